"""Krylov subspaces and low-rank sketches, and the methods that are made of them."""

import functools
import itertools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx
from curvax import _basis
from curvax.preconditioners.nystrom import sharpness, sketch_rank
from curvax.scalings import Context
from tests.devices import printed
from tests.oracles import dense_gauss_newton, dense_hessian
from tests.problems import avals, gradient_of, predict, problem, quadratic_problem
from tests.references import subspace as reference
from tests.strategies import make_problem

KEY = jax.random.key(5)
STEPS = 10
RANK = 6


def close(got, wanted, rtol=1e-8, atol=1e-10):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=rtol, atol=atol)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def columns(basis):
    """The dense matrix of a basis."""
    count = jax.tree.leaves(basis)[0].shape[0]
    return np.stack(
        [flat(jax.tree.map(lambda b: b[i], basis)) for i in range(count)],  # noqa: B023
        axis=1,
    )


def symmetric(size, seed=0, definite=False, decay=1.0):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    values = decay ** np.arange(size)
    values = values if definite else values * rng.choice([-1.0, 1.0], size)
    return (basis * values) @ basis.T


class OfTree(cx.AbstractOperator):
    """A dense symmetric matrix as an operator over a tree of several leaves."""

    matrix: jax.Array
    like: dict

    @property
    def symmetric(self):
        return True

    def mv(self, vector):
        ravelled, unravel = ravel_pytree(vector)
        return unravel((self.matrix.astype(ravelled.dtype) @ ravelled).astype(ravelled.dtype))

    def transpose(self):
        return self

    def in_structure(self):
        return jax.eval_shape(lambda: self.like)

    out_structure = in_structure


def over_tree(matrix, dtype=jnp.float64):
    size = len(matrix)
    like = {"a": jnp.zeros((2, 3), dtype), "b": (jnp.zeros((0, 2), dtype), jnp.zeros((), dtype))}
    like["c"] = jnp.zeros((size - 7,), dtype)
    return OfTree(jnp.asarray(matrix, dtype), like)


dense = eqx.filter_jit(lambda operator: operator.as_matrix())


def normal_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


# -- the low-rank operator -----------------------------------------------------------------------


def test_low_rank_operator_against_dense():
    start = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4,))}
    basis, _ = _basis.orthonormal(_basis.gaussian(KEY, start, 3))
    # A column that is zero has no direction, and so the tail.
    basis = jax.tree.map(lambda b: b.at[2].set(0.0), basis)
    values, tail = jnp.array([3.0, 0.5, 7.0]), 0.2
    operator = cx.LowRank(basis, values, tail)
    u = columns(basis)
    matrix = u @ np.diag(values - tail) @ u.T + tail * np.eye(10)
    vector = normal_like(operator.in_structure())
    inverse = np.linalg.inv(matrix + 0.3 * np.eye(10))

    @eqx.filter_jit
    def views(operator, vector):
        products = [operator.mv(vector), operator.T.mv(vector), operator.inverse(0.3).mv(vector)]
        return products, operator.diagonal(), operator.quadratic_form(vector), operator.trace()

    (product, transposed, solution), diagonal, quadratic, trace = views(operator, vector)
    close(dense(operator), matrix)
    close(flat(product), matrix @ flat(vector))
    close(flat(transposed), matrix @ flat(vector))
    close(flat(solution), inverse @ flat(vector))
    close(quadratic, flat(vector) @ matrix @ flat(vector))
    close(flat(diagonal), np.diagonal(matrix))
    close(trace, np.trace(matrix))
    assert lx.is_symmetric(operator) and lx.is_positive_semidefinite(operator)
    assert not lx.is_positive_semidefinite(cx.LowRank(basis, values, tail, nonnegative=False))
    assert not lx.is_diagonal(operator) and operator.rank == 3


def test_low_rank_operator_keeps_the_dtypes_of_vectors():
    basis = {"a": jnp.ones((2, 3), jnp.float32), "b": jnp.ones((2, 2), jnp.float64)}
    operator = cx.LowRank(basis, jnp.ones(2), 0.5)
    vector = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    assert avals(operator.mv(vector)) == avals(vector)


def test_restricted_low_rank_operator():
    operator = sketched(over_tree(symmetric(12, definite=True, decay=0.6)), KEY, 4)
    masked = {"a": optax.MaskedNode(), "b": (jnp.zeros((0, 2)), optax.MaskedNode())}
    block = eqx.filter_jit(lambda o: o.restrict(masked | {"c": jnp.zeros(5)}))(operator)
    close(dense(block), dense(operator)[7:, 7:])
    u = columns(block.basis)
    close(u.T @ u, np.eye(4))


