"""Leaves as stacks of tensors, and the frame that applies a rule to them."""

import functools
import itertools
from typing import NamedTuple

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from curvax.tensors import Layouts
from curvax.tensorwise import tensorwise
from tests.problems import avals


def close(got, wanted, rtol=1e-12, atol=1e-13):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, wanted)


def same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def layout_of(shape, words=None, **options):
    axes = None if words is None else {"w": words}
    (layout,) = Layouts.of(axes, **options)({"w": jax.ShapeDtypeStruct(shape, jnp.float32)})
    return layout


def numbered(shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# -- leaves as tensors ---------------------------------------------------------------------------


@st.composite
def leaves(draw):
    """A shape, the names of its axes, and options."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    words = draw(
        st.none()
        | st.lists(
            st.sampled_from(["in", "out", "heads", "layers"]),
            min_size=len(shape),
            max_size=len(shape),
        ).map(" ".join)
        | st.integers(0, len(shape) - 1).map(lambda n: " ".join(["layers"] * n + ["..."]))
    )
    options = {
        "block": draw(st.none() | st.integers(1, 6)),
        "merge": draw(st.integers(0, 12)),
        "longest": draw(st.none() | st.integers(1, 6)),
        "order": draw(st.integers(1, 3)),
        "matrices": draw(st.booleans()),
    }
    return shape, words, options


@hypothesis.given(leaf=leaves())
@hypothesis.settings(max_examples=35)
def test_blocks_hold_each_entry_once(leaf):
    shape, words, options = leaf
    layout = layout_of(shape, words, **options)
    if layout is None:
        return
    x = numbered(shape)
    stacks = layout.split(jnp.asarray(x))
    assert tuple(stack.shape for stack in stacks) == layout.blocks
    np.testing.assert_array_equal(layout.join(stacks), x)
    np.testing.assert_array_equal(layout.leaf(layout.tensors(jnp.asarray(x))), x)
    found = np.concatenate([np.ravel(stack) for stack in stacks])
    np.testing.assert_array_equal(np.sort(found), x.ravel())
    most = [
        size if options["longest"] is not None and size > options["longest"] else options["block"]
        for size in layout.sizes
    ]
    for _, *sizes in layout.blocks:
        assert all(block is None or n <= block for n, block in zip(sizes, most, strict=True))
    if options["block"] is None:
        assert layout.blocks == ((layout.count, *layout.sizes),)
    if options["matrices"]:
        assert len(layout.sizes) == 2
    elif layout.sizes and not (words and ("in" in words or "out" in words)):
        assert sum(n > 1 for n in layout.sizes) >= options["order"] or options["order"] == 1


def test_tensors_are_those_that_the_names_say():
    x = numbered((2, 3, 4, 5))
    cases = {
        "out in in in": x.reshape(1, 2, 60),
        "in out out out": x.reshape(1, 2, 60).transpose(0, 2, 1),
        "layers heads in out": x.reshape(6, 4, 5).transpose(0, 2, 1),
        "in heads in out": x.transpose(1, 3, 0, 2).reshape(3, 5, 8),
        "layers ...": x,
        "layers experts ...": x.reshape(6, 4, 5),
        "... layers": x.transpose(3, 0, 1, 2),
        "a b c d": None,
        "in in layers layers": x.transpose(2, 3, 0, 1).reshape(20, 6),
    }
    for words, wanted in cases.items():
        layout = layout_of(x.shape, words)
        got = None if layout is None else layout.tensors(jnp.asarray(x))
        assert (got is None) == (wanted is None), words
        if wanted is not None:
            np.testing.assert_array_equal(got, wanted, words)


def test_matrices():
    matrices = functools.partial(layout_of, matrices=True)
    x = numbered((3, 4))
    for words, outputs in ((None, 1), ("in out", 1), ("out in", 0)):
        layout = matrices(x.shape, words)
        # As it lies in memory.
        np.testing.assert_array_equal(layout.tensors(jnp.asarray(x))[0], x)
        assert layout.outputs == outputs
    assert matrices((2, 3, 4), "layers ...").blocks == ((2, 3, 4),)
    assert matrices((2, 3, 4), "in heads out").blocks == ((3, 2, 4),)
    both = matrices((2, 3, 4, 5), "out in in out")
    assert both.sizes == (10, 12) and both.outputs == 0
    for shape, words in (((3,), None), ((2, 3, 4), None), ((2, 3), "layers ..."), ((3,), "in")):
        assert matrices(shape, words) is None


def test_merging_and_blocks():
    merged = lambda shape, **options: layout_of(shape, **options).sizes
    assert merged((3, 3, 4, 8), merge=9) == (9, 4, 8)
    assert merged((3, 3, 4, 8), merge=36) == (36, 8)
    assert merged((1, 3, 1, 8)) == (3, 8)
    assert merged((1, 1)) == (1,)
    cut = layout_of((5, 7), block=3)
    assert cut.blocks == ((2, 3, 3), (1, 3, 1), (2, 2, 3), (1, 2, 1))
    assert layout_of((2, 5, 6), "layers ...", block=3).blocks == ((4, 3, 3), (4, 2, 3))
    for nothing in ((), (0, 3)):
        assert layout_of(nothing) is None


def test_norms_are_those_of_the_tensors():
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    norms = layout_of(x.shape, "in heads out").norms(jnp.asarray(x))
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=(0, 2))[None, :, None], rtol=1e-12)
    low = layout_of((300,)).norms(jnp.full((300,), 30.0, jnp.float16))
    np.testing.assert_allclose(low, [30 * np.sqrt(300)], rtol=1e-3)  # the square is too large


def test_the_longest_part_of_a_path_decides():
    tree = {"mlp": {"w": jnp.zeros((2, 3)), "out": jnp.zeros((2, 3))}, "embed": jnp.zeros((4, 3))}
    axes = {"mlp": "out in", "mlp']['w": None, "": "in out"}
    found = {leaf.path: leaf.dims for leaf in Layouts.of(axes)(tree) if leaf is not None}
    assert found == {"['mlp']['out']": ((0,), (1,)), "['embed']": ((1,), (0,))}


@pytest.mark.parametrize(
    "axes, message",
    [
        (
            {"w": "... in ..."},
            r"axes: got '\.\.\. in \.\.\.' for 'w', wanted '\.\.\.' at most once",
        ),
        ({"w": "in out"}, r"axes: got 'in out' for \['w'\], whose shape is \(2, 3, 4\): wanted 3"),
        ({"w": "a b c d"}, r"wanted 3 names"),
        ({"w": "a b c d ..."}, r"wanted 3 names"),
        ({"w": "... in"}, r"wanted a name for each axis where one is 'in' or 'out'"),
        ({"v": "in out out"}, r"axes: got the key 'v', which is no part of the path of a leaf"),
    ],
)
def test_names_that_do_not_fit(axes, message):
    with pytest.raises(ValueError, match=message):
        Layouts.of(axes)({"w": jnp.zeros((2, 3, 4))})


def test_block_size_out_of_range():
    with pytest.raises(ValueError, match="block_size: got 0, wanted a size ≥ 1"):
        Layouts.of(block=0)


# -- rules ---------------------------------------------------------------------------------------


class ProbeState(NamedTuple):
    total: jax.Array
    taken: jax.Array


class Probe(cx.AbstractTensorRule):
    """The sum of all gradients so far, times a number; remembers the count that it was given."""

    factor: float = 2.0

    def init(self, stack):
        return ProbeState(jnp.zeros_like(stack), jnp.zeros((), jnp.int32))

    def update(self, stacks, states, count):
        totals = [state.total + stack for stack, state in zip(stacks, states, strict=True)]
        steps = [total * jnp.asarray(self.factor, total.dtype) for total in totals]
        return steps, [ProbeState(total, jnp.asarray(count)) for total in totals]


PARAMS = {"w": (3, 4), "layers": (2, 3, 5), "b": (4,), "scale": ()}
AXES = {"layers": "layers ..."}


def draw(t, shapes=PARAMS, dtype=jnp.float64):
    rng = np.random.default_rng(t)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def probe(matrices=True, axes=AXES, **options):
    return tensorwise(Probe(), Layouts.of(axes, matrices=matrices), **options)


def test_tensors_and_the_rest():
    grads, params = draw(0), draw(1)
    optimizer = probe(rest=optax.chain(optax.trace(0.5), optax.add_decayed_weights(0.1)))
    state = optimizer.init(params)
    for t in range(1, 4):
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        trace = sum(0.5**i for i in range(t))
        wanted = {
            name: 2 * t * g if name in ("w", "layers") else trace * g + 0.1 * params[name]
            for name, g in grads.items()
        }
        close(updates, wanted)
    assert set(state.tensors) == {"['w']", "['layers']"}
    assert state.tensors["['layers']"][0].total.shape == (2, 3, 5)
    assert int(state.count) == 3 and int(state.skipped) == 0


def test_without_a_rest_other_leaves_are_as_they_are():
    grads = draw(0)
    optimizer = probe()
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    same({k: updates[k] for k in ("b", "scale")}, {k: grads[k] for k in ("b", "scale")})


def test_blocks_are_a_matter_of_the_layout():
    """A rule that looks at each entry alone does the same whatever the blocks are."""
    grads = draw(0)
    whole, cut = (
        tensorwise(Probe(), Layouts.of(AXES, block=block, merge=merge))
        for block, merge in ((None, 0), (2, 20))
    )
    close(cut.update(grads, cut.init(grads))[0], whole.update(grads, whole.init(grads))[0])
    assert len(cut.init(grads).tensors["['w']"]) == 1
    assert len(cut.init(grads).tensors["['b']"]) == 1


def test_grafting():
    """Each tensor gets the norm that it has after another transformation, whatever its blocks."""
    like = optax.scale_by_adam()
    optimizer = tensorwise(Probe(), Layouts.of(AXES, block=2), magnitude=like)
    grads = draw(0)
    grads["w"] = jnp.zeros_like(grads["w"])
    state, peer = optimizer.init(grads), like.init(grads)
    for t in range(3):
        updates, state = jax.jit(optimizer.update)(grads, state, grads)
        with jax.numpy_dtype_promotion("standard"):
            adam, peer = like.update(grads, peer)
        for i in range(2):
            step, g = updates["layers"][i], grads["layers"][i]
            np.testing.assert_allclose(
                step, g * np.linalg.norm(adam["layers"][i]) / np.linalg.norm(g), rtol=1e-10
            )
        same(updates["w"], jnp.zeros_like(updates["w"]))
        grads = {**draw(t + 1), "layers": grads["layers"], "w": grads["w"]}
    same(state.magnitude.mu["layers"], peer.mu["layers"])


def test_chained_rules():
    optimizer = tensorwise(cx.Chained(Probe(2.0), Probe(0.5)), Layouts.of(AXES))
    grads = draw(0)
    state = optimizer.init(grads)
    for t in (1, 2, 3):
        updates, state = jax.jit(optimizer.update)(grads, state)
        close(updates["w"], grads["w"] * t * (t + 1) / 2)
    first, second = state.tensors["['w']"][0]
    close(first.total[0], 3 * grads["w"])
    close(second.total[0], 12 * grads["w"])


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_optax(nesterov):
    """Adam's, whose squares are of no account where they decay at once."""
    adam = optax.scale_by_adam(0.8, 0.0, eps=0.0, nesterov=nesterov)
    optimizer = tensorwise(cx.Momentum(0.8, nesterov), Layouts.of(AXES))
    grads = draw(0)
    del grads["scale"]
    state, peer = optimizer.init(grads), adam.init(grads)
    for t in range(4):
        g = {k: v * (1 + t) for k, v in grads.items()}
        with jax.numpy_dtype_promotion("standard"):
            wanted, peer = adam.update(g, peer)
        updates, state = jax.jit(optimizer.update)(g, state)
        close(updates, jax.tree.map(lambda a, b: a * jnp.abs(b), wanted, g), rtol=1e-10)


# Names of the axes of one leaf, and as what it is the same leaves apart.
RULES = {
    "muon": cx.Chained(cx.Momentum(0.9, True), cx.NewtonSchulz(eps=1e-8)),
    "shampoo": cx.KroneckerRoots(cx.EighRoot(), refresh_every=2),
    "soap": cx.EigenbasisAdam(refresh_every=2),
}


@pytest.mark.parametrize("name", RULES)
def test_leaves_that_are_scanned_over_are_separate_leaves(name):
    layouts = lambda axes: Layouts.of(axes, matrices=True)
    # In one transformation each, as rules may treat several leaves together.
    stacked = tensorwise(RULES[name], layouts({"w": "layers ..."}))
    apart = tensorwise(RULES[name], layouts(None))
    states = (
        stacked.init({"w": jnp.zeros((2, 3, 4))}),
        apart.init({"w0": jnp.zeros((3, 4)), "w1": jnp.zeros((3, 4))}),
    )
    update = [jax.jit(optimizer.update) for optimizer in (stacked, apart)]
    for t in range(4):
        grads = draw(t, {"w0": (3, 4), "w1": (3, 4)})
        together = {"w": jnp.stack([grads["w0"], 10 * grads["w1"]])}
        grads["w1"] = 10 * grads["w1"]
        one, first = update[0](together, states[0])
        many, second = update[1](grads, states[1])
        states = first, second
        np.testing.assert_allclose(one["w"][0], many["w0"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(one["w"][1], many["w1"], rtol=1e-9, atol=1e-12)


# -- steps that are not taken --------------------------------------------------------------------


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e200])
def test_a_gradient_that_is_not_finite_costs_one_step(bad):
    """Nor one whose square is not finite. The next step is what it would have been, the first one
    too: nothing counts a step that was not taken.
    """
    rule = cx.Chained(cx.Momentum(0.9, True), Probe())
    rest = optax.scale_by_adam()
    optimizer = tensorwise(rule, Layouts.of(AXES, matrices=True), rest=rest, magnitude=rest)
    state, update = optimizer.init(draw(0)), jax.jit(optimizer.update)
    for t in range(3):
        for name in PARAMS:
            poisoned = draw(t)
            flat = poisoned[name].ravel().at[0].set(bad).reshape(PARAMS[name])
            updates, after = update({**poisoned, name: flat}, state)
            same(updates, jax.tree.map(jnp.zeros_like, updates))
            assert int(after.skipped) == 1 and int(after.count) == int(state.count) + 1
            same(after._replace(count=state.count, skipped=state.skipped), state)
            again, later = update(draw(t), after)
            wanted, new = update(draw(t), state)
            close(again, wanted)
            close(later._replace(count=new.count, skipped=new.skipped), new)
        _, state = update(draw(t), state)
    assert int(state.tensors["['w']"][0][1].taken) == 2


# -- dtypes and structures -----------------------------------------------------------------------


def test_low_precision_leaves_are_summed_in_float32():
    optimizer = probe(axes=None)
    params = {"w": jnp.zeros((3, 4), jnp.bfloat16), "b": jnp.zeros(4, jnp.float16)}
    state = optimizer.init(params)
    assert state.tensors["['w']"][0].total.dtype == jnp.float32
    update = jax.jit(optimizer.update)
    small = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-9, p.dtype), params)
    large = jax.tree.map(jnp.ones_like, params)
    _, state = update(large, state, params)
    for _ in range(4):
        updates, after = update(small, state, params)
        assert avals(updates) == avals(params) and avals(after) == avals(state)
        state = after
    np.testing.assert_array_equal(state.tensors["['w']"][0].total, 1 + 2.0**-7)
    # A gradient in another dtype, and none to say what is wanted.
    wide = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float64), params)
    shapes = jax.eval_shape(optimizer.update, wide, state, params)
    assert [x.dtype for x in jax.tree.leaves(shapes[0])] == [jnp.float16, jnp.bfloat16]
    updates, _ = jax.eval_shape(optimizer.update, small, state)
    assert [x.dtype for x in jax.tree.leaves(updates)] == [jnp.float16, jnp.bfloat16]


