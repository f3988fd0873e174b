"""How each method is set up in the experiments, and the learning rates that are tried for it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

import curvax as cx
from experiments.data import Arrays

# Dense curvature is a matrix of parameters × parameters.
DENSE_LIMIT = 4000
# The Gram matrix of egn has as many rows as a batch has outputs.
ROWS_LIMIT = 512


class Telemetry(NamedTuple):
    """What a step says about itself: NaN where a method has no such thing."""

    value: Array
    damping: Array
    gain_ratio: Array


class Trainer(Protocol):
    """A training step that is compiled once for all learning rates.

    `phases` is the number of different executables that its steps take turns in.
    """

    phases: int

    def init(self, model: PyTree[Any], learning_rate: float) -> Any: ...

    def __call__(
        self, model: PyTree[Any], state: Any, batch: Arrays, key: PRNGKeyArray
    ) -> tuple[PyTree[Any], Any, Telemetry]: ...

    def optimizer_state(self, state: Any) -> Any: ...

    def skipped(self, state: Any) -> int: ...


class FirstOrder:
    """A plain Optax step on the gradient of an objective."""

    phases = 1

    def __init__(
        self, objective: cx.Objective, direction: optax.GradientTransformation, steps: int
    ):
        self._objective = objective
        self._optimizer = optax.chain(direction, _scaled(steps))
        self._compiled = eqx.filter_jit(self._run)

    def init(self, model: PyTree[Any], learning_rate: float) -> Any:
        params, _ = self._objective.bind(model)
        return _with_learning_rate(self._optimizer.init(params), learning_rate)

    def __call__(
        self, model: PyTree[Any], state: Any, batch: Arrays, key: PRNGKeyArray
    ) -> tuple[PyTree[Any], Any, Telemetry]:
        return self._compiled(model, state, batch)

    def _run(
        self, model: PyTree[Any], state: Any, batch: Arrays
    ) -> tuple[PyTree[Any], Any, Telemetry]:
        params, objective = self._objective.bind(model)
        value, gradient = jax.value_and_grad(objective.value)(params, batch)
        updates, state = self._optimizer.update(gradient, state, params)
        moved = optax.apply_updates(params, updates)
        nan = jnp.asarray(jnp.nan, jnp.float32)
        return eqx.combine(moved, model), state, Telemetry(value, nan, nan)

    def optimizer_state(self, state: Any) -> Any:
        return state

    def skipped(self, state: Any) -> int:
        return 0


class SecondOrder:
    """A fused step of curvax, with momentum behind the method where `momentum` is given."""

    def __init__(self, method: cx.Method, steps: int, momentum: float | None = None):
        trace = optax.identity() if momentum is None else optax.trace(momentum)
        self._step = cx.make_step(optax.chain(method, trace, _scaled(steps)), method)
        self.phases = method.plan.period

    def init(self, model: PyTree[Any], learning_rate: float) -> cx.StepState:
        return _with_learning_rate(self._step.init(model), learning_rate)

    def __call__(
        self, model: PyTree[Any], state: cx.StepState, batch: Arrays, key: PRNGKeyArray
    ) -> tuple[PyTree[Any], cx.StepState, Telemetry]:
        model, state, info = self._step(model, state, batch, key)
        return model, state, Telemetry(info.value, info.damping_used, info.gain_ratio)

    def optimizer_state(self, state: cx.StepState) -> Any:
        return state.optimizer

    def skipped(self, state: cx.StepState) -> int:
        return int(state.skipped)


def _scaled(steps: int) -> optax.GradientTransformation:
    # The learning rate lives in the state, so that another one needs no other executable. A run
    # at a constant one ends on a noise floor, which says little about its method: all decay.
    return optax.chain(
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, steps)),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=0.0),
    )


def _with_learning_rate(state: Any, learning_rate: float) -> Any:
    value = jnp.asarray(learning_rate, jnp.float32)
    return optax.tree_utils.tree_set(state, learning_rate=value)


class Setting(NamedTuple):
    """What a trainer is built for: an objective, the steps of a run, and CG steps in each."""

    objective: cx.Objective
    steps: int
    cg_steps: int = 5


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method as it is run here: at a learning rate that falls to zero over the run, by a cosine.

    Attributes:
        build: From a setting to a trainer.
        learning_rates: The grid of peak rates. Adam's is at least as long as any other.
        settings: What else was set, in words.
    """

    build: Callable[[Setting], Trainer]
    learning_rates: tuple[float, ...]
    settings: str


def _adam(setting: Setting) -> Trainer:
    return FirstOrder(setting.objective, optax.scale_by_adam(), setting.steps)


def _ggn_cg(setting: Setting) -> Trainer:
    # Five steps from where the last solution left off go further than ten from zero. The floor
    # under λ is for what the gain ratio does not see: that the next batch is another one.
    solver = cx.CG(max_steps=setting.cg_steps)
    method = cx.methods.ggn_cg(setting.objective, damping=_DAMPING, solver=solver, warm_start=0.95)
    return SecondOrder(method, setting.steps)


def _newton_cg(setting: Setting) -> Trainer:
    # No warm start: negative curvature ends the solve, and would leave the last solution as it is.
    solver = cx.CG(max_steps=setting.cg_steps)
    method = cx.methods.newton_cg(setting.objective, damping=_DAMPING, solver=solver)
    return SecondOrder(method, setting.steps)


def _plain(
    make: Callable[..., cx.Method], momentum: float | None = None, **options: Any
) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        return SecondOrder(make(setting.objective, **options), setting.steps, momentum)

    return build


_DAMPING = cx.LevenbergMarquardt(minimum=1e-2)
_WITH = "Levenberg-Marquardt damping, λ from 1 down to at least 0.01"
_GRID = (0.1, 0.3, 1.0)
MOMENTUM = 0.9
# The peak learning rate of K-FAC, which its scaling makes the same for all problems.
KFAC_RATE = 0.002
KFAC_DAMPING = 1.0
# K-FAC's defaults, with momentum behind it.
_KFAC = "damping 1, RMS, refreshed every 10 steps, momentum 0.9"
_KFAC_GRID = (0.001, 0.002, 0.003, 0.005, 0.01)

RECIPES: dict[str, Recipe] = {
    "adam": Recipe(_adam, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2), "β₁ = 0.9, β₂ = 0.999"),
    "ggn_cg": Recipe(_ggn_cg, (0.05, 0.1, 0.2), f"{_WITH}, warm start 0.95"),
    "newton_cg": Recipe(_newton_cg, (0.03, 0.1, 0.3), _WITH),
    "egn": Recipe(_plain(cx.methods.egn, damping=_DAMPING), _GRID, _WITH),
    "ggn_direct": Recipe(_plain(cx.methods.ggn_direct, damping=_DAMPING), _GRID, _WITH),
    "newton_direct": Recipe(_plain(cx.methods.newton_direct, damping=_DAMPING), _GRID, _WITH),
    "kfac": Recipe(_plain(cx.methods.kfac, MOMENTUM), _KFAC_GRID, f"rank 0.15, {_KFAC}"),
    "kfac_full": Recipe(
        _plain(cx.methods.kfac, MOMENTUM, rank=None),
        _KFAC_GRID,
        f"full rank, {_KFAC}",
    ),
    "ekfac": Recipe(_plain(cx.methods.ekfac, MOMENTUM), _KFAC_GRID, _KFAC),
    "newton_muon": Recipe(
        _plain(cx.methods.newton_muon),
        (0.001, 0.003, 0.01),
        "rank 0.15, refreshed every 10 steps, momentum 0.95 of its own",
    ),
}
DENSE = ("ggn_direct", "newton_direct")
