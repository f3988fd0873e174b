"""The fused step: its two executions, what it keeps, and that a run can be resumed."""

import functools
import io
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from tests.problems import CG_METHODS, METHODS, avals, make_method, problem

STEPS = 11


def same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def optimizer_around(method):
    return optax.chain(method, optax.trace(0.5), optax.scale_by_learning_rate(0.3))


def make_run(name):
    """A step with every cadence that its method has, and a model with a part not trained."""
    p = problem(seed=2)
    options = {"damping": cx.LevenbergMarquardt(4.0, every=2)}
    if name in CG_METHODS:
        options |= {
            "warm_start": 0.9,
            "preconditioner": cx.DiagonalPreconditioner(every=3, decay=0.5),
            "solver": cx.CG(rtol=1e-10, max_steps=60),
        }
    method = make_method(name, p.objective, **options)
    return p, method, cx.make_step(optimizer_around(method), method)


@functools.cache
def host_trajectory(name):
    p, _, step = make_run(name)
    params, state = p.params, step.init(p.params)
    trajectory = [(params, state, None)]
    for i in range(STEPS):
        params, state, info = step(params, state, p.batch, jax.random.key(i))
        trajectory.append((params, state, info))
    return p, step, trajectory


@pytest.mark.parametrize("name", METHODS)
def test_host_phases_equal_one_jitted_function(name):
    p, step, trajectory = host_trajectory(name)
    pure = eqx.filter_jit(step.pure)
    params, state = p.params, step.init(p.params)
    measured = []
    for i in range(STEPS):
        params, state, info = pure(params, state, p.batch, jax.random.key(i))
        wanted = trajectory[i + 1]
        assert jax.tree.structure((params, state, info)) == jax.tree.structure(wanted)
        for got, want in zip(
            jax.tree.leaves((params, state, info)), jax.tree.leaves(wanted), strict=True
        ):
            tolerance = 1e-9 if got.dtype == jnp.float64 else 1e-5
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=str(i))
        measured.append(bool(np.isfinite(info.gain_ratio)))
    # The damping's cadence, from step 0 on; and the loss did go down.
    assert measured == [i % 2 == 0 for i in range(STEPS)]
    assert float(info.value) < float(p.objective.value(p.params, p.batch))
    assert int(state.count) == STEPS and int(state.skipped) == 0


@pytest.mark.parametrize("name", METHODS)
def test_state_keeps_its_types(name):
    _, _, trajectory = host_trajectory(name)
    for _, state, _ in trajectory[1:]:
        assert avals(state) == avals(trajectory[0][1])


@pytest.mark.parametrize("name", CG_METHODS)
def test_preconditioner_changes_only_when_due(name):
    _, _, trajectory = host_trajectory(name)
    weights = [float(state.optimizer[0].preconditioner.weight) for _, state, _ in trajectory]
    changed = [a != b for a, b in itertools.pairwise(weights)]
    assert changed == [i % 3 == 0 for i in range(STEPS)]


@pytest.mark.parametrize("name", METHODS)
def test_resumed_run_is_bit_equal(name):
    """From a file, in the middle of every period, with a step made anew."""
    p, _, trajectory = host_trajectory(name)
    _, method, step = make_run(name)
    params, state, _ = trajectory[5]
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (params, state))
    file.seek(0)
    like = (p.params, step.init(p.params))
    params, state = eqx.tree_deserialise_leaves(file, like)
    same((params, state), trajectory[5][:2])
    leaves, treedef = jax.tree.flatten(state)
    state = jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    assert method.plan.phase(int(state.count)) == method.plan.phase(5)
    for i in range(5, 8):
        params, state, info = step(params, state, p.batch, jax.random.key(i))
        same((params, state, info), trajectory[i + 1])


def test_two_runs_with_one_step_do_not_mix():
    """The phase follows the state that is given, not the last call."""
    p, step, trajectory = host_trajectory("ggn_cg")
    for i in (4, 1, 3):
        params, state, _ = trajectory[i]
        got = step(params, state, p.batch, jax.random.key(i))
        same(got, trajectory[i + 1])


@pytest.mark.parametrize("name", METHODS)
def test_equinox_model_and_donation(name):
    """A model with functions in it; its memory and that of the state are given away."""
    model = eqx.nn.MLP(4, 3, 5, 1, dtype=jnp.float64, key=jax.random.key(0))
    p = problem()
    objective = cx.Objective(lambda model, x: model(x), p.objective.loss)
    method = make_method(name, objective, damping=cx.LevenbergMarquardt(4.0))
    optimizer = optax.chain(method, optax.trace(0.9), optax.scale_by_learning_rate(0.1))
    first = model.layers[0].weight
    step = cx.make_step(optimizer, method, donate=True)
    state = step.init(model)
    values = []
    for _ in range(3):
        model, state, info = step(model, state, p.batch)
        values.append(float(info.value))
    assert values[2] < values[0]
    assert isinstance(model, eqx.nn.MLP) and model.activation is not None
    assert int(state.count) == 3 and int(state.skipped) == 0
    assert first.is_deleted()


