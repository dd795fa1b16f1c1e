"""logd: every byte a container writes.

Data never goes over the bus: the descriptors do. What logd writes into a client's descriptor is framed as Docker's attach and logs
streams are ("multiplexed": one byte 1 = stdout, 2 = stderr; three zero bytes; the payload's length, 32 bits big endian; the payload),
or raw for a container with a terminal.
"""

from __future__ import annotations

from typing import ClassVar

from .base import Empty, Event, Message, Method, Released, Retain


class OpenLog(Message, frozen=True, kw_only=True):
    """Start reading a container's output. Idempotent under (``container_id``, ``run``): a second call with the same ``run`` changes
    nothing if the streams are still being read, and takes up the given descriptors after logd was restarted.

    Descriptors of the request: first the read ends named by ``streams`` (["stdout", "stderr"], or ["tty"] with the pty master), then
    ``attached`` write ends of clients which get everything from the first byte, framed as above. ``run`` counts the container's
    starts. Errors: invalid_argument (unknown driver or option, wrong number of descriptors, a descriptor that isn't what it's said
    to be: streams are pipes or a terminal, clients pipes or sockets), not_implemented (an option that isn't), resource_exhausted.

    Guarantees: a byte read is stored once, whatever instant logd is killed at, if the same ``run`` is opened again with the same
    streams. Each client (of up to 16) that is given again as ``attached``, in any order, goes on where it was; only a kill within
    microseconds of a write to it repeats that write. So whoever opens keeps the clients' descriptors until the run is drained, and
    closes them then. A client's pipe is never made non-blocking (a socket is), nor is a terminal.
    ``options`` of json-file: max-size, max-file. Drivers: json-file, none.
    """

    container_id: str
    run: int
    streams: list[str]
    attached: int = 0
    driver: str = "json-file"
    options: dict[str, str] = {}


class LogOpened(Message, frozen=True, kw_only=True):
    """``path`` of the local log file, for inspect's LogPath; empty for a driver that keeps none."""

    path: str = ""


class AttachLog(Message, frozen=True, kw_only=True):
    """Send what a running container writes from now on to descriptor 0 of the request (a pipe's write end), until it ends or the
    other end is closed. With ``logs`` what was stored comes first, without gap or overlap. Returns as soon as the client is attached.

    A client that doesn't read holds the container's writer back, as in Docker: output is never dropped for an attached client.
    Errors: not_found (no such log), failed_precondition (its streams have ended).
    """

    container_id: str
    logs: bool = False
    stdout: bool = True
    stderr: bool = True


class WaitDrained(Message, frozen=True, kw_only=True):
    """Returns when the streams of that ``run`` have ended, everything is stored, and every attached client has it. An unknown
    container or run counts as drained; one that was being read when logd was killed does only if `OpenLog` doesn't bring its
    streams back within two seconds."""

    container_id: str
    run: int


class ReadLogs(Message, frozen=True, kw_only=True):
    """Write a container's stored log to descriptor 0 of the request (a pipe's write end), framed as above (raw lines if it had a
    terminal), then close it. Returns when everything is written, or the reader went away.

    ``tail`` < 0 means all. ``since_ns`` / ``until_ns`` are Unix times, 0 for none. ``timestamps`` puts RFC 3339 with nanoseconds
    before each line. ``follow`` goes on until the container ends. Errors: not_found, failed_precondition (the driver keeps no log).
    """

    container_id: str
    follow: bool = False
    tail: int = -1
    since_ns: int = 0
    until_ns: int = 0
    timestamps: bool = False
    details: bool = False
    stdout: bool = True
    stderr: bool = True


class RemoveLog(Message, frozen=True, kw_only=True):
    """Stop reading and delete what is stored. Idempotent."""

    container_id: str


OPEN = Method("logd.open", OpenLog, LogOpened, idempotent=True)
ATTACH = Method("logd.attach", AttachLog, Empty)
WAIT_DRAINED = Method("logd.wait_drained", WaitDrained, Empty, idempotent=True)
READ = Method("logd.read", ReadLogs, Empty)  # not for monitors: what a container writes may be anything
REMOVE = Method("logd.remove", RemoveLog, Empty, idempotent=True)
RETAIN = Method("logd.retain", Retain, Released, idempotent=True)


class LogTrouble(Event, frozen=True, kw_only=True):
    """A container's output can't be stored: what it writes from now on may be lost. ``id`` is the container's. Attributes: reason
    (the system's words), driver, container (the ID again, for filters). Told once, when it begins."""

    topic: ClassVar[str] = "log.trouble"

    errno: int = 0


class LogRecovered(Event, frozen=True, kw_only=True):
    """It can be stored again, or there is nothing more to store. Attributes: driver, container, lostBytes."""

    topic: ClassVar[str] = "log.recovered"

    lost_bytes: int = 0


METHODS = (OPEN, ATTACH, WAIT_DRAINED, READ, REMOVE, RETAIN)
EVENTS = (LogTrouble, LogRecovered)
