"""volumed: volumes, and the mounts of a container that aren't its root file system."""

from __future__ import annotations

from typing import ClassVar

from .base import Empty, Event, Message, Method, Released, Retain
from .imaged import Document


class MountRequest(Message, frozen=True, kw_only=True):
    """One ``-v``, ``--mount`` or ``--tmpfs``.

    ``type`` is volume, bind or tmpfs. ``source`` is a volume's name (empty: a new anonymous volume), or a host path for a bind.
    ``create_source`` makes a missing bind source a directory, as ``-v`` does and ``--mount`` doesn't. ``no_copy``: don't fill a new
    volume with what the image has at ``target``. ``propagation``: rprivate and the others of mount_namespaces(7).
    """

    type: str
    target: str
    source: str = ""
    read_only: bool = False
    create_source: bool = False
    no_copy: bool = False
    propagation: str = ""
    selinux_label: str = ""
    tmpfs_size_bytes: int = 0
    tmpfs_mode: int = 0o1777
    tmpfs_options: list[str] = []
    driver: str = ""
    driver_options: dict[str, str] = {}
    labels: dict[str, str] = {}


class AttachVolumes(Message, frozen=True, kw_only=True):
    """Prepare a container's mounts and hold them for it. Idempotent under the container's ID.

    Descriptor 0 of the request, if given, is the container's root directory: a new volume is filled with what it has at the target
    (never following a link out of that root), as is an empty one that's there already. Asked again, a mount without a ``source``
    gets the volume it got before. Errors: invalid_argument (bad path, bad option, duplicate target), not_found (a bind source that
    isn't there, an unknown driver), conflict (the volume exists with another driver or options), not_implemented (a quota),
    failed_precondition (its device can't be mounted). A failed attach leaves no reference and no new volume behind.
    """

    container_id: str
    mounts: list[MountRequest]


class MountPoint(Message, frozen=True, kw_only=True):
    """What goes into the container: ``type``, ``source``, ``target`` and ``options`` are the OCI runtime spec's mount."""

    type: str
    source: str
    target: str
    options: list[str] = []
    kind: str = "volume"
    name: str = ""
    driver: str = ""
    read_only: bool = False
    propagation: str = ""


class AttachedVolumes(Message, frozen=True, kw_only=True):
    mounts: list[MountPoint] = []


class DetachVolumes(Message, frozen=True, kw_only=True):
    """Drop a container's references; with ``remove_anonymous`` also its anonymous volumes nobody else uses. Idempotent."""

    container_id: str
    remove_anonymous: bool = False


class CreateVolume(Message, frozen=True, kw_only=True):
    """Make a volume, or find the one of that name if driver and options agree. Errors: invalid_argument, conflict, not_implemented."""

    name: str = ""
    driver: str = "local"
    driver_options: dict[str, str] = {}
    labels: dict[str, str] = {}


class Volume(Message, frozen=True, kw_only=True):
    name: str
    driver: str = "local"
    mountpoint: str = ""
    created_ns: int = 0
    labels: dict[str, str] = {}
    options: dict[str, str] = {}
    anonymous: bool = False
    references: int = 0


class ListVolumes(Message, frozen=True, kw_only=True):
    """``filters`` as Docker's: name, driver, label, dangling."""

    filters: dict[str, list[str]] = {}


class VolumeList(Message, frozen=True, kw_only=True):
    volumes: list[Volume] = []


class VolumeRef(Message, frozen=True, kw_only=True):
    """A volume by name. Errors: not_found."""

    name: str


class RemoveVolume(Message, frozen=True, kw_only=True):
    """Errors: not_found (unless ``force``), conflict (a container uses it; the message names which)."""

    name: str
    force: bool = False


ATTACH = Method("volumed.attach", AttachVolumes, AttachedVolumes, idempotent=True)
DETACH = Method("volumed.detach", DetachVolumes, Empty, idempotent=True)
RETAIN = Method("volumed.retain", Retain, Released, idempotent=True)
CREATE = Method("volumed.create", CreateVolume, Volume, idempotent=True)
LIST = Method("volumed.list", ListVolumes, VolumeList, idempotent=True, read_only=True)
INSPECT = Method("volumed.inspect", VolumeRef, Document, idempotent=True, read_only=True)
REMOVE = Method("volumed.remove", RemoveVolume, Empty)


class VolumeCreated(Event, frozen=True, kw_only=True):
    """``id`` is the volume's name; attributes: driver."""

    topic: ClassVar[str] = "volume.create"


class VolumeMounted(Event, frozen=True, kw_only=True):
    """A container holds the volume from now on. Attributes: driver, container, destination, propagation, read/write ("true", "false")."""

    topic: ClassVar[str] = "volume.mount"


class VolumeUnmounted(Event, frozen=True, kw_only=True):
    """Attributes: driver, container, destination."""

    topic: ClassVar[str] = "volume.unmount"


class VolumeDestroyed(Event, frozen=True, kw_only=True):
    """Attributes: driver."""

    topic: ClassVar[str] = "volume.destroy"


METHODS = (ATTACH, DETACH, RETAIN, CREATE, LIST, INSPECT, REMOVE)
EVENTS = (VolumeCreated, VolumeMounted, VolumeUnmounted, VolumeDestroyed)
