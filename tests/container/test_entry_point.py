"""Entry-point kinds in the reference's order, and the commands that run them, run."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from launcher.container import command_for, entry_point_kind, make_executable
from launcher.errors import ContractError

KINDS = json.loads((pathlib.Path(__file__).parent / "golden" / "entry_points.json").read_text(encoding="utf-8"))
KIND_NAMES = {"PYTHON_PROGRAM": "program", "PYTHON_PACKAGE": "package", "COMMAND": "command"}
ARGS = ["--name", "a b; echo INJECTED", "", "$(id) 'q' \"d\" \\ \n *"]
PRINT_ARGS = "import json, sys; print(json.dumps(sys.argv))\n"


@pytest.mark.parametrize("golden", KINDS, ids=lambda golden: "+".join(golden["files"]) + ":" + golden["entry_point"])
def test_kinds_are_the_references(golden: dict[str, str], tmp_path: pathlib.Path) -> None:
    for name in golden["files"]:
        (tmp_path / name).touch()
    entry = entry_point_kind(golden["entry_point"], str(tmp_path))
    assert entry.kind == KIND_NAMES[golden["kind"]]


def run(name: str, code_dir: pathlib.Path) -> list[str]:
    command = command_for(entry_point_kind(name, str(code_dir)), ARGS, python=sys.executable)
    done = subprocess.run(command, cwd=code_dir, capture_output=True, text=True, check=True)
    argv: list[str] = json.loads(done.stdout)
    return argv


def test_program(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train.py").write_text(PRINT_ARGS)
    assert run("train.py", tmp_path) == ["train.py", *ARGS]
    entry = entry_point_kind("train.py", str(tmp_path))
    command = command_for(entry, ["x"], python="/p", python_options=["-u"])
    assert command == ["/p", "-u", "train.py", "x"]


def test_package_in_a_directory_becomes_a_dotted_module(tmp_path: pathlib.Path) -> None:
    (tmp_path / "setup.py").touch()
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "train.py").write_text(PRINT_ARGS)
    entry = entry_point_kind("./pkg/train.py", str(tmp_path))
    assert (entry.kind, entry.module) == ("package", "pkg.train")
    assert run("pkg/train.py", tmp_path)[1:] == ARGS


def test_module(tmp_path: pathlib.Path) -> None:
    entry = entry_point_kind("a.b", str(tmp_path), as_module=True)
    assert command_for(entry, ["x"], python="/p") == ["/p", "-m", "a.b", "x"]


@pytest.mark.parametrize("mode", [0o755, 0o644])
def test_command_with_an_interpreter_line(tmp_path: pathlib.Path, mode: int) -> None:
    script = tmp_path / "tool"
    script.write_text(f"#!{sys.executable} -E\n{PRINT_ARGS}")
    script.chmod(mode)
    assert run("tool", tmp_path) == ["./tool", *ARGS]
    assert script.stat().st_mode & 0o777 == mode


def test_command_without_an_interpreter_line(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f'exec {sys.executable} -c "{PRINT_ARGS.strip()}" "$0" "$@"\n')
    assert run("run.sh", tmp_path)[1:] == ["./run.sh", *ARGS]


def test_binary(tmp_path: pathlib.Path) -> None:
    binary = tmp_path / "echo"
    binary.write_bytes(pathlib.Path("/bin/echo").read_bytes())
    binary.chmod(0o640)
    entry = entry_point_kind("echo", str(tmp_path))
    with pytest.raises(ContractError) as caught:
        command_for(entry, [], python="/p")
    assert (caught.value.found, caught.value.expected) == ("a binary without permission to execute", "chmod +x")
    assert make_executable(entry) is True
    assert binary.stat().st_mode & 0o777 == 0o750
    assert make_executable(entry) is False
    command = command_for(entry, ["hello"], python="/p")
    assert command == ["./echo", "hello"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "hello\n"


BAD = [
    ("", '""', "the name of a script, such as train.py"),
    ("-c", '"-c"', "a name that does not begin with a dash"),
    ("../train.py", '"../train.py"', "a path inside {}"),
    ("/etc/passwd", '"/etc/passwd"', "a path inside {}"),
    ("link.py", '"link.py"', "a path inside {}"),
    ("a\0b", '"a\\u0000b"', "a path inside {}"),
    ("nope.py", '"nope.py", which is not there', "one of its files: dir, link.py, train.py"),
    ("dir", '"dir", which is a directory', "one of its files: dir, link.py, train.py"),
]


@pytest.mark.parametrize(("name", "found", "expected"), BAD)
def test_bad_names(tmp_path: pathlib.Path, name: str, found: str, expected: str) -> None:
    code = tmp_path / "code"
    (code / "dir").mkdir(parents=True)
    (code / "train.py").touch()
    (tmp_path / "outside.py").touch()
    (code / "link.py").symlink_to(tmp_path / "outside.py")
    with pytest.raises(ContractError) as caught:
        entry_point_kind(name, str(code))
    error = caught.value
    actual = (error.file, error.field, error.found, error.expected)
    assert actual == (str(code), "entry point", found, expected.format(code))


def test_absolute_name_inside(tmp_path: pathlib.Path) -> None:
    (tmp_path / "t.sh").touch()
    entry = entry_point_kind(str(tmp_path / "t.sh"), str(tmp_path))
    assert command_for(entry, [], python="/p") == ["/bin/sh", str(tmp_path / "t.sh")]
