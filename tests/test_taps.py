"""Taps: which uses of parameters are found, and what is measured at them.

The reference for all models of the zoo is `Rows`: the jaxpr of one example, evaluated with every
loop written out and an addend of zero behind each use, with respect to which it is differentiated.
That these rows make up the gradient of the untouched model says that no use was missed.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

import curvax as cx
from curvax import _tree
from curvax._jaxpr import scan_sizes
from curvax.operators.kronecker import arrange
from curvax.operators.metric import sampling_key
from curvax.plan.moments import BlockMoments, Recipe, TappedScope, moments_of
from curvax.plan.quantities import Scope
from curvax.taps.blocks import DiagonalBlock, KroneckerBlock
from tests import oracles, zoo

TOLERANCES = {
    # Rounded to bfloat16 in other places than the reference.
    "bf16_compute": {"rtol": 5e-2, "atol": 1e-3},
}
COMPILER: dict[str, Any] = {
    # Without LLVM's optimisations these round elsewhere with taps than without.
    **{
        name: {"xla_backend_optimization_level": 3}
        for name in ("cnn_groupnorm", "transformer", "resnet_batchnorm", "transformer_scanned")
    },
}
if jax.__version_info__ < (0, 11):
    # XLA's fusion emitters for the CPU (jaxlib 0.10.2) compile one matrix of the GRU to another
    # one: of two products of concatenations [a b c] and [a b d], the second gets c for d.
    COMPILER["gru"] = {"xla_cpu_use_fusion_emitters": False}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def close(actual, expected, **tolerances):
    np.testing.assert_allclose(actual, expected, **(tolerances or CLOSE))


class Case(NamedTuple):
    example: zoo.Example
    objective: Any
    params: Any
    closed: Any
    blocks: tuple

    def block(self, path: str):
        return next(block for block in self.blocks if block.path == path)


def case_of(predict, model, batch, loss, **options) -> Case:
    objective = cx.Objective(predict, loss, **options)
    params, objective = objective.bind(model)
    closed, blocks = Recipe().blocks(objective, params, objective.example(batch).x)
    return Case(zoo.Example(model, predict, batch, loss), objective, params, closed, blocks)


@functools.cache
def case(name: str) -> Case:
    model, predict, batch, loss = zoo.ZOO[name]()
    return case_of(predict, model, batch, loss)


def measure(
    it: Case, batch=None, key=None, bases=None, compiler=None, **recipe
) -> tuple[Any, Any, Any]:
    """Value, gradient and moments of a step, in one jitted pass."""
    recipe = {"fisher": "empirical"} | recipe
    rotated = bases is not None and any(len(each) == 3 for each in bases.values())
    quantity = BlockMoments(Recipe(**recipe), rotated=rotated)

    def run(params, batch, bases):
        scope = Scope(it.objective, params, batch, key)
        scope.bases = None if bases is None else lambda rotated: bases
        tapped = TappedScope(scope, (quantity,))
        value = it.objective.value_of(tapped.run.linearisation, batch)
        return value, tapped.pulled[0], tapped.moments

    jitted = jax.jit(run, compiler_options=compiler)
    return jitted(it.params, it.example.batch if batch is None else batch, bases)


@functools.cache
def measured(name: str, **recipe) -> tuple[Any, Any, Any]:
    return measure(case(name), compiler=COMPILER.get(name), **recipe)


# -- the reference ---------------------------------------------------------------------------


def _evaluate(jaxpr, consts, args, path, loop, visit):
    """A jaxpr with all calls entered and all loops written out; `visit(place, loop, x, y)`."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex_core.Literal) else values[atom]
    for index, eqn in enumerate(jaxpr.eqns):
        place, inputs, name = (*path, index), [read(a) for a in eqn.invars], eqn.primitive.name
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        inside = lambda body, args, place, loop: _evaluate(
            getattr(body, "jaxpr", body), getattr(body, "consts", ()), args, place, loop, visit
        )
        if name == "scan":
            if "num_consts" in eqn.params:
                sizes = eqn.params["num_consts"], eqn.params["num_carry"]
            else:  # jax 0.11
                sizes = scan_sizes(eqn, inner.jaxpr)
            split = [sizes[0], sum(sizes)]
            consts_in, carry, xs = (
                inputs[: split[0]],
                inputs[split[0] : split[1]],
                inputs[split[1] :],
            )
            order = list(range(eqn.params["length"]))
            stacked = [None] * len(order)
            for i in reversed(order) if eqn.params["reverse"] else order:
                args = [*consts_in, *carry, *(x[i] for x in xs)]
                result = inside(inner, args, (*place, 0), (*loop, i))
                carry, stacked[i] = result[: len(carry)], result[len(carry) :]
            outputs = [*carry, *(jnp.stack(each) for each in zip(*stacked, strict=True))]
        elif name == "cond":
            branches = [
                inside(body, inputs[1:], (*place, i), loop)
                for i, body in enumerate(eqn.params["branches"])
            ]
            outputs = [
                jax.lax.select_n(jnp.broadcast_to(inputs[0], results[0].shape), *results)
                for results in zip(*branches, strict=True)
            ]
        elif inner is not None and not name.startswith("custom"):
            outputs = inside(inner, inputs, (*place, 0), loop)
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = list(outputs) if eqn.primitive.multiple_results else [outputs]
        outputs = visit(place, loop, inputs, outputs)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


class Rows(NamedTuple):
    """Of each use, by block and number: x (stack, B, T, in) and g (stack, B, T, out), g that of the
    sum of the losses of an example's events; and the gradients of examples.
    """

    uses: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]
    gradients: Any
    events: int


def _loss_of_example(it: Case):
    kind = "squared" if isinstance(it.example.loss, cx.SquaredError) else "softmax"
    plain = oracles.plain_event_loss(kind)

    def value(outputs, target):
        lead = len(it.example.loss.lead_shape(outputs[None])) - 1
        events = lambda a: a.reshape(-1, *a.shape[lead:])
        return jnp.sum(jax.vmap(plain)(events(outputs), events(target)))

    return value


