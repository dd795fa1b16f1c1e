"""events: the broker's journal, in Docker's forms."""

from __future__ import annotations

import os
import select
import stat
import sys
import time

from pyx_bus.errors import Unavailable
from pyx_bus.filters import FIELDS, action_of

from ..client import connect, mapping, text
from ..grammar import CliError, Options
from ..output import renderer, unescape
from ..values import filters, invalid, timestamp_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyx_bus.session import Incoming
    from pyx_bus.sync import Connection
    from pyx_bus.sync_streams import Events

_PATTERNS = (">",)
# Templates see Go's field names (docker's events.Message), the JSON has the API's.
_NAMES = {
    "Status": "status", "ID": "id", "From": "from", "Type": "Type", "Action": "Action", "Actor": "Actor", "Scope": "scope",
    "Time": "time", "TimeNano": "timeNano",
}  # fmt: skip
_ACTOR_NAMES = {"ID": "ID", "Attributes": "Attributes"}
_RECONNECT_S = 30.0  # a restart of the broker takes a fraction of a second; a stack that was stopped doesn't come back
_TELL_AFTER_S = 1.0
_AWAY_LOOK_S = 0.5
_LOOK_S = 0.1
_MANY = 1000  # lines between two looks when there's no pause
_BEAT_S = 0.1  # with --until: how soon the broker says that there's nothing more


def document(topic: str, time_ns: int, payload: dict[str, object]) -> dict[str, object]:
    """Docker's JSON of an event (Engine API, SystemEventsResponse)."""
    kind, action = topic.partition(".")[0], action_of(topic)
    attributes = {str(key): str(value) for key, value in sorted(mapping(payload, "attributes").items())}
    if action.startswith("exec_") and attributes.get("command"):
        action = f"{action}: {attributes.pop('command')}"
    elif action == "health_status" and attributes.get(action):
        action = f"{action}: {attributes.pop(action)}"
    identity = text(payload, "id")
    found: dict[str, object] = {}
    if kind in ("container", "image"):
        found = {"status": action, "id": identity}
        if kind == "container" and attributes.get("image"):
            found["from"] = attributes["image"]
    return {
        **found,
        "Type": kind,
        "Action": action,
        "Actor": {"ID": identity, "Attributes": attributes},
        "scope": "local",
        "time": time_ns // 10**9,
        "timeNano": time_ns,
    }


def line(event: dict[str, object]) -> str:
    """``2024-01-31T12:00:00.123456789+01:00 container start <id> (image=…, name=…)``."""
    time_ns = event["timeNano"]
    assert isinstance(time_ns, int)
    local = time.localtime(time_ns // 10**9)
    zone = time.strftime("%z", local)
    zone = "Z" if zone in ("+0000", "") else zone[:3] + ":" + zone[3:]
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}.{time_ns % 10**9:09d}{zone}"
    actor = mapping(event, "Actor")
    attributes = mapping(actor, "Attributes")
    inside = ", ".join(f"{key}={attributes[key]}" for key in sorted(attributes))
    return f"{stamp} {event['Type']} {event['Action']} {actor.get('ID', '')}" + (f" ({inside})" if inside else "")


def wanted(options: Options) -> dict[str, list[str]] | None:
    """The filters as the broker takes them; None if nothing can pass. Raises ``CliError``."""
    found: dict[str, list[str]] = {}
    for key, values in filters(options.list("filter")).items():
        if "" in values:
            raise CliError(f"invalid filter '{key}=': it has no value", 1)
        field = "event" + key[6:] if key in ("action", "action!") else key
        if field in ("scope", "scope!"):
            if ("local" in values) == field.endswith("!"):
                return None
        elif field.removesuffix("!") in FIELDS:
            found.setdefault(field, []).extend(values)
        else:
            raise CliError(f"invalid filter '{key}'", 1, f"known: {', '.join(FIELDS)}; with != what isn't wanted")
    return found


def _writer(options: Options) -> Callable[[dict[str, object]], str]:
    template = options.text("format")
    if not template:
        return line
    if template == "json":
        from json import dumps

        return lambda event: dumps(event, ensure_ascii=False, separators=(",", ":"))
    if template == "table" or template.startswith(("table ", "table\t", "table\\t", "table{")):
        raise CliError("--format: events come one by one, not as a table", 125, "give a template without the word table, or json")
    from ..template import Struct, Texts

    render = renderer(unescape(template))

    def write(event: dict[str, object]) -> str:
        actor = mapping(event, "Actor")
        attributes = Texts({key: str(value) for key, value in mapping(actor, "Attributes").items()})
        fields: dict[str, object] = {"ID": text(actor, "ID"), "Attributes": attributes}
        return render(Struct(_NAMES, {**event, "Actor": Struct(_ACTOR_NAMES, fields)}))

    return write


def _record(message: Incoming, journal: str) -> str:
    """For programs: all there is, as one line of JSON. A gap is one, too."""
    from json import dumps

    body = message.body
    record = {
        "journal": journal,
        "offset": message.offset,
        "topic": message.topic,
        "source": message.source,
        "time_ns": message.time_ns,
        "payload": body["payload"] if message.kind == "event" else body,
    }
    return dumps(record, ensure_ascii=False, separators=(",", ":"), default=str)


def _since(options: Options, since_ns: int, replay: bool) -> tuple[int | str | None, str]:
    """Where to begin: an offset and maybe its journal, a time, the beginning, or now."""
    given = options.text("since")
    if given == "beginning":
        return given, ""
    if given.startswith("offset:"):
        offset, at, journal = given[7:].partition("@")
        if not offset.isdecimal() or bool(at) != bool(journal):
            raise invalid(given, "--since", "an offset is a number, which @ and its journal may follow")
        return int(offset), journal
    if given:
        return f"@{since_ns}", ""
    # Without a beginning only what comes from now on is wanted, unless the end is in the past.
    return "beginning" if replay else None, ""


