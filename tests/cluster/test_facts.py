"""What hosts compare before they work together, and what they say about a difference."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import facts
from launcher.cluster.facts import HostFacts, collect, differences
from launcher.job import Entry
from launcher.record import replace

HOSTS = ("algo-1", "algo-2", "algo-3")


def entry(directory: Path, kind: str = "script", target: str = "train.py", args: tuple[str, ...] = ()) -> Entry:
    return Entry(kind, target, args, str(directory), sys.executable, os.path.basename(target))


def of(host: str, directory: Path, mode: str = "train", hosts: tuple[str, ...] = HOSTS, **options: Any) -> HostFacts:
    mine = collect(host=host, hosts=hosts, entry=entry(directory, **options), mode=mode, driver_file="/nonexistent")
    return HostFacts.from_message(json.loads(json.dumps(mine.as_message())), host)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """The same code in two places."""
    for name in ("one", "two"):
        code = tmp_path / name
        (code / "lib").mkdir(parents=True)
        (code / "train.py").write_text("print(1)\n")
        (code / "lib" / "model.py").write_text("layers = 3\n")
    return tmp_path / "one", tmp_path / "two"


def test_equal_hosts(two: tuple[Path, Path]) -> None:
    one, other = two
    for name in (".git/HEAD", "__pycache__/train.cpython-311.pyc", "lib/__pycache__/x.py", ".hidden", "x.pyc"):
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_text("of this host alone")
    assert differences(of("algo-1", one), of("algo-3", other)) == []
    assert sorted(of("algo-1", one).files) == ["lib/model.py", "train.py"]


def test_one_byte(two: tuple[Path, Path]) -> None:
    one, other = two
    (other / "lib" / "model.py").write_text("layers = 4\n")
    assert differences(of("algo-1", one), of("algo-3", other)) == [
        "lib/model.py: another content on algo-3 than on algo-1"
    ]
    # a script alone: the same on both
    assert differences(of("algo-1", one, "run"), of("algo-3", other, "run")) == []
    (other / "train.py").write_text("print(2)\n")
    assert differences(of("algo-1", one, "run"), of("algo-3", other, "run")) == [
        "train.py: another content on algo-3 than on algo-1"
    ]


def test_files_of_one_host_alone(two: tuple[Path, Path]) -> None:
    one, other = two
    (one / "a.py").touch()
    (other / "b.py").touch()
    assert differences(of("algo-1", one), of("algo-3", other)) == [
        "a.py: on algo-1, not on algo-3",
        "b.py: on algo-3, not on algo-1",
    ]
    for number in range(15):
        (one / f"m{number}.py").touch()
    lines = differences(of("algo-1", one), of("algo-3", other))
    assert len(lines) == 6
    assert lines[-1] == "and 12 more files"


def test_modules_commands_and_calls(two: tuple[Path, Path]) -> None:
    one, other = two
    (other / "lib" / "model.py").write_text("layers = 4\n")
    changed = ["lib/model.py: another content on algo-3 than on algo-1"]
    for kind, target in (("module", "lib.model"), ("function", "lib.model:main"), ("script", "lib")):
        assert differences(
            of("algo-1", one, "run", kind=kind, target=target), of("algo-3", other, "run", kind=kind, target=target)
        ) == (changed)
    for kind, target in (("module", "json.tool"), ("command", "/bin/true")):
        assert of("algo-1", one, "run", kind=kind, target=target).files == {}
    for code, text in ((one, "#!/bin/sh\n:\n"), (other, "#!/bin/sh\ntrue\n")):
        (code / "run.sh").write_text(text)
    script: dict[str, Any] = {"kind": "command", "target": "/bin/sh", "args": ("run.sh",)}
    found = differences(of("algo-1", one, "run", **script), of("algo-3", other, "run", **script))
    assert found == ["run.sh: another content on algo-3 than on algo-1"]
    own = [
        of(host, code, "run", kind="command", target=str(code / "run.sh")) for host, code in (("a", one), ("b", other))
    ]
    assert differences(*own) == ["run.sh: another content on b than on a"]
    call = [
        collect(
            host=host, hosts=HOSTS, entry=Entry("call", f"/x/{host}", (f"/x/{host}",), "/", "python", "f"), mode="run"
        )
        for host in ("a", "b")
    ]
    assert differences(*call) == []


def test_what_can_not_be_read_or_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "code"
    code.mkdir()
    os.mkfifo(code / "fifo")
    (code / "loop").symlink_to(code)
    (code / "dangling").symlink_to("nowhere")
    for name in ("a.bin", "b.bin", "c.bin"):
        (code / name).write_bytes(b"x" * 10)
    assert list(of("a", code).files) == ["a.bin", "b.bin", "c.bin"]
    monkeypatch.setattr(facts, "CODE_BYTES", 25)
    assert of("a", code).files["c.bin"] == "10 bytes"
    monkeypatch.setattr(facts, "CODE_FILES", 2)
    assert list(of("a", code).files) == ["a.bin", "b.bin"]
    assert of("a", tmp_path / "nowhere").files == {}


def test_many_files_are_one_digest(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "two"
    for code in (one, other):
        code.mkdir()
        for number in range(300):
            (code / f"{number}.py").touch()
    assert differences(of("a", one), of("b", other)) == []
    (other / "7.py").write_text("x")
    assert differences(of("a", one), of("b", other)) == ["code: others on b than on a"]


def test_host_lists(tmp_path: Path) -> None:
    mine = of("algo-1", tmp_path)
    more = of("algo-3", tmp_path, hosts=("algo-1", "algo-3", "algo-4"))
    assert differences(mine, more) == ["host list: only algo-1 lists algo-2; only algo-3 lists algo-4"]
    turned = of("algo-3", tmp_path, hosts=("algo-2", "algo-1", "algo-3"))
    assert differences(mine, turned) == [
        "host list: the same hosts in another order: algo-1, algo-2, algo-3 on algo-1, algo-2, algo-1, algo-3 on algo-3"
    ]
    large = tuple(f"algo-{number}" for number in range(4096))
    assert differences(of("a", tmp_path, hosts=large), of("b", tmp_path, hosts=large)) == []
    assert differences(of("a", tmp_path, hosts=large), of("b", tmp_path, hosts=large[1:])) == [
        "host list: 4096 hosts on a, 4095 on b, not the same ones"
    ]
    assert len(json.dumps(of("a", tmp_path, hosts=large).as_message()["hosts"])) < 10


def test_versions(tmp_path: Path) -> None:
    mine = replace(of("algo-1", tmp_path), packages={"torch": "2.13.0", "horovod": "0.28.1"}, driver="535.104.05")
    other = replace(
        mine,
        host="algo-3",
        packages={"torch": "2.12.1"},
        driver="550.54.15",
        python="cpython 3.10.1",
        launcher="9.9",
        args_digest="x",
        entry="script other.py",
        protocol=2,
    )
    assert differences(mine, other) == [
        f"launcher: {mine.launcher} on algo-1, 9.9 on algo-3",
        "launcher protocol: 1 on algo-1, 2 on algo-3",
        f"Python: {mine.python} on algo-1, cpython 3.10.1 on algo-3",
        "entry point: script train.py on algo-1, script other.py on algo-3",
        "script arguments: others on algo-3 than on algo-1",
        "horovod: 0.28.1 on algo-1, not installed on algo-3",
        "torch: 2.13.0 on algo-1, 2.12.1 on algo-3",
        "NVIDIA driver: 535.104.05 on algo-1, 550.54.15 on algo-3",
    ]
    assert differences(mine, replace(mine, driver="")) == []  # a host without a GPU among others
    many = replace(mine, host="algo-2", packages={f"p{number:02}": "1" for number in range(15)})
    lines = differences(mine, many)
    assert lines[:1] == ["horovod: 0.28.1 on algo-1, not installed on algo-2"]
    assert lines[5:] == ["and 12 more packages"]


def test_a_malformed_message_differs(tmp_path: Path) -> None:
    mine = of("algo-1", tmp_path)
    wrong = {**mine.as_message(), "packages": [1], "hosts": 7, "hosts_digest": 1, "files": {"a": 1}}
    malformed: list[Any] = [None, [], {}, wrong]
    for message in malformed:
        theirs = HostFacts.from_message(message, "algo-2")
        assert differences(mine, theirs)
    with pytest.raises(AttributeError):
        mine.host = "x"  # type: ignore[misc]


def test_installed_distributions(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for name in ("a/Mpi4Py-4.1.0.dist-info", "b/mpi4py-3.0.dist-info", "b/typing_extensions-4.9.0.dist-info"):
        (tmp_path / name).mkdir(parents=True)
    (second / "python_apt-2.6.0.egg-info").touch()
    (second / "old.thing-1.0-py3.11.egg-info").touch()
    (second / "here.egg-info").mkdir()
    assert facts.installed([str(first), str(tmp_path / "nowhere"), str(second)]) == {
        "mpi4py": "4.1.0",
        "old-thing": "1.0",
        "python-apt": "2.6.0",
        "typing-extensions": "4.9.0",
    }
    assert "pytest" in facts.installed(sys.path)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.57  Thu\nGCC version:  gcc 12.2.0\n", "575.57"),
        ("nothing\n", ""),
    ],
)
def test_driver_version(tmp_path: Path, line: str, version: str) -> None:
    (tmp_path / "version").write_text(line)
    assert facts.driver_version(str(tmp_path / "version")) == version
    assert facts.driver_version(str(tmp_path / "absent")) == ""
