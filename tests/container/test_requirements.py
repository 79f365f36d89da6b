"""Installing requirements with a real pip, offline."""

from __future__ import annotations

import http.server
import json
import os
import pathlib
import sys
import threading
import zipfile

import pytest

from launcher.container import install_package, install_requirements
from launcher.errors import ContractError, LauncherError


@pytest.fixture
def environ(tmp_path: pathlib.Path) -> dict[str, str]:
    """No index, no cache, and a target of its own: the interpreter's packages are not touched."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_TARGET": str(tmp_path / "installed"),
        "PIP_NO_CACHE_DIR": "1",
    }


def wheel(directory: pathlib.Path) -> str:
    name = "tiny-1.0-py3-none-any.whl"
    files = {
        "tiny.py": "VALUE = 1\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, "tiny-1.0.dist-info/RECORD"])
    with zipfile.ZipFile(directory / name, "w") as file:
        for path, content in {**files, "tiny-1.0.dist-info/RECORD": record}.items():
            file.writestr(path, content)
    return name


def test_installs(tmp_path: pathlib.Path, environ: dict[str, str]) -> None:
    (tmp_path / "requirements.txt").write_text(f"./{wheel(tmp_path)}\n")
    lines: list[str] = []
    assert install_requirements(str(tmp_path), sys.executable, lines.append, environ) is True
    assert (tmp_path / "installed" / "tiny.py").exists()
    assert lines[0] == f"installing in {tmp_path}: {sys.executable} -m pip install -r requirements.txt"
    assert any("Successfully installed tiny-1.0" in line for line in lines)


def test_nothing_to_install(tmp_path: pathlib.Path) -> None:
    assert install_requirements(str(tmp_path), "/no/such/python", print, {}) is False


def test_failure_says_why_first(tmp_path: pathlib.Path, environ: dict[str, str]) -> None:
    (tmp_path / "requirements.txt").write_text("no-such-package==1\n")
    with pytest.raises(LauncherError) as caught:
        install_requirements(str(tmp_path), sys.executable, lambda line: None, environ)
    lines = str(caught.value).splitlines()
    assert caught.value.exit_code == 1
    command = f"{sys.executable} -m pip install -r requirements.txt"
    assert lines[0] == f"InstallRequirementsError: {command}: exit code 1"
    assert lines[1].startswith("ERROR: ")
    assert "no-such-package" in lines[1]


def test_package(tmp_path: pathlib.Path, environ: dict[str, str]) -> None:
    (tmp_path / "setup.cfg").write_text("not a package")
    with pytest.raises(LauncherError, match=r"^InstallModuleError: .* -m pip install \.: exit code 1\n") as caught:
        install_package(str(tmp_path), sys.executable, lambda line: None, environ)
    assert caught.value.exit_code == 1


def test_password_of_an_index_is_not_shown(tmp_path: pathlib.Path, environ: dict[str, str]) -> None:
    del environ["PIP_NO_INDEX"]
    index = "http://aws:hunter2@127.0.0.1:9/simple/"
    environ |= {"PIP_INDEX_URL": index, "PIP_RETRIES": "0", "PIP_TIMEOUT": "1", "PIP_CONFIG_FILE": os.devnull}
    (tmp_path / "requirements.txt").write_text("no-such-package\n")
    lines: list[str] = []
    with pytest.raises(LauncherError) as caught:
        install_requirements(str(tmp_path), sys.executable, lines.append, environ)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in "\n".join(lines)


def test_interpreter_that_does_not_start(tmp_path: pathlib.Path) -> None:
    (tmp_path / "requirements.txt").touch()
    with pytest.raises(LauncherError, match="cannot start /no/such/python: No such file or directory") as caught:
        install_requirements(str(tmp_path), "/no/such/python", print, {})
    assert caught.value.exit_code == 1


class CodeArtifact(http.server.BaseHTTPRequestHandler):
    """The two calls that lead to an index: a token, and the address of a repository."""

    def do_POST(self) -> None:
        self._answer({"authorizationToken": "hunter2"})

    def do_GET(self) -> None:
        self._answer({"repositoryEndpoint": "https://dom-1.example/pypi/repo/"})

    def _answer(self, content: dict[str, str]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's output is its own."""


def test_token_reaches_pip_by_its_environment_only(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    (tmp_path / "requirements.txt").touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s" "$PIP_INDEX_URL" > index\nprintf "%s" "$*" > args\n')
    python.chmod(0o755)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), CodeArtifact)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_CODEARTIFACT", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    lines: list[str] = []
    environ = {
        "PATH": os.defpath,
        "CA_REPOSITORY_ARN": "arn:aws:codeartifact:eu-west-1:123456789012:repository/dom/repo",
    }
    try:
        install_requirements(str(tmp_path), str(python), lines.append, environ)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (tmp_path / "index").read_text() == "https://aws:hunter2@dom-1.example/pypi/repo/simple/"
    assert (tmp_path / "args").read_text() == "-m pip install -r requirements.txt"
    assert "hunter2" not in "\n".join(lines)


@pytest.mark.parametrize("arn", ["x", "arn:aws:codeartifact:r:1:repository/d", "arn:aws:s3:r:1:repository/d/r"])
def test_malformed_repository(tmp_path: pathlib.Path, arn: str) -> None:
    (tmp_path / "requirements.txt").touch()
    with pytest.raises(ContractError) as caught:
        install_requirements(str(tmp_path), sys.executable, print, {"CA_REPOSITORY_ARN": arn})
    expected = "arn:PARTITION:codeartifact:REGION:ACCOUNT:repository/DOMAIN/NAME"
    error = caught.value
    actual = (error.file, error.field, error.found, error.expected)
    assert actual == ("environment", "CA_REPOSITORY_ARN", repr(arn), expected)
