"""What is checked on the real host, in this order; runs there as root, with the standard library and, to ask the broker, pyx's own client.

Every ``check_*`` function is one test of ``test_host.py``. They share the machine, and each leaves it as it found it: the last ones see
that nothing is left. ``reboot_check_*`` run in a second machine with the same disk, after an orderly shutdown of the first, and
``outage_check_*`` in a third after the second lost its power. Deadlines are long: emulated, everything takes about ten times its time.

All that a machine leaves to the next is the disk at /var/lib/pyx.
"""

from __future__ import annotations

import grp
import json
import os
import pty
import pwd
import select
import shutil
import stat
import subprocess
import sys
import tarfile
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
# What of root's power each has; containerd has all of it. The numbers are capabilities(7)'s, as in /proc/PID/status.
USERS = {"busd": "pyx-bus", "imaged": "pyx-imaged", "netd": "pyx-netd", "logd": "pyx-logd", "volumed": "pyx-volumed"}
_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 27 | 1 << 31 | 1 << 21  # CHOWN … FSETID, MKNOD, SETFCAP, SYS_ADMIN
CAPABILITIES = {
    "busd": 0,
    "imaged": _FILES | 1 << 18,  # SYS_CHROOT
    "volumed": _FILES,
    "logd": 1 << 1,  # DAC_OVERRIDE
    "netd": 1 << 10 | 1 << 12 | 1 << 21,  # NET_BIND_SERVICE, NET_ADMIN, SYS_ADMIN
}
SITE = HOME / "lib/python3.11/site-packages"
TIMEOUT_S = 90


def run(*argv: str, code: int = 0, timeout_s: float = TIMEOUT_S, input: str | None = None) -> str:
    """Run a command that must end with ``code``; its standard output."""
    given = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    done = subprocess.run(argv, text=True, capture_output=True, timeout=timeout_s, **given)  # type: ignore[call-overload]
    assert done.returncode == code, f"{' '.join(argv)}: exit code {done.returncode}, not {code}: {done.stdout}{done.stderr}"
    return str(done.stdout)


def pyx(*argv: str, code: int = 0, timeout_s: float = TIMEOUT_S, input: str | None = None) -> str:
    return run("pyx", *argv, code=code, timeout_s=timeout_s, input=input)


