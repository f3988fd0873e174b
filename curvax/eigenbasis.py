"""Eigenbases that are kept up to date: by an eigendecomposition at first, and then by one step of
orthogonal iteration from the basis that is there (Vyas et al. 2024, algorithm 4).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvax._linalg import applied, cholesky, eigh, largest_entry, shifted
from curvax._stacks import finite_each, pick

# Passes of Cholesky QR. Two do, from a basis that is nearly one of eigenvectors; the columns of a
# start that is far from it may be nearly dependent.
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

    **Cost:** for an n × n matrix about 10 n³ operations, as products and a Cholesky factorisation.
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
        products = [_product(a, q) for a, q in zip(matrices, bases, strict=True)]
        if tolerance is None:
            return _iterated(bases, products, sort)
        stale = [_off_diagonal(q, y) > tolerance for q, y in zip(bases, products, strict=True)]
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
    return jnp.sum(basis * _product(matrices, basis), axis=1)


def off_diagonal(matrices: Array, basis: Array) -> Float[Array, " stack"]:
    """The share that the off-diagonal part of QᵀAQ has of its Frobenius norm."""
    return _off_diagonal(basis, _product(matrices, basis))


def _off_diagonal(basis: Array, product: Array) -> Array:
    # With Q orthogonal the norm of AQ − Q diag(QᵀAQ): no further product.
    values = jnp.sum(basis * product, axis=1, keepdims=True)
    scale = largest_entry(product)
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x / scale), axis=(1, 2)))
    return norm(product - basis * values) / jnp.maximum(norm(product), jnp.finfo(basis.dtype).tiny)


def _iterated(bases: list[Array], products: list[Array], sort: bool) -> list[Turn]:
    """From the products Y = AQ."""
    orders, tall = [], []
    for q, y in zip(bases, products, strict=True):
        values = jnp.sum(q * y, axis=1)
        # A multiple of the identity, of the size of rounding errors, holds the null space in place.
        info = jnp.finfo(y.dtype)
        unit = jnp.maximum(info.eps * jnp.sum(jnp.maximum(values, 0), axis=1), info.tiny / info.eps)
        y = y + unit[:, None, None] * q
        order = jnp.argsort(-values, axis=1) if sort else _in_place(q)
        orders.append(order)
        y = y / largest_entry(y)
        y = y / jnp.sqrt(jnp.sum(y * y, axis=1, keepdims=True))
        tall.append(jnp.take_along_axis(y, order[:, None], axis=2) if sort else y)
    turns = []
    for (new, ok), order, q in zip(_orthonormal(tall), orders, bases, strict=True):
        turns.append(_kept_unless(ok, new, order, q))
    return turns


def _orthonormal(stacks: list[Array]) -> list[tuple[Array, Array]]:
    """Q of B = QR for square B with columns of length 1, and whether it is orthonormal: by Cholesky
    QR, as often as it takes (Fukaya et al. 2020, for the lift of the Gram matrix).
    """
    unit = lambda q: float(jnp.finfo(q.dtype).eps) * max(q.shape[-1], _ROWS)

    def measured(q: Array) -> tuple[Array, Array, Array]:
        gram = applied("snk,snm->skm", q, q)
        error = jnp.max(jnp.abs(shifted(gram, -jnp.ones_like(gram[:, 0, 0]))), axis=(1, 2))
        return q, gram, error <= _ROUNDING * unit(q)  # no NaN is

    def more(carry: Any) -> Array:
        done, count = carry
        fine = jnp.concatenate([ok for _, _, ok in done])
        return ~jnp.all(fine) & (count < _PASSES)

    def again(carry: Any) -> Any:
        done, count = carry
        lifted = [shifted(gram, jnp.full_like(gram[:, 0, 0], unit(q))) for q, gram, _ in done]
        new = []
        for (q, _, _), (_, half) in zip(done, cholesky(lifted), strict=True):
            new.append(measured(applied("snk,smk->snm", q, half)))
        return new, count + 1

    begin = [measured(b) for b in stacks], jnp.zeros((), jnp.int32)
    done, _ = jax.lax.while_loop(more, again, begin)
    return [(q, ok) for q, _, ok in done]


def _product(a: Array, b: Array) -> Array:
    # On a GPU with 16 bits: columns of A Q are then off by about eps‖A‖, as the lift is.
    return applied("snm,smk->snk", a, b)


def _kept_unless(ok: Array, new: Array, order: Array, q: Array) -> Turn:
    basis, order = pick(ok, (new, order), (q, _in_place(q)))
    return Turn(basis, order, ok)


def _in_place(basis: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(basis.shape[-1]), basis.shape[::2])
