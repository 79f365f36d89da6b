"""How a job says that it failed or succeeded: ``output/failure``, ``output/failure.json``, ``output/success``.

The platform shows the first 1,024 characters of ``output/failure`` and takes the status from the exit code alone.
A text that the user's script wrote during this job wins over the launcher's; one that an earlier run left does not.
"""

from __future__ import annotations

import json
import os
import stat

from launcher.errors import OutputError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from launcher.container.paths import Paths

# More of a failure text than this is not read: the platform shows 1,024 characters of it.
_MOST_BYTES = 64 * 1024


class FileIdentity(Record):
    """What tells whether a file is still the same: any write changes at least one of these."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    content: bytes


class StaleMark(Record):
    """What earlier runs had left when the job started.

    Attributes:
        removed: paths that were found and removed, for one log line.
        kept: ``path: reason`` of those that could not be removed.
        failure: identity of a failure file that could not be removed, else None.
    """

    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    failure: FileIdentity | None = None


class FailureNotWritten(OutputError):
    """The failure text could not be written; ``text`` holds it, to be printed instead."""

    def __init__(self, path: str, reason: str, text: str) -> None:
        self.path, self.reason, self.text = path, reason, text
        super().__init__(f"cannot write {path} ({reason}); it was to say:\n{text}")

    def __reduce__(self) -> tuple[type[FailureNotWritten], tuple[str, str, str]]:
        return type(self), (self.path, self.reason, self.text)


def note_stale(paths: Paths) -> StaleMark:
    """Remove what an earlier run left of the three files. To be called once, before the script starts.

    Never raises for a file that cannot be removed: the job can still run, and :func:`write_failure` knows the file
    by its identity.
    """
    removed: list[str] = []
    kept: list[str] = []
    identity = _identity(paths.failure_file)
    for path in (paths.failure_file, paths.failure_json, paths.success_file):
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            kept.append(f"{path}: {error.strerror}")
        else:
            removed.append(path)
    if paths.failure_file in removed:
        identity = None
    return StaleMark(removed=tuple(removed), kept=tuple(kept), failure=identity)


def user_failure(paths: Paths, stale: StaleMark | None = None) -> str | None:
    """The failure text that this job's own script wrote; None when there is none, or only blanks."""
    identity = _identity(paths.failure_file)
    if identity is None or (stale is not None and identity == stale.failure):
        return None
    return identity.content.decode("utf-8", "replace") if identity.content.strip() else None


def write_failure(paths: Paths, text: str, detail: dict[str, Any], stale: StaleMark | None = None) -> str | None:
    """Write the failure text, and ``detail`` as JSON beside it. Each file appears whole or not at all.

    Args:
        text: for ``output/failure``; its first 1,024 characters have to stand on their own.
        detail: for ``output/failure.json``, an object with ``message`` (``text``), ``user_message`` (the user's
            text or null) and ``detail``; values that are not JSON are written as text.
        stale: what :func:`note_stale` returned.

    Returns:
        The user's own text, which then was left alone in ``output/failure``; None when ``text`` was written.

    Raises:
        FailureNotWritten: disk full, read-only, or the like. ``output/failure`` is tried first.
    """
    user_text = user_failure(paths, stale)
    if user_text is None:
        _write_whole(paths.failure_file, text, text)
    record = {"message": text, "user_message": user_text, "detail": detail}
    _write_whole(paths.failure_json, json.dumps(record, indent=1, default=str) + "\n", text)
    return user_text


def write_success(paths: Paths) -> None:
    """Write the empty marker ``output/success``.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        _replace(paths.success_file, b"")
    except OSError as error:
        raise OutputError(f"cannot write {paths.success_file} ({error.strerror})") from error


def _write_whole(path: str, content: str, text: str) -> None:
    try:
        # A text may hold anything that a traceback can, lone surrogates too.
        _replace(path, content.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise FailureNotWritten(path, error.strerror or str(error), text) from error


def _replace(path: str, content: bytes) -> None:
    """Write a temporary file beside ``path`` and rename it.

    Not forced to the disk: whoever reads it does so through the same kernel, and a disk that is busy with the job's own
    checkpoints would delay the end of every job.
    """
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


def _identity(path: str) -> FileIdentity | None:
    """None when there is no such regular file, or when it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO there must not be waited for
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        content = os.read(descriptor, _MOST_BYTES) if stat.S_ISREG(status.st_mode) else None
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if content is None:
        return None
    return FileIdentity(
        device=status.st_dev,
        inode=status.st_ino,
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        content=content,
    )
