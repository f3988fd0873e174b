"""Norms of the gradients of single examples, against those gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.taps.norms import written_out
from tests import oracles, zoo

TOLERANCES = {"bf16_compute": {"rtol": 5e-2}}
# See test_taps.
OLD = jax.__version_info__ < (0, 11)
COMPILER = {"gru": {"xla_cpu_use_fusion_emitters": False}} if OLD else {}
WRITTEN_OUT = {
    "gru": {".cell.weight_ih", ".cell.weight_hh", ".cell.bias", ".cell.bias_n"},
    "tied_embedding": {"['embedding']"},
}


def check(objective, model, batch, rtol=1e-9, compiler=None):
    params, bound = objective.bind(model)
    norms = jax.jit(lambda p, b: cx.gradient_norms(bound, p, b), compiler_options=compiler)(
        params, batch
    )
    reference = jax.jit(
        lambda p, b: oracles.gradient_norms_reference(bound, p, b), compiler_options=compiler
    )
    np.testing.assert_allclose(norms, reference(params, batch), rtol=rtol, atol=1e-12)
    return norms


@pytest.mark.parametrize("name", zoo.ZOO)
def test_models_of_the_zoo(name):
    model, predict, batch, loss = zoo.ZOO[name]()
    objective = cx.Objective(predict, loss)
    check(objective, model, batch, compiler=COMPILER.get(name), **TOLERANCES.get(name, {}))
    found = written_out(objective, model, batch)
    assert set(found) == WRITTEN_OUT.get(name, set()), found


def test_reasons():
    tied, predict, batch, loss = zoo.ZOO["tied_embedding"]()
    reasons = written_out(cx.Objective(predict, loss), tied, batch)
    assert reasons == {"['embedding']": "it is used 2 times, and its gradient is the sum"}
    model, predict, batch, loss = zoo.ZOO["gru"]()
    reasons = written_out(cx.Objective(predict, loss), model, batch)
    assert "a loop uses it in each of its steps" in reasons[".cell.weight_hh"]


def odd(params, x):
    """Uses that are not understood, in slices, and elementwise more than once."""
    h = jnp.tanh((0.5 * params["scaled"]) @ x + params["shift"]) + params["shift"]
    h = jnp.tanh(params["sliced"][:4] @ h) * (params["sliced"][4:] @ h)
    return params["gain"] * h[:3] + params["unused"][0] * 0


def test_leaves_that_are_written_out():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    params = {
        "scaled": draw(5, 4),
        "shift": draw(5),
        "sliced": draw(8, 5),
        "gain": draw(3),
        "unused": draw(1),
        "apart": draw(2),
    }
    objective = cx.Objective(odd, cx.SquaredError(), l2=0.3)
    batch = draw(6, 4), draw(6, 3)
    check(objective, params, batch)
    assert {"['scaled']", "['shift']", "['apart']"} <= set(written_out(objective, params, batch))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_weights(reduction, shape):
    """Of examples or of events; an example of weight zero has none."""
    model, predict, (x, y), loss = zoo.ZOO["transformer"]()
    weights = jnp.asarray(np.random.default_rng(1).uniform(0.5, 2.0, shape)).at[1].set(0.0)
    objective = cx.Objective(predict, loss, reduction=reduction, l2=0.1)
    norms = check(objective, model, (x, y, weights))
    assert norms[1] == 0 and norms[0] > 0


class Dropped(eqx.Module):
    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    second: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(4, 8, key=keys[0])
        self.dropout = eqx.nn.Dropout(0.5)
        self.second = eqx.nn.Linear(8, 3, key=keys[1])

    def __call__(self, x, key):
        return self.second(self.dropout(jnp.tanh(self.first(x)), key=key))


def test_dropout():
    """The examples have the keys that they have in a step, which a batch of one could not draw."""
    model = Dropped(jax.random.key(0))
    (x, y), loss = zoo.ZOO["mlp"]().batch, cx.SoftmaxCrossEntropy()
    predict = lambda model, x, key: model(x, key)
    objective = cx.Objective(predict, loss, stochastic=True)
    params, bound = objective.bind(model)
    key = jax.random.key(5)
    keys = bound.example_keys(x, key)

    def norm(x, y, key):
        value = lambda p: loss.value(bound.predict_one(p, x, key)[None], y[None])[0]
        leaves = jax.tree.leaves(jax.grad(value)(params))
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))

    norms = cx.gradient_norms(objective, model, (x, y), key)
    np.testing.assert_allclose(norms, jax.vmap(norm)(x, y, keys), rtol=1e-9)
    with pytest.raises(ValueError, match="key: got None"):
        cx.gradient_norms(objective, model, (x, y))


def shapes_in(jaxpr):
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield getattr(var.aval, "shape", ())
        for value in eqn.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


@pytest.mark.parametrize("length, limit", [(2, 7 * 32 * 24), (100, 7 * 100 * 100)])
def test_the_cheaper_of_two_ways(length, limit):
    """No gradient of a weight for each example, or no Gram matrix of its positions."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    params = {"w": draw(24, 32), "b": draw(32)}
    predict = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"][None]), axis=0)
    objective = cx.Objective(predict, cx.SquaredError())
    batch = draw(7, length, 24), draw(7, 32)
    check(objective, params, batch)
    jaxpr = jax.make_jaxpr(lambda p: cx.gradient_norms(objective, p, batch))(params)
    assert max(np.prod(shape, dtype=int) for shape in shapes_in(jaxpr.jaxpr)) < limit


def test_models_in_parallel():
    """Under a vmap over models each has norms of its own."""
    model, predict, batch, loss = zoo.ZOO["flax_style"]()
    objective = cx.Objective(predict, loss)
    models = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), model)
    together = jax.vmap(lambda m: cx.gradient_norms(objective, m, batch))(models)
    for i, norms in enumerate(together):
        one = jax.tree.map(lambda a, i=i: a[i], models)
        np.testing.assert_allclose(norms, cx.gradient_norms(objective, one, batch), rtol=1e-9)


def test_bad_batches():
    model, predict, (x, y), loss = zoo.ZOO["mlp"]()
    with pytest.raises(ValueError, match="targets: got shape"):
        cx.gradient_norms(cx.Objective(predict, loss), model, (x, y[:-1]))
