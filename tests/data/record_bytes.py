"""Files of records made by hand, and all records of a file as the loader gives them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from launcher.data import Loader
from launcher.data.catalogue import open_source

MAGIC = struct.pack("<I", 0xCED7230A)


def frame(payload: bytes, flag: int = 0) -> bytes:
    """A RecordIO frame."""
    return MAGIC + struct.pack("<I", flag << 29 | len(payload)) + payload + bytes(-len(payload) % 4)


def read_all(path: Path, format: str, on_bad: str = "raise", **options: Any) -> dict[str, Any]:
    """Every record of a file or folder, in order, in one batch; ``damage`` is what was left out."""
    opened = open_source(path, format=format, on_bad=on_bad, **options)
    with Loader(opened, 1000, shuffle="none", tail="short", on_bad=on_bad, allow_empty=True) as loader:
        batches = list(loader)
    return {**(batches[0] if batches else {}), "damage": opened.damage}


def payloads(path: Path, **options: Any) -> list[bytes]:
    """The records of a RecordIO file as bytes."""
    return [bytes(one) for one in read_all(path, "recordio", **options).get("data", [])]
