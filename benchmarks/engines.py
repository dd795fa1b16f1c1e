"""The engines: how each is started, given an image, and asked for the same things.

Each has its own directories and is stopped at the end. Docker's and Podman's programs are only used if they're installed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def which(program: str) -> str:
    return shutil.which(program, path=PATH) or ""


def pss_kib(pids: list[int]) -> int:
    """Sum of the proportional set sizes, in KiB; a process that has gone counts nothing."""
    total = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def processes() -> dict[int, tuple[str, int]]:
    """pid → (command name, parent)."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            name = stat[stat.index("(") + 1 : stat.rindex(")")]
            found[int(entry)] = (name, int(stat[stat.rindex(")") + 2 :].split()[1]))
    return found


def remove_cgroups(name: str) -> None:
    """The parents that an engine leaves in every hierarchy, as soon as its last process has left them (10 s at most)."""
    deadline = time.monotonic() + 10
    for directory in Path("/sys/fs/cgroup").glob(f"*/{name}"):
        for child in [*sorted(directory.rglob("*/"), reverse=True), directory]:
            while True:
                try:
                    child.rmdir()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)


def unmount_below(directory: Path) -> None:
    """Whatever an engine left mounted in its own directories."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((p for p in points if p.startswith(f"{directory}/")), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=False)


class Engine:
    """``command`` starts the command line of every request."""

    name = ""
    image = "busybox"

    def __init__(self, directory: Path) -> None:
        self.directory = directory / self.name
        self.directory.mkdir()
        self.command: list[str] = []
        self.environment = {**os.environ, "PATH": PATH}

    @classmethod
    def available(cls) -> bool:
        return bool(which(cls.name))

    def start(self, image_tar: Path) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def run(self, *args: str, check: bool = True) -> str:
        """Run a request and return what it printed."""
        done = subprocess.run(
            [*self.command, *args], env=self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            raise RuntimeError(f"{self.name} {' '.join(args)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def remove(self, name: str) -> None:
        """Kill at once, and remove."""
        self.run("rm", "-f", name, check=False)

    def engine_pids(self) -> list[int]:
        """The engine's own processes, those of the containers left out."""
        raise NotImplementedError


