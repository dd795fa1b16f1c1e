"""``-p`` and ``--expose``: published and exposed ports, in Docker's forms. Pure."""

from __future__ import annotations

from .grammar import CliError

_PROTOCOLS = ("tcp", "udp")


def port_range(text: str, whole: str) -> tuple[int, int]:
    """``80`` or ``8000-8010``: first and last."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise CliError(f"invalid port: {text} in {whole}" if text != whole else f"invalid port: {text}", 125)
    low, high = int(first), int(last) if dash else int(first)
    if not 0 < low <= 65535 or not 0 < high <= 65535:
        raise CliError(f"invalid port: {text}: not within 1-65535", 125)
    if high < low:
        raise CliError(f"invalid range: {text}: the end is smaller than the start", 125)
    return low, high


def _protocol(text: str, whole: str) -> tuple[str, str]:
    port, slash, protocol = text.partition("/")
    protocol = protocol.lower() if slash else "tcp"
    if protocol not in _PROTOCOLS:
        raise CliError(f"invalid proto: {protocol} in {whole}: tcp or udp", 125)
    return port, protocol


def _address(text: str, whole: str) -> str:
    import _socket

    family = _socket.AF_INET6 if ":" in text else _socket.AF_INET
    try:
        _socket.inet_pton(family, text)
    except (OSError, UnicodeEncodeError):
        raise CliError(f"invalid IP address: {text} in {whole}", 125) from None
    return text


def publish(text: str) -> list[dict[str, object]]:
    """``[[ip:][host]:]container[/proto]``, each port perhaps a range: contract PortMapping's fields, one per port.

    ``80`` and ``127.0.0.1::80`` ask for a free host port (0). IPv6 addresses stand in brackets.
    """
    if "=" in text:
        return _long(text)
    rest, protocol = _protocol(text, text)
    host_ip = ""
    if rest.startswith("["):
        host_ip, bracket, rest = rest[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise CliError(f"invalid address: {text}", 125)
        _address(host_ip, text)
        parts = rest[1:].split(":")
        if len(parts) != 2:
            raise CliError(f"invalid publish format: {text}: an address needs ip:host:container or ip::container", 125)
    else:
        parts = rest.rsplit(":", 2)
        if len(parts) == 3:
            if parts[0]:
                host_ip = _address(parts[0], text)
            parts = parts[1:]
    container = parts[-1]
    host = parts[0] if len(parts) == 2 else ""
    if not container:
        raise CliError(f"no port specified: {text}<empty>", 125)
    first, last = port_range(container, text)
    if not host:
        return [_mapping(port, 0, host_ip, protocol) for port in range(first, last + 1)]
    host_first, host_last = port_range(host, text) if host != "0" else (0, 0)
    if host_first == 0:
        return [_mapping(port, 0, host_ip, protocol) for port in range(first, last + 1)]
    if host_last - host_first != last - first:
        raise CliError(f"invalid ranges specified for container and host ports: {container} and {host}", 125)
    return [_mapping(port, host_first + port - first, host_ip, protocol) for port in range(first, last + 1)]


def _long(text: str) -> list[dict[str, object]]:
    """``target=80,published=8080,protocol=tcp``."""
    values = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key not in ("target", "published", "protocol", "mode"):
            raise CliError(f"invalid field key: {key} in {text}", 125)
        values[key] = value
    if not values.get("target"):
        raise CliError(f"missing mandatory field 'target' in {text}", 125)
    published = values.get("published", "")
    return publish(f"{published + ':' if published else ''}{values['target']}/{values.get('protocol', 'tcp')}")


def _mapping(container: int, host: int, host_ip: str, protocol: str) -> dict[str, object]:
    return {"container_port": container, "host_port": host, "host_ip": host_ip, "protocol": protocol}


def expose(text: str) -> list[str]:
    """``80``, ``3000-3005/udp`` → ``80/tcp``, …"""
    if ":" in text:
        raise CliError(f"invalid port format for --expose: {text}", 125)
    port, protocol = _protocol(text, text)
    first, last = port_range(port, text)
    return [f"{number}/{protocol}" for number in range(first, last + 1)]


def merge(mappings: list[dict[str, object]]) -> str:
    """What ``ps`` shows: ``0.0.0.0:8080->80/tcp, [::]:8080->80/tcp``; neighbours joined to ranges as Docker joins them."""
    rows = sorted(
        {
            (
                str(mapping.get("host_ip", "")) or "0.0.0.0",
                str(mapping.get("protocol", "tcp")),
                _int(mapping.get("container_port")),
                _int(mapping.get("host_port")),
            )
            for mapping in mappings
        },
        key=lambda row: (row[2], row[1], row[0], row[3]),
    )
    groups: list[list[tuple[str, str, int, int]]] = []
    for row in rows:
        for group in groups:
            ip, protocol, container, host = group[-1]
            if (ip, protocol) == row[:2] and row[2] == container + 1 and (row[3] == host + 1 if host else not row[3]):
                group.append(row)
                break
        else:
            groups.append([row])
    return ", ".join(_shown(group) for group in groups)


def _shown(group: list[tuple[str, str, int, int]]) -> str:
    ip, protocol, container, host = group[0]
    last_container, last_host = group[-1][2], group[-1][3]
    target = f"{container}/{protocol}" if len(group) == 1 else f"{container}-{last_container}/{protocol}"
    if not host:
        return target
    address = f"[{ip}]" if ":" in ip else ip
    source = f"{host}" if len(group) == 1 else f"{host}-{last_host}"
    return f"{address}:{source}->{target}"


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0
