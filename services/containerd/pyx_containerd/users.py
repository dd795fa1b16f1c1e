"""Who a process runs as: ``--user`` and ``--group-add`` against the root's passwd and group files (passwd(5), group(5)). Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyx_bus.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Identity:
    uid: int
    gid: int
    groups: list[int] = field(default_factory=list)
    home: str = "/"
    name: str = ""


def _rows(text: bytes, columns: int) -> list[list[str]]:
    rows = []
    for line in text.decode(errors="replace").splitlines():
        cells = line.strip().split(":")
        if len(cells) >= columns and not line.startswith("#"):
            rows.append(cells)
    return rows


def _number(text: str) -> int | None:
    return int(text) if len(text) <= 10 and text.isascii() and text.isdigit() and int(text) < 1 << 31 else None


def resolve(user: str, group_add: list[str], passwd: bytes, group: bytes) -> Identity:
    """``user`` is "", a name or number, each with ``:group`` or not. Numbers needn't be in the files, names must.

    Errors: InvalidArgument, Docker's words.
    """
    users = [row for row in _rows(passwd, 7) if _number(row[2]) is not None and _number(row[3]) is not None]
    groups = [row for row in _rows(group, 3) if _number(row[2]) is not None]
    user_text, _, group_text = user.partition(":")
    user_text = user_text or "0"
    number = _number(user_text)
    row = next((row for row in users if row[0] == user_text), None)
    if row is None and number is not None:
        row = next((row for row in users if int(row[2]) == number), None)
    if row is None and number is None:
        raise InvalidArgument(f'unable to find user "{user_text}": no matching entries in passwd file')
    uid = int(row[2]) if row else int(user_text)
    gid = int(row[3]) if row else 0
    home = (row[5] if row else "") or "/"
    name = row[0] if row else ""
    extra: list[int] = []
    if group_text:
        gid = _group(group_text, groups)
    elif name:
        extra = [int(entry[2]) for entry in groups if len(entry) > 3 and name in entry[3].split(",")]
    extra += [_group(text, groups) for text in group_add]
    return Identity(uid=uid, gid=gid, groups=[gid, *dict.fromkeys(g for g in extra if g != gid)], home=home, name=name)


def _group(text: str, groups: list[list[str]]) -> int:
    for row in groups:
        if row[0] == text:
            return int(row[2])
    number = _number(text)
    if number is None:
        raise InvalidArgument(f'unable to find group "{text}": no matching entries in group file')
    return number