def complaint(*argv: str, code: int, user: str = "root") -> str:
    """The standard error of ``pyx``, which must end with ``code``."""
    command = [*_as(user), "pyx", *argv]
    done = subprocess.run(command, text=True, capture_output=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    assert done.returncode == code, f"pyx {' '.join(argv)}: exit code {done.returncode}, not {code}: {done.stdout}{done.stderr}"
    return done.stderr


def _as(user: str) -> list[str]:
    """What to put before a command for it to be run by a user, with the groups that has."""
    return ["setpriv", "--reuid", user, "--regid", user, "--init-groups"] if user != "root" else []


def ask(method: str) -> dict[str, object]:
    """The result of one of the broker's own methods."""
    from pyx_bus.sync import Connection

    with Connection(timeout_s=TIMEOUT_S) as bus:
        return bus.call(method, timeout_s=TIMEOUT_S)


def journal() -> tuple[str, int]:
    """The journal's identity and the offset that the next event gets."""
    stats = ask("bus.stats")
    return str(stats["journal_id"]), int(str(stats["next_offset"]))


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
    _install()
    said = subprocess.run(["systemd-analyze", "verify", str(UNITS / "pyx.target")], text=True, capture_output=True)
    assert "pyx" not in said.stderr, said.stderr
    _start()
    assert run("systemctl", "is-system-running").strip() == "running"


def _install() -> None:
    """As docs/systemd.md says."""
    for script in (HOME / "bin").glob("pyx*"):
        os.symlink(script, Path("/usr/bin") / script.name)
    for unit in (HOME / "systemd").iterdir():
        if unit.suffix in (".service", ".target"):
            shutil.copy(unit, UNITS)
    for kind in ("sysusers", "tmpfiles"):
        shutil.copy(HOME / f"systemd/pyx.{kind}", f"/usr/lib/{kind}.d/pyx.conf")
    run("systemd-sysusers")
    run("systemd-tmpfiles", "--create", "/usr/lib/tmpfiles.d/pyx.conf")
    run("systemctl", "daemon-reload")


def _start() -> None:
    run("systemctl", "start", "pyx.target")
    wait_for(all_serve, "every service active and on the bus")


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


def _status(name: str) -> dict[str, str]:
    """/proc/PID/status of a unit's main process."""
    pid = run("systemctl", "show", "-P", "MainPID", f"pyx-{name}").strip()
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


def check_every_service_has_its_user_and_its_capabilities() -> None:
    for name, user in USERS.items():
        assert run("systemctl", "show", "-P", "User", f"pyx-{name}").strip() == user
        status = _status(name)
        assert set(status["Uid"].split()) == {str(pwd.getpwnam(user).pw_uid)}, (name, status["Uid"])
        assert set(status["Gid"].split()) == {str(grp.getgrnam(user).gr_gid)}, (name, status["Gid"])
        for kind in ("CapPrm", "CapEff", "CapBnd"):
            assert int(status[kind], 16) == CAPABILITIES[name], f"{name}: {kind} {status[kind]}, not {CAPABILITIES[name]:x}"
        assert status["NoNewPrivs"] == "1", name
    found = ask("bus.services")["services"]
    assert isinstance(found, list)
    expected = {name: pwd.getpwnam(user).pw_uid for name, user in USERS.items() if name != "busd"} | {"containerd": 0}
    assert {service["name"]: service["uid"] for service in found} == expected


def check_modes_of_files() -> None:
    socket = os.stat("/run/pyx/bus.sock")
    # everybody may knock, and is told why if refused
    assert stat.S_IMODE(socket.st_mode) == 0o666, oct(socket.st_mode)
    assert socket.st_gid == grp.getgrnam("pyx").gr_gid
    shared = os.stat("/run/pyx")
    assert (stat.S_IMODE(shared.st_mode), shared.st_uid) == (0o1775, 0), oct(shared.st_mode)
    owners = {"bus" if name == "busd" else name: pwd.getpwnam(user).pw_uid for name, user in USERS.items()}
    owners["bus.sock"] = owners["bus"]
    loose = []
    for top in ("/run/pyx", "/var/lib/pyx"):
        for path in [Path(top), *Path(top).glob("*"), *Path(top).glob("*/*")]:
            info = path.lstat()
            relative = path.relative_to(top).parts
            owner = owners.get(relative[0], 0) if relative else 0
            writable = not stat.S_ISLNK(info.st_mode) and info.st_mode & 0o022 and str(path) not in ("/run/pyx", "/run/pyx/bus.sock")
            if info.st_uid != owner or writable:
                loose.append(f"{path} {oct(info.st_mode)} of {info.st_uid}, not {owner}")
    assert not loose, loose


def check_what_containers_see_is_roots() -> None:
    """Nothing shows that the services that made it aren't root, not even what an archive or an option left unsaid."""
    with tarfile.open("/tmp/one.tar", "w") as tar:
        tar.add("/bin/busybox", "tools/busybox", recursive=False)
    pyx("image", "import", "/tmp/one.tar", "one:latest", timeout_s=180)
    owned = ("/tools/busybox", "stat", "-c", "%u:%g:%a", "/", "/tools", "/data")
    found = pyx("run", "--rm", "-v", "fresh:/data", "one", *owned).split()
    assert found == ["0:0:755", "0:0:755", "0:0:755"], found
    # what belongs to whom in images and volumes stays so
    pyx("run", "--rm", "-v", "fresh:/data", "busybox", "sh", "-c", "touch /data/file && chown 1234:4321 /data/file /data")
    found = pyx("run", "--rm", "-v", "fresh:/data", "busybox", "stat", "-c", "%u:%g", "/data", "/data/file", "/etc/shadow").split()
    assert found == ["1234:4321", "1234:4321", "0:0"], found
    strangers = pyx("run", "--rm", "busybox", "find", "/", "-xdev", "!", "-user", "0")
    assert not strangers, strangers
    pyx("volume", "rm", "fresh")
    pyx("rmi", "one")


def check_who_may_use_the_bus() -> None:
    for name, group in (("member", "pyx"), ("watcher", "pyx-monitor"), ("stranger", "")):
        run("useradd", "--system", "--no-create-home", name)
        if group:
            run("usermod", "-aG", group, name)
    assert "CONTAINER ID" in run(*_as("member"), "pyx", "ps")
    assert run(*_as("member"), "pyx", "run", "--rm", "busybox", "echo", "member").strip() == "member"
    for command in (("ps",), ("run", "--rm", "busybox", "true"), ("events", "--since", "1m", "--until", "0s")):
        refused = complaint(*command, user="stranger", code=125 if command[0] == "run" else 1)
        assert "may not use this bus" in refused, refused
    # nor may it look where the secrets of others are
    for place in (
        "/var/lib/pyx/containerd", "/var/lib/pyx/volumed/volumes", "/var/lib/pyx/logd", "/var/lib/pyx/bus", "/run/pyx/containerd/bundles",
        "/var/lib/pyx/imaged/imaged.sqlite", "/var/lib/pyx/volumed/volumed.db",
    ):  # fmt: skip
        command = ["ls", place] if Path(place).is_dir() else ["head", "-c", "1", place]
        denied = subprocess.run(["setpriv", "--reuid", "stranger", "--regid", "stranger", "--clear-groups", *command], capture_output=True)
        assert denied.returncode, f"anybody may look into {place}"


def check_a_member_with_many_groups() -> None:
    """More than 256, of which the one that counts is the last."""
    groups = ",".join(map(str, [*range(100_000, 100_400), grp.getgrnam("pyx").gr_gid]))
    argv = ["setpriv", "--reuid", "stranger", "--regid", "stranger", "--groups", groups, "pyx", "ps"]
    assert "CONTAINER ID" in run(*argv)


def check_what_a_monitor_may() -> None:
    pyx("run", "-d", "--name", "secret", "-e", "PASSWORD=hunter2", "busybox", "sleep", "1000")
    try:
        assert "secret" in run(*_as("watcher"), "pyx", "ps")
        assert json.loads(run(*_as("watcher"), "pyx", "inspect", "secret"))[0]["Name"] == "/secret"
        assert "busybox" in run(*_as("watcher"), "pyx", "images")
        run(*_as("watcher"), "pyx", "system", "info")
        for command in (
            ("run", "--rm", "busybox", "true"), ("stop", "secret"), ("exec", "secret", "true"), ("rm", "-f", "secret"), ("logs", "secret"),
            ("volume", "create", "mine"), ("pull", "busybox"),
        ):  # fmt: skip
            refused = complaint(*command, user="watcher", code=125 if command[0] == "run" else 1)
            assert "not for monitors" in refused, f"{command}: {refused}"
        assert inspect("secret", "{{.State.Running}}") == "true"
        seen = _events_seen_by("watcher", lambda: (pyx("pause", "secret"), pyx("unpause", "secret")), "container unpause")
        assert "container pause" in seen and "hunter2" not in seen, seen
    finally:
        pyx("rm", "-f", "secret")


def check_secrets_are_masked_for_monitors() -> None:
    pyx("run", "-d", "--name", "secret", "-e", "PASSWORD=hunter2", "busybox", "sleep", "1000")
    try:
        for user in ("root", "member"):
            assert "PASSWORD=hunter2" in run(*_as(user), "pyx", "inspect", "secret")
        seen = run(*_as("watcher"), "pyx", "inspect", "secret")
        assert "hunter2" not in seen and "PASSWORD=" in seen, seen
    finally:
        pyx("rm", "-f", "secret")


def _events_seen_by(user: str, cause: Callable[[], object], wanted: str) -> str:
    """What ``pyx events`` of that user shows of what ``cause`` does, up to the line with ``wanted``."""
    reader = subprocess.Popen([*_as(user), "pyx", "events", "--since", "1m"], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    seen = ""
    try:
        cause()
        deadline = time.monotonic() + TIMEOUT_S
        while wanted not in seen:
            assert time.monotonic() < deadline and reader.poll() is None, f"no {wanted!r} in {seen!r}"
            if select.select([reader.stdout], [], [], 1)[0]:
                seen += os.read(reader.stdout.fileno(), 65536).decode()
    finally:
        reader.kill()
        reader.communicate()
    return seen


def check_groups_are_read_again_on_reload() -> None:
    """``systemctl reload pyx-busd``: no connection ends, and who comes from then on is judged by the new groups."""
    old = grp.getgrnam("pyx-monitor").gr_gid
    pid = run("systemctl", "show", "-P", "MainPID", "pyx-busd")
    connections = _connections_of_services()
    try:
        run("groupmod", "-g", "61000", "pyx-monitor")
        assert not _watcher_is_admitted()
        run("systemctl", "reload", "pyx-busd")
        wait_for(_watcher_is_admitted, "the reload")
        _events_seen_by("watcher", lambda: None, "daemon reload")
    finally:
        run("groupmod", "-g", str(old), "pyx-monitor")
        run("systemctl", "reload", "pyx-busd")
    wait_for(_watcher_is_admitted, "the other reload")
    assert run("systemctl", "show", "-P", "MainPID", "pyx-busd") == pid
    assert _connections_of_services() == connections


def _connections_of_services() -> dict[str, int]:
    """When each service's connection began."""
    found = ask("bus.services")["services"]
    assert isinstance(found, list)
    return {service["name"]: service["since_ns"] for service in found}


def _watcher_is_admitted() -> bool:
    return subprocess.run([*_as("watcher"), "pyx", "ps"], capture_output=True, timeout=TIMEOUT_S).returncode == 0


# restarts and kills -------------------------------------------------------------------------------------------------------


def check_an_upgrade_from_services_that_were_roots() -> None:
    """Their files change hands where they must, and nothing of a running container's or a volume's does."""
    with web() as pid:
        script = "touch /mine /www/mine && chown 1234:4321 /mine /www/mine && ln -s /nowhere /www/link && chown -h 1234:4321 /www/link"
        pyx("exec", "web", "sh", "-c", script)
        _stop_target()
        for name in ("bus", "netd", "logd"):
            run("chown", "-R", "-h", "root:root", f"/var/lib/pyx/{name}")
        run("find", "/run/pyx", "-xdev", "!", "-user", "0", "-exec", "chown", "-h", "root:root", "{}", "+")
        theirs = {}
        for name in ("imaged", "volumed"):  # these may do without, and what is below isn't theirs to begin with
            user = f"pyx-{name}"
            theirs[user] = run("find", f"/var/lib/pyx/{name}", "-maxdepth", "2", "-user", user).split()
            run("chown", "-h", "root:root", *theirs[user])
        run("chown", "root:root", "/run/pyx", "/run/pyx-subnets.lock")
        os.chmod("/run/pyx", 0o755)
        run("python3", "-c", "import socket; socket.socket(socket.AF_UNIX).bind('/run/pyx/bus.sock')")
        run("systemd-tmpfiles", "--create", "/usr/lib/tmpfiles.d/pyx.conf")
        _start()
        assert int(inspect("web", "{{.State.Pid}}")) == pid
        _works()
        found = pyx("exec", "web", "stat", "-c", "%u:%g", "/mine", "/www/mine", "/www/link", "/etc/passwd", "/").split()
        assert found == ["1234:4321", "1234:4321", "1234:4321", "0:0", "0:0"], found
        for user, paths in theirs.items():
            run("chown", "-h", f"{user}:{user}", *[path for path in paths if os.path.lexists(path)])


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
    pyx("run", "-d", "--name", "deaf", "busybox", "sleep", "100000")  # to SIGTERM, as any first process without a handler
    wait_for(lambda: (HOST / "stopped").exists(), "its first sign")
    _remember()


# what outlives a machine --------------------------------------------------------------------------------------------------

MEMORY = Path("/var/lib/pyx/remembered")


def _remember() -> None:
    """Where the journal stands, for the next machine."""
    identity, offset = journal()
    MEMORY.write_text(f"{identity} {offset}")
    os.sync()


def _remembered() -> tuple[str, int]:
    identity, offset = MEMORY.read_text().split()
    return identity, int(offset)


def _offsets_since(offset: int) -> list[int]:
    """Those of the events that the journal has from an offset on."""
    from pyx_bus.sync import Connection

    with Connection(timeout_s=TIMEOUT_S) as bus:
        end = int(str(bus.call("bus.stats")["next_offset"]))
        found: list[int] = []
        for event in bus.events(">", since=offset):
            found.append(event.offset)
            if event.offset >= end - 1:
                return found
    raise AssertionError("the events ended")


def reboot_check_the_journal_goes_on() -> None:
    """After an orderly shutdown nothing is missing: the same journal, its offsets without a hole from before to after."""
    _install()
    _start()
    identity, before = _remembered()
    now = journal()
    assert now[0] == identity
    assert now[1] > before
    first = max(1, before - 20)
    found = _offsets_since(first)
    assert found == list(range(first, found[-1] + 1)), found


def reboot_check_containers_are_known() -> None:
    """Those that ran at the shutdown: as having ended, with how, and what they wrote. They run again."""
    assert inspect("deaf", "{{.State.Status}} {{.State.ExitCode}}") == "exited 137"
    pyx("start", "deaf")
    assert inspect("deaf", "{{.State.Running}}") == "true"
    assert pyx("exec", "deaf", "echo", "in").strip() == "in"
    for container in pyx("ps", "-aq").split():
        pyx("rm", "-f", container)


def reboot_check_files_are_still_their_services() -> None:
    check_modes_of_files()


def reboot_check_power_is_lost_while_events_are_published() -> None:
    """Tells the one who pulls the plug where the journal stands, until that happens."""
    numbers = (HOST / "offsets").open("a", buffering=1)
    identity, _ = journal()
    print(identity, file=(HOST / "identity").open("w", buffering=1))
    for number in range(100_000):
        pyx("volume", "create", f"v{number}")
        print(journal()[1], file=numbers)


def outage_check_offsets_never_go_back() -> None:
    """What was told before the power went, the host has in a file: the next event's offset is none that anybody has heard of."""
    _install()
    _start()
    identity, highest = (HOST / "told").read_text().split()
    now = journal()
    assert now[0] == identity, f"another journal, {now[0]}, not {identity}"
    before = _offsets_since(1)
    assert before == sorted(set(before))
    pyx("volume", "create", "after")
    new = [offset for offset in _offsets_since(1) if offset not in before]
    assert new and min(new) >= int(highest), f"offset {new} was given anew: {highest} had been reached"


def outage_check_everything_works() -> None:
    with web():
        _works()
    assert "after" in pyx("volume", "ls", "-q").split()
    check_modes_of_files()


def _named(prefix: str) -> list[tuple[str, Callable[[], None]]]:
    return [(name.removeprefix(prefix), value) for name, value in list(globals().items()) if name.startswith(prefix)]


PHASES = {"": _named("check_"), "reboot": _named("reboot_check_"), "outage": _named("outage_check_")}


def main() -> None:
    """Run a phase's; a line of JSON for each in /host/results: name, seconds, problem ("" if none)."""
    phase, *wanted = sys.argv[1:] or [""]
    sys.path.append(str(SITE))
    with open(HOST / "results", "a") as results:
        for name, check in PHASES[phase]:
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
