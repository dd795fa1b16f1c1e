"""Container records on disk: SQLite, WAL, synchronous=FULL.

Schema (``PRAGMA user_version`` 1)::

    containers(id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, record BLOB NOT NULL)

``record`` is the msgpack of ``model.Container``; name and state are beside it for constraints and for people with a sqlite3 shell.
Everything is read once, at start: the service answers from memory. Writes go through one thread, which commits all that wait
together: many containers started at once share an fsync. A returned write is durable.

The file system may be full just when something happens that can't be refused: a container ends, say. What ``update`` and ``delete``
can't write is *kept*: as a file of its ID in ``kept``, a directory that outlives the process (not the boot: after that no container runs
as its row says, anyhow), and written again each second, before anything newer. A restarted service reads those files over the rows. A file
is the msgpack of the record, or of nil for a row to delete; what is neither (the power went) says nothing. If not even that can be
written, it's in memory, and ``until_kept`` waits.
"""

from __future__ import annotations

import contextvars
import enum
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from pyx_bus import errors

from .model import Container

RETRY_S = 1.0  # between two attempts at what couldn't be written

_SCHEMA = (
    """CREATE TABLE containers(
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, record BLOB NOT NULL) WITHOUT ROWID""",
)


_UPDATE = "UPDATE containers SET name=?, state=?, record=? WHERE id=?"
_DELETE = "DELETE FROM containers WHERE id=?"

_NIL = b"\xc0"

_log = logging.getLogger(__name__)

Done = Callable[[BaseException | None], None]


class _Signal(enum.Enum):
    RETRY = enum.auto()
    END = enum.auto()


class _Write:
    """``kept_id``: the ID under which it's kept if it can't be written, "" if it's refused then; ``content`` is its file's."""

    def __init__(
        self, statement: str, arguments: tuple[object, ...], kept_id: str = "", content: bytes = b"", done: Done = lambda _: None
    ) -> None:
        self.statement = statement
        self.arguments = arguments
        self.kept_id = kept_id
        self.content = content
        self.done = done


