"""pyx beside Docker, Podman and the bare runtimes: ``make bench``."""
