"""Steps of low-rank K-FAC and of Adam on one device and on several, with the batch shared by them.

    python -m experiments.bench_sharded --sections gpt2 resnet50 --attention cudnn

Each model runs on one device, on all of them with as many examples on each (weak scaling), and on
all of them with as many examples in all. How a step is timed: `experiments/cycles.py`. The
"efficiency" is that of K-FAC's steps as a share of that of Adam's; "refresh ms" is what the slowest
step takes more than the laziest.
"""

import argparse
import functools
import gc
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import curvax as cx
from experiments.bench_kfac import LOW_RANK, Kfac
from experiments.cycles import Adam, Training, measure
from experiments.large_models import Model, gpt2, resnet50
from experiments.tables import Row, write_results
from experiments.timing import provenance

SECTIONS = ("gpt2", "resnet50")


def place(training: Training, mesh: Mesh, init: Any) -> None:
    """The parameters on all devices, the batch shared by them, and the state where it belongs."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec("data"))
    training.params = jax.device_put(training.params, everywhere)
    where = cx.state_sharding(init, training.params, mesh)
    training.state = jax.device_put(training.state, where)
    batch, *rest = training.rest
    training.rest = (jax.device_put(batch, spread), *(jax.device_put(x, everywhere) for x in rest))


class _Adam(Adam):
    """On a mesh from its first step."""

    def __init__(self, model: Model, batch: Any, mesh: Mesh):
        self._mesh: Mesh | None = mesh
        super().__init__(model, batch)

    def __call__(self) -> float:
        if self._mesh is not None:
            place(self, self._mesh, self.optimizer)
            self._mesh = None
        return super().__call__()


def row_of(model: Model, size: int, devices: int, args: argparse.Namespace) -> Row:
    """Times of one model, with a batch of `size` in all."""
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    batch = model.batch(size, jax.random.key(1))
    with jax.set_mesh(mesh):
        adam = _Adam(model, batch, mesh)
        kfac = Kfac(model, batch, LOW_RANK)
        place(kfac, mesh, kfac.fused)
        found = measure([kfac], adam, args.seconds, args.least)[0]
    refresh = (float(found["slowest step"]) - float(found["lazy step"])) * float(found["Adam ms"])
    kept = ("ms", "Adam ms", "in Adam steps", "lazy step", "slowest step", "spread", "skipped")
    row: Row = {"model": model.name, "devices": devices, "batch": size}
    return row | {name: found[name] for name in kept} | {"refresh ms": refresh}


def section(name: str, args: argparse.Namespace) -> list[Row]:
    """One device, and all of them in both ways."""
    if name == "gpt2":
        shape = (2, 32, 2, 64, 16) if args.smoke else ()
        model, size = gpt2(*shape, remat=True, attention=args.attention), 32
    else:
        tiny = functools.partial(resnet50, 32, 10, stages=(1, 1), widths=(8, 16))
        model, size = (tiny() if args.smoke else resnet50()), 256
    size, every = (8 if args.smoke else size), jax.device_count()
    rows: list[Row] = []
    for devices, batch in ((1, size), (every, size * every), (every, size)):
        row = row_of(model, batch, devices, args)
        if rows:
            first = rows[0]
            ratio = lambda key, a=first, b=row: float(a[key]) / float(b[key])
            row["efficiency"] = ratio("ms") / ratio("Adam ms")
            row["refresh, one / these"] = ratio("refresh ms")
        else:
            row |= {"efficiency": 1.0, "refresh, one / these": 1.0}
        rows.append(row)
        print(row, flush=True)
        gc.collect()
    return rows


def main(argv: list[str] | None = None) -> int:
    """Runs the sections asked for, prints tables, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--smoke", action="store_true", help="tiny models, few rounds")
    parser.add_argument("--seconds", type=float, default=10.0, help="per row (default: 10)")
    parser.add_argument("--least", type=int, default=3, help="rounds at least (default: 3)")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--out", type=Path, default=Path("results/bench_sharded.json"))
    args = parser.parse_args(argv)
    if args.smoke:
        args.seconds, args.least = 0.0, 2
    if jax.device_count() == 1:
        print("error: one device only; there is nothing to compare.", file=sys.stderr)
        return 2
    makers = {name: functools.partial(section, name, args) for name in args.sections}
    write_results(makers, args.out, provenance(), echo=print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
