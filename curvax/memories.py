"""What a state keeps of the blocks of K-FAC and EK-FAC."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from curvax.refresh import FactorMemory
from curvax.taps.blocks import DiagonalBlock

# The path of each block of a memory, and how many entries of its stack are its own.
Parts = tuple[tuple[str, int], ...]


class AbstractMemory(eqx.Module):
    """What a state keeps of blocks of equal form, in one stack.

    It goes by the path of the first. All arrays have the stack in front, but for `refreshed`, the
    step of the last refresh, −1 before the first.
    """

    refreshed: eqx.AbstractVar[Int[Array, ""]]
    parts: eqx.AbstractVar[Parts]

    def with_(self, **fields: Any) -> Any:
        """With other arrays in some fields."""
        return dataclasses.replace(self, **fields)

    def split(self) -> Iterator[tuple[str, Any]]:
        """The memory of each block by itself, with its path."""
        start = 0
        for path, count in self.parts:
            span = slice(start, start + count)
            own = jax.tree.map(lambda array, span=span: array[span] if array.ndim else array, self)
            yield path, own.with_(parts=((path, count),))
            start += count


class KroneckerMemory(AbstractMemory):
    """The factors of Kronecker blocks."""

    input: FactorMemory
    output: FactorMemory
    refreshed: Int[Array, ""]
    parts: Parts = eqx.field(static=True)


class EigenMemory(AbstractMemory):
    """Factors, their eigenbases, and the second moments of gradients in those."""

    input: FactorMemory
    output: FactorMemory
    input_basis: Float[Array, "stack in in"] | None
    output_basis: Float[Array, "stack out out"] | None
    scales: Float[Array, "stack out in"]
    updates: Int[Array, " stack"]
    refreshed: Int[Array, ""]
    parts: Parts = eqx.field(static=True)

    @property
    def resting(self) -> Any:
        """What only refreshes read."""
        return self.input.resting, self.output.resting


class DiagonalMemory(AbstractMemory):
    """The moving averages of diagonal blocks, each of the shape of its leaf, and what is added to
    them before they are inverted: one number for each layer of a scanned leaf.
    """

    entries: Array
    shift: Array
    updates: Int[Array, " stack"]
    failures: Int[Array, " stack"]
    refreshed: Int[Array, ""]
    parts: Parts = eqx.field(static=True)


def first_diagonal(block: DiagonalBlock, parts: Parts, leaf: Any, dtype: Any) -> DiagonalMemory:
    """Before anything was measured."""
    stack = len(parts)
    return DiagonalMemory(
        entries=jnp.zeros((stack, *leaf.shape), dtype),
        shift=jnp.ones((stack, *leaf.shape[: block.loops]), dtype),
        updates=jnp.zeros((stack,), jnp.int32),
        failures=jnp.zeros((stack,), jnp.int32),
        refreshed=never(),
        parts=parts,
    )


def never() -> Int[Array, ""]:
    """The step of a refresh that has not been."""
    return jnp.full((), -1, jnp.int32)
