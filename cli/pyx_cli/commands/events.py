"""events: the broker's journal, in Docker's forms."""

from __future__ import annotations

import sys
import time

from pyx_bus.filters import FIELDS, action_of

from ..client import connect, mapping, text
from ..grammar import CliError, Options
from ..output import renderer, unescape
from ..values import filters, timestamp_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyx_bus.session import Incoming

_PATTERNS = (">",)
_RECONNECT_S = 30.0  # a restart of the broker takes a fraction of a second; a stack that was stopped doesn't come back
_BEAT_S = 0.1  # with --until: how soon the broker says that there's nothing more


def document(topic: str, time_ns: int, payload: dict[str, object]) -> dict[str, object]:
    """Docker's JSON of an event (Engine API, SystemEventsResponse)."""
    kind, action = topic.partition(".")[0], action_of(topic)
    attributes = {str(key): str(value) for key, value in mapping(payload, "attributes").items()}
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
    render = renderer(unescape(template))
    names = {"status": "Status", "id": "ID", "from": "From", "scope": "Scope", "time": "Time", "timeNano": "TimeNano"}
    # Templates see Go's field names, the JSON has the API's.
    empty = {"ID": "", "Status": "", "From": ""}
    return lambda event: render({**empty, **event, **{names.get(key, key): value for key, value in event.items()}})


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


def _since(options: Options, since_ns: int, replay: bool) -> int | str | None:
    """Where to begin: an offset, a time, the beginning, or now."""
    given = options.text("since")
    if given == "beginning":
        return given
    if given.startswith("offset:"):
        if not given[7:].isdecimal():
            raise CliError(f'invalid argument "{given}" for "--since": an offset is a number')
        return int(given[7:])
    if given:
        return f"@{since_ns}"
    # Without a beginning only what comes from now on is wanted, unless the end is in the past.
    return "beginning" if replay else None


def events(options: Options) -> int:
    now_ns = time.time_ns()
    chosen = wanted(options)
    given = options.text("since")
    by_time = given and given != "beginning" and not given.startswith("offset:")
    since_ns = timestamp_ns(given, "--since", now_ns) if by_time else 0
    until_ns = timestamp_ns(options.text("until"), "--until", now_ns) if options.given("until") else 0
    if options.flag("json") and options.text("format"):
        raise CliError("--json and --format exclude each other")
    since = _since(options, since_ns, bool(until_ns and until_ns <= now_ns))
    if chosen is None:
        return 0
    connection = connect(options)
    stream = connection.events(
        *_PATTERNS,
        since=since,
        filters=chosen,
        durable=options.text("durable"),
        heartbeat_s=_BEAT_S if until_ns else None,
        auto_ack=False,  # only what has been written is done
        retry_for_s=_RECONNECT_S,
    )
    write = _writer(options)
    as_records = options.flag("json")
    with stream:
        while True:
            message = stream.receive()
            if message is None or (message.kind == "heartbeat" and time.time_ns() >= until_ns):
                return 0
            if message.kind == "heartbeat":
                continue
            if message.kind == "event":
                payload = mapping(message.body, "payload")
                stamp = payload.get("time_ns") or message.time_ns
                time_ns = stamp if isinstance(stamp, int) else message.time_ns
                if until_ns and message.time_ns > until_ns and time_ns > until_ns:
                    return 0
                if since_ns <= time_ns and not (until_ns and time_ns > until_ns):
                    if as_records:
                        sys.stdout.write(_record(message, connection.bus_id) + "\n")
                    else:
                        sys.stdout.write(write(document(message.topic, time_ns, payload)) + "\n")
            elif as_records:
                sys.stdout.write(_record(message, connection.bus_id) + "\n")
            else:
                sys.stdout.flush()
                sys.stderr.write(_gap(message))
            if not stream.pending():
                sys.stdout.flush()
                stream.ack(message.offset)


def _gap(message: Incoming) -> str:
    body = message.body
    if body.get("journal"):
        return "pyx: the broker has begun a new journal: what was published meanwhile may be lost\n"
    return f"pyx: up to {body['lost']} events were lost, offsets {body['first_offset']} to {body['last_offset']}: they're no longer kept\n"
