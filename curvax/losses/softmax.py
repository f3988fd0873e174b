"""The cross-entropy of one class out of several."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from curvax.losses.base import (
    AbstractLoss,
    Events,
    Targets,
    check_array,
    check_range,
    check_shape,
    floored_sqrt,
    wide,
)


class SoftmaxCrossEntropy(AbstractLoss):
    """−Σ_c y_c log softmax(z)_c over the classes c, the last axis of the outputs.

    Targets are integer labels of shape (*lead,), or real labels y ≥ 0 of the outputs' shape
    (one-hot or soft). The latter need not sum to one: with s = Σ_c y_c and p = softmax(z),
    ∇ℓ = s p − y and ∇²ℓ = s (diag p − p pᵀ). Logits of −∞ (masked classes) are allowed for
    classes with y_c = 0. An integer that names no class makes every result of its event NaN.

    `sample` draws integer labels, whose Fisher information is that of s = 1.
    """

    event_ndim: int | None = eqx.field(default=1, static=True, init=False)
    convex: bool = eqx.field(default=True, static=True, init=False)

    def _labels(self, z: Array, targets: Array) -> tuple[Array, Array]:
        """The labels y, (*lead, classes), and their sums s, (*lead, 1)."""
        if jnp.issubdtype(targets.dtype, jnp.integer):
            # Compared, not gathered: an index would be clamped or wrapped, and XLA fuses the
            # comparison into the sum over classes, also where these are sharded.
            label = targets.astype(np.promote_types(targets.dtype, np.int32))[..., None]
            named = (label >= 0) & (label < z.shape[-1])
            hit = label == jax.lax.broadcasted_iota(label.dtype, z.shape, z.ndim - 1)
            # Selected, not multiplied: XLA takes NaN · 0 for 0 where it knows the 0.
            y, s = (jnp.where(named, x.astype(z.dtype), jnp.nan) for x in (hit, named))
            return y, s
        y = targets.astype(z.dtype)
        return y, jnp.sum(y, axis=-1, keepdims=True)

    def _sqrt_parts(self, outputs: Events, targets: Array) -> tuple[Array, Array, Array]:
        """p, d = √p and √s, with which S = √s (I − p 1ᵀ) diag(d)."""
        z = wide(outputs)
        p = jax.nn.softmax(z, axis=-1)
        return p, floored_sqrt(p, outputs.dtype), jnp.sqrt(self._labels(z, targets)[1])

    def value(self, outputs: Events, targets: Targets) -> Array:
        z = wide(outputs)
        y, _ = self._labels(z, targets)
        # 0 log 0 = 0: a masked class costs nothing.
        return -jnp.sum(jnp.where(y == 0, 0.0, y * jax.nn.log_softmax(z, axis=-1)), axis=-1)

    def gradient(self, outputs: Events, targets: Targets) -> Events:
        z = wide(outputs)
        y, s = self._labels(z, targets)
        return (s * jax.nn.softmax(z, axis=-1) - y).astype(outputs.dtype)

    def hessian_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        z, v = wide(outputs), wide(vector)
        p = jax.nn.softmax(z, axis=-1)
        _, s = self._labels(z, targets)
        return (s * p * (v - jnp.sum(p * v, axis=-1, keepdims=True))).astype(outputs.dtype)

    def fisher_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return self.hessian_product(outputs, targets, vector)

    def sqrt_product(self, outputs: Events, targets: Targets, coordinates: Events) -> Events:
        p, d, root_s = self._sqrt_parts(outputs, targets)
        du = d * wide(coordinates)
        return (root_s * (du - p * jnp.sum(du, axis=-1, keepdims=True))).astype(outputs.dtype)

    def sqrt_transpose_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        p, d, root_s = self._sqrt_parts(outputs, targets)
        v = wide(vector)
        return (root_s * d * (v - jnp.sum(p * v, axis=-1, keepdims=True))).astype(outputs.dtype)

    def gradient_coordinates(self, outputs: Events, targets: Targets) -> Events:
        y, s = self._labels(wide(outputs), targets)
        p, d, root_s = self._sqrt_parts(outputs, targets)
        # r = ∇ℓ / (√s d): S r = ∇ℓ − p (1ᵀ∇ℓ), and 1ᵀ∇ℓ = s − s = 0. With s = 0, ∇ℓ = 0 = r.
        r = (s * p - y) / (jnp.where(s == 0, 1.0, root_s) * d)
        return r.astype(outputs.dtype)

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Array:
        return jax.random.categorical(key, wide(outputs), axis=-1)

    def check(self, outputs: Any, targets: Any) -> None:
        self._check_outputs(outputs)
        check_array("targets", targets)
        shape = tuple(outputs.shape)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            check_shape("targets", targets, shape[:-1], "one integer label for each event")
            check_range("targets", targets, 0, shape[-1] - 1)
        else:
            why = "the shape of the outputs; labels of one axis less must have an integer dtype"
            check_shape("targets", targets, shape, why)
            check_range("targets", targets, 0, np.inf)
