"""The grid of an experiment: every method at every learning rate and seed, with a progress bar."""

import dataclasses
import math

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import models
from experiments.recipes import RECIPES, Setting
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
    model = task.model
    grids = {name: _rates(name, settings.smoke) for name in settings.methods}
    total = sum(len(grid) * len(settings.seeds) for grid in grids.values())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[readings]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )
    trials = []
    with bar:
        overall = bar.add_task(f"{model}: runs", total=total, readings="")
        current = bar.add_task("", total=settings.steps, readings="")
        for name, grid in grids.items():
            bar.reset(current, description=f"{name}: compiling", total=None)
            setting = Setting(task.objective, settings.steps, settings.cg_steps)
            trainer = RECIPES[name].build(setting)
            compiled = compile_seconds(trainer, task, settings.batch_size)
            bar.console.print(f"{model} {name:<13} compiled in {compiled:.1f} s", highlight=False)
            runs = []
            for rate in grid:
                for seed in settings.seeds:
                    label = f"{name} @ {rate:g}"
                    bar.reset(current, description=label, total=settings.steps, readings="")

                    def watch(step: int, readings: dict[str, float]) -> None:
                        bar.update(current, completed=step, readings=_readings(readings))

                    run = train(
                        trainer,
                        task,
                        learning_rate=rate,
                        seed=seed,
                        steps=settings.steps,
                        batch_size=settings.batch_size,
                        watch=watch,
                    )
                    runs.append(run)
                    bar.advance(overall)
                    bar.console.print(_line(model, name, run), highlight=False)
            trials.append(Trial(name, tuple(runs), compiled))
    parameters = models.count(task.init(jax.random.key(0)))
    return Comparison(model, parameters, settings.target, tuple(trials))


def _rates(method: str, smoke: bool) -> tuple[float, ...]:
    grid = RECIPES[method].learning_rates
    return grid[1:3] if smoke else grid


def _readings(readings: dict[str, float]) -> str:
    text = f"loss {readings['value']:.3f}  {1e3 * readings['seconds']:.1f} ms"
    if not math.isnan(readings["damping"]):
        text += f"  λ {readings['damping']:.1e}  ρ {readings['gain_ratio']:.2f}"
    return text


def _line(model: str, method: str, run: Run) -> str:
    end = f"loss {run.final:.3f}, {1e3 * run.step_seconds:.1f} ms a step"
    end = f"diverged after {len(run.losses)} steps" if run.diverged else end
    skipped = f", {run.skipped} steps skipped" if run.skipped else ""
    setting = f"learning rate {run.learning_rate:<6g} seed {run.seed}"
    return f"{model} {method:<13} {setting}  {end}{skipped}"
