"""Files of records, made by hand."""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC = 0xCED7230A


def frame(payload: bytes, flag: int = 0) -> bytes:
    """One RecordIO frame."""
    return struct.pack("<II", MAGIC, flag << 29 | len(payload)) + payload + b"\0" * (-len(payload) % 4)


def write_recordio(path: Path, records: list[bytes]) -> Path:
    """A RecordIO file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(frame, records)))
    return path


def numbered(count: int, first: int = 0) -> list[bytes]:
    """Records that say which one they are; 12 bytes each, 20 with the frame."""
    return [f"record {number:5}".encode() for number in range(first, first + count)]
