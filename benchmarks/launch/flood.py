"""The reading end of the flood: drain the launcher's stdout, time the lines that matter, watch its memory."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import statistics
import time
from pathlib import Path

from jobs import Job, memory_of, peak_rss_of

BEACON = re.compile(rb"BEACON (\d+)\.")
KEEP = 4096  # bytes of the last chunk kept for the next: a beacon's line may be cut in two anywhere
PIPE_BYTES = 1 << 20
WATCH_S = 0.25
FLOOD_S = 4.0
PERIOD_S = 0.05
LINGER_S = 30.0  # how long after the flood's end its text may still arrive


class Drain:
    """Reads one job's stdout to its end, or to ``LINGER_S`` past the end of the flood."""

    def __init__(self, scratch: Path) -> None:
        self.seconds = FLOOD_S
        self.max_bytes = min(8 << 30, shutil.disk_usage(scratch).free // 4)  # some launchers put it all in a file
        self.delays_ms: list[float] = []
        self.mixed = 0
        self.received = 0
        self.peak_uss = 0
        self.peak_rss: dict[int, int] = {}

    def run(self, job: Job) -> dict[str, float]:
        """Let the ranks start, read all, and return the numbers of this run."""
        assert job.process.stdout is not None
        fd = job.process.stdout.fileno()
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        job.meet_ranks()
        self._watch_memory(job)
        job.go()
        self._read(job, fd)
        written, took = self._flooded(job)
        beats = int(self.seconds / PERIOD_S)
        self.delays_ms.sort()
        arrived = self.delays_ms
        found = {
            "missing_lines": float(beats - len(arrived)),
            "mixed_lines": float(self.mixed),
            "flood_mb_s": written / took / 1e6,
            "through_share": self.received / written,
            "peak_rss_mb": sum(self.peak_rss.values()) / 1e6,
            "peak_uss_mb": self.peak_uss / 1e6,
        }
        if arrived:
            found |= {
                "delay_median_ms": statistics.median(arrived),
                "delay_p99_ms": arrived[min(len(arrived) - 1, int(0.99 * len(arrived)))],
                "delay_max_ms": arrived[-1],
            }
        return found

    def _flooded(self, job: Job) -> tuple[int, float]:
        path = job.dir / "flooded.0"
        if not path.exists():
            raise job.fail(f"the flood had not ended {LINGER_S:g} s after its time")
        written, took = path.read_text().split()
        return int(written), float(took)

    def _read(self, job: Job, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        deadline = time.monotonic() + self.seconds + LINGER_S
        watch_at = time.monotonic() + WATCH_S
        tail = b""
        while (now := time.monotonic()) < deadline:
            if now >= watch_at:
                self._watch_memory(job)
                watch_at = now + WATCH_S
            if not poll.poll(100):
                continue
            chunk = os.read(fd, PIPE_BYTES)
            arrived_ns = time.monotonic_ns()
            if not chunk:
                return
            self.received += len(chunk)
            tail = self._find_beacons(tail, chunk, arrived_ns)

    def _find_beacons(self, tail: bytes, chunk: bytes, arrived_ns: int) -> bytes:
        """Note the beacons whose last byte is in ``chunk``; return what the next chunk must be searched with."""
        for part, begin in ((tail + chunk[:KEEP], len(tail)), (chunk, KEEP)):
            at = part.find(b"BEACON ")
            while at >= 0:
                match = BEACON.match(part, at)
                if match and match.end() > begin:
                    self.delays_ms.append((arrived_ns - int(match.group(1))) / 1e6)
                    line = part[part.rfind(b"\n", 0, at) + 1 : at]
                    self.mixed += b"ffff" in line or part[match.end() : match.end() + 1] not in (b"\n", b"\r", b"")
                at = part.find(b"BEACON ", at + 1)
        return (tail + chunk)[-KEEP:] if len(chunk) < KEEP else chunk[-KEEP:]

    def _watch_memory(self, job: Job) -> None:
        pids = (job.process.pid, *job.helpers())
        self.peak_uss = max(self.peak_uss, sum(memory_of(pid).private for pid in pids))
        for pid in pids:
            self.peak_rss[pid] = max(self.peak_rss.get(pid, 0), peak_rss_of(pid))
