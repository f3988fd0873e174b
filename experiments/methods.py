"""All methods on one task, each at the best learning rate of a small grid of its own.

    python -m experiments.methods --task fashion-mnist-mlp --seeds 0 1 2

writes a table (Markdown and JSON) and a plot of the training loss against steps, time (in steps of
Adam) and gradients: what a step costs in operations, as a multiple of one gradient. Each run is
written down as it ends, in a file of lines beside them: a process that is killed or stopped goes on
where it was when it is started again, and what was run with the same settings is not run again.
"""

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from experiments.data import DataCorrupted, DataUnavailable, load
from experiments.grid import Search, Settings, Study
from experiments.plots import learning_curves
from experiments.recipes import RECIPES
from experiments.store import Store
from experiments.summary import Comparison, write_json
from experiments.summary import Row as Summary
from experiments.tables import Row, as_text
from experiments.timing import provenance
from experiments.training import SMOOTHING, Task, a_part


class Kind(NamedTuple):
    """A data set, a model, the examples in a batch, the steps of a run, and the test score."""

    dataset: str
    model: str
    batch_size: int
    steps: int
    score: str


# Of Adam's steps, in which a method is to have Adam's final loss.
SHORT = 0.6
TABLES = ("concrete", "energy", "kin8nm", "power-plant", "wine-quality-red", "yacht")
TASKS = {
    "fashion-mnist-mlp": Kind("fashion-mnist", "mlp", 256, 400, "test acc. %"),
    "fashion-mnist-cnn": Kind("fashion-mnist", "cnn", 256, 400, "test acc. %"),
    "tinyshakespeare": Kind("tinyshakespeare", "transformer", 128, 600, "test loss"),
    **{f"uci-{name}": Kind(name, "mlp", 256, 400, "test RMSE") for name in TABLES},
}


def settle(args: argparse.Namespace, task: Task) -> tuple[Settings, dict[str, str]]:
    """The settings, and the methods that are left out, with the reason."""
    kind = TASKS[args.task]
    batch_size = args.batch_size or (64 if args.smoke else kind.batch_size)
    size = task.size(min(batch_size, len(task.train[0])))
    reasons = {name: RECIPES[name].unfit(size) for name in args.methods}
    settings = Settings(
        dataset=kind.dataset,
        models=(kind.model,),
        methods=tuple(name for name, reason in reasons.items() if reason is None),
        steps=args.steps or (10 if args.smoke else kind.steps),
        batch_size=size.batch,
        cg_steps=2 if args.smoke else 5,
        target=math.nan,
        seeds=tuple(dict.fromkeys(args.seeds)),
        smoke=args.smoke,
    )
    return settings, {name: reason for name, reason in reasons.items() if reason is not None}


def to_adams_end(comparison: Comparison) -> Comparison:
    """With the loss at which Adam ended as the one to be reached."""
    ends = [run.final for t in comparison.trials if t.method == "adam" for run in t.chosen]
    return dataclasses.replace(comparison, target=statistics.fmean(ends) if ends else math.nan)


def rows(comparison: Comparison, score: str) -> list[Row]:
    """The table: methods that ended lowest first, then those that were left out."""
    made = [_row(each, score) for each in sorted(comparison.rows(), key=lambda row: row.final)]
    empty = dict.fromkeys(_row(comparison.rows()[0], score), "") if made else {}
    missing = comparison.left_out.items()
    return made + [{**empty, "method": name, "notes": f"left out: {why}"} for name, why in missing]


def _row(row: Summary, score: str) -> Row:
    percent = score.endswith("%")
    notes = {
        "at an end of its grid": row.at_edge,
        f"{row.diverged} runs diverged": row.diverged,
        f"{row.skipped} steps skipped": row.skipped,
    }
    return {
        "method": row.method,
        "learning rate": f"{row.learning_rate:g}",
        "final loss": "diverged" if math.isinf(row.final) else f"{row.final:.4g}",
        score: _number(100 * row.score if percent else row.score, ".1f" if percent else ".3f"),
        f"in {SHORT:g} of the steps": _number(row.short, ".4g") + ", yes" * row.sooner,
        "steps × Adam": _number(row.to_adam_ratio, ".2f"),
        "time × Adam": _number(row.to_adam_time, ".2f"),
        "gradients a step": _number(row.gradients, ".2f"),
        "time a step × Adam": _number(row.time_ratio, ".2f"),
        "state × Adam": _number(row.state_ratio, ".2f"),
        "notes": ", ".join(note for note, there in notes.items() if there),
    }


