"""What is in a channel: its files, their format, who they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.data.catalogue import open_source
from launcher.errors import DataError, UsageError

from .record_files import frame, numbered, write_recordio

numpy = pytest.importorskip("numpy")

PROTO = frame(b"\x0a\x12\x0a\x06values\x12\x08\x12\x06\x0a\x04\0\0\x80?")  # features: values: Float32Tensor [1.0]


def channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, **config: str) -> Path:
    """A channel of a job tree, which is this process's."""
    base = tmp_path / "ml"
    (base / "input/config").mkdir(parents=True)
    (base / "input/config/inputdataconfig.json").write_text(json.dumps({name: config}))
    folder = base / "input/data" / name
    folder.mkdir(parents=True)
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(base))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.npy", b"", "npy"),
        ("a.rec", frame(b"any bytes"), "recordio"),
        ("a.rec", PROTO, "recordio-protobuf"),
        ("part-0", frame(b"any bytes"), "recordio"),
        ("part-0", PROTO, "recordio-protobuf"),
        ("a.csv", b"1,2\n", "csv"),
        ("part-0", b"0.5,-2e3,nan\n1,2,3\n", "csv"),
        ("part-0", b"1 1:0.5 7:2 # a comment\n", "libsvm"),
        ("part-0", b'{"a": 1}\n', "jsonlines"),
        ("A.TXT", b"some words\n", "lines"),
        ("part-0", b"\xff\xd8\xff\xe0 a picture", "images"),
    ],
)
def test_the_format_is_told_by_suffix_or_first_bytes(tmp_path: Path, name: str, content: bytes, format: str) -> None:
    (tmp_path / name).write_bytes(content)
    if format == "npy":
        numpy.save(tmp_path / name, numpy.zeros((3, 2), numpy.float32))
    options = {} if format != "images" or "." in name else {"format": "files"}  # their files are told by suffix
    opened = open_source(tmp_path, **options)
    assert opened.format == (format if not options else "files")
    assert opened.records == {"npy": 3}.get(format, content.count(b"\n") if content[:1] in b"01{s" else 1)


def test_what_fits_two_formats_or_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"\x00\x01\x02")
    with pytest.raises(
        UsageError, match=r"data is of no format that is known; say which one by format=, of fixed, npy"
    ):
        open_source(tmp_path)
    (tmp_path / "data").rename(tmp_path / "data.rec")
    with pytest.raises(DataError, match=r"data\.rec: byte 0: begins with b'\\x00\\x01\\x02', as no file of") as found:
        open_source(tmp_path)
    assert (found.value.file, found.value.offset) == (str(tmp_path / "data.rec"), 0)
    (tmp_path / "data.rec").rename(tmp_path / "data.csv.gz")
    with pytest.raises(UsageError, match=r"data.csv.gz: the file is compressed"):
        open_source(tmp_path)
    with pytest.raises(UsageError, match=r"format 'excel' is not known; expected auto, fixed"):
        open_source(tmp_path, format="excel")
    with pytest.raises(UsageError, match=r"format lines has no option 'header'; its options: none"):
        open_source(tmp_path, format="lines", header=True)


def test_a_channel_has_its_content_type_and_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = channel(
        tmp_path, monkeypatch, "train", ContentType="text/csv; label_size=1", S3DistributionType="ShardedByS3Key"
    )
    (folder / "part-0").write_text("7,1,2\n8,3,4\n")
    for where in ("train", folder):
        opened = open_source(where)
        assert (opened.format, opened.records, opened.distribution) == ("csv", 2, "ShardedByS3Key")
        assert [field[0] for field in opened.fields] == ["label_values", "values"]
    with pytest.raises(UsageError, match="no channel and no path 'tran'; the channels of this job are train"):
        open_source("tran")


def test_a_pipe_channel_has_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    channel(tmp_path, monkeypatch, "train", TrainingInputMode="Pipe").rmdir()
    with pytest.raises(UsageError, match="channel train is in Pipe mode"):
        open_source("train")


def test_files_are_in_the_order_of_their_bytes_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b/2.rec", "b/10.rec", "b.rec", "Z.rec", "_SUCCESS", ".part", "b/_metadata"):
        write_recordio(tmp_path / name, numbered(2))
    (tmp_path / "c.rec").symlink_to(tmp_path / "Z.rec")
    assert [path for path, _, _ in open_source(tmp_path).files] == ["Z.rec", "b.rec", "b/10.rec", "b/2.rec"]
    assert [path for path, _, _ in open_source(tmp_path, links=True).files][-1] == "c.rec"
    hidden = open_source(tmp_path, hidden=True, format="recordio")
    assert [path for path, _, _ in hidden.files][:3] == [".part", "Z.rec", "_SUCCESS"]
    (tmp_path / "alias").symlink_to(tmp_path / "b")
    assert open_source(tmp_path / "alias").records == 4
    assert open_source(tmp_path / "b/2.rec").files == (("2.rec", 40, 2),)


