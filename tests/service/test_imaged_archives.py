"""``load`` of archives as skopeo and podman write them, and of ones nobody should have written."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from tests import images
from tests.imaged_support import imaged, tar_of, tree

from pyx_bus import errors
from pyx_bus.contract import imaged as contract

LAYERS = [
    tar_of(("etc", "d", None), ("etc/one", "f", "1"), ("etc/gone", "f", "x"), ("link", "s", "etc/one")),
    tar_of(("etc/two", "f", "2"), ("etc/.wh.gone", "f", "")),
]


def skopeo(source: str, target: str, *options: str) -> None:
    images.run_quiet("skopeo", "--insecure-policy", "copy", "-q", *options, source, target)


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return images.oci_layout(tmp_path / "layout", LAYERS, config={"Cmd": ["/link"], "Labels": {"a": "b"}})


async def check(service: Any, name: str) -> None:
    document = await service.inspect(name)
    assert document["RootFS"]["Layers"] == ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in LAYERS]
    assert document["Config"]["Cmd"] == ["/link"]
    assert tree(document["GraphDriver"]["Data"]["LowerDir"])["etc/one"] == "1"
    assert tree(document["GraphDriver"]["Data"]["UpperDir"]) == {"etc": "dir", "etc/two": "2", "etc/gone": "dev"}


@pytest.mark.parametrize("compress", ["", "gzip", "zstd", "xz", "bzip2"])
async def test_docker_archive_of_skopeo(tmp_path: Path, layout: Path, compress: str) -> None:
    archive = tmp_path / "a.tar"
    skopeo(f"oci:{layout}:latest", f"docker-archive:{archive}:local/test:1", "--additional-tag", "other:2")
    pack = {"gzip": gzip.compress, "zstd": zstandard.compress, "xz": lzma.compress, "bzip2": bz2.compress}.get(compress)
    if pack is not None:
        archive.write_bytes(pack(archive.read_bytes()))
    async with imaged(tmp_path / "i") as service:
        loaded = await service.load(archive)
        assert sorted(loaded.references) == ["local/test:1", "other:2"] and loaded.ids == []
        await check(service, "local/test:1")
        assert service.kept()["ingest"] == 0


async def test_oci_archive_of_skopeo(tmp_path: Path, layout: Path) -> None:
    archive = tmp_path / "a.tar"
    skopeo(f"oci:{layout}:latest", f"oci-archive:{archive}:busybox:oci")
    async with imaged(tmp_path / "i") as service:
        assert (await service.load(archive)).references == ["busybox:oci"]
        await check(service, "busybox:oci")
        again = await service.load(archive)
        assert again.references == ["busybox:oci"] and service.kept()["layers"] == 2


async def test_an_archive_without_a_name(tmp_path: Path, layout: Path) -> None:
    archive = tmp_path / "a.tar"
    skopeo(f"oci:{layout}:latest", f"oci-archive:{archive}")
    async with imaged(tmp_path / "i") as service:
        loaded = await service.load(archive)
        assert loaded.references == [] and len(loaded.ids) == 1
        await check(service, loaded.ids[0])
        await check(service, loaded.ids[0][7:19])


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
async def test_archives_of_podman(tmp_path: Path, layout: Path, form: str) -> None:
    runroot = tempfile.mkdtemp(prefix="pyx-podman-")  # podman takes no more than 50 characters
    podman = ["podman", "--root", str(tmp_path / "p"), "--runroot", runroot, "--storage-driver", "vfs"]
    archive = tmp_path / "a.tar"
    skopeo(f"oci:{layout}:latest", f"docker-archive:{tmp_path / 'in.tar'}:docker.io/library/pod:1")
    images.run_quiet(*podman, "load", "-q", "-i", tmp_path / "in.tar")
    images.run_quiet(*podman, "tag", "pod:1", "localhost/second:2")
    names = ["localhost/second:2", "pod:1"] if form == "docker-archive" else ["pod:1"]
    images.run_quiet(*podman, "save", "-q", "--format", form, *(["-m"] if len(names) > 1 else []), "-o", archive, *names)
    shutil.rmtree(runroot)
    async with imaged(tmp_path / "i") as service:
        loaded = await service.load(archive)
        assert sorted(loaded.references) == names
        await check(service, "pod:1")


async def test_several_images_in_one_archive(tmp_path: Path, layout: Path) -> None:
    images.oci_layout(layout, [LAYERS[0], tar_of(("third", "f", "3"))], tag="docker.io/library/third:1")
    archive = tmp_path / "a.tar"
    images.run_quiet("tar", "-C", layout, "-cf", archive, ".")
    async with imaged(tmp_path / "i") as service:
        loaded = await service.load(archive)
        assert loaded.references == ["third:1"] and len(loaded.ids) == 1
        assert service.kept()["layers"] == 3


async def test_layers_shared_by_links_as_old_docker_saved_them(tmp_path: Path) -> None:
    config = {
        "architecture": images.oci_architecture(), "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in LAYERS]},
    }  # fmt: skip
    data = json.dumps(config).encode()
    name = hashlib.sha256(data).hexdigest() + ".json"
    manifest = [{"Config": name, "RepoTags": ["old:1"], "Layers": ["aa/layer.tar", "bb/layer.tar"]}]
    archive = tmp_path / "a.tar"
    archive.write_bytes(
        tar_of(
            ("aa", "d", None), ("aa/layer.tar", "s", "../cc.tar"), ("bb/layer.tar", "f", LAYERS[1]), ("cc.tar", "f", LAYERS[0]),
            (name, "f", data), ("manifest.json", "f", json.dumps(manifest)), ("repositories", "f", "{}"),
        )
    )  # fmt: skip
    async with imaged(tmp_path / "i") as service:
        assert (await service.load(archive)).references == ["old:1"]


def rewrite(archive: Path, change: Any) -> None:
    """Write a tar anew with ``change(name, data)`` instead of each file's data; None leaves it out."""
    out = io.BytesIO()
    with tarfile.open(archive) as old, tarfile.open(fileobj=out, mode="w") as new:
        for info in old:
            file = old.extractfile(info) if info.isfile() else None
            data = change(info.name, file.read()) if file else b""
            if data is None:
                continue
            info.size = len(data) if file else 0
            new.addfile(info, io.BytesIO(data))
    archive.write_bytes(out.getvalue())


