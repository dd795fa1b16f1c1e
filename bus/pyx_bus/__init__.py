"""The bus of pyx: wire format, broker, client library, and the typed contract of every service."""

__version__ = "0.1.0"
