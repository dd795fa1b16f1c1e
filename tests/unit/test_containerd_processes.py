"""What is made of ps's output."""

from __future__ import annotations

import pytest

from pyx_bus.errors import InvalidArgument
from pyx_containerd.processes import check, parse

OUTPUT = """\
UID          PID    PPID CMD
root           1       0 /sbin/init
root         100       1 sh -c  sleep   5
www          101     100 sleep 5
www         1001     100 [defunct]
"""


def test_only_the_container_s_lines_are_left() -> None:
    table = parse(OUTPUT, {100, 101})
    assert table.titles == ["UID", "PID", "PPID", "CMD"]
    assert table.rows == [["root", "100", "1", "sh -c  sleep   5"], ["www", "101", "100", "sleep 5"]]
    assert parse(OUTPUT, set()).rows == []


def test_threads_follow_their_process() -> None:
    output = "  PID   LWP COMMAND\n   10     - a\n    -    10 -\n   11     - b\n    -    11 -\n"
    assert parse(output, {11}).rows == [["11", "-", "b"], ["-", "11", "-"]]


@pytest.mark.parametrize("output", ["", "COMMAND\nsh\n", "PID CMD\nx y\n"])
def test_output_without_pids_is_refused(output: str) -> None:
    with pytest.raises(InvalidArgument, match="PID"):
        parse(output, {1})


@pytest.mark.parametrize("argument", ["-ouser=PID", "user=PID,pid", "-o pid=PID,ppid=PID"])
def test_no_other_column_may_pose_as_the_pid(argument: str) -> None:
    with pytest.raises(InvalidArgument, match="PID"):
        check([argument])
    check(["-o", "pid=PID,comm", "pid=PID"])
