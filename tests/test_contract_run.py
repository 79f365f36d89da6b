"""Whole jobs under the container contract: `train` in a full job tree, and what it leaves behind."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

SHOW = """
    import json, os, sys
    seen = {"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd(), "path": sys.path}
    print("SEEN " + json.dumps(seen), flush=True)
"""


def seen(job: Any) -> dict[str, Any]:
    lines = [line for line in job.stdout.splitlines() if "SEEN " in line]
    assert len(lines) == 1, job.output()
    return json.loads(lines[0].partition("SEEN ")[2])


def code(job: Any, text: str, name: str = "train.py") -> Path:
    """A file of the user's code in the job tree."""
    return job.script(text, f"opt-ml/code/{name}")


@pytest.fixture
def fake_python(job: Any) -> Path:
    """An interpreter that records how pip is called instead of calling it (FAKE_PIP_CODE: and how pip ends)."""
    path = job.directory / "fake-python"
    path.write_text(
        f"""#!{sys.executable}
import json, os, sys
if sys.argv[1:3] == ["-m", "pip"]:
    with open({str(job.directory / "pip-calls")!r}, "a") as file:
        json.dump({{"argv": sys.argv[3:], "cwd": os.getcwd()}}, file)
        file.write("\\n")
    print("Collecting things")
    print("ERROR: No matching distribution found for it", file=sys.stderr)
    sys.exit(int(os.environ.get("FAKE_PIP_CODE", "0")))
os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
"""
    )
    path.chmod(0o755)
    return path


def pip_calls(job: Any) -> list[dict[str, Any]]:
    path = job.directory / "pip-calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- the entry point


def test_program_by_hyperparameter(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py", "epochs": 3, "batch-size": 64, "layers": [1, 2], "name": "a b"})
    code(job, SHOW)
    assert job.run("train") == 0, job.output()
    found = seen(job)
    assert found["argv"] == ["train.py", "--batch-size", "64", "--epochs", "3", "--layers", "[1, 2]", "--name", "a b"]
    assert found["cwd"] == os.path.realpath(job.base / "code")
    assert found["path"][0] == os.path.realpath(job.base / "code")


def test_program_by_environment_wins(job: Any) -> None:
    job.tree({"sagemaker_program": "other.py"})
    code(job, "print('OTHER')", "other.py")
    code(job, "print('CHOSEN')", "chosen.py")
    assert job.run("train", env={"SAGEMAKER_PROGRAM": "chosen.py"}) == 0, job.output()
    assert "CHOSEN" in job.stdout and "OTHER" not in job.stdout


def test_arguments_arrive_exactly(job: Any) -> None:
    """No shell sees them: quotes, spaces, dollars and semicolons are data."""
    values = {
        "a": "x; echo INJECTED",
        "b": "$HOME `id`",
        "c": None,
        "d": True,
        "e": 1e-3,
        "f": {"k": 1, "a": "b"},
        "g": ["x", "y"],
        "unicode": "ä→",
        "empty": "",
        "big": 2**70,
    }
    job.tree({"sagemaker_program": "train.py", **values})
    code(job, SHOW)
    assert job.run("train") == 0, job.output()
    argv = seen(job)["argv"]
    pairs = dict(zip(argv[1::2], argv[2::2], strict=True))
    assert pairs == {
        "-a": "x; echo INJECTED",
        "-b": "$HOME `id`",
        "-c": "",
        "-d": "True",
        "-e": "0.001",
        "-f": "a=b,k=1",
        "-g": "['x', 'y']",
        "--unicode": "ä→",
        "--empty": "",
        "--big": str(2**70),
    }
    assert argv[1::2] == sorted(argv[1::2], key=lambda word: word.lstrip("-"))


def test_bare_strings_are_taken_as_they_are(job: Any) -> None:
    job.tree()
    (job.base / "input/config/hyperparameters.json").write_text(
        json.dumps({"sagemaker_program": "train.py", "optimizer": "SGD", "lr": "0.1", "quoted": '"Adam"'})
    )
    code(job, SHOW)
    assert job.run("train") == 0, job.output()
    assert seen(job)["argv"][1:] == ["--lr", "0.1", "--optimizer", "SGD", "--quoted", "Adam"]


def test_environment_of_the_contract(job: Any) -> None:
    job.tree(
        {"sagemaker_program": "train.py", "batch-size": 64, "rate": 0.5},
        channels={"training": {"TrainingInputMode": "File"}, "test-set": {"TrainingInputMode": "File"}},
    )
    code(job, SHOW)
    assert job.run("train", "-n", "1") == 0, job.output()
    env = seen(job)["env"]
    base = str(job.base)
    expected = {
        "SM_HPS": '{"batch-size":64,"rate":0.5}',
        "SM_HP_BATCH-SIZE": "64",
        "SM_HP_BATCH_SIZE": "64",
        "SM_HP_RATE": "0.5",
        "SM_USER_ARGS": '["--batch-size","64","--rate","0.5"]',
        "SM_CHANNELS": '["test-set","training"]',
        "SM_CHANNEL_TRAINING": f"{base}/input/data/training",
        "SM_CHANNEL_TEST-SET": f"{base}/input/data/test-set",
        "SM_CHANNEL_TEST_SET": f"{base}/input/data/test-set",
        "SM_HOSTS": '["algo-1"]',
        "SM_CURRENT_HOST": "algo-1",
        "SM_MODEL_DIR": f"{base}/model",
        "SM_OUTPUT_DATA_DIR": f"{base}/output/data",
        "SM_USER_ENTRY_POINT": "train.py",
        "SM_MODULE_NAME": "train",
        "SM_NETWORK_INTERFACE_NAME": "lo",
    }
    assert {name: env.get(name) for name in expected} == expected
    assert json.loads(env["SM_TRAINING_ENV"])["hyperparameters"] == {"batch-size": 64, "rate": 0.5}


def test_ranks_per_host_by_hyperparameter(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py", "sagemaker_mpi_num_of_processes_per_host": 2})
    code(job, "import os; print('WORLD', os.environ['WORLD_SIZE'])")
    assert job.run("train") == 0, job.output()
    assert job.stdout.count("WORLD 2") == 2


def test_shell_entry_point(job: Any) -> None:
    job.tree({"sagemaker_program": "train.sh", "name": "a b"})
    code(job, 'echo "SH [$1] [$2] $SM_HP_NAME $PWD $RANK"; exit 4\n', "train.sh")
    assert job.run("train") == 4, job.output()
    assert f"SH [--name] [a b] a b {job.base}/code 0" in job.stdout


def test_framework_module(job: Any) -> None:
    job.tree({"rate": 2})
    code(job, "import sys\ndef main():\n    print('FRAMEWORK', sys.argv[1:], __name__)\n", "toolkit.py")
    env = {"SAGEMAKER_TRAINING_MODULE": "toolkit:main", "PYTHONPATH": str(job.base / "code")}
    assert job.run("train", env=env) == 0, job.output()
    assert "FRAMEWORK" in job.stdout


def test_framework_module_that_fails(job: Any) -> None:
    job.tree()
    code(job, "def main():\n    raise ValueError('of the toolkit')\n", "toolkit.py")
    env = {"SAGEMAKER_TRAINING_MODULE": "toolkit:main", "PYTHONPATH": str(job.base / "code")}
    assert job.run("train", env=env) == 1, job.output()
    assert "ValueError: of the toolkit" in job.failure


def test_no_entry_point(job: Any) -> None:
    job.tree()
    assert job.run("train") == 65
    assert "SAGEMAKER_PROGRAM" in job.failure and "sagemaker_program" in job.failure


def test_entry_point_that_is_not_there(job: Any) -> None:
    job.tree({"sagemaker_program": "missing.py"})
    code(job, "", "train.py")
    assert job.run("train") == 65
    assert "missing.py" in job.failure and "train.py" in job.failure


def test_entry_point_outside_of_the_code(job: Any) -> None:
    job.tree({"sagemaker_program": "../../outside.py"})
    job.script("print('RAN')", "outside.py")
    assert job.run("train") == 65
    assert "a path inside" in job.failure and "RAN" not in job.stdout


def test_train_takes_no_script(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py"})
    assert job.run("train", "x.py") == 64
    assert "train takes no script" in job.stderr


def test_code_is_fetched_from_a_directory(job: Any) -> None:
    job.script(SHOW, "source/train.py")
    job.tree({"sagemaker_program": "train.py", "sagemaker_submit_directory": str(job.directory / "source")})
    assert job.run("train") == 0, job.output()
    assert seen(job)["env"]["SM_MODULE_DIR"] == str(job.directory / "source")


TRAIN = Path(sys.executable).parent / "train"


@pytest.mark.skipif(not TRAIN.exists(), reason="the package is not installed beside the interpreter")
def test_console_script(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py"})
    code(job, SHOW)
    assert job.run(command=(TRAIN,), own_tree=False, env={"SAGEMAKER_BASE_DIR": str(job.base)}) == 0, job.output()
    assert seen(job)["argv"] == ["train.py"]


# ---- requirements and packages


def test_requirements_are_installed_first(job: Any, fake_python: Path) -> None:
    job.tree({"sagemaker_program": "train.py"})
    code(job, "from pathlib import Path; print('CALLS', Path('../../pip-calls').exists())")
    code(job, "some-package==1\n", "requirements.txt")
    assert job.run("train", "--python", fake_python) == 0, job.output()
    assert pip_calls(job) == [
        {"argv": ["install", "-r", "requirements.txt"], "cwd": os.path.realpath(job.base / "code")}
    ]
    assert "CALLS True" in job.stdout
    assert "Collecting things" in job.stdout + job.stderr


def test_requirements_of_a_shell_script(job: Any, fake_python: Path) -> None:
    job.tree({"sagemaker_program": "train.sh"})
    code(job, "echo SH", "train.sh")
    code(job, "some-package\n", "requirements.txt")
    assert job.run("train", "--python", fake_python) == 0, job.output()
    assert len(pip_calls(job)) == 1


def test_package_is_installed_and_run_as_a_module(job: Any, fake_python: Path) -> None:
    job.tree({"sagemaker_program": "kit/main.py", "x": 1})
    code(job, "from setuptools import setup; setup(name='kit')", "setup.py")
    code(job, "", "kit/__init__.py")
    code(job, SHOW, "kit/main.py")
    assert job.run("train", "--python", fake_python) == 0, job.output()
    assert [call["argv"] for call in pip_calls(job)] == [["install", "."]]
    assert seen(job)["argv"][1:] == ["-x", "1"]


def test_pip_that_fails(job: Any, fake_python: Path) -> None:
    job.tree({"sagemaker_program": "train.py"})
    code(job, "print('RAN')")
    code(job, "some-package\n", "requirements.txt")
    assert job.run("train", "--python", fake_python, env={"FAKE_PIP_CODE": "2"}) == 1
    assert "InstallRequirementsError" in job.failure
    assert "No matching distribution found for it" in job.failure[:1024]
    assert "RAN" not in job.stdout


def test_empty_requirements_with_the_real_pip(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py"})
    code(job, SHOW)
    code(job, "# nothing\n", "requirements.txt")
    assert job.run("train", env={"PIP_NO_INDEX": "1"}) == 0, job.output()


@pytest.mark.slow
def test_local_package_with_the_real_pip(job: Any) -> None:
    """Installed into a folder of this test: PIP_TARGET is pip's own variable for --target."""
    job.tree({"sagemaker_program": "train.py"})
    code(job, "from setuptools import setup; setup(name='kit_of_a_test', py_modules=['kit_of_a_test'])", "lib/setup.py")
    code(job, "WORD = 'from the package'", "lib/kit_of_a_test.py")
    code(job, "./lib\n", "requirements.txt")
    code(job, "import kit_of_a_test; print(kit_of_a_test.WORD, kit_of_a_test.__file__)")
    target = str(job.directory / "site")
    env = {
        "PIP_TARGET": target,
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the other way round: no isolation, so nothing is fetched
        "PYTHONPATH": target,
    }
    assert job.run("train", env=env) == 0, job.output()
    assert f"from the package {target}" in job.stdout


# ---- how it ended


def test_success_leaves_its_mark_and_removes_older_ones(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py"})
    code(job, "import os; print('LEFT', os.path.exists('../output/failure'))")
    for name in ("failure", "failure.json", "success"):
        (job.base / "output" / name).write_text("of an earlier run")
    assert job.run("train") == 0
    assert "LEFT False" in job.stdout
    assert (job.base / "output" / "success").read_text() == ""
    assert not (job.base / "output" / "failure").exists()
    assert not (job.base / "output" / "failure.json").exists()


@pytest.mark.parametrize(
    ("body", "exit_code", "text"),
    [
        ("raise ValueError('no such column: age')", 1, "ValueError: no such column: age"),
        ("import sys; sys.exit(3)", 3, "exited with code 3"),
        ("import sys; sys.exit('gave up')", 1, "gave up"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 139, "SIGSEGV"),
        ("import os; os.abort()", 134, "SIGABRT"),
        ("import os; os._exit(77)", 77, "77"),
        ("def f(:", 1, "SyntaxError"),
    ],
)
def test_failure_keeps_the_code_and_tells_the_cause(job: Any, body: str, exit_code: int, text: str) -> None:
    job.tree({"sagemaker_program": "train.py"})
    code(job, body)
    (job.base / "output" / "success").write_text("")
    assert job.run("train") == exit_code, job.output()
    assert text in job.failure[:1024]
    assert "rank 0 on algo-1" in job.failure.splitlines()[0]
    assert job.failure_json["detail"]["exit_code"] == exit_code
    assert job.failure_json["message"] == job.failure
    assert not (job.base / "output" / "success").exists()


def test_text_of_the_user_wins(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py"})
    code(job, "open('../output/failure', 'w').write('my own words'); raise ValueError('other words')")
    assert job.run("train") == 1
    assert job.failure == "my own words"
    assert job.failure_json["user_message"] == "my own words"
    assert "other words" in job.failure_json["message"]
    assert "my own" in job.stderr or "written by the script itself" in job.stderr


def test_stale_text_does_not_win(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py"})
    (job.base / "output" / "failure").write_text("of an earlier run")
    code(job, "raise ValueError('of this run')")
    assert job.run("train") == 1
    assert "of this run" in job.failure and "earlier" not in job.failure


def test_text_of_a_user_who_succeeds_is_kept(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py"})
    code(job, "open('../output/failure', 'w').write('only a note')")
    assert job.run("train") == 0
    assert job.failure == "only a note"


# ---- row 35: what the platform's files may get wrong


GOOD = {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]}


@pytest.mark.parametrize(
    ("content", "field", "texts"),
    [
        ({"hosts": ["algo-1"]}, "current_host", ["nothing"]),
        ({"current_host": "algo-1"}, "hosts", ["nothing"]),
        ({**GOOD, "hosts": "algo-1"}, "hosts", ['"algo-1"']),
        ({**GOOD, "hosts": []}, "hosts", ["[]"]),
        ({**GOOD, "hosts": ["algo-1", 2]}, "hosts[1]", ["2"]),
        ({**GOOD, "current_host": "algo-3"}, "current_host", ['"algo-3"', "algo-2"]),
        ({**GOOD, "hosts": ["algo-1", "algo-1"]}, "hosts[1]", ['"algo-1"']),
        (
            {**GOOD, "instance_groups": [{"instance_group_name": "g", "hosts": ["algo-9"]}]},
            "instance_groups[0].hosts[0]",
            ['"algo-9"'],
        ),
        (
            {
                **GOOD,
                "current_group_name": "b",
                "instance_groups": [{"instance_group_name": "a", "hosts": ["algo-1", "algo-2"]}],
            },
            "current_group_name",
            ['"b"', '"a"'],
        ),
        (
            {
                **GOOD,
                "instance_groups": [
                    {"instance_group_name": "a", "hosts": ["algo-1"]},
                    {"instance_group_name": "a", "hosts": ["algo-2"]},
                ],
            },
            "instance_groups[1].instance_group_name",
            ["second time"],
        ),
        ('{"current_host": "algo-1", }', "", ["not JSON", "line 1"]),
        ("[]", "", ["[]"]),
        ('{"current_host": "a", "current_host": "b", "hosts": ["a"]}', "current_host", ["twice"]),
        (None, "", ["no such file"]),
    ],
)
def test_bad_host_list(job: Any, content: Any, field: str, texts: list[str]) -> None:
    job.tree({"sagemaker_program": "train.py"})
    code(job, "print('STARTED')")
    path = job.base / "input/config/resourceconfig.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert job.run("train") == 65, job.output()
    first = job.failure.splitlines()[0]
    assert first.startswith(f"ContractError: {path}: ")
    if field:
        assert f"field {field!r}" in first
    for text in texts:
        assert text in first
    assert job.failure_json["detail"]["file"] == str(path)
    assert job.failure_json["detail"]["field"] == field
    assert job.failure_json["detail"]["exit_code"] == 65
    assert f"[launcher] error: {path}" in job.stderr
    assert "STARTED" not in job.stdout
    assert not list(job.directory.glob("**/attempt_0"))


@pytest.mark.parametrize("name", ["hyperparameters.json", "inputdataconfig.json"])
def test_bad_other_files(job: Any, name: str) -> None:
    job.tree({"sagemaker_program": "train.py"})
    path = job.base / "input/config" / name
    path.write_text("{'single': 'quotes'}")
    assert job.run("train") == 65
    assert str(path) in job.failure and "not JSON" in job.failure


def test_extra_fields_are_no_error(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py"}, resources={"current_host": "a", "hosts": ["a"], "added_later": [1]})
    code(job, SHOW)
    assert job.run("train") == 0, job.output()


@pytest.mark.parametrize("beginning", ["", '{"current_host": "algo-1", "hos'])
def test_file_that_is_completed_a_little_later(job: Any, beginning: str) -> None:
    """The launcher reads the cut file, keeps looking, and takes the whole one."""
    job.tree({"sagemaker_program": "train.py"})
    code(job, SHOW)
    path = job.base / "input/config/resourceconfig.json"
    path.unlink()
    os.mkfifo(path)  # the first read waits for a writer: so it is known to have seen the cut text

    def complete() -> None:
        whole = path.with_suffix(".whole")
        whole.write_text(json.dumps({"current_host": "algo-1", "hosts": ["algo-1"]}))
        with open(path, "w") as pipe:
            os.replace(whole, path)
            pipe.write(beginning)

    writer = threading.Thread(target=complete)
    writer.start()
    try:
        assert job.run("train") == 0, job.output()
    finally:
        if not path.is_file():  # the launcher never opened it: let the writer go
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        writer.join()
    assert seen(job)["env"]["SM_HOSTS"] == '["algo-1"]'


def test_file_that_stays_empty(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py"})
    (job.base / "input/config/resourceconfig.json").write_text("")
    assert job.run("train") == 65
    assert "an empty file" in job.failure
