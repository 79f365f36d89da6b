"""From a rank's end, as the guardian saw it, and the files it left, to its exit record."""

from __future__ import annotations

import os
import stat

from launcher.causes import WATCHDOG
from launcher.evidence import EXIT, SIGNAL, ExitRecord
from launcher.supervisor.pages import read_page

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from launcher.engines.torch import RankLaunch
    from launcher.supervisor.guardian import Event

# An error file holds a message and a traceback. What is larger is not read: the file is the rank's to write.
_MAX_ERROR_FILE = 1 << 20


def make_record(event: Event, launch: RankLaunch, host: str, told_ns: int, replaced: bool = False) -> ExitRecord:
    """The exit record for an ``exited`` event.

    Args:
        told_ns: when the launcher first signalled the rank; 0: never.
        replaced: the rank's process has become another program (exec), so its page says nothing about its end.
    """
    ended_ns = event.number(4)
    error, note = read_error_file(launch.error_file)
    page = read_page(launch.status_page) if launch.booted and not replaced else None
    how, value = event.text(2), event.number(3)
    failed = how == SIGNAL or value != 0
    ours = error.get("launcher") if failed else None
    ours = ours if isinstance(ours, dict) else {}
    message, traceback, timestamp = _torch_fields(error) if failed else ("", "", 0)
    # What a thread raised, the rank has survived for a while: its end is the time that counts.
    at_ns = None if ours.get("thread") else ours.get("monotonic_ns")
    # A time of another boot of the machine, or a forged one, is no time.
    failed_ns = at_ns if isinstance(at_ns, int) and 0 < at_ns <= ended_ns else ended_ns
    waited = WATCHDOG.search(f"{message}\n{event.text(10)}")
    return ExitRecord(
        host=host,
        rank=launch.rank,
        local_rank=launch.local_rank,
        pid=event.number(1),
        how=how,
        value=value,
        ended_ns=ended_ns,
        failed_ns=failed_ns,
        told_ns=told_ns,
        was_stopped=event.text(8) == "1",
        message=message,
        where=str(ours.get("where", "")),
        traceback=traceback,
        thread=str(ours.get("thread", "")),
        waited_for=f"collective {waited[1]} ({waited[2]})" if waited else "",
        timestamp=timestamp,
        phase=page.phase if page else None,
        steps=page.step if page else 0,
        max_rss_kib=event.number(5),
        cpu_s=(event.number(6) + event.number(7)) / 1e6,
        stdout_tail=event.text(9),
        stderr_tail=event.text(10),
        error_file=launch.error_file if error else "",
        note=note,
        operation=page.operation if page else "",
        sequence=page.number if page else 0,
        collective_phase=page.doing if page else "",
        waited_ns=min(page.collective_waits_ns, ended_ns) if page else 0,
    )


def failed_start(launch: RankLaunch, host: str, code: int, message: str, now_ns: int) -> ExitRecord:
    """The record of a rank that never ran; ``code`` as a shell would give it (126, 127)."""
    return ExitRecord(
        host=host,
        rank=launch.rank,
        local_rank=launch.local_rank,
        pid=0,
        how=EXIT,
        value=code,
        ended_ns=now_ns,
        failed_ns=now_ns,
        message=message,
    )


def read_error_file(path: str) -> tuple[dict[str, Any], str]:
    """The error file's content and a note on why it was not used; never raises, whatever the rank put there.

    torchrun's schema: ``{"message": {"message": str, "extraInfo": {"py_callstack": str, "timestamp": str}}}`` or the
    flat ``{"message": str, "timestamp": int}``.
    """
    try:
        # O_NONBLOCK: the rank may have left a FIFO there. O_NOFOLLOW: or a link to somewhere else.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"error file {path} ignored: {error.strerror}"
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return {}, f"error file {path} ignored: not a regular file"
        if info.st_size > _MAX_ERROR_FILE:
            return {}, f"error file {path} ignored: {info.st_size} bytes, at most {_MAX_ERROR_FILE} are read"
        with open(fd, "rb", closefd=False) as file:
            body = file.read(_MAX_ERROR_FILE)
    except OSError as error:
        return {}, f"error file {path} ignored: {error.strerror}"
    finally:
        os.close(fd)
    import json

    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        return {}, f"error file {path} ignored: not JSON ({error})"
    if not isinstance(content, dict) or "message" not in content:
        return {}, f"error file {path} ignored: no 'message' in it"
    return content, ""


def _torch_fields(error: dict[str, Any]) -> tuple[str, str, int]:
    body = error.get("message", "")
    extra: Any = error
    if isinstance(body, dict):
        extra = body.get("extraInfo", {})
        body = body.get("message", "")
    extra = extra if isinstance(extra, dict) else {}
    stamp = str(extra.get("timestamp", ""))
    return (
        str(body),
        str(extra.get("py_callstack", "")),
        int(stamp) if len(stamp) <= 10 and stamp.isascii() and stamp.isdigit() else 0,
    )
