"""The Optax contract, and that each method's direction is the one that it promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from tests.devices import printed
from tests.oracles import damped_solve, dense_gauss_newton, dense_hessian
from tests.problems import (
    CG_METHODS,
    EXACT_CG,
    GAUSS_NEWTON_METHODS,
    METHODS,
    avals,
    gradient_of,
    make_method,
    norm,
    predict,
    problem,
)

DAMPING = {"newton_cg": 4.0, "newton_direct": 0.02}


def close(got, wanted, rtol=1e-8, atol=1e-10):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, wanted)


def same(got, wanted):
    """Equal to the last bit, NaN equal to NaN."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def dense_direction(name, p, batch=None, gradient=None):
    batch = p.batch if batch is None else batch
    gradient = p.gradient if gradient is None else gradient
    damping = float(jnp.float32(DAMPING.get(name, 0.3)))
    if name in GAUSS_NEWTON_METHODS:
        return damped_solve(dense_gauss_newton(p.objective, p.params, batch), damping, gradient)
    matrix = dense_hessian(p.objective, p.params, batch)
    smallest = jnp.linalg.eigvalsh(matrix)[0] + damping
    # The one needs a definite matrix, the other is only put to the test by an indefinite one.
    assert smallest > 0 if name == "newton_cg" else smallest < 0
    return damped_solve(matrix, damping, gradient, absolute=name == "newton_direct")


def updater(method):
    """`update` under jit, with the traces counted in `.traces`."""

    @jax.jit
    def run(grads, state, params, batch):
        run.traces += 1
        return method.update(grads, state, params, batch=batch)

    run.traces = 0
    return run


class Case:
    """One method on the softmax problem, its update compiled once for the whole module."""

    def __init__(self, name):
        self.name = name
        self.problem = problem()
        self.damping = DAMPING.get(name, 0.3)
        self.method = make_method(name, self.problem.objective, damping=self.damping)
        self.state = self.method.init(self.problem.params)
        self.update = updater(self.method)

    @functools.cached_property
    def direction(self):
        return dense_direction(self.name, self.problem)

    @functools.cached_property
    def first(self):
        p = self.problem
        return self.update(p.gradient, self.state, p.params, p.batch)


@functools.cache
def make_case(name):
    return Case(name)


@pytest.fixture(params=METHODS)
def case(request):
    return make_case(request.param)


# -- directions ------------------------------------------------------------------------------


def test_direction_is_the_dense_solve_on_every_route(case):
    p, method = case.problem, case.method
    updates, state = case.first
    close(updates, case.direction)
    assert int(state.count) == 1 and int(state.skipped) == 0

    @jax.jit
    def through_observation(params, batch, state):
        observation = method.observe(params, batch)
        return method.update(observation.gradient, state, params, observation=observation)

    updates, _ = through_observation(p.params, p.batch, case.state)
    close(updates, case.direction)

    step = cx.make_step(optax.chain(method, optax.scale(-0.5)), method)
    moved, _, info = step(p.params, step.init(p.params), p.batch)
    close(moved, jax.tree.map(lambda w, d: w - 0.5 * d, p.params, case.direction))
    np.testing.assert_allclose(info.value, p.objective.value(p.params, p.batch), rtol=1e-6)
    np.testing.assert_allclose(info.gradient_norm, norm(p.gradient), rtol=1e-6)
    np.testing.assert_allclose(info.solution_norm, norm(case.direction), rtol=1e-6)


@pytest.mark.parametrize("loss", ["squared", "poisson"])
@pytest.mark.parametrize("name", METHODS)
def test_direction_for_other_losses_with_l2(name, loss):
    p = problem(loss, seed=3, l2=0.1)
    damping = 30.0 if name in ("newton_cg", "newton_direct") else 0.3
    if name in GAUSS_NEWTON_METHODS:
        matrix = dense_gauss_newton(p.objective, p.params, p.batch)
    else:
        matrix = dense_hessian(p.objective, p.params, p.batch)
        assert jnp.linalg.eigvalsh(matrix)[0] > -damping
    method = make_method(name, p.objective, damping=damping)
    updates, _ = jax.jit(method.update)(p.gradient, method.init(p.params), p.params, batch=p.batch)
    close(updates, damped_solve(matrix, float(jnp.float32(damping)), p.gradient))


