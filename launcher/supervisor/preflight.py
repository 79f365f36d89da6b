"""What is likely to end this job later, said while it starts: limits of this host that jobs are known to run into."""

from __future__ import annotations

import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Loader workers, stores and log files of a rank take some hundreds of descriptors; 1,024 is the usual default.
_FEW_FILES = 1024
# A checkpoint or a log needs more than this; below it, writing is about to fail.
_LITTLE_SPACE = 100 * 2**20


def warnings(directories: Sequence[str]) -> list[str]:
    """A line for each limit that is out of the ordinary. Looks, changes nothing, takes microseconds.

    Args:
        directories: where the job writes: logs, output, model.
    """
    lines = []
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < _FEW_FILES:
        lines.append(f"only {files} open files are allowed for each process here (ulimit -n)")
    if not os.path.isdir("/dev/shm"):  # looked at, not written
        lines.append("there is no /dev/shm here: loader workers cannot hand over tensors")
    seen = set()
    for path in directories:
        try:
            info = os.statvfs(path)
        except OSError:
            continue  # not there yet
        free = info.f_bavail * info.f_frsize
        if free < _LITTLE_SPACE and info.f_fsid not in seen:
            seen.add(info.f_fsid)
            lines.append(f"only {free / 2**20:.0f} MiB are free under {path}")
    return lines