def rows_of(it: Case) -> Rows:
    x, target = it.example.batch[:2]
    closed, loss = it.closed, _loss_of_example(it)
    uses = {
        (block.path, i): use
        for block in it.blocks
        if isinstance(block, KroneckerBlock)
        for i, use in enumerate(block.uses)
    }

    def run(params, x, zeros):
        seen, made = {}, {}

        def visit(place, loop, inputs, outputs):
            for name, use in uses.items():
                if use.path == place:
                    seen[name, loop] = inputs[use.x]
                    made[name, loop] = outputs[use.y]
                    if zeros is not None:
                        outputs[use.y] = outputs[use.y] + zeros[name, loop]
            return outputs

        args = [*jax.tree.leaves(params), *jax.tree.leaves(x)]
        (outputs,) = _evaluate(closed.jaxpr, closed.consts, args, (), (), visit)
        return outputs, seen, made

    # Keys of tuples and strings do not sort: they stay outside of the pytrees.
    one = jax.tree.map(lambda a: a[0], x)
    order: list = []

    def shapes():
        _, _, made = run(it.params, one, None)
        order.extend(made)
        return [made[key] for key in order]

    zeros = [np.zeros(s.shape, s.dtype) for s in jax.eval_shape(shapes)]

    @jax.jit
    def everything(params, x, target):
        def one(x, target):
            def value(zeros):
                outputs, seen, _ = run(params, x, dict(zip(order, zeros, strict=True)))
                return loss(outputs, target), [seen[key] for key in order]

            gradients, seen = jax.grad(value, has_aux=True)(zeros)
            plain = lambda p: loss(it.objective.predict_one(p, x, None), target)
            return seen, gradients, jax.grad(plain)(params)

        seen, cotangents, gradients = jax.vmap(one)(x, target)
        sides = []
        for (name, _), inputs, g in zip(order, seen, cotangents, strict=True):
            arrangement = uses[name].arrangement
            sides.append((arrangement.input_rows(inputs, 1), arrangement.output_rows(g, 1)))
        return sides, gradients

    sides, gradients = everything(it.params, x, target)
    parts: dict = {name: {} for name in uses}
    for (name, loop), pair in zip(order, sides, strict=True):
        loops = uses[name].loops
        stacked = tuple(i for i, each in zip(loop, loops, strict=True) if each.stacked)
        parts[name].setdefault(stacked, []).append([np.asarray(s, np.float64) for s in pair])
    result = {}
    for name, by_stack in parts.items():
        # Repetitions follow each other along the positions.
        sides = [
            [np.concatenate([each[side] for each in by_stack[k]], axis=2) for k in sorted(by_stack)]
            for side in (0, 1)
        ]
        result[name] = tuple(np.concatenate(side, axis=0) for side in sides)
    outputs = jax.eval_shape(lambda: it.objective.outputs(it.params, x))
    events = math.prod(it.example.loss.lead_shape(outputs))
    return Rows(result, gradients, events)


@functools.cache
def rows(name: str) -> Rows:
    return rows_of(case(name))


def with_one(x):
    return np.concatenate([x, np.ones((*x.shape[:-1], 1))], axis=-1)


def factors_of(block, rows: Rows, sharing="expand"):
    """(A, G) of a block: means of A over rows, sums of G with the 1/N of each event."""
    reference = {"expand": oracles.kfac_expand_reference, "reduce": oracles.kfac_reduce_reference}
    sides = []
    for i, swapped in enumerate(block.swapped):
        x, g = rows.uses[block.path, i]
        repeats = block.uses[i].repeats
        if sharing == "reduce":  # by the positions of each repetition
            fold = lambda a, n=repeats: a.reshape(a.shape[0], a.shape[1] * n, -1, a.shape[-1])
            x, g = fold(x), fold(g)
        pairs = [
            reference[sharing](x[s], g[s] / np.sqrt(rows.events), bias=block.bias is not None)
            for s in range(len(x))
        ]
        a, total = (np.stack(each) for each in zip(*pairs, strict=True))
        sides.append(((total, a) if swapped else (a, total), x.shape[1] * x.shape[2]))
    if any(block.swapped):
        trace = lambda m: np.trace(m, axis1=1, axis2=2)[:, None, None]
        total = sum(trace(a) * trace(g) for (a, g), _ in sides)
        a = sum(a * trace(g) for (a, g), _ in sides)
        return a, sum(g * trace(a) for (a, g), _ in sides) / total
    count = sum(n for _, n in sides)
    return sum(a * n for (a, _), n in sides) / count, sum(g for (_, g), _ in sides)


def as_held(matrix, form):
    return np.diagonal(matrix, axis1=1, axis2=2) if form.kind == "diagonal" else matrix


def check_factors(block, moments, rows, sharing="expand", **tolerances):
    a, g = factors_of(block, rows, sharing)
    for moment, expected, form in (
        (moments[block.path].input, a, block.input),
        (moments[block.path].output, g, block.output),
    ):
        close(moment.product, as_held(expected, form), **tolerances)
        close(moment.trace, np.trace(expected, axis1=1, axis2=2), **tolerances)


# -- finding ---------------------------------------------------------------------------------


def _layers(depth, pattern):
    return [line.replace("*", str(i)) for i in range(depth) for line in pattern]


