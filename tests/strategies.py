"""Hypothesis strategies for what curvax takes."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from curvax import losses as cl

# -- losses ----------------------------------------------------------------------------------


def convex_function(outputs, targets):
    """Convex in the outputs, of any event shape; its Hessian is dense and of full rank."""
    error = outputs - targets
    return jnp.sum(jnp.cosh(error)) + 0.5 * jnp.sum(error) ** 2


def nonconvex_function(outputs, targets):
    return jnp.sum(jnp.sin(outputs - targets)) + 0.1 * jnp.sum(outputs) ** 2


LOSS_KINDS = (
    "squared",
    "squared_whole",
    "softmax",
    "softmax_soft",
    "sigmoid",
    "poisson",
    "gaussian",
    "custom",
    "custom_nonconvex",
)


def make_loss(kind: str, lead: tuple[int, ...], event: tuple[int, ...], seed: int, dtype=None):
    """A (loss, outputs, targets) of that kind; losses with fixed event axes use `event[-1]`."""
    rng = np.random.default_rng(seed)
    event_ndim = len(event)
    if kind in ("softmax", "softmax_soft"):
        event = event[-1:] or (3,)
    elif kind == "gaussian":
        event = (2 * (event[-1] if event else 1),)
    shape = (*lead, *event)
    outputs = 1.5 * rng.standard_normal(shape)
    match kind:
        case "squared":
            loss, targets = cl.SquaredError(event_ndim=event_ndim), rng.standard_normal(shape)
        case "squared_whole":
            loss, targets = cl.SquaredError(half=False), rng.standard_normal(shape)
        case "softmax":
            loss, targets = cl.SoftmaxCrossEntropy(), rng.integers(event[-1], size=lead)
        case "softmax_soft":  # sums anywhere in (0, classes); some weights are 0
            loss = cl.SoftmaxCrossEntropy()
            targets = rng.uniform(size=shape) * (rng.uniform(size=shape) < 0.7)
        case "sigmoid":
            loss, targets = cl.SigmoidCrossEntropy(event_ndim=event_ndim), rng.uniform(size=shape)
        case "poisson":
            loss = cl.Poisson(event_ndim=event_ndim)
            targets = rng.poisson(2.0, size=shape).astype(float)
        case "gaussian":
            loss = cl.Gaussian()
            targets = rng.standard_normal((*shape[:-1], shape[-1] // 2))
        case "custom":
            loss = cl.CustomLoss(convex_function, event_ndim=event_ndim)
            targets = rng.standard_normal(shape)
        case "custom_nonconvex":
            loss = cl.CustomLoss(nonconvex_function, event_ndim=event_ndim, convex=False)
            targets = rng.standard_normal(shape)
        case _:
            raise ValueError(kind)
    outputs = jnp.asarray(outputs, dtype or jnp.zeros(()).dtype)
    targets = jax.tree.map(
        lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(outputs.dtype),
        jnp.asarray(targets),
    )
    return loss, outputs, targets


@st.composite
def losses(draw, kinds=LOSS_KINDS):
    """Draws (loss, outputs, targets): every kind, one to two lead axes, zero to two event axes."""
    kind = draw(st.sampled_from(kinds))
    # Few shapes: each costs a compilation, which examples of the same shape then share.
    lead = draw(st.sampled_from([(1,), (3,), (2, 3)]))
    event = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    return make_loss(kind, lead, event, draw(st.integers(0, 2**31)))
