"""The data that all contenders read, made once, and the facts by which what they return is checked.

Record i of a set has label i, and its values follow from i alone: ``Rows.values`` of a batch's labels is the batch.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

BASE_ROWS = 1024  # different rows before the first value makes the difference; a power of two
MAGIC = 0xCED7230A
CSV_COLUMNS = 100
CSV_DISTINCT = 10_000  # rows of text; the file has them again and again, in another order
SEED = 20261123
_CHUNK = 1 << 26  # bytes written at a time


@dataclass(frozen=True)
class Set:
    """A set of records of fixed size: a row of values, then a label (int64).

    ``name`` is also the folder's. ``dtype`` is of the values. A record has ``width`` values.
    """

    name: str
    records: int
    width: int
    dtype: str
    batch: int

    @property
    def values_bytes(self) -> int:
        """Of one record's values."""
        return self.width * np.dtype(self.dtype).itemsize

    @property
    def record_bytes(self) -> int:
        """Of one record."""
        return self.values_bytes + 8

    @property
    def layout(self) -> np.dtype[Any]:
        """Of one record, as NumPy names it."""
        return np.dtype([("values", self.dtype, (self.width,)), ("label", "<i8")])

    def facts(self) -> dict[str, Any]:
        """For another process: ``Set(**facts)``."""
        return asdict(self)