def _number(x: float, form: str) -> str:
    if math.isnan(x):
        return "–"
    if math.isinf(x):
        return "never"
    return format(x, form if abs(x) < 1e5 else ".3g")


def notes(settings: Settings) -> str:
    """What the columns mean."""
    seeds = f"medians over {len(settings.seeds)} seeds" if len(settings.seeds) > 1 else "one seed"
    return (
        f"Final loss: smoothed training loss (moving average of batch losses, weight "
        f"{SMOOTHING:g}); {seeds}, the learning rate chosen with the first; {settings.steps} steps "
        f"of {settings.batch_size} examples, over which the learning rate falls to zero by a "
        f"cosine. In {SHORT:g} of the steps: the final loss of shorter runs, over which it falls "
        "alike, and whether half of them end no higher than Adam in all steps. Steps and time × "
        "Adam: of the long runs, until the loss with which Adam ended, as a multiple of what Adam "
        "took to get there. Gradients a step: operations, as a multiple of those of one gradient, "
        "on average. Time a step: of steps interleaved with Adam's. State: bytes of the "
        "optimizer's state."
    )


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="python -m experiments.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = cli.add_argument
    add("--task", choices=tuple(TASKS), default="fashion-mnist-mlp", help="default: %(default)s")
    add("--methods", nargs="+", choices=tuple(RECIPES), default=list(RECIPES), help="default: all")
    add("--steps", type=int, help="steps of a run (default: by task)")
    add("--batch-size", type=int, help="examples in a batch (default: by task)")
    add("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    add("--minutes", type=float, default=20.0, help="longest run (default: %(default)s)")
    add("--out", type=Path, default=Path("results/methods"), help="default: %(default)s")
    add("--smoke", action="store_true", help="10 steps on a part of the data")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and give the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    args = parser().parse_args(argv)
    # Where the output is no terminal its width is unknown, and 80 columns cut the lines.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    kind = TASKS[args.task]
    try:
        dataset = load(kind.dataset)
        task = Task(a_part(dataset) if args.smoke else dataset, kind.model)
        args.out.mkdir(parents=True, exist_ok=True)
        settings, left_out = settle(args, task)
        store = Store(args.out / f"{args.task}.jsonl")
        search = Search(settings, task, console, store, Study(args.minutes, SHORT))
        comparison = search.compare()
    except (DataUnavailable, DataCorrupted, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: started again, it goes on where it was.", file=sys.stderr)
        return 130
    comparison = dataclasses.replace(comparison, left_out=left_out | comparison.left_out)
    write(args, settings, to_adams_end(comparison), console)
    return 0


def write(
    args: argparse.Namespace, settings: Settings, comparison: Comparison, console: Console
) -> None:
    """Table, numbers and plot, in files of the task's name."""
    kind, path = TASKS[args.task], lambda ending: args.out / f"{args.task}.{ending}"
    table = as_text(rows(comparison, kind.score))
    console.print(table, highlight=False, markup=False, soft_wrap=True)
    about = provenance()
    where = f"{about['device']}, {about['date']}, `{about['command']}`"
    path("md").write_text(f"{table}\n\n{notes(settings)}\n\n{where}\n", encoding="utf-8")
    document = {
        **about,
        "settings": dataclasses.asdict(settings),
        "recipes": {t.method: RECIPES[t.method].settings for t in comparison.trials},
        "costs": {t.method: dataclasses.asdict(t.cost) for t in comparison.trials if t.cost},
    }
    write_json(path("json"), document, [comparison], curves=False)
    written = ["md", "json"]
    if comparison.trials:
        title = f"{args.task}, batches of {settings.batch_size}, {about['device']}"
        by = ("step", "adam steps", "gradients")
        learning_curves(path("png"), [comparison], title, by, goal="Adam's end")
        written.append("png")
    console.print("written: " + ", ".join(str(path(ending)) for ending in written), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
