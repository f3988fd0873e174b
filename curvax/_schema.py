"""What a tree looks like: the path, type and shape of everything in it, to be kept and compared."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, Sharding
from jaxtyping import PyTree

from curvax import _tree
from curvax.memories import AbstractMemory

# What is written as it is.
PLAIN = {each.__name__: each for each in (bool, int, float, str)}
# What comes from the program, such as the activations in a model.
FUNCTION = "function"


class Entry(NamedTuple):
    """A node or a leaf. `what` is a dtype for an array, a typed key among them, else the name of a
    type; `shape` is that of an array.
    """

    path: str
    what: str
    shape: list[int] | None

    def __str__(self) -> str:
        return self.what if self.shape is None else f"{self.what}{self.shape}"


def entries(tree: PyTree[Any]) -> Iterator[tuple[Entry, Any]]:
    """All nodes, each followed by what is in it, and all leaves. A node has None beside it.

    **Raises** `ValueError` for a leaf that is nothing to write.
    """
    pending: list[tuple[tuple[Any, ...], Any]] = [((), tree)]
    while pending:
        path, node = pending.pop()
        name = jax.tree_util.keystr(path)
        if jax.tree_util.all_leaves([node]):
            yield leaf_entry(name, node), node
            continue
        yield Entry(name, _type(node), None), None
        below = lambda each, node=node: each is not node
        inside, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=below)
        pending += [((*path, *key), each) for key, each in reversed(inside)]


def leaf_entry(path: str, leaf: Any) -> Entry:
    """**Raises** `ValueError` for a leaf that is nothing to write."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and leaf.dtype != object:
        return Entry(path, str(leaf.dtype), list(leaf.shape))
    name = type(leaf).__name__
    if PLAIN.get(name) is type(leaf):
        return Entry(path, name, None)
    if callable(leaf):
        return Entry(path, FUNCTION, None)
    raise ValueError(
        f"tree: got a {name} at {path or 'its root'}, wanted arrays, keys, numbers, strings and "
        "functions. Put in its stead what it can be made of again."
    )


def is_key(leaf: Any) -> bool:
    """A typed key, or a struct of one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def difference(saved: Sequence[Entry], wanted: Sequence[Entry]) -> str | None:
    """What is different at the first path where something is, as a sentence."""
    known, asked = {each.path for each in saved}, {each.path for each in wanted}
    for i in range(max(len(saved), len(wanted))):
        have = saved[i] if i < len(saved) else None
        want = wanted[i] if i < len(wanted) else None
        if have == want:
            continue
        # In the order of the tree: what one of them lacks comes before what only moved.
        if have is not None and have.path not in asked:
            want = None
        elif want is not None and want.path not in known:
            have = None
        where = (want or have or saved[0]).path or "the root"
        return f"{where} is {have or 'nothing'} there, and {want or 'nothing'} in `like`"
    return None


def sharding(leaf: Any) -> Sharding | None:
    """The devices that an array is wanted on; None for a value of the host, and for an array that
    follows others.
    """
    found = getattr(leaf, "sharding", None)
    if found is None or not getattr(leaf, "committed", True):
        return None
    if isinstance(found, NamedSharding) and isinstance(found.mesh, AbstractMesh):
        # As `jax.eval_shape` has it where axes are Explicit.
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(
                f"like: got a sharding on {found.mesh}, which names no devices, wanted one that "
                "does, or jax.set_mesh(...) around the call."
            )
        return NamedSharding(mesh, found.spec)
    return found


def placed(value: Any, like: Any) -> Any:
    """A value of the host where, and as what, `like` is."""
    if is_key(value):
        # By its numbers, which go to devices of other processes, too.
        numbers = _put(np.asarray(jax.random.key_data(value)), sharding(like))
        return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(value))
    if not _tree.is_array(value) or isinstance(like, np.ndarray):
        return value
    if isinstance(like, np.generic):
        return value[()]
    if getattr(like, "weak_type", False):
        # Without, a step would be compiled again, and might give another dtype.
        weak = jnp.full(like.shape, np.zeros((), like.dtype).item())
        value = weak.at[...].set(jnp.asarray(value)) if weak.dtype == like.dtype else value
    return _put(value, sharding(like))


def _put(value: Any, devices: Sharding | None) -> jax.Array:
    return jnp.array(value) if devices is None else jax.device_put(value, devices)


def _type(node: Any) -> str:
    """The name of a node's type. A stack of factors says whose they are, in order."""
    name = "None" if node is None else type(node).__name__
    if isinstance(node, AbstractMemory):
        return f"{name} of " + ", ".join(f"{path} × {count}" for path, count in node.parts)
    return name