# A bias stands behind the weight whose block it belongs to.
FOUND = {
    "mlp": _layers(3, ["dense .layers[*].weight .layers[*].bias"]),
    "cnn_groupnorm": [
        "conv .first.weight .first.bias",
        "scale .norm.weight",
        "shift .norm.bias",
        "conv .second.weight",
        "dense .readout.weight .readout.bias",
    ],
    "transformer": [
        "embedding .tokens.weight",
        "shift .positions",
        *_layers(
            2,
            [
                "scale .blocks[*].attention_norm.weight",
                "shift .blocks[*].attention_norm.bias",
                "dense .blocks[*].attention.query_proj.weight .blocks[*].attention.query_proj.bias",
                "dense .blocks[*].attention.key_proj.weight",
                "dense .blocks[*].attention.value_proj.weight",
                "dense .blocks[*].attention.output_proj.weight "
                ".blocks[*].attention.output_proj.bias",
                "scale .blocks[*].mlp_norm.weight",
                "shift .blocks[*].mlp_norm.bias",
                "dense .blocks[*].mlp.layers[0].weight .blocks[*].mlp.layers[0].bias",
                "dense .blocks[*].mlp.layers[1].weight .blocks[*].mlp.layers[1].bias",
            ],
        ),
        "scale .norm.weight",
        "shift .norm.bias",
        "dense .readout.weight",
    ],
    "gru": [
        "dense .cell.weight_ih .cell.bias",
        "dense .cell.weight_hh",
        "shift .cell.bias_n",  # of a third of the outputs
        "dense .readout.weight .readout.bias",
    ],
    **{
        key: ["conv .conv.weight .conv.bias", "dense .readout.weight .readout.bias"]
        for key in (
            "conv_grouped",
            "conv_dilated",
            "conv_strided",
            "conv_1d",
            "conv_3d",
            "conv_transposed",
        )
    },
    "resnet_batchnorm": [
        "conv ['stem']",
        "conv ['conv1']",
        "conv ['conv2']",
        *(
            f"{kind} ['norm{i}']['{leaf}']"
            for i in (1, 2)
            for kind, leaf in (("scale", "scale"), ("shift", "bias"))
        ),
        "dense ['readout'] ['bias']",
    ],
    "depthwise_separable": [
        "conv ['depthwise'] ['shift']",
        "conv ['pointwise'] ['bias']",
        "dense ['readout']",
    ],
    "flax_style": _layers(
        3, ["dense ['params']['Dense_*']['kernel'] ['params']['Dense_*']['bias']"]
    ),
    "bf16_compute": ["dense ['w1'] ['b1']", "dense ['w2'] ['b2']"],
    "inner_jit": [f"dense ['{i}']['w'] ['{i}']['b']" for i in ("first", "middle", "last")],
    "custom_vjp": [f"dense ['{i}']['w'] ['{i}']['b']" for i in ("first", "middle", "last")],
    "cond": [f"dense ['{i}']['w'] ['{i}']['b']" for i in ("first", "plus", "minus", "last")],
    "batched_einsum": ["dense ['w'] ['b']", "dense ['mix']", "dense ['readout']"],
    **{
        key: ["dense ['gate']", "dense ['w1'] ['b1']", "dense ['w2']", "shift ['b2']"]
        for key in ("moe_einsum", "moe_vmap")
    },
    "tied_embedding": ["embedding + dense ['embedding']", "dense ['w'] ['b']"],
    "transformer_scanned": [
        "embedding ['tokens']",
        "shift ['positions']",
        "dense ['layers']['qkv'] ['layers']['qkv_bias']",
        "dense ['layers']['out']",
        "dense ['layers']['up'] ['layers']['up_bias']",
        "dense ['layers']['down']",
        "shift ['layers']['down_bias']",  # after the residual
        *(
            f"{kind} ['layers']['norm{i}']['{leaf}']"
            for i in (1, 2)
            for kind, leaf in (("scale", "scale"), ("shift", "bias"))
        ),
        "scale ['norm']['scale']",
        "shift ['norm']['bias']",
        "dense ['readout']",
    ],
    "fused_qkv": ["dense ['qkv'] ['qkv_bias']", "dense ['out']", "dense ['readout']"],
    "headed_projection": [
        "dense ['query'] ['query_bias']",
        "dense ['key']",
        "dense ['value']",
        "dense ['out']",
        "dense ['readout']",
    ],
}


def described(it: Case) -> list[str]:
    paths = _tree.paths(it.params)
    return [
        f"{block.kind} {' '.join([block.path, *(paths[i] for i in block.leaves[1:])])}"
        for block in it.blocks
    ]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_finding(name):
    it = case(name)
    assert sorted(described(it)) == sorted(FOUND[name])
    assert all(not getattr(block, "reason", "") for block in it.blocks)
    covered = sorted(leaf for block in it.blocks for leaf in block.leaves)
    assert covered == list(range(len(jax.tree.leaves(it.params))))


def blocks_for(predict, params, x, **options):
    it = cx.Objective(predict, cx.SquaredError())
    return {b.path[2:-2]: b for b in Recipe(**options).blocks(it, params, x)[1]}


def _carried(p, x):
    step = lambda h, x: (jnp.tanh(p["w"] @ h + x), None)
    return jax.lax.scan(step, p["h"], jnp.stack([x, x]))[0]


def _while(p, x):
    return jax.lax.while_loop(lambda h: jnp.sum(h) < 1, lambda h: p["w"] @ h + 1, x)


@jax.custom_vjp
def _twice(w, x):
    return w @ (w @ x)


_twice.defvjp(lambda w, x: (_twice(w, x), (w, x)), lambda r, g: (r[0], g))


@jax.custom_vjp
def _straight_through(w):
    return w


_straight_through.defvjp(lambda w: (w, None), lambda _, g: (g,))


MASK = np.tril(np.ones((3, 3)))
W3, V3 = jnp.eye(3), jnp.ones(3)

