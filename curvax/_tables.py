"""Text tables."""


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table, whose first row is its heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]