def test_curvature_batch(case):
    p, method = case.problem, case.method
    if case.name in GAUSS_NEWTON_METHODS:
        matrix = dense_gauss_newton(p.objective, p.params, p.other_batch)
    else:
        matrix = dense_hessian(p.objective, p.params, p.other_batch)
        if case.name == "newton_cg":
            assert jnp.linalg.eigvalsh(matrix)[0] > -case.damping
    wanted = damped_solve(
        matrix,
        float(jnp.float32(case.damping)),
        p.gradient,
        absolute=case.name == "newton_direct",
    )
    run = jax.jit(method.update)
    updates, _ = run(p.gradient, case.state, p.params, batch=p.batch, curvature_batch=p.other_batch)
    close(updates, wanted)

    step = cx.make_step(optax.chain(method, optax.scale(-1.0)), method)
    moved, _, info = step(p.params, step.init(p.params), p.batch, curvature_batch=p.other_batch)
    close(moved, jax.tree.map(jnp.subtract, p.params, wanted))
    np.testing.assert_allclose(info.value, p.objective.value(p.params, p.batch), rtol=1e-6)


@pytest.mark.parametrize(
    "name, kind",
    [("egn", "exact"), ("egn", "mc"), ("egn", "empirical"), ("ggn_cg", "mc")],
)
def test_fisher_curvature(name, kind):
    p = problem()
    quantity = cx.FisherCurvature(kind, 2)
    method = make_method(name, p.objective, damping=0.3, curvature=quantity)
    key = jax.random.key(5)
    updates, _ = jax.jit(method.update)(
        p.gradient, method.init(p.params), p.params, batch=p.batch, key=key
    )
    fisher = lambda params: cx.Fisher(p.objective, params, p.batch, key, kind, 2).as_matrix()
    matrix = jax.jit(fisher)(p.params)
    if kind == "exact":
        np.testing.assert_allclose(
            matrix, dense_gauss_newton(p.objective, p.params, p.batch), atol=1e-12
        )
    if kind == "empirical":
        x, y = p.batch
        one = lambda x, y: jax.flatten_util.ravel_pytree(
            gradient_of(p.objective, p.params, (x[None], y[None]))
        )[0]
        each = jax.jit(jax.vmap(one))(x, y)
        np.testing.assert_allclose(matrix, each.T @ each / x.shape[0], atol=1e-12)
    close(updates, damped_solve(matrix, float(jnp.float32(0.3)), p.gradient))


def test_clipped_gradient_is_solved_for_as_it_comes(case):
    """Something before the method in a chain changes the right-hand side, not the matrix."""
    p = case.problem
    optimizer = optax.chain(optax.clip(0.01), case.method)
    clipped = jax.tree.map(lambda g: jnp.clip(g, -0.01, 0.01), p.gradient)
    step = cx.make_step(optimizer, case.method)
    moved, _, _ = step(p.params, step.init(p.params), p.batch)
    wanted = dense_direction(case.name, p, gradient=clipped)
    close(moved, jax.tree.map(jnp.add, p.params, wanted))


# -- a transformation among others -------------------------------------------------------------


def mask_of(p):
    return {"w1": True, "b1": False, "w2": True}


def masked_direction(case):
    """The damped solve with the block of the parameters that take part."""
    p = case.problem
    kept = [k for k in p.params if mask_of(p)[k]]
    part = {k: p.params[k] for k in kept}
    whole = lambda part: {**p.params, **part}
    objective = cx.Objective(lambda part, x: predict(whole(part), x), p.objective.loss)
    gradient = {k: p.gradient[k] for k in kept}
    if case.name in GAUSS_NEWTON_METHODS:
        matrix = dense_gauss_newton(objective, part, p.batch)
    else:
        matrix = dense_hessian(objective, part, p.batch)
    return damped_solve(
        matrix, float(jnp.float32(case.damping)), gradient, absolute=case.name == "newton_direct"
    )


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_masked_and_partition(case, wrapper):
    p, method = case.problem, case.method
    if wrapper == "masked":
        optimizer = optax.chain(optax.masked(method, mask_of(p)), optax.scale(-1.0))
    else:
        labels = {k: "second" if v else "first" for k, v in mask_of(p).items()}
        optimizer = optax.partition(
            {"second": optax.chain(method, optax.scale(-1.0)), "first": optax.sgd(1.0)}, labels
        )
    state = optimizer.init(p.params)
    with pytest.raises(ValueError, match=r"observation=method\.observe"):
        optimizer.update(p.gradient, state, p.params, batch=p.batch)

    @jax.jit
    def run(params, batch, state):
        observation = method.observe(params, batch)
        return optimizer.update(observation.gradient, state, params, observation=observation)

    updates, after = run(p.params, p.batch, state)
    wanted = jax.tree.map(lambda d: -d, {**p.gradient, **masked_direction(case)})
    close(updates, wanted)
    assert avals(after) == avals(state)
    # And in the fused step, which makes the observation.
    step = cx.make_step(optimizer, method)
    moved, _, _ = step(p.params, step.init(p.params), p.batch)
    close(moved, jax.tree.map(jnp.add, p.params, wanted))


