"""The memory cgroup of this host's ranks: its limit, its peak, and the OOM kills it has counted."""

from __future__ import annotations

import os

from launcher.record import Record


class MemoryState(Record):
    """Bytes, and a count; 0 where the kernel does not tell. ``limit`` 0: none."""

    limit: int = 0
    peak: int = 0
    oom_kills: int = 0


# A v1 limit at or above this is the kernel's "none" (PAGE_COUNTER_MAX rounded to pages).
_NO_LIMIT = 1 << 60


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(text: str) -> int:
    text = text.strip()
    return int(text) if text.isdigit() else 0


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _number(value)
    return 0


class MemoryCgroup:
    """The cgroup that this process is in; its ranks are in the same."""

    def __init__(self, cgroup_file: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> None:
        self._v2 = ""
        self._v1 = ""
        for line in _read(cgroup_file).splitlines():
            hierarchy, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            # In a container the path is the host's, but the mount shows the container's own group at its root.
            if hierarchy == "0":
                self._v2 = _first_with("memory.events", (root + path, f"{root}/unified{path}", root))
            elif "memory" in controllers.split(","):
                self._v1 = _first_with("memory.oom_control", (f"{root}/memory{path}", f"{root}/memory"))

    def read(self) -> MemoryState:
        """The state now. A limit of an ancestor counts when it is the tighter one."""
        if self._v1:
            limits = [_number(_read(f"{path}/memory.limit_in_bytes")) for path in _upwards(self._v1)]
            return MemoryState(
                limit=min((limit for limit in limits if 0 < limit < _NO_LIMIT), default=0),
                peak=_number(_read(f"{self._v1}/memory.max_usage_in_bytes")),
                oom_kills=_field(_read(f"{self._v1}/memory.oom_control"), "oom_kill"),
            )
        if self._v2:
            limits = [_number(_read(f"{path}/memory.max")) for path in _upwards(self._v2)]
            return MemoryState(
                limit=min((limit for limit in limits if limit), default=0),
                peak=_number(_read(f"{self._v2}/memory.peak")),
                oom_kills=_field(_read(f"{self._v2}/memory.events"), "oom_kill"),
            )
        return MemoryState()


def _first_with(name: str, places: tuple[str, ...]) -> str:
    return next((place.rstrip("/") for place in places if os.path.exists(f"{place}/{name}")), "")


def _upwards(path: str) -> list[str]:
    """``path`` and its parents, as long as they are cgroups."""
    result = []
    while os.path.exists(f"{path}/cgroup.procs"):
        result.append(path)
        path = os.path.dirname(path)
    return result