def test_mistakes_in_a_low_rank_operator_are_named(unchecked):
    with pytest.raises(ValueError, match=re.escape("basis['a']: got shape (3, 2), wanted 2 col")):
        cx.LowRank({"a": jnp.ones((3, 2))}, jnp.ones(2))
    with pytest.raises(ValueError, match=re.escape("tail: got shape (2,), wanted ()")):
        cx.LowRank({"a": jnp.ones((2, 2))}, jnp.ones(2), jnp.ones(2))


# -- Nyström approximations ----------------------------------------------------------------------


sketched = eqx.filter_jit(cx.nystrom)


@pytest.mark.parametrize(("rank", "at_once"), [(1, 1), (5, 3), (20, 1), (20, 50)])
def test_nystrom_is_that_of_the_paper(rank, at_once):
    operator = over_tree(symmetric(20, definite=True, decay=0.7))
    start = _basis.gaussian(KEY, operator.like, rank)
    seen = sketched(operator, start, at_once=at_once)
    vectors, values = reference.nystrom(np.asarray(operator.matrix), columns(start))
    u = columns(seen.basis)
    close(seen.values, values)
    close(u.T @ u, np.eye(rank))
    close(dense(seen), vectors @ np.diag(values) @ vectors.T)
    close(u @ (np.asarray(seen.values)[:, None] * u.T), vectors @ np.diag(values) @ vectors.T)
    if rank == 20:
        close(dense(seen), operator.matrix)
    close(dense(sketched(operator, KEY, rank, at_once=at_once)), dense(seen))


@pytest.mark.parametrize("make", [cx.GaussNewton, cx.Fisher])
def test_nystrom_of_full_rank_is_the_curvature(make):
    p = make_problem("dict", "softmax", weights="example", l2=0.1)
    operator = make(p.objective, p.model, p.batch)
    matrix = p.dense()["gauss_newton" if make is cx.GaussNewton else "exact"]
    close(dense(sketched(operator, KEY, 10**6, at_once=4)), matrix)


def test_the_basis_of_a_sketch_starts_a_better_one():
    operator = over_tree(symmetric(30, definite=True, decay=0.9))
    errors, seen = [], sketched(operator, KEY, 5)
    best = np.linalg.norm(np.linalg.eigvalsh(operator.matrix)[:-5])
    for _ in range(6):
        errors.append(np.linalg.norm(operator.matrix - dense(seen)))
        seen = sketched(operator, seen.basis)
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1.05 * best < errors[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["deficient", "zero", "tiny", "huge", "graded"])
def test_nystrom_of_degenerate_operators(kind, dtype):
    rng = np.random.default_rng(0)
    root = rng.standard_normal((30, 4))
    matrix = {
        "deficient": root @ root.T,
        "zero": np.zeros((30, 30)),
        "tiny": 1e-15 * root @ root.T,
        "huge": 1e15 * root @ root.T,
        "graded": symmetric(30, definite=True, decay=0.01),
    }[kind]
    operator = over_tree(matrix, dtype)
    seen = sketched(operator, KEY, 10)
    eps = float(jnp.finfo(dtype).eps)
    scale = np.linalg.norm(matrix)
    u, values = columns(seen.basis).astype(float), np.asarray(seen.values, float)
    assert np.all(np.isfinite(u)) and np.all(values >= 0)
    assert np.all(np.diff(values) <= 0)
    assert np.linalg.norm(matrix - u @ np.diag(values) @ u.T) <= 100 * eps * scale
    kept = u[:, values > 1e3 * eps * scale]
    np.testing.assert_allclose(kept.T @ kept, np.eye(kept.shape[1]), atol=50 * eps)
    inverse = np.asarray(dense(seen.inverse(0.1 * scale + 1)), float)
    wanted = np.linalg.inv(matrix + (0.1 * scale + 1) * np.eye(30))
    np.testing.assert_allclose(inverse, wanted, atol=200 * eps * np.abs(wanted).max())


def test_nystrom_of_an_indefinite_operator_is_near_its_positive_part():
    values, basis = np.linalg.eigh(symmetric(30))
    values = np.where(np.arange(30) < 25, -0.1, 1.0 + np.arange(30))
    operator = over_tree(basis @ np.diag(values) @ basis.T)
    start = _basis.gaussian(KEY, operator.like, 10)
    seen = sketched(operator, start)
    assert lx.is_positive_semidefinite(seen)
    _, wanted = reference.shifted_nystrom(np.asarray(operator.matrix), columns(start))
    close(seen.values, wanted, 1e-6, 1e-6)
    np.testing.assert_allclose(np.sort(seen.values)[5:], values[25:], rtol=1e-2)
    positive = basis @ np.diag(np.maximum(values, 0)) @ basis.T
    assert np.linalg.norm(dense(seen) - positive, 2) < 0.3


def test_nystrom_shows_what_is_not_finite():
    seen = sketched(over_tree(jnp.full((12, 12), jnp.nan)), KEY, 3)
    assert not jnp.any(jnp.isfinite(seen.values))


