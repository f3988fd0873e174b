"""Matrices with equal singular values in place of given ones, by products alone."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ScalarLike

from curvax import _tree
from curvax._linalg import is_old_gpu, transposed

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
    - `dtype`: of products. None takes bfloat16 where the matrices are float32 and the device is no
      CPU, as is customary (Jordan et al. 2024), and else their own, float32 at least.

    **Returns** the matrices in their own dtype, float32 at least.
    """
    x = matrices.astype(_tree.accumulation_dtype(matrices.dtype))
    tall = x.shape[-2] > x.shape[-1]
    x = transposed(x) if tall else x
    own = lambda x: _iterate(x, coefficients, eps, x.dtype if dtype is None else jnp.dtype(dtype))
    low = lambda x: _iterate(x, coefficients, eps, jnp.dtype(jnp.bfloat16))
    if dtype is None and x.dtype == jnp.float32 and not is_old_gpu():
        x = jax.lax.platform_dependent(x, cpu=own, default=low)
    else:
        x = own(x)
    return transposed(x) if tall else x


def _iterate(x: Array, coefficients: Coefficients, eps: ScalarLike, dtype: jnp.dtype) -> Array:
    """What is as large as x is kept in its own dtype, and what is as large as A in that of the
    products: reading and writing it takes as long as they do.
    """

    def product(a: Array, b: Array, result: Any = dtype) -> Array:
        precision = jax.lax.Precision.HIGHEST if dtype == x.dtype else None
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.matmul(a, b, precision=precision, preferred_element_type=result)

    def added(*terms: tuple[Any, Array]) -> Array:
        return functools.reduce(operator.add, (c * term.astype(x.dtype) for c, term in terms))

    def together(x: Array, coefficients: Coefficients, first: bool) -> Array:
        """These steps as one polynomial of A times X.

        A factor aI + F, and the whole polynomial share·I + rest, are kept in two parts: for the
        smallest singular values the share is all, and is not rounded. Polynomials of A commute.
        """
        gram, scale = product(x, transposed(x)), jnp.ones((), x.dtype)
        if first:
            # The norm is in the trace. Zeros, and what has so small a square, stay zero.
            square = jnp.trace(gram.astype(x.dtype), axis1=-2, axis2=-1)[..., None, None]
            norm = jnp.sqrt(square) + jnp.asarray(eps, x.dtype)
            scale = jnp.where(square < jnp.finfo(x.dtype).tiny, 0, 1 / norm)
            gram = added((scale * scale, gram)).astype(dtype)
        (last, b, c), *others = coefficients
        factor = added((b, gram), (c, product(gram, gram))).astype(dtype)
        share, rest = last, factor
        for a, b, c in others:
            for _ in range(2):
                gram = added((last, gram), (1, product(factor, gram))).astype(dtype)
            last, factor = a, added((b, gram), (c, product(gram, gram))).astype(dtype)
            rest = added((share, factor), (a, rest), (1, product(factor, rest))).astype(dtype)
            share = a * share
        # The large singular values are what is left of a difference.
        return added((share * scale, x), (scale, product(rest, x, x.dtype)))

    rows, columns = x.shape[-2:]
    length = _TOGETHER if columns >= _WIDE * rows else 1
    for start in range(0, len(coefficients), length):
        x = together(x, coefficients[start : start + length], start == 0)
    return x