def test_an_empty_channel_is_an_error_and_an_empty_file_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F10."""
    folder = channel(tmp_path, monkeypatch, "train", S3DistributionType="ShardedByS3Key")
    with pytest.raises(
        DataError, match=r"channel train has no files: .*, because its objects are fewer than the hosts"
    ):
        open_source("train")
    write_recordio(folder / "a.rec", [])
    write_recordio(folder / "b.rec", numbered(3))
    assert open_source("train").files == (("a.rec", 0, 0), ("b.rec", 60, 3))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b""),
        ("a.csv", b"\n\n"),
        ("a.libsvm", b""),
        ("a.libsvm", b"# nothing\n"),
        ("a.jsonl", b"\n"),
        ("a.txt", b""),
        ("a.rec", b""),
        ("a.pbr", b""),
        ("a.tfrecord", b""),
        ("a.tar", b""),
        ("a.tar", bytes(10240)),
        ("a.npy", b""),
        ("a.mds", b""),
        ("a.bin", b""),
        ("part-0", b""),
        ("index.json", b'{"shards": [], "version": 2}'),
    ],
)
def test_files_without_a_record_are_named_f10(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    options = {"fields": {"x": "uint8"}} if name == "a.bin" else {}
    whole = tmp_path if name == "index.json" else tmp_path / name
    with pytest.raises(DataError, match=r"(is empty|has no records|lists no files).* a channel has one") as found:
        open_source(tmp_path, **options)
    assert (found.value.file, str(found.value).startswith(f"{whole}: ")) == (str(whole), True)
    if name != "index.json":
        (tmp_path / f"b{Path(name).suffix}").write_bytes(content)
        with pytest.raises(DataError, match=rf"{tmp_path}: its 2 files (are empty|have no records)"):
            open_source(tmp_path, **options)


def test_a_damaged_first_file_does_not_hide_the_format(tmp_path: Path) -> None:
    write_recordio(tmp_path / "b.rec", numbered(3))
    (tmp_path / "a.rec").write_bytes(b"junk" + (tmp_path / "b.rec").read_bytes()[4:])
    with pytest.raises(DataError, match=r"a\.rec: byte 0: record 0: found 0x6b6e756a where a frame must begin"):
        open_source(tmp_path)
    assert [records for _, _, records in open_source(tmp_path, on_bad="skip").files] == [2, 3]


def test_files_of_different_formats_are_not_mixed(tmp_path: Path) -> None:
    write_recordio(tmp_path / "b.rec", numbered(3))
    (tmp_path / "LICENSE").write_text("free\n")
    (tmp_path / "b.idx").write_text("0\t0\n")
    with pytest.raises(UsageError, match=r"LICENSE is of no format that is known"):
        open_source(tmp_path)  # a suffix that tells nothing is no contradiction
    (tmp_path / "c.csv").write_text("1,2\n")
    with pytest.raises(
        UsageError, match=r"b\.rec is of format recordio or recordio-protobuf by its suffix, c\.csv of csv"
    ):
        open_source(tmp_path)
    (tmp_path / "LICENSE").unlink()
    with pytest.raises(UsageError, match="put the files of each format into a folder of their own, or say by format="):
        open_source(tmp_path)
    assert open_source(tmp_path, format="files").records == 3


def test_links_that_are_left_out_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_recordio(tmp_path / "store/a.rec", numbered(3))
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.rec", "b.rec"):
        (folder / name).symlink_to(tmp_path / "store/a.rec")
    with pytest.raises(
        DataError, match=r"data has no files but 2 symbolic links left out, which links=True \(--links\)"
    ):
        open_source(folder)
    assert open_source(folder, links=True).records == 6
    write_recordio(folder / "c.rec", numbered(1))
    assert capfd.readouterr().err == ""
    for _ in range(2):  # it is told once
        assert open_source(folder).records == 1
    said = f"[launcher] {folder}: 2 symbolic links left out, which links=True (--links) follows\n"
    assert capfd.readouterr().err == said


@pytest.mark.parametrize("where", [None, 3, ["a.rec"], b"a.rec", ""])
def test_what_is_no_path_is_refused(where: object) -> None:
    with pytest.raises(UsageError, match=r"channel is .*; expected the name of a channel, or the path of a file or fo"):
        open_source(where)  # type: ignore[arg-type]


REFUSED = """
import os, sys
from launcher.data.catalogue import open_source
from launcher.errors import DataError
os.setuid(65534)
try:
    open_source(sys.argv[1])
