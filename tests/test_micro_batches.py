"""A batch taken in parts gives the step of the whole, with the memory of a part."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from curvax.plan.moments import BlockMoments
from tests.problems import EXACT_CG

BATCH, PARTS, STEPS = 120, 4, 10
DAMPING = cx.LevenbergMarquardt(1.0, every=2)


def predict(params, x):
    hidden = jnp.tanh(params["w1"] @ x + params["b1"])
    return params["w2"] @ hidden + params["b2"]


def make(reduction="mean", weighted=False, l2=0.03, seed=0, **options):
    """Layers of 36 inputs, wide enough for low-rank factors, and a batch."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape))
    params = {"w1": draw(34, 36), "b1": draw(34), "w2": draw(3, 34), "b2": draw(3)}
    batch = (jnp.asarray(rng.standard_normal((BATCH, 36))), jnp.asarray(rng.integers(0, 3, BATCH)))
    if weighted:
        weight = rng.uniform(0.5, 2.0, BATCH)
        weight[1::PARTS] = 0.0  # a part with no weight at all
        batch = (*batch, jnp.asarray(weight))
    loss = cx.SoftmaxCrossEntropy()
    objective = cx.Objective(predict, loss, reduction=reduction, l2=l2, example=batch, **options)
    return objective, params, batch


def kfac(objective, rank, **options):
    settings = {"fisher": "exact", "refresh_every": 2, "damping": DAMPING} | options
    return cx.methods.kfac(objective, rank=rank, **settings)


# Nothing here draws random numbers that depend on the examples.
METHODS = {
    "ggn_cg": lambda o: cx.methods.ggn_cg(o, damping=DAMPING, solver=EXACT_CG, warm_start=0.9),
    "newton_cg": lambda o: cx.methods.newton_cg(o, damping=DAMPING, solver=EXACT_CG),
    "nystrom_newton": lambda o: cx.methods.nystrom_newton(o, solver=EXACT_CG, damping=1.0),
    "sophia_h": lambda o: cx.methods.sophia_h(o, every=2),
    "kfac": lambda o: kfac(o, None),
    "kfac of low rank": lambda o: kfac(o, 8),
    "kfac of inputs": lambda o: kfac(o, 8, fisher="forward_only"),
    # Each eigenvector is determined only where a factor has full rank: hence the large batch.
    "ekfac": lambda o: cx.methods.ekfac(o, fisher="exact", damping=1.0, refresh_every=2),
}


def trained(method, params, batch, count, *, steps=STEPS, pure=False, **options):
    """Parameters after some steps, and the metrics of each."""
    optimizer = optax.chain(method, optax.trace(0.5), optax.scale_by_learning_rate(0.1))
    step = cx.make_step(optimizer, method, micro_batches=count)
    run = eqx.filter_jit(step.pure) if pure else step
    state, told = step.init(params), []
    for i in range(steps):
        params, state, info = run(params, state, batch, jax.random.key(i), **options)
        told.append(info)
    assert int(state.skipped) == 0
    return params, told


def close(got, wanted, rtol=1e-10):
    got, wanted = (jax.tree.leaves(tree) for tree in (got, wanted))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_are_those_of_the_whole_batch(name):
    objective, params, batch = make(weighted="kfac" not in name)
    whole, _ = trained(METHODS[name](objective), params, batch, 1)
    parts, _ = trained(METHODS[name](objective), params, batch, PARTS)
    close(parts, whole)
    assert not np.allclose(parts["w1"], params["w1"], rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "reduction", "weighted"),
    [
        ("ggn_cg", "sum", True),
        ("kfac", "sum", False),
        ("kfac", "sum", True),
        ("kfac", "mean", True),
    ],
)
def test_sums_means_and_weights(name, reduction, weighted):
    objective, params, batch = make(reduction, weighted)
    whole, before = trained(METHODS[name](objective), params, batch, 1, steps=4)
    parts, after = trained(METHODS[name](objective), params, batch, PARTS, steps=4)
    close(parts, whole)
    # In float32; the gain ratio is a difference of two values of nearly the same size.
    for got, wanted in zip(after, before, strict=True):
        np.testing.assert_allclose(got.value, wanted.value, rtol=1e-6)
        np.testing.assert_allclose(got.gain_ratio, wanted.gain_ratio, rtol=1e-5)


@pytest.mark.parametrize(("name", "pure"), [("ggn_cg", False), ("kfac", False), ("kfac", True)])
def test_one_jitted_function_and_a_batch_apart_for_the_curvature(name, pure):
    objective, params, batch = make()
    apart = make("mean", weighted=True, seed=1)[2]
    options = {"pure": pure, "curvature_batch": apart, "steps": 4}
    whole, _ = trained(METHODS[name](objective), params, batch, 1, **options)
    parts, _ = trained(METHODS[name](objective), params, batch, PARTS, **options)
    close(parts, whole)


def test_what_has_no_weight_at_all_leaves_the_l2_term():
    objective, params, (x, y) = make()
    batch = (x, y, jnp.zeros(BATCH))
    method = METHODS["ggn_cg"](objective)
    close(*(method.observe(params, batch, micro_batches=count).gradient for count in (PARTS, 1)))