FALLBACKS = {
    "primitive": (lambda p, x: jnp.exp(p["w"]) @ x, "`exp` is no known use of a parameter"),
    "carried": (_carried, "it is carried through a `scan`"),
    "parameters": (lambda p, x: p["w"] @ p["v"] @ x, "it meets a parameter in `dot_general`"),
    "normalised": (
        lambda p, x: (p["w"] * jax.lax.rsqrt(jnp.sum(p["v"] ** 2, 1, keepdims=True))) @ x,
        "it meets a parameter in `mul`",
    ),
    "masked": (lambda p, x: (p["w"] * MASK) @ x, "it meets a constant in `mul`"),
    "scaled": (lambda p, x: (p["w"] * 0.5) @ x, "it meets a constant in `mul`"),
    "unused": (lambda p, x: x, "the model does not use it"),
    "stopped": (lambda p, x: jax.lax.stop_gradient(p["w"]) @ x, "the model does not use it"),
    "output": (lambda p, x: p["w"][0], "it is an output of the model"),
    "loop": (_while, "`while` cannot be entered"),
    "broadcast": (
        lambda p, x: jnp.broadcast_to(p["h"][None], (3, 3)) @ x,
        "it is broadcast before `dot_general`",
    ),
    "passed_on": (
        lambda p, x: jax.lax.scan(lambda h, w: (h + x, w.T), x, p["w"][None])[1][0] @ x,
        "it is an output of `scan`",
    ),
    "overlap": (lambda p, x: p["w"] @ x + p["w"][:1] @ x, "its uses do not fit together"),
    "partial": (lambda p, x: p["w"][:2] @ x, "its uses do not fit together"),
    "rule": (lambda p, x: _twice(p["w"], x), "`custom_vjp_call` does more than one product"),
    "identity": (
        lambda p, x: _straight_through(p["w"]) @ x,
        "it is an output of `custom_vjp_call`",
    ),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_reason_of_a_fallback(name):
    predict, reason = FALLBACKS[name]
    params = {"w": W3, "v": W3, "h": V3}
    blocks = blocks_for(predict, params, jnp.ones((2, 3)))
    which = "h" if reason.startswith(("it is carried", "it is broadcast")) else "w"
    assert blocks[which].reason == reason
    if name == "parameters":
        assert blocks["v"].reason == reason


# What is used, as (kind, weight, bias).
WRITTEN = {
    "twice": (lambda p, x: p["w"] @ jnp.tanh(p["w"] @ x + p["h"]) + p["h"], ["dense w h"]),
    "once_without": (
        lambda p, x: p["w"] @ jnp.tanh(p["w"] @ x + p["h"]),
        ["dense w", "shift h"],
    ),
    "shared_bias": (
        lambda p, x: p["v"] @ jnp.tanh(p["w"] @ x + p["h"]) + p["h"],
        ["dense v", "dense w", "shift h"],
    ),
    "bias_elsewhere": (
        lambda p, x: (p["w"] @ x + p["h"]) * p["h"],
        ["dense w", "scale + shift h"],
    ),
    "minus": (lambda p, x: p["w"] @ x - p["h"], ["dense w", "shift h"]),
    "used_twice": (
        lambda p, x: (lambda s: s * (s + p["h"]))(p["w"] @ x),
        ["dense w", "shift h"],
    ),
    "constants": (lambda p, x: (p["w"] - MASK) @ x + (1 + p["h"]), ["dense w h"]),
    "gain": (lambda p, x: ((p["w"] + 0.5) @ x) * (1 + p["h"]), ["dense w", "scale h"]),
    "transposed": (lambda p, x: x @ p["w"].T + p["h"], ["dense w h"]),
    "turned": (lambda p, x: jnp.flip(p["w"], 1) @ x, ["dense w"]),
    "named": (lambda p, x: checkpoint_name(p["w"] @ x, "s") + p["h"], ["dense w h"]),
    "fused": (
        lambda p, x: jnp.tanh(p["w"][:2] @ x).sum() * (p["w"][2:] @ x),
        ["dense w'][0", "dense w'][1"],
    ),
    "lookup": (lambda p, x: p["w"][jnp.argmax(x)] + p["h"], ["embedding w", "shift h"]),
    "scalar": (lambda p, x: p["s"] * x, ["scale s"]),
    "scalar_each": (lambda p, x: p["h"] * jnp.sum(x), ["scale h"]),
    "scaled_vector": (lambda p, x: x + 0.5 * p["h"], ["scale h"]),
    "tied": (lambda p, x: p["w"].T @ jnp.tanh(p["w"] @ x + p["h"]), ["dense w", "shift h"]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_ways_to_write_a_layer(name):
    """Found, and the moments are there and those of the whole gradient."""
    predict, expected = WRITTEN[name]
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    leaves = {"w": draw(3, 3), "v": draw(3, 3), "h": draw(3), "s": draw()}
    used = {key for line in expected for key in line.split("'")[0].split() if key in leaves}
    params = {key: leaves[key] for key in sorted(used)}
    x = draw(1, 3)
    y = draw(*jax.eval_shape(lambda: predict(params, x[0])).shape)[None]
    it = case_of(predict, params, (x, y), cx.SquaredError())
    keys = sorted(params)
    found = [
        " ".join(
            [
                b.kind,
                b.path[2:].removesuffix("]").removesuffix("'"),
                *(keys[i] for i in b.leaves[1:]),
            ]
        )
        for b in it.blocks
    ]
    assert sorted(found) == expected
    assert not any(getattr(b, "reason", "") for b in it.blocks)
    _, gradient, moments = measure(it)
    reference = rows_of(it)
    for block in it.blocks:
        if isinstance(block, DiagonalBlock):
            if len(block.uses) == 1:
                close(moments[block.path], jax.tree.leaves(gradient)[block.leaf] ** 2)
            continue
        check_factors(block, moments, reference)
        if len(block.uses) == 1:  # one example at one place: a square of its gradient
            whole = arrange(block, jax.tree.leaves(gradient)).reshape(-1)
            a, g = moments[block.path].input.product[0], moments[block.path].output.product[0]
            a = jnp.diag(a) if a.ndim == 1 else a
            close(oracles.kronecker_dense(g, a), np.outer(whole, whole))


def test_blocks_asked_to_be_diagonal():
    predict = lambda p, x: p["v"] @ jnp.tanh(p["w"] @ x + p["h"])
    params = {"w": W3, "v": W3, "h": V3}
    blocks = blocks_for(predict, params, jnp.ones((2, 3)), diagonal=("w",))
    assert blocks["w"].reason == "asked for"
    assert blocks["h"].kind == "shift" and not blocks["h"].reason
    assert isinstance(blocks["v"], KroneckerBlock)


# -- moments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.ZOO)
def test_rows_make_up_the_gradient(name):
    """Of every example: no use is missed, and rows are what the arrangement says."""
    it, reference = case(name), rows(name)
    blocks = [block for block in it.blocks if isinstance(block, KroneckerBlock)]

    @jax.jit
    @jax.vmap
    def arranged(gradients):
        return [arrange(block, jax.tree.leaves(gradients)) for block in blocks]

    for block, wanted in zip(blocks, arranged(reference.gradients), strict=True):
        total = 0
        for i, swapped in enumerate(block.swapped):
            x, g = reference.uses[block.path, i]
            x = with_one(x) if block.bias is not None else x
            part = np.einsum("sbto,sbti->bsoi", g, x)
            total = total + (part.swapaxes(2, 3) if swapped else part)
        close(total, wanted, **TOLERANCES.get(name, CLOSE))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_empirical_factors(name):
    it, reference = case(name), rows(name)
    _, _, moments = measured(name)
    for block in it.blocks:
        if isinstance(block, KroneckerBlock):
            check_factors(block, moments, reference, **TOLERANCES.get(name, CLOSE))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_diagonal_blocks(name):
    it, reference = case(name), rows(name)
    _, _, moments = measured(name)
    leaves = jax.tree.leaves(reference.gradients)
    for block in it.blocks:
        if isinstance(block, DiagonalBlock):
            entries = moments[block.path]
            assert entries.shape == leaves[block.leaf].shape[1:]
            if all(use.repeats == 1 for use in block.uses):
                wanted = jnp.sum(jnp.square(leaves[block.leaf]), axis=0) / reference.events
                close(entries, wanted)


@pytest.mark.parametrize("name", ["transformer_scanned", "conv_grouped", "gru", "batched_einsum"])
def test_reduced_factors(name):
    it, reference = case(name), rows(name)
    _, _, moments = measured(name, sharing="reduce")
    for block in it.blocks:
        if isinstance(block, KroneckerBlock) and "embedding" not in block.kind:
            check_factors(block, moments, reference, "reduce")


@pytest.mark.parametrize("name", zoo.ZOO)
def test_taps_change_no_gradient(name):
    it = case(name)
    value, gradient, _ = measured(name)

    def plain(params, batch):
        at = it.objective.linearise(params, batch)
        return it.objective.value_of(at, batch), it.objective.gradient_of(at)

    jitted = jax.jit(plain, compiler_options=COMPILER.get(name))
    expected = jitted(it.params, it.example.batch)
    if name == "gru":  # XLA fuses the body of the scan in another way, and rounds in another place
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-13, atol=1e-15), (value, gradient), expected)
        return
    same = jax.tree.map(np.array_equal, (value, gradient), expected)
    assert all(jax.tree.leaves(same)), same


# -- by hand ---------------------------------------------------------------------------------

CONVOLUTIONS = {
    "conv_grouped": ((2, 2), {"groups": 2}),
    "conv_dilated": ((3, 2), {"dilation": 2, "padding": ((1, 2), (0, 1))}),
    "conv_strided": ((3, 3), {"stride": (2, 3), "padding": 1}),
    "conv_1d": ((3,), {"padding": 1}),
    "conv_3d": ((2, 2, 2), {}),
    "conv_transposed": ((3, 3), {"input_dilation": 2, "padding": 1}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_by_hand(name):
    """Patches by explicit loops; the gradient behind the convolution from the model as written."""
    kernel, options = CONVOLUTIONS[name]
    it = case(name)
    x, labels = it.example.batch
    model = it.example.model
    patches = np.stack([oracles.conv_patches_reference(one, kernel, **options) for one in x])

    def head(h, label):
        h = jnp.tanh(h)
        logits = model.readout(jnp.mean(h.reshape(h.shape[0], -1), axis=1))
        return oracles.plain_event_loss("softmax")(logits, label)

    g = jax.vmap(jax.grad(head))(jax.vmap(model.conv)(x), labels)
    groups = patches.shape[2]
    g = np.moveaxis(np.asarray(g).reshape(len(x), groups, -1, patches.shape[1]), 3, 1)
    moments = measured(name)[2][".conv.weight"]
    for s in range(groups):
        a, total = oracles.kfac_expand_reference(
            patches[:, :, s], g[:, :, s] / np.sqrt(len(x)), bias=True
        )
        close(moments.input.product[s], a)
        close(moments.output.product[s], total)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "forward_only"])
def test_dense_layers_against_the_exact_fisher(loss, fisher):
    draw = np.random.default_rng(3).standard_normal
    sizes = (3, 4, 3) if loss == "softmax" else (3, 4, 6)  # 6: more columns than are unrolled
    layers = [
        (jnp.asarray(draw((m, n))), jnp.asarray(draw(m))) for n, m in itertools.pairwise(sizes)
    ]

    def predict(p, x):
        return p[1][0] @ jnp.tanh(p[0][0] @ x + p[0][1]) + p[1][1]

    x = jnp.asarray(draw((5, 3)))
    criterion = cx.SquaredError() if loss == "squared" else cx.SoftmaxCrossEntropy()
    y = jnp.asarray(draw((5, sizes[-1]))) if loss == "squared" else jnp.arange(5) % sizes[-1]
    it = case_of(predict, layers, (x, y), criterion)
    reference = oracles.kfac_dense_reference(layers, x, loss)
    key = jax.random.key(7)
    samples = {"samples": 3} if fisher == "mc" else {}
    moments = measure(it, key=key, fisher=fisher, **samples)[2]
    if fisher == "mc":  # exactly the mean of empirical ones with the targets that were drawn
        outputs = it.objective.outputs(it.params, x)
        drawn = [criterion.sample(k, outputs) for k in jax.random.split(sampling_key(key), 3)]
        each = [measure(it, (x, t))[2] for t in drawn]
    for _i, (block, expected) in enumerate(zip(it.blocks, reference, strict=True)):
        close(moments[block.path].input.product[0], expected.a)
        if fisher == "exact":
            close(moments[block.path].output.product[0], expected.g)
        if fisher == "mc":
            mean = sum(m[block.path].output.product for m in each) / 3
            close(moments[block.path].output.product, mean)


def _unrolled(params, tokens):
    h = params["tokens"][tokens] + params["positions"]
    for layer in params["layers"]:
        h = zoo._transformer_block(layer, h)
    return zoo.layer_norm(params["norm"], h) @ params["readout"]


def test_scanned_layers_are_a_stack_of_unrolled_ones():
    scanned = case("transformer_scanned")
    params = scanned.params
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(2)]
    it = case_of(
        _unrolled, params | {"layers": layers}, scanned.example.batch, scanned.example.loss
    )
    moments, expected = measured("transformer_scanned")[2], measure(it)[2]
    for block in scanned.blocks:
        if block.path.startswith("['layers']"):
            each = [
                expected[block.path.replace("['layers']", f"['layers'][{i}]")] for i in range(2)
            ]
            if isinstance(block, KroneckerBlock):
                whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *each)
            else:
                whole = jnp.stack(each)
            jax.tree.map(close, moments[block.path], whole)
        else:
            jax.tree.map(close, moments[block.path], expected[block.path])


