"""Where the state of an optimizer is on a mesh."""

from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from curvax import _tree

KEEP = ("all", "own")


def state_sharding(
    optimizer: Any, params: PyTree[Any], mesh: Mesh, *, keep: str = "all"
) -> PyTree[NamedSharding]:
    """The sharding of every leaf of an optimizer's state, for `jax.jit(init, out_shardings=…)`,
    `jax.device_put`, and the arguments and results of a step.

    A copy of a parameter, such as a momentum, is where the parameter is. Matrices of curvature are
    cut along the stack that they are in, else along their rows, over all axes of the mesh whose
    lengths divide them. Counters and what does not divide are on every device. It is the work of a
    refresh that is balanced by cost, however the state is kept: each matrix is factorised on one
    device, and what every device keeps of it is gathered.

    **Arguments:**

    - `optimizer`: what has an `init`: an Optax transformation, a method, or a fused step.
    - `params`: what `init` takes, as arrays or `jax.ShapeDtypeStruct`s, with their shardings. What
      has none is on every device.
    - `keep`: `"all"`: every device keeps what every step reads (inverses, low-rank bases,
      eigenbases), so that steps without a refresh send nothing for it; only what refreshes alone
      read (full factors and second moments) is divided. `"own"` divides all of it: least memory,
      at the price of sending preconditioned gradients, or parts of them, in every step (the two
      ends of the dial of Pauloski et al. 2021, KAISA, section 3.1).

    **Returns** a tree of `NamedSharding`s, in the structure of the state.

    **Raises** `ValueError` for another `keep`, and for parameters on another mesh.
    """
    if keep not in KEEP:
        raise ValueError(f'keep: got {keep!r}, wanted "all" or "own".')
    state = eqx.filter_eval_shape(optimizer.init, params)
    owners = dict(_specs(params, mesh))
    says = lambda node: hasattr(node, "resting")
    curvature = [node for node in jax.tree.leaves(state, is_leaf=says) if says(node)]
    ids = lambda tree: {id(leaf) for leaf in jax.tree.leaves(tree)}
    matrices, resting = ids(curvature), ids([node.resting for node in curvature])

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        spec = None
        if id(leaf) not in matrices:
            spec = _spec_of_copy(path, leaf.shape, owners)
        elif leaf.ndim > 1 and (keep == "own" or id(leaf) in resting):
            spec = _spread(leaf.shape, mesh)
        return NamedSharding(mesh, PartitionSpec() if spec is None else spec)

    return jax.tree_util.tree_map_with_path(place, state)


def _specs(params: Any, mesh: Mesh) -> Iterator[tuple[str, tuple[tuple[int, ...], PartitionSpec]]]:
    """Shape and spec of each parameter, by its path."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(params, _is_shaped)):
        sharding, spec = getattr(leaf, "sharding", None), PartitionSpec()
        if isinstance(sharding, NamedSharding):
            if sharding.mesh.shape != mesh.shape:
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)}: it is on a mesh of "
                    f"{sharding.mesh.shape}, wanted one of {mesh.shape}. Put all on one mesh."
                )
            spec = sharding.spec
        yield jax.tree_util.keystr(path), (leaf.shape, spec)


def _is_shaped(leaf: Any) -> bool:
    return _tree.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _spec_of_copy(
    path: Sequence[Any],
    shape: tuple[int, ...],
    owners: dict[str, tuple[tuple[int, ...], PartitionSpec]],
) -> PartitionSpec | None:
    """Where the parameter is that a leaf is like, by itself or as a stack of one; or None."""
    # The end of the path in a tree of the parameters, or a key of a dict that is one's path.
    ends = {jax.tree_util.keystr(tuple(path[i:])) for i in range(len(path))}
    ends |= {key.key for key in path if isinstance(key, jax.tree_util.DictKey)}
    for end in sorted(ends & owners.keys(), key=len, reverse=True):
        like, spec = owners[end]
        if shape == like:
            return spec
        if shape == (1, *like):
            return PartitionSpec(None, *spec)
    return None


def _spread(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Over as many devices as divide it: the first axis, the stack, before the others."""
    names: list[tuple[str, ...]] = [() for _ in shape]
    left = list(shape)
    for name, size in sorted(mesh.shape.items(), key=lambda item: -item[1]):
        fits = next((i for i, length in enumerate(left) if length and length % size == 0), None)
        if fits is not None:
            names[fits] += (name,)
            left[fits] //= size
    return PartitionSpec(*(own or None for own in names))
