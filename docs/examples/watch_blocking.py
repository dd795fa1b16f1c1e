"""Tell what happens to containers, in a plain script that goes on where it ended the last time: python watch_blocking.py [NAME]."""

import sys

from pyx_bus.sync import Connection

try:
    with Connection(name="watch-blocking") as bus:  # $PYX_BUS, or the host's bus
        durable = sys.argv[1] if len(sys.argv) > 1 else ""  # under this name the broker keeps our position
        with bus.events("container.>", since="beginning", durable=durable) as events:
            for event in events:
                if event.topic == "bus.gap":
                    print(f"{event.payload['lost']} events are gone, up to offset {event.offset}", flush=True)
                else:
                    print(event.offset, event.topic, event.payload["id"], event.payload.get("attributes", {}), flush=True)
except KeyboardInterrupt:
    pass
