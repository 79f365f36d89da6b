"""Reads all records of a text format from bytes, in their order; for the tests and the fuzzers of this folder."""

from __future__ import annotations

import ctypes
import ctypes.util
from pathlib import Path
from typing import Any

from launcher import _data
from launcher.data.fields import KINDS, Ragged, Sparse
from launcher.data.text import Csv, JsonLines, Libsvm, Lines

Format = Csv | JsonLines | Libsvm | Lines


def index_of(format: Format, *paths: Path, access: str = "mapped", skip: bool = False) -> _data.Index:
    """The index of files."""
    files = [_data.File(path, access) for path in paths]
    return _data.Index(files, [format.scan(file, skip) for file in files])


def read_source(source: _data.Source) -> dict[str, Any]:
    """One batch of all records of ``source``, columns by name."""
    makers: list[Any] = []
    for _, kind, _, shape in source.fields:
        if KINDS[kind] == "sparse":
            makers.append(lambda values, offsets, keys, shape=shape: Sparse(values, offsets, keys, shape))
        else:
            makers.append(Ragged if KINDS[kind] == "ragged" else None)
    epoch = dict.fromkeys(("shuffle", "seed", "epoch", "base", "rank"), 0)
    epoch |= dict.fromkeys(("extent", "window", "lanes", "world"), 1)
    epoch |= {"records": source.records, "batch": max(source.records, 1), "tail": 2, "agreed_steps": -1}
    batch = _data.Engine(source, epoch, [*makers, None, None]).next()
    return {} if batch is None else batch


def read(format: Format, content: bytes, path: Path, fields: Any = None, **index: Any) -> dict[str, Any]:
    """All records of a file of this content, which is written to ``path``."""
    path.write_bytes(content)
    return read_source(format.source(index_of(format, path, **index), fields))


def texts(column: Ragged) -> list[bytes]:
    """The rows of a text column."""
    return [row.tobytes() for row in column]


_libc = ctypes.CDLL(ctypes.util.find_library("c"))
_libc.strtof.restype = ctypes.c_float
_libc.strtof.argtypes = (ctypes.c_char_p, ctypes.c_void_p)


def nearest_float32(text: str) -> float:
    """The float32 that is nearest to the number in ``text``; NumPy would round twice, to float64 first."""
    value: float = _libc.strtof(text.strip().encode(), None)
    return value
