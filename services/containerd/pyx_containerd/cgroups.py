"""Taking a cgroup down. Its processes need a moment to be gone after they were killed, so this is a short wait, not a call."""

from __future__ import annotations

import trio

from . import kernel


async def clear(path: str) -> None:
    """Kill what is in a cgroup and remove it. Its processes need a moment to be gone, hence the few attempts."""
    pause = 0.001
    while kernel.cgroup_directories(path):
        kernel.kill_cgroup(path)
        if kernel.remove_cgroup(path) or pause > 1:
            return
        await trio.sleep(pause)
        pause *= 2
