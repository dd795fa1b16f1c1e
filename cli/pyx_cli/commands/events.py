"""events: the broker's journal, in Docker's forms."""

from __future__ import annotations

import sys
import time

from ..client import connect, mapping, text
from ..grammar import CliError, Options
from ..output import renderer, unescape
from ..values import filters, timestamp_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyx_bus.session import Incoming

_PATTERNS = ["container.>", "image.>", "network.>", "volume.>", "log.>", "service.>"]
_RECONNECT_S = 30.0  # a restart of the broker takes a fraction of a second; a stack that was stopped doesn't come back
_QUIET_S = 0.25  # with --until in the past: this long without a further kept event means there is none


def document(topic: str, time_ns: int, payload: dict[str, object]) -> dict[str, object]:
    """Docker's JSON of an event (Engine API, SystemEventsResponse)."""
    kind, *words = topic.split(".")
    action = "_".join(words)  # "container.exec.start" is Docker's "exec_start"
    attributes = {str(key): str(value) for key, value in mapping(payload, "attributes").items()}
    if action.startswith("exec_") and attributes.get("command"):
        action = f"{action}: {attributes.pop('command')}"
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


def matches(event: dict[str, object], wanted: dict[str, list[str]]) -> bool:
    """Docker's filters: values of one key are alternatives, keys all have to hold."""
    actor = mapping(event, "Actor")
    attributes = mapping(actor, "Attributes")
    kind, action, identity = str(event["Type"]), str(event["Action"]), str(actor.get("ID", ""))
    for key, values in wanted.items():
        if key == "type":
            ok = kind in values
        elif key in ("event", "action"):
            ok = any(action == value or action.startswith(value + ":") for value in values)
        elif key == "label":
            ok = all(_label(attributes, value) for value in values)
        elif key in ("container", "network", "volume", "image", "service"):
            names = [identity, str(attributes.get("name", ""))]
            if key == "image" and kind == "container":
                names = [str(attributes.get("image", ""))]
            elif kind != key and not (key == "container" and attributes.get("container")):
                return False
            elif kind != key:
                names = [str(attributes["container"])]
            ok = any(value in names or (len(value) >= 4 and identity.startswith(value)) for value in values)
        elif key == "scope":
            ok = "local" in values
        else:
            raise CliError(f"invalid filter '{key}'")
        if not ok:
            return False
    return True


def _label(attributes: dict[str, object], wanted: str) -> bool:
    key, equals, value = wanted.partition("=")
    return key in attributes and (not equals or attributes[key] == value)


def _writer(options: Options) -> Callable[[dict[str, object]], str]:
    template = options.text("format")
    if not template:
        return line
    if template == "json":
        from json import dumps

        return lambda event: dumps(event, ensure_ascii=False, separators=(",", ":"))
    render = renderer(unescape(template))
    names = {"status": "Status", "id": "ID", "from": "From", "scope": "Scope", "time": "Time", "timeNano": "TimeNano"}
    # Templates see Go's field names, the JSON has the API's.
    empty = {"ID": "", "Status": "", "From": ""}
    return lambda event: render({**empty, **event, **{names.get(key, key): value for key, value in event.items()}})


def events(options: Options) -> int:
    now_ns = time.time_ns()
    wanted = filters(options.list("filter"))
    since_ns = timestamp_ns(options.text("since"), "--since", now_ns) if options.given("since") else 0
    until_ns = timestamp_ns(options.text("until"), "--until", now_ns) if options.given("until") else 0
    write = _writer(options)
    # A time in the past is found in what the journal keeps; without one only what comes from now on is wanted.
    replay = bool(options.given("since") or (until_ns and until_ns <= now_ns))
    journal = _Journal(options, "beginning" if replay else None)
    while True:
        timeout_s = None
        if until_ns:
            timeout_s = max((until_ns - time.time_ns()) / 1e9, _QUIET_S)
        message = journal.receive(timeout_s)
        if message is None:
            return 0
        if message.kind == "gap":
            sys.stderr.write("pyx: some events were lost: this command didn't keep up, or they're no longer kept\n")
            continue
        if message.kind != "event":
            continue
        payload = mapping(message.body, "payload")
        stamp = payload.get("time_ns") or message.body.get("time_ns") or 0
        time_ns = stamp if isinstance(stamp, int) else 0
        if time_ns < since_ns:
            continue
        if until_ns and time_ns > until_ns:
            if time_ns > now_ns or not replay:
                return 0
            continue
        event = document(message.topic, time_ns, payload)
        if matches(event, wanted):
            sys.stdout.write(write(event) + "\n")
            if not journal.pending():
                sys.stdout.flush()


class _Journal:
    """A subscription that outlives the broker: it goes on at the next offset, or with everything a new journal has."""

    def __init__(self, options: Options, since: int | str | None) -> None:
        self._options = options
        self._connection = connect(options)
        self._connection.subscribe(_PATTERNS, since)
        self._bus_id = self._connection.bus_id
        self._next = since

    def pending(self) -> bool:
        return self._connection.pending()

    def receive(self, timeout_s: float | None) -> Incoming | None:
        from pyx_bus.errors import Unavailable

        while True:
            try:
                message = self._connection.receive(timeout_s)
            except Unavailable:
                sys.stdout.flush()
                self._reconnect()
                continue
            if message is not None and message.kind in ("event", "gap"):
                self._next = message.offset + 1
            return message

    def _reconnect(self) -> None:
        """Raises CliError if the broker stays away for longer than a restart takes."""
        from pyx_bus.errors import Unavailable

        give_up = time.monotonic() + _RECONNECT_S
        while True:
            try:
                self._connection = connect(self._options)
                if self._connection.bus_id != self._bus_id:  # offsets of another journal mean nothing here
                    self._bus_id, self._next = self._connection.bus_id, "beginning"
                self._connection.subscribe(_PATTERNS, self._next)
                return
            except (CliError, Unavailable):
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.05)  # between two looks at whether the broker listens again
