"""What volumed keeps: ``<root>/volumed.db`` (SQLite, WAL, synchronous=FULL), and a directory per volume (see `drivers.local`).

Schema, version 1 (``PRAGMA user_version``):

    volumes     (name PRIMARY KEY, driver, created_ns, labels JSON, options JSON)
    references_ (container_id, target, volume → volumes, since_ns; PRIMARY KEY (container_id, target))

A volume exists when its row does. All is read once, at the start; afterwards only changes touch the database, each one transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pyx_bus.errors import FailedPrecondition, ResourceExhausted

from .model import VolumeRecord

_VERSION = 1
_SCHEMA = """
CREATE TABLE volumes (
  name TEXT PRIMARY KEY, driver TEXT NOT NULL, created_ns INTEGER NOT NULL, labels TEXT NOT NULL, options TEXT NOT NULL
) STRICT;
CREATE TABLE references_ (
  container_id TEXT NOT NULL, target TEXT NOT NULL, volume TEXT NOT NULL REFERENCES volumes(name), since_ns INTEGER NOT NULL,
  PRIMARY KEY (container_id, target)
) STRICT;
CREATE INDEX references_volume ON references_(volume);
"""


@dataclass(frozen=True, slots=True)
class Reference:
    """A container has the volume mounted at ``target``."""

    container_id: str
    target: str
    volume: str
    since_ns: int


class Store:
    """Blocking; one thread at a time."""

    def __init__(self, path: Path) -> None:
        path.touch()
        path.chmod(0o600)  # passwords of network file systems are among the options; WAL's files follow its mode
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise FailedPrecondition(f'"{path}" is of a newer version ({version}, we know {_VERSION})')
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_VERSION}; COMMIT;")

    def load(self) -> tuple[list[VolumeRecord], list[Reference]]:
        volumes = [
            VolumeRecord(name, driver, created_ns, json.loads(labels), json.loads(options))
            for name, driver, created_ns, labels, options in self._db.execute(
                "SELECT name, driver, created_ns, labels, options FROM volumes ORDER BY name"
            )
        ]
        rows = self._db.execute("SELECT container_id, target, volume, since_ns FROM references_")
        return volumes, [Reference(*row) for row in rows]

    def change(
        self,
        *,
        add: Iterable[VolumeRecord] = (),
        refer: Iterable[Reference] = (),
        release: Iterable[Reference] = (),
        remove: Iterable[str] = (),
    ) -> None:
        """All or nothing, and on the disk when it returns. Errors: resource_exhausted (disk full)."""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany(
                "DELETE FROM references_ WHERE container_id = ? AND target = ?", [(r.container_id, r.target) for r in release]
            )
            db.executemany("DELETE FROM volumes WHERE name = ?", [(name,) for name in remove])
            db.executemany(
                "INSERT INTO volumes VALUES (?, ?, ?, ?, ?)",
                [(v.name, v.driver, v.created_ns, json.dumps(v.labels), json.dumps(v.options)) for v in add],
            )
            db.executemany(
                "INSERT OR REPLACE INTO references_ VALUES (?, ?, ?, ?)",
                [(r.container_id, r.target, r.volume, r.since_ns) for r in refer],
            )
            db.execute("COMMIT")
        except BaseException as error:
            if db.in_transaction:  # SQLite ends it by itself for some errors
                db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise ResourceExhausted("no space left where volumes are kept", hint="remove volumes or images") from error
            raise

    def close(self) -> None:
        self._db.close()
