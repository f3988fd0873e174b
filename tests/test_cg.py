"""`curvax.solvers.CG` against dense float64 solves and a textbook recursion in NumPy."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from curvax.solvers import CG, StopReason

F32, F64 = jnp.float32, jnp.float64
PSD, SYMMETRIC, NSD = (
    lx.positive_semidefinite_tag,
    lx.symmetric_tag,
    lx.negative_semidefinite_tag,
)


def on_tree(matrix, like, tag=PSD):
    """A matrix acting on ravelled pytrees: what the solver never does, an oracle may."""
    _, unravel = ravel_pytree(like)
    return lx.FunctionLinearOperator(
        lambda v: unravel(matrix @ ravel_pytree(v)[0]), jax.eval_shape(lambda: like), tag
    )


def on_vector(matrix, tag=PSD, dtype=F64):
    return lx.MatrixLinearOperator(jnp.asarray(matrix, dtype), tag)


def with_spectrum(eigenvalues, seed=0):
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    matrix = (q * np.asarray(eigenvalues)) @ q.T
    return (matrix + matrix.T) / 2


def gaussian(n, seed=0):
    return np.random.default_rng(seed + 100).normal(size=n)


def compute(solver, op, b, **options):
    return solver.compute(solver.init(op, options), b, options)


def stop_of(stats):
    return StopReason(int(stats["stop"]))


def is_result(result, name):
    return bool(result == getattr(lx.RESULTS, name))


def phi(matrix, b, x):
    return 0.5 * x @ matrix @ x - b @ x


def textbook(matrix, b, steps, radius=np.inf):
    """Steihaug's algorithm without preconditioning; every iterate, the start included."""
    x, r = np.zeros_like(b), b.copy()
    p, iterates = r.copy(), [x]
    for _ in range(steps):
        product = matrix @ p
        curvature, rr = p @ product, r @ r
        alpha = rr / curvature
        if curvature <= 0 or np.linalg.norm(x + alpha * p) >= radius:
            quadratic = [p @ p, 2 * x @ p, x @ x - radius**2]
            iterates.append(x + max(np.roots(quadratic).real) * p)
            break
        x, r = x + alpha * p, r - alpha * product
        p = r + (r @ r) / rr * p
        iterates.append(x)
    return iterates


# Against dense solves


shapes = st.lists(
    st.lists(st.integers(0, 3), max_size=2).map(tuple), min_size=1, max_size=3
).filter(lambda group: sum(int(np.prod(shape)) for shape in group) > 0)


@settings(max_examples=8, deadline=None)
@given(shapes=shapes, seed=st.integers(0, 10**6), log_condition=st.floats(0, 4))
def test_solves_random_pytree_systems(shapes, seed, log_condition):
    like = {f"leaf{i}": jnp.zeros(shape, F64) for i, shape in enumerate(shapes)}
    flat, unravel = ravel_pytree(like)
    matrix = with_spectrum(np.logspace(-log_condition, 0, flat.size), seed)
    b = gaussian(flat.size, seed)
    solution = lx.linear_solve(
        on_tree(jnp.asarray(matrix), like), unravel(jnp.asarray(b)), CG(1e-11)
    )
    assert jax.tree.structure(solution.value) == jax.tree.structure(like)
    expected = np.linalg.solve(matrix, b)
    error = np.linalg.norm(ravel_pytree(solution.value)[0] - expected)
    assert error <= 1e-6 * np.linalg.norm(expected)
    residual = np.linalg.norm(matrix @ ravel_pytree(solution.value)[0] - b) / np.linalg.norm(b)
    assert residual <= 2e-11
    stats = solution.stats
    x = np.asarray(ravel_pytree(solution.value)[0])
    np.testing.assert_allclose(stats["quadratic"], phi(matrix, b, x), rtol=1e-9)
    np.testing.assert_allclose(stats["curvature"], x @ matrix @ x, rtol=1e-9)


