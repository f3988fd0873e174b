"""Stacks of upper triangular matrices, by halves: nearly all of it are products of matrices.

LAPACK's substitution is not called: on a CPU its threads wait for each other, at each call for
longer than small blocks take, and for a stack perhaps for ever.
"""

import jax.numpy as jnp
from jaxtyping import Array

from curvax._linalg import grown, matmul, transposed

# Blocks of this size are multiplied whole,
_BLOCK = 256
# on the diagonal of an equation inverted,
_LEAF = 64
# or not multiplied by a kernel for matrices.
_TINY = 8


def triangular_product(a: Array, b: Array) -> Array:
    """a @ b, where both are triangular: in the limit with a third of the operations."""
    size = a.shape[-1]
    if size <= _BLOCK:
        return matmul(a, b)
    half = size // 2
    first = triangular_product(a[:, :half, :half], b[:, :half, :half])
    second = triangular_product(a[:, half:, half:], b[:, half:, half:])
    return _assembled(first, matmul(a[:, :half], b[:, :, half:]), second)


def solve_transposed(upper: Array, right: Array) -> Array:
    """U⁻ᵀ B. Only small blocks on the diagonal are inverted."""
    count, size, _ = upper.shape
    leaf = min(_LEAF, 1 << max(size - 1, 0).bit_length())
    starts = range(0, size, leaf)
    blocks = [upper[:, i : i + leaf, i : i + leaf] for i in starts]
    blocks[-1] = grown(blocks[-1], leaf)
    inverses = _inverse(jnp.stack(blocks, axis=1).reshape(-1, leaf, leaf))
    inverses = transposed(inverses).reshape(count, len(starts), leaf, leaf)

    def solve(right: Array, first: int, last: int) -> Array:
        """The rows of the blocks from `first` to before `last`, once earlier ones are known."""
        if last - first == 1:
            rows = right.shape[1]
            return matmul(inverses[:, first, :rows, :rows], right)
        middle = (first + last) // 2
        start, split, end = first * leaf, middle * leaf, min(last * leaf, size)
        top = solve(right[:, : split - start], first, middle)
        known = matmul(transposed(upper[:, start:split, split:end]), top)
        bottom = solve(right[:, split - start :] - known, middle, last)
        return jnp.concatenate([top, bottom], axis=1)

    return solve(right, 0, len(starts))


def _inverse(upper: Array) -> Array:
    """[[A, C], [0, B]]⁻¹ = [[A⁻¹, −A⁻¹ C B⁻¹], [0, B⁻¹]], both halves in one stack; the size is a
    power of two.
    """
    size = upper.shape[-1]
    if size == 1:
        return 1 / upper
    half = size // 2
    halves = jnp.concatenate([upper[:, :half, :half], upper[:, half:, half:]])
    first, second = jnp.split(_inverse(halves), 2)
    corner = -_small_product(first, _small_product(upper[:, :half, half:], second))
    return _assembled(first, corner, second)


def _small_product(a: Array, b: Array) -> Array:
    if a.shape[-1] > _TINY:
        return matmul(a, b)
    return jnp.sum(a[:, :, :, None] * b[:, None, :, :], axis=2)


def _assembled(first: Array, corner: Array, second: Array) -> Array:
    zeros = jnp.zeros_like(transposed(corner))
    left = jnp.concatenate([first, zeros], axis=1)
    return jnp.concatenate([left, jnp.concatenate([corner, second], axis=1)], axis=2)
