"""What ``system info`` says about this host."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path

from pyx_bus.contract.containerd import SystemInfo

from . import kernel
from .engine import Engine
from .model import State


def info(engine: Engine) -> SystemInfo:
    """Facts and counts of this moment."""
    states = [live.record.state for live in engine.containers.values()]
    running, paused = states.count(State.RUNNING), states.count(State.PAUSED)
    mode = kernel.cgroup_mode()
    choice = engine.choice
    warnings = []
    if choice is not None and not choice.name:
        warnings.append(f"no OCI runtime works on this host: {choice.reason}")
    return SystemInfo(
        containers=len(states),
        containers_running=running,
        containers_paused=paused,
        containers_stopped=len(states) - running - paused,
        runtimes={name: runtime.path for name, runtime in engine.runtimes.items()},
        default_runtime=choice.name if choice else "",
        runtime_version=choice.version if choice else "",
        runtime_reason=choice.reason if choice else "still being found out",
        cgroup_version=mode,
        cgroup_driver="cgroupfs",
        kernel_version=platform.release(),
        operating_system=_os_name(),
        architecture=platform.machine(),
        cpus=engine.cpus,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        hostname=socket.gethostname(),
        root_dir=str(engine.context.root.parent),
        warnings=warnings,
    )


def _os_name() -> str:
    for name in ("/etc/os-release", "/usr/lib/os-release"):
        try:
            text = Path(name).read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("PRETTY_NAME="):
                return line.partition("=")[2].strip('"')
    return platform.system()
