"""Leading eigenvectors of second moments that are never formed, and what belongs to their
coordinates: all that is outside of their span counts as one more.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvax._linalg import matmul, transposed
from curvax._stacks import identities, pick
from curvax.eigenbasis import turned
from curvax.operators.factors import LowRankFactor
from curvax.refresh import first_factor
from curvax.rules.low_rank import renewed
from curvax.rules.sides import along
from curvax.taps.blocks import Form

# What is left of a sum of squares when another is taken away is known to so many rounding errors:
# on a GPU products have 16 bits.
_ROUNDING = 128


class SubspaceSide(NamedTuple):
    """Of a dimension of length n the leading eigenvectors Q of its second moment F, and the moving
    average of FQ, in which what F was before the last refresh is its part in their span. `age` and
    `failures` as of `EigenSide`.
    """

    basis: Float[Array, "stack n k"]
    sketch: Float[Array, "stack n k"]
    age: Int[Array, " stack"]
    failures: Int[Array, " stack"]

    @property
    def resting(self) -> Any:
        """What only refreshes read."""
        return self.sketch


class Mixed(NamedTuple):
    """A side with its basis anew, and of each new coordinate the squares of its cosines with the
    old ones; all that is outside counts as one coordinate, the last.
    """

    side: SubspaceSide
    shares: Float[Array, "stack coordinates coordinates"]

    def reordered(self, stack: Array, dim: int) -> Array:
        """Second moments of the old coordinates as those of the new ones, if the old ones are not
        correlated. Their sum stays, with the last counted as often as there are dimensions outside.
        """
        return along(stack, self.shares, dim)


def mean_squares(stack: Array, bases: dict[int, Array]) -> Array:
    """The squares of tensors in the coordinates of bases along some dimensions, with one more in
    each: the mean of those outside of its span.
    """
    if not bases:
        return jnp.square(stack)
    (dim, basis), *others = bases.items()
    rest = dict(others)
    total = lambda squares: jnp.sum(squares, dim + 1, keepdims=True)
    inside = mean_squares(along(stack, basis, dim, transpose=True), rest)
    # By Pythagoras, so that nothing of the size of the tensors is written.
    whole = total(mean_squares(stack, rest))
    least = _ROUNDING * float(jnp.finfo(stack.dtype).eps) * whole
    outside = jnp.maximum(whole - total(inside), least) / (basis.shape[1] - basis.shape[2])
    return jnp.concatenate([inside, outside], dim + 1)


def scaled(stack: Array, scales: Array, bases: dict[int, Array]) -> Array:
    """Tensors with their coordinates multiplied, those outside of a span by its last scale."""
    if not bases:
        return scales * stack
    (dim, basis), *others = bases.items()
    rest, columns = dict(others), basis.shape[2]
    inner, last = jnp.split(scales, [columns], axis=dim + 1)
    inside = along(stack, basis, dim, transpose=True)
    return scaled(stack, last, rest) + along(scaled(inside, inner - last, rest), basis, dim)


def first_subspace(form: Form, stack: int, dtype: Any, seed: int) -> SubspaceSide:
    """Nothing measured, and some basis: one for all, so that layers in one array are as apart."""
    factor = cast(LowRankFactor, first_factor(form, 1, dtype, seed).factor)
    basis = jnp.repeat(cast(Array, factor.basis), stack, axis=0)
    count = lambda: jnp.zeros((stack,), jnp.int32)
    return SubspaceSide(basis, jnp.zeros_like(basis), count(), count())


def mixed_sides(sides: Sequence[SubspaceSide], first: Bool[Array, ""]) -> list[Mixed]:
    """With bases from their sketches. One that could not be made stays, and is counted."""
    factors, traces = [], []
    for side in sides:
        traces.append(jnp.sum(side.basis * side.sketch, (1, 2)))
        core = jnp.zeros_like(side.sketch[:, : side.sketch.shape[2]])
        factors.append(LowRankFactor(side.basis, core, jnp.zeros_like(traces[-1])))
    new = renewed(factors, [side.sketch for side in sides], traces)
    cores = [factor.core for factor, _ in new]
    starts = [identities(core.shape[0], core.shape[1], core.dtype) for core in cores]
    results = []
    turns = turned(cores, starts, first)
    for side, (factor, ok), turn in zip(sides, new, turns, strict=True):
        basis = cast(Array, factor.basis)
        pair = matmul(basis, turn.basis), matmul(basis, matmul(factor.core, turn.basis))
        ok = ok & turn.ok
        basis, sketch = pick(ok, pair, (side.basis, side.sketch))
        age = jnp.where(ok, 0, side.age + 1)
        failures = side.failures + (~ok).astype(jnp.int32)
        shares = _shares(matmul(transposed(basis), side.basis), basis.shape[1])
        results.append(Mixed(SubspaceSide(basis, sketch, age, failures), shares))
    return results


def _shares(cosines: Array, size: int) -> Array:
    """From those of the new columns (rows) with the old."""
    inside = jnp.square(cosines)
    left = lambda axis: jnp.maximum(1 - jnp.sum(inside, axis, keepdims=True), 0)
    # For each dimension outside: there are so many, and a new one is any of them.
    lost = left(1) / (size - cosines.shape[-1])
    kept = 1 - jnp.sum(lost, 2, keepdims=True)
    top = jnp.concatenate([inside, left(2)], axis=2)
    return jnp.concatenate([top, jnp.concatenate([lost, kept], axis=2)], axis=1)