def test_ends_after_as_many_steps_as_distinct_eigenvalues():
    matrix = with_spectrum([1.0] * 10 + [3.0] * 10 + [7.0] * 10)
    b = gaussian(30)
    x, result, stats = compute(CG(1e-10), on_vector(matrix), jnp.asarray(b))
    assert int(stats["num_steps"]) == 3
    assert is_result(result, "successful") and stop_of(stats) is StopReason.converged
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_agrees_with_lineax_after_the_same_number_of_steps(steps):
    matrix = with_spectrum(np.linspace(1, 50, 20))
    diagonal = np.diag(np.diag(matrix))
    b = jnp.asarray(gaussian(20))
    options = {"preconditioner": on_vector(np.linalg.inv(diagonal))}
    ours = lx.linear_solve(on_vector(matrix), b, CG(0.0, 0.0, steps), options=options)
    theirs = lx.linear_solve(
        on_vector(matrix), b, lx.CG(0.0, 0.0, max_steps=steps), options=options
    )
    assert int(ours.stats["num_steps"]) == steps
    np.testing.assert_allclose(ours.value, theirs.value, rtol=1e-11, atol=1e-13)


def test_negative_semidefinite_is_solved_through_its_negative():
    matrix = -with_spectrum(np.linspace(1, 5, 8))
    b = gaussian(8)
    exact = np.linalg.solve(matrix, b)
    op = on_vector(matrix, NSD)
    for options in ({}, {"y0": jnp.asarray(exact)}):
        x, result, stats = compute(CG(1e-12), op, jnp.asarray(b), **options)
        assert is_result(result, "successful")
        np.testing.assert_allclose(x, exact, rtol=1e-10)
        np.testing.assert_allclose(stats["quadratic"], phi(matrix, b, exact), rtol=1e-10)
        np.testing.assert_allclose(stats["curvature"], exact @ matrix @ exact, rtol=1e-10)
    assert int(stats["num_steps"]) == 0


# Scale and precision


@pytest.mark.parametrize("size", [10**6, 10**7])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_float32_at_network_scale(size, preconditioned):
    rng = np.random.default_rng(0)
    diagonal = jnp.asarray(rng.uniform(1, 2, size), F32)
    b = jnp.asarray(rng.normal(size=size), F32)
    structure = jax.eval_shape(lambda: b)

    @jax.jit
    def solve(diagonal, b):
        op = lx.FunctionLinearOperator(lambda v: diagonal * v, structure, PSD)
        inverse = lx.FunctionLinearOperator(lambda v: v / diagonal, structure, PSD)
        return compute(CG(), op, b, **({"preconditioner": inverse} if preconditioned else {}))

    x, result, stats = solve(diagonal, b)
    assert is_result(result, "successful")
    assert int(stats["num_steps"]) <= (1 if preconditioned else 12)
    residual = np.asarray(diagonal, np.float64) * np.asarray(x) - np.asarray(b)
    assert np.linalg.norm(residual) <= 1.1e-5 * np.linalg.norm(np.asarray(b))


# lineax promotes the leaves' dtypes on its own account.
@jax.numpy_dtype_promotion("standard")
def test_mixed_precision_tree():
    like = {"low": jnp.zeros((6,), jnp.bfloat16), "high": jnp.zeros((2, 3), F32)}
    # Entries that bfloat16 holds exactly, so that the product is the only inexact step.
    scale = {"low": jnp.full((6,), 2, jnp.bfloat16), "high": jnp.full((2, 3), 4, F32)}
    op = lx.FunctionLinearOperator(
        lambda v: jax.tree.map(jnp.multiply, scale, v), jax.eval_shape(lambda: like), PSD
    )
    b = {"low": jnp.arange(6).astype(jnp.bfloat16), "high": jnp.ones((2, 3), F32)}
    for solution in (lx.linear_solve(op, b, CG(1e-2)).value, compute(CG(1e-2), op, b)[0]):
        assert solution["low"].dtype == jnp.bfloat16 and solution["high"].dtype == F32
        np.testing.assert_allclose(solution["low"].astype(F32), np.arange(6) / 2, rtol=2e-2)
        np.testing.assert_allclose(solution["high"], 0.25, rtol=2e-2)


