"""Dimensions whose second moments have eigenbases, and what is kept in these coordinates."""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvax._linalg import applied
from curvax._stacks import Groups, identities
from curvax.eigenbasis import Turn, turned
from curvax.rules.base import AbstractTensorRule
from curvax.rules.sides import along, spread, with_factor


class EigenSide(NamedTuple):
    """Of a dimension of length n the second moment, and an eigenbasis of it.

    `age` counts the refreshes since the last that succeeded, `failures` those that did not.
    """

    factor: Float[Array, "stack n n"]
    basis: Float[Array, "stack n n"]
    age: Int[Array, " stack"]
    failures: Int[Array, " stack"]

    @property
    def resting(self) -> Any:
        """What only refreshes read."""
        return self.factor


class Turned(NamedTuple):
    """A side with its basis anew, the old coordinates in the new ones, and their order."""

    side: EigenSide
    rotation: Float[Array, "stack n n"]
    order: Int[Array, "stack n"]

    def reordered(self, stack: Array, dim: int) -> Array:
        """What belongs to each coordinate along a dimension, in the order that they have now."""
        order = spread(self.order, dim, stack.ndim - 1)
        return jnp.take_along_axis(stack, order, axis=dim + 1)


class AbstractEigenbasisRule(AbstractTensorRule):
    """What keeps something in the coordinates of bases that are turned every T steps.

    The bases are those of the gradients before: a refresh is due after the steps 1, T + 1, 2T + 1,
    …, and done before the step that is next. The first step only begins the second moments.
    """

    refresh_every: eqx.AbstractVar[int]

    @abc.abstractmethod
    def turns(self, sides: Sequence[Any], first: Bool[Array, ""]) -> Sequence[Any]:
        """All sides that there are, with their bases anew; `first` where there were none yet."""

    @abc.abstractmethod
    def turned(self, state: Any, turns: Sequence[Any]) -> Any:
        """The state of a stack in the new coordinates; None for a dimension without a side."""

    @abc.abstractmethod
    def step(self, gradient: Array, state: Any, count: Int[Array, ""]) -> tuple[Array, Any]:
        """The direction of one stack, and its new state."""

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        return (count > 0) & ((count - 1) % self.refresh_every == 0)

    def refresh(self, states: Sequence[Any], count: Int[Array, ""]) -> Sequence[Any]:
        present = [side for state in states for side in state.sides if side is not None]
        found = iter(self.turns(present, count == 1))
        turns = [[None if side is None else next(found) for side in s.sides] for s in states]
        return list(map(self.turned, states, turns))

    def update(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> tuple[Sequence[Array], Sequence[Any]]:
        pairs = [self.step(*pair, count) for pair in zip(stacks, states, strict=True)]
        return [step for step, _ in pairs], [state for _, state in pairs]


def first_side(stack: int, size: int, dtype: Any) -> EigenSide:
    """Nothing measured, and the identity."""
    count = lambda: jnp.zeros((stack,), jnp.int32)
    zeros = jnp.zeros((stack, size, size), dtype)
    return EigenSide(zeros, identities(stack, size, dtype), count(), count())


def first_sides(stack: Array, longest: int | None, one_sided: bool) -> tuple[EigenSide | None, ...]:
    """Those of the dimensions of a stack that have one."""
    count, *shape = stack.shape
    has = with_factor(tuple(shape), longest, one_sided)
    pairs = zip(shape, has, strict=True)
    return tuple(first_side(count, n, stack.dtype) if there else None for n, there in pairs)


def sides_of(turns: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(None if turn is None else turn.side for turn in turns)


def turned_sides(
    sides: Sequence[EigenSide],
    first: Bool[Array, ""],
    *,
    tolerance: float | None = None,
    sort: bool = True,
) -> list[Turned]:
    """By [`turned`][curvax.eigenbasis.turned], those of equal size together. A basis that could not
    be turned stays, and is counted.
    """

    def anew(_: Any, sides: list[EigenSide]) -> list[tuple[Turn, Array]]:
        turns = turned(
            [side.factor for side in sides],
            [side.basis for side in sides],
            first,
            tolerance=tolerance,
            sort=sort,
        )
        return [
            (turn, applied("snk,snm->skm", turn.basis, side.basis))
            for side, turn in zip(sides, turns, strict=True)
        ]

    groups = Groups([(side.factor.shape[-1], side.factor.dtype) for side in sides], sides)
    results = []
    for side, (turn, rotation) in zip(sides, groups.map(anew, sides), strict=True):
        age = jnp.where(turn.ok, 0, side.age + 1)
        failures = side.failures + (~turn.ok).astype(jnp.int32)
        new = EigenSide(side.factor, turn.basis, age, failures)
        results.append(Turned(new, rotation, turn.order))
    return results


def projected(
    stack: Array,
    sides: Sequence[EigenSide | None],
    *,
    back: bool = False,
    skipped: int | None = None,
) -> Array:
    """Tensors in the coordinates of the bases, or `back` from them; along one dimension as they
    are, if it is to be skipped.
    """
    for dim, side in enumerate(sides):
        if side is not None and dim != skipped:
            stack = along(stack, side.basis, dim, transpose=not back)
    return stack


def rotated(stack: Array, turns: Sequence[Turned | None]) -> Array:
    """Tensors in old coordinates in the new ones."""
    for dim, turn in enumerate(turns):
        if turn is not None:
            stack = along(stack, turn.rotation, dim)
    return stack


def reordered(stack: Array, turns: Sequence[Any]) -> Array:
    """What belongs to each coordinate, in the order that they have now."""
    for dim, turn in enumerate(turns):
        if turn is not None:
            stack = turn.reordered(stack, dim)
    return stack
