"""K-FAC for some leaves, another optimizer for the rest."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from tests import oracles, problems, zoo
from tests.problems import avals

NAMES = ("kfac", "ekfac", "newton_muon")
HIDDEN = optax.MaskedNode


def close(got, wanted, rtol=1e-9, atol=1e-12):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, wanted)


@functools.cache
def problem():
    p = problems.problem()
    return p._replace(
        objective=cx.Objective(p.objective.predict, p.objective.loss, example=p.batch)
    )


def make(name, objective, **options):
    options = {"damping": 0.03, "refresh_every": 2} | options
    if name != "newton_muon":
        options = {"fisher": "exact"} | options
    return getattr(cx.methods, name)(objective, **options)


def taken(optimizer, method, params, batch, steps=1):
    """What an optimizer makes of the parameters, and its state."""
    step = cx.make_step(optimizer, method)
    state, first = step.init(params), None
    for _ in range(steps):
        params, state, info = step(params, state, batch)
        assert bool(info.finite)
        first = first or avals(state)
        assert avals(state) == first
    return params, state


def references(p):
    layers = [(p.params["w1"], p.params["b1"]), (p.params["w2"], None)]
    return oracles.kfac_dense_reference(layers, p.batch[0], "softmax")


λ = float(jnp.float32(0.03))


def damped(matrix):
    shift = np.sqrt(λ) * np.trace(matrix) / len(matrix)
    return np.linalg.inv(matrix + shift * np.eye(len(matrix)))


# -- the direction -------------------------------------------------------------------------------


def test_a_weight_whose_bias_is_masked_has_none():
    p = problem()
    method = make("kfac", p.objective, rank=None, scaling=cx.AsIs())
    optimizer = optax.masked(method, {"w1": True, "b1": False, "w2": True})
    params, state = taken(optax.chain(optimizer, optax.scale(-1.0)), method, p.params, p.batch)
    first, second = references(p)
    wanted = {
        "w1": damped(first.g) @ p.gradient["w1"] @ damped(first.a[:-1, :-1]),
        "b1": p.gradient["b1"],  # optax.masked lets it through
        "w2": damped(second.g) @ p.gradient["w2"] @ damped(second.a),
    }
    close(jax.tree.map(jnp.subtract, p.params, params), wanted, rtol=1e-6, atol=1e-8)
    memory = state.optimizer[0].inner_state.preconditioner
    assert memory["['b1']"] == HIDDEN() and memory["['w1']"].input.factor.size == 4
    assert {row.path for row in cx.factor_report(state)} == {"['w1']", "['w2']"}


def test_a_bias_whose_weight_is_masked_is_diagonal():
    p = problem()
    method = make("kfac", p.objective, rank=None, scaling=cx.AsIs())
    optimizer = optax.masked(method, {"w1": False, "b1": True, "w2": False})
    params, state = taken(optax.chain(optimizer, optax.scale(-1.0)), method, p.params, p.batch)
    entries = np.diag(references(p)[0].g)
    wanted = p.gradient["b1"] / (entries + λ * entries.mean())
    close(p.params["b1"] - params["b1"], wanted, rtol=1e-6, atol=1e-8)
    memory = state.optimizer[0].inner_state.preconditioner
    assert {path for path, each in memory.items() if each != HIDDEN()} == {"['b1']"}


MASKS = {
    "weights": {k: {"w": True, "b": False} for k in ("first", "middle", "last")},
    "mixed": {"first": False, "middle": {"w": False, "b": True}, "last": True},
}


@pytest.mark.parametrize(
    "name, mask",
    [("kfac", "weights"), ("ekfac", "mixed"), ("newton_muon", "mixed")],
)
def test_masked_leaves_are_as_if_they_were_frozen(name, mask, monkeypatch):
    """The same steps as those of the objective whose other leaves are not trained."""
    monkeypatch.setattr("curvax.taps.blocks.WHOLE", 1)
    params, predict, batch, loss = zoo.ZOO["inner_jit"]()
    objective = cx.Objective(predict, loss, example=batch)
    options = {} if name == "ekfac" else {"rank": 3, "stagger": 2}
    flags = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), MASKS[mask], params)
    trained, frozen = eqx.partition(params, flags)

    method = make(name, objective, **options)
    rate = optax.scale(-0.05)
    inside = optax.chain(method, optax.trace(0.5), rate)
    optimizer = optax.partition(
        {True: inside, False: optax.set_to_zero()}, jax.tree.map(bool, flags)
    )
    got, _ = taken(optimizer, method, params, batch, steps=4)

    alone = make(name, cx.Objective(predict, loss, example=batch, static=frozen), **options)
    wanted, _ = taken(optax.chain(alone, optax.trace(0.5), rate), alone, trained, batch, steps=4)
    # Low-rank factors begin with a basis that is drawn by the number of a block.
    close(got, eqx.combine(wanted, frozen), rtol=1e-7, atol=1e-9)


# -- inside of a step ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, model", [("kfac", "mlp"), ("ekfac", "fused_qkv"), ("newton_muon", "fused_qkv")]
)
def test_the_rest_by_adam(name, model, monkeypatch):
    """Biases and the last layer are Adam's; on the host and under `cond`."""
    monkeypatch.setattr("curvax.taps.blocks.WHOLE", 4)
    model, predict, batch, loss = zoo.ZOO[model](jnp.float32)
    objective = cx.Objective(predict, loss, example=batch)
    method = getattr(cx.methods, name)(objective, refresh_every=2)

    def label(path, _):
        text = jax.tree_util.keystr(path)
        adam = any(part in text for part in ("bias", "layers[2]", "readout"))
        return "adam" if adam else "kfac"

    # By a function: the model is one itself, and Optax would call a tree of its kind.
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
    rate = 0.02 if name == "newton_muon" else 0.05
    optimizer = optax.multi_transform(
        {"kfac": optax.chain(method, optax.scale(-rate)), "adam": optax.adam(1e-2)}, labels
    )
    with jax.numpy_dtype_promotion("standard"):
        step = cx.make_step(optimizer, method)
        state, values, start, structure = step.init(model), [], model, None
        for i in range(6):
            before = model, state
            model, state, info = step(model, state, batch, jax.random.key(i))
            values.append(float(info.value))
            structure = structure or avals(state)
            assert avals(state) == structure
            if i == 1:
                traced = step._compiled._cache_size()
        pure = eqx.filter_jit(step.pure)(*before, batch, jax.random.key(5))
    assert step._compiled._cache_size() == traced and int(state.skipped) == 0
    assert values[-1] < 0.95 * values[0], values
    arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    for a, b in zip(arrays(pure[:2]), arrays((model, state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(arrays(model), arrays(start), strict=True):
        assert not np.array_equal(a, b) or not jnp.issubdtype(a.dtype, jnp.inexact)
    memory = optax.tree_utils.tree_get(state, "preconditioner")
    shown = {path for path, each in memory.items() if each != HIDDEN()}
    mlp = {".layers[0].weight", ".layers[1].weight"}
    assert shown == (mlp if name == "kfac" else {"['qkv']", "['out']"})


def test_policies_and_scalings_that_look_at_the_curvature():
    p = problem()
    mask = {"w1": True, "b1": False, "w2": True}
    for options in (
        {"damping": cx.LevenbergMarquardt(1.0, every=1)},
        {"scaling": cx.QuadraticModel()},
        {"scaling": cx.Grafted(optax.scale_by_rms())},
    ):
        method = make("kfac", p.objective, **options)
        optimizer = optax.chain(optax.masked(method, mask), optax.scale(-0.05))
        with jax.numpy_dtype_promotion("standard"):
            params, state = taken(optimizer, method, p.params, p.batch, steps=2)
        value = lambda params: float(p.objective.value(params, p.batch))
        assert value(params) < value(p.params), options
        assert int(state.skipped) == 0
        if "damping" in options:
            assert np.isfinite(float(optax.tree_utils.tree_get(state, "gain_ratio")))


def test_a_bad_batch_costs_one_step():
    p = problem()
    method = make("kfac", p.objective)
    optimizer = optax.chain(optax.masked(method, {"w1": True, "b1": False, "w2": False}))
    step = cx.make_step(optimizer, method)
    state = step.init(p.params)
    params, after, info = step(p.params, state, problems.poisoned(p.batch))
    assert not bool(info.finite) and int(after.skipped) == 1
    close(params, p.params)
    _, after, info = step(p.params, after, p.batch)
    assert bool(info.finite) and int(after.skipped) == 1


# -- a loop of one's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name, monkeypatch):
    """With the state of a step, and an observation that was made with it."""
    monkeypatch.setattr("curvax.taps.blocks.WHOLE", 1)
    p = problem()
    options = {} if name == "ekfac" else {"rank": 2}
    method = make(name, p.objective, **options)
    optimizer = optax.masked(method, {"w1": True, "b1": False, "w2": True})
    state = cx.make_step(optimizer, method).init(p.params).optimizer

    @jax.jit
    def update(params, state):
        observation = method.observe(params, p.batch, state=state.inner_state)
        return optimizer.update(observation.gradient, state, params, observation=observation)

    updates, after = update(p.params, state)
    assert int(after.inner_state.skipped) == 0 and int(after.inner_state.count) == 1
    moved, _ = taken(optax.chain(optimizer, optax.scale(-1e-3)), method, p.params, p.batch)
    close(jax.tree.map(lambda w, d: w - 1e-3 * d, p.params, updates), moved, rtol=1e-7, atol=1e-9)


def test_what_cannot_work_says_what_to_do():
    p = problem()
    mask = {"w1": True, "b1": False, "w2": True}
    method = make("kfac", p.objective, rank=None)
    optimizer = optax.masked(method, mask)
    with pytest.raises(ValueError, match=r"init: optax\.masked .* curvax\.make_step\(optimizer, m"):
        optimizer.init(p.params)
    state = cx.make_step(optimizer, method).init(p.params).optimizer
    with pytest.raises(ValueError, match=r"update: under optax\.masked .* observation="):
        optimizer.update(p.gradient, state, p.params, batch=p.batch)
    blind = method.observe(p.params, p.batch)
    with pytest.raises(ValueError, match=r"it measured \['w1'\] as if no leaf were masked.*state="):
        optimizer.update(p.gradient, state, p.params, observation=blind)
    other = optax.masked(method, {"w1": True, "b1": True, "w2": False})
    seen = method.observe(p.params, p.batch, state=state.inner_state)
    message = r"the mask hides other leaves .* \[\"\['b1'\]\", \"\['w2'\]\"\] are hidden"
    with pytest.raises(ValueError, match=message):
        other.update(p.gradient, state, p.params, observation=seen)
