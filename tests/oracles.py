"""Dense and slow references, written without the code that they judge."""

import itertools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
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


@eqx.filter_jit
def dense_hessian(objective, params: PyTree, batch) -> Array:
    """∇²f over the ravelled parameters, by `jax.hessian` of the objective's value."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.hessian(lambda v: objective.value(unravel(v), batch))(flat)


@eqx.filter_jit
def dense_gauss_newton(objective, params: PyTree, batch) -> Array:
    """(1/N) Σ Jᵢᵀ∇²ℓᵢJᵢ + l2·I for a mean over N examples with outputs of one axis."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    x, targets = batch
    forward = jax.vmap(objective.predict, (None, 0))
    jacobian = jax.jacobian(lambda v: forward(unravel(v), x))(flat)
    curvature = clipped(dense_event_hessian(objective.loss, forward(params, x), targets))
    matrix = jnp.einsum("eip,eij,ejq->pq", jacobian, curvature, jacobian) / x.shape[0]
    return matrix + objective.l2 * jnp.eye(flat.size)


@eqx.filter_jit
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


def gradient_norms_reference(objective, params: PyTree, batch: tuple) -> Array:
    """The norm of each example's gradient, of the objective on that example alone."""

    def one(example):
        alone = jax.tree.map(lambda a: a[None], example)
        gradient = jax.grad(lambda p: objective.without_l2().value(p, alone))(params)
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))

    return jnp.sqrt(jax.vmap(one)(batch))


# -- Kronecker factors -----------------------------------------------------------------------
#
# A weight W (out, in) acts on x and yields s = W x. Its block of the curvature, over W.ravel(),
# is approximated by G ⊗ A: A is the mean of x xᵀ over what the weight is applied to, and G carries
# every scale: the 1/B of a mean over B examples, and the sum over positions. Gradients g with
# respect to s are columns of a root of the curvature: they have the √(1/B) of their event, and
# further columns are leading axes, which are summed. A bias is a last input that is 1.


def kronecker_dense(g, a) -> np.ndarray:
    """G ⊗ A in the order of W.ravel() for W (out, in), with G (out, out) and A (in, in)."""
    return np.kron(np.asarray(g), np.asarray(a))


def _with_one(x) -> np.ndarray:
    x = np.asarray(x)
    return np.concatenate([x, np.ones((*x.shape[:-1], 1))], axis=-1)


def _sum_of_outer(rows) -> np.ndarray:
    return sum(np.outer(row, row) for row in rows.reshape(-1, rows.shape[-1]))


class LayerBlock(NamedTuple):
    """Of a layer with bias everything is over [W b], of shape (out, in + 1)."""

    exact: np.ndarray  # the block of the Gauss-Newton matrix, which is the Fisher matrix
    a: np.ndarray
    g: np.ndarray
    inputs: np.ndarray  # (B, in + 1)
    gradients: np.ndarray  # (columns, B, out), as the functions below take them


def kfac_dense_reference(layers, x, loss: str, nonlinearity=jnp.tanh) -> list[LayerBlock]:
    """Blocks and factors of a mean over the rows of x, for s ← W a + b, a ← nonlinearity(s).

    `layers`: pairs of W (out, in) and b (out,) or None. `loss`: "squared", for ½‖z − y‖², or
    "softmax". The exact Fisher expectation of G is a sum over the columns of a root of ∇²ℓ.
    (Martens & Grosse 2015.)
    """

    def join(weight, bias):
        return weight if bias is None else jnp.concatenate([weight, bias[:, None]], axis=1)

    def apply(a, shifts, joined):
        """The outputs, and the input of each layer."""
        seen = []
        for i in range(len(layers)):
            a = a if layers[i][1] is None else jnp.concatenate([a, jnp.ones(1)])
            seen.append(a)
            a = joined[i] @ a + shifts[i]
            a = a if i == len(layers) - 1 else nonlinearity(a)
        return a, seen

    def root(z):
        """S with S Sᵀ = ∇²ℓ."""
        if loss == "squared":
            return np.eye(z.size)
        if loss == "softmax":
            p = np.exp(z - np.max(z))
            p = p / np.sum(p)
            return np.diag(np.sqrt(p)) - np.outer(p, np.sqrt(p))
        raise ValueError(loss)

    joined = [join(*layer) for layer in layers]
    shifts = [jnp.zeros(weight.shape[0]) for weight, _ in layers]
    scale = 1 / np.sqrt(len(x))
    exact = [np.zeros((matrix.size, matrix.size)) for matrix in joined]
    inputs, gradients = [[] for _ in layers], [[] for _ in layers]

    @jax.jit
    def jacobians(one):
        outputs, seen = apply(one, shifts, joined)
        by_weight = jax.jacrev(lambda joined: apply(one, shifts, joined)[0])(joined)
        by_shift = jax.jacrev(lambda shifts: apply(one, shifts, joined)[0])(shifts)
        return outputs, seen, by_weight, by_shift

    for one in jnp.asarray(x):
        outputs, seen, by_weight, by_shift = jax.tree.map(np.asarray, jacobians(one))
        columns = scale * root(outputs)
        for i in range(len(layers)):
            rows = columns.T @ by_weight[i].reshape(outputs.size, -1)
            exact[i] += rows.T @ rows
            inputs[i].append(seen[i])
            gradients[i].append(columns.T @ by_shift[i])

    result = []
    for block, a, g in zip(exact, inputs, gradients, strict=True):
        a, g = np.stack(a), np.stack(g, axis=1)
        result.append(LayerBlock(block, *kfac_expand_reference(a[:, None], g[:, :, None]), a, g))
    return result


