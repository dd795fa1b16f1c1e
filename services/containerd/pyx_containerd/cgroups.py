"""Taking a cgroup down. Its processes need a moment to be gone after they were killed, so this is a short wait, not a call."""

from __future__ import annotations

import trio

from . import kernel

GIVE_UP_S = 10.0


async def clear(path: str) -> None:
    """Kill what is in a cgroup and remove it; what can't be killed within ``GIVE_UP_S`` (stuck in the kernel) is left."""
    pause = 0.001
    with trio.move_on_after(GIVE_UP_S):
        while kernel.cgroup_directories(path):
            kernel.kill_cgroup(path)
            if kernel.remove_cgroup(path):
                return
            await trio.sleep(pause)
            pause = min(0.2, pause * 2)
