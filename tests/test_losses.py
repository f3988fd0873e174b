import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curvax import losses as cl

from . import oracles, strategies

SEEDS = st.integers(0, 2**31)
BUILT_IN = tuple(kind for kind in strategies.LOSS_KINDS if "custom" not in kind)


def close(a, b, rtol=1e-10, atol=1e-10):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rtol, atol=atol)


def batch(kind, dtype=None, seed=0):
    return strategies.make_loss(kind, (3, 2), (4,), seed, dtype)


# -- values ----------------------------------------------------------------------------------


def test_values_by_hand():
    z, y = jnp.array([[1.0, -2.0]]), jnp.array([[0.0, 1.0]])
    close(cl.SquaredError().value(z, y), [5.0])
    close(cl.SquaredError(half=False).value(z, y), [10.0])
    close(cl.SquaredError(event_ndim=0).value(z, y), [[0.5, 4.5]])
    log_sum = math.log(math.e + math.exp(-2.0))
    close(cl.SoftmaxCrossEntropy().value(z, jnp.array([1])), [log_sum + 2.0])
    close(cl.SoftmaxCrossEntropy().value(z, y), [log_sum + 2.0])
    close(cl.SoftmaxCrossEntropy().value(z, 3.0 * y), [3.0 * (log_sum + 2.0)])
    sigmoid = math.log1p(math.e) + math.log1p(math.exp(-2.0)) + 2.0
    close(cl.SigmoidCrossEntropy().value(z, y), [sigmoid])
    close(cl.SigmoidCrossEntropy().value(z, y == 1), [sigmoid])
    close(cl.Poisson().value(z, jnp.array([[3, 0]])), [math.e - 3.0 + math.exp(-2.0)])
    close(cl.Gaussian().value(z, jnp.array([[2.0]])), [0.5 * (-2.0 + math.exp(2.0))])
    close(cl.CustomLoss(lambda z, y: jnp.dot(z, y)).value(z, y), [-2.0])


@given(strategies.losses())
def test_check_accepts_and_value_has_the_lead_shape(drawn):
    loss, outputs, targets = drawn
    loss.check(outputs, targets)
    loss.check(*jax.eval_shape(lambda: (outputs, targets)))
    jax.eval_shape(lambda z, y: loss.check(z, y), outputs, targets)
    event_ndim = outputs.ndim - 1 if loss.event_ndim is None else loss.event_ndim
    lead = outputs.shape[: outputs.ndim - event_ndim]
    value = jax.eval_shape(loss.value, outputs, targets)
    assert value.shape == lead == loss.lead_shape(outputs)


# -- derivatives -----------------------------------------------------------------------------


@eqx.filter_jit
def gradients(loss, outputs, targets):
    coordinates = loss.gradient_coordinates(outputs, targets)
    back = None if coordinates is None else loss.sqrt_product(outputs, targets, coordinates)
    reference = oracles.dense_event_gradient(loss, outputs, targets)
    return loss.gradient(outputs, targets), back, reference


@settings(max_examples=40)
@given(strategies.losses())
def test_gradient_and_its_coordinates(drawn):
    loss, outputs, targets = drawn
    gradient, back, reference = gradients(loss, outputs, targets)
    assert gradient.shape == outputs.shape
    close(gradient.reshape(reference.shape), reference)
    assert (back is None) == isinstance(loss, cl.CustomLoss)
    if back is not None:
        close(back, gradient)


def expected_curvature(loss, outputs, targets):
    """The dense curvature that the loss promises as S Sᵀ."""
    if isinstance(loss, cl.Gaussian):
        # The Hessian is quadratic in y, so two nodes integrate it: y = μ ± σ.
        mean, rho = jnp.split(outputs, 2, axis=-1)
        nodes = (mean + jnp.exp(0.5 * rho), mean - jnp.exp(0.5 * rho))
        return sum(oracles.dense_event_hessian(loss, outputs, node) for node in nodes) / 2
    hessian = oracles.dense_event_hessian(loss, outputs, targets)
    return hessian if loss.convex else oracles.clipped(hessian)


