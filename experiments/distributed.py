"""Training in several processes, on one machine or many: one method, one loss curve.

Every process runs the same program, reads its own part of each batch, and holds its own part of
the arrays; the loss curve is that of one process. With SLURM or Open MPI the processes find each
other; elsewhere each is told where the first one listens, how many there are, and which it is.
"""

import argparse
import dataclasses
import json
import math
import os
import socket
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import curvax as cx
from experiments.data import DataCorrupted, DataUnavailable, batches, load
from experiments.recipes import RECIPES, Setting
from experiments.training import Task, a_part

# What is split over the axes of a mesh: the batch over the first two, weights over the last two.
AXES = ("data", "fsdp", "tensor")
# What launchers call the number of processes, and the number of this one.
_LAUNCHERS = (
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
)
EXAMPLES = """examples:
  python -m experiments.distributed                                   one process
  srun python -m experiments.distributed                              in a job of SLURM
  mpirun -n 4 python -m experiments.distributed --coordinator host0:12345
  python -m experiments.distributed --coordinator host0:12345 --processes 2 --process 0
  python -m experiments.distributed --coordinator host0:12345 --processes 2 --process 1

Data are read from the folder CURVAX_DATA if that is set, else fetched once into the cache.
"""


class Unusable(ValueError):
    """What the user can mend; the message says how."""


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="python -m experiments.distributed",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = cli.add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens (default: detected)")
    add("--processes", type=int, metavar="N", help="how many there are (default: detected)")
    add("--process", type=int, metavar="I", help="which one this is, from 0 (default: detected)")
    add(
        "--timeout",
        type=int,
        default=120,
        metavar="SECONDS",
        help="longest wait for the other processes (default: %(default)s)",
    )
    add(
        "--mesh",
        metavar="AXIS=N,…",
        help="devices along each of data, fsdp, tensor, such as data=4,tensor=2 (default: all of "
        "them along data)",
    )
    add(
        "--methods",
        "--method",
        nargs="+",
        choices=tuple(RECIPES),
        default=["kfac"],
        metavar="NAME",
        help=f"one after the other, any of {', '.join(RECIPES)} (default: kfac)",
    )
    add("--learning-rate", type=float, help="the peak (default: the middle of a method's grid)")
    add("--steps", type=int, default=400, help="default: %(default)s")
    add("--batch", type=int, default=256, help="examples in all processes (default: %(default)s)")
    add("--seed", type=int, default=0, help="of model, batches and method (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("results/distributed.jsonl"),
        help="a line for each step, written by process 0 (default: %(default)s)",
    )
    add("--float64", action="store_true", help="curves then agree to rounding on any mesh")
    add("--smoke", action="store_true", help="on a part of the data")
    return cli