def test_experts_written_in_two_ways():
    jax.tree.map(close, measured("moe_einsum")[2], measured("moe_vmap")[2])


def _nested(policy, reverse):
    """Layers are scanned over; in each, time is."""

    def predict(params, xs):
        @functools.partial(jax.checkpoint, policy=policy)
        def cell(layer, h, x):
            return jnp.tanh(layer["w"] @ x + layer["b"] + layer["u"] @ h)

        def step(xs, layer):
            def inner(h, x):
                h = cell(layer, h, x)
                return h, h

            return jax.lax.scan(inner, jnp.zeros(3), xs, reverse=reverse)[1], None

        xs, _ = jax.lax.scan(step, xs, params["layers"], reverse=reverse)
        return params["readout"] @ xs[0]

    return predict


@pytest.mark.parametrize(
    ("policy", "reverse", "sharing"),
    [
        (None, False, "reduce"),
        ("dots_with_no_batch_dims_saveable", True, "expand"),
        ("everything_saveable", False, "expand"),
    ],
)
def test_nested_loops_and_rematerialisation(policy, reverse, sharing):
    policy = policy and getattr(jax.checkpoint_policies, policy)
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    layers = {"w": draw(2, 3, 3), "b": draw(2, 3), "u": draw(2, 3, 3)}
    params = {"layers": layers, "readout": draw(2, 3)}
    batch = draw(3, 4, 3), draw(3, 2)
    it = case_of(_nested(policy, reverse), params, batch, cx.SquaredError())
    assert sorted(described(it)) == [
        "dense ['layers']['u']",
        "dense ['layers']['w'] ['layers']['b']",
        "dense ['readout']",
    ]
    reference = rows_of(it)
    moments = measure(it, sharing=sharing)[2]
    for block in it.blocks:
        check_factors(block, moments, reference, sharing)


