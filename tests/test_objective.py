"""The objective: values, gradients, layouts of batches, and what it says of bad input."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import curvax as cx
from curvax import _tree

from . import strategies
from .strategies import make_problem, predict_dict, problems

KEY = jax.random.key(5)


def flat(tree):
    return ravel_pytree(tree)[0]


def close(a, b, rtol=1e-9, atol=1e-11):
    # A GPU's convolutions reorder sums and take fast transforms, in float64 too.
    rtol, atol = (rtol, atol) if jax.default_backend() == "cpu" else (1e-6, 1e-8)
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rtol, atol=atol)


def raises(text):
    return pytest.raises(ValueError, match=re.escape(text))


# -- values and gradients --------------------------------------------------------------------


@settings(max_examples=12)
@given(problems())
def test_value_and_gradient(recipe):
    problem = recipe.build()
    params, objective = problem.objective.bind(problem.model)
    dense = problem.dense()

    @jax.jit
    def everything(params, batch):
        value, gradient = jax.value_and_grad(objective.value)(params, batch)
        at = objective.linearise(params, batch)
        return value, gradient, objective.value_of(at, batch), objective.gradient_of(at)

    value, gradient, value_of, gradient_of = everything(params, problem.batch)
    close(value, dense["value"])
    close(value_of, dense["value"])
    # Masked examples hold NaN: by either way none reaches the gradient
    close(flat(gradient), dense["gradient"])
    close(flat(gradient_of), dense["gradient"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction):
    problem = make_problem("sequence", "softmax", reduction=reduction)
    x, y = problem.batch
    events = 8.0 if reduction == "mean" else 1.0
    params = problem.params
    values = problem.objective.loss.value(problem.objective.outputs(params, x), y)
    assert values.shape == (4, 2)
    close(problem.objective.value(params, problem.batch), jnp.sum(values) / events)
    weights = jnp.array([1.0, 0.0, 2.0, 0.5])
    total = 7.0 if reduction == "mean" else 1.0
    wanted = jnp.sum(weights[:, None] * values) / total
    close(problem.objective.value(params, (x, y, weights)), wanted)
    close(problem.objective.value(params, (x, y, jnp.repeat(weights[:, None], 2, 1))), wanted)
    mask = jnp.array([[True, True], [False, True], [False, False], [True, False]])
    total = 4.0 if reduction == "mean" else 1.0
    close(problem.objective.value(params, (x, y, mask)), jnp.sum(values[mask]) / total)


def test_all_masked_leaves_the_l2_term():
    problem = make_problem("dict", l2=0.4)
    x, y = problem.batch
    batch = (x * jnp.nan, y - 100, jnp.zeros(4))
    value, gradient = jax.jit(jax.value_and_grad(problem.objective.value))(problem.params, batch)
    close(value, 0.2 * jnp.sum(flat(problem.params) ** 2))
    close(flat(gradient), 0.4 * flat(problem.params))


def test_masked_nan_inside_a_norm():
    # A zero in place of the masked input is no safe point of this model; a NaN must still not
    # reach the other examples' derivatives where the input itself is finite.
    problem = make_problem("conv", "softmax", weights="example")
    gradient = jax.grad(lambda p: problem.objective.bind(problem.model)[1].value(p, problem.batch))
    close(flat(jax.jit(gradient)(problem.params)), problem.dense()["gradient"])


def test_unweighted_nan_is_not_hidden():
    problem = make_problem("dict", "squared")
    x, y = problem.batch
    assert jnp.isnan(problem.objective.value(problem.params, (x.at[0].set(jnp.nan), y)))
    weighted = (x.at[0].set(jnp.nan), y, jnp.ones(4))
    assert jnp.isnan(problem.objective.value(problem.params, weighted))


@settings(max_examples=6)
@given(
    st.sets(st.integers(1, 4), max_size=2),
    problems(models=("dict", "sequence"), losses=("softmax", "squared_whole"), sizes=(5,)),
)
def test_value_over_uneven_micro_batches(cuts, recipe):
    problem = recipe.build()
    parts = strategies.micro_batches(problem.batch, cuts)
    params, objective = problem.params, problem.objective.without_l2()

    @jax.jit
    def over_parts(params, parts):
        total, weight = 0.0, 0.0
        for part in parts:
            x, y = objective.example(part)[:2]
            values = objective.loss.value(objective.outputs(params, x), y)
            share = objective.total_weight(part, values) if objective.reduction == "mean" else 1.0
            total, weight = total + share * objective.value(params, part), weight + share
        return total / weight if objective.reduction == "mean" else total

    total = over_parts(params, parts)
    close(total + 0.5 * problem.objective.l2 * jnp.sum(flat(params) ** 2), problem.dense()["value"])


def test_low_precision_parameters():
    problem = make_problem("dict", "softmax", l2=0.1)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), problem.model)
    x, y = problem.batch
    batch = (x.astype(jnp.bfloat16), y)
    value, gradient = jax.jit(jax.value_and_grad(problem.objective.value))(narrow, batch)
    assert value.dtype == jnp.float32
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(gradient))
    close(value, problem.dense()["value"], rtol=2e-2)
    linearised = lambda params: problem.objective.gradient_of(
        problem.objective.linearise(params, batch)
    )
    gradient = jax.eval_shape(linearised, narrow)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(gradient))


def test_pull_back_examples():
    problem = make_problem("dict", "squared")
    x, _ = problem.batch
    cotangents = jax.random.normal(KEY, (2, 4, 3))
    rows = problem.objective.pull_back_examples(problem.params, x, cotangents)
    seen = jnp.concatenate([leaf.reshape(4, 2, -1) for leaf in jax.tree.leaves(rows)], axis=-1)
    jacobian = problem.dense()["jacobian"].reshape(4, 3, -1)
    close(seen, jnp.einsum("cbo,bon->bcn", cotangents, jacobian))


# -- parameters ------------------------------------------------------------------------------


@given(strategies.parameters())
def test_bind_takes_every_inexact_leaf(tree):
    objective = cx.Objective(predict_dict, cx.SquaredError())
    model = {"trained": tree, "counter": jnp.arange(3), "name": "model", "function": jnp.tanh}
    params, bound = objective.bind(model)
    assert _tree.size(params) == _tree.size(tree)
    whole = bound.model(params)
    assert jax.tree.structure(whole) == jax.tree.structure(model)
    assert whole["name"] == "model" and whole["function"] is jnp.tanh
    assert (whole["counter"] == jnp.arange(3)).all()
    again, same = bound.bind(params)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert hash(jax.tree.structure(same)) == hash(jax.tree.structure(bound))


def test_frozen_leaves():
    problem = make_problem("mlp", "softmax")
    model = problem.model
    trained = eqx.tree_at(
        lambda tree: tree.layers[1],
        jax.tree.map(lambda _: False, model),
        jax.tree.map(eqx.is_inexact_array, model.layers[1]),
    )
    params, static = eqx.partition(model, trained)
    objective = cx.Objective(problem.objective.predict, problem.objective.loss, static=static)
    keep = jnp.concatenate(
        [jnp.zeros(flat(problem.params.layers[0]).size), jnp.ones(flat(params).size)]
    ).astype(bool)
    dense = problem.dense()
    close(objective.value(params, problem.batch), dense["value"])
    close(flat(jax.grad(objective.value)(params, problem.batch)), dense["gradient"][keep])
    operator = cx.GaussNewton(objective, params, problem.batch)
    close(operator.as_matrix(), dense["gauss_newton"][keep][:, keep])
    # Without `static` the message says what is missing.
    bare = cx.Objective(problem.objective.predict, problem.objective.loss)
    with raises("Objective(..., static="):
        bare.value(params, problem.batch)


def test_restrict_matches_optax_masked():
    problem = make_problem("dict", "softmax", weights="example", l2=0.1)
    seen = []

    def init(params):
        seen.append(params)
        return optax.EmptyState()

    inner = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    mask = {"hidden": False, "readout": True, "shift": True}
    optax.masked(inner, mask).init(problem.params)
    kept, objective = problem.objective.restrict(problem.params, seen[0])
    assert isinstance(kept["hidden"], optax.MaskedNode)
    whole = problem.objective.value(problem.params, problem.batch)
    l2_of_rest = 0.05 * jnp.sum(flat(problem.params["hidden"]) ** 2)
    close(objective.value(kept, problem.batch) + l2_of_rest, whole)
    gradient = jax.grad(objective.value)(kept, problem.batch)
    full = jax.grad(problem.objective.value)(problem.params, problem.batch)
    close(flat(gradient), flat({k: full[k] for k in ("readout", "shift")}))


# -- stochastic models -----------------------------------------------------------------------


class Dropped(eqx.Module):
    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    second: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.first = eqx.nn.Linear(2, 8, key=one)
        self.dropout = eqx.nn.Dropout(0.5)
        self.second = eqx.nn.Linear(8, 3, key=two)

    def __call__(self, x, key):
        return self.second(self.dropout(jnp.tanh(self.first(x)), key=key))


def predict_dropped(model, x, key):
    return model(x, key)


def test_stochastic():
    _, _, (x, y), _, _ = make_problem("dict", "softmax")
    model = Dropped(KEY)
    objective = cx.Objective(predict_dropped, cx.SoftmaxCrossEntropy(), stochastic=True)
    params, objective = objective.bind(model)
    keys = list(jax.random.split(KEY, 4))
    vector = jax.tree.map(jnp.ones_like, params)

    @eqx.filter_jit
    def written_out(model):
        outputs = jnp.stack([model(one, key) for one, key in zip(x, keys, strict=True)])
        point, unravel = ravel_pytree(params)
        hessian = jax.hessian(lambda v: objective.value(unravel(v), (x, y), KEY))(point)
        return outputs, jnp.mean(objective.loss.value(outputs, y)), hessian

    @jax.jit
    def everything(params):
        # One key, one network: products, rows and gradient agree on it
        operator = cx.GaussNewton(objective, params, (x, y), KEY)
        hessian = cx.Hessian(objective, params, (x, y), KEY)
        views = operator.as_matrix(), flat(operator.diagonal()), flat(operator.mv(vector))
        values = [objective.value(params, (x, y), key) for key in (KEY, jax.random.key(6))]
        return objective.outputs(params, x, KEY), values, views, hessian.as_matrix()

    outputs, wanted, dense = written_out(model)
    seen, (value, other), (matrix, diagonal, product), hessian = everything(params)
    close(seen, outputs)
    close(value, wanted)
    assert abs(other - wanted) > 1e-3
    close(diagonal, np.diagonal(matrix))
    close(product, np.sum(matrix, axis=1))
    close(hessian, dense)
    for evaluate in (
        lambda: objective.value(params, (x, y)),
        lambda: objective.linearise(params, (x, y)),
        lambda: cx.Hessian(objective, params, (x, y)).mv(vector),
        lambda: cx.GaussNewton(objective, params, (x, y)).mv(vector),
        lambda: cx.Jacobian(objective, params, (x, y)).mv(vector),
    ):
        with raises("key: got None, but this objective is stochastic"):
            evaluate()


# -- layouts of a batch ----------------------------------------------------------------------


def test_layouts():
    problem = make_problem("dict", "softmax")
    x, y = problem.batch
    weights = jnp.array([1.0, 2.0, 0.0, 1.0])
    objective, params = problem.objective, problem.params
    plain = objective.value(params, (x, y))
    close(objective.value(params, [x, y]), plain)
    close(objective.value(params, {"x": x, "y": y}), plain)
    close(objective.value(params, {"x": x, "y": y, "other": 1}), plain)
    close(objective.value(params, (np.asarray(x), np.asarray(y))), plain)
    weighted = objective.value(params, (x, y, weights))
    close(objective.value(params, {"x": x, "y": y, "weight": weights}), weighted)
    close(objective.value(params, (x, y, np.asarray(weights))), weighted)
    host = objective.example((np.asarray(x), np.asarray(y), np.asarray(weights)))
    assert all(isinstance(leaf, np.ndarray) for leaf in host)  # nothing went to a device


def predict_pair(params, x):
    return predict_dict(params, x["left"] + x["right"][0])


def split_nested(batch):
    return {"left": batch["a"], "right": (batch["b"],)}, batch["labels"], batch["mask"]


def test_split_takes_any_pytree():
    problem = make_problem("dict", "softmax", weights="example")
    x, y, weights = problem.batch
    objective = cx.Objective(predict_pair, cx.SoftmaxCrossEntropy(), split=split_nested)
    batch = {"a": 0.25 * x, "b": 0.75 * x, "labels": y, "mask": weights, "id": jnp.arange(4)}
    dense = problem.dense()
    close(objective.value(problem.params, batch), dense["value"])
    for kind, name in ((cx.GaussNewton, "gauss_newton"), (cx.Hessian, "hessian")):
        as_matrix = eqx.filter_jit(
            lambda model, kind=kind: kind(objective, model, batch).as_matrix()
        )
        close(as_matrix(problem.model), dense[name])


# -- bad input -------------------------------------------------------------------------------


def bad_batches():
    x, y = make_problem("mlp", "softmax").batch
    nothing = (x[:0], y[:0])
    return {
        "feature size": ((jnp.ones((4, 5)), y), "x: the model could not be applied to one example"),
        "feature size shown": ((jnp.ones((4, 5)), y), "float64[5]"),
        "too few labels": ((x, y[:3]), "targets: got shape (3,), wanted (4,)"),
        "one label": ((x, y[:1]), "targets: got shape (1,), wanted (4,)"),
        "label out of range": ((x, y.at[2].set(3)), "targets: got 3 at index (2,)"),
        "negative label": ((x, y.at[0].set(-1)), "targets: got -1 at index (0,)"),
        "real labels": ((x, y.astype(float)), "targets: got shape (4,), wanted (4, 3)"),
        "no example": (nothing, "batch: got 0 examples, wanted at least 1"),
        "weights of another length": ((x, y, jnp.ones(3)), "weight: got shape (3,), wanted (4,)"),
        "weights of another rank": ((x, y, jnp.ones((4, 3))), "weight: got shape (4, 3)"),
        "four parts": ((x, y, y, y), "batch: got a tuple with leaves"),
        "an array": (x, "wanted (x, target), (x, target, weight), or a mapping"),
        "other keys": ({"inputs": x, "y": y}, "['inputs']: float64[4, 2]"),
        "lengths": (({"a": x, "b": x[:2]}, y), "got lengths {\"['a']\": 4, \"['b']\": 2}"),
        "a scalar": (({"a": x, "b": jnp.ones(())}, y), "\"['b']\": None"),
        "no x": (((), y), "got lengths of no leaf"),
    }


@pytest.mark.parametrize("case", bad_batches())
def test_bad_batches(case):
    problem = make_problem("mlp", "softmax")
    params, objective = problem.objective.bind(problem.model)
    batch, message = bad_batches()[case]
    for evaluate in (objective.value, objective.linearise, objective.check):
        with raises(message):
            evaluate(params, batch)
    vector = jax.tree.map(jnp.ones_like, params)
    for operator in (cx.GaussNewton, cx.Hessian):
        with raises(message):
            operator(objective, params, batch).mv(vector)
    if "label" not in case or "labels" in case:  # shapes are checked under jit too
        with raises(message):
            jax.jit(objective.value)(params, batch)


def test_label_out_of_range_under_jit_is_nan():
    problem = make_problem("mlp", "softmax")
    params, objective = problem.objective.bind(problem.model)
    x, y = problem.batch
    assert jnp.isnan(jax.jit(objective.value)(params, (x, y.at[2].set(3))))


def test_bad_models(unchecked):
    x, y = make_problem("dict", "softmax").batch
    integer = cx.Objective(
        lambda p, x: jnp.ones(3, int) + 0 * p["w"].astype(int), cx.SquaredError()
    )
    with raises("outputs: got dtype int64, wanted a floating dtype"):
        integer.value({"w": jnp.ones(())}, (x, y))
    pair = cx.Objective(lambda p, x: (p["w"] * x, x), cx.SquaredError())
    with raises("outputs: got a tuple from predict, wanted one array"):
        pair.value({"w": jnp.ones(())}, (x, x))
    objective = cx.Objective(predict_dict, cx.SoftmaxCrossEntropy())
    for model in ({"w": jnp.arange(3)}, {"w": jnp.zeros((0,))}, {}):
        with raises("model: got no trainable leaf"):
            objective.bind(model)
    with raises("w']: int64[3]"):
        cx.GaussNewton(objective, {"w": jnp.arange(3)}, (x, y))


def test_bad_options(unchecked):
    with raises("reduction: got 'average', wanted 'mean' or 'sum'"):
        cx.Objective(predict_dict, cx.SquaredError(), reduction="average")


@pytest.mark.parametrize("small", [0, 6, 100])
def test_sums_over_leaves_that_are_stacked(small, monkeypatch):
    """Small leaves of one type are summed over together, which changes no sum."""
    monkeypatch.setattr(_tree, "_SMALL", small)
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (6,), (2, 3), (), (6,), (2, 4), (2, 3)]
    a, b = ([jnp.asarray(rng.standard_normal(shape)) for shape in shapes] for _ in range(2))
    a[0], b[2] = a[0].astype(jnp.float32), b[2].astype(jnp.float32)
    groups = _tree.alike(a, [leaf.dtype for leaf in b])
    together = {0: [[i] for i in range(7)], 6: [[0], [1, 4], [2], [3], [5], [6]]}
    assert groups == together.get(small, together[6])
    assert _tree.alike(a) == (
        [[i] for i in range(7)] if not small else [[0], [1, 4], [2, 6], [3], [5]]
    )
    wanted = sum(
        float(jnp.sum(x.astype(float) * y.astype(float))) for x, y in zip(a, b, strict=True)
    )
    np.testing.assert_allclose(_tree.dot(a, b), wanted, rtol=1e-12)
    assert _tree.all_finite(a)
    for i in range(7):
        bad = [*a[:i], a[i] * jnp.nan, *a[i + 1 :]]
        assert not _tree.all_finite(bad)
