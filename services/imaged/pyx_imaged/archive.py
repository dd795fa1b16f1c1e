"""Which images an archive holds: docker-archive (``docker save``, manifest.json) and OCI layout (image-layout.md). Pure.

Members are found by their normalized names; a member that's a link (older ``docker save`` shares layers so) means its target, always
looked up among the members and never on a file system.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable
from dataclasses import dataclass

from pyx_bus.errors import InvalidArgument, NotFound

from . import manifest, platforms, reference
from .model import DiffID, Digest, Member, sha256

_LINKS_LIMIT = 10


@dataclass(frozen=True, slots=True)
class ArchiveLayer:
    """A layer: the member that has it, and what its digests must come out as (``digest`` empty: the archive doesn't say)."""

    member: Member
    diff_id: DiffID
    media_type: str


@dataclass(frozen=True, slots=True)
class ArchiveImage:
    config: bytes
    layers: tuple[ArchiveLayer, ...]
    names: tuple[str, ...]
    documents: tuple[bytes, ...] = ()
    digest: str = ""


class Archive:
    """``read`` gives the bytes of a member (bounded by the caller's limit)."""

    def __init__(self, members: list[Member], read: Callable[[Member, int], bytes]) -> None:
        self._members = {posixpath.normpath(member.name.lstrip("/")): member for member in members}
        self._read = read

    def images(self, wanted: platforms.Platform) -> list[ArchiveImage]:
        """The archive's images, in its order. Errors: invalid_argument, not_found (none for that platform)."""
        if "manifest.json" in self._members:
            return self._docker()
        if "index.json" in self._members:
            return self._oci(wanted)
        raise InvalidArgument(
            "not an image archive: it has neither manifest.json (docker-archive) nor index.json (OCI layout)",
            hint="the tar of a root file system becomes an image by import",
        )

    def _member(self, name: str, what: str) -> Member:
        path = posixpath.normpath(name.lstrip("/"))
        for _ in range(_LINKS_LIMIT):
            member = self._members.get(path)
            if member is None:
                break
            if member.kind == "2":
                path = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.link))
            elif member.kind == "1":
                path = posixpath.normpath(member.link.lstrip("/"))
            elif member.number < 0:
                break
            else:
                return member
        raise InvalidArgument(f'image archive without its {what} "{name}"')

    def _docker(self) -> list[ArchiveImage]:
        data = self._read(self._member("manifest.json", "manifest"), manifest.MANIFEST_LIMIT)
        try:
            listed = json.loads(data)
        except (ValueError, RecursionError):
            raise InvalidArgument("image archive's manifest.json is not valid JSON") from None
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise InvalidArgument("image archive's manifest.json is not a list of images")
        images = []
        for item in listed:
            name, paths = item.get("Config"), item.get("Layers") or []
            if not isinstance(name, str) or not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
                raise InvalidArgument("image archive's manifest.json has an invalid entry")
            member = self._member(name, "config")
            config = self._read(member, manifest.CONFIG_LIMIT)
            claimed = posixpath.basename(name).removesuffix(".json")
            if reference.is_digest(f"sha256:{claimed}") and f"sha256:{claimed}" != member.digest:
                raise InvalidArgument(f'image archive\'s config "{name}" has the wrong digest {member.digest}')
            members = [self._member(path, "layer") for path in paths]
            tags = manifest.strings(item.get("RepoTags"))
            images.append(self._image(config, members, ["" for _ in members], tags))
        return images

    def _oci(self, wanted: platforms.Platform) -> list[ArchiveImage]:
        index = manifest.load(self._read(self._member("index.json", "index"), manifest.MANIFEST_LIMIT), "index.json")
        images: dict[str, ArchiveImage] = {}
        for entry in manifest.parse_index(index):
            name = entry.name if "/" in entry.name or ":" in entry.name else ""  # a bare tag names no repository
            found = self._oci_image(entry.descriptor, wanted, depth=0)
            if found is None:
                continue
            if "@" in name:
                name = ""  # what a registry has isn't an archive's to say, and pinned names trust it
            key = sha256(found.config) + found.digest
            before = images[key].names if key in images else ()
            names = (*before, name) if name and name not in before else before
            images[key] = ArchiveImage(found.config, found.layers, names, found.documents, found.digest)
        if not images:
            raise NotFound(f'image archive has no image for the platform "{wanted}"')
        return list(images.values())

    def _blob(self, item: manifest.Descriptor, what: str) -> Member:
        member = self._member(f"blobs/sha256/{item.digest.removeprefix('sha256:')}", what)
        if member.digest != item.digest:
            raise InvalidArgument(f"image archive's {what} {item.digest} has the wrong digest {member.digest}")
        return member

    def _oci_image(self, item: manifest.Descriptor, wanted: platforms.Platform, depth: int) -> ArchiveImage | None:
        data = self._read(self._blob(item, "manifest"), manifest.MANIFEST_LIMIT)
        document = manifest.load(data, "image manifest")
        if manifest.is_index(document, item.media_type):
            if depth > 3:
                raise InvalidArgument("image archive with indexes in indexes")
            entries = manifest.parse_index(document)
            chosen = platforms.select([(e.platform, e.descriptor.digest) for e in entries if e.platform], wanted)
            for entry in entries:
                if entry.descriptor.digest == chosen or (chosen is None and entry.platform is None):
                    found = self._oci_image(entry.descriptor, wanted, depth + 1)
                    if found is not None:
                        return ArchiveImage(found.config, found.layers, (), (data, *found.documents), item.digest)
            return None
        parsed = manifest.parse_manifest(document)
        config = self._read(self._blob(parsed.config, "config"), manifest.CONFIG_LIMIT)
        members = [self._blob(layer, "layer") for layer in parsed.layers]
        image = self._image(config, members, [layer.media_type for layer in parsed.layers], [])
        return ArchiveImage(image.config, image.layers, (), (data,), item.digest)

    def _image(self, config: bytes, members: list[Member], types: list[str], names: list[str]) -> ArchiveImage:
        diff_ids = manifest.diff_ids(manifest.load(config, "image config", manifest.CONFIG_LIMIT))
        if len(diff_ids) != len(members):
            raise InvalidArgument(f"image config names {len(diff_ids)} layers, the archive has {len(members)}")
        for name in names:
            if reference.parse(name).digest:  # as Docker: what a registry has isn't an archive's to say, and pinned names trust it
                raise InvalidArgument(f'image archive with an invalid tag: "{name}"')
        layers = (ArchiveLayer(*layer) for layer in zip(members, diff_ids, types, strict=True))
        return ArchiveImage(config, tuple(layers), tuple(names))


def documents_by_digest(image: ArchiveImage) -> dict[Digest, bytes]:
    """The small blobs that belong to an image: its config, its manifest, the index it was chosen from."""
    return {sha256(data): data for data in (image.config, *image.documents)}
