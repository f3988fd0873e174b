"""Table and plot of what `experiments.scaling` compiled, with times predicted from stated rates.

python -m experiments.scaling_report --plot docs/img/scaling.png
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.tables import Row, as_text

RESULTS = Path(__file__).parent / "results" / "scaling_cpu.json"
# Of one H200. The first two were measured there on GPT-2 124M (bench_kfac_h200.json: 8.24 TFLOP of
# an Adam step in 22.5 ms, and 0.205 more of a step without refresh in 3.7); the links are NVLink in
# a node of 8 and one InfiniBand adapter for each device beyond it.
FLOPS, PRECISE_FLOPS = 370e12, 56e12
NODE, NEAR, FAR = 8, 450e9, 50e9
MESHES = {"data": "#0072B2", "fsdp": "#D55E00", "fsdp×tensor": "#009E73"}


def arithmetic(row: Row) -> float:
    """Milliseconds."""
    precise = row["GFLOP at highest precision"]
    return 1e12 * ((row["GFLOP"] - precise) / FLOPS + precise / PRECISE_FLOPS)


def links(row: Row) -> float:
    """Milliseconds."""
    # Groups of neighbours are inside a node; so are all in a mesh of one node.
    near = row["sent bytes"] if row["devices"] <= NODE else row["sent bytes among few"]
    return 1e3 * (near / NEAR + (row["sent bytes"] - near) / FAR)


def cases(rows: Sequence[Row]) -> dict[tuple[str, str, int], dict[str, Row]]:
    """The rows of Adam, of a step without refresh and of a refresh, of what was compiled whole."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if "error" not in row:
            name = row["optimizer"] if row["optimizer"] == "adam" else "lazy"
            name = "refresh" if name == "lazy" and row["step"] != "nothing due" else name
            key = (row["model"], row["mesh"], row["devices"])
            found.setdefault(key, {})[name] = row
    order = lambda key: (key[0], list(MESHES).index(key[1]), key[2])
    return {key: found[key] for key in sorted(found, key=order) if len(found[key]) == 3}


def in_adam_steps(parts: dict[str, Row]) -> float:
    """A mean step of a cycle."""
    time = {name: arithmetic(row) + links(row) for name, row in parts.items()}
    lazy, refresh = (parts[name]["steps of a cycle"] for name in ("lazy", "refresh"))
    mean = (lazy * time["lazy"] + refresh * time["refresh"]) / (lazy + refresh)
    return mean / time["adam"]


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row for each step of each case."""
    table: list[Row] = []
    for (model, mesh, devices), parts in cases(rows).items():
        for name in ("adam", "lazy", "refresh"):
            row = parts[name]
            table.append(
                {
                    "model": model,
                    "mesh": mesh,
                    "devices": devices,
                    "step": {"adam": "Adam", "lazy": "K-FAC, lazy"}.get(name, "K-FAC, refresh"),
                    "parameters MB": f"{row['parameter bytes'] / 1e6:.0f}",
                    "state MB": f"{row['state bytes'] / 1e6:.0f}",
                    "TFLOP": f"{row['GFLOP'] / 1e3:.2f}",
                    "of these float32": f"{row['GFLOP at highest precision'] / 1e3:.3f}",
                    "sent GB": f"{row['sent bytes'] / 1e9:.2f}"
                    + ("" if row["loops counted"] else " *"),
                    "arithmetic ms": f"{arithmetic(row):.1f}",
                    "links ms": f"{links(row):.1f}",
                    "mean step / Adam": f"{in_adam_steps(parts):.2f}" if name == "refresh" else "",
                }
            )
    return table


def plot(rows: Sequence[Row], path: Path) -> None:
    """For each model the mean step in Adam steps, and the state on a device."""
    import matplotlib.pyplot as plt

    found = cases(rows)
    models = sorted({model for model, _, _ in found})
    figure, axes = plt.subplots(2, len(models), figsize=(4.6 * len(models), 6.4), squeeze=False)
    for column, model in enumerate(models):
        above, below = axes[:, column]
        for mesh, colour in MESHES.items():
            mine = {key[2]: parts for key, parts in found.items() if key[:2] == (model, mesh)}
            state = lambda name, mine=mine: [x[name]["state bytes"] / 1e6 for x in mine.values()]
            style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4}
            above.plot(list(mine), [in_adam_steps(x) for x in mine.values()], label=mesh, **style)
            below.plot(list(mine), state("lazy"), label=f"K-FAC, {mesh}", **style)
            below.plot(list(mine), state("adam"), linestyle=":", label=f"Adam, {mesh}", **style)
        above.axhline(1, color="0.6", linewidth=0.8)
        above.set_title(model)
        above.set_ylabel("mean step of K-FAC in Adam steps")
        below.set_ylabel("state on a device, MB")
        below.set_yscale("log")
        for each in (above, below):
            each.set_xscale("log", base=2)
            each.set_xlabel("devices")
            each.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, and draws the plot if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    rows = json.loads(args.results.read_text())["rows"]
    print(as_text(summary(rows)))
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
