"""Worker processes from imaged's side: start one for a job, follow its progress, read its result, never leave it behind.

A worker is a fresh interpreter (nothing is forked from this process, which has threads). It holds the read end of a pipe, its
lifeline: when imaged dies, however, the worker notices and ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import trio

from pyx_bus.errors import BY_CODE, Internal

from .extract import Limits
from .model import PackResult, SpoolResult, UnpackResult

_LINE_LIMIT = 64 << 20  # the result of a spooled archive lists its members
_PATIENCE_S = 60.0  # with who reads a list and takes nothing of it
Progress = Callable[[int], None]


def _nowhere(_: int) -> None:
    return


class Workers:
    """Runs jobs, a bounded number at a time. More than the host has CPUs: a job may wait for a slow registry or client."""

    def __init__(self, limits: Limits, *, allow_absolute: bool) -> None:
        self._limits = limits
        self._allow_absolute = allow_absolute
        self._slots = trio.CapacityLimiter(max(8, 2 * len(os.sched_getaffinity(0))))
        self._readers = trio.CapacityLimiter(8)  # of their own: whoever may only look, and doesn't read, keeps no image from coming

    async def unpack(
        self, source: int, root: Path, *, base: bool, blob: Path | None, strict_end: bool, progress: Progress
    ) -> UnpackResult:
        """Extract the layer that descriptor ``source`` gives (not closed here) into ``root``; keep its bytes in ``blob``.

        Errors: invalid_argument (bad archive), resource_exhausted (limits, disk). Cancelled: the worker is killed.
        """
        job = {
            "kind": "unpack", "root": str(root), "base": base, "blob": str(blob or ""), "strict_end": strict_end,
            "allow_absolute": self._allow_absolute,
        }  # fmt: skip
        return msgspec.convert(await self._run(source, job, progress), UnpackResult)

    async def spool(self, source: int, directory: Path, progress: Progress) -> SpoolResult:
        """Keep the members of an outer archive in ``directory``. Errors as ``unpack``'s."""
        return msgspec.convert(await self._run(source, {"kind": "spool", "directory": str(directory)}, progress), SpoolResult)

    async def pack(self, changes: dict[str, Any], blob: Path) -> PackResult:
        """What a container changed (``changes`` says what to compare, see ``worker._sides``) becomes a layer in the file ``blob``.

        Errors: failed_precondition (what no layer can hold), resource_exhausted (limits, disk).
        """
        job = {"kind": "pack", **changes, "blob": str(blob)}
        return msgspec.convert(await self._run(subprocess.DEVNULL, job, _nowhere), PackResult)

    async def diff(self, changes: dict[str, Any], out: int) -> None:
        """It's listed on the descriptor ``out`` (not closed here). Errors: failed_precondition, unavailable (the reader went away)."""
        job = {"kind": "diff", **changes, "out": out, "patience_s": _PATIENCE_S}
        await self._run(subprocess.DEVNULL, job, _nowhere, (out,), self._readers)

    async def _run(
        self,
        source: int,
        job: dict[str, Any],
        progress: Progress,
        fds: tuple[int, ...] = (),
        slots: trio.CapacityLimiter | None = None,
    ) -> dict[str, Any]:
        async with slots or self._slots:
            ours, theirs = -1, -1
            try:
                theirs, ours = os.pipe2(os.O_CLOEXEC)
                job |= {"limits": asdict(self._limits), "lifeline": theirs}
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-I", "-m", "pyx_imaged.worker", json.dumps(job)],
                    stdin=source,
                    stdout=subprocess.PIPE,
                    pass_fds=(theirs, *fds),
                    env={"LANG": "C.UTF-8", "PATH": os.environ.get("PATH", "")},
                )
                os.close(theirs)
                theirs = -1
                return await self._follow(process, progress)
            finally:
                for fd in (ours, theirs):
                    if fd >= 0:
                        os.close(fd)

    async def _follow(self, process: trio.Process, progress: Progress) -> dict[str, Any]:
        assert process.stdout is not None
        answer: dict[str, Any] = {}
        buffer = bytearray()
        try:
            async with process.stdout:
                while data := await process.stdout.receive_some(65536):
                    buffer += data
                    if len(buffer) > _LINE_LIMIT:
                        raise Internal("the worker's answer is too long")
                    *lines, rest = buffer.split(b"\n") if b"\n" in data else (buffer,)
                    buffer = bytearray(rest)
                    for line in lines:
                        message = json.loads(line)
                        if "progress" in message:
                            progress(message["progress"])
                        else:
                            answer = message
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()  # a killed process ends at once
        if "result" in answer:
            return dict(answer["result"])
        if "error" in answer:
            raise BY_CODE.get(answer["error"]["code"], Internal)(answer["error"]["message"])
        raise Internal(f"the worker ended with status {process.returncode} and without an answer")