def kfac_expand_reference(x, g, bias: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(A, G) of a weight shared over T positions, each an example of its own: x (B, T, in) and
    g (..., B, T, out). (KFAC-expand, Eschenhagen et al. 2023.)
    """
    x, g = _with_one(x) if bias else np.asarray(x), np.asarray(g)
    batch, length, _ = x.shape
    return _sum_of_outer(x) / (batch * length), _sum_of_outer(g)


def kfac_reduce_reference(x, g, bias: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(A, G) of a weight shared over T positions, by the mean of their inputs and the sum of
    their gradients: x (B, T, in) and g (..., B, T, out). (KFAC-reduce, Eschenhagen et al. 2023.)
    """
    x, g = _with_one(x) if bias else np.asarray(x), np.asarray(g)
    return _sum_of_outer(x.mean(axis=1)) / len(x), _sum_of_outer(g.sum(axis=-2))


def fused_reference(x, g, parts: int, factors=kfac_expand_reference) -> list[tuple]:
    """(A, G) of each of the layers with a bias whose outputs stand one after another in those of
    one weight, by `factors`.
    """
    return [factors(x, part, bias=True) for part in np.split(np.asarray(g), parts, axis=-1)]


def shared_block_reference(x, g, bias: bool = False) -> np.ndarray:
    """The exact block of a shared weight: Σ over examples of vec(Σ_t g_t x_tᵀ) vec(·)ᵀ."""
    x, g = _with_one(x) if bias else np.asarray(x), np.asarray(g)
    return _sum_of_outer(_example_gradients(x, g).reshape(-1, g.shape[-1] * x.shape[-1]))


def _example_gradients(x, g) -> np.ndarray:
    """Σ_t g_t x_tᵀ of every column and example, (columns · B, out, in)."""
    columns = g.reshape(-1, *x.shape[:2], g.shape[-1])
    return np.stack(
        [
            sum(np.outer(g_t, x_t) for g_t, x_t in zip(g_one, x_one, strict=True))
            for column in columns
            for g_one, x_one in zip(column, x, strict=True)
        ]
    )


class Eigenbasis(NamedTuple):
    """G = U_G diag(·) U_Gᵀ and A alike, eigenvalues ascending; `moments` are (out, in).

    The signs of the columns are arbitrary, and bases of repeated eigenvalues too: compare
    `dense`, or `moments` where no eigenvalue is repeated.
    """

    basis_g: np.ndarray
    basis_a: np.ndarray
    moments: np.ndarray

    @property
    def dense(self) -> np.ndarray:
        basis = np.kron(self.basis_g, self.basis_a)
        return basis @ np.diag(self.moments.ravel()) @ basis.T


def ekfac_reference(x, g, bias: bool = False) -> Eigenbasis:
    """The eigenbases of A and G, and in them the second moments Σ (U_Gᵀ (g xᵀ) U_A)².

    x (B, in) and g (..., B, out). With positions, x (B, T, in) and g (..., B, T, out), the bases
    are those of KFAC-expand and the gradient of an example is the sum over its positions. To take
    positions as independent fold them into B; for KFAC-reduce pass x.mean(1) and g.sum(-2).
    (George et al. 2018.)
    """
    x, g = _with_one(x) if bias else np.asarray(x), np.asarray(g)
    if x.ndim == 2:
        x, g = x[:, None], g[..., None, :]
    a, total = kfac_expand_reference(x, g)
    basis_a, basis_g = np.linalg.eigh(a)[1], np.linalg.eigh(total)[1]
    moments = sum((basis_g.T @ one @ basis_a) ** 2 for one in _example_gradients(x, g))
    return Eigenbasis(basis_g, basis_a, moments)


def conv_patches_reference(
    x, kernel_shape, stride=1, padding=0, dilation=1, groups: int = 1, input_dilation=1
) -> np.ndarray:
    """What a convolution's weight is applied to, for one example x (C, *spatial).

    (positions, groups, (C / groups) · K), positions in the order of the output and the rest in
    that of a weight (out, C / groups, *kernel) without its first axis. No kernel is flipped.
    Options are for all axes at once or one for each; a padding may be a pair (low, high).
    """
    x, dims = np.asarray(x), len(kernel_shape)
    each = lambda option: (option,) * dims if isinstance(option, int) else tuple(option)
    stride, dilation, input_dilation = each(stride), each(dilation), each(input_dilation)
    padding = [(p, p) if isinstance(p, int) else tuple(p) for p in each(padding)]
    sizes = [(n - 1) * d + 1 for n, d in zip(x.shape[1:], input_dilation, strict=True)]
    padded = np.zeros([len(x)] + [n + sum(p) for n, p in zip(sizes, padding, strict=True)])
    for place in itertools.product(*map(range, x.shape[1:])):
        spots = zip(place, input_dilation, padding, strict=True)
        padded[(slice(None), *(i * d + p[0] for i, d, p in spots))] = x[(slice(None), *place)]
    reach = [(k - 1) * d for k, d in zip(kernel_shape, dilation, strict=True)]
    counts = [(n - r - 1) // s + 1 for n, r, s in zip(padded.shape[1:], reach, stride, strict=True)]
    patches = []
    for place in itertools.product(*map(range, counts)):
        patch = np.zeros((len(x), *kernel_shape))
        for tap in itertools.product(*map(range, kernel_shape)):
            spots = zip(place, stride, tap, dilation, strict=True)
            at = tuple(i * s + k * d for i, s, k, d in spots)
            patch[(slice(None), *tap)] = padded[(slice(None), *at)]
        patches.append(patch.reshape(groups, -1))
    return np.stack(patches)
