"""The registry client against a server that does what public registries do: bearer tokens, redirects, broken connections, refusals."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import trio
from tests import images
from tests.imaged_support import imaged, tar_of

import pyx_imaged.registry
from pyx_bus import errors
from pyx_imaged.registry import Registry

LAYER = tar_of(("data", "f", bytes(range(256)) * 8000))


class Server(ThreadingHTTPServer):
    """Serves an OCI layout as ``some/repo``. Switches: what it asks for, and how it misbehaves."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that are told to go away do

    def __init__(self, layout: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.layout = layout
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.auth = "Bearer"
        self.deny = False
        self.break_after = 0
        self.ranges = True
        self.redirect = False
        self.always: int = 0
        self.scopes: list[str] = []
        self.requests: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        server, url = self.server, urlsplit(self.path)
        server.requests.append(url.path)
        if url.path == "/token":
            if server.deny:
                return self.answer(401, b'{"errors":[{"message":"no\\nsuch account"}]}')
            server.scopes += parse_qs(url.query)["scope"]
            return self.answer(200, json.dumps({"access_token": "secret", "expires_in": 300}).encode())
        if server.always:
            return self.answer(server.always, b'{"errors":[{"message":"slow down"}]}')
        cdn = url.path.startswith("/cdn/")
        if cdn and "Authorization" in self.headers and self.headers["Host"].startswith("localhost"):
            return self.answer(400, b"credentials sent to somebody else")
        if server.auth and not cdn and self.headers.get("Authorization") != "Bearer secret":
            realm = f'{server.auth} realm="http://{server.address}/token",service="test",scope="repository:some/repo:pull"'
            return self.answer(401, b"{}", WWW_Authenticate=realm)
        if match := re.fullmatch(r"/v2/some/repo/manifests/(.+)", url.path):
            digest = json.loads((server.layout / "index.json").read_text())["manifests"][0]["digest"]
            data = (server.layout / "blobs/sha256" / digest[7:]).read_bytes()
            return self.answer(200, data, Content_Type="application/vnd.oci.image.manifest.v1+json", Docker_Content_Digest=digest)
        match = re.fullmatch(r"/(?:v2/some/repo/blobs|cdn)/sha256:([0-9a-f]{64})", url.path)
        if not match or not (server.layout / "blobs/sha256" / match[1]).exists():
            return self.answer(404, b'{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown"}]}')
        if server.redirect and not cdn:
            target = f"http://localhost:{server.server_address[1]}/cdn/sha256:{match[1]}"
            return self.answer(307, b"", Location=target)
        return self.blob((server.layout / "blobs/sha256" / match[1]).read_bytes())

    def blob(self, data: bytes) -> None:
        start = 0
        if self.server.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.server.break_after and len(data) - start > self.server.break_after:
            self.wfile.write(data[start : start + self.server.break_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(data[start:])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(images.oci_layout(tmp_path / "layout", [LAYER], compress="none"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


async def test_an_anonymous_token(tmp_path: Path, server: Server) -> None:
    async with imaged(tmp_path / "i") as service:
        await service.pull(f"{server.address}/some/repo:x")
        assert server.scopes == ["repository:some/repo:pull"]
        assert server.requests.count("/token") == 1


async def test_credentials_wanted(tmp_path: Path, server: Server) -> None:
    async with imaged(tmp_path / "i") as service:
        server.deny = True
        with pytest.raises(errors.PermissionDenied, match=r"pull access denied.*: no such account"):
            await service.pull(f"{server.address}/some/repo:x")
        server.auth = "Basic"
        with pytest.raises(errors.PermissionDenied, match="wants credentials"):
            await service.pull(f"{server.address}/some/repo:x")
        assert set((await service.settled()).values()) == {0}


async def test_refusals(tmp_path: Path, server: Server) -> None:
    async with imaged(tmp_path / "i") as service:
        for status, kind in ((429, errors.ResourceExhausted), (403, errors.PermissionDenied), (418, errors.InvalidArgument)):
            server.always = status
            with pytest.raises(kind, match="slow down"):
                await service.pull(f"{server.address}/some/repo:x")
        server.always = 0
        with pytest.raises(errors.NotFound, match="not found in registry"):
            await service.pull(f"{server.address}/some/other:x")


async def test_a_redirect_elsewhere_gets_no_token(tmp_path: Path, server: Server) -> None:
    server.redirect = True
    async with imaged(tmp_path / "i") as service:
        await service.pull(f"{server.address}/some/repo:x")
    assert any(request.startswith("/cdn/") for request in server.requests)


@pytest.mark.parametrize("ranges", [True, False])
async def test_a_broken_download_goes_on(
    tmp_path: Path, server: Server, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyx_imaged.registry, "_PAUSE_S", 0.01)
    server.break_after, server.ranges = 600_000, ranges
    async with imaged(tmp_path / "i") as service:
        if ranges:
            pulled = await service.pull(f"{server.address}/some/repo:x")
            assert (await service.inspect(pulled.id))["Size"] == 256 * 8000
            assert len([request for request in server.requests if "/blobs/" in request]) == 1 + 4
        else:
            with pytest.raises(errors.Unavailable, match="download of sha256:"):
                await service.pull(f"{server.address}/some/repo:x")
            assert set((await service.settled()).values()) == {0}


@pytest.mark.parametrize("how", ["unavailable", "cancelled"])
async def test_an_interrupted_pull_goes_on_with_the_next(
    tmp_path: Path, server: Server, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two layers came whole, then the registry broke down: asked again, only the second one is fetched."""
    monkeypatch.setattr(pyx_imaged.registry, "_PAUSE_S", 0.01)
    server.layout = images.oci_layout(tmp_path / "two", [tar_of(("small", "f", "s")), LAYER], compress="none")
    server.break_after, server.ranges = 600_000, False
    if how == "cancelled":
        monkeypatch.setattr(pyx_imaged.registry, "_PAUSE_S", 1000.0)
    async with imaged(tmp_path / "i") as service:
        name = f"{server.address}/some/repo:x"
        if how == "unavailable":
            with pytest.raises(errors.Unavailable):
                await service.pull(name)
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.pull, name)
                with trio.fail_after(10):
                    while not service.kept()["layers"]:
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        with trio.fail_after(10):
            while service.kept()["ingest"]:
                await trio.sleep(0.01)
        assert await service.settled() == {"blobs/sha256": 1, "layers": 1, "snapshots": 0, "ingest": 0, "trash": 0}
        server.break_after = 0
        server.requests.clear()
        await service.pull(name)
        assert [item.status for item in service.progress].count("Already exists") == 1
        assert len([request for request in server.requests if "/blobs/" in request]) == 2  # the config and one layer


@pytest.mark.parametrize(
    ("domain", "insecure", "expected"),
    [
        ("localhost", [], True), ("localhost:5000", [], True), ("127.3.2.1:80", [], True), ("[::1]:5000", [], True),
        ("10.0.0.1:5000", [], False), ("example.org", [], False), ("example.org:5000", ["example.org:5000"], True),
        ("example.org:5001", ["example.org:5000"], False), ("example.org:1", ["example.org"], True),
        ("10.0.0.1:5000", ["10.0.0.0/8"], True), ("localhost.example.org", [], False), ("docker.io", [], False),
    ],
)  # fmt: skip
def test_who_may_be_insecure(domain: str, insecure: list[str], expected: bool) -> None:
    assert Registry(insecure).may_be_insecure(domain) is expected
