"""Many steps of a method, and whether memory grows or anything compiles again on the way.

    python -m experiments.soak --methods kfac soap --steps 5000

reads, every 500 steps, the memory of the process, the bytes of all arrays that JAX keeps, and how
often XLA has compiled; the exit code is 1 where something grows.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
from rich.console import Console

from experiments.data import DataCorrupted, DataUnavailable, batches, load
from experiments.recipes import RECIPES, Setting
from experiments.tables import Row, write_results
from experiments.timing import provenance
from experiments.training import Task, a_part

_MIB = 2**20
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Reading(NamedTuple):
    """After so many steps: resident bytes of the process, bytes of arrays and how many these are,
    and programs compiled since the start.
    """

    step: int
    resident: int
    arrays: int
    count: int
    compiled: int

    @property
    def row(self) -> Row:
        return {
            "step": self.step,
            "resident KiB": self.resident // 1024,
            "arrays": self.count,
            "arrays' bytes": self.arrays,
            "compiled": self.compiled,
        }


class Compilations:
    """Counts what XLA compiles from now on. JAX takes listeners for good."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **about: Any) -> None:
        self.count += event == _COMPILED


def resident() -> int:
    """Bytes of this process in memory, without those that its allocator could give back."""
    with contextlib.suppress(OSError, AttributeError):  # only with glibc
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def read(step: int, compilations: Compilations) -> Reading:
    gc.collect()  # what waits for it has not leaked
    arrays = jax.live_arrays()
    nbytes = sum(array.nbytes for array in arrays)
    return Reading(step, resident(), nbytes, len(arrays), compilations.count)


def readings(
    method: str, task: Task, *, steps: int, batch_size: int, every: int, seed: int = 0
) -> Iterator[Reading]:
    """Trains, and reads every so many steps."""
    compilations = Compilations()
    recipe = RECIPES[method]
    trainer = recipe.build(Setting(task.objective, axes=task.axes))
    rate = recipe.learning_rates[len(recipe.learning_rates) // 2]
    key = jax.random.key(seed)
    model = task.init(key)
    state = trainer.init(model, rate, steps)
    for step, batch in enumerate(batches(task.train, batch_size, seed=seed, steps=steps), 1):
        model, state, told = trainer(model, state, batch, jax.random.fold_in(key, step))
        jax.block_until_ready(told.value)
        if step % every == 0:
            yield read(step, compilations)


def grown(found: Sequence[Reading], tolerance: int) -> list[str]:
    """What grew after the first reading, in words; resident bytes by more than `tolerance`.

    The pages of a process come and go: the median of the first half is held against that of the
    second.
    """
    first, last, half = found[0], found[-1], len(found) // 2
    said = []
    if last.compiled > first.compiled:
        said.append(f"{last.compiled - first.compiled} programs compiled after step {first.step}")
    if last.count > first.count or last.arrays > first.arrays:
        more = last.arrays - first.arrays
        said.append(f"{last.count - first.count} arrays more, {more} bytes, than at {first.step}")
    before, after = (
        statistics.median(r.resident for r in part) for part in (found[:half], found[half:])
    )
    if after - before > tolerance:
        said.append(f"{(after - before) / _MIB:.1f} MiB more in the second half of the run")
    return said


def soak(
    method: str,
    task: Task,
    echo: Callable[[str], None],
    *,
    steps: int,
    batch_size: int,
    every: int,
    tolerance: int,
) -> tuple[list[Row], list[str]]:
    """The table of one method, and what grew."""
    found = []
    for reading in readings(method, task, steps=steps, batch_size=batch_size, every=every):
        found.append(reading)
        echo("  ".join(f"{name} {value}" for name, value in reading.row.items()))
    return [reading.row for reading in found], grown(found, tolerance)


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="python -m experiments.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = cli.add_argument
    add("--methods", "--method", nargs="+", choices=tuple(RECIPES), default=["kfac"])
    add("--steps", type=int, default=5000, help="default: %(default)s")
    add("--every", type=int, default=500, help="steps between readings (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--tolerance", type=float, default=4.0, help="MiB of the process (default: %(default)s)")
    add("--out", type=Path, default=Path("results/soak.json"), help="default: %(default)s")
    add("--smoke", action="store_true", help="on a part of the data")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and give the exit code: 0, 1 where something grew, 2 for what the user can mend, 130
    when interrupted.
    """
    args = parser().parse_args(argv)
    console = Console()
    echo = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
    if not 0 < 2 * args.every <= args.steps:
        print("error: --every: wanted at least two readings in --steps.", file=sys.stderr)
        return 2
    faults: list[str] = []

    def section(method: str) -> Callable[[], list[Row]]:
        def make() -> list[Row]:
            rows, said = soak(
                method,
                task,
                echo,
                steps=args.steps,
                batch_size=args.batch_size,
                every=args.every,
                tolerance=int(args.tolerance * _MIB),
            )
            faults.extend(f"{method}: {fault}" for fault in said)
            return rows

        return make

    try:
        dataset = load("fashion-mnist")
        task = Task(a_part(dataset) if args.smoke else dataset, "mlp")
        write_results(
            {method: section(method) for method in args.methods}, args.out, provenance(), echo
        )
    except (DataUnavailable, DataCorrupted, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for fault in faults:
        print(f"grown: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
