"""Matrix products at full precision, whatever the default of the device (TF32 ruins small
eigenvalues).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

_HIGHEST = jax.lax.Precision.HIGHEST


def matmul(a: Array, b: Array) -> Array:
    """a @ b, in the dtype of `a`."""
    return jnp.matmul(a, b.astype(a.dtype), precision=_HIGHEST)


def einsum(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, precision=_HIGHEST)
