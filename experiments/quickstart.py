"""Adam and second-order methods, side by side on small models.

    python -m experiments.quickstart

trains an MLP and a convnet on Fashion-MNIST with every method on the same batches, each at the
learning rate of its own small grid that ends with the least loss, and writes a table, the numbers
behind it (JSON) and a plot (PNG).
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments import models
from experiments.data import DataCorrupted, Dataset, DataUnavailable, load
from experiments.grid import Settings, search
from experiments.plots import learning_curves
from experiments.recipes import DENSE, DENSE_LIMIT, RECIPES, ROWS_LIMIT
from experiments.summary import table, write_json
from experiments.timing import provenance
from experiments.training import SMOOTHING, Task

TABLES = ("concrete", "energy", "kin8nm", "power-plant", "wine-quality-red", "yacht")
DATASETS = ("fashion-mnist", *TABLES)
# The loss to reach. On Fashion-MNIST Adam passes it before the end of a default run.
TARGET = 0.4
REGRESSION_TARGET = 0.1

EXAMPLES = """examples:
  python -m experiments.quickstart                all of it: a few minutes on two CPU cores
  python -m experiments.quickstart --smoke        everything once, too short to say anything
  python -m experiments.quickstart --model mlp --seeds 0 1 2
  python -m experiments.quickstart --dataset kin8nm --methods adam egn ggn_cg

