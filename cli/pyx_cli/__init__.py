"""The command line of pyx: parse, call the bus, print. It holds no state, needs no root, and imports no service.

What runs before the first byte to the bus is kept to a few milliseconds: nothing here imports typing, re, enum, dataclasses,
argparse or json at start; whatever a command needs beyond the parser is imported by that command.
"""
