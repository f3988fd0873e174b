"""Where arrays are on a mesh; with Explicit axes that is part of their types."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit(leaf: Any) -> NamedSharding | None:
    """The sharding in the type of an array, or of its shape; None if it has none."""
    shape = isinstance(leaf, jax.ShapeDtypeStruct)
    sharding = leaf.sharding if shape else jax.typeof(leaf).sharding
    named = isinstance(sharding, NamedSharding)
    return sharding if named and AxisType.Explicit in sharding.mesh.axis_types else None


def compiler_sharded(function: Callable[..., Any], like: Any, *args: Any) -> Any:
    """`function(*args)`, with the results sharded as the arrays of `like`, and what is between as
    the compiler sees fit: with Explicit axes many a product would have to say what it makes.
    """
    found = [sharding for leaf in jax.tree.leaves(args) if (sharding := explicit(leaf))]
    if not found:
        return function(*args)
    whole = NamedSharding(found[0].mesh, PartitionSpec())
    wanted = jax.tree.map(lambda leaf: explicit(leaf) or whole, like)
    return jax.sharding.auto_axes(function, out_sharding=wanted)(*args)


def sharded_as(array: Any, like: Any) -> Any:
    """An array where another is, if that is part of the type of the other."""
    sharding = explicit(like)
    if sharding is None or sharding == explicit(array):
        return array
    return jax.sharding.reshard(array, sharding)


def whole(array: Any) -> Any:
    """A copy of all of an array on each device, where it lives on an Explicit mesh."""
    sharding = explicit(array)
    if sharding is None:
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def on_mesh_of(params: Any, state: Any) -> Any:
    """The state, with a copy on each device of the parameters' mesh of what is on none yet."""
    found = [leaf.sharding for leaf in jax.tree.leaves(params) if _placed(leaf)]
    meshes = [each.mesh for each in found if isinstance(each, NamedSharding)]
    if not meshes:
        return state
    everywhere = NamedSharding(meshes[0], PartitionSpec())

    def place(leaf: Any) -> Any:
        if not _placed(leaf) or isinstance(leaf.sharding, NamedSharding):
            return leaf
        return jax.device_put(leaf, everywhere)

    return jax.tree.map(place, state)


def _placed(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)


@functools.cache
def plain(sharding: Any) -> Any:
    """Equal for shardings that put an array alike on a mesh, so that it may be a static argument:
    the results of a program are not always written down as its arguments were.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    kept = [
        tuple(name for name in _names(entry) if sharding.mesh.shape[name] > 1)
        for entry in sharding.spec
    ]
    while kept and not kept[-1]:
        kept.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*kept), memory_kind=sharding.memory_kind)


def gathered(tree: Any, batch: Any) -> Any:
    """The tree, no more sharded along the axes of an Explicit mesh that a batch is sharded along:
    what one example makes of it can then be there for all examples, each on its own device.
    """
    taken = {name for leaf in jax.tree.leaves(batch) for name in _axes(leaf)}

    def gather(leaf: Any) -> Any:
        sharding = explicit(leaf)
        if sharding is None or taken.isdisjoint(_axes(leaf)):
            return leaf
        kept = [
            tuple(name for name in _names(entry) if name not in taken) for entry in sharding.spec
        ]
        return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, PartitionSpec(*kept)))

    return jax.tree.map(gather, tree)


def _axes(leaf: Any) -> set[str]:
    """The axes of an Explicit mesh that any axis of an array is sharded along."""
    sharding = explicit(leaf)
    return {name for entry in (sharding.spec if sharding else ()) for name in _names(entry)}


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
