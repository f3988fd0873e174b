"""Steps of K-FAC in steps of Adam, on the same model, batch and device, interleaved.

    python -m experiments.bench_kfac --sections cpu
    python -m experiments.bench_kfac --sections gpt2-8 gpt2-32 resnet50 --attention cudnn

What is due differs from step to step of a refresh cycle. So each round takes two cycles of K-FAC
and as many Adam steps. One cycle is timed as training runs it, without waiting for the device
between steps: "in Adam steps" is the ratio of the medians of these. In the other every step is
waited for and timed by itself, for the laziest and the slowest step. Two cycles come first,
uncounted: they compile one executable for each pattern of due quantities. Compilation seconds are
what these calls took beyond the steady times.
"""

import argparse
import dataclasses
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import curvax as cx
from curvax import _tree
from experiments import workloads
from experiments.large_models import Model, gpt2, resnet50
from experiments.tables import Row, write_results
from experiments.timing import Timing, provenance

LEARNING_RATE = 1e-3
CYCLE = 10
# Steps of a cycle that the refresh is spread over: each is one more executable to compile, and
# fewer factors are factorised together.
STAGGER = {"gpt2": 1, "resnet": 1}
MIB = 2**20
SECTIONS = ("cpu", "gpt2-8", "gpt2-32", "gpt2-8-full", "resnet50", "resnet50-full")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A choice of K-FAC: a share of the rank (None: full), or EKFAC."""

    name: str
    rank: float | None = None
    ekfac: bool = False


LOW_RANK, FULL, EKFAC = (
    Variant("rank 0.15", 0.15),
    Variant("full rank"),
    Variant("ekfac", ekfac=True),
)


def kfac_step(model: Model, batch: Any, variant: Variant) -> cx.Step:
    """The fused step: K-FAC, momentum, a learning rate. All that is used of the methods' API."""
    objective = cx.Objective(model.predict, cx.SoftmaxCrossEntropy(), example=batch)
    if variant.ekfac:
        method = cx.methods.ekfac(objective, refresh_every=CYCLE)
    else:
        method = cx.methods.kfac(
            objective,
            rank=variant.rank,
            refresh_every=CYCLE,
            fisher="empirical",
            stagger=STAGGER.get(model.name.split("-")[0], 1),
        )
    optimizer = optax.chain(method, optax.trace(0.9), optax.scale_by_learning_rate(LEARNING_RATE))
    return cx.make_step(optimizer, method, donate=True)


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
    """Training by K-FAC of any library: `phases` says what is due on each step of a cycle."""

    phases: Sequence[tuple[Any, ...]]

    @property
    def optimizer_state(self) -> Any:
        return self.state

    @property
    def skipped(self) -> int:
        """Steps that were not made, for numbers that are not finite."""
        return 0


class Kfac(Cycle):
    """Training by curvax's K-FAC."""

    def __init__(self, model: Model, batch: Any, variant: Variant):
        self.fused = kfac_step(model, batch, variant)
        params = jax.jit(model.init)(jax.random.key(0))
        super().__init__(self.fused, params, self.fused.init(params), (batch, jax.random.key(2)))
        plan = self.fused.method.plan
        self.phases = [plan.phase(i) for i in range(plan.period)]

    @property
    def optimizer_state(self) -> Any:
        return self.state.optimizer

    @property
    def skipped(self) -> int:
        return int(self.state.skipped)

    def memory_at(self, phase: int) -> tuple[float, float]:
        later = CYCLE + phase  # as in the steady state
        return self.memory(self.fused.lower(self.params, self.state, *self.rest, count=later))


class Adam(Training):
    """Training by Adam, warmed up."""

    def __init__(self, model: Model, batch: Any):
        objective = cx.Objective(model.predict, cx.SoftmaxCrossEntropy())
        optimizer = optax.adam(LEARNING_RATE)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, batch: Any) -> Any:
            value, gradient = jax.value_and_grad(objective.value)(params, batch)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        params = jax.jit(model.init)(jax.random.key(0))
        super().__init__(step, params, optimizer.init(params), (batch,))
        self.lower = lambda: step.lower(self.params, self.state, *self.rest)
        self.warm_up = [self() for _ in range(3)]
        progress(f"{model.name}: Adam's first step took {self.warm_up[0]:.0f} s")


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def measure(kfacs: Sequence[Cycle], adam: Adam, seconds: float, least: int) -> list[Row]:
    """A cycle of each K-FAC and as many steps of Adam in turn, for about `seconds`, `least` rounds
    at least.
    """
    warm_ups = []
    for kfac in kfacs:
        warm_ups.append([kfac() for _ in range(2 * len(kfac.phases))])
        progress(f"K-FAC's first two cycles took {sum(warm_ups[-1]):.0f} s")
    rounds: list[list[list[float]]] = [[[] for _ in kfac.phases] for kfac in kfacs]
    adams: list[float] = []
    cycles: list[tuple[float, ...]] = []
    began = time.perf_counter()
    while len(rounds[0][0]) < least or time.perf_counter() - began < seconds:
        whole = []
        for kfac, phases in zip(kfacs, rounds, strict=True):
            for taken in phases:
                taken.append(kfac())
            whole.append(kfac.cycle(len(phases)))
        adams.extend(adam() for _ in kfacs[0].phases)
        cycles.append((*whole, adam.cycle(len(kfacs[0].phases))))
    base = Timing("adam", tuple(adams), adam.warm_up[0])
    *mine, adams_cycle = (statistics.median(each) for each in zip(*cycles, strict=True))
    return [
        _row(kfac, adam, base, warm_up, phases, (own, adams_cycle))
        for kfac, warm_up, phases, own in zip(kfacs, warm_ups, rounds, mine, strict=True)
    ]


