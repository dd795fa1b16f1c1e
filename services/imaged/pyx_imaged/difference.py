"""What a container changed: its own layer, or its whole tree, against the image's layers below. Runs in the worker process only.

Theory of operation. Both sides are walked together, one directory at a time, by descriptors (O_NOFOLLOW): a link is never followed,
whoever made it. A directory of the image is the sum of its parts in the layers (``Below``), put together as overlayfs does. What
is a change is Docker's rule (moby, pkg/archive/changes.go): type, mode, owner, device number, capability, and of anything but
directories size and time; a directory with a change inside is changed itself. An overlay's own layer holds
nothing but what was touched, so no more than that is looked at; a plain copy is compared as a whole.

The tree may change meanwhile: what vanishes is left out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from . import kernel

ADDED, CHANGED, DELETED, SAME = "A", "C", "D", ""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PATH_LIMIT = 4096  # bytes: what a layer's reader takes, and the kernel in one call
_COMPARE = 1 << 20
_CAPABILITY = "security.capability"
_REDIRECT, _METACOPY = "trusted.overlay.redirect", "trusted.overlay.metacopy"
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

# What the runtime makes to mount something on, unless the image has it. Docker hides these in a layer of their own. Directories
# count as soon as there's something in them, files as soon as they aren't empty.
_MOUNT_POINTS = frozenset((
    "dev", "dev/console", "dev/mqueue", "dev/pts", "dev/shm", "etc", "etc/hostname", "etc/hosts", "etc/resolv.conf", "proc",
    "sbin/docker-init", "sys",
))  # fmt: skip


class TreeError(ValueError):
    """There is something that can't be told of, or kept, as it is. The message is for people."""


@dataclass(slots=True)
class Change:
    """``path`` has no slash in front ("" is the root); ``name`` in the open ``directory`` is the same thing, until the next one is asked
    for. ``opaque``: a directory that hides the image's. ``status`` is the container's, of what's deleted the image's."""

    path: str
    kind: str
    status: os.stat_result
    directory: int
    name: str
    opaque: bool = False


@dataclass(frozen=True, slots=True)
class _Found:
    """Something in a directory of the image: where it lies, and for a directory what's in it (to be closed)."""

    status: os.stat_result
    directory: int
    below: Below | None = None


class Below:
    """A directory as the image has it: that of every layer with a part in it, topmost first. Owns the descriptors."""

    __slots__ = ("fds",)

    def __init__(self, fds: Sequence[int]) -> None:
        self.fds = fds

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = ()

    def child(self, name: str) -> _Found | None:
        first: _Found | None = None
        parts: list[int] = []
        for fd in self.fds:
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(status.st_mode):  # a whiteout or a file: what's further down doesn't count
                if first is None and not kernel.is_whiteout(status):
                    first = _Found(status, fd)
                break
            parts.append(os.open(name, _DIRECTORY, dir_fd=fd))
            first = first or _Found(status, fd)
            if kernel.is_opaque(parts[-1]):
                break
        return _Found(first.status, first.directory, Below(parts)) if first is not None and parts else first

    def names(self) -> set[str]:
        found: set[str] = set()
        hidden: set[str] = set()
        for fd in self.fds:
            here: set[str] = set()
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.name in found or entry.name in hidden:
                        continue
                    plain = entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False) or entry.is_symlink()
                    if not plain and kernel.is_whiteout(entry.stat(follow_symlinks=False)):
                        hidden.add(entry.name)
                    else:
                        here.add(entry.name)
            found |= here
        return found


@dataclass(slots=True)
class _Level:
    """A directory on the way. ``pending`` is the change that it is itself as soon as something in it is told."""

    fd: int
    path: str
    size: int
    below: Below | None
    names: Iterator[str]
    pending: Change | None
    hidden: bool

    def close(self) -> None:
        os.close(self.fd)
        if self.below is not None:
            self.below.close()


@dataclass(frozen=True, slots=True)
class Sides:
    """What is compared: the open directory ``own``, and those of ``layers``, topmost first; all stay the caller's.

    ``overlay``: ``own`` is in overlayfs's form, the changes alone; else it's a whole tree, which was copied before ``since_ns``: what
    wasn't touched afterwards is as it was.
    """

    own: int
    layers: Sequence[int]
    overlay: bool
    since_ns: int = 0


