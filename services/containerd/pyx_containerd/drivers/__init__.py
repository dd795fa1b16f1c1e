"""Drivers: the OCI runtimes."""
