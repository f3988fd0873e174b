"""K-FAC's operators on their own: against dense references, and exact where theory says so."""

import functools
import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax as cx
from curvax.operators.factors import DiagonalFactor, LowRankFactor
from curvax.operators.kronecker import Product, Rotated
from tests import oracles, zoo
from tests.problems import gradient_of

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
λ = 0.3


def close(actual, expected, **tolerances):
    np.testing.assert_allclose(actual, expected, **(CLOSE | tolerances))


def build(kind, objective, model, batch, key=None, **options):
    """The operator, made in one compiled call."""
    make = lambda model, batch, key: kind(objective, model, batch, key, **options)
    return eqx.filter_jit(make)(model, batch, key)


def ravelled(tree):
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


@eqx.filter_jit
def dense_of(operator):
    return operator.as_matrix()


@eqx.filter_jit
def sides_of(product):
    """Matrix and trace of the factor of each side."""
    sides = {"input": product.input, "output": product.output}
    return {name: (side.matrix(), side.trace()) for name, side in sides.items()}


@functools.cache
def small_sides(kind_name, **options):
    """An operator of the MLP below; low rank needs `WHOLE` to be small."""
    it = mlp()
    return build(getattr(cx, kind_name), it.objective, it.params, it.batch, **options)


# -- a small network, and its dense references -----------------------------------------------


class Network:
    """s ← W a + b, a ← nonlinearity(s), with parameters [(W, b), …]; b may be None."""

    def __init__(self, sizes, size, loss, *, nonlinearity=jnp.tanh, biases=True, seed=0, **options):
        rng = np.random.default_rng(seed)
        draw = lambda *shape, by=1: jnp.asarray(rng.standard_normal(shape) / by)
        self.params = [
            (draw(m, n, by=math.sqrt(n)), draw(m, by=3) if biases else None)
            for n, m in itertools.pairwise(sizes)
        ]
        targets = {
            "softmax": lambda: jnp.asarray(rng.integers(sizes[-1], size=size)),
            "squared": lambda: draw(size, sizes[-1]),
        }
        self.batch = (draw(size, sizes[0]), targets[loss]())
        self.loss, self.nonlinearity = loss, nonlinearity
        kind = {"softmax": cx.SoftmaxCrossEntropy, "squared": cx.SquaredError}[loss]
        self.objective = cx.Objective(self.predict, kind(), **options)

    def predict(self, params, x):
        for i, (w, b) in enumerate(params):
            x = w @ x if b is None else w @ x + b
            x = x if i == len(params) - 1 else self.nonlinearity(x)
        return x

    @functools.cached_property
    def reference(self):
        layers = self.params
        return oracles.kfac_dense_reference(layers, self.batch[0], self.loss, self.nonlinearity)

    @functools.cached_property
    def places(self) -> list[np.ndarray]:
        """For each layer, where the entries of [W b], row by row, stand among all parameters."""
        leaves, treedef = jax.tree.flatten(self.params)
        ends = np.cumsum([0] + [leaf.size for leaf in leaves])
        numbers = [
            np.arange(a, b).reshape(leaf.shape)
            for a, b, leaf in zip(ends[:-1], ends[1:], leaves, strict=True)
        ]
        return [
            (w if b is None else np.concatenate([w, b[:, None]], axis=1)).ravel()
            for w, b in jax.tree.unflatten(treedef, numbers)
        ]

    def scatter(self, blocks) -> np.ndarray:
        """The block-diagonal matrix over all parameters."""
        n = sum(len(p) for p in self.places)
        dense = np.zeros((n, n))
        for place, block in zip(self.places, blocks, strict=True):
            dense[np.ix_(place, place)] = block
        return dense


@functools.cache
def mlp(**options) -> Network:
    return Network((4, 5, 3), 6, "softmax", **options)


def kron(network, change=lambda g, a: (g, a)):
    return network.scatter([oracles.kronecker_dense(*change(r.g, r.a)) for r in network.reference])


@pytest.fixture
def all_sides_low_rank(monkeypatch):
    monkeypatch.setattr("curvax.taps.blocks.WHOLE", 1)


