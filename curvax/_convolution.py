"""Convolutions that stay fast inside loops and branches on the CPU.

XLA's CPU backend brings convolutions into the layout that its fast kernels take (batch first,
features last; kernels with spatial axes first) only in a program's entry computation. Inside
`while`, `scan` and `cond` any other layout, and so every weight gradient, falls back to a naive
loop: a Gauss-Newton product of a small convnet was seen to take 24 times longer there. So the
layout is made explicit here, where it does not change what is computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jaxtyping import Array


def loop_safe(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of pytrees of arrays, fit for the body of a loop or a branch.

    Does nothing unless the default backend is the CPU.
    """
    if jax.default_backend() != "cpu":
        return function

    def wrapped(*args: Any) -> Any:
        jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        if _has_convolution(jaxpr.jaxpr):
            outs = _evaluate(jaxpr.jaxpr, jaxpr.consts, leaves)
        else:
            outs = jex_core.jaxpr_as_fun(jaxpr)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(out), outs)

    return wrapped


def _has_convolution(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "conv_general_dilated"
        or any(_has_convolution(sub) for sub in _sub_jaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )


def _sub_jaxprs(params: dict[str, Any]) -> list[Any]:
    # By attribute, not by type or name: open or closed, alone or in the tuple of a cond.
    found = []
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Array]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        closed = eqn.params.get("jaxpr")
        if eqn.primitive.name == "conv_general_dilated":
            outputs = [_convolve(*inputs, eqn.params)]
        elif eqn.primitive.name in ("jit", "pjit") and _has_convolution(closed.jaxpr):
            outputs = _evaluate(closed.jaxpr, closed.consts, inputs)
        else:
            # A loop inside of the loop keeps its convolutions as they are: correct, only slow.
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _convolve(lhs: Array, rhs: Array, params: dict[str, Any]) -> Array:
    numbers = params["dimension_numbers"]
    spatial = "".join("DHW"[-(lhs.ndim - 2) :])
    lhs = jnp.transpose(lhs, _features_last(numbers.lhs_spec))
    rhs = jnp.transpose(rhs, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    canonical = jax.lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    )
    out = jax.lax.conv_general_dilated_p.bind(
        lhs, rhs, **(params | {"dimension_numbers": canonical})
    )
    order = _features_last(numbers.out_spec)
    return jnp.transpose(out, tuple(order.index(axis) for axis in range(out.ndim)))


def _features_last(spec: Sequence[int]) -> tuple[int, ...]:
    batch, features, *spatial = spec
    return (batch, *spatial, features)