def test_mistakes_in_a_sketch_are_named(unchecked):
    operator = over_tree(np.eye(12))
    with pytest.raises(ValueError, match="rank: got 0, wanted at least 1"):
        cx.nystrom(operator, KEY, 0)
    with pytest.raises(ValueError, match="at_once: got 0, wanted at least 1"):
        cx.nystrom(operator, KEY, 2, at_once=0)
    with pytest.raises(ValueError, match="got a Composed that is not marked symmetric"):
        cx.nystrom(operator @ operator, KEY, 2)
    for options in ({"rank": 0}, {"at_once": -1}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))}: got .*, wanted at least 1"):
            cx.NystromSketch(cx.GaussNewtonCurvature(), **options)
    with pytest.raises(ValueError, match="tail: got 'none', wanted 'smallest' or 'zero'"):
        cx.NystromPreconditioner(tail="none")


def equations(jaxpr):
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = len(jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(item, "jaxpr", item), "eqns"):
                    total += equations(item)
    return total


def test_programs_do_not_grow_with_rank_or_subspace():
    p = problem()
    operator = cx.GaussNewton(p.objective, p.params, p.batch)
    sizes = {
        equations(jax.make_jaxpr(lambda key, rank=rank: cx.nystrom(operator, key, rank))(KEY))
        for rank in (3, 30)
    }
    assert len(sizes) == 1

    def solve(b, steps):
        solver = cx.AbsoluteKrylov(steps)
        return solver.compute(solver.init(operator, {}), b, {})[0]

    sizes = {
        equations(jax.make_jaxpr(functools.partial(solve, steps=steps))(p.gradient))
        for steps in (3, 30)
    }
    assert len(sizes) == 1


# -- the absolute value in a Krylov subspace -----------------------------------------------------


@eqx.filter_jit
def solve(solver, operator, b, options=None):
    options = options or {}
    return solver.compute(solver.init(operator, options), b, options)


def absolute_inverse(matrix, damping):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(1 / (np.abs(values) + damping)) @ vectors.T


@pytest.mark.parametrize("steps", [25, 40])
def test_a_whole_subspace_gives_the_dense_solution(steps):
    matrix = symmetric(25, decay=0.8)
    operator = over_tree(matrix)
    b = normal_like(operator.like)
    solution, result, stats = solve(cx.AbsoluteKrylov(steps), cx.Damped(operator, 0.1), b)
    close(flat(solution), absolute_inverse(matrix, 0.1) @ flat(b))
    assert result == lx.RESULTS.successful
    assert int(stats["max_steps"]) == 25 and int(stats["num_steps"]) <= 25
    close(stats["smallest_eigenvalue"], np.linalg.eigvalsh(matrix)[0])
    # Not |A + λI|, which is another matrix where A is indefinite.
    other, _, _ = solve(cx.Eigh(), cx.Damped(operator, 0.1), b)
    assert np.linalg.norm(flat(other) - flat(solution)) > 1e-3


def test_the_curvature_of_a_network():
    p = problem()
    matrix = np.asarray(dense_hessian(p.objective, p.params, p.batch))
    assert np.linalg.eigvalsh(matrix)[0] < -1e-3
    operator = cx.Hessian(p.objective, p.params, p.batch)
    for steps in (1, 4, 9, 40):
        solution, _, _ = solve(cx.AbsoluteKrylov(steps), cx.Damped(operator, 0.05), p.gradient)
        wanted = reference.absolute_solve(matrix, flat(p.gradient), 0.05, steps)
        close(flat(solution), wanted)
        assert flat(solution) @ flat(p.gradient) > 0
    close(wanted, absolute_inverse(matrix, 0.05) @ flat(p.gradient))


def test_the_basis_stays_orthogonal():
    """Next to nothing is left of a product whose part along the basis is taken off."""
    operator = over_tree(symmetric(30, decay=0.1))
    b = normal_like(operator.like)
    lanczos = eqx.filter_jit(cx.AbsoluteKrylov(12)._lanczos)
    done = lanczos(operator, operator.in_structure(), b, jnp.linalg.norm(flat(b)))
    basis = columns(done.basis)
    close(basis.T @ basis, np.eye(12), 0, 1e-13)


