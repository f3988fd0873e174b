"""Steps of a method in steps of Adam, on the same model, batch and device, interleaved.

What is due differs from step to step of a refresh cycle. So each round takes two cycles of the
method and as many Adam steps. One cycle is timed as training runs it, without waiting for the
device between steps: "in Adam steps" is the ratio of the medians of these. In the other every step
is waited for and timed by itself, for the laziest and the slowest step. Two cycles come first,
uncounted: they compile what there is to compile. Compilation seconds are what these calls took
beyond the steady times.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import curvax as cx
from curvax import _tree
from experiments import workloads
from experiments.large_models import Model
from experiments.tables import Row
from experiments.timing import Timing

LEARNING_RATE = 1e-3
MIB = 2**20


class Training:
    """A call makes one training step, on its own donated buffers, and returns its seconds."""

    def __init__(self, step: Callable[..., Any], params: Any, state: Any, rest: tuple[Any, ...]):
        self.step, self.params, self.state, self.rest = step, params, state, rest

    def __call__(self) -> float:
        jax.block_until_ready((self.params, self.state))
        start = time.perf_counter()
        self.params, self.state, info = self.step(self.params, self.state, *self.rest)
        jax.block_until_ready((self.params, self.state, info))
        return time.perf_counter() - start

    def cycle(self, steps: int) -> float:
        """Seconds of so many steps in a row."""
        jax.block_until_ready((self.params, self.state))
        start = time.perf_counter()
        for _ in range(steps):
            self.params, self.state, _ = self.step(self.params, self.state, *self.rest)
        jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - start

    def memory(self, lowered: jax.stages.Lowered) -> tuple[float, float]:
        """MiB of temporaries, and of all that is alive in a step; NaN where unknown."""
        seen = lowered.compile().memory_analysis()
        if seen is None:
            return float("nan"), float("nan")
        temporary = seen.temp_size_in_bytes
        outside = seen.argument_size_in_bytes + seen.output_size_in_bytes - seen.alias_size_in_bytes
        return temporary / MIB, (temporary + outside) / MIB


class Cycle(Training):
    """Training by a method of any library: `phases` says what is due on each step of a cycle."""

    name: str
    phases: Sequence[tuple[Any, ...]]

    @property
    def optimizer_state(self) -> Any:
        return self.state

    @property
    def skipped(self) -> int:
        """Steps that were not made, for numbers that are not finite."""
        return 0

    def memory_at(self, phase: int) -> tuple[float, float] | None:
        """As of `memory`, for a step of the cycle; None where that is not known."""
        del phase
        return None


class FirstOrder(Training):
    """Training by a plain Optax optimizer of the gradient."""

    def __init__(self, model: Model, batch: Any, optimizer: optax.GradientTransformation):
        objective = cx.Objective(model.predict, cx.SoftmaxCrossEntropy())

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, batch: Any) -> Any:
            value, gradient = jax.value_and_grad(objective.value)(params, batch)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        params = jax.jit(model.init)(jax.random.key(0))
        super().__init__(step, params, optimizer.init(params), (batch,))
        self.optimizer = optimizer
        self.lower = lambda: step.lower(self.params, self.state, *self.rest)


class Adam(FirstOrder):
    """Training by Adam, warmed up."""

    def __init__(self, model: Model, batch: Any):
        super().__init__(model, batch, optax.adam(LEARNING_RATE))
        self.warm_up = [self() for _ in range(3)]
        progress(f"{model.name}: Adam's first step took {self.warm_up[0]:.0f} s")


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def measure(others: Sequence[Cycle], adam: Adam, seconds: float, least: int) -> list[Row]:
    """A cycle of each method and as many steps of Adam in turn, for about `seconds`, `least` rounds
    at least.
    """
    warm_ups = []
    for other in others:
        warm_ups.append([other() for _ in range(2 * len(other.phases))])
        progress(f"{other.name}: the first two cycles took {sum(warm_ups[-1]):.0f} s")
    rounds: list[list[list[float]]] = [[[] for _ in other.phases] for other in others]
    adams: list[float] = []
    cycles: list[tuple[float, ...]] = []
    began = time.perf_counter()
    while len(rounds[0][0]) < least or time.perf_counter() - began < seconds:
        whole = []
        for other, phases in zip(others, rounds, strict=True):
            for taken in phases:
                taken.append(other())
            whole.append(other.cycle(len(phases)))
        adams.extend(adam() for _ in others[0].phases)
        cycles.append((*whole, adam.cycle(len(others[0].phases))))
    base = Timing("adam", tuple(adams), adam.warm_up[0])
    *mine, adams_cycle = (statistics.median(each) for each in zip(*cycles, strict=True))
    return [
        _row(other, adam, base, warm_up, phases, (own, adams_cycle))
        for other, warm_up, phases, own in zip(others, warm_ups, rounds, mine, strict=True)
    ]


def _row(
    other: Cycle,
    adam: Adam,
    base: Timing,
    warm_up: list[float],
    phases: list[list[float]],
    cycles: tuple[float, float],
) -> Row:
    period = len(other.phases)
    steady = [Timing(f"phase {i}", tuple(taken), warm_up[i]) for i, taken in enumerate(phases)]
    medians = [timing.median for timing in steady]
    # By what is due, not by time, which is noisy: the laziest step, and the one that does most.
    dues = [sum(map(bool, phase)) for phase in other.phases]
    idle = [medians[i] for i, due in enumerate(dues) if due == min(dues)]
    lazy, refresh = (
        pick(range(period), key=lambda i: (dues[i], medians[i])) for pick in (min, max)
    )
    compiling = sum(max(s - medians[i % period], 0.0) for i, s in enumerate(warm_up))
    adam_compiling = sum(max(s - base.median, 0.0) for s in adam.warm_up)
    row: Row = {
        "ms": 1e3 * cycles[0] / period,
        "Adam ms": 1e3 * cycles[1] / period,
        "in Adam steps": cycles[0] / cycles[1],
        "lazy step": statistics.median(idle) / base.median,
        "slowest step": max(medians) / base.median,
        "slowest / median": max(medians) / statistics.median(medians),
        "spread": statistics.median(timing.spread for timing in steady),
        "Adam spread": base.spread,
        "rounds": len(phases[0]),
        "phases": " ".join(f"{m / base.median:.2f}" for m in medians),
        "executables": len(set(other.phases)),
        "compile s": compiling,
        "compile / Adam": compiling / adam_compiling,
        "state / Adam": _tree.nbytes(other.optimizer_state) / _tree.nbytes(adam.state),
        "skipped": other.skipped,
    }
    most, least_due = other.memory_at(refresh), other.memory_at(lazy)
    if most is not None and least_due is not None:
        plain = adam.memory(adam.lower())
        row |= {
            "temp MiB, refresh": most[0],
            "temp MiB, lazy": least_due[0],
            "temp MiB, Adam": plain[0],
            "memory / Adam": max(most[1], least_due[1]) / plain[1],
        }
    return row


def from_workload(workload: workloads.Workload) -> Model:
    """A small model of `workloads`, with its own batch."""
    copy = lambda _: jax.tree.map(jnp.copy, workload.params)
    batch = lambda size, _: (workload.x[:size], workload.labels[:size])
    return Model(workload.name, copy, workload.predict, batch)
