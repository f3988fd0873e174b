"""Plots of training runs."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.recipes import RECIPES
from experiments.summary import Comparison, Trial
from experiments.training import Run

# Okabe & Ito's palette, but brown for its yellow, and two more; line styles beside it tell apart
# what has no colour. A method has the pair of its place among the recipes: there are 50.
COLOURS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C564B",
    "#882255",
    "#999933",
)
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
# Of more curves than this the legend has a place of its own, best first.
_CROWDED = 10


def style(method: str) -> tuple[str, Any]:
    """The colour and line of a method, which are its own whatever it is plotted with."""
    place = list(RECIPES).index(method)
    return COLOURS[place % len(COLOURS)], LINES[place // len(COLOURS)]


class Measure(NamedTuple):
    """What a loss is plotted against: the words, a scale, and the numbers of runs of a trial."""

    title: str
    label: str
    scale: str
    numbers: Callable[[Trial, Sequence[Run]], np.ndarray]


def _gradients(trial: Trial, runs: Sequence[Run]) -> np.ndarray:
    assert trial.cost is not None
    return np.mean([np.cumsum(trial.cost.of(run)) for run in runs], axis=0)


def _seconds(trial: Trial, runs: Sequence[Run]) -> np.ndarray:
    return np.mean([np.cumsum(run.seconds) for run in runs], axis=0)


def _steps(trial: Trial, runs: Sequence[Run]) -> np.ndarray:
    return np.arange(1, len(runs[0].losses) + 1)


def _adam_steps(trial: Trial, runs: Sequence[Run]) -> np.ndarray:
    assert trial.cost is not None
    return trial.cost.in_adam_steps * _steps(trial, runs)


MEASURES = {
    "step": Measure("step", "step", "linear", _steps),
    "time": Measure("time", "seconds (without compilation)", "log", _seconds),
    # What else the machine did is in seconds of runs, but not in a ratio of interleaved steps.
    "adam steps": Measure("time", "time, in steps of Adam", "log", _adam_steps),
    "gradients": Measure("work", "gradients of the same number of operations", "log", _gradients),
}


def learning_curves(
    path: Path,
    comparisons: Sequence[Comparison],
    title: str,
    by: Sequence[str] = ("step", "time"),
    goal: str = "target",
) -> None:
    """Smoothed training loss against each of some `MEASURES`, a row for each model.

    Each method at its chosen learning rate: the mean over seeds, and a band from least to most.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    crowded = max(len(comparison.trials) for comparison in comparisons) > _CROWDED
    height = 1.2 + (5.4 if crowded else 3.4) * len(comparisons)
    width = 5.0 * len(by) + (2.6 if crowded else 0)
    figure, grid = plt.subplots(
        len(comparisons),
        len(by),
        figsize=(width, height),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(title)
    for row, comparison in zip(grid, comparisons, strict=True):
        for trial in sorted(comparison.trials, key=_end) if crowded else comparison.trials:
            _curves(row, [MEASURES[name] for name in by], trial, crowded)
        for axes, name in zip(row, by, strict=True):
            measure = MEASURES[name]
            axes.set_title(f"{comparison.model}: loss by {measure.title}", fontsize=11)
            axes.set_xlabel(measure.label)
            axes.set_xscale(measure.scale)
            if measure.scale == "log":
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_yscale("log")
            axes.axhline(comparison.target, color="0.45", linewidth=1, linestyle=(0, (1, 2)))
            axes.grid(True, which="major", color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        row[0].set_ylabel("smoothed training loss")
        row[0].annotate(
            f"{goal} {comparison.target:.3g}",
            (0, comparison.target),
            xycoords=("axes fraction", "data"),
            xytext=(3, 2),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=8,
            color="0.35",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )
        if crowded:
            # What diverges leaves the picture, and does not stretch it.
            lowest = min(min(run.smoothed) for t in comparison.trials for run in t.chosen)
            row[0].set_ylim(0.8 * lowest, 2 * _start(comparison))
            named = row[0].get_legend_handles_labels()
            row[-1].legend(
                *named,
                title="method, learning rate",
                frameon=False,
                fontsize=9,
                loc="upper left",
                bbox_to_anchor=(1, 1),
            )
        else:
            row[0].legend(frameon=False, fontsize=9, loc="upper right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curves(row: Any, measures: Sequence[Measure], trial: Trial, crowded: bool) -> None:
    """One method in each panel of a row."""
    colour, line = style(trial.method)
    runs = [run for run in trial.chosen if not run.diverged]
    if not runs:
        row[0].plot([], [], color=colour, linestyle=line, label=f"{trial.method} diverged")
        return
    label = f"{trial.method}, learning rate {runs[0].learning_rate:g}"
    width = 1.8
    if crowded:
        label = f"{trial.method}, {runs[0].learning_rate:g}"
        width = 3.0 if trial.method == "adam" else 1.2
    mean, least, most = _over_seeds(runs)
    for axes, measure in zip(row, measures, strict=True):
        x = measure.numbers(trial, runs)
        axes.plot(x, mean, color=colour, linestyle=line, linewidth=width, label=label)
        if len(runs) > 1:
            axes.fill_between(x, least, most, color=colour, alpha=0.15, linewidth=0)


def _end(trial: Trial) -> float:
    return statistics.fmean(run.final for run in trial.chosen)


def _start(comparison: Comparison) -> float:
    """The usual loss before the first step."""
    return statistics.median(trial.chosen[0].losses[0] for trial in comparison.trials)


def _over_seeds(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    losses = np.stack([run.smoothed for run in runs])
    return losses.mean(0), losses.min(0), losses.max(0)


Axis = tuple[str, tuple[float, ...]]
Panel = tuple[str, Axis, Axis, tuple[float | None, float | None], np.ndarray]


def heat_maps(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Losses over two hyperparameters each, on one logarithmic scale, with their numbers.

    A panel is a title, the name and values of its rows and of its columns, the default of both
    (boxed where it is on the grid) and the matrix. What is not finite is grey.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    losses = np.concatenate([np.ravel(panel[-1]) for panel in panels])
    losses = losses[np.isfinite(losses)]
    # Beyond eight times the least loss, bad is bad: the colours are for what is near the best.
    norm = LogNorm(losses.min(), min(losses.max(), 8 * losses.min()))
    colours = plt.get_cmap("viridis_r").with_extremes(bad="0.8")
    width = 1.0 + 4.1 * len(panels)
    figure, grid = plt.subplots(
        1, len(panels), figsize=(width, 4.6), squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    image = None
    for axes, (name, rows, columns, default, matrix) in zip(grid[0], panels, strict=True):
        shown = np.ma.masked_invalid(matrix)
        image = axes.imshow(shown, norm=norm, cmap=colours, origin="lower")
        for (i, j), loss in np.ndenumerate(matrix):
            dark = np.isfinite(loss) and norm(loss) > 0.5
            text = f"{loss:.2f}" if loss < 9.995 else (f"{loss:.0f}" if loss < 1000 else ">1e3")
            text = text if np.isfinite(loss) else "∞"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="w" if dark else "k")
        axes.set_title(name, fontsize=11)
        axes.set_ylabel(rows[0])
        axes.set_xlabel(columns[0])
        axes.set_yticks(range(len(rows[1])), [_short(x) for x in rows[1]])
        axes.set_xticks(range(len(columns[1])), [_short(x) for x in columns[1]])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if default[0] in rows[1] and default[1] in columns[1]:
            corner = columns[1].index(default[1]) - 0.5, rows[1].index(default[0]) - 0.5
            box = Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=2.5)
            axes.add_patch(box)
    assert image is not None
    bar = figure.colorbar(image, ax=grid[0].tolist(), extend="max", shrink=0.8)
    bar.set_label("smoothed training loss")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _short(x: float) -> str:
    return f"{x:g}" if x >= 1e-3 else f"{x:.0e}".replace("e-0", "e-")
