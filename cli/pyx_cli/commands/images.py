"""Images: ls, pull, load, import, tag, rm."""

from __future__ import annotations

import os
import sys
import time

from ..client import connect, each, items, missing, number, text, texts
from ..grammar import CliError, Options
from ..output import Listing, ago, created_at, human_size, short_id
from ..terminal import is_terminal
from ..values import filters

_LISTING = Listing(
    {
        "Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", "ID": "IMAGE ID", "CreatedSince": "CREATED",
        "CreatedAt": "CREATED AT", "Size": "SIZE", "VirtualSize": "SIZE", "Containers": "CONTAINERS", "SharedSize": "SHARED SIZE",
        "UniqueSize": "UNIQUE SIZE",
    },
    ("Repository", "Tag", "ID", "CreatedSince", "Size"),
    shrink=("Repository", "Tag"),
)  # fmt: skip


def familiar(reference: str) -> str:
    """``docker.io/library/busybox:latest`` → ``busybox:latest``: the hub's own names are shown as people write them."""
    for prefix in ("docker.io/library/", "docker.io/"):
        if reference.startswith(prefix):
            return reference[len(prefix) :]
    return reference


def split_reference(reference: str) -> tuple[str, str]:
    """(repository, tag or digest); a colon before the last slash is a registry's port."""
    if "@" in reference:
        repository, _, digest = reference.partition("@")
        return repository, digest
    slash, colon = reference.rfind("/"), reference.rfind(":")
    return (reference[:colon], reference[colon + 1 :]) if colon > slash else (reference, "")


def ls(options: Options) -> int:
    wanted = filters(options.list("filter"))
    if options.args:
        wanted.setdefault("reference", []).append(options.args[0])
    body: dict[str, object] = {"all": options.flag("all")}
    if wanted:
        body["filters"] = wanted
    images = items(connect(options).call("imaged.list", body), "images")
    now_ns = time.time_ns()
    rows = []
    for image in images:
        rows += _rows(image, now_ns, not options.flag("no-trunc"), options.flag("digests"))
    if options.flag("quiet") and not options.text("format"):
        rows = list({row["ID"]: row for row in rows}.values())
    columns = ("Repository", "Tag", "Digest", "ID", "CreatedSince", "Size") if options.flag("digests") else None
    _LISTING.print(options, rows, columns)
    return 0


def _rows(image: dict[str, object], now_ns: int, trunc: bool, digests: bool) -> list[dict[str, str]]:
    """One row a tag; an image with none is shown as <none>."""
    identity, created_ns = text(image, "id"), number(image, "created_ns")
    by_repository = {}
    for digest in texts(image, "digests"):
        repository, value = split_reference(familiar(digest))
        by_repository[repository] = value
    size = human_size(number(image, "size_bytes"))
    containers = number(image, "containers", -1)
    names = [split_reference(familiar(reference)) for reference in texts(image, "references")]
    tags = [(repository, tag) for repository, tag in names if not tag.startswith("sha256:")]
    for repository, tag in names:
        if tag.startswith("sha256:"):
            by_repository.setdefault(repository, tag)
    tagged = {repository for repository, _ in tags}
    if not tags:
        tags = [(repository, "<none>") for repository in by_repository] or [("<none>", "<none>")]
    elif digests:
        tags += [(repository, "<none>") for repository in by_repository if repository not in tagged]
    return [
        {
            "Repository": repository,
            "Tag": tag or "<none>",
            "Digest": by_repository.get(repository, "<none>"),
            "ID": short_id(identity) if trunc else identity,
            "CreatedSince": ago(created_ns, now_ns),
            "CreatedAt": created_at(created_ns),
            "Size": size,
            "VirtualSize": size,
            "Containers": "N/A" if containers < 0 else str(containers),
            "SharedSize": "N/A",
            "UniqueSize": "N/A",
        }
        for repository, tag in tags
    ]


