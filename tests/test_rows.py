"""The Gram matrix of the rows from factors of the weights' gradients, against rows written out."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.operators import rows as rows_module

KEY = jax.random.key(0)


class Mixed(eqx.Module):
    """Embedding, dense layer used at each position under jit and checkpoint, convolution, and a
    weight with a group axis: (position, 4) → (2, 4) outputs.
    """

    embedding: eqx.nn.Embedding
    dense: eqx.nn.Linear
    convolution: eqx.nn.Conv1d
    grouped: jax.Array

    def __init__(self):
        keys = jax.random.split(KEY, 4)
        self.embedding = eqx.nn.Embedding(7, 5, key=keys[0])
        self.dense = eqx.nn.Linear(5, 40, key=keys[1])
        self.convolution = eqx.nn.Conv1d(40, 3, 3, padding=1, key=keys[2])
        self.grouped = jax.random.normal(keys[3], (2, 3, 4))

    def __call__(self, x):
        hidden = jax.vmap(self.embedding)(x)
        dense = jax.checkpoint(lambda h: jnp.tanh(jax.jit(jax.vmap(self.dense))(h)))
        hidden = self.convolution(dense(hidden).T).T
        return jnp.einsum("gi,gij->gj", hidden[:2], self.grouped)


def tied(weight, x):
    """A weight that takes part twice: a sum of two products, with no one pair of factors."""
    return jnp.tanh(x @ weight) @ weight


def dropout(weight, x, key):
    return eqx.nn.Dropout(0.5)(x, key=key) @ weight


def problem(name):
    normal = lambda *shape: jax.random.normal(jax.random.key(1), shape)
    if name == "mixed":
        return Mixed(), jax.random.randint(KEY, (5, 3), 0, 7), lambda m, x: m(x), {}
    if name == "mlp":
        model = eqx.nn.MLP(6, 4, 8, 2, key=KEY)
        return model, normal(5, 6), lambda m, x: m(x), {}
    if name == "tied":
        return normal(4, 4), normal(5, 4) + 1, tied, {}
    return normal(6, 4), normal(5, 6) + 1, dropout, {"stochastic": True}


@pytest.mark.parametrize("name", ["mixed", "mlp", "tied", "dropout"])
@pytest.mark.parametrize("kind", ["gauss_newton", "mc", "empirical"])
def test_gram_matrix(name, kind):
    model, x, predict, options = problem(name)
    double = lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf
    model, x = jax.tree.map(double, (model, x))
    objective = cx.Objective(predict, cx.SoftmaxCrossEntropy(), **options)
    lead = (5, 2) if name == "mixed" else (5,)
    batch = (x, jnp.zeros(lead, jnp.int32), jnp.linspace(0.0, 1.0, 5))

    @eqx.filter_jit
    def rows(model, batch):
        if kind == "gauss_newton":
            operator = cx.GaussNewton(objective, model, batch, key=KEY)
        else:
            operator = cx.Fisher(objective, model, batch, key=KEY, kind=kind, samples=2)
        return operator.row_gradients(), operator.row_gram()

    gradients, gram = rows(model, batch)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
    flat = np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)
    flat = flat.reshape(-1, flat.shape[2])
    np.testing.assert_allclose(gram, flat @ flat.T, rtol=1e-10, atol=1e-14)


def test_weights_of_matrix_products_are_never_written_out(monkeypatch):
    found = []
    monkeypatch.setattr(
        rows_module,
        "_find_product",
        lambda *args, find=rows_module._find_product: found.append(find(*args)) or found[-1],
    )
    model, x, predict, _ = problem("mlp")
    objective = cx.Objective(predict, cx.SoftmaxCrossEntropy())
    gram = lambda m, x: cx.GaussNewton(objective, m, (x, jnp.zeros(5, jnp.int32))).row_gram()
    eqx.filter_eval_shape(gram, model, x)
    kinds = [isinstance(term, rows_module._Product) for term in found]
    assert kinds == [leaf.ndim == 2 for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array))]
