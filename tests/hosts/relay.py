"""A TCP relay: LISTEN_ADDRESS LISTEN_PORT TARGET_ADDRESS TARGET_PORT DELAY_S. Orders come a line each on stdin.

Every byte is passed on ``DELAY_S`` after it came. Orders: ``stall`` keeps bytes back, ``go`` lets them through,
``drop`` resets all connections; each is answered with itself. Ends when stdin does.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import socket
import struct
import sys
import time

CHUNK = 65536


class Way:
    """One direction of a connection: what was read from ``source`` and when it is due at ``sink``."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.waiting: collections.deque[tuple[float, bytes]] = collections.deque()
        self.ended = False

    def read(self, due: float) -> None:
        try:
            data = self.source.recv(CHUNK)
        except OSError:
            data = b""
        self.ended = not data
        self.waiting.append((due, data))

    def write(self, now: float) -> bool:
        """Passes on what is due; False when the direction is over."""
        while self.waiting and self.waiting[0][0] <= now:
            data = self.waiting.popleft()[1]
            try:
                if not data:
                    self.sink.shutdown(socket.SHUT_WR)
                    return False
                self.sink.sendall(data)
            except OSError:
                return False
        return True


def _serve(server: socket.socket, target: tuple[str, int], delay_s: float) -> None:
    ways: list[Way] = []
    kept: dict[int, socket.socket] = {}
    stalled = False
    while True:
        reading = [way.source for way in ways if not way.ended]
        due = [way.waiting[0][0] for way in ways if way.waiting and not stalled]
        limit = max(0.0, min(due) - time.monotonic()) if due else None
        ready = select.select([0, server, *reading], [], [], limit)[0]
        now = time.monotonic()
        if 0 in ready:
            data = os.read(0, CHUNK)
            if not data:
                return
            for order in data.decode().split():
                if order == "drop":
                    for one in kept.values():
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        one.close()
                    ways, kept = [], {}
                else:
                    stalled = order == "stall"
                print(order, flush=True)
            continue
        if server in ready:
            near = server.accept()[0]
            try:
                far = socket.create_connection(target, 5)
            except OSError:
                near.close()
                continue
            far.settimeout(5)
            near.settimeout(5)
            kept.update({near.fileno(): near, far.fileno(): far})
            ways += [Way(near, far), Way(far, near)]
        for way in ways:
            if way.source in ready:
                way.read(now + delay_s)
        if not stalled:
            ways = [way for way in ways if way.write(now)]


def main() -> None:
    listen, target = (sys.argv[1], int(sys.argv[2])), (sys.argv[3], int(sys.argv[4]))
    family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET
    with socket.create_server(listen, family=family) as server, contextlib.suppress(KeyboardInterrupt):
        print("listening", flush=True)
        _serve(server, target, float(sys.argv[5]))


main()