def changes(sides: Sides, *, layer: bool) -> Iterator[Change]:
    """Every change, a directory before what's in it, names in order.

    ``layer``: what a layer must hold to make the image's tree the container's, and not only what counts as a change. That's also
    what's in an overlay's own layer without any difference (``SAME``; the end of a hard link, say), and the root if it's changed. Of an
    opaque directory everything is new.
    Errors: TreeError, OSError.
    """
    yield from _Walk(sides, layer).run()


class _Walk:
    def __init__(self, sides: Sides, layer: bool) -> None:
        self._sides, self._layer = sides, layer
        self._stack: list[_Level] = []

    def run(self) -> Iterator[Change]:
        sides = self._sides
        below = Below([os.dup(fd) for fd in sides.layers])
        status = os.fstat(sides.own)
        if self._layer and self._root_differs(status):
            yield Change("", CHANGED, status, sides.own, ".")
        self._enter(os.open(".", _DIRECTORY, dir_fd=sides.own), "", 0, below, None, hidden=False)
        try:
            while self._stack:
                name = next(self._stack[-1].names, None)
                if name is None:
                    self._stack.pop().close()
                    continue
                change = self._look(self._stack[-1], name)
                if change is not None:
                    yield from self._waiting()
                    yield change
        finally:
            while self._stack:
                self._stack.pop().close()

    def _waiting(self) -> Iterator[Change]:
        """The directories on the way here that haven't been told yet."""
        for level in self._stack:
            pending, level.pending = level.pending, None
            if pending is not None:
                yield pending

    def _enter(self, fd: int, path: str, size: int, below: Below | None, pending: Change | None, *, hidden: bool) -> None:
        names: Collection[str] = os.listdir(fd)
        if below is not None and (hidden or not self._sides.overlay):
            names = below.names().union(names)
        self._stack.append(_Level(fd, path, size, below, iter(sorted(names)), pending, hidden))

    def _look(self, level: _Level, name: str) -> Change | None:
        """What's to be told of one name; a directory is entered."""
        path = f"{level.path}/{name}" if level.path else name
        size = level.size + len(os.fsencode(name)) + 1
        if size > _PATH_LIMIT:
            raise TreeError(f'the container has a path of more than {_PATH_LIMIT} bytes, which begins with "{printable(path[:80])}"')
        before = level.below.child(name) if level.below is not None else None
        inside = before.below if before is not None else None
        child = -1
        try:
            status = self._status(level.fd, name)
            if status is None:
                if before is None:
                    return None
                return Change(path, DELETED, before.status, level.fd, name)
            if stat.S_ISDIR(status.st_mode):
                try:
                    child = os.open(name, _DIRECTORY, dir_fd=level.fd)
                except OSError as error:
                    if error.errno in _GONE:
                        return None
                    raise
                change = self._directory(level, path, size, name, child, before)
                child, inside = -1, None
                return change
            return self._other(level, path, name, status, before)
        finally:
            if child >= 0:
                os.close(child)
            if inside is not None:
                inside.close()

    def _status(self, directory: int, name: str) -> os.stat_result | None:
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return None if kernel.is_whiteout(status) else status  # in a plain tree, too: no layer could hold such a device

    def _directory(self, level: _Level, path: str, size: int, name: str, child: int, before: _Found | None) -> Change | None:
        """Enter it. It's told now if it's changed itself, else with the first change inside."""
        status, inside = os.fstat(child), before.below if before is not None else None
        opaque = False
        if self._sides.overlay:
            if _attribute(child, _REDIRECT) is not None:
                raise TreeError(f'the directory "/{printable(path)}" is kept by reference to another one (overlayfs\'s redirect_dir)')
            opaque = inside is not None and kernel.is_opaque(child)
        kind = ADDED if before is None else CHANGED if _differ(before.status, status) else SAME
        if kind == SAME and self._layer and inside is not None and self._touched(status):
            kind = CHANGED if attributes(child) != attributes(inside.fds[0]) else SAME
        later = (kind == ADDED and path in _MOUNT_POINTS) or (kind == SAME and not (opaque and self._layer))
        change = Change(path, kind if kind != SAME else CHANGED, status, level.fd, name, opaque)
        if opaque and self._layer and inside is not None:
            inside.close()
            inside = None
        hidden = level.hidden or opaque
        self._enter(child, path, size, inside, change if later else None, hidden=hidden)
        return None if later else change

    def _other(self, level: _Level, path: str, name: str, status: os.stat_result, before: _Found | None) -> Change | None:
        if before is None:
            if path in _MOUNT_POINTS and stat.S_ISREG(status.st_mode) and status.st_size == 0:
                return None
            return Change(path, ADDED, status, level.fd, name)
        if _differ(before.status, status) or self._differ_inside(level.fd, name, status, before):
            return Change(path, CHANGED, status, level.fd, name)
        if self._layer and self._sides.overlay:
            return Change(path, SAME, status, level.fd, name)
        return None

    def _touched(self, status: os.stat_result) -> bool:
        return self._sides.overlay or status.st_ctime_ns >= self._sides.since_ns

    def _differ_inside(self, directory: int, name: str, status: os.stat_result, before: _Found) -> bool:
        """Where everything else is the same: the capability, and in a plain tree all the rest, since time and size can be set back."""
        if not self._touched(status):
            return False
        try:
            if stat.S_ISLNK(status.st_mode):
                return os.readlink(name, dir_fd=directory) != os.readlink(name, dir_fd=before.directory)
            if not stat.S_ISREG(status.st_mode):
                return False
            fd, old = os.open(name, _FILE, dir_fd=directory), -1
            try:
                old = os.open(name, _FILE, dir_fd=before.directory)
                if _attribute(fd, _CAPABILITY) != _attribute(old, _CAPABILITY):
                    return True
                return not self._sides.overlay and (attributes(fd) != attributes(old) or not _same_content(fd, old))
            finally:
                os.close(fd)
                if old >= 0:
                    os.close(old)
        except OSError as error:
            if error.errno in (*_GONE, errno.EINVAL):
                return True  # something else by now
            raise

    def _root_differs(self, status: os.stat_result) -> bool:
        if not self._sides.layers:
            return (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) != (0o755, 0, 0)
        top = self._sides.layers[0]
        return _differ(os.fstat(top), status) or attributes(self._sides.own) != attributes(top)