def test_any_other_symmetric_operator_by_its_own_absolute_value():
    matrix = symmetric(12)
    b = normal_like(over_tree(matrix).like)
    solution, _, _ = solve(cx.AbsoluteKrylov(12), over_tree(matrix), b)
    close(flat(solution), absolute_inverse(matrix, 0.0) @ flat(b))
    tagged = lx.MatrixLinearOperator(jnp.asarray(matrix), lx.symmetric_tag)
    solution, _, _ = solve(cx.AbsoluteKrylov(12), tagged, jnp.asarray(flat(b)))
    close(solution, absolute_inverse(matrix, 0.0) @ flat(b))
    through = lx.linear_solve(tagged, jnp.asarray(flat(b)), cx.AbsoluteKrylov(12))
    close(through.value, solution)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_exhausted_subspace(dtype):
    """b has parts along three eigenvectors: the fourth column would be noise."""
    values, vectors = np.linalg.eigh(symmetric(20, definite=True, decay=0.8))
    matrix = vectors @ np.diag(values) @ vectors.T
    b = vectors[:, [0, 7, 19]] @ np.array([1.0, -2.0, 0.5])
    operator = over_tree(matrix, dtype)
    _, unravel = ravel_pytree(operator.like)
    right = unravel(jnp.asarray(b, dtype))
    solution, result, stats = solve(cx.AbsoluteKrylov(20), cx.Damped(operator, 0.1), right)
    tight = {"float32": 1e-5, "float64": 1e-10}[dtype]
    close(flat(solution), absolute_inverse(matrix, 0.1) @ b, 0, tight)
    assert result == lx.RESULTS.successful
    if dtype == "float64":
        assert int(stats["num_steps"]) == 3
        close(stats["smallest_eigenvalue"], min(values[[0, 7, 19]]))


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_degenerate_systems(damping):
    identity = over_tree(np.eye(12))
    b = normal_like(identity.like)
    zero = jax.tree.map(jnp.zeros_like, b)
    solver = cx.AbsoluteKrylov(5)
    damped = lambda matrix: cx.Damped(over_tree(matrix), damping)
    solution, _, stats = solve(solver, damped(np.eye(12)), b)
    close(flat(solution), flat(b) / (1 + damping))
    assert int(stats["num_steps"]) == 1
    close(flat(solve(solver, damped(-np.eye(12)), b)[0]), flat(b) / (1 + damping))
    close(flat(solve(solver, damped(symmetric(12)), zero)[0]), 0.0)
    nothing = flat(solve(solver, damped(np.zeros((12, 12))), b)[0])
    close(nothing, flat(b) / damping if damping else 0.0)


def test_small_values_are_raised_to_the_floor():
    values = np.array([2.0] + 11 * [1e-9])
    b = normal_like(over_tree(np.eye(12)).like)
    operator = over_tree(np.diag(values))
    for floor, least in ((1e-6, 2e-6), (0.1, 0.2), (0.0, 1e-9)):
        solution, _, _ = solve(cx.AbsoluteKrylov(12, floor), cx.Damped(operator, 0.0), b)
        close(flat(solution)[1:], flat(b)[1:] / least, 1e-5)


def test_what_is_not_finite_is_reported():
    b = normal_like(over_tree(np.eye(12)).like)
    matrices = {"operator": np.full((12, 12), np.nan), "vector": np.eye(12)}
    for name, matrix in matrices.items():
        right = b if name == "operator" else b | {"a": b["a"].at[0, 0].set(jnp.nan)}
        solution, result, _ = solve(cx.AbsoluteKrylov(3), over_tree(matrix), right)
        assert result == lx.RESULTS.breakdown
        assert np.all(np.isnan(flat(solution)))


def test_mistakes_in_the_krylov_solver_are_named():
    operator = over_tree(np.eye(12))
    with pytest.raises(ValueError, match="max_steps: got 0, wanted at least 1"):
        cx.AbsoluteKrylov(0)
    with pytest.raises(ValueError, match=r"floor: got -1\.0, wanted a number ≥ 0"):
        cx.AbsoluteKrylov(3, -1.0)
    with pytest.raises(ValueError, match="got a Composed that is not marked symmetric"):
        cx.AbsoluteKrylov().init(operator @ operator, {})
    matrix = lx.MatrixLinearOperator(jnp.eye(3), lx.symmetric_tag)
    total = lambda b: jnp.sum(lx.linear_solve(matrix, b, cx.AbsoluteKrylov()).value)
    with pytest.raises(ValueError, match="not a linear function of the vector"):
        jax.grad(total)(jnp.arange(3.0))


# -- ten steps -----------------------------------------------------------------------------------


def batch_at(p, t):
    return p.batch if t % 3 else p.other_batch


def key_at(t):
    return jax.random.fold_in(jax.random.key(7), t)


def dense_views(p, curvature="gauss_newton", batch=batch_at):
    """Value, gradient and curvature as functions of a vector and the number of a step."""
    _, unravel = ravel_pytree(p.params)
    matrix = {"gauss_newton": dense_gauss_newton, "hessian": dense_hessian}[curvature]
    value = eqx.filter_jit(lambda v, batch: p.objective.value(unravel(v), batch))
    return (
        lambda v, t: float(value(jnp.asarray(v), batch(p, t))),
        lambda v, t: flat(gradient_of(p.objective, unravel(jnp.asarray(v)), batch(p, t))),
        lambda v, t: np.asarray(matrix(p.objective, unravel(jnp.asarray(v)), batch(p, t))),
    )


