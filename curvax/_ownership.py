"""Work on stacks of matrices, dealt out to the devices of a mesh.

Every device would do all of it otherwise: nothing in a factorisation tells the compiler that a
stack may be cut. What a device makes is gathered where others need it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array


class Deal(NamedTuple):
    """Of a stack, how many matrices every device works on, and who owns each of the rest."""

    each: int
    owners: tuple[int, ...]


def dealt(stacks: Sequence[tuple[int, float]], devices: int) -> list[Deal]:
    """For stacks given as how many matrices and what one of them costs.

    What a stack has left when all devices have the same goes to those with the least to do so far,
    one to each; the most expensive stacks first (Graham 1969).
    """
    found: dict[int, Deal] = {}
    loads = np.zeros(devices)
    for i in sorted(range(len(stacks)), key=lambda i: -stacks[i][1]):
        count, cost = stacks[i]
        owners = np.argsort(loads, kind="stable")[: count % devices]
        loads[owners] += cost
        found[i] = Deal(count // devices, tuple(map(int, owners)))
    return [found[i] for i in range(len(stacks))]


@contextlib.contextmanager
def working_on(mesh: Mesh | None) -> Iterator[None]:
    """Inside, work is dealt out to the devices of a mesh, also where none is set."""
    if mesh is None or not jax.sharding.get_abstract_mesh().empty:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def over_devices(
    function: Callable[..., list[Any]], keys: Sequence[Any], *lists: Sequence[Any]
) -> list[Any]:
    """`function(keys, *lists)`, each matrix on one device of the mesh, if one is set.

    For each group of matrices there is a key, and in every list a tree of arrays with the stack in
    front; so has the result. `function` treats the matrices of a group one by one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not keys or mesh.size <= 1 or set(mesh.axis_types) != {AxisType.Auto}:
        return function(keys, *lists)
    # Whole on every device before and after: else the compiler carries the division on into what
    # surrounds this, and moves the same numbers many times.
    whole = lambda tree: jax.lax.with_sharding_constraint(tree, PartitionSpec())
    groups = list(zip(*lists, strict=True))
    deals = dealt([(_count(trees[0]), _cost(trees)) for trees in groups], mesh.size)
    shared = [i for i, deal in enumerate(deals) if deal.each]
    single = [i for i, deal in enumerate(deals) if deal.owners]
    even = [jax.tree.map(lambda x, i=i: x[: deals[i].each * mesh.size], groups[i]) for i in shared]
    rest = [jax.tree.map(lambda x, i=i: x[deals[i].each * mesh.size :], groups[i]) for i in single]

    def work(even: list[Any], rest: list[Any]) -> tuple[list[Any], list[Any]]:
        here = jax.lax.axis_index(mesh.axis_names)
        results = [
            _own(function, keys[i], trees, deals[i].owners, here, mesh.axis_names)
            for i, trees in zip(single, rest, strict=True)
        ]
        own = [keys[i] for i in shared]
        return (function(own, *map(list, zip(*even, strict=True))) if own else []), results

    divided, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
    work = jax.shard_map(
        work,
        mesh=mesh,
        in_specs=(divided, everywhere),
        out_specs=(divided, everywhere),
        check_vma=False,
    )
    parts: list[list[Any]] = [[] for _ in groups]
    for places, trees in zip((shared, single), whole(work(*whole((even, rest)))), strict=True):
        for i, tree in zip(places, trees, strict=True):
            parts[i].append(tree)
    return [jax.tree.map(lambda *x: jnp.concatenate(x) if x[1:] else x[0], *own) for own in parts]


def _own(
    function: Callable[..., list[Any]],
    key: Any,
    trees: Sequence[Any],
    owners: tuple[int, ...],
    here: Array,
    axes: tuple[str, ...],
) -> Any:
    """What `function` makes of the matrices of a stack, each by its owner: the sum over devices of
    what each has, with zeros for the others'. It takes the bytes of the stack, however many devices
    there are.
    """
    mine = jnp.asarray(owners) == here
    place = jnp.argmax(mine)
    own = [jax.tree.map(lambda x: x[place][None], tree) for tree in trees]
    make = lambda *own: function([key], *([tree] for tree in own))[0]
    like = jax.eval_shape(make, *own)
    idle = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    made = jax.lax.cond(jnp.any(mine), make, idle, *own)

    def spread(x: Array) -> Array:
        held = mine.reshape(-1, *(1,) * (x.ndim - 1))
        numbers = x.astype(jnp.int32) if x.dtype == bool else x
        summed = jax.lax.psum(jnp.where(held, numbers, jnp.zeros_like(numbers)), axes)
        return summed.astype(x.dtype)

    return jax.tree.map(spread, made)


def _count(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _cost(trees: Any) -> float:
    """What one matrix of a group costs, up to a factor: as a product of its arrays would."""
    shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(trees)]
    return sum(float(np.prod(shape)) * min(shape, default=1) for shape in shapes)
