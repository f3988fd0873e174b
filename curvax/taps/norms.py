"""Norms of the gradients of single examples, mostly without those gradients.

At a product the gradient of an example is Σ_t g_t x_tᵀ over its positions, and

    ‖Σ_t g_t x_tᵀ‖² = Σ_{t,u} ⟨x_t, x_u⟩ ⟨g_t, g_u⟩

takes two Gram matrices of positions, in the backward pass of the whole batch (Goodfellow 2015;
Rochette et al. 2019 for convolutions). Where there are so many positions that the gradient is the
smaller of the two, it is formed for one weight at a time, and only there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from curvax import _tree
from curvax.batch import Batch, Example, share, weigh
from curvax.linearisation import Linearisation
from curvax.objective import Objective, Params
from curvax.operators.curvature import AbstractOutputCurvature
from curvax.taps.arrangement import Arrangement, Elementwise, Lookup, accumulator, product
from curvax.taps.blocks import Block, DiagonalBlock, find_blocks
from curvax.taps.moments import linearise_tapped


@dataclasses.dataclass(frozen=True)
class SquaredNorms:
    """The rule of a tap: ‖∇ᵢ‖² of each example i of a batch, at a use of a weight and its bias."""

    arrangement: Arrangement
    batch: int
    bias: bool
    dtype: Any

    def probes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((self.batch,), self.dtype),)

    def __call__(self, g: Array, x: Array, weight: Array, *, lead: int) -> tuple[Array, ...]:
        del weight
        arrangement = self.arrangement
        if isinstance(arrangement, Elementwise):
            gradients = arrangement.gradients(x, g, lead)
            squares = jnp.sum(jnp.square(gradients), axis=range(1, gradients.ndim))
            return (squares.astype(self.dtype),)
        outputs = arrangement.output_rows(g, lead)
        if isinstance(arrangement, Lookup):
            indices = arrangement.indices(x, lead)
            there = (indices >= 0) & (indices < arrangement.inputs)
            same = (indices[:, :, None] == indices[:, None]) & there[:, None]
            gram = product("sbtm,sbum->sbtu", outputs, outputs)
            return (jnp.sum(jnp.where(same[None], gram, 0), axis=(0, 2, 3)).astype(self.dtype),)
        inputs, sides = arrangement.input_rows(x, lead), arrangement.inputs + arrangement.outputs
        if arrangement.positions * sides > arrangement.inputs * arrangement.outputs:
            total = jnp.sum(jnp.square(product("sbtm,sbtn->sbmn", outputs, inputs)), axis=(0, 2, 3))
            if self.bias:
                sums = jnp.sum(outputs.astype(accumulator(outputs)), axis=2)
                total = total + jnp.sum(jnp.square(sums), axis=(0, 2)).astype(total.dtype)
            return (total.astype(self.dtype),)
        grams = [product("sbtm,sbum->sbtu", rows, rows) for rows in (inputs, outputs)]
        first = grams[0] + 1 if self.bias else grams[0]
        dtype = accumulator(*grams)
        total = jnp.sum(first.astype(dtype) * grams[1].astype(dtype), axis=(0, 2, 3))
        return (total.astype(self.dtype),)


def gradient_norms(
    objective: Objective, model: PyTree[Any], batch: Batch, key: PRNGKeyArray | None = None
) -> Float[Array, " batch"]:
    """The L2 norm of each example's gradient of its own loss.

    That loss is the objective on this example alone, without the l2 term: the mean (or sum, by the
    objective's `reduction`) over the events of the example, by their weights. The norm is 0 for an
    example that is masked.

    **Arguments:** `objective` (it needs no `example`), `model` (or its trained part), `batch`, and
    a `key` for a stochastic objective.

    **Returns** one number for each example, exact up to rounding. It takes one forward and one
    backward pass over the batch, and for a weight with T positions of n inputs and m outputs two
    Gram matrices of T² numbers for each example, or its gradient of n·m numbers if that is less
    work. Leaves that are used more than once, or whose use is not understood, have their gradients
    written out for all examples, as `vmap(grad)` would do for all:
    [`written_out`][curvax.taps.norms.written_out] names them.

    **Raises** `ValueError` as the objective does, for a batch that does not fit.
    """
    params, objective = objective.bind(model)
    objective.check(params, batch, key)
    own = lambda at: _own_scores(objective, objective.example(batch), at)
    return jnp.sqrt(squared_norms(objective, params, batch, key, own))


def squared_norms(
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray | None,
    cotangent_of: Callable[[Linearisation], Array],
) -> Float[Array, " batch"]:
    """‖Jᵢᵀuᵢ‖² of each example i, for the cotangents u that are made of the linearised model."""
    example = objective.example(batch)
    closed, blocks = find_blocks(objective, params, example.x)
    tapped = [block for block in blocks if not _reason(block)]
    size, dtype = _batch_size(example), _tree.accumulation_dtype(_tree.common_dtype(params))
    taps = {}
    for block in tapped:
        (use,) = block.uses
        bias = not isinstance(block, DiagonalBlock) and block.bias is not None
        taps[block.path] = use, SquaredNorms(use.arrangement, size, bias, dtype), ()
    at = linearise_tapped(objective, params, batch, key, closed, taps)
    cotangent = cotangent_of(at.linearisation)
    total = jnp.zeros((size,), dtype)
    if tapped:
        _, statistics = at.pull(cotangent)
        for (squares,) in statistics.values():
            total = total + jnp.sum(squares.reshape(-1, size), axis=0)
    rest = {leaf for block in blocks if _reason(block) for leaf in block.leaves}
    if rest:
        total = total + _by_gradients(objective, params, example, cotangent, key, rest, dtype)
    return jnp.maximum(total, 0)


def squared_rows(curvature: AbstractOutputCurvature) -> Float[Array, " batch"]:
    """‖sᵢ‖² for a curvature Σᵢ cᵢ sᵢ sᵢᵀ (and its l2 term) with one row for each example i: that of
    a single output, or of a score. The cost is as of `gradient_norms`.

    **Raises** `ValueError` where an example has more rows than one.
    """
    linearisation, metric = curvature.linearised()
    struct = metric.rows_structure()
    batch = struct.shape[0]
    if struct.size != batch:
        raise ValueError(
            f"curvature: got {struct.size // batch} rows for each example (rows of shape "
            f"{struct.shape}), wanted one: a model with a single output, or "
            "FisherCurvature('empirical')."
        )
    ones = jnp.ones(struct.shape, struct.dtype)
    rows = lambda at: curvature.metric(at).sqrt(ones)
    squares = squared_norms(
        curvature.objective, curvature.params, curvature.batch, curvature.key, rows
    )
    weight = jnp.broadcast_to(linearisation.coefficients.reshape(-1), (batch,))
    return share(squares, weight.astype(squares.dtype))


def written_out(objective: Objective, model: PyTree[Any], batch: Batch) -> dict[str, str]:
    """The leaves whose gradients [`gradient_norms`][curvax.gradient_norms] forms for all examples
    at once, by their paths, and why. Nothing is computed.
    """
    params, objective = objective.bind(model)
    _, blocks = find_blocks(objective, params, objective.example(batch).x)
    paths = _tree.paths(params)
    return {paths[leaf]: _reason(b) for b in blocks if _reason(b) for leaf in b.leaves}


def _reason(block: Block) -> str:
    """Why the norms of a block do not come from a tap, if so."""
    if isinstance(block, DiagonalBlock) and block.reason:
        return block.reason
    if len(block.uses) > 1:
        return f"it is used {len(block.uses)} times, and its gradient is the sum"
    if any(use.repeats > 1 for use in block.uses):
        return "a loop uses it in each of its steps, and its gradient is the sum"
    return ""


def _batch_size(example: Example) -> int:
    return jax.tree.leaves(example.x)[0].shape[0]


def _own_scores(objective: Objective, example: Example, at: Any) -> Array:
    """The cotangent of the outputs under which each example has the gradient of its own loss."""
    values = jax.eval_shape(objective.loss.value, at.outputs, at.targets)
    events = tuple(range(1, values.ndim))
    weights = jnp.ones((), values.dtype) if example.weight is None else jnp.asarray(example.weight)
    weights = weights.astype(values.dtype)
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    weights = jnp.broadcast_to(weights, values.shape)
    if objective.reduction == "mean":
        weights = share(weights, jnp.sum(weights, axis=events, keepdims=True))
    return weigh(weights, objective.loss.gradient(at.outputs, at.targets))


def _by_gradients(
    objective: Objective,
    params: Params,
    example: Example,
    cotangent: Array,
    key: PRNGKeyArray | None,
    leaves: set[int],
    dtype: Any,
) -> Array:
    """Σ of the squares of some leaves' gradients, written out for each example."""
    flat, treedef = jax.tree.flatten(params)
    chosen = [p if i in leaves else optax.MaskedNode() for i, p in enumerate(flat)]
    template = jax.tree.unflatten(treedef, chosen)
    kept, restricted = objective.restrict(params, template)
    gradients = restricted.pull_back_examples(kept, example.x, cotangent[None], key)
    squares = [
        jnp.sum(jnp.square(leaf.astype(dtype)), axis=range(1, leaf.ndim))
        for leaf in jax.tree.leaves(gradients)
    ]
    return jnp.sum(jnp.stack(squares), axis=0)
