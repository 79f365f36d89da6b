"""Status pages, made and read without the extension module, which the launcher does not load before the ranks start.

Layout: native/include/launcher/status_page.h.
"""

from __future__ import annotations

import errno
import os
import stat

from launcher.record import Record

_PAGE_BYTES = 4096
_MAGIC = b"LNCHPAGE"
_VERSION = 1
_RANK_OFFSET, _PHASE_OFFSET, _STEP_OFFSET = 12, 20, 72
_COLLECTIVE_SEQ_OFFSET, _COLLECTIVE_ENTER_OFFSET = 136, 152


def make_status_page(path: str, rank: int) -> None:
    """Makes the page of ``rank``.

    Raises:
        OSError: it cannot be made in full.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        head = _MAGIC + _VERSION.to_bytes(4, "little") + rank.to_bytes(4, "little")
        if os.write(fd, head.ljust(_PAGE_BYTES, b"\0")) != _PAGE_BYTES:
            raise OSError(errno.EFBIG, "not written in full", path)
    finally:
        os.close(fd)


class Page(Record):
    """What the launcher reads of a page. ``collective_entered_ns`` is 0 outside of any collective."""

    phase: int
    step: int
    collective_seq: int
    collective_entered_ns: int


def read_page(path: str) -> Page | None:
    """The page at ``path``; None when it is gone, torn, or not a page: the file is the rank's to write."""
    try:
        # Neither a link nor a FIFO that the rank has put there is followed or waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        page = os.read(fd, _PAGE_BYTES) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)
    if len(page) < _PAGE_BYTES or not page.startswith(_MAGIC):
        return None

    def number(offset: int, size: int) -> int:
        return int.from_bytes(page[offset : offset + size], "little")

    return Page(
        phase=number(_PHASE_OFFSET, 4),
        step=number(_STEP_OFFSET, 8),
        collective_seq=number(_COLLECTIVE_SEQ_OFFSET, 8),
        collective_entered_ns=number(_COLLECTIVE_ENTER_OFFSET, 8),
    )
