"""One setting of K-FAC for all problems, beside Adam at the best of seven learning rates for each.

    python -m experiments.defaults

Adam's rate is chosen by its final loss with the first seed. Then both run with every seed; a row
has medians over them. Learning rates fall to zero over a run, by a cosine. Losses are training
losses, smoothed as in the quickstart.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import models
from experiments.data import DataCorrupted, DataUnavailable, load
from experiments.recipes import KFAC_RATE, RECIPES, Setting
from experiments.tables import Row, write_results
from experiments.timing import provenance
from experiments.training import Run, Task, compile_seconds, train

ADAM_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


class Problem(NamedTuple):
    """A model, its data, and the examples in a batch."""

    model: str
    dataset: str
    batch_size: int


PROBLEMS = {
    "mlp": Problem("mlp", "fashion-mnist", 256),
    "kin8nm": Problem("mlp", "kin8nm", 256),
    "energy": Problem("mlp", "energy", 256),
    "cnn": Problem("cnn", "fashion-mnist", 128),
    "autoencoder": Problem("autoencoder", "fashion-mnist", 256),
    "lm": Problem("transformer", "tinyshakespeare", 8),
}


def compare(problem: Problem, steps: int, seeds: Sequence[int]) -> Row:
    """A row: what both ended with, and how soon K-FAC had Adam's best loss."""
    task = Task(load(problem.dataset), problem.model)
    setting = Setting(task.objective)
    adam, kfac = (RECIPES[name].build(setting) for name in ("adam", "kfac"))
    seconds = [compile_seconds(each, task, problem.batch_size) for each in (adam, kfac)]

    def run(trainer: Any, rate: float, seed: int) -> Run:
        return train(
            trainer,
            task,
            learning_rate=rate,
            seed=seed,
            steps=steps,
            batch_size=problem.batch_size,
        )

    adams = at_best_rate(functools.partial(run, adam), ADAM_RATES, seeds)
    kfacs = [run(kfac, KFAC_RATE, seed) for seed in seeds]
    goals = [each.final for each in adams]
    own = [a.reach(goal) for a, goal in zip(adams, goals, strict=True)]
    reached = [k.reach(goal) for k, goal in zip(kfacs, goals, strict=True)]
    shares = [k[0] / a[0] for k, a in zip(reached, own, strict=True)]
    times = [k[1] / a[1] for k, a in zip(reached, own, strict=True)]
    median = statistics.median
    return {
        "model": problem.model,
        "data": problem.dataset,
        "parameters": models.count(task.init(jax.random.key(0))),
        "batch": problem.batch_size,
        "Adam's rate": adams[0].learning_rate,
        "Adam's end": median(goals),
        "K-FAC's end": median(each.final for each in kfacs),
        "steps, share": _number(median(shares)),
        "shares": " ".join("never" if s == float("inf") else f"{s:.2f}" for s in shares),
        "seconds, share": _number(median(times)),
        "Adam s": median(sum(each.seconds) for each in adams),
        "K-FAC s": median(sum(each.seconds) for each in kfacs),
        "Adam's score": median(each.score for each in adams),
        "K-FAC's score": median(each.score for each in kfacs),
        "Adam compile s": seconds[0],
        "K-FAC compile s": seconds[1],
        "skipped": sum(each.skipped for each in kfacs),
    }


def at_best_rate(
    run: Callable[[float, int], Run], rates: Iterable[float], seeds: Sequence[int]
) -> list[Run]:
    """`run(rate, seed)` of every seed at the rate that ended best with the first."""
    tried = [run(rate, seeds[0]) for rate in rates]
    best = min(tried, key=lambda each: each.final)
    return [best, *(run(best.learning_rate, seed) for seed in seeds[1:])]


def _number(x: float) -> float | str:
    return "never" if x == float("inf") else x


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the problems, prints the table, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=tuple(PROBLEMS), default=tuple(PROBLEMS))
    parser.add_argument("--steps", type=int, default=200, help="steps of a run (default: 200)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("results/defaults.json"))
    args = parser.parse_args(argv)
    about = provenance() | {
        "steps": args.steps,
        "seeds": args.seeds,
        "Adam's rates": list(ADAM_RATES),
        "K-FAC": {"settings": RECIPES["kfac"].settings, "learning rate": KFAC_RATE},
    }

    def section(name: str) -> list[Row]:
        return [compare(PROBLEMS[name], args.steps, args.seeds)]

    sections = {name: functools.partial(section, name) for name in args.problems}
    try:
        write_results(sections, args.out, about, echo=print)
    except (DataUnavailable, DataCorrupted) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
