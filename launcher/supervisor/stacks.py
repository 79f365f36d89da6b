"""Stacks of hanging ranks as debuggers see them, native frames too: by py-spy or gdb, where one is installed."""

from __future__ import annotations

import os
import shutil
import subprocess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Tool -> how it writes all threads of a process to its stdout.
_TOOLS = {
    "py-spy": ("dump", "--native", "--pid"),
    "gdb": ("-batch", "-nx", "-ex", "thread apply all backtrace", "-p"),
}


class StackDumps:
    """Debuggers at work on some ranks. Empty when none is installed."""

    def __init__(self, targets: Mapping[int, str]) -> None:
        """``targets``: pid -> file for its stacks."""
        self._running: list[subprocess.Popen[bytes]] = []
        tool = next((path for path in map(shutil.which, _TOOLS) if path), None)
        if tool is None:
            return
        for pid, path in targets.items():
            command = [tool, *_TOOLS[os.path.basename(tool)], str(pid)]
            with open(path, "wb") as file:
                self._running.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
                )

    def done(self) -> bool:
        """Whether all have ended."""
        return all(process.poll() is not None for process in self._running)

    def stop(self) -> None:
        """Ends what still runs: a debugger may itself hang on a rank in an uninterruptible wait."""
        for process in self._running:
            if process.poll() is None:
                process.kill()
                process.wait()
