"""Coverage-guided fuzzing of the bus's core: ``python -m tests.fuzz world|parts [options of libFuzzer] [corpus]``; ``make fuzz`` does both.

It ends with the first input that breaks a promise (an exception, ten seconds, a gigabyte), and leaves it in ``crash-*`` or ``timeout-*``.
``python -m tests.fuzz world FILE`` runs one input again.
"""

from __future__ import annotations

import atexit
import logging
import sys

import atheris

with atheris.instrument_imports(include=["pyx_bus"]):
    from tests.fuzz import parts, world

LIMITS = ["-timeout=10", "-rss_limit_mb=1024", "-max_len=2000", "-print_final_stats=1"]


def main() -> None:
    target, *options = sys.argv[1:]
    logging.disable()  # it would be of what is made up here
    if target == "world":
        worlds = world.Worlds()
        atexit.register(worlds.close)
        run = worlds.run
    else:
        run = parts.run
    again = f"{sys.executable} -m tests.fuzz {target}"  # libFuzzer starts itself again by a shell, to merge
    atheris.Setup([again, *LIMITS, *options], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
