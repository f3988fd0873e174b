"""Models as people write them, none knowing anything of curvax: tiny, deterministic, of any dtype.

`ZOO[name](dtype)` is an `Example`. `predict(model, x)` is for one example; `loss` says which of
the axes of its outputs are events. Under the settings of `conftest` there is no implicit
broadcasting of ranks, hence each `bias[None]`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from curvax import losses as cl


class Example(NamedTuple):
    model: Any
    predict: Callable[[Any, Any], jax.Array]
    batch: tuple
    loss: cl.AbstractLoss


ZOO: dict[str, Callable[..., Example]] = {}


def _entry(build):
    ZOO[build.__name__] = build
    return build


# -- data and parameters ---------------------------------------------------------------------


class _Draw:
    """Arrays of one dtype, one after the other from one seed."""

    def __init__(self, seed: int, dtype):
        self.rng, self.dtype = np.random.default_rng(seed), dtype

    def normal(self, *shape: int, scale: float = 1.0):
        return jnp.asarray(scale * self.rng.standard_normal(shape), self.dtype)

    def weight(self, *shape: int, fan_in: int | None = None):
        """Scaled by the fan-in, which is the last axis but one if not given."""
        return self.normal(*shape, scale=1 / math.sqrt(fan_in or shape[-2]))

    def shift(self, *shape: int):
        """A bias: small, and not zero."""
        return self.normal(*shape, scale=0.1)

    def gain(self, *shape: int):
        """The scale of a norm: close to one."""
        return 1 + self.normal(*shape, scale=0.1)

    def integers(self, high: int, *shape: int):
        return jnp.asarray(self.rng.integers(high, size=shape))


def _labelled(draw, classes: int, size: int, *shape: int):
    return (draw.normal(size, *shape), draw.integers(classes, size)), cl.SoftmaxCrossEntropy()


def _valued(draw, outputs: int, size: int, *shape: int):
    return (draw.normal(size, *shape), draw.normal(size, outputs)), cl.SquaredError()


def _sequences(draw, classes: int, size: int, length: int, width: int):
    """Inputs (length, width), with one label for each position."""
    batch = draw.normal(size, length, width), draw.integers(classes, size, length)
    return batch, cl.SoftmaxCrossEntropy()


def _language(draw, vocabulary: int, size: int, length: int):
    """Tokens, and at each position the next."""
    tokens = draw.integers(vocabulary, size, length + 1)
    return (tokens[:, :-1], tokens[:, 1:]), cl.SoftmaxCrossEntropy()


def _cast(model, dtype):
    """Drawn in the default dtype, so that a model has the same parameters in any other."""
    return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, model)


def call(model, x):
    return model(x)


# -- Equinox ---------------------------------------------------------------------------------


@_entry
def mlp(dtype=jnp.float64):
    model = eqx.nn.MLP(4, 3, 6, 2, activation=jax.nn.silu, key=jax.random.key(0))
    return Example(_cast(model, dtype), call, *_labelled(_Draw(0, dtype), 3, 6, 4))


class Cnn(eqx.Module):
    first: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    second: eqx.nn.Conv2d
    readout: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(2, 4, 3, padding=1, key=keys[0])
        self.norm = eqx.nn.GroupNorm(2, 4)
        self.second = eqx.nn.Conv2d(4, 4, 3, stride=2, use_bias=False, key=keys[1])
        self.readout = eqx.nn.Linear(16, 3, key=keys[2])

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.first(x)))
        return self.readout(jnp.tanh(self.second(x)).reshape(-1))


@_entry
def cnn_groupnorm(dtype=jnp.float64):
    model = Cnn(jax.random.key(1))
    return Example(_cast(model, dtype), call, *_labelled(_Draw(1, dtype), 3, 4, 2, 6, 6))


class TransformerBlock(eqx.Module):
    attention_norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp_norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, width, key):
        first, second = jax.random.split(key)
        self.attention_norm = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(
            2, width, use_query_bias=True, use_output_bias=True, key=first
        )
        self.mlp_norm = eqx.nn.LayerNorm(width)
        self.mlp = eqx.nn.MLP(width, width, 2 * width, 1, activation=jax.nn.gelu, key=second)

    def __call__(self, h):
        normed = jax.vmap(self.attention_norm)(h)
        causal = jnp.tril(jnp.ones((h.shape[0], h.shape[0]), bool))
        h = h + self.attention(normed, normed, normed, mask=causal)
        return h + jax.vmap(lambda one: self.mlp(self.mlp_norm(one)))(h)


class Transformer(eqx.Module):
    tokens: eqx.nn.Embedding
    positions: jax.Array
    blocks: list[TransformerBlock]
    norm: eqx.nn.LayerNorm
    readout: eqx.nn.Linear

    def __init__(self, vocabulary, length, width, depth, key):
        first, second, third, *rest = jax.random.split(key, 3 + depth)
        self.tokens = eqx.nn.Embedding(vocabulary, width, key=first)
        self.positions = 0.1 * jax.random.normal(second, (length, width))
        self.blocks = [TransformerBlock(width, k) for k in rest]
        self.norm = eqx.nn.LayerNorm(width)
        self.readout = eqx.nn.Linear(width, vocabulary, use_bias=False, key=third)

    def __call__(self, tokens):
        h = jax.vmap(self.tokens)(tokens) + self.positions
        for block in self.blocks:
            h = block(h)
        return jax.vmap(lambda one: self.readout(self.norm(one)))(h)


@_entry
def transformer(dtype=jnp.float64):
    model = Transformer(5, 4, 8, 2, jax.random.key(2))
    return Example(_cast(model, dtype), call, *_language(_Draw(2, dtype), 5, 3, 4))


class Gru(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(3, 5, key=first)
        self.readout = eqx.nn.Linear(5, 2, key=second)

    def __call__(self, xs):
        start = jnp.zeros((5,), xs.dtype)
        last, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), start, xs)
        return self.readout(last)


@_entry
def gru(dtype=jnp.float64):
    model = Gru(jax.random.key(3))
    return Example(_cast(model, dtype), call, *_valued(_Draw(3, dtype), 2, 4, 6, 3))


class Pooled(eqx.Module):
    """A convolution of any kind, a nonlinearity, the mean over the positions, and a readout."""

    conv: eqx.Module
    readout: eqx.nn.Linear

    def __call__(self, x):
        h = jnp.tanh(self.conv(x))
        return self.readout(jnp.mean(h.reshape(h.shape[0], -1), axis=1))


def _pooled(layer, seed: int, dtype, shape, channels, *args, **options):
    """`shape`: of one input, its first axis the channels."""
    first, second = jax.random.split(jax.random.key(seed))
    conv = layer(shape[0], channels, *args, key=first, **options)
    model = Pooled(conv, eqx.nn.Linear(channels, 3, key=second))
    return Example(_cast(model, dtype), call, *_labelled(_Draw(seed, dtype), 3, 4, *shape))


@_entry
def conv_grouped(dtype=jnp.float64):
    return _pooled(eqx.nn.Conv2d, 4, dtype, (4, 5, 4), 6, 2, groups=2)


@_entry
def conv_dilated(dtype=jnp.float64):
    shape, padding = (2, 6, 5), ((1, 2), (0, 1))
    return _pooled(eqx.nn.Conv2d, 5, dtype, shape, 3, (3, 2), dilation=2, padding=padding)


@_entry
def conv_strided(dtype=jnp.float64):
    return _pooled(eqx.nn.Conv2d, 6, dtype, (2, 7, 6), 3, 3, stride=(2, 3), padding=1)


@_entry
def conv_1d(dtype=jnp.float64):
    return _pooled(eqx.nn.Conv1d, 7, dtype, (3, 8), 4, 3, padding="SAME")


@_entry
def conv_3d(dtype=jnp.float64):
    return _pooled(eqx.nn.Conv3d, 8, dtype, (2, 3, 4, 3), 3, 2)


@_entry
def conv_transposed(dtype=jnp.float64):
    return _pooled(eqx.nn.ConvTranspose2d, 9, dtype, (2, 3, 4), 3, 3, stride=2, padding=1)


# -- convolutions, plain ---------------------------------------------------------------------


def convolve(x, kernel, *, stride: int = 1, padding="SAME", groups: int = 1):
    """(H, W, C) by (h, w, C / groups, out): channels last, unlike those of Equinox."""
    out = jax.lax.conv_general_dilated(
        x[None],
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return out[0]


@_entry
def resnet_batchnorm(dtype=jnp.float64):
    """One residual block; batch normalisation by running statistics, which are constants."""
    draw = _Draw(10, dtype)
    channels = 4
    running = {
        name: (
            0.2 * draw.rng.standard_normal(channels).astype(dtype),
            draw.rng.uniform(0.5, 2.0, channels).astype(dtype),
        )
        for name in ("norm1", "norm2")
    }

    def norm(params, name, h):
        mean, variance = running[name]
        scale = params[name]["scale"] * jax.lax.rsqrt(variance + 1e-5)
        return (h - mean[None, None]) * scale[None, None] + params[name]["bias"][None, None]

    def predict(params, x):
        h = convolve(x, params["stem"])
        inner = jax.nn.relu(norm(params, "norm1", convolve(h, params["conv1"])))
        h = jax.nn.relu(h + norm(params, "norm2", convolve(inner, params["conv2"])))
        return jnp.mean(h, axis=(0, 1)) @ params["readout"] + params["bias"]

    params = {
        "stem": draw.weight(3, 3, 2, channels, fan_in=18),
        "conv1": draw.weight(3, 3, channels, channels, fan_in=36),
        "conv2": draw.weight(3, 3, channels, channels, fan_in=36),
        "readout": draw.weight(channels, 3),
        "bias": draw.shift(3),
    }
    for name in running:
        params[name] = {"scale": draw.gain(channels), "bias": draw.shift(channels)}
    return Example(params, predict, *_labelled(draw, 3, 4, 5, 5, 2))


def predict_separable(params, x):
    h = convolve(x, params["depthwise"], groups=x.shape[-1]) + params["shift"][None, None]
    h = convolve(jnp.tanh(h), params["pointwise"]) + params["bias"][None, None]
    return jnp.mean(jnp.tanh(h), axis=(0, 1)) @ params["readout"]


@_entry
def depthwise_separable(dtype=jnp.float64):
    """Depthwise (two filters for each of three channels), then pointwise."""
    draw = _Draw(11, dtype)
    params = {
        "depthwise": draw.weight(3, 3, 1, 6, fan_in=9),
        "shift": draw.shift(6),
        "pointwise": draw.weight(1, 1, 6, 5, fan_in=6),
        "bias": draw.shift(5),
        "readout": draw.weight(5, 3),
    }
    return Example(params, predict_separable, *_labelled(draw, 3, 4, 5, 4, 3))


# -- dense layers, each written in another way -----------------------------------------------


def predict_flax(variables, x):
    params = variables["params"]
    h = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    h = jnp.tanh(h @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])
    return h @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]


@_entry
def flax_style(dtype=jnp.float64):
    draw = _Draw(12, dtype)
    sizes = (4, 6, 5, 3)
    layers = {
        f"Dense_{i}": {"kernel": draw.weight(*sizes[i : i + 2]), "bias": draw.shift(sizes[i + 1])}
        for i in range(3)
    }
    return Example({"params": layers}, predict_flax, *_labelled(draw, 3, 6, 4))


def predict_bf16(params, x):
    half = lambda a: a.astype(jnp.bfloat16)
    h = jnp.tanh(half(x) @ half(params["w1"]) + half(params["b1"]))
    return (h @ half(params["w2"]) + half(params["b2"])).astype(x.dtype)


@_entry
def bf16_compute(dtype=jnp.float32):
    """Computes in bfloat16; parameters, inputs and outputs are float32 unless asked otherwise."""
    draw = _Draw(13, dtype)
    params = {
        "w1": draw.weight(4, 6),
        "b1": draw.shift(6),
        "w2": draw.weight(6, 3),
        "b2": draw.shift(3),
    }
    return Example(params, predict_bf16, *_labelled(draw, 3, 6, 4))


@jax.jit
def dense_jitted(layer, x):
    return layer["w"] @ x + layer["b"]


@jax.jit
def predict_jitted(params, x):
    h = jnp.tanh(dense_jitted(params["first"], x))
    return dense_jitted(params["last"], jnp.tanh(dense_jitted(params["middle"], h)))


def _three_layers(draw, last: int = 3):
    """Weights (out, in)."""
    return {
        "first": {"w": draw.weight(5, 4, fan_in=4), "b": draw.shift(5)},
        "middle": {"w": draw.weight(5, 5), "b": draw.shift(5)},
        "last": {"w": draw.weight(last, 5, fan_in=5), "b": draw.shift(last)},
    }


@_entry
def inner_jit(dtype=jnp.float64):
    """A jitted model of jitted layers, two of them of one shape (one jaxpr for both)."""
    draw = _Draw(14, dtype)
    return Example(_three_layers(draw), predict_jitted, *_labelled(draw, 3, 6, 4))


@jax.custom_vjp
def dense_custom(w, x):
    return w @ x


def _dense_custom_forward(w, x):
    return dense_custom(w, x), (w, x)


def _dense_custom_backward(residuals, cotangent):
    w, x = residuals
    return cotangent[:, None] * x[None], w.T @ cotangent


dense_custom.defvjp(_dense_custom_forward, _dense_custom_backward)


def predict_custom(params, x):
    h = jnp.tanh(params["first"]["w"] @ x + params["first"]["b"])
    h = jnp.tanh(dense_custom(params["middle"]["w"], h) + params["middle"]["b"])
    return params["last"]["w"] @ h + params["last"]["b"]


@_entry
def custom_vjp(dtype=jnp.float64):
    """The middle layer has a rule for reverse mode alone: JAX refuses forward mode."""
    draw = _Draw(15, dtype)
    return Example(_three_layers(draw), predict_custom, *_labelled(draw, 3, 6, 4))


def predict_cond(params, x):
    h = jnp.tanh(params["first"]["w"] @ x + params["first"]["b"])
    h = jax.lax.cond(
        x[0] > 0,
        lambda h: params["plus"]["w"] @ h + params["plus"]["b"],
        lambda h: params["minus"]["w"] @ h + params["minus"]["b"],
        h,
    )
    return params["last"]["w"] @ jnp.tanh(h) + params["last"]["b"]


@_entry
def cond(dtype=jnp.float64):
    """Each example takes one of two layers; both are taken in the batch."""
    draw = _Draw(16, dtype)
    layers = _three_layers(draw, last=2)
    layers["plus"] = layers.pop("middle")
    layers["minus"] = {"w": draw.weight(5, 5), "b": draw.shift(5)}
    (x, y), loss = _valued(draw, 2, 6, 4)
    return Example(layers, predict_cond, (x.at[0, 0].set(0.5).at[1, 0].set(-0.5), y), loss)


def predict_batched(params, x):
    """(positions, blocks, inputs): each block has a weight of its own."""
    h = jnp.einsum("tbi,bijk->tbjk", x, params["w"]) + params["b"][None]
    h = jnp.einsum("bjk,bjo->bok", jnp.mean(jnp.tanh(h), axis=0), params["mix"])
    return jnp.einsum("bok,bkoc->c", jnp.tanh(h), params["readout"])


@_entry
def batched_einsum(dtype=jnp.float64):
    draw = _Draw(17, dtype)
    params = {
        "w": draw.weight(2, 3, 4, 2, fan_in=3),
        "b": draw.shift(2, 4, 2),
        "mix": draw.weight(2, 4, 3),
        "readout": draw.weight(2, 2, 3, 2, fan_in=12),
    }
    return Example(params, predict_batched, *_valued(draw, 2, 4, 3, 2, 3))


# -- mixtures of experts ---------------------------------------------------------------------


def predict_moe_einsum(params, x):
    gate = jax.nn.softmax(x @ params["gate"], axis=-1)
    h = jnp.tanh(jnp.einsum("e i o, t i -> t e o", params["w1"], x) + params["b1"][None])
    h = jnp.einsum("e i o, t e i -> t e o", params["w2"], h)
    return jnp.einsum("t e, t e o -> t o", gate, h) + params["b2"][None]


def predict_moe_vmap(params, x):
    def expert(w1, b1, w2):
        return jax.vmap(lambda one: jnp.tanh(one @ w1 + b1) @ w2)(x)

    gate = jax.nn.softmax(x @ params["gate"], axis=-1)
    outputs = jax.vmap(expert)(params["w1"], params["b1"], params["w2"])
    return jnp.sum(gate.T[:, :, None] * outputs, axis=0) + params["b2"][None]


def _moe(dtype, predict):
    draw = _Draw(18, dtype)
    params = {
        "gate": draw.weight(4, 3),
        "w1": draw.weight(3, 4, 5),
        "b1": draw.shift(3, 5),
        "w2": draw.weight(3, 5, 2),
        "b2": draw.shift(2),
    }
    return Example(params, predict, *_sequences(draw, 2, 3, 4, 4))


@_entry
def moe_einsum(dtype=jnp.float64):
    return _moe(dtype, predict_moe_einsum)


@_entry
def moe_vmap(dtype=jnp.float64):
    """The function of `moe_einsum`, with its parameters and batch."""
    return _moe(dtype, predict_moe_vmap)


# -- attention and language ------------------------------------------------------------------


def predict_tied(params, tokens):
    """The embedding is the output layer too; each position sees the mean of those before it."""
    h = params["embedding"][tokens]
    count = jnp.arange(1, len(tokens) + 1, dtype=h.dtype)
    h = jnp.cumsum(h, axis=0) / count[:, None]
    h = h + jnp.tanh(h @ params["w"] + params["b"][None])
    return h @ params["embedding"].T


@_entry
def tied_embedding(dtype=jnp.float64):
    draw = _Draw(19, dtype)
    params = {"embedding": draw.normal(5, 4), "w": draw.weight(4, 4), "b": draw.shift(4)}
    return Example(params, predict_tied, *_language(draw, 5, 4, 3))


def layer_norm(norm, h):
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-5)
    return h * norm["scale"][None] + norm["bias"][None]


def attend(q, k, v):
    """Causal, of heads (T, heads, size)."""
    scores = jnp.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones(scores.shape, bool))
    return jnp.einsum("hts,shk->thk", jax.nn.softmax(jnp.where(causal, scores, -1e9)), v)


def attend_fused(params, h, heads: int = 2):
    """One weight (d, 3 · heads · size) for queries, keys and values."""
    qkv = h @ params["qkv"] + params["qkv_bias"][None]
    q, k, v = (a.reshape(len(h), heads, -1) for a in jnp.split(qkv, 3, axis=-1))
    return attend(q, k, v).reshape(len(h), -1) @ params["out"]


def _transformer_block(layer, h):
    h = h + attend_fused(layer, layer_norm(layer["norm1"], h))
    inner = jax.nn.gelu(layer_norm(layer["norm2"], h) @ layer["up"] + layer["up_bias"][None])
    return h + inner @ layer["down"] + layer["down_bias"][None]


def predict_scanned(params, tokens):
    @jax.checkpoint
    def step(h, layer):
        return _transformer_block(layer, h), None

    h, _ = jax.lax.scan(step, params["tokens"][tokens] + params["positions"], params["layers"])
    return layer_norm(params["norm"], h) @ params["readout"]


@_entry
def transformer_scanned(dtype=jnp.float64):
    """The parameters of the layers are stacked, and scanned over with rematerialisation."""
    draw = _Draw(20, dtype)
    vocabulary, length, width, depth = 5, 4, 6, 2
    layers = {
        "norm1": {"scale": draw.gain(depth, width), "bias": draw.shift(depth, width)},
        "qkv": draw.weight(depth, width, 3 * width),
        "qkv_bias": draw.shift(depth, 3 * width),
        "out": draw.weight(depth, width, width),
        "norm2": {"scale": draw.gain(depth, width), "bias": draw.shift(depth, width)},
        "up": draw.weight(depth, width, 8),
        "up_bias": draw.shift(depth, 8),
        "down": draw.weight(depth, 8, width),
        "down_bias": draw.shift(depth, width),
    }
    params = {
        "tokens": draw.normal(vocabulary, width),
        "positions": draw.shift(length, width),
        "layers": layers,
        "norm": {"scale": draw.gain(width), "bias": draw.shift(width)},
        "readout": draw.weight(width, vocabulary),
    }
    return Example(params, predict_scanned, *_language(draw, vocabulary, 3, length))


def predict_fused(params, x):
    return jnp.tanh(x + attend_fused(params, x)) @ params["readout"]


@_entry
def fused_qkv(dtype=jnp.float64):
    draw = _Draw(21, dtype)
    params = {
        "qkv": draw.weight(4, 12),
        "qkv_bias": draw.shift(12),
        "out": draw.weight(4, 4),
        "readout": draw.weight(4, 3),
    }
    return Example(params, predict_fused, *_sequences(draw, 3, 3, 4, 4))


def predict_headed(params, x):
    q, k, v = (jnp.einsum("td,dhk->thk", x, params[name]) for name in ("query", "key", "value"))
    h = attend(q + params["query_bias"][None], k, v)
    return jnp.tanh(x + jnp.einsum("thk,hkd->td", h, params["out"])) @ params["readout"]


@_entry
def headed_projection(dtype=jnp.float64):
    """Weights of shape (d, heads, size), and (heads, size, d) back, as in Flax."""
    draw = _Draw(22, dtype)
    params = {name: draw.weight(4, 2, 3, fan_in=4) for name in ("query", "key", "value")}
    params |= {
        "query_bias": draw.shift(2, 3),
        "out": draw.weight(2, 3, 4, fan_in=6),
        "readout": draw.weight(4, 3),
    }
    return Example(params, predict_headed, *_sequences(draw, 3, 3, 4, 4))