@jax.numpy_dtype_promotion("standard")
def test_low_precision_vectors_are_held_in_float32():
    # 1 + 2⁻¹⁰ is no bfloat16: an accumulation in bfloat16 would lose every small leaf of b.
    like = {"a": jnp.zeros((), jnp.bfloat16), "b": jnp.zeros((), F32), "c": jnp.zeros((), F64)}
    op = lx.IdentityLinearOperator(jax.eval_shape(lambda: like))
    b = {"a": jnp.asarray(1, jnp.bfloat16), "b": jnp.asarray(2, F32), "c": jnp.asarray(3, F64)}
    x, _, stats = compute(CG(), op, b)
    assert [leaf.dtype for leaf in jax.tree.leaves(x)] == [jnp.bfloat16, F32, F64]
    assert stats["quadratic"].dtype == F64
    np.testing.assert_allclose(stats["quadratic"], -7.0)


def test_recomputed_residuals_are_true():
    matrix = with_spectrum(np.logspace(-2, 0, 40)).astype(np.float32)
    b = jnp.asarray(gaussian(40), F32)

    def reported_over_true(every):
        solver = CG(0.0, 0.0, max_steps=150, residual_every=every)
        x, _, stats = compute(solver, on_vector(matrix, dtype=F32), b)
        true = np.linalg.norm(matrix.astype(np.float64) @ np.asarray(x) - np.asarray(b))
        return float(stats["residual_norm"]) * np.linalg.norm(np.asarray(b)) / true

    # The recursion goes on to shrink long after float32 has no better x to offer.
    assert reported_over_true(None) < 1e-3
    assert 0.1 < reported_over_true(3) < 10


# Negative curvature and other breakdowns


def test_negative_curvature_at_the_first_step_returns_the_direction():
    op = on_vector(np.diag([-3.0, 1.0]), SYMMETRIC)
    b = jnp.asarray([2.0, 1.0])
    x, result, stats = compute(CG(), op, b)
    assert is_result(result, "breakdown") and stop_of(stats) is StopReason.negative_curvature
    np.testing.assert_array_equal(x, b)
    np.testing.assert_allclose(stats["curvature"], -11.0)
    np.testing.assert_allclose(stats["quadratic"], -5.5 - 5.0)
    # With a preconditioner, the preconditioned direction; with a warm start, the warm start.
    inverse = on_vector(np.diag([2.0, 0.5]))
    x, _, _ = compute(CG(), op, b, preconditioner=inverse)
    np.testing.assert_array_equal(x, [4.0, 0.5])
    y0 = jnp.asarray([0.5, 0.0])
    x, result, stats = compute(CG(), op, b, y0=y0)
    assert is_result(result, "breakdown") and int(stats["num_steps"]) == 0
    np.testing.assert_array_equal(x, y0)


def test_negative_curvature_later_returns_the_iterate():
    matrix = with_spectrum([-0.3, 1.0, 2.0, 4.0, 5.0, 9.0])
    b = gaussian(6, seed=3)
    x, result, stats = compute(CG(1e-12), on_vector(matrix, SYMMETRIC), jnp.asarray(b))
    steps = int(stats["num_steps"])
    assert 1 <= steps < 6
    assert is_result(result, "breakdown") and stop_of(stats) is StopReason.negative_curvature
    np.testing.assert_allclose(x, textbook(matrix, b, steps)[-1], rtol=1e-10)
    infinite = compute(CG(1e-12), on_vector(matrix, SYMMETRIC), jnp.asarray(b), radius=jnp.inf)
    np.testing.assert_array_equal(infinite[0], x)
    assert is_result(infinite[1], "breakdown")
    assert stop_of(infinite[2]) is StopReason.negative_curvature


def test_nan_in_the_vector():
    op = on_vector(np.eye(3))
    y0 = jnp.asarray([1.0, 2.0, 3.0])
    for bad in (jnp.nan, jnp.inf):
        b = jnp.asarray([1.0, bad, 1.0])
        for solver in (CG(), CG(0.0, 0.0, max_steps=2)):
            x, result, stats = compute(solver, op, b)
            np.testing.assert_array_equal(x, np.zeros(3))
            assert is_result(result, "nonfinite_input")
            assert stop_of(stats) is StopReason.nonfinite and int(stats["num_steps"]) == 0
        np.testing.assert_array_equal(compute(CG(), op, b, y0=y0)[0], y0)
    solution = lx.linear_solve(op, b, CG(), throw=False)
    assert is_result(solution.result, "nonfinite_input")


