"""What every log driver guarantees (see ``pyx_logd.drivers.base``)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyx_bus.errors import InvalidArgument
from pyx_logd.drivers import DRIVERS, Driver, factory
from pyx_logd.jsonfile import decode
from pyx_logd.model import Chunk


@pytest.fixture(params=sorted(DRIVERS))
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Driver:
    directory = tmp_path / "abcdef"
    directory.mkdir()
    made = factory(request.param)(directory, {}, lambda what, error, lost: pytest.fail(f"{what}: {error}"))
    made.open()
    return made


def stored(driver: Driver) -> list[bytes]:
    texts: list[bytes] = []
    for segment in driver.segments():
        texts.extend(text for _, _, text in decode(os.pread(segment.fd, segment.size_bytes, 0)))
        os.close(segment.fd)
    return texts


async def test_what_is_written_can_be_read_if_it_says_so(driver: Driver) -> None:
    driver.write([Chunk("stdout", b"one\ntwo\n", 1), Chunk("stdout", b"piece", 2)])
    await driver.wait_ready()
    assert stored(driver) == ([b"one\ntwo\n", b"piece"] if driver.readable else [])
    assert bool(driver.path) == driver.readable
    await driver.aclose()
    await driver.aclose()
    assert stored(driver) == ([b"one\ntwo\n", b"piece"] if driver.readable else [])


async def test_rewind_forgets_what_came_after_the_mark(driver: Driver) -> None:
    driver.write([Chunk("stdout", b"kept\n", 1)])
    mark = driver.mark()
    driver.write([Chunk("stdout", b"forgotten\n", 2)])
    driver.rewind(mark)
    driver.write([Chunk("stdout", b"again\n", 3)])
    assert stored(driver) == ([b"kept\n", b"again\n"] if driver.readable else [])
    await driver.aclose()


async def test_opening_again_goes_on(driver: Driver) -> None:
    driver.open()
    driver.write([Chunk("stderr", b"a\n", 1)])
    await driver.aclose()
    driver.open()
    driver.write([Chunk("stderr", b"b\n", 2)])
    assert b"".join(stored(driver)) == (b"a\nb\n" if driver.readable else b"")
    await driver.aclose()


async def test_a_listener_is_forgotten(driver: Driver) -> None:
    driver.on_rotate(lambda: pytest.fail("called"))()
    driver.write([Chunk("stdout", b"x\n", 1)])
    await driver.aclose()


@pytest.mark.parametrize("name", sorted(DRIVERS))
def test_unknown_options_are_refused_before_anything_is_touched(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=f'unknown log opt "colour" for {name} log driver'):
        factory(name)(tmp_path / "missing", {"colour": "red"}, lambda what, error, lost: None)
    assert list(tmp_path.iterdir()) == []
