"""The window: whatever instant a kill comes at, each byte is stored once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyx_logd.drivers.json_file import JsonFile
from pyx_logd.jsonfile import cut, decode
from pyx_logd.window import READ_MAX_BYTES, Window


class Killed(BaseException):
    """Stands for the kill: nothing after it runs."""


def log_driver(directory: Path, **options: str) -> JsonFile:
    directory.mkdir(exist_ok=True)
    driver = JsonFile(directory, {name.replace("_", "-"): value for name, value in options.items()}, lambda what, error, lost: None)
    driver.open()
    return driver


def stored(directory: Path) -> bytes:
    files = sorted(directory.glob("*.log*"), key=lambda path: -int("0" + path.suffix.lstrip(".").replace("log", "")))
    return b"".join(text for path in files for _, _, text in decode(path.read_bytes()))


def recover(window: Window, driver: JsonFile) -> None:
    left = window.recover()
    if left.mark is not None:
        driver.rewind(left.mark)
        chunks, rest = cut("stdout", left.pending + left.data, 1)
        driver.write(chunks)
        window.settle(rest)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


STEPS = ("before read", "after read", "half written", "after write", "after settle")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("options", [{}, {"max_size": "150", "max_file": "9"}])
@pytest.mark.parametrize("before", [b"", b"first\nunfin", b"x\n" * 5])
def test_each_byte_is_stored_once(tmp_path: Path, pipe: tuple[int, int], step: str, options: dict[str, str], before: bytes) -> None:
    read, write = pipe
    directory = tmp_path / "abc"
    driver = log_driver(directory, **options)
    window = Window(tmp_path / "1-stdout")
    written = before
    if before:
        os.write(write, before)
        data = window.read(read, driver.mark())
        assert data == before
        chunks, rest = cut("stdout", data, 1)
        driver.write(chunks)
        window.settle(rest)
    now = b"ished\nsecond\nthird " + b"y" * 5
    os.write(write, now)
    written += now
    if step == "before read":
        # as read() leaves it when it was killed just before its readv
        real, os.readv = os.readv, _kill
        try:
            with pytest.raises(Killed):
                window.read(read, driver.mark())
        finally:
            os.readv = real
    else:
        data = window.read(read, driver.mark())
        assert data is not None
        chunks, rest = cut("stdout", data, 1)
        if step == "half written":
            with open(driver.path, "ab") as file:
                file.write(b'{"log":"ished\\n","stre')
        elif step in ("after write", "after settle"):
            driver.write(chunks)
        if step == "after settle":
            window.settle(rest)

    window, driver = Window(tmp_path / "1-stdout"), log_driver(directory, **options)
    recover(window, driver)
    while (data := window.read(read, driver.mark())) is not None:
        chunks, rest = cut("stdout", data, 1)
        driver.write(chunks)
        window.settle(rest)
    assert stored(directory) + window.pending == written
    window.close(remove=True)
    assert not (tmp_path / "1-stdout").exists()


def _kill(*args: object) -> int:
    raise Killed


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=70_000), max_size=6))
def test_reading_gives_what_was_written(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    window = Window(tmp_path_factory.mktemp("window") / "w")
    read, write = os.pipe()
    os.set_blocking(write, False)
    got = b""
    sent = b""
    for piece in pieces:
        sent += piece[: os.write(write, piece)]
        while (data := window.read(read, (1, 2))) is not None:
            chunks, rest = cut("stdout", data, 1)
            got += b"".join(chunk.data for chunk in chunks)
            window.settle(rest)
    assert got + window.pending == sent
    window.close(remove=True)
    os.close(read)
    os.close(write)


def test_a_file_of_somebody_else_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"\x01" + b"\xff" * 200_000)
    window = Window(tmp_path / "w")
    assert window.pending == b"" and window.recover().mark is None
    (tmp_path / "v").write_bytes(os.urandom(4096 + 2 * 16384 + READ_MAX_BYTES))
    assert len(Window(tmp_path / "v").pending) <= 16384
