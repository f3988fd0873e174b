"""Which sides tensors have, and of which rank, so that a state stays within a budget."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax import _tree
from curvax.rules.base import AbstractTensorRule
from curvax.taps.wishes import StateBudget

_SHARES = 64

# Of a leaf, the shapes of its stacks.
Stacks = Sequence[jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class TensorBudget:
    """The largest share of a rank with which a whole state fits into a multiple of Adam's, in bytes
    of float32 at least, counters apart.

    Where the smallest share of 1/64 is too much for all tensors together, those whose state is the
    largest for their size have a factor on their shortest side only, or none.

    Attributes:
        adam: Adam's state times this is the budget.
        behind: Copies of the parameters that are kept behind the rule: 1 for a momentum.
        bare: Whether tensors may be left without any factor.
    """

    adam: StateBudget
    behind: int = 0
    bare: bool = True

    @staticmethod
    def parse(text: str | None, *, behind: int = 0, bare: bool = True) -> "TensorBudget | None":
        """From a text such as "0.75x adam". **Raises** `ValueError` for any other."""
        return None if text is None else TensorBudget(StateBudget.parse(text), behind, bare)

    def rules(
        self, rule: AbstractTensorRule, leaves: Sequence[Stacks], params: Any, beside: Any
    ) -> list[Any]:
        """The rule for each leaf: `rule` with another `rank`, `one_sided` or `longest`, so that
        what it keeps fits together with what is `beside` it.

        **Raises** `ValueError` where no factor fits.
        """
        wide = jax.tree.leaves(_tree.widened(_tree.structure(params)))
        copy, costs = sum(map(_nbytes, wide)), _Costs(leaves)
        kept = self.behind * copy + sum(map(_nbytes, jax.tree.leaves(beside)))
        room = 2 * self.adam.of_adam * copy - kept
        fits = lambda rules: costs.total(rules) <= room
        if not hasattr(rule, "rank"):
            return self._reduced([rule] * len(leaves), costs, room, kept, copy)
        of_rank = lambda share: [dataclasses.replace(rule, rank=share / _SHARES)] * len(leaves)
        # First, as nearly full ranks may take more than full ones.
        if fits(of_rank(_SHARES)):
            return of_rank(_SHARES)
        low, high = 0, _SHARES - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(of_rank(middle)) else (low, middle - 1)
        return of_rank(low) if low else self._reduced(of_rank(1), costs, room, kept, copy)

    def _reduced(
        self, rules: list[Any], costs: "_Costs", room: float, kept: int, copy: int
    ) -> list[Any]:
        """With fewer sides. What is taken away next does not depend on the budget, so that a larger
        one never has fewer.
        """
        smaller = [{"one_sided": True}, {"longest": 0}][: 1 + self.bare]
        while (total := costs.total(rules)) > room:
            order = sorted(range(len(rules)), key=lambda i: -costs.density(rules[i], i))
            options = (
                (i, new)
                for i in order
                for new in (dataclasses.replace(rules[i], **change) for change in smaller)
                if costs.of(new, i) < costs.of(rules[i], i)
            )
            i, new = next(options, (0, None))
            fewer = [*rules[:i], new, *rules[i + 1 :]]
            if new is None or not costs.any_factor(fewer):
                least = math.ceil(50 * (kept + total) / copy) / 100
                raise ValueError(
                    f"state_budget: got {self.adam.of_adam:g}x adam, wanted at least {least:.2f}x: "
                    "the smallest factors, and what is kept beside them, need as much."
                )
            rules = fewer
        return rules


class _Costs:
    """Bytes of what rules keep of leaves."""

    def __init__(self, leaves: Sequence[Stacks]):
        self.leaves = leaves
        self.known: dict[Any, tuple[int, bool]] = {}

    def of(self, rule: Any, i: int) -> int:
        return sum(self._of(rule, stack)[0] for stack in self.leaves[i])

    def total(self, rules: Sequence[Any]) -> int:
        return sum(self.of(rule, i) for i, rule in enumerate(rules))

    def density(self, rule: Any, i: int) -> float:
        return self.of(rule, i) / sum(stack.size for stack in self.leaves[i])

    def any_factor(self, rules: Sequence[Any]) -> bool:
        pairs = zip(rules, self.leaves, strict=True)
        return any(self._of(rule, stack)[1] for rule, stacks in pairs for stack in stacks)

    def _of(self, rule: Any, stack: jax.ShapeDtypeStruct) -> tuple[int, bool]:
        key = (getattr(rule, "rank", None), rule.one_sided, rule.longest, stack.shape, stack.dtype)
        if key not in self.known:
            state = jax.eval_shape(rule.init, stack)
            has = any(side is not None for side in state.sides)
            self.known[key] = sum(map(_nbytes, jax.tree.leaves(state))), has
        return self.known[key]


def _nbytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
