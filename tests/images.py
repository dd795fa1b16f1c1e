"""Root file systems and archives that tests are run on, made from what Debian has: busybox-static and mmdebstrap.

Usable as a module by tests of every part, and as a command (``python tests/images.py busybox OUT.tar``; ``debian OUT.tar``).
Archives of the field's formats are written by the field's own tools (skopeo, podman), so that what's tested is what people have.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import platform
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

_PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
"""
_GROUP = """root:x:0:
daemon:x:1:
bin:x:2:
tty:x:5:
www-data:x:33:
users:x:100:
nogroup:x:65534:
"""
_MTIME = 1_700_000_000


def _entry(tar: tarfile.TarFile, name: str, kind: bytes, mode: int, data: bytes = b"", link: str = "", uid: int = 0) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size, info.linkname, info.mtime = kind, mode, len(data), link, _MTIME
    info.uid = info.gid = uid
    tar.addfile(info, io.BytesIO(data))


def busybox_tar(path: str | os.PathLike[str], busybox: str = "/bin/busybox", extra: dict[str, bytes] | None = None) -> Path:
    """Write a root file system's tar with busybox and a link for each of its applets; returns ``path``.

    ``extra`` are more files: absolute path → content, mode 0644 (0755 where the content begins with ``#!``). Reproducible: the same
    busybox gives the same bytes.
    """
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for directory, mode in (
            ("bin", 0o755), ("dev", 0o755), ("etc", 0o755), ("home", 0o755), ("lib", 0o755), ("proc", 0o555), ("root", 0o700),
            ("run", 0o755), ("sys", 0o555), ("tmp", 0o1777), ("usr", 0o755), ("usr/bin", 0o755), ("usr/sbin", 0o755),
            ("var", 0o755), ("var/tmp", 0o1777), ("var/www", 0o755),
        ):  # fmt: skip
            _entry(tar, directory, tarfile.DIRTYPE, mode)
        _entry(tar, "sbin", tarfile.SYMTYPE, 0o777, link="bin")
        _entry(tar, "bin/busybox", tarfile.REGTYPE, 0o755, Path(busybox).read_bytes())
        for applet in sorted(set(applets) - {"busybox"}):
            _entry(tar, f"bin/{applet}", tarfile.SYMTYPE, 0o777, link="busybox")
        _entry(tar, "usr/bin/env", tarfile.SYMTYPE, 0o777, link="../../bin/busybox")
        for name, text in (
            ("passwd", _PASSWD), ("group", _GROUP), ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
            ("os-release", 'NAME="busybox"\nID=busybox\nPRETTY_NAME="busybox from Debian"\n'), ("hostname", "busybox\n"),
            ("hosts", "127.0.0.1 localhost\n"), ("resolv.conf", ""), ("shells", "/bin/sh\n"),
        ):  # fmt: skip
            _entry(tar, f"etc/{name}", tarfile.REGTYPE, 0o644, text.encode())
        _entry(tar, "etc/shadow", tarfile.REGTYPE, 0o640, b"root:*:19000:0:99999:7:::\n")
        for name, data in sorted((extra or {}).items()):
            _entry(tar, name.lstrip("/"), tarfile.REGTYPE, 0o755 if data.startswith(b"#!") else 0o644, data)
    return Path(path)


