"""How far durable subscriptions have got."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from pyx_bus.broker import positions as positions_module
from pyx_bus.broker.positions import Positions
from pyx_bus.errors import InvalidArgument, NotFound, ResourceExhausted

JOURNAL = "0123456789abcdef"


def test_an_acknowledged_position_is_there_for_the_next_broker(tmp_path: Path) -> None:
    first = Positions(tmp_path / "p", JOURNAL, now_ns=lambda: 77)
    position = first.open("backup.tool_1", 1000, 40)
    assert (position.name, position.uid, position.offset, position.acked_ns) == ("backup.tool_1", 1000, 40, 77)
    position.ack(52)
    position.ack(50)
    assert position.offset == 53
    second = Positions(tmp_path / "p", JOURNAL)  # the first isn't closed: it may just as well be dead
    again = second.open("backup.tool_1", 1000, 9999)
    assert (again.uid, again.offset, again.acked_ns) == (1000, 53, 77)
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o700
    first.close()
    second.close()


def test_every_user_has_names_of_its_own(tmp_path: Path) -> None:
    positions = Positions(tmp_path, JOURNAL)
    for uid, offset in ((1000, 5), (1001, 7), (0, 9)):
        positions.open("mine", uid, 1).ack(offset)
    positions.close()
    again = Positions(tmp_path, JOURNAL)
    assert [(one.uid, one.offset) for one in again.list()] == [(0, 10), (1000, 6), (1001, 8)]
    again.remove(1000, "mine")
    assert [one.uid for one in again.list()] == [0, 1001]
    again.close()


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "-x", "_x", "a/b", "a\0b", "a b", "é", "x" * 65, "a\n"])
def test_a_name_cannot_lead_anywhere_else(tmp_path: Path, name: str) -> None:
    positions = Positions(tmp_path, JOURNAL)
    with pytest.raises(InvalidArgument, match="can't name a durable subscription"):
        positions.open(name, 0, 1)
    assert list(tmp_path.iterdir()) == []


def test_there_is_a_bound_for_each_user_and_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions_module, "MAX_OF_USER", 3)
    monkeypatch.setattr(positions_module, "MAX_POSITIONS", 5)
    positions = Positions(tmp_path, JOURNAL)
    for number in range(3):
        positions.open("x" * 62 + f"-{number}", 1000, 1)
    with pytest.raises(ResourceExhausted, match="3 of a user, 5 in all"):
        positions.open("fourth", 1000, 1)
    positions.open("fourth", 1001, 1)
    positions.open("fifth", 1002, 1)
    with pytest.raises(ResourceExhausted):
        positions.open("sixth", 1003, 1)
    positions.open("fifth", 1002, 1)
    positions.remove(1002, "fifth")
    positions.open("sixth", 1003, 1)
    assert [position.name for position in positions.list()] == [
        *("x" * 62 + f"-{n}" for n in range(3)),
        "fourth",
        "sixth",
    ]
    positions.close()


def test_what_is_removed_is_gone_and_an_ack_does_not_bring_it_back(tmp_path: Path) -> None:
    positions = Positions(tmp_path, JOURNAL)
    position = positions.open("a", 1, 1)
    positions.remove(1, "a")
    position.ack(7)
    assert positions.get(1, "a") is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFound):
        positions.remove(1, "a")


def test_a_damaged_position_begins_at_the_oldest_and_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    positions = Positions(tmp_path, JOURNAL)
    positions.open("a", 1000, 1).ack(10)
    positions.close()
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    assert len(good) == 64
    damages = [good[:size] for size in (0, 1, 63)] + [good + b"x", bytes(64)]
    damages += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(64)]
    for damage in damages:
        caplog.clear()
        path.write_bytes(damage)
        positions = Positions(tmp_path, JOURNAL)
        assert '"a" of user 1000 is damaged' in caplog.text
        assert positions.open("a", 1000, 33).offset == 0  # rather twice than never
        positions.close()


def test_in_another_journal_it_begins_at_the_beginning(tmp_path: Path) -> None:
    positions = Positions(tmp_path, JOURNAL)
    positions.open("a", 1000, 1).ack(10)
    positions.close()
    positions = Positions(tmp_path, "another")
    position = positions.open("a", 1000, 500)
    assert position.offset == 0
    position.ack(3)
    positions.close()
    assert Positions(tmp_path, "another").open("a", 1000, 500).offset == 4


def test_a_disk_that_fails_loses_no_position_while_the_broker_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    positions = Positions(tmp_path, JOURNAL)
    position = positions.open("a", 1000, 1)
    before = len(os.listdir("/proc/self/fd"))

    def fail(fd: int, data: bytes, position: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(positions_module, "write_all", fail)
        position.ack(10)
    assert position.offset == 11
    assert "can't write the position of the durable subscription 'a'" in caplog.text
    assert Positions(tmp_path, JOURNAL).open("a", 1000, 1).offset == 1
    position.ack(11)
    assert Positions(tmp_path, JOURNAL).open("a", 1000, 1).offset == 12
    assert len(os.listdir("/proc/self/fd")) == before
    positions.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
