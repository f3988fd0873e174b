"""Vector-space operations on parameter pytrees.

Nothing here ravels: a sharded leaf keeps its sharding, and a dot product is the sum of the
leafwise dot products. Low-precision leaves (bfloat16, float16) are reduced in float32.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, Scalar

from curvax._sharding import sharded_as, whole
from curvax._stacks import places

# Arrays of at most so many entries: launching a kernel for each costs more than to read them.
_SMALL = 2**18


def accumulation_dtype(*dtypes) -> jnp.dtype:
    """The dtype in which reductions over leaves of the given dtypes are carried out."""
    return _result_type(jnp.float32, *dtypes)


def _result_type(*dtypes) -> jnp.dtype:
    """`jnp.result_type`, also where strict promotion would refuse to mix them."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def _times(c: Scalar | float, x: Array) -> Array:
    """c·x, in the dtype that holds both."""
    if isinstance(c, int | float):
        return c * x
    dtype = _result_type(c.dtype, x.dtype)
    return c.astype(dtype) * x.astype(dtype)


def alike(arrays: Sequence[Array], kinds: Sequence[Hashable] = ()) -> list[list[int]]:
    """Which of some arrays to put in one stack for one kernel: the small ones of equal type (and,
    where given, equal kind).
    """
    keys = [
        (jax.typeof(array), kinds[i] if kinds else None) if array.size <= _SMALL else i
        for i, array in enumerate(arrays)
    ]
    return list(places(keys).values())


def stacked(arrays: Sequence[Array]) -> Array:
    """With one more leading axis."""
    return arrays[0][None] if len(arrays) == 1 else jnp.stack(arrays)


def total(a: PyTree[Array]) -> Scalar:
    """Sum over all entries of all leaves."""
    leaves = jax.tree.leaves(a)
    dtype = accumulation_dtype(*(leaf.dtype for leaf in leaves))
    result = jnp.zeros((), dtype)
    for members in alike(leaves):
        # One array as it is: with another axis XLA no longer knows its fast sums on a CPU.
        own = [leaves[i] for i in members]
        group = own[0] if len(own) == 1 else stacked(own)
        result = result + jnp.sum(group, dtype=dtype)
    return result


def dot(a: PyTree[Array], b: PyTree[Array]) -> Scalar:
    """Sum over leaves of ⟨a, b⟩, at the highest matrix precision."""
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    dtype = accumulation_dtype(*(leaf.dtype for leaf in leaves_a + leaves_b))
    # Multiply-and-sum, not `vdot`: no reshape (a reshape of a sharded leaf gathers it), and XLA's
    # tree-shaped reduction keeps float32 accurate to many millions of entries.
    pairs = zip(leaves_a, leaves_b, strict=True)
    return total([x.astype(dtype) * y.astype(dtype) for x, y in pairs])


def norm(a: PyTree[Array]) -> Scalar:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(dot(a, a))


