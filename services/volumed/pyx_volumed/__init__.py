"""volumed: volumes, and the mounts of a container that aren't its root file system.

Owns: the volumes (their names, labels, directories, and what they're first filled with) and who uses them. Says, for a container,
what to mount where; the OCI runtime mounts it. Never: who mounts a volume beyond a container's ID, or when it runs.
"""
