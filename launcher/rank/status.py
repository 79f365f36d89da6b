"""The rank's status page, seen from Python.

The layout is native/include/launcher/status_page.h. The supervisor creates one page per rank in the run directory,
before it starts the rank, and reads it with ``snapshot()``. A rank has two ways to write it:

* the boot shim, which must not pay for loading the extension module, writes three fields at their fixed offsets with
  ``write_boot`` and ``write_phase``, through a file descriptor and without a mapping;
* ``launcher.init()`` maps it with ``open_page(path, writable=True)``; a step then is a store, no system call.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher._native import StatusPage

PAGE_SIZE = 4096
PID_OFFSET = 16
PHASE_OFFSET = 20
STARTED_NS_OFFSET = 24

CREATED, BOOTING, RUNNING, FINISHED, FAILED = range(5)
PHASE_NAMES = ("created", "booting", "running", "finished", "failed")

# What a rank does inside a collective.
OUTSIDE, ENTERING, COPYING_IN, WAITING, REDUCING, COPYING_OUT, BETWEEN_HOSTS = range(7)
COLLECTIVE_PHASE_NAMES = (
    "outside",
    "entering",
    "copying in",
    "waiting for others",
    "reducing",
    "copying out",
    "between hosts",
)


def write_phase(fd: int, phase: int) -> None:
    """Set the phase in the page that ``fd`` is open for writing on. Valid beside any mapping of the same page."""
    os.pwrite(fd, phase.to_bytes(4, "little"), PHASE_OFFSET)


def write_boot(fd: int, pid: int, started_ns: int) -> None:
    """Say who writes this page, since when (CLOCK_MONOTONIC), and that it is booting; the phase comes last."""
    os.pwrite(fd, started_ns.to_bytes(8, "little"), STARTED_NS_OFFSET)
    os.pwrite(fd, pid.to_bytes(4, "little"), PID_OFFSET)
    write_phase(fd, BOOTING)


def phase_name(phase: int) -> str:
    """The word for a phase; a number that no version of ours writes is shown as it is."""
    return PHASE_NAMES[phase] if 0 <= phase < len(PHASE_NAMES) else f"unknown ({phase})"


def create_page(path: str, rank: int) -> StatusPage:
    """Make the page of ``rank``.

    Raises:
        OSError: the file exists already, or can not be made in full (disk full among others); ``filename`` is set.
    """
    from launcher._native import StatusPage

    return StatusPage.create(path, rank)


def open_page(path: str, *, writable: bool = False) -> StatusPage:
    """Map a page that exists.

    Raises:
        OSError: the file can not be opened or mapped; ``filename`` is set.
        ValueError: it is not a status page, or one of another version.
    """
    from launcher._native import StatusPage

    return StatusPage.open(path, writable=writable)
