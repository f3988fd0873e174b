"""Steps on meshes of many devices that are not there: compiled for them, and counted.

    python -m experiments.scaling --model gpt2-124m --devices 8 64 512 --mesh data fsdp fsdp×tensor

Each case is compiled in a process of its own, where one CPU stands for so many devices. Nothing is
run, and no array is allocated. What is compiled already, as `--out` has it, is not compiled again.
A compiler for the CPU says what is computed, kept and sent. Its bytes of temporaries, and its sums
of bfloat16 as float32, are its own. `docs/scaling.md` is made of the results.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax.placement import KEEP
from curvax.plan import Phase, Traffic
from curvax.plan.phases import phases
from experiments.large_models import Model, gpt2
from experiments.tables import Row, as_text
from experiments.timing import provenance

LEARNING_RATE = 1e-3
# Layers, width, heads; and sequences for each device (for all devices of "tensor" together, as
# many for each of them).
MODELS = {"gpt2-124m": ((12, 768, 12), 8), "gpt2-1.3b": ((24, 2048, 16), 4)}
LENGTH = 1024
TENSOR = 4
MESHES = ("data", "fsdp", "fsdp×tensor")
OPTIMIZERS = ("adam", "kfac")
# LLVM makes machine code that nobody runs. It takes most of the time.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"

# Which axis of a weight is cut by "fsdp", and which by "tensor", counted from the end: a product
# that makes a wider activation is cut by its outputs, the one that takes it by its inputs.
CUTS = {
    "qkv": (-2, -1),
    "project": (-1, -2),
    "up": (-2, -1),
    "down": (-1, -2),
    "tokens": (-1, -2),
    "positions": (-1, None),
}


def mesh_of(name: str, devices: int, width: int) -> Mesh:
    """A mesh of all the devices; "tensor" is the axis of neighbours.

    Where the width of a model cannot be divided by so many, several times 64 devices share it.
    """
    axes = {name: devices}
    if name == "fsdp" and width % devices:
        axes = {"data": devices // 64, "fsdp": 64}
    elif name == "fsdp×tensor":
        axes = {"fsdp": devices // TENSOR, "tensor": TENSOR}
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def where(path: Any, leaf: Any, mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    """A parameter cut over some axes of a mesh, where its own can be divided."""
    names = [entry.key for entry in path]
    spec: list[str | None] = [None] * leaf.ndim
    cuts = next((CUTS[name] for name in names if name in CUTS), (None, None))
    for axis, cut in zip(("fsdp", "tensor"), cuts, strict=True):
        # A bias goes with the outputs of its weight.
        cut = None if names[-1] == "b" and cut != -1 else cut
        if axis in mesh.shape and axis in axes and cut and leaf.shape[cut] % mesh.shape[axis] == 0:
            spec[cut] = axis
    return NamedSharding(mesh, P(*spec))


def gathered(mesh: Mesh, params: Any) -> Any:
    """Parameters as they are used: whole, but for "tensor".

    Without a word the compiler would cut activations as it finds the weights cut, not by examples.
    """
    arrange = lambda path, leaf: jax.lax.with_sharding_constraint(
        leaf, where(path, leaf, mesh, ("tensor",))
    )
    return jax.tree_util.tree_map_with_path(arrange, params)


def params_on(model: Model, mesh: Mesh) -> Any:
    """Shapes of the parameters, as they are kept."""

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        kept = where(path, leaf, mesh, ("fsdp", "tensor"))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=kept)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(place, shapes)


def batch_on(model: Model, size: int, mesh: Mesh) -> Any:
    """Cut by examples, over all axes but "tensor"."""
    where = NamedSharding(mesh, P(tuple(name for name in mesh.axis_names if name != "tensor")))
    shapes = jax.eval_shape(lambda key: model.batch(size, key), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)


def compiled_adam(objective: cx.Objective, params: Any, batch: Any, mesh: Mesh) -> Phase:
    """A step of Adam, in the shape of a phase of a plan."""
    optimizer = optax.adam(LEARNING_RATE)

    def step(params: Any, state: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(objective.value)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    whole = NamedSharding(mesh, P())
    (inner, *rest) = jax.eval_shape(optimizer.init, params)
    count = jax.ShapeDtypeStruct((), inner.count.dtype, sharding=whole)
    state = (inner._replace(count=count, mu=params, nu=params), *rest)
    where = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*where, whole))
    made = step.lower(params, state, batch).compile()
    memory = made.memory_analysis()
    assert memory is not None
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Phase("every step", 0, 1, cx.traffic(made), *sizes)


def compiled_kfac(
    objective: cx.Objective, params: Any, batch: Any, mesh: Mesh, rank: float, keep: str
) -> list[Phase]:
    """The kinds of steps of low-rank K-FAC, as in `experiments.bench_kfac`."""
    method = cx.methods.kfac(objective, rank=rank, refresh_every=10, fisher="empirical")
    optimizer = optax.chain(method, optax.trace(0.9), optax.scale_by_learning_rate(LEARNING_RATE))
    step = cx.make_step(optimizer, method)
    where = cx.state_sharding(optimizer, params, mesh, keep=keep)
    return phases(step, params, batch, jax.random.key(0), mesh, where)


def case(
    model_name: str, mesh_name: str, devices: int, optimizer: str, rank: float, keep: str
) -> list[Row]:
    """A row for each kind of step."""
    shape, per_device = MODELS[model_name]
    mesh = mesh_of(mesh_name, devices, shape[1])
    model = gpt2(*shape, length=LENGTH, arrange=functools.partial(gathered, mesh))
    params, batch = params_on(model, mesh), batch_on(model, per_device * devices, mesh)
    objective = cx.Objective(model.predict, cx.SoftmaxCrossEntropy(), example=batch)
    start = time.perf_counter()
    if optimizer == "adam":
        found = [compiled_adam(objective, params, batch, mesh)]
    else:
        found = compiled_kfac(objective, params, batch, mesh, rank, keep)
    seconds = time.perf_counter() - start
    own = bytes_on_one(params)
    return [
        {
            "model": model_name,
            "mesh": mesh_name,
            "devices": devices,
            "axes": dict(mesh.shape),
            "optimizer": optimizer,
            "rank": rank,
            "keep": keep,
            "step": phase.label,
            "steps of a cycle": phase.steps,
            "sequences per device": per_device,
            "parameter bytes": own,
            "state bytes": phase.arguments - own - bytes_on_one(batch),
            "temporary bytes": phase.temporary,
            "GFLOP": phase.traffic.flops / 1e9,
            "GFLOP at highest precision": phase.traffic.precise / 1e9,
            "sent bytes": phase.traffic.wire(),
            "sent bytes among few": sent_in_groups_of(TENSOR, phase.traffic),
            "operations": phase.traffic.counts(),
            "result bytes": phase.traffic.nbytes(),
            "loops counted": phase.traffic.counted,
            "compile seconds": round(seconds / len(found), 1),
        }
        for phase in found
    ]


def bytes_on_one(tree: Any) -> int:
    """Of the leaves, what one device holds."""
    shares = [(leaf.sharding.shard_shape(leaf.shape), leaf) for leaf in jax.tree.leaves(tree)]
    sizes = [jax.ShapeDtypeStruct(shape, leaf.dtype) for shape, leaf in shares]
    return sum(each.size * each.dtype.itemsize for each in sizes)


def sent_in_groups_of(most: int, found: Traffic) -> float:
    """Bytes sent by operations of so few devices: they are neighbours."""
    return sum(each.times * each.wire for each in found.collectives if each.group <= most)


def in_process(cell: Row, seconds: float) -> list[Row]:
    """The rows of a case, or one that says why there are none."""
    model, mesh, devices, optimizer, rank, keep = cell.values()
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    flags += f" --xla_force_host_platform_device_count={devices}"
    one = ["--model", model, "--mesh", mesh, "--devices", str(devices)]
    one += ["--rank", str(rank), "--keep", keep, "--one", optimizer]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "experiments.scaling", *one],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return [cell | {"error": f"not compiled in {seconds:.0f} s"}]
    if done.returncode:
        return [cell | {"error": f"ended with status {done.returncode}"}]
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Compiles what is asked for, prints a table, and writes JSON after each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["gpt2-124m"])
    parser.add_argument("--devices", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--mesh", nargs="+", choices=MESHES, default=list(MESHES))
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--rank", type=float, default=0.15, help="of K-FAC (default: 0.15)")
    parser.add_argument("--keep", choices=KEEP, default="all", help="of cx.state_sharding")
    parser.add_argument("--seconds", type=float, default=900, help="per case (default: 900)")
    parser.add_argument("--out", type=Path, default=Path("results/scaling_cpu.json"))
    parser.add_argument("--one", choices=OPTIMIZERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        rows = case(args.model[0], args.mesh[0], args.devices[0], args.one, args.rank, args.keep)
        print(json.dumps(rows))
        return 0
    path: Path = args.out
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if "error" not in row]
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("model", "devices", "mesh", "optimizer")
    for values in itertools.product(*(getattr(args, name) for name in names)):
        case_of = dict(zip(names, values, strict=True))
        cell = {name: case_of[name] for name in ("model", "mesh", "devices", "optimizer")}
        kfac = cell["optimizer"] == "kfac"
        cell |= {"rank": args.rank if kfac else 0.0, "keep": args.keep if kfac else "all"}
        if any(cell.items() <= row.items() for row in rows):
            continue
        found = in_process(cell, args.seconds)
        rows += found
        print(as_text(found), flush=True)
        path.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
