"""Rules one behind the other."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Bool, Int

from curvax.rules.base import AbstractTensorRule


class Chained(AbstractTensorRule):
    """One rule after the other: what one makes of a gradient is the gradient of the next.

    **Arguments:** `rules`. The state of a stack is a tuple of theirs.
    """

    rules: tuple[AbstractTensorRule, ...]

    def __init__(self, *rules: AbstractTensorRule):
        self.rules = rules
        for rule in rules[1:]:
            if type(rule).observe is not AbstractTensorRule.observe:
                raise ValueError(
                    f"rules: got {type(rule).__name__} behind another, wanted it first: it "
                    "observes the gradient before anything is made of it."
                )

    def init(self, stack: Array) -> tuple[Any, ...]:
        return tuple(rule.init(stack) for rule in self.rules)

    def update(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> tuple[Sequence[Array], Sequence[Any]]:
        kept: list[Sequence[Any]] = []
        for i, rule in enumerate(self.rules):
            stacks, new = rule.update(stacks, [state[i] for state in states], count)
            kept.append(new)
        return stacks, [tuple(each[i] for each in kept) for i in range(len(stacks))]

    def observe(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> Sequence[Any]:
        first = self.rules[0].observe(stacks, [state[0] for state in states], count)
        return [(new, *state[1:]) for new, state in zip(first, states, strict=True)]

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""] | None:
        dues = [due for rule in self.rules if (due := rule.due(count)) is not None]
        return functools.reduce(operator.or_, dues) if dues else None

    def refresh(self, states: Sequence[Any], count: Int[Array, ""]) -> Sequence[Any]:
        columns = [list(column) for column in zip(*states, strict=True)]
        for i, rule in enumerate(self.rules):
            due = rule.due(count)
            if due is not None:
                fresh = lambda states, rule=rule: list(rule.refresh(states, count))
                columns[i] = jax.lax.cond(due, fresh, lambda states: states, columns[i])
        return list(zip(*columns, strict=True))
