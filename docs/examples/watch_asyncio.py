"""Tell what happens to containers, on asyncio: python watch_asyncio.py [JOURNAL OFFSET], as it printed them last, goes on behind."""

import asyncio
import sys

from pyx_bus.client import connect


async def main(journal: str = "", offset: str = "") -> None:
    async with connect(name="watch-asyncio") as bus:  # $PYX_BUS, or the host's bus
        async for event in bus.events("container.>", since=int(offset) + 1 if offset else None, journal=journal):
            if event.topic == "bus.gap":  # longer away than the journal keeps, or it's another journal
                print(event.journal, event.offset, "gap:", event.payload, flush=True)
            else:
                print(event.journal, event.offset, event.topic, event.id, event.attributes.get("name", ""), flush=True)


try:
    asyncio.run(main(*sys.argv[1:3]))
except KeyboardInterrupt:
    pass