Data are read from the folder CURVAX_DATA if that is set, else fetched once into the cache.
"""


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="python -m experiments.quickstart",
        description="Compare Adam with second-order methods on small models: steps and seconds to "
        "a training loss, cost of a step, memory of the optimizer. Each method runs at every "
        "learning rate of a small grid of its own, and is shown at the one that ends lowest.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, help: str, **options: Any) -> None:
        cli.add_argument(flag, help=help, **options)

    def number(flag: str, help: str) -> None:
        add(flag, help, type=_positive, metavar="N")

    add(
        "--dataset",
        f"one of {', '.join(DATASETS)} (default: fashion-mnist); all but the first are regression",
        choices=DATASETS,
        default="fashion-mnist",
        metavar="NAME",
    )
    add(
        "--model",
        "mlp, cnn or both (default: both; for regression mlp, which is all there is)",
        nargs="+",
        choices=models.MODELS,
        metavar="NAME",
    )
    add(
        "--methods",
        f"any of {', '.join(RECIPES)} (default: adam ggn_cg newton_cg, and egn where a batch has "
        f"at most {ROWS_LIMIT} outputs); the last two for at most {DENSE_LIMIT} parameters",
        nargs="+",
        choices=tuple(RECIPES),
        metavar="NAME",
    )
    number("--steps", "steps of each run (default: 300)")
    number("--batch-size", "examples in a batch (default: 512)")
    number("--cg-steps", "steps of the inner solver in ggn_cg and newton_cg (default: 5)")
    add(
        "--target",
        f"the smoothed training loss to reach (default: {TARGET:g}; {REGRESSION_TARGET:g} for "
        "regression)",
        type=float,
        metavar="LOSS",
    )
    add(
        "--seeds",
        "seeds of model and batches; every learning rate runs with each of them (default: 0)",
        nargs="+",
        type=_natural,
        default=[0],
        metavar="N",
    )
    add(
        "--out",
        "where quickstart.json and quickstart.png go (default: results/quickstart)",
        type=Path,
        default=Path("results/quickstart"),
        metavar="FOLDER",
    )
    add("--no-plot", "write no PNG", action="store_true")
    add(
        "--smoke",
        "10 steps on a part of the data, two learning rates, 2 steps of CG: under a minute",
        action="store_true",
    )
    return cli


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _natural(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


class Unusable(ValueError):
    """Flags that do not go together; the message is for the user."""


def settle(flags: argparse.Namespace, dataset: Dataset) -> Settings:
    """The settings that flags and data make together, or `Unusable`."""
    regression = dataset.kind == "regression"
    smoke = flags.smoke
    batch_size = flags.batch_size or (64 if smoke else 512)
    if batch_size > len(dataset.train[0]):
        raise Unusable(
            f"--batch-size {batch_size}: {dataset.name} has {len(dataset.train[0])} examples to "
            f"train on{' with --smoke' if smoke else ''}."
        )
    names = tuple(dict.fromkeys(flags.model or (("mlp",) if regression else models.MODELS)))
    if regression and "cnn" in names:
        raise Unusable(f"--model cnn: it takes images, and {dataset.name} has none; use mlp.")
    rows = batch_size * Task(dataset, names[0]).outputs
    methods = tuple(dict.fromkeys(flags.methods or ()))
    if not methods:
        methods = ("adam", "ggn_cg", "newton_cg") + (("egn",) if rows <= ROWS_LIMIT else ())
    for name in names:
        size = models.count(Task(dataset, name).init(jax.random.key(0)))
        if size > DENSE_LIMIT and set(DENSE) & set(methods):
            raise Unusable(
                f"--methods {' '.join(m for m in methods if m in DENSE)}: {name} has {size} "
                f"parameters, and dense curvature is for at most {DENSE_LIMIT}; use ggn_cg."
            )
    target = flags.target
    if target is None:
        target = REGRESSION_TARGET if regression else TARGET
    return Settings(
        dataset=flags.dataset,
        models=names,
        methods=methods,
        steps=flags.steps or (10 if smoke else 300),
        batch_size=batch_size,
        cg_steps=flags.cg_steps or (2 if smoke else 5),
        target=target,
        seeds=tuple(dict.fromkeys(flags.seeds)),
        smoke=smoke,
    )


def notes(settings: Settings, edge: bool) -> str:
    """What the columns mean."""
    seeds = f"medians over {len(settings.seeds)} seeds" if len(settings.seeds) > 1 else "one seed"
    text = (
        f"Loss: smoothed training loss (moving average of batch losses, weight {SMOOTHING:g}); "
        f"{seeds}; {settings.steps} steps of {settings.batch_size} examples. Steps to Adam's end: "
        "until the loss with which Adam ended, and (×) as a multiple of Adam's own. Seconds are "
        "sums over steps; compilation is apart. State: bytes of the optimizer's state."
    )
    return text + (" * at an end of its grid." if edge else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and give the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    cli = parser()
    flags = cli.parse_args(argv)
    # Where the output is no terminal its width is unknown, and 80 columns cut the tables.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    errors = Console(stderr=True)
    try:
        dataset = load(flags.dataset)
        if flags.smoke:
            dataset = _part(dataset)
        settings = settle(flags, dataset)
        flags.out.mkdir(parents=True, exist_ok=True)
        _run(settings, dataset, flags, sys.argv[1:] if argv is None else list(argv), console)
    except (DataUnavailable, DataCorrupted, Unusable, OSError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print("Interrupted: nothing more is written.")
        return 130
    return 0


def _run(
    settings: Settings, dataset: Dataset, flags: Any, argv: list[str], console: Console
) -> None:
    about = provenance()
    about["command"] = " ".join(["python -m experiments.quickstart", *argv])
    console.print(f"{settings.dataset} on {about['device']}, jax {jax.__version__}")
    comparisons = [search(settings, Task(dataset, name), console) for name in settings.models]
    score = "test\nacc. %" if dataset.kind == "classification" else "test\nRMSE"
    for comparison in comparisons:
        title = f"{comparison.model} ({comparison.parameters:,} parameters) on {settings.dataset}"
        console.print(table(comparison, score, title))
    edge = any(trial.at_edge for comparison in comparisons for trial in comparison.trials)
    console.print(notes(settings, edge), style="dim", highlight=False)
    document = {
        **about,
        "settings": dataclasses.asdict(settings),
        "recipes": {name: RECIPES[name].settings for name in settings.methods},
        "smoothing": SMOOTHING,
    }
    write_json(flags.out / "quickstart.json", document, comparisons)
    written = [flags.out / "quickstart.json"]
    if not flags.no_plot:
        title = f"{settings.dataset}, batches of {settings.batch_size}, {about['device']}"
        learning_curves(flags.out / "quickstart.png", comparisons, title)
        written.append(flags.out / "quickstart.png")
    console.print("written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)


def _part(dataset: Dataset) -> Dataset:
    train = tuple(array[:2000] for array in dataset.train)
    test = tuple(array[:500] for array in dataset.test)
    return dataclasses.replace(dataset, train=train, test=test)


if __name__ == "__main__":
    sys.exit(main())
