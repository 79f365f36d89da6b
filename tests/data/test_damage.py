"""Damaged files, and files that change while they are read: an error with file and offset, never anything else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.data.catalogue import open_source
from launcher.data.loader import Loader
from launcher.errors import DataError

from .record_files import frame, numbered, write_recordio

numpy = pytest.importorskip("numpy")

HEAD = b"".join(map(frame, numbered(5)))  # 100 bytes
TAIL = b"".join(map(frame, numbered(5, 5)))


@pytest.mark.parametrize(
    ("content", "problem", "offset", "kept"),
    [
        pytest.param(HEAD + frame(b"x" * 50)[:30], "truncated", 100, 5, id="F1 payload cut at the end"),
        pytest.param(HEAD + b"\x0a", "truncated", 100, 5, id="F2 one stray byte"),
        pytest.param(HEAD + b"\x0a\x23\xd7\xce\x00\x00\x00", "truncated", 100, 5, id="F2 seven stray bytes"),
        pytest.param(HEAD + b"junk" * 3 + TAIL, "malformed", 100, 10, id="F3 bad magic"),
        pytest.param(HEAD + frame(b"x", 2) + TAIL, "malformed", 100, 10, id="F6 middle without first"),
        pytest.param(HEAD + frame(b"x" * 4, 1) + TAIL, "malformed", 100, 10, id="F6 whole after first"),
        pytest.param(HEAD + frame(b"x" * 4, 1), "truncated", 100, 5, id="F6 end after first"),
        pytest.param(HEAD + frame(b"x", 5) + TAIL, "malformed", 100, 10, id="F6 flag 5"),
    ],
)
def test_a_damaged_file_is_an_error_or_its_damage_is_left_out(
    tmp_path: Path, content: bytes, problem: str, offset: int, kept: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_recordio(tmp_path / "a.rec", [])
    path.write_bytes(content)
    write_recordio(tmp_path / "b.rec", numbered(3))
    with pytest.raises(DataError) as raised:
        open_source(tmp_path, format="recordio")
    error = raised.value
    assert (error.problem, error.file, error.record) == (problem, str(path), 5)
    assert error.offset in (offset, offset + 12)  # the record's, or that of the part after its first one
    assert str(error).startswith(f"{path}: byte {error.offset}: record 5: ")
    opened = open_source(tmp_path, format="recordio", on_bad="skip")
    assert [records for _, _, records in opened.files] == [kept, 3]
    assert [damage.file for damage in opened.damage] == ["a.rec"]
    assert opened.damage[0].offset == offset
    assert opened.damage[0].bytes == len(content) - kept * 20
    assert f"{tmp_path}: {opened.damage[0].bytes} bytes are left out, at 1 place" in capfd.readouterr().err


def test_damaged_records_are_left_out_and_counted(tmp_path: Path) -> None:
    """F1: all the others are read, and the number of steps is known before the first."""
    (tmp_path / "a.rec").write_bytes(HEAD + b"junk" * 3 + TAIL)
    with Loader(tmp_path, 2, format="recordio", on_bad="skip", shuffle="none") as loader:
        assert len(loader) == 5
        found = [bytes(row) for batch in loader for row in batch["data"]]
    assert found == numbered(10)


CUT = """
import json, os, sys
from launcher.data.loader import Loader
from launcher.errors import DataError

path, threads, access, keep = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
os.environ["LAUNCHER_DATA_ACCESS"] = access
told = []
with Loader(path, 16, shuffle="none", threads=threads) as loader:
    for attempt in range(2):
        try:
            for batch in loader:
                os.truncate(path, keep)
        except DataError as error:
            told.append((error.problem, error.file, error.offset))
