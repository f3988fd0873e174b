"""Matrices with equal singular values in place of given ones, by products alone."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ScalarLike

from curvax import _tree
from curvax._linalg import is_old_gpu, transposed
from curvax._stacks import Groups, joined, places, spans

# Of a step X ↦ aX + (bA + cA²)X, A = XXᵀ (Jordan et al. 2024): a large slope at zero, and singular
# values that end between about 0.7 and 1.2 instead of at 1.
QUINTIC = (3.4445, -4.7750, 2.0315)

Coefficients = tuple[tuple[float, float, float], ...]

# Columns for each row from which on it is cheaper to iterate with A alone: s steps of an m × n
# matrix take 4 m²n + (8 s − 6) m³ operations instead of s (4 m²n + 2 m³).
_WIDE = 1.5
# After so many such steps A is formed anew: what rounding leaves of its smallest eigenvalues may be
# negative, and grows twelvefold in a step.
_TOGETHER = 3
# Matrices that keep a device busy: a stack of so many is not copied into a larger one.
_ENOUGH = 8


def newton_schulz(
    matrices: Array,
    coefficients: Coefficients = (QUINTIC,) * 5,
    *,
    eps: ScalarLike = 1e-30,
    dtype: Any = None,
) -> Array:
    """U Vᵀ of each matrix U Σ Vᵀ in a stack, roughly, by Newton-Schulz iteration.

    Each step maps the singular values, which start at σ/‖Σ‖, by x ↦ ax + bx³ + cx⁵.

    **Arguments:**

    - `matrices`: of shape (..., rows, columns).
    - `coefficients`: (a, b, c) of each step.
    - `eps`: is added to the norm that a matrix is divided by first.
    - `dtype`: in which it is computed. None takes bfloat16 where the matrices are float32 and the
      device is no CPU, as is customary (Jordan et al. 2024), and else their own, float32 at least.

    **Returns** the matrices in their own dtype, float32 at least.
    """
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    (done,) = orthogonalized([stack], coefficients, eps=eps, dtype=dtype)
    return done.reshape(matrices.shape)


def orthogonalized(
    stacks: Sequence[Array],
    coefficients: Coefficients = (QUINTIC,) * 5,
    *,
    eps: ScalarLike = 1e-30,
    dtype: Any = None,
) -> list[Array]:
    """[`newton_schulz`][curvax.orthogonal.newton_schulz] of stacks of matrices of several shapes.

    What is square is worked on together for all whose shorter sides are equal, but for float32 on a
    CPU, where a larger stack saves nothing.
    """
    wide = [x.astype(_tree.accumulation_dtype(x.dtype)) for x in stacks]
    alike = Groups((_shape(i, x) for i, x in enumerate(wide)), wide)
    wholes = alike.together(wide)
    results = list(wholes)
    for members in places((x.dtype, min(x.shape[1:])) for x in wholes).values():
        group = [wholes[i] for i in members]
        kind = group[0].dtype
        if dtype is None and kind == jnp.float32 and not is_old_gpu():
            apart = lambda *xs: [_iterate([x], coefficients, eps, x.dtype)[0] for x in xs]
            low = lambda *xs: _iterate(xs, coefficients, eps, jnp.dtype(jnp.bfloat16))
            done = jax.lax.platform_dependent(*group, cpu=apart, default=low)
        else:
            done = _iterate(group, coefficients, eps, kind if dtype is None else jnp.dtype(dtype))
        for i, x in zip(members, done, strict=True):
            results[i] = x
    return alike.apart(results)


def _shape(place: int, x: Array) -> Any:
    """Of matrices that are put in one stack; else the stack's own place."""
    return (x.dtype, *x.shape[1:]) if x.shape[0] < _ENOUGH else place


def _iterate(
    xs: Sequence[Array], coefficients: Coefficients, eps: ScalarLike, dtype: jnp.dtype
) -> list[Array]:
    """Of stacks with one length of the shorter side, be it rows or columns.

    All that is written down is in the dtype of the products: reading and writing it takes as long
    as they do.
    """
    wide = xs[0].dtype
    parts = spans(xs)

    def product(a: Array, b: Array, result: Any = dtype) -> Array:
        precision = jax.lax.Precision.HIGHEST if dtype == wide else None
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.matmul(a, b, precision=precision, preferred_element_type=result)

    def added(*terms: tuple[Any, Array]) -> Array:
        return functools.reduce(operator.add, (c * term.astype(wide) for c, term in terms))

    def rounded(*terms: tuple[Any, Array]) -> Array:
        # Or XLA keeps the sum as it was before it was rounded, for those who read it again.
        return jax.lax.optimization_barrier(added(*terms).astype(dtype))

    def squared(x: Array) -> Array:
        """A: XXᵀ or XᵀX, whichever is smaller."""
        return product(transposed(x), x) if _is_tall(x) else product(x, transposed(x))

    def times(x: Array, polynomial: Array) -> Array:
        return product(*((x, polynomial) if _is_tall(x) else (polynomial, x)), wide)

    def together(xs: Sequence[Array], coefficients: Coefficients, first: bool) -> list[Array]:
        """These steps as one polynomial of A times X.

        A factor aI + F, and the whole polynomial share·I + rest, are kept in two parts: for the
        smallest singular values the share is all, and is not rounded. Polynomials of A commute.
        """
        gram = joined([squared(x) for x in xs])
        scale = jnp.ones((gram.shape[0], 1, 1), wide)
        if first:
            # The norm is in the trace. Zeros, and what has so small a square, stay zero.
            square = jnp.trace(gram.astype(wide), axis1=-2, axis2=-1)[..., None, None]
            norm = jnp.sqrt(square) + jnp.asarray(eps, wide)
            scale = jnp.where(square < jnp.finfo(wide).tiny, 0, 1 / norm)
            gram = rounded((scale * scale, gram))
        (last, b, c), *others = coefficients
        factor = rounded((b, gram), (c, product(gram, gram)))
        share, rest = last, factor
        for a, b, c in others:
            for _ in range(2):
                gram = rounded((last, gram), (1, product(factor, gram)))
            last, factor = a, rounded((b, gram), (c, product(gram, gram)))
            rest = rounded((share, factor), (a, rest), (1, product(factor, rest)))
            share = a * share
        # The large singular values are what is left of a difference.
        return [
            added((share * scale[own], x), (scale[own], times(x, rest[own])))
            for x, own in zip(xs, parts, strict=True)
        ]

    short = min(xs[0].shape[1:])
    long = sum(x.shape[0] * max(x.shape[1:]) for x in xs)
    length = _TOGETHER if long >= _WIDE * short * parts[-1].stop else 1
    for start in range(0, len(coefficients), length):
        low = [x.astype(dtype) for x in xs]
        xs = together(low, coefficients[start : start + length], start == 0)
    return list(xs)


def _is_tall(x: Array) -> bool:
    return x.shape[-2] > x.shape[-1]
