"""Killing every descendant of this process: what is left when the guardian, which does it otherwise, is gone."""

from __future__ import annotations

import os
import signal
import time

_LIMIT_S = 5.0


def kill_descendants(root: int) -> int:
    """SIGKILLs and reaps all living descendants of ``root``, a child subreaper, until none is left. How many."""
    killed: set[int] = set()
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        _reap()
        living = _descendants(root)
        if not living:
            break
        for number in (signal.SIGSTOP, signal.SIGKILL):  # what is stopped cannot fork
            for pid in living:
                _send(pid, number)
        killed.update(living)
        time.sleep(0.002)
    return len(killed)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:
            continue  # it has ended meanwhile
        if state not in (b"Z", b"X"):
            parents[int(name)] = int(parent)
    found: set[int] = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found and pid not in found}
        if not more:
            return sorted(found - {root})
        found |= more