def test_matrices(sketch, p, steps=STEPS):
    return [columns(sketch.test_matrix(key_at(t), p.params)) for t in range(steps)]


test_matrices.__test__ = False


def descend(method, p, rate=1.0, steps=STEPS, **batches):
    """Parameters after some fused steps, the last state of the method, and all metrics."""
    step = cx.make_step(optax.chain(method, optax.scale(-rate)), method)
    params, state, metrics = p.params, step.init(p.params), []
    for t in range(steps):
        extra = {name: at(p, t) for name, at in batches.items()}
        params, state, info = step(params, state, batch_at(p, t), key_at(t), **extra)
        metrics.append(info)
    return params, state.optimizer[0], metrics


@pytest.mark.parametrize("size", [4, 12])
def test_saddle_free_newton_is_that_of_the_paper(size):
    p = problem()
    damping = cx.LevenbergMarquardt(0.5)
    solver = cx.AbsoluteKrylov(size)
    method = cx.methods.saddle_free_newton(p.objective, damping=damping, solver=solver)
    params, state, metrics = descend(method, p)
    wanted, dampings = reference.saddle_free_steps(
        *dense_views(p, "hessian"), flat(p.params), STEPS, 0.5, size
    )
    close(flat(params), wanted)
    assert float(state.level.damping) == pytest.approx(dampings[-1], rel=1e-6)
    assert len(set(dampings)) > 3
    assert [int(info.solver_steps) for info in metrics] == [size] * STEPS


