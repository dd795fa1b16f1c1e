"""The process that touches hostile archives: ``python -m pyx_imaged.worker``, one job, then the end.

The job is JSON in argv[1]; the archive is standard input (a file, or a pipe: it's read once, from front to back). Standard output
gets JSON lines: ``{"progress": bytes read}`` a few times a second, at last ``{"result": {...}}`` or ``{"error": {...}}``.
The job's ``lifeline`` is a pipe that imaged holds open: when it ends, imaged is gone or has lost interest, and so the worker ends at once.

Job ``unpack``: decompress, digest both ways, extract into ``root`` (chrooted into it first), and keep the bytes as they came in the
file ``blob`` if given. Job ``spool``: keep each member of an outer archive as a numbered file in ``directory``. Job ``pack``: what a
container changed becomes a layer in the file ``blob`` (difference.py, pack.py). Job ``diff``: it's listed on the descriptor ``out``.

One thread reads, digests and decompresses (in C, without the GIL), the other extracts.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import queue
import resource
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from . import decompress, difference, tarstream
from .extract import Extractor, LayerError, LimitError, Limits

_READ = 256 << 10
_LOOK_BYTES = 16 << 20  # between two looks at the free space
_QUEUE = 8  # chunks of up to 1 MiB between the threads

_PROGRESS_S = 0.1
_MEMBERS_LIMIT = 50_000  # of an outer archive: an image has a few hundred
_NAMES_LIMIT = 16 << 20  # bytes of all its names: they're remembered and reported


class Source:
    """Standard input: digested, counted, and copied into the blob file on the way."""

    def __init__(self, fd: int, blob: str, limits: Limits) -> None:
        self._fd = fd
        self._limits = limits
        self._next_look = 0
        self._blob = os.open(blob, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600) if blob else None
        self._head = b""
        self._reported = 0.0
        self.sha256 = hashlib.sha256()
        self.size = 0

    def head(self) -> bytes:
        """The first bytes, without taking them."""
        while len(self._head) < 8:
            data = self._next()
            if not data:
                break
            self._head += data
        return self._head

    def read(self) -> bytes:
        """Some bytes; none at the end."""
        if self._head:
            data, self._head = self._head, b""
            return data
        return self._next()

    def _next(self) -> bytes:
        while True:
            try:
                data = os.read(self._fd, _READ)
                break
            except BlockingIOError:  # somebody made their end non-blocking; it's one open file description
                poller = select.poll()
                poller.register(self._fd, select.POLLIN)
                poller.poll()
        self.sha256.update(data)
        self.size += len(data)
        if self._blob is not None:
            if self.size > self._limits.max_bytes:
                raise LimitError(f"archive of more than {self._limits.max_bytes} bytes")
            if self.size >= self._next_look:  # what comes may be endless without ever giving an entry
                self._next_look = self.size + _LOOK_BYTES
                status = os.fstatvfs(self._blob)
                if status.f_bavail * status.f_frsize < self._limits.min_free_bytes:
                    raise OSError(errno.ENOSPC, "no space left for the archive")
            view = memoryview(data)
            while view:
                view = view[os.write(self._blob, view) :]
        if (now := time.monotonic()) - self._reported > _PROGRESS_S:
            self._reported = now
            say({"progress": self.size})
        return data

    def finish(self) -> None:
        """Read what's left (it belongs to the digest). imaged makes the file durable before it counts."""
        self._head = b""
        while self._next():
            pass
        if self._blob is not None:
            os.close(self._blob)


