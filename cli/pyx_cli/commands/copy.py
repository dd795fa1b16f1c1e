"""cp and export: tar streams between a container and files here, by Docker's rules on names (moby, pkg/archive/copy.go)."""

from __future__ import annotations

import os
import stat
import sys

from ..client import connect, number, text
from ..grammar import CliError, Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyx_bus.sync import Connection


def split(argument: str) -> tuple[str, str]:
    """(container, path); no container if it's a path here: "-", one that begins with a dot or a slash, or has no colon."""
    if argument.startswith(("/", ".")) or argument == "-":
        return "", argument
    container, colon, path = argument.partition(":")
    return (container, path) if colon and container else ("", argument)


def asserts_directory(path: str) -> bool:
    return path.endswith(("/", "/.")) or path == "."


def split_entry(path: str) -> tuple[str, str]:
    """(directory, entry): as of a cleaned path, but the "." of "dir/." stays the entry."""
    cleaned = os.path.normpath(path)
    if path == "." or path.endswith("/."):
        return cleaned, "."
    parent, base = os.path.split(cleaned)
    return parent or ".", base


def target(path: str, exists: bool, is_directory: bool, source_base: str, source_is_directory: bool) -> tuple[str, str]:
    """Where to unpack, and what the source's first component is to be called there. Docker's table of cases."""
    parent, base = split_entry(path)
    if exists and is_directory:
        return path, source_base
    if exists and source_is_directory:
        raise CliError("cannot copy directory")
    if not exists and not source_is_directory and asserts_directory(path):
        raise CliError("no such directory")
    return parent, base


def _stat(connection: Connection, container: str, path: str) -> dict[str, object] | None:
    """None if it isn't there."""
    from pyx_bus.errors import NotFound

    try:
        return connection.call("containerd.stat", {"container": container, "path": path})
    except NotFound:
        connection.call("containerd.inspect", {"container": container})  # says so if it's the container that isn't there
        return None


def _linked(path: str, found: dict[str, object]) -> str:
    """Where a link in the container leads."""
    return os.path.normpath(os.path.join(os.path.split(os.path.normpath("/" + path))[0], text(found, "link_target")))


def stream(connection: Connection, method: str, body: dict[str, object], fd: int, work: Callable[[], None] | None) -> dict[str, object]:
    """Make the call with ``fd`` (closed here), do our side of the pipe, and wait for the result, whose error comes first."""
    from pyx_bus.archive import ArchiveError

    try:
        serial = connection.open(method, body, [fd])
    finally:
        os.close(fd)
    failure: Exception | None = None
    if work is not None:
        try:
            work()
        except (ArchiveError, OSError) as error:  # theirs may be the cause: they let go of the pipe
            failure = error
    while True:
        message = connection.receive(None)
        assert message is not None
        if message.serial != serial:
            continue
        if message.kind == "error":
            refusal = message.error()
            if failure is not None and refusal.code == "unavailable":
                break  # we let go of it
            raise refusal
        if failure is None:
            return message.body
        break
    assert failure is not None
    if isinstance(failure, ArchiveError):
        raise CliError(str(failure))
    raise failure


def cp(options: Options) -> int:
    (source_container, source), (container, path) = (split(argument) for argument in options.args)
    if source_container and container:
        raise CliError("copying between containers is not supported")
    if not source_container and not container:
        raise CliError("must specify at least one container source")
    connection = connect(options)
    keep = options.flag("archive")
    if source_container:
        size, shown = _from(connection, source_container, source, path, options.flag("follow-link"), keep)
    else:
        size, shown = _to(connection, source, container, path, options.flag("follow-link"), keep)
    if path != "-" and not options.flag("quiet"):
        from ..output import human_size

        sys.stderr.write(f"Successfully copied {human_size(size)} to {shown}\n")
    return 0


