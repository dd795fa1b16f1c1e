"""imaged's pure modules: references, platforms, manifests, changes, decisions about images."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyx_bus.errors import Conflict, InvalidArgument, NotFound
from pyx_imaged import changes, manifest, plan, platforms, reference
from pyx_imaged.model import ChainID, DiffID, Digest, Image, ImageID, Layer, SnapshotRecord, chain_ids
from pyx_imaged.platforms import Platform

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "canonical", "familiar"),
    [
        ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
        ("library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("index.docker.io/library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("user/image", "docker.io/user/image:latest", "user/image:latest"),
        ("docker.io/library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
        ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
        ("127.0.0.1:5000/debian:12", "127.0.0.1:5000/debian:12", "127.0.0.1:5000/debian:12"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        ("Reg/x", "Reg/x:latest", "Reg/x:latest"),
        ("quay.io/a/b/c_d__e.f-g:T.1", "quay.io/a/b/c_d__e.f-g:T.1", "quay.io/a/b/c_d__e.f-g:T.1"),
        (f"x@sha256:{HEX}", f"docker.io/library/x@sha256:{HEX}", f"x@sha256:{HEX}"),
        (f"x:1@sha256:{HEX}", f"docker.io/library/x@sha256:{HEX}", f"x@sha256:{HEX}"),
    ],
)
def test_references(text: str, canonical: str, familiar: str) -> None:
    parsed = reference.parse(text)
    assert (parsed.canonical, parsed.familiar) == (canonical, familiar)
    assert reference.parse(familiar).canonical == canonical and reference.parse(canonical) == reference.parse(familiar)


@pytest.mark.parametrize(
    "text",
    [
        "", ":tag", "a:", "A", "a/B", "a b", "-a", "a-", "a..b", "a//b", "/a", "a/", "a:b:c", "a@", "a@sha256:12", "a@md5:x", HEX,
        f"a@sha256:{HEX.upper()}", "a:" + "t" * 129, "x" * 256, "host:port/a", "a:-b", "ä", "a\n", "a:b\n", "a___b", "..", "a/../b",
    ],
)  # fmt: skip
def test_no_references(text: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid reference"):
        reference.parse(text)


@given(st.text(alphabet="aA0._-/:@[]% \n", max_size=30))
def test_what_is_parsed_is_parsed_the_same_again(text: str) -> None:
    parsed = reference.parse_or_none(text)
    if parsed is not None:
        assert reference.parse(parsed.canonical).canonical == parsed.canonical
        assert reference.parse(parsed.familiar).canonical == parsed.canonical
        assert ".." not in parsed.path and "\n" not in parsed.canonical and " " not in parsed.canonical


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "", "linux/amd64"),
        ("x86_64", "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3", "linux/amd64/v2"),
        ("aarch64", "", "linux/arm64"),
        ("armv7l", "", "linux/arm/v7"),
        ("armv6l", "", "linux/arm/v6"),
        ("riscv64", "", "linux/riscv64"),
        ("i686", "", "linux/386"),
    ],
)
def test_host_platforms(machine: str, flags: str, expected: str) -> None:
    assert str(platforms.host_platform(machine, flags.split())) == expected


@pytest.mark.parametrize(
    ("host", "offered", "chosen"),
    [
        ("linux/amd64", "linux/arm64 linux/amd64 windows/amd64", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64 linux/amd64/v2 linux/amd64/v4", "linux/amd64/v2"),
        ("linux/amd64", "linux/amd64/v2", None),
        ("linux/amd64", "linux/386", None),
        ("linux/arm64", "linux/arm/v7 linux/arm64/v8", "linux/arm64/v8"),
        ("linux/arm64", "linux/arm/v6 linux/arm/v7", "linux/arm/v7"),
        ("linux/arm/v7", "linux/arm64 linux/arm/v5 linux/arm/v6", "linux/arm/v6"),
        ("linux/arm/v6", "linux/arm/v7", None),
        ("linux/s390x", "linux/amd64", None),
    ],
)
def test_choice_out_of_an_index(host: str, offered: str, chosen: str | None) -> None:
    entries = [(platforms.normalize(*text.split("/")), text) for text in offered.split()]
    assert platforms.select(entries, Platform(*host.split("/"))) == chosen


def test_platform_options() -> None:
    host = Platform("linux", "amd64", "v3")
    assert platforms.parse("linux/x86_64", host) == Platform("linux", "amd64")
    assert platforms.parse("arm64", host) == Platform("linux", "arm64")
    assert platforms.parse("linux", host) == host
    assert platforms.parse("linux/arm/7", host) == Platform("linux", "arm", "v7")
    for bad in ("", "a/b/c/d", "linux/", "linux/a b"):
        with pytest.raises(InvalidArgument, match="invalid platform"):
            platforms.parse(bad, host)


def test_chain_ids() -> None:
    a, b = DiffID("sha256:" + "a" * 64), DiffID("sha256:" + "b" * 64)
    second = "sha256:" + hashlib.sha256(f"{a} {b}".encode()).hexdigest()
    assert chain_ids([a, b]) == (a, second) and chain_ids([]) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2023-11-14T22:13:20Z", 1_700_000_000_000_000_000),
        ("2023-11-14T22:13:20.5Z", 1_700_000_000_500_000_000),
        ("2023-11-15T00:13:20.123456789+02:00", 1_700_000_000_123_456_789),
        ("0001-01-01T00:00:00Z", 0), ("", 0), ("yesterday", 0), (None, 0), (17, 0),
    ],
)  # fmt: skip
def test_creation_times(text: Any, expected: int) -> None:
    assert manifest.created_ns({"created": text}) == expected
    if expected:
        assert manifest.created_ns({"created": manifest.rfc3339(expected)}) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("sha256:" + "a" * 64),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["config", "layers", "manifests", "digest", "size", "mediaType", "platform", "os", "rootfs", "diff_ids",
                         "Env", "Cmd", "Labels", "Volumes", "Healthcheck", "Test", "schemaVersion", "annotations"]),
        inner, max_size=6,
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["config", "layers", "manifests", "rootfs", "schemaVersion", "os", "created"]), JSON))
def test_no_document_is_more_than_refused(document: dict[str, Any]) -> None:
    for parse in (manifest.parse_manifest, manifest.parse_index, manifest.diff_ids):
        try:
            parse(document)
        except InvalidArgument:
            pass
    manifest.image_config(ImageID("x"), "x", document)
    manifest.is_index(document)
    manifest.platform_of(document)


@pytest.mark.parametrize(
    ("line", "result"),
    [
        ('CMD ["a", "b"]', {"Cmd": ["a", "b"]}), ("cmd a b", {"Cmd": ["/bin/sh", "-c", "a b"]}), ("CMD", {"Cmd": []}),
        ('ENTRYPOINT ["x"', {"Entrypoint": ["/bin/sh", "-c", '["x"']}), ("ENV A B C", {"Env": ["A=B C"]}),
        ('ENV A="x y" B=2', {"Env": ["A=x y", "B=2"]}),
        ("EXPOSE 8000-8001", {"ExposedPorts": {"8000/tcp": {}, "8001/tcp": {}}}),
        ("WORKDIR a", {"WorkingDir": "/a"}), ('VOLUME ["/a b"]', {"Volumes": {"/a b": {}}}),
    ],
)  # fmt: skip
def test_changes(line: str, result: dict[str, Any]) -> None:
    assert changes.apply({}, [line]) == result


@pytest.mark.parametrize(
    "line", ["", "RUN x", "FROM y", "ENV", "ENV a", "ENV =b", "EXPOSE x", "EXPOSE 0", "EXPOSE 80/icmp", "LABEL 'a", "VOLUME [1]"]
)
def test_invalid_changes(line: str) -> None:
    with pytest.raises(InvalidArgument, match="change"):
        changes.apply({}, [line])


def image(letter: str, *layers: str) -> Image:
    return Image(ImageID("sha256:" + letter * 64), b"{}", tuple(ChainID(layer) for layer in layers), "", (Digest("config" + letter),))


A, B = image("a", "1", "2"), image("b", "1", "3")
IMAGES = {A.id: A, B.id: B}
NAMES = {
    "docker.io/library/x:1": A.id, "docker.io/library/x:2": A.id, f"docker.io/library/x@sha256:{HEX}": A.id, "q.io/y:1": A.id,
    "docker.io/library/aa:latest": B.id,
}  # fmt: skip


def unused(image_id: ImageID) -> list[SnapshotRecord]:
    return []


def test_a_name_goes_before_an_id() -> None:
    assert plan.find("aa", IMAGES, NAMES)[0] == B.id
    assert plan.find("aaa", IMAGES, NAMES)[0] == A.id
    assert plan.find("sha256:a", IMAGES, NAMES)[0] == A.id
    assert plan.find(f"x@sha256:{HEX}", IMAGES, NAMES)[0] == A.id
    near = image("a")
    twin = Image(ImageID("sha256:" + "a" * 63 + "b"), b"{}", ())
    with pytest.raises(InvalidArgument, match="ambiguous"):
        plan.find("aaa", {near.id: near, twin.id: twin}, {})


def test_what_a_removal_takes() -> None:
    def remove(text: str, force: bool = False, names: dict[str, ImageID] = NAMES, users: Any = unused) -> plan.Removal:
        return plan.remove(text, force, IMAGES, names, users)

    assert remove("x:1") == plan.Removal(["docker.io/library/x:1"], None)
    fewer = {name: owner for name, owner in NAMES.items() if not name.endswith("x:2")}
    assert remove("x:1", names=fewer) == plan.Removal(["docker.io/library/x:1", f"docker.io/library/x@sha256:{HEX}"], None)
    assert remove(f"x@sha256:{HEX}") == plan.Removal([f"docker.io/library/x@sha256:{HEX}"], None)
    assert remove("aa") == plan.Removal(["docker.io/library/aa:latest"], B.id)
    with pytest.raises(Conflict, match="several repositories"):
        remove("aaa")
    assert remove("aaa", force=True) == plan.Removal(sorted(n for n in NAMES if NAMES[n] == A.id), A.id)
    with pytest.raises(NotFound, match='no such image: "nosuch:latest"'):
        remove("nosuch")

    def used(image_id: ImageID) -> list[SnapshotRecord]:
        return [SnapshotRecord("c" * 64, image_id, "x", "x", 0, "overlayfs")]

    with pytest.raises(Conflict, match=r'image "aa:latest" is used by container c{12}$'):
        remove("aa", users=used)
    assert remove("aa", force=True, users=used) == plan.Removal(["docker.io/library/aa:latest"], None)
    assert remove("x:1", users=used) == plan.Removal(["docker.io/library/x:1"], None)


def test_garbage() -> None:
    def layer(name: str) -> Layer:
        return Layer(ChainID(name), DiffID(name), int(name), 0, Digest(f"blob{name}"), 0, "")

    layers = {ChainID(name): layer(name) for name in "12345"}
    blobs = [Digest(f"blob{name}") for name in "12345"] + [Digest("configa"), Digest("configb"), Digest("lost")]
    waste = plan.garbage([A, B], layers, blobs, [ChainID("4")], [Digest("lost")])
    assert [item.number for item in waste.layers] == [5] and waste.blobs == ["blob5"]
    waste = plan.garbage([A], layers, blobs, [], [])
    assert {item.number for item in waste.layers} == {3, 4, 5}
    assert set(waste.blobs) == {"blob3", "blob4", "blob5", "configb", "lost"}