# -- against the references --------------------------------------------------------------------


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("loss", ["softmax", "squared"])
def test_kfac_is_the_product_of_the_factors(loss, biases):
    it = Network((4, 5, 3), 6, loss, biases=biases)
    operator = build(cx.KroneckerFactored, it.objective, it.params, it.batch)
    expected = kron(it)
    close(dense_of(operator), expected)
    vector = jax.tree.map(lambda a: jnp.asarray(np.cos(a)), it.params)
    flat = ravelled(vector)
    products = eqx.filter_jit(lambda op, vector: (op.mv(vector), op.quadratic_form(vector)))
    got, form = products(operator, vector)
    assert jax.tree.structure(got) == jax.tree.structure(it.params)
    close(ravelled(got), expected @ flat)
    close(form, flat @ expected @ flat)


def test_a_sum_scales_by_the_number_of_examples_and_l2_is_left_out():
    it, mean = mlp(reduction="sum", l2=0.7), mlp()
    for kind in (cx.KroneckerFactored, cx.EigenvalueCorrected):
        total = build(kind, it.objective, it.params, it.batch)
        close(dense_of(total), 6 * dense_of(small_sides(kind.__name__)))
    close(kron(it), kron(mean))


def test_ekfac_has_the_second_moments_in_the_eigenbasis():
    it = mlp()
    blocks = [oracles.ekfac_reference(r.inputs, r.gradients).dense for r in it.reference]
    close(dense_of(small_sides("EigenvalueCorrected")), it.scatter(blocks))


def test_ekfac_is_nearer_to_each_block_than_kfac():
    it = mlp()
    corrected = dense_of(small_sides("EigenvalueCorrected"))
    factored = dense_of(small_sides("KroneckerFactored"))
    exact = it.scatter([r.exact for r in it.reference])
    for place in it.places:
        distance = [
            np.linalg.norm((matrix - exact)[np.ix_(place, place)])
            for matrix in (corrected, factored)
        ]
        assert distance[0] < 0.98 * distance[1]


def test_both_keep_the_trace_of_the_exact_blocks_of_the_last_layer():
    """By the moments: tr(E[g²xxᵀ]) is not E[g²]·E[x²], but EK-FAC has it exactly."""
    it = mlp()
    exact = sum(np.trace(r.exact) for r in it.reference)
    close(small_sides("EigenvalueCorrected").trace(), exact)


def test_forward_only_has_no_output_factor():
    it = mlp()
    operator = small_sides("KroneckerFactored", fisher="forward_only")
    close(dense_of(operator), kron(it, lambda g, a: (np.eye(len(g)), a)))


@pytest.mark.parametrize("kind", ["KroneckerFactored", "EigenvalueCorrected"])
def test_a_bias_and_a_leaf_may_be_diagonal(kind):
    """As asked for: then the weight has a factor without a coordinate 1."""
    it = mlp()
    operator = build(
        getattr(cx, kind), it.objective, it.params, it.batch, diagonal=("[0][1]", "[1][0]")
    )
    matrix = check_functions(operator)
    starts = np.cumsum([0] + [leaf.size for leaf in jax.tree.leaves(it.params)])
    for i in (1, 2):
        part = slice(starts[i], starts[i + 1])
        assert np.all(np.diagonal(matrix)[part] > 0)
        close(matrix[part], np.diag(np.diagonal(matrix))[part])
    weight = slice(starts[0], starts[1])
    r = it.reference[0]
    if kind == "KroneckerFactored":
        close(matrix[weight, weight], np.kron(r.g, r.a[:-1, :-1]))


# -- functions of an operator ------------------------------------------------------------------

OPERATORS: dict[str, Any] = {
    "kfac": ("KroneckerFactored", {}),
    "forward_only": ("KroneckerFactored", {"fisher": "forward_only"}),
    "ekfac": ("EigenvalueCorrected", {}),
    "low_rank": ("LowRankKronecker", {"rank": 2, "passes": 1}),
    "low_rank_inputs": ("LowRankKronecker", {"rank": 3, "passes": 1}),
    "low_rank_forward": ("LowRankKronecker", {"rank": 2, "passes": 1, "fisher": "forward_only"}),
}


