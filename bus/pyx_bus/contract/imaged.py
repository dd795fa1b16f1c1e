"""imaged: images by name and digest, and the root file systems made of them.

References are Docker's: ``busybox`` means ``docker.io/library/busybox:latest`` (distribution's ``reference`` package). An image's
ID is the digest of its config, ``sha256:<64 hex>``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .base import Empty, Event, Message, Method, Released, Retain


class HealthCheck(Message, frozen=True, kw_only=True):
    """Docker's HEALTHCHECK as stored in an image config; durations in nanoseconds as there."""

    test: list[str] = []
    interval_ns: int = 0
    timeout_ns: int = 0
    start_period_ns: int = 0
    start_interval_ns: int = 0
    retries: int = 0


class ImageConfig(Message, frozen=True, kw_only=True):
    """What a container takes over from its image (OCI image-spec, config.md; Docker's Healthcheck and Shell, which runs a CMD-SHELL)."""

    id: str
    reference: str
    architecture: str = ""
    os: str = "linux"
    user: str = ""
    env: list[str] = []
    entrypoint: list[str] = []
    cmd: list[str] = []
    working_dir: str = ""
    volumes: list[str] = []
    exposed_ports: list[str] = []
    labels: dict[str, str] = {}
    stop_signal: str = ""
    healthcheck: HealthCheck | None = None
    shell: list[str] = []


class Mount(Message, frozen=True, kw_only=True):
    """A mount to be made by whoever asked: the arguments of mount(8), one option an entry."""

    type: str
    source: str
    options: list[str] = []


class PrepareSnapshot(Message, frozen=True, kw_only=True):
    """Make (or find again) the writable root file system of a container. Idempotent under the container's ID.

    Errors: not_found (no such image), failed_precondition (exists for another image), resource_exhausted (disk full).
    """

    container_id: str
    image: str
    platform: str = ""


class Snapshot(Message, frozen=True, kw_only=True):
    """``mounts`` is to be mounted, in order, on an empty directory. ``writable_path`` is the container's own layer (its changes)."""

    image: ImageConfig
    mounts: list[Mount]
    writable_path: str = ""
    snapshotter: str = "overlayfs"


class ReleaseSnapshot(Message, frozen=True, kw_only=True):
    """Drop a container's snapshot; the caller has unmounted it. Idempotent. Deleting the files may go on after the reply."""

    container_id: str


class ResolveImage(Message, frozen=True, kw_only=True):
    """An image by reference, ID or unambiguous ID prefix. Errors: not_found, invalid_argument."""

    reference: str
    platform: str = ""


class ImportImage(Message, frozen=True, kw_only=True):
    """A root file system's tar (plain, gzip, zstd, xz, bzip2; descriptor 0 of the request, readable) becomes an image of one layer.

    ``changes`` are Dockerfile instructions as of ``docker import -c`` (CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD,
    STOPSIGNAL, USER, VOLUME, WORKDIR).
    Errors: invalid_argument (not a tar, truncated, an entry that leaves the root or has an absolute path), resource_exhausted (beyond
    the configured limits, disk full); nothing is kept then.
    """

    reference: str = ""
    message: str = ""
    changes: list[str] = []
    platform: str = ""


class ImageID(Message, frozen=True, kw_only=True):
    id: str
    reference: str = ""


class CommitSnapshot(Message, frozen=True, kw_only=True):
    """A container's changes become a layer on top of its image's, and that an image. Streams one ``SnapshotRead``: from then on the
    container may change again.

    ``config`` is the container's (its ``id`` and ``reference`` don't count), to which ``changes`` are applied as of import;
    ``created_by`` is what the history says the layer was made by. Nothing changed: the same layers, and a history entry more.
    Left out are sockets, what's called ``.wh.*`` (a layer would take it for deletions) and empty files and directories that are only
    there for the runtime to mount on.
    Errors: not_found (no snapshot), invalid_argument (reference, changes), failed_precondition (127 layers already, released meanwhile,
    a path of more than 4096 bytes), resource_exhausted. A commit that fails or is cancelled leaves nothing.
    """

    container_id: str
    config: ImageConfig
    reference: str = ""
    author: str = ""
    message: str = ""
    changes: list[str] = []
    created_by: str = ""


class SnapshotRead(Message, frozen=True, kw_only=True):
    """What was changed has been read. ``size_bytes`` is the layer's, compressed."""

    size_bytes: int = 0


class DiffSnapshot(Message, frozen=True, kw_only=True):
    """Write what a container changed to descriptor 0 of the request, and close it: of each change a kind, a space, the path from the
    root, and a zero byte. Kinds and rules are Docker's: A added, C changed (a directory also if something in it is), D deleted (with
    all that was in it); directories come before what's in them, in order of names. Paths are bytes as the file system has them.

    Errors: not_found (no snapshot), failed_precondition (as of commit), unavailable (the reader went away, or takes nothing for a minute).
    """

    container_id: str


