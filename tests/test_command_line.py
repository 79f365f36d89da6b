"""The command line: what is the launcher's and what the script's, where a setting comes from, how a mistake reads."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

SHOW = """
    import json, os, sys
    print("SEEN " + json.dumps({"argv": sys.argv, "world": os.environ["WORLD_SIZE"], "name": __name__}), flush=True)
"""


def seen(job: Any) -> dict[str, Any]:
    """What the script of a one-rank job printed."""
    lines = [line for line in job.stdout.splitlines() if line.startswith("SEEN ")]
    assert len(lines) == 1, job.output()
    return json.loads(lines[0][5:])


def setting(job: Any, name: str, *args: str | Path, env: dict[str, str] | None = None) -> tuple[Any, str]:
    """Value and source of a setting, as ``plan`` tells it."""
    assert job.run("plan", "--json", *args, env=env) == 0, job.output()
    found = json.loads(job.stdout)["settings"][name]
    return found["value"], found["source"]


# ---- the script and its arguments


def test_options_before_the_script_are_ours_and_after_it_its_own(job: Any) -> None:
    job.script(SHOW)
    assert job.run("-n", "1", "--max-restarts=2", "train.py", "-n", "7", "--help", "--", "--no-such", "a b", "") == 0
    assert seen(job)["argv"] == ["train.py", "-n", "7", "--help", "--", "--no-such", "a b", ""]
    assert seen(job)["world"] == "1"


def test_run_is_the_default_subcommand(job: Any) -> None:
    job.script(SHOW)
    assert job.run("run", "-n", "1", "train.py", "x") == 0
    assert seen(job)["argv"] == ["train.py", "x"]


def test_two_dashes_end_the_options(job: Any) -> None:
    job.script(SHOW, "-n.py")
    assert job.run("-n", "1", "--", "-n.py", "x") == 0
    assert seen(job)["argv"] == ["-n.py", "x"]


def test_module_in_the_working_directory(job: Any) -> None:
    job.script(SHOW, "tool.py")
    assert job.run("-m", "tool", "--x", "1") == 0
    assert seen(job)["argv"] == [str(job.directory / "tool.py"), "--x", "1"]
    assert seen(job)["name"] == "__main__"


def test_package_with_a_main(job: Any) -> None:
    job.script("VALUE = 4", "kit/__init__.py")
    job.script(
        "from . import VALUE\nfrom kit.sub import deep\nprint('VALUE', VALUE, deep, __package__)", "kit/__main__.py"
    )
    job.script("deep = 'deep'", "kit/sub.py")
    assert job.run("--module", "kit") == 0, job.output()
    assert "VALUE 4 deep kit" in job.stdout


def test_module_that_is_not_there(job: Any) -> None:
    assert job.run("-m", "no_such_module") == 1
    assert "No module named no_such_module" in job.stderr


@pytest.mark.parametrize("executable", [True, False])
@pytest.mark.parametrize("shebang", ["#!/bin/sh\n", ""])
def test_shell_script(job: Any, executable: bool, shebang: str) -> None:
    path = job.directory / "train.sh"
    path.write_text(shebang + 'echo "rank $RANK of $WORLD_SIZE: $0 [$1] [$2]"\n')
    if executable:
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    assert job.run("-n", "1", "train.sh", "a b", "$HOME") == 0, job.output()
    assert "rank 0 of 1: " in job.stdout
    assert "train.sh [a b] [$HOME]" in job.stdout


def test_executable_of_any_name(job: Any) -> None:
    path = job.directory / "tool"
    path.write_text(f"#!{sys.executable}\nimport sys; print('TOOL', sys.argv[1:])\n")
    path.chmod(0o755)
    assert job.run("tool", "x y") == 0, job.output()
    assert "TOOL ['x y']" in job.stdout


def test_no_python_runs_a_binary(job: Any) -> None:
    assert job.run("-n", "2", "--no-python", "/bin/sh", "-c", "echo rank=$RANK; exit 0") == 0
    assert "rank=0" in job.stdout and "rank=1" in job.stdout


def test_no_python_looks_on_the_path(job: Any) -> None:
    assert job.run("--no-python", "sh", "-c", "exit 9") == 9
    assert job.run("--no-python", "no-such-program") == 64
    assert "no-such-program: not found on PATH" in job.stderr


def test_script_elsewhere_keeps_the_working_directory(job: Any) -> None:
    job.script("import os, helper; print(os.getcwd(), helper.X)", "src/train.py")
    job.script("X = 'beside'", "src/helper.py")
    assert job.run("src/train.py") == 0, job.output()
    assert f"{job.directory} beside" in job.stdout


def test_other_interpreter(job: Any) -> None:
    fake = job.directory / "python-wrapper"
    fake.write_text(f'#!/bin/sh\nexport CHOSEN=wrapper\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    job.script("import os; print('CHOSEN', os.environ.get('CHOSEN'))")
    assert job.run("--python", fake, "train.py") == 0, job.output()
    assert "CHOSEN wrapper" in job.stdout
    assert job.run("train.py", env={"PYTHON_EXEC": str(fake)}) == 0, job.output()
    assert "CHOSEN wrapper" in job.stdout


# ---- help


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_short_and_complete(job: Any, word: str) -> None:
    assert job.run(word, own_tree=False) == 0
    lines = job.stdout.splitlines()
    assert len(lines) < 90
    assert max(map(len, lines)) <= 140
    from launcher.options import OPTIONS

    for option in OPTIONS:
        assert "--" + option.name.replace("_", "-") in job.stdout
    assert job.stderr == ""
    assert set(job.directory.iterdir()) == {job.stdout_path, job.stderr_path}


def test_version(job: Any) -> None:
    from launcher import __version__

    assert job.run("--version", own_tree=False) == 0
    assert job.stdout == f"launcher {__version__}\n"


# ---- mistakes: exit 64, one line, with what to do


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (["--max-restart", "1", "train.py"], ["unknown option --max-restart", "did you mean --max-restarts?"]),
        (["--nproc_per_nod=1", "train.py"], ["unknown option --nproc_per_nod", "did you mean --nproc-per-node?"]),
        (["-x", "train.py"], ["unknown option -x", "--help"]),
        (["--max-restarts"], ["--max-restarts", "value"]),
        (["-n"], ["-n", "value"]),
        (["--max-restarts", "many", "train.py"], ["--max-restarts", "max_restarts is 'many'", "a whole number"]),
        (["--max-restarts=-1", "train.py"], ["'-1'", "0 or more"]),
        (["--grace", "soon", "train.py"], ["'soon'", "seconds"]),
        (["--grace", "nan", "train.py"], ["'nan'", "seconds"]),
        (["--early-exit", "never", "train.py"], ["'never'", "wait, abort, ok"]),
        (["--standalone=yes", "train.py"], ["'yes'", "true/True/1"]),
        (["--channel", "nothing", "train.py"], ["NAME=PATH", "'nothing'"]),
        (["-n", "0", "train.py"], ["nproc_per_node", "command line", "'0'", "above 0"]),
        (["-n", "gpu", "train.py"], ["no GPU"]),
        (["--redirects", "5", "train.py"], ["redirects", "'5'"]),
        (["--tee", "7:3", "train.py"], ["tee", "'7'", "0..0"]),
        (["--local-ranks-filter", "4", "train.py"], ["local_ranks_filter", "'4'"]),
        (["--nnodes", "3", "train.py"], ["nnodes is 3", "host list has 1"]),
        (["--stop-timeout", "5", "--stop-reserve", "5", "train.py"], ["stop_reserve", "stop_timeout"]),
        (["--json", "train.py"], ["plan"]),
        ([], ["no script given", "--help"]),
        (["-n", "2"], ["no script given"]),
        (["trian.py"], ["no such script: trian.py"]),
        (["pla"], ["no such script: pla", "did you mean plan?"]),
        (["--config", "none.yaml", "train.py"], ["none.yaml", "No such file"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistake_is_said_in_one_line(job: Any, args: list[str], texts: list[str]) -> None:
    job.script("print('STARTED')")
    env = {"CUDA_VISIBLE_DEVICES": ""}
    assert job.run(*args, env=env) == 64, job.output()
    lines = [line for line in job.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("[launcher] error: "), job.output()
    for text in texts:
        assert text in lines[0]
    assert "Traceback" not in job.stderr
    assert "STARTED" not in job.stdout


def test_value_of_an_option_may_not_be_the_script(job: Any) -> None:
    job.script(SHOW)
    assert job.run("--max-restarts", "train.py") == 64
    assert "train.py" in job.stderr


def test_directory_without_a_main(job: Any) -> None:
    (job.directory / "empty").mkdir()
    assert job.run("empty") == 64
    assert "empty is a directory without a __main__.py" in job.stderr


def test_file_that_cannot_be_executed(job: Any) -> None:
    (job.directory / "tool").write_bytes(b"\x7fELF nonsense")
    (job.directory / "tool").chmod(0o755)
    assert job.run("tool") == 126
    assert "Exec format error" in job.failure


# ---- where a setting comes from


def test_yaml_is_found_by_itself_and_by_option(job: Any) -> None:
    job.script(SHOW)
    job.script("nproc-per-node: 2\nmax_restarts: 4\n", "launcher.yaml")
    job.script("max_restarts: 5\n", "other.yaml")
    assert setting(job, "nproc_per_node", "train.py") == ("2", "launcher.yaml")
    assert setting(job, "max_restarts", "train.py") == (4, "launcher.yaml")
    assert setting(job, "max_restarts", "--config", "other.yaml", "train.py") == (5, "other.yaml")
    assert setting(job, "max_restarts", "train.py", env={"LAUNCHER_CONFIG": "other.yaml"}) == (5, "other.yaml")
    assert setting(job, "nproc_per_node", "--config", "other.yaml", "train.py")[1] == "default"


def test_yaml_is_used_by_the_run(job: Any) -> None:
    job.script(SHOW)
    job.script("nproc_per_node: 1\nlog-prefix: '<${rank}>'\n", "launcher.yaml")
    assert job.run("train.py") == 0
    assert job.stdout.startswith("<0> SEEN")


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("max_restrats: 1", ["unknown setting 'max_restrats'", "did you mean max_restarts?"]),
        ("max-restarts: many", ["max_restarts is 'many'", "a whole number"]),
        ("max_restarts: [1]", ["max_restarts is [1]", "a whole number"]),
        ("max_restarts: true", ["max_restarts is True", "a whole number"]),
        ("log_dir: {a: 1}", ["log_dir", "a single value"]),
        ("standalone: maybe", ["standalone is 'maybe'", "true/True/1"]),
        ("- a\n- b", ["found a list", "mapping"]),
        ("just text", ["found a str", "mapping"]),
        ("a: b: c", ["not YAML"]),
    ],
)
def test_yaml_mistakes(job: Any, content: str, texts: list[str]) -> None:
    job.script(SHOW)
    (job.directory / "launcher.yaml").write_text(content)
    assert job.run("train.py") == 64, job.output()
    for text in ["launcher.yaml", *texts]:
        assert text in job.stderr
    assert "Traceback" not in job.stderr


@pytest.mark.parametrize("content", ["", "# nothing\n", "early_exit: ok\nfollow_parent: off\nstandalone: true\n"])
def test_yaml_that_is_fine(job: Any, content: str) -> None:
    job.script(SHOW)
    (job.directory / "launcher.yaml").write_text(content)
    assert job.run("train.py") == 0, job.output()


def test_yaml_channels(job: Any) -> None:
    job.script("import os; print(sorted(os.listdir(os.environ['SM_CHANNEL_TRAINING'])))")
    job.script("rows", "data/rows.csv")
    job.script("channel:\n  training: data\n", "launcher.yaml")
    assert job.run("train.py") == 0, job.output()
    assert "['rows.csv']" in job.stdout


def test_precedence_of_all_sources(job: Any) -> None:
    """Each source in turn, the strongest taken away each time."""
    job.script(SHOW)
    job.script("nproc_per_node: 7\n", "launcher.yaml")
    job.tree(hyperparameters={"sagemaker_mpi_num_of_processes_per_host": 6})
    env = {"LAUNCHER_NPROC_PER_NODE": "4", "PET_NPROC_PER_NODE": "5"}
    name = "nproc_per_node"
    assert setting(job, name, "-n", "3", "train.py", env=env) == ("3", "command line")
    assert setting(job, name, "train.py", env=env) == ("4", "environment LAUNCHER_NPROC_PER_NODE")
    del env["LAUNCHER_NPROC_PER_NODE"]
    assert setting(job, name, "train.py", env=env) == ("5", "environment PET_NPROC_PER_NODE")
    reserved = "hyperparameter sagemaker_mpi_num_of_processes_per_host"
    assert setting(job, name, "train.py") == ("6", reserved)
    job.tree()
    assert setting(job, name, "train.py") == ("7", "launcher.yaml")
    (job.directory / "launcher.yaml").unlink()
    assert setting(job, name, "train.py") == ("auto", "default")


def test_bad_value_names_its_source(job: Any) -> None:
    job.script(SHOW)
    assert job.run("train.py", env={"LAUNCHER_MAX_RESTARTS": "x"}) == 64
    assert "environment LAUNCHER_MAX_RESTARTS: max_restarts is 'x'" in job.stderr
    assert job.run("train.py", env={"PET_STANDALONE": "2"}) == 64
    assert "environment PET_STANDALONE: standalone is '2'" in job.stderr


def test_unknown_variable_of_ours_is_named(job: Any) -> None:
    """`LAUNCHER_MAX_RESTRATS=1` would otherwise be ignored without a word, which the YAML file does not do."""
    job.script(SHOW)
    job.run("train.py", env={"LAUNCHER_MAX_RESTRATS": "1"})
    assert "LAUNCHER_MAX_RESTRATS" in job.stderr, "not even a line that says it is unknown"


def test_options_of_torchrun_without_effect_are_said(job: Any) -> None:
    job.script(SHOW)
    arguments = (
        "--rdzv-backend",
        "c10d",
        "--rdzv_endpoint=localhost:0",
        "--monitor-interval",
        "5",
        "--start-method=spawn",
    )
    assert job.run("--nnodes=1", "--node-rank=0", *arguments, "train.py", "x") == 0, job.output()
    assert seen(job)["argv"] == ["train.py", "x"]
    for option in ("--rdzv-backend", "--rdzv-endpoint", "--monitor-interval", "--start-method"):
        assert sum(f"{option} has no effect" in line for line in job.stderr.splitlines()) == 1


def test_torchruns_spellings(job: Any) -> None:
    job.script(SHOW)
    assert job.run("--nproc_per_node=1", "--max_restarts=1", "--log_dir", "logs", "-r", "0", "-t", "0", "train.py") == 0
    assert list(job.directory.glob("logs/*/attempt_0/0/stdout.log"))


# ---- where the job tree is


def test_sagemaker_base_dir_is_the_tree(job: Any) -> None:
    job.tree(hyperparameters={"rate": 0.5})
    job.script("import os; print(os.environ['SM_HP_RATE'], os.environ['SM_MODEL_DIR'])")
    assert job.run("train.py", own_tree=False, env={"SAGEMAKER_BASE_DIR": str(job.base)}) == 0, job.output()
    assert f"0.5 {job.base}/model" in job.stdout
    assert (job.base / "output" / "success").exists()
    assert "job tree" not in job.stderr


def test_made_tree_is_named(job: Any) -> None:
    job.script("import os; print(os.environ['SM_MODEL_DIR'], os.path.isdir(os.environ['SM_MODEL_DIR']))")
    assert job.run("--job-dir", "here", "train.py", own_tree=False) == 0
    assert f"[launcher] job tree: {job.directory / 'here'}\n" in job.stderr
    assert f"{job.directory}/here/model True" in job.stdout
    if not os.path.exists("/opt/ml/input/config"):
        assert job.run("train.py", own_tree=False) == 0
        (made,) = (job.directory / "launcher_runs").iterdir()
        assert f"[launcher] job tree: {made}\n" in job.stderr


def test_channel_and_base_directory_exclude_each_other(job: Any) -> None:
    job.tree()
    job.script(SHOW)
    assert job.run("--channel", "a=.", "train.py") == 64
    assert "--channel" in job.stderr and str(job.base) in job.stderr


def test_channel_that_is_not_there(job: Any) -> None:
    job.script(SHOW)
    assert job.run("--channel", "training=nowhere", "train.py") == 64
    assert "channel 'training'" in job.stderr and "nowhere" in job.stderr


def test_run_directory_that_cannot_be_made(job: Any) -> None:
    job.script(SHOW)
    (job.directory / "file").write_text("")
    assert job.run("--log-dir", "file/logs", "train.py") == 74
    assert "--log-dir" in job.stderr and "Traceback" not in job.stderr
