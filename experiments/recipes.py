"""How each method is set up in the experiments, and the learning rates that are tried for it.

Every method of `curvax.methods.list()` has a recipe here, and no other place has one.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
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
# A Gram matrix has as many rows as a batch has outputs, or samples of them.
ROWS_LIMIT = 512
# Steps from one refresh to the next, of methods that have a cadence.
CADENCE = 10


class Telemetry(NamedTuple):
    """What a step says about itself: NaN (or −1 steps) where a method has no such thing."""

    value: Array
    damping: Array
    gain_ratio: Array
    solver_steps: Array


class Trainer(Protocol):
    """A training step that is compiled once for all learning rates and lengths of a run.

    `phases` is the number of different executables that its steps take turns in, `cycle` after how
    many steps the work in them repeats itself. `method` is what observes a batch, if anything does;
    `pure` is the step for a trace of one's own, with the `phase` of its number in a cycle.
    """

    phases: int
    cycle: int
    method: cx.Method | None

    def init(self, model: PyTree[Any], learning_rate: float, steps: int) -> Any: ...

    def phase(self, step: int) -> Any: ...

    def pure(
        self, model: PyTree[Any], state: Any, batch: Arrays, key: PRNGKeyArray, phase: Any
    ) -> tuple[PyTree[Any], Any, Telemetry]: ...

    def __call__(
        self, model: PyTree[Any], state: Any, batch: Arrays, key: PRNGKeyArray
    ) -> tuple[PyTree[Any], Any, Telemetry]: ...

    def optimizer_state(self, state: Any) -> Any: ...

    def skipped(self, state: Any) -> int: ...


class FirstOrder:
    """A plain Optax step on the gradient of an objective."""

    phases = 1
    method: cx.Method | None = None

    def __init__(
        self,
        objective: cx.Objective,
        direction: optax.GradientTransformation,
        cycle: int = 1,
    ):
        self.cycle = cycle
        self._objective = objective
        self._optimizer = optax.chain(direction, _scaled())
        self._compiled = eqx.filter_jit(self.pure)

    def init(self, model: PyTree[Any], learning_rate: float, steps: int) -> Any:
        params, _ = self._objective.bind(model)
        return _set(self._optimizer.init(params), learning_rate, steps)

    def __call__(
        self, model: PyTree[Any], state: Any, batch: Arrays, key: PRNGKeyArray
    ) -> tuple[PyTree[Any], Any, Telemetry]:
        return self._compiled(model, state, batch, key, None)

    def phase(self, step: int) -> None:
        del step

    def pure(
        self, model: PyTree[Any], state: Any, batch: Arrays, key: PRNGKeyArray, phase: None
    ) -> tuple[PyTree[Any], Any, Telemetry]:
        del key, phase
        params, objective = self._objective.bind(model)
        value, gradient = jax.value_and_grad(objective.value)(params, batch)
        updates, state = self._optimizer.update(gradient, state, params)
        moved = optax.apply_updates(params, updates)
        nan, none = jnp.asarray(jnp.nan, jnp.float32), jnp.asarray(-1, jnp.int32)
        return eqx.combine(moved, model), state, Telemetry(value, nan, nan, none)

    def optimizer_state(self, state: Any) -> Any:
        return state

    def skipped(self, state: Any) -> int:
        return 0


class SecondOrder:
    """A fused step of curvax, with momentum behind the method where `momentum` is given."""

    def __init__(self, method: cx.Method, momentum: float | None = None):
        trace = optax.identity() if momentum is None else optax.trace(momentum)
        self._step = cx.make_step(optax.chain(method, trace, _scaled()), method)
        self.method: cx.Method | None = method
        self.phases = self.cycle = method.plan.period

    def init(self, model: PyTree[Any], learning_rate: float, steps: int) -> cx.StepState:
        return _set(self._step.init(model), learning_rate, steps)

    def __call__(
        self, model: PyTree[Any], state: cx.StepState, batch: Arrays, key: PRNGKeyArray
    ) -> tuple[PyTree[Any], cx.StepState, Telemetry]:
        return self._told(self._step(model, state, batch, key))

    def phase(self, step: int) -> Any:
        return self._step.method.plan.phase(self.cycle + step)

    def pure(
        self, model: PyTree[Any], state: cx.StepState, batch: Arrays, key: PRNGKeyArray, phase: Any
    ) -> tuple[PyTree[Any], cx.StepState, Telemetry]:
        return self._told(self._step.pure(model, state, batch, key, phase=phase))

    def _told(self, made: Any) -> tuple[PyTree[Any], cx.StepState, Telemetry]:
        model, state, info = made
        told = Telemetry(info.value, info.damping_used, info.gain_ratio, info.solver_steps)
        return model, state, told

    def optimizer_state(self, state: cx.StepState) -> Any:
        return state.optimizer

    def skipped(self, state: cx.StepState) -> int:
        return int(state.skipped)


def _scaled() -> optax.GradientTransformation:
    # The learning rate and the length of the run live in the state, so that others need no other
    # executable. A run at a constant rate ends on a noise floor, which says little about its
    # method: all fall to zero, by a cosine.
    def scaled(learning_rate: Any, decay_steps: Any) -> optax.GradientTransformation:
        def rate(count: Any) -> Array:
            gone = jnp.minimum(jnp.asarray(count, jnp.float32) / decay_steps, 1)
            return learning_rate * (1 + jnp.cos(jnp.pi * gone)) / 2

        return optax.scale_by_learning_rate(rate)

    return optax.inject_hyperparams(scaled)(learning_rate=0.0, decay_steps=1.0)


def _set(state: Any, learning_rate: float, steps: int) -> Any:
    rate, length = (jnp.asarray(x, jnp.float32) for x in (learning_rate, steps))
    return optax.tree_utils.tree_set(state, learning_rate=rate, decay_steps=length)


class Setting(NamedTuple):
    """What a trainer is built for: an objective, CG steps in each step, and the axes of leaves."""

    objective: cx.Objective
    cg_steps: int = 5
    axes: Mapping[str, str | None] | None = None


class Size(NamedTuple):
    """Of a task: parameters of the model, examples in a batch and in all, and of an example the
    outputs and what is one event of the loss, such as a token.
    """

    parameters: int
    batch: int
    examples: int
    outputs: int
    events: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method as it is run here: at a learning rate that falls to zero over the run, by a cosine.

    Attributes:
        build: From a setting to a trainer.
        learning_rates: The grid of peak rates. Adam's is at least as long as any other.
        settings: What else was set, in words.
        unfit: Why the method is not for a task of some size, in words; None if it is.
    """

    build: Callable[[Setting], Trainer]
    learning_rates: tuple[float, ...]
    settings: str
    unfit: Callable[[Size], str | None] = lambda size: None