@eqx.filter_jit
def curvatures(loss, outputs, targets, vector):
    names = ("hessian_product", "sqrt_product", "sqrt_transpose_product", "fisher_product")
    maps = [oracles.materialised_event_map(name, loss, outputs, targets) for name in names]
    hessian = oracles.dense_event_hessian(loss, outputs, targets)
    expected = expected_curvature(loss, outputs, targets)
    return maps, hessian, expected, loss.sqrt_product(outputs, targets, vector)


@settings(max_examples=50)
@given(strategies.losses(), SEEDS)
def test_curvature_and_its_square_root(drawn, seed):
    loss, outputs, targets = drawn
    vector = np.random.default_rng(seed).standard_normal(outputs.shape)
    found = curvatures(loss, outputs, targets, jnp.asarray(vector, outputs.dtype))
    (hessian, root, transpose, fisher), dense, expected, product = jax.tree.map(np.asarray, found)
    close(hessian, dense)
    close(transpose, root.swapaxes(-1, -2))
    close(root @ root.swapaxes(-1, -2), expected)
    close(fisher, expected)
    # What the basis vectors, equal on all events, would not show: events that mix.
    flat = vector.reshape(root.shape[0], -1)
    close(product.reshape(flat.shape), np.einsum("eij,ej->ei", root, flat))


def test_events_without_label_weight_have_no_gradient_and_no_curvature():
    loss, outputs, _ = batch("softmax_soft")
    targets = jnp.zeros_like(outputs)
    for result in (
        loss.value(outputs, targets),
        loss.gradient(outputs, targets),
        loss.gradient_coordinates(outputs, targets),
        loss.sqrt_product(outputs, targets, outputs),
    ):
        close(result, jnp.zeros_like(result))


def test_custom_equals_built_in():
    built_in, outputs, targets = batch("softmax")
    custom = cl.CustomLoss(lambda z, y: jax.nn.logsumexp(z) - z[y])
    for method in ("hessian_product", "fisher_product"):
        products = [getattr(loss, method)(outputs, targets, outputs) for loss in (built_in, custom)]
        close(*products)


def test_custom_takes_a_pytree_of_targets():
    loss = cl.CustomLoss(lambda z, y: y["weight"] * jnp.sum((z - y["mean"]) ** 2))
    outputs = jnp.ones((3, 2, 4))
    targets = {"weight": jnp.full((3, 2), 2.0), "mean": jnp.zeros((3, 2, 4))}
    loss.check(outputs, targets)
    close(loss.value(outputs, targets), jnp.full((3, 2), 8.0))
    close(loss.gradient(outputs, targets), jnp.full((3, 2, 4), 4.0))
    targets["weight"] = jnp.ones((3,))
    with pytest.raises(ValueError, match=re.escape("targets['weight']: got shape (3,), wanted")):
        loss.check(outputs, targets)


# -- sampling --------------------------------------------------------------------------------


def standard_normal_sampler(key, outputs):
    return outputs + jax.random.normal(key, outputs.shape, outputs.dtype)


@pytest.mark.parametrize("kind", [*BUILT_IN, "custom"])
def test_samples_have_the_fisher_information(kind):
    loss, outputs, _ = strategies.make_loss(kind, (2,), (3,), seed=5)
    if kind == "custom":
        loss = cl.CustomLoss(
            lambda z, y: 0.5 * jnp.sum((z - y) ** 2), sampler=standard_normal_sampler
        )
    draws = 4000
    keys = jax.random.split(jax.random.key(1), draws)
    samples = jax.vmap(lambda key: loss.sample(key, outputs))(keys)
    loss.check(outputs, samples[0])
    gradients = jax.vmap(lambda y: loss.gradient(outputs, y))(samples)
    outer = gradients[..., :, None] * gradients[..., None, :]  # (draws, events, n, n)
    fisher = oracles.materialised_event_map("fisher_product", loss, outputs, samples[0])
    error = jnp.abs(outer.mean(0) - fisher)
    # Six standard errors of the mean: one entry in 1e9 is further out by chance.
    assert jnp.all(error <= 6.0 * outer.std(0) / draws**0.5 + 1e-12)
    score = jnp.abs(gradients.mean(0))
    assert jnp.all(score <= 6.0 * gradients.std(0) / draws**0.5 + 1e-12)


