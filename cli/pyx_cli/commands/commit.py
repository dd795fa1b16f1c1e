"""commit and diff: what a container changed, as an image or as a list."""

from __future__ import annotations

import os
import re
import sys

from ..client import connect, text
from ..grammar import Options
from .copy import stream

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def commit(options: Options) -> int:
    body: dict[str, object] = {
        "container": options.args[0],
        "author": options.text("author"),
        "message": options.text("message"),
        "changes": options.list("change"),
        "pause": options.flag("pause", True),
    }
    if len(options.args) > 1:
        body["reference"] = options.args[1]
    print(text(connect(options).call("containerd.commit", body), "id"))
    return 0


def line(record: bytes) -> bytes:
    """``A /path``, one line whatever the container called it: control characters are written as ``\\x1b``."""
    shown = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", record.decode("utf-8", "surrogateescape"))
    return shown.encode("utf-8", "surrogateescape") + b"\n"


def diff(options: Options) -> int:
    connection = connect(options)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)

    def work() -> None:
        rest = b""
        with open(read_end, "rb", buffering=0) as records:
            while data := records.read(1 << 16):
                *whole, rest = (rest + data).split(b"\0")
                sys.stdout.buffer.write(b"".join(map(line, whole)))

    try:
        stream(connection, "containerd.diff", {"container": options.args[0]}, write_end, work)
    finally:
        sys.stdout.flush()
    return 0
