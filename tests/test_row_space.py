"""Row-space and dense symmetric solvers against dense solves."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import curvax as cx
from curvax.solvers import row_factor

from .strategies import make_problem, problems

KEY = jax.random.key(3)
CURVATURES = {
    "gauss_newton": cx.GaussNewton,
    "exact": cx.Fisher,
    "empirical": functools.partial(cx.Fisher, kind="empirical"),
    "mc": functools.partial(cx.Fisher, kind="mc", key=KEY, samples=2),
}
INNER = {"cholesky": lx.Cholesky(), "cg": cx.CG(rtol=1e-14, max_steps=200)}


def flat(tree):
    return ravel_pytree(tree)[0]


def close(a, b, rtol=1e-8):
    a, b = np.asarray(a, float), np.asarray(b, float)
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(initial=0.0), 1e-3))


def normal_like(tree, seed=0):
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.random.normal(jax.random.key(seed), vector.shape, vector.dtype))


@eqx.filter_jit
def solve(solver, operator, vector, rows=None):
    options = {} if rows is None else {"rows": rows}
    return solver.compute(solver.init(operator, options), vector, options)[0]


def build(name, problem):
    return CURVATURES[name](problem.objective, problem.model, problem.batch)


def dense_solve(operator, damping, vector):
    matrix = np.asarray(as_matrix(operator))
    return np.linalg.solve(matrix + damping * np.eye(len(matrix)), np.asarray(flat(vector)))


as_matrix = eqx.filter_jit(lambda operator: operator.as_matrix())
linearised = eqx.filter_jit(lambda operator: operator.linearise())
product = eqx.filter_jit(lambda operator, vector: operator.mv(vector))


@eqx.filter_jit
def row_views(operator, vector):
    """U, UᵀU as a matrix and by products, and Uᵀv."""
    factor = row_factor(operator)
    gram = factor.gram()
    assert lx.is_positive_semidefinite(gram)
    structure = gram.in_structure()
    basis = jnp.eye(structure.size).reshape(structure.size, *structure.shape)
    u = jax.vmap(lambda rows: flat(factor.mv(rows)), out_axes=1)(basis)
    products = jax.vmap(lambda rows: gram.mv(rows).reshape(-1), out_axes=1)(basis)
    return u, gram.as_matrix(), products, factor.transpose_mv(vector).reshape(-1)


# -- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize(
    ("model", "loss", "weights"),
    [("conv", "softmax", "example"), ("sequence", "sigmoid", "event")],
)
def test_gram_matrix_is_that_of_the_rows(name, model, loss, weights):
    problem = make_problem(model, loss, weights=weights, l2=0.3)
    operator = build(name, problem)
    vector = normal_like(problem.params)
    u, gram, products, pushed = row_views(operator, vector)
    u = np.asarray(u)
    close(u @ u.T + 0.3 * np.eye(len(u)), as_matrix(operator))
    close(gram, u.T @ u)
    close(products, u.T @ u)
    close(pushed, u.T @ np.asarray(flat(vector)))


@settings(max_examples=5)
@given(problems(losses=("squared", "softmax", "softmax_soft", "sigmoid", "poisson", "gaussian")))
def test_gradient_rows_give_the_gradient_of_the_loss(recipe):
    problem = recipe.build()
    factor = row_factor(linearised(build("gauss_newton", problem)))
    wanted = problem.dense()["gradient"] - problem.objective.l2 * flat(problem.params)
    gradient = eqx.filter_jit(lambda factor: flat(factor.mv(factor.gradient_rows())))
    close(gradient(factor), wanted)


# -- solves ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "weights", "inner"),
    [("dict", "example", "cg"), ("dict", None, "cholesky"), ("sequence", "event", "cholesky")],
)
@pytest.mark.parametrize("name", CURVATURES)
def test_solves(name, inner, model, weights):
    problem = make_problem(model, "softmax", weights=weights, l2=0.05)
    operator = build(name, problem)
    solver = cx.RowSpace(INNER[inner])
    for seed, damping in ((0, 0.1), (1, 1e-3)):
        vector = normal_like(problem.params, seed)
        solution = solve(solver, cx.Damped(operator, damping), vector)
        close(flat(solution), dense_solve(operator, damping, vector), 1e-7)

    @eqx.filter_jit
    def draw(operator):
        factor = row_factor(operator)
        rows = jax.random.normal(KEY, factor.gram().in_structure().shape)
        return rows, factor.mv(rows)

    rows, vector = draw(operator)
    zeros = jax.tree.map(jnp.zeros_like, vector)  # `rows` stands in for the right-hand side
    solution = solve(solver, cx.Damped(operator, 0.1), zeros, rows)
    close(flat(solution), dense_solve(operator, 0.1, vector), 1e-7)


def test_solves_through_lineax_with_gradients():
    problem = make_problem("dict", "squared")
    vector = normal_like(problem.params)

    def total(model, damping, solver):
        operator = cx.GaussNewton(problem.objective, model, problem.batch)
        solution = lx.linear_solve(cx.Damped(operator, damping), vector, solver).value
        return jnp.sum(flat(solution) ** 2)

    seen, wanted = (
        jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)(problem.model, 0.2, solver)
        for solver in (cx.RowSpace(), lx.Cholesky())
    )
    close(seen[0], wanted[0])
    close(flat(seen[1]), flat(wanted[1]))


def test_refinement_wins_back_the_digits_of_float32():
    problem = make_problem("mlp", "squared")
    narrow = lambda tree: jax.tree.map(
        lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, tree
    )
    operator = build("gauss_newton", problem)
    damping = 1e-5 * float(np.linalg.norm(as_matrix(operator), 2))
    single = cx.GaussNewton(problem.objective, narrow(problem.model), narrow(problem.batch))
    vector = normal_like(problem.params)
    # In the row space, where ‖A‖/λ digits cancel
    vector = product(operator, vector)
    wanted = dense_solve(operator, damping, vector)
    errors = []
    for refinements in (0, 1, 2):
        solver = cx.RowSpace(refinements=refinements)
        solution = solve(solver, cx.Damped(single, damping), narrow(vector))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(solution))
        error = np.linalg.norm(np.asarray(flat(solution), float) - wanted) / np.linalg.norm(wanted)
        errors.append(float(error))
    assert errors[1] < 1e-2
    assert errors[1] < errors[0] / 3


def test_restricted_operators_have_rows_too():
    import optax

    problem = make_problem("dict", "softmax", weights="example")
    template = problem.params | {"hidden": optax.MaskedNode()}
    operator = build("gauss_newton", problem).restrict(template)
    vector = normal_like({k: v for k, v in problem.params.items() if k != "hidden"})
    vector = vector | {"hidden": optax.MaskedNode()}
    solution = solve(cx.RowSpace(), cx.Damped(operator, 0.1), vector)
    close(flat(solution), dense_solve(operator, 0.1, vector))


def test_mistakes_are_named():
    problem = make_problem("dict", "softmax")
    gauss_newton = build("gauss_newton", problem)
    hessian = cx.Hessian(problem.objective, problem.model, problem.batch)
    with pytest.raises(ValueError, match=re.escape("got a GaussNewton, wanted Damped")):
        cx.RowSpace().init(gauss_newton, {})
    with pytest.raises(ValueError, match="got a Hessian, which has no row factor"):
        cx.RowSpace().init(cx.Damped(hessian, 0.1), {})
    with pytest.raises(ValueError, match="got a Composed that is not marked symmetric"):
        cx.Eigh().init(gauss_newton @ gauss_newton, {})


# -- eigh ------------------------------------------------------------------------------------


@eqx.filter_jit
def eigh_stats(solver, operator, vector):
    return solver.compute(solver.init(operator, {}), vector, {})[2]


@given(st.integers(0, 1000))
@settings(max_examples=3)
def test_eigh(seed):
    problem = make_problem("dict", "poisson", l2=-0.4, seed=seed)  # indefinite
    operator = cx.Hessian(problem.objective, problem.model, problem.batch)
    matrix = np.asarray(problem.dense()["hessian"])
    values, basis = np.linalg.eigh(matrix)
    assert values[0] < 0
    vector = normal_like(problem.params, seed)
    v = np.asarray(flat(vector))
    plain = solve(cx.Eigh(spectrum="as_is"), operator, vector)
    close(flat(plain), np.linalg.solve(matrix, v), 1e-6)
    floor = 0.1
    magnitudes = np.maximum(np.abs(values), floor * np.max(np.abs(values)))
    absolute = np.asarray(flat(solve(cx.Eigh(floor=floor), operator, vector)))
    close(absolute, basis @ ((basis.T @ v) / magnitudes), 1e-8)
    assert absolute @ v > 0
    for solver in (cx.Eigh(), cx.Eigh(spectrum="as_is")):
        close(eigh_stats(solver, operator, vector)["smallest_eigenvalue"], values[0])


def test_eigh_equals_solve_where_definite():
    problem = make_problem("dict", "softmax", l2=0.5)
    operator = build("gauss_newton", problem)
    vector = normal_like(problem.params)
    for spectrum in ("absolute", "as_is"):
        solution = lx.linear_solve(operator, vector, cx.Eigh(spectrum=spectrum)).value
        close(flat(solution), dense_solve(operator, 0.0, vector))