# -- sketches and eigenbases -----------------------------------------------------------------


def orthonormal(seed, stack, size, rank):
    rng = np.random.default_rng(seed)
    return np.stack([np.linalg.qr(rng.standard_normal((size, rank)))[0] for _ in range(stack)])


@pytest.mark.parametrize(
    ("name", "sharing", "weighted"),
    [
        ("mlp", "expand", False),
        ("mlp", "expand", True),
        ("conv_strided", "expand", False),
        ("conv_grouped", "expand", True),
        ("conv_grouped", "reduce", True),
        ("conv_dilated", "expand", False),
        ("conv_transposed", "expand", False),
        ("conv_transposed", "reduce", False),
    ],
)
def test_sketches(name, sharing, weighted, monkeypatch):
    it = case(name)
    batch = it.example.batch
    if weighted:
        batch = (*batch, jnp.asarray([1.0, 0.0, 2.5, 0.5, 1.0, 3.0][: len(batch[1])]))
    full = (
        measure(it, batch, sharing=sharing)[2] if weighted else measured(name, sharing=sharing)[2]
    )
    monkeypatch.setattr("curvax.taps.blocks.WHOLE", 1)
    x = it.objective.example(batch).x
    blocks = Recipe(rank=2).blocks(it.objective, it.params, x)[1]
    bases = {}
    for i, block in enumerate(b for b in blocks if isinstance(b, KroneckerBlock)):
        assert block.input.kind == block.output.kind == "sketch"
        bases[block.path] = tuple(
            jnp.asarray(orthonormal(i + side, block.stack, form.size, 2))
            for side, form in enumerate((block.input, block.output))
        )
    moments = measure(it, batch, bases=bases, sharing=sharing, rank=2)[2]
    for path, (basis_a, basis_g) in bases.items():
        for side, basis in (("input", basis_a), ("output", basis_g)):
            moment, whole = getattr(moments[path], side), getattr(full[path], side)
            close(moment.product, whole.product @ basis)
            close(moment.trace, whole.trace)


@pytest.mark.parametrize(
    ("name", "sharing"),
    [
        ("conv_grouped", "expand"),
        ("conv_grouped", "reduce"),
        ("transformer_scanned", "expand"),
        ("tied_embedding", "expand"),
    ],
)
def test_rotated_second_moments(name, sharing):
    """Of rows in any orthonormal bases; a side that is held as a diagonal keeps its coordinates."""
    it, reference = case(name), rows(name)
    bases, expected = {}, {}
    for i, block in enumerate(b for b in it.blocks if isinstance(b, KroneckerBlock)):
        sizes = block.input, block.output
        pair = [
            orthonormal(i + side, block.stack, form.size, form.size)
            if form.kind == "full"
            else None
            for side, form in enumerate(sizes)
        ]
        bases[block.path] = (None, None, tuple(None if b is None else jnp.asarray(b) for b in pair))
        total = 0
        for j, swapped in enumerate(block.swapped):
            x, g = reference.uses[block.path, j]
            if sharing == "reduce":
                x, g = x.mean(2, keepdims=True), g.sum(2, keepdims=True)
            x = with_one(x) if block.bias is not None else x
            sides = (g, x) if swapped else (x, g)
            x, g = (s if b is None else s @ b[:, None] for s, b in zip(sides, pair, strict=True))
            total = total + np.einsum("sbto,sbti->soi", g**2, x**2) / reference.events
        expected[block.path] = total
    moments = measure(it, bases=bases, sharing=sharing)[2]
    assert moments.keys() == expected.keys()
    for path, wanted in expected.items():
        close(moments[path].rotated, wanted)


