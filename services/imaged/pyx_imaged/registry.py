"""A registry's client: what a pull needs of the distribution specification (pull; token authentication of Docker's registries).

Anonymous. A registry on a loopback address, or one named in ``insecure_registries``, may speak plain HTTP or have a certificate
nobody knows (tried in that order: https, then http, as Docker does); all others get https with verification. What comes is checked
against its digest before anybody sees it; a layer's stream is checked by whoever consumes it.

httpx is imported with the first pull: an engine that never pulls needn't hold its 10 MiB.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from pyx_bus import __version__
from pyx_bus.errors import (
    BusError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)

from . import manifest
from .manifest import Descriptor
from .model import Digest, sha256
from .reference import Reference, is_digest

if TYPE_CHECKING:
    import httpx

_HUB = "registry-1.docker.io"
_CONNECT_TIMEOUT_S = 15.0
_READ_TIMEOUT_S = 60.0
_SMALL_BYTES = 64 << 10  # of an error's text or a token
_ATTEMPTS = 5
_PAUSE_S = 0.2  # before the second attempt, doubled before each further one
_TOKEN_LIFE_S = 60.0  # what the token specification grants where the answer doesn't say
_PARAMETER = re.compile(r'(\w+)=(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))')


@dataclass(frozen=True, slots=True)
class Fetched:
    """A manifest or index as the registry gave it, verified; ``digest`` is of exactly these bytes."""

    data: bytes
    digest: Digest
    media_type: str
    document: dict[str, Any]


class Registry:
    """``insecure`` are host[:port] or CIDR networks, as in Docker's daemon.json."""

    def __init__(self, insecure: Collection[str] = ()) -> None:
        self._insecure = [entry for entry in insecure if "/" not in entry]
        self._networks = [ipaddress.ip_network(entry) for entry in insecure if "/" in entry]
        self._networks += [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]

    def may_be_insecure(self, domain: str) -> bool:
        """Whether plain HTTP is allowed with this registry."""
        host = domain[1 : domain.index("]")] if domain.startswith("[") else domain.partition(":")[0]
        if domain in self._insecure or host in self._insecure or host == "localhost":
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    @asynccontextmanager
    async def repository(self, name: Reference) -> AsyncIterator[Repository]:
        """A connection to one repository for the length of the block. Errors: unavailable."""
        import httpx

        insecure = self.may_be_insecure(name.domain)
        host = _HUB if name.domain == "docker.io" else name.domain
        async with httpx.AsyncClient(
            follow_redirects=True,
            verify=_trust() if not insecure else False,
            timeout=httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            # Compressed on the way, a blob isn't the bytes its digest is of, and a small answer may become a huge one.
            headers={"User-Agent": f"pyx/{__version__}", "Accept-Encoding": "identity"},
            limits=httpx.Limits(max_connections=8),
        ) as client:
            base = f"https://{host}"
            if insecure:
                try:
                    async with client.stream("GET", f"{base}/v2/"):
                        pass
                except (httpx.TransportError, httpx.TooManyRedirects):
                    base = f"http://{host}"
            yield Repository(client, base, name)