DONATED = {
    "muon": cx.methods.muon(preconditioner=cx.EigenbasisAdam(), axes=AXES),
    "psgd_kron": cx.methods.psgd_kron(axes=AXES),
    "chained": tensorwise(cx.Chained(cx.Momentum(), cx.EigenbasisAdam()), Layouts.of(AXES)),
}


@pytest.mark.parametrize("name", DONATED)
def test_state_can_be_donated(name):
    """No buffer stands in it twice."""
    state = DONATED[name].init(draw(0))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def test_init_on_shapes():
    optimizer = probe(rest=optax.scale_by_adam(), magnitude=optax.scale_by_adam())
    shapes = jax.eval_shape(lambda: draw(0))
    same(optimizer.init(shapes), optimizer.init(draw(0)))
    abstract = jax.eval_shape(optimizer.init, shapes)
    types = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    assert types(abstract) == types(optimizer.init(draw(0)))


class Model(eqx.Module):
    """A module that is called, with a function among its leaves."""

    linears: tuple[eqx.nn.Linear, ...]
    activation: object

    def __call__(self, x):
        for linear in self.linears:
            x = self.activation(linear(x))
        return x


def equinox_model():
    keys = jax.random.split(jax.random.key(0))
    linears = tuple(eqx.nn.Linear(3, 3, key=key, dtype=jnp.float64) for key in keys)
    return Model(linears, jax.nn.relu)


