"""The store: what is returned as written is there after a crash, one name has one holder, and those who wait share a commit."""

import pytest
import trio

from pyx_bus import errors
from pyx_bus.contract.containerd import ContainerSpec
from pyx_bus.contract.imaged import ImageConfig
from pyx_containerd.model import Container, Process, State
from pyx_containerd.store import Store


def container(number, name=None, **fields):
    return Container(
        id=f"{number:064x}",
        name=name or f"c{number}",
        spec=ContainerSpec(image="busybox", labels={"a": "b"}),
        image=ImageConfig(id="sha256:0", reference="busybox"),
        process=Process(args=["x"], env=[], working_dir="/", user="", stop_signal=15),
        created_at_ns=number,
        hostname="h",
        **fields,
    )


async def test_round_trip(tmp_path):
    store = Store(tmp_path / "db")
    await store.insert(container(2))
    await store.insert(container(1))
    await store.update(container(1, state=State.EXITED, exit_code=3))
    await store.delete(container(2).id)
    other = Store(tmp_path / "db")  # as after kill -9: nothing was closed
    assert other.load() == [container(1, state=State.EXITED, exit_code=3)]
    other.close()
    store.close()


async def test_one_name_has_one_holder(tmp_path):
    store = Store(tmp_path / "db")
    outcomes = []

    async def insert(number):
        try:
            await store.insert(container(number, name="same"))
            outcomes.append("made")
        except errors.AlreadyExists:
            outcomes.append("refused")

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(insert, number)
    assert sorted(outcomes) == ["made"] + ["refused"] * 19
    await store.insert(container(100))
    with pytest.raises(errors.AlreadyExists):
        await store.update(container(100, name="same"))
    store.close()


async def test_those_who_wait_share_a_commit(tmp_path):
    store = Store(tmp_path / "db")
    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(store.insert, container(number))
    assert store.commits < 25
    assert len(store.load()) == 50
    store.close()


async def test_a_cancelled_writer_has_still_written(tmp_path):
    store = Store(tmp_path / "db")
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.insert(container(1))
    assert len(store.load()) == 1
    store.close()


async def test_a_kept_file_that_can_not_be_read_says_nothing(tmp_path):
    kept = tmp_path / "kept"
    store = Store(tmp_path / "db", kept)
    for number in range(4):
        await store.insert(container(number))
    store.close()
    for number, data in enumerate((b"", b"\xc0", b"\x81\xa2id")):
        (kept / container(number).id).write_bytes(data)
    (kept / container(9).id).write_bytes(b"\xc0")
    store = Store(tmp_path / "db", kept)
    assert [one.created_at_ns for one in store.load()] == [0, 2, 3]
    await store.update(container(3))  # what was kept is written before
    assert list(kept.iterdir()) == []
    assert len(store.load()) == 3
    store.close()
