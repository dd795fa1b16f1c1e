"""The shim's wire: golden bytes (a shim may be older than the containerd that finds it again), and hostile ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyx_containerd import shim

GOLDEN = [
    ((shim.FORK, 0, [b"/run/b", b"id"]), "0101000000000002" "000000062f72756e2f62" "000000026964"),
    ((shim.KILL, 7, [b"", b"15"]), "0103000000070002" "00000000" "000000023135"),
    ((shim.STATE, 1, []), "0104000000010000"),
    ((shim.OK, 1, [b"42"]), "0140000000010001" "000000023432"),
    ((shim.EXITED, 0, [b"", b"3", b"0", b"1"]), "0142000000000004" "00000000" "0000000133" "0000000130" "0000000131"),
]


@pytest.mark.parametrize(("message", "data"), GOLDEN)
def test_golden_bytes(message, data):
    assert shim.encode(*message).hex() == data
    assert shim.decode(bytes.fromhex(data)) == message


@given(st.integers(0, 255), st.integers(0, 2**32 - 1), st.lists(st.binary(max_size=100), max_size=20))
def test_round_trip(kind, serial, fields):
    assert shim.decode(shim.encode(kind, serial, fields)) == (kind, serial, fields)


@given(st.binary(max_size=60))
def test_garbage_is_refused_or_reencodes_to_itself(data):
    try:
        message = shim.decode(data)
    except shim.ProtocolError:
        return
    assert shim.encode(*message) == data


def test_exit_file():
    assert shim.read_exit(b"137 9 1700000000000000000\n") == (137, 9, 1700000000000000000)
    assert shim.read_exit(b"") is None
    assert shim.read_exit(b"137 9") is None


def test_it_imports_nothing_heavy():
    import subprocess
    import sys

    # what a zygote has loaded is what every shim pays for
    heavy = {"enum", "re", "typing", "socket", "json", "subprocess", "threading", "signal", "logging"}
    program = (
        f"import sys; source=open({shim.__file__!r}).read(); exec(compile(source, 'shim', 'exec'), {{'__name__': 'shim'}});"
        f"print(*sorted(set(sys.modules) & {heavy!r}))"
    )
    ran = subprocess.run([sys.executable, "-I", "-S", "-OO", "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""