def test_saddle_free_newton_leaves_a_saddle():
    """Newton's method goes to the saddle of x² − y² + y⁴/2 from nearby, this one away from it."""

    def predict(params, x):
        return (params["x"] ** 2 - params["y"] ** 2 + 0.5 * params["y"] ** 4)[None]

    loss = cx.CustomLoss(lambda z, y: z[0], convex=False)
    objective = cx.Objective(predict, loss)
    params = {"x": jnp.asarray(0.5), "y": jnp.asarray(1e-3)}
    batch = (jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    for name, at in (("saddle_free_newton", 1.0), ("newton_direct", 0.0)):
        options = {"solver": cx.Eigh("as_is")} if name == "newton_direct" else {}
        method = getattr(cx.methods, name)(objective, damping=1e-3, **options)
        step = cx.make_step(optax.chain(method, optax.scale(-1.0)), method)
        here, state = params, step.init(params)
        for _ in range(25):
            here, state, _ = step(here, state, batch)
        close(here["y"], at, atol=1e-2)


def test_nystrom_newton_is_that_of_the_paper(every=4):
    p = problem()
    method = cx.methods.nystrom_newton(
        p.objective,
        rank=RANK,
        refresh_every=every,
        damping=cx.LevenbergMarquardt(0.3),
        solver=cx.CG(rtol=0.0, max_steps=3),
    )
    sketch = cx.NystromSketch(cx.GaussNewtonCurvature(), RANK)
    params, state, _ = descend(method, p)
    wanted, dampings = reference.nystrom_newton_steps(
        *dense_views(p), flat(p.params), STEPS, 0.3, test_matrices(sketch, p), every, 3
    )
    close(flat(params), wanted)
    assert float(state.level.damping) == pytest.approx(dampings[-1], rel=1e-6)
    assert len(set(dampings)) > 3
    assert int(state.preconditioner.updates) == -(-STEPS // every)


def sketched_on_the_other(p, t):
    return p.other_batch if t % 3 else p.batch


@pytest.mark.parametrize(
    ("curvature", "automatic", "apart"),
    [
        ("gauss_newton", False, False),
        ("gauss_newton", True, False),
        ("gauss_newton", True, True),
        ("hessian", True, False),
        ("hessian", False, True),
    ],
)
def test_sketchy_sgd_is_that_of_the_paper(curvature, automatic, apart):
    p = convex_problem() if curvature == "hessian" else problem()
    quantities = {"gauss_newton": cx.GaussNewtonCurvature(), "hessian": cx.HessianCurvature()}
    method = cx.methods.sketchy_sgd(
        p.objective,
        rank=RANK,
        refresh_every=3,
        damping=0.1,
        automatic_rate=automatic,
        curvature=quantities[curvature],
    )
    rate = 0.5 if automatic else 0.05
    batches = {"curvature_batch": sketched_on_the_other} if apart else {}
    params, state, _ = descend(method, p, rate, **batches)
    sketch = cx.NystromSketch(quantities[curvature], RANK)
    scaling = cx.InverseSharpness(sketch)
    probes = [flat(scaling.start(key_at(t), p.params)) for t in range(STEPS)]
    _, gradient, matrix = dense_views(p, curvature)
    _, _, other = dense_views(p, curvature, sketched_on_the_other)
    wanted, rates = reference.sketchy_sgd_steps(
        gradient,
        matrix,
        flat(p.params),
        STEPS,
        float(np.float32(0.1)),
        rate,
        test_matrices(sketch, p),
        3,
        sketched=other if apart else None,
        probes=probes if automatic else None,
        powers=10,
    )
    close(flat(params), wanted)
    if automatic:
        close(state.solution[1].sharpness, rate / rates[-1])
        assert len(set(rates)) == 4


def convex_problem():
    """Softmax regression: the Hessian is positive semidefinite, and of low rank."""
    rng = np.random.default_rng(0)
    batches = [
        (jnp.asarray(rng.standard_normal((size, 4))), jnp.asarray(rng.integers(0, 3, size)))
        for size in (7, 5)
    ]
    params = {"w": jnp.asarray(0.5 * rng.standard_normal((3, 4))), "b": jnp.zeros(3)}
    linear = lambda params, x: params["w"] @ x + params["b"]
    return type(problem())(cx.Objective(linear, cx.SoftmaxCrossEntropy()), params, *batches)


# -- what the parts are for ----------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["smallest", "zero"])
def test_the_preconditioner_saves_steps_of_cg(tail):
    """Of 100 eigenvalues 0.8ⁱ a sketch of rank 40 takes those that are above λ, nearly, to 1."""
    damping = jnp.asarray(1e-4)
    operator = over_tree(symmetric(100, definite=True, decay=0.8))
    preconditioner = cx.NystromPreconditioner(tail=tail)
    seen = sketched(operator, KEY, 40)
    one = jnp.ones((), jnp.int32)
    state = cx.NystromState(seen.basis, seen.values, one, one)
    tagged = lx.TaggedLinearOperator(operator, lx.positive_semidefinite_tag)
    b = normal_like(operator.like)
    steps = []
    for options in ({}, {"preconditioner": preconditioner.operator(state, damping)}):
        solver = cx.CG(rtol=1e-8, max_steps=500)
        _, result, stats = solve(solver, cx.Damped(tagged, damping), b, options)
        assert result == lx.RESULTS.successful
        steps.append(int(stats["num_steps"]))
    plain, preconditioned = steps
    assert preconditioned * 4 < plain, steps


def test_sharpness_of_a_full_sketch_is_below_one():
    operator = over_tree(symmetric(20, definite=True, decay=0.7))
    seen = sketched(operator, KEY, 20)
    start = normal_like(operator.like)
    for rho in (1e-3, 1.0):
        found = float(sharpness(operator, seen.inverse(rho), start, 60))
        assert 0.99 / (1 + rho) < found < 1 / (1 + rho) + 1e-12


def test_a_wrong_learning_rate_is_made_right():
    """With a sketch of rank 1 of an ill-conditioned problem, ρ far below its second eigenvalue."""
    p = quadratic_problem(scales=(3.0, 1.0, 0.3, 0.1))
    values = {}
    for automatic in (True, False):
        method = cx.methods.sketchy_sgd(
            p.objective, rank=1, damping=1e-3, automatic_rate=automatic, refresh_every=5
        )
        step = cx.make_step(optax.chain(method, optax.scale(-0.5)), method)
        params, state = p.params, step.init(p.params)
        for t in range(20):
            params, state, _ = step(params, state, p.batch, key_at(t))
        values[automatic] = float(p.objective.value(params, p.batch))
    start = float(p.objective.value(p.params, p.batch))
    assert values[True] < 0.5 * start
    assert not values[False] < start


@pytest.mark.parametrize(
    ("budget", "rank"), [("1.0x adam", 1), ("1.4x Adam", 1), ("5.5 x adam", 10), ("2.1x adam", 3)]
)
def test_rank_of_a_state_budget(budget, rank):
    assert sketch_rank(7, budget) == rank
    p = problem()
    for make in (cx.methods.nystrom_newton, cx.methods.sketchy_sgd):
        state = make(p.objective, rank=7, state_budget=budget).init(p.params)
        assert state.preconditioner.basis["w1"].shape == (rank, 5, 4)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.preconditioner.basis))
    size = sum(leaf.size for leaf in jax.tree.leaves(p.params))
    assert numbers + size <= float(budget.split("x")[0]) * 2 * size < numbers + 2 * size


