"""Second moments that are held at low rank, with one eigenvalue for all that is outside."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from curvax._linalg import einsum, matmul, shifted
from curvax._stacks import pick
from curvax.operators.factors import LowRankFactor
from curvax.refresh import FactorMemory, first_factor, refresh
from curvax.roots import AbstractInverseRoot, RootState, first_root, largest_eigenvalue
from curvax.rules.sides import along, names_of
from curvax.taps.blocks import Form
from curvax.taps.statistics import Moment


class LowRankSide(NamedTuple):
    """Of a dimension of length n the second moment F as QMQᵀ + τ(I − QQᵀ), Q n × k, and its inverse
    root.

    `factor` is that of the last refresh. Since then the moving averages of `sketch`, FQ, and of the
    `trace` of F have seen every gradient. `root` is that of M, and `outside` that of τ.
    """

    factor: LowRankFactor
    sketch: Float[Array, "stack n k"]
    trace: Float[Array, " stack"]
    root: RootState
    outside: Float[Array, " stack"]

    @property
    def resting(self) -> Any:
        """What only refreshes read."""
        return self.sketch

    def measured(self, stack: Array, dim: int, decay: Array, weight: Array) -> "LowRankSide":
        """After a gradient, by two products with Q."""
        product = sketched(stack, cast(Array, self.factor.basis), dim)
        trace = jnp.sum(jnp.square(stack), range(1, stack.ndim))
        return self._replace(
            sketch=decay * self.sketch + weight * product,
            trace=decay * self.trace + weight * trace,
        )

    def applied(self, stack: Array, dim: int) -> Array:
        """The inverse root times each vector along a dimension."""
        basis = cast(Array, self.factor.basis)
        inside = along(stack, basis, dim, transpose=True)
        inside = along(inside, shifted(self.root.root, -self.outside), dim)
        outside = self.outside.reshape(-1, *(1,) * (stack.ndim - 1))
        return outside * stack + along(inside, basis, dim)


def sketched(stack: Array, basis: Array, dim: int) -> Float[Array, "stack n k"]:
    """The second moment along a dimension times Q, without the moment."""
    names = names_of(stack)
    thin = along(stack, basis, dim, transpose=True)
    other = names.replace(names[dim], "z")
    return einsum(f"s{names},s{other}->s{names[dim]}z", stack, thin)


def renewed(
    factors: Sequence[LowRankFactor], sketches: Sequence[Array], traces: Sequence[Array]
) -> list[tuple[LowRankFactor, Bool[Array, " stack"]]]:
    """Factors from the sketches FQ in their bases and the traces of F, by one pass of a Nyström
    approximation, and whether they are finite; those that are not stay as they are.
    """
    memories = []
    for factor in factors:
        # One that has no past is all moment.
        none = jnp.zeros(factor.tail.shape, jnp.int32)
        memories.append(FactorMemory(factor, factor, none, none))
    done = refresh(memories, list(map(Moment, sketches, traces)), 1.0)
    return [(cast(LowRankFactor, memory.factor), memory.updates > 0) for memory in done]


def first_low_rank(
    config: AbstractInverseRoot, stack: int, size: int, columns: int, dtype: Any, seed: int
) -> LowRankSide:
    """Nothing measured, and the identity."""
    factor = first_factor(Form("sketch", size, columns), stack, dtype, seed).factor
    return LowRankSide(
        factor=cast(LowRankFactor, factor),
        sketch=jnp.zeros((stack, size, columns), dtype),
        trace=jnp.zeros((stack,), dtype),
        root=first_root(config, stack, columns, dtype),
        outside=jnp.ones((stack,), dtype),
    )


def refreshed_sides(sides: Sequence[LowRankSide]) -> list[LowRankSide]:
    """With factors from their sketches."""
    columns = ([getattr(side, name) for side in sides] for name in ("factor", "sketch", "trace"))
    results = []
    for side, (factor, ok) in zip(sides, renewed(*columns), strict=True):
        sketch = matmul(cast(Array, factor.basis), factor.core)
        failures = side.root.failures + (~ok).astype(jnp.int32)
        results.append(
            side._replace(
                factor=factor,
                sketch=pick(ok, sketch, side.sketch),
                root=side.root._replace(failures=failures),
            )
        )
    return results


def rooted(
    side: LowRankSide, root: RootState, config: AbstractInverseRoot, exponent: float, scale: Array
) -> LowRankSide:
    """With the root of its core, and that of the eigenvalue outside; both of the factor over
    `scale`.
    """
    largest = largest_eigenvalue(side.factor.core / scale)
    values = side.factor.tail / scale + config.lift(largest)
    fine = (values > 0) & (root.age == 0)
    power = jnp.where(fine, values, 1) ** -exponent
    return side._replace(root=root, outside=jnp.where(fine, power, side.outside))
