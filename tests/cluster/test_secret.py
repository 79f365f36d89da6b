"""Where the job's secret comes from, and what is no place for one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.cluster.secret import job_digest, job_key, key_without_secret, read_secret
from launcher.errors import UsageError


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"from the file\n")
    path.chmod(0o600)
    return path


def test_sources(secret_file: Path) -> None:
    assert read_secret({}) == (b"", "")
    assert read_secret({"LAUNCHER_SECRET": "abc"}) == (b"abc", "environment LAUNCHER_SECRET")
    assert read_secret({}, str(secret_file)) == (b"from the file", f"option --secret-file ({secret_file})")
    assert read_secret({"LAUNCHER_SECRET": "from the file"}, str(secret_file))[0] == b"from the file"
    with pytest.raises(UsageError, match="hold different secrets; leave one of the two out"):
        read_secret({"LAUNCHER_SECRET": "abc"}, str(secret_file))
    with pytest.raises(UsageError, match="LAUNCHER_SECRET is empty"):
        read_secret({"LAUNCHER_SECRET": ""}, str(secret_file))


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602])
def test_a_file_that_everyone_may_read(secret_file: Path, mode: int) -> None:
    secret_file.chmod(mode)
    with pytest.raises(UsageError, match=rf"hyperparameter x \({secret_file}\): every user .*mode {mode:04o}"):
        read_secret({}, str(secret_file), "hyperparameter x")


def test_files_that_are_none(tmp_path: Path, secret_file: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, words in (
        (tmp_path / "absent", "No such file or directory"),
        (tmp_path, "not a regular file"),
        (tmp_path / "fifo", "not a regular file"),
        ("a\0b", "embedded null"),
    ):
        with pytest.raises(UsageError, match=words):
            read_secret({}, str(path))
    secret_file.write_bytes(b"\r\n")
    with pytest.raises(UsageError, match="the file is empty"):
        read_secret({}, str(secret_file))
    secret_file.write_bytes(b"x" * 70_000)
    with pytest.raises(UsageError, match="70000 bytes are no secret"):
        read_secret({}, str(secret_file))


def test_keys() -> None:
    keys = {job_key(b"a"), job_key(b"b"), key_without_secret("a"), key_without_secret("b")}
    assert {len(key) for key in keys} == {32}
    assert len(keys) == 4
    assert job_digest("ab", "c") != job_digest("a", "bc")
    assert len(job_digest("name", "\udcff")) == 32
