"""The small Equinox models of the experiments. A model sees one example."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

MODELS = ("mlp", "cnn", "autoencoder", "transformer")
# What methods of gradients alone are told of the axes of leaves: kernels of convolutions are
# matrices, and what is looked up and what gives the outputs is left to Adam, as is customary.
AXES = {
    "cnn": {f".convolutions[{i}].weight": "out in in in" for i in range(2)},
    "transformer": {".tokens": None, ".positions": None, ".head": None},
}

IMAGE_WIDTHS = (128, 64)
TABLE_WIDTHS = (50, 50)
CODE_WIDTHS = (256, 64, 16, 64, 256)


class MLP(eqx.Module):
    """A tanh network on the flattened example: 784-128-64-10 on 28×28 images in ten classes."""

    layers: list[eqx.nn.Linear]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        sizes: tuple[int, ...],
        activation: Callable[[Array], Array] = jnp.tanh,
        *,
        key: PRNGKeyArray,
    ):
        self.activation = activation
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = [
            eqx.nn.Linear(fan_in, fan_out, dtype=jnp.float32, key=k)
            for fan_in, fan_out, k in zip(sizes, sizes[1:], keys, strict=False)
        ]

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " outputs"]:
        x = jnp.ravel(x)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
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


class Block(eqx.Module):
    """Causal attention and a GELU network four times as wide, each on a norm of its input."""

    attention_norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp_norm: eqx.nn.LayerNorm
    widen: eqx.nn.Linear
    narrow: eqx.nn.Linear

    def __init__(self, width: int, heads: int, *, key: PRNGKeyArray):
        first, second, last = jax.random.split(key, 3)
        self.attention_norm = eqx.nn.LayerNorm(width, dtype=jnp.float32)
        self.attention = eqx.nn.MultiheadAttention(heads, width, dtype=jnp.float32, key=first)
        self.mlp_norm = eqx.nn.LayerNorm(width, dtype=jnp.float32)
        self.widen = eqx.nn.Linear(width, 4 * width, dtype=jnp.float32, key=second)
        self.narrow = eqx.nn.Linear(4 * width, width, dtype=jnp.float32, key=last)

    def __call__(self, x: Float[Array, "length width"]) -> Float[Array, "length width"]:
        causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
        z = jax.vmap(self.attention_norm)(x)
        x = x + self.attention(z, z, z, mask=causal)
        z = jax.vmap(self.mlp_norm)(x)
        return x + jax.vmap(self.narrow)(jax.nn.gelu(jax.vmap(self.widen)(z)))


class Transformer(eqx.Module):
    """A decoder with learned positions, and a head of its own: at each position the next token."""

    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(
        self,
        length: int,
        vocabulary: int,
        layers: int = 2,
        width: int = 64,
        heads: int = 4,
        *,
        key: PRNGKeyArray,
    ):
        first, second, last, *keys = jax.random.split(key, 3 + layers)
        self.tokens = eqx.nn.Embedding(vocabulary, width, dtype=jnp.float32, key=first)
        self.positions = eqx.nn.Embedding(length, width, dtype=jnp.float32, key=second)
        self.blocks = [Block(width, heads, key=k) for k in keys]
        self.norm = eqx.nn.LayerNorm(width, dtype=jnp.float32)
        self.head = eqx.nn.Linear(width, vocabulary, dtype=jnp.float32, key=last)

    def __call__(self, ids: Int[Array, " length"]) -> Float[Array, "length vocabulary"]:
        x = jax.vmap(self.tokens)(ids) + jax.vmap(self.positions)(jnp.arange(len(ids)))
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def build(name: str, shape: tuple[int, ...], outputs: int, *, key: PRNGKeyArray) -> eqx.Module:
    """A model for examples of this shape.

    Raises:
        ValueError: There is no such model, or it does not take such examples.
    """
    if name == "mlp":
        hidden = IMAGE_WIDTHS if len(shape) > 1 else TABLE_WIDTHS
        return MLP((int(np.prod(shape)), *hidden, outputs), key=key)
    if name == "autoencoder":
        return MLP((int(np.prod(shape)), *CODE_WIDTHS, outputs), key=key)
    if name == "transformer":
        if len(shape) != 1:
            raise ValueError(f"transformer takes a row of ids; the examples have shape {shape}.")
        return Transformer(shape[0], outputs, key=key)
    if name != "cnn":
        raise ValueError(f"No model is called {name!r}. There are: {', '.join(MODELS)}.")
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"cnn takes square images; the examples have shape {shape}. Use mlp.")
    return ConvNet(shape[0], outputs, key=key)


def count(model: eqx.Module) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
