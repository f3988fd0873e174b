"""Hypothesis strategies for what curvax takes."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import curvax as cx
from curvax import losses as cl

from . import oracles

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


# -- models ----------------------------------------------------------------------------------


class Convnet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    readout: eqx.nn.Linear

    def __init__(self, outputs: int, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 2, 2, key=first)
        self.norm = eqx.nn.GroupNorm(2, 2)
        self.readout = eqx.nn.Linear(2, outputs, key=second)

    def __call__(self, x):
        return self.readout(jnp.mean(jnp.tanh(self.norm(self.conv(x))), axis=(1, 2)))


def predict_module(model, x):
    return model(x)


def predict_dict(params, x):
    weight, bias = params["hidden"]
    return params["readout"] @ jnp.tanh(weight @ x + bias) + params["shift"][0]


def predict_sequence(params, x):
    """(T, 2) -> (T, outputs): each position sees those before it."""
    hidden = jnp.tanh(x @ params["mix"])
    return jnp.cumsum(hidden, axis=0) @ params["readout"]


MODEL_KINDS = ("mlp", "dict", "conv", "sequence")
INPUT_SHAPES = {"mlp": (2,), "dict": (2,), "conv": (1, 3, 3), "sequence": (2, 2)}


def make_model(kind: str, outputs: int, seed: int):
    """(predict, model). The dict has nested containers and a leaf of size 0."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.7 * rng.standard_normal(shape))
    match kind:
        case "mlp":
            key = jax.random.key(seed)
            model = eqx.nn.MLP(2, outputs, 3, 1, activation=jnp.tanh, key=key)
            return predict_module, model
        case "conv":
            return predict_module, Convnet(outputs, jax.random.key(seed))
        case "dict":
            return predict_dict, {
                "hidden": (draw(3, 2), draw(3)),
                "readout": draw(outputs, 3),
                "shift": [draw(outputs), jnp.zeros((0, 2))],
            }
        case "sequence":
            return predict_sequence, {"mix": draw(2, 3), "readout": draw(3, outputs)}
    raise ValueError(kind)


# -- parameter trees -------------------------------------------------------------------------


@st.composite
def parameters(draw, dtypes=("float64", "float32")):
    """Nested dicts, tuples and Modules of arrays, of mixed dtypes, some of size 0."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    shapes = st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0)])

    def array(shape, dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    leaf = st.builds(array, shapes, st.sampled_from(dtypes))
    node = st.recursive(
        leaf,
        lambda inner: (
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2)
            | st.tuples(inner, inner)
            | st.builds(Pair, inner, inner)
        ),
        max_leaves=4,
    )
    return {"root": draw(node), "last": array((2,), dtypes[0])}


class Pair(eqx.Module):
    first: Any
    second: Any


# -- whole problems --------------------------------------------------------------------------


class Problem(NamedTuple):
    """An objective with model and batch, and the names that the dense oracle needs.

    Masked examples of `batch` hold NaN inputs and targets, or a label out of range; `clean` is
    the batch without these.
    """

    objective: cx.Objective
    model: Any
    batch: tuple
    clean: tuple
    loss_kind: str

    @property
    def params(self):
        return eqx.filter(self.model, eqx.is_inexact_array)

    @property
    def lead(self) -> int:
        outputs = jax.eval_shape(
            jax.vmap(lambda x: self.objective.predict(self.model, x)), self.clean[0]
        )
        return len(self.objective.loss.lead_shape(outputs))

    def dense(self, drawn=None, params=None) -> dict:
        params = self.params if params is None else params
        static = eqx.filter(self.model, eqx.is_inexact_array, inverse=True)
        predict = _Whole(self.objective.predict, static)
        o, (x, y, w) = self.objective, self.clean
        return oracles.dense(
            predict, self.loss_kind, self.lead, o.reduction, o.l2, params, x, y, w, drawn
        )


class _Whole(eqx.Module):
    predict: Callable = eqx.field(static=True)
    static: Any

    def __call__(self, params, x):
        return self.predict(eqx.combine(params, self.static), x)


class Recipe(NamedTuple):
    arguments: dict[str, Any]

    def build(self) -> Problem:
        return make_problem(**self.arguments)


WEIGHT_KINDS = (None, "example", "event")


def make_problem(
    model: str = "dict",
    loss: str = "softmax",
    *,
    weights: str | None = None,
    reduction: str = "mean",
    l2: float = 0.0,
    seed: int = 0,
    size: int = 4,
    poison: bool = True,
) -> Problem:
    """Weights are drawn from {0, ½, 1, 2}, one of them 0 where there are two or more."""
    rng = np.random.default_rng(seed + 1)
    lead = (size, 2) if model == "sequence" else (size,)
    criterion, outputs, y = make_loss(loss, lead, (3,), seed)
    predict, network = make_model(model, outputs.shape[-1], seed)
    x = jnp.asarray(rng.standard_normal((size, *INPUT_SHAPES[model])))
    objective = cx.Objective(predict, criterion, reduction=reduction, l2=l2)
    if weights is None:
        return Problem(objective, network, (x, y), (x, y, None), loss)
    shape = (size,) if weights == "example" else criterion.lead_shape(outputs)
    weight = rng.choice([0.0, 0.5, 1.0, 2.0], size=shape)
    weight.flat[-1], weight.flat[0] = 0.0, 1.0
    weight = jnp.asarray(weight)
    bad_x, bad_y = x, y
    if poison:
        masked = weight == 0
        whole = jnp.all(masked.reshape(size, -1), axis=1)
        fill = lambda a, mask, value: jnp.where(
            mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), jnp.asarray(value, a.dtype), a
        )
        bad_x = fill(x, whole, jnp.nan)
        bad_y = fill(y, masked, -100 if jnp.issubdtype(y.dtype, jnp.integer) else jnp.nan)
    return Problem(objective, network, (bad_x, bad_y, weight), (x, y, weight), loss)


@st.composite
def problems(draw, models=MODEL_KINDS, losses=LOSS_KINDS, sizes=(1, 4)):
    """Draws a `Recipe` for a `Problem`: any model, loss, reduction, weights and l2.

    Built by the test and not here: beartype samples what it checks with `random`, which
    Hypothesis does not want in a strategy.
    """
    return Recipe(
        {
            "model": draw(st.sampled_from(models)),
            "loss": draw(st.sampled_from(losses)),
            "weights": draw(st.sampled_from(WEIGHT_KINDS)),
            "reduction": draw(st.sampled_from(("mean", "sum"))),
            "l2": draw(st.sampled_from((0.0, 0.3))),
            "seed": draw(st.integers(0, 100)),
            "size": draw(st.sampled_from(sizes)),
        }
    )


def micro_batches(batch, cuts):
    """Splits a batch into consecutive micro-batches, uneven ones, at the given places."""
    ends = [0, *sorted(cuts), jax.tree.leaves(batch)[0].shape[0]]
    return [
        jax.tree.map(lambda a: a[start:end], batch)  # noqa: B023
        for start, end in itertools.pairwise(ends)
    ]
