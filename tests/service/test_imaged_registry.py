"""Pull from Debian's docker-registry on loopback, filled by skopeo: tags, digests, indexes, formats, failures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests import images
from tests.imaged_support import imaged, tar_of, tree

from pyx_bus import errors
from pyx_bus.contract import imaged as contract


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with images.registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="module")
def busybox(tmp_path_factory: pytest.TempPathFactory, registry: str) -> str:
    """A busybox of two layers in the registry."""
    home = tmp_path_factory.mktemp("busybox")
    base = images.busybox_tar(home / "base.tar").read_bytes()
    layout = images.oci_layout(home / "oci", [base, tar_of(("etc/motd", "f", "hello\n"), ("tmp/x", "f", "1"))])
    return images.push(f"oci:{layout}:latest", registry, "busybox:1")


def put_manifest(registry: str, repository: str, tag: str, document: dict[str, object]) -> str:
    data = json.dumps(document).encode()
    answer = httpx.put(
        f"http://{registry}/v2/{repository}/manifests/{tag}", content=data, headers={"Content-Type": str(document["mediaType"])}
    )
    answer.raise_for_status()
    return "sha256:" + hashlib.sha256(data).hexdigest()


async def test_pull_by_tag_again_and_by_digest(tmp_path: Path, busybox: str) -> None:
    async with imaged(tmp_path / "i") as service:
        pulled = await service.pull(busybox)
        assert pulled.reference == busybox and not pulled.up_to_date
        assert {item.status for item in service.progress} >= {"Pull complete", f"Digest: {pulled.digest}"}
        document = await service.inspect(busybox)
        repository = busybox.rpartition(":")[0]
        assert document["RepoTags"] == [busybox]
        assert document["RepoDigests"] == [f"{repository}@{pulled.digest}"]
        assert len(document["RootFS"]["Layers"]) == 2  # type: ignore[index]
        again = await service.pull(busybox)
        assert again.up_to_date and again.id == pulled.id
        assert any(item.status == "Already exists" for item in service.progress)
        by_digest = await service.pull(f"{repository}@{pulled.digest}")
        assert by_digest.id == pulled.id and by_digest.up_to_date
        snapshot = await service.prepare("c1", busybox)
        assert snapshot.image.id == pulled.id and snapshot.image.cmd == ["sh"]
    # a second start finds it all again
    async with imaged(tmp_path / "i") as service:
        assert await service.names() == [busybox]
        assert (await service.prepare("c1", busybox)).writable_path == snapshot.writable_path
        with pytest.raises(errors.Conflict, match="used by container c1"):
            await service.bus.call(contract.REMOVE, contract.RemoveImage(reference=busybox))
        await service.bus.call(contract.RELEASE, contract.ReleaseSnapshot(container_id="c1"))
        removed = await service.bus.call(contract.REMOVE, contract.RemoveImage(reference=busybox))
        assert removed.deleted[0] == pulled.id and len(removed.deleted) == 3
        assert set((await service.settled()).values()) == {0}


async def test_a_directory_the_layer_only_implies_keeps_its_attributes(tmp_path: Path, busybox: str) -> None:
    async with imaged(tmp_path / "i") as service:
        await service.pull(busybox)
        document = await service.inspect(busybox)
        top = Path(document["GraphDriver"]["Data"]["UpperDir"])  # type: ignore[index]
        assert tree(top) == {"etc": "dir", "etc/motd": "hello\n", "tmp": "dir", "tmp/x": "1"}
        assert (top / "tmp").stat().st_mode & 0o7777 == 0o1777


@pytest.mark.parametrize("form", ["v2s2", "oci"])
@pytest.mark.parametrize("compress", ["gzip", "zstd"])
async def test_manifest_formats_and_compressions(tmp_path: Path, registry: str, form: str, compress: str) -> None:
    if (form, compress) == ("v2s2", "zstd"):
        compress = "none"  # schema 2 knows no zstd; skopeo compresses an uncompressed layer by gzip on the way
    layer = tar_of(("hello", "f", f"{form} {compress}"))
    layout = images.oci_layout(tmp_path / "oci", [layer], compress=compress)
    name = f"{registry}/forms/{form}-{compress}:x"
    images.run_quiet(
        "skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", "-f", form, f"oci:{layout}:latest",
        f"docker://{name}",
    )  # fmt: skip
    async with imaged(tmp_path / "i") as service:
        await service.pull(name)
        document = await service.inspect(name)
        assert tree(document["GraphDriver"]["Data"]["UpperDir"]) == {"hello": f"{form} {compress}"}  # type: ignore[index]


async def test_the_hosts_platform_out_of_an_index(tmp_path: Path, registry: str) -> None:
    host, other = images.oci_architecture(), "s390x"
    manifests = []
    for architecture in (other, host):
        layout = images.oci_layout(tmp_path / architecture, [tar_of(("arch", "f", architecture))], architecture=architecture)
        images.push(f"oci:{layout}:latest", registry, f"multi:{architecture}")
        entry = json.loads((layout / "index.json").read_text())["manifests"][0]
        del entry["annotations"]
        manifests.append({**entry, "platform": {"os": "linux", "architecture": architecture}})
    unknown = {**manifests[0], "platform": {"os": "unknown", "architecture": "unknown"}}
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [unknown, *manifests],
    }
    digest = put_manifest(registry, "multi", "latest", index)
    async with imaged(tmp_path / "i") as service:
        name = f"{registry}/multi"
        pulled = await service.pull(name)
        assert pulled.digest == digest
        assert (await service.inspect(name))["Architecture"] == host
        foreign = await service.pull(name, platform=f"linux/{other}")
        assert foreign.id != pulled.id and (await service.inspect(foreign.id))["Architecture"] == other
        with pytest.raises(errors.NotFound, match=f'is here for "linux/{other}"'):
            await service.bus.call(contract.RESOLVE, contract.ResolveImage(reference=name, platform=f"linux/{host}"))
        with pytest.raises(errors.NotFound, match='no image for the platform "linux/riscv64"') as caught:
            await service.pull(name, platform="linux/riscv64")
        assert caught.value.hint == f"it has: linux/{host}, linux/{other}"


async def test_layers_are_shared_between_images(tmp_path: Path, registry: str, busybox: str) -> None:
    base = images.busybox_tar(tmp_path / "base.tar").read_bytes()
    layout = images.oci_layout(tmp_path / "oci", [base, tar_of(("other", "f", "layer"))])
    other = images.push(f"oci:{layout}:latest", registry, "other:1")
    async with imaged(tmp_path / "i") as service:
        await service.pull(busybox)
        assert service.kept()["layers"] == 2
        await service.pull(other)
        assert [item.status for item in service.progress].count("Already exists") == 1
        assert service.kept()["layers"] == 3
        await service.bus.call(contract.REMOVE, contract.RemoveImage(reference=busybox))
        assert (await service.settled())["layers"] == 2
        assert tree((await service.inspect(other))["GraphDriver"]["Data"]["UpperDir"]) == {"other": "layer"}  # type: ignore[index]


async def test_what_isnt_there(tmp_path: Path, registry: str) -> None:
    async with imaged(tmp_path / "i") as service:
        for name in (f"{registry}/nosuch:1", f"{registry}/nosuch@sha256:{'0' * 64}"):
            with pytest.raises(errors.NotFound, match="not found in registry"):
                await service.pull(name)
        with pytest.raises(errors.Unavailable, match="can't be reached"):
            await service.pull(f"127.0.0.1:{images.free_port()}/x:1")
        with pytest.raises(errors.InvalidArgument, match="invalid reference"):
            await service.pull("x/UPPER")
        assert set((await service.settled()).values()) == {0}


async def test_a_layer_of_wrong_content_leaves_nothing(tmp_path: Path) -> None:
    """The registry's own store is damaged: one byte of a layer's blob changed, so digest and content disagree."""
    with images.registry(tmp_path / "registry") as address:
        layers = [tar_of(("a", "f", "first")), tar_of(("b", "f", "second"))]
        layout = images.oci_layout(tmp_path / "oci", layers, compress="none")
        reference = images.push(f"oci:{layout}:latest", address, "broken:1")
        entry = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
        manifest = json.loads((layout / "blobs/sha256" / entry.removeprefix("sha256:")).read_text())
        damaged = 0
        for blob in (tmp_path / "registry" / "data").rglob("blobs/sha256/*/*/data"):
            content = blob.read_bytes()
            if b"second" in content:
                blob.write_bytes(content.replace(b"second", b"sEcond"))
                damaged += 1
            elif content.startswith(b"\x1f\x8b") and len(manifest["layers"]) == 2:
                import gzip

                plain = gzip.decompress(content)
                if b"second" in plain:
                    changed = gzip.compress(plain.replace(b"second", b"sEcond"))
                    blob.write_bytes(changed[: len(content)].ljust(len(content), b"\0"))
                    damaged += 1
        assert damaged == 1
        async with imaged(tmp_path / "i") as service:
            with pytest.raises(errors.InvalidArgument, match=r"wrong digest|damaged|bytes instead of|has more than"):
                await service.pull(reference)
            assert set((await service.settled()).values()) == {0}
            assert await service.names() == []
