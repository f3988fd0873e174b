"""Muon and what it is composed with: equal to Optax's, to NumPy's, and to singular values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import curvax as cx
from curvax.methods import kfac, muon, newton_muon, soap_muon
from curvax.orthogonal import QUINTIC, newton_schulz, orthogonalized
from tests.references import muon as reference
from tests.references import shampoo as shampoo_reference

STEPS, RATE = 10, 0.05
SHAPES = {"wide": (4, 9), "tall": (11, 4), "square": (5, 5), "row": (1, 3), "bias": (7,)}
DION = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037))


def close(got, wanted, rtol=1e-8, atol=1e-10):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, wanted)


def beginning(shapes):
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def gradient(theta, t):
    """Of a quadratic, with noise."""
    noise = {
        name: np.random.default_rng((2, i, t)).standard_normal(leaf.shape)
        for i, (name, leaf) in enumerate(theta.items())
    }
    return {name: 0.3 * leaf + noise[name] for name, leaf in theta.items()}


def descent(directions, shapes=SHAPES, steps=STEPS):
    """The path of a function of gradient and step."""
    theta, path = beginning(shapes), []
    for t in range(steps):
        path.append(directions(gradient(theta, t)))
        theta = {name: leaf - RATE * np.asarray(path[-1][name]) for name, leaf in theta.items()}
    return path


def of_optax(optimizer, shapes=SHAPES):
    """The directions of a transformation, one compiled function of the gradient."""
    params = jax.tree.map(jnp.asarray, beginning(shapes))
    state, update = optimizer.init(params), jax.jit(optimizer.update)

    def step(grads):
        nonlocal state
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        return jax.tree.map(np.asarray, updates)

    return step


def of_numpy(rules):
    return lambda grads: {name: rule.step(grads[name]) for name, rule in rules.items()}


OPTIONS = {
    "default": {},
    "no_nesterov": {"nesterov": False},
    "momentum": {"momentum": 0.7},
    "rms": {"rms": 0.2},
    "coefficients": {"coefficients": DION},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_ten_steps_are_those_of_numpy_and_of_optax(name):
    options = OPTIONS[name]
    got = descent(of_optax(muon(**options)))
    nesterov = options.get("nesterov", True)
    rules = {
        key: reference.Muon(shape, **options)
        if len(shape) == 2
        else reference.Adam(nesterov=nesterov)
        for key, shape in SHAPES.items()
    }
    close(got, descent(of_numpy(rules)))
    names = {"momentum": "beta", "rms": "consistent_rms", "coefficients": "ns_coeffs"}
    peer = {names.get(key, key): value for key, value in options.items()}
    if "ns_coeffs" in peer:
        peer["ns_steps"] = len(DION)
    close(got, descent(of_optax(optax.contrib.muon(-1.0, **peer))))


def test_a_learning_rate_of_its_own_for_the_rest():
    rest = optax.chain(optax.scale_by_adam(0.8, 0.95, nesterov=True), optax.scale(0.3))
    peer = optax.contrib.muon(-1.0, adam_b1=0.8, adam_b2=0.95, adam_learning_rate=-0.3)
    close(descent(of_optax(muon(rest=rest))), descent(of_optax(peer)))


# For each leaf its shape, the names of its axes, and the same in Optax's words.
SPECS = {
    "qkv": ((5, 3, 4), "in heads out", MuonDimensionNumbers(0, 2)),
    "fused": ((5, 3, 4), "in out out", MuonDimensionNumbers(0, (1, 2))),
    "output": ((3, 4, 5), "in in out", MuonDimensionNumbers((0, 1), 2)),
    "kernel": ((6, 2, 3, 2), "out in in in", MuonDimensionNumbers((1, 2, 3), 0)),
    "layers": ((3, 4, 7), "layers ...", MuonDimensionNumbers(1, 2)),
    "experts": ((2, 3, 4, 5), "layers experts ...", MuonDimensionNumbers(2, 3)),
    "equinox": ((6, 3), "out in", MuonDimensionNumbers(1, 0)),
    "embed": ((9, 4), None, None),
    "plain": ((6, 3), None, MuonDimensionNumbers(0, 1)),
}


def test_axes_are_those_of_dimension_numbers():
    shapes = {name: shape for name, (shape, _, _) in SPECS.items()}
    axes = {name: words for name, (_, words, _) in SPECS.items() if name != "plain"}
    numbers = {name: each for name, (_, _, each) in SPECS.items()}
    peer = optax.contrib.muon(-1.0, muon_weight_dimension_numbers=numbers)
    close(
        descent(of_optax(muon(axes=axes), shapes), shapes), descent(of_optax(peer, shapes), shapes)
    )


def test_layers_in_one_array_are_layers():
    """Weights, biases and all, with a matrix for each layer."""
    apart = {"w0": (4, 9), "w1": (4, 9), "b0": (9,), "b1": (9,)}
    wanted = of_optax(muon(), apart)
    got = of_optax(muon(axes={"w": "layers ...", "b": "layers ..."}), {"w": (2, 4, 9), "b": (2, 9)})
    for t in range(3):
        grads = gradient(beginning(apart), t)
        each = wanted(grads)
        both = lambda tree: {k: np.stack([tree[f"{k}{i}"] for i in range(2)]) for k in "wb"}
        close(got(both(grads)), both(each))


# -- the iteration -------------------------------------------------------------------------------


def decaying(rows, columns, seed=0):
    """With singular values from 1 down to 1e-8."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, rows)))[0] for n in (rows, columns))
    return (left * np.logspace(0, -8, rows)) @ right.T


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
@pytest.mark.parametrize("shape", [(6, 6), (6, 8), (6, 9), (30, 6), (1, 1)])
def test_iteration_is_a_polynomial_of_the_singular_values(shape, steps):
    """Of square matrices, of wide ones, where it is taken with the Gram matrix, and of tall."""
    coefficients = (*DION, *(QUINTIC,) * 5)[:steps]
    stack = np.random.default_rng(0).standard_normal((2, *shape))
    got = newton_schulz(jnp.asarray(stack), coefficients, eps=1e-3)
    wanted = [reference.orthogonal(each, coefficients, 1e-3) for each in stack]
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.parametrize("dtype, error", [("float32", 3e-5), ("bfloat16", 0.17)])
def test_iteration_in_low_precision(columns, dtype, error):
    """Whatever the singular values, none blows up. In bfloat16 rounding leaves the tiny ones
    anything; without them the error is a third, and that of the usual iteration twice as large.
    """
    rng = np.random.default_rng(0)
    matrices = rng.standard_normal((64, columns)), decaying(64, columns)
    for matrix in matrices:
        exact = reference.orthogonal(matrix)
        got = newton_schulz(jnp.asarray(matrix, jnp.float32), dtype=jnp.dtype(dtype))
        assert got.dtype == jnp.float32
        off = np.asarray(got, np.float64) - exact
        limit = error if matrix is matrices[1] else error / 3
        assert np.linalg.norm(off) < limit * np.linalg.norm(exact)
        assert np.linalg.svd(got, compute_uv=False)[0] < 1.25