def test_nan_in_the_operator():
    solver = CG(1e-10, max_steps=6)
    always = on_vector(np.full((3, 3), np.nan), SYMMETRIC)
    for options in ({}, {"y0": jnp.ones(3, F64)}):
        x, result, stats = compute(solver, always, jnp.ones(3, F64), **options)
        np.testing.assert_array_equal(x, np.zeros(3))
        assert is_result(result, "breakdown") and stop_of(stats) is StopReason.nonfinite

    # A product that turns NaN as soon as the Krylov space reaches the last coordinate: step 3.
    matrix = np.diag([2.0] * 3) - np.diag([1.0] * 2, 1) - np.diag([1.0] * 2, -1)
    dense = jnp.asarray(matrix)
    op = lx.FunctionLinearOperator(
        lambda v: jnp.where(jnp.abs(v[2]) > 0, jnp.nan, dense @ v),
        jax.ShapeDtypeStruct((3,), F64),
        PSD,
    )
    b = np.array([1.0, 0.0, 0.0])
    x, result, stats = compute(solver, op, jnp.asarray(b))
    assert is_result(result, "breakdown") and stop_of(stats) is StopReason.nonfinite
    assert int(stats["num_steps"]) == 2
    np.testing.assert_allclose(x, textbook(matrix, b, 2)[-1], rtol=1e-12)
    assert all(np.isfinite(np.asarray(value)) for value in stats.values())


def test_overflow_is_reported():
    # The second product is finite, the step that follows from it is not.
    op = on_vector(np.diag([1.0, 1e-37]), dtype=F32)
    b = jnp.asarray([1.0, 1e4], F32)
    _, result, _ = compute(CG(1e-30, max_steps=10), op, b)
    assert not is_result(result, "successful")


