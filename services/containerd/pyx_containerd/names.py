"""Names for containers nobody named: a quality and something found outdoors. Pure."""

from __future__ import annotations

from collections.abc import Callable, Container

_QUALITIES_WORDS = """
    able amber apt ardent bold brave breezy bright brisk calm candid clear clever cosy crisp curious dapper deft eager early
    easy fair fleet fond frank fresh gentle glad golden grand green hardy hearty humble jolly keen kind lively loyal lucid
    lucky mellow merry mild modest neat nimble noble patient placid plucky polite prompt proud quick quiet ready rosy serene
    sharp silent silver sincere sleek snug sober solid spry steady still stout sunny swift tidy tranquil trusty upbeat vivid
    warm wise witty young zesty
"""
QUALITIES = _QUALITIES_WORDS.split()
_THINGS_WORDS = """
    acorn alder anchor aspen badger basalt beacon beech birch bison bramble breeze brook canyon cedar clover comet coral crane
    creek cypress dune eagle ember falcon fern finch fjord fox garnet glacier granite grove harbor hare hawk hazel heron hill
    ibex iris island ivy jay juniper kelp kestrel lagoon lark laurel lichen linden lynx magpie maple marlin marsh meadow moss
    oak opal orchid osprey otter owl pebble pine plover poplar prairie puffin quartz quail raven reef ridge river robin rowan
    sable sage salmon sequoia shore sparrow spruce summit swan tern thistle tide trout tundra valley walnut willow wren
"""
THINGS = _THINGS_WORDS.split()


def random_name(choose: Callable[[int], int], taken: Container[str]) -> str:
    """A free ``quality_thing``; a digit is added when luck runs out. ``choose(n)`` gives a random number below n."""
    name = ""
    for attempt in range(16):
        name = f"{QUALITIES[choose(len(QUALITIES))]}_{THINGS[choose(len(THINGS))]}"
        if attempt >= 8:
            name += str(choose(10**6))
        if name not in taken:
            return name
    return f"{name}_{choose(1 << 60):x}"
