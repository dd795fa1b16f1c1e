"""logs: what a container wrote, from logd through a pipe."""

from __future__ import annotations

import os
import time

from ..client import connect, document, mapping, text
from ..demux import Demux
from ..foreground import flush_python_streams, output_pipe
from ..grammar import CliError, Options
from ..values import timestamp_ns


def logs(options: Options) -> int:
    now_ns = time.time_ns()
    body: dict[str, object] = {}
    tail = options.text("tail", "all")
    if tail != "all":
        if not tail.lstrip("-").isdecimal():
            raise CliError(f'invalid argument "{tail}" for "-n, --tail" flag: a number of lines, or all')
        if int(tail) >= 0:
            body["tail"] = int(tail)
    for flag in ("since", "until"):
        if options.given(flag):
            try:
                body[f"{flag}_ns"] = max(1, timestamp_ns(options.text(flag), f"--{flag}", now_ns))
            except CliError as error:
                error.status = 1
                raise
    for flag in ("follow", "timestamps", "details"):
        if options.flag(flag):
            body[flag] = True
    connection = connect(options)
    found = document(connection.call("containerd.inspect", {"container": options.args[0]}))
    body["container_id"] = text(found, "Id")
    tty = bool(mapping(found, "Config").get("Tty"))
    flush_python_streams()
    read, write = output_pipe()
    try:
        serial = connection.open("logd.read", body, (write,))
    finally:
        os.close(write)
    _copy(read, tty)
    while True:
        message = connection.receive()
        if message is None or message.serial != serial:
            continue
        if message.kind == "error":
            raise message.error()
        return 0


def _copy(read: int, tty: bool) -> None:
    """Everything from the pipe to our own streams, in batches as they come."""
    demux = Demux()
    while data := os.read(read, 1 << 18):
        for stream, payload in [(1, data)] if tty else demux.feed(data):
            view = memoryview(payload)
            while view:
                try:
                    view = view[os.write(stream, view) :]
                except BlockingIOError:  # somebody made our standard output non-blocking
                    import select

                    select.select((), (stream,), ())
    os.close(read)
