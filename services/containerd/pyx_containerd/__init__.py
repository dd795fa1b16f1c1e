"""containerd: the life of containers.

It owns every container's spec and state, its shim and runtime, execs, and the order in which the other services are asked. It never
talks to a registry, to netlink, or touches what a container writes: those are imaged's, netd's and logd's.
"""
