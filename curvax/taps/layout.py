"""How a leaf of the parameters is seen where it is used, and back.

A model transposes, reshapes and slices a parameter, scans over its leading axes, and then uses it.
A [`View`][curvax.taps.layout.View] records that, so that gradients can be brought into the frame of
the use (a matrix of outputs × inputs) and directions out of it again.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf after some operations, each a (kind, depth, argument).

    `depth` leading axes of the leaf are loop axes: operations at that depth leave them alone.
    `shape` is the shape that is seen, without the loop axes; `base` the one before the operations
    at the present depth.
    """

    leaf: int
    shape: Axes
    base: Axes
    depth: int = 0
    operations: tuple[tuple[str, int, Any], ...] = ()

    def then(self, kind: str, argument: Any, shape: Axes) -> "View":
        operations = (*self.operations, (kind, self.depth, argument))
        return dataclasses.replace(self, operations=operations, shape=shape)

    def entered(self) -> "View":
        """The view inside a loop over the leading axis."""
        shape = self.shape[1:]
        return dataclasses.replace(self, shape=shape, base=shape, depth=self.depth + 1)

    @property
    def outside(self) -> "View":
        """What was done before the innermost loop was entered: the view of `base`."""
        before = tuple(op for op in self.operations if op[1] < self.depth)
        return dataclasses.replace(self, shape=self.base, operations=before)

    @property
    def inside(self) -> "View":
        """What is done to `base` inside of the loops."""
        after = tuple((kind, 0, arg) for kind, d, arg in self.operations if d == self.depth)
        return dataclasses.replace(self, depth=0, operations=after)

    def arranged(self, *groups: Axes) -> "View":
        """The axes in groups, the axes of each made one."""
        shape = tuple(math.prod(self.shape[axis] for axis in group) for group in groups)
        order = tuple(axis for group in groups for axis in group)
        view = self.then("transpose", order, tuple(self.shape[axis] for axis in order))
        return view.then("reshape", shape, shape)

    def apply(self, leaf: Array) -> Array:
        """A leaf (or a gradient of it) as it is seen, loop axes first."""
        for kind, depth, argument in self.operations:
            loops = leaf.shape[:depth]
            if kind == "transpose":
                leaf = jnp.transpose(leaf, (*range(depth), *(depth + axis for axis in argument)))
            elif kind == "reshape":
                leaf = jnp.reshape(leaf, loops + argument)
            elif kind == "reverse":
                leaf = jax.lax.rev(leaf, tuple(depth + axis for axis in argument))
            elif kind == "broadcast":
                shape, axes = argument
                axes = (*range(depth), *(depth + axis for axis in axes))
                leaf = jax.lax.broadcast_in_dim(leaf, loops + shape, axes)
            else:
                starts, stops, strides = argument
                full = (0,) * depth, loops, (1,) * depth
                leaf = jax.lax.slice(leaf, full[0] + starts, full[1] + stops, full[2] + strides)
        return leaf

    def transposed(self, seen: Array, struct: jax.ShapeDtypeStruct) -> Array:
        """The transpose of `apply`: zeros where the view does not look, sums where it repeats."""
        struct = jax.ShapeDtypeStruct(struct.shape, seen.dtype)
        return jax.linear_transpose(self.apply, struct)(seen)[0]

    @property
    def partial(self) -> bool:
        """Whether the view leaves entries of the leaf out."""
        return any(kind == "slice" for kind, _, _ in self.operations)

    @property
    def repeats(self) -> bool:
        """Whether the view repeats entries of the leaf."""
        return any(kind == "broadcast" for kind, _, _ in self.operations)


_AS_IT_IS = (
    "convert_element_type",
    "copy",
    "name",
    "optimization_barrier",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
)


def follow(eqn: Any, view: View) -> View | None:
    """The view after an equation that only moves entries; None for any other."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape if eqn.outvars else ()
    if name in _AS_IT_IS:
        return view if len(eqn.outvars) == 1 else None
    if name == "rev":
        return view.then("reverse", tuple(eqn.params["dimensions"]), shape)
    if name == "transpose":
        return view.then("transpose", tuple(eqn.params["permutation"]), shape)
    if name in ("reshape", "squeeze", "expand_dims"):
        plain = eqn.params.get("dimensions") is None or name != "reshape"
        return view.then("reshape", shape, shape) if plain else None
    if name == "broadcast_in_dim":
        if len(eqn.invars) > 1:
            return None
        if math.prod(shape) == math.prod(view.shape):
            return view.then("reshape", shape, shape)
        axes = tuple(eqn.params["broadcast_dimensions"])
        return view.then("broadcast", (shape, axes), shape)
    if name == "slice":
        starts, stops = tuple(eqn.params["start_indices"]), tuple(eqn.params["limit_indices"])
        strides = tuple(eqn.params["strides"] or (1,) * len(starts))
        return view.then("slice", (starts, stops, strides), shape)
    return None


def spread(eqn: Any, view: View) -> View:
    """The view as an elementwise operation sees it: scalars and axes of size 1 are broadcast."""
    shape = eqn.outvars[0].aval.shape
    if shape == view.shape:
        return view
    axes = tuple(range(len(shape) - len(view.shape), len(shape))) if view.shape else ()
    return view.then("broadcast", (shape, axes), shape)


def on_host(view: View, array: np.ndarray) -> np.ndarray:
    """`view.apply`, of a view without loops to an array of NumPy."""
    for kind, _, argument in view.operations:
        if kind == "transpose":
            array = array.transpose(argument)
        elif kind == "reshape":
            array = array.reshape(argument)
        elif kind == "reverse":
            array = np.flip(array, argument)
        elif kind == "broadcast":
            shape, axes = argument
            kept = [1] * len(shape)
            for source, axis in enumerate(axes):
                kept[axis] = array.shape[source]
            array = np.broadcast_to(array.reshape(kept), shape)
        else:
            array = array[tuple(slice(*bounds) for bounds in zip(*argument, strict=True))]
    return array


def flipped(view: View) -> bool:
    """Whether neighbours in memory are outputs of one input, and not inputs of one output."""
    if not view.base:
        return False
    places = np.broadcast_to(np.arange(view.base[-1]), view.base)
    seen = on_host(view.inside, places)
    return seen.shape[-2] > 1 and bool(seen[..., 0, 0].flat[0] != seen[..., 1, 0].flat[0])


def tile(views: Collection[View]) -> bool:
    """Whether slices of a leaf leave nothing out and do not overlap."""
    first, *others = views
    if any(v.outside != first.outside or v.depth != first.depth for v in others):
        return False
    if first.outside.partial:
        return False
    entries = np.arange(math.prod(first.base)).reshape(first.base)
    seen = [on_host(view.inside, entries).ravel() for view in views]
    together = np.concatenate(seen)
    return together.size == entries.size and np.unique(together).size == entries.size


def place_in(array: np.ndarray, owner: np.ndarray) -> Any:
    """Where an array reads its entries, if it reads those of `owner`."""
    if not np.may_share_memory(array, owner):
        return None
    # NumPy gives axes of size 1 any stride.
    strides = [stride for stride, size in zip(array.strides, array.shape, strict=True) if size > 1]
    return array.shape, strides, array.__array_interface__["data"]