except DataError as error:
    print(error)
"""


def test_a_path_that_can_not_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="/dev/null: neither a file nor a folder, but a device"):
        open_source("/dev/null")
    with pytest.raises(DataError, match="can not be looked at: File name too long"):
        open_source(tmp_path / ("x" * 300))
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else, who may not look")
    tmp_path.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, tmp_path / "data"], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{tmp_path}/data: can not be looked at: Permission denied\n", done.stderr


def test_the_fingerprint_says_which_records_these_are(tmp_path: Path) -> None:
    def fingerprint(**files: int) -> int:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, count in files.items():
            write_recordio(folder / f"{name}.rec", numbered(count))
        return open_source(folder).fingerprint

    first = fingerprint(a=3, b=2)
    assert first == fingerprint(a=3, b=2)
    others = [fingerprint(a=2, b=3), fingerprint(a=3, c=2), fingerprint(a=3, b=3), fingerprint(a=5)]
    assert len({first, *others}) == 5
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "a.txt").write_text("x\n")
    assert open_source(lines).fingerprint != open_source(lines, format="files").fingerprint


REMOTE = """
import json, sys
import numpy
from launcher.data.loader import Loader

def io():
    return dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())

folder, rank = sys.argv[1], int(sys.argv[2])
with Loader(folder, 64, rank=rank, world_size=2, seed=3, fields=["number"], tail="short", window=1) as loader:
    before = io()
    records = [int(number) for batch in loader for number in batch["number"]]
    after = io()
    maps = open("/proc/self/maps").read()
bytes_read, calls = (int(after[key]) - int(before[key]) for key in ("rchar", "syscr"))
print(json.dumps([records, bytes_read, calls, folder in maps]))
"""


def test_a_remote_channel_is_read_in_large_pieces_each_once(tmp_path: Path) -> None:
    """F21: FastFile, here marked by LAUNCHER_DATA_ACCESS: order of blocks, no mapping of data, 1.1 x its share."""
    records, record_bytes = 4096, 16384
    dtype = numpy.dtype({"names": ["number"], "formats": ["i8"], "offsets": [0], "itemsize": record_bytes})
    for number in range(2):
        values = numpy.zeros(records // 2, dtype)
        values["number"] = numpy.arange(number * records // 2, (number + 1) * records // 2)
        numpy.save(tmp_path / f"{number}.npy", values)
    answers = []
    for rank in range(2):
        done = subprocess.run(
            [sys.executable, "-c", REMOTE, tmp_path, str(rank)],
            env={**os.environ, "LAUNCHER_DATA_ACCESS": "read", "WORLD_SIZE": "1", "RANK": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    assert sorted(answers[0][0] + answers[1][0]) == list(range(records))
    assert answers[0][0] != sorted(answers[0][0])
    share = records * record_bytes // 2
    for _, bytes_read, calls, mapped in answers:
        assert 0.9 * share <= bytes_read <= 1.1 * share  # a file is begun when it is opened
        assert bytes_read / calls >= 2**19  # few calls are for less: the ends of files, and /proc
        assert not mapped


def test_the_access_can_be_forced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recordio(tmp_path / "a.rec", numbered(3))
    assert open_source(tmp_path).access == "resident"
    monkeypatch.setenv("LAUNCHER_DATA_ACCESS", "read")
    assert open_source(tmp_path).access == "remote"
    monkeypatch.setenv("LAUNCHER_DATA_ACCESS", "mmap")
    with pytest.raises(UsageError, match="LAUNCHER_DATA_ACCESS is 'mmap'; expected automatic, mapped or read"):
        open_source(tmp_path)


def test_a_folder_of_images_says_what_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("cat/1.jpg", "dog/1.JPG", "dog/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff\xd8\xff")
    opened = open_source(tmp_path, format="images")
    assert [path for path, _, _ in opened.files] == ["cat/1.jpg", "dog/1.JPG"]
    assert [field[0] for field in opened.fields] == ["data", "label"]
    assert "1 file is no image by its suffix: dog/notes.md" in capfd.readouterr().err
    with pytest.raises(UsageError, match="no file has the suffix of an image; format='files' reads them as they are"):
        open_source(tmp_path / "dog/notes.md", format="images")
