"""What runtimes' failures mean; messages as runc 1.1 and crun 1.8 write them."""

import json

import pytest

from pyx_containerd.drivers.runtime import Runtime, parse_failure


def line(message, level="error"):
    return json.dumps({"level": level, "msg": message, "time": "2025-01-01T00:00:00Z"}) + "\n"


START = "runc run failed: unable to start container process: "


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (START + 'exec: "nope": executable file not found in $PATH', 127),
        (START + 'exec: "/nope": stat /nope: no such file or directory', 127),
        (START + 'exec: "/etc/passwd": permission denied', 126),
        (START + 'exec: "/etc": is a directory', 126),
        ('exec failed: unable to start container process: exec: "nope": executable file not found in $PATH', 127),
        ("executable file `nope` not found in $PATH: No such file or directory", 127),
        ("executable file '/nope' not found: No such file or directory", 127),
        ("open executable: Permission denied", 126),
        ("open executable: No such file or directory", 127),
        (START + 'error during container init: error mounting "/x" to rootfs at "/y": no such file or directory', 125),
        (START + 'error during container init: error setting cgroup config for procHooks process: failed to write "1"', 125),
        ("cgroups in hybrid mode not supported, drop all controllers from cgroupv2", 125),
        ("chdir to cwd (\"/x\") set in config.json failed: permission denied", 125),
    ],
)
def test_exit_codes(message, code):
    failure = parse_failure(line("a warning", "warning") + line(message))
    assert failure.exit_code == code
    assert "runc run failed" not in failure.reason
    assert "\n" not in failure.reason


def test_the_last_error_decides_and_warnings_do_not():
    log = line("first") + line("second") + line("beware", "warning")
    assert parse_failure(log).reason == "second"


def test_silence_and_plain_text():
    assert parse_failure("", 137) == parse_failure("\n", 137)
    assert parse_failure("", 137).exit_code == 125
    assert "137" in parse_failure("", 137).reason
    assert parse_failure("unable to open: no\n").reason == "unable to open: no"


def test_arguments_name_only_files_of_the_bundle():
    runtime = Runtime("runc", "/usr/sbin/runc", "/run/x")
    for argv in (runtime.run("id", tty=True), runtime.exec("id", "k", tty=False), runtime.delete("id")):
        assert argv[0] == "/usr/sbin/runc"
        assert argv[1:3] == ["--root", "/run/x"]
        assert [word for word in argv[3:] if word.startswith("/")] == []
    assert "{console}" in runtime.run("id", tty=True)
    assert "{console}" not in runtime.run("id", tty=False)
