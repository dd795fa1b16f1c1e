"""Networks: ls."""

from __future__ import annotations

from ..client import connect, items, mapping, number, text
from ..grammar import Options
from ..output import Listing, created_at, labels_text
from ..values import filters

_LISTING = Listing(
    {
        "ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Scope": "SCOPE", "IPv6": "IPV6", "Internal": "INTERNAL",
        "Labels": "LABELS", "CreatedAt": "CREATED AT",
    },
    ("ID", "Name", "Driver", "Scope"),
)  # fmt: skip


def ls(options: Options) -> int:
    wanted = filters(options.list("filter"))
    networks = items(connect(options).call("netd.list", {"filters": wanted} if wanted else {}), "networks")
    rows = [
        {
            "ID": text(network, "id") if options.flag("no-trunc") else text(network, "id")[:12],
            "Name": text(network, "name"),
            "Driver": text(network, "driver"),
            "Scope": text(network, "scope") or "local",
            "IPv6": "true" if network.get("ipv6") else "false",
            "Internal": "true" if network.get("internal") else "false",
            "Labels": labels_text(mapping(network, "labels")),
            "CreatedAt": created_at(number(network, "created_ns")),
        }
        for network in networks
    ]
    _LISTING.print(options, sorted(rows, key=lambda row: row["Name"]))
    return 0
