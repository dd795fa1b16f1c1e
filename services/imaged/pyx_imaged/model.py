"""What imaged keeps: images, layers, snapshots; and what its workers find out. Frozen, pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

import msgspec

Digest = NewType("Digest", str)
"""``sha256:<64 hex>`` of a blob's bytes as they travel and are kept (compressed, if the layer is)."""
DiffID = NewType("DiffID", str)
"""``sha256:<64 hex>`` of a layer's uncompressed tar."""
ChainID = NewType("ChainID", str)
"""Identity of a layer together with everything below it (OCI image-spec config.md, "Layer ChainID")."""
ImageID = NewType("ImageID", str)
"""The digest of an image's config."""


def sha256(data: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def chain_ids(diff_ids: Sequence[DiffID]) -> tuple[ChainID, ...]:
    """The chain ID of each layer, bottom first: sha256 over "<chain below> <diff ID>"."""
    chains: list[ChainID] = []
    for diff_id in diff_ids:
        chains.append(ChainID(sha256(f"{chains[-1]} {diff_id}".encode()) if chains else diff_id))
    return tuple(chains)


def short(digest: str) -> str:
    """The twelve digits people know an object by."""
    return digest.removeprefix("sha256:")[:12]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's directory ``layers/<number>``. Immutable once it's here. ``blob`` is what it was unpacked from."""

    chain_id: ChainID
    diff_id: DiffID
    number: int
    size_bytes: int
    blob: Digest
    blob_size_bytes: int
    media_type: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image: its config's bytes (their digest is its ID) and its layers, bottom first.

    ``manifest`` is the digest of the manifest it came with (empty for an import or a docker-archive); ``blobs`` are all blobs it
    keeps alive besides its layers'. ``stored_at_ns`` is when it first came here.
    """

    id: ImageID
    config: bytes
    layers: tuple[ChainID, ...]
    manifest: str = ""
    blobs: tuple[Digest, ...] = ()
    stored_at_ns: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A container's writable layer and which image it was made of; ``asked`` is the reference it was made for, ``name`` what
    that image was called then."""

    container_id: str
    image_id: ImageID
    asked: str
    name: str
    created_ns: int
    snapshotter: str


class UnpackResult(msgspec.Struct, frozen=True):
    """What ``worker.unpack`` found: both digests, sizes in bytes, and the directories the archive only implies."""

    digest: str
    size: int
    diff_id: str
    compression: str
    unpacked_size: int
    entries: int
    implied: list[str]


class PackResult(msgspec.Struct, frozen=True):
    """What ``worker.pack_changes`` made: as of a blob. ``entries`` 0: nothing was changed. ``left_out``: what a layer can't have."""

    digest: str
    size: int
    diff_id: str
    entries: int
    left_out: int


class Member(msgspec.Struct, frozen=True):
    """A member of an outer archive; ``number`` is its file's name in the spool directory, -1 if it has none."""

    name: str
    kind: str
    link: str = ""
    number: int = -1
    size: int = 0
    digest: str = ""


class SpoolResult(msgspec.Struct, frozen=True):
    members: list[Member]
    compression: str