def _adam(setting: Setting) -> Trainer:
    return FirstOrder(setting.objective, optax.scale_by_adam())


def _with_cg(
    make: Callable[..., cx.Method], rules: dict[str, Any] | None = None, **options: Any
) -> Callable[[Setting], Trainer]:
    """With the CG steps of the setting, or at most as many as `rules` say."""

    def build(setting: Setting) -> Trainer:
        solver = cx.CG(**{"max_steps": setting.cg_steps} | (rules or {}))
        return SecondOrder(make(setting.objective, solver=solver, **options))

    return build


def _observing(
    make: Callable[..., cx.Method], momentum: float | None = None, **options: Any
) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        return SecondOrder(make(setting.objective, **options), momentum)

    return build


def _of_gradients(
    make: Callable[..., optax.GradientTransformation],
    momentum: float | None = None,
    cycle: int = CADENCE,
    **options: Any,
) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        trace = optax.identity() if momentum is None else optax.trace(momentum)
        named = {"axes": setting.axes} if "axes" in inspect.signature(make).parameters else {}
        direction = optax.chain(make(**options, **named), trace)
        return FirstOrder(setting.objective, direction, cycle)

    return build


def _dense(size: Size) -> str | None:
    if size.parameters <= DENSE_LIMIT:
        return None
    return f"{size.parameters} parameters, and dense curvature is for at most {DENSE_LIMIT}"


