"""Small models as plain functions of a parameter dict, for timing side by side with peers."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Params = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and a batch. `apply` takes a batch of inputs, `predict` one example."""

    name: str
    params: Params
    apply: Callable[[Params, Array], Array]
    predict: Callable[[Params, Array], Array]
    x: Array
    labels: Array


def mlp(widths: tuple[int, ...] = (784, 256, 256, 10), batch: int = 128) -> Workload:
    """A ReLU network 784-256-256-10 with a random batch."""
    keys = jax.random.split(jax.random.key(0), len(widths) + 1)
    params: Params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        params[f"w{i}"] = jax.random.normal(keys[i], (fan_in, fan_out)) * (2 / fan_in) ** 0.5
        params[f"b{i}"] = jnp.zeros((fan_out,))

    def apply(params: Params, x: Array) -> Array:
        for i in range(len(widths) - 1):
            x = x @ params[f"w{i}"] + params[f"b{i}"]
            x = jax.nn.relu(x) if i < len(widths) - 2 else x
        return x

    name = "-".join(map(str, widths))
    return _with_data(name, params, apply, apply, (widths[0],), widths[-1], batch)


def convnet(
    batch: int = 64, channels: tuple[int, ...] = (1, 16, 32, 32), size: int = 28
) -> Workload:
    """Three 3×3 convolutions (16, 32, 32 channels, two of stride 2) on 28×28, a mean, a head.

    Fewer for shorter `channels`, which begin with those of the image.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    params: Params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(channels)):
        scale = (2 / (9 * fan_in)) ** 0.5
        params[f"w{i}"] = jax.random.normal(keys[i], (3, 3, fan_in, fan_out)) * scale
        params[f"b{i}"] = jnp.zeros((fan_out,))
    params["head"] = jax.random.normal(keys[3], (channels[-1], 10)) * channels[-1] ** -0.5

    def apply(params: Params, x: Array) -> Array:
        for i, stride in zip(range(len(channels) - 1), (1, 2, 2), strict=False):
            x = jax.lax.conv_general_dilated(
                x,
                params[f"w{i}"],
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + params[f"b{i}"])
        return jnp.mean(x, axis=(1, 2)) @ params["head"]

    def predict(params: Params, x: Array) -> Array:
        return apply(params, x[None])[0]

    return _with_data("convnet", params, apply, predict, (size, size, channels[0]), 10, batch)


def _with_data(
    name: str,
    params: Params,
    apply: Any,
    predict: Any,
    shape: tuple[int, ...],
    classes: int,
    batch: int,
) -> Workload:
    key_x, key_y = jax.random.split(jax.random.key(1))
    x = jax.random.normal(key_x, (batch, *shape))
    labels = jax.random.randint(key_y, (batch,), 0, max(classes, 2))
    return Workload(name, params, apply, predict, x, labels)