def test_bad_preconditioners_are_reported():
    matrix = with_spectrum(np.linspace(1, 5, 6))
    b = jnp.asarray(gaussian(6))
    for entry, reason in ((-1.0, "indefinite_preconditioner"), (np.nan, "nonfinite")):
        x, result, stats = compute(
            CG(), on_vector(matrix), b, preconditioner=on_vector(entry * np.eye(6))
        )
        np.testing.assert_array_equal(x, np.zeros(6))
        assert is_result(result, "breakdown") and stop_of(stats) is StopReason[reason]
    # Singular: the solution within its range is found, the rest of the residual is reported.
    half = np.diag([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    x, result, _ = compute(CG(1e-10), on_vector(matrix), b, preconditioner=on_vector(half))
    assert not is_result(result, "successful")
    np.testing.assert_allclose(x[:3], np.linalg.solve(matrix[:3, :3], b[:3]), rtol=1e-8)


@pytest.mark.parametrize("options", [{}, {"y0": 3.0}, {"radius": 1.0}])
def test_zero_vector(options):
    options = {k: jnp.full((4,), v) if k == "y0" else v for k, v in options.items()}
    x, result, stats = compute(CG(), on_vector(np.diag([1.0, 2, 3, 4])), jnp.zeros(4), **options)
    np.testing.assert_array_equal(x, np.zeros(4))
    assert is_result(result, "successful") and int(stats["num_steps"]) == 0
    assert all(float(stats[k]) == 0 for k in ("residual_norm", "quadratic", "curvature"))


@pytest.mark.parametrize("magnitude", [1e-15, 1e-30, 1e15])
def test_tiny_and_huge_vectors_stay_finite(magnitude):
    matrix = with_spectrum(np.linspace(1, 5, 6))
    b = jnp.asarray(magnitude * gaussian(6), F32)
    x, result, stats = compute(CG(), on_vector(matrix, dtype=F32), b)
    assert np.all(np.isfinite(x)) and all(np.isfinite(np.asarray(v)) for v in stats.values())
    if magnitude != 1e-30:  # whose square is no float32
        assert is_result(result, "successful")
        expected = np.linalg.solve(matrix, np.asarray(b, np.float64))
        np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-4 * magnitude)


def test_many_steps_do_not_shrink_into_underflow():
    # pᵀA p is the first to vanish, and would be taken for negative curvature.
    matrix = with_spectrum(np.linspace(1e-6, 1e-5, 8))
    b = jnp.asarray(1e-3 * gaussian(8), F32)
    solver = CG(0.0, 0.0, max_steps=60)
    _, result, stats = compute(solver, on_vector(matrix, dtype=F32), b)
    assert is_result(result, "successful") and stop_of(stats) is StopReason.converged


def test_step_limit():
    op, b = on_vector(with_spectrum(np.logspace(-6, 0, 20))), jnp.asarray(gaussian(20))
    x, result, stats = compute(CG(max_steps=3), op, b)
    assert is_result(result, "max_steps_reached") and stop_of(stats) is StopReason.max_steps
    assert int(stats["num_steps"]) == 3 == int(stats["max_steps"])
    fixed, result, stats = compute(CG(0.0, 0.0, max_steps=3), op, b)
    assert is_result(result, "successful") and stop_of(stats) is StopReason.max_steps
    np.testing.assert_array_equal(x, fixed)
    with pytest.raises(eqx.EquinoxRuntimeError):
        lx.linear_solve(op, b, CG(max_steps=3))
    assert int(compute(CG(), op, b)[2]["max_steps"]) == 200


# The trust radius


def test_steihaug_stops_on_the_boundary():
    matrix = with_spectrum(np.linspace(0.1, 10, 12))
    b = gaussian(12)
    exact = np.linalg.solve(matrix, b)
    full = np.linalg.norm(exact)
    values = []
    for fraction in (0.0, 0.05, 0.3, 0.7, 0.95, 2.0):
        radius = fraction * full
        x, result, stats = compute(CG(1e-12), on_vector(matrix), jnp.asarray(b), radius=radius)
        assert is_result(result, "successful")
        values.append(float(stats["quadratic"]))
        np.testing.assert_allclose(values[-1], phi(matrix, b, np.asarray(x)), atol=1e-12)
        if fraction < 1:
            assert stop_of(stats) is StopReason.boundary
            np.testing.assert_allclose(np.linalg.norm(x), radius, rtol=1e-12)
            expected = textbook(matrix, b, 12, radius)[-1] if radius else np.zeros(12)
        else:
            assert stop_of(stats) is StopReason.converged
            expected = exact
        np.testing.assert_allclose(x, expected, rtol=1e-8, atol=1e-10)
    assert np.all(np.diff(values) < 0)


def test_steihaug_follows_negative_curvature_to_the_boundary():
    matrix = with_spectrum([-0.3, 1.0, 2.0, 4.0, 5.0, 9.0])
    b = gaussian(6, seed=3)
    op = on_vector(matrix, SYMMETRIC)
    x, result, stats = compute(CG(1e-12), op, jnp.asarray(b), radius=50.0)
    assert is_result(result, "successful") and stop_of(stats) is StopReason.negative_curvature
    np.testing.assert_allclose(np.linalg.norm(x), 50.0, rtol=1e-12)
    np.testing.assert_allclose(x, textbook(matrix, b, 6, 50.0)[-1], rtol=1e-9)
    # On the first step, too, and in the preconditioned direction.
    op = on_vector(-np.eye(2), SYMMETRIC)
    inverse = on_vector(np.diag([3.0, 1.0]))
    x, _, _ = compute(CG(), op, jnp.asarray([1.0, 4.0]), radius=10.0, preconditioner=inverse)
    np.testing.assert_allclose(x, [6.0, 8.0])


def test_warm_start_is_brought_into_the_ball():
    matrix = with_spectrum(np.linspace(1, 10, 8))
    b = gaussian(8)
    exact = np.linalg.solve(matrix, b)
    half = np.linalg.norm(exact) / 2

    def solve(y0):
        return compute(CG(), on_vector(matrix), jnp.asarray(b), y0=y0, radius=half)

    x, result, stats = solve(jnp.asarray(100 * exact))
    assert is_result(result, "successful") and stop_of(stats) is StopReason.boundary
    np.testing.assert_allclose(np.linalg.norm(x), half, rtol=1e-12)
    assert float(stats["quadratic"]) <= phi(matrix, b, exact / 2) + 1e-12
    # From inside, the boundary is met along the direction from y0.
    y0 = 0.1 * exact[::-1]
    x, _, stats = solve(jnp.asarray(y0))
    assert int(stats["num_steps"]) == 1
    np.testing.assert_allclose(np.linalg.norm(x), half, rtol=1e-12)
    direction, step = b - matrix @ y0, np.asarray(x) - y0
    np.testing.assert_allclose(step / np.linalg.norm(step), direction / np.linalg.norm(direction))


# The stop on model decrease, warm starts


@pytest.mark.parametrize("epsilon", [1e3, 3e-2, 5e-4])
def test_relative_decrease_stops_where_martens_says(epsilon):
    matrix = with_spectrum(np.logspace(-5, 0, 300))
    op, b = on_vector(matrix), jnp.asarray(gaussian(300))
    solver = CG(1e-5, max_steps=1000, relative_decrease=epsilon)
    _, result, stats = compute(solver, op, b)
    assert is_result(result, "successful") and stop_of(stats) is StopReason.relative_decrease
    # From the solver's own models: another CG is no oracle once orthogonality is lost to rounding.
    k = int(stats["num_steps"])
    model = functools.cache(
        lambda k: float(compute(CG(0.0, 0.0, max_steps=k), op, b)[2]["quadratic"])
    )

    def decrease(k):
        window = int(max(10, np.ceil(0.1 * k)))
        return (model(k) - model(k - window)) / model(k) / window if k > window else np.inf

    np.testing.assert_allclose(stats["quadratic"], model(k), rtol=1e-12)
    assert decrease(k) < epsilon <= decrease(k - 1)
    assert model(k) < model(k - 1) < 0
    if epsilon == 1e3:
        assert k == 11, "the first k > K"
    if epsilon == 5e-4:
        assert k > 110, "K = 0.1 k"
        _, _, longer = compute(CG(1e-5, max_steps=1000), op, b)
        assert int(longer["num_steps"]) > k
        assert float(longer["quadratic"]) < model(k)


def test_model_is_monotone_and_known_at_every_step():
    matrix = with_spectrum(np.logspace(-2, 0, 12))
    b, y0 = gaussian(12), gaussian(12, seed=9)
    values = [phi(matrix, b, y0)]
    for steps in range(1, 11):
        x, _, stats = compute(
            CG(0.0, 0.0, max_steps=steps), on_vector(matrix), jnp.asarray(b), y0=jnp.asarray(y0)
        )
        values.append(phi(matrix, b, np.asarray(x)))
        np.testing.assert_allclose(stats["quadratic"], values[-1], rtol=1e-10)
    assert np.all(np.diff(values) < 0)


def test_warm_start():
    matrix = with_spectrum(np.linspace(1, 30, 15))
    b = gaussian(15)
    exact = np.linalg.solve(matrix, b)
    solver = CG(1e-8, max_steps=30)
    x, result, stats = compute(solver, on_vector(matrix), jnp.asarray(b), y0=jnp.asarray(exact))
    assert int(stats["num_steps"]) == 0 and is_result(result, "successful")
    np.testing.assert_array_equal(x, exact)
    np.testing.assert_allclose(stats["quadratic"], phi(matrix, b, exact), rtol=1e-12)
    # One step from y0 is one step from zero on the residual's system.
    y0 = gaussian(15, seed=5)
    expected = y0 + textbook(matrix, b - matrix @ y0, 1)[-1]
    x, _, stats = compute(CG(0.0, 0.0, max_steps=1), on_vector(matrix), jnp.asarray(b), y0=y0)
    np.testing.assert_allclose(x, expected, rtol=1e-12)
    np.testing.assert_allclose(stats["quadratic"], phi(matrix, b, expected), rtol=1e-10)
    # A spoilt warm start is none.
    x, result, _ = compute(
        solver, on_vector(matrix), jnp.asarray(b), y0=jnp.full((15,), jnp.nan, F64)
    )
    assert is_result(result, "successful")
    np.testing.assert_allclose(x, exact, rtol=1e-6)


# Tracing


@pytest.mark.parametrize("solver", [CG(), CG(residual_every=2), CG(max_steps=3)])
@pytest.mark.parametrize("warm", [False, True])
def test_product_is_traced_once_and_for_a_warm_start_twice(solver, warm):
    traced = []

    def fn(v):
        traced.append(None)
        return 2 * v

    structure = jax.ShapeDtypeStruct((3,), F64)
    op = lx.FunctionLinearOperator(fn, structure, PSD, closure_convert=False)
    options = {"y0": jnp.ones(3, F64)} if warm else {}
    state = solver.init(op, options)
    before = len(traced)
    jax.jit(lambda b: solver.compute(state, b, options)[0]).lower(jnp.ones(3, F64))
    assert len(traced) - before == 1 + warm


# Transformations


def test_vmap_over_right_hand_sides():
    matrix = with_spectrum(np.linspace(1, 30, 10))
    # Solves of different lengths: an eigenvector, nothing, a general vector, a bad one.
    rows = np.stack([np.linalg.eigh(matrix)[1][:, 0], np.zeros(10), gaussian(10), gaussian(10)])
    rows[3, 0] = np.nan
    for solver in (CG(1e-11), CG(1e-11, max_steps=20), CG(1e-11, residual_every=3)):
        solve = functools.partial(compute, solver, on_vector(matrix))
        x, result, stats = jax.vmap(solve)(jnp.asarray(rows))
        np.testing.assert_allclose(x[:3], np.linalg.solve(matrix, rows[:3].T).T, atol=1e-10)
        np.testing.assert_array_equal(x[3], np.zeros(10))
        assert stats["num_steps"][0] == 1 and stats["num_steps"][1] == 0
        assert 5 <= stats["num_steps"][2] <= 14 and stats["num_steps"][3] == 0
        assert (result == lx.RESULTS.successful).tolist() == [True, True, True, False]
    batched = jax.vmap(lambda b: lx.linear_solve(on_vector(matrix), b, CG(1e-11)).value)(rows[:3])
    np.testing.assert_allclose(batched, np.linalg.solve(matrix, rows[:3].T).T, atol=1e-10)


def test_vmap_over_operators():
    scales = jnp.asarray([1.0, 2.0, 5.0])
    matrix = jnp.asarray(with_spectrum(np.linspace(1, 4, 5)))
    b = jnp.asarray(gaussian(5))

    def solve(scale):
        structure = jax.ShapeDtypeStruct((5,), F64)
        op = lx.FunctionLinearOperator(lambda v: scale * (matrix @ v), structure, PSD)
        return compute(CG(1e-12), op, b)[0]

    expected = np.linalg.solve(matrix, b)[None] / np.asarray(scales)[:, None]
    np.testing.assert_allclose(jax.vmap(solve)(scales), expected, rtol=1e-10)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_through_linear_solve(sign):
    base = jnp.asarray(with_spectrum(np.linspace(1, 10, 7)))
    b = jnp.asarray(gaussian(7))
    weights = jnp.asarray(gaussian(7, seed=1))
    tag = PSD if sign > 0 else NSD

    def ours(matrix, b):
        symmetric = sign * (matrix + matrix.T) / 2
        inverse = lx.MatrixLinearOperator(jnp.diag(1 / jnp.diag(base)), PSD)
        solution = lx.linear_solve(
            lx.MatrixLinearOperator(symmetric, tag),
            b,
            CG(1e-13, max_steps=50),
            options={"preconditioner": inverse, "y0": jnp.ones(7, F64)},
        )
        return weights @ jnp.sin(solution.value)

    def dense(matrix, b):
        return weights @ jnp.sin(jnp.linalg.solve(sign * (matrix + matrix.T) / 2, b))

    for got, expected in zip(
        jax.grad(ours, (0, 1))(base, b), jax.grad(dense, (0, 1))(base, b), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)
    tangent = jnp.asarray(gaussian(7, seed=2))
    np.testing.assert_allclose(
        jax.jvp(lambda b: ours(base, b), (b,), (tangent,))[1],
        jax.jvp(lambda b: dense(base, b), (b,), (tangent,))[1],
        rtol=1e-8,
    )


def test_state_is_transposed_and_conjugated():
    matrix = with_spectrum(np.linspace(1, 10, 4))
    b = jnp.asarray(gaussian(4))
    solver = CG(1e-12)
    options = {"preconditioner": on_vector(np.eye(4)), "y0": b}
    state = solver.init(on_vector(matrix), options)
    for method in (solver.transpose, solver.conj):
        new_state, new_options = method(state, options)
        assert set(new_options) == {"preconditioner"}
        x, _, _ = solver.compute(new_state, b, new_options)
        np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-10)
    assert solver.assume_full_rank()


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs more than one device")
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_shardings_are_kept(axis_type):
    count = len(jax.devices())
    mesh = jax.make_mesh((count,), ("data",), axis_types=(axis_type,))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with jax.set_mesh(mesh):
        b = jax.device_put(jnp.asarray(gaussian(4 * count)), sharded)
        diagonal = jax.device_put(jnp.linspace(1.0, 2.0, 4 * count), sharded)

        @jax.jit
        def solve(diagonal, b, y0):
            structure = jax.eval_shape(lambda: b)
            op = lx.FunctionLinearOperator(lambda v: diagonal * v, structure, PSD)
            solver = CG(1e-12, residual_every=3)
            return compute(solver, op, b, y0=y0, radius=1e3)

        x, result, _ = solve(diagonal, b, jnp.zeros_like(b))
    assert is_result(result, "successful")
    assert x.sharding.is_equivalent_to(sharded, 1)
    np.testing.assert_allclose(x, np.asarray(b) / np.asarray(diagonal), rtol=1e-10)


