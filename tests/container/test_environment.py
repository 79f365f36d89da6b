"""What is ours in the script's environment, and what may be logged of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from launcher.container import (
    check_lengths,
    mask_args,
    mask_secrets,
    mask_text,
    mask_value,
    read,
    sm_environment,
    to_args,
)
from launcher.errors import UsageError

HOSTS = {"current_host": "b", "hosts": ["a", "b"]}


def test_sdk_v3_variables(tree: Any) -> None:
    base = str(tree(HOSTS, hyperparameters={"sagemaker_program": "t.py"}))
    found = sm_environment(read(base, {}), num_cpus=3, num_gpus=2, num_neurons=1, master_port=7777)
    expected = {
        "SM_MASTER_ADDR": "a",
        "SM_MASTER_PORT": "7777",
        "SM_HOST_COUNT": "2",
        "SM_CURRENT_HOST_RANK": "1",
        "SM_INPUT_DATA_DIR": f"{base}/input/data",
        "SM_OUTPUT_FAILURE": f"{base}/output/failure",
        "SM_SOURCE_DIR": f"{base}/code",
        "SM_ENTRY_SCRIPT": "t.py",
        "SM_NUM_CPUS": "3",
        "SM_NUM_GPUS": "2",
        "SM_NUM_NEURONS": "1",
    }
    assert {name: found[name] for name in expected} == expected


def test_launchers_secret_is_not_for_the_script(tree: Any) -> None:
    hyperparameters = {"sagemaker_launcher_secret": "8c1f", "sagemaker_other": "told"}
    found = sm_environment(read(str(tree(HOSTS, hyperparameters=hyperparameters)), {}), num_cpus=1)
    assert "told" in found["SM_FRAMEWORK_PARAMS"]
    assert not [name for name, value in found.items() if "8c1f" in value]


def test_entry_point_of_the_command_line_wins(tree: Any) -> None:
    container = read(str(tree(HOSTS, hyperparameters={"sagemaker_program": "t.py"})), {})
    found = sm_environment(container, num_cpus=1, user_entry_point="dir/other.py")
    assert (found["SM_USER_ENTRY_POINT"], found["SM_MODULE_NAME"]) == ("dir/other.py", "dir/other")
    assert json.loads(found["SM_TRAINING_ENV"])["user_entry_point"] == "dir/other.py"


@pytest.mark.parametrize(
    ("environ", "region"),
    [
        ({}, ""),
        ({"AWS_REGION": "x"}, "x"),
        ({"AWS_REGION": "x", "AWS_DEFAULT_REGION": "y"}, "y"),
        ({"SAGEMAKER_REGION": "z"}, "z"),
    ],
)
def test_region(tree: Any, environ: dict[str, str], region: str) -> None:
    assert sm_environment(read(str(tree(HOSTS)), environ), num_cpus=1)["SAGEMAKER_REGION"] == region


def test_a_hyperparameter_wins_over_an_alias(tree: Any) -> None:
    for values in ({"a-b": "1", "a_b": "2"}, {"a_b": "2", "a-b": "1"}):
        found = sm_environment(read(str(tree(HOSTS, hyperparameters=values)), {}), num_cpus=1)
        assert (found["SM_HP_A-B"], found["SM_HP_A_B"]) == ("1", "2")


def test_a_shell_passes_the_alias_on_to_its_children(tree: Any) -> None:
    container = read(str(tree(HOSTS, hyperparameters={"batch-size": "64"})), {})
    environ = {"PATH": os.defpath, **sm_environment(container, num_cpus=1)}
    done = subprocess.run(
        ["/bin/sh", "-c", 'echo "$SM_HP_BATCH_SIZE"; env'], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("64\n")
    assert "SM_HP_BATCH_SIZE=64\n" in done.stdout


def test_every_value_survives_a_process_start(tree: Any) -> None:
    values = {"text": "a b; $(ls) `x` 'q' \"d\" \\ \n é 東", "list": '["x", "y"]', "": "v", "x": "-1", "none": "null"}
    container = read(str(tree(HOSTS, hyperparameters=values)), {})
    program = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], sys.stdout)"
    environ = sm_environment(container, num_cpus=1)
    command = [sys.executable, "-X", "utf8", "-c", program, *to_args(container.user)]
    done = subprocess.run(command, env=environ, capture_output=True, check=True)
    argv, seen = json.loads(done.stdout)
    assert argv == to_args(container.user)
    assert argv[:2] == ["", "v"]
    assert {name: seen.get(name) for name in environ} == environ


def test_too_long_for_the_kernel() -> None:
    longest = {"N": "x" * (131_071 - 2)}
    check_lengths(longest)
    subprocess.run(["/bin/true"], env=longest, check=True)
    with pytest.raises(UsageError, match=r"SM_HPS is 131072 bytes long; Linux takes at most 131071"):
        check_lengths({"SM_HPS": "x" * (131_072 - 7)})
    with pytest.raises(OSError, match="Argument list too long"):
        subprocess.run(["/bin/true"], env={"SM_HPS": "x" * (131_072 - 7)}, check=True)


HIDDEN = "hunter2"


def test_secrets_are_hidden_everywhere_in_an_environment(tree: Any) -> None:
    values = {
        "api-key": HIDDEN,
        "lr": "0.1",
        "nested": json.dumps({"a": [{"db_password": HIDDEN}], "ok": "shown"}),
        "listed": json.dumps([["x"], {"secret": HIDDEN}]),
        "sagemaker_hf_token": HIDDEN,
        "credentials": json.dumps({"user": HIDDEN, "more": [HIDDEN]}),
        "url": f"https://user:{HIDDEN}@host/path",
        "in_text": json.dumps(json.dumps({"token": HIDDEN})),
    }
    environ = sm_environment(read(str(tree(HOSTS, hyperparameters=values)), {}), num_cpus=1)
    environ["AWS_SECRET_ACCESS_KEY"] = HIDDEN
    environ["PIP_INDEX_URL"] = f"https://aws:{HIDDEN}@host/simple/"
    assert sum(HIDDEN in value for value in environ.values()) > 10
    masked = mask_secrets(environ)
    assert [name for name, value in masked.items() if HIDDEN in value] == []
    assert list(masked) == list(environ)
    assert json.loads(masked["SM_HPS"])["lr"] == 0.1
    assert json.loads(masked["SM_HPS"])["nested"] == {"a": [{"db_password": "******"}], "ok": "shown"}
    assert json.loads(masked["SM_TRAINING_ENV"])["hyperparameters"]["api-key"] == "******"
    assert masked["PIP_INDEX_URL"] == "https://aws:******@host/simple/"
    assert masked["SM_HOSTS"] == environ["SM_HOSTS"]


@pytest.mark.parametrize(
    ("args", "masked"),
    [
        (["--api-key", "x", "--lr", "1"], ["--api-key", "******", "--lr", "1"]),
        (["--api-key=x", "1"], ["--api-key=******", "1"]),
        (["--password", "-odd"], ["--password", "******"]),
        (["--token", "--lr"], ["--token", "******"]),
        (["--config", "db_password=x,lr=1"], ["--config", "db_password=******,lr=1"]),
        (["--l", "[{'secret': 'x y'}]"], ["--l", "[{'secret': '******'}]"]),
        (["--author", "me"], ["--author", "me"]),
        (["--secret", ""], ["--secret", ""]),
    ],
)
def test_arguments_for_the_log(args: list[str], masked: list[str]) -> None:
    assert mask_args(args) == masked


def test_masking_leaves_the_rest_alone() -> None:
    same = {"PATH": "/bin:/usr/bin", "JSON": '{"a": [1, 2],  "b": "x"}', "SSH_AUTH_SOCK": "/tmp/s", "EMPTY_KEY": ""}
    assert mask_secrets(same) == same
    assert mask_text("{not json, key='a b'}") == "{not json, key='******'}"
    assert mask_value("lr", 0.5) == 0.5
    # In linear time: this takes minutes if every position of a long word is tried as the start of a name.
    assert mask_text("x" * 300_000) == "x" * 300_000
    assert mask_value("tokens", [1, "a"]) == ["******", "******"]