def parted(batch):
    return [jax.tree.map(lambda leaf, i=i: leaf[i::PARTS], batch) for i in range(PARTS)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_samples_are_drawn_for_each_part_by_a_key_of_its_own(reduction):
    """Bartlett's estimate and K-FAC's sampled factors are averages of those of the parts."""
    objective, params, batch = make(reduction, l2=0.0)
    key = jax.random.key(3)
    scale = 1 / PARTS if reduction == "mean" else 1.0
    for method in (cx.methods.sophia_g(objective), kfac(objective, None, fisher="mc")):
        observe = eqx.filter_jit(method.observe)
        together = observe(params, batch, key, micro_batches=PARTS)
        alone = [
            observe(params, part, jax.random.fold_in(key, i))
            for i, part in enumerate(parted(batch))
        ]
        close(together.gradient, sum_of([one.gradient for one in alone], scale))
        (quantity,) = (q for q in together.quantities if q.additive)
        found = [one[quantity] for one in alone]
        if isinstance(quantity, BlockMoments):
            for path, moments in together[quantity].items():
                inputs = sum_of([each[path].input for each in found], 1 / PARTS)
                close(moments.input, inputs)
                close(moments.output, sum_of([each[path].output for each in found], scale))
        else:
            close(together[quantity], sum_of(found, scale))


def sum_of(trees, scale):
    return jax.tree.map(lambda *leaves: scale * sum(leaves), *trees)


def test_a_stochastic_model_and_low_precision():
    """A model that draws, in bfloat16: what comes out has the type that went in."""

    def noisy(params, x, key):
        return predict(params, x + jax.random.normal(key, x.shape, x.dtype))

    _, params, batch = make()
    low = lambda tree: jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )
    params, batch = low(params), low(batch)
    objective = cx.Objective(noisy, cx.SoftmaxCrossEntropy(), stochastic=True, example=batch)
    method = cx.methods.ggn_cg(objective, damping=1.0)
    key = jax.random.key(0)
    gradient = method.observe(params, batch, key, micro_batches=PARTS).gradient
    alone = [
        method.observe(params, part, jax.random.fold_in(key, i)).gradient
        for i, part in enumerate(parted(batch))
    ]
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    mean = sum_of([wide(one) for one in alone], jnp.float32(1 / PARTS))
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(mean))
    for got, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(mean), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=0, atol=0.02 * size)
    new, _ = trained(method, params, batch, PARTS, steps=2)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(new))


def test_under_a_mask():
    objective, params, batch = make()
    mask = {"w1": True, "b1": False, "w2": True, "b2": True}
    taken = []
    for count in (1, PARTS):
        method = METHODS["ggn_cg"](objective)
        optimizer = optax.chain(optax.masked(method, mask), optax.scale_by_learning_rate(0.1))
        step = cx.make_step(optimizer, method, micro_batches=count)
        moved, state = params, step.init(params)
        for _ in range(3):
            moved, state, _ = step(moved, state, batch)
        taken.append(moved)
    close(*taken)


@pytest.mark.parametrize("name", ["ggn_cg", "kfac", "sophia_h"])
def test_memory_is_that_of_a_part(name):
    def deep(params, x):
        for _ in range(8):
            x = jnp.tanh(params["w"] @ x)
        return x

    params = {"w": jnp.eye(34)}
    batch = (jnp.zeros((4096, 34)), jnp.zeros(4096, jnp.int32))
    objective = cx.Objective(deep, cx.SoftmaxCrossEntropy(), example=batch)
    method = METHODS[name](objective)
    if name == "kfac":
        method = kfac(objective, None, fisher="mc")
    taken = []
    for count in (1, 8):
        step = cx.make_step(optax.chain(method, optax.scale(-0.1)), method, micro_batches=count)
        lowered = step.lower(params, step.init(params), batch, jax.random.key(0), count=0)
        taken.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    whole, part = taken
    assert whole > 8 * 4096 * 34 * 8  # what each layer gives is kept
    assert part < 0.35 * whole, taken


def test_what_cannot_be_taken_in_parts_is_said():
    objective, params, batch = make(l2=0.0)
    method = METHODS["ggn_cg"](objective)
    with pytest.raises(ValueError, match="micro_batches: got 0, wanted at least 1"):
        cx.make_step(method, method, micro_batches=0)
    step = cx.make_step(method, method, micro_batches=7)
    with pytest.raises(ValueError, match="got 120 examples, wanted a multiple of micro_batches=7"):
        step(params, step.init(params), batch)
    split = cx.Objective(predict, cx.SoftmaxCrossEntropy(), split=lambda b: (b["x"], b["y"]))
    method = cx.methods.ggn_cg(split, damping=1.0)
    step = cx.make_step(method, method, micro_batches=2)
    odd = {"x": batch[0], "y": batch[1], "rate": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"the leaf \['rate'\] has shape \(3,\)"):
        step(params, step.init(params), odd)
    for method in (cx.methods.egn(objective, damping=1.0), cx.methods.ignd(objective, damping=1.0)):
        step = cx.make_step(method, method, micro_batches=2)
        with pytest.raises(ValueError, match="micro_batches: got more than one, wanted 1"):
            step(params, step.init(params), batch, jax.random.key(0))
