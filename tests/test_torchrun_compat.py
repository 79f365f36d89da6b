"""What a script sees under `python -m launcher` is what it sees under torchrun: both are run and compared."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="not installed: torch"),
]

PROBE = """
import json, os, sys
local = os.environ["RANK"]
seen = {
    "env": dict(os.environ),
    "argv": sys.argv,
    "path0": sys.path[0],
    "name": __name__,
    "file": __file__,
    "doc": __doc__,
    "package": __package__,
    "cwd": os.getcwd(),
    "stdin": sys.stdin.read() if local == "0" else "",
    "flags": str(sys.flags),
    "session": os.getsid(0) == os.getpid(),
    "executable": sys.executable,
    "unbuffered": sys.stdout.write_through,
    "signals": {number: str(__import__("signal").getsignal(number)) for number in (1, 2, 3, 10, 12, 13, 15)},
    "umask": os.umask(0o22),
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd") if int(name) < 3),
}
with open(f"seen.{local}", "w") as file:
    json.dump(seen, file)
"""

# Differ from run to run, or by intent (see launcher/engines/torch.py): compared on their own below.
OWN = {
    "MASTER_PORT",
    "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "OMP_NUM_THREADS",
    "MASTER_ADDR",
}

Seen = list[dict[str, Any]]
CASES: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "plain": (["--nproc-per-node", "2"], ["probe.py", "--lr", "0.1", "a b"], {}),
    "module": (["--nproc-per-node=2", "-m"], ["probe", "x${local_rank}y"], {"OMP_NUM_THREADS": "7"}),
    "options": (
        [
            "--max-restarts",
            "2",
            "--rdzv-id",
            "abc",
            "--role",
            "trainer",
            "--virtual-local-rank",
            "--nproc_per_node",
            "2",
        ],
        ["probe.py", "--rank=${local_rank}"],
        {"CUDA_VISIBLE_DEVICES": "4,6"},
    ),
    "variables": (
        [],
        ["sub/probe.py"],
        {"PET_NPROC_PER_NODE": "2", "PET_MAX_RESTARTS": "1", "PET_ROLE": "r", "PET_MASTER_ADDR": "localhost"},
    ),
}


def environ(extra: dict[str, str]) -> dict[str, str]:
    own = ("LAUNCHER_", "SM_", "SAGEMAKER_", "PET_", "TORCHELASTIC_", "OMP_", "SLURM_")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)} | extra


def run(directory: Path, words: list[str], extra: dict[str, str], stdin: str = "line one\n") -> tuple[int, str]:
    """Exit code and standard error of ``python WORDS`` in ``directory``."""
    (directory / "stdin").write_text(stdin)
    with open(directory / "stdin") as file:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=directory,
            env=environ(extra),
            stdin=file,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
    return done.returncode, done.stderr


def torchrun(directory: Path, words: list[str], extra: dict[str, str] | None = None) -> tuple[int, str]:
    return run(directory, ["-m", "torch.distributed.run", *words], extra or {})


def ours(directory: Path, words: list[str], extra: dict[str, str] | None = None) -> tuple[int, str]:
    return run(directory, ["-m", "launcher", "--job-dir", "job", *words], extra or {})


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Seen, Seen]]:
    """What both ranks saw under torchrun and under the launcher, in the same directory; each case is run once."""
    results: dict[str, tuple[Seen, Seen]] = {}

    def get(case: str) -> tuple[Seen, Seen]:
        if case not in results:
            options, script, extra = CASES[case]
            directory = tmp_path_factory.mktemp(case)
            (directory / "sub").mkdir()
            for place in (directory, directory / "sub"):
                (place / "probe.py").write_text(PROBE)
            seen = []
            for runner in (torchrun, ours):
                code, stderr = runner(directory, [*options, *script], extra)
                assert code == 0, stderr
                files = [directory / f"seen.{rank}" for rank in range(2)]
                seen.append([json.loads(file.read_text()) for file in files])
                for file in files:
                    file.unlink()
            results[case] = (seen[0], seen[1])
        return results[case]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
class TestSameView:
    def test_environment(self, both: Callable[[str], tuple[Seen, Seen]], case: str) -> None:
        base = environ(CASES[case][2])
        for theirs, own in zip(*both(case), strict=True):
            added = {name for name, value in theirs["env"].items() if base.get(name) != value} - {"PWD", "_", "SHLVL"}
            assert added - own["env"].keys() == set()
            assert {name: own["env"][name] for name in added - OWN} == {
                name: theirs["env"][name] for name in added - OWN
            }

    def test_run_id(self, both: Callable[[str], tuple[Seen, Seen]], case: str) -> None:
        own = both(case)[1]
        if "--rdzv-id" in CASES[case][0]:  # which torchrun replaces by a random one when there is one host
            assert own[0]["env"]["TORCHELASTIC_RUN_ID"] == "abc"
        assert own[0]["env"]["TORCHELASTIC_RUN_ID"] == own[1]["env"]["TORCHELASTIC_RUN_ID"]

    def test_threads(self, both: Callable[[str], tuple[Seen, Seen]], case: str) -> None:
        theirs, own = both(case)
        given = CASES[case][2].get("OMP_NUM_THREADS")
        cpus = len(os.sched_getaffinity(0))
        for rank in range(2):
            if given:
                assert own[rank]["env"]["OMP_NUM_THREADS"] == theirs[rank]["env"]["OMP_NUM_THREADS"] == given
            else:
                assert 1 <= int(own[rank]["env"]["OMP_NUM_THREADS"]) <= max(1, cpus // 2)

    def test_arguments(self, both: Callable[[str], tuple[Seen, Seen]], case: str) -> None:
        for theirs, own in zip(*both(case), strict=True):
            assert own["argv"] == theirs["argv"]

    def test_interpreter(self, both: Callable[[str], tuple[Seen, Seen]], case: str) -> None:
        names = ("path0", "name", "file", "doc", "package", "cwd", "flags", "executable", "session", "unbuffered")
        for theirs, own in zip(*both(case), strict=True):
            assert {name: own[name] for name in names} == {name: theirs[name] for name in names}

    def test_process(self, both: Callable[[str], tuple[Seen, Seen]], case: str) -> None:
        names = ("stdin", "signals", "umask", "descriptors")
        for theirs, own in zip(*both(case), strict=True):
            assert {name: own[name] for name in names} == {name: theirs[name] for name in names}

    def test_rendezvous(self, both: Callable[[str], tuple[Seen, Seen]], case: str) -> None:
        own = both(case)[1]
        assert own[0]["env"]["MASTER_PORT"] == own[1]["env"]["MASTER_PORT"]
        assert 1024 <= int(own[0]["env"]["MASTER_PORT"]) < 65536
        assert own[0]["env"]["MASTER_ADDR"] in ("127.0.0.1", "localhost")
        # Rank 0 hosts the store: "True" would make every rank a client of nobody.
        assert own[0]["env"]["TORCHELASTIC_USE_AGENT_STORE"] == "False"


def shape(value: Any) -> Any:
    """Keys and types of a JSON value."""
    return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else type(value).__name__


@pytest.mark.slow
def test_error_file_and_summary(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        textwrap.dedent("""
            import os
            from torch.distributed.elastic.multiprocessing.errors import record

            @record
            def main():
                raise ValueError("no such column")

            if __name__ == "__main__":
                main()
        """)
    )
    stderr, errors = [], []
    for runner, log_dir, code in ((torchrun, "theirs", 1), (ours, "ours", 1)):
        found, text = runner(tmp_path, ["--nproc-per-node=1", "--log-dir", log_dir, "train.py"])
        assert found == code, text
        stderr.append(text)
        (file,) = (tmp_path / log_dir).glob("*/attempt_0/0/error.json")
        errors.append(json.loads(file.read_text()))
    theirs, own = errors
    theirs["message"].pop("errorCode", None)  # added by torchrun's parent when it passes the file on
    assert shape(own["message"]) == shape(theirs["message"])
    assert own["message"]["message"] == theirs["message"]["message"] == "ValueError: no such column"
    assert own["message"]["extraInfo"]["py_callstack"].startswith("Traceback (most recent call last)")
    assert "ValueError: no such column" in own["message"]["extraInfo"]["py_callstack"]
    for line in ("train.py FAILED", "Failures:", "Root Cause (first observed failure):"):
        assert all(line in text for text in stderr)
    for field in (
        "  time      : ",
        "  host      : ",
        "  rank      : 0 (local_rank: 0)",
        "  exitcode  : 1 (pid: ",
        "  error_file: ",
    ):
        assert all(field in text for text in stderr), field


def test_error_file_without_record(job: Any) -> None:
    """torchrun writes none for a script without @record; here every Python script has one."""
    job.script("def work():\n    raise KeyError('column')\nwork()")
    assert job.run("train.py") == 1
    error = json.loads(job.rank_file(0, "error.json").read_text())
    assert error["message"]["message"] == "KeyError: 'column'"
    assert error["message"]["extraInfo"]["timestamp"].isdigit()
    assert error["launcher"]["where"] == f"{job.directory}/train.py:2 in work"


@pytest.mark.slow
def test_process_group(job: Any) -> None:
    job.script("""
        import os
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        values = torch.full((3,), float(dist.get_rank() + 1))
        dist.all_reduce(values)
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (os.environ["RANK"], torch.get_num_threads()))
        print("SUM", values.tolist(), [rank for rank, _ in gathered], flush=True)
        dist.destroy_process_group()
    """)
    assert job.run("--nproc-per-node", "2", "train.py", deadline_s=90) == 0, job.output()
    assert job.stdout.count("SUM [3.0, 3.0, 3.0] ['0', '1']") == 2


LOG_SCRIPT = "import sys; print('to out'); print('to err', file=sys.stderr)"


@pytest.mark.slow
@pytest.mark.parametrize("streams", [["-r", "3"], ["--redirects", "3", "--tee", "0:1,1:2"]], ids=" ".join)
def test_log_tree(tmp_path: Path, streams: list[str]) -> None:
    """With redirects, torchrun's files are there with torchrun's content (ours may be more: see --log-dir)."""
    (tmp_path / "train.py").write_text(LOG_SCRIPT)
    trees = []
    for runner, log_dir in ((torchrun, "theirs"), (ours, "ours")):
        code, text = runner(
            tmp_path, ["--nproc-per-node=2", "--rdzv-id=id", "--log-dir", log_dir, *streams, "train.py"]
        )
        assert code == 0, text
        (top,) = (tmp_path / log_dir).iterdir()
        trees.append({str(path.relative_to(top)): path.read_text() for path in top.glob("attempt_0/?/std*.log")})
    assert top.name.startswith("id_")
    assert trees[0] == trees[1]
    assert trees[1]["attempt_0/1/stdout.log"] == "to out\n"


@pytest.mark.parametrize(
    ("options", "console"),
    [
        ([], ["0 out", "0 err", "1 out", "1 err"]),
        (["-r", "3"], []),
        (["-r", "1"], ["0 err", "1 err"]),
        (["-r", "2"], ["0 out", "1 out"]),
        (["-r", "0:3"], ["1 out", "1 err"]),
        (["-r", "3", "-t", "1:1"], ["1 out"]),
        (["-r", "0-1:3", "-t", "0:2"], ["0 err"]),
        (["-t", "3"], ["0 out", "0 err", "1 out", "1 err"]),
        (["--local-ranks-filter", "1"], ["1 out", "1 err"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else None,
)
def test_streams(job: Any, options: list[str], console: list[str]) -> None:
    job.script("""
        import os, sys
        print(os.environ["RANK"], "out")
        print(os.environ["RANK"], "err", file=sys.stderr)
    """)
    assert job.run("-n", "2", "--log-prefix", "", *options, "train.py") == 0, job.output()
    shown = {f"{rank} {name}": getattr(job, f"std{name}") for rank in range(2) for name in ("out", "err")}
    assert [line for line, text in shown.items() if line in text.splitlines()] == console
    for rank in range(2):
        for name in ("out", "err"):
            assert job.rank_file(rank, f"std{name}.log").read_text() == f"{rank} {name}\n"


def test_log_dir_of_dev_null_keeps_none(job: Any) -> None:
    job.script("print('x')")
    assert job.run("--log-dir", "/dev/null", "train.py") == 0, job.output()
    assert "x" in job.stdout
    assert not list(job.directory.rglob("stdout.log"))


def test_prefix_template(job: Any) -> None:
    job.script("print('x')")
    template = "${host}/${role_name}${local_rank}/${rank}:"
    assert job.run("-n", "2", "--role", "trainer", "--log-prefix", template, "train.py") == 0
    assert sorted(job.stdout.splitlines()) == ["algo-1/trainer0/0: x", "algo-1/trainer1/1: x"]


def test_restarts_are_counted(job: Any) -> None:
    job.script("""
        import os, sys
        names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "RANK", "TORCHELASTIC_ERROR_FILE")
        print("SEEN", *(os.environ[name] for name in names), flush=True)
        sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] != "2")
    """)
    assert job.run("-n", "1", "--max-restarts", "3", "--crash-loop-s", "0", "train.py") == 0, job.output()
    lines = [line.split() for line in job.stdout.splitlines() if "SEEN" in line]
    assert [words[1:4] for words in lines] == [["0", "3", "0"], ["1", "3", "0"], ["2", "3", "0"]]
    assert [f"attempt_{count}/0/error.json" in words[4] for count, words in enumerate(lines)] == [True] * 3


def test_macro_in_arguments(job: Any) -> None:
    job.script("import sys; print(*sys.argv[1:])")
    assert (
        job.run("-n", "2", "--log-prefix", "", "train.py", "x${local_rank}", "--a=${local_rank}${local_rank}", "$x")
        == 0
    )
    assert sorted(job.stdout.splitlines()) == ["x0 --a=00 $x", "x1 --a=11 $x"]


def test_macro_in_arguments_of_a_binary(job: Any) -> None:
    assert job.run("-n", "2", "--log-prefix", "", "--no-python", "/bin/echo", "r${local_rank}") == 0
    assert sorted(job.stdout.splitlines()) == ["r0", "r1"]


def test_affinity_and_threads(job: Any) -> None:
    """Every rank has CPUs of its own, and as many threads; the user's number wins, and so does no affinity."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two CPUs")
    job.script("""
        import json, os
        print(json.dumps([sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"]]))
    """)
    assert job.run("-n", "2", "--log-prefix", "", "train.py") == 0
    first, second = (json.loads(line) for line in job.stdout.splitlines())
    assert set(first[0]) | set(second[0]) == allowed
    assert not set(first[0]) & set(second[0])
    assert 1 <= int(first[1]) <= len(allowed) // 2
    assert job.run("-n", "2", "--log-prefix", "", "train.py", env={"OMP_NUM_THREADS": "5"}) == 0
    assert [json.loads(line)[1] for line in job.stdout.splitlines()] == ["5", "5"]
    assert job.run("-n", "2", "--log-prefix", "", "--affinity", "none", "train.py") == 0
    assert [set(json.loads(line)[0]) for line in job.stdout.splitlines()] == [allowed, allowed]


