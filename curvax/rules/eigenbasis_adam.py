"""Adam in the eigenbasis of a gradient's second moments."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from curvax._checks import check_cadence, check_decays
from curvax.rules.bases import (
    AbstractEigenbasisRule,
    EigenSide,
    Turned,
    first_sides,
    projected,
    reordered,
    rotated,
    sides_of,
    turned_sides,
)
from curvax.rules.sides import second_moment


class EigenAdamState(NamedTuple):
    """Adam's moments in the coordinates of the bases, not corrected for their start, and for each
    dimension its basis, or None where it has its own.
    """

    mean: Float[Array, "stack ..."]
    square: Float[Array, "stack ..."]
    sides: tuple[EigenSide | None, ...]


class EigenbasisAdam(AbstractEigenbasisRule):
    """Adam in the coordinates of an eigenbasis of GGᵀ for each dimension: SOAP (Vyas et al. 2024,
    algorithms 3 and 4).

    In step t the gradient is projected on the bases Q, Adam's direction in these coordinates is
    projected back, and then the second moments take up the gradient. A refresh turns Q towards
    their eigenvectors, sorts the columns by eigenvalue, rotates Adam's mean along, and puts its
    squares in the new order. It is due after the steps T, 2T, …, and done before the step that is
    next. The first step only begins the moments, whose eigendecomposition is the first basis: its
    direction is zero.

    **Arguments:**

    - `b1`, `b2`, `eps`: Adam's.
    - `decay`: of the second moments; None is `b2`.
    - `refresh_every`: T.
    - `longest`: longer dimensions keep their own coordinates.
    - `one_sided`: only the shortest dimension has a basis.
    - `tolerance`: of [`turned`][curvax.eigenbasis.turned].
    """

    b1: ScalarLike = 0.95
    b2: ScalarLike = 0.95
    eps: ScalarLike = 1e-8
    decay: ScalarLike | None = None
    refresh_every: int = eqx.field(static=True, default=10)
    longest: int | None = eqx.field(static=True, default=None)
    one_sided: bool = eqx.field(static=True, default=False)
    tolerance: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_decays(b1=self.b1, b2=self.b2, decay=self.decay)
        check_cadence("refresh_every", self.refresh_every)

    def init(self, stack: Array) -> EigenAdamState:
        sides = first_sides(stack, self.longest, self.one_sided)
        return EigenAdamState(stack, jnp.zeros_like(stack), sides)

    def turns(self, sides: Sequence[Any], first: Bool[Array, ""]) -> Sequence[Turned]:
        return turned_sides(sides, first, tolerance=self.tolerance)

    def turned(self, state: EigenAdamState, turns: Sequence[Turned | None]) -> EigenAdamState:
        mean, square, _ = state
        return EigenAdamState(rotated(mean, turns), reordered(square, turns), sides_of(turns))

    def step(
        self, gradient: Array, state: EigenAdamState, count: Int[Array, ""]
    ) -> tuple[Array, EigenAdamState]:
        dtype = gradient.dtype
        b1, b2, eps = (jnp.asarray(each, dtype) for each in (self.b1, self.b2, self.eps))
        decay = b2 if self.decay is None else jnp.asarray(self.decay, dtype)
        begun = (count > 0).astype(dtype)
        steps = jnp.maximum(count, 1).astype(dtype)
        seen = projected(gradient, state.sides)
        mean = state.mean + begun * (1 - b1) * (seen - state.mean)
        square = state.square + begun * (1 - b2) * (jnp.square(seen) - state.square)
        correction = jnp.sqrt(1 - b2**steps) / (1 - b1**steps)
        step = projected(mean / (jnp.sqrt(square) + eps), state.sides, back=True) * correction
        sides = tuple(
            side
            and side._replace(
                factor=decay * side.factor + (1 - decay) * second_moment(gradient, dim)
            )
            for dim, side in enumerate(state.sides)
        )
        return step, EigenAdamState(mean, square, sides)
