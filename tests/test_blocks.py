"""Which block a leaf goes to, and in which form its factors are held, as it was asked for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.plan.moments import Recipe
from curvax.taps.blocks import SHARE


def close(actual, expected, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


# -- ranks by path -----------------------------------------------------------------------------

WIDTHS = (40, 36, 48, 34)


def predict_deep(params, x):
    for i, layer in enumerate(params["layers"]):
        x = layer["w"] @ x + layer["b"]
        x = jnp.tanh(x) if i < len(params["layers"]) - 1 else x
    return x


def deep():
    """Sides that are all above the size of those that are held whole, so that ranks count."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-1]), jnp.float32)
    layers = [{"w": draw(m, n), "b": draw(m)} for n, m in itertools.pairwise(WIDTHS)]
    batch = draw(8, WIDTHS[0]), draw(8, WIDTHS[-1])
    return {"layers": layers}, batch


def ranks_of(rank, **options):
    """(input, output) rank of each layer, None for a full factor."""
    params, batch = deep()
    table = cx.sites(cx.Objective(predict_deep, cx.SquaredError()), params, batch, rank=rank)
    held = lambda form: form.rank if form.kind == "sketch" else None
    return [
        tuple(map(held, table[f"['layers'][{i}]['w']"].factors)) for i in range(len(WIDTHS) - 1)
    ]


def test_the_longest_part_of_a_path_decides():
    assert ranks_of({"": 5, "[1]": None, "layers": 7, "[1]['w']": 3}) == [(7, 7), (3, 3), (7, 7)]
    assert ranks_of({"": 5, "[1]": None}) == [(5, 5), (None, None), (5, 5)]
    assert ranks_of({"[0]": 0.25}) == [ranks_of(0.25)[0], *ranks_of(SHARE)[1:]]
    # The number of a layer is no part of a longer one's, and order does not matter.
    assert ranks_of({"[2]": 9, "": 4}) == ranks_of({"": 4, "[2]": 9}) == [(4, 4), (4, 4), (9, 9)]


def test_a_pair_is_for_inputs_and_outputs():
    assert ranks_of((6, 4)) == [(6, 4)] * 3
    assert ranks_of({"": (6, None), "[1]": (None, 2)}) == [(6, None), (None, 2), (6, None)]
    assert ranks_of((100, 4))[0] == (None, 4)


@pytest.mark.parametrize("name", ["kfac", "newton_muon"])
def test_methods_hold_factors_at_the_rank_of_their_path(name):
    params, batch = deep()
    objective = cx.Objective(predict_deep, cx.SquaredError(), example=batch)
    method = getattr(cx.methods, name)(objective, rank={"[1]": 6, "": None})
    step = cx.make_step(method, method)
    _, state, info = step(params, step.init(params), batch, jax.random.key(0))
    memory = state.optimizer.preconditioner
    assert memory["['layers'][1]['w']"].input.factor.core.shape == (1, 6, 6)
    assert memory["['layers'][0]['w']"].input.factor.values.shape == (1, 41, 41)
    assert bool(info.finite)


def test_low_rank_operator_with_a_rank_for_each_path():
    """Full factors are those of K-FAC, sketched ones keep the trace."""
    params, batch = deep()
    objective = cx.Objective(predict_deep, cx.SquaredError())
    build = jax.jit(
        lambda p: (
            cx.LowRankKronecker(objective, p, batch, rank={"": None, "[2]": 8}).matrices,
            cx.KroneckerFactored(objective, p, batch).matrices,
        )
    )
    mixed, full = build(params)
    for i, (got, wanted) in enumerate(zip(mixed, full, strict=True)):
        close(got.trace(), wanted.trace(), rtol=1e-4)
        if i < 2:
            close(got.input.values, wanted.input.values, rtol=1e-4, atol=1e-5)
        else:
            assert got.input.core.shape == (1, 8, 8)


def test_a_key_that_names_no_leaf():
    params, batch = deep()
    objective = cx.Objective(predict_deep, cx.SquaredError(), example=batch)
    message = r"rank: got the key 'heads', .* there are \['layers'\]\[0\]\['b'\], \['layers'\]\[0\]"
    with pytest.raises(ValueError, match=message):
        cx.sites(objective, params, batch, rank={"heads": 4, "": 2})
    with pytest.raises(ValueError, match=message):
        cx.methods.kfac(objective, rank={"heads": 4}).init(params)


def test_ranks_out_of_range_say_where():
    for rank, message in [
        ({"": 0.1, "up": 0}, "rank: got 0 for 'up'"),
        ({"": (4, 1.5)}, "rank: got 1.5 for ''"),
        ((4, -1), "rank: got -1, wanted"),
    ]:
        with pytest.raises(ValueError, match=message):
            Recipe(rank)
    assert hash(Recipe({"a": 1, "": None})) == hash(Recipe({"": None, "a": 1}))


def test_slices_have_paths_of_their_own():
    params = {"w": jnp.ones((80, 40))}

    def predict(p, x):
        return p["w"][40:] @ jnp.tanh(p["w"][:40] @ x)

    batch = jnp.ones((2, 40)), jnp.ones((2, 40))
    objective = cx.Objective(predict, cx.SquaredError())
    x = objective.example(batch).x
    _, blocks = Recipe({"['w'][0]": 3, "": 5}).blocks(objective, params, x)
    assert sorted(block.input.rank for block in blocks) == [3, 5]