def events(options: Options) -> int:
    now_ns = time.time_ns()
    chosen = wanted(options)
    given = options.text("since")
    by_time = given and given != "beginning" and not given.startswith("offset:")
    since_ns = timestamp_ns(given, "--since", now_ns) if by_time else 0
    until_ns = timestamp_ns(options.text("until"), "--until", now_ns) if options.given("until") else 0
    if options.flag("json") and options.text("format"):
        raise CliError("--json and --format exclude each other", 125)
    since, journal = _since(options, since_ns, bool(until_ns and until_ns <= now_ns))
    if chosen is None:
        return 0
    connection = connect(options)
    stream = connection.events(
        *_PATTERNS,
        since=since,
        journal=journal,
        filters=chosen,
        durable=options.text("durable"),
        heartbeat_s=_BEAT_S if until_ns else None,
        auto_ack=False,
        retry_for_s=_TELL_AFTER_S,
    )
    form = _form(options, connection)
    output = _Output(stream if options.text("durable") else None)
    with stream:
        while True:
            message = _receive(stream, connection, output.look_again_s)
            if message is None:
                output.acknowledge()
                continue
            if message.kind == "heartbeat":
                if until_ns and time.time_ns() >= until_ns:
                    break
                continue
            if message.kind == "event":
                stamp = mapping(message.body, "payload").get("time_ns") or message.time_ns
                time_ns = stamp if isinstance(stamp, int) else message.time_ns
                if until_ns and message.time_ns > until_ns and time_ns > until_ns:
                    break
                passes = since_ns <= time_ns and not (until_ns and time_ns > until_ns)
                output.write(form(message, time_ns) if passes else "", message.offset)
            elif options.flag("json"):
                output.write(form(message, message.time_ns), message.offset)
            else:
                sys.stdout.flush()
                sys.stderr.write(_gap(message))
                output.write("", message.offset)
            if message.kind == "gap" and message.body.get("journal"):
                output.forget()
            if not stream.pending():
                output.flush()
        output.finish()
    return 0


def _receive(stream: Events, connection: Connection, timeout_s: float | None) -> Incoming | None:
    """What comes next; None after ``timeout_s`` or when the bus is back. Says once that it's away, raises ``Unavailable`` in the end."""
    try:
        return stream.receive(timeout_s)
    except Unavailable as error:
        last = error
    sys.stdout.flush()
    sys.stderr.write(f"pyx: the bus is away; waiting up to {_RECONNECT_S:.0f} s for it to come back\n")
    sys.stderr.flush()
    give_up = time.monotonic() + _RECONNECT_S - _TELL_AFTER_S
    while time.monotonic() < give_up:
        try:
            message = stream.receive(_AWAY_LOOK_S)
            if message is not None or not connection.closed:
                return message
        except Unavailable as error:
            last = error
    raise last


def _form(options: Options, connection: Connection) -> Callable[[Incoming, int], str]:
    """How an event, with its time, becomes a line."""
    if options.flag("json"):
        return lambda message, _: _record(message, connection.bus_id) + "\n"
    write = _writer(options)
    return lambda message, time_ns: write(document(message.topic, time_ns, mapping(message.body, "payload"))) + "\n"


class _Output:
    """Standard output, and how far a durable subscription has got with it.

    Into a file or a terminal what's written is done. Into a pipe it's done when the reader has taken it out: what lies in the pipe when
    the reader ends would be lost otherwise (pipe(7); FIONREAD tells what is in it).
    """

    def __init__(self, stream: Events | None) -> None:
        self._stream = stream
        self._written = 0
        self._waiting: list[tuple[int, int]] = []  # (bytes written up to and with it, offset)
        self._pipe = stream is not None and stat.S_ISFIFO(os.fstat(1).st_mode)

    @property
    def look_again_s(self) -> float | None:
        """When to look whether the reader has taken more; None if nobody has to."""
        return _LOOK_S if self._waiting else None

    def write(self, line: str, offset: int) -> None:
        sys.stdout.write(line)
        if self._stream is not None:
            self._written += len(line.encode())
            self._waiting.append((self._written, offset))
            if len(self._waiting) >= _MANY:
                self.flush()

    def flush(self) -> None:
        sys.stdout.flush()
        self.acknowledge()

    def forget(self) -> None:
        """Another journal: the offsets of what waits mean nothing in it."""
        sys.stdout.flush()
        self._waiting.clear()

    def acknowledge(self) -> None:
        if self._stream is None or not self._waiting:
            return
        taken = self._written - (_unread(1) if self._pipe else 0)
        done = 0
        while done < len(self._waiting) and self._waiting[done][0] <= taken:
            done += 1
        if done:
            self._stream.ack(self._waiting[done - 1][1])
            del self._waiting[:done]

    def finish(self) -> None:
        """Until the reader has taken everything, or is gone."""
        self.flush()
        poller = select.poll()
        poller.register(1, 0)  # POLLERR alone: the reader's end was closed
        while self._waiting and not poller.poll(int(_LOOK_S * 1000)):
            self.acknowledge()


def _unread(fd: int) -> int:
    """Bytes in a pipe (ioctl_pipe(2), FIONREAD)."""
    from fcntl import ioctl
    from termios import FIONREAD

    return int.from_bytes(ioctl(fd, FIONREAD, bytes(4)), sys.byteorder)


def _gap(message: Incoming) -> str:
    body = message.body
    if body.get("journal"):
        return "pyx: the broker has begun a new journal: what was published meanwhile may be lost\n"
    return f"pyx: up to {body['lost']} events were lost, offsets {body['first_offset']} to {body['last_offset']}: they're no longer kept\n"
