"""FastFile mode for real: a folder that a FUSE server of the tests serves (fuse_folder.py)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from launcher.data import Loader
from launcher.data.catalogue import open_source
from launcher.errors import DataError

numpy = pytest.importorskip("numpy")

RECORDS, RECORD_BYTES = 4096, 32768
MNT_DETACH = 2
FAULT = 2**23

Serve = Callable[..., AbstractContextManager["subprocess.Popen[str]"]]


@pytest.fixture
def serve() -> Serve:
    """Serves a folder at a mount point while it is entered; its output tells what was read."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/fuse")

    @contextmanager
    def serving(folder: Path, mountpoint: Path, fault: str = ":") -> Iterator[subprocess.Popen[str]]:
        program = Path(__file__).with_name("fuse_folder.py")
        server = subprocess.Popen(
            [sys.executable, str(program), str(folder), str(mountpoint), fault],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        assert server.stderr is not None
        if server.stdout.readline() != "ready\n":
            why = server.communicate()[1]
            if "PermissionError" in why:
                pytest.skip("this container may not mount FUSE")
            raise AssertionError(why)
        try:
            yield server
        finally:
            ctypes.CDLL(None).umount2(os.fsencode(mountpoint), MNT_DETACH)
            server.kill()
            server.communicate()

    return serving


def make_files(folder: Path) -> None:
    """Records that are numbered, in two files."""
    folder.mkdir()
    dtype = numpy.dtype({"names": ["number"], "formats": ["i8"], "offsets": [0], "itemsize": RECORD_BYTES})
    for number in range(2):
        values = numpy.zeros(RECORDS // 2, dtype)
        values["number"] = numpy.arange(number * RECORDS // 2, (number + 1) * RECORDS // 2)
        numpy.save(folder / f"{number}.npy", values)


def test_a_fuse_channel_is_read_in_large_pieces_each_once(serve: Serve, tmp_path: Path) -> None:
    """F21: told by the file system; order of blocks, no mapping of data, 1.1 x the share of each host at most."""
    folder, mountpoint = tmp_path / "data", tmp_path / "mounted"
    make_files(folder)
    mountpoint.mkdir()
    share = RECORDS * RECORD_BYTES // 2
    seen: list[int] = []
    for rank in range(2):  # each a host: what the kernel keeps of the one is gone when its mount is
        with serve(folder, mountpoint) as server:
            assert open_source(mountpoint).access == "remote"
            with Loader(
                mountpoint, 64, rank=rank, world_size=2, seed=3, fields=["number"], tail="short", window=1
            ) as loader:
                numbers = [int(number) for batch in loader for number in batch["number"]]
                assert str(mountpoint) not in Path("/proc/self/maps").read_text()
            server.kill()  # what it was asked for it has said before it answered
            assert server.stdout is not None
            requests = [[int(word) for word in line.split()[1:]] for line in server.stdout]
        assert numbers != sorted(numbers)
        seen += numbers
        fetched = sum(size for _, size in requests)
        assert 0.9 * share <= fetched <= 1.1 * share
        assert fetched / len(requests) >= 2**16  # the kernel cuts a call of 1 MiB into as many as it reads ahead
    assert sorted(seen) == list(range(RECORDS))


def test_a_read_that_fails_names_file_and_offset(serve: Serve, tmp_path: Path) -> None:
    """F20: EIO from what serves the file."""
    folder, mountpoint = tmp_path / "data", tmp_path / "mounted"
    make_files(folder)
    mountpoint.mkdir()
    with (
        serve(folder, mountpoint, f"1.npy:{FAULT}"),
        Loader(mountpoint, 64, shuffle="none") as loader,
        pytest.raises(DataError, match="can not be read: Input/output error") as caught,
    ):
        for _ in loader:
            pass
    assert caught.value.problem == "unreadable"
    assert caught.value.file.endswith("1.npy")
    assert caught.value.offset is not None
    assert FAULT - 2**20 <= caught.value.offset <= FAULT  # where the piece begins that could not be read