def test_stats_have_one_schema():
    b = jnp.asarray(gaussian(4), F32)
    good, bad = on_vector(np.eye(4), dtype=F32), on_vector(-np.eye(4), SYMMETRIC, F32)
    seen = set()
    for op in (good, bad):
        for solver in (
            CG(),
            CG(max_steps=2),
            CG(relative_decrease=1e-3, residual_every=2),
        ):
            for options in ({}, {"y0": b}, {"radius": 1.0}):
                solve = functools.partial(compute, solver, op, **options)
                assert all(isinstance(value, jax.Array) for value in solve(b)[2].values())
                stats = jax.eval_shape(lambda b: solve(b)[2], b)  # noqa: B023
                seen.add(tuple((k, v.shape, v.dtype, v.weak_type) for k, v in stats.items()))
    assert len(seen) == 1
    schema = {name: (shape, dtype) for name, shape, dtype, weak in seen.pop() if not weak}
    assert schema == {
        "num_steps": ((), jnp.int32),
        "max_steps": ((), jnp.int32),
        "stop": ((), jnp.int32),
        "residual_norm": ((), F32),
        "quadratic": ((), F32),
        "curvature": ((), F32),
    }


def test_tolerances_may_be_traced():
    op, b = on_vector(with_spectrum(np.linspace(1, 100, 20))), jnp.asarray(gaussian(20))
    solve = jax.jit(lambda rtol: compute(CG(rtol, max_steps=30), op, b)[2]["num_steps"])
    assert 0 < int(solve(1e-2)) < int(solve(1e-8))
    assert solve._cache_size() == 1