@pytest.fixture(params=OPERATORS)
def operator(request, all_sides_low_rank):
    name, options = OPERATORS[request.param]
    return small_sides(name, **options)


@eqx.filter_jit
def everything(operator, damping, how="exact"):
    """The dense matrices of an operator and of its functions, and their scalars."""
    functions = {
        "itself": operator,
        "inverse": operator.inverse(damping, how),
        "sqrt": operator.sqrt(damping),
        "inverse_sqrt": operator.inverse_sqrt(damping),
    }
    matrices = {name: each.as_matrix() for name, each in functions.items()}
    numbers = {
        name: (each.trace(), each.frobenius_norm(), each.logdet(damping))
        for name, each in functions.items()
    }
    return matrices, numbers


def check_functions(operator):
    matrices, numbers = everything(operator, λ)
    dense = np.asarray(matrices["itself"])
    eye = np.eye(len(dense))
    assert np.linalg.eigvalsh(dense)[0] > -1e-12
    close(matrices["sqrt"] @ matrices["sqrt"], dense + λ * eye)
    close(matrices["inverse_sqrt"] @ matrices["inverse_sqrt"], matrices["inverse"])
    close(matrices["inverse"] @ (dense + λ * eye), eye)
    for name, matrix in matrices.items():
        close(matrix, matrix.T)
        trace, norm, logdet = numbers[name]
        close(trace, np.trace(matrix))
        close(norm, np.linalg.norm(matrix))
        close(logdet, np.linalg.slogdet(matrix + λ * eye)[1])
    return dense


def test_functions_of_an_operator(operator):
    check_functions(operator)


@pytest.mark.parametrize("how", ["pi", "per_factor"])
@pytest.mark.parametrize("name", ["KroneckerFactored", "LowRankKronecker"])
def test_damping_shared_out_between_the_factors(name, how, all_sides_low_rank):
    it = mlp()
    operator = small_sides(name, **({"rank": 2, "passes": 1} if name == "LowRankKronecker" else {}))
    blocks = []
    for matrix in operator.matrices:
        sides = sides_of(matrix)
        g, a = (np.asarray(sides[side][0][0]) for side in ("output", "input"))
        π = 1.0
        if how == "pi":
            π = math.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
        inverse = lambda m, shift: np.linalg.inv(m + shift * np.eye(len(m)))
        blocks.append(np.kron(inverse(g, math.sqrt(λ) / π), inverse(a, π * math.sqrt(λ))))
    functions = eqx.filter_jit(lambda inverse: (inverse.as_matrix(), inverse.trace()))
    matrix, trace = functions(operator.inverse(λ, how))
    close(matrix, it.scatter(blocks))
    close(trace, sum(np.trace(block) for block in blocks))


def test_functions_compile_and_are_pytrees():
    it = mlp()
    operator = small_sides("KroneckerFactored")

    @eqx.filter_jit
    def run(operator, damping, vector):
        inverse = operator.inverse(damping)
        return inverse, inverse.mv(vector), operator.logdet(damping)

    inverse, product, logdet = run(operator, 0.3, it.params)
    again = jax.tree.unflatten(jax.tree.structure(inverse), jax.tree.leaves(inverse))
    jax.tree.map(close, again.mv(it.params), product)
    close(logdet, operator.logdet(0.3))


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("KroneckerFactored", jnp.bfloat16),
        ("EigenvalueCorrected", jnp.float32),
        ("LowRankKronecker", jnp.float32),
        ("LowRankKronecker", jnp.bfloat16),
    ],
)
def test_low_precision_parameters(kind, dtype, all_sides_low_rank):
    """Factors are in float32, products in the dtype of the leaves."""
    it = mlp()
    narrow = jax.tree.map(lambda a: a.astype(dtype), it.params)
    batch = (it.batch[0].astype(dtype), it.batch[1])
    options = {"rank": 2, "passes": 1} if kind == "LowRankKronecker" else {}
    operator = build(getattr(cx, kind), it.objective, narrow, batch, **options)
    wide = small_sides(kind, **options)
    tolerance = 1e-4 if dtype == jnp.float32 else 0.1

    @eqx.filter_jit
    def functions(op):
        ways = op, op.inverse(λ), op.inverse(λ, "pi"), op.sqrt(λ)
        logdets = op.logdet(λ), op.logdet(jnp.asarray(λ, jnp.float64))
        return [each.mv(narrow) for each in ways], (op.trace(), *logdets, op.frobenius_norm())

    products, numbers = functions(operator)
    expected, wanted = functions(wide)
    for product, want in zip(products, expected, strict=True):
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(product))
        got, want = ravelled(product), ravelled(want)
        assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)
    for got, want in zip(numbers, wanted, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=tolerance)


