"""``python -m launcher transform``: batch transform on this machine, with the same handlers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CODE = """
    def model_fn(model_dir):
        return 10
    def input_fn(body, content_type):
        return content_type, body
    def predict_fn(data, model):
        return data
    def output_fn(prediction, accept):
        content_type, body = prediction
        if "bad" in body:
            raise ValueError("a bad record")
        return f"<{body}>", accept
"""


class Folder:
    def __init__(self, job: Any) -> None:
        self.job, self.input, self.output = job, job.directory / "in", job.directory / "out"
        self.input.mkdir()

    def write(self, name: str, text: str) -> None:
        path = self.input / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(self, *options: str, env: dict[str, str] | None = None) -> int:
        environ = {"SAGEMAKER_BASE_DIR": str(self.job.base), "SAGEMAKER_MODEL_SERVER_WORKERS": "2", **(env or {})}
        words = ("transform", "--input", str(self.input), "--output", str(self.output), *options)
        code: int = self.job.run(*words, env=environ, own_tree=False)
        return code

    def made(self) -> dict[str, str]:
        found = (path for path in self.output.rglob("*") if path.is_file())
        return {str(path.relative_to(self.output)): path.read_text() for path in found}


@pytest.fixture
def folder(served: Any) -> Folder:
    served.code(CODE)
    return Folder(served.job)


def test_each_file_is_one_request_and_one_output(folder: Folder) -> None:
    folder.write("b.csv", "1,2\n3,4\n")
    folder.write("deep/er/a.csv", "5,6\n")
    assert folder.run() == 0, folder.job.stderr
    assert folder.made() == {"b.csv.out": "<1,2\n3,4\n>", "deep/er/a.csv.out": "<5,6\n>"}
    assert "transformed 2 files in 2 requests" in folder.job.stderr


@pytest.mark.parametrize(
    ("options", "output"),
    [
        (("--split", "Line", "--strategy", "SingleRecord"), "<1><2><3>"),
        (("--split", "Line", "--strategy", "SingleRecord", "--assemble", "Line"), "<1>\n<2>\n<3>\n"),
        (("--split", "Line"), "<1\n2\n3>"),
    ],
)
def test_records_are_split_batched_and_assembled(folder: Folder, options: tuple[str, ...], output: str) -> None:
    folder.write("a.csv", "1\r\n2\n\n3")
    assert folder.run(*options) == 0, folder.job.stderr
    assert folder.made() == {"a.csv.out": output}


def test_order_is_kept_over_many_requests(folder: Folder) -> None:
    folder.write("a.jsonl", "".join(f"{i}\n" for i in range(500)))
    folder.write("b.jsonl", "".join(f"{i}\n" for i in range(500, 700)))
    assert folder.run("--split", "Line", "--strategy", "SingleRecord", "--content-type", "text/csv") == 0
    assert folder.made() == {
        "a.jsonl.out": "".join(f"<{i}>" for i in range(500)),
        "b.jsonl.out": "".join(f"<{i}>" for i in range(500, 700)),
    }


def test_requests_are_as_large_as_the_payload_allows(folder: Folder) -> None:
    line = "x" * 99_999
    folder.write("a.csv", f"{line}\n" * 25)
    assert folder.run("--split", "Line", "--payload-mb", "1") == 0, folder.job.stderr
    parts = folder.made()["a.csv.out"].split("><")
    assert [part.count("x") // 99_999 for part in parts] == [10, 10, 5]


def test_a_record_that_is_too_large_is_named(folder: Folder) -> None:
    folder.write("a.csv", "1\n" + "x" * (1 << 20) + "y\n")
    assert folder.run("--split", "Line", "--payload-mb", "1") == 65
    assert f"{folder.input}/a.csv: found a record of 1048577 bytes (line 2)" in folder.job.stderr


def test_a_request_that_fails_fails_the_job_and_its_file_alone(folder: Folder) -> None:
    folder.write("good.csv", "1\n")
    folder.write("mixed.csv", "1\nbad\n3\n")
    assert folder.run("--split", "Line", "--strategy", "SingleRecord") == 1
    assert folder.made() == {"good.csv.out": "<1>"}
    assert "1 of 4 requests failed" in folder.job.stderr
    assert f"{folder.input}/mixed.csv, request 2: 500 HandlerFailed: ValueError: a bad record" in folder.job.stderr


def test_a_model_that_can_not_be_loaded_fails_the_job(folder: Folder, served: Any) -> None:
    served.code("def model_fn(d): raise RuntimeError('no weights')")
    folder.write("a.csv", "1\n")
    assert folder.run() == 1
    assert "the model could not be loaded: RuntimeError: no weights" in folder.job.stderr
    assert folder.made() == {}


@pytest.mark.parametrize(
    ("prepare", "options", "code", "text"),
    [
        ("", (), 65, "found an empty directory"),
        ("a.xyz", (), 65, "a.xyz: found a suffix that tells no content type"),
        ("a.csv", ("--split", "Lines"), 64, "expected one of None, Line"),
        ("a.csv", ("--inptu", "x"), 64, "did you mean --input?"),
    ],
)
def test_what_can_not_be_done_is_said_first(
    folder: Folder, prepare: str, options: tuple[str, ...], code: int, text: str
) -> None:
    if prepare:
        folder.write(prepare, "1\n")
    assert folder.run(*options) == code
    assert text in folder.job.stderr


def test_an_output_that_can_not_be_written_is_said(folder: Folder) -> None:
    folder.write("a.csv", "1\n")
    folder.output.write_text("a file in the way")
    assert folder.run() == 74
    assert f"cannot write {folder.output}/a.csv.out" in folder.job.stderr


def test_default_functions_and_accept(folder: Folder, served: Any, tmp_path: Path) -> None:
    served.code("def model_fn(d): return 2\ndef predict_fn(data, model): return data * model")
    folder.write("a.csv", "1,2\n3,4\n")
    assert folder.run("--accept", "application/jsonlines", "--split", "Line") == 0, folder.job.stderr
    assert [json.loads(line) for line in folder.made()["a.csv.out"].splitlines()] == [[2, 4], [6, 8]]