class Repository:
    """Reads of one repository, with a token where the registry wants one; temporary failures are tried again."""

    def __init__(self, client: httpx.AsyncClient, base: str, name: Reference) -> None:
        self._client = client
        self._base = base
        self._name = name
        self._token = ""
        self._token_until = 0.0
        self._token_lock = trio.Lock()

    async def manifest(self, target: str) -> Fetched:
        """A manifest or index by tag or digest. Errors: not_found, permission_denied, unavailable, invalid_argument."""
        accept = {"Accept": ", ".join(manifest.ACCEPT)}
        url = f"{self._base}/v2/{self._name.path}/manifests/{target}"
        data, headers = await self._get(url, accept, manifest.MANIFEST_LIMIT, f'manifest "{target}"')
        digest = sha256(data)
        claimed = target if is_digest(target) else headers.get("docker-content-digest", digest)
        if digest != claimed:
            raise InvalidArgument(f'manifest of "{self._name.familiar}" has the wrong digest {digest} instead of {claimed}')
        media_type = headers.get("content-type", "").partition(";")[0].strip()
        return Fetched(data, digest, media_type, manifest.load(data, "image manifest"))

    async def blob(self, item: Descriptor, limit: int) -> bytes:
        """A small blob, whole and verified. Errors: as ``manifest``."""
        data, _ = await self._get(f"{self._base}/v2/{self._name.path}/blobs/{item.digest}", {}, limit, f"blob {item.digest}")
        if sha256(data) != item.digest:
            raise InvalidArgument(f"blob {item.digest} has the wrong digest {sha256(data)}")
        return data

    async def blob_stream(self, digest: str, size: int) -> AsyncIterator[bytes]:
        """A blob piece by piece; after a broken connection it goes on where it stopped. Not verified.

        Errors: as ``manifest``; invalid_argument if more comes than ``size`` says.
        """
        import httpx

        url = f"{self._base}/v2/{self._name.path}/blobs/{digest}"
        done, attempt = 0, 0
        while True:
            try:
                async with self._open(url, {"Range": f"bytes={done}-"} if done else {}, f"blob {digest}") as response:
                    skip = done if response.status_code == 200 else 0  # it doesn't know ranges: pass over what we have
                    async for chunk in response.aiter_raw(1 << 18):
                        if skip >= len(chunk):
                            skip -= len(chunk)
                            continue
                        chunk, skip = chunk[skip:], 0
                        done += len(chunk)
                        attempt = 0
                        if 0 <= size < done:
                            raise InvalidArgument(f"blob {digest} has more than its {size} bytes")
                        yield chunk
                if size < 0 or done >= size:
                    return
                failure = f"the registry sent {done} of {size} bytes"
            except httpx.TransportError as error:
                failure = _reason(error)
            attempt += 1
            if attempt >= _ATTEMPTS:
                raise Unavailable(f'download of {digest} from "{self._name.domain}" failed: {failure}')
            await trio.sleep(_PAUSE_S * 2 ** (attempt - 1))  # give a registry that's restarting a moment

    async def _get(
        self, url: str, headers: dict[str, str], limit: int, what: str
    ) -> tuple[bytes, httpx.Headers]:
        import httpx

        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._open(url, headers, what) as response:
                    data = await _beginning(response, limit + 1)
                    if len(data) > limit:
                        raise InvalidArgument(f"{what} is larger than {limit} bytes")
                    return data, response.headers
            except httpx.TransportError as error:
                if attempt >= _ATTEMPTS or isinstance(error, httpx.ConnectError):
                    raise Unavailable(
                        f'registry "{self._name.domain}" can\'t be reached: {_reason(error)}',
                        hint="a registry without TLS must be listed in insecure_registries" if "SSL" in str(error) else "",
                    ) from error
            except Unavailable:
                if attempt >= _ATTEMPTS:
                    raise
            await trio.sleep(_PAUSE_S * 2 ** (attempt - 1))

    @asynccontextmanager
    async def _open(self, url: str, headers: dict[str, str], what: str) -> AsyncIterator[httpx.Response]:
        """A successful response; the rest as typed errors. Asks for a token once if it's refused without one."""
        import httpx

        try:
            async with self._followed(url, headers, what) as response:
                yield response
        except (httpx.InvalidURL, httpx.TooManyRedirects) as error:
            raise InvalidArgument(f'registry "{self._name.domain}" leads nowhere for {what}: {_reason(error)}') from None

    @asynccontextmanager
    async def _followed(self, url: str, headers: dict[str, str], what: str) -> AsyncIterator[httpx.Response]:
        for last in (False, True):
            sent = {**headers, "Authorization": f"Bearer {self._token}"} if self._token else headers
            used = self._token
            async with self._client.stream("GET", url, headers=sent) as response:
                if response.status_code in (200, 206):
                    yield response
                    return
                body = await _beginning(response)
                if response.status_code != 401 or last:
                    raise self._error(response.status_code, body, what)
                challenge = response.headers.get("www-authenticate", "")
            await self._authenticate(challenge, used)

    async def _authenticate(self, challenge: str, used: str) -> None:
        """Get an anonymous token from where the registry says (distribution's token specification)."""
        async with self._token_lock:
            if self._token != used and time.monotonic() < self._token_until:
                return  # another layer's request got one meanwhile
            scheme, _, rest = challenge.partition(" ")
            parameters = {key.lower(): quoted or plain for key, quoted, plain in _PARAMETER.findall(rest)}
            realm = parameters.get("realm", "")
            if scheme.lower() != "bearer" or not realm.startswith(("https://", "http://")):
                raise PermissionDenied(f'registry "{self._name.domain}" wants credentials for "{self._name.familiar}"')
            query = {"scope": parameters.get("scope") or f"repository:{self._name.path}:pull"}
            if "service" in parameters:
                query["service"] = parameters["service"]
            async with self._client.stream("GET", realm, params=query) as response:
                body = await _beginning(response)
            if response.status_code != 200:
                raise self._error(response.status_code, body, "token")
            answer = manifest.load(body, "token")
            token = answer.get("token") or answer.get("access_token")
            if not isinstance(token, str) or not token:
                raise PermissionDenied(f'registry "{self._name.domain}" gave no token for "{self._name.familiar}"')
            life = answer.get("expires_in")
            self._token = token
            self._token_until = time.monotonic() + (life if isinstance(life, int) and life > 0 else _TOKEN_LIFE_S)

    def _error(self, status: int, body: bytes, what: str) -> BusError:
        said = _said(body)
        name = self._name.familiar
        if status in (401, 403):
            return PermissionDenied(
                f'pull access denied for "{name}"' + (f": {said}" if said else ""),
                hint="the repository doesn't exist or wants credentials",
            )
        if status == 404:
            return NotFound(f'"{name}" not found in registry "{self._name.domain}" ({what}' + (f": {said})" if said else ")"))
        if status == 429:
            return ResourceExhausted(f'registry "{self._name.domain}" limits requests' + (f": {said}" if said else ""))
        text = f'registry "{self._name.domain}" answered {status} for {what}' + (f": {said}" if said else "")
        return Unavailable(text) if status >= 500 else InvalidArgument(text)


def _trust() -> ssl.SSLContext | bool:
    """The host's own certificate authorities, so that what an administrator added counts; httpx's bundle on a host without any."""
    paths = ssl.get_default_verify_paths()
    return ssl.create_default_context() if paths.cafile or (paths.capath and os.listdir(paths.capath)) else True


async def _beginning(response: httpx.Response, limit: int = _SMALL_BYTES) -> bytes:
    """The first ``limit`` bytes as they came: what a registry packs unasked isn't unpacked here."""
    data = bytearray()
    async for chunk in response.aiter_raw(65536):
        data += chunk
        if len(data) >= limit:
            break
    return bytes(data[:limit])


def _said(body: bytes) -> str:
    """The first message of a registry's error document; one printable line of bounded length."""
    try:
        errors = manifest.load(body, "error").get("errors")
    except InvalidArgument:
        return ""
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    text = str(first.get("message") or first.get("code") or "")
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
