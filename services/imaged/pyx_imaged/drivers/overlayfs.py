"""Snapshots by overlayfs (Documentation/filesystems/overlayfs.rst): the layers are the lower directories, the container's changes
go into an upper one. Two directories to make, nothing to copy.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from pyx_bus.contract.imaged import Mount
from pyx_bus.errors import FailedPrecondition

from .. import kernel

_OPTIONS_LIMIT = 4095  # mount(2) takes one page with its terminating zero
_PARAMETERS = Path("/sys/module/overlay/parameters")
# What a host may have switched on, and we can't have: layers are shared by many mounts, and a container's own layer is to be read
# by itself (a moved directory or half a file in it would be a mere reference).
_OFF = ("index", "redirect_dir", "metacopy")


class Overlayfs:
    """``links`` is a short path to the directory the layers lie in: 127 of them must fit into a page of mount options."""

    name = "overlayfs"
    instant = True
    overlay = True

    def __init__(self, links: Path) -> None:
        self._links = links
        self._extra = [f"{name}=off" for name in _OFF if _is_on(_PARAMETERS / name)]

    def probe(self, scratch: Path) -> None:
        lower, upper, work = (scratch / name for name in ("lower", "upper", "work"))
        for directory in (lower, upper, work):
            directory.mkdir()
        (lower / "gone").touch()
        root = kernel.detached_overlay(lower, upper, work)
        try:
            os.unlink("gone", dir_fd=root)
            os.mkdir("new", dir_fd=root)
        finally:
            os.close(root)
        if not kernel.is_whiteout(os.lstat(upper / "gone")):
            raise OSError(f"overlayfs makes no usable whiteouts on the file system of {scratch}")
        os.setxattr(upper / "new", kernel.OVERLAY_OPAQUE, b"y")

    def prepare(self, directory: Path, layers: Sequence[Path]) -> None:
        upper = directory / "fs"
        os.mkdir(upper, 0o755)
        os.mkdir(directory / "work", 0o700)
        kernel.give_to_root(upper)
        if layers:  # the upper directory's attributes are those of the container's /
            status = os.stat(layers[-1])
            if (status.st_uid, status.st_gid) != (0, 0):
                os.chown(upper, status.st_uid, status.st_gid)
            os.chmod(upper, stat.S_IMODE(status.st_mode))

    def mounts(self, directory: Path, layers: Sequence[Path]) -> list[Mount]:
        lower = ":".join(f"{self._links}/{layer.name}" for layer in reversed(layers)) or f"{self._links}/empty"
        options = [f"lowerdir={lower}", f"upperdir={directory}/fs", f"workdir={directory}/work", *self._extra]
        if len(",".join(options)) > _OPTIONS_LIMIT:
            raise FailedPrecondition(
                f"the image's {len(layers)} layers don't fit into the options of one mount",
                hint="keep the engine's data under a shorter path, or set snapshotter = \"copy\"",
            )
        return [Mount(type="overlay", source="overlay", options=options)]

    def writable(self, directory: Path) -> Path:
        return directory / "fs"


def _is_on(parameter: Path) -> bool:
    try:
        return parameter.read_text().strip() == "Y"
    except OSError:
        return False  # not known to this kernel
