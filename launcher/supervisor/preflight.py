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
    """A line for each limit that is out of the ordinary. Looks, changes nothing, waits for nothing.

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


class GpuHolders:
    """Asks the driver, in the background, who holds GPU memory while this job's ranks are only starting.

    A process of an earlier job that was left behind is the usual answer; the ranks then fail much later, for want of
    memory. Within a container the driver shows the container's own processes only.
    """

    _QUERY = ("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")

    def __init__(self) -> None:
        self._process = None
        # By hand: shutil would be imported on every start, also where there is no GPU.
        places = (os.path.join(place, "nvidia-smi") for place in os.environ.get("PATH", os.defpath).split(os.pathsep))
        tool = next((path for path in places if os.access(path, os.X_OK)), None)
        if tool is not None:
            import subprocess

            self._process = subprocess.Popen(
                [tool, *self._QUERY], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )

    def take(self) -> list[str] | None:
        """A line for each holder, once; None while the driver has not answered, and after the lines were taken."""
        if self._process is None or self._process.poll() is None:
            return None
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            answer = stream.read(64 * 1024).decode("utf-8", "replace")
        self._process = None
        lines = []
        for row in answer.splitlines():
            fields = [field.strip() for field in row.split(",")]
            if len(fields) == 3 and fields[0].isdigit():
                lines.append(f"GPU memory is held already: pid {fields[0]} ({fields[1]}), {fields[2]} MiB")
        return lines

    def close(self) -> None:
        """Ends the question, if it is still open."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None