def _row(
    kfac: Cycle,
    adam: Adam,
    base: Timing,
    warm_up: list[float],
    phases: list[list[float]],
    cycles: tuple[float, float],
) -> Row:
    period = len(kfac.phases)
    steady = [Timing(f"phase {i}", tuple(taken), warm_up[i]) for i, taken in enumerate(phases)]
    medians = [timing.median for timing in steady]
    # By what is due, not by time, which is noisy: the laziest step, and the one that does most.
    dues = [sum(map(bool, phase)) for phase in kfac.phases]
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
        "executables": len(set(kfac.phases)),
        "compile s": compiling,
        "compile / Adam": compiling / adam_compiling,
        "state / Adam": _tree.nbytes(kfac.optimizer_state) / _tree.nbytes(adam.state),
        "skipped": kfac.skipped,
    }
    if isinstance(kfac, Kfac):
        most, least_due = kfac.memory_at(refresh), kfac.memory_at(lazy)
        plain = adam.memory(adam.lower())
        row |= {
            "temp MiB, refresh": most[0],
            "temp MiB, lazy": least_due[0],
            "temp MiB, Adam": plain[0],
            "memory / Adam": max(most[1], least_due[1]) / plain[1],
        }
    return row


def section(cases: list[tuple[Model, int, tuple[Variant, ...]]], args: Any) -> list[Row]:
    """A row for each model, batch size and variant."""
    rows: list[Row] = []
    for model, size, variants in cases:
        batch = model.batch(size, jax.random.key(1))
        adam = Adam(model, batch)
        for variant in variants:
            row: Row = {"model": model.name, "batch": size, "method": variant.name}
            try:
                kfac = Kfac(model, batch, variant)
                row |= measure([kfac], adam, args.seconds, args.least)[0]
            except jax.errors.JaxRuntimeError as error:  # out of memory: the other rows still count
                row["error"] = str(error).splitlines()[0][:200]
            rows.append(row)
            print(row, flush=True)
            kfac = None
            gc.collect()
    # The table takes its columns from the first row.
    return sorted(rows, key=lambda row: "error" in row)


def from_workload(workload: workloads.Workload) -> Model:
    """A small model of `workloads`, with its own batch."""
    copy = lambda _: jax.tree.map(jnp.copy, workload.params)
    batch = lambda size, _: (workload.x[:size], workload.labels[:size])
    return Model(workload.name, copy, workload.predict, batch)


def cases_of(name: str, args: Any) -> list[tuple[Model, int, tuple[Variant, ...]]]:
    """The models, batch sizes and variants of a section; tiny ones for `--smoke`."""
    every = (LOW_RANK, FULL, EKFAC)
    if name == "cpu":
        sizes = (8, 8) if args.smoke else (256, 64)
        widths = (16, 32, 32, 10) if args.smoke else (64, 256, 256, 10)
        small = workloads.mlp(widths, sizes[0]), workloads.convnet(sizes[1])
        return [(from_workload(w), size, every) for w, size in zip(small, sizes, strict=True)]
    variants = (FULL, EKFAC) if name.endswith("full") else (LOW_RANK,)
    if name.startswith("resnet50"):
        tiny = functools.partial(resnet50, 32, 10, stages=(1, 1), widths=(8, 16))
        return [(tiny(), 4, variants) if args.smoke else (resnet50(), 256, variants)]
    remat = {"none": False, "full": True, "dots": "dots"}[args.remat]
    shape = (2, 32, 2, 64, 16) if args.smoke else ()
    size = int(name.split("-")[1])
    model = gpt2(*shape, remat=remat, attention=args.attention)
    return [(model, size // 4 if args.smoke else size, variants)]


def main(argv: list[str] | None = None) -> int:
    """Runs the sections asked for, prints tables, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=["cpu"])
    parser.add_argument("--smoke", action="store_true", help="tiny models, few rounds")
    parser.add_argument("--seconds", type=float, default=20.0, help="per row (default: 20)")
    parser.add_argument("--least", type=int, default=5, help="rounds at least (default: 5)")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="full")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--out", type=Path, default=Path("results/bench_kfac.json"))
    args = parser.parse_args(argv)
    if args.smoke:
        args.seconds, args.least = 0.0, 2
    makers: dict[str, Callable[[], list[Row]]] = {
        name: functools.partial(lambda name: section(cases_of(name, args), args), name)
        for name in args.sections
    }
    write_results(makers, args.out, provenance(), echo=print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