class Plain:
    """The uncompressed stream, made by a thread of its own; ``take(n)`` gives n bytes, fewer at its end."""

    def __init__(self, source: Source) -> None:
        self.compression = decompress.kind_of(source.head())
        decompress.load(self.compression)  # now: later, behind the chroot, there are no modules
        self.sha256 = hashlib.sha256()
        self.size = 0
        self._source = source
        self._chunks: queue.Queue[bytes | BaseException | None] = queue.Queue(_QUEUE)
        self._current = memoryview(b"")
        self._ended = False
        self._thread = threading.Thread(target=self._produce, daemon=True)
        self._thread.start()

    def _produce(self) -> None:
        try:
            for chunk in decompress.chunks(self.compression, self._source.read):
                self.sha256.update(chunk)
                self.size += len(chunk)
                self._chunks.put(chunk)
            self._source.finish()
            self._chunks.put(None)
        except BaseException as error:
            self._chunks.put(error)

    def _refill(self) -> bool:
        if self._ended:
            return False
        item = self._chunks.get()
        if item is None:
            self._ended = True
            return False
        if isinstance(item, BaseException):
            self._ended = True
            raise item
        self._current = memoryview(item)
        return True

    def take(self, count: int) -> bytes | memoryview:
        if count <= len(self._current):
            data, self._current = self._current[:count], self._current[count:]
            return data
        parts = [self._current]
        have = len(self._current)
        self._current = memoryview(b"")
        while have < count and self._refill():
            part = self._current[: count - have]
            self._current = self._current[len(part) :]
            parts.append(part)
            have += len(part)
        return b"".join(parts)

    def drain(self, limit: int) -> None:
        """Take the rest (padding after the archive's end), at most ``limit`` bytes of it."""
        left = limit - len(self._current)
        while left >= 0 and self._refill():
            left -= len(self._current)
        if left < 0:
            raise LimitError("archive with too much after its end")
        self._thread.join()


def say(message: dict[str, Any]) -> None:
    """A line to imaged. A failure to write means it's gone; the lifeline ends us then."""
    try:
        os.write(1, json.dumps(message).encode() + b"\n")
    except OSError:
        pass


