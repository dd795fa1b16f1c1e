"""How a pull or load is shown: one live line a layer on a terminal, one line a change of status elsewhere."""

from __future__ import annotations

import os

from .client import number, text
from .terminal import is_terminal, window_size


class Progress:
    """``item`` takes a Progress item of imaged, or a RunProgress of phase pull."""

    def __init__(self, fd: int, quiet: bool = False) -> None:
        self._fd = fd
        self._quiet = quiet
        self._live = not quiet and is_terminal(fd)
        self._lines: list[str] = []  # the layers' IDs, in the order they came
        self._last: dict[str, str] = {}

    def item(self, body: dict[str, object]) -> None:
        if self._quiet:
            return
        name, status = text(body, "id"), text(body, "status")
        if not name:
            self._emit(f"{status}\n")
            self._lines.clear()
            return
        if not self._live:
            if self._last.get(name) != status:
                self._last[name] = status
                self._emit(f"{name}: {status}\n")
            return
        line = f"{name}: {status}"
        current, total = number(body, "current_bytes"), number(body, "total_bytes")
        columns = window_size(self._fd)[1] or 80
        if total and current < total:
            line = f"{line:<28} {_bar(current, total, columns - 56)} {_mega(current)}/{_mega(total)}"
        line = line[: columns - 1]
        if name in self._lines:
            up = len(self._lines) - self._lines.index(name)
            self._emit(f"\x1b[{up}A\r\x1b[2K{line}\x1b[{up}B\r")
        else:
            self._lines.append(name)
            self._emit(f"{line}\n")

    def _emit(self, line: str) -> None:
        data = line.encode()
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                import select

                select.select((), (self._fd,), ())


def _bar(current: int, total: int, width: int) -> str:
    if width < 5:
        return ""
    filled = current * width // total
    return "[" + "=" * filled + ">" + " " * (width - filled - 1 if filled < width else 0) + "]"


def _mega(size: int) -> str:
    return f"{size / 1e6:.1f}MB"
