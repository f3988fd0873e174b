"""How the damping of a Kronecker product is shared out between its factors."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Scalar

from curvax.operators.factors import AbstractFactor
from curvax.operators.kronecker import tikhonov


class AbstractFactorDamping(eqx.Module):
    """How a damping λ of a Kronecker product is shared out between its factors.

    (G + γ_G I) ⊗ (A + γ_A I) stands in for G ⊗ A + λI. What a subclass returns must be positive,
    also for factors that are zero; factors are stacks, and shifts have one entry for each matrix.
    """

    @abc.abstractmethod
    def shifts(
        self, damping: Scalar, input: AbstractFactor, output: AbstractFactor
    ) -> tuple[Array, Array]:
        """What to add to the input and to the output factor of each matrix of a stack."""

    @abc.abstractmethod
    def diagonal(self, damping: Scalar, entries: Array) -> Array:
        """What to add to a diagonal block, or to the second moments of EK-FAC."""


class FactoredTikhonov(AbstractFactorDamping):
    """π√λ to A and √λ/π to G, with π² the ratio of their mean eigenvalues (Martens & Grosse 2015,
    section 6.3). λ has the units of the curvature, so that it scales with the loss.
    """

    def shifts(self, damping: Scalar, input: Any, output: Any) -> tuple[Array, Array]:
        return tikhonov(damping, input, output, pi=True)

    def diagonal(self, damping: Scalar, entries: Array) -> Array:
        del entries
        return damping


class RelativeTikhonov(AbstractFactorDamping):
    """√λ times the mean eigenvalue to each factor: the same rule, with λ as a share of the mean
    eigenvalue of each block, and so without units.
    """

    def shifts(self, damping: Scalar, input: Any, output: Any) -> tuple[Array, Array]:
        root = jnp.sqrt(damping)
        means = [factor.trace() / factor.size for factor in (input, output)]
        tiny = jnp.finfo(means[0].dtype).tiny
        floors = [jnp.maximum(root.astype(mean.dtype) * mean, tiny**0.5) for mean in means]
        return floors[0], floors[1]

    def diagonal(self, damping: Scalar, entries: Array) -> Array:
        mean = jnp.mean(entries)
        return jnp.maximum(damping.astype(mean.dtype) * mean, jnp.finfo(mean.dtype).tiny ** 0.5)
