"""Fetching the user's code: each kind of source, what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import http.server
import io
import os
import pathlib
import tarfile
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.container import Container, prepare_code, read
from launcher.errors import ClusterError, ContractError

HOSTS = {"current_host": "a", "hosts": ["a"]}


def archive(path: pathlib.Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: Any = "w:gz") -> pathlib.Path:
    with tarfile.open(path, mode) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.fixture
def job(tree: Any) -> Any:
    def make(source: object, **environ: str) -> Container:
        return read(str(tree(HOSTS, hyperparameters={"sagemaker_submit_directory": str(source)})), environ)

    return make


def fetch(container: Container) -> list[str]:
    lines: list[str] = []
    assert prepare_code(container, lines.append) is True
    assert lines == [f"code: {container.submit_dir} -> {container.paths.code_dir}"]
    return sorted(os.listdir(container.paths.code_dir))


def leftovers(container: Container) -> list[str]:
    return sorted(set(os.listdir(container.paths.base)) - {"input", "code"}) + os.listdir(container.paths.code_dir)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_archive(job: Any, tmp_path: pathlib.Path, mode: str) -> None:
    members = [
        (member("pkg", type=tarfile.DIRTYPE, mode=0o555), b""),
        (member("pkg/run.sh", mode=0o6755), b"#!/bin/sh\n"),
        (member("train.py"), b"x = 1\n"),
        (member("link.py", type=tarfile.SYMTYPE, linkname="pkg/../train.py"), b""),
    ]
    container = job(archive(tmp_path / "source.tar.gz", members, mode))
    assert fetch(container) == ["link.py", "pkg", "train.py"]
    code = pathlib.Path(container.paths.code_dir)
    assert (code / "link.py").read_text() == "x = 1\n"
    assert (code / "pkg" / "run.sh").stat().st_mode & 0o7777 == 0o755
    assert leftovers(container) == os.listdir(code)


def test_directory_and_single_file(job: Any, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "src"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a.py").write_text("a")
    (source / "dangling").symlink_to("nowhere")
    container = job(f"file://{source}")
    assert fetch(container) == ["sub"]
    (tmp_path / "ml" / "code" / "sub" / "a.py").unlink()
    (tmp_path / "ml" / "code" / "sub").rmdir()
    assert fetch(job(source / "sub" / "a.py")) == ["a.py"]


def test_present_code_is_kept_and_said(job: Any, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "new.py").touch()
    container = job(source)
    fetch(container)
    lines: list[str] = []
    assert prepare_code(container, lines.append) is False
    code = container.paths.code_dir
    assert lines == [f"WARNING: {code} is not empty (new.py): it is used as it is, and {source} is ignored"]


def test_nothing_to_fetch(tree: Any) -> None:
    container = read(str(tree(HOSTS)), {})
    lines: list[str] = []
    assert prepare_code(container, lines.append) is False
    assert lines == []
    assert os.listdir(container.paths.code_dir) == []


UNSAFE = [
    ([member("../x")], "../x", "a name that leads outside"),
    ([member("/abs/x")], "/abs/x", "a name that leads outside"),
    ([member("a/../../x")], "a/../../x", "a name that leads outside"),
    (
        [member("out", type=tarfile.SYMTYPE, linkname="../.."), member("out/x")],
        "out",
        "a link to ../.., which is outside",
    ),
    ([member("l", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "l", "a link to /etc/passwd, which is outside"),
    ([member("h", type=tarfile.LNKTYPE, linkname="../x")], "h", "a link to ../x, which is outside"),
    (
        [member("dot", type=tarfile.SYMTYPE, linkname="."), member("up", type=tarfile.SYMTYPE, linkname="dot/..")],
        "up",
        "a link to dot/.., which is outside",
    ),
    ([member("fifo", type=tarfile.FIFOTYPE)], "fifo", "a device or FIFO"),
]


@pytest.mark.parametrize(("members", "name", "found"), UNSAFE, ids=[case[1] + case[2][:6] for case in UNSAFE])
def test_unsafe_archives_are_refused(
    job: Any, tmp_path: pathlib.Path, members: list[tarfile.TarInfo], name: str, found: str
) -> None:
    source = archive(tmp_path / "s.tar.gz", [(member("first.py"), b""), *((info, b"") for info in members)])
    container = job(source)
    with pytest.raises(ContractError) as caught:
        prepare_code(container, print)
    error = caught.value
    expected = "members that stay inside the code directory"
    assert (error.file, error.field, error.found, error.expected) == (str(source), name, found, expected)
    assert leftovers(container) == []
    assert not (tmp_path / "x").exists()


def test_damaged_archives(job: Any, tmp_path: pathlib.Path) -> None:
    whole = archive(tmp_path / "whole.tar.gz", [(member("big"), os.urandom(200_000))]).read_bytes()
    changed = bytearray(whole)
    changed[-6] ^= 0xFF  # in the checksum at the end
    cut, damaged, other = tmp_path / "cut.tar.gz", tmp_path / "damaged.tar.gz", tmp_path / "other.tar.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    damaged.write_bytes(changed)
    other.write_text("not an archive")
    for source, found, expected in (
        (cut, "a file that cannot be unpacked", "a whole tar archive"),
        (damaged, "a file that cannot be unpacked", "a whole tar archive"),
        (other, "a file that is not a tar archive", "a tar archive, compressed or not"),
    ):
        container = job(source)
        with pytest.raises(ContractError) as caught:
            prepare_code(container, print)
        assert caught.value.file == str(source)
        assert caught.value.found.startswith(found)
        assert caught.value.expected == expected
        assert leftovers(container) == []


def test_bad_sources(job: Any, tmp_path: pathlib.Path) -> None:
    hyperparameters = str(tmp_path / "ml" / "input" / "config" / "hyperparameters.json")
    for source, found, expected in (
        ("/no/such", '"/no/such", which is not there', "s3://, a directory or a file"),
        (tmp_path, f'"{tmp_path}"', "a directory that does not contain the code directory"),
        ("s3://bucket", '"s3://bucket"', "s3://bucket/key"),
    ):
        with pytest.raises(ContractError) as caught:
            prepare_code(job(source), print)
        error = caught.value
        actual = (error.file, error.field, error.found, error.expected)
        assert actual == (hyperparameters, "sagemaker_submit_directory", found, expected)


class S3(http.server.BaseHTTPRequestHandler):
    """As much of S3 as a download needs: one object, ``/bucket/dir/code.tar.gz``."""

    content = b""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        found = self.path.split("?")[0] == "/bucket/dir/code.tar.gz"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(self.content) if found else 0))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if body and found:
            self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's output is its own."""


@pytest.fixture
def s3(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3.content = archive(tmp_path / "s3.tar.gz", [(member("train.py"), b"x")]).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), S3)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_s3(job: Any, s3: str) -> None:
    environ = {"S3_ENDPOINT_URL": s3, "AWS_REGION": "eu-west-1"}
    assert fetch(job("s3://bucket/dir/code.tar.gz", **environ)) == ["train.py"]


def test_s3_errors(job: Any, s3: str) -> None:
    with pytest.raises(ContractError, match="Not Found"):
        prepare_code(job("s3://bucket/other", S3_ENDPOINT_URL=s3, AWS_REGION="eu-west-1"), print)
    with pytest.raises(ClusterError, match="cannot download s3://bucket/other"):
        prepare_code(job("s3://bucket/other", S3_ENDPOINT_URL="http://127.0.0.1:9", AWS_REGION="eu-west-1"), print)


def test_s3_without_boto3(job: Any) -> None:
    try:
        import boto3  # noqa: F401
    except ImportError:
        with pytest.raises(ContractError, match="but the Python package boto3 is not installed"):
            prepare_code(job("s3://bucket/key"), print)
    else:
        pytest.skip("boto3 is installed")
