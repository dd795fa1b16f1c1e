"""Volumes: create, ls, rm."""

from __future__ import annotations

from ..client import connect, each, items, mapping, number, text
from ..grammar import CliError, Options
from ..output import Listing, created_at, labels_text
from ..values import filters, key_values, options_map

_LISTING = Listing(
    {
        "Driver": "DRIVER", "Name": "VOLUME NAME", "Scope": "SCOPE", "Mountpoint": "MOUNTPOINT", "Labels": "LABELS",
        "Links": "LINKS", "Size": "SIZE", "CreatedAt": "CREATED AT",
    },
    ("Driver", "Name"),
    key="Name",
)  # fmt: skip


def create(options: Options) -> int:
    name = options.text("name")
    if options.args:
        if name:
            raise CliError("conflicting options: either specify --name or provide positional arg, not both")
        name = options.args[0]
    body: dict[str, object] = {}
    if name:
        body["name"] = name
    if options.given("driver"):
        body["driver"] = options.text("driver")
    if options.given("opt"):
        body["driver_options"] = options_map(options.list("opt"), "-o, --opt")
    if options.given("label"):
        body["labels"] = key_values(options.list("label"))
    print(text(connect(options).call("volumed.create", body), "name"))
    return 0


def ls(options: Options) -> int:
    wanted = filters(options.list("filter"))
    volumes = items(connect(options).call("volumed.list", {"filters": wanted} if wanted else {}), "volumes")
    rows = [
        {
            "Driver": text(volume, "driver") or "local",
            "Name": text(volume, "name"),
            "Scope": "local",
            "Mountpoint": text(volume, "mountpoint"),
            "Labels": labels_text(mapping(volume, "labels")),
            "Links": str(number(volume, "references")),
            "Size": "N/A",
            "CreatedAt": created_at(number(volume, "created_ns")),
        }
        for volume in volumes
    ]
    _LISTING.print(options, sorted(rows, key=lambda row: row["Name"]))
    return 0


def remove(options: Options) -> int:
    connection = connect(options)
    force = options.flag("force")

    def one(name: str) -> None:
        connection.call("volumed.remove", {"name": name, "force": force})

    return each(options, one, options.args)
