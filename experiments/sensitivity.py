"""How much the end of a run depends on its settings: K-FAC beside Adam, as heat maps.

    python -m experiments.sensitivity

An MLP on Fashion-MNIST, from one seed, at 7 × 7 settings of two hyperparameters at a time: of K-FAC
damping × steps between refreshes (at its default learning rate) and damping × learning rate, of
Adam β₂ × learning rate. A cell is the smoothed training loss at the end. Hyperparameters live in
the state or on the host, so that all of K-FAC takes two compilations.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree
from rich.progress import track

import curvax as cx
from experiments.data import Arrays, DataCorrupted, DataUnavailable, load
from experiments.plots import heat_maps
from experiments.recipes import (
    KFAC_DAMPING,
    KFAC_RATE,
    MOMENTUM,
    FirstOrder,
    SecondOrder,
    Telemetry,
)
from experiments.tables import Row, write_results
from experiments.timing import provenance
from experiments.training import Task, train

DAMPINGS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
PERIODS = (1, 2, 5, 10, 20, 50, 100)
PERIOD = 10
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BETAS = (0.5, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999)


class Kfac(SecondOrder):
    """K-FAC with damping and period of refresh as attributes."""

    damping = KFAC_DAMPING
    refresh_every = PERIOD

    def __init__(self, objective: cx.Objective):
        # Of this policy no more is used than that its λ is in the state. The host decides when a
        # refresh is due: steps 0 and 1 of the method's own cycle are one with and one without.
        held = cx.LevenbergMarquardt(every=None)
        method = cx.methods.kfac(objective, refresh_every=2, damping=held)
        super().__init__(method, MOMENTUM)
        self._dues = method.plan.phase(0), method.plan.phase(1)
        self._compiled = eqx.filter_jit(self._step.pure)
        self._count = 0

    def init(self, model: PyTree[Any], learning_rate: float, steps: int) -> cx.StepState:
        self._count = 0
        state = super().init(model, learning_rate, steps)
        return _set(state, damping=self.damping)

    def __call__(
        self, model: PyTree[Any], state: cx.StepState, batch: Arrays, key: PRNGKeyArray
    ) -> tuple[PyTree[Any], cx.StepState, Telemetry]:
        phase = self._dues[int(self._count % self.refresh_every > 0)]
        self._count += 1
        return self._told(self._compiled(model, state, batch, key, phase=phase))


class Adam(FirstOrder):
    """Adam with β₂ as an attribute."""

    b2 = 0.999

    def __init__(self, objective: cx.Objective):
        direction = optax.inject_hyperparams(lambda b2: optax.scale_by_adam(b2=b2))(b2=self.b2)
        super().__init__(objective, direction)

    def init(self, model: PyTree[Any], learning_rate: float, steps: int) -> Any:
        return _set(super().init(model, learning_rate, steps), b2=self.b2)


def _set(state: Any, **numbers: float) -> Any:
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}
    return optax.tree_utils.tree_set(state, **arrays)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Two hyperparameters with their values: the names are those of a row."""

    title: str
    rows: tuple[str, tuple[float, ...]]
    columns: tuple[str, tuple[float, ...]]
    default: tuple[float | None, float | None]

    def matrix(self, section: list[Row]) -> np.ndarray:
        """Losses, as (rows, columns); infinite where a run diverged."""
        found = {(r[self.rows[0]], r[self.columns[0]]): r["loss"] for r in section}
        loss = lambda r, c: math.inf if found[r, c] is None else found[r, c]
        return np.asarray([[loss(r, c) for c in self.columns[1]] for r in self.rows[1]])