@pytest.mark.parametrize("name", CG_METHODS)
def test_masked_with_everything_that_has_the_shape_of_parameters(name):
    """A warm start, a preconditioner and a judged step under a mask."""
    p = problem()
    method = make_method(
        name,
        p.objective,
        damping=cx.LevenbergMarquardt(4.0),
        warm_start=0.9,
        preconditioner=cx.DiagonalPreconditioner(every=2),
    )
    optimizer = optax.chain(optax.masked(method, mask_of(p)), optax.scale_by_learning_rate(0.1))
    step = cx.make_step(optimizer, method)
    params, state = p.params, step.init(p.params)
    for i in range(3):
        params, state, info = step(params, state, p.batch, jax.random.key(i))
        assert np.isfinite(float(info.gain_ratio))
    assert float(p.objective.value(params, p.batch)) < float(p.objective.value(p.params, p.batch))


def test_inject_hyperparams_schedule(case):
    p = case.problem
    schedule = lambda count: case.damping * jnp.where(count == 0, 1.0, 1e6)
    build = optax.inject_hyperparams(getattr(cx.methods, case.name))
    options = {"solver": EXACT_CG} if case.name in CG_METHODS else {}
    optimizer = build(p.objective, damping=schedule, **options)
    run = updater(optimizer)
    state = optimizer.init(p.params)
    updates, state = run(p.gradient, state, p.params, p.batch)
    close(updates, case.direction, rtol=1e-6, atol=1e-8)
    updates, state = run(p.gradient, state, p.params, p.batch)
    scaled = jax.tree.map(lambda g: g / (case.damping * 1e6), p.gradient)
    close(updates, scaled, rtol=1e-3, atol=1e-12)
    assert run.traces == 1


@pytest.mark.parametrize("name", METHODS)
def test_low_precision_direction(name):
    """In float32 the direction is that of float64, to float32's digits."""
    p = problem()
    low = problem(dtype=jnp.float32)
    damping = 4.0
    options = {"solver": cx.CG(rtol=1e-6, max_steps=100)} if name in CG_METHODS else {}
    method = make_method(name, low.objective, damping=damping, **options)
    updates, _ = jax.jit(method.update)(
        low.gradient, method.init(low.params), low.params, batch=low.batch
    )
    gauss_newton = name in GAUSS_NEWTON_METHODS
    dense = dense_gauss_newton if gauss_newton else dense_hessian
    matrix = dense(p.objective, p.params, p.batch)
    wanted = damped_solve(matrix, damping, p.gradient)
    error = norm(jax.tree.map(lambda a, b: a.astype(b.dtype) - b, updates, wanted))
    assert float(error) < 1e-5 * float(norm(wanted))


@pytest.mark.parametrize("name", CG_METHODS)
def test_what_has_the_shape_of_parameters_is_found(name):
    """By `optax.tree_map_params`: a warm start, and the diagonal of a preconditioner."""
    p = problem()
    method = make_method(
        name, p.objective, warm_start=0.9, preconditioner=cx.DiagonalPreconditioner(every=3)
    )
    mapped = optax.tree_map_params(method, lambda leaf: leaf + 1, method.init(p.params))
    ones = jax.tree.map(jnp.ones_like, p.params)
    same(mapped.solution, ones)
    same(mapped.preconditioner.average, ones)
    assert int(mapped.count) == 0 and float(mapped.preconditioner.weight) == 0


# -- meshes ------------------------------------------------------------------------------------

