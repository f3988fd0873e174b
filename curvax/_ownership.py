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
    rest = []
    for i in single:
        start = deals[i].each * mesh.size
        # The slots of the others are filled with something that is never looked at.
        slots = np.full(mesh.size, start)
        slots[list(deals[i].owners)] = start + np.arange(len(deals[i].owners))
        rest.append(jax.tree.map(lambda x, slots=slots: x[slots], groups[i]))

    def work(even: list[Any], rest: list[Any]) -> tuple[list[Any], list[Any]]:
        here = jax.lax.axis_index(mesh.axis_names)
        results = []
        for i, trees in zip(single, rest, strict=True):
            make = lambda *trees, key=keys[i]: function([key], *([tree] for tree in trees))[0]
            idle = lambda *trees, make=make: jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, *trees)
            )
            mine = np.isin(np.arange(mesh.size), deals[i].owners)
            results.append(jax.lax.cond(jnp.asarray(mine)[here], make, idle, *trees))
        own = [keys[i] for i in shared]
        return (function(own, *map(list, zip(*even, strict=True))) if own else []), results

    spec = PartitionSpec(mesh.axis_names)
    work = jax.shard_map(work, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    done, extra = whole(work(*whole((even, rest))))
    parts: list[list[Any]] = [[] for _ in groups]
    for i, tree in zip(shared, done, strict=True):
        parts[i].append(tree)
    for i, tree in zip(single, extra, strict=True):
        owners = np.asarray(deals[i].owners)
        parts[i].append(jax.tree.map(lambda x, owners=owners: x[owners], tree))
    return [jax.tree.map(lambda *x: jnp.concatenate(x) if x[1:] else x[0], *own) for own in parts]


def _count(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _cost(trees: Any) -> float:
    """What one matrix of a group costs, up to a factor: as a product of its arrays would."""
    shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(trees)]
    return sum(float(np.prod(shape)) * min(shape, default=1) for shape in shapes)
