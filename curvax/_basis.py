"""Several parameter trees in one: a tall matrix whose columns are trees.

Each leaf of a basis has one more axis in front, for the columns. As with `_tree` nothing is
ravelled, so a sharded leaf keeps its sharding: an inner product of columns is a sum over leaves.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from curvax import _tree
from curvax._convolution import loop_safe
from curvax._linalg import eigh, matmul, transposed
from curvax._sharding import explicit

Basis = PyTree[Float[Array, "_ ..."]]

_HIGHEST = jax.lax.Precision.HIGHEST


def gram(a: Basis, b: Basis) -> Float[Array, "k m"]:
    """AᵀB."""
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    dtype = _tree.accumulation_dtype(*(leaf.dtype for leaf in leaves_a + leaves_b))
    total = jnp.zeros((leaves_a[0].shape[0], leaves_b[0].shape[0]), dtype)
    for x, y in zip(leaves_a, leaves_b, strict=True):
        # Over the last two axes, then the others: XLA (jaxlib 0.10.2, 0.11.2) makes wrong numbers
        # of a contraction of three axes that two meshes' axes share otherwise in x than in y.
        axes, others = tuple(range(1, x.ndim))[-2:], tuple(range(1, x.ndim))[:-2]
        product = jax.lax.dot_general(
            x.astype(dtype),
            y.astype(dtype),
            ((axes, axes), (others, others)),
            precision=_HIGHEST,
            out_sharding=_spread(x, *_spec(x)[1:-2], None, None),
        )
        total = total + jnp.sum(product, axis=tuple(range(len(others))))
    return total


def products(basis: Basis, vector: PyTree[Array]) -> Float[Array, " columns"]:
    """Bᵀv."""
    return gram(basis, jax.tree.map(lambda v: v[None], vector))[:, 0]


def rotated(basis: Basis, matrix: Float[Array, "k m"]) -> Basis:
    """B M."""

    def leaf(b: Array) -> Array:
        return jax.lax.dot_general(
            matrix.astype(b.dtype), b, (((0,), (0,)), ((), ())), precision=_HIGHEST
        )

    return jax.tree.map(leaf, basis)


def combined(basis: Basis, coefficients: Float[Array, " columns"]) -> PyTree[Array]:
    """B c."""
    return jax.tree.map(lambda x: x[0], rotated(basis, coefficients[:, None]))


def column(basis: Basis) -> PyTree[jax.ShapeDtypeStruct]:
    """The structure of one column."""
    return jax.eval_shape(lambda: jax.tree.map(lambda b: b[0], basis))


def zeros(like: PyTree, columns: int) -> Basis:
    """Columns of zeros, in the dtypes in which leaves like these are summed up."""

    def leaf(x: Any) -> Array:
        zero = jnp.zeros_like(x, _tree.accumulation_dtype(x.dtype))
        return jnp.broadcast_to(zero, (columns, *x.shape))

    return jax.tree.map(leaf, like)


def gaussian(key: PRNGKeyArray, like: PyTree, columns: int) -> Basis:
    """Independent standard normal columns, in the dtypes in which such leaves are summed up."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    draws = []
    for one, leaf in zip(keys, leaves, strict=False):
        shape, dtype = (columns, *leaf.shape), _tree.accumulation_dtype(leaf.dtype)
        draw = jax.random.normal(one, shape, dtype)
        spread = _spread(leaf, None, *_spec(leaf))
        draws.append(draw if spread is None else jax.sharding.reshard(draw, spread))
    return treedef.unflatten(draws)


def applied(
    function: Callable[[PyTree[Array]], PyTree[Array]],
    basis: Basis,
    structure: PyTree[jax.ShapeDtypeStruct],
    at_once: int = 1,
) -> Basis:
    """The function of each column, in the dtypes of the basis: `at_once` of them side by side,
    those one after another. It gets columns in the dtypes of `structure`.
    """

    def one(v: PyTree[Array]) -> PyTree[Array]:
        return _tree.cast(function(_tree.cast(v, structure)), v)

    side_by_side = jax.vmap(one)
    count = jax.tree.leaves(basis)[0].shape[0]
    if at_once >= count:
        return side_by_side(basis)
    if at_once == 1:
        return jax.lax.map(loop_safe(one), basis)
    rounds, rest = divmod(count, at_once)
    # Not the batches of `lax.map`, which fails on leaves of size 0.
    rows = lambda x: x[: rounds * at_once].reshape(rounds, at_once, *x.shape[1:])
    done = jax.lax.map(loop_safe(side_by_side), jax.tree.map(rows, basis))
    done = jax.tree.map(lambda x: x.reshape(rounds * at_once, *x.shape[2:]), done)
    if not rest:
        return done
    last = side_by_side(jax.tree.map(lambda x: x[-rest:], basis))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), done, last)


def orthonormal(basis: Basis) -> tuple[Basis, Float[Array, "k k"]]:
    """Q with orthonormal columns and R with B = Q R.

    From the eigenvectors of the Gram matrix, twice, as once would square the condition number
    (Stathopoulos & Wu 2002). Unlike Cholesky QR it does not break down where columns depend on
    each other: Q then has shorter columns, which R makes up for.
    """
    gathered = None
    for _ in range(2):
        values, vectors = eigh_of(gram(basis, basis))
        smallest = len(values) * jnp.finfo(values.dtype).eps * values[-1]
        roots = jnp.sqrt(jnp.maximum(values, jnp.maximum(smallest, jnp.finfo(values.dtype).tiny)))
        basis = rotated(basis, vectors / roots[None])
        upper = roots[:, None] * transposed(vectors)
        gathered = upper if gathered is None else matmul(upper, gathered)
    assert gathered is not None
    return basis, gathered


def eigh_of(matrix: Float[Array, "k k"]) -> tuple[Float[Array, " k"], Float[Array, "k k"]]:
    """Eigenvalues, smallest first, and eigenvectors of a symmetric matrix, up to rounding."""
    ((values, vectors),) = eigh([((matrix + transposed(matrix)) / 2)[None]])
    return values[0], vectors[0]


def _spec(leaf: Any) -> tuple[Any, ...]:
    """How the axes of a leaf are sharded, where that is part of its type."""
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.Array) else leaf.sharding
    spec = () if sharding is None else tuple(sharding.spec)
    return spec + (None,) * (len(leaf.shape) - len(spec))


def _spread(leaf: Any, *spec: Any) -> jax.sharding.NamedSharding | None:
    """A sharding on the mesh that is part of the type of a leaf; None if there is none."""
    sharding = explicit(leaf)
    if sharding is None:
        return None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
