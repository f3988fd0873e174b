"""The small Equinox models of the experiments. A model sees one example."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

MODELS = ("mlp", "cnn")

IMAGE_WIDTHS = (128, 64)
TABLE_WIDTHS = (50, 50)


class MLP(eqx.Module):
    """A tanh network on the flattened example: 784-128-64-10 on 28×28 images in ten classes."""

    layers: list[eqx.nn.Linear]

    def __init__(self, sizes: tuple[int, ...], *, key: PRNGKeyArray):
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = [
            eqx.nn.Linear(fan_in, fan_out, dtype=jnp.float32, key=k)
            for fan_in, fan_out, k in zip(sizes, sizes[1:], keys, strict=False)
        ]

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " outputs"]:
        x = jnp.ravel(x)
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


class ConvNet(eqx.Module):
    """Two convolutions of stride 2, each with GroupNorm and ReLU, and a linear layer."""

    convolutions: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.GroupNorm]
    head: eqx.nn.Linear

    def __init__(
        self,
        size: int,
        outputs: int,
        channels: tuple[int, int] = (4, 8),
        *,
        key: PRNGKeyArray,
    ):
        first, second, last = jax.random.split(key, 3)
        narrow, wide = channels
        self.convolutions = [
            eqx.nn.Conv2d(1, narrow, 5, 2, padding=2, dtype=jnp.float32, key=first),
            eqx.nn.Conv2d(narrow, wide, 3, 2, padding=1, dtype=jnp.float32, key=second),
        ]
        self.norms = [eqx.nn.GroupNorm(2, n, dtype=jnp.float32) for n in channels]
        side = (size + 3) // 4  # halved twice, rounded up
        self.head = eqx.nn.Linear(wide * side * side, outputs, dtype=jnp.float32, key=last)

    def __call__(self, x: Float[Array, "size size"]) -> Float[Array, " outputs"]:
        x = x[None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = jax.nn.relu(norm(convolution(x)))
        return self.head(jnp.ravel(x))


def build(name: str, shape: tuple[int, ...], outputs: int, *, key: PRNGKeyArray) -> eqx.Module:
    """A model for examples of this shape.

    Raises:
        ValueError: There is no such model, or it does not take such examples.
    """
    if name == "mlp":
        hidden = IMAGE_WIDTHS if len(shape) > 1 else TABLE_WIDTHS
        return MLP((int(np.prod(shape)), *hidden, outputs), key=key)
    if name != "cnn":
        raise ValueError(f"No model is called {name!r}. There are: {', '.join(MODELS)}.")
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"cnn takes square images; the examples have shape {shape}. Use mlp.")
    return ConvNet(shape[0], outputs, key=key)


def count(model: eqx.Module) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
