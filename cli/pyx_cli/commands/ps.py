"""ps and port."""

from __future__ import annotations

import sys
import time

from .. import ports
from ..client import connect, document, items, mapping, number, text, texts
from ..grammar import CliError, Options
from ..output import Listing, ago, created_at, labels_text, short_id
from ..values import filters

_LISTING = Listing(
    {
        "ID": "CONTAINER ID", "Image": "IMAGE", "Command": "COMMAND", "CreatedAt": "CREATED AT", "RunningFor": "CREATED",
        "Status": "STATUS", "State": "STATE", "Ports": "PORTS", "Names": "NAMES", "Labels": "LABELS", "Mounts": "MOUNTS",
        "LocalVolumes": "LOCAL VOLUMES", "Networks": "NETWORKS",
    },
    ("ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names"),
    shrink=("Image", "Command", "Ports", "Status"),
)  # fmt: skip


def ps(options: Options) -> int:
    wanted = filters(options.list("filter"))
    body: dict[str, object] = {}
    limit = 1 if options.flag("latest") else max(0, options.number("last", -1))
    if options.flag("all") or limit or "status" in wanted or "exited" in wanted:
        body["all"] = True
    if limit:
        body["limit"] = limit
    if wanted:
        body["filters"] = wanted
    containers = items(connect(options).call("containerd.list", body), "containers")
    now_ns = time.time_ns()
    trunc = not options.flag("no-trunc")
    rows = [_row(container, now_ns, trunc) for container in containers]
    _LISTING.print(options, rows)
    return 0


def _row(container: dict[str, object], now_ns: int, trunc: bool) -> dict[str, str]:
    command = text(container, "command")
    labels = mapping(container, "labels")
    mounts = texts(container, "mounts")
    created_ns = number(container, "created_ns")
    image = text(container, "image")
    if image.startswith("sha256:") and trunc:
        image = short_id(image)
    identity = text(container, "id")
    return {
        "ID": identity[:12] if trunc else identity,
        "Image": image,
        "Command": f'"{command[:19] + "…" if trunc and len(command) > 20 else command}"',
        "CreatedAt": created_at(created_ns),
        "RunningFor": ago(created_ns, now_ns),
        "Status": text(container, "status"),
        "State": text(container, "state"),
        "Ports": _ports(container),
        "Names": text(container, "name"),
        "Labels": labels_text(labels),
        "Mounts": ",".join(mount[:14] + "…" if trunc and len(mount) > 15 else mount for mount in mounts),
        "LocalVolumes": str(sum(not mount.startswith("/") for mount in mounts)),
        "Networks": ",".join(texts(container, "networks")),
    }


def _ports(container: dict[str, object]) -> str:
    published = items(container, "ports")
    taken = {f"{port.get('container_port')}/{port.get('protocol', 'tcp')}" for port in published}
    rows: list[dict[str, object]] = [*published]
    for port in texts(container, "exposed_ports"):
        word, _, protocol = port.partition("/")
        if word.isdecimal() and f"{word}/{protocol or 'tcp'}" not in taken:
            rows.append({"container_port": int(word), "protocol": protocol or "tcp"})
    return ports.merge(rows)


def port(options: Options) -> int:
    """Host addresses of published ports, from the inspect document's NetworkSettings.Ports."""
    found = document(connect(options).call("containerd.inspect", {"container": options.args[0]}))
    published = mapping(mapping(found, "NetworkSettings"), "Ports")
    wanted = ""
    if len(options.args) > 1:
        word, _, protocol = options.args[1].partition("/")
        wanted = f"{word}/{protocol or 'tcp'}"
    lines = []
    for target in sorted(published, key=lambda name: (name.partition("/")[0].zfill(5), name)):
        if wanted and target != wanted:
            continue
        for binding in items(published, target):
            host = text(binding, "HostIp") or "0.0.0.0"
            address = f"[{host}]:{text(binding, 'HostPort')}" if ":" in host else f"{host}:{text(binding, 'HostPort')}"
            lines.append(f"{address}\n" if wanted else f"{target} -> {address}\n")
    if wanted and not lines:
        raise CliError(f"no public port '{options.args[1]}' published for {options.args[0]}")
    sys.stdout.write("".join(lines))
    return 0