def test_models_that_can_be_called():
    model = equinox_model()
    params = eqx.filter(model, eqx.is_inexact_array)
    optimizer = probe(axes={"weight": "out in"}, rest=optax.scale(3.0))
    state = optimizer.init(params)
    assert set(state.tensors) == {".linears[0].weight", ".linears[1].weight"}
    grads = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(3, jnp.float64))))(model)
    updates, _ = eqx.filter_jit(optimizer.update)(grads, state, params)
    for update, grad in zip(updates.linears, grads.linears, strict=True):
        close(update.weight, 2 * grad.weight)
        close(update.bias, 3 * grad.bias)
    assert isinstance(eqx.apply_updates(model, updates), Model)
    # Under a partition by labels.
    labels = lambda params: jax.tree.map(lambda p: "a" if p.ndim == 2 else "b", params)
    parts = optax.partition({"a": probe(axes={"weight": "out in"}), "b": optax.scale(3.0)}, labels)
    same(parts.update(grads, parts.init(params), params)[0], updates)


# -- among other transformations -----------------------------------------------------------------


def test_masked():
    """A key of `axes` may be that of a leaf that is hidden."""
    optimizer = optax.masked(probe(), {"w": True, "layers": False, "b": True, "scale": False})
    grads = draw(0)
    state = optimizer.init(grads)
    assert list(state.inner_state.tensors) == ["['w']"]
    updates, after = jax.jit(optimizer.update)(grads, state, grads)
    close(updates, {**grads, "w": 2 * grads["w"]})
    assert avals(after) == avals(state)
    with pytest.raises(ValueError, match="got the key 'layers'"):
        probe().init({"w": grads["w"]})


