"""Moments of all blocks of a model, from backward passes with taps in them."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from curvax import _tree
from curvax._convolution import loop_safe
from curvax.batch import Batch, share, weigh
from curvax.linearisation import Linearisation
from curvax.objective import Objective, Params
from curvax.operators.curvature import GaussNewton
from curvax.operators.metric import ScoreMetric, sampling_key
from curvax.taps.arrangement import Elementwise, Lookup
from curvax.taps.blocks import Block, DiagonalBlock, KroneckerBlock
from curvax.taps.run import Tapped
from curvax.taps.statistics import Moment, Sharing, Squares, Statistics
from curvax.taps.uses import Use

FisherKind = Literal["exact", "mc", "empirical", "forward_only"]

# Backward passes that are written out one after the other; more are looped over.
_UNROLLED = 4


class BlockMoments(NamedTuple):
    """Moments of one Kronecker block: the mean of x xᵀ over examples and positions, and the sum of
    g gᵀ, which carries all the scale. A `rotated` second moment is of their eigenbasis.
    """

    input: Moment | None = None
    output: Moment | None = None
    rotated: Float[Array, "stack out in"] | None = None


# For a diagonal block: its entries, of the shape of the leaf.
Moments = dict[str, Any]


class TappedPass(eqx.Module):
    """The model on a batch with taps in it, linearised in the parameters and in the probes."""

    linearisation: Linearisation
    tangent: Any
    probes: Any = eqx.field(static=True)  # shapes, frozen

    def pull(self, cotangent: Array) -> tuple[Params, Any]:
        """Jᵀu, and the statistics of that backward pass."""
        at = self.linearisation
        transpose = jax.linear_transpose(
            self.tangent, _tree.structure(at.params), _tree.thaw(self.probes)
        )
        return transpose(cotangent.astype(at.outputs.dtype))


class _ParamsTangent(eqx.Module):
    tangent: Any
    probes: Any = eqx.field(static=True)

    def __call__(self, vector: Params) -> Array:
        return self.tangent(vector, _tree.zeros_like(_tree.thaw(self.probes)))


def tapped_pass(
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray | None,
    closed: Any,
    blocks: Sequence[Block],
    bases: Mapping[str, Any],
    sharing: Sharing,
) -> TappedPass:
    """One forward pass over a batch, with taps for the given blocks.

    `bases` holds, for each path of a Kronecker block, the bases of its (input, output) sketches,
    each (stack, n, k) or None, or a third entry: the eigenbases of both sides instead.
    """
    weighted = objective.example(batch).weight is not None
    dtype = _tree.accumulation_dtype(_tree.common_dtype(params))
    taps = {}
    for block in blocks:
        for index, use in enumerate(block.uses):
            rule, given = _rule(block, index, bases, sharing, weighted)
            taps[block.path, index] = use, dataclasses.replace(rule, dtype=dtype), given
    return linearise_tapped(objective, params, batch, key, closed, taps)


def linearise_tapped(
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray | None,
    closed: Any,
    taps: Mapping[Any, tuple[Use, Any, tuple[Array, ...]]],
) -> TappedPass:
    """One forward pass over a batch with taps in it: by a name each the use, the rule, and what the
    rule is given besides, for each matrix of a stack.
    """
    example = objective.example(batch)
    shared = {}
    for name, (use, rule, given) in taps.items():
        loops = tuple(loop.length for loop in use.loops if loop.stacked)
        split = lambda basis, loops=loops: basis.reshape(*loops, -1, *basis.shape[1:])
        probes = tuple(
            jax.ShapeDtypeStruct((*loops, *probe.shape), probe.dtype) for probe in rule.probes()
        )
        shared[name] = (probes, tuple(split(basis) for basis in given))
    tapped = Tapped(closed, {name: (use, rule) for name, (use, rule, _) in taps.items()})
    leaves_of = jax.tree.leaves
    weights = _example_weights(objective, example)
    keys = objective.example_keys(example.x, key)

    def outputs(params: Params, probes: Any) -> Array:
        payloads = {name: (probes[name], shared[name][1]) for name in taps}

        def one(x: Any, key: Any, weight: Array) -> Array:
            args = [*leaves_of(params), *leaves_of(x), *leaves_of(key)]
            (y,) = tapped(args, payloads, weight)
            return y

        # Outside of jit an array of NumPy would reach the taps as it is.
        return jax.vmap(one)(jax.tree.map(jnp.asarray, example.x), keys, weights)

    structs = {name: probes for name, (probes, _) in shared.items()}
    primal, tangent = jax.linearize(outputs, params, _tree.zeros_like(structs))
    frozen = _tree.freeze(structs)
    alone = _ParamsTangent(tangent, frozen)
    return TappedPass(objective.linearised(params, example, primal, alone), tangent, frozen)


def _rule(
    block: Block, index: int, bases: Mapping[str, Any], sharing: Sharing, weighted: bool
) -> tuple[Statistics | Squares, tuple[Array, ...]]:
    if isinstance(block, DiagonalBlock):
        arrangement = block.uses[index].arrangement
        assert isinstance(arrangement, Elementwise)
        return Squares(arrangement, whole=block.rows is None), ()
    input, output, *eigenbases = bases.get(block.path, (None, None))
    rule = block.statistics(index, sharing, weighted)
    if eigenbases:
        sides = reversed(eigenbases[0]) if block.swapped[index] else eigenbases[0]
        given = tuple(basis for basis in sides if basis is not None)
        return dataclasses.replace(rule, rotated=True), given
    if block.swapped[index]:
        input, output = output, input
    wanted = ((rule.input, input), (rule.output, output))
    return rule, tuple(basis for kind, basis in wanted if kind == "sketch")


def _example_weights(objective: Objective, example: Any) -> Array:
    """The share of each example in a mean over examples."""
    first = jnp.asarray(jax.tree.leaves(example.x)[0])
    count = first.shape[0]
    if example.weight is None:
        # Made of x, so that it is split over devices as x is.
        beside = jnp.zeros_like(first[(slice(None), *(0,) * (first.ndim - 1))], jnp.float32)
        return beside + 1 / count
    weight = jnp.asarray(example.weight)
    weight = weight.reshape(count, -1).sum(axis=1)
    return share(weight, jnp.sum(weight))


# -- passes ----------------------------------------------------------------------------------------


def collect_moments(
    objective: Objective,
    batch: Batch,
    key: PRNGKeyArray | None,
    at: TappedPass,
    blocks: Sequence[Block],
    fisher: FisherKind,
    samples: int,
    sharing: Sharing,
    pulled: tuple[Params, Any] | None,
) -> Moments:
    """The moments of the blocks, under a flavour of the Fisher.

    `pulled` is the backward pass of the gradient without its l2 term, which the empirical and
    forward-only flavours use; the others make passes of their own.
    """
    linearisation = at.linearisation
    weighted = objective.example(batch).weight is not None
    if fisher == "forward_only" or (fisher == "empirical" and not weighted):
        assert pulled is not None
        gradient, raw = pulled
        # These cotangents carry c where a square wants √c.
        scale = 1 / linearisation.coefficients if not weighted else jnp.ones(())
        squares = jax.tree.map(jnp.square, gradient)
        return _assemble(at, batch, objective, blocks, raw, raw, squares, scale, sharing)
    cotangents = _cotangents(objective, linearisation, batch, key, fisher, samples)
    count = cotangents.shape[0]
    fallback = any(isinstance(block, DiagonalBlock) and block.reason for block in blocks)

    def backward(cotangent: Array) -> tuple[Any, Any]:
        gradient, raw = at.pull(cotangent)
        squares = jax.tree.map(jnp.square, gradient) if fallback else None
        return squares, raw

    squares, first = backward(cotangents[0])
    raw = first
    if count <= _UNROLLED:
        for i in range(1, count):
            squares, raw = _plus((squares, raw), backward(cotangents[i]))
    else:

        def body(total: Any, cotangent: Array) -> tuple[Any, None]:
            return _plus(total, backward(cotangent)), None

        loop = loop_safe(lambda total: jax.lax.scan(body, total, cotangents[1:])[0])
        squares, raw = loop((squares, raw))
    # The inputs are the same in each pass, and count once.
    return _assemble(at, batch, objective, blocks, first, raw, squares, jnp.ones(()), sharing)


def _plus(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _cotangents(
    objective: Objective,
    at: Linearisation,
    batch: Batch,
    key: PRNGKeyArray | None,
    fisher: FisherKind,
    samples: int,
) -> Float[Array, "passes batch ..."]:
    """Output cotangents u with Σ u uᵀ the curvature of the objective in the outputs."""
    loss = objective.loss
    if fisher == "empirical":
        scores = loss.gradient(at.outputs, at.targets)
        return weigh(jnp.sqrt(at.coefficients), scores)[None]
    if fisher == "mc":
        assert key is not None
        metric = ScoreMetric.from_samples(loss, at, key, samples)
        weighed = jax.vmap(weigh, (None, 0))(jnp.sqrt(at.coefficients), metric.scores)
        return weighed / np.sqrt(samples).astype(weighed.dtype)
    operator = GaussNewton(objective, at.params, batch, key, at)
    rows = operator.row_basis()
    # Signs change no block of a product; they keep examples apart in what is estimated from whole
    # gradients.
    signs_key = jax.random.key(0) if key is None else sampling_key(key)
    signs = jax.random.rademacher(signs_key, rows.shape[:2], rows.dtype)
    return rows * signs.reshape(signs.shape + (1,) * (rows.ndim - 2))


def _assemble(
    at: TappedPass,
    batch: Batch,
    objective: Objective,
    blocks: Sequence[Block],
    inputs: Any,
    outputs: Any,
    squares: Params | None,
    scale: Array,
    sharing: Sharing,
) -> Moments:
    example = objective.example(batch)
    count = 1 if example.weight is not None else jax.tree.leaves(example.x)[0].shape[0]
    structs = jax.tree.leaves(_tree.structure(at.linearisation.params))
    moments: Moments = {}
    for block in blocks:
        names = [(block.path, i) for i in range(len(block.uses))]
        if isinstance(block, DiagonalBlock):
            if block.reason:
                entries = jax.tree.leaves(squares)[block.leaf]
            else:
                entries = _total(
                    use.view.outside.transposed(outputs[name][0], structs[block.leaf])
                    for use, name in zip(block.uses, names, strict=True)
                )
            moments[block.path] = entries * scale.astype(entries.dtype)
            continue
        moments[block.path] = _block_moments(block, names, inputs, outputs, count, scale, sharing)
    return moments


def _block_moments(
    block: KroneckerBlock,
    names: Any,
    inputs: Any,
    outputs: Any,
    count: int,
    scale: Array,
    sharing: Sharing,
) -> BlockMoments:
    flat = lambda array, extra: array.reshape(-1, *array.shape[array.ndim - extra :])
    if len(outputs[names[0]]) == 1:
        turned = lambda moment, swapped: jnp.swapaxes(moment, 1, 2) if swapped else moment
        rotated = _total(
            turned(flat(outputs[name][0], 2), swapped)
            for name, swapped in zip(names, block.swapped, strict=True)
        )
        return BlockMoments(rotated=rotated * scale.astype(rotated.dtype))
    if block.output.kind == "none":
        rows = [count * _rows(use, sharing) for use in block.uses]
        extra = 1 if block.input.kind == "diagonal" else 2
        parts = [
            Moment(flat(inputs[name][0], extra), inputs[name][1].reshape(-1)) for name in names
        ]
        return BlockMoments(_weighted(parts, [1 / sum(rows)] * len(parts)))
    sides: list[tuple[Moment, Moment]] = []
    for name, use, swapped in zip(names, block.uses, block.swapped, strict=True):
        forms = (block.output, block.input) if swapped else (block.input, block.output)
        extra = [1 if form.kind == "diagonal" else 2 for form in forms]
        first, second = inputs[name][:2], outputs[name][2:]
        rows = count * _rows(use, sharing)
        a = Moment(flat(first[0], extra[0]), first[1].reshape(-1))
        a = jax.tree.map(lambda m, rows=rows: m / rows, a)
        g = Moment(flat(second[0], extra[1]), second[1].reshape(-1))
        g = jax.tree.map(lambda m: m * scale.astype(m.dtype), g)
        sides.append((g, a) if swapped else (a, g))
    if not any(block.swapped):
        total = sum(_rows(use, sharing) for use in block.uses)
        shares = [_rows(use, sharing) / total for use in block.uses]
        a = _weighted([side[0] for side in sides], shares)
        return BlockMoments(a, _weighted([side[1] for side in sides], [1.0] * len(sides)))
    # Σ Aᵢ ⊗ Gᵢ as one product of the same trace, each side weighed by the trace of the other.
    total = sum(a.trace * g.trace for a, g in sides)
    total = jnp.where(total > 0, total, 1)
    a = _weighted([side[0] for side in sides], [side[1].trace for side in sides])
    g = _weighted([side[1] for side in sides], [side[0].trace / total for side in sides])
    return BlockMoments(a, g)


def _total(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


def _rows(use: Use, sharing: Sharing) -> int:
    """Input rows that one example has at a use."""
    reduced = sharing == "reduce" and not isinstance(use.arrangement, Lookup)
    return use.repeats * (1 if reduced else use.arrangement.positions)


def _weighted(moments: Sequence[Moment], weights: Sequence[Any]) -> Moment:
    def combine(*arrays: Array) -> Array:
        total = jnp.zeros_like(arrays[0])
        for array, weight in zip(arrays, weights, strict=True):
            weight = jnp.asarray(weight, array.dtype)
            total = total + array * weight.reshape(weight.shape + (1,) * (array.ndim - weight.ndim))
        return total

    return jax.tree.map(combine, *moments)
