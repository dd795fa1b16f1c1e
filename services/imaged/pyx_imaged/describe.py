"""Docker's inspect JSON of an image (Engine API, ImageInspect). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import manifest, reference
from .model import DiffID, Image


def names_of(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """RepoTags and RepoDigests out of an image's canonical names."""
    parsed = [reference.parse(name) for name in names]
    return sorted(p.familiar for p in parsed if not p.digest), sorted(p.familiar for p in parsed if p.digest)


def document(
    image: Image,
    config: Mapping[str, Any],
    names: Iterable[str],
    size_bytes: int,
    diff_ids: Sequence[DiffID],
    driver: str,
    directories: Sequence[str],
) -> dict[str, object]:
    """``directories`` are the layers' on disk, topmost first."""
    tags, digests = names_of(names)
    platform = manifest.platform_of(config)
    inner = config.get("config")
    data: dict[str, str] = {}
    if directories:
        data["UpperDir"] = directories[0]
        if directories[1:]:
            data["LowerDir"] = ":".join(directories[1:])
    return {
        "Id": image.id,
        "RepoTags": tags,
        "RepoDigests": digests,
        "Parent": "",
        "Comment": _comment(config),
        "Created": str(config.get("created") or ""),
        "DockerVersion": str(config.get("docker_version") or ""),
        "Author": str(config.get("author") or ""),
        "Config": _config(inner if isinstance(inner, dict) else {}),
        "Architecture": platform.architecture,
        **({"Variant": platform.variant} if platform.variant else {}),
        "Os": platform.os,
        "Size": size_bytes,
        "VirtualSize": size_bytes,
        "GraphDriver": {"Name": driver, "Data": data},
        "RootFS": {"Type": "layers", "Layers": list(diff_ids)},
        "Metadata": {"LastTagTime": manifest.rfc3339(image.stored_at_ns)},
    }


def _comment(config: Mapping[str, Any]) -> str:
    history = config.get("history")
    last = history[-1] if isinstance(history, list) and history else {}
    return str(config.get("comment") or (last.get("comment") if isinstance(last, dict) else "") or "")


def _config(inner: Mapping[str, Any]) -> dict[str, object]:
    """Docker prints the fields that are always there even when they're empty; others as they are."""
    always: dict[str, object] = {
        "Hostname": "", "Domainname": "", "User": "", "AttachStdin": False, "AttachStdout": False, "AttachStderr": False,
        "Tty": False, "OpenStdin": False, "StdinOnce": False, "Env": [], "Cmd": None, "Image": "", "Volumes": None,
        "WorkingDir": "", "Entrypoint": None, "OnBuild": None, "Labels": None,
    }  # fmt: skip
    return {**always, **inner}
