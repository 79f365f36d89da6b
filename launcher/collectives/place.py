"""Where this rank stands: in the launcher's job, on which host, and with whom it can share memory."""

from __future__ import annotations

import os
import sys

from launcher.errors import UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher._native import StatusPage


class Place(Record):
    """This rank's place in the job, as the launcher's environment tells it.

    ``local_ranks``: the ranks of this host, as the job numbers them. ``directory``: the job's folder on this host,
    which only this user may enter.
    """

    rank: int
    world_size: int
    local_ranks: tuple[int, ...]
    directory: str
    host: str
    attempt: int


def read_switch(name: str) -> bool:
    """Whether the environment variable ``name``, on by default, is not 0.

    Raises:
        UsageError: it is neither 0 nor 1.
    """
    value = os.environ.get(name, "1")
    if value not in ("0", "1"):
        raise UsageError(f"environment variable {name} is {value!r}; expected 0 (off) or 1 (on, the default)")
    return value == "1"


def read_place(environ: Mapping[str, str]) -> Place | None:
    """The place of this process; None when it is no rank of a launcher.

    Raises:
        UsageError: a variable is not what the launcher sets.
    """
    directory = environ.get("LAUNCHER_RUN_DIR", "")
    if not directory or "RANK" not in environ:
        return None

    def number(name: str, default: int) -> int:
        raw = environ.get(name, "")
        try:
            value = int(raw) if raw else default
        except ValueError:
            value = -1
        if value < 0:
            raise UsageError(
                f"environment variable {name} is {raw!r}; expected a whole number, as the launcher sets it"
            )
        return value

    rank, world_size = number("RANK", 0), number("WORLD_SIZE", 1)
    local_size = number("LOCAL_WORLD_SIZE", world_size)
    local_rank = number("LOCAL_RANK", 0)
    # --virtual-local-rank tells every rank that it is the first; the folder of its status page has the true number.
    folder = os.path.basename(os.path.dirname(environ.get("LAUNCHER_STATUS_PAGE", "")))
    if folder.isdecimal():
        local_rank = int(folder)
    first = 0 if local_size == world_size else rank - local_rank  # the ranks of a host follow each other
    if not 0 <= first <= rank < first + local_size <= world_size:
        raise UsageError(
            f"the environment says RANK={rank} of WORLD_SIZE={world_size} and LOCAL_RANK={local_rank} of "
            f"LOCAL_WORLD_SIZE={local_size}, which can not all be true; leave these variables as the launcher sets them"
        )
    return Place(
        rank=rank,
        world_size=world_size,
        local_ranks=tuple(range(first, first + local_size)),
        directory=directory,
        host=environ.get("SM_CURRENT_HOST") or os.uname().nodename,
        attempt=number("LAUNCHER_ATTEMPT", 0),
    )


def identity(place: Place | None) -> str:
    """A text that is the same on ranks which can share memory: one kernel, process and mount namespace, and user.

    The launcher's folder for the job is part of it: hosts that are simulated on one machine stay apart.
    """
    parts = [os.uname().nodename, str(os.getuid()), place.directory if place else ""]
    for path in ("/proc/self/ns/pid", "/proc/self/ns/mnt"):
        try:
            parts.append(os.readlink(path))
        except OSError as error:
            parts.append(f"{path}: {error.strerror}")
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            parts.append(file.read().strip())
    except OSError as error:
        parts.append(f"boot_id: {error.strerror}")
    return " ".join(parts)


_page: tuple[int, str, StatusPage | None] = (0, "", None)


def status_page(environ: Mapping[str, str]) -> StatusPage | None:
    """This rank's status page, mapped once per process; None without the launcher, or (said once) when it fails."""
    global _page
    path = environ.get("LAUNCHER_STATUS_PAGE", "")
    if _page[:2] != (os.getpid(), path):
        _page = (os.getpid(), path, _open(path))
    return _page[2]


def _open(path: str) -> StatusPage | None:
    if not path:
        return None
    from launcher.rank.status import open_page

    try:
        return open_page(path, writable=True)
    except (OSError, ValueError) as error:
        print(f"[launcher] the collectives of this rank are not shown to its supervisor: {error}", file=sys.stderr)
        return None
