"""Damping policies, preconditioners and warm starts: what they do to a step, and learn from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from curvax.transform import gain_ratio
from tests.oracles import dense_gauss_newton, dense_hessian
from tests.problems import (
    CG_METHODS,
    GAUSS_NEWTON_METHODS,
    METHODS,
    gradient_of,
    make_method,
    norm,
    problem,
    quadratic_problem,
)


def close(got, wanted, rtol=1e-8, atol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, wanted)


# -- the rules, by themselves ------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, factor, accepted",
    [
        (-np.inf, 1.5, False),
        (-0.01, 1.5, False),
        (0.0, 1.5, True),
        (0.24, 1.5, True),
        (0.26, 1.0, True),
        (0.74, 1.0, True),
        (0.76, 2 / 3, True),
        (3.0, 2 / 3, True),
        (np.nan, 1.0, True),
    ],
)
def test_levenberg_marquardt_rule(ratio, factor, accepted):
    policy = cx.LevenbergMarquardt(2.0)
    gain = cx.Gain(jnp.float32(ratio), jnp.float32(1.0))
    state = policy.update(policy.init(), gain)
    np.testing.assert_allclose(state.damping, 2.0 * factor, rtol=1e-6)
    assert float(state.radius) == np.inf
    assert bool(policy.accepts(gain)) == accepted


def test_levenberg_marquardt_limits_and_constants():
    policy = cx.LevenbergMarquardt(
        1.0, increase=10.0, decrease=0.1, lower=0.4, upper=0.5, minimum=0.2, maximum=5.0
    )
    for ratio, wanted in [(0.39, 5.0), (0.51, 0.2), (0.45, 1.0)]:
        state = policy.update(policy.init(), cx.Gain(jnp.float32(ratio), jnp.float32(1.0)))
        np.testing.assert_allclose(state.damping, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "ratio, length, radius, accepted",
    [
        (0.1, 2.0, 0.5, True),  # shrinks by 4
        (0.1, 0.8, 0.2, True),  # from the length of the step that failed
        (-1.0, 2.0, 0.5, False),
        (0.5, 2.0, 2.0, True),
        (0.9, 2.0, 4.0, True),  # good, and at the boundary
        (0.9, 1.0, 2.0, True),  # good, but inside
        (np.nan, 2.0, 2.0, True),
    ],
)
def test_trust_region_rule(ratio, length, radius, accepted):
    policy = cx.TrustRegion(2.0, value=0.25)
    gain = cx.Gain(jnp.float32(ratio), jnp.float32(length))
    state = policy.update(policy.init(), gain)
    np.testing.assert_allclose(state.radius, radius, rtol=1e-6)
    assert float(state.damping) == 0.25
    assert bool(policy.accepts(gain)) == accepted


def test_trust_region_limits():
    policy = cx.TrustRegion(2.0, minimum=1.0, maximum=3.0)
    for ratio, wanted in [(-1.0, 1.0), (0.9, 3.0)]:
        state = policy.update(policy.init(), cx.Gain(jnp.float32(ratio), jnp.float32(2.0)))
        assert float(state.radius) == wanted


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: cx.Constant(-1.0), r"value: got -1\.0, wanted a number ≥ 0"),
        (lambda: cx.LevenbergMarquardt(0.0), r"initial: got 0\.0, wanted a number > 0"),
        (lambda: cx.LevenbergMarquardt(every=0), r"every: got 0, wanted a number of steps ≥ 1"),
        (lambda: cx.TrustRegion(-2.0), r"initial: got -2\.0, wanted"),
        (lambda: cx.TrustRegion(value=-1.0), r"value: got -1\.0, wanted"),
    ],
)
def test_wrong_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- with every method -------------------------------------------------------------------------


POLICIES = {
    "constant": lambda: cx.Constant(4.0),
    "scheduled": lambda: cx.Scheduled(lambda count: 4.0 / (1.0 + count.astype(jnp.float32))),
    "levenberg": lambda: cx.LevenbergMarquardt(4.0),
    "trust": lambda: cx.TrustRegion(0.05, value=1e-3),
}
RATE = 0.7


@functools.cache
def trajectory(name, policy):
    p = problem()
    method = make_method(name, p.objective, damping=POLICIES[policy]())
    step = cx.make_step(optax.chain(method, optax.scale(-RATE)), method)
    params, state = p.params, step.init(p.params)
    found = []
    for _ in range(4):
        before, memory = params, state.optimizer[0]
        params, state, info = step(params, state, p.batch)
        found.append((before, memory, params, state.optimizer[0], info))
    return p, method, found


def matrix_at(name, p, params):
    dense = dense_gauss_newton if name in GAUSS_NEWTON_METHODS else dense_hessian
    return dense(p.objective, params, p.batch)


@pytest.mark.parametrize(
    "name, policy",
    [(name, policy) for name in METHODS for policy in ("levenberg", "trust")]
    + [("ggn_direct", "constant"), ("newton_cg", "scheduled")],
)
def test_gain_ratio_by_hand_and_what_is_learned(name, policy):
    p, method, found = trajectory(name, policy)
    for i, (before, memory, after, learned, info) in enumerate(found):
        if policy in ("constant", "scheduled"):
            wanted = 4.0 if policy == "constant" else 4.0 / (1 + i)
            np.testing.assert_allclose(info.damping_used, wanted, rtol=1e-6)
            assert np.isnan(info.gain_ratio) and bool(info.accepted)
            continue
        assert bool(info.accepted)
        gradient = gradient_of(p.objective, before, p.batch)
        change = jax.tree.map(jnp.subtract, after, before)
        flat = jax.flatten_util.ravel_pytree(change)[0]
        slope = flat @ jax.flatten_util.ravel_pytree(gradient)[0]
        predicted = -(slope + 0.5 * flat @ matrix_at(name, p, before) @ flat)
        actual = p.objective.value(before, p.batch) - p.objective.value(after, p.batch)
        np.testing.assert_allclose(info.gain_ratio, actual / predicted, rtol=1e-5)
        np.testing.assert_allclose(norm(change), RATE * info.solution_norm, rtol=1e-5)
        np.testing.assert_allclose(info.damping_used, memory.level.damping)
        gain = cx.Gain(info.gain_ratio, info.solution_norm)
        close(learned.level, method.damping.update(memory.level, gain), rtol=1e-6)
    if policy == "levenberg":
        assert float(found[-1][3].level.damping) != 4.0
    if policy == "trust":
        radii = [float(memory.level.radius) for _, memory, *_ in found]
        for radius, (*_, info) in zip(radii, found, strict=True):
            assert float(info.radius_used) == radius
            assert float(info.solution_norm) <= radius * (1 + 1e-5)
        # So small a radius is reached, the model is good there, and it grows.
        np.testing.assert_allclose(found[0][4].solution_norm, 0.05, rtol=1e-5)
        assert radii[1] == pytest.approx(0.1)


@pytest.mark.parametrize("name", METHODS)
def test_quadratic_objective_has_gain_one(name):
    """A linear model under squared error is its own quadratic model, for a step of any length."""
    p = quadratic_problem()
    method = make_method(name, p.objective, damping=cx.LevenbergMarquardt(0.5))
    state = method.init(p.params)
    _, state = jax.jit(method.update)(p.gradient, state, p.params, batch=p.batch)
    assert float(state.metrics.gain_ratio) == 1.0
    np.testing.assert_allclose(state.level.damping, 0.5 * 2 / 3, rtol=1e-6)
    step = cx.make_step(optax.chain(method, optax.scale(-1.9)), method)
    _, _, info = step(p.params, step.init(p.params), p.batch)
    np.testing.assert_allclose(info.gain_ratio, 1.0, rtol=1e-6)

    observation = method.observe(p.params, p.batch)
    # The metrics are float32: 1.0 there is 1 to 6e-8, and the terms are all of order one.
    change = jax.tree.map(lambda g: -0.4 * g, p.gradient)
    assert float(gain_ratio(observation, observation[method.curvature], p.gradient, change)) == 1.0


@pytest.mark.parametrize("policy", ["levenberg", "trust"])
@pytest.mark.parametrize("name", METHODS)
def test_step_that_makes_it_worse_is_not_taken(name, policy):
    """Uphill: the model promises no decrease, and there is none."""
    p = problem()
    damping = POLICIES[policy]()
    method = make_method(name, p.objective, damping=damping)
    step = cx.make_step(optax.chain(method, optax.trace(0.9), optax.scale(5.0)), method)
    state = step.init(p.params)
    params, after, info = step(p.params, state, p.batch)
    jax.tree.map(np.testing.assert_array_equal, params, p.params)
    jax.tree.map(np.testing.assert_array_equal, after.optimizer[1], state.optimizer[1])
    method_state = after.optimizer[0]
    assert float(info.gain_ratio) < 0 and not bool(info.accepted)
    assert int(method_state.rejected) == 1 and int(after.skipped) == int(method_state.skipped) == 0
    assert int(after.count) == int(method_state.count) == 1
    if policy == "levenberg":
        np.testing.assert_allclose(method_state.level.damping, 6.0, rtol=1e-6)
    else:
        np.testing.assert_allclose(method_state.level.radius, 0.0125, rtol=1e-5)


def test_rejection_in_the_update_loop():
    """Without a fused step the full step is judged: where it overshoots, updates are zeros."""
    objective = cx.Objective(
        lambda w, x: jnp.sin(w * x), cx.CustomLoss(lambda z, y: jnp.sum((z - y) ** 2), event_ndim=1)
    )
    params = jnp.asarray([1.45])
    batch = (jnp.ones((1, 1)), jnp.zeros((1, 1)))
    method = cx.methods.ggn_direct(objective, damping=cx.LevenbergMarquardt(1e-6))
    gradient = gradient_of(objective, params, batch)
    updates, state = method.update(gradient, method.init(params), params, batch=batch)
    full = params - gradient / (2 * jnp.cos(params) ** 2 + 1e-6)
    worse = objective.value(full, batch) > objective.value(params, batch)
    assert bool(worse) == (float(state.metrics.gain_ratio) < 0) == (int(state.rejected) == 1)
    assert (float(jnp.abs(updates).max()) == 0) == bool(worse)


# -- preconditioner and warm start -------------------------------------------------------------


@pytest.mark.parametrize("name", CG_METHODS)
def test_diagonal_average_by_hand(name):
    p = problem()
    preconditioner = cx.DiagonalPreconditioner(every=2, decay=0.8, exponent=0.75)
    method = make_method(name, p.objective, damping=4.0, preconditioner=preconditioner)
    state = method.init(p.params)
    run = jax.jit(method.update)
    average = jax.tree.map(np.zeros_like, p.params)
    weight = 0.0
    for i in range(4):
        key = jax.random.key(i)
        _, state = run(p.gradient, state, p.params, batch=p.batch, key=key)
        if i % 2 == 0:
            line = p.objective.linearise(p.params, p.batch)
            fresh = cx.gauss_newton_bartlett(p.objective, line, key)
            average = jax.tree.map(lambda a, d: 0.8 * a + 0.2 * np.asarray(d), average, fresh)
            weight = 0.8 * weight + 0.2
        close(state.preconditioner.average, average)
        np.testing.assert_allclose(state.preconditioner.weight, weight, rtol=1e-6)
    operator = preconditioner.operator(state.preconditioner, jnp.float32(4.0))
    wanted = jax.tree.map(lambda a: (np.abs(a / weight) + 4.0) ** -0.75, average)
    close(operator.mv(jax.tree.map(jnp.ones_like, p.params)), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", CG_METHODS)
def test_preconditioner_saves_steps_where_scales_differ(name):
    p = quadratic_problem(scales=np.geomspace(0.1, 100.0, 24))
    steps, directions = {}, {}
    for kind in (None, "diagonal"):
        preconditioner = kind and cx.DiagonalPreconditioner(every=1, decay=0.95, exponent=1.0)
        method = make_method(
            name,
            p.objective,
            damping=1e-3,
            preconditioner=preconditioner,
            solver=cx.CG(rtol=1e-10, max_steps=400),
        )
        run = jax.jit(method.update)
        state = method.init(p.params)
        for i in range(30):
            updates, state = run(p.gradient, state, p.params, batch=p.batch, key=jax.random.key(i))
        steps[kind], directions[kind] = int(state.metrics.solver_steps), updates
    assert 2 * steps["diagonal"] < steps[None]
    close(directions["diagonal"], directions[None], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CG_METHODS)
def test_warm_start(name):
    """From the last solution nothing is left to do; from half of it, something is."""
    p = problem()
    counts = {}
    for factor in (1.0, 0.5):
        method = make_method(
            name,
            p.objective,
            damping=4.0,
            warm_start=factor,
            solver=cx.CG(rtol=1e-8, max_steps=100),
        )
        run = jax.jit(method.update)
        state = method.init(p.params)
        first, state = run(p.gradient, state, p.params, batch=p.batch)
        close(state.solution, first)
        cold = int(state.metrics.solver_steps)
        second, state = run(p.gradient, state, p.params, batch=p.batch)
        counts[factor] = int(state.metrics.solver_steps)
        close(second, first, rtol=1e-5, atol=1e-7)
        assert counts[factor] <= cold
    assert counts[1.0] == 0 < counts[0.5]