def test_sample_without_a_sampler():
    loss, outputs, _ = batch("custom")
    with pytest.raises(ValueError, match="sampler: got None, wanted a function"):
        loss.sample(jax.random.key(0), outputs)


# -- numbers ---------------------------------------------------------------------------------


def results(loss, outputs, targets):
    """Everything that a loss computes."""
    vector = jnp.ones_like(outputs)
    return {
        "value": loss.value(outputs, targets),
        "gradient": loss.gradient(outputs, targets),
        "coordinates": loss.gradient_coordinates(outputs, targets),
        "hessian": loss.hessian_product(outputs, targets, vector),
        "fisher": loss.fisher_product(outputs, targets, vector),
        "sqrt": loss.sqrt_product(outputs, targets, vector),
        "sqrt_transpose": loss.sqrt_transpose_product(outputs, targets, vector),
    }


compiled_results = eqx.filter_jit(results)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("kind", strategies.LOSS_KINDS)
def test_dtypes(kind, dtype):
    loss, outputs, targets = batch(kind, dtype)
    with jax.numpy_dtype_promotion("strict"):
        low = compiled_results(loss, outputs, targets)
    exact = compiled_results(loss, *jax.tree.map(wide, (outputs, targets)))
    for name, result in low.items():
        if result is None:
            continue
        assert result.dtype == (jnp.float32 if name == "value" else dtype)
        # Computed in float32, the results are rounded once. (For the custom loss eigh adds
        # √ε where an eigenvalue was clipped to 0.)
        eps = float(jnp.finfo(dtype).eps)
        tolerance = 2e-3 if kind == "custom_nonconvex" and "sqrt" in name else 2e-5
        close(result, exact[name], rtol=eps + tolerance, atol=tolerance)


def wide(x):
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_samples_are_not_rounded_to_low_precision(dtype):
    for kind in BUILT_IN:
        loss, outputs, _ = batch(kind, dtype)
        with jax.numpy_dtype_promotion("strict"):
            sample = loss.sample(jax.random.key(0), outputs)
        loss.check(outputs, sample)
        if kind not in ("softmax", "softmax_soft"):
            assert sample.dtype == (jnp.float32 if dtype == jnp.bfloat16 else dtype)