def _differ(old: os.stat_result, new: os.stat_result) -> bool:
    if (old.st_mode, old.st_uid, old.st_gid, old.st_rdev) != (new.st_mode, new.st_uid, new.st_gid, new.st_rdev):
        return True
    return not stat.S_ISDIR(new.st_mode) and (old.st_size != new.st_size or not _same_time(old.st_mtime_ns, new.st_mtime_ns))


def _same_time(one_ns: int, other_ns: int) -> bool:
    """Layers may come with whole seconds only."""
    (seconds, fraction), (other_seconds, other_fraction) = divmod(one_ns, 10**9), divmod(other_ns, 10**9)
    return seconds == other_seconds and (fraction == other_fraction or not fraction or not other_fraction)


def _same_content(one: int, other: int) -> bool:
    while True:
        data = os.read(one, _COMPARE)
        if data != os.read(other, _COMPARE):
            return False
        if not data:
            return True


def _attribute(fd: int, name: str) -> bytes | None:
    try:
        return os.getxattr(fd, name)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def attributes(fd: int) -> dict[str, bytes]:
    """The extended attributes that belong into a layer: capability, access lists, the users' own. Errors: TreeError, OSError."""
    found: dict[str, bytes] = {}
    try:
        names = os.listxattr(fd)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return found
        raise
    for name in names:
        if name == _METACOPY:
            raise TreeError("the container has a file that is kept in two parts (overlayfs's metacopy)")
        wanted = name == _CAPABILITY or name.startswith(("user.", "system.posix_acl_"))
        if wanted and not name.startswith("user.overlay.") and (value := _attribute(fd, name)) is not None:
            found[name] = value
    return found


def printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
