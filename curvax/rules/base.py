"""What every rule for the tensors of a gradient answers to."""

import abc
from collections.abc import Sequence
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Int


class AbstractTensorRule(eqx.Module):
    """What is made of a gradient, as stacks of tensors of equal shape, and what is kept of it.

    It gets the stacks of all leaves at once, so that it can do for several together what takes
    long for each, such as a factorisation. A state keeps its structure, shapes and dtypes.
    """

    @abc.abstractmethod
    def init(self, stack: Array) -> Any:
        """The state of one stack, from zeros of its shape (stack, *dimensions) and dtype."""

    @abc.abstractmethod
    def update(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> tuple[Sequence[Array], Sequence[Any]]:
        """The direction of each stack, with the gradient's sign, and its new state; `count` is the
        number of steps taken so far, without those skipped. Stacks of low precision come as
        float32. What is not finite in a gradient never gets into a state, but what fails on finite
        numbers (a factorisation) is for the rule to look after.
        """

    # What is done at a cadence, before `update`. Nothing, unless a rule says otherwise.

    def observe(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> Sequence[Any]:
        """The states after what a refresh in the same step is to have seen of the gradient."""
        del stacks, count
        return states

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""] | None:
        """Whether this step has a refresh; None for a rule that has none."""
        del count
        return None

    def refresh(self, states: Sequence[Any], count: Int[Array, ""]) -> Sequence[Any]:
        """The states with what takes long done anew, for all leaves in one branch."""
        del count
        return states
