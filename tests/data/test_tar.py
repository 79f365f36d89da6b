"""WebDataset's tar archives: what is a sample, and what happens to archives that are damaged."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import _data
from launcher.errors import DataError

Read = Callable[[_data.Source], dict[str, list[Any]]]
Members = list[tuple[str, bytes]]

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(path: Path, members: Members, kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pairs(count: int) -> Members:
    return [
        (f"{i:04d}.{extension}", f"{extension} of {i}".encode() * (i % 400))
        for i in range(count)
        for extension in ("jpg", "txt")
    ]


def index_of(path: Path, skip: bool = False, access: str = "automatic") -> _data.Index:
    file = _data.File(path, access)
    return _data.Index([file], [_data.scan_tar(file, skip)])


def open_tar(path: Path, fields: list[str] | None = None, integers: tuple[str, ...] = (), **how: Any) -> _data.Source:
    index = index_of(path, **how)
    names = ["key", *_data.tar_extensions(index)] if fields is None else fields
    return _data.tar_source(index, [(name, name in integers) for name in names], fields is None)


def texts(values: list[Any]) -> list[bytes]:
    return [value.tobytes() for value in values]


@pytest.mark.parametrize("access", ["mapped", "read"])
@pytest.mark.parametrize("kind", FORMATS)
def test_samples_of_each_dialect(kind: str, access: str, tmp_path: Path, read_all: Read) -> None:
    # ustar keeps 256 bytes of a path; the others any number, in headers of their own.
    folders = ["", "a.b/", "d" * 90 + "/e/"] + (["f" * 120 + "/" + "g" * 140 + "/"] if kind != "ustar" else [])
    keys = [folder + f"s{i}" for i in range(40) for folder in folders]
    members = [
        (f"{key}.{extension}", f"{key} {extension}".encode() * number)
        for number, key in enumerate(keys)
        for extension in ("Seg.PNG", "txt")
    ]
    path = make_tar(tmp_path / "a.tar", members, FORMATS[kind])
    found = read_all(open_tar(path, access=access))
    assert list(found) == ["key", "seg.png", "txt"]
    assert texts(found["key"]) == [key.encode() for key in keys]
    assert texts(found["seg.png"]) == [content for name, content in members if name.endswith("PNG")]
    assert texts(found["txt"]) == [content for name, content in members if name.endswith("txt")]


def test_what_is_no_part_of_a_sample_is_left_out(tmp_path: Path, read_all: Read) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", pax_headers={"comment": "of all members"}) as archive:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "x"
            archive.addfile(info, io.BytesIO(content))

        add("data", kind=tarfile.DIRTYPE)
        add("__meta__/a.txt", b"no")
        add("README", b"no")
        add("data/.hidden.txt", b"no")
        add("data/1.txt", b"one")
        add("data/1.link", kind=tarfile.SYMTYPE)
        add("data/1.cls", b" 7\n")
        add("data/2.txt", b"")
        add("data/empty.", b"no")
        add("data/2.cls", b"-12")
    found = read_all(open_tar(path, integers=("cls",)))
    assert texts(found["key"]) == [b"data/1", b"data/2"]
    assert texts(found["txt"]) == [b"one", b""]
    assert found["cls"] == [7, -12]


def test_fields_that_are_named_are_all_that_is_read(tmp_path: Path, read_all: Read) -> None:
    path = make_tar(tmp_path / "a.tar", [("1.a", b"1"), ("1.b", b"2"), ("2.c", b"3"), ("2.a", b"4")])
    assert texts(read_all(open_tar(path, ["a"]))["a"]) == [b"1", b"4"]


@pytest.mark.parametrize(
    ("members", "fields", "integers", "message"),
    [
        ([("1.a", b""), ("1.b", b""), ("2.a", b"")], None, (), 'no member with extension "b"'),
        ([("1.a", b""), ("2.a", b""), ("2.b", b"")], None, (), '"2.b" has an extension that the first sample lacks'),
        ([("1.a", b""), ("2.a", b""), ("2.A", b"")], None, (), 'two members "2.A"'),
        ([("1.a", b"1"), ("2.a", b"1.5")], None, ("a",), "no decimal integer"),
        ([("1.a", b"1"), ("2.a", b"9223372036854775808")], None, ("a",), "no decimal integer"),
    ],
    ids=["missing", "extra", "twice", "integer", "large"],
)
def test_a_sample_unlike_the_first_f9(
    members: Members,
    fields: list[str] | None,
    integers: tuple[str, ...],
    message: str,
    tmp_path: Path,
    read_all: Read,
) -> None:
    """F9: an error that names file, offset and record, when the sample is read."""
    path = make_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message) as caught:
        read_all(open_tar(path, fields, integers))
    assert (caught.value.problem, caught.value.file, caught.value.record) == ("mismatch", str(path), 1)
    assert caught.value.offset >= 512


def test_two_fields_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='two fields would be called "key"'):
        open_tar(make_tar(tmp_path / "a.tar", [("1.key", b"")]))


def test_an_archive_that_was_cut_f1(tmp_path: Path, read_all: Read) -> None:
    """F1: an error when the archive is opened; with skip the cut sample alone is lost, and said."""
    path = make_tar(tmp_path / "a.tar", pairs(200))
    with tarfile.open(path) as archive:
        cut = archive.getmember("0150.txt")
    with path.open("r+b") as file:
        file.truncate(cut.offset_data + 700)
    with pytest.raises(DataError, match=f"{cut.size} bytes wanted, 700 there") as caught:
        index_of(path)
    assert (caught.value.problem, caught.value.offset) == ("truncated", cut.offset)
    index = index_of(path, skip=True)
    assert index.records == 150
    assert len(read_all(open_tar(path, skip=True))["txt"]) == 150
    ((offset, size, text),) = index.part(0).damage
    assert offset < cut.offset and offset + size == cut.offset_data + 700 and "bytes wanted" in text


def test_an_archive_that_was_cut_between_members_f1(tmp_path: Path) -> None:
    """F1: the end-of-archive marker is missing, so samples may be."""
    path = make_tar(tmp_path / "a.tar", pairs(20))
    with tarfile.open(path) as archive:
        cut = archive.getmember("0015.jpg").offset
    with path.open("r+b") as file:
        file.truncate(cut)
    with pytest.raises(DataError, match="the archive has no end") as caught:
        index_of(path)
    assert (caught.value.problem, caught.value.offset) == ("truncated", cut)
    assert index_of(path, skip=True).records == 15


@pytest.mark.parametrize("stray", [1, 7, 511])
def test_stray_bytes_at_the_end_f2(stray: int, tmp_path: Path) -> None:
    """F2: 1 to 511 bytes after the last member: no header fits."""
    path = make_tar(tmp_path / "a.tar", pairs(20))
    with tarfile.open(path) as archive:
        cut = archive.getmember("0015.jpg").offset
    with path.open("r+b") as file:
        file.truncate(cut + stray)
    with pytest.raises(DataError, match=f"truncated header: {stray} bytes") as caught:
        index_of(path)
    assert (caught.value.problem, caught.value.offset) == ("truncated", cut)


def test_a_header_that_is_damaged_f3(tmp_path: Path, read_all: Read) -> None:
    """F3: an error with the offset; with skip, what follows is found again, and no sample is torn."""
    members = pairs(300)
    path = make_tar(tmp_path / "a.tar", members)
    with tarfile.open(path) as archive:
        first, second = archive.getmember("0100.jpg"), archive.getmember("0200.txt")
    with path.open("r+b") as file:
        for member in (first, second):
            file.seek(member.offset_data - 512)
            file.write(b"x" * 100)
    with pytest.raises(DataError, match="checksum does not hold") as caught:
        index_of(path)
    assert (caught.value.problem, caught.value.offset) == ("malformed", first.offset_data - 512)
    found = read_all(open_tar(path, skip=True))
    kept = [name.encode() for i in range(300) if (name := f"{i:04d}") not in ("0100", "0200")]
    assert texts(found["key"]) == kept
    assert texts(found["txt"]) == [
        content for name, content in members if name[-3:] == "txt" and name[:4].encode() in kept
    ]
    damage = index_of(path, skip=True).part(0).damage
    assert damage[0][0] <= first.offset and len(damage) >= 2


def test_archives_one_after_the_other_are_refused(tmp_path: Path) -> None:
    one = make_tar(tmp_path / "a.tar", pairs(3)).read_bytes()
    path = tmp_path / "b.tar"
    path.write_bytes(one + one)
    with pytest.raises(DataError, match="data follow the end of the archive"):
        index_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"x" * 4096 + bytes(range(256)) * 9), "gzip, not tar"),
        (b"\x01" * 1024, "no tar header"),
        (b"\x01" * 100, "truncated header"),
    ],
    ids=["gzip", "noise", "short"],
)
def test_what_is_no_archive(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        index_of(path)
    assert caught.value.offset == 0


def test_an_empty_file_has_no_samples_f10(tmp_path: Path) -> None:
    """F10: an empty file is fine, and so is an archive of nothing."""
    (tmp_path / "a.tar").write_bytes(b"")
    make_tar(tmp_path / "b.tar", [])
    assert index_of(tmp_path / "a.tar").records == index_of(tmp_path / "b.tar").records == 0
    assert _data.tar_extensions(index_of(tmp_path / "b.tar")) == []


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("1.bin")
        info.pax_headers = {"GNU.sparse.major": "1"}
        archive.addfile(info)
    with pytest.raises(DataError, match="a sparse member"):
        index_of(path)
