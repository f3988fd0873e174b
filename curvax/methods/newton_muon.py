"""Muon on a gradient that is preconditioned on its input side."""

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
from curvax.scalings import AbstractScaling, Orthogonalised
from curvax.transform import Method


def newton_muon(
    objective: Objective,
    *,
    rank: float | int | None = 0.15,
    refresh_every: int = 10,
    damping: AbstractDamping | ScalarLike = 1e-2,
    split: AbstractFactorDamping = RelativeTikhonov(),
    scaling: AbstractScaling = Orthogonalised(),
    decay: float = 0.9,
    stagger: int = 1,
    diagonal: tuple[str, ...] = (),
) -> Method:
    """A⁻¹ from low-rank, forward-only factors, then an orthogonalised step."""
    recipe = Recipe(rank, "forward_only", 1, "expand", diagonal)
    factors = KroneckerPreconditioner(recipe, refresh_every, stagger, decay, split)
    return precondition(objective, factors, damping=damping, scaling=scaling)
