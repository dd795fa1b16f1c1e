"""A netlink socket that sends a batch and reads its acknowledgements, for the messages of rtnl.py, nft.py and conntrack.py."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Sequence

from .. import conntrack, nft, rtnl

_SOL_NETLINK = 270
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 10, 11
_NETLINK_ROUTE, _NETLINK_NETFILTER = 0, 12
_NFNLGRP_NFTABLES = 7
_READ_BYTES = 65536
_SO_SNDBUFFORCE = 32
_TRANSACTION_BYTES = 16 << 20


class NetlinkSocket:
    """One socket, in the network namespace of the thread that made it, for good. Safe for use by several threads.

    The kernel works off a batch inside ``send`` and has queued every answer before it returns, so reading never waits.
    """

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        except BaseException:
            self._socket.close()
            raise
        self._lock = threading.Lock()

    def close(self) -> None:
        self._socket.close()

    def _exchange(self, data: bytes, acknowledged: int, doing: str) -> None:
        """Send a batch, read ``acknowledged`` answers. Raises the first failure as OSError, with the kernel's own words."""
        first: OSError | None = None
        with self._lock:
            self._socket.send(data)
            while acknowledged > 0:
                for _, code, words in rtnl.answers(self._socket.recv(_READ_BYTES)):
                    acknowledged -= 1
                    if code and first is None:
                        first = OSError(code, f"{doing}: {os.strerror(code)}" + (f" ({words})" if words else ""))
        if first is not None:
            raise first


class RouteSocket(NetlinkSocket):
    """rtnetlink."""

    def __init__(self) -> None:
        super().__init__(_NETLINK_ROUTE)

    def run(self, *messages: bytes) -> None:
        """Carry out messages, each acknowledged; a failed one doesn't keep the following from being tried."""
        self._exchange(b"".join(messages), len(messages), "rtnetlink")

    def link_index(self, name: str) -> int:
        """An interface's index in the socket's namespace, whatever the caller's is. Raises OSError (ENODEV)."""
        index = 0
        acknowledged = False
        with self._lock:
            self._socket.send(rtnl.get_link(1, name))
            while not acknowledged:
                data = self._socket.recv(_READ_BYTES)
                index = index or rtnl.link_index(data)
                for _, code, _ in rtnl.answers(data):
                    acknowledged = True
                    if code:
                        raise OSError(code, f'rtnetlink: interface "{name}": {os.strerror(code)}')
        return index


class NetfilterSocket(NetlinkSocket):
    """nfnetlink: nftables transactions and connection tracking."""

    def __init__(self) -> None:
        super().__init__(_NETLINK_NETFILTER)
        # A transaction is one datagram, and with every port of a host published it has megabytes: a bound, not memory taken.
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _TRANSACTION_BYTES)

    def commit(self, changes: Sequence[bytes]) -> None:
        """One nftables transaction; of a failed one nothing stays."""
        if changes:
            # In a transaction that fails, the kernel answers every failed change and may leave out the acknowledgements of the
            # others, so the first failure ends the reading; what else is queued is drained.
            data = nft.batch(list(changes))
            with self._lock:
                self._socket.send(data)
                left = len(changes)
                while left > 0:
                    for _, code, words in rtnl.answers(self._socket.recv(_READ_BYTES)):
                        left -= 1
                        if code:
                            self._drain()
                            raise OSError(code, f"nftables: {os.strerror(code)}" + (f" ({words})" if words else ""))

    def has_table(self, table: str) -> bool:
        """Whether the nftables table exists."""
        with self._lock:
            self._socket.send(nft.get_table(table))
            while True:
                for _, code, words in rtnl.answers(self._socket.recv(_READ_BYTES)):
                    if code and code != errno.ENOENT:
                        raise OSError(code, f"nftables: {os.strerror(code)} {words}")
                    return code == 0

    def _drain(self) -> None:
        try:
            while True:
                self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass

    def forget(self, stale: Sequence[conntrack.Stale]) -> int:
        """Delete the tracked flows that one of ``stale`` covers; returns how many. As slow as the table is big: call it in a thread."""
        chosen: list[conntrack.Flow] = []
        with self._lock:
            self._socket.send(conntrack.dump(1))
            done = False
            while not done:
                flows, done = conntrack.flows(self._socket.recv(_READ_BYTES))
                chosen.extend(flow for flow in flows if any(one.covers(flow) for one in stale))
        gone = 0
        for flow in chosen:
            try:
                self._exchange(conntrack.delete(2, flow), 1, "conntrack")
                gone += 1
            except OSError as error:
                if error.errno != errno.ENOENT:  # expired meanwhile
                    raise
        return gone


class TableWatch:
    """Hears of every deleted nftables table: ``nft flush ruleset`` by an administrator or a restarted firewall takes ours too."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
        try:
            self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def deleted_nowait(self) -> bool:
        """Read what has come; whether a table was deleted, as far as one can know (so much may have come that some was lost)."""
        deleted = False
        while True:
            try:
                deleted = nft.tells_of_deleted_table(self._socket.recv(_READ_BYTES)) or deleted
            except BlockingIOError:
                return deleted
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                deleted = True
