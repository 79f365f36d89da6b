"""The failure and success files: whole, the user's text first, nothing stale."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest

from launcher.container import (
    FailureNotWritten,
    Paths,
    StaleMark,
    note_stale,
    user_failure,
    write_failure,
    write_success,
)
from launcher.errors import OutputError


@pytest.fixture
def paths(tmp_path: pathlib.Path) -> Paths:
    return Paths.at(str(tmp_path / "ml"))


def text_of(path: str) -> str:
    return pathlib.Path(path).read_text(encoding="utf-8")


def test_writes_both_files_and_nothing_else(paths: Paths) -> None:
    assert write_failure(paths, "rank 1 failed: é", {"rank": 1, "path": pathlib.Path("/x")}) is None
    assert text_of(paths.failure_file) == "rank 1 failed: é"
    assert json.loads(text_of(paths.failure_json)) == {
        "message": "rank 1 failed: é",
        "user_message": None,
        "detail": {"rank": 1, "path": "/x"},
    }
    assert sorted(os.listdir(paths.output_dir)) == ["failure", "failure.json"]


def test_text_that_is_not_unicode(paths: Paths) -> None:
    write_failure(paths, "bad \ud800", {})
    assert text_of(paths.failure_file) == "bad \\ud800"


def test_the_users_text_wins(paths: Paths) -> None:
    stale = note_stale(paths)
    assert stale == StaleMark()
    os.makedirs(paths.output_dir)
    pathlib.Path(paths.failure_file).write_text("mine")
    assert user_failure(paths, stale) == "mine"
    assert write_failure(paths, "launcher's", {}, stale) == "mine"
    assert text_of(paths.failure_file) == "mine"
    assert json.loads(text_of(paths.failure_json))["user_message"] == "mine"


def test_an_empty_file_is_no_text(paths: Paths) -> None:
    os.makedirs(paths.output_dir)
    pathlib.Path(paths.failure_file).write_text("\n")
    assert write_failure(paths, "launcher's", {}) is None
    assert text_of(paths.failure_file) == "launcher's"


def test_stale_files_are_removed_and_named(paths: Paths) -> None:
    write_failure(paths, "old", {})
    write_success(paths)
    stale = note_stale(paths)
    assert stale == StaleMark(removed=(paths.failure_file, paths.failure_json, paths.success_file))
    assert os.listdir(paths.output_dir) == []
    # The same text again, written by this job's script, is this job's.
    pathlib.Path(paths.failure_file).write_text("old")
    assert write_failure(paths, "launcher's", {}, stale) == "old"


# A file that cannot be removed: bind mounts and permissions need privileges that a test run may lack, so the
# directory of the file is made read-only, and for root, whom that does not stop, immutable by chattr if it can be.
def seal(directory: str) -> bool:
    os.chmod(directory, 0o555)
    if not os.access(directory, os.W_OK):
        return True
    try:
        return subprocess.run(["chattr", "+i", directory], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def unseal(directory: str) -> None:
    if os.geteuid() == 0 and shutil.which("chattr"):
        subprocess.run(["chattr", "-i", directory], capture_output=True, check=False)
    os.chmod(directory, 0o755)


def test_stale_file_that_cannot_be_removed(paths: Paths) -> None:
    write_failure(paths, "old", {})
    if not seal(paths.output_dir):
        unseal(paths.output_dir)
        pytest.skip("this user can write everywhere")
    try:
        stale = note_stale(paths)
        assert stale.removed == ()
        assert [kept.split(":")[0] for kept in stale.kept] == [paths.failure_file, paths.failure_json]
        assert user_failure(paths, stale) is None
        with pytest.raises(FailureNotWritten):
            write_failure(paths, "new", {}, stale)
    finally:
        unseal(paths.output_dir)
    assert write_failure(paths, "new", {}, stale) is None
    assert text_of(paths.failure_file) == "new"


def test_unchanged_stale_file_loses_and_a_rewritten_one_wins(paths: Paths) -> None:
    write_failure(paths, "old", {})
    # What note_stale returns when the file cannot be removed: the identity, taken here before a copy is put back.
    kept = pathlib.Path(paths.failure_file)
    status = kept.stat()
    from launcher.container.failure import FileIdentity

    identity = FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, kept.read_bytes())
    stale = StaleMark(failure=identity)
    assert user_failure(paths, stale) is None
    os.utime(kept, ns=(0, 0))
    assert user_failure(paths, stale) == "old"


def test_output_that_cannot_be_written(paths: Paths, tmp_path: pathlib.Path) -> None:
    (tmp_path / "ml").write_text("a file where the base directory should be")
    with pytest.raises(FailureNotWritten) as caught:
        write_failure(paths, "the reason", {})
    error = caught.value
    assert (error.exit_code, error.path, error.text) == (74, paths.failure_file, "the reason")
    assert str(error) == f"cannot write {paths.failure_file} (Not a directory); it was to say:\nthe reason"
    assert copy.copy(error).text == "the reason"
    with pytest.raises(OutputError, match=r"cannot write .*success"):
        write_success(paths)
    assert note_stale(paths) == StaleMark()


def test_directory_in_the_place_of_the_file(paths: Paths) -> None:
    os.makedirs(paths.failure_file)
    stale = note_stale(paths)
    assert [kept.split(":")[0] for kept in stale.kept] == [paths.failure_file]
    with pytest.raises(FailureNotWritten, match="Is a directory"):
        write_failure(paths, "the reason", {}, stale)
    assert os.listdir(paths.output_dir) == ["failure"]


def test_full_disk_leaves_no_half_written_file(paths: Paths) -> None:
    # A file size limit stands in for the full disk: the kernel refuses the write part of the way in both cases.
    program = (
        "import resource, signal, sys\n"
        "from launcher.container import FailureNotWritten, Paths, write_failure\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))\n"
        "try:\n"
        "    write_failure(Paths.at(sys.argv[1]), 'x' * 5000, {})\n"
        "except FailureNotWritten as error:\n"
        "    print(error.reason, len(error.text))\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, paths.base], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "File too large 5000\n"
    assert os.listdir(paths.output_dir) == []


def test_success(paths: Paths) -> None:
    write_success(paths)
    assert os.path.getsize(paths.success_file) == 0
    write_success(paths)
    assert os.listdir(paths.output_dir) == ["success"]
