"""Platforms (``os/arch[/variant]``) and which entry of an index fits one (OCI image-spec image-index.md; containerd platforms). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pyx_bus.errors import InvalidArgument

_ARCHITECTURES = {
    "x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "i486": "386", "i586": "386", "i686": "386",
    "armhf": "arm", "armel": "arm", "armv6l": "arm", "armv7l": "arm", "armv8l": "arm", "loongarch64": "loong64",
    "mipsel": "mipsle", "mips64el": "mips64le", "ppc64el": "ppc64le",
}  # fmt: skip
_ARM_VARIANTS = {"armhf": "v7", "armel": "v6", "armv6l": "v6", "armv7l": "v7", "armv8l": "v8"}
_WORD = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class Platform:
    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def normalize(os: str, architecture: str, variant: str = "") -> Platform:
    """The one spelling of a platform: ``x86_64`` is amd64, arm64's v8 goes without saying, arm without a variant is v7."""
    os, name, variant = os.lower() or "linux", architecture.lower(), variant.lower()
    architecture = _ARCHITECTURES.get(name, name)
    if variant and variant[0].isdigit():
        variant = f"v{variant}"
    if architecture == "arm":
        variant = variant or _ARM_VARIANTS.get(name, "v7")
    elif (architecture, variant) in (("arm64", "v8"), ("arm64", "v8.0"), ("amd64", "v1")):
        variant = ""
    return Platform(os, architecture, variant)


def parse(text: str, host: Platform) -> Platform:
    """What ``--platform`` names: os/arch[/variant], or one of os and arch alone. Errors: invalid_argument."""
    parts = text.split("/")
    if len(parts) > 3 or not all(_WORD.fullmatch(part) for part in parts):
        raise InvalidArgument(f'invalid platform: "{text}"', hint="os/architecture[/variant], like linux/arm64")
    if len(parts) == 1:
        if parts[0].lower() in ("linux", "windows", "freebsd", "darwin"):
            return Platform(parts[0].lower(), host.architecture, host.variant)
        return normalize(host.os, parts[0])
    return normalize(*parts)


def host_platform(machine: str, cpu_flags: Iterable[str] = ()) -> Platform:
    """The platform of a host whose ``uname -m`` is ``machine``; on amd64 the level its CPU flags allow (x86-64-v2…v4)."""
    platform = normalize("linux", machine)
    if platform.architecture != "amd64":
        return platform
    flags, level = set(cpu_flags), 1
    for number, needed in (
        (2, {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
        (3, {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
        (4, {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ):
        if not needed <= flags:
            break
        level = number
    return Platform("linux", "amd64", f"v{level}" if level > 1 else "")


def candidates(wanted: Platform) -> list[Platform]:
    """What runs on ``wanted``, best first: lower variants of the same architecture, and for arm64 32-bit arm."""
    found = [wanted]
    number = wanted.variant.removeprefix("v")
    if wanted.architecture == "amd64":
        found += [normalize(wanted.os, "amd64", f"v{n}") for n in range(int(number or 1) - 1, 0, -1)]
    elif wanted.architecture == "arm" and number.isdigit():
        found += [Platform(wanted.os, "arm", f"v{n}") for n in range(int(number) - 1, 4, -1)]
    elif wanted.architecture == "arm64":
        if wanted.variant:
            found.append(Platform(wanted.os, "arm64"))
        found += [Platform(wanted.os, "arm", f"v{n}") for n in (8, 7, 6, 5)]
    return found


def select(entries: Iterable[tuple[Platform, str]], wanted: Platform) -> str | None:
    """Of an index's (platform, digest) pairs the digest that fits best, the first one among equals; None if none runs there."""
    listed = list(entries)
    for candidate in candidates(wanted):
        for platform, digest in listed:
            if platform == candidate:
                return digest
    return None


def runs_on(platform: Platform, wanted: Platform) -> bool:
    """Whether an image of ``platform`` is what somebody who asked for ``wanted`` gets."""
    return platform in candidates(wanted)
