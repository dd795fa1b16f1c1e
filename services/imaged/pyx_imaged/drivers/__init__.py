"""Snapshotters: ways to give a container a writable root file system on top of an image's layers."""
