"""Reading a log back: from its end for ``--tail``, across rotated files, on as it grows, in blocks of many records."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from . import frames
from .clients import Client
from .drivers import Driver
from .drivers.base import Segment
from .jsonfile import decode, format_time_fixed, line_ends

BLOCK_BYTES = 512 * 1024
"""Decoded at a time, in a thread: about 2 ms of work, so a thread's 0.1 ms hardly counts."""

_TAIL_BLOCK_BYTES = 64 * 1024
_DELETED_SEGMENTS_MAX = 8
"""A follower slower than rotation keeps this many deleted files alive, then loses the oldest, as if it had come later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which records, and how they look. Times are Unix nanoseconds, 0 for no limit; ``tail`` < 0 means all."""

    stdout: bool = True
    stderr: bool = True
    since_ns: int = 0
    until_ns: int = 0
    tail: int = -1
    timestamps: bool = False


class Renderer:
    """Blocks of records → what a client gets. Pure but for knowing, from block to block, which stream is inside a line."""

    def __init__(self, selection: Selection, frame: frames.Frame) -> None:
        self.past_until = False
        self._selection = selection
        self._frame = frame
        self._times = bool(selection.timestamps or selection.since_ns or selection.until_ns)
        self._inside = {"stdout": False, "stderr": False}

    def render(self, block: bytes) -> bytes:
        """``block`` is whole records. Sets ``past_until`` at the first record that's later."""
        selection = self._selection
        wanted = {"stdout": selection.stdout, "stderr": selection.stderr}
        out: list[bytes] = []
        texts: list[bytes] = []
        current = ""
        for stream, time_ns, text in decode(block, times=self._times):
            if selection.until_ns and time_ns > selection.until_ns:
                self.past_until = True
                break
            if time_ns < selection.since_ns or not wanted.get(stream) or not text:
                continue
            if selection.timestamps:
                text = self._stamp(stream, time_ns, text)
            if stream != current and texts:
                out.append(self._frame(current, b"".join(texts)))
                texts = []
            current = stream
            texts.append(text)
        if texts:
            out.append(self._frame(current, b"".join(texts)))
        return b"".join(out)

    def _stamp(self, stream: str, time_ns: int, text: bytes) -> bytes:
        stamp = format_time_fixed(time_ns) + b" "
        whole = text.endswith(b"\n")
        body = text[:-1] if whole else text
        stamped = body.replace(b"\n", b"\n" + stamp)
        if not self._inside[stream]:
            stamped = stamp + stamped
        self._inside[stream] = not whole
        return stamped + b"\n" if whole else stamped


class LogReader:
    """Goes once over a log, and further as it grows. Close it."""

    def __init__(self, driver: Driver, selection: Selection, frame: frames.Frame) -> None:
        self._driver = driver
        self._renderer = Renderer(selection, frame)
        self._tail = selection.tail
        self._segments = driver.segments()
        self._position = 0
        self._lost = False
        self._following = False
        self._forget: Callable[[], None] = lambda: None

    def follow(self) -> None:
        """Go on with what is written from now on, to new files too; else it ends where the log ended when the reader was made.

        Call it before anything else could run.
        """
        self._following = True
        self._forget = self._driver.on_rotate(self._rotated)

    def _rotated(self) -> None:
        try:
            fresh = self._driver.segments()
        except OSError:  # no descriptor left. It's the writer's call: let it go on, and this reader end
            self._lost = True
            return
        self._segments.append(fresh.pop())
        for segment in fresh:
            os.close(segment.fd)
        deleted = sum(os.fstat(segment.fd).st_nlink == 0 for segment in self._segments[1:])  # the first is being read
        if deleted > _DELETED_SEGMENTS_MAX and self._tail < 0:  # else a thread is looking through them
            os.close(self._segments.pop(1).fd)

    @property
    def past_until(self) -> bool:
        """Whether all that was asked for has been sent, whatever comes."""
        return self._renderer.past_until

    def caught_up(self) -> bool:
        """Whether there's nothing stored beyond what was sent. True only of this instant."""
        if not self._segments or self._renderer.past_until:
            return True
        if len(self._segments) > 1:
            return False
        segment = self._segments[0]
        segment.size_bytes = os.fstat(segment.fd).st_size
        return self._position >= segment.size_bytes

    async def send_to(self, client: Client) -> None:
        """Send all there is, until `caught_up` or the client is gone."""
        if self._tail >= 0:
            # files begun meanwhile come after the tail's beginning, wherever that is
            index, self._position = await trio.to_thread.run_sync(self._find_tail, tuple(self._segments), self._tail)
            for older in self._segments[:index]:
                os.close(older.fd)
            del self._segments[:index]
            self._tail = -1
        while self._segments and not client.gone and not self._renderer.past_until:
            if self._lost:
                client.close()
                return
            segment = self._segments[0]
            last = len(self._segments) == 1
            if self._position >= segment.size_bytes and self._following:
                segment.size_bytes = os.fstat(segment.fd).st_size  # a rotated file doesn't grow any more, but it did until it was
            if self._position >= segment.size_bytes:
                if last:
                    return
                os.close(self._segments.pop(0).fd)
                self._position = 0
                continue
            data, self._position = await trio.to_thread.run_sync(self._block, segment.fd, self._position, segment.size_bytes)
            client.write_nowait(data)
            await client.flush()

    def _block(self, fd: int, position: int, size: int) -> tuple[bytes, int]:
        """Rendered records from ``position`` on, and where they end. Blocking."""
        length = BLOCK_BYTES
        while True:
            block = os.pread(fd, min(length, size - position), position)
            end = block.rfind(b"\n") + 1
            if end:
                return self._renderer.render(block[:end]), position + end
            if len(block) < length:  # a record without its end: nothing after it, or the file was cut
                return b"", size
            length *= 2

    def _find_tail(self, segments: Sequence[Segment], lines: int) -> tuple[int, int]:
        """In which segment the last ``lines`` lines begin, and where. Blocking. A line not yet finished counts as one."""
        for index in range(len(segments) - 1, -1, -1):
            found, start = self._lines_back(segments[index], lines, newest=index == len(segments) - 1)
            lines -= found
            if lines <= 0:
                return index, start
        return 0, 0

    @staticmethod
    def _lines_back(segment: Segment, wanted: int, *, newest: bool) -> tuple[int, int]:
        """How many lines of at most ``wanted`` end in the segment, and where the first of them begins."""
        end = segment.size_bytes
        if wanted <= 0:
            return 0, end
        found = 0
        carry = b""
        position = end
        start = 0
        first_block = True
        while position > 0:
            length = min(_TAIL_BLOCK_BYTES, position)
            position -= length
            block = os.pread(segment.fd, length, position) + carry
            head = 0 if position == 0 else block.find(b"\n") + 1
            if not head and position:
                carry = block
                continue
            ends = [head + offset for offset in line_ends(block[head:])]
            if first_block and block[head:]:
                first_block = False
                if newest and (not ends or ends[-1] != len(block)):
                    ends.append(len(block))  # the unfinished line
            # a line begins where the one before it ends: to have n lines, find the end of the n+1st from the end
            if found + len(ends) > wanted:
                return wanted, position + ends[len(ends) - 1 - (wanted - found)]
            found += len(ends)
            carry = block[:head]
        return found, start

    def close(self) -> None:
        self._forget()
        for segment in self._segments:
            os.close(segment.fd)
        self._segments.clear()
