"""Which block a leaf goes to, and in which form its factors are held, as it was asked for."""

import functools
import itertools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from curvax.plan.moments import Recipe
from curvax.taps.wishes import SHARE
from tests import oracles, zoo


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


# -- fused weights -----------------------------------------------------------------------------


class Fused(NamedTuple):
    """A model with one weight for queries, keys and values, and the rows of that weight."""

    objective: cx.Objective
    params: dict
    batch: tuple
    x: np.ndarray  # (B, T, in)
    g: np.ndarray  # (columns, B, T, out), whose squares make up the Gauss-Newton matrix

    def place(self, parts: int) -> np.ndarray:
        """For each part, where the entries of [W b], row by row, stand among all parameters."""
        _, unravel = jax.flatten_util.ravel_pytree(self.params)
        size = sum(leaf.size for leaf in self.params.values())
        numbers = unravel(jnp.arange(float(size)))
        joined = jnp.concatenate([numbers["qkv"].T, numbers["qkv_bias"][:, None]], axis=1)
        return np.asarray(joined.reshape(parts, -1)).astype(int)


@functools.cache
def fused() -> Fused:
    params, predict, batch, loss = zoo.ZOO["fused_qkv"]()
    x = batch[0]
    events, classes = x.shape[0] * x.shape[1], params["readout"].shape[1]

    def from_products(products, x):
        """The rest of the model, behind the fused product of one example."""
        heads = (a.reshape(len(x), 2, -1) for a in jnp.split(products, 3, axis=-1))
        h = zoo.attend(*heads).reshape(len(x), -1) @ params["out"]
        return jnp.tanh(x + h) @ params["readout"]

    def rows(x):
        products = x @ params["qkv"] + params["qkv_bias"][None]
        z, pull = jax.vjp(lambda s: from_products(s, x), products)
        np.testing.assert_allclose(z, predict(params, x))
        p = jax.nn.softmax(z)
        root = (
            jnp.sqrt(p)[:, :, None] * jnp.eye(classes)[None] - p[:, :, None] * jnp.sqrt(p)[:, None]
        )
        cotangents = jnp.einsum("tij,ts->sjti", root, jnp.eye(len(z))).reshape(-1, *z.shape)
        return jax.vmap(lambda u: pull(u)[0])(cotangents)

    g = np.stack([rows(one) for one in x], axis=1) / np.sqrt(events)
    objective = cx.Objective(predict, loss, example=batch)
    return Fused(objective, params, batch, np.asarray(x), g)


def dense(kind, it, **options):
    build = lambda params: getattr(cx, kind)(it.objective, params, it.batch, **options).as_matrix()
    return np.asarray(jax.jit(build)(it.params))


@pytest.mark.parametrize("parts", [3, 6])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_fused_weight_has_the_blocks_of_its_projections(parts, sharing):
    """Of queries, keys and values; or of each of their two heads."""
    it = fused()
    matrix = dense("KroneckerFactored", it, fused={"qkv": parts}, sharing=sharing)
    factors = getattr(oracles, f"kfac_{sharing}_reference")
    wanted = oracles.fused_reference(it.x, it.g, parts, factors)
    for place, (a, g) in zip(it.place(parts), wanted, strict=True):
        close(matrix[np.ix_(place, place)], oracles.kronecker_dense(g, a))
        # And nothing between a part and whatever else.
        others = np.setdiff1d(np.arange(len(matrix)), place)
        assert not matrix[np.ix_(place, others)].any()


def test_eigenvalues_of_a_fused_weight_are_corrected_part_by_part():
    it = fused()
    matrix = dense("EigenvalueCorrected", it, fused={"qkv": 3})
    x, columns = it.x.reshape(-1, it.x.shape[-1]), np.split(it.g, 3, axis=-1)
    for place, g in zip(it.place(3), columns, strict=True):
        basis = oracles.ekfac_reference(x, g.reshape(len(g), len(x), -1), bias=True)
        close(matrix[np.ix_(place, place)], basis.dense)