def _rows(of: Callable[[Size], int]) -> Callable[[Size], str | None]:
    def unfit(size: Size) -> str | None:
        rows = of(size)
        if rows <= ROWS_LIMIT:
            return None
        return f"{rows} rows in a batch, and a Gram matrix is for at most {ROWS_LIMIT}"

    return unfit


def _whole(size: Size) -> str | None:
    if size.batch >= size.examples:
        return None
    return f"made for full batches, and one here has {size.batch} of {size.examples} examples"


_DAMPING = cx.LevenbergMarquardt(minimum=1e-2)
_WITH = "Levenberg-Marquardt damping, λ from 1 down to at least 0.01"
_GRID = (0.1, 0.3, 1.0)
_CG_GRID = (0.05, 0.1, 0.2)
# Of steps whose entries have about the size of Adam's.
_ADAM_GRID = (0.001, 0.003, 0.01, 0.03)
MOMENTUM = 0.9
# The peak learning rate of K-FAC, which its scaling makes the same for all problems.
KFAC_RATE = 0.002
KFAC_DAMPING = 1.0
# K-FAC's defaults, with momentum behind it.
_KFAC = "damping 1, RMS, refreshed every 10 steps, momentum 0.9"
_KFAC_GRID = (0.001, 0.002, 0.003, 0.005, 0.01)
_REFRESHED = "refreshed every 10 steps"
_SAMPLED = "a Fisher matrix of one sample for each output event"

# Five steps from where the last solution left off go further than ten from zero. The floor under λ
# is for what the gain ratio does not see: that the next batch is another one. newton_cg has no warm
# start: negative curvature ends the solve, and would leave the last solution as it is.
_CG = {"damping": _DAMPING, "warm_start": 0.95}
_HESSIAN_FREE = {"rtol": 0.0, "max_steps": 50, "relative_decrease": 5e-4, "keep": 1.3}

