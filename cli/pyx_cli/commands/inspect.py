"""inspect, of one kind of object or of whatever has the name."""

from __future__ import annotations

import sys

from ..client import connect, document, error_line
from ..grammar import CliError, Options
from ..output import formatted, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyx_bus.sync import Connection

# In the order in which a bare name is looked for.
_KINDS = {
    "container": ("containerd.inspect", "container"),
    "image": ("imaged.inspect", "reference"),
    "network": ("netd.inspect", "network"),
    "volume": ("volumed.inspect", "name"),
}


def containers(options: Options) -> int:
    return _inspect(options, ("container",))


def images(options: Options) -> int:
    return _inspect(options, ("image",))


def networks(options: Options) -> int:
    return _inspect(options, ("network",))


def volumes(options: Options) -> int:
    return _inspect(options, ("volume",))


def any_(options: Options) -> int:
    kind = options.text("type")
    if kind and kind not in _KINDS:
        raise CliError(f'"{kind}" is not a valid value for --type', 1, "container, image, network or volume")
    return _inspect(options, (kind,) if kind else tuple(_KINDS))


def _find(connection: Connection, options: Options, kinds: Sequence[str], name: str) -> dict[str, object]:
    from pyx_bus.errors import InvalidArgument, NotFound

    for kind in kinds:
        method, field = _KINDS[kind]
        body: dict[str, object] = {field: name}
        if kind == "image" and options.given("platform"):
            body["platform"] = options.text("platform")
        try:
            return document(connection.call(method, body))
        except NotFound:
            if len(kinds) == 1:
                raise
        except InvalidArgument:
            # "Db" can't be an image's name, but may be a volume's; with one kind alone it's the answer.
            if len(kinds) == 1 or kind == "container":
                raise
    raise NotFound(f'no such object: "{name}"')


def _inspect(options: Options, kinds: Sequence[str]) -> int:
    from pyx_bus.errors import NotFound

    connection = connect(options)
    found, complaints = [], []
    for name in options.args:
        try:
            found.append(_find(connection, options, kinds, name))
        except NotFound as error:
            complaints.append(error)
    template = options.text("format")
    if template:
        for one in found:
            sys.stdout.write(f"{formatted(options, one)}\n")
    else:
        print_json(found)
    sys.stdout.flush()
    for complaint in complaints:
        sys.stderr.write(error_line(complaint))
    return 1 if complaints else 0