def test_leaves_of_several_dtypes():
    it = mlp()
    dtypes = [(jnp.float32, jnp.float64), (jnp.float64, jnp.bfloat16)]
    cast = lambda params: [
        tuple(leaf.astype(d) for leaf, d in zip(*pair, strict=True))
        for pair in zip(params, dtypes, strict=True)
    ]
    back = lambda params: jax.tree.map(lambda a: a.astype(jnp.float64), params)
    objective = cx.Objective(lambda p, x: it.predict(back(p), x), cx.SoftmaxCrossEntropy())
    operator = build(cx.KroneckerFactored, objective, cast(it.params), it.batch)
    product = eqx.filter_jit(lambda op, vector: op.mv(vector))
    got = product(operator, cast(it.params))
    expected = product(small_sides("KroneckerFactored"), it.params)
    for a, b, d in zip(
        jax.tree.leaves(got), jax.tree.leaves(expected), jax.tree.leaves(dtypes), strict=True
    ):
        assert a.dtype == d
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0.02, atol=2e-3)
    assert np.isfinite(float(operator.logdet(λ)))


# -- exact where theory says so ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["KroneckerFactored", "EigenvalueCorrected"])
@pytest.mark.parametrize("loss", ["softmax", "squared"])
def test_one_datum(kind, loss):
    """The block of one datum of one direction of curvature is a product: for a scalar output."""
    it = Network((4, 5, 1) if loss == "squared" else (4, 5, 2), 1, loss)
    operator = build(getattr(cx, kind), it.objective, it.params, it.batch)
    close(dense_of(operator), it.scatter([r.exact for r in it.reference]))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_one_datum_of_a_fisher_matrix(fisher):
    """For canonical losses the Fisher matrix is the Gauss-Newton matrix; here from its classes."""
    it = Network((4, 3), 1, "softmax")
    x, y = it.batch
    dense = oracles.dense(it.predict, "softmax", 1, "mean", 0.0, it.params, x, y, None)
    operator = build(cx.KroneckerFactored, it.objective, it.params, it.batch, fisher=fisher)
    close(dense_of(operator), dense[fisher])
    if fisher == "exact":
        close(dense["exact"], dense["gauss_newton"])


def test_drawn_targets_average_to_the_exact_fisher():
    it = Network((3, 2), 4, "softmax", seed=3)
    exact = build(cx.KroneckerFactored, it.objective, it.params, it.batch)
    drawn = build(
        cx.KroneckerFactored,
        it.objective,
        it.params,
        it.batch,
        jax.random.key(0),
        fisher="mc",
        samples=2000,
    )
    np.testing.assert_allclose(dense_of(drawn), dense_of(exact), atol=0.03)
    assert np.abs(dense_of(drawn) - dense_of(exact)).max() > 1e-6


@pytest.mark.parametrize("kind", ["KroneckerFactored", "EigenvalueCorrected"])
def test_deep_linear_network_with_squared_error(kind):
    """The gradients' factor is the same for all examples: each block is a product (Bernacchia et
    al. 2018), and EK-FAC finds it.
    """
    it = Network((4, 5, 3, 2), 7, "squared", nonlinearity=lambda s: s, biases=False)
    operator = build(getattr(cx, kind), it.objective, it.params, it.batch)
    matrix = dense_of(operator)
    gauss_newton = oracles.dense_gauss_newton(it.objective, it.params, it.batch)
    for place in it.places:
        block = np.ix_(place, place)
        close(matrix[block], gauss_newton[block])


