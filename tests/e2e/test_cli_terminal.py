"""``-it`` at a real terminal: job control, resizing, ctrl-c, detaching, and the terminal restored however it ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

Start = Callable[..., Any]
pytestmark = pytest.mark.root


def _shell(terminal: Start, *flags: str, **options: Any) -> Any:
    session = terminal("run", "--rm", "-it", *flags, "busybox", "sh", **options)
    session.expect("# ")
    return session


def test_a_shell_has_a_terminal_with_job_control(terminal: Start) -> None:
    session = _shell(terminal)
    session.send("tty; sleep 100 & jobs; kill %1; echo code=$?\r")
    session.expect("/dev/")
    session.expect("sleep 100")
    session.expect("code=0")
    session.send("exit 42\r")
    assert session.wait() == 42


def test_ctrl_c_goes_to_the_foreground_job_inside_and_ctrl_z_stops_it(terminal: Start) -> None:
    session = _shell(terminal)
    job = "sh -c 'echo go; exec sleep 1000'\r"  # what it prints comes from the job, which has the terminal by then
    session.send(job)
    session.expect("go\r\n")
    session.send("\x03")
    session.expect("# ")
    session.send("echo status=$?\r")
    session.expect("status=130")
    # One that says when it goes on: the shell has given it the terminal before.
    session.send("sh -c 'trap \"echo back\" CONT; echo go; while :; do sleep 0.05; done'\r")
    session.expect("go\r\n")
    session.send("\x1a")
    session.expect("Stopped")
    session.expect("# ")
    session.send("fg\r")
    session.expect("back\r\n")
    session.send("\x03")
    session.expect("# ")
    session.send("exit 3\r")
    assert session.wait() == 3


def test_the_window_size_is_the_terminal_s_and_follows_it(terminal: Start) -> None:
    session = _shell(terminal, rows=30, columns=100)
    session.send("stty size\r")
    session.expect("30 100")
    session.send("exit\r")
    assert session.wait() == 0
    script = "trap 'echo now $(stty size)' WINCH; echo ready; while :; do sleep 0.05; done"
    session = terminal("run", "--rm", "-it", "busybox", "sh", "-c", script)
    session.expect("ready")
    session.resize(40, 132)
    session.expect("now 40 132")
    session.send("\x03")
    assert session.wait() == 130


def test_detaching_leaves_it_running_and_attach_comes_back(stack: Any, terminal: Start) -> None:
    session = terminal("run", "--name", "detached", "-it", "busybox", "sh")
    session.expect("# ")
    session.send("x=kept\r")
    session.expect("# ")
    session.send("\x10\x11")
    assert session.wait() == 0
    assert "read escape sequence" in session.text
    assert session.flags() == (True, True)
    assert stack.state("detached") == "running"
    again = terminal("attach", "--detach-keys", "ctrl-a,d", "detached")
    again.send("\recho $x\r")
    again.expect("kept\r\n")
    again.send("\x01d")
    assert again.wait() == 0
    assert stack.state("detached") == "running"
    shell = terminal("exec", "-it", "detached", "sh")
    shell.expect("# ")
    shell.send("\x10\x11")
    assert shell.wait() == 0
    told = stack.pyx("events", "--since", "1m", "--until", "0s", "-f", "container=detached", "--format", "{{.Action}}").stdout.split("\n")
    expected = ["create", "attach", "start", "resize", "detach", "attach", "resize", "detach"]
    assert told == [*expected, "exec_create: sh", "exec_start: sh", "exec_detach", ""]
    stack.pyx("rm", "-f", "detached", check=True)


def test_the_terminal_is_restored(terminal: Start) -> None:
    """After an exit, an engine's error, and a signal that ends the command itself."""
    session = _shell(terminal)
    assert session.flags() == (False, False)
    session.send("exit\r")
    session.wait()
    assert session.flags() == (True, True)
    failing = terminal("run", "--rm", "-it", "busybox", "/nope")
    assert failing.wait() == 127
    assert failing.flags() == (True, True)
    ended = _shell(terminal, "--name", "orphan")
    os.kill(ended.pid, signal.SIGTERM)
    assert ended.wait() == 143
    assert ended.flags() == (True, True)


def test_the_orphan_of_a_killed_command_lives_on(stack: Any) -> None:
    """It belongs to the previous test: what ended there was the command alone."""
    assert stack.state("orphan") == "running"
    stack.pyx("rm", "-f", "orphan", check=True)


def test_exec_with_a_terminal(stack: Any, terminal: Start) -> None:
    stack.pyx("run", "-d", "--name", "host", "busybox", "sleep", "1000", check=True)
    session = terminal("exec", "-it", "host", "sh", rows=20, columns=70)
    session.expect("# ")
    session.send("stty size; tty\r")
    session.expect("20 70")
    session.expect("/dev/pts/")
    session.resize(21, 71)
    os.kill(session.pid, signal.SIGWINCH)
    session.send("\rstty size\r")
    session.expect("21 71")
    session.send("exit 9\r")
    assert session.wait() == 9
    assert session.flags() == (True, True)
    stack.pyx("rm", "-f", "host", check=True)


def test_output_on_a_terminal_is_complete(terminal: Start) -> None:
    session = terminal("run", "--rm", "-t", "busybox", "seq", "1", "20000")
    assert session.wait(30) == 0
    assert session.text.split() == [str(number) for number in range(1, 20001)]


def test_ctrl_c_without_a_terminal_inside_is_passed_on_as_a_signal(terminal: Start) -> None:
    session = terminal(
        "run", "--rm", "busybox", "sh", "-c", "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done"
    )
    session.expect("ready")
    session.send("\x03")
    session.expect("caught")
    assert session.wait() == 5


def test_a_terminal_is_asked_for_where_there_is_none(stack: Any) -> None:
    done = stack.pyx("run", "--rm", "-it", "busybox", "true", input="")
    assert (done.returncode, done.stderr) == (1, "pyx: the input device is not a TTY\n")
