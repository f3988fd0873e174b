"""Estimates of diagonals and traces: unbiased within their own standard errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import traceax
from jax.flatten_util import ravel_pytree

import curvax as cx

from .strategies import make_problem

KEY = jax.random.key(11)


def flat(tree):
    return ravel_pytree(tree)[0]


def assert_unbiased(draws, wanted):
    """The mean of independent draws is within five standard errors of what is wanted."""
    standard_error = jnp.std(draws, axis=0) / np.sqrt(len(draws))
    assert jnp.all(jnp.abs(jnp.mean(draws, axis=0) - wanted) < 5 * standard_error + 1e-10)
    assert jnp.any(standard_error > 0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("model", "loss", "weights", "l2"),
    [
        ("dict", "softmax", "example", 0.3),
        ("sequence", "sigmoid", "event", 0.0),
        ("mlp", "gaussian", None, 0.0),
        ("mlp", "squared_whole", "example", 0.0),
    ],
)
def test_gauss_newton_bartlett_is_unbiased(model, loss, weights, l2, reduction):
    problem = make_problem(model, loss, weights=weights, l2=l2, reduction=reduction)
    operator = cx.GaussNewton(problem.objective, problem.model, problem.batch)
    linear = operator.linearise()

    @jax.jit
    def draw(keys):
        one = lambda key: cx.gauss_newton_bartlett(linear.objective, linear.linearisation, key)
        return jax.vmap(lambda key: flat(one(key)))(keys)

    draws = draw(jax.random.split(KEY, 5000))
    assert jnp.all(draws >= l2)
    assert_unbiased(draws, jnp.diagonal(problem.dense()["exact"]))
    assert_unbiased(draws, flat(operator.diagonal()))


@pytest.mark.parametrize("make", [cx.Hessian, cx.GaussNewton])
def test_hutchinson(make):
    problem = make_problem("dict", "softmax", weights="example", l2=0.1)
    operator = make(problem.objective, problem.model, problem.batch).linearise()
    matrix = operator.as_matrix()
    keys = jax.random.split(KEY, 2000)
    diagonals = jax.jit(jax.vmap(lambda key: flat(cx.hutchinson_diagonal(operator, key))))(keys)
    assert_unbiased(diagonals, jnp.diagonal(matrix))
    traces = jax.jit(jax.vmap(lambda key: cx.hutchinson_trace(operator, key)))(keys)
    assert_unbiased(traces, jnp.trace(matrix))
    # Several samples are the mean of as many, in the structure of the parameters
    averaged = cx.hutchinson_diagonal(operator, KEY, samples=8)
    assert jax.tree.structure(averaged) == jax.tree.structure(problem.params)
    singles = [flat(cx.hutchinson_diagonal(operator, key)) for key in jax.random.split(KEY, 8)]
    np.testing.assert_allclose(flat(averaged), sum(singles) / 8, rtol=1e-8, atol=1e-12)
    single = [cx.hutchinson_trace(operator, key) for key in jax.random.split(KEY, 8)]
    average = cx.hutchinson_trace(operator, KEY, samples=8)
    np.testing.assert_allclose(average, sum(single) / 8, rtol=1e-8)


def test_hutchinson_is_exact_on_a_diagonal():
    entries = {"a": jnp.arange(3.0), "b": (jnp.ones((2, 2)), jnp.zeros((0,)))}
    operator = cx.Diagonal(entries)
    estimate = cx.hutchinson_diagonal(operator, KEY)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), estimate, entries))
    assert cx.hutchinson_trace(operator, KEY) == 7.0


def test_estimators_take_any_lineax_operator():
    matrix = lx.MatrixLinearOperator(jnp.diag(jnp.arange(4.0)), lx.symmetric_tag)
    np.testing.assert_allclose(cx.hutchinson_diagonal(matrix, KEY, 3), jnp.arange(4.0))
    np.testing.assert_allclose(cx.hutchinson_trace(matrix, KEY, 3), 6.0)


@pytest.mark.parametrize("estimate", [cx.hutchinson_diagonal, cx.hutchinson_trace])
def test_fewer_than_one_sample(estimate):
    with pytest.raises(ValueError, match="samples: got 0, wanted at least 1"):
        estimate(cx.Diagonal(jnp.ones(2)), KEY, samples=0)


def test_flat():
    problem = make_problem("dict", "softmax", l2=0.1)
    operator = cx.GaussNewton(problem.objective, problem.model, problem.batch)
    matrix = problem.dense()["gauss_newton"]
    view = cx.flat(operator)
    size = len(matrix)
    vector = jax.random.normal(KEY, (size,))
    assert (
        view.in_structure() == view.out_structure() == jax.ShapeDtypeStruct((size,), vector.dtype)
    )
    assert lx.is_symmetric(view) and lx.is_positive_semidefinite(view)
    for each in (view, view.T, lx.linearise(view)):
        np.testing.assert_allclose(each.mv(vector), matrix @ vector, atol=1e-10)
    np.testing.assert_allclose(view.as_matrix(), matrix, atol=1e-10)
    np.testing.assert_allclose(view.diagonal(), jnp.diagonal(matrix), atol=1e-10)
    jacobian = cx.flat(cx.Jacobian(problem.objective, problem.model, problem.batch))
    dense = problem.dense()["jacobian"]
    np.testing.assert_allclose(jacobian.mv(vector), dense @ vector, atol=1e-10)
    cotangent = jnp.ones(dense.shape[0])
    np.testing.assert_allclose(jacobian.T.mv(cotangent), dense.T @ cotangent, atol=1e-10)


@pytest.mark.parametrize("estimator", [traceax.HutchinsonEstimator(), traceax.XTraceEstimator()])
def test_traceax_takes_a_flat_operator(estimator):
    problem = make_problem("dict", "softmax", l2=0.1)
    operator = cx.GaussNewton(problem.objective, problem.model, problem.batch).linearise()
    wanted = jnp.trace(operator.as_matrix())

    @eqx.filter_jit
    def estimates(operator, keys):
        one = lambda key: estimator.estimate(key, cx.flat(operator), 12)[0]
        return jax.lax.map(one, keys)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        draws = estimates(operator, jax.random.split(KEY, 100))
    assert_unbiased(draws, wanted)
