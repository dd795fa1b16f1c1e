"""netd: networks, container network namespaces with an endpoint in them, addresses, published ports, resolver settings.

It makes and keeps namespaces; who runs in them isn't its matter. It never looks at images, processes or mounts other than the
bind mounts that keep its own namespaces alive. No traffic passes through it: the kernel forwards (a bridge, nftables), so running
containers keep their network while netd is down.
"""
