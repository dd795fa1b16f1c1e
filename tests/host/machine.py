"""Run a script on a real host: a virtual machine with Debian 12, systemd as PID 1 and cgroup v2, made for it and thrown away after.

Emulated (TCG), because a usable /dev/kvm is rare where tests run, and one that's there but doesn't work hangs; so everything inside takes
about ten times longer. ``PYX_TEST_ACCEL=kvm`` uses KVM all the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .image import image
from .payload import payload

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


def run(directory: Path, files: list[Path], *, timeout_s: float) -> Outcome:
    """Start a machine with ``files`` in a directory it shares with us, where it executes ``run``; wait for its end.

    In the machine that directory is /host, and /opt/pyx is what ``payload.py`` made. Whatever is written to /host is in ``share``
    afterwards. After ``timeout_s`` the machine is killed.
    """
    share = directory / "share"
    share.mkdir(parents=True)
    for path in files:
        shutil.copy(path, share / path.name)
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
        "-device", "virtio-rng-pci",
        "-fsdev", f"local,id=host,path={share},security_model=none", "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
    ]  # fmt: skip
    began = time.monotonic()
    with open(console, "wb") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
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
