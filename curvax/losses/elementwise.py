"""Losses that are a sum over the outputs: squared error, sigmoid cross-entropy, Poisson."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from curvax.losses.base import (
    AbstractDiagonalLoss,
    Events,
    Targets,
    check_array,
    check_range,
    check_shape,
    floored_sqrt,
    wide,
)


class AbstractElementwiseLoss(AbstractDiagonalLoss):
    """ℓ(z, y) = Σᵢ φ(zᵢ, yᵢ), y of the shape of z, with φ'' ≥ 0 a function of z alone."""

    _support: ClassVar[tuple[int | float, int | float]]  # the range of the targets

    @abc.abstractmethod
    def _terms(self, z: Array, y: Array) -> Array:
        """φ(zᵢ, yᵢ)."""

    @abc.abstractmethod
    def _slopes(self, z: Array, y: Array) -> Array:
        """φ'(zᵢ, yᵢ)."""

    @abc.abstractmethod
    def _curvature(self, z: Array) -> Array:
        """φ''(zᵢ)."""

    def _root(self, outputs: Events) -> Array:
        return floored_sqrt(self._curvature(wide(outputs)), outputs.dtype)

    def _arguments(self, outputs: Events, targets: Array) -> tuple[Array, Array]:
        z = wide(outputs)
        y = targets.astype(z.dtype)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            low, high = self._support
            y = jnp.where((low <= y) & (y <= high), y, jnp.nan)
        return z, y

    def value(self, outputs: Events, targets: Targets) -> Array:
        terms = self._terms(*self._arguments(outputs, targets))
        return jnp.sum(terms, axis=tuple(range(len(self.lead_shape(outputs)), outputs.ndim)))

    def gradient(self, outputs: Events, targets: Targets) -> Events:
        return self._slopes(*self._arguments(outputs, targets)).astype(outputs.dtype)

    def hessian_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return (self._curvature(wide(outputs)) * wide(vector)).astype(outputs.dtype)

    def fisher_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return self.hessian_product(outputs, targets, vector)

    def gradient_coordinates(self, outputs: Events, targets: Targets) -> Events:
        slopes = self._slopes(*self._arguments(outputs, targets))
        return (slopes / self._root(outputs)).astype(outputs.dtype)

    def check(self, outputs: Any, targets: Any) -> None:
        self._check_outputs(outputs)
        check_array("targets", targets)
        check_shape("targets", targets, tuple(outputs.shape), "the shape of the outputs")
        check_range("targets", targets, *self._support)


class SquaredError(AbstractElementwiseLoss):
    """½‖z − y‖², or ‖z − y‖² with `half=False`, summed over the event.

    As a likelihood: y ~ N(z, I), or N(z, I/2) with `half=False`.
    """

    half: bool = eqx.field(default=True, static=True)
    event_ndim: int | None = eqx.field(default=None, static=True)
    convex: bool = eqx.field(default=True, static=True, init=False)
    _support: ClassVar[tuple[int | float, int | float]] = (-np.inf, np.inf)

    def _terms(self, z, y):
        return (0.5 if self.half else 1.0) * (z - y) ** 2

    def _slopes(self, z, y):
        return (1.0 if self.half else 2.0) * (z - y)

    def _curvature(self, z):
        return jnp.full_like(z, 1.0 if self.half else 2.0)

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Array:
        z = wide(outputs)
        # Not rounded to bfloat16: at |z| ≫ 1 that would lose the noise, hence the Fisher.
        return z + jax.random.normal(key, z.shape, z.dtype) / self._root(z)


class SigmoidCrossEntropy(AbstractElementwiseLoss):
    """Σᵢ log(1 + e^{zᵢ}) − yᵢ zᵢ: independent binary labels y in [0, 1], outputs z are logits."""

    event_ndim: int | None = eqx.field(default=None, static=True)
    convex: bool = eqx.field(default=True, static=True, init=False)
    _support: ClassVar[tuple[int | float, int | float]] = (0, 1)

    def _terms(self, z, y):
        # softplus(z) − y z would cancel for large z; for y in {0, 1} one of the two terms is 0.
        return y * jax.nn.softplus(-z) + (1.0 - y) * jax.nn.softplus(z)

    def _slopes(self, z, y):
        return (1.0 - y) * jax.nn.sigmoid(z) - y * jax.nn.sigmoid(-z)  # σ(z) − y, uncancelled

    def _curvature(self, z):
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Array:
        z = wide(outputs)
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)


class Poisson(AbstractElementwiseLoss):
    """Σᵢ e^{zᵢ} − yᵢ zᵢ: counts y ≥ 0, outputs z are log rates. The constant log y! is left out.

    `sample` needs a threefry key, as `jax.random.poisson` does, and saturates at the largest
    integer that JAX is configured for.
    """

    event_ndim: int | None = eqx.field(default=None, static=True)
    convex: bool = eqx.field(default=True, static=True, init=False)
    _support: ClassVar[tuple[int | float, int | float]] = (0, np.inf)

    def _terms(self, z, y):
        return jnp.exp(z) - y * z

    def _slopes(self, z, y):
        return jnp.exp(z) - y

    def _curvature(self, z):
        return jnp.exp(z)

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Array:
        z = wide(outputs)
        return jax.random.poisson(key, jnp.exp(z)).astype(z.dtype)