def test_more_ranks_than_cpus(job: Any) -> None:
    count = len(os.sched_getaffinity(0)) + 1
    job.script("import os; print(len(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])")
    assert job.run("-n", str(count), "--log-prefix", "", "train.py") == 0
    assert job.stdout.splitlines() == [f"{count - 1} 1"] * count


def test_variables_of_an_outer_job_are_not_passed_on(job: Any) -> None:
    job.script("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['TORCHELASTIC_ERROR_FILE'])")
    outer = {"RANK": "5", "WORLD_SIZE": "8", "TORCHELASTIC_ERROR_FILE": "/outer/error.json", "LOCAL_RANK": "3"}
    assert job.run("train.py", env=outer) == 0
    assert job.stdout.startswith("0 1 ")
    assert "/outer/" not in job.stdout


def test_taken_port_is_replaced_and_said(job: Any) -> None:
    import socket

    job.script("import os; print('PORT', os.environ['MASTER_PORT'])")
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        port = server.getsockname()[1]
        assert job.run("--master-port", str(port), "train.py") == 0, job.output()
    assert f"PORT {port}\n" not in job.stdout
    assert str(port) in job.stderr
    assert job.run("--master-port", str(port), "--master-addr", "localhost", "train.py") == 0
    assert f"PORT {port}\n" in job.stdout