def diagonal_blocks(objective, params, batch, layers):
    """The Gauss-Newton matrix with all but the given blocks (lists of leaves) set to zero."""
    matrix = np.asarray(dense_of(cx.GaussNewton(objective, params, batch)))
    names = sorted(params)
    ends = np.cumsum([0] + [params[name].size for name in names])
    numbers = {name: np.arange(*ends[i : i + 2]) for i, name in enumerate(names)}
    mask = np.zeros_like(matrix)
    for layer in layers:
        place = np.concatenate([numbers[name] for name in layer])
        mask[np.ix_(place, place)] = 1
    return matrix * mask


def sequences(shape, outputs, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    return draw, (draw(*shape), draw(*outputs))


def test_expand_is_exact_for_a_linear_model_with_a_loss_for_each_token():
    draw, batch = sequences((4, 6, 3), (4, 6, 2))
    params = {"w1": draw(3, 5), "w2": draw(5, 2), "b2": draw(2)}
    predict = lambda p, x: (x @ p["w1"]) @ p["w2"] + p["b2"][None]
    objective = cx.Objective(predict, cx.SquaredError(event_ndim=1))
    operator = build(cx.KroneckerFactored, objective, params, batch, sharing="expand")
    expected = diagonal_blocks(objective, params, batch, [["w1"], ["w2", "b2"]])
    close(dense_of(operator), expected)
    reduced = build(cx.KroneckerFactored, objective, params, batch, sharing="reduce")
    assert np.linalg.norm(dense_of(reduced) - expected) > 0.1 * np.linalg.norm(expected)


def test_reduce_is_exact_for_a_linear_model_with_a_loss_of_the_mean():
    draw, batch = sequences((4, 6, 3), (4, 2))
    params = {"w1": draw(3, 5), "b1": draw(5), "w2": draw(5, 2)}
    predict = lambda p, x: jnp.mean(x @ p["w1"] + p["b1"][None], axis=0) @ p["w2"]
    objective = cx.Objective(predict, cx.SquaredError())
    expected = diagonal_blocks(objective, params, batch, [["w1", "b1"], ["w2"]])
    for kind in (cx.KroneckerFactored, cx.EigenvalueCorrected):
        operator = build(kind, objective, params, batch, sharing="reduce")
        close(dense_of(operator), expected)
    expanded = build(cx.KroneckerFactored, objective, params, batch, sharing="expand")
    assert np.linalg.norm(dense_of(expanded) - expected) > 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolution(sharing):
    """By every position's own loss, or by that of their mean."""
    positions = (3, 3)  # of a 2 × 2 kernel with stride 2 and padding 1 on 5 × 5
    outputs = (4, *positions, 3) if sharing == "expand" else (4, 3)
    draw, batch = sequences((4, 5, 5, 2), outputs)
    params = {"w": draw(2, 2, 2, 3), "b": draw(3)}

    def predict(p, x):
        s = zoo.convolve(x, p["w"], stride=2, padding=((1, 0), (0, 1))) + p["b"][None, None]
        return s if sharing == "expand" else jnp.mean(s, axis=(0, 1))

    objective = cx.Objective(predict, cx.SquaredError(event_ndim=1))
    operator = build(cx.KroneckerFactored, objective, params, batch, sharing=sharing)
    expected = diagonal_blocks(objective, params, batch, [["w", "b"]])
    close(dense_of(operator), expected)


def test_outputs_of_several_axes():
    """One event of 2 × 3 outputs: a linear layer, then a reshape."""
    draw, batch = sequences((5, 4), (5, 2, 3))
    params = {"w": draw(4, 6), "b": draw(6)}
    predict = lambda p, x: (x @ p["w"] + p["b"]).reshape(2, 3)
    for reduction in ("mean", "sum"):
        objective = cx.Objective(predict, cx.SquaredError(half=False), reduction=reduction)
        operator = build(cx.KroneckerFactored, objective, params, batch)
        close(dense_of(operator), diagonal_blocks(objective, params, batch, [["w", "b"]]))


def test_weights_and_masks():
    """A linear model: its block is exact for any weights; a masked example may hold anything."""
    it = Network((4, 3), 6, "squared")
    x, y = it.batch
    padded = (
        jnp.concatenate([x, jnp.full((2, 4), jnp.nan)]),
        jnp.concatenate([y, jnp.zeros((2, 3))]),
        jnp.asarray([1.0] * 6 + [0.0] * 2),
    )
    weight = jnp.asarray([1.0, 2, 0, 1, 3, 1])
    for kind in (cx.KroneckerFactored, cx.EigenvalueCorrected):
        plain = build(kind, it.objective, it.params, it.batch)
        close(dense_of(build(kind, it.objective, it.params, padded)), dense_of(plain))
        weighted = build(kind, it.objective, it.params, (x, y, weight))
        exact = dense_of(cx.GaussNewton(it.objective, it.params, (x, y, weight)))
        close(dense_of(weighted), exact)


# -- low rank ----------------------------------------------------------------------------------


def test_low_rank_is_kfac_where_the_factors_have_low_rank(all_sides_low_rank):
    """Three examples: the input factors of 9 and 8 have rank 3."""
    it = Network((8, 7, 7), 3, "softmax", seed=2)
    operator = build(cx.LowRankKronecker, it.objective, it.params, it.batch, rank=6)
    assert all(isinstance(m.input, LowRankFactor) for m in operator.matrices)
    sides = [sides_of(matrix) for matrix in operator.matrices]
    for matrix, reference in zip(sides, it.reference, strict=True):
        close(matrix["input"][0][0], reference.a, atol=1e-10)
        # Of the softmax's rank 6 for each of three examples.
        close(matrix["output"][1], np.trace(reference.g))
    close(sides[1]["output"][0][0], it.reference[1].g, atol=1e-10)


def test_as_many_columns_as_a_side_has_is_kfac(all_sides_low_rank):
    full = small_sides("KroneckerFactored")
    close(dense_of(small_sides("LowRankKronecker", rank=6, passes=1)), dense_of(full))


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_keeps_the_trace_of_every_factor(rank, all_sides_low_rank):
    it = mlp()
    operator = small_sides("LowRankKronecker", rank=rank, passes=1)
    for matrix, reference in zip(operator.matrices, it.reference, strict=True):
        assert isinstance(matrix.input, LowRankFactor) and isinstance(matrix.output, LowRankFactor)
        sides = sides_of(matrix)
        close(sides["input"][1], np.trace(reference.a))
        close(sides["output"][1], np.trace(reference.g))
    close(operator.trace(), np.trace(kron(it)))


def test_sides_up_to_a_limit_are_held_whole():
    operator = small_sides("LowRankKronecker", passes=1)
    close(dense_of(operator), dense_of(small_sides("KroneckerFactored")))


# -- embeddings, stacks, and other models --------------------------------------------------------


@pytest.mark.parametrize(
    "kind, name",
    [
        ("KroneckerFactored", "tied_embedding"),
        ("EigenvalueCorrected", "tied_embedding"),
        ("KroneckerFactored", "conv_grouped"),
        ("EigenvalueCorrected", "moe_einsum"),
    ],
)
def test_inverse_on_models_of_the_zoo(name, kind):
    model, predict, batch, loss = zoo.ZOO[name]()
    check_functions(build(getattr(cx, kind), cx.Objective(predict, loss), model, batch))


def test_embedding_has_no_dense_factor_of_the_size_of_its_vocabulary():
    words = 300
    params = {"e": jnp.ones((words, 2)), "w": jnp.ones((2, 3))}
    objective = cx.Objective(lambda p, t: p["e"][t] @ p["w"], cx.SoftmaxCrossEntropy())
    batch = (jnp.asarray([[1, 7], [7, 299]]), jnp.asarray([[0, 1], [2, 2]]))

    def largest(kind):
        def run(params, batch):
            inverse = kind(objective, params, batch).inverse(λ)
            return inverse.mv(params)

        closed = jax.make_jaxpr(run)(params, batch)
        return max(math.prod(v.aval.shape) for e in closed.jaxpr.eqns for v in e.outvars)

    for kind in (cx.KroneckerFactored, cx.EigenvalueCorrected):
        assert largest(kind) <= 8 * words
        operator = build(kind, objective, params, batch)
        matrix = operator.matrices[0]
        assert isinstance(matrix, Rotated if kind is cx.EigenvalueCorrected else Product)
        if isinstance(matrix, Product):
            assert isinstance(matrix.input, DiagonalFactor)
            close(matrix.input.entries[0, [1, 7, 299, 5]], [0.25, 0.5, 0.25, 0])


# -- as lineax operators -------------------------------------------------------------------------


def test_questions_of_lineax():
    operator = small_sides("KroneckerFactored")
    for each in (operator, operator.inverse(λ), operator.inverse(λ, "pi"), operator.sqrt()):
        assert lx.is_symmetric(each) and lx.is_positive_semidefinite(each)
        assert not lx.is_diagonal(each) and not lx.is_negative_semidefinite(each)
        assert each.T is each
        assert lx.linearise(each) is each
    dense = np.asarray(dense_of(operator))
    diagonal, materialised = eqx.filter_jit(lambda op: (lx.diagonal(op), lx.materialise(op)))(
        operator
    )
    close(diagonal, np.diagonal(dense))
    close(dense_of(materialised), dense)
    close(dense_of(operator + cx.Scaled(operator, 2.0)), 3 * dense)


def test_inverse_as_a_preconditioner_saves_steps():
    it = Network((8, 6), 60, "softmax")
    it.batch = (it.batch[0] * jnp.logspace(-2, 1, 8)[None], it.batch[1])
    vector = gradient_of(it.objective, it.params, it.batch)
    operator = cx.GaussNewton(it.objective, it.params, it.batch)

    @eqx.filter_jit
    def solve(preconditioner):
        options = {} if preconditioner is None else {"preconditioner": preconditioner.inverse(1e-3)}
        damped = cx.Damped(operator, 1e-3)
        solution = lx.linear_solve(damped, vector, cx.CG(rtol=1e-7), options=options)
        return solution.value, solution.stats["num_steps"]

    exact = oracles.damped_solve(dense_of(operator), 1e-3, vector)
    steps = []
    for kind in (None, cx.KroneckerFactored, cx.EigenvalueCorrected):
        made = None if kind is None else build(kind, it.objective, it.params, it.batch)
        value, count = solve(made)
        steps.append(int(count))
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-3, atol=1e-3), value, exact)
    assert max(steps[1:]) < 0.7 * steps[0], steps


