"""Convolutions rewritten for loops on the CPU compute what they computed before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax._convolution import loop_safe

LAYOUTS = {
    1: ("NCW", "OIW", "NCW"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NCDHW", "OIDHW", "NDHWC"),
}


def arrays(dims, groups):
    rng = np.random.default_rng(0)
    sizes = (6, 5, 4)[:dims]
    shape = {"N": 2, "C": 4} | dict(zip("DHW"[-dims:], sizes, strict=True))
    kernel = {"O": 6, "I": 4 // groups} | dict.fromkeys("DHW"[-dims:], 3)
    lhs, rhs, _ = LAYOUTS[dims]
    return (
        jnp.asarray(rng.standard_normal([shape[axis] for axis in lhs])),
        jnp.asarray(rng.standard_normal([kernel[axis] for axis in rhs])),
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "window",
    [{}, {"window_strides": 2}, {"lhs_dilation": 2}, {"rhs_dilation": 2}],
    ids=["plain", "strided", "transposed", "dilated"],
)
def test_convolution_and_its_gradients(dims, groups, window):
    window = {"window_strides": 1} | window
    options = {name: (value,) * dims for name, value in window.items()}

    @jax.jit
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            padding=[(1, 1)] * dims,
            dimension_numbers=LAYOUTS[dims],
            feature_group_count=groups,
            **options,
        )

    def loss(x, w):
        return jnp.sum(jnp.sin(convolve(x, w)))

    x, w = arrays(dims, groups)
    np.testing.assert_allclose(loop_safe(convolve)(x, w), convolve(x, w), rtol=1e-12)
    gradient = jax.grad(loss, argnums=(0, 1))
    for ours, plain in zip(loop_safe(gradient)(x, w), gradient(x, w), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-9, atol=1e-12)


def layouts(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield tuple(eqn.params["dimension_numbers"])
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from layouts(value.jaxpr)


def test_every_convolution_is_brought_into_the_layout_of_the_fast_kernels(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    x, w = arrays(2, 1)
    x = jnp.moveaxis(x, 3, 1)

    def value(x, w):
        convolved = jax.jit(
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW")
            )
        )(x, w)
        return jnp.sum(convolved**2)

    gradient = jax.grad(value, argnums=(0, 1))
    before = set(layouts(jax.make_jaxpr(gradient)(x, w).jaxpr))
    after = set(layouts(jax.make_jaxpr(loop_safe(gradient))(x, w).jaxpr))
    assert len(before) == 3
    assert after == {((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))}


def test_other_backends_and_programs_without_convolutions_are_left_alone(monkeypatch):
    tree = {"a": jnp.arange(3.0), "b": (jnp.ones(2),)}
    double = loop_safe(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree))
    assert jax.tree.structure(double(tree)) == jax.tree.structure(tree)
    np.testing.assert_array_equal(double(tree)["a"], 2 * tree["a"])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loop_safe(len) is len
