"""Frames: whatever the chunks a stream arrives in, the same frames come out; whatever nonsense, a ProtocolError and nothing else."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyx_bus import wire
from pyx_bus.wire import HEADER, Decoder, Frame, ProtocolError, encode, topic_matches

frames = st.builds(
    Frame,
    st.integers(1, 17),
    st.binary(max_size=255),
    st.binary(max_size=300),
    peer=st.integers(0, 2**32 - 1),
    serial=st.integers(0, 2**32 - 1),
    arg=st.integers(0, 2**64 - 1),
)


def fields(frame: Frame) -> tuple[object, ...]:
    return frame.kind, frame.route, frame.body, frame.peer, frame.serial, frame.arg


@given(st.lists(frames, max_size=8), st.lists(st.integers(1, 700), max_size=20))
def test_any_chunking_gives_the_same_frames(sent: list[Frame], cuts: list[int]) -> None:
    data = b"".join(frame.encode() for frame in sent)
    decoder = Decoder()
    received: list[Frame] = []
    for size in [*cuts, len(data) + 1]:
        received += decoder.feed(data[:size])
        data = data[size:]
    assert [fields(f) for f in received] == [fields(f) for f in sent]


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_garbage_is_a_protocol_error_at_worst(chunks: list[bytes]) -> None:
    decoder = Decoder()
    try:
        for chunk in chunks:
            decoder.feed(chunk)
    except ProtocolError:
        pass


def test_golden_bytes() -> None:
    data = encode(wire.CALL, b"netd.list", b"\x80", 7, 9, 5000, 2)
    assert data.hex() == "22000000" "03" "00" "02" "09" "07000000" "09000000" "8813000000000000" "6e6574642e6c697374" "80"


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(23, 3, 0, 0, 0, 0, 0, 0),  # shorter than a header
        HEADER.pack(30, 3, 0, 0, 20, 0, 0, 0),  # shorter than its routing text
        HEADER.pack(wire.MAX_FRAME + 1, 3, 0, 0, 0, 0, 0, 0),
        HEADER.pack(0xFFFFFFFF, 3, 0, 0, 0, 0, 0, 0),
        HEADER.pack(24, 3, 0, wire.MAX_FDS + 1, 0, 0, 0, 0),
    ],
)
def test_bad_header_is_refused_before_its_body_is_buffered(header: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder().feed(header)


def test_limits_hold_for_the_sender_too() -> None:
    with pytest.raises(ProtocolError):
        encode(wire.CALL, b"", b"x" * wire.MAX_FRAME)
    with pytest.raises(ProtocolError):
        encode(wire.CALL, b"r" * 256, b"")


def test_descriptors_go_to_the_frame_that_announced_them() -> None:
    first = encode(wire.CALL, b"a", b"", fds=2)
    plain = encode(wire.CALL, b"b", b"")
    second = encode(wire.CALL, b"c", b"", fds=1)
    decoder = Decoder()
    a, b = decoder.feed(first + plain + second[:5], [10, 11, 12])
    (c,) = decoder.feed(second[5:])
    assert (a.fds, b.fds, c.fds) == ([10, 11], [], [12])


@pytest.mark.parametrize("data", [encode(wire.CALL, b"a", b""), encode(wire.CALL, b"a", b"", fds=1)])
def test_descriptors_without_a_frame_for_them_are_an_error_and_stay_takeable(data: bytes) -> None:
    decoder = Decoder()
    with pytest.raises(ProtocolError):
        decoder.feed(data, [10, 11])
    assert sorted(decoder.take_fds()) == [10, 11]


def test_frame_without_its_descriptors_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="announces 1"):
        Decoder().feed(encode(wire.CALL, b"a", b"", fds=1))


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("container.start", "container.start", True),
        ("container.*", "container.start", True),
        ("container.*", "container.exec.start", False),
        ("container.>", "container.exec.start", True),
        ("container.>", "container", False),
        ("*.start", "container.start", True),
        ("*", "container.start", False),
        (">", "anything.at.all", True),
        ("container.start", "container.stop", False),
    ],
)
def test_topic_patterns(pattern: str, topic: str, expected: bool) -> None:
    assert topic_matches(pattern, topic) is expected


def test_a_frame_in_tiny_pieces_costs_no_copy_of_what_came_before() -> None:
    data = Frame(wire.CALL, b"a.b", bytes(wire.MAX_FRAME - wire.HEADER_SIZE - 3), serial=1).encode()
    decoder = Decoder()
    assert decoder.feed(data[:-40_000]) == []
    started = time.process_time()
    for byte in data[-40_000:-1]:
        assert decoder.feed(bytes((byte,))) == []
    assert time.process_time() - started < 5  # copying would be 160 GB
    (frame,) = decoder.feed(data[-1:])
    assert len(frame.body) == wire.MAX_FRAME - wire.HEADER_SIZE - 3