def sets(quick: bool) -> dict[str, Set]:
    """The two sets of the throughput tables; a tenth of the records when only trying."""
    part = 10 if quick else 1
    return {
        "small": Set("small", 1_000_000 // part, 254, "<f4", 256),
        "medium": Set("medium", 10_000 // part, 102_392, "|u1", 64),
    }


class Rows:
    """The rows of a set, computed."""

    def __init__(self, which: Set) -> None:
        self.set = which
        generator = np.random.default_rng(SEED)
        if which.dtype == "<f4":
            self.base: np.ndarray[Any, Any] = generator.standard_normal((BASE_ROWS, which.width), dtype=np.float32)
        else:
            self.base = generator.integers(0, 256, (BASE_ROWS, which.width), dtype=np.uint8)

    def values(self, labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The values of the records with these labels."""
        found = self.base[labels % BASE_ROWS]
        if self.set.dtype == "<f4":
            found[:, 0] = labels  # below 2^24: exact
        else:
            found[:, :4] = labels.astype("<u4")[:, None].view(np.uint8)
        return found

    def blocks(self) -> Iterator[np.ndarray[Any, Any]]:
        """All records in order, as arrays of ``Set.layout``."""
        step = max(1, _CHUNK // self.set.record_bytes)
        for begin in range(0, self.set.records, step):
            labels = np.arange(begin, min(begin + step, self.set.records), dtype=np.int64)
            block = np.empty(len(labels), self.set.layout)
            block["values"], block["label"] = self.values(labels), labels
            yield block


def npy_path(folder: Path, which: Set) -> Path:
    """Where the set lies as one ``.npy`` file, in a folder of its own."""
    return folder / which.name / "npy" / "records.npy"


def memmap(folder: Path, which: Set) -> np.ndarray[Any, Any]:
    """The set as bytes, one record a row, mapped."""
    records = np.load(npy_path(folder, which), mmap_mode="r")
    found: np.ndarray[Any, Any] = records.view(np.uint8).reshape(which.records, which.record_bytes)
    return found


def _write_npy(target: Path, which: Set) -> None:
    with (target / "records.npy").open("wb") as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(which.layout),
            "fortran_order": False,
            "shape": (which.records,),
        }
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
        for block in Rows(which).blocks():
            file.write(block.tobytes())


# RecordIO-protobuf: 254 float32 under "values" and a float32 label, 1064 bytes with the frame.
RECORDIO = "recordio"
PROTOBUF_WIDTH = 254


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    length, size = bytearray(), len(payload)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2]) + bytes(length) + payload


def record_template() -> tuple[bytes, int, int]:
    """A framed ``Record`` of zeros: its bytes, and where the values and the label's value are in it.

    The payload of a packed field is the little-endian array itself, so records of one shape differ in nothing else.
    """
    marks = b"\xa5" * (4 * PROTOBUF_WIDTH), b"\x5a" * 4

    def entry(number: int, payload: bytes) -> bytes:
        tensor = _field(1, payload)  # Float32Tensor.values
        value = _field(2, tensor)  # Value.float32_tensor
        return _field(number, _field(1, b"values") + _field(2, value))  # a map entry: key, value

    record = entry(1, marks[0]) + entry(2, marks[1])
    padded = record + bytes(-len(record) % 4)
    framed = struct.pack("<II", MAGIC, len(record)) + padded
    return framed, framed.index(marks[0]), framed.index(marks[1])


def recordio_set(quick: bool) -> Set:
    """The rows of the small set, with a label of float32."""
    return Set(RECORDIO, 100_000 if quick else 1_000_000, PROTOBUF_WIDTH, "<f4", 256)


def recordio_path(data: Path) -> Path:
    """The one file of RecordIO-protobuf, in a folder of its own."""
    return data / RECORDIO / "records.pr"


def _write_recordio(target: Path, which: Set) -> None:
    template, values_at, label_at = record_template()
    with (target / "records.pr").open("wb") as file:
        for rows in Rows(which).blocks():
            block = np.tile(np.frombuffer(template, np.uint8), (len(rows), 1))
            block[:, values_at : values_at + which.values_bytes] = rows["values"].copy().view(np.uint8)
            block[:, label_at : label_at + 4] = rows["label"].astype("<f4")[:, None].view(np.uint8)
            block.tofile(file)


def csv_rows(quick: bool) -> int:
    """Lines of the CSV file."""
    return 10_000 if quick else 100_000


def _write_csv(target: Path, quick: bool) -> None:
    generator = np.random.default_rng(SEED)
    table = generator.standard_normal((CSV_DISTINCT, CSV_COLUMNS)) * 10.0 ** generator.integers(-2, 3, CSV_COLUMNS)
    lines = [",".join(f"{value:.7g}" for value in row) + "\n" for row in table.tolist()]
    with (target / "table.csv").open("w") as file:
        for _ in range(csv_rows(quick) // CSV_DISTINCT):
            file.writelines(lines[at] for at in generator.permutation(CSV_DISTINCT).tolist())


TREE_FOLDERS = 100


def tree_files(quick: bool) -> int:
    """Files in the folder that is to be listed."""
    return 10_000 if quick else 100_000


def _write_tree(target: Path, quick: bool) -> None:
    each = tree_files(quick) // TREE_FOLDERS
    for folder in range(TREE_FOLDERS):
        (target / f"class-{folder:03}").mkdir()
        for number in range(each):
            (target / f"class-{folder:03}" / f"sample-{number:06}.bin").write_bytes(b"\0" * (number % 3))


def once(folder: Path, facts: object, make: Callable[[Path], None]) -> Path:
    """The folder, filled by ``make`` unless it was with the same facts already; made anew when it is half made."""
    mark = folder.with_name(folder.name + ".made")
    wanted = json.dumps(facts, sort_keys=True)
    if mark.exists() and mark.read_text() == wanted:
        return folder
    mark.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(folder)
    mark.write_text(wanted)
    return folder


def make_npy(folder: Path, which: Set) -> None:
    """Makes the set's ``.npy`` file."""
    once(npy_path(folder, which).parent, which.facts(), lambda target: _write_npy(target, which))


def make_recordio(data: Path, quick: bool) -> None:
    """Makes it."""
    which = recordio_set(quick)
    once(recordio_path(data).parent, which.facts(), lambda target: _write_recordio(target, which))


def csv_path(data: Path) -> Path:
    """The one CSV file, without a header, in a folder of its own."""
    return data / "csv" / "table.csv"


def make_csv(data: Path, quick: bool) -> None:
    """Makes it."""
    once(csv_path(data).parent, [csv_rows(quick), SEED], lambda target: _write_csv(target, quick))


def tree_path(data: Path) -> Path:
    """A folder with many small files, in folders."""
    return data / "tree"


def make_tree(data: Path, quick: bool) -> None:
    """Makes it."""
    once(tree_path(data), [tree_files(quick), TREE_FOLDERS], lambda target: _write_tree(target, quick))


def touch(folder: Path) -> None:
    """Reads all files below the folder, so that the page cache has them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass
