"""RecordIO through the loader: what is whole is read as it was written, what is damaged is an error with its place."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from launcher.data.writers import RecordIOWriter
from launcher.errors import DataError

from .record_bytes import MAGIC, frame, payloads, read_all

pytest.importorskip("numpy")

GOOD = frame(b"first record") + frame(b"second") + frame(b"")
RECORDS = [b"first record", b"second", b""]


@pytest.fixture(params=["mapped", "read"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are mapped, or read as on FUSE."""
    monkeypatch.setenv("LAUNCHER_DATA_ACCESS", request.param)


def refused(path: Path, content: bytes) -> DataError:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        payloads(path)
    assert caught.value.file == str(path) and str(path) in str(caught.value)
    assert f"byte {caught.value.offset}" in str(caught.value)
    return caught.value


@pytest.mark.usefixtures("either_way")
def test_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(GOOD)
    assert payloads(path) == RECORDS
    path.write_bytes(GOOD + frame(b"x")[:-3])  # the last pad may be missing
    assert payloads(path)[-1] == b"x"


@pytest.mark.usefixtures("either_way")
def test_f1_a_payload_cut_off_at_the_end(tmp_path: Path) -> None:
    """F1: an error with file, offset, wanted and available bytes; skip drops just that record and counts it."""
    path = tmp_path / "a.rec"
    error = refused(path, GOOD + frame(bytes(100))[:50])
    assert (error.problem, error.offset, error.record) == ("truncated", len(GOOD), 3)
    assert "100 bytes, found 42" in str(error)
    assert payloads(path, on_bad="skip") == RECORDS
    (damage,) = read_all(path, "recordio", on_bad="skip")["damage"]
    assert (damage.offset, damage.bytes) == (len(GOOD), 50)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("stray", range(1, 8))
def test_f2_stray_bytes_at_the_end(tmp_path: Path, stray: int) -> None:
    """F2: 1 to 7 bytes after the last record are an error, never silent."""
    error = refused(tmp_path / "a.rec", GOOD + bytes(stray))
    assert (error.problem, error.offset) == ("truncated", len(GOOD)) and "truncated header" in str(error)
    assert f"found {stray} bytes" in str(error)


@pytest.mark.usefixtures("either_way")
def test_f3_a_bad_magic_in_the_middle(tmp_path: Path) -> None:
    """F3: an error with offset; skip goes on only where three records follow each other, and reports the bytes."""
    path = tmp_path / "a.rec"
    rubbish = b"0123" + frame(b"a header that leads nowhere") + b"4567"
    error = refused(path, GOOD + rubbish + GOOD)
    assert (error.problem, error.offset, error.record) == ("malformed", len(GOOD), 3)
    assert payloads(path, on_bad="skip") == RECORDS * 2
    (damage,) = read_all(path, "recordio", on_bad="skip")["damage"]
    assert (damage.offset, damage.bytes) == (len(GOOD), len(rubbish))


def test_f4_escaped_magics_at_every_alignment(tmp_path: Path) -> None:
    """F4: what the dmlc dialect splits is byte-identical to the original."""
    path = tmp_path / "a.rec"
    luck = random.Random(4)
    records = []
    for shift in range(8):
        for times in range(5):
            records.append(luck.randbytes(shift) + (MAGIC + luck.randbytes(luck.randrange(7))) * times)
    with RecordIOWriter(path) as writer:
        for record in records:
            writer.write(record)
    assert path.read_bytes().count(MAGIC) > len(records)
    assert payloads(path) == records
    assert payloads(path, dialect="dmlc") == records


