"""logd: every byte a container writes.

Owns: reading a container's streams, storing what they carry, handing it to the container's log driver, showing it to whoever is
attached, and reading it back. Never: why a container runs, or who it is beyond its ID.

Each stream's reader (`pump`) does, for every read, without letting anything else run in between: read into a buffer that outlives
the process (`window`), encode all whole lines at once (`jsonfile`), one write to the log (`drivers`). Then each attached client
(`clients`) gets the raw bytes. Reading back (`reader`) decodes in bulk the same way.
"""