def test_partition_with_a_label_that_no_leaf_has():
    labels = {"w": "tensors", "layers": "tensors", "b": "others", "scale": "others"}
    parts = {"tensors": probe(), "others": optax.scale(3.0), "none": probe()}
    optimizer = optax.partition(parts, labels)
    grads = draw(0)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(grads), grads)
    close(updates, {k: (2 if labels[k] == "tensors" else 3) * g for k, g in grads.items()})


def test_tree_map_params():
    """Stacks have no parameter's shape: for a tree of shardings they are not parameters."""
    optimizer = probe(rest=optax.trace(0.9), magnitude=optax.trace(0.9))
    state = optimizer.init(draw(0))
    mapped = optax.tree_map_params(optimizer, lambda leaf: leaf + 1, state)
    same(mapped.magnitude.trace["w"], jnp.ones((3, 4)))
    same(mapped.rest.trace["b"], jnp.ones(4))
    same(mapped.tensors, state.tensors)
    specs = {name: name for name in PARAMS}
    mapped = optax.tree_map_params(
        optimizer,
        lambda leaf, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: "replicated",
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    assert mapped.tensors == mapped.count == mapped.skipped == "replicated"
    assert mapped.magnitude.trace["w"] == "w" and mapped.rest.trace["b"] == "b"


def test_multi_steps():
    optimizer = optax.MultiSteps(probe(), every_k_schedule=2).gradient_transformation()
    grads = draw(0, dtype=jnp.float32)
    state, update = optimizer.init(grads), jax.jit(optimizer.update)
    for t in range(4):
        scaled = jax.tree.map(lambda g, c=1 + t % 2: c * g, grads)
        with jax.numpy_dtype_promotion("standard"):
            updates, after = update(scaled, state, grads)
        assert avals(after) == avals(state)
        state = after
        factor = 0 if t % 2 == 0 else 1.5 * 2 * (1 + t // 2)
        close(updates["w"], jnp.float32(factor) * grads["w"], rtol=1e-6)


def test_extra_arguments_go_to_the_other_transformations():
    def update(updates, state, params=None, *, factor, **extra):
        del params, extra
        return jax.tree.map(lambda u: u * factor, updates), state

    stretched = optax.GradientTransformationExtraArgs(lambda params: (), update)
    grads = draw(0)
    optimizer = probe(rest=stretched)
    updates, _ = optimizer.update(grads, optimizer.init(grads), factor=5.0, unknown="x")
    close(updates["b"], 5 * grads["b"])


def test_all_orders_of_leaves():
    """What belongs to a leaf does not depend on its place among the others."""
    grads = draw(0)
    optimizer = probe(rest=optax.scale(3.0))
    wanted, _ = optimizer.update(grads, optimizer.init(grads))
    for names in itertools.permutations(PARAMS):
        keys = [f"{i}{name}" for i, name in enumerate(names)]  # dictionaries are sorted
        tree = {key: grads[key[1:]] for key in keys}
        updates, _ = optimizer.update(tree, optimizer.init(tree))
        close({key[1:]: u for key, u in updates.items()}, wanted)
