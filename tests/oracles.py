"""Dense and slow references, written without the code that they judge."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax.losses import AbstractLoss

# -- losses ----------------------------------------------------------------------------------


def _flat_events(loss: AbstractLoss, outputs: Array, targets: PyTree) -> tuple[Array, PyTree]:
    """Outputs of shape (events, *event), and the targets alike."""
    lead = len(loss.lead_shape(outputs))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), (outputs, targets))


@eqx.filter_jit
def dense_event_gradient(loss: AbstractLoss, outputs: Array, targets: PyTree) -> Array:
    """∇ℓ of every event by `jax.grad` of the loss's value, (events, n)."""

    def gradient(z, y):
        return jax.grad(lambda z: loss.value(z[None], jax.tree.map(lambda a: a[None], y))[0])(z)

    z, y = _flat_events(loss, outputs, targets)
    return jax.vmap(gradient)(z, y).reshape(z.shape[0], -1)


@eqx.filter_jit
def dense_event_hessian(loss: AbstractLoss, outputs: Array, targets: PyTree) -> Array:
    """∇²ℓ of every event by `jax.hessian` of the loss's value, (events, n, n)."""

    def hessian(z, y):
        one = jax.tree.map(lambda a: a[None], y)
        return jax.hessian(lambda z: loss.value(z[None], one)[0])(z).reshape(z.size, z.size)

    z, y = _flat_events(loss, outputs, targets)
    return jax.vmap(hessian)(z, y)


def clipped(matrices: Array) -> Array:
    """The nearest positive semidefinite matrices."""
    eigenvalues, basis = jnp.linalg.eigh(matrices)
    return jnp.einsum("eij,ej,ekj->eik", basis, jnp.maximum(eigenvalues, 0.0), basis)


@eqx.filter_jit
def materialised_event_map(
    method: str, loss: AbstractLoss, outputs: Array, targets: PyTree
) -> Array:
    """The matrix of `loss.method` on every event, (events, n, n), column by column."""
    z, _ = _flat_events(loss, outputs, targets)
    events, size = z.shape[0], z[0].size

    def column(unit):
        vector = jnp.broadcast_to(unit, (events, size)).reshape(outputs.shape)
        return getattr(loss, method)(outputs, targets, vector).reshape(events, size)

    return jax.vmap(column, out_axes=-1)(jnp.eye(size, dtype=outputs.dtype))