def test_iteration_of_zeros_and_of_tiny_matrices():
    matrix = np.random.default_rng(0).standard_normal((1, 4, 5))
    for scale in (0.0, 1e-17, 1e-20, 1e-30):
        got = newton_schulz(jnp.asarray(scale * matrix, jnp.float32))
        wanted = reference.orthogonal(matrix[0]) if scale == 1e-17 else np.zeros((4, 5))
        np.testing.assert_allclose(got[0], wanted, atol=1e-5)
    assert np.isnan(newton_schulz(jnp.full((2, 2), jnp.nan))).all()


def lowered(device, kind, **options):
    x = jax.ShapeDtypeStruct((4, 8), kind)
    traced = jax.jit(functools.partial(newton_schulz, **options)).trace(x)
    return traced.lower(lowering_platforms=(device,)).as_text()


def test_products_are_in_bfloat16_where_it_is_customary():
    assert "bf16" in lowered("cuda", jnp.float32)
    assert "bf16" in lowered("tpu", jnp.float32)
    for device, kind, options in (
        ("cpu", jnp.float32, {}),
        ("cuda", jnp.float64, {}),
        ("cuda", jnp.float32, {"dtype": jnp.float32}),
    ):
        text = lowered(device, kind, **options)
        assert "dot_general" in text and "bf16" not in text
    assert "bf16" in lowered("cpu", jnp.float32, dtype=jnp.bfloat16)


def test_several_shapes():
    """Each as if it were alone, also where the larger number decides how the steps are taken."""
    rng = np.random.default_rng(0)
    shapes = (2, 6, 20), (9, 20, 6), (3, 6, 6), (1, 5, 7), (2, 6, 20)
    stacks = [rng.standard_normal(shape) for shape in shapes]
    got = orthogonalized([jnp.asarray(stack) for stack in stacks], eps=1e-3)
    for each, stack in zip(got, stacks, strict=True):
        wanted = [reference.orthogonal(one, eps=1e-3) for one in stack]
        np.testing.assert_allclose(each, wanted, rtol=1e-9, atol=1e-9)


def test_matrices_of_equal_sides_are_iterated_together():
    def products(*shapes):
        optimizer = muon()
        params = {str(i): jnp.ones(shape) for i, shape in enumerate(shapes)}
        with jax.numpy_dtype_promotion("standard"):
            traced = jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params)
        return str(traced).count("dot_general")

    one = products((4, 9))
    assert one > 4 and products((4, 9), (4, 9)) == one
    # Twice A, and twice what is made of it times X.
    assert products((4, 9), (9, 4), (4, 8)) == one + 8
    assert products((4, 9), (5, 9)) == 2 * one