def cache_directory() -> Path:
    """Where costly archives are kept between runs: ``PYX_TEST_CACHE``, else /var/cache/pyx-tests."""
    directory = Path(os.environ.get("PYX_TEST_CACHE", "/var/cache/pyx-tests"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def debian_tar(suite: str = "bookworm", variant: str = "minbase") -> Path:
    """A whole Debian as a root file system's tar, made by mmdebstrap once and then kept (takes about 40 s; needs the apt mirror).

    Safe to call from several processes: they wait for the one that makes it.
    """
    machine = platform.machine()
    target = cache_directory() / f"debian-{suite}-{variant}-{machine}.tar"
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            half = target.with_suffix(".part.tar")
            half.unlink(missing_ok=True)
            mirrors = _apt_sources(suite)
            subprocess.run(
                ["mmdebstrap", f"--variant={variant}", "--quiet", suite, str(half), *mirrors],
                check=True, env={**os.environ, "SOURCE_DATE_EPOCH": str(_MTIME)},
            )  # fmt: skip
            half.rename(target)
    return target


def _apt_sources(suite: str) -> list[str]:
    """The host's own sources of that suite, so that its mirror is used; none (mmdebstrap's default) if it has none."""
    etc = Path("/etc/apt")
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    return [str(path) for path in files if path.is_file() and f"{suite} " in path.read_text(errors="replace") + " "]


def run_quiet(*command: str | os.PathLike[str], cwd: str | os.PathLike[str] | None = None) -> str:
    """Run a tool; its standard output. Raises with what it printed on stderr."""
    done = subprocess.run([os.fspath(word) for word in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout


def oci_layout(
    path: str | os.PathLike[str],
    layers: list[bytes],
    *,
    tag: str = "latest",
    config: dict[str, object] | None = None,
    compress: str = "gzip",
    architecture: str = "",
) -> Path:
    """Write an OCI image layout directory (image-spec, image-layout.md) with one image made of the tars ``layers``.

    ``config`` is the image's ``config`` object. ``compress`` is gzip, zstd or none. It's the neutral start for skopeo, which turns
    it into every other form: ``skopeo copy oci:DIR:TAG docker-archive:FILE:NAME``.
    """
    import gzip
    import hashlib
    import json

    directory = Path(path)
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def put(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def packed(data: bytes) -> tuple[bytes, str]:
        if compress == "gzip":
            return gzip.compress(data, 1, mtime=0), "+gzip"
        if compress == "zstd":
            import zstandard

            return zstandard.compress(data, 1), "+zstd"
        return data, ""

    descriptors = []
    for layer in layers:
        data, suffix = packed(layer)
        descriptors.append(put(data, "application/vnd.oci.image.layer.v1.tar" + suffix))
    image_config = {
        "created": "2023-11-14T22:13:20Z",
        "architecture": architecture or oci_architecture(),
        "os": "linux",
        "config": config or {"Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]},
        "history": [{"created": "2023-11-14T22:13:20Z", "created_by": f"layer {i}"} for i in range(len(layers))],
    }
    config_descriptor = put(json.dumps(image_config).encode(), "application/vnd.oci.image.config.v1+json")
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config_descriptor,
        "layers": descriptors,
    }
    descriptor = put(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag}
    index_path = directory / "index.json"
    index = json.loads(index_path.read_text()) if index_path.exists() else {"schemaVersion": 2, "manifests": []}
    index["manifests"].append(descriptor)
    index_path.write_text(json.dumps(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return directory


def oci_architecture() -> str:
    """The host's architecture as OCI names it."""
    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def registry(directory: str | os.PathLike[str]) -> Iterator[str]:
    """Debian's docker-registry on a free loopback port with its data in ``directory``; yields ``127.0.0.1:<port>``."""
    home = Path(directory)
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    configuration = home / "config.yml"
    configuration.write_text(
        "version: 0.1\nlog: {level: error}\nstorage:\n"
        f"  filesystem: {{rootdirectory: {home / 'data'}}}\n  delete: {{enabled: true}}\n"
        f"http: {{addr: 127.0.0.1:{port}}}\n"
    )
    with open(home / "registry.log", "wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(configuration)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"docker-registry didn't start: {(home / 'registry.log').read_text()[-2000:]}") from None
                time.sleep(0.02)  # between two looks at a condition, not for luck
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def push(source: str, registry_address: str, name: str) -> str:
    """Copy a skopeo source (``oci:DIR:TAG``, ``docker-archive:FILE``) to ``<registry>/<name>`` with skopeo; returns the reference."""
    reference = f"{registry_address}/{name}"
    run_quiet("skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", source, f"docker://{reference}")
    return reference


def main() -> None:
    kind, out = sys.argv[1], sys.argv[2]
    if kind == "busybox":
        busybox_tar(out)
    elif kind == "debian":
        shutil.copyfile(debian_tar(), out)
    else:
        sys.exit(f"unknown kind {kind!r}: busybox or debian")


if __name__ == "__main__":
    main()