async def refused(tmp_path: Path, archive: Path, message: str, kind: type[errors.BusError] = errors.InvalidArgument) -> None:
    async with imaged(tmp_path / "i") as service:
        with pytest.raises(kind, match=message):
            await service.load(archive)
        assert set((await service.settled()).values()) == {0}
        assert await service.names() == []


async def test_an_oci_layer_of_the_wrong_digest(tmp_path: Path, layout: Path) -> None:
    archive = tmp_path / "a.tar"
    skopeo(f"oci:{layout}:latest", f"oci-archive:{archive}:x:1")
    entry = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    manifest = json.loads((layout / "blobs/sha256" / entry.removeprefix("sha256:")).read_text())
    hexdigest = manifest["layers"][1]["digest"].removeprefix("sha256:")
    other = gzip.compress(tar_of(("etc/evil", "f", "x")))
    rewrite(archive, lambda name, data: other if name.endswith(hexdigest) else data)
    await refused(tmp_path, archive, "wrong digest")


async def test_a_docker_layer_of_the_wrong_digest(tmp_path: Path, layout: Path) -> None:
    archive = tmp_path / "a.tar"
    skopeo(f"oci:{layout}:latest", f"docker-archive:{archive}:x:1")
    other = tar_of(("etc/evil", "f", "x"))
    rewrite(archive, lambda name, data: other if data == LAYERS[1] else data)
    await refused(tmp_path, archive, "wrong digest")


async def test_a_config_of_the_wrong_digest(tmp_path: Path, layout: Path) -> None:
    archive = tmp_path / "a.tar"
    skopeo(f"oci:{layout}:latest", f"docker-archive:{archive}:x:1")
    rewrite(archive, lambda name, data: data + b" " if b'"rootfs"' in data else data)
    await refused(tmp_path, archive, "wrong digest")


