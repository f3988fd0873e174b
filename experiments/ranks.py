"""What a low rank costs: K-FAC by the rank of its factors, beside Adam.

    python -m experiments.ranks

A ReLU network 784-512-256-10 on Fashion-MNIST, batches of 256, 400 steps, momentum 0.9, factors
refreshed every 10 steps, learning rates that fall to zero by a cosine. Adam runs at the best of
seven rates for the first seed, K-FAC once with its defaults and once with a KL clip, at one rate
for all ranks. Losses are training losses, smoothed as in the quickstart; rows have medians over the
seeds.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PRNGKeyArray
from rich.progress import track

import curvax as cx
from experiments import models
from experiments.data import DataCorrupted, DataUnavailable, load
from experiments.defaults import ADAM_RATES, at_best_rate
from experiments.recipes import KFAC_RATE, MOMENTUM, RECIPES, SecondOrder, Setting
from experiments.tables import Row, write_results
from experiments.timing import provenance
from experiments.training import Run, Task, train

WIDTHS = (784, 512, 256, 10)
BATCH = 256
RANKS = (0.05, 0.15, 0.3, None)


class Wide(Task):
    """The task, with a wider network than that of the other experiments."""

    def init(self, key: PRNGKeyArray) -> models.MLP:
        return models.MLP(WIDTHS, jax.nn.relu, key=key)


class Way(NamedTuple):
    """How K-FAC is set up, and its learning rate."""

    options: dict[str, Any]
    learning_rate: float


WAYS = {
    "kfac, defaults": Way({}, KFAC_RATE),
    "kfac, KL clip, damping 0.3": Way({"scaling": cx.KLClip(), "damping": 0.3}, 0.01),
}


def compare(task: Task, steps: int, seeds: Sequence[int]) -> list[Row]:
    """Adam's row, and one for each way and rank."""

    def run(trainer: Any, rate: float, seed: int) -> Run:
        return train(trainer, task, learning_rate=rate, seed=seed, steps=steps, batch_size=BATCH)

    adam = RECIPES["adam"].build(Setting(task.objective))
    rates = track(ADAM_RATES, description="Adam's rates")
    adams = at_best_rate(functools.partial(run, adam), rates, seeds)
    rows = [_row("adam", "", adams, adams)]
    cases = [(name, rank) for name in WAYS for rank in RANKS]
    for name, rank in track(cases, description="K-FAC"):
        options, rate = WAYS[name]
        method = cx.methods.kfac(task.objective, rank=rank, **options)
        trainer = SecondOrder(method, MOMENTUM)
        kfacs = [run(trainer, rate, seed) for seed in seeds]
        rows.append(_row(name, "full" if rank is None else rank, kfacs, adams))
    return rows


def _row(name: str, rank: float | str, runs: list[Run], adams: list[Run]) -> Row:
    return {
        "method": name,
        "rank": rank,
        "learning rate": runs[0].learning_rate,
        "loss": statistics.median(run.final for run in runs),
        "losses": " ".join(f"{run.final:.3f}" for run in runs),
        "accuracy": statistics.median(run.score for run in runs),
        "state / Adam": runs[0].state_bytes / adams[0].state_bytes,
        "skipped": sum(run.skipped for run in runs),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything, prints the table, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="steps of a run (default: 400)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("results/ranks.json"))
    args = parser.parse_args(argv)
    about = provenance() | {"steps": args.steps, "seeds": args.seeds, "batch": BATCH}
    try:
        task = Wide(load("fashion-mnist"), "mlp")
    except (DataUnavailable, DataCorrupted) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sections = {"784-512-256-10": lambda: compare(task, args.steps, args.seeds)}
    write_results(sections, args.out, about, echo=print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
