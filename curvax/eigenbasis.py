"""Eigenbases that are kept up to date: by an eigendecomposition at first, and then by one step of
orthogonal iteration from the basis that is there (Vyas et al. 2024, algorithm 4).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvax._linalg import applied, cholesky, eigh, largest_entry, matmul, shifted, transposed
from curvax._stacks import escalated, finite_each, pick

# Passes of Cholesky QR. One or two do, from a basis that is nearly one of eigenvectors.
_PASSES = 6
# Orthonormal is what is so to this many rounding errors for each row, of so many rows at least: on
# a GPU products have 16 bits.
_ROUNDING, _ROWS = 8, 128


class Turn(NamedTuple):
    """A basis anew.

    Its columns are in the order of their eigenvalues, largest first; `order` says at which place
    each was before, so that what is kept for each column can be put in the same order. Where it is
    not `ok`, the basis and its order are the old ones.
    """

    basis: Float[Array, "stack n n"]
    order: Int[Array, "stack n"]
    ok: Bool[Array, " stack"]


def turned(
    matrices: Sequence[Array],
    bases: Sequence[Array],
    first: bool | Bool[Array, ""],
    *,
    tolerance: float | None = None,
    sort: bool = True,
) -> list[Turn]:
    """The eigenbases of stacks of positive semidefinite matrices, from those of similar ones.

    Each step of Q ← qr(AQ) divides what a column has of an eigenvector by the ratio of the two
    eigenvalues. Where A is singular, columns of its null space stay as they are.

    **Arguments:**

    - `matrices`, `bases`: A, and the orthogonal Q.
    - `first`: whether there are no bases yet: by an eigendecomposition. Both ways are compiled, one
      is run.
    - `tolerance`: where the off-diagonal part of QᵀAQ has less than this share of its Frobenius
      norm, Q stays as it is (Eschenhagen et al. 2025). None never asks.
    - `sort`: puts the columns in the order of qᵀAq before the step.

    **Cost:** for an n × n matrix about 15 n³ operations, as products and two Cholesky
    factorisations, where one pass makes the basis orthonormal; 7 n³ for each more.
    """
    if not matrices:
        return []

    def by_eigh(matrices: list[Array], bases: list[Array]) -> list[Turn]:
        turns = []
        for (_, vectors), q in zip(eigh(matrices), bases, strict=True):
            new = vectors[..., ::-1]
            turns.append(_kept_unless(finite_each(new), new, _in_place(q), q))
        return turns

    def by_iteration(matrices: list[Array], bases: list[Array]) -> list[Turn]:
        products = [matmul(a, q) for a, q in zip(matrices, bases, strict=True)]
        if tolerance is None:
            return _iterated(bases, products, sort)
        stale = [off_diagonal(q, y) > tolerance for q, y in zip(bases, products, strict=True)]
        keep = lambda: [Turn(q, _in_place(q), jnp.ones(q.shape[:1], bool)) for q in bases]
        any_stale = jnp.any(jnp.concatenate(stale))
        new = jax.lax.cond(any_stale, lambda: _iterated(bases, products, sort), keep)
        return [pick(old, turn, same) for old, turn, same in zip(stale, new, keep(), strict=True)]

    lists = list(matrices), list(bases)
    if isinstance(first, bool):
        return by_eigh(*lists) if first else by_iteration(*lists)
    return jax.lax.cond(first, by_eigh, by_iteration, *lists)


def rayleigh(matrices: Array, basis: Array) -> Float[Array, "stack n"]:
    """qᵀAq of each column."""
    return jnp.sum(basis * applied("snm,smk->snk", matrices, basis), axis=1)


def off_diagonal(basis: Array, product: Array) -> Float[Array, " stack"]:
    """The share that the off-diagonal part of QᵀAQ has of its Frobenius norm, from Q and AQ."""
    # With Q orthogonal the norm of AQ − Q diag(QᵀAQ): no further product.
    values = jnp.sum(basis * product, axis=1, keepdims=True)
    scale = largest_entry(product)
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x / scale), axis=(1, 2)))
    return norm(product - basis * values) / jnp.maximum(norm(product), jnp.finfo(basis.dtype).tiny)


def _iterated(bases: list[Array], products: list[Array], sort: bool) -> list[Turn]:
    """From the products Y = AQ."""
    orders, starts, moments = [], [], []
    for q, y in zip(bases, products, strict=True):
        moment = matmul(transposed(q), y)
        moment = (moment + transposed(moment)) / 2
        values = jnp.diagonal(moment, axis1=1, axis2=2)
        order = jnp.argsort(-values, axis=1) if sort else _in_place(q)
        if sort:
            q = jnp.take_along_axis(q, order[:, None], axis=2)
            moment = jnp.take_along_axis(moment, order[:, None], axis=2)
            moment = jnp.take_along_axis(moment, order[:, :, None], axis=1)
        orders.append(order)
        starts.append(q)
        moments.append(moment / largest_entry(moment))
    # With B = QᵀAQ = LLᵀ is AQ = QL Lᵀ: it has the Q factor of QL, whose columns are nearly
    # orthogonal, where all of AQ point to the largest eigenvector.
    tall = []
    for q, lower in zip(starts, _lower(moments), strict=True):
        tall.append(
            applied("snm,smk->snk", q, lower / jnp.linalg.norm(lower, axis=1, keepdims=True))
        )
    turns = []
    for b, order, q in zip(tall, orders, bases, strict=True):
        new, ok = _orthonormal(b)
        turns.append(_kept_unless(ok, new, order, q))
    return turns


def _lower(matrices: list[Array]) -> list[Array]:
    """L with LLᵀ = B + uI of positive semidefinite matrices whose largest entry is 1: a multiple of
    the identity, of the size of rounding errors, holds their null space in place. Tenfold where
    these are larger.
    """

    def attempt(units: list[Array]) -> list[Array]:
        lifted = [shifted(b, unit) for b, unit in zip(matrices, units, strict=True)]
        return [lower for lower, _ in cholesky(lifted)]

    eps = lambda b: jnp.finfo(b.dtype).eps
    traces = [jnp.trace(b, axis1=1, axis2=2) for b in matrices]
    units = [eps(b) * jnp.maximum(t, 1) for b, t in zip(matrices, traces, strict=True)]
    return [lower for lower, _ in escalated(attempt, units)]


def _orthonormal(tall: Array) -> tuple[Array, Array]:
    """Q of B = QR for square B with columns of length 1, and whether it is orthonormal: by Cholesky
    QR, as often as it takes (Fukaya et al. 2020, for the lift of the Gram matrix).
    """
    size = tall.shape[-1]
    unit = float(jnp.finfo(tall.dtype).eps) * max(size, _ROWS)

    def measured(q: Array) -> tuple[Array, Array, Array]:
        gram = applied("snk,snm->skm", q, q)
        # A sum has a NaN where an entry has one; a maximum need not have it (XLA on a CPU).
        off = shifted(gram, -jnp.ones_like(gram[:, 0, 0]))
        error = jnp.sqrt(jnp.sum(jnp.square(off), axis=(1, 2)))
        return q, gram, error <= _ROUNDING * unit * size**0.5

    def more(carry: Any) -> Array:
        (_, _, ok), count = carry
        return ~jnp.all(ok) & (count < _PASSES)

    def again(carry: Any) -> Any:
        (q, gram, _), count = carry
        ((_, half),) = cholesky([shifted(gram, jnp.full_like(gram[:, 0, 0], unit))])
        return measured(applied("snk,smk->snm", q, half)), count + 1

    (q, _, ok), _ = jax.lax.while_loop(more, again, (measured(tall), jnp.zeros((), jnp.int32)))
    return q, ok


def _kept_unless(ok: Array, new: Array, order: Array, q: Array) -> Turn:
    basis, order = pick(ok, (new, order), (q, _in_place(q)))
    return Turn(basis, order, ok)


def _in_place(basis: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(basis.shape[-1]), basis.shape[::2])