async def test_a_missing_layer(tmp_path: Path, layout: Path) -> None:
    archive = tmp_path / "a.tar"
    skopeo(f"oci:{layout}:latest", f"docker-archive:{archive}:x:1")
    rewrite(archive, lambda name, data: None if data == LAYERS[0] else data)
    await refused(tmp_path, archive, "without its layer")


@pytest.mark.parametrize("cut", [100, 600, 5000, -3000])
@pytest.mark.parametrize("compress", [False, True])
async def test_truncated(tmp_path: Path, layout: Path, cut: int, compress: bool) -> None:
    archive = tmp_path / "a.tar"
    skopeo(f"oci:{layout}:latest", f"docker-archive:{archive}:x:1")
    data = archive.read_bytes()
    data = gzip.compress(data) if compress else data
    archive.write_bytes(data[: max(10, min(cut, len(data) * 3 // 4) if cut > 0 else len(data) // 2)])
    await refused(tmp_path, archive, "truncated|too short|without its")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty or too short"),
        (b"garbage" * 1000, "not a tar archive"),
        (b"\x1f\x8bgarbage" * 1000, "damaged gzip"),
        (b"\x28\xb5\x2f\xfdgarbage" * 1000, "damaged zstd"),
        (tar_of(("some", "f", "file")), "not an image archive"),
        (tar_of(("manifest.json", "f", "[[]]")), "not a list of images"),
        (tar_of(("manifest.json", "f", "[" * 100_000)), "not valid JSON"),
        (tar_of(("manifest.json", "f", '[{"Config":"../../../../etc/passwd","Layers":[]}]')), "without its config"),
        (tar_of(("x", "s", "/etc/passwd"), ("manifest.json", "f", '[{"Config":"x","Layers":[]}]')), "without its config"),
        (tar_of(("manifest.json", "s", "manifest.json")), "without its manifest"),
        (tar_of(("index.json", "f", '{"manifests":[{"digest":"sha256:../../x"}]}')), "invalid digest"),
    ],
)
async def test_garbage(tmp_path: Path, content: bytes, message: str) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(content)
    await refused(tmp_path, archive, message)


async def test_a_layer_that_leaves_its_root(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    evil = tar_of(("d", "s", os.fspath(victim)), ("d/keep", "f", "evil"))
    layout = images.oci_layout(tmp_path / "layout", [evil])
    archive = tmp_path / "a.tar"
    images.run_quiet("tar", "-C", layout, "-cf", archive, ".")
    await refused(tmp_path, archive, "through a link that leads nowhere")
    assert list(victim.iterdir()) == []


async def test_an_archive_beyond_the_limit(tmp_path: Path) -> None:
    layer = tar_of(("zeros", "f", bytes(50_000_000)))
    layout = images.oci_layout(tmp_path / "layout", [layer])
    archive = tmp_path / "a.tar"
    images.run_quiet("tar", "-C", layout, "-cf", archive, ".")
    assert archive.stat().st_size < 2_000_000
    async with imaged(tmp_path / "i", max_image_bytes=10_000_000) as service:
        with pytest.raises(errors.ResourceExhausted, match="more than 10000000 bytes"):
            await service.load(archive)
        assert set((await service.settled()).values()) == {0}


async def test_load_and_remove_by_id(tmp_path: Path, layout: Path) -> None:
    archive = tmp_path / "a.tar"
    skopeo(f"oci:{layout}:latest", f"docker-archive:{archive}:x/y:1", "--additional-tag", "z:2")
    async with imaged(tmp_path / "i") as service:
        await service.load(archive)
        image_id = (await service.inspect("z:2"))["Id"]
        with pytest.raises(errors.Conflict, match="several repositories"):
            await service.bus.call(contract.REMOVE, contract.RemoveImage(reference=image_id))
        first = await service.bus.call(contract.REMOVE, contract.RemoveImage(reference="x/y:1"))
        assert first.untagged == ["x/y:1"] and first.deleted == []
        second = await service.bus.call(contract.REMOVE, contract.RemoveImage(reference=image_id[7:15]))
        assert second.untagged == ["z:2"] and second.deleted[0] == image_id
        assert set((await service.settled()).values()) == {0}