def test_cost_of_wide_matrices():
    """The iteration with the Gram matrix has the operations that its docstring says."""

    def operations(m, n):
        cost = jax.jit(newton_schulz).lower(jnp.ones((m, n))).compile().cost_analysis()
        return cost["flops"]

    m = 48
    assert operations(m, 4 * m) == pytest.approx((8 * 4 + 28) * m**3, rel=0.1)
    assert operations(m, m) == pytest.approx(30 * m**3, rel=0.1)


# -- compositions --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"every": 1}, {"every": 3, "one_sided": True}])
def test_soap_muon_orthogonalises_the_direction_of_soap(options):
    shapes = {"wide": (4, 5), "tall": (5, 4), "bias": (5,)}  # one more: a null space is a line
    soap = cx.EigenbasisAdam(
        b1=0.9, refresh_every=options["every"], one_sided=options.get("one_sided", False)
    )
    got = descent(of_optax(soap_muon(adam=soap), shapes), shapes)
    rules = {
        name: shampoo_reference.Soap(shape[::-1], b1=0.9, **options)
        for name, shape in shapes.items()
        if name != "bias"
    }
    adam = reference.Adam(b1=0.9, b2=0.95, nesterov=False)

    def directions(grads):
        steps = {"bias": adam.step(grads["bias"])}
        for name, rule in rules.items():
            factor = 0.2 * np.sqrt(max(shapes[name]))
            steps[name] = factor * reference.orthogonal(rule.step(grads[name].T), eps=1e-30).T
        return {name: steps[name] for name in shapes}

    close(got, descent(directions, shapes))


def test_muon_with_shampoos_factors():
    shapes = {"wide": (4, 9), "tall": (7, 3)}
    roots = cx.KroneckerRoots(cx.EighRoot(), decay=0.9, refresh_every=2, early=False)
    got = descent(of_optax(muon(preconditioner=roots), shapes), shapes)
    rules = {
        name: (shampoo_reference.Shampoo(shape, decay=0.9, every=2), reference.Muon(shape))
        for name, shape in shapes.items()
    }
    chained = lambda grads: {k: b.step(a.step(grads[k])) for k, (a, b) in rules.items()}
    close(got, descent(chained, shapes), rtol=1e-7)


def linear_problem():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.standard_normal((16, 4))), jnp.asarray(rng.integers(0, 3, 16))
    params = {"w": jnp.asarray(rng.standard_normal((3, 4)))}
    predict = lambda params, x: params["w"] @ x
    return cx.Objective(predict, cx.SoftmaxCrossEntropy(), example=batch), params, batch


@pytest.mark.parametrize("sides", ["inputs", "both"])
def test_muon_in_the_metric_of_the_factors_of_kfac(sides):
    """Ten steps: the momentum of what K-FAC makes of the gradient, and its orthogonal factor."""
    objective, params, batch = linear_problem()
    build = newton_muon if sides == "inputs" else functools.partial(kfac, fisher="exact")
    make = lambda scaling: build(
        objective, rank=None, damping=0.03, refresh_every=3, scaling=scaling
    )
    plain = make(cx.AsIs())
    method = make(cx.Orthogonalised(momentum=0.9))
    run = [jax.jit(lambda *a, m=m: m.update(*a, batch=batch)) for m in (plain, method)]
    states = [m.init(params) for m in (plain, method)]
    average = np.zeros((3, 4))
    value_and_grad = jax.jit(jax.grad(objective.value))
    w = params["w"]
    for _ in range(STEPS):
        grads = value_and_grad({"w": w}, batch)
        natural, states[0] = run[0](grads, states[0], {"w": w})
        updates, states[1] = run[1](grads, states[1], {"w": w})
        natural = np.asarray(natural["w"])
        average = natural + 0.9 * average
        wanted = 2 * reference.orthogonal(natural + 0.9 * average, eps=1e-30)
        np.testing.assert_allclose(updates["w"], wanted, rtol=1e-8, atol=1e-10)
        w = w - 0.3 * updates["w"]


# -- arguments -----------------------------------------------------------------------------------


def test_bad_arguments_are_named(unchecked):
    with pytest.raises(ValueError, match=r"momentum: got 1.0, wanted a number in \[0, 1\)"):
        muon(momentum=1.0)
    with pytest.raises(ValueError, match=r"rms: got 0.0, wanted a positive number or None"):
        muon(rms=0.0)
    with pytest.raises(ValueError, match=r"coefficients: got \(\(1.5, -0.5\),\), wanted"):
        muon(coefficients=((1.5, -0.5),))
    with pytest.raises(ValueError, match=r"dtype: got float16, wanted one with the range of"):
        muon(dtype=jnp.float16)
    rule = cx.NewtonSchulz()
    with pytest.raises(ValueError, match=r"tensors of shape \(3,\), wanted matrices"):
        cx.tensorwise.tensorwise(rule, cx.Layouts.of()).init({"b": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"axes: got 'in out' for \['w'\], whose shape is"):
        muon(axes={"w": "in out"}).init({"w": jnp.zeros((2, 3, 4))})
