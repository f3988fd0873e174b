"""The tap: an identity whose backward pass also returns statistics.

`tap(y, probes, data, rule)` is y. The derivative with respect to each probe, a zero of the shape of
a statistic, is *defined* to be that statistic of the cotangent of y and of `data`:

    rule(ȳ, *data, *shared, lead=number of leading batch axes) -> one array for each probe

Under `vmap` the batch axis becomes one more leading axis, over which the rule sums by itself (one
matrix product instead of a sum of per-example ones). A `custom_vjp` could not do that: it would
materialise a statistic for each example.

Differentiating with respect to zero-valued probes in the same backward pass as the parameters is
all there is to do; `scan`, `checkpoint`, `jit` and sharding need no rule of their own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from curvax._sharding import compiler_sharded

# A hashable function: the primitive is compared and cached by it.
Rule = Callable[..., tuple[Array, ...]]

_tap = jex_core.Primitive("curvax_tap")
_tangent = jex_core.Primitive("curvax_tap_tangent")


def tap(
    y: Array,
    probes: Sequence[Array],
    data: Sequence[Array],
    shared: Sequence[Array],
    rule: Rule,
) -> Array:
    """`y`; see the module. `data` belongs to an example, as y does; `shared` to none."""
    counts = {"probes": len(probes), "shared": len(shared)}
    return _tap.bind(y, *probes, *data, *shared, rule=rule, lead=0, outer=0, **counts)


def _identity(y: Any, *_: Any, **__: Any) -> Any:
    return y  # an array, or what stands for one while a program is traced


for _primitive in (_tap, _tangent):
    _primitive.def_impl(_identity)
    _primitive.def_abstract_eval(_identity)
    mlir.register_lowering(_primitive, lambda _, y, *__, **___: [y])


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, probes: int, **params: Any) -> Any:
    data = primals[1 + probes :]
    linear = tangents[: 1 + probes]
    out = _tap.bind(*primals, probes=probes, **params)
    if all(type(t) is ad.Zero for t in linear):
        return out, tangents[0]
    linear = [ad.instantiate_zeros(t) for t in linear]
    return out, _tangent.bind(*linear, *data, probes=probes, **params)


ad.primitive_jvps[_tap] = _jvp


def _transpose(
    cotangent: Any,
    y: Any,
    *others: Any,
    rule: Rule,
    probes: int,
    shared: int,
    lead: int,
    outer: int,
) -> list[Any]:
    data = others[probes:]
    if type(cotangent) is ad.Zero:
        zeros = [ad.Zero(other.aval) if ad.is_undefined_primal(other) else None for other in others]
        return [cotangent, *zeros]
    statistics: Any = functools.partial(rule, lead=lead)
    for _ in range(outer):
        statistics = jax.vmap(statistics)
    # As the probes are sharded, whatever the activations are.
    like = tuple(_struct(probe.aval) for probe in others[:probes])
    found = compiler_sharded(statistics, like, cotangent, *data)
    return [cotangent, *found, *[None] * len(data)]


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding)


ad.primitive_transposes[_tangent] = _transpose


def _batch(
    primitive: Any, args: Sequence[Array], axes: Sequence[Any], **params: Any
) -> tuple[Array, int]:
    """Sums over the axis where the probes do not have it; a model of its own where they do."""
    probes, shared, outer = params["probes"], params["shared"], params["outer"]
    size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    common = (*range(1, 1 + probes), *range(len(args) - shared, len(args)))
    if any(axes[i] is not None for i in common):
        moved = [_at(arg, axis, 0, size) for arg, axis in zip(args, axes, strict=True)]
        return primitive.bind(*moved, **(params | {"outer": outer + 1})), 0
    moved = [
        arg if i in common else _at(arg, axis, outer, size)
        for i, (arg, axis) in enumerate(zip(args, axes, strict=True))
    ]
    return primitive.bind(*moved, **(params | {"lead": params["lead"] + 1})), outer


def _at(x: Array, axis: Any, position: int, size: int) -> Array:
    """`x` with its mapped axis at `position`, broadcast there if it has none."""
    if axis is None:
        shape = (*x.shape[:position], size, *x.shape[position:])
        return jnp.broadcast_to(jnp.expand_dims(x, position), shape)
    return jnp.moveaxis(x, axis, position)


for _primitive in (_tap, _tangent):
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _primitive)
