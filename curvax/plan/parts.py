"""A batch taken in parts, one after the other: a step then holds what one part needs.

Value, gradient and whatever is a sum over examples are summed in one scan; a curvature operator
visits the parts in each of its products.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from curvax import _tree
from curvax._convolution import loop_safe
from curvax.batch import Batch
from curvax.objective import Objective, Params
from curvax.operators import AbstractCurvature
from curvax.operators.accumulated import Scanned
from curvax.plan.quantities import AbstractQuantity, Scope


class Parts(NamedTuple):
    """The parts of a batch, on a leading axis, and a key for each.

    The objective of the batch is the sum over parts of `portions` times that of a part;
    `fractions` are their shares of the weight of all examples.
    """

    batches: Batch
    keys: Array | None
    portions: Array
    fractions: Array


def parts_of(
    objective: Objective, params: Params, batch: Batch, key: PRNGKeyArray | None, count: int
) -> Parts:
    """Part i has the examples i, i + count, …, so that what is spread over devices stays there.

    **Raises** `ValueError` for a batch that does not divide.
    """
    example = objective.example(batch)
    size = jax.tree.leaves(example.x)[0].shape[0]
    if size % count:
        raise ValueError(
            f"batch: got {size} examples, wanted a multiple of micro_batches={count}; fill up the "
            "last part with examples of weight 0."
        )

    def split(path: Any, leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] != size:
            raise ValueError(
                f"batch: the leaf {jax.tree_util.keystr(path)} has shape {leaf.shape}, wanted the "
                f"{size} examples on its first axis, to take them in micro_batches={count} parts."
            )
        return jnp.moveaxis(leaf.reshape(size // count, count, *leaf.shape[1:]), 1, 0)

    dtype = _tree.accumulation_dtype(_tree.common_dtype(params))
    fractions = jnp.full((count,), 1 / count, dtype)
    if example.weight is not None:
        weights = split((), example.weight).astype(dtype).reshape(count, -1).sum(axis=1)
        total = weights.sum()
        fractions = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), fractions)
    return Parts(
        jax.tree_util.tree_map_with_path(split, batch),
        None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count)),
        fractions if objective.reduction == "mean" else jnp.ones_like(fractions),
        fractions,
    )


def objective_of_part(objective: Objective, count: int) -> Objective:
    """The l2 term is shared out among the parts, as portions of the mean do by themselves."""
    return objective if objective.reduction == "mean" else objective.scaled_l2(1 / count)


def value_in_parts(
    objective: Objective, params: Params, batch: Batch, key: PRNGKeyArray | None, count: int
) -> Scalar:
    """The objective on a batch that is taken in so many parts."""
    if count == 1:
        return objective.value(params, batch, key)
    own = objective_of_part(objective, count)

    def one(part: Parts) -> Scalar:
        return _tree.scale(part.portions, own.value(params, part.batches, part.keys))

    return _summed(one, parts_of(objective, params, batch, key, count))


class PartsScope(Scope):
    """The intermediates of a batch in `count` parts.

    The quantities of `together` come from the passes that value and gradient take.
    """

    def __init__(
        self,
        objective: Objective,
        params: Params,
        batch: Batch,
        key: PRNGKeyArray | None,
        curvature_batch: Batch | None = None,
        *,
        count: int,
        bases: Callable[[bool], Any] | None = None,
        together: tuple[AbstractQuantity, ...] = (),
    ):
        super().__init__(objective, params, batch, key, curvature_batch, bases=bases)
        self._count = count
        self._together = together

    @functools.cached_property
    def parts(self) -> Parts:
        return parts_of(self.objective, self.params, self.batch, self.key, self._count)

    @functools.cached_property
    def curvature(self) -> "PartsScope":
        if self.curvature_batch is None:
            return self
        batch = self.curvature_batch
        return PartsScope(self.objective, self.params, batch, self.key, count=self._count)

    @functools.cached_property
    def value(self) -> Scalar:
        return self._sums[0][0]

    @functools.cached_property
    def gradient(self) -> Params:
        return _tree.cast(self._sums[0][1], self.params)

    @functools.cached_property
    def _sums(self) -> tuple[Any, tuple[Any, ...]]:
        return self._pass(self._together, lambda at: (at.value, at.gradient))

    def provide(self, quantity: AbstractQuantity) -> PyTree[Array]:
        if not quantity.additive:
            return quantity.compute(self)
        if quantity in self._together:
            return self._sums[1][self._together.index(quantity)]
        return self._pass((quantity,), lambda at: ())[1][0]

    def operator(self, of: type[AbstractCurvature], /, **options: Any) -> Scanned:
        objective, own = objective_of_part(self.objective, self._count), self.parts
        fixed = tuple(options.items())
        return Scanned(objective, self.params, own.batches, own.keys, own.portions, of, fixed)

    def inside_branch(self) -> "PartsScope":
        return PartsScope(
            self.objective,
            self.params,
            self.batch,
            self.key,
            self.curvature_batch,
            count=self._count,
            bases=self.bases,
        )

    def _pass(
        self, quantities: tuple[AbstractQuantity, ...], also: Callable[[Scope], Any]
    ) -> tuple[Any, tuple[Any, ...]]:
        """Sums over the parts, in one scan."""
        objective = objective_of_part(self.objective, self._count)
        apart = self.curvature_batch is not None
        tapped = tuple(quantity for quantity in quantities if quantity.tapped)

        def one(each: tuple[Parts, Parts]) -> tuple[Any, tuple[Any, ...]]:
            own, other = each
            scope = Scope(
                objective,
                self.params,
                own.batches,
                own.keys,
                other.batches if apart else None,
                taps=tapped,
                bases=self.bases,
            )
            first = _tree.scale(own.portions, _tree.widened(also(scope)))
            shares = (other.portions, other.fractions)
            wide = [_tree.widened(quantity.compute(scope)) for quantity in quantities]
            pairs = zip(quantities, wide, strict=True)
            return first, tuple(quantity.weighed(value, *shares) for quantity, value in pairs)

        return _summed(one, (self.parts, self.curvature.parts))


def _summed(one: Callable[[Any], Any], stacked: Any) -> Any:
    """The sum of `one` over a leading axis."""
    struct = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], stacked))

    def add(total: Any, each: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(each)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), struct)
    return jax.lax.scan(loop_safe(add), zeros, stacked)[0]
