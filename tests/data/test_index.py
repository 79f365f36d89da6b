"""The index of a channel, and the sidecar that the ranks of a host share."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import _data
from launcher.data.catalogue import Opened, open_source
from launcher.data.indexing import KEPT_FROM_BYTES, sidecar_paths
from launcher.errors import DataError, UsageError

from .record_files import numbered, write_recordio

Wait = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recordio(tmp_path / "data/a.rec", numbered(100))
    write_recordio(tmp_path / "data/b.rec", numbered(50))
    return tmp_path / "data"


def sidecars(folder: Path) -> list[Path]:
    return sorted(folder.glob(".launcher-index-*"))


def records_of(opened: Opened) -> list[int]:
    return [records for _, _, records in opened.files]


def overwrite(path: Path, records: list[bytes]) -> None:
    """Other records in the same file, of the same size and time: only who scans it again sees them."""
    status = path.stat()
    write_recordio(path, records)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_index_that_is_kept_is_not_made_again(folder: Path) -> None:
    assert records_of(open_source(folder, index="keep")) == [100, 50]
    assert len(sidecars(folder)) == 1
    assert [path for path, _, _ in open_source(folder).files] == ["a.rec", "b.rec"]
    overwrite(folder / "a.rec", [b"x" * 1992])  # one record where there were 100
    opened = open_source(folder)
    assert records_of(opened) == [100, 50]
    assert opened.index is not None
    assert opened.index.place(99) == (0, 1980, 20, 99)
    assert records_of(open_source(folder, index="off")) == [1, 50]


def test_only_a_file_that_has_changed_is_scanned_again(folder: Path) -> None:
    open_source(folder, index="keep")
    overwrite(folder / "a.rec", [b"x" * 1992])
    write_recordio(folder / "b.rec", numbered(60))
    write_recordio(folder / "c.rec", numbered(7))
    assert records_of(open_source(folder)) == [100, 60, 7]
    (folder / "b.rec").unlink()
    assert records_of(open_source(folder)) == [100, 7]


def test_a_small_channel_gets_no_sidecar_and_a_large_one_does(folder: Path) -> None:
    open_source(folder)
    assert not sidecars(folder)
    write_recordio(folder / "large.rec", [b"x" * KEPT_FROM_BYTES])
    assert open_source(folder).records == 151
    assert len(sidecars(folder)) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "version"])
def test_a_damaged_sidecar_is_made_again_and_that_is_said(
    folder: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """F17."""
    open_source(folder, index="keep")
    (sidecar,) = sidecars(folder)
    good = sidecar.read_bytes()
    bad = bytearray(good)
    bad[{"flipped": 100, "version": 8}.get(damage, 0)] ^= 2
    sidecar.write_bytes({"cut": good[:-50], "empty": b""}.get(damage, bytes(bad)))
    assert records_of(open_source(folder)) == [100, 50]
    assert f"[launcher] {sidecar}: " in capfd.readouterr().err
    assert sidecar.read_bytes() == good
    assert records_of(open_source(folder)) == [100, 50]
    assert capfd.readouterr().err == ""


def test_where_there_is_no_room_beside_the_data_the_cache_has_it(folder: Path, tmp_path: Path) -> None:
    opened = open_source(folder, index="off")
    beside, cached, *_ = sidecar_paths(str(folder), opened.index_key)
    Path(beside).mkdir()  # nothing can be renamed to this
    (Path(beside) / "full").touch()
    open_source(folder, index="keep")
    assert Path(cached).is_file()
    assert Path(cached).is_relative_to(tmp_path / "cache")
    overwrite(folder / "a.rec", [b"x" * 1992])
    assert records_of(open_source(folder)) == [100, 50]


OPEN = """
import sys
from launcher.data.catalogue import open_source
print([records for _, _, records in open_source(sys.argv[1], index="keep").files], flush=True)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def waits_for_lock(process: subprocess.Popen[str]) -> bool:
    waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return process.poll() is not None or any(str(process.pid) in words for words in waiting)


def test_one_rank_makes_the_index_and_the_others_wait(folder: Path, wait_until: Wait) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with start(OPEN, folder) as other:
        wait_until(lambda: waits_for_lock(other), "the other rank waits")
        opened = open_source(folder, index="off")
        assert opened.index is not None
        entries = [
            (name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for name in ("a.rec", "b.rec")
        ]
        parts = [opened.index.part(0), opened.index.part(1)]
        _data.save_index(sidecar_paths(str(folder), opened.index_key)[0], opened.index_key, entries, parts)
        overwrite(folder / "a.rec", [b"x" * 1992])
        os.close(descriptor)
        assert other.stdout is not None
        assert other.stdout.read() == "[100, 50]\n"  # by the index, not by the file as it is now


LOCK = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_rank_that_is_killed_while_it_makes_the_index_holds_nobody_up(folder: Path, wait_until: Wait) -> None:
    """F17."""
    shared = sorted(os.listdir("/dev/shm"))
    with start(LOCK, folder) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "locked\n"
        partial = Path(sidecar_paths(str(folder), open_source(folder, index="off").index_key)[0] + ".tmp")
        partial.write_bytes(b"half an index")
        with start(OPEN, folder) as other:
            wait_until(lambda: waits_for_lock(other), "the other rank waits")
            first.kill()
            assert other.stdout is not None
            assert other.stdout.read() == "[100, 50]\n"
    assert len(sidecars(folder)) == 1  # what was half written is part of it
    assert sorted(os.listdir("/dev/shm")) == shared


def test_an_index_that_is_named_counts_whatever_the_times(folder: Path, tmp_path: Path) -> None:
    opened = open_source(folder, index="off")
    assert opened.index is not None
    path = tmp_path / "the.index"
    entries = [(name, size, 0) for name, size, _ in opened.files]
    _data.save_index(str(path), opened.index_key, entries, [opened.index.part(0), opened.index.part(1)])
    overwrite(folder / "a.rec", [b"x" * 1992])
    assert records_of(open_source(folder, index=str(path))) == [100, 50]
    write_recordio(folder / "b.rec", numbered(51))
    with pytest.raises(DataError, match=r"the.index: it has no file 'b.rec' of 1020 bytes; index the data again"):
        open_source(folder, index=str(path))
    with pytest.raises(UsageError, match="there is no index 'nothing'; expected auto, keep, off, or the path"):
        open_source(folder, index="nothing")