# Errors


def test_static_mistakes_raise():
    b = jnp.ones(2, F64)
    with pytest.raises(ValueError, match=r"square operator.*\(2,\).*\(3,\)"):
        CG().init(on_vector(np.ones((3, 2)), ()), {})
    with pytest.raises(ValueError, match="symmetric operator"):
        CG().init(on_vector(np.eye(2), ()), {})
    with pytest.raises(ValueError, match="real operators"):
        CG().init(on_vector(np.eye(2), PSD, jnp.complex128), {})
    op = on_vector(np.eye(2))
    with pytest.raises(ValueError, match=r"vector has structure.*\(3,\)"):
        compute(CG(), op, jnp.ones(3, F64))
    with pytest.raises(ValueError, match=r"y0.*\(3,\)"):
        compute(CG(), op, b, y0=jnp.ones(3, F64))
    with pytest.raises(ValueError, match=r"preconditioner.*\(3,\)"):
        compute(CG(), op, b, preconditioner=on_vector(np.eye(3)))
    with pytest.raises(ValueError, match="positive semidefinite"):
        compute(CG(), op, b, preconditioner=on_vector(np.eye(2), SYMMETRIC))
    with pytest.raises(ValueError, match="lineax operator"):
        compute(CG(), op, b, preconditioner=lambda v: v)
    with pytest.raises(ValueError, match="radius must be non-negative"):
        compute(CG(), op, b, radius=-1.0)
    with pytest.raises(ValueError, match="cannot be transposed"):
        jax.grad(lambda b: lx.linear_solve(op, b, CG(), options={"radius": 1.0}).value[0])(b)
    for name, value in (("rtol", -1.0), ("relative_decrease", -1.0), ("max_steps", 0)):
        with pytest.raises(ValueError, match=name):
            CG(**{name: value})
