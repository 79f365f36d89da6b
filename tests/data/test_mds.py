"""Shards of MosaicML streaming: encodings, what the index file is checked for, damage."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher import _data
from launcher.data.catalogue import open_source
from launcher.data.mds import Shard, find_shards, make_source, read_columns, verify
from launcher.errors import DataError, UsageError

numpy = pytest.importorskip("numpy")

Read = Callable[[_data.Source], dict[str, list[Any]]]
Columns = dict[str, tuple[str, int | None]]  # encoding and bytes by name


def shard(columns: Columns, samples: Sequence[dict[str, bytes]]) -> bytes:
    """A shard, written as the format's description says."""
    names = sorted(columns)
    header = json.dumps(
        {
            "column_encodings": [columns[name][0] for name in names],
            "column_names": names,
            "column_sizes": [columns[name][1] for name in names],
            "compression": None,
            "format": "mds",
            "version": 2,
        }
    ).encode()
    bodies = []
    for sample in samples:
        sizes = [struct.pack("<I", len(sample[name])) for name in names if columns[name][1] is None]
        bodies.append(b"".join(sizes + [sample[name] for name in names]))
    offsets = [4 + 4 * (len(samples) + 1) + len(header)]
    for body in bodies:
        offsets.append(offsets[-1] + len(body))
    return struct.pack(f"<{len(offsets) + 1}I", len(samples), *offsets) + header + b"".join(bodies)


SIMPLE: Columns = {"i": ("int", 8), "s": ("str", None)}


def simple(begin: int, end: int) -> bytes:
    return shard(SIMPLE, [{"i": struct.pack("<q", i - 3), "s": b"s" * (i % 7)} for i in range(begin, end)])


