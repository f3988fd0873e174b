"""Results as tables: printed, and written as JSON with where they come from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def as_text(rows: list[Row]) -> str:
    """Rows of equal keys as a table in Markdown."""
    if not rows:
        return "(no rows)"
    header = list(rows[0])
    cells = [header, *[[_cell(row.get(name)) for name in header] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write_results(
    sections: dict[str, Callable[[], list[Row]]],
    path: Path,
    provenance: Row,
    echo: Callable[[str], None],
) -> None:
    """Makes, shows and writes one section after the other: a run cut short is not lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, list[Row]] = {}
    for name, make in sections.items():
        echo(f"\n{name} …")
        done[name] = make()
        echo(as_text(done[name]))
        path.write_text(json.dumps({"provenance": provenance, "sections": done}, indent=1) + "\n")
    echo(f"\nwritten to {path}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.3e}"
    return str(value)