GRIDS = {
    "kfac: damping × period": Grid(
        f"K-FAC, learning rate {KFAC_RATE:g}",
        ("damping", DAMPINGS),
        ("refresh every", PERIODS),
        (KFAC_DAMPING, PERIOD),
    ),
    "kfac: damping × rate": Grid(
        f"K-FAC, refreshed every {PERIOD} steps",
        ("damping", DAMPINGS),
        ("learning rate", RATES),
        (KFAC_DAMPING, KFAC_RATE),
    ),
    "adam: β₂ × rate": Grid("Adam", ("β₂", BETAS), ("learning rate", RATES), (0.999, 1e-3)),
}


def sweep(task: Task, steps: int, batch_size: int) -> dict[str, Callable[[], list[Row]]]:
    """The sections: a row for each cell."""
    kfac, adam = Kfac(task.objective), Adam(task.objective)

    def run(trainer: Any, rate: float) -> float | None:
        ended = train(trainer, task, learning_rate=rate, seed=0, steps=steps, batch_size=batch_size)
        return ended.final if math.isfinite(ended.final) else None

    def by_period(damping: float, period: float) -> float | None:
        kfac.damping, kfac.refresh_every = damping, int(period)
        return run(kfac, KFAC_RATE)

    def by_rate(damping: float, rate: float) -> float | None:
        kfac.damping, kfac.refresh_every = damping, PERIOD
        return run(kfac, rate)

    def by_beta(b2: float, rate: float) -> float | None:
        adam.b2 = b2
        return run(adam, rate)

    def section(grid: Grid, loss: Callable[[float, float], float | None]) -> list[Row]:
        cells = [(r, c) for r in grid.rows[1] for c in grid.columns[1]]
        return [
            {grid.rows[0]: r, grid.columns[0]: c, "loss": loss(r, c)}
            for r, c in track(cells, description=grid.title)
        ]

    losses = zip(GRIDS.items(), (by_period, by_rate, by_beta), strict=True)
    return {name: lambda grid=grid, loss=loss: section(grid, loss) for (name, grid), loss in losses}


def summary(matrices: dict[str, np.ndarray]) -> list[Row]:
    """A row for each grid: its best cell, and how many come near the best of all."""
    best = min(matrix.min() for matrix in matrices.values())
    return [
        {
            "grid": name,
            "best": float(matrix.min()),
            "median": float(np.median(matrix)) if np.isfinite(np.median(matrix)) else "diverged",
            "worst": float(matrix.max()) if np.isfinite(matrix.max()) else "diverged",
            "within 1.1 × best of all": float(np.mean(matrix <= 1.1 * best)),
            "within 1.25 × best of all": float(np.mean(matrix <= 1.25 * best)),
            "within 1.25 × own best": float(np.mean(matrix <= 1.25 * matrix.min())),
        }
        for name, matrix in matrices.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the grids, and writes JSON and PNG."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="steps of a run (default: 150)")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--out", type=Path, default=Path("results/sensitivity.json"))
    parser.add_argument("--plot", type=Path, default=Path("results/kfac_sensitivity.png"))
    args = parser.parse_args(argv)
    about = provenance() | {"steps": args.steps, "batch": args.batch_size}
    try:
        task = Task(load("fashion-mnist"), "mlp")
    except (DataUnavailable, DataCorrupted) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    matrices: dict[str, np.ndarray] = {}

    def kept(name: str, make: Callable[[], list[Row]]) -> list[Row]:
        rows = make()
        matrices[name] = GRIDS[name].matrix(rows)
        return rows

    made = sweep(task, args.steps, args.batch_size)
    sections = {name: lambda n=name, m=make: kept(n, m) for name, make in made.items()}
    write_results(sections | {"summary": lambda: summary(matrices)}, args.out, about, echo=print)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    title = (
        f"Training loss after {args.steps} steps: MLP on Fashion-MNIST, batches of "
        f"{args.batch_size} (□ default)"
    )
    panels = [
        (grid.title, grid.rows, grid.columns, grid.default, matrices[name])
        for name, grid in GRIDS.items()
    ]
    heat_maps(args.plot, panels, title)
    print(f"written: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
