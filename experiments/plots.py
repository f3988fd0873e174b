"""Plots of training runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.recipes import RECIPES
from experiments.summary import Comparison
from experiments.training import Run

# Okabe & Ito's palette, but brown for its yellow, and two more; line styles beside it tell apart
# what has no colour. A method has the pair of its place among the recipes: there are 30.
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
LINES = ("-", "-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def style(method: str) -> tuple[str, Any]:
    """The colour and line of a method, which are its own whatever it is plotted with."""
    place = list(RECIPES).index(method)
    return COLOURS[place % len(COLOURS)], LINES[place % len(LINES)]


def learning_curves(path: Path, comparisons: Sequence[Comparison], title: str) -> None:
    """Smoothed training loss against steps and against seconds, a row for each model.

    Each method at its chosen learning rate: the mean over seeds, and a band from least to most.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    height = 1.2 + 3.4 * len(comparisons)
    figure, grid = plt.subplots(
        len(comparisons), 2, figsize=(10, height), sharey="row", squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for (by_step, by_second), comparison in zip(grid, comparisons, strict=True):
        for trial in comparison.trials:
            colour, line = style(trial.method)
            runs = [run for run in trial.chosen if not run.diverged]
            if not runs:
                by_step.plot([], [], color=colour, linestyle=line, label=f"{trial.method} diverged")
                continue
            label = f"{trial.method}, learning rate {runs[0].learning_rate:g}"
            mean, least, most = _over_seeds(runs)
            steps = np.arange(1, len(mean) + 1)
            seconds = np.mean([np.cumsum(run.seconds) for run in runs], axis=0)
            for axes, x in ((by_step, steps), (by_second, seconds)):
                axes.plot(x, mean, color=colour, linestyle=line, linewidth=1.8, label=label)
                if len(runs) > 1:
                    axes.fill_between(x, least, most, color=colour, alpha=0.15, linewidth=0)
        by_step.set_title(f"{comparison.model}: loss by step", fontsize=11)
        by_second.set_title(f"{comparison.model}: loss by time", fontsize=11)
        by_step.set_ylabel("smoothed training loss")
        by_step.set_xlabel("step")
        by_second.set_xlabel("seconds (without compilation)")
        by_second.set_xscale("log")
        for axes in (by_step, by_second):
            axes.set_yscale("log")
            axes.axhline(comparison.target, color="0.45", linewidth=1, linestyle=(0, (1, 2)))
            axes.grid(True, which="major", color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        by_second.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        by_step.annotate(
            f"target {comparison.target:g}",
            (0, comparison.target),
            xycoords=("axes fraction", "data"),
            xytext=(3, 2),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=8,
            color="0.35",
        )
        by_step.legend(frameon=False, fontsize=9, loc="upper right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
