"""Dense and slow references, written without the code that they judge."""

import equinox as eqx
import jax
import jax.flatten_util
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


# -- directions ------------------------------------------------------------------------------


def dense_hessian(objective, params: PyTree, batch) -> Array:
    """∇²f over the ravelled parameters, by `jax.hessian` of the objective's value."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.hessian(lambda v: objective.value(unravel(v), batch))(flat)


def dense_gauss_newton(objective, params: PyTree, batch) -> Array:
    """(1/N) Σ Jᵢᵀ∇²ℓᵢJᵢ + l2·I for a mean over N examples with outputs of one axis."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    x, targets = batch
    forward = jax.vmap(objective.predict, (None, 0))
    jacobian = jax.jacobian(lambda v: forward(unravel(v), x))(flat)
    curvature = clipped(dense_event_hessian(objective.loss, forward(params, x), targets))
    matrix = jnp.einsum("eip,eij,ejq->pq", jacobian, curvature, jacobian) / x.shape[0]
    return matrix + objective.l2 * jnp.eye(flat.size)


def damped_solve(matrix: Array, damping: float, vector: PyTree, absolute: bool = False) -> PyTree:
    """(A + λI)⁻¹v, or |A + λI|⁻¹v, through eigenvalues."""
    flat, unravel = jax.flatten_util.ravel_pytree(vector)
    values, basis = jnp.linalg.eigh(matrix + damping * jnp.eye(flat.size))
    values = jnp.abs(values) if absolute else values
    return unravel(basis @ ((basis.T @ flat) / values))


# -- curvature -------------------------------------------------------------------------------


def plain_event_loss(kind: str):
    """ℓ(z, y) of one event for each kind of `strategies.LOSS_KINDS`, as one would write it."""
    from . import strategies

    def softmax(z, y):
        if jnp.issubdtype(y.dtype, jnp.integer):
            return jnp.log(jnp.sum(jnp.exp(z))) - z[y]
        return jnp.sum(y) * jnp.log(jnp.sum(jnp.exp(z))) - jnp.sum(y * z)

    def gaussian(z, y):
        mean, rho = jnp.split(z, 2)
        return 0.5 * jnp.sum(rho + (y - mean) ** 2 / jnp.exp(rho))

    return {
        "squared": lambda z, y: 0.5 * jnp.sum((z - y) ** 2),
        "squared_whole": lambda z, y: jnp.sum((z - y) ** 2),
        "softmax": softmax,
        "softmax_soft": softmax,
        "sigmoid": lambda z, y: jnp.sum(jnp.log(1 + jnp.exp(z)) - y * z),
        "poisson": lambda z, y: jnp.sum(jnp.exp(z) - y * z),
        "gaussian": gaussian,
        "custom": strategies.convex_function,
        "custom_nonconvex": strategies.nonconvex_function,
    }[kind]


def _event_curvature(kind: str, z: Array, y: Array) -> Array:
    """The positive semidefinite curvature of one event, (n, n) over the ravelled z."""
    if kind == "gaussian":  # the expected Hessian
        _, rho = jnp.split(z, 2)
        return jnp.diag(jnp.concatenate([jnp.exp(-rho), jnp.full_like(rho, 0.5)]))
    hessian = jax.hessian(plain_event_loss(kind))(z, y).reshape(z.size, z.size)
    return clipped(hessian[None])[0] if kind == "custom_nonconvex" else hessian


def _exact_fisher(kind: str, z: Array, y: Array) -> Array:
    """Σ_k p_k g_k g_kᵀ over the classes k for a softmax; elsewhere the curvature."""
    if not kind.startswith("softmax"):
        return _event_curvature(kind, z, y)
    p = jnp.exp(z) / jnp.sum(jnp.exp(z))
    total = 1.0 if jnp.issubdtype(y.dtype, jnp.integer) else jnp.sum(y)
    scores = [jax.grad(plain_event_loss("softmax"))(z, jnp.array(k)) for k in range(z.size)]
    return total * sum(p[k] * jnp.outer(g, g) for k, g in enumerate(scores))


@eqx.filter_jit
def dense(predict, kind, lead, reduction, l2, params, x, y, weight, drawn=None):
    """Value, gradient and every curvature of an objective, dense over the ravelled parameters.

    `lead` axes of the outputs index events. `drawn`: a stack of sampled targets for "mc".
    """
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    loss = plain_event_loss(kind)
    forward = lambda v: jax.vmap(lambda one: predict(unravel(v), one))(x)
    events = lambda a: a.reshape(-1, *a.shape[lead:])
    outputs = forward(flat)
    lead_shape = outputs.shape[:lead]
    c = jnp.ones(lead_shape) if weight is None else weight.astype(flat.dtype)
    c = jnp.broadcast_to(c.reshape(c.shape + (1,) * (lead - c.ndim)), lead_shape).reshape(-1)
    c = c / jnp.sum(c) if reduction == "mean" else c

    def value(v):
        values = jax.vmap(loss)(events(forward(v)), events(y))
        return jnp.sum(c * values) + 0.5 * l2 * jnp.sum(v**2)

    z, target = events(outputs), events(y)
    jacobian = jax.jacrev(forward)(flat)
    rows = events(jacobian).reshape(z.shape[0], -1, flat.size)
    ridge = l2 * jnp.eye(flat.size)

    def sandwich(blocks):
        return jnp.einsum("e,eim,eij,ejn->mn", c, rows, blocks, rows) + ridge

    def scores(target):
        g = jax.vmap(jax.grad(plain_event_loss(kind)))(z, target).reshape(z.shape[0], -1)
        return jnp.einsum("ei,ej->eij", g, g)

    result = {
        "value": value(flat),
        "gradient": jax.grad(value)(flat),
        "hessian": jax.hessian(value)(flat),
        "gauss_newton": sandwich(jax.vmap(lambda z, y: _event_curvature(kind, z, y))(z, target)),
        "exact": sandwich(jax.vmap(lambda z, y: _exact_fisher(kind, z, y))(z, target)),
        "empirical": sandwich(scores(target)),
        "jacobian": jacobian.reshape(outputs.size, flat.size),
    }
    if drawn is not None:
        result["mc"] = sandwich(sum(scores(events(t)) for t in drawn) / len(drawn))
    return result