# -- what is wrong is said -----------------------------------------------------------------------

WRONG = {
    "fisher": ({"fisher": "bogus"}, "fisher: got 'bogus'"),
    "sharing": ({"sharing": "bogus"}, "sharing: got 'bogus'"),
    "samples": ({"samples": 0}, "samples: got 0"),
    "key": ({"fisher": "mc"}, "key: got None"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["KroneckerFactored", "EigenvalueCorrected", "LowRankKronecker"])
def test_bad_arguments(kind, wrong, unchecked):
    it = mlp()
    options, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        getattr(cx, kind)(it.objective, it.params, it.batch, **options)


def test_bad_ranks_passes_and_flavours():
    it = mlp()
    make = functools.partial(cx.LowRankKronecker, it.objective, it.params, it.batch)
    for rank in (0, -1, 0.0, 1.5):
        with pytest.raises(ValueError, match=f"rank: got {rank}"):
            make(rank=rank)
    with pytest.raises(ValueError, match="passes: got 0"):
        make(passes=0)
    with pytest.raises(ValueError, match="fisher: got 'forward_only'"):
        cx.EigenvalueCorrected(it.objective, it.params, it.batch, fisher="forward_only")


def test_bad_vectors_batches_and_inverses(unchecked):
    it = mlp()
    operator = small_sides("KroneckerFactored")
    with pytest.raises(ValueError, match="vector"):
        operator.mv(it.params[:1])
    with pytest.raises(ValueError, match="how: got 'bogus', wanted one of 'exact', 'pi'"):
        operator.inverse(λ, "bogus")
    x, y = it.batch
    for kind in (cx.KroneckerFactored, cx.EigenvalueCorrected, cx.LowRankKronecker):
        with pytest.raises(ValueError, match="targets: got shape"):
            kind(it.objective, it.params, (x, y[:-1]))
        with pytest.raises(ValueError, match="x: the model could not be applied"):
            kind(it.objective, it.params, (x[:, :2], y))
