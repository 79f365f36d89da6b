"""Regenerate ``golden/*.json``: what sagemaker-training 5.1.4 sets and passes for a list of job trees.

How the committed files were made, on Linux with CPython 3.11 and no NVIDIA or Neuron tools installed::

    python -m venv reference && reference/bin/pip install sagemaker-training==5.1.4
    reference/bin/python tests/container/regenerate_golden.py

Each case is a set of ``input/config`` files (kept as text, so that key order and spelling survive) and an
environment. The reference reads its base directory at import, hence one interpreter per case. What it answers
is recorded as facts: the variables of ``Environment.to_env_vars()``, the three it sets while it is constructed,
and the list of ``to_cmd_args()``. The temporary base directory is written as ``{BASE}``. ``probes`` holds what
the reference found on the machine (processors, devices, tools), which the tests hand to our function.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from importlib import metadata

GOLDEN = pathlib.Path(__file__).parent / "golden"
VERSION = "5.1.4"

ONE_HOST = {
    "current_group_name": "homogeneousCluster",
    "current_host": "algo-1",
    "current_instance_type": "ml.m5.xlarge",
    "hosts": ["algo-1"],
    "instance_groups": [
        {"hosts": ["algo-1"], "instance_group_name": "homogeneousCluster", "instance_type": "ml.m5.xlarge"}
    ],
    "network_interface_name": "eth0",
}
TWO_HOSTS = {
    **ONE_HOST,
    "current_host": "algo-2",
    "hosts": ["algo-1", "algo-2"],
    "instance_groups": [
        {"hosts": ["algo-1", "algo-2"], "instance_group_name": "homogeneousCluster", "instance_type": "ml.m5.xlarge"}
    ],
}
MIXED_GROUPS = {
    "current_group_name": "gpu",
    "current_host": "algo-3",
    "current_instance_type": "ml.p4d.24xlarge",
    "hosts": ["algo-1", "algo-2", "algo-3", "algo-10"],
    "instance_groups": [
        {"hosts": ["algo-1", "algo-2"], "instance_group_name": "cpu", "instance_type": "ml.c5.xlarge"},
        {"hosts": ["algo-3", "algo-10"], "instance_group_name": "gpu", "instance_type": "ml.p4d.24xlarge", "x": 1},
    ],
    "network_interface_name": "eth0",
}
TRAIN = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
TWO_CHANNELS = {"validation": {**TRAIN, "ContentType": "text/csv"}, "train": TRAIN}
PROGRAM = {"sagemaker_program": '"train.py"'}


def case(
    hyperparameters: dict[str, object],
    resources: dict[str, object] = ONE_HOST,
    channels: dict[str, object] = TWO_CHANNELS,
    **environ: str,
) -> dict[str, object]:
    """One job tree: the text of its three files, and its environment."""
    return {
        "files": {
            "hyperparameters.json": json.dumps(hyperparameters),
            "resourceconfig.json": json.dumps(resources),
            "inputdataconfig.json": json.dumps(channels),
        },
        "environ": environ,
    }


CASES: dict[str, dict[str, object]] = {
    "plain": case({**PROGRAM, "lr": "0.1", "epochs": "3", "optimizer": '"SGD"'}),
    "hyphens": case({**PROGRAM, "batch-size": "64", "weight-decay": "1e-4", "a.b": "1", "batch_size2": "2"}),
    "hyphen_and_underscore": case({**PROGRAM, "batch-size": "64", "batch_size": "32"}),
    "upper_case_twins": case({**PROGRAM, "lr": "1", "LR": "2"}),
    "nested": case(
        {
            **PROGRAM,
            "layers": "[64, 32, [1, null]]",
            "names": '["x", "y\'s"]',
            "config": '{"b": 2, "a": {"z": true, "y": [1.5]}, "c": null}',
            "empty_list": "[]",
            "empty_dict": "{}",
            "json_in_json": '"{\\"a\\": 1}"',
        }
    ),
    "unicode": case({**PROGRAM, "name": '"Zürich 東京 🚀"', "bare": "Zürich 東京", "größe": '"ß"'}),
    "odd_values": case(
        {
            **PROGRAM,
            "t": "true",
            "f": "false",
            "n": "null",
            "python_false": "False",
            "sci": "1e-3",
            "huge": "123456789012345678901234567890",
            "floaty": "1.0",
            "nan": "NaN",
            "inf": "-Infinity",
            "spaces": "  a  b ",
            "blank": "",
            "quoted_blank": '""',
            "quotes": 'it\'s "quoted" $HOME; `ls` \\ \n newline',
            "leading_zero": "007",
            "twice": '"\\"20\\""',
            "x": "5",
            "": "empty name",
            "-dash": "1",
            "tab\tname": "1",
        }
    ),
    "untyped_file": case({**PROGRAM, "i": 5, "f": 0.5, "b": True, "n": None, "l": [1, "a"], "d": {"k": "v"}}),
    "groups": case({**PROGRAM, "sagemaker_mpi_enabled": "true"}, MIXED_GROUPS),
    "groups_named": case(
        {
            **PROGRAM,
            "sagemaker_torch_distributed_enabled": "true",
            "sagemaker_distribution_instance_groups": '["gpu", "cpu"]',
        },
        MIXED_GROUPS,
    ),
    "groups_other": case(
        {**PROGRAM, "sagemaker_mpi_enabled": "true", "sagemaker_distribution_instance_groups": '["cpu"]'}, MIXED_GROUPS
    ),
    "two_hosts": case({**PROGRAM, "sagemaker_parameter_server_enabled": "false"}, TWO_HOSTS),
    "two_hosts_distributed": case({**PROGRAM, "sagemaker_pytorch_ddp_enabled": "true"}, TWO_HOSTS),
    "topology": case(
        PROGRAM,
        {
            **TWO_HOSTS,
            "topology": [
                {"hostName": "algo-1", "capacityUnitId": "cu-1"},
                {"hostName": "algo-2", "capacityUnitId": "cu-1"},
            ],
        },
    ),
    "no_channels_no_program": case({}, channels={}),
    "hyphen_channels": case(PROGRAM, channels={"my-data": TRAIN, "v1.2": TRAIN}),
    "minimal_resources": case(PROGRAM, {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"], "future": {"k": 1}}),
    "minimal_distributed": case(
        {**PROGRAM, "sagemaker_mpi_enabled": "true"}, {"current_host": "b", "hosts": ["b", "a"]}
    ),
    "legacy_group_key": case(
        PROGRAM,
        {
            "current_host": "algo-1",
            "hosts": ["algo-1"],
            "current_instance_group": "homogeneousCluster",
            "instance_groups": [
                {"instance_group_name": "homogeneousCluster", "instance_type": "local", "hosts": ["algo-1"]}
            ],
        },
    ),
    "reserved": case(
        {
            "sagemaker_program": '"src/run.py"',
            "sagemaker_submit_directory": '"s3://bucket/key/sourcedir.tar.gz"',
            "sagemaker_container_log_level": "10",
            "sagemaker_job_name": '"job-2024-01-01"',
            "sagemaker_region": '"eu-west-1"',
            "sagemaker_s3_output": '"s3://bucket/out"',
            "sagemaker_enable_cloudwatch_metrics": "false",
            "default_user_module_name": '"m"',
            "_tuning_objective_metric": '"acc"',
            "sagemaker_instance_type": '"ml.p4d.24xlarge"',
            "sagemaker_mpi_num_of_processes_per_host": "8",
            "sagemaker_mpi_custom_mpi_options": '"-x A=B --NCCL_DEBUG INFO"',
            "sagemaker_mpi_enabled": "false",
            "lr": "1",
        }
    ),
    "bare_strings": case(
        {
            "sagemaker_program": "train.sh",
            "sagemaker_submit_directory": "/somewhere/else",
            "sagemaker_job_name": "job",
            "sagemaker_container_log_level": '"20"',
            "opt": "adam",
        }
    ),
    "environment": case(
        {**PROGRAM, "lr": "1"},
        SAGEMAKER_PROGRAM="other.py",
        SAGEMAKER_TRAINING_MODULE="my_framework.training:main",
        TRAINING_JOB_NAME="platform-job",
        SM_HP_MP_PARAMETERS='{"partitions": 2}',
        AWS_DEFAULT_REGION="us-east-2",
    ),
    "environment_empty_mp": case(PROGRAM, SM_HP_MP_PARAMETERS="{}"),
    "python_spelled_false": case({**PROGRAM, "sagemaker_mpi_enabled": "False"}, TWO_HOSTS),
}

# (files in the code directory, entry point): the reference looks at nothing else.
ENTRY_POINTS = [
    (["train.py"], "train.py"),
    (["train.py", "setup.py"], "train.py"),
    (["train.sh", "setup.py"], "train.sh"),
    (["train.sh"], "train.sh"),
    (["tool"], "tool"),
    (["tool", "setup.py"], "tool"),
    (["run.pyc"], "run.pyc"),
    (["pkg", "setup.py"], "pkg/train.py"),
]


def dump() -> None:
    """Child process: print what the reference answers for ``SAGEMAKER_BASE_DIR``."""
    from sagemaker_training import environment  # the reference; not a dependency of ours

    env = environment.Environment()
    answer = {
        "probes": {
            "num_cpus": env.num_cpus,
            "num_gpus": env.num_gpus,
            "num_neurons": env.num_neurons,
            "smddprun_installed": env.is_smddprun_installed,
            "smddpmprun_installed": env.is_smddpmprun_installed,
        },
        "variables": env.to_env_vars(),
        "side_effects": {name: os.environ[name] for name in ("SAGEMAKER_JOB_NAME", "SAGEMAKER_REGION", "CURRENT_HOST")},
        "args": env.to_cmd_args(),
    }
    print("ANSWER " + json.dumps(answer))


def record(inputs: dict[str, object]) -> dict[str, object]:
    """Write the job tree of one case, ask the reference about it, and template the base directory."""
    with tempfile.TemporaryDirectory() as base:
        config = pathlib.Path(base, "input", "config")
        config.mkdir(parents=True)
        files = inputs["files"]
        assert isinstance(files, dict)
        for name, text in files.items():
            (config / name).write_text(text, encoding="utf-8")
        environ = {"PATH": "/usr/bin:/bin", "HOME": base, "SAGEMAKER_BASE_DIR": base, "PYTHONUTF8": "1"}
        given = inputs["environ"]
        assert isinstance(given, dict)
        done = subprocess.run(
            [sys.executable, __file__, "--dump"], env={**environ, **given}, capture_output=True, text=True, check=True
        )
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        answer: dict[str, object] = json.loads(line.removeprefix("ANSWER ").replace(base, "{BASE}"))
    return {**inputs, **answer}


def main() -> None:
    if sys.argv[1:] == ["--dump"]:
        dump()
        return
    found = metadata.version("sagemaker-training")
    if found != VERSION:
        sys.exit(f"sagemaker-training {found} is installed; the golden files record {VERSION}")
    from sagemaker_training import _entry_point_type

    GOLDEN.mkdir(exist_ok=True)
    for name, inputs in CASES.items():
        text = json.dumps({"reference": f"sagemaker-training {VERSION}", **record(inputs)}, indent=1, sort_keys=True)
        (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    kinds = []
    for files, entry in ENTRY_POINTS:
        with tempfile.TemporaryDirectory() as code:
            for file in files:
                pathlib.Path(code, file).touch()
            kinds.append({"files": files, "entry_point": entry, "kind": _entry_point_type.get(code, entry).value})
    (GOLDEN / "entry_points.json").write_text(json.dumps(kinds, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
