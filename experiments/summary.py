"""What the runs of an experiment come to: one row for each method, as a table and as JSON."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from experiments.costs import Cost
from experiments.store import rounded
from experiments.training import Run


@dataclasses.dataclass(frozen=True)
class Trial:
    """All runs of one method on one model: every learning rate with every seed, or those that were
    not best with the first seed with that one only. `short` are runs at the best one over a part
    of the steps.
    """

    method: str
    runs: tuple[Run, ...]
    compile_seconds: float
    cost: Cost | None = None
    short: tuple[Run, ...] = ()

    @property
    def chosen(self) -> tuple[Run, ...]:
        """The runs, one a seed, at the learning rate with the least mean final loss."""
        rates = sorted({run.learning_rate for run in self.runs})
        by_rate = [tuple(run for run in self.runs if run.learning_rate == rate) for rate in rates]
        most = max(map(len, by_rate))
        return min(
            (runs for runs in by_rate if len(runs) == most),
            key=lambda runs: statistics.fmean(run.final for run in runs),
        )

    @property
    def at_edge(self) -> bool:
        """Whether the chosen learning rate is the largest or smallest of several tried."""
        rates = sorted({run.learning_rate for run in self.runs})
        return len(rates) > 2 and self.chosen[0].learning_rate in (rates[0], rates[-1])


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at its chosen learning rate: medians over seeds.

    `to_adam` is steps to the loss at which Adam ended on the same seed, and `to_adam_ratio` the
    same as a multiple of the steps that Adam itself took to get there first; `to_adam_time` is that
    multiple in seconds. Infinite is never. Where costs were measured, `milliseconds` are those of
    steps beside Adam's, `to_adam_time` is in steps as they cost there, and `gradients` is what a
    step took on average, in gradients. `short` is the final loss of shorter runs, and `sooner`
    whether at least half of them, each beside Adam's run with the same seed, ended no higher.
    """

    method: str
    learning_rate: float
    at_edge: bool
    steps: float
    seconds: float
    to_adam: float
    to_adam_ratio: float
    to_adam_time: float
    final: float
    score: float
    milliseconds: float
    time_ratio: float
    gradients: float
    state_ratio: float
    compile_seconds: float
    diverged: int
    skipped: int
    short: float
    sooner: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The methods on one model. `target` is the fixed loss to be reached; `left_out` says of other
    methods why they were not run.
    """

    model: str
    parameters: int
    target: float
    trials: tuple[Trial, ...]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[Row]:
        adam = {t.method: t for t in self.trials}.get("adam")
        return [self._row(trial, adam.chosen if adam else None) for trial in self.trials]

    def _row(self, trial: Trial, adam: Sequence[Run] | None) -> Row:
        runs = trial.chosen
        reached = [run.reach(self.target) for run in runs]
        to_adam, ratios, times = [math.nan], [math.nan], [math.nan]
        if adam is not None:
            there = [run.reach(a.final) for run, a in zip(runs, adam, strict=True)]
            own = [a.reach(a.final) for a in adam]
            to_adam = [steps for steps, _ in there]
            ratios, times = (
                [_share(n[i], m[i]) for n, m in zip(there, own, strict=True)] for i in range(2)
            )
        milliseconds = 1e3 * _median(run.step_seconds for run in runs)
        base = adam or ()
        ahead = [run.final - a.final for run, a in zip(trial.short, base, strict=False)]
        base_milliseconds = 1e3 * _median(run.step_seconds for run in base)
        gradients = math.nan
        if trial.cost is not None:
            # Beside each other: whatever else the machine did in the runs is no part of it.
            milliseconds, base_milliseconds = trial.cost.milliseconds, trial.cost.adam_milliseconds
            times = [ratio * trial.cost.in_adam_steps for ratio in ratios]
            gradients = _median(float(trial.cost.of(run).mean()) for run in runs)
        return Row(
            method=trial.method,
            learning_rate=runs[0].learning_rate,
            at_edge=trial.at_edge,
            steps=_median(steps for steps, _ in reached),
            seconds=_median(seconds for _, seconds in reached),
            to_adam=_median(to_adam),
            to_adam_ratio=_median(ratios),
            to_adam_time=_median(times),
            final=_median(run.final for run in runs),
            score=_median(run.score for run in runs),
            milliseconds=milliseconds,
            time_ratio=milliseconds / base_milliseconds,
            gradients=gradients,
            state_ratio=runs[0].state_bytes / _median(run.state_bytes for run in base),
            compile_seconds=trial.compile_seconds,
            diverged=sum(run.diverged for run in trial.runs),
            skipped=sum(run.skipped for run in runs),
            short=_median(run.final for run in trial.short),
            sooner=bool(base) and _median(ahead) <= 0,
        )


def _share(x: float, of: float) -> float:
    return x / of if math.isfinite(of) else math.nan


def _median(numbers: Any) -> float:
    numbers = list(numbers)
    return statistics.median(numbers) if numbers else math.nan


def table(comparison: Comparison, score: str, title: str) -> Table:
    """The rows for a terminal of 100 columns."""
    shown = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        collapse_padding=True,
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    shown.add_column("method", no_wrap=True)
    goal = f"{comparison.target:g}"
    for head in (
        "learning\nrate",
        f"steps\nto {goal}",
        f"seconds\nto {goal}",
        "steps to\nAdam's end",
        "final\nloss",
        score,
        "ms a\nstep",
        "time\n×Adam",
        "state\n×Adam",
    ):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in comparison.rows():
        percent = score.endswith("%")
        shown.add_row(
            row.method,
            f"{row.learning_rate:g}" + ("*" if row.at_edge else ""),
            _number(row.steps, ".0f"),
            _number(row.seconds, ".1f"),
            _number(row.to_adam, ".0f") + _in_brackets(row.to_adam_ratio),
            "diverged" if row.final == math.inf else f"{row.final:.3f}",
            _number(100 * row.score if percent else row.score, ".1f" if percent else ".3f"),
            _number(row.milliseconds, ".1f"),
            _number(row.time_ratio, ".1f"),
            _number(row.state_ratio, ".2f"),
        )
    return shown


def _number(x: float, form: str) -> str:
    if math.isnan(x):
        return "–"
    return "never" if math.isinf(x) else format(x, form)


def _in_brackets(ratio: float) -> str:
    return f" ({ratio:.2f}×)" if math.isfinite(ratio) else ""


def _end(run: Run) -> dict[str, Any]:
    kept = {name: getattr(run, name) for name in ("learning_rate", "seed", "score", "skipped")}
    return kept | {"steps": len(run.losses), "final": run.final}


def write_json(
    path: Path, settings: dict[str, Any], comparisons: Sequence[Comparison], curves: bool = True
) -> None:
    """Settings, rows and every run, with all its losses or what it came to. What is infinite or not
    a number is null.
    """
    told = dataclasses.asdict if curves else _end
    document = {
        **settings,
        "comparisons": [
            {
                "model": comparison.model,
                "parameters": comparison.parameters,
                "target": comparison.target,
                "left_out": comparison.left_out,
                "rows": [dataclasses.asdict(row) for row in comparison.rows()],
                "runs": [
                    {"method": trial.method, **told(run)}
                    for trial in comparison.trials
                    for run in trial.runs + trial.short
                ],
            }
            for comparison in comparisons
        ],
    }
    text = json.dumps(rounded(document), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