def connect(
    coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> None:
    """Finds the other processes, if there are any. **Raises** `Unusable` if that fails."""
    found = _launched()
    if coordinator is None and processes is None and process is None:
        if found is None or found[0] == 1:
            return
    elif coordinator is None:
        raise Unusable("--processes, --process: they need --coordinator host:port too.")
    elif processes is None or process is None:
        if found is None:
            raise Unusable(
                "--coordinator: no launcher says how many processes there are and which this is; "
                "pass --processes N --process I."
            )
        processes, process = (processes or found[0], found[1] if process is None else process)
    if processes is not None and process is not None and not 0 <= process < processes:
        raise Unusable(f"--process {process}: wanted 0 to {processes - 1}, of --processes.")
    if coordinator is not None:
        _check_port(coordinator, process)
    where = coordinator or "the address that the launcher gives"
    missing = (
        f"the processes did not meet within {timeout} seconds at {where}. Check that all of them "
        "were started (in a job of SLURM by srun) with the same --coordinator and --processes, "
        "that process 0 runs on that host, and that no firewall closes the port; with "
        "--coordinator host:port the place is yours to choose, with --timeout the patience."
    )
    # JAX aborts the process when its own time is up, with a stack trace for a message.
    watch = threading.Timer(timeout, _give_up, (missing,))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=timeout + 60
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Unusable(
            f"could not start at {where}: {reason}. Where nothing was detected, pass "
            "--coordinator host:port."
        ) from error
    finally:
        watch.cancel()


def _check_port(coordinator: str, process: int | None) -> None:
    """Whether the first process can listen there: JAX itself would crash."""
    port = coordinator.rpartition(":")[2]
    if not port.isdecimal():
        raise Unusable(f"--coordinator {coordinator}: wanted host:port, such as localhost:12345.")
    if process != 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise Unusable(
                f"--coordinator {coordinator}: process 0 cannot listen at port {port} "
                f"({error.strerror}); take another one."
            ) from error


def _give_up(why: str) -> None:
    print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(2)


def _launched() -> tuple[int, int] | None:
    """The number of processes, and that of this one, as a launcher says."""
    for size, rank in _LAUNCHERS:
        if size in os.environ and rank in os.environ:
            return int(os.environ[size]), int(os.environ[rank])
    return None


def make_mesh(text: str | None) -> Mesh:
    """The mesh that a flag describes, over all devices. **Raises** `Unusable` if it cannot be."""
    devices = jax.device_count()
    sizes: dict[str, int] = {}
    for part in (text or f"data={devices}").split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise Unusable(
                f"--mesh {text}: got {part.strip()!r}, wanted each of {', '.join(AXES)} at most "
                "once, with a number of devices, such as data=4,tensor=2."
            )
        sizes[name] = int(size)
    if math.prod(sizes.values()) != devices:
        raise Unusable(
            f"--mesh {text}: it has {math.prod(sizes.values())} places, and there are {devices} "
            f"devices ({jax.local_device_count()} of them in this one of {jax.process_count()} "
            "processes). Make the numbers equal; on a CPU, XLA_FLAGS="
            "--xla_force_host_platform_device_count=K gives each process K devices."
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """That of a batch of so many examples. **Raises** `Unusable` where it does not divide."""
    axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if batch % parts:
        raise Unusable(
            f"--batch {batch}: it is split over {parts} devices, and {parts} does not divide it; "
            f"take {max(batch // parts, 1) * parts}."
        )
    return NamedSharding(mesh, PartitionSpec(axes))


def parameter_shardings(mesh: Mesh, params: PyTree[Any]) -> PyTree[NamedSharding]:
    """Of a weight of shape (outputs, inputs), or a bias: outputs over tensor, inputs over fsdp,
    each where its size divides; the whole everywhere else.
    """

    def one(leaf: Any) -> NamedSharding:
        wanted = ("tensor", *("fsdp",) * (leaf.ndim - 1))[: leaf.ndim]
        fit = zip(wanted, leaf.shape, strict=True)
        spec = (axis if size % mesh.shape.get(axis, size + 1) == 0 else None for axis, size in fit)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, params)


def own_rows(sharding: NamedSharding, batch: int) -> slice:
    """The examples of each batch that this process reads: those of its devices."""
    held = sharding.addressable_devices_indices_map((batch,)).values()
    bounds = [index[0].indices(batch) for index in held if index is not None]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def losses(args: argparse.Namespace, method: str, task: Task, mesh: Mesh) -> Iterator[float]:
    """The loss of each step's batch before the step, the same in all processes."""
    spread = batch_sharding(mesh, args.batch)
    recipe = RECIPES[method]
    trainer = recipe.build(Setting(task.objective, axes=task.axes))
    rate = args.learning_rate or recipe.learning_rates[len(recipe.learning_rates) // 2]
    key = jax.random.key(args.seed)

    def init(key: PRNGKeyArray) -> PyTree[Any]:
        model = task.init(key)
        return jax.tree.map(_double, model) if args.float64 else model

    # Made where it is to be: no process holds the whole of what is split.
    shapes = jax.eval_shape(init, key)
    weights = parameter_shardings(mesh, shapes)
    model = jax.jit(init, out_shardings=weights)(key)
    start = lambda model: trainer.init(model, rate, args.steps)
    places = cx.state_sharding(types.SimpleNamespace(init=start), model, mesh)
    state = jax.jit(start, out_shardings=places)(model)

    rows = own_rows(spread, args.batch)
    drawn = batches(task.train, args.batch, seed=args.seed, steps=args.steps, rows=rows)
    for step, part in enumerate(drawn):
        batch = tuple(
            jax.make_array_from_process_local_data(spread, array, (args.batch, *array.shape[1:]))
            for array in part
        )
        model, state, told = trainer(model, state, batch, jax.random.fold_in(key, step))
        yield float(told.value)


def _double(array: Any) -> Any:
    return array.astype(np.float64) if array.dtype == np.float32 else array


def prepare(args: argparse.Namespace) -> tuple[Task, Mesh]:
    """The data and the mesh that flags ask for. **Raises** `Unusable` if they do not fit."""
    dataset = load("fashion-mnist")
    if args.smoke:
        dataset = a_part(dataset)
    if args.float64:
        jax.config.update("jax_enable_x64", True)
        dataset = dataclasses.replace(dataset, train=tuple(map(_double, dataset.train)))
    task, mesh = Task(dataset, "mlp"), make_mesh(args.mesh)
    size = len(task.train[0])
    if not 1 <= args.batch <= size:
        raise Unusable(f"--batch {args.batch}: wanted 1 to {size}, the examples there are.")
    batch_sharding(mesh, args.batch)
    for method in args.methods:
        unfit = RECIPES[method].unfit(task.size(args.batch))
        if unfit is not None:
            raise Unusable(f"--method {method}: {unfit}.")
    return task, mesh


def train(args: argparse.Namespace, console: Console, first: bool) -> None:
    """The runs. The first process shows how far they are, and writes."""
    task, mesh = prepare(args)
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    console.print(
        f"{jax.process_count()} processes, {jax.device_count()} × {jax.devices()[0].device_kind}: "
        f"{shape}",
        highlight=False,
    )
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, _lines(args.out, first) as file:
        for method in args.methods:
            bar = progress.add_task(f"{method}: compiling", total=args.steps)
            for step, loss in enumerate(losses(args, method, task, mesh)):
                file.write(json.dumps({"method": method, "step": step, "loss": loss}) + "\n")
                file.flush()
                progress.update(bar, advance=1, description=f"{method}: loss {loss:.4g}")
    console.print(f"written: {args.out}", highlight=False, soft_wrap=True)


def _lines(path: Path, first: bool) -> TextIO:
    """The file to write, or for all processes but the first nowhere."""
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
    return (path if first else Path(os.devnull)).open("w", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and give the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    args = parser().parse_args(argv)
    try:
        connect(args.coordinator, args.processes, args.process, args.timeout)
        first = jax.process_index() == 0
        train(args, Console(quiet=not first), first)
    except (Unusable, DataUnavailable, DataCorrupted, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
