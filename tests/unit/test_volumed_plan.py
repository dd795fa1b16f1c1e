"""Names, paths and options of mounts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyx_bus.contract.volumed import MountRequest
from pyx_bus.errors import InvalidArgument
from pyx_volumed.model import check_name, check_target, clean_path
from pyx_volumed.plan import plan, tmpfs_options


@pytest.mark.parametrize("name", ["ab", "0x", "a.b-c_d", "A" * 255])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "a", ".hidden", "-x", "a/b", "..", "a b", "a\n", "é1", "a\0", "A" * 256])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidArgument):
        check_name(name)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.sampled_from(["a", "b", "..", ".", "", "c.d"]), max_size=8))
def test_a_target_stays_in_the_root(parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    cleaned = clean_path(path)
    assert cleaned.startswith("/") and not cleaned.startswith("//") and ".." not in cleaned.split("/")
    assert clean_path(cleaned) == cleaned
    if cleaned == "/":
        with pytest.raises(InvalidArgument, match="root directory"):
            check_target(path)
    else:
        assert check_target(path) == cleaned


def tmpfs(*options: str, **more: object) -> list[str]:
    return tmpfs_options(MountRequest(type="tmpfs", target="/t", tmpfs_options=list(options), **more))  # type: ignore[arg-type]


def test_tmpfs_options_are_dockers() -> None:
    assert tmpfs() == ["noexec", "nosuid", "nodev", "rw", "mode=1777"]
    assert tmpfs("ro", "exec", "size=10m") == ["nosuid", "nodev", "mode=1777", "ro", "exec", "size=10m"]
    assert tmpfs("size=1", tmpfs_size_bytes=5) == ["noexec", "nosuid", "nodev", "rw", "mode=1777", "size=1"]
    assert "ro" in tmpfs(read_only=True) and "rw" not in tmpfs(read_only=True)


@pytest.mark.parametrize("option", ["size", "size=", "evil=1", "remount", "size=1,exec", "bind", ""])
def test_other_tmpfs_options_are_refused(option: str) -> None:
    with pytest.raises(InvalidArgument, match="tmpfs option"):
        tmpfs(option)


def test_duplicates_are_found_however_they_are_written() -> None:
    mounts = [MountRequest(type="tmpfs", target="/a/b"), MountRequest(type="bind", source="/x", target="/a/./c/../b/")]
    with pytest.raises(InvalidArgument, match='duplicate mount point: "/a/b"'):
        plan(mounts)
