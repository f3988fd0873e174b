"""K-FAC with the eigenvalues corrected: EK-FAC."""

from jaxtyping import ScalarLike

from curvax.blockwise import (
    AbstractFactorDamping,
    EigenPreconditioner,
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


def ekfac(
    objective: Objective,
    *,
    refresh_every: int = 10,
    fisher: FisherKind = "mc",
    samples: int = 1,
    sharing: Sharing = "expand",
    damping: AbstractDamping | ScalarLike = 1e-2,
    split: AbstractFactorDamping = RelativeTikhonov(),
    scaling: AbstractScaling = KLClip(),
    decay: float = 0.9,
    diagonal: tuple[str, ...] = (),
) -> Method:
    """The inverse of second moments of the gradient in the eigenbasis of the Kronecker factors."""
    recipe = Recipe(None, fisher, samples, sharing, diagonal)
    factors = EigenPreconditioner(recipe, refresh_every, 1, decay, split)
    return precondition(objective, factors, damping=damping, scaling=scaling)
