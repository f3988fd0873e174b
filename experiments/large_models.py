"""Large models as plain functions of a parameter pytree: GPT-2 124M and ResNet-50.

Parameters are float32, the arithmetic is bfloat16, and `predict` sees one example.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

Params = dict[str, Any]
Remat = Literal["full", "dots"] | bool
COMPUTE = jnp.bfloat16
NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, its parameters before training, and random batches for timing it.

    `init(key)` makes new parameters (a step with donated buffers eats them), `batch(size, key)`
    makes inputs and labels, and `predict(params, x)` takes one example to its logits.
    """

    name: str
    init: Callable[[PRNGKeyArray], Params]
    predict: Callable[[Params, Array], Array]
    batch: Callable[[int, PRNGKeyArray], tuple[Array, Array]]

    @property
    def parameters(self) -> int:
        """How many there are; nothing is allocated."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))


# -- GPT-2 -----------------------------------------------------------------------------------


def gpt2(
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocab: int = 50304,
    length: int = 1024,
    *,
    tied: bool = True,
    remat: Remat = True,
    attention: Literal["xla", "cudnn"] = "xla",
    arrange: Callable[[Params], Params] = lambda params: params,
) -> Model:
    """GPT-2 (124M by default): layers stacked along a leading axis and run by `scan`.

    `remat`: True or "full" keeps a layer's input only, "dots" also its matrix products with
    weights, False everything. `attention="cudnn"` wants a GPU and heads of a width divisible
    by 8. `arrange` is applied to the parameters of a layer before it runs, and to those outside of
    the layers: a place for sharding constraints. Logits are bfloat16.
    """

    def init(key: PRNGKeyArray) -> Params:
        keys = iter(jax.random.split(key, 7))
        normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
        residual = (2 * layers) ** -0.5

        def dense(fan_in: int, fan_out: int, scale: float = 1.0) -> Params:
            return {"w": scale * normal(layers, fan_in, fan_out), "b": jnp.zeros((layers, fan_out))}

        norm = lambda *lead: {"scale": jnp.ones((*lead, width)), "shift": jnp.zeros((*lead, width))}
        params = {
            "tokens": normal(vocab, width),
            "positions": normal(length, width),
            "layers": {
                "norm_1": norm(layers),
                "qkv": dense(width, 3 * width),
                "project": dense(width, width, residual),
                "norm_2": norm(layers),
                "up": dense(width, 4 * width),
                "down": dense(4 * width, width, residual),
            },
            "norm": norm(),
        }
        return params if tied else params | {"head": normal(width, vocab)}

    def layer(x: Array, p: Params) -> tuple[Array, None]:
        p = arrange(p)
        qkv = _dense(layer_norm(x, p["norm_1"]), p["qkv"])
        q, k, v = (a.reshape(-1, heads, width // heads) for a in jnp.split(qkv, 3, axis=-1))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention)
        x = x + _dense(mixed.reshape(x.shape), p["project"])
        hidden = jax.nn.gelu(_dense(layer_norm(x, p["norm_2"]), p["up"]))
        return x + _dense(hidden, p["down"]), None

    body = _checkpointed(layer, remat)

    def predict(params: Params, x: Array) -> Array:
        stacked = params["layers"]
        params = arrange({name: params[name] for name in params if name != "layers"})
        hidden = (params["tokens"][x] + params["positions"][: x.shape[0]]).astype(COMPUTE)
        hidden, _ = jax.lax.scan(body, hidden, stacked)
        head = params["tokens"].T if tied else params["head"]
        return layer_norm(hidden, params["norm"]) @ head.astype(COMPUTE)

    def batch(size: int, key: PRNGKeyArray) -> tuple[Array, Array]:
        tokens = jax.random.randint(key, (size, length + 1), 0, vocab)
        return tokens[:, :-1], tokens[:, 1:]

    return Model(f"gpt2-{layers}x{width}", init, predict, batch)


def _checkpointed(body: Any, remat: Remat) -> Any:
    if not remat:
        return body
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    # Inside of a scan, nothing has to keep XLA from merging the two forward passes.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def layer_norm(x: Array, p: Params) -> Array:
    """LayerNorm, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normal = wide * jax.lax.rsqrt(variance + NORM_EPSILON)
    return (normal * p["scale"] + p["shift"]).astype(x.dtype)