@pytest.mark.parametrize("donate", [False, True])
def test_what_a_step_leaves_alone_is_not_copied(donate):
    """The average of the diagonal in steps without an estimate; not so if its memory is donated."""
    p = problem()
    method = cx.methods.sophia_g(p.objective, every=2)
    step = cx.make_step(optimizer_around(method), method, donate=donate)
    averages = lambda state: jax.tree.leaves(state.optimizer[0].preconditioner.average)
    params = jax.tree.map(jnp.copy, p.params)
    params, state, _ = step(params, step.init(params), p.batch, jax.random.key(0))
    before, values = averages(state), [np.array(leaf) for leaf in averages(state)]
    _, after, _ = step(params, state, p.batch, jax.random.key(1))
    kept = [a is b for a, b in zip(averages(after), before, strict=True)]
    assert kept == [not donate] * len(before)
    same(averages(after), values)
    if not donate:
        host = state._replace(optimizer=jax.tree.map(np.asarray, state.optimizer))
        _, again, _ = step(params, host, p.batch, jax.random.key(1))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again))
        same(again, after)


@pytest.mark.parametrize("name", ["ggn_cg", "newton_direct"])
def test_warmup_from_zero_does_not_stall(name):
    """A step of length zero has no gain ratio: it must neither be rejected nor raise λ."""
    p = problem()
    method = make_method(name, p.objective, damping=cx.LevenbergMarquardt(4.0))
    rate = optax.linear_schedule(0.0, 0.5, 2)
    step = cx.make_step(optax.chain(method, optax.scale_by_learning_rate(rate)), method)
    params, state, info = step(p.params, step.init(p.params), p.batch)
    same(params, p.params)
    assert np.isnan(info.gain_ratio) and bool(info.accepted)
    assert float(state.optimizer[0].level.damping) == 4.0
    params, state, info = step(params, state, p.batch)
    assert np.isfinite(info.gain_ratio) and int(state.optimizer[0].rejected) == 0
    assert float(p.objective.value(params, p.batch)) < float(info.value)


def test_multi_steps_in_a_fused_step():
    p = problem()
    method = make_method("ggn_cg", p.objective, damping=cx.LevenbergMarquardt(4.0))
    inner = optax.chain(method, optax.scale(-1.0))
    step = cx.make_step(optax.MultiSteps(inner, 3), method)
    params, state = p.params, step.init(p.params)
    for i in range(6):
        before = params
        with jax.numpy_dtype_promotion("standard"):  # MultiSteps needs it
            params, state, info = step(params, state, p.batch)
        moved = not np.array_equal(before["w1"], params["w1"])
        assert moved == (i % 3 == 2), i
        assert bool(np.isfinite(info.gain_ratio)) == moved
    assert int(state.optimizer.gradient_step) == 2


def counted_step():
    """A step in two phases, and how often its model was traced so far."""
    p = problem()
    traces = []

    def predict(params, x):
        traces.append(x.shape)
        return p.objective.predict(params, x)

    objective = cx.Objective(predict, p.objective.loss)
    method = make_method("ggn_cg", objective, damping=cx.LevenbergMarquardt(4.0, every=2))
    return p, cx.make_step(optimizer_around(method), method), lambda: len(traces)


def test_step_compiles_once_for_each_phase():
    p, step, traced = counted_step()
    params, state = p.params, step.init(p.params)
    counts = []
    for _ in range(5):
        params, state, _ = step(params, state, p.batch)
        counts.append(traced())
    assert 0 < counts[0] < counts[1]
    assert counts[1:] == [counts[1]] * 4


def test_lower_takes_shapes_and_compiles_for_calls():
    p, step, traced = counted_step()
    state = step.init(p.params)
    lowered = [step.lower(p.params, state, p.batch, count=count) for count in (0, 1)]
    texts = [each.as_text() for each in lowered]
    assert texts[0] != texts[1]
    again = step.lower(*jax.eval_shape(lambda: (p.params, state, p.batch)), count=1)
    assert again.as_text() == texts[1]
    for each in lowered:
        each.compile()
    before = traced()
    params, state, _ = step(p.params, state, p.batch)
    step(params, state, p.batch)
    shapes_only = 1  # the first call checks the batch
    assert traced() <= before + shapes_only