class Store:
    """One database file, and the directory ``kept`` (beside it if not given) for what can't be written to it.

    ``load`` before the loop runs hot; the rest from trio."""

    def __init__(self, path: Path, kept: Path | None = None) -> None:
        self.path = path
        self.kept = kept or path.with_name(path.name + ".kept")
        self.kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.commits = 0
        self._pending: dict[str, _Write] = {}  # the thread's, once that has something to do
        self._unsaved: set[str] = set()  # of those, what has no file
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Container)
        self._queue: queue.SimpleQueue[_Write | _Signal] = queue.SimpleQueue()
        self._connection = self._open()
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._work,), name="store", daemon=True)
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
        rows: dict[str, Container] = {}
        for (data,) in self._connection.execute("SELECT record FROM containers"):
            container = self._decoder.decode(data)
            rows[container.id] = container
        for place in sorted(self.kept.iterdir()):
            if place.name not in rows:  # it was never made, or is deleted, or a file that was just being written
                place.unlink()
                continue
            try:
                found = msgspec.msgpack.decode(place.read_bytes(), type=Container | None)
            except msgspec.DecodeError as error:
                _log.error("what was kept of the row of %s can't be read: %s", place.name, error)
                place.unlink()
                continue
            if found is not None:
                rows[place.name] = found
                self._pending[place.name] = self._updating(found)
            else:
                del rows[place.name]
                self._pending[place.name] = self._deleting(place.name)
        if self._pending:
            self._queue.put(_Signal.RETRY)
        return sorted(rows.values(), key=lambda container: container.created_at_ns)

    async def insert(self, container: Container) -> None:
        """Errors: already_exists (ID or name), resource_exhausted."""
        record = self._encoder.encode(container)
        statement = "INSERT INTO containers(id, name, state, record) VALUES(?,?,?,?)"
        await self._write(_Write(statement, (container.id, container.name, container.state.value, record)))

    async def rename(self, container: Container) -> None:
        """Write a record with another name, or leave all as it was. Errors: already_exists, resource_exhausted."""
        write = self._updating(container)
        write.kept_id = ""
        await self._write(write)

    async def update(self, container: Container) -> None:
        """Write what has happened. An ID that isn't there is left so.

        Errors: resource_exhausted: it can't even be kept in a file; it's still written once that's possible."""
        await self._write(self._updating(container))

    async def delete(self, container_id: str) -> None:
        """Errors: as ``update``'s."""
        await self._write(self._deleting(container_id))

    def is_kept(self, container_id: str) -> bool:
        """Whether what has happened to it is in a file, so that a restarted service knows."""
        return container_id not in self._unsaved

    async def until_kept(self, container_id: str) -> None:
        while not self.is_kept(container_id):  # noqa: ASYNC110  the thread tries that often
            await trio.sleep(RETRY_S)

    def _updating(self, container: Container) -> _Write:
        record = self._encoder.encode(container)
        return _Write(_UPDATE, (container.name, container.state.value, record, container.id), container.id, record)

    @staticmethod
    def _deleting(container_id: str) -> _Write:
        return _Write(_DELETE, (container_id,), container_id, _NIL)

    async def _write(self, write: _Write) -> None:
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

        write.done = done
        self._queue.put(write)
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
            batch: list[_Write] = []
            try:
                found = self._queue.get(timeout=RETRY_S if self._pending else None)
                while True:
                    if isinstance(found, _Write):
                        batch.append(found)
                    elif found is _Signal.END:
                        ending = True
                        break
                    found = self._queue.get_nowait()
            except queue.Empty:
                pass
            if batch or self._pending:
                self._commit(batch)
        self._connection.close()

    def _commit(self, batch: list[_Write]) -> None:
        results: list[BaseException | None] = []
        try:
            if self._pending:
                self._write_pending()
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
            results = [error if self._keep(write, error) else None for write in batch]
            for container_id in list(self._unsaved):
                self._save(self._pending[container_id])
        for write, result in zip(batch, results, strict=True):
            write.done(result)

    def _write_pending(self) -> None:
        """In a transaction of its own: a file must be gone before anything newer is written, or a restart could take it for newer."""
        self._connection.execute("BEGIN IMMEDIATE")
        for write in self._pending.values():
            try:
                self._connection.execute(write.statement, write.arguments)
            except sqlite3.IntegrityError as error:  # all others would wait for ever
                _log.error("the row of %s can't be written: %s", write.kept_id, error)
        self._connection.execute("COMMIT")
        _log.warning("written what the container store had no room for: %d", len(self._pending))
        for container_id in self._pending:
            (self.kept / container_id).unlink(missing_ok=True)
        self._pending.clear()
        self._unsaved.clear()

    def _keep(self, write: _Write, error: Exception) -> bool:
        """Keep what couldn't be written. True if whoever asked for it must be told that it failed."""
        if not write.kept_id:
            return True
        if not self._pending:
            _log.warning("can't write the container store, trying again until it works: %s", error)
        self._pending.pop(write.kept_id, None)
        self._pending[write.kept_id] = write
        return not self._save(write)

    def _save(self, write: _Write) -> bool:
        place = self.kept / write.kept_id
        new = place.with_name(place.name + ".new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                written = os.write(fd, write.content)
            finally:
                os.close(fd)
            if written < len(write.content):
                raise OSError(f"only {written} of {len(write.content)} bytes were written")
            new.rename(place)
        except OSError as error:
            new.unlink(missing_ok=True)
            if write.kept_id not in self._unsaved:
                _log.warning("nor keep the row of %s beside it: %s", write.kept_id, error)
            self._unsaved.add(write.kept_id)
            return False
        self._unsaved.discard(write.kept_id)
        return True

    def close(self) -> None:
        """Write what waits and close the file."""
        self._queue.put(_Signal.END)
        self._thread.join()