def add(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """a + b, in the dtypes of `a`."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), a, b)


def sub(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """a − b, in the dtypes of `a`."""
    return jax.tree.map(lambda x, y: x - y.astype(x.dtype), a, b)


def scale(c: Scalar | float, a: PyTree[Array]) -> PyTree[Array]:
    """c·a, in the dtypes of `a`."""
    return jax.tree.map(lambda x: _times(c, x).astype(x.dtype), a)


def add_scaled(a: PyTree[Array], c: Scalar | float, b: PyTree[Array]) -> PyTree[Array]:
    """a + c·b, in the dtypes of `a`."""

    def leaf(x: Array, y: Array) -> Array:
        step = _times(c, y)
        dtype = _result_type(x.dtype, step.dtype)
        return (x.astype(dtype) + step.astype(dtype)).astype(x.dtype)

    return jax.tree.map(leaf, a, b)


def zeros_like(a: PyTree) -> PyTree[Array]:
    """Zeros of the structure of `a`."""
    return jax.tree.map(jnp.zeros_like, a)


def widened(a: PyTree) -> PyTree:
    """Arrays, or their shapes, in the dtypes that sums of them are carried in."""

    def leaf(x: Any) -> Any:
        dtype = accumulation_dtype(x.dtype)
        return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    return jax.tree.map(leaf, a)


def where(condition: Bool[Array, ""], a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """Leafwise `jnp.where` with one scalar condition; a leaf that is the same in both is kept."""
    return jax.tree.map(lambda x, y: x if x is y else jnp.where(condition, x, y), a, b)


def all_finite(a: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every entry of every inexact leaf is finite."""
    # A sum of numbers times zero is zero, or not a number: on a CPU it takes a fifth of the time of
    # asking each number and reducing the answers.
    return total([x * 0 for x in jax.tree.leaves(a) if eqx.is_inexact_array(x)]) == 0


def cast(a: PyTree, like: PyTree) -> PyTree[Array]:
    """`a` with each leaf in the dtype of the matching leaf of `like`."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), a, like)


def structure(a: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the leaves of `a`."""
    return jax.eval_shape(lambda: a)


def freeze(structs: PyTree[Any]) -> tuple[tuple[Any, ...], Any]:
    """A tree of shapes as a hashable value, for static fields; `thaw` is the inverse."""
    leaves, treedef = jax.tree.flatten(structs)
    return tuple(leaves), treedef


def thaw(frozen: tuple[tuple[Any, ...], Any]) -> PyTree[Any]:
    leaves, treedef = frozen
    return jax.tree.unflatten(treedef, leaves)


def size(a: PyTree) -> int:
    """Number of scalars in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(a))


def nbytes(a: PyTree) -> int:
    """Bytes held by all array leaves."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(a) if hasattr(x, "dtype"))


def random_like(
    key: Array, a: PyTree, sampler: Callable[..., Array] = jax.random.normal
) -> PyTree[Array]:
    """Independent draws of `sampler(key, shape, dtype)` in the structure of `a`."""
    leaves, treedef = jax.tree.flatten(a)
    keys = jax.random.split(key, max(len(leaves), 1))
    draws = [
        sharded_as(sampler(k, x.shape, x.dtype), x) for k, x in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, draws)


def paths(a: PyTree) -> list[str]:
    """Readable path of every leaf, for messages and tables."""
    return [jax.tree_util.keystr(path) or "<root>" for path, _ in jax.tree.leaves_with_path(a)]


def described(tree: PyTree) -> str:
    """Dtype and shape of the first leaves, for messages."""
    described = [
        f"{path}: {leaf.dtype}{list(leaf.shape)}"
        if hasattr(leaf, "shape")
        else f"{path}: {type(leaf).__name__}"
        for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True)
    ]
    return "{" + ", ".join(described[:12]) + (", …" if len(described) > 12 else "") + "}"


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, of JAX or of NumPy."""
    return isinstance(leaf, (np.ndarray, jax.Array))


def common_dtype(*trees: PyTree) -> jnp.dtype:
    """The dtype that holds every leaf of the given trees."""
    dtypes = [leaf.dtype for tree in trees for leaf in jax.tree.leaves(tree)]
    return _result_type(*dtypes) if dtypes else jnp.dtype(jnp.float32)


def ravel(a: PyTree[Array], dtype=None) -> Array:
    """All leaves in one vector: for dense references and small solves only, never in a step."""
    dtype = common_dtype(a) if dtype is None else dtype
    pieces = [jnp.ravel(whole(leaf)).astype(dtype) for leaf in jax.tree.leaves(a)]
    return jnp.concatenate(pieces) if pieces else jnp.zeros((0,), dtype)


def unravel(like: PyTree, vector: Array) -> PyTree[Array]:
    """Inverse of `ravel`, into the shapes and dtypes of `like`."""
    leaves, treedef = jax.tree.flatten(like)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size)
    pieces = [
        sharded_as(vector[start:end].reshape(leaf.shape).astype(leaf.dtype), leaf)
        for leaf, start, end in zip(leaves, ends[:-1], ends[1:], strict=True)
    ]
    return jax.tree.unflatten(treedef, pieces)
