"""The second disk: pyx as an administrator would install it, to be mounted on /opt.

A virtual environment for Debian 12's Python, pyx's wheel and its locked dependencies in it, put together here (pip would take half a
minute inside), and the files of ``deploy/systemd``. The dependencies are kept by the lock file's hash; pyx itself is packed each time.
"""

from __future__ import annotations

import configparser
import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.images import cache_directory, run_quiet

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = "3.11"  # Debian 12's
HOME = "/opt/pyx"
DISK_BYTES = 192 << 20
SCRIPT = """\
#!{home}/bin/python3
import sys
from {module} import {function}
sys.exit({function}())
"""


def payload(target: Path) -> Path:
    """Write the disk to ``target``."""
    with tempfile.TemporaryDirectory(prefix="host-payload-", dir=cache_directory()) as scratch:
        home = Path(scratch) / "disk/pyx"
        (home / "bin").mkdir(parents=True)
        (home / "bin/python3").symlink_to("/usr/bin/python3")
        (home / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
        site = home / f"lib/python{PYTHON}/site-packages"
        shutil.copytree(_dependencies(), site, symlinks=True)
        wheel = _wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        for name, reference in _scripts(site).items():
            module, _, function = reference.partition(":")
            script = home / "bin" / name
            script.write_text(SCRIPT.format(home=HOME, module=module, function=function))
            script.chmod(0o755)
        if sys.version_info[:2] == (3, 11):  # its byte code is Debian's, too; other Pythons leave it to the machine
            subprocess.run([sys.executable, "-m", "compileall", "-q", "-s", home, "-p", HOME, site], check=False, stdout=subprocess.DEVNULL)
        shutil.copytree(REPOSITORY / "deploy/systemd", home / "systemd")
        with open(target, "wb") as file:
            file.truncate(DISK_BYTES)
        run_quiet("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", home.parent, target)
    return target


def _dependencies() -> Path:
    """A directory with the locked dependencies' binary packages."""
    # What only development needs is in the lock, too; it's taken from the project's own list what isn't.
    lock = REPOSITORY / "requirements.lock"
    project = REPOSITORY / "pyproject.toml"
    inputs = lock.read_bytes() + project.read_bytes() + Path(__file__).read_bytes()
    target = cache_directory() / f"host-payload-{hashlib.sha256(inputs).hexdigest()[:16]}"
    with open(target.with_suffix(".lock"), "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not target.exists():
            half = target.with_suffix(".part")
            shutil.rmtree(half, ignore_errors=True)
            run_quiet(
                sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile", "--target", half,
                "--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:",
                "--constraint", _pins(lock, half), *_runtime(project),
            )  # fmt: skip
            shutil.rmtree(half / "bin", ignore_errors=True)
            for old in cache_directory().glob("host-payload-*"):
                if old.is_dir() and len(old.name) == len(target.name) and old != target:
                    shutil.rmtree(old, ignore_errors=True)
            half.rename(target)
    return target


def _pins(lock: Path, beside: Path) -> Path:
    """The lock's versions as pip's constraints, which can't have hashes."""
    pins = [line.rstrip(" \\") for line in lock.read_text().splitlines() if "==" in line and not line.startswith((" ", "#"))]
    path = beside.with_suffix(".pins")
    path.write_text("\n".join(pins) + "\n")
    return path


def _runtime(project: Path) -> list[str]:
    import tomllib

    return list(tomllib.loads(project.read_text())["project"]["dependencies"])


def _wheel(scratch: Path) -> Path:
    run_quiet(
        sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation",
        "--wheel-dir", scratch, REPOSITORY,
    )  # fmt: skip
    (wheel,) = scratch.glob("pyx-*.whl")
    return wheel


def _scripts(site: Path) -> dict[str, str]:
    """The console scripts the wheel declares: name → module:function."""
    (entry_points,) = site.glob("pyx-*.dist-info/entry_points.txt")
    parser = configparser.ConfigParser()
    parser.read(entry_points)
    return dict(parser["console_scripts"])
