"""The training loop: one run of one method at one learning rate and seed, timed step by step."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

import curvax as cx
from curvax import _tree
from experiments import models
from experiments.data import Arrays, Dataset, batches, windows
from experiments.recipes import Size, Telemetry, Trainer

# Weight of the past in the smoothed loss: it looks back over about ten steps.
SMOOTHING = 0.9
_EVALUATED_AT_ONCE = 1000
# Tokens in a window of a text, and the most windows that a model is evaluated on.
LENGTH = 64
_WINDOWS_EVALUATED = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A data set, and the model that is trained on it. The objective follows from both."""

    dataset: Dataset
    model: str

    @property
    def kind(self) -> str:
        """The kind of the data set, but "reconstruction" where its images are reproduced."""
        return "reconstruction" if self.model == "autoencoder" else self.dataset.kind

    @functools.cached_property
    def train(self) -> Arrays:
        """Inputs and targets to train on."""
        return self._examples(self.dataset.train)

    @functools.cached_property
    def test(self) -> Arrays:
        """Inputs and targets to evaluate on: of a text at most 512 windows, spread over it."""
        examples = self._examples(self.dataset.test)
        if self.kind != "language":
            return examples
        apart = math.ceil(len(examples[0]) / _WINDOWS_EVALUATED)
        return tuple(array[::apart] for array in examples)

    def _examples(self, split: Arrays) -> Arrays:
        if self.kind == "language":
            return windows(split[0], LENGTH)
        if self.kind == "reconstruction":
            images, numbers = split[0], self.dataset.metadata
            pixels = np.clip(images * numbers["std"] + numbers["mean"], 0, 1)
            return images, pixels.reshape(len(pixels), -1)
        return split

    @property
    def outputs(self) -> int:
        """The size of the last axis of the model's outputs."""
        if self.kind == "classification":
            return int(self.dataset.metadata["classes"])
        if self.kind == "language":
            return len(self.dataset.vocabulary)
        return self.train[1].shape[-1]

    @property
    def rows(self) -> int:
        """The number of outputs for one example."""
        return self.outputs * self.events

    @property
    def events(self) -> int:
        """What of an example has a loss of its own: the tokens of a text."""
        return LENGTH if self.kind == "language" else 1

    def size(self, batch_size: int) -> Size:
        """What decides which methods are for this task."""
        parameters = models.count(self.init(jax.random.key(0)))
        return Size(parameters, batch_size, len(self.train[0]), self.rows, self.events)

    @property
    def objective(self) -> cx.Objective:
        example = tuple(array[:1] for array in self.train)
        return cx.Objective(lambda model, x: model(x), _LOSSES[self.kind], example=example)

    @property
    def axes(self) -> dict[str, str | None] | None:
        """For methods that see nothing but gradients."""
        return models.AXES.get(self.model)

    def init(self, key: PRNGKeyArray) -> eqx.Module:
        return models.build(self.model, self.train[0].shape[1:], self.outputs, key=key)


_LOSSES = {
    "classification": cx.SoftmaxCrossEntropy(),
    "language": cx.SoftmaxCrossEntropy(),
    "reconstruction": cx.SigmoidCrossEntropy(),
    "regression": cx.SquaredError(),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run gave: training loss of each step's batch before the step, and its seconds.

    `score` is measured on the test set: for classification the accuracy; for regression the root
    mean squared error in units of the target's standard deviation; for reconstruction that of a
    pixel between 0 and 1; for language the mean loss of a token in nats. A run that met a loss that
    is not finite stops there, and has `diverged`. `skipped` counts the steps that the method did
    not take. `solver_steps` are those of an inner solver, if there is one.
    """

    learning_rate: float
    seed: int
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    score: float
    diverged: bool
    skipped: int
    state_bytes: int
    solver_steps: tuple[int, ...] = ()

    @property
    def smoothed(self) -> np.ndarray:
        return smooth(self.losses)

    @property
    def final(self) -> float:
        """The smoothed training loss at the end; infinite for a run that diverged."""
        return math.inf if self.diverged else float(self.smoothed[-1])

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)

    def reach(self, target: float) -> tuple[float, float]:
        """Steps and seconds until the smoothed loss is at most `target`; infinite if never."""
        below = np.flatnonzero(self.smoothed <= target)
        if not below.size:
            return math.inf, math.inf
        steps = int(below[0]) + 1
        return steps, sum(self.seconds[:steps])


def smooth(losses: tuple[float, ...]) -> np.ndarray:
    """Exponential moving average, corrected for its start as Adam's moments are."""
    average, smoothed = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**step))
    return np.asarray(smoothed)


