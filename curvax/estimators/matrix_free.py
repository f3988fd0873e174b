"""Stochastic estimates of an operator's diagonal and trace from products with it.

For anything finer (XTrace, Hutch++, spectral densities) hand an operator to traceax or matfree;
[`flat`][curvax.flat] gives them the view over plain vectors that they expect.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from curvax import _tree
from curvax._checks import check_count
from curvax._convolution import loop_safe
from curvax.operators.base import AbstractOperator


def hutchinson_diagonal(
    operator: lx.AbstractLinearOperator, key: PRNGKeyArray, samples: int = 1
) -> PyTree[Array]:
    """E[v ⊙ Av] with Rademacher v: an unbiased estimate of diag(A) (Bekas et al. 2007).

    Its variance in entry i is the sum of the squares of the other entries of row i. Costs one
    product a sample; the result has the structure of the operator's input.
    """
    check_count("samples", samples)
    return _mean(operator, key, samples, lambda v, product: jax.tree.map(jnp.multiply, v, product))


def hutchinson_trace(
    operator: lx.AbstractLinearOperator, key: PRNGKeyArray, samples: int = 1
) -> Scalar:
    """E[vᵀAv] with Rademacher v: an unbiased estimate of tr(A) (Hutchinson 1989)."""
    check_count("samples", samples)
    return _mean(operator, key, samples, _tree.dot)


def _mean(operator, key, samples, statistic):
    operator = lx.linearise(operator)
    structure = operator.in_structure()

    def one(key: PRNGKeyArray):
        probe = _tree.random_like(key, structure, random_signs)
        return statistic(probe, operator.mv(probe))

    if samples == 1:
        return one(key)
    draws = jax.lax.map(loop_safe(one), jax.random.split(key, samples))
    return jax.tree.map(lambda draw: jnp.mean(draw, axis=0), draws)


def random_signs(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """Independent ±1, as `jax.random.rademacher`, but of one random word for 32 of them: a random
    word for each entry takes longer on a CPU than a backward pass of a small network.
    """
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = jnp.right_shift(words, jnp.arange(32, dtype=jnp.uint32)[None]) & jnp.uint32(1)
    return 1 - 2 * bits.reshape(-1)[:size].reshape(shape).astype(dtype)


class flat(AbstractOperator):
    """An operator over pytrees as one over vectors, for libraries that expect those.

    Ravels at every product: for analysis, not for training steps on sharded parameters.
    """

    operator: lx.AbstractLinearOperator

    def mv(self, vector: Array) -> Array:
        product = self.operator.mv(_tree.unravel(self.operator.in_structure(), vector))
        # Not the dtype of the vector: traceax's Rademacher probes are integers.
        return _tree.ravel(product, self.out_structure().dtype)

    def as_matrix(self) -> Array:
        return self.operator.as_matrix()

    def transpose(self) -> "flat":
        return flat(self.operator.T)

    def linearise(self) -> "flat":
        return flat(lx.linearise(self.operator))

    @property
    def symmetric(self) -> bool:
        return lx.is_symmetric(self.operator)

    @property
    def positive_semidefinite(self) -> bool:
        return lx.is_positive_semidefinite(self.operator)

    @property
    def is_diagonal(self) -> bool:
        return lx.is_diagonal(self.operator)

    def in_structure(self) -> jax.ShapeDtypeStruct:
        dtype = _tree.common_dtype(self.operator.in_structure(), self.operator.out_structure())
        return jax.ShapeDtypeStruct((self.operator.in_size(),), dtype)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        dtype = self.in_structure().dtype
        return jax.ShapeDtypeStruct((self.operator.out_size(),), dtype)
