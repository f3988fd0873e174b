"""Kronecker-factored curvature: K-FAC."""

from jaxtyping import ScalarLike

from curvax.blockwise import (
    AbstractFactorDamping,
    KroneckerPreconditioner,
    RelativeTikhonov,
    precondition,
)
from curvax.damping import AbstractDamping
from curvax.objective import Objective
from curvax.plan.moments import Recipe
from curvax.scalings import AbstractScaling, KLClip
from curvax.taps.moments import FisherKind
from curvax.taps.statistics import Sharing
from curvax.transform import Method


def kfac(
    objective: Objective,
    *,
    rank: float | int | None = 0.15,
    refresh_every: int = 10,
    fisher: FisherKind = "mc",
    samples: int = 1,
    sharing: Sharing = "expand",
    damping: AbstractDamping | ScalarLike = 1e-2,
    split: AbstractFactorDamping = RelativeTikhonov(),
    scaling: AbstractScaling = KLClip(),
    decay: float = 0.9,
    stagger: int = 1,
    diagonal: tuple[str, ...] = (),
) -> Method:
    """(A + γ_A I)⁻¹ and (G + γ_G I)⁻¹ on the two sides of each weight's gradient."""
    recipe = Recipe(rank, fisher, samples, sharing, diagonal)
    factors = KroneckerPreconditioner(recipe, refresh_every, stagger, decay, split)
    return precondition(objective, factors, damping=damping, scaling=scaling)
