"""The only door to the kernel: system calls, netlink sockets, sysctls, exec of nft.

Everything here is synchronous. What takes less than 0.3 ms may be called from the loop; each function's docstring says if it isn't so.
"""
