"""A gradient whitened by a Kronecker product that is fitted to its covariance."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from curvax._checks import check_cadence, check_decays
from curvax.rules.bases import (
    AbstractEigenbasisRule,
    EigenSide,
    Turned,
    first_sides,
    projected,
    rotated,
    sides_of,
    turned_sides,
)
from curvax.rules.sides import second_moment, spread


class CovarianceState(NamedTuple):
    """The moving average of the gradient in the coordinates of the bases; for each dimension its
    factor and basis, and the eigenvalues in that basis, or None.
    """

    mean: Float[Array, "stack ..."]
    sides: tuple[EigenSide | None, ...]
    values: tuple[Float[Array, "stack n"] | None, ...]


class KroneckerCovariance(AbstractEigenbasisRule):
    """S^−½ of the mean gradient, with S = S₁ ⊗ S₂ ⊗ … near to the gradient's second moment in KL
    divergence: KL-Shampoo (Lin et al. 2025, with the QR scheme).

    Each factor is the moving average of the second moments of gradients that the other factors have
    whitened, Sᵢ ← βSᵢ + (1 − β)(nᵢ/n)(G ×ⱼ≠ᵢ Sⱼ^−½)₍ᵢ₎(…)₍ᵢ₎ᵀ, for m × n matrices L = E[GR⁻¹Gᵀ]/n
    and R = E[GᵀL⁻¹G]/m. Its eigenbasis Q is turned by a QR step every T steps; the eigenvalues λ
    are moving averages of their own, of diag(Qᵀ · Q) of the same matrix, in every step, so that
    they fit to the Q that is there. Wherever a factor is inverted, it is Q diag(λ) Qᵀ.

    Steps are as those of [`EigenbasisAdam`][curvax.EigenbasisAdam]: the direction first, then
    the factors, and then, every T steps, the bases. The first step begins the factors, with nothing
    whitened, and has a direction of zero.

    **Arguments:**

    - `b1`: of the mean gradient, which is not corrected for its start.
    - `b2`: β.
    - `eps`: is added to λ₁^½ λ₂^½ ….
    - `initial`: the first eigenvalues.
    - `limit`: λ^−½ of a dimension of length n is at most max(10, min(n, limit)); None for no limit.
    - `refresh_every`: T.
    - `longest`: longer dimensions have no factor.
    - `one_sided`: only the shortest dimension has one.
    """

    b1: ScalarLike = 0.9
    b2: ScalarLike = 0.98
    eps: ScalarLike = 1e-8
    initial: ScalarLike = 0.1
    limit: ScalarLike | None = 4000.0
    refresh_every: int = eqx.field(static=True, default=10)
    longest: int | None = eqx.field(static=True, default=None)
    one_sided: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_decays(b1=self.b1, b2=self.b2)
        check_cadence("refresh_every", self.refresh_every)
        if isinstance(self.initial, int | float) and not self.initial > 0:
            raise ValueError(f"initial: got {self.initial}, wanted a positive number.")

    def init(self, stack: Array) -> CovarianceState:
        sides = first_sides(stack, self.longest, self.one_sided)
        initial = jnp.asarray(self.initial, stack.dtype)
        values = tuple(
            None if side is None else jnp.full(side.factor.shape[:2], initial) for side in sides
        )
        return CovarianceState(stack, sides, values)

    def turns(self, sides: Sequence[Any], first: Bool[Array, ""]) -> Sequence[Turned]:
        return turned_sides(sides, first, sort=False)

    def turned(self, state: CovarianceState, turns: Sequence[Turned | None]) -> CovarianceState:
        return CovarianceState(rotated(state.mean, turns), sides_of(turns), state.values)

    def step(
        self, gradient: Array, state: CovarianceState, count: Int[Array, ""]
    ) -> tuple[Array, CovarianceState]:
        dtype, order = gradient.dtype, gradient.ndim - 1
        b1, b2, eps = (jnp.asarray(each, dtype) for each in (self.b1, self.b2, self.eps))
        begun = count > 0
        inverse = [
            None if each is None else spread(jax.lax.rsqrt(each), dim, order)
            for dim, each in enumerate(state.values)
        ]

        def whitened(tensors: Array, skipped: int | None = None) -> Array:
            for dim, each in enumerate(inverse):
                if each is not None and dim != skipped:
                    tensors = tensors * jnp.where(begun, each, 1)
            return tensors

        # In all coordinates but one, in turn; and from the last of these in all.
        partly = [projected(gradient, state.sides, skipped=dim) for dim in range(order)]
        last = [side if dim == order - 1 else None for dim, side in enumerate(state.sides)]
        seen = projected(partly[-1], last)

        mean = state.mean + jnp.where(begun, 1 - b1, 0) * (seen - state.mean)
        scale = whitened(jnp.ones((), dtype))
        step = projected(mean * (scale / (1 + eps * scale)), state.sides, back=True)

        sides, values = list(state.sides), list(state.values)
        for dim, (side, each) in enumerate(zip(state.sides, state.values, strict=True)):
            if side is None or each is None:
                continue
            others = [i for i in range(1, order + 1) if i != dim + 1]
            share = math.prod(gradient.shape[i] for i in others)
            moment = second_moment(whitened(partly[dim], dim), dim) / share
            sides[dim] = side._replace(factor=b2 * side.factor + (1 - b2) * moment)
            square = jnp.mean(jnp.square(whitened(seen, dim)), others)
            new = jnp.maximum(b2 * each + (1 - b2) * square, self._floor(each))
            values[dim] = jnp.where(begun, new, each)
        return step, CovarianceState(mean, tuple(sides), tuple(values))

    def _floor(self, values: Array) -> Array:
        if self.limit is None:
            return jnp.asarray(jnp.finfo(values.dtype).tiny, values.dtype)
        most = jnp.minimum(jnp.asarray(self.limit, values.dtype), values.shape[-1])
        return 1 / jnp.square(jnp.maximum(most, 10))
