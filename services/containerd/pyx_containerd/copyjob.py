"""The process behind cp and export: ``python -m pyx_containerd.copyjob DESCRIPTOR``, its job as JSON on stdin, its answer on stdout.

It leaves the mount namespace it came in, puts the container's root together in its own, and goes through it from its root's descriptor
only (openat2, RESOLVE_IN_ROOT; archive.py): neither the container nor an archive can lead it out.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
import resource
import stat
import sys
from typing import Any

from pyx_bus import archive

from . import kernel
from .errors import KernelError

_CODES = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "invalid_argument",
    errno.ELOOP: "invalid_argument",
    errno.ENAMETOOLONG: "invalid_argument",
    errno.EROFS: "failed_precondition",
    errno.ENOSPC: "resource_exhausted",
    errno.EDQUOT: "resource_exhausted",
    errno.EMFILE: "resource_exhausted",
    errno.EPIPE: "unavailable",
}
_ATTEMPTS = 64  # openat2(2), EAGAIN: something was renamed while ".." was looked up


def open_path(root: int, path: str, flags: int) -> int:
    """As ``kernel.open_in_root``, with OSError."""
    for attempt in range(_ATTEMPTS):
        try:
            return kernel.open_in_root(root, path, flags)
        except KernelError as error:
            if error.errno != errno.EAGAIN or attempt == _ATTEMPTS - 1:
                raise OSError(error.errno, os.strerror(error.errno), path) from None
    raise AssertionError


def enter(job: dict[str, Any]) -> int:
    """The container's root, put together in a mount namespace of our own; its descriptor."""
    kernel.own_mounts()
    place = job["place"]
    if job["mounted"] and _device(job["mounted"]) == job["device"]:
        kernel.mount("bind", job["mounted"], place, ["bind"])
    else:  # not running, or it has just ended
        for mount in job["mounts"]:
            kernel.mount(mount["type"], mount["source"], place, mount.get("options", []))
    root = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if job["kind"] != "export":
        for volume in sorted(job["volumes"], key=lambda volume: str(volume["target"]).count("/")):
            _bind(root, volume["source"], volume["target"], read_only=volume["read_only"])
        for target, source in job["files"].items():
            _bind(root, source, target, read_only=False)
    if job["read_only"]:
        kernel.remount_read_only(place)
    return root


def _device(path: str) -> int:
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1


def _bind(root: int, source: str, target: str, *, read_only: bool) -> None:
    """Where the target isn't there yet, the container was never started: the runtime would make it."""
    try:
        is_directory = stat.S_ISDIR(os.stat(source).st_mode)
        if is_directory:
            kernel.make_directories_in_root(root, target)
        fd = open_path(root, target, os.O_PATH)
    except (OSError, KernelError):
        return  # a file that isn't there on one of the sides
    try:
        kernel.mount("bind", source, f"/proc/self/fd/{fd}", ["rbind"])
    finally:
        os.close(fd)
    if read_only:
        fd = open_path(root, target, os.O_PATH)  # now what is mounted there
        try:
            kernel.remount_read_only(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)


def clean(path: str) -> str:
    """From the root, without ``.`` and ``..`` (as Docker's: by its text)."""
    return "/" + posixpath.normpath("/" + path).lstrip("/")


def locate(root: int, path: str) -> tuple[int, str, str]:
    """(directory, the entry in it, the name in an archive). A link at the end is followed if "/" or "/." say that it's a directory."""
    at = clean(path)
    within = at == "/" or path.endswith("/.") or path == "."
    if within or path.endswith("/"):
        return open_path(root, at, os.O_RDONLY | os.O_DIRECTORY), ".", "." if within else posixpath.basename(at)
    parent, name = posixpath.split(at)
    directory = open_path(root, parent, os.O_RDONLY | os.O_DIRECTORY)
    os.stat(name, dir_fd=directory, follow_symlinks=False)
    return directory, name, name


def tell(root: int, path: str) -> dict[str, Any]:
    directory, name, _ = locate(root, path)
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    target = os.readlink(name, dir_fd=directory) if stat.S_ISLNK(found.st_mode) else ""
    return {
        "name": posixpath.basename(clean(path)) or "/",
        "mode": found.st_mode,
        "size_bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "link_target": target,
    }


def unpack(root: int, path: str, fd: int, *, keep_owner: bool) -> int:
    at = clean(path)
    try:
        os.close(open_path(root, at, os.O_RDONLY | os.O_DIRECTORY))
    except NotADirectoryError:
        raise archive.ArchiveError(f'"{at}" is not a directory') from None

    def open_directory(below: str, make: bool) -> int:
        # Links in the container are followed, as they are for who's inside: /bin may be one to usr/bin.
        try:
            return open_path(root, f"{at}/{below}", os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if not make or not below:
                raise
        parent, name = posixpath.split(below)
        above = open_directory(parent, True)
        try:
            os.mkdir(name, 0o755, dir_fd=above)
        finally:
            os.close(above)
        return open_path(root, f"{at}/{below}", os.O_RDONLY | os.O_DIRECTORY)

    with open(fd, "rb", buffering=0) as source:
        size = archive.unpack(source, open_directory, owner=(0, 0), keep_owner=keep_owner)
        while source.read(1 << 20):  # what follows the archive's end: its writer shall not meet a closed pipe
            pass
    return size


def run(job: dict[str, Any], fd: int) -> dict[str, Any]:
    root = enter(job)
    if job["kind"] == "stat":
        return tell(root, job["path"])
    if job["kind"] == "unpack":
        return {"size_bytes": unpack(root, job["path"], fd, keep_owner=job["keep_owner"])}
    directory, name, arcname = (root, ".", "") if job["kind"] == "export" else locate(root, job["path"])
    with open(fd, "wb") as out:
        archive.pack(out, directory, name, arcname)
    return {}


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one a level of directories
    os.umask(0)
    job = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        answer = {"result": run(job, int(sys.argv[1]))}
    except archive.ArchiveError as error:
        answer = {"error": {"code": "invalid_argument", "message": str(error)}}
    except KernelError as error:
        answer = {"error": {"code": "internal", "message": error.message}}
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else job.get("path", "")
        text = f'"{where}": {(error.strerror or str(error)).lower()}'
        if error.errno == errno.ENOENT:
            text = f"could not find \"{job.get('path', where)}\" in the container"
        answer = {"error": {"code": _CODES.get(error.errno or 0, "internal"), "message": text}}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
