"""What imaged knows, in SQLite: images, their names, and the layers that are unpacked.

Schema (version 1):

- ``image``: id (config digest), config (its bytes), manifest (digest or ""), blobs (JSON list of digests), stored_at_ns
- ``image_layer``: image, position (0 = bottom), chain_id
- ``name``: reference (canonical, with a tag or a digest) → image
- ``layer``: chain_id, diff_id, number (its directory), size_bytes, blob, blob_size_bytes, media_type

A row is written after the files it stands for are on the disk, and deleted before they are. Snapshots have no rows: a snapshot is
its directory (see ``disk``). Every method blocks for the disk and is one transaction.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

from .model import ChainID, DiffID, Digest, Image, ImageID, Layer

_MIGRATIONS = (
    """
    CREATE TABLE image (
        id TEXT PRIMARY KEY, config BLOB NOT NULL, manifest TEXT NOT NULL, blobs TEXT NOT NULL, stored_at_ns INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE layer (
        chain_id TEXT PRIMARY KEY, diff_id TEXT NOT NULL, number INTEGER NOT NULL UNIQUE, size_bytes INTEGER NOT NULL,
        blob TEXT NOT NULL, blob_size_bytes INTEGER NOT NULL, media_type TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE image_layer (
        image TEXT NOT NULL REFERENCES image ON DELETE CASCADE, position INTEGER NOT NULL,
        chain_id TEXT NOT NULL REFERENCES layer, PRIMARY KEY (image, position)
    ) WITHOUT ROWID;
    CREATE TABLE name (reference TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES image ON DELETE CASCADE) WITHOUT ROWID;
    """,
)


class Store:
    """One connection, used by one thread at a time (a lock sees to it)."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        path.touch()
        path.chmod(0o600)  # environments of images are in it, and people put secrets there; WAL's files follow its mode
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")

    def close(self) -> None:
        self._db.close()

    def layers(self) -> list[Layer]:
        rows = self._db.execute("SELECT chain_id, diff_id, number, size_bytes, blob, blob_size_bytes, media_type FROM layer")
        return [
            Layer(ChainID(chain), DiffID(diff), number, size, Digest(blob), blob_size, media_type)
            for chain, diff, number, size, blob, blob_size, media_type in rows
        ]

    def images(self) -> list[Image]:
        chains: dict[str, list[ChainID]] = {}
        for image, chain_id in self._db.execute("SELECT image, chain_id FROM image_layer ORDER BY image, position"):
            chains.setdefault(image, []).append(ChainID(chain_id))
        return [
            Image(ImageID(key), config, tuple(chains.get(key, ())), manifest, tuple(map(Digest, json.loads(blobs))), stored)
            for key, config, manifest, blobs, stored in self._db.execute(
                "SELECT id, config, manifest, blobs, stored_at_ns FROM image"
            )
        ]

    def names(self) -> dict[str, ImageID]:
        return {name: ImageID(image) for name, image in self._db.execute("SELECT reference, image FROM name")}

    def put_image(self, image: Image, names: Iterable[str], layers: Iterable[Layer]) -> None:
        """Add (or refresh) an image, layers it's the first to use, and its names (which move here if they were taken)."""
        with self._lock, self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO layer VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (x.chain_id, x.diff_id, x.number, x.size_bytes, x.blob, x.blob_size_bytes, x.media_type)
                    for x in layers
                ],
            )
            self._db.execute(
                "INSERT INTO image VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "manifest = excluded.manifest, blobs = excluded.blobs",
                (image.id, image.config, image.manifest, json.dumps(image.blobs), image.stored_at_ns),
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO image_layer VALUES (?, ?, ?)",
                [(image.id, position, chain_id) for position, chain_id in enumerate(image.layers)],
            )
            self._put_names(image.id, names)

    def put_names(self, image_id: ImageID, names: Iterable[str]) -> None:
        with self._lock, self._transaction():
            self._put_names(image_id, names)

    def _put_names(self, image_id: ImageID, names: Iterable[str]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO name VALUES (?, ?)", [(name, image_id) for name in names])

    def remove(self, names: Iterable[str], images: Iterable[ImageID], layers: Iterable[ChainID]) -> None:
        """Remove names, images, and layers no image needs any more."""
        with self._lock, self._transaction():
            self._db.executemany("DELETE FROM name WHERE reference = ?", [(name,) for name in names])
            self._db.executemany("DELETE FROM image WHERE id = ?", [(image,) for image in images])
            self._db.executemany("DELETE FROM layer WHERE chain_id = ?", [(layer,) for layer in layers])

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK if the block raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:  # the block or COMMIT failed; SQLite ends it by itself for some errors
                self._db.execute("ROLLBACK")