def test_low_rank_of_a_fused_weight(monkeypatch):
    """The bases of all parts side by side: exact where they have all columns but one."""
    monkeypatch.setattr("curvax.taps.blocks.WHOLE", 1)
    it = fused()
    # The inputs span 4 of 5 dimensions, and so do the four of a part's outputs at rank 3.
    x, y = it.batch
    flat = it._replace(batch=(x.at[..., 3].set(1.0), y))
    options = {"fused": {"qkv": 3}}
    low = dense("LowRankKronecker", flat, rank={"": None, "qkv": (4, None)}, **options)
    close(low, dense("KroneckerFactored", flat, **options), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_a_step_of_a_fused_weight_is_that_of_its_projections(name):
    it = fused()

    def apart(params):
        weights, biases = (jnp.split(params[k], 3, axis=-1) for k in ("qkv", "qkv_bias"))
        rest = {k: params[k] for k in ("out", "readout")}
        return rest | {"w": list(weights), "b": list(biases)}

    def together(params):
        joined = {"qkv": jnp.concatenate(params["w"], axis=-1)}
        joined["qkv_bias"] = jnp.concatenate(params["b"])
        return joined | {k: params[k] for k in ("out", "readout")}

    def predict_apart(params, x):
        q, k, v = (
            (x @ w + b[None]).reshape(len(x), 2, -1)
            for w, b in zip(params["w"], params["b"], strict=True)
        )
        h = zoo.attend(q, k, v).reshape(len(x), -1) @ params["out"]
        return jnp.tanh(x + h) @ params["readout"]

    separate = cx.Objective(predict_apart, it.objective.loss, example=it.batch)
    results = []
    for objective, params, options in (
        (it.objective, it.params, {"fused": {"qkv": 3}}),
        (separate, apart(it.params), {}),
    ):
        if name == "kfac":
            options["rank"] = None
        build = getattr(cx.methods, name)
        options |= {"damping": 0.1, "scaling": cx.KLClip()}  # by leaf, RMS would tell them apart
        method = build(objective, fisher="exact", refresh_every=2, **options)
        step = cx.make_step(optax.chain(method, optax.scale(-0.1)), method)
        state = step.init(params)
        for _ in range(2):
            params, state, info = step(params, state, it.batch)
        assert bool(info.finite)
        results.append(params)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-8), results[0], together(results[1]))


@pytest.mark.parametrize(
    "name, weight, parts",
    [("transformer_scanned", "qkv", 3), ("conv_grouped", ".conv.weight", 3), ("moe_vmap", "w1", 5)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_parts_of_stacks(name, weight, parts, weighted):
    """Scanned layers, groups, experts: blocks on the diagonal of G, and the same A for each."""
    model, predict, batch, loss = zoo.ZOO[name]()
    if weighted:
        batch = (*batch, jnp.arange(1.0, 1 + len(batch[1])))
    objective = cx.Objective(predict, loss)
    build = lambda **options: eqx.filter_jit(
        lambda model: cx.KroneckerFactored(objective, model, batch, fisher="empirical", **options)
    )(model)
    whole, split = build(), build(fused={weight: parts})
    i = next(i for i, block in enumerate(whole.blocks) if weight in block.path)
    (a, g), (each_a, each_g) = (
        (matrix.input.values, matrix.output.values)
        for matrix in (whole.matrices[i], split.matrices[i])
    )
    size = g.shape[1] // parts
    close(each_a, np.repeat(a, parts, axis=0))
    wanted = [
        matrix[k * size : (k + 1) * size, k * size : (k + 1) * size]
        for matrix in np.asarray(g)
        for k in range(parts)
    ]
    close(each_g, np.stack(wanted))


def test_fused_weights_in_the_table_of_sites():
    it = fused()
    table = cx.sites(it.objective, it.params, it.batch, fused={"qkv": 3})
    site = table["['qkv']"]
    assert (site.stack, site.parts) == (3, 3)
    assert [form.size for form in site.factors] == [5, 4]
    assert table["['qkv_bias']"].block == "['qkv']"
    assert "3 (3 parts)" in str(table)


def test_weights_that_are_no_such_parts():
    it = fused()

    def sites(parts):
        return cx.sites(it.objective, it.params, it.batch, fused=parts)

    with pytest.raises(ValueError, match=r"got 5 parts for \['qkv'\], whose 12 outputs are no 5"):
        sites({"qkv": 5})
    with pytest.raises(ValueError, match=r"got the key 'kqv', .* there are \['out'\], \['qkv'\], "):
        sites({"kqv": 3})
    with pytest.raises(ValueError, match=r"fused: got 0 for 'qkv', wanted a number of parts"):
        sites({"qkv": 0})
    model, predict, batch, loss = zoo.ZOO["tied_embedding"]()
    objective = cx.Objective(predict, loss)
    with pytest.raises(ValueError, match=r"got 2 parts for \['embedding'\], which the model"):
        cx.sites(objective, model, batch, fused={"embedding": 2})
    model, predict, batch, loss = zoo.ZOO["transformer"]()
    with pytest.raises(ValueError, match=r"tokens.weight, wanted a weight, not an embedding"):
        cx.sites(cx.Objective(predict, loss), model, batch, fused={"tokens": 2})


def test_a_weight_that_the_model_takes_apart_itself():
    params = {"w": jnp.ones((6, 3))}
    predict = lambda p, x: jnp.tanh(p["w"][:3] @ x) * (p["w"][3:] @ x)
    batch = jnp.ones((2, 3)), jnp.ones((2, 3))
    objective = cx.Objective(predict, cx.SquaredError())
    plain = cx.sites(objective, params, batch)
    assert cx.sites(objective, params, batch, fused={"w": 2}) == plain
    with pytest.raises(ValueError, match=r"got 3 parts .* uses as 2 different matrices"):
        cx.sites(objective, params, batch, fused={"w": 3})