def a_part(dataset: Dataset) -> Dataset:
    """The first 2000 examples to train on and 500 to evaluate on: enough to see that all works."""
    size = LENGTH if dataset.kind == "language" else 1
    train = tuple(array[: 2000 * size] for array in dataset.train)
    test = tuple(array[: 500 * size] for array in dataset.test)
    return dataclasses.replace(dataset, train=train, test=test)


def compile_seconds(trainer: Trainer, task: Task, batch_size: int) -> float:
    """Compiles a step, on states that are thrown away, and says how long that took."""
    key = jax.random.key(0)
    model = task.init(key)
    state = trainer.init(model, 0.0, 1)
    start = time.perf_counter()
    for batch in batches(task.train, batch_size, seed=0, steps=trainer.phases + 1):
        model, state, _ = trainer(model, state, batch, key)
    jax.block_until_ready(state)
    return time.perf_counter() - start


def train(
    trainer: Trainer,
    task: Task,
    *,
    learning_rate: float,
    seed: int,
    steps: int,
    batch_size: int,
    watch: Callable[[int, dict[str, float]], None] | None = None,
) -> Run:
    """One run. The seed sets the initial model, the batches and the randomness of the method.

    A step is timed from its batch on the host until its loss is there; drawing the batch is not
    counted. `watch` is called every few steps, outside of the time that is measured.
    """
    key = jax.random.key(seed)
    model = task.init(key)
    state = trainer.init(model, learning_rate, steps)
    state_bytes = _tree.nbytes(trainer.optimizer_state(state))
    every = max(1, steps // 25)
    told: list[tuple[jax.Array, jax.Array]] = []
    seconds: list[float] = []
    diverged = False
    for step, batch in enumerate(batches(task.train, batch_size, seed=seed, steps=steps)):
        step_key = jax.random.fold_in(key, step)
        start = time.perf_counter()
        model, state, telemetry = trainer(model, state, batch, step_key)
        jax.block_until_ready(telemetry.value)
        seconds.append(time.perf_counter() - start)
        told.append((telemetry.value, telemetry.solver_steps))
        if step % every == 0 or step == steps - 1:
            diverged = not bool(jnp.isfinite(telemetry.value))
            if watch is not None:
                watch(step + 1, _readings(telemetry, seconds[-every:]))
            if diverged:
                break
    losses, solver_steps = zip(*jax.device_get(told), strict=True)
    inner = any(each >= 0 for each in solver_steps)
    return Run(
        learning_rate=learning_rate,
        seed=seed,
        losses=tuple(map(float, losses)),
        seconds=tuple(seconds),
        score=evaluate(model, task),
        diverged=diverged,
        skipped=trainer.skipped(state),
        state_bytes=state_bytes,
        solver_steps=tuple(map(int, solver_steps)) if inner else (),
    )


def _readings(telemetry: Telemetry, seconds: list[float]) -> dict[str, float]:
    numbers = {name: float(x) for name, x in jax.device_get(telemetry)._asdict().items()}
    return {**numbers, "seconds": statistics.median(seconds)}


def evaluate(model: Any, task: Task) -> float:
    """The score on the test set; see `Run`."""
    total = sum(float(_score(model, part, task.kind)) for part in _chunks(task.test))
    mean = total / task.test[1].size
    return mean if task.kind in ("classification", "language") else math.sqrt(mean)


def _chunks(arrays: Arrays) -> list[Arrays]:
    starts = range(0, len(arrays[0]), _EVALUATED_AT_ONCE)
    return [tuple(array[i : i + _EVALUATED_AT_ONCE] for array in arrays) for i in starts]


@eqx.filter_jit
def _score(model: Callable[[Any], jax.Array], part: Arrays, kind: str) -> jax.Array:
    x, target = part
    outputs = jax.vmap(model)(jnp.asarray(x))
    if kind == "classification":
        return jnp.sum(jnp.argmax(outputs, -1) == target)
    if kind == "language":
        return jnp.sum(_LOSSES[kind].value(outputs, jnp.asarray(target)))
    if kind == "reconstruction":
        outputs = jax.nn.sigmoid(outputs)
    return jnp.sum((outputs - target) ** 2)