def _follow(options: Options, method: str, body: dict[str, object], fds: tuple[int, ...], quiet: bool) -> dict[str, object]:
    """A call that reports its progress; the result. Interrupting cancels it."""
    from ..progress import Progress

    connection = connect(options)
    progress = Progress(1, quiet)
    serial = connection.open(method, body, fds)
    while True:
        message = connection.receive()
        assert message is not None
        if message.serial != serial:
            continue
        if message.kind == "item":
            progress.item(message.body)
        elif message.kind == "error":
            raise message.error()
        elif message.kind == "result":
            return message.body


def _platform(options: Options) -> dict[str, object]:
    return {"platform": options.text("platform")} if options.given("platform") else {}


def pull(options: Options) -> int:
    quiet = options.flag("quiet")
    reference = options.args[0]
    if not quiet and not split_reference(reference)[1]:
        print("Using default tag: latest", flush=True)
    result = _follow(options, "imaged.pull", {"reference": reference, **_platform(options)}, (), quiet)
    print(text(result, "reference"))  # digest and status have been among the progress
    return 0


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def load(options: Options) -> int:
    path = options.text("input")
    if not path and is_terminal(0):
        raise CliError("requested load from stdin, but stdin is empty", 1, "name the archive with --input FILE, or redirect it")
    if path and os.path.isdir(path):
        raise CliError(f"{path}: is a directory")
    fd, relay = _readable(path)
    try:
        result = _relayed(options, "imaged.load", _platform(options), fd, relay, options.flag("quiet"))
    finally:
        os.close(fd)
    for reference in texts(result, "references"):
        print(f"Loaded image: {familiar(reference)}")
    for identity in texts(result, "ids"):
        print(f"Loaded image ID: {identity}")
    return 0


def _readable(path: str) -> tuple[int, int]:
    """A descriptor of the archive for the service, and the write end to feed it through if it's our terminal (-1: none)."""
    if path and path != "-":
        return _open(path), -1
    if is_terminal(0):
        # Never hand out the terminal itself: it would be more than the right to read an archive.
        return os.pipe2(os.O_CLOEXEC)
    return os.dup(0), -1


def _relayed(
    options: Options, method: str, body: dict[str, object], fd: int, relay: int, quiet: bool
) -> dict[str, object]:
    if relay >= 0:
        import threading

        threading.Thread(target=_pump, args=(relay,), daemon=True).start()
    return _follow(options, method, body, (fd,), quiet or not is_terminal(1))  # what scripts read is the result


def _pump(relay: int) -> None:
    try:
        while data := os.read(0, 65536):
            view = memoryview(data)
            while view:
                view = view[os.write(relay, view) :]
    except OSError:
        pass
    os.close(relay)


def import_(options: Options) -> int:
    source = options.args[0]
    if source.startswith(("http://", "https://")):
        raise CliError("importing from a URL isn't supported", 1, f"curl -L {source} | pyx import - NAME:TAG")
    body: dict[str, object] = {"changes": options.list("change"), **_platform(options)}
    if len(options.args) > 1:
        body["reference"] = options.args[1]
    if options.given("message"):
        body["message"] = options.text("message")
    fd, relay = _readable(source)
    try:
        result = _relayed(options, "imaged.import", body, fd, relay, True)
    finally:
        os.close(fd)
    print(text(result, "id"))
    return 0


def tag(options: Options) -> int:
    source, target = options.args
    connect(options).call("imaged.tag", {"source": source, "target": target})
    return 0


def remove(options: Options) -> int:
    connection = connect(options)
    force = options.flag("force")

    from pyx_bus.errors import NotFound

    def one(name: str) -> str | bool:
        try:
            result = connection.call("imaged.remove", {"reference": name, "force": force})
        except NotFound as error:
            if not force:
                raise
            return missing(error)
        lines = [f"Untagged: {familiar(reference)}" for reference in texts(result, "untagged")]
        lines += [f"Deleted: {identity}" for identity in texts(result, "deleted")]
        sys.stdout.flush()
        return "\n".join(lines) or True

    return each(options, one, options.args)
