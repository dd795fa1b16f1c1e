"""Decisions about images, without I/O: which one a name means, what ``rm`` removes, which ones a filter keeps, what's garbage."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from pyx_bus.errors import Conflict, InvalidArgument, NotFound

from . import reference
from .model import ChainID, Digest, Image, ImageID, Layer, SnapshotRecord, short
from .reference import Reference


def find(text: str, images: Mapping[ImageID, Image], names: Mapping[str, ImageID]) -> tuple[ImageID, Reference | None]:
    """The image that ``text`` names, and the reference if it was found by one: a name goes before an ID's prefix, as in Docker.

    Errors: not_found, invalid_argument (several images begin with that ID; not a reference at all).
    """
    if not text:
        raise InvalidArgument("no image given")
    if (full := text if text.startswith("sha256:") else f"sha256:{text}") in images:
        return ImageID(full), None
    parsed = reference.parse_or_none(text)
    if parsed is not None and (image_id := names.get(parsed.canonical)) is not None:
        return image_id, parsed
    prefix = reference.id_prefix(text)
    if prefix is not None:
        found = [image_id for image_id in images if image_id[7:].startswith(prefix)]
        if len(found) == 1:
            return found[0], None
        if found:
            raise InvalidArgument(f'image ID prefix is ambiguous: "{text}"', hint=f"{len(found)} images begin with it")
    if parsed is None and prefix is None:
        reference.parse(text)  # says what's wrong with it
    raise NotFound(f'no such image: "{parsed.familiar if parsed else text}"')


@dataclass(frozen=True, slots=True)
class Removal:
    """What a removal does: names to forget, and the image if its last name goes."""

    names: list[str] = field(default_factory=list)
    image: ImageID | None = None


def remove(
    text: str,
    force: bool,
    images: Mapping[ImageID, Image],
    names: Mapping[str, ImageID],
    users: Callable[[ImageID], Collection[SnapshotRecord]],
) -> Removal:
    """What ``image rm text`` removes (Docker's rules). Errors: not_found, conflict."""
    image_id, named = find(text, images, names)
    mine = sorted(name for name, owner in names.items() if owner == image_id)
    tags = [name for name in mine if "@" not in name]
    if named is not None:
        gone = [named.canonical]
        rest = [name for name in tags if name not in gone]
        if rest:
            # digests of a repository whose last tag goes, go with it
            if not any(name.rpartition(":")[0] == named.repository for name in rest):
                gone += [name for name in mine if name.startswith(named.repository + "@") and name not in gone]
            return Removal(gone, None)
        if named.digest and tags:
            return Removal(gone, None)
        gone = sorted({*gone, *mine})
    else:
        repositories = {name.rpartition(":")[0] for name in tags}
        if len(repositories) > 1 and not force:
            raise Conflict(
                f"image {short(image_id)} is named in several repositories: {', '.join(map(familiar, tags))}",
                hint="remove it by name, or use --force",
            )
        gone = mine
    holders = sorted(short(user.container_id) for user in users(image_id))
    if holders and not force:
        what = f'"{familiar(gone[0])}"' if gone else short(image_id)
        raise Conflict(
            f"image {what} is used by container {holders[0]}" + (f" and {len(holders) - 1} more" if len(holders) > 1 else ""),
            hint="remove the container first",
            details={"container": holders[0]},
        )
    return Removal(gone, None if holders else image_id)


def familiar(canonical: str) -> str:
    """A kept name as Docker prints it."""
    return reference.parse(canonical).familiar


@dataclass(frozen=True, slots=True)
class Listed:
    """What filters look at."""

    image: Image
    tags: list[str]
    created_ns: int
    labels: Mapping[str, str]


_FILTERS = ("before", "dangling", "label", "reference", "since")


def keep(
    listed: Iterable[Listed], filters: Mapping[str, list[str]], created_of: Callable[[str], int]
) -> list[Listed]:
    """The images all filters keep. ``created_of`` gives the creation time of an image named in before/since (or raises not_found)."""
    found = list(listed)
    for name, values in filters.items():
        if name not in _FILTERS:
            raise InvalidArgument(f'invalid filter: "{name}"', hint=f"one of {', '.join(_FILTERS)}")
        if name == "label":  # all of them; the others: any of them
            for value in values:
                key, equals, wanted = value.partition("=")
                found = [x for x in found if key in x.labels and (not equals or x.labels[key] == wanted)]
        elif name == "dangling":
            flags = {_boolean(value) for value in values}
            found = [x for x in found if (not x.tags) in flags]
        elif name == "reference":
            found = [x for x in found if any(_matches(tag, value) for tag in x.tags for value in values)]
        else:
            for value in values:
                edge = created_of(value)
                found = [x for x in found if (x.created_ns < edge if name == "before" else x.created_ns > edge)]
    return found


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "t"):
        return True
    if text.lower() in ("0", "false", "f"):
        return False
    raise InvalidArgument(f'invalid value of the filter dangling: "{text}"', hint="true or false")


def _matches(canonical: str, pattern: str) -> bool:
    """Docker's reference filter: the pattern may be of the name alone or with the tag; * doesn't cross a slash."""
    name = reference.parse(canonical)
    texts = (name.familiar, name.familiar_repository, canonical, name.repository)
    return any(
        text.count("/") == pattern.count("/") and fnmatch.fnmatchcase(text.replace("/", "\0"), pattern.replace("/", "\0"))
        for text in texts
    )


@dataclass(frozen=True, slots=True)
class Garbage:
    layers: list[Layer]
    blobs: list[Digest]


def garbage(
    images: Iterable[Image],
    layers: Mapping[ChainID, Layer],
    blobs: Collection[Digest],
    held_layers: Collection[ChainID],
    held_blobs: Collection[Digest],
) -> Garbage:
    """Layers and blobs that no image needs and no transfer in progress holds."""
    live_layers, live_blobs = set(held_layers), set(held_blobs)
    for image in images:
        live_layers.update(image.layers)
        live_blobs.update(image.blobs)
    for chain_id in live_layers:
        if chain_id in layers:
            live_blobs.add(layers[chain_id].blob)
    return Garbage(
        [layer for chain_id, layer in layers.items() if chain_id not in live_layers],
        [blob for blob in blobs if blob not in live_blobs],
    )