_make = cx.methods
RECIPES: dict[str, Recipe] = {
    "adam": Recipe(_adam, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2), "β₁ = 0.9, β₂ = 0.999"),
    "ggn_cg": Recipe(_with_cg(_make.ggn_cg, **_CG), _CG_GRID, f"{_WITH}, warm start 0.95"),
    "newton_cg": Recipe(_with_cg(_make.newton_cg, damping=_DAMPING), (0.03, 0.1, 0.3), _WITH),
    "egn": Recipe(
        _observing(_make.egn, damping=_DAMPING), _GRID, _WITH, _rows(lambda s: s.batch * s.outputs)
    ),
    "ggn_direct": Recipe(_observing(_make.ggn_direct, damping=_DAMPING), _GRID, _WITH, _dense),
    "newton_direct": Recipe(
        _observing(_make.newton_direct, damping=_DAMPING), _GRID, _WITH, _dense
    ),
    "kfac": Recipe(_observing(_make.kfac, MOMENTUM), _KFAC_GRID, f"rank 0.15, {_KFAC}"),
    "kfac_full": Recipe(
        _observing(_make.kfac, MOMENTUM, rank=None), _KFAC_GRID, f"full rank, {_KFAC}"
    ),
    "kfac_dense": Recipe(
        _observing(_make.kfac, MOMENTUM, rank=None, refresh_every=1),
        _KFAC_GRID,
        "full rank, damping 1, RMS, refreshed in every step, momentum 0.9",
    ),
    "ekfac": Recipe(_observing(_make.ekfac, MOMENTUM), _KFAC_GRID, _KFAC),
    "newton_muon": Recipe(
        _observing(_make.newton_muon),
        (0.001, 0.003, 0.01),
        f"rank 0.15, {_REFRESHED}, momentum 0.95 of its own",
    ),
    "adahessian": Recipe(_observing(_make.adahessian), (0.01, 0.03, 0.1, 0.3), "every step"),
    "sophia_g": Recipe(_observing(_make.sophia_g), _ADAM_GRID, "γ = 0.05, every 10 steps"),
    "sophia_h": Recipe(_observing(_make.sophia_h), _ADAM_GRID, "γ = 0.01, every 10 steps"),
    "natural_gradient": Recipe(
        _with_cg(_make.natural_gradient, fisher="mc", **_CG),
        _CG_GRID,
        f"{_SAMPLED}, {_WITH}, warm start 0.95",
    ),
    "minsr": Recipe(
        _observing(_make.minsr, fisher="mc", damping=1e-2),
        (0.01, 0.03, 0.1),
        f"{_SAMPLED}, damping 0.01",
        _rows(lambda s: s.batch * s.events),
    ),
    "spring": Recipe(
        _observing(_make.spring, fisher="mc", damping=1e-2),
        (0.01, 0.03, 0.1),
        f"{_SAMPLED}, damping 0.01, momentum 0.99",
        _rows(lambda s: s.batch * s.events),
    ),
    "hessian_free": Recipe(
        _with_cg(_make.hessian_free, _HESSIAN_FREE, damping=_DAMPING),
        _GRID,
        f"at most 50 steps of CG, {_WITH}",
    ),
    "saddle_free_newton": Recipe(
        _observing(_make.saddle_free_newton, damping=_DAMPING), (0.03, 0.1, 0.3), _WITH
    ),
    "nystrom_newton": Recipe(
        _with_cg(_make.nystrom_newton, **_CG), _CG_GRID, f"rank 10, {_REFRESHED}, {_WITH}"
    ),
    "sketchy_sgd": Recipe(
        _observing(_make.sketchy_sgd, damping=0.1),
        (0.03, 0.1, 0.3),
        "rank 10, damping 0.1, refreshed every 100 steps",
    ),
    "ignd": Recipe(
        _observing(_make.ignd, curvature=cx.FisherCurvature("empirical"), damping=1.0),
        (0.1, 0.3, 1.0, 3.0),
        "the empirical Fisher matrix of each example, damping 1",
    ),
    "gauss_newton": Recipe(_observing(_make.gauss_newton), (1.0,), "its own damping", _whole),
    "lbfgs": Recipe(_of_gradients(_make.lbfgs, cycle=1), (0.1, 0.3, 1.0), "no line search", _whole),
    "shampoo": Recipe(
        _of_gradients(_make.shampoo, MOMENTUM),
        (0.0003, 0.001, 0.003, 0.01),
        f"{_REFRESHED}, its default grafting, momentum 0.9",
    ),
    "soap": Recipe(_of_gradients(_make.soap), _ADAM_GRID, _REFRESHED),
    "kl_shampoo": Recipe(_of_gradients(_make.kl_shampoo), _ADAM_GRID, _REFRESHED),
    "muon": Recipe(
        _of_gradients(_make.muon, cycle=1, rms=0.2),
        (0.003, 0.01, 0.03, 0.1),
        "momentum 0.95, root mean square 0.2",
    ),
    "soap_muon": Recipe(
        _of_gradients(_make.soap_muon),
        (0.003, 0.01, 0.03, 0.1),
        f"root mean square 0.2, {_REFRESHED}",
    ),
    "psgd_kron": Recipe(_of_gradients(_make.psgd_kron), (0.0003, 0.001, 0.003, 0.01), "its own"),
}
DENSE = tuple(name for name, recipe in RECIPES.items() if recipe.unfit is _dense)
