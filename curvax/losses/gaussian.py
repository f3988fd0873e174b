"""A normal distribution whose variance is learned too."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from curvax.losses.base import (
    AbstractDiagonalLoss,
    Events,
    Targets,
    check_array,
    check_shape,
    wide,
)


class Gaussian(AbstractDiagonalLoss):
    """½ Σᵢ ρᵢ + (yᵢ − μᵢ)² e^{−ρᵢ}: a normal distribution with learned variance e^ρ.

    The last axis of the outputs is (μ₁ … μ_k, ρ₁ … ρ_k), that of the targets is k. ℓ is not
    convex; the curvature S Sᵀ is the Fisher information E_y[∇²ℓ] = diag(e^{−ρ}, ½).
    """

    event_ndim: int | None = eqx.field(default=1, static=True, init=False)
    convex: bool = eqx.field(default=False, static=True, init=False)

    def _root(self, outputs: Events) -> Array:
        _, rho = jnp.split(wide(outputs), 2, axis=-1)
        return jnp.concatenate([jnp.exp(-0.5 * rho), jnp.full_like(rho, 0.5**0.5)], axis=-1)

    def _residual(self, outputs: Events, targets: Array) -> tuple[Array, Array, Array]:
        """ε = (y − μ) e^{−ρ/2}, e^{−ρ/2} and ρ. No e^{−ρ}: it overflows before ε² does."""
        mean, rho = jnp.split(wide(outputs), 2, axis=-1)
        scale = jnp.exp(-0.5 * rho)
        return (targets.astype(mean.dtype) - mean) * scale, scale, rho

    def value(self, outputs: Events, targets: Targets) -> Array:
        error, _, rho = self._residual(outputs, targets)
        return 0.5 * jnp.sum(rho + error**2, axis=-1)

    def gradient(self, outputs: Events, targets: Targets) -> Events:
        error, scale, _ = self._residual(outputs, targets)
        parts = [-error * scale, 0.5 * (1.0 - error**2)]
        return jnp.concatenate(parts, axis=-1).astype(outputs.dtype)

    def hessian_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        # ∂²ℓ/∂μ² = e^{−ρ}, ∂²ℓ/∂μ∂ρ = (y − μ) e^{−ρ}, ∂²ℓ/∂ρ² = ½ (y − μ)² e^{−ρ}.
        error, scale, _ = self._residual(outputs, targets)
        v_mean, v_rho = jnp.split(wide(vector), 2, axis=-1)
        parts = [
            scale * (scale * v_mean + error * v_rho),
            error * (scale * v_mean + 0.5 * error * v_rho),
        ]
        return jnp.concatenate(parts, axis=-1).astype(outputs.dtype)

    def fisher_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return (self._root(outputs) ** 2 * wide(vector)).astype(outputs.dtype)

    def gradient_coordinates(self, outputs: Events, targets: Targets) -> Events:
        error, _, _ = self._residual(outputs, targets)
        parts = [-error, 0.5**0.5 * (1.0 - error**2)]  # ∇ℓ / (e^{−ρ/2}, √½), never divided
        return jnp.concatenate(parts, axis=-1).astype(outputs.dtype)

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Array:
        mean, rho = jnp.split(wide(outputs), 2, axis=-1)
        return mean + jnp.exp(0.5 * rho) * jax.random.normal(key, mean.shape, mean.dtype)

    def check(self, outputs: Any, targets: Any) -> None:
        self._check_outputs(outputs)
        check_array("targets", targets)
        *lead, size = outputs.shape
        if size % 2:
            wanted = "a last axis of even size (means, then log variances)"
            raise ValueError(f"outputs: got shape {tuple(outputs.shape)}, wanted {wanted}")
        check_shape("targets", targets, (*lead, size // 2), "half the last axis of the outputs")
