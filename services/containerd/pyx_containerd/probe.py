"""Which OCI runtime works on this host: found out by running a container with each, and remembered.

Candidates are the configured ones and crun and runc from PATH; the first that works is the default, crun first since it's several
times faster. The answer is cached under everything it depends on (path, size, mtime, kernel, cgroup mode), so that a restart
doesn't pay for it. The probe's container is a static program of a few bytes that exits with 42.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import trio

from . import cgroups, kernel
from .drivers.runtime import Runtime, parse_failure

PREFERENCE = ("crun", "runc")
_EXIT_CODE = 42
_CODE = {
    "x86_64": (62, bytes.fromhex("b83c000000bf2a0000000f05")),  # mov eax,60; mov edi,42; syscall
    "aarch64": (183, bytes.fromhex("a80b80d2400580d2010000d4")),  # mov w8,#93; mov x0,#42; svc #0
    "riscv64": (243, bytes.fromhex("9308d0051305a00273000000")),  # li a7,93; li a0,42; ecall
}


@dataclass(frozen=True, slots=True)
class Choice:
    """The default runtime ("" if none works), its version, and why it was chosen."""

    name: str
    version: str
    reason: str


def program(machine: str) -> bytes:
    """A static ELF that exits with 42 (elf(5): one header, one loaded segment). Empty for an unknown machine."""
    if machine not in _CODE:
        return b""
    number, code = _CODE[machine]
    base, head = 0x400000, 64 + 56
    size = head + len(code)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, number, 1, base + head, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return header + segment + code


def candidates(configured: dict[str, str]) -> dict[str, str]:
    """name → path of every runtime that's there."""
    found = {}
    search = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    for name in (*PREFERENCE, *configured):
        path = shutil.which(configured.get(name, name), path=search)
        if path:
            found[name] = path
    return found


def _key(paths: dict[str, str], wanted: str) -> list[object]:
    facts: list[object] = [platform.release(), kernel.cgroup_mode(), wanted]
    for name, path in sorted(paths.items()):
        status = os.stat(path)
        facts.append([name, path, status.st_size, status.st_mtime_ns])
    return facts


async def choose(paths: dict[str, str], wanted: str, cache: Path, scratch: Path, cgroup_parent: str) -> Choice:
    """The default among ``paths``. ``wanted``: the configured default, taken without question. Cached in ``cache``."""
    key = json.loads(json.dumps(_key(paths, wanted)))
    try:
        saved = json.loads(cache.read_text())
        if saved["key"] == key:
            return Choice(saved["name"], saved["version"], saved["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    choice = await _choose(paths, wanted, scratch, cgroup_parent)
    if choice.name:
        temporary = cache.with_suffix(".tmp")
        temporary.write_text(json.dumps({"key": key, "name": choice.name, "version": choice.version, "reason": choice.reason}))
        temporary.replace(cache)
    return choice


async def _choose(paths: dict[str, str], wanted: str, scratch: Path, cgroup_parent: str) -> Choice:
    if wanted:
        if wanted not in paths:
            return Choice("", "", f'the configured default runtime "{wanted}" was not found')
        return Choice(wanted, await version(paths[wanted]), "set by configuration")
    refused: list[str] = []
    for name in [*(name for name in PREFERENCE if name in paths), *(name for name in paths if name not in PREFERENCE)]:
        problem = await attempt(Runtime(name, paths[name], str(scratch / "runtime")), scratch, cgroup_parent)
        if not problem:
            because = "works on this host" + ("; " + "; ".join(refused) if refused else ", first choice")
            return Choice(name, await version(paths[name]), because)
        refused.append(f"{name} refused: {problem}")
    return Choice("", "", "; ".join(refused) or "neither crun nor runc was found")


async def version(path: str) -> str:
    """The first line of ``--version``."""
    try:
        result = await trio.run_process([path, "--version"], capture_stdout=True, capture_stderr=True, check=False)
    except OSError:
        return ""
    return result.stdout.decode(errors="replace").partition("\n")[0].strip()


async def attempt(runtime: Runtime, scratch: Path, cgroup_parent: str) -> str:
    """Really run a container; "" if that worked, else why not. Leaves nothing behind."""
    binary = program(platform.machine())
    if not binary:
        return "" if await version(runtime.path) else "it can't be executed"
    scratch.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="probe-", dir=scratch))
    container_id = f"probe-{os.getpid()}-{time.monotonic_ns() % 10**9}"
    cgroup = f"{cgroup_parent}/{container_id}"
    try:
        rootfs = directory / "rootfs"
        for name in ("proc", "dev", "sys"):
            (rootfs / name).mkdir(parents=True)
        (rootfs / "exit").write_bytes(binary)
        (rootfs / "exit").chmod(0o755)
        (directory / "config.json").write_text(json.dumps(_bundle(cgroup)))
        log = directory / "log"
        argv = [runtime.path, "--root", runtime.root, "--log", str(log), "--log-format", "json", "run", "--bundle", str(directory)]
        with trio.move_on_after(20):
            result = await trio.run_process([*argv, container_id], capture_stdout=True, capture_stderr=True, check=False)
            if result.returncode == _EXIT_CODE:
                return ""
            said = log.read_text(errors="replace") if log.exists() else ""
            return parse_failure(said or result.stderr.decode(errors="replace"), result.returncode).reason
        return "it hung"
    except OSError as error:
        return str(error)
    finally:
        with trio.CancelScope(shield=True):
            if (Path(runtime.root) / container_id).exists():
                await trio.run_process(
                    [runtime.path, "--root", runtime.root, "delete", "--force", container_id],
                    capture_stdout=True,
                    capture_stderr=True,
                    check=False,
                )
            await cgroups.clear(cgroup)
            shutil.rmtree(directory, ignore_errors=True)
            shutil.rmtree(Path(runtime.root) / container_id, ignore_errors=True)


def _bundle(cgroup: str) -> dict[str, object]:
    options = ["nosuid", "noexec", "nodev"]
    return {
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/exit"], "cwd": "/", "env": ["PATH=/"]},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": options}],
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")],
            "resources": {"pids": {"limit": 32}},
        },
    }
