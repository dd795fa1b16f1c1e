"""The user's terminal: raw mode and back, its size, and the keys that detach."""

from __future__ import annotations

import fcntl
import os
import termios

from .grammar import CliError

# struct winsize of tty_ioctl(4): rows, columns, and two that nobody fills in; four native unsigned shorts.


def window_size(fd: int) -> tuple[int, int]:
    """(rows, columns); (0, 0) if ``fd`` is no terminal."""
    try:
        raw = fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8)
    except OSError:
        return 0, 0
    import sys

    return int.from_bytes(raw[0:2], sys.byteorder), int.from_bytes(raw[2:4], sys.byteorder)


def set_window_size(fd: int, rows: int, columns: int) -> None:
    """Tell a pty its size; its foreground group gets SIGWINCH from the kernel. A pty that is gone is ignored."""
    import sys

    order = sys.byteorder
    try:
        fcntl.ioctl(fd, termios.TIOCSWINSZ, rows.to_bytes(2, order) + columns.to_bytes(2, order) + b"\0" * 4)
    except OSError:
        pass


class RawMode:
    """Raw mode of a terminal while entered (cfmakeraw of termios(3)); ``leave`` may be called any number of times."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[object] | None = None

    def enter(self) -> None:
        saved = termios.tcgetattr(self._fd)
        raw = [*saved[:6], [*saved[6]]]
        raw[0] &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
        )  # fmt: skip
        raw[1] &= ~termios.OPOST
        raw[2] = (raw[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
        raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
        self._saved = saved
        termios.tcsetattr(self._fd, termios.TCSADRAIN, raw)

    def leave(self) -> None:
        saved, self._saved = self._saved, None
        if saved is not None:
            try:
                termios.tcsetattr(self._fd, termios.TCSADRAIN, saved)  # type: ignore[arg-type]
            except (OSError, termios.error):
                pass  # the terminal itself is gone (hang-up)


def is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def parse_keys(text: str) -> bytes:
    """``ctrl-p,ctrl-q`` or ``ctrl-@,a``: the bytes a terminal sends for them. Empty text turns detaching off."""
    result = b""
    for word in text.split(",") if text else ():
        if len(word) == 1 and word.isascii():
            result += word.encode()
            continue
        letter = word[5:].lower()
        if not word.lower().startswith("ctrl-") or len(letter) != 1 or not ("a" <= letter <= "z" or letter in "@[\\]^_"):
            raise CliError(f'invalid detach keys: unknown character: "{word}"', 125, "keys look like this: ctrl-p,ctrl-q")
        result += bytes([ord(letter.upper()) - 64])
    return result


class DetachScanner:
    """Finds the detach sequence in what is typed. Bytes that may begin it are held back until the next key decides."""

    __slots__ = ("_held", "_keys")

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = 0  # how many bytes of the sequence have been typed

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """(what to pass on, whether the sequence is complete); nothing after the sequence is passed on."""
        keys = self._keys
        if not keys:
            return data, False
        out = bytearray()
        for byte in data:
            if byte == keys[self._held]:
                self._held += 1
                if self._held == len(keys):
                    self._held = 0
                    return bytes(out), True
                continue
            if self._held:
                # What was held wasn't the sequence after all; a shorter beginning of it may still end here.
                typed = keys[: self._held] + bytes([byte])
                keep = min(len(typed) - 1, len(keys) - 1)
                while keep and typed[-keep:] != keys[:keep]:
                    keep -= 1
                out += typed[: len(typed) - keep]
                self._held = keep
            else:
                out.append(byte)
        return bytes(out), False