SHARDED = """
    import jax, jax.numpy as jnp, numpy as np, optax
    jax.config.update("jax_enable_x64", True)
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import curvax as cx
    from curvax import _tree
    from curvax.taps import blocks
    from tests.problems import METHODS, CG_METHODS, avals, make_method, problem

    assert len(jax.devices()) == 4
    meshes = {
        "explicit": jax.make_mesh((4,), ("data",)),
        "auto": jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
    }
    assert meshes["explicit"].axis_types == (AxisType.Explicit,)
    p = problem(seed=1)
    rng = np.random.default_rng(0)
    batch = (jnp.asarray(rng.standard_normal((8, 4))), jnp.asarray(rng.integers(0, 3, 8)))

    def check(name, step, mesh, wanted):
        traces = 0

        def run(params, state, batch, key):
            nonlocal traces
            traces += 1
            return step.pure(params, state, batch, key)

        with jax.set_mesh(mesh):
            params = jax.device_put(p.params, NamedSharding(mesh, P()))
            split = jax.device_put(batch, NamedSharding(mesh, P("data")))
            state = jax.jit(step.init)(params)
            before = avals(state), [a.sharding for a in jax.tree.leaves(state)]
            assert avals(step.init(params)) == before[0], name
            jitted = jax.jit(run)
            for i in range(3):
                params, state, _ = jitted(params, state, split, jax.random.key(i))
                after = avals(state), [a.sharding for a in jax.tree.leaves(state)]
                assert after[0] == before[0], (name, i, after[0], before[0])
                for a, b, leaf in zip(after[1], before[1], jax.tree.leaves(state)):
                    assert a.is_equivalent_to(b, leaf.ndim), (name, i, a, b)
            assert traces == 1, (name, traces)
        for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves(wanted)):
            tol = 1e-10 if a.dtype == jnp.float64 else 1e-5
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)
        assert int(state.skipped) == 0

    # Leaves of one shape that are split along different axes are summed over without a gather.
    specs = [P("data", None), P(None, "data"), P(), P("data", None)]
    for mesh in meshes.values():
        with jax.set_mesh(mesh):
            leaves = [jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, s)) for s in specs]
            sums = jax.jit(lambda leaves: (_tree.norm(leaves), _tree.all_finite(leaves)))
            program = sums.lower(leaves).compile().as_text()
            assert "all-reduce" in program and "all-gather" not in program, program

    def methods():
        for name in METHODS:
            options = {"damping": cx.LevenbergMarquardt(4.0)}
            if name in CG_METHODS:
                preconditioner = cx.DiagonalPreconditioner(every=2)
                options |= {"warm_start": 0.9, "preconditioner": preconditioner}
            yield name, make_method(name, p.objective, **options)
        example = cx.Objective(p.objective.predict, p.objective.loss, example=batch)
        yield "kfac", cx.methods.kfac(example, rank=2, refresh_every=2)
        yield "ekfac", cx.methods.ekfac(example, refresh_every=2)

    blocks.WHOLE = 1  # so that there are low ranks
    for name, method in methods():
        optimizer = optax.chain(method, optax.trace(0.9), optax.scale(-0.5))
        step = cx.make_step(optimizer, method)
        plain, plain_state = p.params, step.init(p.params)
        for i in range(3):
            plain, plain_state, _ = step(plain, plain_state, batch, jax.random.key(i))
        for kind, mesh in meshes.items():
            check(name, step, mesh, (plain, plain_state))
            print(name, kind)
"""


def test_state_keeps_its_sharding_and_results_equal_one_device():
    """On a mesh of explicit and one of automatic axes, in a process with more devices."""
    names, kinds = (*METHODS, "kfac", "ekfac"), ("explicit", "auto")
    assert printed(SHARDED) == [word for name in names for k in kinds for word in (name, k)]


def test_batch_of_another_size_needs_no_other_state():
    p = problem()
    method = make_method("ggn_cg", p.objective, damping=0.3, solver=EXACT_CG)
    state = method.init(p.params)
    for batch in (p.batch, p.other_batch):
        gradient = gradient_of(p.objective, p.params, batch)
        updates, state = jax.jit(method.update)(gradient, state, p.params, batch=batch)
        matrix = dense_gauss_newton(p.objective, p.params, batch)
        close(updates, damped_solve(matrix, float(jnp.float32(0.3)), gradient))
