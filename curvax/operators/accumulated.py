"""Curvature over more data than one batch holds at once."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PRNGKeyArray, PyTree

from curvax import _tree
from curvax._convolution import loop_safe
from curvax.batch import Batch, share
from curvax.objective import Objective, Params
from curvax.operators.algebra import Scaled, Sum
from curvax.operators.base import AbstractOperator
from curvax.operators.curvature import AbstractCurvature, AbstractOutputCurvature


def accumulate(
    operator: type[AbstractCurvature],
    objective: Objective,
    model: PyTree[Any],
    batches: Iterable[Batch],
    *,
    key: PRNGKeyArray | None = None,
    **options: Any,
) -> AbstractOperator:
    """The curvature of an objective over several batches, of any sizes, one at a time.

    Equal to the operator on all their examples at once, also under `reduction="mean"` with
    uneven batches or weights; the l2 term counts once. The batches are held in memory; a product
    visits one after the other.

    **Arguments:** `operator`: `Hessian`, `GaussNewton` or `Fisher`; `batches`: an iterable of
    batches (all are kept); `options` go to the operator. Batch i gets the key `fold_in(key, i)`.

    **Raises** `ValueError` if there is no batch.
    """
    batches = tuple(batches)
    if not batches:
        raise ValueError("batches: got none, wanted at least one.")
    params, objective = objective.bind(model)
    bare = objective.without_l2()
    weights = [_weight(objective, params, batch, key) for batch in batches]
    total = sum(weights[1:], start=weights[0])
    parts: list[lx.AbstractLinearOperator] = []
    for i, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
        own_key = None if key is None else jax.random.fold_in(key, i)
        portion = share(weight, total) if objective.reduction == "mean" else jnp.ones_like(weight)
        part = operator(bare, params, batch, key=own_key, **options)
        parts.append(Scaled(part, portion, nonnegative=True))
    return _with_l2(objective, params, parts)


def accumulate_stacked(
    operator: type[AbstractCurvature],
    objective: Objective,
    model: PyTree[Any],
    batches: Batch,
    *,
    key: PRNGKeyArray | None = None,
    **options: Any,
) -> AbstractOperator:
    """As [`accumulate`][curvax.accumulate], over one batch whose leaves have a leading axis of
    micro-batches: a product is one `lax.scan`, so that it compiles once however many there are.

    Micro-batches are then equally large; mask the rest of a last one by weights.
    """
    params, objective = objective.bind(model)
    count = jax.tree.leaves(batches)[0].shape[0]
    if count == 0:
        raise ValueError("batches: got a stack of 0 micro-batches, wanted at least 1.")
    keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    bare = objective.without_l2()
    weights = jax.lax.map(lambda batch: _weight(objective, params, batch, key), batches)
    total = jnp.sum(weights)
    shares = share(weights, total) if objective.reduction == "mean" else jnp.ones_like(weights)
    scanned = Scanned(bare, params, batches, keys, shares, operator, tuple(options.items()))
    return _with_l2(objective, params, [scanned])


def _with_l2(
    objective: Objective, params: Params, parts: list[lx.AbstractLinearOperator]
) -> AbstractOperator:
    if objective.l2:
        parts.append(Scaled(lx.IdentityLinearOperator(_tree.structure(params)), objective.l2))
    return Sum(tuple(parts))


def _weight(objective: Objective, params: Params, batch: Batch, key: PRNGKeyArray | None) -> Array:
    example = objective.example(batch)
    outputs = jax.eval_shape(objective.outputs, params, example.x, key)
    values = jax.eval_shape(objective.loss.value, outputs, example.target)
    return objective.total_weight(batch, values)


class Scanned(AbstractCurvature):
    """Σ_i share_i · A_i over a stack of micro-batches, as one scan."""

    objective: Objective
    params: Params
    batch: Batch  # a stack of micro-batches
    key: Array | None  # one for each
    shares: Array
    operator: type[AbstractCurvature] = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        def add(total: PyTree[Array], one: tuple) -> tuple[PyTree[Array], None]:
            batch, key, portion = one
            part = self.operator(self.objective, self.params, batch, key=key, **dict(self.options))
            return _tree.add_scaled(total, portion, part.mv(vector)), None

        xs = (self.batch, self.key, self.shares)
        zeros = _tree.zeros_like(_tree.widened(vector))
        return _tree.cast(jax.lax.scan(loop_safe(add), zeros, xs)[0], vector)

    @property
    def positive_semidefinite(self) -> bool:
        return issubclass(self.operator, AbstractOutputCurvature)

    def linearise(self) -> "Scanned":
        return self  # what would be kept is what no memory is there for

    def restrict(self, template: PyTree[Any]) -> "Scanned":
        params, objective = self.objective.restrict(self.params, template)
        return dataclasses.replace(self, objective=objective, params=params)

    def linearised(self) -> NoReturn:
        """**Raises** `ValueError`: rows are those of a whole batch."""
        raise ValueError(
            "micro_batches: got more than one, wanted 1: this method looks at the examples of the "
            "whole batch side by side."
        )
