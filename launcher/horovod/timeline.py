"""A trace of one rank's collectives, for chrome://tracing or Perfetto.

Format: the JSON array of the Trace Event Format, complete events (``"ph": "X"``), microseconds.
"""

from __future__ import annotations

import json
import os
import threading
import time

from launcher.errors import OutputError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TextIO


class Timeline:
    """Writes events as they end. The file is a whole JSON array once :meth:`close` was called.

    Each collective is two events: ``negotiate`` from its submission to the moment all ranks have asked for it, and the
    collective itself, until its result is there. Time 0 is when the timeline was started.

    Raises:
        OutputError: the file cannot be made, or written.
    """

    def __init__(self, path: str, rank: int) -> None:
        self._path, self._rank = path, rank
        self._lock = threading.Lock()
        self._threads: dict[str, int] = {}
        self._began_ns = time.monotonic_ns()
        try:
            self._file: TextIO | None = open(path, "w", encoding="utf-8")  # noqa: SIM115 - open until close()
        except OSError as error:
            raise OutputError(f"timeline {path}: {error.strerror}; give another file") from error
        self._write({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}, first=True)

    def add(self, name: str, kind: str, submitted_ns: int, matched_ns: int, ended_ns: int, nbytes: int) -> None:
        """One collective; times of ``time.monotonic_ns``, bytes of this rank's input."""
        with self._lock:
            if self._file is None:
                return
            thread = self._threads.get(name)
            if thread is None:
                thread = self._threads[name] = len(self._threads) + 1
                label = {"name": "thread_name", "ph": "M", "pid": self._rank, "tid": thread}
                self._write({**label, "args": {"name": name}})
            for what, begin_ns, end_ns, more in (
                ("negotiate", submitted_ns, matched_ns, {}),
                (kind, matched_ns, ended_ns, {"bytes": nbytes}),
            ):
                begin_us = (begin_ns - self._began_ns) / 1000
                event = {"name": what, "ph": "X", "pid": self._rank, "tid": thread, "ts": begin_us}
                self._write({**event, "dur": (end_ns - begin_ns) / 1000, "args": {"tensor": name, **more}})

    def close(self) -> None:
        """Ends the array. A second call does nothing."""
        with self._lock:
            if self._file is None:
                return
            file, self._file = self._file, None
            try:
                file.write("\n]\n")
                file.close()
            except OSError as error:
                raise OutputError(f"timeline {self._path}: {error.strerror}") from error

    def _write(self, event: dict[str, Any], first: bool = False) -> None:
        assert self._file is not None
        try:
            self._file.write(("[\n" if first else ",\n") + json.dumps(event))
        except OSError as error:
            self._file = None
            raise OutputError(f"timeline {self._path}: {error.strerror}") from error


def from_environment(rank: int) -> Timeline | None:
    """What HOROVOD_TIMELINE asks for: a file, on rank 0. ``DYNAMIC`` means only when start_timeline is called."""
    path = os.environ.get("HOROVOD_TIMELINE", "")
    if not path or path == "DYNAMIC" or rank != 0:
        return None
    return Timeline(path, rank)
