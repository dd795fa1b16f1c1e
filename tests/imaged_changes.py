"""What the tests of diff and commit share: the worker's two jobs on directories, and a layer's tar as Python reads it."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyx_imaged.extract import Limits


def work(kind: str, own: Path, layers: Sequence[Path], *, overlay: bool, since_ns: int = 0, **fields: Any) -> dict[str, Any]:
    """One job in a process of its own, as imaged runs it. ``layers`` are the lowest first."""
    lifeline, ours = os.pipe()
    fds = [lifeline, *([fields["out"]] if "out" in fields else [])]
    empty = own.parent / "nothing"
    empty.mkdir(exist_ok=True)
    job = {
        "kind": kind, "own": str(own), "layers": [str(layer) for layer in reversed(layers)], "overlay": overlay,
        "since_ns": since_ns, "empty": str(empty), "lifeline": lifeline, "limits": asdict(Limits()), **fields,
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-m", "pyx_imaged.worker", json.dumps(job)], pass_fds=fds, stdout=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(lifeline)
        os.close(ours)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def diff(own: Path, layers: Sequence[Path], *, overlay: bool, since_ns: int = 0) -> list[str]:
    """The lines of ``diff``, or its error."""
    out = own.parent / f"diff-{time.monotonic_ns()}"
    with open(out, "xb") as file:
        answer = work("diff", own, layers, overlay=overlay, since_ns=since_ns, out=file.fileno(), patience_s=10)
    if "error" in answer:
        return [f"{answer['error']['code']}: {answer['error']['message']}"]
    return [os.fsdecode(line) for line in out.read_bytes().split(b"\0")[:-1]]


def pack(own: Path, layers: Sequence[Path], blob: Path, *, overlay: bool, since_ns: int = 0) -> dict[str, Any]:
    """The result of packing, or its error."""
    answer = work("pack", own, layers, overlay=overlay, since_ns=since_ns, blob=str(blob))
    return dict(answer.get("result") or answer["error"])


def members(blob: Path) -> dict[str, tarfile.TarInfo]:
    """What's in a layer, in its order. Fails if anything is there twice."""
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(blob.read_bytes()))) as tar:
        found = tar.getmembers()
    assert len({info.name for info in found}) == len(found)
    return {info.name: info for info in found}
