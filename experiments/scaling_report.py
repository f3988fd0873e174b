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

# A model, a mesh, how many devices, the rank of the factors, and who keeps them.
Case = tuple[str, str, int, float, str]

RESULTS = Path(__file__).parent / "results" / "scaling_cpu.json"
# Of one H200. The first two were measured there on GPT-2 124M (bench_kfac_h200.json: 8.24 TFLOP of
# an Adam step in 22.5 ms, and 0.205 more of a step without refresh in 3.7); the links are NVLink in
# a node of 8 and one InfiniBand adapter for each device beyond it.
FLOPS, PRECISE_FLOPS = 370e12, 56e12
NODE, NEAR, FAR = 8, 450e9, 50e9
RANK = 0.15
BOTH, KFAC = ("adam", "lazy"), ("lazy", "refresh")
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


def cases(rows: Sequence[Row]) -> dict[Case, dict[str, Row]]:
    """The rows of Adam, of a step without refresh and of a refresh, of what was compiled whole."""
    good = [row for row in rows if "error" not in row]
    place = lambda row: (row["model"], row["mesh"], row["devices"])
    adam = {place(row): row for row in good if row["optimizer"] == "adam"}
    found: dict[Case, dict[str, Row]] = {}
    for row in good:
        if row["optimizer"] == "kfac" and place(row) in adam:
            parts = found.setdefault(
                (*place(row), row["rank"], row["keep"]), {"adam": adam[place(row)]}
            )
            parts["lazy" if row["step"] == "nothing due" else "refresh"] = row
    models, meshes = list(dict.fromkeys(row["model"] for row in rows)), list(MESHES)
    order = lambda key: (models.index(key[0]), meshes.index(key[1]), *key[2:])
    return {key: found[key] for key in sorted(found, key=order) if len(found[key]) == 3}


def in_adam_steps(parts: dict[str, Row]) -> float:
    """A mean step of a cycle."""
    time = {name: arithmetic(row) + links(row) for name, row in parts.items()}
    lazy, refresh = (parts[name]["steps of a cycle"] for name in ("lazy", "refresh"))
    mean = (lazy * time["lazy"] + refresh * time["refresh"]) / (lazy + refresh)
    return mean / time["adam"]


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row for each case."""
    table: list[Row] = []
    for (model, mesh, devices, rank, keep), parts in cases(rows).items():
        of = lambda text, parts=parts, names=tuple(parts): " / ".join(
            text(parts[name]) for name in names
        )
        precise = lambda row: f"{row['GFLOP at highest precision'] / 1e3:.2f}"
        times = lambda row: f"{arithmetic(row):.0f} + {links(row):.0f}"
        sent = lambda row: f"{row['sent bytes'] / 1e9:.2f}" + "*" * (not row["loops counted"])
        table.append(
            {
                "model": model,
                "mesh": mesh,
                "devices": devices,
                "rank": f"{rank}",
                "keep": keep,
                "parameters MB": f"{parts['adam']['parameter bytes'] / 1e6:.0f}",
                "state MB": of(lambda row: f"{row['state bytes'] / 1e6:.0f}", names=BOTH),
                "TFLOP": of(lambda row: f"{row['GFLOP'] / 1e3:.2f}"),
                "float32 TFLOP": of(precise, names=KFAC),
                "sent GB": of(sent),
                "arithmetic + links, ms": of(times),
                "mean step": f"{in_adam_steps(parts):.2f}",
            }
        )
    return table


def plot(rows: Sequence[Row], path: Path) -> None:
    """For each model the mean step in Adam steps, and the state on a device."""
    import matplotlib.pyplot as plt

    found = cases(rows)
    models = list(dict.fromkeys(key[0] for key in found))
    figure, axes = plt.subplots(2, len(models), figsize=(4.6 * len(models), 6.4), squeeze=False)
    for column, model in enumerate(models):
        above, below = axes[:, column]
        for mesh, colour in MESHES.items():
            mine = {
                key[2]: parts
                for key, parts in found.items()
                if key[:2] == (model, mesh) and key[3:] == (RANK, "all")
            }
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
            counts = sorted({key[2] for key in found if key[0] == model})
            each.set_xticks(counts, [str(count) for count in counts])
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
