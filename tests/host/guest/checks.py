"""What is checked on the real host, in this order; runs there, with nothing but the standard library, as root.

Every ``check_*`` function is one test of ``test_host.py``. They share the machine, and each leaves it as it found it: the last ones see
that nothing is left. Deadlines are long: emulated, everything takes about ten times its time.
"""

from __future__ import annotations

import grp
import json
import os
import pty
import select
import shutil
import stat
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HOST = Path("/host")
HOME = Path("/opt/pyx")
UNITS = Path("/etc/systemd/system")
CGROUPS = Path("/sys/fs/cgroup")
SERVICES = ("busd", "imaged", "netd", "volumed", "logd", "containerd")
TIMEOUT_S = 90


def run(*argv: str, code: int = 0, timeout_s: float = TIMEOUT_S, input: str | None = None) -> str:
    """Run a command that must end with ``code``; its standard output."""
    given = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    done = subprocess.run(argv, text=True, capture_output=True, timeout=timeout_s, **given)  # type: ignore[call-overload]
    assert done.returncode == code, f"{' '.join(argv)}: exit code {done.returncode}, not {code}: {done.stdout}{done.stderr}"
    return str(done.stdout)


def pyx(*argv: str, code: int = 0, timeout_s: float = TIMEOUT_S, input: str | None = None) -> str:
    return run("pyx", *argv, code=code, timeout_s=timeout_s, input=input)


def complaint(*argv: str, code: int) -> str:
    """The standard error of ``pyx``, which must end with ``code``."""
    done = subprocess.run(["pyx", *argv], text=True, capture_output=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    assert done.returncode == code, f"pyx {' '.join(argv)}: exit code {done.returncode}, not {code}: {done.stdout}{done.stderr}"
    return done.stderr


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} didn't come true within {timeout_s} s"
        time.sleep(0.2)


def inspect(container: str, template: str) -> str:
    return pyx("inspect", "--format", template, container).strip()


def state(unit: str) -> str:
    return subprocess.run(["systemctl", "is-active", unit], text=True, capture_output=True).stdout.strip()


def serves(name: str) -> bool:
    """Whether a service is on the bus: the broker, too, is asked through it."""
    info = subprocess.run(["pyx", "system", "info"], text=True, capture_output=True, timeout=TIMEOUT_S).stdout
    return f" {name}: pid" in info if name != "busd" else "Services:" in info


def all_serve() -> bool:
    return all(state(f"pyx-{name}") == "active" and serves(name) for name in SERVICES)


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
        return str(answer.read().decode())


@contextmanager
def web(name: str = "web") -> Iterator[int]:
    """A container that serves a page of a volume on the host's port 8080; yields its init's pid."""
    script = "echo hi >/www/index.html; echo started; exec httpd -f -h /www"
    try:
        pyx("run", "-d", "--name", name, "-p", "8080:80", "-v", "data:/www", "busybox", "sh", "-c", script)
        yield int(inspect(name, "{{.State.Pid}}"))
    finally:  # also of a container that couldn't be started
        pyx("rm", "-f", name)
        pyx("volume", "rm", "data")


def _works(container: str = "web") -> None:
    """The container is as it was, and new ones can be made."""
    assert pyx("exec", container, "echo", "in").strip() == "in"
    assert fetch(8080).strip() == "hi"
    assert pyx("run", "--rm", "busybox", "echo", "new").strip() == "new"


# the stack ----------------------------------------------------------------------------------------------------------------


def check_units_start() -> None:
    for script in (HOME / "bin").glob("pyx*"):
        os.symlink(script, Path("/usr/bin") / script.name)
    for unit in (HOME / "systemd").iterdir():
        if unit.suffix in (".service", ".target"):
            shutil.copy(unit, UNITS)
    sysusers = Path("/usr/lib/sysusers.d/pyx.conf")
    shutil.copy(HOME / "systemd/pyx.sysusers", sysusers)
    run("systemd-sysusers")
    run("systemctl", "daemon-reload")
    said = subprocess.run(["systemd-analyze", "verify", str(UNITS / "pyx.target")], text=True, capture_output=True)
    assert "pyx" not in said.stderr, said.stderr
    run("systemctl", "start", "pyx.target")
    wait_for(all_serve, "every service active and on the bus")
    assert run("systemctl", "is-system-running").strip() == "running"


def check_the_host_is_described() -> None:
    info = pyx("system", "info")
    assert "Cgroup version: v2" in info, info
    assert "Default runtime: crun" in info, info
    assert "works on this host" in info, info


def check_image_import() -> None:
    pyx("image", "import", "/host/busybox.tar", "busybox:latest", timeout_s=180)
    assert "busybox" in pyx("images")


