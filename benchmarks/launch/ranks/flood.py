"""Rank 0 writes lines as fast as it can for a while; rank 1 writes a line with the time in it every 50 ms.

flood.py SECONDS MAX_BYTES
"""

import os
import sys
import time

from meet import RANK, tell, wait_for_go

PERIOD_S = 0.05
LINE = b"f" * 99 + b"\n"
BLOCK = LINE * ((1 << 20) // len(LINE))


def flood(seconds: float, max_bytes: int) -> None:
    """Write blocks of whole lines until the time or the number of bytes is used up; tell both."""
    began = time.monotonic()
    written = 0
    while time.monotonic() - began < seconds and written < max_bytes:
        rest = memoryview(BLOCK)
        while rest:
            rest = rest[os.write(1, rest) :]
        written += len(BLOCK)
    tell("flooded", f"{written} {time.monotonic() - began}")


def beacon(seconds: float) -> None:
    """Write a line with the current time in each period."""
    began = time.monotonic()
    for beat in range(int(seconds / PERIOD_S)):
        time.sleep(max(0.0, began + beat * PERIOD_S - time.monotonic()))
        os.write(1, b"BEACON %d.\n" % time.monotonic_ns())


tell("ready", str(os.getpid()))
wait_for_go()
if RANK == 0:
    flood(float(sys.argv[1]), int(sys.argv[2]))
else:
    beacon(float(sys.argv[1]))
