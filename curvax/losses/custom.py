"""A loss of a user's own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from curvax.losses.base import (
    AbstractLoss,
    Events,
    Targets,
    check_array,
    check_shape,
    wide,
)


class CustomLoss(AbstractLoss):
    """A user's function `fn(event_outputs, event_targets) -> scalar`, by automatic differentiation.

    `fn` sees one event: outputs of the trailing `event_ndim` axes, and a pytree of targets whose
    leaves have lost the lead axes, all in float32 if they were narrower. With `convex=False` the
    curvature is ∇²ℓ with its negative eigenvalues set to zero, as in S always.
    `sampler(key, event_outputs)` draws the targets of one event; without it `sample` **raises**
    `ValueError`.

    S is the symmetric root V √max(Λ, 0) Vᵀ of the dense Hessian of an event, found by `eigh`: it
    is unique, where V alone could differ between two compilations. It costs n² memory and n³
    work for events of n entries.

    The functions are static, hence compared by identity: define them once, because a new lambda
    retraces.
    """

    fn: Callable[[Any, Any], Any] = eqx.field(static=True)
    event_ndim: int | None = eqx.field(default=1, static=True)
    convex: bool = eqx.field(default=True, static=True)
    sampler: Callable[[Any, Any], Any] | None = eqx.field(default=None, static=True)

    def _over_events(self, event_fn: Callable, outputs: Array, *others: Any) -> Any:
        for _ in self.lead_shape(outputs):
            event_fn = jax.vmap(event_fn)
        return event_fn(*jax.tree.map(wide, (outputs, *others)))

    def value(self, outputs: Events, targets: Targets) -> Array:
        values = self._over_events(self.fn, outputs, targets)
        return values.astype(wide(outputs).dtype)

    def gradient(self, outputs: Events, targets: Targets) -> Events:
        return self._over_events(jax.grad(self.fn), outputs, targets).astype(outputs.dtype)

    def hessian_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        def event_product(z, y, v):
            return jax.jvp(lambda z: jax.grad(self.fn)(z, y), (z,), (v,))[1]

        product = self._over_events(event_product, outputs, targets, vector)
        return product.astype(outputs.dtype)

    def _spectral_product(self, outputs, targets, vector, function: Callable) -> Array:
        """V f(max(Λ, 0)) Vᵀ v, where ∇²ℓ = V Λ Vᵀ."""

        def event_product(z, y, v):
            hessian = jax.hessian(self.fn)(z, y).reshape(z.size, z.size)
            eigenvalues, basis = jnp.linalg.eigh(hessian)
            inner = jnp.matmul(basis.T, v.reshape(-1), precision=jax.lax.Precision.HIGHEST)
            inner = function(jnp.maximum(eigenvalues, 0.0)) * inner
            return jnp.matmul(basis, inner, precision=jax.lax.Precision.HIGHEST).reshape(z.shape)

        product = self._over_events(event_product, outputs, targets, vector)
        return product.astype(outputs.dtype)

    def fisher_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        if self.convex:
            return self.hessian_product(outputs, targets, vector)
        return self._spectral_product(outputs, targets, vector, lambda x: x)

    def sqrt_product(self, outputs: Events, targets: Targets, coordinates: Events) -> Events:
        return self._spectral_product(outputs, targets, coordinates, jnp.sqrt)

    def sqrt_transpose_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return self._spectral_product(outputs, targets, vector, jnp.sqrt)

    def gradient_coordinates(self, outputs: Events, targets: Targets) -> None:
        return None

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Targets:
        if self.sampler is None:
            wanted = "a function (key, event_outputs) -> event_targets, to draw targets with"
            raise ValueError(f"sampler: got None, wanted {wanted}")
        sampler = self.sampler
        keys = jax.random.split(key, self.lead_shape(outputs))
        return self._over_events(lambda z, key: sampler(key, z), outputs, keys)

    def check(self, outputs: Any, targets: Any) -> None:
        self._check_outputs(outputs)
        lead = self.lead_shape(outputs)
        for path, leaf in jax.tree_util.tree_leaves_with_path(targets):
            name = f"targets{jax.tree_util.keystr(path)}"
            if not hasattr(leaf, "shape"):
                raise ValueError(f"{name}: got {type(leaf).__name__}, wanted an array")
            seen = tuple(leaf.shape)
            if seen[: len(lead)] != lead:
                wanted = f"({', '.join(map(str, lead))}, ...), the lead axes of the outputs first"
                raise ValueError(f"{name}: got shape {seen}, wanted {wanted}")
        events = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[len(lead) :], x.dtype), (outputs, targets)
        )
        result = jax.eval_shape(lambda z, y: self.fn(*jax.tree.map(wide, (z, y))), *events)
        check_array("fn's result", result, floating=True)
        check_shape("fn's result", result, (), "a scalar for each event")