def check_networks() -> None:
    for network in ("none", "host", "bridge"):
        assert pyx("run", "--rm", "--network", network, "busybox", "echo", "hello", network).strip() == f"hello {network}"
    addresses = pyx("run", "--rm", "busybox", "ip", "-o", "addr")
    assert "eth0" in addresses, addresses


def check_runtimes_and_exit_codes() -> None:
    for runtime in ("crun", "runc"):
        chosen = ("run", "--rm", "--runtime", runtime, "busybox")
        assert pyx(*chosen, "echo", runtime).strip() == runtime
        pyx(*chosen, "sh", "-c", "exit 7", code=7)
        assert "/etc/passwd" in complaint(*chosen, "/etc/passwd", code=126) or runtime == "crun"
        assert "nosuch" in complaint(*chosen, "nosuch", code=127)
    pyx("run", "--rm", "--runtime", "nosuch", "busybox", "true", code=125)


def check_limits_are_in_cgroup_v2() -> None:
    for runtime in ("crun", "runc"):
        limits = ("-m", "64m", "--cpus", "0.5", "--pids-limit", "33")
        pyx("run", "-d", "--runtime", runtime, "--name", "limited", *limits, "busybox", "sleep", "1000")
        group = CGROUPS / "pyx" / inspect("limited", "{{.Id}}")
        found = {name: (group / name).read_text().strip() for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max")}
        assert found == {"memory.max": "67108864", "memory.swap.max": "67108864", "cpu.max": "50000 100000", "pids.max": "33"}, found
        # its own cgroup namespace, and the score the kernel would give it, not its shim's
        assert pyx("exec", "limited", "cat", "/proc/self/cgroup", "/proc/1/oom_score_adj").split() == ["0::/", "0"]
        assert pyx("exec", "limited", "cat", "/sys/fs/cgroup/memory.max").strip() == "67108864"
        pyx("pause", "limited")
        assert "frozen 1" in (group / "cgroup.events").read_text()
        pyx("unpause", "limited")
        assert "frozen 0" in (group / "cgroup.events").read_text()
        pyx("rm", "-f", "limited")
        wait_for(lambda path=group: not path.exists(), "the cgroup's end")


def check_device_rules() -> None:
    """cgroup v2 has no devices controller: the runtime attaches a program."""
    for runtime in ("crun", "runc"):
        script = "mknod /tmp/disk b 254 0 && cat /tmp/disk"
        said = complaint("run", "--rm", "--runtime", runtime, "busybox", "sh", "-c", script, code=1)
        assert "not permitted" in said, said
        pyx("run", "--rm", "--runtime", runtime, "busybox", "sh", "-c", "head -c 1 /dev/urandom >/dev/null && echo >/dev/null")


def check_oom_kill_is_noted() -> None:
    eat = 'a=$(head -c 100m /dev/zero | tr "\\0" x); echo survived'
    for runtime in ("crun", "runc"):
        pyx("run", "--runtime", runtime, "--name", "eater", "-m", "20m", "--memory-swap", "20m", "busybox", "sh", "-c", eat, code=137)
        assert inspect("eater", "{{.State.OOMKilled}} {{.State.ExitCode}}") == "true 137"
        pyx("rm", "eater")


def check_exec_logs_stop() -> None:
    pyx("run", "-d", "--name", "one", "busybox", "sh", "-c", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done")
    wait_for(lambda: pyx("logs", "one").strip() == "up", "the first line in the log")
    assert pyx("exec", "-i", "one", "cat", input="through\n") == "through\n"
    pyx("exec", "one", "sh", "-c", "exit 9", code=9)
    pyx("stop", "-t", "60", "one")
    assert inspect("one", "{{.State.Status}} {{.State.ExitCode}}") == "exited 3"
    assert pyx("logs", "one").split() == ["up", "bye"]
    pyx("rm", "one")


def check_a_published_port_and_a_volume() -> None:
    with web():
        assert fetch(8080).strip() == "hi"
        assert "8080->80/tcp" in pyx("ps")
        said = complaint("run", "--rm", "-p", "8080:80", "busybox", "true", code=125)
        assert "8080" in said, said
        assert pyx("run", "--rm", "-v", "data:/x:ro", "busybox", "cat", "/x/index.html").strip() == "hi"


def check_a_terminal() -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.execvp("pyx", ["pyx", "run", "--rm", "-it", "busybox", "sh"])
    text = ""

    def expect(wanted: str) -> None:
        nonlocal text
        deadline = time.monotonic() + TIMEOUT_S
        while wanted not in text:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([fd], [], [], left)[0], f"{wanted!r} never showed up: {text!r}"
            text += os.read(fd, 65536).decode(errors="replace")
        text = text.partition(wanted)[2]

    expect("# ")
    os.write(fd, b"tty; echo $((40 + 2)); stty size\n")
    expect("/dev/pts/0")
    expect("42")
    os.write(fd, b"exit 5\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    os.close(fd)


def check_events() -> None:
    reader = subprocess.Popen(["pyx", "events", "--format", "json"], text=True, stdout=subprocess.PIPE)
    assert reader.stdout is not None
    try:
        seen: list[str] = []
        deadline = time.monotonic() + TIMEOUT_S
        running: subprocess.Popen[bytes] | None = None
        while not any("die" in line or "exited" in line for line in seen):
            assert time.monotonic() < deadline, f"no end of a container among the events: {seen}"
            if running is None or running.poll() is not None:  # until the reader has subscribed, its events go unseen
                running = subprocess.Popen(["pyx", "run", "--rm", "busybox", "true"])
            if select.select([reader.stdout], [], [], 1)[0]:
                seen.append(reader.stdout.readline())
        assert running is not None
        running.wait(TIMEOUT_S)
    finally:
        reader.kill()
        reader.wait()


# who may ------------------------------------------------------------------------------------------------------------------


def check_modes_of_files() -> None:
    socket = os.stat("/run/pyx/bus.sock")
    assert stat.S_IMODE(socket.st_mode) == 0o660, oct(socket.st_mode)
    assert socket.st_gid == grp.getgrnam("pyx").gr_gid
    loose = []
    for top in ("/run/pyx", "/var/lib/pyx"):
        for path in [Path(top), *Path(top).glob("*"), *Path(top).glob("*/*")]:
            mode = path.lstat().st_mode
            if path.lstat().st_uid != 0 or (not stat.S_ISLNK(mode) and mode & 0o022 and path.name != "bus.sock"):
                loose.append(f"{path} {oct(mode)}")
    assert not loose, loose


def check_who_may_use_the_bus() -> None:
    for name in ("member", "stranger"):
        run("useradd", "--system", "--no-create-home", name)
    run("usermod", "-aG", "pyx", "member")
    assert "CONTAINER ID" in run("setpriv", "--reuid", "member", "--regid", "member", "--init-groups", "pyx", "ps")
    argv = ["setpriv", "--reuid", "stranger", "--regid", "stranger", "--init-groups", "pyx", "ps"]
    refused = subprocess.run(argv, text=True, capture_output=True, timeout=TIMEOUT_S)
    assert refused.returncode == 1 and "permission denied" in refused.stderr, refused
    # nor may it look where the secrets of others are
    for place in ("/var/lib/pyx/containerd", "/var/lib/pyx/volumed/volumes", "/var/lib/pyx/logd", "/run/pyx/containerd/bundles"):
        if Path(place).exists():
            argv = ["setpriv", "--reuid", "stranger", "--regid", "stranger", "--clear-groups", "ls", place]
            denied = subprocess.run(argv, capture_output=True)
            assert denied.returncode, f"anybody may list {place}"


# restarts and kills -------------------------------------------------------------------------------------------------------


def check_restarts() -> None:
    with web() as pid:
        for name in SERVICES:
            run("systemctl", "restart", f"pyx-{name}")
            wait_for(lambda name=name: serves(name), f"{name} on the bus")
        wait_for(all_serve, "every service back")
        assert int(inspect("web", "{{.State.Pid}}")) == pid
        _works()


def _kill(name: str) -> None:
    """Everything in the unit's cgroup gets SIGKILL: as systemctl's default has it."""
    unit = f"pyx-{name}"
    with web() as pid:
        before = run("systemctl", "show", "-P", "MainPID", unit)
        run("systemctl", "kill", "-s", "KILL", unit)
        wait_for(lambda: state(unit) == "active" and run("systemctl", "show", "-P", "MainPID", unit) != before, f"a new {unit}")
        wait_for(lambda: all(map(serves, SERVICES)), "every service on the bus")
        assert int(inspect("web", "{{.State.Pid}}")) == pid
        assert pyx("exec", "web", "cat", "/proc/1/comm").strip() == "httpd"
        _works()


def check_kill_busd() -> None:
    _kill("busd")


def check_kill_imaged() -> None:
    _kill("imaged")


def check_kill_netd() -> None:
    _kill("netd")


def check_kill_volumed() -> None:
    _kill("volumed")


def check_kill_logd() -> None:
    _kill("logd")


def check_kill_containerd() -> None:
    _kill("containerd")


def _stop_target() -> None:
    run("systemctl", "stop", "pyx.target")
    wait_for(lambda: all(state(f"pyx-{name}") == "inactive" for name in SERVICES), "every service's end")


def check_containers_outlive_the_stack() -> None:
    with web() as pid:
        pyx("run", "-d", "--name", "ends", "busybox", "sh", "-c", "while ! [ -e /stop ]; do sleep 0.1; done; echo ended; exit 4")
        ends = int(inspect("ends", "{{.State.Pid}}"))
        _stop_target()
        assert Path(f"/proc/{pid}").exists() and Path(f"/proc/{ends}").exists()
        assert fetch(8080).strip() == "hi"
        Path(f"/proc/{ends}/root/stop").touch()
        wait_for(lambda: not Path(f"/proc/{ends}").exists(), "the end of a container while nobody watches")
        run("systemctl", "start", "pyx.target")
        wait_for(all_serve, "every service back")
        assert int(inspect("web", "{{.State.Pid}}")) == pid
        assert inspect("ends", "{{.State.Status}} {{.State.ExitCode}}") == "exited 4"
        wait_for(lambda: pyx("logs", "ends").strip() == "ended", "its last line")
        pyx("rm", "ends")
        _works()


# leftovers ----------------------------------------------------------------------------------------------------------------


def _left(stopped: bool) -> list[str]:
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "/run/pyx/" in line or "/var/lib/pyx/" in line]
    for name in SERVICES:  # some have mount namespaces of their own, where a mount could be kept
        pid = run("systemctl", "show", "-P", "MainPID", f"pyx-{name}").strip()
        if pid != "0":
            lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
            found += [f"{name}: {line}" for line in lines if "/bundles/" in line or "nsfs" in line]
    groups = [path for path in CGROUPS.glob("pyx/**") if path.name not in ("pyx", "warm", "shims") or stopped]
    found += [str(path) for path in groups]
    links = [name for name in os.listdir("/sys/class/net") if name != "lo" and (stopped or name != "pyx0")]
    found += [f"link {name}" for name in links]
    found += [str(path) for path in Path("/run/pyx/containerd/bundles").glob("*")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                comm = (entry / "comm").read_text()
            except OSError:
                continue
            if comm.startswith("pyx-s:") or (stopped and any(b"/pyx" in word for word in words[:5])):
                found.append(f"process {entry.name} {words}")
    if stopped:
        found += [line for line in run("nft", "list", "tables").splitlines() if "pyx" in line]
    return found


def check_nothing_is_left_of_containers() -> None:
    assert pyx("ps", "-aq") == ""
    assert pyx("volume", "ls", "-q") == ""
    wait_for(lambda: not _left(stopped=False), f"a clean host; left: {_left(stopped=False)}")


def check_nothing_is_left_of_the_stack() -> None:
    _stop_target()
    wait_for(lambda: not _left(stopped=True), f"a clean host; left: {_left(stopped=True)}")


def check_nothing_was_logged_that_shouldnt_be() -> None:
    lines = run("journalctl", "-b", "--no-pager", "-o", "cat", "-u", "pyx-*").splitlines()
    bad = [line for line in lines if "Traceback" in line or "level=error" in line or "left-over process" in line]
    assert not bad, bad
    denied = [line for line in run("journalctl", "-b", "--no-pager", "-k").splitlines() if "seccomp" in line or "BUG" in line]
    assert not denied, denied


def check_containers_run_when_the_host_shuts_down() -> None:
    """What comes of them, test_host.py sees: after this the machine is powered off as any host is."""
    run("systemctl", "start", "pyx.target")
    wait_for(all_serve, "every service back")
    script = "trap 'echo bye >/host/stopped; exit' TERM; echo up >/host/stopped; while :; do sleep 0.1; done"
    pyx("run", "-d", "-v", "/host:/host", "busybox", "sh", "-c", script)
    pyx("run", "-d", "busybox", "sleep", "100000")  # deaf to SIGTERM, as any first process without a handler
    wait_for(lambda: (HOST / "stopped").exists(), "its first sign")


CHECKS = [(name.removeprefix("check_"), value) for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> None:
    """Run them all; a line of JSON for each in /host/results: name, seconds, problem ("" if none)."""
    wanted = sys.argv[1:]
    with open(HOST / "results", "a") as results:
        for name, check in CHECKS:
            if wanted and name not in wanted:
                continue
            began = time.monotonic()
            problem = ""
            try:
                check()
            except BaseException:
                problem = traceback.format_exc()
                journal = subprocess.run(["journalctl", "-b", "--no-pager", "-n", "60", "-u", "pyx*"], text=True, capture_output=True)
                problem += "\nThe journal:\n" + journal.stdout
            print(json.dumps({"name": name, "seconds": round(time.monotonic() - began, 1), "problem": problem}), file=results, flush=True)


if __name__ == "__main__":
    main()
