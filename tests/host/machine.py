"""Run a script on a real host: a virtual machine with Debian 12, systemd as PID 1 and cgroup v2, made for it and thrown away after.

Emulated (TCG), because a usable /dev/kvm is rare where tests run, and one that's there but doesn't work hangs; so everything inside takes
about ten times longer. ``PYX_TEST_ACCEL=kvm`` uses KVM all the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.images import run_quiet

from .image import image
from .payload import payload

DATA_BYTES = 1 << 30  # sparse
MEMORY_MB = 2048
CPUS = 2


@dataclass(frozen=True)
class Outcome:
    """``status`` is the script's, or None if the machine never said (``console`` may say why). ``shutdown_s``: from the script's end to
    the machine's."""

    status: int | None
    output: str
    console: str
    share: Path
    duration_s: float
    shutdown_s: float


def data_disk(path: Path) -> Path:
    """An empty file system with a journal, as people have, for what must outlive a machine."""
    with open(path, "wb") as file:
        file.truncate(DATA_BYTES)
    run_quiet("mkfs.ext4", "-q", "-F", path)
    return path


def run(
    directory: Path,
    files: list[Path],
    *,
    data: Path,
    phase: str = "",
    timeout_s: float,
    power_off_when: Callable[[Path], bool] | None = None,
) -> Outcome:
    """Start a machine with ``files`` in a directory it shares with us, where it executes ``run``; wait for its end.

    In the machine that directory is /host, and /opt/pyx is what ``payload.py`` made. Whatever is written to /host is in ``share``
    afterwards. ``data`` is its disk /dev/vdc; everything else is new each time. ``phase`` is in /host/phase. After ``timeout_s`` the
    machine is killed; or as soon as ``power_off_when``, given the shared directory, says so: what the machine had in its memory only is
    lost then, as when the power goes.
    """
    share = directory / "share"
    share.mkdir(parents=True)
    for path in files:
        shutil.copy(path, share / path.name)
    (share / "phase").write_text(phase)
    made = image()
    pyx = payload(directory / "pyx.ext4")
    console = directory / "console"
    accel = os.environ.get("PYX_TEST_ACCEL", "tcg")
    argv = [
        "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi" if accel == "tcg" else accel, "-cpu", "max",
        "-m", str(MEMORY_MB), "-smp", str(CPUS), "-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot",
        "-nodefaults", "-no-user-config", "-kernel", str(made.kernel), "-initrd", str(made.initrd),
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off systemd.show_status=0",
        "-drive", f"id=root,file={made.disk},format=raw,if=none,snapshot=on,cache=unsafe", "-device", "virtio-blk-pci,drive=root",
        "-drive", f"id=pyx,file={pyx},format=raw,if=none,readonly=on", "-device", "virtio-blk-pci,drive=pyx",
        "-drive", f"id=data,file={data},format=raw,if=none,cache=writeback", "-device", "virtio-blk-pci,drive=data",
        "-device", "virtio-rng-pci",
        "-fsdev", f"local,id=host,path={share},security_model=none", "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
    ]  # fmt: skip
    began = time.monotonic()
    with open(console, "wb") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and time.monotonic() < began + timeout_s:
                if power_off_when is not None and power_off_when(share):
                    break
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    ended = time.time()
    status = share / "status"
    return Outcome(
        status=int(status.read_text()) if status.exists() else None,
        output=(share / "output").read_text(errors="replace") if (share / "output").exists() else "",
        console=console.read_text(errors="replace"),
        share=share,
        duration_s=time.monotonic() - began,
        shutdown_s=ended - status.stat().st_mtime if status.exists() else 0.0,
    )
