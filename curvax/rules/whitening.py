"""A preconditioner that is fitted until what it makes of gradients is white."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, ScalarLike, UInt32

from curvax._linalg import matmul, transposed
from curvax._triangular import solve_transposed, triangular_product
from curvax.rules.base import AbstractTensorRule
from curvax.rules.sides import along, second_moment, spread, with_factor

Factors = tuple[Array, ...]

# Larger factors are multiplied in blocks.
_BLOCK = 512


class WhiteningState(NamedTuple):
    """Q₁ ⊗ Q₂ ⊗ …: for each dimension of length n upper triangular matrices (stack, n, n), or
    diagonals (stack, n).

    `waited` counts the steps since they were last fitted; `key` is what random vectors are drawn
    from, together with the number of the step and that of the stack.
    """

    factors: Factors
    waited: Int[Array, ""]
    key: UInt32[Array, "..."]


def annealed(count: Array) -> Array:
    """1 for 500 steps, and then exp(−t/1000), but no less than 0.03."""
    late = (count - 499).astype(jnp.float32)
    return jnp.clip(jnp.exp(-late / 1000), 0.03, 1.0)


class TriangularWhitening(AbstractTensorRule):
    """QᵀQ g for each tensor g, with Q = Q₁ ⊗ Q₂ ⊗ … for which E[|Qg|² + |Q⁻ᵀv|²] is least, v being
    random: QᵀQ is near E[ggᵀ]^−½ then, and what it makes of gradients is white.

    PSGD (Li 2018; Li 2019; Pooladzandi & Li 2024): a step of relative gradient descent on the group
    of triangular matrices, Q ← Q − ηEQ, stays in the group and needs no inverse root. With a = Qg,
    b = Q⁻ᵀv, and aaᵀ summed over all other dimensions, a fit of the factor of one is

        Qᵢ ← Qᵢ − η triu(aaᵀ − bbᵀ) Qᵢ / ‖aaᵀ + bbᵀ‖,

    where the norm is the largest entry for diagonals, for matrices a bound below the spectral norm.
    Factors are then balanced, so that none grows while another shrinks. To the g that Q is fitted
    to, √ε v with ε that of float32 is added, times its mean absolute value: Q stays bounded where
    gradients are zero.

    **Arguments:**

    - `probability`: p of a fit in a step, or a schedule of it: 1/p steps after the last one is the
      next, so that nothing is left to chance. None is a schedule that is 1 for 500 steps, and then
      falls as exp(−t/1000) down to 0.03.
    - `rate`: η.
    - `longest`: dimensions that are longer have diagonals; vectors always.
    - `one_sided`: only the shortest dimension has a matrix.
    - `limit`: of the root mean square of a result, which would be 1 if it were white; None for no
      limit.
    - `scale`: the first Q, as a multiple of the identity.
    - `seed`: of the random vectors.
    """

    probability: ScalarLike | Callable[[Array], Any] | None = None
    rate: ScalarLike = 0.1
    longest: int = eqx.field(static=True, default=8192)
    one_sided: bool = eqx.field(static=True, default=False)
    limit: ScalarLike | None = 1.1
    scale: ScalarLike = 1.0
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        chance = self.probability
        if isinstance(chance, int | float) and not 0 < chance <= 1:
            raise ValueError(f"probability: got {chance}, wanted a number in (0, 1].")
        for name in ("rate", "limit", "scale"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{name}: got {value}, wanted a positive number.")

    def init(self, stack: Array) -> WhiteningState:
        count, *shape = stack.shape
        root = jnp.asarray(self.scale, stack.dtype) ** (1 / len(shape))
        full = with_factor(tuple(shape), self.longest, self.one_sided)

        def factor(size: int, full: bool) -> Array:
            if not full or len(shape) == 1 or size == 1:
                return jnp.full((count, size), root)
            return jnp.broadcast_to(root * jnp.eye(size, dtype=stack.dtype), (count, size, size))

        factors = tuple(factor(*each) for each in zip(shape, full, strict=True))
        key = jax.random.key_data(jax.random.key(self.seed))
        return WhiteningState(factors, jnp.zeros((), jnp.int32), key)

    def update(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> tuple[Sequence[Array], Sequence[Any]]:
        if not stacks:
            return stacks, states
        held = [state.factors for state in states]
        # A hair less, as a device may round 1/(1/k) up.
        waited = (states[0].waited + 1).astype(jnp.float32)
        due = waited >= (1 - 1e-6) / self._chance(count)

        def fitted(held: list[Factors]) -> list[Factors]:
            results = []
            for i, (factors, stack, state) in enumerate(zip(held, stacks, states, strict=True)):
                key = jax.random.fold_in(jax.random.wrap_key_data(state.key), count)
                results.append(self._fitted(factors, stack, jax.random.fold_in(key, i)))
            return results

        held = jax.lax.cond(due, fitted, lambda held: held, held)
        new = [
            state._replace(factors=factors, waited=jnp.where(due, 0, state.waited + 1))
            for factors, state in zip(held, states, strict=True)
        ]
        return [self._applied(*pair) for pair in zip(held, stacks, strict=True)], new

    def _chance(self, count: Array) -> Array:
        chance = annealed if self.probability is None else self.probability
        with jax.numpy_dtype_promotion("standard"):  # schedules of Optax need it
            return jnp.asarray(chance(count) if callable(chance) else chance).astype(jnp.float32)

    def _fitted(self, factors: Factors, gradient: Array, key: PRNGKeyArray) -> Factors:
        noise = jax.random.normal(key, gradient.shape, gradient.dtype)
        size = jnp.mean(jnp.abs(gradient), tuple(range(1, gradient.ndim)), keepdims=True)
        a = gradient + math.sqrt(jnp.finfo(jnp.float32).eps) * size * noise
        b = noise
        for dim, factor in enumerate(factors):
            a = _times(factor, a, dim)
            b = _solved(factor, b, dim)
        largest = [jnp.max(jnp.abs(each), tuple(range(1, each.ndim))) for each in factors]
        middle = jnp.exp(sum(map(jnp.log, largest)) / len(factors))
        return tuple(
            self._moved(factor, _moment(factor, a, dim), _moment(factor, b, dim), middle / most)
            for dim, (factor, most) in enumerate(zip(factors, largest, strict=True))
        )

    def _moved(self, factor: Array, aa: Array, bb: Array, balance: Array) -> Array:
        """η of the way, with its share of the balance."""
        if factor.ndim == 2:
            norm = jnp.max(jnp.abs(aa + bb), axis=1)
            move = (aa - bb) * factor
        else:
            norm = _norm_bound(aa + bb)
            move = triangular_product(jnp.triu(aa - bb), factor)
        # What is not finite in a or b is not so in the norm.
        usable = (norm > 0) & jnp.isfinite(norm) & jnp.isfinite(balance)
        step = jnp.asarray(self.rate, norm.dtype) / jnp.where(usable, norm, 1)
        wide = lambda each: each.reshape(-1, *[1] * (factor.ndim - 1))
        return jnp.where(wide(usable), wide(balance) * (factor - wide(step) * move), factor)

    def _applied(self, factors: Factors, gradient: Array) -> Array:
        for dim, factor in enumerate(factors):
            if factor.ndim == 2:
                gradient = gradient * spread(factor * factor, dim, gradient.ndim - 1)
            elif factor.size < gradient.size:  # cheaper than Qᵀ(Qg)
                gradient = along(gradient, matmul(transposed(factor), factor), dim)
            else:
                gradient = _times(factor, _times(factor, gradient, dim), dim, transpose=True)
        if self.limit is None:
            return gradient
        square = jnp.mean(jnp.square(gradient), tuple(range(1, gradient.ndim)), keepdims=True)
        return gradient / jnp.maximum(jnp.sqrt(square) / jnp.asarray(self.limit, square.dtype), 1)


def _times(factor: Array, stack: Array, dim: int, *, transpose: bool = False) -> Array:
    """Q, or Qᵀ, times each vector along a dimension, without what is zero in large blocks."""
    if factor.ndim == 2:
        return stack * spread(factor, dim, stack.ndim - 1)
    size = factor.shape[-1]
    if size <= _BLOCK:
        return along(stack, factor, dim, transpose=transpose)
    half = size // 2
    first, second = (
        jax.lax.slice_in_dim(stack, *ends, axis=dim + 1) for ends in ((0, half), (half, size))
    )
    corner = along(
        first if transpose else second, factor[:, :half, half:], dim, transpose=transpose
    )
    ahead = _times(factor[:, :half, :half], first, dim, transpose=transpose)
    behind = _times(factor[:, half:, half:], second, dim, transpose=transpose)
    parts = [ahead, behind + corner] if transpose else [ahead + corner, behind]
    return jnp.concatenate(parts, axis=dim + 1)


def _solved(factor: Array, stack: Array, dim: int) -> Array:
    """Q⁻ᵀ times each vector along a dimension."""
    if factor.ndim == 2:
        return stack / spread(factor, dim, stack.ndim - 1)
    moved = jnp.moveaxis(stack, dim + 1, 1)
    solved = solve_transposed(factor, moved.reshape(*moved.shape[:2], -1))
    return jnp.moveaxis(solved.reshape(moved.shape), 1, dim + 1)


def _moment(factor: Array, stack: Array, dim: int) -> Array:
    if factor.ndim == 2:
        others = tuple(i + 1 for i in range(stack.ndim - 1) if i != dim)
        return jnp.sum(jnp.square(stack), others)
    return second_moment(stack, dim)


def _norm_bound(matrices: Array) -> Array:
    """|H²c|/|Hc| of symmetric H, with c the longest column: below the spectral norm, and for most
    matrices by less than √2.
    """
    largest = jnp.max(jnp.abs(matrices), axis=(1, 2), keepdims=True)
    scaled = matrices / jnp.where(largest > 0, largest, 1)
    longest = jnp.argmax(jnp.sum(jnp.square(scaled), axis=1), axis=1)
    first = matmul(scaled, jnp.take_along_axis(scaled, longest[:, None, None], axis=2))
    length = lambda vectors: jnp.sqrt(jnp.sum(jnp.square(vectors), axis=(1, 2)))
    return largest[:, 0, 0] * length(matmul(scaled, first)) / length(first)
