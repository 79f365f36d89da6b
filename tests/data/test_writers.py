"""Writers: what they write is read back the same, and a file is there whole or not at all."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from launcher import _data
from launcher.data.fields import Ragged, Sparse
from launcher.data.writers import FixedWriter, RecordIOWriter, RecordProtoWriter, TFRecordWriter
from launcher.errors import OutputError, UsageError

numpy = pytest.importorskip("numpy")

MAGIC = struct.pack("<I", 0xCED7230A)


def test_recordio_frames_are_as_the_format_has_them(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    with RecordIOWriter(path) as writer:
        writer.write(b"abcde")
        writer.write(b"")
        writer.write(b"abcd" + MAGIC + b"x")
    assert writer.records == 3
    whole = MAGIC + struct.pack("<I", 5) + b"abcde\0\0\0" + MAGIC + struct.pack("<I", 0)
    split = MAGIC + struct.pack("<I", 1 << 29 | 4) + b"abcd" + MAGIC + struct.pack("<I", 3 << 29 | 1) + b"x\0\0\0"
    assert path.read_bytes() == whole + split


def test_without_escape_a_record_is_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    with RecordIOWriter(path, escape=False) as writer:
        writer.write(MAGIC * 2)
    assert path.read_bytes() == MAGIC + struct.pack("<I", 8) + MAGIC * 2


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    with pytest.raises(KeyError), RecordIOWriter(path) as writer:
        writer.write(b"one")
        assert not path.exists()
        raise KeyError
    assert os.listdir(tmp_path) == []
    writer = RecordIOWriter(path)
    writer.write(b"two")
    writer.close()
    writer.close()
    assert os.listdir(tmp_path) == ["a.rec"]
    with pytest.raises(UsageError, match="closed"):
        writer.write(b"three")


def test_what_can_not_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"missing/a\.rec"):
        RecordIOWriter(tmp_path / "missing" / "a.rec")


def test_record_messages_of_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "a.pbr"
    rng = numpy.random.default_rng(1)
    columns = {
        "values": rng.standard_normal((3, 5)).astype(numpy.float32),
        "wide": rng.standard_normal((3, 2, 2)),
        "ids": numpy.array([1, -2, 2**31 - 1]),
        "row": Sparse(numpy.array([1.0, 2.0], numpy.float32), numpy.array([0, 2, 2, 2]), numpy.array([7, 3]), (2, 5)),
        "image": [b"abc", b"", b"x"],
        "label_values": numpy.array([0, 1, 1], numpy.int8),
    }
    with RecordProtoWriter(path) as writer:
        writer.write(columns)
    file = _data.File(path)
    index = _data.scan_recordio(file)
    assert index.records == 3
    messages = [file.read(offset + 8, bytes - 8) for offset, bytes in (index.at(number) for number in range(3))]
    lengths = [struct.unpack("<I", file.read(index.at(number)[0] + 4, 4))[0] for number in range(3)]
    decoded = [
        {field[0]: (field[1:], values, keys) for field, values, keys in _data.decode_record_proto(message[:length])}
        for message, length in zip(messages, lengths, strict=True)
    ]
    for row, record in enumerate(decoded):
        assert record["values"] == ((0, 0, [5]), columns["values"][row].tobytes(), [])
        assert record["wide"] == ((0, 1, [2, 2]), columns["wide"][row].tobytes(), [])
        assert record["ids"] == ((0, 7, [1]), struct.pack("<i", columns["ids"][row]), [])
        assert record["image"] == ((1, 5, []), columns["image"][row], [])
        assert record["label_values"] == ((0, 7, [1]), struct.pack("<i", columns["label_values"][row]), [])
    assert decoded[0]["row"] == ((2, 0, [2, 5]), struct.pack("<2f", 1, 2), [7, 3])
    assert decoded[1]["row"] == ((2, 0, [2, 5]), b"", [])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"values": numpy.array([2**31])}, "32 bits"),
        ({"values": numpy.array(["text"])}, "a Record stores"),
        ({"values": numpy.zeros(2), "ids": numpy.zeros(3)}, "different numbers of rows"),
        ({}, "one field at least"),
        ({"row": Sparse(numpy.zeros(1), numpy.array([0, 1]), numpy.array([5]), (5,))}, "a key is not within"),
        ({"row": Ragged(numpy.zeros(3), numpy.array([0, 2, 1]))}, "offsets must grow"),
    ],
)
def test_what_a_record_message_can_not_hold_is_refused(tmp_path: Path, columns: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words), RecordProtoWriter(tmp_path / "a.pbr") as writer:
        writer.write(columns)


def test_record_messages_keep_their_fields(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keep them the same"), RecordProtoWriter(tmp_path / "a.pbr") as writer:
        writer.write({"values": numpy.zeros((2, 3))})
        writer.write({"values": numpy.zeros((2, 4))})


def test_fixed_records_are_a_npy_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    parts = [
        {"values": numpy.full((rows, 3), rows, numpy.float32), "label": numpy.arange(rows)} for rows in (2, 0, 1000)
    ]
    with FixedWriter(path) as writer:
        for part in parts:
            writer.write(part)
    loaded = numpy.load(path)
    assert loaded.shape == (1002,) and loaded.dtype.itemsize == 20
    assert (loaded["values"] == numpy.concatenate([part["values"] for part in parts])).all()
    assert (loaded["label"] == numpy.concatenate([part["label"] for part in parts])).all()
    with FixedWriter(path) as writer:
        writer.write(numpy.arange(6, dtype=numpy.int16).reshape(2, 3))
        writer.write(numpy.arange(3, dtype=numpy.int16).reshape(1, 3))
    assert numpy.load(path).tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no batch was written"),
        ([numpy.zeros((2, 3)), numpy.zeros((2, 4))], "and are now"),
        ([{"a": Ragged(numpy.zeros(3), numpy.array([0, 2, 3]))}], "no rows of fixed size"),
        ([{"a": Sparse(numpy.zeros(1), numpy.array([0, 1]), numpy.array([5]), (9,))}], "no rows of fixed size"),
        ([Ragged(numpy.zeros(3), numpy.array([0, 2, 3]))], "rows have no fixed size"),
        ([numpy.array([None])], "fixed size"),
    ],
)
def test_what_is_no_fixed_record_is_refused(tmp_path: Path, batches: list[object], words: str) -> None:
    with pytest.raises(UsageError, match=words), FixedWriter(tmp_path / "a.npy") as writer:
        for batch in batches:
            writer.write(batch)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", [RecordIOWriter, TFRecordWriter])
def test_a_record_is_bytes(tmp_path: Path, writer: type[RecordIOWriter] | type[TFRecordWriter]) -> None:
    for record, words in (("abc", "of type str; expected bytes; encode it"), (numpy.zeros(2), "of type ndarray; exp")):
        with pytest.raises(UsageError, match=rf"record 1 is {words}"), writer(tmp_path / "a") as out:
            out.write(b"abc")
            out.write(record)  # type: ignore[arg-type]
    with (
        pytest.raises(UsageError, match="got NoneType; expected names with their columns"),
        RecordProtoWriter(tmp_path / "b") as messages,
    ):
        messages.write(None)  # type: ignore[arg-type]


def test_tfrecords_have_their_sums(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    with TFRecordWriter(path) as writer:
        writer.write(b"123456789")
    # CRC-32C of "123456789" is 0xe3069283 (the check value of the catalogue of CRCs).
    crc = 0xE3069283
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    content = path.read_bytes()
    assert content[:8] == struct.pack("<Q", 9)
    assert content[12:] == b"123456789" + struct.pack("<I", masked)
