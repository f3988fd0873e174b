"""Small training problems that the tests of plans, methods and steps share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import curvax as cx
from tests.strategies import make_loss

METHODS = ("ggn_cg", "newton_cg", "egn", "ggn_direct", "newton_direct")
CG_METHODS = ("ggn_cg", "newton_cg")
GAUSS_NEWTON_METHODS = ("ggn_cg", "egn", "ggn_direct")

EXACT_CG = cx.CG(rtol=1e-14, max_steps=400)


class Problem(NamedTuple):
    """An objective, parameters without any static part, and two batches that differ in size."""

    objective: cx.Objective
    params: dict[str, jax.Array]
    batch: Any
    other_batch: Any

    @property
    def gradient(self) -> dict[str, jax.Array]:
        return gradient_of(self.objective, self.params, self.batch)


@eqx.filter_jit
def gradient_of(objective: cx.Objective, params, batch):
    return jax.grad(objective.value)(params, batch)


def predict(params, x):
    return params["w2"] @ jnp.tanh(params["w1"] @ x + params["b1"])


def predict_linear(params, x):
    return params["w"] @ x + params["b"]


@functools.cache
def problem(loss: str = "softmax", *, seed: int = 0, dtype=jnp.float64, **options) -> Problem:
    """An MLP of 4 inputs and 5 hidden units; `options` go to the objective."""
    rng = np.random.default_rng(seed)
    batches = []
    for size in (7, 5):
        criterion, outputs, targets = make_loss(loss, (size,), (3,), seed + size, dtype)
        batches.append((jnp.asarray(rng.standard_normal((size, 4)), dtype), targets))
    width = outputs.shape[-1]
    draw = lambda *shape: jnp.asarray(0.6 * rng.standard_normal(shape), dtype)
    params = {"w1": draw(5, 4), "b1": draw(5), "w2": draw(width, 5)}
    return Problem(cx.Objective(predict, criterion, **options), params, *batches)


def quadratic_problem(seed: int = 0, scales=(1.0, 1.0, 1.0, 1.0)) -> Problem:
    """Least squares in a linear model: f is a quadratic, its Gauss-Newton matrix its Hessian."""
    rng = np.random.default_rng(seed)
    width = len(scales)
    batches = [
        (
            jnp.asarray(rng.standard_normal((size, width)) * np.asarray(scales)),
            jnp.asarray(rng.standard_normal((size, 2))),
        )
        for size in (3 * width, 2 * width)
    ]
    params = {"w": jnp.asarray(rng.standard_normal((2, width))), "b": jnp.zeros(2)}
    return Problem(cx.Objective(predict_linear, cx.SquaredError()), params, *batches)


def make_method(name: str, objective: cx.Objective, **options) -> cx.Method:
    """The method, with a solver that converges."""
    if name in CG_METHODS:
        options.setdefault("solver", EXACT_CG)
    build: Callable[..., cx.Method] = getattr(cx.methods, name)
    return build(objective, **options)


def poisoned(batch):
    """The batch with a NaN in one input of one example."""
    x, *rest = batch
    return (x.at[0, 0].set(jnp.nan), *rest)


def norm(tree) -> jax.Array:
    return jnp.sqrt(
        sum(jnp.sum(jnp.square(leaf.astype(jnp.float64))) for leaf in jax.tree.leaves(tree))
    )


def avals(tree) -> list[Any]:
    """What decides whether JAX traces again: shape, dtype, weak type and sharding."""
    return [jax.typeof(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