def test_mistakes_in_methods_are_named():
    p = problem()
    for make in (cx.methods.nystrom_newton, cx.methods.sketchy_sgd):
        with pytest.raises(ValueError, match=r"state_budget: got '0\.9x adam', wanted at least"):
            make(p.objective, state_budget="0.9x adam")
        with pytest.raises(ValueError, match="rank: got 0, wanted at least 1"):
            make(p.objective, rank=0)
        with pytest.raises(ValueError, match=r"wanted every ≥ 1"):
            make(p.objective, refresh_every=0)
        method = make(p.objective)
        state = method.init(p.params)
        with pytest.raises(ValueError, match="key: got None, but the Nyström sketch of rank 10"):
            method.update(p.gradient, state, p.params, batch=p.batch)
    with pytest.raises(ValueError, match="steps: got 0, wanted at least 1"):
        cx.InverseSharpness(steps=0)
    # Where the direction was not made by an operator.
    scaling = cx.InverseSharpness()
    plan = cx.Plan([cx.Requirement(scaling.refresh, "test")])

    def apply():
        seen = plan.observe(p.objective, p.params, p.batch, KEY)
        context = Context(p.gradient, p.params, seen, jnp.zeros(()), ())
        return scaling.apply(scaling.init(p.params), p.gradient, context)

    with pytest.raises(ValueError, match="InverseSharpness where no preconditioner with a key is"):
        jax.eval_shape(apply)


# -- what could go wrong with a state ------------------------------------------------------------

METHODS = {
    "nystrom_newton": {"rank": 3, "refresh_every": 3, "warm_start": 0.9},
    "sketchy_sgd": {"rank": 3, "refresh_every": 3, "momentum": optax.ema(0.9)},
    "saddle_free_newton": {"solver": cx.AbsoluteKrylov(5)},
}


def make(name, objective, **options):
    return getattr(cx.methods, name)(objective, **METHODS[name] | options)


def test_both_executions_of_the_cadence_agree():
    """One executable for each phase, and `lax.cond` in a jit of the user's."""
    p = problem()
    method = make("sketchy_sgd", p.objective)
    step = cx.make_step(optax.chain(method, optax.scale(-0.3)), method)
    one = other = (p.params, step.init(p.params))
    pure = jax.jit(step.pure)
    for t in range(5):
        one = step(*one, batch_at(p, t), key_at(t))[:2]
        other = pure(*other, batch_at(p, t), key_at(t))[:2]
        assert avals(one) == avals(other)
    assert int(one[1].optimizer[0].preconditioner.updates) == 2
    jax.tree.map(lambda a, b: close(a, b, 1e-6), one, other)


class Broken(cx.plan.AbstractCurvatureQuantity):
    """A curvature whose products overflow."""

    @property
    def label(self):
        return "broken"

    def compute(self, scope):
        at = scope.curvature
        good = cx.GaussNewton(at.objective, at.params, at.batch, at.key, at.linearisation)
        return cx.Scaled(good, jnp.inf)


def test_a_sketch_that_fails_leaves_the_old_one():
    p = problem()
    for curvature, updates in ((cx.GaussNewtonCurvature(), 1), (Broken(), 0)):
        sketch = cx.NystromSketch(curvature, 3)
        preconditioner = cx.NystromPreconditioner(sketch, 2, "zero")
        method = cx.preconditioned(p.objective, preconditioner, damping=0.1)
        state = method.init(p.params)
        run = jax.jit(lambda *a, method=method: method.update(*a, batch=p.batch, key=KEY))
        updated, state = run(p.gradient, state, p.params)
        assert int(state.preconditioner.updates) == updates
        assert int(state.preconditioner.failures) == 1 - updates
        assert int(state.skipped) == 0
        if not updates:  # the identity, before there was a sketch
            close(flat(updated), flat(p.gradient))


@pytest.mark.parametrize("name", METHODS)
def test_partition(name):
    """Equal to the method on what it sees, where the sketch or the subspace is whole."""
    p = problem()
    options = {
        "saddle_free_newton": {"solver": cx.AbsoluteKrylov(35)},
        "nystrom_newton": {"rank": 100, "solver": cx.CG(rtol=1e-13, max_steps=50)},
        "sketchy_sgd": {"rank": 100, "momentum": None, "automatic_rate": False},
    }[name]
    method = make(name, p.objective, damping=0.5, **options)
    mask = {"w1": True, "b1": False, "w2": True}
    labels = {k: "second" if v else "first" for k, v in mask.items()}
    optimizer = optax.partition(
        {"second": optax.chain(method, optax.scale(-1.0)), "first": optax.sgd(1.0)}, labels
    )
    step = cx.make_step(optimizer, method)
    state = step.init(p.params)
    moved, after, _ = step(p.params, state, p.batch, KEY)
    assert avals(after) == avals(state)

    part = {k: v for k, v in p.params.items() if mask[k]}
    whole = lambda part: {**p.params, **part}
    objective = cx.Objective(lambda part, x: predict(whole(part), x), p.objective.loss)
    gradient = flat({k: p.gradient[k] for k in part})
    oracle = dense_hessian if name == "saddle_free_newton" else dense_gauss_newton
    matrix = np.asarray(oracle(objective, part, p.batch))
    if name == "saddle_free_newton":
        direction = absolute_inverse(matrix, 0.5) @ gradient
    else:
        direction = np.linalg.solve(matrix + 0.5 * np.eye(len(matrix)), gradient)
    close(flat({k: p.params[k] - moved[k] for k in part}), direction)
    close(moved["b1"], p.params["b1"] - p.gradient["b1"])


