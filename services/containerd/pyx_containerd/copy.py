"""``cp``, its stat, and ``export``: what goes between a container's root and a pipe.

A process of its own does the work (copyjob.py), in a mount namespace of its own: it sees the container's root with its volumes whether
or not it runs, it can be killed at any time, and nothing it mounted stays. What it needs to know goes to it as JSON.

One at a time for a container, since an overlay mustn't be mounted twice. A start or a removal doesn't wait for a client that doesn't
read: it ends the copies that are under way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import trio

from pyx_bus import errors
from pyx_bus.contract import containerd as contract

from .engine import Engine, Live
from .model import State


async def stat(engine: Engine, live: Live, path: str) -> contract.PathStat:
    """Errors: see ``contract.StatPath``."""
    return msgspec.convert(await _work(engine, live, {"kind": "stat", "path": path}, -1), contract.PathStat)


async def copy_from(engine: Engine, live: Live, path: str, fd: int) -> None:
    """Errors: see ``contract.CopyFrom``. ``fd`` stays the caller's, here and below."""
    await _work(engine, live, {"kind": "pack", "path": path}, fd)
    engine.publish(contract.ContainerCopied, live.record, path=path, direction="from")


async def copy_to(engine: Engine, live: Live, path: str, fd: int, *, keep_owner: bool) -> int:
    """How many bytes of files came. Errors: see ``contract.CopyTo``."""
    result = await _work(engine, live, {"kind": "unpack", "path": path, "keep_owner": keep_owner}, fd)
    engine.publish(contract.ContainerCopied, live.record, path=path, direction="to")
    return int(result["size_bytes"])


async def export(engine: Engine, live: Live, fd: int) -> None:
    """Errors: see ``contract.ExportContainer``."""
    await _work(engine, live, {"kind": "export"}, fd)
    engine.publish(contract.ContainerExported, live.record)


async def end_copies(live: Live) -> None:
    """End what is under way, and wait until its process is gone."""
    for scope, done in list(live.copies.items()):
        scope.cancel()
        with trio.CancelScope(shield=True):
            await done.wait()


async def _work(engine: Engine, live: Live, job: dict[str, Any], fd: int) -> dict[str, Any]:
    async with live.lock:  # not in the middle of a start or a removal
        if live.record.state is State.REMOVING or live.id not in engine.containers:
            raise errors.FailedPrecondition(f'container "{live.record.name}" is being removed')
        scope, done = trio.CancelScope(), trio.Event()
        live.copies[scope] = done
    try:
        with scope:
            async with live.copying:
                return await _run(engine, {**job, **_root(engine, live)}, fd)
    finally:
        del live.copies[scope]
        done.set()
    raise errors.FailedPrecondition(f'container "{live.record.name}" was started or removed meanwhile', hint="try again")


def _root(engine: Engine, live: Live) -> dict[str, Any]:
    """What the job makes its view of."""
    record, bundle = live.record, engine.bundle(live.id)
    place = engine.context.run / "copy"
    place.mkdir(mode=0o700, exist_ok=True)
    mounted = bundle / "rootfs" if live.mounted else None
    return {
        "place": str(place),
        "mounted": str(mounted or ""),
        "device": os.stat(mounted).st_dev if mounted else 0,
        "mounts": [msgspec.to_builtins(mount) for mount in record.rootfs_mounts],
        "volumes": [
            {"source": volume.source, "target": volume.target, "read_only": volume.read_only}
            for volume in record.attached_volumes
            if volume.kind != "tmpfs"
        ],
        "files": {f"/etc/{name}": str(bundle / name) for name in ("hosts", "hostname", "resolv.conf") if live.mounted},
        "read_only": record.spec.read_only_rootfs,
    }


async def _run(engine: Engine, job: dict[str, Any], fd: int) -> dict[str, Any]:
    argv = [sys.executable, "-I", "-m", "pyx_containerd.copyjob", str(fd)]
    done = await trio.run_process(
        argv,
        stdin=json.dumps(job).encode(),
        capture_stdout=True,
        check=False,
        pass_fds=(fd,) if fd >= 0 else (),
        env={"LANG": "C.UTF-8", "PATH": os.environ.get("PATH", "")},
        cwd=Path("/"),
        deliver_cancel=_kill,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise errors.Internal(f"the copying process ended with status {done.returncode} and without an answer") from None
    if "error" in answer:
        raise errors.BY_CODE.get(answer["error"]["code"], errors.Internal)(answer["error"]["message"])
    return dict(answer["result"])


async def _kill(process: subprocess.Popen[bytes] | trio.Process) -> None:
    process.kill()  # there's nothing it would have to tidy up
