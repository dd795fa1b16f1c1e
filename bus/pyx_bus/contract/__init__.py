"""The typed contract of every service: one module each, so that a client imports only what it calls."""
