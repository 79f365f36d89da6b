"""TFRecord through the loader."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from launcher.data.writers import TFRecordWriter
from launcher.errors import DataError

from . import fuzz_record_proto as fuzz
from .record_bytes import read_all

pytest.importorskip("numpy")

RECORDS = [b"first", b"", b"x" * 5000, b"last"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.tfrecord"
    with TFRecordWriter(path) as writer:
        for record in RECORDS:
            writer.write(record)
    return path


@pytest.mark.parametrize("access", ["mapped", "read"])
def test_records(path: Path, access: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_DATA_ACCESS", access)
    assert [bytes(one) for one in read_all(path, "auto")["data"]] == RECORDS


def test_a_cut_file(path: Path) -> None:
    """F1, F2, for this format."""
    content = path.read_bytes()
    last = len(content) - len(RECORDS[-1]) - 16
    for size in (len(content) - 1, last + 13, last + 11, last + 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError) as caught:
            read_all(path, "tfrecord")
        assert (caught.value.problem, caught.value.offset, caught.value.record) == ("truncated", last, 3)
        found = read_all(path, "tfrecord", on_bad="skip")
        assert [bytes(one) for one in found["data"]] == RECORDS[:3] and found["damage"][0].bytes == size - last


def test_a_damaged_length(path: Path) -> None:
    """F3, for this format."""
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="sum of the record's length") as caught:
        read_all(path, "tfrecord")
    assert (caught.value.problem, caught.value.offset) == ("malformed", 0)
    found = read_all(path, "tfrecord", on_bad="skip")
    assert [bytes(one) for one in found["data"]] == RECORDS[1:] and found["damage"][0].bytes == 21


def test_damaged_data(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[12] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="the sum of the record's 5 bytes is wrong") as caught:
        read_all(path, "tfrecord")
    assert (caught.value.problem, caught.value.offset, caught.value.record) == ("malformed", 12, 0)
    assert bytes(read_all(path, "tfrecord", check_sums=False)["data"][0]) == b"girst"
    assert read_all(path, "tfrecord", on_bad="substitute")["mask"].tolist() == [False, True, True, True]


def feature(kind: int, *chunks: bytes) -> bytes:
    """A Feature: 1 BytesList, 2 FloatList, 3 Int64List, of these chunks."""
    return fuzz.delimited(kind, b"".join(fuzz.delimited(1, chunk) for chunk in chunks))


def example(**features: bytes) -> bytes:
    entries = [fuzz.delimited(1, key.encode()) + fuzz.delimited(2, value) for key, value in features.items()]
    return fuzz.delimited(1, b"".join(fuzz.delimited(1, entry) for entry in entries))


def read_examples(path: Path, *messages: bytes, **options: Any) -> dict[str, Any]:
    with TFRecordWriter(path) as writer:
        for message in messages:
            writer.write(message)
    return read_all(path, "tfrecord", **options)


def test_examples(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    messages = [
        example(
            image=feature(1, b"image" * i),
            label=feature(3, fuzz.varint(-i)),
            values=feature(2, struct.pack("<2f", i, -i)),
        )
        for i in range(3)
    ]
    found = read_examples(path, *messages, example=True)
    assert [bytes(one) for one in found["image"]] == [b"", b"image", b"imageimage"]
    assert found["label"].tolist() == [[0], [-1], [-2]] and found["label"].dtype.name == "int64"
    assert found["values"].tolist() == [[0, 0], [1, -1], [2, -2]]
    assert [bytes(one) for one in read_examples(path, *messages)["data"]] == messages
    lengths = [example(values=feature(3, fuzz.varint(1) * i), more=feature(1, b"")) for i in range(3)]
    found = read_examples(path, *lengths, schema=[("values", 1, 8, [])])
    assert [one.tolist() for one in found["values"]] == [[], [1], [1, 1]]
    with pytest.raises(DataError, match="found 1 values, wanted 2") as caught:
        read_examples(path, *lengths[:0:-1], example=True)
    assert (caught.value.problem, caught.value.record) == ("mismatch", 1)
