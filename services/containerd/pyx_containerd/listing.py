"""``ps``: which containers match Docker's filters, and a row for each. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pyx_bus.contract.containerd import ContainerSummary
from pyx_bus.errors import InvalidArgument, NotFound

from .model import Container, HealthStatus, State, resolve
from .status import status_text

_FILTERS_WORDS = """
    id name label status ancestor exited volume network publish expose before since health is-task
"""
FILTERS = frozenset(_FILTERS_WORDS.split())
HEALTH_VALUES = (*HealthStatus, "none")


def select(
    containers: list[Container], filters: dict[str, list[str]], *, all_: bool, limit: int
) -> list[Container]:
    """The matching ones, newest first. Values of one filter are alternatives (labels: all must match), filters add up.

    Without ``all_`` only running ones, unless a filter or ``limit`` speaks of others. Errors: InvalidArgument, NotFound (before,
    since).
    """
    for name in filters:
        if name not in FILTERS:
            raise InvalidArgument(f'invalid filter: "{name}"')
    for state in filters.get("status", []):
        if state not in set(State):
            raise InvalidArgument(f'invalid value for filter "status": "{state}"')
    for value in filters.get("health", []):
        if value not in HEALTH_VALUES:
            raise InvalidArgument(f'invalid value for filter "health": "{value}" ({", ".join(HEALTH_VALUES)})')
    newest = sorted(containers, key=lambda container: container.created_at_ns, reverse=True)
    every = all_ or limit > 0 or bool({"status", "exited", "before", "since"} & filters.keys())
    after = before = None
    if filters.get("since"):
        after = _named(containers, filters["since"][-1]).created_at_ns
    if filters.get("before"):
        before = _named(containers, filters["before"][-1]).created_at_ns
    found = []
    for container in newest:
        if not every and container.state not in (State.RUNNING, State.PAUSED, State.RESTARTING):
            continue
        if after is not None and container.created_at_ns <= after:
            continue
        if before is not None and container.created_at_ns >= before:
            continue
        if all(_matches(container, name, values) for name, values in filters.items()):
            found.append(container)
    return found[:limit] if limit > 0 else found


def _named(containers: list[Container], reference: str) -> Container:
    by_id: dict[str, object] = {container.id: container for container in containers}
    matches = resolve(reference, by_id, {container.name: container.id for container in containers})
    if len(matches) != 1:
        raise NotFound(f'no such container: "{reference}"')
    return next(container for container in containers if container.id == matches[0])


def _matches(container: Container, name: str, values: list[str]) -> bool:
    match name:
        case "id":
            return any(container.id.startswith(value) for value in values)
        case "name":
            return any(_search(value, container.name) or _search(value, "/" + container.name) for value in values)
        case "label":
            return all(_label(container.labels, value) for value in values)
        case "status":
            return container.state.value in values
        case "exited":
            return container.state in (State.EXITED, State.DEAD) and str(container.exit_code) in values
        case "ancestor":
            return any(_ancestor(container, value) for value in values)
        case "volume":
            places = {volume.name for volume in container.attached_volumes} | {v.target for v in container.attached_volumes}
            return any(value in places for value in values)
        case "network":
            names = {container.spec.network}
            if container.sandbox:
                names |= {endpoint.network_id for endpoint in container.sandbox.endpoints}
            return any(value in names for value in values)
        case "publish":
            ports = container.sandbox.ports if container.sandbox else container.spec.ports
            return any(_port(value, port.host_port, port.protocol) for value in values for port in ports)
        case "health":
            return (container.health.status.value if container.health else "none") in values
        case "expose":
            return any((value if "/" in value else value + "/tcp") in container.exposed_ports for value in values)
        case _:
            return True


def _search(pattern: str, text: str) -> bool:
    try:
        return re.search(pattern, text) is not None
    except re.error:
        raise InvalidArgument(f'invalid value for filter "name": "{pattern}"') from None


def _label(labels: dict[str, str], value: str) -> bool:
    key, separator, wanted = value.partition("=")
    return key in labels and (not separator or labels[key] == wanted)


def _ancestor(container: Container, value: str) -> bool:
    image = container.image.id
    if value in (container.spec.image, image, container.image.reference, container.spec.image.removesuffix(":latest")):
        return True
    if container.spec.image == value + ":latest":
        return True
    return len(value) >= 4 and image.removeprefix("sha256:").startswith(value.removeprefix("sha256:"))


def _port(value: str, port: int, protocol: str) -> bool:
    number, _, wanted = value.partition("/")
    first, _, last = number.partition("-")
    if not first.isdigit() or (last and not last.isdigit()):
        raise InvalidArgument(f'invalid port: "{value}"')
    return int(first) <= port <= int(last or first) and (wanted or "tcp") == protocol


def summary(container: Container, now_ns: int) -> ContainerSummary:
    command = " ".join(container.process.args)
    networks: Iterable[str] = [container.spec.network or "bridge"]
    if container.sandbox and container.sandbox.endpoints:
        networks = [endpoint.network for endpoint in container.sandbox.endpoints]
    return ContainerSummary(
        id=container.id,
        name=container.name,
        image=container.spec.image,
        image_id=container.image.id,
        command=command,
        created_ns=container.created_at_ns,
        state=container.state.value,
        status=status_text(container, now_ns),
        ports=list(container.sandbox.ports) if container.sandbox else [],
        exposed_ports=list(container.exposed_ports),
        labels=container.labels,
        mounts=[volume.name or volume.source for volume in container.attached_volumes],
        networks=list(networks),
        health=container.health.status.value if container.health else "",
    )