def _from(connection: Connection, container: str, source: str, path: str, follow: bool, keep: bool) -> tuple[int, str]:
    found = _stat(connection, container, source)
    if found is None:
        raise CliError(f"could not find the file {source} in container {container}")
    name = split_entry("/" + source)[1]  # what it's called here, wherever a link leads
    if follow and stat.S_ISLNK(number(found, "mode")):
        source = _linked(source, found)
        found = _stat(connection, container, source)
        if found is None:
            raise CliError(f"could not find the file {source} in container {container}")
    body: dict[str, object] = {"container": container, "path": source}
    if path == "-":
        if os.isatty(1):
            raise CliError("refusing to write an archive to a terminal: redirect it")
        stream(connection, "containerd.copy_from", body, os.dup(1), None)
        return 0, ""
    is_directory = stat.S_ISDIR(number(found, "mode"))
    base = os.path.basename(os.path.normpath("/" + source)) if not asserts_directory(source) or source.endswith("/") else "."
    base = base or "."  # of the root
    directory, new = target(path, os.path.exists(path), os.path.isdir(path), name or ".", is_directory)
    try:
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise CliError(f'invalid output path: directory "{directory}" does not exist') from None
    from pyx_bus import archive

    size = 0
    read, write = os.pipe2(os.O_CLOEXEC)

    def work() -> None:
        nonlocal size
        with open(read, "rb", buffering=0) as tar:
            size = archive.unpack(tar, _below(place), keep_owner=keep, rename=(base, new) if base != new else ("", ""))

    stream(connection, "containerd.copy_from", body, write, work)
    return size, os.path.abspath(path)


def _below(place: int) -> Callable[[str, bool], int]:
    """Opens directories below ``place``, one component at a time and through no link: what came out of a container stays there."""

    def open_directory(below: str, make: bool) -> int:
        current = os.dup(place)
        try:
            for name in below.split("/") if below else ():
                try:
                    following = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
                except FileNotFoundError:
                    if not make:
                        raise
                    os.mkdir(name, 0o755, dir_fd=current)
                    following = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
                os.close(current)
                current = following
        except BaseException:
            os.close(current)
            raise
        return current

    return open_directory


def _to(connection: Connection, source: str, container: str, path: str, follow: bool, keep: bool) -> tuple[int, str]:
    found = _stat(connection, container, path)
    if found is not None and stat.S_ISLNK(number(found, "mode")):
        path = _linked(path, found)
        found = _stat(connection, container, path)
    mode = number(found, "mode") if found is not None else 0
    if mode and not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise CliError(f'destination "{container}:{path}" must be a directory or a regular file')
    body: dict[str, object] = {"container": container, "path": path, "keep_owner": keep}
    if source == "-":
        if not stat.S_ISDIR(mode):
            raise CliError(f'destination "{container}:{path}" must be a directory')
        return number(stream(connection, "containerd.copy_to", body, os.dup(0), None), "size_bytes"), f"{container}:{path}"
    from pyx_bus import archive

    parent, base = split_entry(source)
    named = base
    if follow or source.endswith("/"):
        parent, base = split_entry(os.path.realpath(source) + ("/." if base == "." else ""))
    place = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    is_directory = stat.S_ISDIR(os.stat(base, dir_fd=place, follow_symlinks=False).st_mode)
    body["path"], arcname = target(path or "/", mode != 0, stat.S_ISDIR(mode), named, is_directory)
    read, write = os.pipe2(os.O_CLOEXEC)

    def work() -> None:
        with open(write, "wb") as tar:
            archive.pack(tar, place, base, arcname)

    return number(stream(connection, "containerd.copy_to", body, read, work), "size_bytes"), f"{container}:{path}"


def export(options: Options) -> int:
    name = options.text("output")
    if not name:
        if os.isatty(1):
            raise CliError("refusing to write an archive to a terminal: use --output, or redirect it")
        fd = os.dup(1)
    else:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    stream(connect(options), "containerd.export", {"container": options.args[0]}, fd, None)
    return 0