def test_rotated_second_moments_are_those_of_ekfac():
    it, reference = case("mlp"), rows("mlp")
    bases, expected = {}, {}
    for block in it.blocks:
        x, g = (np.asarray(side)[0, :, 0] for side in reference.uses[block.path, 0])
        found = oracles.ekfac_reference(x, g / np.sqrt(reference.events), bias=True)
        bases[block.path] = (None, None, (found.basis_a[None], found.basis_g[None]))
        expected[block.path] = found.moments
    moments = measure(it, bases=bases)[2]
    for path, wanted in expected.items():
        close(moments[path].rotated[0], wanted)


# -- examples --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv_grouped", "transformer_scanned"])
def test_ensemble(name):
    """Under `vmap` over parameters each model has moments of its own."""
    it = case(name)
    models = [jax.tree.map(lambda a, f=f: f * a, it.params) for f in (1.0, 0.5)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *models)
    quantity = BlockMoments(Recipe(fisher="empirical"))
    one = lambda params: moments_of(it.objective, params, it.example.batch, None, quantity)[1]
    together = jax.jit(jax.vmap(one))(stacked)
    first = jax.tree.map(lambda a: a[0], together)
    jax.tree.map(close, first, measured(name)[2])
    if name == "transformer_scanned":  # one compilation less
        return
    second = measure(it._replace(params=models[1]))[2]
    jax.tree.map(close, jax.tree.map(lambda a: a[1], together), second)


@pytest.mark.parametrize("name", ["mlp", "conv_grouped", "cond"])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_masked_examples_do_not_count(name, fisher):
    it = case(name)
    x, y = it.example.batch
    count = len(x)
    padded = (
        jnp.concatenate([x, jnp.full_like(x[:2], jnp.nan)]),
        jnp.concatenate([y, jnp.full_like(y[:2], -100)]),
        jnp.asarray([1.0] * count + [0.0] * 2),
    )
    moments = measure(it, padded, fisher=fisher)[2]
    jax.tree.map(close, moments, measured(name, fisher=fisher)[2])


@pytest.mark.parametrize("name", ["mlp", "conv_grouped"])
def test_weights_count_as_repetitions(name):
    it = case(name)
    x, y = it.example.batch
    repeats = np.arange(len(x)) % 3 + 1
    repeated = jax.tree.map(lambda a: jnp.asarray(np.repeat(a, repeats, axis=0)), (x, y))
    weighted = (x, y, jnp.asarray(repeats, jnp.float64))
    jax.tree.map(close, measure(it, weighted)[2], measure(it, repeated)[2])


def test_a_sum_scales_the_output_factors_alone():
    it = case("moe_einsum")
    example = it.example
    summed = case_of(example.predict, example.model, example.batch, example.loss, reduction="sum")
    moments, mean = measure(summed)[2], measured("moe_einsum")[2]
    count = example.batch[1].size
    for block in it.blocks:
        ours, theirs = moments[block.path], mean[block.path]
        if isinstance(block, KroneckerBlock):
            jax.tree.map(close, ours.input, theirs.input)
            ours, theirs = ours.output, theirs.output
        jax.tree.map(lambda a, b: close(a, count * b), ours, theirs)


@pytest.mark.parametrize("name", ["conv_grouped", "moe_einsum"])
def test_micro_batches(name):
    """Moments of two batches of one size have those of both together as their mean."""
    it = case(name)
    other = jax.tree.map(lambda a: jnp.flip(a, axis=-1), it.example.batch)
    both = jax.tree.map(lambda *a: jnp.concatenate(a), it.example.batch, other)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, measured(name)[2], measure(it, other)[2])
    jax.tree.map(close, measure(it, both)[2], mean)


def test_fallback_from_whole_gradients():
    """For one example the square of its gradient; for `exact` right in expectation over signs."""
    predict = lambda p, x: jnp.exp(p["w"]) @ x
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.standard_normal((2, 3)))}
    batch = jnp.asarray(rng.standard_normal((1, 3))), jnp.asarray(rng.standard_normal((1, 2)))
    it = case_of(predict, params, batch, cx.SquaredError())
    _, gradient, moments = measure(it)
    close(moments["['w']"], gradient["w"] ** 2)
    exact = measure(it, fisher="exact")[2]["['w']"]
    jacobian = jax.jacobian(predict)(params, batch[0][0])["w"]
    close(exact, jnp.sum(jacobian**2, axis=0))


# -- memory ----------------------------------------------------------------------------------