class LoadImages(Message, frozen=True, kw_only=True):
    """A docker-archive or OCI-layout tar, compressed or not (descriptor 0 of the request, readable). Streams ``Progress``.

    Errors: invalid_argument (no image archive, damaged, wrong digests, a hostile layer), not_found (no image for the platform),
    resource_exhausted. Images of the archive before the one that failed stay.
    """

    platform: str = ""


class LoadedImages(Message, frozen=True, kw_only=True):
    """``references`` of the named images, ``ids`` of those without a name, in archive order."""

    references: list[str] = []
    ids: list[str] = []


class Progress(Message, frozen=True, kw_only=True):
    """One step of a pull or load: ``id`` is a layer's short digest, or empty for the image as a whole."""

    id: str = ""
    status: str
    current_bytes: int = 0
    total_bytes: int = 0


class PullImage(Message, frozen=True, kw_only=True):
    """Pull ``reference`` (tag or digest) for ``platform`` ("os/arch[/variant]", the host's if empty). Streams ``Progress``.

    Errors: not_found, permission_denied (the registry wants credentials), unavailable (can't be reached), invalid_argument.
    """

    reference: str
    platform: str = ""


class PulledImage(Message, frozen=True, kw_only=True):
    """``digest`` is the manifest's (or index's) as the registry gave it; ``up_to_date`` when nothing new was fetched."""

    id: str
    reference: str
    digest: str
    up_to_date: bool = False


class ListImages(Message, frozen=True, kw_only=True):
    """``filters`` as Docker's: reference, label, dangling, before, since."""

    filters: dict[str, list[str]] = {}
    all: bool = False


class ImageSummary(Message, frozen=True, kw_only=True):
    id: str
    references: list[str] = []
    digests: list[str] = []
    created_ns: int = 0
    size_bytes: int = 0
    containers: int = -1
    labels: dict[str, str] = {}


class ImageList(Message, frozen=True, kw_only=True):
    images: list[ImageSummary] = []


class Document(Message, frozen=True, kw_only=True):
    """Docker's inspect JSON of one object: Engine API field names and forms."""

    document: dict[str, Any]


class TagImage(Message, frozen=True, kw_only=True):
    """Give ``source`` another name. Moves the name if it was taken, as Docker does. Idempotent."""

    source: str
    target: str


class RemoveImage(Message, frozen=True, kw_only=True):
    """Remove a name, and the image with its last one. Errors: not_found, conflict (used by a container; several names, by ID)."""

    reference: str
    force: bool = False


class RemovedImage(Message, frozen=True, kw_only=True):
    untagged: list[str] = []
    deleted: list[str] = []


RESOLVE = Method("imaged.resolve", ResolveImage, ImageConfig, idempotent=True, read_only=True)
PREPARE = Method("imaged.prepare", PrepareSnapshot, Snapshot, idempotent=True)
RELEASE = Method("imaged.release", ReleaseSnapshot, Empty, idempotent=True)
RETAIN = Method("imaged.retain", Retain, Released, idempotent=True)
IMPORT = Method("imaged.import", ImportImage, ImageID)
COMMIT = Method("imaged.commit", CommitSnapshot, ImageID, item=SnapshotRead)
DIFF = Method("imaged.diff", DiffSnapshot, Empty)
LOAD = Method("imaged.load", LoadImages, LoadedImages, item=Progress)
PULL = Method("imaged.pull", PullImage, PulledImage, item=Progress)
LIST = Method("imaged.list", ListImages, ImageList, idempotent=True, read_only=True)
INSPECT = Method("imaged.inspect", ResolveImage, Document, idempotent=True, read_only=True)
TAG = Method("imaged.tag", TagImage, Empty, idempotent=True)
REMOVE = Method("imaged.remove", RemoveImage, RemovedImage)


class ImageEvent(Event, frozen=True, kw_only=True):
    """``id`` is the image's; attributes: name (its familiar name, else its ID) and every label of it."""


class ImageCreated(ImageEvent, frozen=True, kw_only=True):
    """Made here, of a container. An image.tag follows if it got a name."""

    topic: ClassVar[str] = "image.create"


class ImageImported(ImageEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "image.import"


class ImageLoaded(ImageEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "image.load"


class ImagePulled(ImageEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "image.pull"


class ImageTagged(ImageEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "image.tag"


class ImageUntagged(ImageEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "image.untag"


class ImageDeleted(ImageEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "image.delete"


METHODS = (RESOLVE, PREPARE, RELEASE, RETAIN, IMPORT, COMMIT, DIFF, LOAD, PULL, LIST, INSPECT, TAG, REMOVE)
EVENTS = (ImageCreated, ImageImported, ImageLoaded, ImagePulled, ImageTagged, ImageUntagged, ImageDeleted)