def write_set(root: Path, shards: Sequence[bytes], **changes: Any) -> list[str]:
    """Shards and their index; ``changes`` go into each entry of it."""
    entries = []
    for number, content in enumerate(shards):
        name = f"shard.{number:05d}.mds"
        (root / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {"sha1": hashlib.sha1(content).hexdigest()}}
        samples = struct.unpack("<I", content[:4])[0]
        entry = {"version": 2, "format": "mds", "raw_data": raw, "zip_data": None, "samples": samples}
        entries.append(entry | changes)
    (root / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return sorted(os.listdir(root))


def index_of(root: Path, names: Sequence[str], skip: bool = False, access: str = "automatic") -> Any:
    files = [_data.File(root / name, access) for name in names]
    return _data.Index(files, [_data.scan_mds(file, skip) for file in files]), files


def open_mds(root: Path, fields: Sequence[str] | None = None, **how: Any) -> _data.Source:
    shards = find_shards(str(root), [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()])
    index, files = index_of(root, [one.path for one in shards], **how)
    return make_source(index, files, shards, fields=fields)


@pytest.mark.parametrize("access", ["mapped", "read"])
def test_each_encoding(access: str, tmp_path: Path, read_all: Read) -> None:
    numbers = {name: name for name in ("uint8", "int16", "uint32", "uint64", "float16", "float32", "float64")}
    columns: Columns = {
        **{f"n_{name}": (name, numpy.dtype(name).itemsize) for name in numbers},
        "int": ("int", 8),
        "array": ("ndarray:int16:2,3", 12),
        "line": ("ndarray:float32", None),
        "str": ("str", None),
        "pkl": ("pkl", None),
        "own": ("something of one's own", 5),
    }
    rng = numpy.random.default_rng(5)
    want: list[dict[str, Any]] = []
    samples = []
    for i in range(23):
        line = rng.random(1 + 41 * i, numpy.float32)  # from 256 values on, the size takes two bytes
        wide = len(line) > 255
        want.append(
            {
                **{f"n_{name}": numpy.array(i * 3, name) for name in numbers},
                "int": numpy.int64(-i),
                "array": rng.integers(-9, 9, (2, 3), numpy.int16),
                "line": line,
                "str": numpy.frombuffer("é".encode() * i, numpy.uint8),
                "pkl": numpy.frombuffer(b"\x80\x04." * i, numpy.uint8),
                "own": numpy.frombuffer(b"%05d" % i, numpy.uint8),
            }
        )
        samples.append({name: value.tobytes() for name, value in want[-1].items()})
        samples[-1]["line"] = struct.pack("<BH" if wide else "<BB", 1 << 2 | wide, len(line)) + line.tobytes()
    write_set(tmp_path, [shard(columns, samples[:20]), shard(columns, samples[20:])])
    found = read_all(open_mds(tmp_path, access=access))
    assert list(found) == sorted(columns)
    for name, values in found.items():
        for one, expected in zip(values, [sample[name] for sample in want], strict=True):
            assert numpy.asarray(one).dtype == expected.dtype and numpy.array_equal(one, expected)


def test_columns_that_are_wanted_and_shards_without_an_index(tmp_path: Path, read_all: Read) -> None:
    write_set(tmp_path, [simple(0, 10), simple(10, 13)])
    (tmp_path / "index.json").unlink()
    assert read_all(open_mds(tmp_path, ["i"])) == {"i": [i - 3 for i in range(13)]}
    with pytest.raises(UsageError, match="'q' is no column; the columns are i, s"):
        open_mds(tmp_path, ["q"])


def test_sets_in_folders(tmp_path: Path, read_all: Read) -> None:
    for number, name in enumerate(("train", "more")):
        (tmp_path / name).mkdir()
        write_set(tmp_path / name, [simple(10 * number, 10 * number + 2)])
    assert read_all(open_mds(tmp_path))["i"] == [7, 8, -3, -2]


def test_an_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    names = write_set(tmp_path, [simple(0, 4), simple(4, 6)])
    with pytest.raises(DataError, match=r"index\.json beside it does not list this shard"):
        find_shards(str(tmp_path), [*names, "shard.00009.mds"])
    with pytest.raises(DataError, match="lists this shard, and it is not there") as caught:
        find_shards(str(tmp_path), names[:-1])
    assert caught.value.file == str(tmp_path / "shard.00001.mds")
    assert [one.path for one in find_shards(str(tmp_path), names[:-1], sharded=True)] == ["shard.00000.mds"]
    write_set(tmp_path, [simple(0, 4)], samples=5)
    (tmp_path / "shard.00001.mds").unlink()
    with pytest.raises(DataError, match=r"the shard has 4 samples, and index\.json says 5"):
        open_mds(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", "no list of shards"),
        ('{"shards": [{"version": 1, "format": "mds"}]}', r"shards\[0\] is not of format mds, version 2"),
        ('{"shards": [{"version": 2, "format": "mds", "raw_data": {}}]}', "no file name"),
        (
            '{"shards": [{"version": 2, "format": "mds", "samples": 1, "raw_data": {"basename": "../up.mds"}}]}',
            "no file name",
        ),
    ],
)
def test_an_index_that_is_none(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        find_shards(str(tmp_path), ["index.json"])
    assert caught.value.file == str(tmp_path / "index.json")


def test_an_index_whose_shards_are_all_missing(tmp_path: Path) -> None:
    write_set(tmp_path, [simple(0, 3)])
    (tmp_path / "shard.00000.mds").unlink()
    with pytest.raises(DataError, match=r"shard.00000.mds: .*index.json lists this shard, and it is not there"):
        open_source(tmp_path)


@pytest.mark.parametrize("indexed", [True, False])
def test_compressed_shards_are_refused(indexed: bool, tmp_path: Path) -> None:
    write_set(tmp_path, [simple(0, 4)], zip_data={"basename": "shard.00000.mds.zstd"})
    (tmp_path / "shard.00000.mds").rename(tmp_path / "shard.00000.mds.zstd")
    names = ["shard.00000.mds.zstd", *(["index.json"] if indexed else [])]
    with pytest.raises(DataError, match="decompress them beside their index") as caught:
        find_shards(str(tmp_path), names)
    assert caught.value.file == str(tmp_path / "shard.00000.mds.zstd")


def test_shards_with_other_columns_f9(tmp_path: Path) -> None:
    """F9: the columns differ between shards."""
    write_set(tmp_path, [simple(0, 4), shard({"i": ("int", 8)}, [{"i": bytes(8)}])])
    with pytest.raises(DataError, match=r"the columns are i \(int\), those of .* are i \(int\), s \(str\)") as caught:
        open_mds(tmp_path)
    assert (caught.value.problem, caught.value.file) == ("mismatch", str(tmp_path / "shard.00001.mds"))


def test_a_shard_that_was_cut_f1(tmp_path: Path, read_all: Read) -> None:
    """F1: an error with file and offset; with skip the samples that are whole stay."""
    content = simple(0, 20)
    (tmp_path / "a.mds").write_bytes(content[:-30])
    offsets = struct.unpack("<21I", content[4:88])
    first = next(i for i in range(20) if offsets[i + 1] > len(content) - 30)
    with pytest.raises(DataError, match=f"the file ends inside the sample: .* {20 - first} of 20 samples") as caught:
        index_of(tmp_path, ["a.mds"])
    assert (caught.value.problem, caught.value.offset, caught.value.record) == ("truncated", offsets[first], first)
    assert read_all(open_mds(tmp_path, skip=True))["i"] == [i - 3 for i in range(first)]
    index, _ = index_of(tmp_path, ["a.mds"], skip=True)
    assert index.part(0).damage[0][:2] == (offsets[first], len(content) - 30 - offsets[first])


def patched(content: bytes, at: int, value: int) -> bytes:
    return content[:at] + struct.pack("<I", value) + content[at + 4 :]


@pytest.mark.parametrize(
    ("content", "problem", "message"),
    [
        (simple(0, 9)[:6], "truncated", "a shard of 6 bytes"),
        (simple(0, 9)[:20], "truncated", "the table of 9 samples needs 44 bytes, the file has 20"),
        (simple(0, 9)[:60], "truncated", "the file ends inside the header"),
        (simple(0, 9) + b"x", "malformed", "1 bytes follow the last sample"),
        (patched(simple(0, 9), 4, 40), "malformed", "the first sample begins at byte 40, inside the table"),
        (patched(simple(0, 9), 12, 9), "malformed", "the sample ends at byte 9"),
        (patched(simple(0, 9), 0, 1 << 30), "truncated", "the table of 1073741824 samples"),
    ],
)
def test_damaged_tables_f2(content: bytes, problem: str, message: str, tmp_path: Path) -> None:
    """F2: what is left over, missing or out of order is an error before the first step, with skip, too."""
    (tmp_path / "a.mds").write_bytes(content)
    for skip in (False, True):
        with pytest.raises(DataError, match=message) as caught:
            index_of(tmp_path, ["a.mds"], skip)
        assert (caught.value.problem, caught.value.file) == (problem, str(tmp_path / "a.mds"))


@pytest.mark.parametrize(
    ("column", "value", "problem", "message"),
    [
        (("ndarray:int32", None), b"", "mismatch", "an array without a shape"),
        (("ndarray:int32", None), b"\x08\x01\x01" + bytes(4), "mismatch", "an array of 2 dimensions"),
        (("ndarray:int32", None), b"\x07\x01", "mismatch", "an array whose shape is cut"),
        (("ndarray:int32", None), b"\x04\x02" + bytes(4), "mismatch", "an array of 2 values in 4 bytes"),
    ],
)
def test_samples_that_do_not_fit_their_columns_f9(
    column: tuple[str, int | None], value: bytes, problem: str, message: str, tmp_path: Path, read_all: Read
) -> None:
    """F9: the sample's number is in the error."""
    good = b"\x04\x01" + bytes(4)
    write_set(tmp_path, [shard({"a": column}, [{"a": good}, {"a": value}])])
    with pytest.raises(DataError, match=message) as caught:
        read_all(open_mds(tmp_path))
    assert (caught.value.problem, caught.value.record) == (problem, 1)


def test_sizes_in_a_sample_that_go_past_its_end(tmp_path: Path, read_all: Read) -> None:
    content = simple(0, 3)
    begin = struct.unpack("<I", content[8:12])[0]  # of sample 1, whose first word is the size of "s"
    for size, message in ((9, "are left"), (0, "bytes are left behind")):
        (tmp_path / "a.mds").write_bytes(patched(content, begin, size))
        with pytest.raises(DataError, match=message) as caught:
            read_all(open_mds(tmp_path))
        assert (caught.value.problem, caught.value.offset, caught.value.record) == ("malformed", begin, 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": ("int", 4)}, "gives column 'a' of encoding 'int' 4 bytes; it has 8"),
        ({"a": ("ndarray:int8:0", 0)}, "gives column 'a' the size 0"),
        ({"a": ("ndarray:int8:x", 4)}, "whose shape is none"),
        ({"a": ("ndarray:int8:2,2", None)}, "gives column 'a' of encoding 'ndarray:int8:2,2' 0 bytes; it has 4"),
    ],
)
def test_headers_that_contradict_themselves(columns: Columns, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.mds").write_bytes(shard(columns, []))
    with pytest.raises(DataError, match=message):
        read_columns(_data.File(tmp_path / "a.mds"))


def test_an_empty_file_and_a_shard_of_nothing_f10(tmp_path: Path) -> None:
    """F10: no records, no error."""
    (tmp_path / "a.mds").write_bytes(b"")
    (tmp_path / "b.mds").write_bytes(shard(SIMPLE, []))
    source = open_mds(tmp_path)
    assert source.records == 0 and [field[0] for field in source.fields] == ["i", "s"]


def test_hashes_are_compared(tmp_path: Path) -> None:
    names = write_set(tmp_path, [simple(0, 4), simple(4, 8), simple(8, 9)])
    shards = find_shards(str(tmp_path), names)
    assert verify(str(tmp_path), shards) == ([], [])
    content = (tmp_path / names[1]).read_bytes()
    (tmp_path / names[1]).write_bytes(content[:-1] + b"?")
    (tmp_path / names[2]).write_bytes((tmp_path / names[2]).read_bytes()[:-1])
    unknown = Shard(names[3], -1, -1, (("xxh3_64", "0"),))
    errors, notes = verify(str(tmp_path), [*shards[:2], unknown])
    assert [error.problem for error in errors] == ["malformed", "truncated"]
    assert "sha1 is" in str(errors[0]) and "index.json says" in str(errors[1])
    assert len(notes) == 1 and "xxh3_64 of 1 shards was not compared" in notes[0]