def _avals(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (var.aval for var in eqn.outvars)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda a: hasattr(a, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _avals(inner)


def _wide_transformer(size):
    draw = zoo._Draw(0, jnp.float64)
    width, depth = 32, 3
    layer = {
        "norm1": {"scale": draw.gain(depth, width), "bias": draw.shift(depth, width)},
        "qkv": draw.weight(depth, width, 3 * width),
        "qkv_bias": draw.shift(depth, 3 * width),
        "out": draw.weight(depth, width, width),
        "norm2": {"scale": draw.gain(depth, width), "bias": draw.shift(depth, width)},
        "up": draw.weight(depth, width, width),
        "up_bias": draw.shift(depth, width),
        "down": draw.weight(depth, width, width),
        "down_bias": draw.shift(depth, width),
    }
    params = {
        "tokens": draw.normal(5, width),
        "positions": draw.shift(4, width),
        "layers": layer,
        "norm": {"scale": draw.gain(width), "bias": draw.shift(width)},
        "readout": draw.weight(width, 5),
    }
    (tokens, targets), loss = zoo._language(draw, 5, size, 4)
    return case_of(zoo.predict_scanned, params, (tokens, targets), loss)


def _with_moments(it, quantity):
    def run(params, batch):
        tapped = TappedScope(Scope(it.objective, params, batch, None), (quantity,))
        return tapped.pulled[0], tapped.moments

    return run


def test_memory():
    """Nothing of the size of a factor is held for each example."""
    size, width = 37, 32
    it = _wide_transformer(size)
    batch = it.example.batch
    run = _with_moments(it, BlockMoments(Recipe(fisher="empirical")))
    for aval in _avals(jax.make_jaxpr(run)(it.params, batch).jaxpr):
        assert not (size in aval.shape and math.prod(aval.shape) >= size * width * width), aval
    plain = lambda p, b: it.objective.gradient_of(it.objective.linearise(p, b))
    compiled = [
        jax.jit(f).lower(it.params, batch).compile().memory_analysis().temp_size_in_bytes
        for f in (run, plain)
    ]
    measures = jax.eval_shape(run, it.params, batch)[1]
    statistics = sum(math.prod(s.shape) * 8 for s in jax.tree.leaves(measures))
    assert compiled[0] <= 1.5 * compiled[1] + 2 * statistics, (compiled, statistics)


@pytest.mark.parametrize("name", ["cond", "gru", "transformer_scanned", "conv_grouped"])
def test_no_statistic_of_an_example(name):
    """In a batch of 41 no matrix of the size of a factor is there for each example, but for the
    weights of a `cond`, which `vmap` selects for each example, with taps or without.
    """
    it = case(name)
    size = 41
    x, y = (jnp.resize(a, (size, *a.shape[1:])) for a in it.example.batch)
    run = _with_moments(it, BlockMoments(Recipe(fisher="empirical")))
    squares = {
        (form.size, form.size)
        for block in it.blocks
        if isinstance(block, KroneckerBlock)
        for form in (block.input, block.output)
    }
    plain = lambda p, b: it.objective.gradient_of(it.objective.linearise(p, b))
    usual = {aval.shape for aval in _avals(jax.make_jaxpr(plain)(it.params, (x, y)).jaxpr)}
    for aval in _avals(jax.make_jaxpr(run)(it.params, (x, y)).jaxpr):
        if aval.shape not in usual:
            assert not (size in aval.shape and aval.shape[-2:] in squares), aval


# -- any contraction -------------------------------------------------------------------------


@st.composite
def contractions(draw):
    """An equation of x and w, with axes in any order: s of a stack, p of x alone (positions), i
    contracted, o of w alone.
    """
    axes = {
        kind: draw(st.integers(low, 2)) for kind, low in (("s", 0), ("p", 0), ("i", 1), ("o", 1))
    }
    letters = iter("abcdefgh")
    names = {kind: [next(letters) for _ in range(n)] for kind, n in axes.items()}
    sizes = {name: draw(st.integers(1, 3)) for group in names.values() for name in group}
    order = lambda kinds: "".join(draw(st.permutations([n for k in kinds for n in names[k]])))
    return names, sizes, order("spi"), order("sio"), order("spo"), draw(st.booleans())


@settings(max_examples=12)
@given(contractions(), st.integers(0, 9))
def test_any_contraction(site, seed):
    names, sizes, x_axes, w_axes, y_axes, weight_first = site
    rng = np.random.default_rng(seed)
    draw = lambda axes, *lead: rng.standard_normal((*lead, *(sizes[a] for a in axes)))
    equation = f"{w_axes},{x_axes}->{y_axes}" if weight_first else f"{x_axes},{w_axes}->{y_axes}"

    def predict(params, x):
        pair = (params["w"], x) if weight_first else (x, params["w"])
        return jnp.einsum(equation, *pair).reshape(-1)

    x, w = jnp.asarray(draw(x_axes, 2)), {"w": jnp.asarray(draw(w_axes))}
    y = jax.vmap(predict, (None, 0))(w, x)
    it = case_of(predict, w, (x, jnp.zeros_like(y)), cx.SquaredError())
    (block,) = it.blocks
    moments = measure(it)[2][block.path]
    grid = lambda kind: list(np.ndindex(*(sizes[a] for a in names[kind])))
    at = lambda array, axes, **index: array[
        tuple(
            dict(zip((n for k in index for n in names[k]), sum(index.values(), ()), strict=True))[a]
            for a in axes
        )
    ]
    g = np.asarray(y).reshape(2, *(sizes[a] for a in y_axes))  # the gradient of ½y²
    a = {
        s: sum(
            np.outer(row, row)
            for b in range(2)
            for p in grid("p")
            for row in [[at(np.asarray(x)[b], x_axes, s=s, p=p, i=i) for i in grid("i")]]
        )
        / (2 * len(grid("p")))
        for s in grid("s")
    }
    total = {
        s: sum(
            np.outer(row, row)
            for b in range(2)
            for p in grid("p")
            for row in [[at(g[b], y_axes, s=s, p=p, o=o) for o in grid("o")]]
        )
        / 2
        for s in grid("s")
    }
    # A label for each entry of the weight says which matrix, row and column holds it.
    labels = np.arange(w["w"].size, dtype=np.float64).reshape(w["w"].shape)
    held = np.asarray(arrange(block, [jnp.asarray(labels)])).astype(int)
    label = lambda s, o, i: int(at(labels, w_axes, s=s, o=o, i=i))
    assert held.shape == (len(grid("s")), len(grid("o")), len(grid("i")))
    place = {held[index]: index for index in np.ndindex(*held.shape)}
    for s in grid("s"):
        rows = [place[label(s, o, grid("i")[0])] for o in grid("o")]
        columns = [place[label(s, grid("o")[0], i)] for i in grid("i")]
        k, outs, ins = rows[0][0], [r[1] for r in rows], [c[2] for c in columns]
        close(np.asarray(moments.input.product)[k][np.ix_(ins, ins)], a[s])
        close(np.asarray(moments.output.product)[k][np.ix_(outs, outs)], total[s])
