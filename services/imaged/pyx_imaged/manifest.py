"""Image manifests, indexes and configs (OCI image-spec; Docker's image manifest v2 schema 2), read with suspicion. Pure.

JSON from a registry or an archive is input: every field that's used is checked here, and nothing else leaves this module.
"""

from __future__ import annotations

import calendar
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from pyx_bus.contract.imaged import HealthCheck, ImageConfig
from pyx_bus.errors import InvalidArgument

from . import platforms, reference
from .model import DiffID, Digest, ImageID

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
ACCEPT = (OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST)
MANIFEST_LIMIT = 4 << 20  # bytes; what distribution allows
CONFIG_LIMIT = 8 << 20
LAYERS_LIMIT = 127  # overlayfs takes 500; Docker's own bound, so that what we make runs there too
_LAYER_TYPES = re.compile(
    r"application/vnd\.oci\.image\.layer\.(?:nondistributable\.)?v1\.tar(?:\+gzip|\+zstd)?"
    r"|application/vnd\.docker\.image\.rootfs\.(?:diff|foreign\.diff)\.tar(?:\.gzip|\.zstd)?"
)
_RFC3339 = re.compile(r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9})\d*)?(?:[Zz]|([+-])(\d\d):(\d\d))")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to a blob (OCI descriptor.md). ``size`` is the number of bytes it claims to have, -1 if it doesn't say."""

    digest: Digest
    size: int
    media_type: str


@dataclass(frozen=True, slots=True)
class Manifest:
    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    descriptor: Descriptor
    platform: platforms.Platform | None
    name: str = ""


def load(data: bytes, what: str, limit: int = MANIFEST_LIMIT) -> dict[str, Any]:
    """The JSON object in ``data``. Errors: invalid_argument."""
    if len(data) > limit:
        raise InvalidArgument(f"{what} of {len(data)} bytes (at most {limit})")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidArgument(f"{what} is not valid JSON") from None
    if not isinstance(document, dict):
        raise InvalidArgument(f"{what} is not a JSON object")
    try:
        msgspec.msgpack.encode(document)
    except (UnicodeEncodeError, OverflowError, RecursionError):  # kept, it would make every answer with it in it fail
        raise InvalidArgument(f"{what} has half a character, or a number beyond 64 bits") from None
    return document


def is_index(document: Mapping[str, Any], media_type: str = "") -> bool:
    """Whether it's an index (manifest list): by its media type, else by what it has."""
    kind = document.get("mediaType") or media_type
    if kind in (OCI_INDEX, DOCKER_INDEX):
        return True
    return kind not in (OCI_MANIFEST, DOCKER_MANIFEST) and "manifests" in document and "layers" not in document


def descriptor(value: object, what: str) -> Descriptor:
    """A checked descriptor. Errors: invalid_argument."""
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} is no descriptor")
    digest, size = value.get("digest"), value.get("size", -1)
    if not isinstance(digest, str) or not reference.is_digest(digest):
        raise InvalidArgument(f'{what} has an invalid digest: "{digest}"')
    if not isinstance(size, int) or isinstance(size, bool) or size < -1:
        raise InvalidArgument(f'{what} has an invalid size: "{size}"')
    return Descriptor(Digest(digest), size, str(value.get("mediaType", "")))


def parse_index(document: Mapping[str, Any]) -> list[IndexEntry]:
    """The entries of an index that may be images: attestations and the like (platform "unknown") left out."""
    entries = document.get("manifests")
    if not isinstance(entries, list):
        raise InvalidArgument("image index without manifests")
    found = []
    for value in entries:
        item = descriptor(value, "image index entry")
        platform = None
        if isinstance(given := value.get("platform"), dict):
            platform = platforms.normalize(*(str(given.get(key) or "") for key in ("os", "architecture", "variant")))
            if platform.architecture == "unknown":
                continue
        annotations = value.get("annotations")
        annotations = annotations if isinstance(annotations, dict) else {}
        name = annotations.get("io.containerd.image.name") or annotations.get("org.opencontainers.image.ref.name") or ""
        found.append(IndexEntry(item, platform, str(name)))
    return found