def unpack(job: dict[str, Any]) -> dict[str, Any]:
    """Extract one layer; see the module's head."""
    limits = Limits(**job["limits"])
    source = Source(0, job.get("blob", ""), limits)
    plain = Plain(source)
    root = os.open(job["root"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fchdir(root)
    os.umask(0)
    os.chroot(".")  # a second fence: even a path followed by mistake would end inside the layer
    extractor = Extractor(root, limits, base=job["base"], allow_absolute=job.get("allow_absolute", False))
    try:
        unpacked = extractor.run(plain.take, strict_end=job.get("strict_end", False))
        plain.drain(limits.max_bytes)
    finally:
        extractor.close()
        os.close(root)
    return {
        "digest": "sha256:" + source.sha256.hexdigest(),
        "size": source.size,
        "diff_id": "sha256:" + plain.sha256.hexdigest(),
        "compression": plain.compression,
        "unpacked_size": unpacked.size_bytes,
        "entries": unpacked.entries,
        "implied": [os.fsdecode(path) for path in sorted(unpacked.implied)],
    }


def spool(job: dict[str, Any]) -> dict[str, Any]:
    """Keep the members of an outer archive (docker-archive, OCI layout) as ``directory/<number>``, digested."""
    limits = Limits(**job["limits"])
    plain = Plain(Source(0, "", limits))
    members: list[dict[str, Any]] = []
    total = names = 0
    for entry in tarstream.entries(plain.take, strict_end=True):
        if len(members) >= _MEMBERS_LIMIT:
            raise LimitError(f"image archive with more than {_MEMBERS_LIMIT} members")
        names += len(entry.name) + len(entry.link)
        if names > _NAMES_LIMIT:
            raise LimitError(f"image archive with more than {_NAMES_LIMIT} bytes of names")
        total += entry.size
        if total > limits.max_bytes:
            raise LimitError(f"image archive of more than {limits.max_bytes} bytes")
        member: dict[str, Any] = {"name": os.fsdecode(entry.name), "kind": entry.kind.decode(), "link": os.fsdecode(entry.link)}
        if entry.kind == tarstream.REGULAR and entry.sparse is None:
            digest = hashlib.sha256()
            member |= {"number": len(members), "size": entry.size}
            with open(f"{job['directory']}/{len(members)}", "xb") as file:  # buffered: a raw write may take a part only
                status = os.fstatvfs(file.fileno())
                if status.f_bavail * status.f_frsize - entry.size < limits.min_free_bytes:
                    raise OSError(errno.ENOSPC, "no space left for the archive")
                for data in _data(plain, entry.size):
                    digest.update(data)
                    file.write(data)
            tarstream.exactly(plain.take, entry.padding)
            member["digest"] = "sha256:" + digest.hexdigest()
        elif entry.kind == tarstream.REGULAR:
            raise tarstream.TarError("image archive with sparse members")
        members.append(member)
    plain.drain(limits.max_bytes)
    return {"members": members, "compression": plain.compression}


def _data(plain: Plain, size: int) -> Iterator[bytes | memoryview]:
    while size > 0:
        data = plain.take(min(size, 1 << 20))
        if not data:
            raise tarstream.TarError("truncated tar archive")
        size -= len(data)
        yield data


def _sides(job: dict[str, Any]) -> difference.Sides:
    """Opened; from here on there's nothing to be found by a path: a second fence, as for unpacking."""
    try:
        own = os.open(job["own"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise difference.TreeError("the container was removed meanwhile") from None
    layers = [os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for path in job["layers"]]
    os.chroot(job["empty"])
    os.chdir("/")
    return difference.Sides(own, layers, job["overlay"], job["since_ns"])


def pack_changes(job: dict[str, Any]) -> dict[str, Any]:
    """A container's changes as a layer's blob."""
    from . import pack

    limits = Limits(**job["limits"])
    blob = pack.Blob(job["blob"], limits)
    packer = pack.Packer(blob, limits)
    packer.run(difference.changes(_sides(job), layer=True))
    digest, size = blob.finish()
    return {
        "digest": f"sha256:{digest}",
        "size": size,
        "diff_id": f"sha256:{blob.sha256.hexdigest()}",
        "entries": packer.entries,
        "left_out": packer.left_out,
    }


def list_changes(job: dict[str, Any]) -> dict[str, Any]:
    """``<kind> /<path>`` and a zero byte for each."""
    from . import pack

    out = pack.Pipe(job["out"], job["patience_s"])
    for change in difference.changes(_sides(job), layer=False):
        out.write(f"{change.kind} /".encode() + os.fsencode(change.path) + b"\0")
    out.flush()
    return {}


def _watch(lifeline: int) -> None:
    try:
        while os.read(lifeline, 1):
            pass
    except OSError:
        pass
    os._exit(3)


def main() -> int:
    job = json.loads(sys.argv[1])
    threading.Thread(target=_watch, args=(job["lifeline"],), daemon=True).start()
    gc.disable()  # nothing here makes cycles, and the process is short-lived
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    sys.setswitchinterval(0.0005)  # the extractor's many short calls otherwise keep the other thread waiting
    try:
        result = {"unpack": unpack, "spool": spool, "pack": pack_changes, "diff": list_changes}[job["kind"]](job)
    except (LayerError, tarstream.TarError, decompress.CompressionError) as error:
        say({"error": {"code": "invalid_argument", "message": str(error)}})
    except LimitError as error:
        say({"error": {"code": "resource_exhausted", "message": str(error)}})
    except difference.TreeError as error:
        say({"error": {"code": "failed_precondition", "message": str(error)}})
    except BrokenPipeError:
        say({"error": {"code": "unavailable", "message": "the reader went away, or takes nothing"}})
    except OSError as error:
        code = "resource_exhausted" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE) else "internal"
        say({"error": {"code": code, "message": str(error)}})
        if code == "internal":
            raise
    else:
        say({"result": result})
        return 0
    return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a thread may still hang in a read of an archive nobody wants any more
