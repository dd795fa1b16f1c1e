"""Host ports, reserved for real: a bound socket per published port, so that no other process can take it, nor we one that is in use.

Packets to a published port are DNATed before they would reach the socket; it never answers anything.
"""

from __future__ import annotations

import errno
import resource
import socket
from collections.abc import Iterable
from dataclasses import replace

from pyx_bus.errors import BusError, Conflict, InvalidArgument, PermissionDenied, ResourceExhausted

from ..model import Port


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as the hard limit does: a port is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


_Key = tuple[str, str, int]


def _key(port: Port) -> _Key:
    return port.protocol, port.host_ip, port.host_port


class Reservations:
    """The ports this process holds. One whose socket somebody else got while netd was away is held by name alone."""

    def __init__(self) -> None:
        self._held: dict[_Key, socket.socket | None] = {}

    def __len__(self) -> int:
        return len(self._held)

    def reserve(self, ports: Iterable[Port]) -> tuple[Port, ...]:
        """All of them or none; host port 0 becomes a free one of the ephemeral range.

        Errors: conflict (in use), invalid_argument (not an address of this host), resource_exhausted, permission_denied.
        """
        reserved: list[Port] = []
        try:
            for port in ports:
                if _key(port) in self._held:
                    raise _refusal(port, OSError(errno.EADDRINUSE, "address already in use"))
                bound = _bind(port)
                port = replace(port, host_port=bound.getsockname()[1])
                self._held[_key(port)] = bound
                reserved.append(port)
        except BaseException:
            self.release(reserved)
            raise
        return tuple(reserved)

    def restore(self, ports: Iterable[Port]) -> list[BusError]:
        """Hold again what was reserved before a restart. Whatever comes of it they're held; returns why some have no socket."""
        problems: list[BusError] = []
        for port in ports:
            try:
                self._held[_key(port)] = _bind(port)
            except BusError as error:
                self._held[_key(port)] = None
                problems.append(error)
        return problems

    def release(self, ports: Iterable[Port]) -> None:
        """Idempotent."""
        for port in ports:
            bound = self._held.pop(_key(port), None)
            if bound is not None:
                bound.close()

    def close(self) -> None:
        for bound in self._held.values():
            if bound is not None:
                bound.close()
        self._held.clear()


def _bind(port: Port) -> socket.socket:
    where = (port.host_ip or "0.0.0.0", port.host_port)
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    bound = socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC)
    try:
        try:
            bound.bind(where)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port.protocol != "tcp":
                raise
            # Connections of a server that just ended (TIME_WAIT) are in the way of a plain bind. With SO_REUSEADDR the bind passes
            # them by, and listening is what tells then whether somebody else really has the port.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(where)
            bound.listen(0)
        if port.protocol == "udp":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    except BaseException as error:
        bound.close()
        if isinstance(error, OSError):
            raise _refusal(port, error) from error
        raise
    return bound


def _refusal(port: Port, error: OSError) -> BusError:
    details = {"port": str(port.host_port), "protocol": port.protocol}
    if error.errno == errno.EADDRINUSE:
        return Conflict(
            f"can't publish {port}: port is already allocated",
            hint=f"publish another host port, or see who has it: ss -lnp 'sport = :{port.host_port}'",
            details=details,
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return InvalidArgument(f'can\'t publish {port}: "{port.host_ip}" is not an address of this host', details=details)
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(f"can't publish {port}: {error.strerror}", hint="netd needs CAP_NET_BIND_SERVICE", details=details)
    return ResourceExhausted(f"can't publish {port}: {error.strerror}", details=details)