def _dense(x: Array, p: Params) -> Array:
    return x @ p["w"].astype(x.dtype) + p["b"].astype(x.dtype)


# -- ResNet-50 -------------------------------------------------------------------------------


def resnet50(
    size: int = 224,
    classes: int = 1000,
    *,
    stages: tuple[int, ...] = (3, 4, 6, 3),
    widths: tuple[int, ...] = (64, 128, 256, 512),
    expansion: int = 4,
) -> Model:
    """ResNet-50 (v1.5: strides in the 3×3 convolutions), BatchNorm with fixed statistics."""
    stem = widths[0]

    def init(key: PRNGKeyArray) -> Params:
        keys = (jax.random.fold_in(key, i) for i in itertools.count())

        def conv(extent: int, fan_in: int, fan_out: int, scale: float = 1.0) -> Params:
            deviation = (2 / (extent**2 * fan_in)) ** 0.5
            kernel = jax.random.normal(next(keys), (extent, extent, fan_in, fan_out))
            norm = {"scale": jnp.full((fan_out,), scale), "shift": jnp.zeros((fan_out,))}
            return {"w": deviation * kernel, "norm": norm}

        params: Params = {"stem": conv(7, 3, stem)}
        channels = stem
        for stage, (count, width) in enumerate(zip(stages, widths, strict=True)):
            for block in range(count):
                # A small last scale, as statistics are fixed: the sum over blocks must not blow up.
                convs = {
                    "reduce": conv(1, channels, width),
                    "mix": conv(3, width, width),
                    "expand": conv(1, width, expansion * width, scale=0.25),
                }
                if block == 0:
                    convs["shortcut"] = conv(1, channels, expansion * width, scale=0.5**0.5)
                channels = expansion * width
                params[f"stage{stage}_block{block}"] = convs
        head = channels**-0.5 * jax.random.normal(next(keys), (channels, classes))
        return params | {"head": {"w": head, "b": jnp.zeros((classes,))}}

    def bottleneck(x: Array, p: Params, stride: int) -> Array:
        y = jax.nn.relu(_conv_norm(x, p["reduce"], 1))
        y = jax.nn.relu(_conv_norm(y, p["mix"], stride))
        y = _conv_norm(y, p["expand"], 1)
        shortcut = _conv_norm(x, p["shortcut"], stride) if "shortcut" in p else x
        return jax.nn.relu(y + shortcut)

    def predict(params: Params, x: Array) -> Array:
        x = jax.nn.relu(_conv_norm(x[None].astype(COMPUTE), params["stem"], 2))
        x = _max_pool(x)
        for stage, count in enumerate(stages):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                x = bottleneck(x, params[f"stage{stage}_block{block}"], stride)
        pooled = jnp.mean(x[0].astype(jnp.float32), axis=(0, 1)).astype(COMPUTE)
        return _dense(pooled, params["head"]).astype(jnp.float32)

    def batch(size_of_batch: int, key: PRNGKeyArray) -> tuple[Array, Array]:
        key_x, key_y = jax.random.split(key)
        x = jax.random.normal(key_x, (size_of_batch, size, size, 3))
        return x, jax.random.randint(key_y, (size_of_batch,), 0, classes)

    name = "resnet50" if stages == (3, 4, 6, 3) else f"resnet-{'-'.join(map(str, stages))}"
    return Model(name, init, predict, batch)


def batch_norm(x: Array, p: Params, mean: Any = 0.0, variance: Any = 1.0) -> Array:
    """BatchNorm as in evaluation, computed in float32.

    The stored statistics are constants, by default what BatchNorm stores before training.
    """
    normal = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + NORM_EPSILON)
    return (normal * p["scale"] + p["shift"]).astype(x.dtype)


def _conv_norm(x: Array, p: Params, stride: int) -> Array:
    pad = (p["w"].shape[0] // 2,) * 2
    y = jax.lax.conv_general_dilated(
        x,
        p["w"].astype(x.dtype),
        (stride, stride),
        (pad, pad),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return batch_norm(y, p["norm"])


def _max_pool(x: Array) -> Array:
    """3×3, stride 2."""
    pad = ((0, 0), (1, 1), (1, 1), (0, 0))
    # The initial value has to be a Python number: an array has no derivative here.
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pad)
