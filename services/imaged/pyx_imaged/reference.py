"""Image references as Docker reads them (distribution's ``reference`` package). Pure.

``[domain/]path[:tag][@digest]``: a first component is a domain if it has a dot or a colon or is ``localhost`` (or has capitals);
without one it's ``docker.io``, and there a path of one component lies under ``library/``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyx_bus.errors import InvalidArgument

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"(?:sha256:)?[0-9a-f]{1,64}")
_NAME_LIMIT = 255  # distribution's NameTotalLengthMax


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalized reference. With a digest the tag says nothing more (``name:tag@digest`` keeps both, the digest decides)."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        """``docker.io/library/busybox``."""
        return f"{self.domain}/{self.path}"

    @property
    def familiar_repository(self) -> str:
        """The shortest name that means this repository, as Docker prints it: ``busybox``."""
        if self.domain != DEFAULT_DOMAIN:
            return self.repository
        return self.path.removeprefix("library/") if self.path.count("/") == 1 else self.path

    @property
    def familiar(self) -> str:
        """``busybox:latest``, ``busybox@sha256:…``, ``127.0.0.1:5000/a/b:1``."""
        if self.digest:
            return f"{self.familiar_repository}@{self.digest}"
        return f"{self.familiar_repository}:{self.tag}"

    @property
    def canonical(self) -> str:
        """``docker.io/library/busybox:latest`` or ``…@sha256:…``: the key under which a name is kept."""
        return f"{self.repository}@{self.digest}" if self.digest else f"{self.repository}:{self.tag}"

    @property
    def target(self) -> str:
        """What to ask a registry for: the digest if there is one, else the tag."""
        return self.digest or self.tag


def parse(text: str) -> Reference:
    """The reference ``text`` means, with tag ``latest`` where neither tag nor digest is given. Errors: invalid_argument."""
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidArgument(f'invalid reference: "{text}"', hint="a digest is sha256: and 64 lowercase hex digits")
    if not at and _ID.fullmatch(rest):
        raise InvalidArgument(f'invalid reference: "{text}"', hint="64 hex digits are an image's ID, not a name")
    first, slash, remainder = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        domain, path = first, remainder
    else:
        domain, path = DEFAULT_DOMAIN, rest
    if domain == "index.docker.io":
        domain = DEFAULT_DOMAIN
    path, colon, tag = path.partition(":")
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = f"library/{path}"
    if not _DOMAIN.fullmatch(domain):
        raise InvalidArgument(f'invalid reference: "{text}"', hint=f'"{domain}" is no registry\'s address')
    if not _PATH.fullmatch(path):
        hint = "a repository's name must be lowercase" if path != path.lower() else ""
        raise InvalidArgument(f'invalid reference: "{text}"', hint=hint)
    if colon and not _TAG.fullmatch(tag):
        raise InvalidArgument(f'invalid reference: "{text}"', hint="a tag has up to 128 letters, digits, _, . and -")
    if len(domain) + 1 + len(path) > _NAME_LIMIT:
        raise InvalidArgument(f'invalid reference: "{text}"', hint=f"a repository's name has at most {_NAME_LIMIT} characters")
    return Reference(domain, path, tag or ("" if digest else DEFAULT_TAG), digest)


def parse_or_none(text: str) -> Reference | None:
    """Like ``parse``, but None for what isn't a reference."""
    try:
        return parse(text)
    except InvalidArgument:
        return None


def is_digest(text: str) -> bool:
    """Whether ``text`` is ``sha256:`` and 64 hex digits: the only form of digest that is kept."""
    return _DIGEST.fullmatch(text) is not None


def id_prefix(text: str) -> str | None:
    """The hex digits of an image ID or a prefix of one; None if it can't be that."""
    return text.removeprefix("sha256:") if _PREFIX.fullmatch(text) else None