def parse_manifest(document: Mapping[str, Any]) -> Manifest:
    """An image's manifest. Errors: invalid_argument (schema 1, an artifact that's no image, too many layers)."""
    if document.get("schemaVersion") == 1:
        raise InvalidArgument("image manifest schema 1 is too old", hint="push the image again with a newer tool")
    config = descriptor(document.get("config"), "image manifest's config")
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise InvalidArgument("image manifest without layers")
    if len(layers) > LAYERS_LIMIT:
        raise InvalidArgument(f"image with {len(layers)} layers (at most {LAYERS_LIMIT})")
    found = tuple(descriptor(layer, "layer") for layer in layers)
    for layer in found:
        if layer.media_type and not _LAYER_TYPES.fullmatch(layer.media_type):
            raise InvalidArgument(f'not a container image: a layer has the media type "{layer.media_type}"')
    return Manifest(config, found)


def diff_ids(config: Mapping[str, Any]) -> list[DiffID]:
    """The layers an image config says it's made of. Errors: invalid_argument."""
    rootfs = config.get("rootfs")
    listed = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if listed is None and isinstance(rootfs, dict):
        listed = []
    if not isinstance(listed, list) or not all(isinstance(d, str) and reference.is_digest(d) for d in listed):
        raise InvalidArgument("image config without valid rootfs.diff_ids")
    if len(listed) > LAYERS_LIMIT:
        raise InvalidArgument(f"image with {len(listed)} layers (at most {LAYERS_LIMIT})")
    return [DiffID(d) for d in listed]


def platform_of(config: Mapping[str, Any]) -> platforms.Platform:
    return platforms.normalize(*(str(config.get(key) or "") for key in ("os", "architecture", "variant")))


def created_ns(config: Mapping[str, Any]) -> int:
    """Unix time of ``created`` (RFC 3339) in nanoseconds; 0 if it isn't said, or isn't between the years 1678 and 2262: 64 bits."""
    match = _RFC3339.fullmatch(str(config.get("created") or ""))
    if not match:
        return 0
    year, month, day, hour, minute, second, fraction, sign, off_hour, off_minute = match.groups()
    try:
        seconds = calendar.timegm((int(year), int(month), int(day), int(hour), int(minute), int(second), 0, 0, 0))
    except ValueError:
        return 0  # the thirteenth month, the year 0
    if sign:
        offset = int(off_hour) * 3600 + int(off_minute) * 60
        seconds -= offset if sign == "+" else -offset
    created = seconds * 1_000_000_000 + int((fraction or "0").ljust(9, "0"))
    return created if -(2**63) <= created < 2**63 else 0  # Go's zero time is the year 1


def rfc3339(time_ns: int) -> str:
    """As Go prints it: nanoseconds without trailing zeros, UTC."""
    seconds, fraction = divmod(time_ns, 1_000_000_000)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return text + (f".{fraction:09d}".rstrip("0") if fraction else "") + "Z"


def strings(value: object) -> list[str]:
    """A list of texts; anything else that's found there counts as nothing."""
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def image_config(image_id: ImageID, name: str, config: Mapping[str, Any]) -> ImageConfig:
    """What a container takes over from an image's config (image-spec config.md; Docker adds Healthcheck)."""
    given = config.get("config")
    inner: dict[str, Any] = given if isinstance(given, dict) else {}
    platform = platform_of(config)
    check = inner.get("Healthcheck")
    health = None
    if isinstance(check, dict) and (test := strings(check.get("Test"))):
        health = HealthCheck(
            test=test,
            interval_ns=_integer(check.get("Interval")),
            timeout_ns=_integer(check.get("Timeout")),
            start_period_ns=_integer(check.get("StartPeriod")),
            start_interval_ns=_integer(check.get("StartInterval")),
            retries=_integer(check.get("Retries")),
        )
    labels = inner.get("Labels")
    return ImageConfig(
        id=image_id,
        reference=name,
        architecture=platform.architecture,
        os=platform.os,
        user=str(inner.get("User") or ""),
        env=strings(inner.get("Env")),
        entrypoint=strings(inner.get("Entrypoint")),
        cmd=strings(inner.get("Cmd")),
        working_dir=str(inner.get("WorkingDir") or ""),
        volumes=_keys(inner.get("Volumes")),
        exposed_ports=_keys(inner.get("ExposedPorts")),
        labels={str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {},
        stop_signal=str(inner.get("StopSignal") or ""),
        healthcheck=health,
        shell=strings(inner.get("Shell")),
    )


def _integer(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _keys(value: object) -> list[str]:
    return sorted(str(key) for key in value) if isinstance(value, dict) else []