print(json.dumps(told))
"""


@pytest.mark.parametrize("access", ["mapped", "read"])
@pytest.mark.parametrize(("format", "threads"), [("npy", 0), ("recordio", 1)])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(
    tmp_path: Path, format: str, threads: int, access: str
) -> None:
    """F20: no signal and no zeros, in each mode, then and later."""
    keep = 2000 * 4096
    path = tmp_path / ("a.npy" if format == "npy" else "a.rec")
    if format == "npy":
        numpy.save(path, numpy.ones((4000, 1024), numpy.float32))
    else:
        write_recordio(path, [b"x" * 4088] * 4000)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", CUT, path, str(threads), access, str(keep)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [(problem, file) for problem, file, _ in told] == [("changed", str(path))] * 2
    assert all(offset == -1 or offset >= keep for _, _, offset in told)


HANDLERS = """
import faulthandler, mmap, os, sys
from launcher import _data
from launcher.errors import DataError

def lose(path):
    with open(path, "wb") as file:
        file.write(bytes(8192))
    return path

ours = _data.File(lose("ours"))
faulthandler.enable()
ours.check_unchanged()
os.truncate("ours", 0)
try:
    ours.read(4096, 1)
except DataError as error:
    print(type(error).__name__, flush=True)
with open(lose("theirs"), "r+b") as file:
    theirs = mmap.mmap(file.fileno(), 0)
os.truncate("theirs", 0)
theirs[5000]
"""


def test_faults_of_others_end_as_without_us(tmp_path: Path) -> None:
    """F20: with faulthandler, whichever came first; ours are errors, the others its."""
    for extra in ([], ["-X", "faulthandler"]):
        done = subprocess.run(
            [sys.executable, *extra, "-c", HANDLERS], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (-signal.SIGBUS, "DataError\n")
        assert done.stderr.count("Fatal Python error: Bus error") == 1


def test_a_file_that_changes_before_an_epoch_is_an_error(tmp_path: Path) -> None:
    """F20."""
    numpy.save(tmp_path / "a.npy", numpy.zeros((100, 4), numpy.float32))
    with Loader(tmp_path, 10) as loader:
        assert len(list(loader)) == 10
        os.utime(tmp_path / "a.npy", (0, 0))
        with pytest.raises(DataError, match=r"a.npy: it was written to since it was opened") as raised:
            list(loader)
    assert raised.value.problem == "changed"


def test_a_state_of_other_files_is_refused(tmp_path: Path) -> None:
    """F15: the file is named; strict=False warns and begins the epoch anew."""
    for name in ("a", "b", "c"):
        numpy.save(tmp_path / f"{name}.npy", numpy.zeros((100, 4), numpy.float32))
    with Loader(tmp_path, 10) as loader:
        next(iter(loader))
        state = json.loads(json.dumps(loader.state_dict()))
    numpy.save(tmp_path / "b.npy", numpy.zeros((101, 4), numpy.float32))
    with Loader(tmp_path, 10) as loader, pytest.raises(DataError, match=r"b.npy: .*then") as raised:
        loader.load_state_dict(state)
    assert (raised.value.problem, raised.value.file) == ("changed", str(tmp_path / "b.npy"))
    with Loader(tmp_path, 10, strict=False) as loader:
        with pytest.warns(RuntimeWarning, match="begins anew"):
            loader.load_state_dict(state)
        assert len(loader) == 30


TRAIN = """
import launcher
from launcher.data import Loader

for batch in Loader("train", 2):
    pass
"""


def test_the_failure_file_of_the_job_names_file_and_offset(job, tmp_path: Path) -> None:
    """F1, as the platform shows it: a script that knows nothing of damage fails with what is needed to find it."""
    job.tree(channels={"train": {"TrainingInputMode": "File", "ContentType": "application/x-recordio"}})
    path = job.base / "input/data/train/part-0"
    path.write_bytes(HEAD + b"\x0a\x23\xd7")
    assert job.run("-n", "2", job.script(TRAIN)) == 1, job.output()
    assert f"{path}: byte 100: " in job.failure
    assert "DataError" in job.failure
    assert f"{path}: byte 100: " in json.dumps(job.failure_json)