EXTREME = [
    (cl.SoftmaxCrossEntropy(), jnp.array([[80.0, -80.0, 0.0]]), jnp.array([0])),
    (cl.SoftmaxCrossEntropy(), jnp.array([[80.0, -80.0, 0.0]]), jnp.array([1])),
    (cl.SoftmaxCrossEntropy(), jnp.array([[80.0, -80.0]]), jnp.array([[0.3, 0.9]])),
    (cl.SoftmaxCrossEntropy(), jnp.array([[8.0, -jnp.inf]]), jnp.array([0])),
    (cl.SigmoidCrossEntropy(), jnp.array([[80.0, -80.0]]), jnp.array([[1.0, 0.0]])),
    (cl.SigmoidCrossEntropy(), jnp.array([[80.0, -80.0]]), jnp.array([[0, 1]])),
    (cl.SigmoidCrossEntropy(), jnp.array([[800.0, -800.0]]), jnp.array([[0.5, 0.5]])),
    (cl.Poisson(), jnp.array([[80.0, -80.0, -800.0]]), jnp.array([[1.0, 1.0, 1.0]])),
    (cl.Gaussian(), jnp.array([[1.0, 2.0, 80.0, -80.0]]), jnp.array([[0.0, 2.5]])),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize(("loss", "outputs", "targets"), EXTREME)
def test_extreme_outputs_are_finite_and_coordinates_exact(loss, outputs, targets, dtype):
    outputs = outputs.astype(dtype)
    found = compiled_results(loss, outputs, targets)
    for name, result in found.items():
        assert jnp.all(jnp.isfinite(result)), name
    # r² is finite as well: a Gram matrix of coordinates does not overflow.
    if not isinstance(loss, cl.Poisson | cl.Gaussian):  # there |∇ℓ| itself may be e^80
        assert jnp.all(jnp.isfinite(found["coordinates"] ** 2))
    back = loss.sqrt_product(outputs, targets, found["coordinates"])
    gradient = found["gradient"]
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    # The softmax gradient p − y is itself rounded at the scale of y.
    scale = float(jnp.abs(gradient).max()) if targets.ndim == 2 else 1.0
    close(back, gradient, rtol=tolerance, atol=tolerance * scale)


def test_gradient_keeps_its_relative_accuracy_at_confident_predictions():
    z = jnp.array([[80.0]], jnp.float32)
    close(cl.SigmoidCrossEntropy().gradient(z, jnp.array([[1]])), [[-np.exp(-80.0)]], 1e-5, 0.0)
    close(cl.SigmoidCrossEntropy().value(z, jnp.array([[1]])), [np.exp(-80.0)], 1e-5, 0.0)


# -- labels out of range ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("bad", [-1, -4, 4, 100, 2**32, 2**62])
def test_labels_out_of_range(dtype, bad):
    if not np.iinfo(dtype).min <= bad <= np.iinfo(dtype).max:
        pytest.skip("not a number of this dtype")
    loss, outputs, _ = strategies.make_loss("softmax", (3,), (4,), seed=0)
    targets = jnp.array([0, bad, 3], dtype)
    wanted = f"targets: got {bad} at index (1,), wanted values in [0, 3]"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        loss.check(outputs, targets)
    value, gradient = jax.jit(lambda z, y: (loss.value(z, y), loss.gradient(z, y)))(
        outputs, targets
    )
    np.testing.assert_array_equal(jnp.isnan(value), [False, True, False])
    assert jnp.all(jnp.isnan(gradient[1]))
    assert jnp.all(jnp.isfinite(gradient[jnp.array([0, 2])]))
    total = jax.jit(jax.grad(lambda z: loss.value(z, targets).sum()))(outputs)
    assert jnp.any(jnp.isnan(total[1]))


def test_small_integer_dtypes_with_more_classes_than_they_count():
    loss = cl.SoftmaxCrossEntropy()
    outputs = jnp.zeros((2, 300))
    close(loss.value(outputs, jnp.array([5, 44], jnp.uint8)), [math.log(300)] * 2)
    assert loss.gradient(outputs, jnp.array([5, 44], jnp.uint8))[0, 261] > 0  # 261 = 5 + 256


@pytest.mark.parametrize(
    ("loss", "bad", "wanted"),
    [(cl.SigmoidCrossEntropy(), 2, "[0, 1]"), (cl.Poisson(), -1, "[0, inf]")],
)
def test_integer_targets_out_of_range(loss, bad, wanted):
    outputs = jnp.zeros((2, 3))
    targets = jnp.zeros((2, 3), jnp.int32).at[1, 2].set(bad)
    message = f"targets: got {bad} at index (1, 2), wanted values in {wanted}"
    with pytest.raises(ValueError, match=re.escape(message)):
        loss.check(outputs, targets)
    with pytest.raises(ValueError, match=re.escape("at index (1, 2), wanted values in")):
        loss.check(outputs, targets.astype(jnp.bfloat16))
    value, gradient = jax.jit(lambda y: (loss.value(outputs, y), loss.gradient(outputs, y)))(
        targets
    )
    np.testing.assert_array_equal(jnp.isnan(value), [False, True])
    assert jnp.isnan(gradient).sum() == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_nan_targets_pass_the_check(dtype):
    for loss in (cl.SquaredError(), cl.SigmoidCrossEntropy(), cl.SoftmaxCrossEntropy()):
        loss.check(jnp.zeros((2, 3)), jnp.full((2, 3), jnp.nan, dtype))


# -- refused arguments -----------------------------------------------------------------------


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


SOFTMAX, GAUSSIAN = cl.SoftmaxCrossEntropy(), cl.Gaussian()
SUM = cl.CustomLoss(lambda z, y: z)
REFUSED = [
    (SOFTMAX, floats(128, 10), ints(1), "targets: got shape (1,), wanted (128,)"),
    (SOFTMAX, floats(128, 10), ints(64), "targets: got shape (64,), wanted (128,)"),
    (SOFTMAX, floats(128, 10), ints(128, 1), "targets: got shape (128, 1), wanted (128,)"),
    (SOFTMAX, floats(8, 5, 10), ints(8), "targets: got shape (8,), wanted (8, 5)"),
    (SOFTMAX, floats(8, 10), ints(8, 10), "targets: got shape (8, 10), wanted (8,)"),
    (SOFTMAX, floats(8, 10), floats(1, 10), "targets: got shape (1, 10), wanted (8, 10)"),
    (SOFTMAX, floats(8, 10), floats(8), "targets: got shape (8,), wanted (8, 10)"),
    (SOFTMAX, floats(8, 10), [0] * 8, "targets: got list, wanted an array"),
    (SOFTMAX, floats(10), ints(), "outputs: got shape (10,), wanted a batch axis and 1 event"),
    (SOFTMAX, floats(0, 10), ints(0), "outputs: got shape (0, 10), wanted at least one entry"),
    (SOFTMAX, ints(8, 10), ints(8), "outputs: got dtype int32, wanted a floating dtype"),
    (cl.SquaredError(), floats(8, 2), floats(1, 2), "targets: got shape (1, 2), wanted (8, 2)"),
    (cl.SquaredError(), floats(8, 1), floats(8), "targets: got shape (8,), wanted (8, 1)"),
    (cl.SquaredError(), floats(), floats(), "outputs: got shape (), wanted a batch axis"),
    (cl.SquaredError(), floats(0, 2), floats(0, 2), "outputs: got shape (0, 2), wanted at least"),
    (cl.SquaredError(), ints(8, 2), ints(8, 2), "outputs: got dtype int32, wanted a floating"),
    (
        cl.SquaredError(),
        floats(8),
        jax.ShapeDtypeStruct((8,), jnp.complex64),
        "targets: got dtype complex64, wanted a floating, integer or bool dtype",
    ),
    (cl.SquaredError(), [1.0], floats(1), "outputs: got list, wanted an array"),
    (cl.SigmoidCrossEntropy(), floats(8, 2), ints(8), "targets: got shape (8,), wanted (8, 2)"),
    (cl.Poisson(), floats(8, 2), ints(1, 2), "targets: got shape (1, 2), wanted (8, 2)"),
    (GAUSSIAN, floats(8, 3), floats(8, 1), "outputs: got shape (8, 3), wanted a last axis of even"),
    (GAUSSIAN, floats(8, 4), floats(8, 4), "targets: got shape (8, 4), wanted (8, 2)"),
    (GAUSSIAN, floats(8, 4), floats(1, 2), "targets: got shape (1, 2), wanted (8, 2)"),
    (SUM, floats(8, 4), floats(1, 4), "targets: got shape (1, 4), wanted (8, ...)"),
    (SUM, floats(8, 4), floats(8, 4), "fn's result: got shape (4,), wanted () (a scalar"),
    (SUM, floats(8, 4), {"a": 3.0}, "targets['a']: got float, wanted an array"),
]


@pytest.mark.parametrize(("loss", "outputs", "targets", "message"), REFUSED)
def test_refused(loss, outputs, targets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loss.check(outputs, targets)


def test_negative_soft_label():
    with pytest.raises(ValueError, match=re.escape("targets: got -0.5 at index (1, 0), wanted")):
        SOFTMAX.check(jnp.zeros((2, 2)), jnp.array([[1.0, 0.0], [-0.5, 1.5]]))


def test_negative_event_ndim():
    with pytest.raises(ValueError, match="event_ndim: got -1, wanted None or at least 0"):
        cl.SquaredError(event_ndim=-1)


# -- modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", strategies.LOSS_KINDS)
def test_a_loss_is_a_static_argument(kind):
    loss, outputs, targets = batch(kind)
    assert jax.tree.leaves(loss) == []
    jitted = jax.jit(lambda loss, z, y: loss.value(z, y))(loss, outputs, targets)
    close(jitted, loss.value(outputs, targets))
    assert isinstance(loss, eqx.Module) and hash(loss) == hash(batch(kind)[0])
