"""top: what goes on in a running container."""

from __future__ import annotations

import sys

from ..client import connect, texts
from ..grammar import Options

_CELL, _PADDING = 20, 3  # Docker's tabwriter: a column is at least so wide, and so much wider than what's in it


def lines(rows: list[list[str]]) -> list[str]:
    """Docker's columns. The last one isn't padded."""
    widths = [max(_CELL, *(len(row[at]) + _PADDING for row in rows)) for at in range(len(rows[0]) - 1)]
    return ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + row[-1] for row in rows]


def top(options: Options) -> int:
    container, *ps_args = options.args
    # Several options may be one word, as Docker joins and splits them.
    words = [word for argument in ps_args for word in argument.split()]
    found = connect(options).call("containerd.top", {"container": container, "ps_args": words})
    processes = found.get("processes")
    rows = [[str(field) for field in row] for row in processes] if isinstance(processes, list) else []
    sys.stdout.write("\n".join(lines([texts(found, "titles"), *rows])) + "\n")
    return 0
