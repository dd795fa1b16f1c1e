"""Docker's multiplexed stream, taken apart: eight bytes (stream, three zeros, length big endian), then the payload. Pure.

``feed`` takes whatever a read gave and returns the payload as few runs as there are changes of stream, so that a
batch of lines costs one write.
"""

from __future__ import annotations

STDOUT, STDERR = 1, 2


class Demux:
    """State between reads: the header's bytes so far, or how much of the current frame's payload is missing."""

    __slots__ = ("_left", "_partial", "_stream")

    def __init__(self) -> None:
        self._partial = b""
        self._left = 0
        self._stream = STDOUT

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """``[(stream, payload), …]`` in order. Raises ValueError on a header that isn't one."""
        runs: list[tuple[int, list[memoryview]]] = []
        if self._partial:
            data = self._partial + data
            self._partial = b""
        view = memoryview(data)
        position, end = 0, len(data)
        left, stream = self._left, self._stream
        while position < end:
            if not left:
                if end - position < 8:
                    self._partial = data[position:]
                    break
                stream = data[position]
                if stream not in (0, 1, 2) or data[position + 1 : position + 4] != b"\0\0\0":
                    raise ValueError(f"malformed output stream: header {data[position:position + 8].hex()}")
                left = int.from_bytes(data[position + 4 : position + 8], "big")
                position += 8
                continue
            taken = min(left, end - position)
            piece = view[position : position + taken]
            target = STDERR if stream == STDERR else STDOUT
            if runs and runs[-1][0] == target:
                runs[-1][1].append(piece)
            else:
                runs.append((target, [piece]))
            position += taken
            left -= taken
        self._left, self._stream = left, stream
        return [(target, b"".join(pieces)) for target, pieces in runs]

    @property
    def inside(self) -> bool:
        """The stream may not end here: a frame was begun."""
        return bool(self._partial or self._left)
