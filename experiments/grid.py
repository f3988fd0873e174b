"""The grid of an experiment: every method at every learning rate and seed, with a progress bar."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import models
from experiments.costs import Cost, measure
from experiments.recipes import RECIPES, Setting, Trainer
from experiments.store import Store
from experiments.summary import Comparison, Trial
from experiments.training import Run, Task, compile_seconds, train


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers."""

    dataset: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    steps: int
    batch_size: int
    cg_steps: int
    target: float
    seeds: tuple[int, ...]
    smoke: bool


def search(settings: Settings, task: Task, console: Console) -> Comparison:
    """Runs every method at every learning rate of its grid with every seed."""
    return Search(settings, task, console).compare()


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of many methods, each at a learning rate that is searched for.

    The cost of each is measured. A method that fails is left out, as is one a run of which would
    take more than so many `minutes`. A grid whose best rate is an end of it grows there, by its own
    ratio, and else between the best and the better of its neighbours: to at most as many rates as
    Adam's grid begins with, and that to two more. Further seeds run at the best rate alone, and all
    seeds once more over the share `short` of the steps.
    """

    minutes: float
    short: float


# Rates nearer to each other than by this factor are not worth a run.
_CLOSE = 1.3


class Search:
    """The methods of some settings on a task. What a store has is not computed again."""

    def __init__(
        self,
        settings: Settings,
        task: Task,
        console: Console,
        store: Store | None = None,
        study: Study | None = None,
    ):
        self.settings, self.task = settings, task
        self.store = Store() if store is None else store
        self.study = study
        self.grids = {name: _rates(name, settings.smoke) for name in settings.methods}
        self._adam: Trainer | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[readings]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        seeds = len(settings.seeds)
        more = lambda grid: len(grid) * seeds if study is None else len(grid) + 2 * seeds - 1
        self._runs = sum(map(more, self.grids.values()))
        self._overall = self._bar.add_task(f"{task.model}: runs", total=self._runs, readings="")
        self._current = self._bar.add_task("", total=settings.steps, readings="")

    def compare(self) -> Comparison:
        trials, left_out = [], {}
        with self._bar:
            for name in self.grids:
                try:
                    trials.append(self._trial(name))
                except _TooLong as reason:
                    left_out[name] = str(reason)
                except Exception as error:
                    if self.study is None:
                        raise
                    left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                if name in left_out:
                    self._say(f"{name:<13} left out: {left_out[name]}")
        parameters = models.count(self.task.init(jax.random.key(0)))
        model, target = self.task.model, self.settings.target
        return Comparison(model, parameters, target, tuple(trials), left_out)

    def _trial(self, name: str) -> Trial:
        """All runs of a method."""
        made: list[Trainer] = []

        def trainer() -> Trainer:
            """Compiled when it is first asked for."""
            if not made:
                self._bar.reset(self._current, description=f"{name}: compiling", total=None)
                made.append(self._build(name))
                compiled = compile_seconds(made[0], self.task, self.settings.batch_size)
                self._say(f"{name:<13} compiled in {compiled:.1f} s")
                if self.store.get(self._key(name, of="cost")) is None:
                    self.store.put(self._key(name, of="cost"), self._costs(made[0], compiled))
            return made[0]

        known = self.store.get(self._key(name, of="cost"))
        if known is None:
            trainer()
            known = self.store.get(self._key(name, of="cost"))
        cost = None
        if known["cost"] is not None:
            cost = Cost(**{**known["cost"], "gradients": tuple(known["cost"]["gradients"])})
        run = functools.partial(self._run, name, trainer)
        seeds, grid = self.settings.seeds, self.grids[name]
        if self.study is None:
            runs = [run(rate, seed) for rate in grid for seed in seeds]
            return Trial(name, tuple(runs), known["compile_seconds"])
        if cost is not None:
            minutes, limit = cost.milliseconds * self.settings.steps / 60e3, self.study.minutes
            if minutes > limit:
                raise _TooLong(f"{minutes:.0f} minutes a run, and the limit is {limit:g}")
        runs = [run(rate, seeds[0]) for rate in grid]
        while (rate := self._next(name, runs)) is not None:
            self._more(1)
            runs.append(run(rate, seeds[0]))
        best = min(runs, key=lambda run: run.final).learning_rate
        runs += [run(best, seed) for seed in seeds[1:]]
        steps = max(1, round(self.study.short * self.settings.steps))
        short = [run(best, seed, steps) for seed in seeds]
        return Trial(name, tuple(runs), known["compile_seconds"], cost, tuple(short))

    def _next(self, name: str, runs: Sequence[Run]) -> float | None:
        """One more learning rate, near to the best."""
        runs = sorted(runs, key=lambda run: run.learning_rate)
        most = len(self.grids["adam"]) if "adam" in self.grids else len(_rates("adam", False))
        most += 2 * (name == "adam")
        if len(runs) < 2 or len(runs) >= most:
            return None
        rates, finals = [run.learning_rate for run in runs], [run.final for run in runs]
        best = finals.index(min(finals))
        if best == 0:
            rate = rates[0] ** 2 / rates[1]
        elif best == len(runs) - 1:
            rate = rates[-1] ** 2 / rates[-2]
        else:
            beside = min(best - 1, best + 1, key=finals.__getitem__)
            rate = math.sqrt(rates[best] * rates[beside])
            if max(rate, rates[best]) < _CLOSE * min(rate, rates[best]):
                return None
        return float(f"{rate:.2g}")

    def _more(self, runs: int) -> None:
        self._runs += runs
        self._bar.update(self._overall, total=self._runs)

    def _run(
        self,
        name: str,
        trainer: Callable[[], Trainer],
        rate: float,
        seed: int,
        steps: int | None = None,
    ) -> Run:
        steps = self.settings.steps if steps is None else steps
        key = self._key(name, of="run", learning_rate=rate, seed=seed, steps=steps)
        entry = self.store.get(key)
        if entry is None:
            compiled = trainer()
            label = f"{name} @ {rate:g}"
            self._bar.reset(self._current, description=label, total=steps, readings="")

            def watch(step: int, readings: dict[str, float]) -> None:
                self._bar.update(self._current, completed=step, readings=_readings(readings))

            run = train(
                compiled,
                self.task,
                learning_rate=rate,
                seed=seed,
                steps=steps,
                batch_size=self.settings.batch_size,
                watch=watch,
            )
            entry = self.store.put(key, dataclasses.asdict(run))
            self._say(_line(name, run))
        self._bar.advance(self._overall)
        return _run_of(entry)

    def _build(self, name: str) -> Trainer:
        setting = Setting(self.task.objective, self.settings.cg_steps, self.task.axes)
        return RECIPES[name].build(setting)

    def _costs(self, trainer: Trainer, compiled: float) -> dict[str, Any]:
        cost = None
        if self.study is not None:
            if self._adam is None:
                self._adam = self._build("adam")
            cost = dataclasses.asdict(
                measure(trainer, self._adam, self.task, self.settings.batch_size)
            )
        return {"compile_seconds": compiled, "cost": cost}

    def _key(self, name: str, **more: Any) -> dict[str, Any]:
        """What a result depends on: another value of any of these makes another result."""
        settings = self.settings
        return {
            "dataset": settings.dataset,
            "model": self.task.model,
            "examples": len(self.task.train[0]),
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "cg_steps": settings.cg_steps,
            "method": name,
            "settings": RECIPES[name].settings,
            "device": jax.devices()[0].device_kind,
            **({"axes": self.task.axes} if self.task.axes else {}),
            **more,
        }

    def _say(self, line: str) -> None:
        self._bar.console.print(f"{self.task.model} {line}", highlight=False, markup=False)


class _TooLong(Exception):
    """A run would take too long."""


def _rates(method: str, smoke: bool) -> tuple[float, ...]:
    grid = RECIPES[method].learning_rates
    return grid[1:3] if smoke and len(grid) > 1 else grid


def _run_of(entry: dict[str, Any]) -> Run:
    """A run as it was stored."""
    made: dict[str, Any] = {name: math.nan if x is None else x for name, x in entry.items()}
    made["losses"] = tuple(math.nan if loss is None else loss for loss in entry["losses"])
    made |= {name: tuple(entry[name]) for name in ("seconds", "solver_steps")}
    return Run(**made)


def _readings(readings: dict[str, float]) -> str:
    text = f"loss {readings['value']:.3f}  {1e3 * readings['seconds']:.1f} ms"
    if not math.isnan(readings["damping"]):
        text += f"  λ {readings['damping']:.1e}  ρ {readings['gain_ratio']:.2f}"
    return text


def _line(method: str, run: Run) -> str:
    end = f"loss {run.final:.3f}, {1e3 * run.step_seconds:.1f} ms a step"
    end = f"diverged after {len(run.losses)} steps" if run.diverged else end
    skipped = f", {run.skipped} steps skipped" if run.skipped else ""
    setting = f"learning rate {run.learning_rate:<6g} seed {run.seed}"
    return f"{method:<13} {setting}  {end}{skipped}"
