"""Status pages, made and read without the extension module, which the launcher does not load before the ranks start.

Layout: native/include/launcher/status_page.h.
"""

from __future__ import annotations

import os

_PAGE_BYTES = 4096
_MAGIC = b"LNCHPAGE"
_VERSION = 1
_RANK_OFFSET, _PHASE_OFFSET, _STEP_OFFSET = 12, 20, 72


def make_status_page(path: str, rank: int) -> None:
    """Makes the page of ``rank``.

    Raises:
        OSError: it cannot be made in full.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        head = _MAGIC + _VERSION.to_bytes(4, "little") + rank.to_bytes(4, "little")
        os.write(fd, head.ljust(_PAGE_BYTES, b"\0"))
    finally:
        os.close(fd)


def read_page(path: str) -> tuple[int, int] | None:
    """Phase and step of a status page; None when it is gone or torn."""
    try:
        with open(path, "rb") as file:
            page = file.read(_PAGE_BYTES)
    except OSError:
        return None
    if len(page) < _PAGE_BYTES or not page.startswith(_MAGIC):
        return None
    phase = int.from_bytes(page[_PHASE_OFFSET : _PHASE_OFFSET + 4], "little")
    return phase, int.from_bytes(page[_STEP_OFFSET : _STEP_OFFSET + 8], "little")
