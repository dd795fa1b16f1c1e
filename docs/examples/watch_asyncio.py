"""Tell what happens to containers, on asyncio: python watch_asyncio.py [OFFSET], the offset to go on at. Ctrl-C ends it."""

import asyncio
import sys

from pyx_bus import client


async def main(since: int | None) -> None:
    async with client.connect(name="watch-asyncio") as bus:  # $PYX_BUS, or the host's bus
        async for event in bus.events("container.>", since=since):
            if event.topic == "bus.gap":  # longer away than the journal keeps
                print(f"{event.payload.lost} events are gone, up to offset {event.offset}", flush=True)
            else:
                print(event.offset, event.topic, event.id, event.attributes.get("name", ""), flush=True)


try:
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else None))
except KeyboardInterrupt:
    pass
