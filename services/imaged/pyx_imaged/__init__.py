"""imaged: images by name and digest, and the root file systems made of them.

It owns the content store (blobs by digest), the layers unpacked from them, image names, the registry client, archives, and the
writable snapshot of every container. It never mounts anything for a container, knows no process of one, and never runs anything
of an image. Every archive it reads is hostile until proven otherwise: unpacking happens in a process of its own (``worker``).
"""
