"""What a step must compute, decided before it runs.

Parts of a method state [`Requirement`][curvax.plan.Requirement]s; a [`Plan`][curvax.plan.Plan]
merges them, and turns a batch into an [`Observation`][curvax.plan.Observation] in which every
quantity was computed once.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree, Scalar

from curvax import _tree
from curvax._convolution import loop_safe
from curvax.batch import Batch
from curvax.objective import Objective, Params
from curvax.plan.parts import PartsScope, value_in_parts
from curvax.plan.quantities import AbstractQuantity, GainRatio, Scope

Due = bool | Bool[Array, ""]


class Requirement(eqx.Module):
    """A part's wish for a quantity, every so many steps, starting at step `offset`."""

    quantity: AbstractQuantity
    by: str = eqx.field(static=True)
    every: int = eqx.field(static=True, default=1)
    offset: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if self.every < 1 or not 0 <= self.offset < self.every:
            raise ValueError(
                f"{self.by}: got every={self.every}, offset={self.offset}, wanted every ≥ 1 and "
                "0 ≤ offset < every."
            )


class Observation(eqx.Module):
    """What one pass over a batch produced: value, gradient, and the planned quantities.

    `observation[quantity]` is a quantity's value; `observation.due(quantity)` says whether this
    step computed it: a Python bool where the phase was chosen before tracing, else an array.
    """

    objective: Objective
    params: Params
    batch: Batch
    key: PRNGKeyArray | None
    value: Scalar
    gradient: Params
    values: tuple[PyTree[Array], ...]
    dues: tuple[Due, ...]
    quantities: tuple[AbstractQuantity, ...] = eqx.field(static=True)
    curvature_on_batch: bool = eqx.field(static=True)
    judged_later: bool = eqx.field(static=True)
    """Whether the finished step, not the method, measures the gain ratio."""
    micro_batches: int = eqx.field(static=True, default=1)

    def __getitem__(self, quantity: AbstractQuantity) -> Any:
        return self.values[self._index(quantity)]

    def value_at(self, params: Params) -> Scalar:
        """The objective at other parameters, on the same batch with the same key."""
        count = self.micro_batches
        return value_in_parts(self.objective, params, self.batch, self.key, count)

    def due(self, quantity: AbstractQuantity) -> Due:
        return self.dues[self._index(quantity)]

    def _index(self, quantity: AbstractQuantity) -> int:
        if quantity not in self.quantities:
            raise ValueError(
                f"observation: it lacks the {quantity.label}; it was made by the plan of another "
                "method. Make it with this method's own `observe`."
            )
        return self.quantities.index(quantity)


class Entry(eqx.Module):
    """A quantity of a plan: who wants it, and when."""

    quantity: AbstractQuantity
    cadences: tuple[tuple[int, int], ...] = eqx.field(static=True)
    wanted_by: tuple[str, ...] = eqx.field(static=True)

    def due(self, count: int | Int[Array, ""]) -> Due:
        """Whether the quantity is due on step `count`."""
        if any(every == 1 for every, _ in self.cadences):
            return True
        dues = [count % every == offset for every, offset in self.cadences]
        if self.quantity.from_start:
            dues.append(count == 0)
        if isinstance(count, int):
            return any(dues)
        return jnp.any(jnp.stack([jnp.asarray(due) for due in dues]))

    @property
    def period(self) -> int:
        return math.lcm(*(every for every, _ in self.cadences))


class Plan(eqx.Module):
    """The merged requirements of the parts of a method: static, and hashable."""

    entries: tuple[Entry, ...]

    def __init__(self, requirements: Iterable[Requirement]):
        merged: dict[AbstractQuantity, list[Requirement]] = {}
        for requirement in requirements:
            merged.setdefault(requirement.quantity, []).append(requirement)
        self.entries = tuple(
            Entry(
                quantity,
                tuple(dict.fromkeys((wish.every, wish.offset) for wish in wishes)),
                tuple(dict.fromkeys(wish.by for wish in wishes)),
            )
            for quantity, wishes in merged.items()
        )

    @property
    def period(self) -> int:
        """Steps after which the pattern of what is due repeats."""
        return math.lcm(*(entry.period for entry in self.entries)) if self.entries else 1

    def phase(self, count: int | Int[Array, ""]) -> tuple[Due, ...]:
        """For each entry, whether it is due on step `count`; for an int, known before tracing."""
        return tuple(entry.due(count) for entry in self.entries)

    def observe(
        self,
        objective: Objective,
        params: Params,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        phase: tuple[Due, ...] | None = None,
        curvature_batch: Batch | None = None,
        judged_later: bool = False,
        bases: Callable[[bool], Any] | None = None,
        micro_batches: int = 1,
    ) -> Observation:
        """Computes value, gradient and what is due. A pure function; call it inside `jit`.

        `bases` gives what a state holds to the quantities that are measured in it. With
        `micro_batches`, batches are taken in so many parts, one after the other.

        **Raises** `ValueError` for a missing key, and for a batch that does not fit.
        """
        phase = self.phase(0) if phase is None else phase
        for entry in self.entries:
            if entry.quantity.random and key is None:
                raise ValueError(
                    f"key: got None, but the {entry.quantity.label} (wanted by "
                    f"{', '.join(entry.wanted_by)}) draws random numbers: pass "
                    "key=jax.random.key(...), a new one each step."
                )
        due_now = tuple(
            entry.quantity for entry, due in zip(self.entries, phase, strict=True) if due is True
        )
        if micro_batches > 1:
            together = tuple(quantity for quantity in due_now if quantity.additive)
            scope: Scope = PartsScope(
                objective,
                params,
                batch,
                key,
                curvature_batch,
                count=micro_batches,
                bases=bases,
                together=together,
            )
        else:
            from_hessian = curvature_batch is None and any(q.from_hessian for q in due_now)
            taps = tuple(quantity for quantity in due_now if quantity.tapped)
            scope = Scope(
                objective, params, batch, key, curvature_batch, from_hessian, taps=taps, bases=bases
            )
        # Touched first: a branch below may read these, but must not be the first to make them.
        value, gradient = scope.value, scope.gradient
        values = tuple(
            _compute(entry.quantity, due, scope)
            for entry, due in zip(self.entries, phase, strict=True)
        )
        return Observation(
            objective,
            params,
            batch,
            key,
            value,
            gradient,
            values,
            phase,
            tuple(entry.quantity for entry in self.entries),
            curvature_batch is None,
            judged_later,
            micro_batches,
        )


def _compute(quantity: AbstractQuantity, due: Due, scope: Scope) -> PyTree[Array]:
    if isinstance(quantity, GainRatio):
        return None
    if due is True:
        return scope.provide(quantity)
    if due is False:
        return None
    compute = loop_safe(lambda: scope.inside_branch().provide(quantity))
    absent = lambda: _tree.zeros_like(jax.eval_shape(compute))
    return jax.lax.cond(due, compute, absent)
