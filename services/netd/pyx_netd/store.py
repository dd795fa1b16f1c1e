"""What netd keeps on disk, in two SQLite files, because two things with different lives are kept.

``<root>/netd.sqlite`` outlives the boot: the networks (ID, name, subnet once picked). WAL with synchronous=FULL: what was reported as
done survives a power loss.

    network(id TEXT PRIMARY KEY, name TEXT UNIQUE, driver, created_ns INTEGER, subnet, gateway, labels TEXT JSON)

``<run>/attachments-<boot id>.sqlite`` dies with the boot, as the namespaces it speaks of do; the boot's ID in the name makes sure of
it even where the run directory is on a disk. So nothing needs to reach the disk before a container's start goes on
(synchronous=OFF): a killed process loses nothing of it, and a power loss ends the boot.

    attachment(container_id TEXT PRIMARY KEY, network_id, endpoint_id, container_name, netns, netns_inode INTEGER,
               created_ns INTEGER, address, mac, host_interface, ports TEXT JSON)
    cursor(id INTEGER PRIMARY KEY CHECK (id = 0), address INTEGER)     the address given last

``PRAGMA user_version`` is the schema's version; a newer one than this program knows is refused.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

from pyx_bus.errors import FailedPrecondition, ResourceExhausted

from .model import Attachment, Network, Port

_VERSION = 1

_NETWORKS = """
CREATE TABLE IF NOT EXISTS network (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, driver TEXT NOT NULL, created_ns INTEGER NOT NULL,
    subnet TEXT NOT NULL, gateway TEXT NOT NULL, labels TEXT NOT NULL
) STRICT
"""

_ATTACHMENTS = """
CREATE TABLE IF NOT EXISTS attachment (
    container_id TEXT PRIMARY KEY, network_id TEXT NOT NULL, endpoint_id TEXT NOT NULL, container_name TEXT NOT NULL,
    netns TEXT NOT NULL, netns_inode INTEGER NOT NULL, created_ns INTEGER NOT NULL, address TEXT NOT NULL, mac TEXT NOT NULL,
    host_interface TEXT NOT NULL, ports TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cursor (id INTEGER PRIMARY KEY CHECK (id = 0), address INTEGER NOT NULL) STRICT
"""


def _open(path: Path, schema: str, synchronous: str) -> sqlite3.Connection:
    # The loop and its worker threads both use the store, never at the same time: service.py's locks order them.
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute(f"PRAGMA synchronous={synchronous}")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        db.close()
        raise FailedPrecondition(
            f'"{path}" was written by a newer version (schema {version}, this one knows {_VERSION})',
            hint="upgrade, or use another data directory",
        )
    db.executescript(f"BEGIN; {schema}; PRAGMA user_version={_VERSION}; COMMIT")
    return db


class NetworkStore:
    """The networks. Writes return once they are durable."""

    def __init__(self, root: Path) -> None:
        self._db = _open(root / "netd.sqlite", _NETWORKS, "FULL")

    def close(self) -> None:
        self._db.close()

    def load(self) -> list[Network]:
        rows = self._db.execute(
            "SELECT id, name, driver, created_ns, subnet, gateway, labels FROM network ORDER BY created_ns, name"
        )
        return [
            Network(
                id=id_, name=name, driver=driver, created_ns=created_ns, subnet=subnet, gateway=gateway, labels=json.loads(labels)
            )
            for id_, name, driver, created_ns, subnet, gateway, labels in rows
        ]

    def save(self, network: Network) -> None:
        """Insert or replace by ID."""
        self._db.execute(
            "INSERT OR REPLACE INTO network VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                network.id, network.name, network.driver, network.created_ns, network.subnet, network.gateway,
                json.dumps(network.labels),
            ),
        )  # fmt: skip


class AttachmentStore:
    """The attachments of this boot."""

    def __init__(self, run: Path, boot_id: str) -> None:
        path = run / f"attachments-{boot_id}.sqlite"
        for old in run.glob("attachments-*"):
            if not old.name.startswith(path.name):
                old.unlink(missing_ok=True)
        self._db = _open(path, _ATTACHMENTS, "OFF")

    def close(self) -> None:
        self._db.close()

    def load(self) -> list[Attachment]:
        found = self._db.cursor()
        found.row_factory = sqlite3.Row
        # The columns are named as the fields are.
        rows = [dict(row) for row in found.execute("SELECT * FROM attachment ORDER BY created_ns")]
        return [Attachment(**{**row, "ports": tuple(Port(**port) for port in json.loads(row["ports"]))}) for row in rows]

    def cursor(self) -> int:
        """The number of the address given last; 0 if none was."""
        row = self._db.execute("SELECT address FROM cursor").fetchone()
        return int(row[0]) if row else 0

    def add(self, attachment: Attachment, cursor: int) -> None:
        """Commit an attachment, and with it the number of the address given last (0: leave it). Errors: resource_exhausted."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute(
                "INSERT OR REPLACE INTO attachment VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    attachment.container_id, attachment.network_id, attachment.endpoint_id, attachment.container_name,
                    attachment.netns, attachment.netns_inode, attachment.created_ns, attachment.address, attachment.mac,
                    attachment.host_interface, json.dumps([asdict(port) for port in attachment.ports]),
                ),
            )  # fmt: skip
            if cursor:
                self._db.execute("INSERT OR REPLACE INTO cursor VALUES (0, ?)", (cursor,))
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:  # SQLite ends it by itself for some errors
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise ResourceExhausted("no space left in the run directory") from error
            raise

    def remove(self, container_id: str) -> None:
        """Forget an attachment. Idempotent."""
        self._db.execute("DELETE FROM attachment WHERE container_id = ?", (container_id,))