@pytest.mark.parametrize("name", ["nystrom_newton", "sketchy_sgd"])
def test_a_rank_above_the_number_of_parameters(name):
    p = convex_problem()
    method = make(name, p.objective, rank=1000)
    step = cx.make_step(optax.chain(method, optax.scale(-0.5)), method)
    params, state = p.params, step.init(p.params)
    assert state.optimizer[0].preconditioner.values.shape == (15,)
    params, state, _ = step(params, state, p.batch, KEY)
    assert int(state.optimizer[0].preconditioner.updates) == 1


def test_description_has_the_sketch_and_the_memory_of_the_basis():
    p = problem()
    text = make("nystrom_newton", p.objective).describe(p.params, p.batch)
    assert re.search(r"Nyström sketch of rank 3 of the Gauss-Newton operator +precond\w+ +3 ", text)
    row = next(line for line in text.splitlines() if "['w1']" in line)
    assert str((3 + 1) * 20 * 8) in row  # and one for the warm start


# -- convolutions and meshes ---------------------------------------------------------------------


def test_convolutions():
    p = make_problem("conv", "softmax")
    operator = cx.GaussNewton(p.objective, p.model, p.batch)
    seen = sketched(operator, KEY, 100, at_once=4)
    close(dense(seen), p.dense()["gauss_newton"])


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np, optax
    jax.config.update("jax_enable_x64", True)
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import curvax as cx
    from curvax import _basis
    from tests.problems import avals, predict
    from tests.test_subspace_methods import make, solve

    meshes = {
        "explicit": jax.make_mesh((4,), ("data",)),
        "auto": jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
    }
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.6 * rng.standard_normal(shape))
    plain = {"w1": draw(8, 4), "b1": draw(8), "w2": draw(4, 8)}
    specs = {"w1": P("data", None), "b1": P(), "w2": P(None, None)}
    batch = (draw(8, 4), jnp.asarray(rng.integers(0, 4, 8)))

    def predict_with(mesh):
        # On a mesh of explicit axes a product over a sharded axis must say what it makes.
        def predict(params, x):
            w1 = params["w1"]
            if mesh is not None and AxisType.Explicit in mesh.axis_types:
                w1 = jax.sharding.reshard(w1, P(None, None))
            return params["w2"] @ jnp.tanh(w1 @ x + params["b1"])
        return predict

    def run(name, mesh, params, batch):
        objective = cx.Objective(predict_with(mesh), cx.SoftmaxCrossEntropy())
        method = make(name, objective, refresh_every=1)  # one executable
        step = cx.make_step(optax.chain(method, optax.scale(-0.3)), method)
        state = jax.jit(step.init)(params) if mesh is None else step.init(params)
        before = avals(state)
        for i in range(4):
            params, state, _ = step(params, state, batch, jax.random.key(i))
            assert avals(state) == before, (name, i)
        assert int(state.skipped) == 0
        return params

    for name in ("sketchy_sgd",):
        wanted = run(name, None, plain, batch)
        for kind, mesh in meshes.items():
            with jax.set_mesh(mesh):
                put = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
                params = {k: put(v, specs[k]) for k, v in plain.items()}
                split = (put(batch[0], P()), put(batch[1], P()))
                moved = run(name, mesh, params, split)
                for k in plain if kind == "explicit" else ():
                    assert moved[k].sharding.is_equivalent_to(params[k].sharding, plain[k].ndim)
            for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted)):
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-9)
            print(name, kind)

    # The Krylov solver keeps the shardings of its vector.
    entries, b = draw(16, 4), draw(16, 4)
    wanted = np.asarray(b) / (np.abs(np.asarray(entries)) + 0.1)
    for kind, mesh in meshes.items():
        with jax.set_mesh(mesh):
            put = lambda x: {"a": jax.device_put(x, NamedSharding(mesh, P("data")))}
            operator = cx.Damped(cx.Diagonal(put(entries), nonnegative=False), 0.1)
            solution, _, _ = solve(cx.AbsoluteKrylov(64), operator, put(b))
            if kind == "explicit":
                assert avals(solution) == avals(put(b))
            np.testing.assert_allclose(np.asarray(solution["a"]), wanted, rtol=1e-8)

    # Inner products of sharded columns are summed up where they are, and so are combinations.
    for mesh in meshes.values():
        with jax.set_mesh(mesh):
            sharding = NamedSharding(mesh, P(None, "data"))
            basis = {"a": jax.device_put(jnp.ones((3, 8, 16)), sharding)}
            program = jax.jit(_basis.orthonormal).lower(basis).compile().as_text()
            assert "all-reduce" in program and "all-gather" not in program, program
"""


def test_sharded_parameters():
    assert printed(SHARDED) == ["sketchy_sgd", "explicit", "sketchy_sgd", "auto"]
