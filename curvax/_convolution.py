"""Convolutions that stay fast inside loops and branches on the CPU.

XLA's CPU backend brings convolutions into the layout that its fast kernels take (batch first,
features last; kernels with spatial axes first) only in a program's entry computation. Inside
`while`, `scan` and `cond` any other layout, and so every weight gradient, falls back to a naive
loop: a Gauss-Newton product of a small convnet was seen to take 16 times longer there. So the
layout is made explicit here, where it does not change what is computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvax._jaxpr import evaluate, sub_jaxprs


def loop_safe(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of pytrees of arrays, fit for the body of a loop or a branch.

    Does nothing unless the default backend is the CPU.
    """
    if jax.default_backend() != "cpu":
        return function

    def wrapped(*args: Any) -> Any:
        jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*args)
        rule = _rule if _has_convolution(jaxpr.jaxpr) else None
        outs = evaluate(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(args), rule)
        return jax.tree.unflatten(jax.tree.structure(out), outs)

    return wrapped


def _has_convolution(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "conv_general_dilated" or any(map(_has_convolution, sub_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _rule(eqn: Any, inputs: list[Any]) -> list[Array] | None:
    # A loop inside of the loop keeps its convolutions as they are: correct, only slow.
    if eqn.primitive.name != "conv_general_dilated":
        return None
    lhs, rhs = inputs
    numbers = eqn.params["dimension_numbers"]
    spatial = "".join("DHW"[-(lhs.ndim - 2) :])
    lhs = jnp.transpose(lhs, _features_last(numbers.lhs_spec))
    rhs = jnp.transpose(rhs, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    canonical = jax.lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    )
    params = eqn.params | {"dimension_numbers": canonical}
    out = jax.lax.conv_general_dilated_p.bind(lhs, rhs, **params)
    order = _features_last(numbers.out_spec)
    return [jnp.transpose(out, tuple(order.index(axis) for axis in range(out.ndim)))]


def _features_last(spec: Sequence[int]) -> tuple[int, ...]:
    batch, features, *spatial = spec
    return (batch, *spatial, features)
