"""Meshes with Explicit axes, where how an array is sharded is part of its type."""

from collections.abc import Callable
from typing import Any

import jax
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
