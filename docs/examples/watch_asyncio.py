"""Tell what happens to containers, on asyncio: python watch_asyncio.py [FILE]. Ctrl-C ends it.

What was told last is kept in FILE, by journal and offset, and the next time it goes on behind that.
"""

import asyncio
import sys
from pathlib import Path

from pyx_bus import client


async def main(place: Path | None) -> None:
    journal, since = "", None
    if place is not None and place.exists():
        journal, offset = place.read_text().split()
        since = int(offset) + 1
    async with client.connect(name="watch-asyncio") as bus:  # $PYX_BUS, or the host's bus
        async for event in bus.events("container.>", since=since, journal=journal):
            if event.topic != "bus.gap":
                print(event.offset, event.topic, event.id, event.attributes.get("name", ""), flush=True)
            elif event.payload.journal:  # its directory was removed: another one, from its beginning
                print(f"journal {event.journal} begins", flush=True)
            else:  # longer away than the journal keeps
                print(f"{event.payload.lost} events are gone, up to offset {event.offset}", flush=True)
            if place is not None:
                new = place.with_suffix(".new")  # whenever this ends, one whole place is there
                new.write_text(f"{event.journal} {event.offset}")
                new.replace(place)


try:
    asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
except KeyboardInterrupt:
    pass