class Pyx(Engine):
    name = "pyx"

    def start(self, image_tar: Path) -> None:
        self.environment |= {"PYX_ROOT": str(self.directory / "root"), "PYX_RUN": str(self.directory / "run")}
        self.command = [str(Path(__file__).parents[1] / ".venv/bin/pyx")]
        self.run("system", "up", "--detach")
        self.run("image", "import", str(image_tar), "busybox:latest")

    @classmethod
    def available(cls) -> bool:
        return True

    def stop(self) -> None:
        ids = self.run("ps", "-aq", check=False).split()
        if ids:
            self.run("rm", "-f", *ids, check=False)
        self.run("system", "down", check=False)

    def engine_pids(self) -> list[int]:
        """Services have the stack's directory in their environment; shims and their zygote are known by their file, and this stack's by
        living in the benchmark's own mount namespace."""
        wanted = f"PYX_RUN={self.environment['PYX_RUN']}".encode()
        namespace = os.readlink("/proc/self/ns/mnt")
        pids = []
        for pid, (name, _) in processes().items():
            try:
                if os.readlink(f"/proc/{pid}/ns/mnt") != namespace:
                    continue
                service = wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                shim = b"pyx_containerd/shim" in Path(f"/proc/{pid}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if name != "pyx" and (service or shim):
                pids.append(pid)
        return pids


class Docker(Engine):
    name = "docker"

    @classmethod
    def available(cls) -> bool:
        return bool(which("docker") and which("dockerd") and which("containerd"))

    def start(self, image_tar: Path) -> None:
        socket = self.directory / "docker.sock"
        # Debian's own client, which fits the daemon; another one may come first in PATH.
        client = "/usr/bin/docker" if os.access("/usr/bin/docker", os.X_OK) else which("docker")
        self.command = [client, "-H", f"unix://{socket}"]
        self.environment["DOCKER_API_VERSION"] = "1.41"
        self.log = (self.directory / "log").open("w")
        self.daemon = subprocess.Popen(
            [
                which("dockerd"),
                f"--data-root={self.directory}/data",
                f"--exec-root={self.directory}/exec",
                f"--pidfile={self.directory}/pid",
                f"--host=unix://{socket}",
                "--bip=172.31.201.1/24",
            ],
            env=self.environment,
            stdout=self.log,
            stderr=self.log,
        )
        deadline = time.monotonic() + 30
        while not socket.exists() or "Version" not in self.run("version", check=False):
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dockerd didn't start: {(self.directory / 'log').read_text()[-600:]}")
            time.sleep(0.1)
        self.run("import", str(image_tar), "busybox:latest")

    def stop(self) -> None:
        ids = self.run("ps", "-aq", check=False).split()
        if ids:
            self.run("rm", "-f", *ids, check=False)
        self.daemon.send_signal(signal.SIGTERM)
        self.daemon.wait(60)
        remove_cgroups("docker")

    def engine_pids(self) -> list[int]:
        table = processes()
        mine = {self.daemon.pid}
        while True:
            more = {p for p, (_, parent) in table.items() if parent in mine} - mine
            if not more:
                break
            mine |= more
        shims = [p for p, (name, _) in table.items() if name.startswith("containerd-shim")]
        return [p for p in {*mine, *shims} if table[p][0] not in ("sleep", "busybox")]


class Podman(Engine):
    name = "podman"

    def start(self, image_tar: Path) -> None:
        self.command = [
            which("podman"),
            f"--root={self.directory}/root",
            f"--runroot={self.directory}/run",
            f"--tmpdir={self.directory}/tmp",
            f"--network-config-dir={self.directory}/networks",
            "--runtime=" + os.environ.get("BENCH_PODMAN_RUNTIME", "runc"),
            "--cgroup-manager=cgroupfs",
            "--events-backend=file",
        ]
        self.run("import", "-q", str(image_tar), "localhost/busybox:latest")

    def run(self, *args: str, check: bool = True) -> str:
        if args[0] in ("run", "create"):
            # Its own default limits are above our hard ones, which not every root may raise (CAP_SYS_RESOURCE).
            args = (args[0], "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096", *args[1:])
        return super().run(*args, check=check)

    def remove(self, name: str) -> None:
        self.run("rm", "-f", "-t", "0", name, check=False)

    def stop(self) -> None:
        self.run("rm", "-f", "-a", "-t", "0", check=False)
        remove_cgroups("libpod_parent")

    def engine_pids(self) -> list[int]:
        return [pid for pid, (name, _) in processes().items() if name == "conmon"]


class Bare:
    """The runtime alone, on a bundle of the same root file system: the floor."""

    def __init__(self, runtime: str, directory: Path, image_tar: Path) -> None:
        self.name = runtime
        self.directory = directory / f"bare-{runtime}"
        rootfs = self.directory / "bundle/rootfs"
        rootfs.mkdir(parents=True)
        subprocess.run(["tar", "-C", rootfs, "-xf", image_tar], check=True)
        subprocess.run([which(runtime), "spec"], cwd=self.directory / "bundle", check=True)
        config = self.directory / "bundle/config.json"
        spec = json.loads(config.read_text())
        spec["process"]["terminal"] = False
        spec["process"]["args"] = ["/bin/true"]
        config.write_text(json.dumps(spec))
        self._count = 0

    def run_once(self) -> None:
        self._count += 1
        subprocess.run(
            [
                which(self.name),
                f"--root={self.directory}/state",
                "run",
                "--bundle",
                self.directory / "bundle",
                f"bench{os.getpid()}x{self._count}",
            ],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
