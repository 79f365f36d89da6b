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
_MOST = (1 << 63) - 1  # what hosts tell each other
_RANK_OFFSET, _PHASE_OFFSET, _STEP_OFFSET = 12, 20, 72
_COLLECTIVE_SEQ_OFFSET, _BYTES_OFFSET, _COLLECTIVE_ENTER_OFFSET, _OPERATION_OFFSET = 136, 144, 152, 160
_OPERATION_BYTES = 32
_COLLECTIVE_PHASE_OFFSET, _WAITING_FOR_OFFSET, _WAITS_OFFSET, _GROUP_SEQUENCE_OFFSET = 256, 260, 264, 272

# As launcher.rank.status names them; 0 is outside.
_COLLECTIVE_PHASES = (
    "outside",
    "entering",
    "copying in",
    "waiting for others",
    "reducing",
    "copying out",
    "between hosts",
)


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
    """What the launcher reads of a page.

    Attributes:
        collective_seq: collectives that the rank has entered, in all groups together.
        collective_entered_ns: 0 outside of any collective.
        bytes, operation: of the last collective.
        collective_phase: what the rank does in it, a place in _COLLECTIVE_PHASES.
        waiting_for: the rank that it waits for; -1: none, or not known.
        collective_waits_ns: time it has waited for others, in all.
        group_sequence: number of the last collective in its group; 0: not told.
    """

    phase: int
    step: int
    collective_seq: int
    collective_entered_ns: int
    bytes: int
    operation: str
    collective_phase: int
    waiting_for: int
    collective_waits_ns: int
    group_sequence: int = 0

    @property
    def number(self) -> int:
        """The last collective's number, as the errors of its group give it where that is known."""
        return self.group_sequence or self.collective_seq

    @property
    def doing(self) -> str:
        """What the rank does inside of a collective, in words; "" outside."""
        if not self.collective_entered_ns:
            return ""
        known = 0 < self.collective_phase < len(_COLLECTIVE_PHASES)
        return _COLLECTIVE_PHASES[self.collective_phase] if known else "inside"


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
        return int.from_bytes(page[offset : offset + size], "little") & _MOST

    return Page(
        phase=number(_PHASE_OFFSET, 4),
        step=number(_STEP_OFFSET, 8),
        collective_seq=number(_COLLECTIVE_SEQ_OFFSET, 8),
        collective_entered_ns=number(_COLLECTIVE_ENTER_OFFSET, 8),
        bytes=number(_BYTES_OFFSET, 8),
        operation=_text(page[_OPERATION_OFFSET : _OPERATION_OFFSET + _OPERATION_BYTES]),
        collective_phase=number(_COLLECTIVE_PHASE_OFFSET, 4),
        waiting_for=number(_WAITING_FOR_OFFSET, 4) - 1,
        collective_waits_ns=number(_WAITS_OFFSET, 8),
        group_sequence=number(_GROUP_SEQUENCE_OFFSET, 8),
    )


def _text(raw: bytes) -> str:
    """A name for a line of text: it may have been cut in the middle of a character, and is the rank's to write."""
    name = raw.partition(b"\0")[0].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in name)
