"""logs: what a container wrote, from logd through a pipe."""

from __future__ import annotations

import os
import select
import time

from ..client import connect, document, mapping, text
from ..demux import Demux
from ..foreground import flush_python_streams, output_pipe
from ..grammar import CliError, Options
from ..values import timestamp_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyx_bus.sync import Connection


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
    return _copy(connection, serial, read, tty)


def _copy(connection: Connection, serial: int, read: int, tty: bool) -> int:
    """Everything from the pipe to our own streams, in batches as they come, until its end and the call's.

    Both are watched: a call that failed may never have come to the pipe.
    """
    demux = Demux()
    poller = select.poll()
    poller.register(read, select.POLLIN)
    poller.register(connection.fileno(), select.POLLIN)
    data = b" "
    answered = False
    while data or not answered:
        if connection.pending() or connection.fileno() in [fd for fd, _ in poller.poll() if fd != read]:
            message = connection.receive()
            if message is not None and message.serial == serial:
                if message.kind == "error":
                    raise message.error()
                answered = True
                poller.unregister(connection.fileno())
            continue
        data = os.read(read, 1 << 18)
        if not data:
            poller.unregister(read)
        for stream, payload in [(1, data)] if tty else demux.feed(data):
            _write(stream, payload)
    os.close(read)
    return 0


def _write(stream: int, payload: bytes) -> None:
    view = memoryview(payload)
    while view:
        try:
            view = view[os.write(stream, view) :]
        except BlockingIOError:  # somebody made our standard output non-blocking
            select.select((), (stream,), ())
