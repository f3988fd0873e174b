"""Moments that are measured from some positions of a batch, instead of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import curvax as cx
from curvax.plan.moments import BlockMoments, Recipe, moments_of
from curvax.taps import statistics

BATCH, FEATURES, OUTPUTS = 3, 4, 2
LOSS = cx.SquaredError(event_ndim=1)
WEIGHT = "['w']"


def measured(predict, params, batch, bases=None, **recipe):
    objective = cx.Objective(predict, LOSS, reduction="sum")
    quantity = BlockMoments(Recipe(fisher="empirical", **recipe))
    given = None if bases is None else lambda rotated: bases

    def run(params, batch):
        return moments_of(objective, params, batch, None, quantity, given)[1][WEIGHT]

    return jax.jit(run)(params, batch)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def gram(rows):
    rows = np.asarray(rows).reshape(-1, rows.shape[-1])
    return rows.T @ rows


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(statistics, "FEWEST_ROWS", 1)
    monkeypatch.setattr("curvax.taps.blocks.WHOLE", 1)


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_positions_of_a_sequence(rows, rank, few_rows):
    """Every k-th, with the k that leaves about rows·n of them, for each side by itself."""
    length = 7
    params = {"w": normal(0, OUTPUTS, FEATURES), "b": normal(1, OUTPUTS)}
    x, y = normal(2, BATCH, length, FEATURES), normal(3, BATCH, length, OUTPUTS)
    predict = lambda p, x: x @ p["w"].T + p["b"][None]
    sides = {
        "input": np.concatenate([x, np.ones((BATCH, length, 1))], axis=-1),
        "output": np.asarray(jax.vmap(predict, (None, 0))(params, x) - y),
    }
    every = {name: max(BATCH * length // (rows * s.shape[-1]), 1) for name, s in sides.items()}
    assert (every["input"] > 1 or every["output"] > 1) == (rows < 100)
    kept = {name: rows_of[:, :: every[name]] for name, rows_of in sides.items()}
    mean = gram(kept["input"]) / (BATCH * kept["input"].shape[1])
    total = gram(kept["output"]) * length / kept["output"].shape[1]
    bases = None
    if rank is not None:
        one = lambda n: jnp.ones((1, n, 1)) / n**0.5
        bases = {WEIGHT: (one(FEATURES + 1), one(OUTPUTS))}
    got = measured(predict, params, (x, y), bases, rank=rank, rows=rows)
    for moment, wanted in ((got.input, mean), (got.output, total)):
        columns = np.eye(len(wanted)) if rank is None else np.full((len(wanted), 1), 1.0)
        columns = columns / np.linalg.norm(columns, axis=0)
        np.testing.assert_allclose(moment.product[0], wanted @ columns, rtol=1e-10)
        np.testing.assert_allclose(moment.trace[0], np.trace(wanted), rtol=1e-10)


def test_places_of_a_convolution(few_rows):
    """Every second place in each direction, which are those of the convolution of twice the
    stride.
    """
    size, channels = 7, 2
    params = {"w": normal(0, OUTPUTS, channels, 3, 3)}
    x, targets = normal(1, BATCH, channels, size, size), normal(2, BATCH, 7, 7, OUTPUTS)

    def predict(stride):
        def one(p, x):
            y = lax.conv_general_dilated(x[None], p["w"], (stride, stride), [(1, 1)] * 2)
            return jnp.moveaxis(y[0], 0, -1)

        return one

    # 147 places for 18 inputs, and for 2 outputs.
    got = measured(predict(1), params, (x, targets), rows=2)
    coarse = measured(predict(2), params, (x, targets[:, ::2, ::2]))
    np.testing.assert_allclose(got.input.product, coarse.input.product, rtol=1e-10)
    cotangents = jax.vmap(predict(1), (None, 0))(params, x) - targets
    step = int((147 // 4) ** 0.5)
    kept = cotangents[:, ::step, ::step]
    wanted = gram(kept) * 49 / (kept.shape[1] * kept.shape[2])
    np.testing.assert_allclose(got.output.product[0], wanted, rtol=1e-10)


@pytest.mark.parametrize("fewest, every", [(1, 7), (2, 3), (3, 2), (4, 1), (64, 1)])
def test_examples_of_a_diagonal_block(fewest, every, monkeypatch):
    """Every k-th example, with the k that leaves at least so many of them."""
    monkeypatch.setattr(statistics, "FEWEST_EXAMPLES", fewest)
    params = {"w": normal(0, FEATURES)}
    x, y = normal(1, 7, 5, FEATURES), normal(2, 7, 5, FEATURES)
    predict = lambda p, x: x * p["w"][None]
    each = np.asarray(((x * params["w"][None, None] - y) * x).sum(axis=1))
    kept = each[::every]
    for rows, wanted in ((4, np.sum(kept**2, axis=0) * 7 / len(kept)), (None, np.sum(each**2, 0))):
        got = measured(predict, params, (x, y), rows=rows)
        np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_rows_out_of_range():
    with pytest.raises(ValueError, match=r"rows: got 0, wanted None or at least 1\."):
        Recipe(rows=0)