def test_f5_the_plain_dialect(tmp_path: Path) -> None:
    """F5: parts of 8, 10, 1 and 29 bytes prove it; a file that proves nothing obeys the option."""
    path = tmp_path / "a.rec"
    whole = bytes(range(48))
    proof = frame(whole[:8], 1) + frame(whole[8:18], 2) + frame(whole[18:19], 2) + frame(whole[19:], 3)
    path.write_bytes(proof)
    assert payloads(path) == payloads(path, dialect="plain") == [whole]
    with pytest.raises(DataError, match="dialect 'plain' or 'auto'"):
        payloads(path, dialect="dmlc")
    unclear = frame(b"abcd", 1) + frame(b"efgh", 2) + frame(b"xyz", 3)
    path.write_bytes(unclear)
    assert payloads(path) == payloads(path, dialect="dmlc") == [b"abcd" + MAGIC + b"efgh" + MAGIC + b"xyz"]
    assert payloads(path, dialect="plain") == [b"abcdefghxyz"]
    path.write_bytes(unclear + proof)
    assert payloads(path) == [b"abcdefghxyz", whole]


@pytest.mark.parametrize(
    ("bad", "problem", "offset", "words"),
    [
        (frame(b"x", 2), "malformed", 0, "found flag 2"),
        (frame(b"x", 3), "malformed", 0, "found flag 3"),
        (frame(b"x", 1) + frame(b"y"), "malformed", 12, "found flag 0"),
        (frame(b"x", 1), "truncated", 12, "after part 1 of a record"),
        *((frame(b"x", flag), "malformed", 0, f"found flag {flag}") for flag in (4, 5, 6, 7)),
    ],
    ids=["2", "3", "1 0", "1", "4", "5", "6", "7"],
)
def test_f6_parts_that_make_no_record(tmp_path: Path, bad: bytes, problem: str, offset: int, words: str) -> None:
    """F6: 2 without 1, 1 then 0, the end after 1, and flags 4 to 7 are errors that name the record."""
    error = refused(tmp_path / "a.rec", GOOD + bad)
    assert (error.problem, error.offset, error.record) == (problem, len(GOOD) + offset, 3) and words in str(error)


def test_f7_a_magic_that_is_not_escaped(tmp_path: Path) -> None:
    """F7: SageMaker's Python writers do not escape; a frame is as long as it says."""
    path = tmp_path / "a.rec"
    records = [MAGIC * 3, b"abcd" + MAGIC + struct.pack("<I", 4) + b"efgh", frame(b"inner") * 5]
    path.write_bytes(b"".join(frame(record) for record in records))
    assert payloads(path) == records


def test_f10_an_empty_file_among_others(tmp_path: Path) -> None:
    """F10: a file without records is fine."""
    for name, content in (("a.rec", GOOD), ("b.rec", b""), ("c.rec", frame(b"x"))):
        (tmp_path / name).write_bytes(content)
    assert payloads(tmp_path) == [*RECORDS, b"x"]


def test_image_records_of_mxnet(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    single = [struct.pack("<IfQQ", 0, 0.5 + i, 10 + i, 0) + b"image" * i for i in range(3)]
    path.write_bytes(b"".join(map(frame, single)))
    records = read_all(path, "recordio", image_header=True)
    assert records["label"].tolist() == [0.5, 1.5, 2.5] and records["id"].tolist() == [10, 11, 12]
    assert [bytes(one) for one in records["data"]] == [b"", b"image", b"imageimage"]
    several = [struct.pack("<IfQQ2f", 2, 0, i, 0, i, -i) + b"image" for i in range(2)]
    path.write_bytes(b"".join(map(frame, several)))
    assert read_all(path, "recordio", image_header=True)["label"].tolist() == [[0, 0], [1, -1]]
    path.write_bytes(frame(several[0]) + frame(single[0]))
    with pytest.raises(DataError, match="with 0 labels after its header, wanted 2") as caught:
        read_all(path, "recordio", image_header=True)
    assert (caught.value.problem, caught.value.record) == ("mismatch", 1)
    path.write_bytes(GOOD)
    with pytest.raises(DataError, match="read it as bytes"):
        read_all(path, "recordio", image_header=True)
