"""``top``: the host's ps(1), and of what it prints the container's processes. All but the running of it is pure.

What Docker does (moby, daemon/top_unix.go): ps is asked for the container's processes with ``-q``, or, where that doesn't go with the
other options, for whatever they say; its PID column then tells which lines are the container's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import trio

from pyx_bus.errors import FailedPrecondition, InvalidArgument, Unavailable

DEFAULT_ARGS = ("-ef",)
TIMEOUT_S = 10.0
_RENAMED_PID = re.compile(r"(\S*)=\s*(PID\S*)")


@dataclass(frozen=True, slots=True)
class Table:
    titles: list[str]
    rows: list[list[str]]


def check(args: Sequence[str]) -> None:
    """Nothing may stand under PID but PIDs: they decide what is shown. Errors: invalid_argument."""
    for argument in args:
        if "\0" in argument:
            raise InvalidArgument("an option of ps can't have a null byte")
        for what, title in _RENAMED_PID.findall(argument):
            if what.rpartition(",")[2] != "pid":
                raise InvalidArgument(f'a column of ps other than the PID can\'t be called "{title}"')


def parse(output: str, pids: Collection[int]) -> Table:
    """The lines of ``pids``, each with as many fields as there are titles: the last one has the rest of the line.

    Errors: invalid_argument (the options leave no PID column).
    """
    lines = output.splitlines()
    titles = lines[0].split() if lines else []
    if "PID" not in titles:
        raise InvalidArgument("couldn't find the PID column in ps's output", hint='give options that show it, such as "-o pid,comm"')
    at = titles.index("PID")
    rows = []
    shown = False
    for line in lines[1:]:
        fields = line.split(None, len(titles) - 1)
        if at >= len(fields):
            continue
        if fields[at] == "-":  # with -m: a thread of the process above
            mine = shown
        elif fields[at].isdigit():
            mine = shown = int(fields[at]) in pids
        else:
            raise InvalidArgument(f'unexpected PID in ps\'s output: "{fields[at]}"')
        if mine:
            rows.append([*fields, *[""] * (len(titles) - len(fields))])
    return Table(titles, [[field.rstrip() for field in row] for row in rows])


async def table(args: Sequence[str], pids: Sequence[int]) -> Table:
    """Run ps. Errors: invalid_argument (its complaint), failed_precondition (there's no ps), unavailable (it takes too long)."""
    args = list(args) or list(DEFAULT_ARGS)
    check(args)
    wanted = ",".join(map(str, pids))
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8", "COLUMNS": "100000"}
    with trio.move_on_after(TIMEOUT_S):
        for argv in (["ps", *args, "-q", wanted], ["ps", *args]):
            try:
                done = await trio.run_process(
                    argv, check=False, capture_stdout=True, capture_stderr=True, stdin=b"", env=environment
                )
            except FileNotFoundError:
                raise FailedPrecondition("there's no ps on this host", hint="install procps") from None
            if done.returncode == 0:
                return parse(done.stdout.decode(errors="replace"), set(pids))
        complaint = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise InvalidArgument(complaint or f"ps ended with status {done.returncode}")
    raise Unavailable(f"ps didn't answer within {TIMEOUT_S:g} s")
