"""Container records on disk: SQLite, WAL, synchronous=FULL.

Schema (``PRAGMA user_version`` 1)::

    containers(id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, record BLOB NOT NULL)

``record`` is the msgpack of ``model.Container``; name and state are beside it for constraints and for people with a sqlite3 shell.
Everything is read once, at start: the service answers from memory. Writes go through one thread, which commits all that wait
together: many containers started at once share an fsync. A returned write is durable.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from pyx_bus import errors

from .model import Container

_SCHEMA = (
    """CREATE TABLE containers(
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, record BLOB NOT NULL) WITHOUT ROWID""",
)


class _Write:
    def __init__(self, statement: str, arguments: tuple[object, ...], done: Callable[[BaseException | None], None]) -> None:
        self.statement = statement
        self.arguments = arguments
        self.done = done


class Store:
    """One database file. ``open`` and ``load`` before the loop runs hot; ``insert``, ``update`` and ``delete`` from trio."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commits = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Container)
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._connection = self._open()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for number in range(version, len(_SCHEMA)):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_SCHEMA[number])
            connection.execute(f"PRAGMA user_version={number + 1}")
            connection.execute("COMMIT")
        return connection

    def load(self) -> list[Container]:
        """Every record, oldest first. Only before the first write."""
        rows = self._connection.execute("SELECT record FROM containers").fetchall()
        return sorted((self._decoder.decode(row[0]) for row in rows), key=lambda container: container.created_at_ns)

    async def insert(self, container: Container) -> None:
        """Errors: already_exists (ID or name)."""
        await self._write(
            "INSERT INTO containers(id, name, state, record) VALUES(?,?,?,?)",
            (container.id, container.name, container.state.value, self._encoder.encode(container)),
        )

    async def update(self, container: Container) -> None:
        """Errors: already_exists (a rename to a name in use). An ID that isn't there is left so."""
        await self._write(
            "UPDATE containers SET name=?, state=?, record=? WHERE id=?",
            (container.name, container.state.value, self._encoder.encode(container), container.id),
        )

    async def delete(self, container_id: str) -> None:
        await self._write("DELETE FROM containers WHERE id=?", (container_id,))

    async def _write(self, statement: str, arguments: tuple[object, ...]) -> None:
        # Shielded: the write happens anyway once it's queued, and the caller must know how it went.
        token = trio.lowlevel.current_trio_token()
        finished = trio.Event()
        outcome: list[BaseException | None] = []

        def done(error: BaseException | None) -> None:
            outcome.append(error)
            try:
                token.run_sync_soon(finished.set)
            except trio.RunFinishedError:
                pass

        self._queue.put(_Write(statement, arguments, done))
        with trio.CancelScope(shield=True):
            await finished.wait()
        error = outcome[0]
        if isinstance(error, sqlite3.IntegrityError):
            raise errors.AlreadyExists("a container with this ID or name exists")
        if isinstance(error, sqlite3.OperationalError):
            raise errors.ResourceExhausted(f"can't write the container store: {error}")
        if error is not None:
            raise error

    def _work(self) -> None:
        ending = False
        while not ending:
            write = self._queue.get()
            batch: list[_Write] = []
            while True:
                if write is None:
                    ending = True
                    break
                batch.append(write)
                try:
                    write = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._commit(batch)
        self._connection.close()

    def _commit(self, batch: list[_Write]) -> None:
        results: list[BaseException | None] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for write in batch:
                try:  # a constraint undoes its own statement only, the others of the batch go on
                    self._connection.execute(write.statement, write.arguments)
                    results.append(None)
                except sqlite3.IntegrityError as error:
                    results.append(error)
            self._connection.execute("COMMIT")
            self.commits += 1
        except Exception as error:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error:
                pass
            results = [error] * len(batch)
        for write, result in zip(batch, results, strict=True):
            write.done(result)

    def close(self) -> None:
        """Write what waits and close the file."""
        self._queue.put(None)
        self._thread.join()
