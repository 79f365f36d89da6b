"""Record messages through the loader, and against libprotobuf."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from launcher import _data
from launcher.data import Loader
from launcher.data.fields import Sparse
from launcher.data.writers import RecordProtoWriter
from launcher.errors import DataError, UsageError

from . import fuzz_record_proto as fuzz
from .record_bytes import MAGIC, frame, read_all

numpy = pytest.importorskip("numpy")


def entry(number: int, key: str, kind: int, tensor: bytes) -> bytes:
    """An entry of the map ``number`` (1 features, 2 label)."""
    value = fuzz.delimited(2, fuzz.delimited(kind, tensor))
    return fuzz.delimited(number, fuzz.delimited(1, key.encode()) + value)


def floats(*values: float) -> bytes:
    return fuzz.delimited(1, struct.pack(f"<{len(values)}f", *values))


def message(*values: float, label: float = 0) -> bytes:
    return entry(1, "values", 2, floats(*values)) + entry(2, "values", 2, floats(label))


def read(path: Path, *messages: bytes, **options: Any) -> dict[str, Any]:
    path.write_bytes(b"".join(map(frame, messages)))
    return read_all(path, "recordio-protobuf", **options)


def test_dense_records(tmp_path: Path) -> None:
    path = tmp_path / "a.pbr"
    rng = numpy.random.default_rng(1)
    columns = {
        "values": rng.standard_normal((500, 20)).astype(numpy.float32),
        "wide": rng.standard_normal((500, 2, 3)),
        "label_values": rng.integers(-300, 300, 500),
    }
    with RecordProtoWriter(path) as writer:
        writer.write(columns)
    with Loader(path, 500, shuffle="full", seed=3, record_numbers=True) as loader:
        assert {field.name: field.shape for field in loader.fields} == {
            "values": (20,),
            "wide": (2, 3),
            "label_values": (1,),
        }
        (batch,) = loader
    order = batch["record"]
    assert sorted(order.tolist()) == list(range(500)) and order.tolist() != list(range(500))
    assert (batch["values"] == columns["values"][order]).all()
    assert (batch["wide"] == columns["wide"][order]).all()
    assert batch["label_values"].dtype == numpy.int32
    assert (batch["label_values"][:, 0] == columns["label_values"][order]).all()


def test_sparse_records(tmp_path: Path) -> None:
    path = tmp_path / "a.pbr"
    rows = Sparse(numpy.arange(1.0, 5.0), numpy.array([0, 3, 3, 4]), numpy.array([5, 1, 9, 0]), (10,))
    with RecordProtoWriter(path) as writer:
        writer.write({"values": rows, "label_values": numpy.zeros(3)})
    found = read_all(path, "recordio-protobuf")["values"]
    assert isinstance(found, Sparse) and found.shape == (10,)
    assert found.keys.tolist() == [5, 1, 9, 0] and found.offsets.tolist() == [0, 3, 3, 4]
    assert (found.to_dense() == rows.to_dense()).all()


def test_f8_a_message_in_any_form(tmp_path: Path) -> None:
    """F8: not packed, in chunks, unknown fields, label before features: the same tensors."""
    value = struct.pack("<f", 2)
    unpacked = fuzz.tagged(1, 5, value)
    forms = [
        message(1, 2, label=3),
        entry(2, "values", 2, floats(3)) + entry(1, "values", 2, floats(1, 2)),
        entry(1, "values", 2, floats(1) + unpacked) + entry(2, "values", 2, floats() + floats(3)),
        fuzz.delimited(3, b"uid")
        + entry(1, "values", 2, fuzz.delimited(9, b"?") + floats(1, 2))
        + fuzz.varint(80)
        + b"x"
        + entry(2, "values", 2, floats(3)),
        entry(1, "values", 2, floats(7, 7, 7)) + message(1, 2, label=3),  # the last entry of a key counts
    ]
    records = read(tmp_path / "a.pbr", *forms)
    assert records["values"].tolist() == [[1, 2]] * len(forms)
    assert records["label_values"].tolist() == [[3]] * len(forms)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (message(1, 2, 3), "found 3 values, wanted 2"),
        (entry(2, "values", 2, floats(0)), "'values': found no such key"),
        (entry(1, "values", 2, floats(1, 2)), "'label_values': found no such key"),
        (entry(1, "values", 3, floats(1, 2)) + entry(2, "values", 2, floats(0)), "found Float64Tensor"),
        (message(1, 2) + entry(1, "more", 2, floats(1)), "found the key 'more'"),
        (
            entry(1, "values", 2, floats(1, 2) + fuzz.delimited(2, b"\0\1")) + entry(2, "values", 2, floats(0)),
            "found a sparse tensor",
        ),
        (
            entry(1, "values", 2, floats(1, 2) + fuzz.delimited(3, b"\2\1")) + entry(2, "values", 2, floats(0)),
            "found the shape (2, 1)",
        ),
    ],
    ids=["length", "absent feature", "absent label", "dtype", "another key", "sparse", "shape"],
)
def test_f9_a_record_of_another_schema(tmp_path: Path, bad: bytes, words: str) -> None:
    """F9: an error that names the record; ``substitute`` puts another in its place, with mask False."""
    path = tmp_path / "a.pbr"
    good = [message(i, -i, label=i) for i in range(4)]
    with pytest.raises(DataError) as caught:
        read(path, *good[:2], bad, *good[2:])
    error = caught.value
    assert (error.problem, error.record, error.file) == ("mismatch", 2, str(path)) and words in str(error)
    assert error.offset == 2 * len(frame(good[0]))
    records = read(path, *good[:2], bad, *good[2:], on_bad="substitute")
    assert records["mask"].tolist() == [True, True, False, True, True]
    assert records["label_values"][[0, 1, 3, 4], 0].tolist() == [0, 1, 2, 3]


def test_a_damaged_message_names_its_place(tmp_path: Path) -> None:
    good = message(1, 2)
    bad = entry(1, "values", 2, fuzz.delimited(1, b"12345")) + entry(2, "values", 2, floats(0))
    with pytest.raises(DataError, match="packed numbers") as caught:
        read(tmp_path / "a.pbr", good, bad)
    assert caught.value.problem == "malformed"
    assert caught.value.offset == len(frame(good)) + 8 + bad.index(b"12345")


def test_fields_that_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pbr"
    extra = entry(1, "more", 2, floats(9))
    assert list(read(path, message(1, 2), message(3, 4), fields=["label_values"])) == ["label_values", "damage"]
    schema = [("values", 1, 0, [])]  # ragged float32: of any length, and other keys are left out
    records = read(path, message(1, 2), message(3) + extra, message(), schema=schema)
    assert [one.tolist() for one in records["values"]] == [[1, 2], [3], []]
    with pytest.raises(UsageError, match="no field 'none'"):
        read(path, message(1, 2), fields=["none"])


def test_bytes_of_any_length(tmp_path: Path) -> None:
    images = [b"abc", b"", b"\xff" * 100]
    found = read(tmp_path / "a.pbr", *(entry(1, "image", 9, fuzz.delimited(1, image)) for image in images))
    assert [bytes(one) for one in found["image"]] == images


def test_a_message_in_parts_of_either_dialect(tmp_path: Path) -> None:
    """F4, F5: where nothing proves the dialect, the one in which the record is a message that fits."""
    path = tmp_path / "a.pbr"
    values = [1.0] * 5 + [struct.unpack("<f", MAGIC)[0]] + [2.0] * 10
    whole = fuzz.delimited(3, b"xx") + entry(1, "values", 2, floats(*values))
    at = whole.index(MAGIC)
    assert at % 4 == 0
    for content in (frame(whole[:at], 1) + frame(whole[at + 4 :], 3), frame(whole[:8], 1) + frame(whole[8:], 3)):
        path.write_bytes(frame(whole) + content)
        assert read_all(path, "recordio-protobuf")["values"].tolist() == [values] * 2


def test_an_unknown_field_of_an_entry_is_skipped() -> None:
    """As libprotobuf in C++ has it; the C library behind Python's leaves the whole entry out."""
    value = fuzz.delimited(2, fuzz.delimited(2, floats(1)))
    inner = fuzz.delimited(9, b"?") + fuzz.delimited(1, b"values") + value
    assert _data.decode_record_proto(fuzz.delimited(1, inner)) == [
        (("values", 0, 0, [1]), struct.pack("<f", 1), []),
    ]


def test_f8_against_libprotobuf() -> None:
    """F8: generated messages, whole and damaged (a million once by hand; see the module that makes them)."""
    pytest.importorskip("google.protobuf", reason="protobuf is not installed: pip install protobuf")
    counts = fuzz.run(5000, seed=8)
    assert counts["fine"] > 2500 and counts["malformed"] > 250 and counts["refused"] > 250
