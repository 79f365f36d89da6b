"""Reading job trees: what comes out of good ones, and the one exact error of each bad one."""

from __future__ import annotations

import json
import math
import os
import pathlib
import threading
import time
from typing import Any

import pytest

from launcher.container import Channel, InstanceGroup, Paths, TopologyEntry, base_dir, read
from launcher.errors import ContractError

HOSTS = {"current_host": "a", "hosts": ["a", "b"]}
RC, HP, IDC = "resourceconfig.json", "hyperparameters.json", "inputdataconfig.json"


def error_of(base: pathlib.Path, environ: dict[str, str] | None = None) -> ContractError:
    with pytest.raises(ContractError) as caught:
        read(str(base), environ or {}, retry_for_s=0)
    assert caught.value.exit_code == 65
    return caught.value


def check(error: ContractError, base: pathlib.Path, file: str, field: str, found: str, expected: str) -> None:
    actual = (error.file, error.field, error.found, error.expected)
    assert actual == (str(base / "input" / "config" / file), field, found, expected)
    for part in (error.file, field, found, expected):
        assert part in str(error)


OBJECT = "a JSON object"
UNREADABLE: list[tuple[Any, str, str, str]] = [
    ("", "", "an empty file", OBJECT),
    (" \n", "", "an empty file", OBJECT),
    (
        '{"hosts": ["a"',
        "",
        "a JSON text that is cut short (line 1, column 15: Expecting ',' delimiter)",
        OBJECT,
    ),
    (
        '{"hosts": "a]}',
        "",
        "a JSON text that is cut short (line 1, column 11: Unterminated string starting at)",
        OBJECT,
    ),
    (
        '{"hosts": ["a"],\n "x": y}',
        "",
        "text that is not JSON (line 2, column 7: Expecting value)",
        OBJECT,
    ),
    ('{"a": 1}{', "", "a JSON text that is cut short (line 1, column 9: Extra data)", OBJECT),
    ('{"a": 1}}', "", "text that is not JSON (line 1, column 9: Extra data)", OBJECT),
    ("[1, 2]", "", "[1, 2]", OBJECT),
    ('"text"', "", '"text"', OBJECT),
    ("null", "", "null", OBJECT),
    ('{"a": NaN}', "", "the constant NaN", "JSON, which has no NaN or Infinity"),
    ('{"a": -Infinity}', "", "the constant -Infinity", "JSON, which has no NaN or Infinity"),
    ('{"a": 1, "b": 2, "a": 3}', "a", "the name twice in one object", "each name once"),
    ('{"x": [{"k": 1, "k": 1}]}', "k", "the name twice in one object", "each name once"),
    (b'{"a": "\xff"}', "", "a byte that is not UTF-8 at offset 7", "UTF-8 text"),
    ("[" * 100_000 + "]" * 100_000, "", "JSON nested too deeply to read", OBJECT),
]


@pytest.mark.parametrize("file", [RC, HP, IDC])
@pytest.mark.parametrize(("content", "field", "found", "expected"), UNREADABLE)
def test_unreadable_files(tree: Any, file: str, content: Any, field: str, found: str, expected: str) -> None:
    base = tree(HOSTS, **{file.removesuffix(".json"): content})
    check(error_of(base), base, file, field, found, expected)


def test_number_that_is_too_long(tree: Any) -> None:
    base = tree(HOSTS, hyperparameters='{"a": ' + "1" * 10_000 + "}")
    error = error_of(base)
    assert error.found.startswith("a number that cannot be read (Exceeds the limit")


def test_directory_instead_of_file(tree: Any) -> None:
    base = tree(HOSTS)
    (base / "input" / "config" / HP).mkdir()
    check(error_of(base), base, HP, "", "an unreadable file (Is a directory)", "a readable JSON file")


ONE_OF = 'one of hosts, ["a", "b"]'
GROUP = {"instance_group_name": "g", "instance_type": "t", "hosts": ["a", "b"]}
BAD_RESOURCES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"current_host": "a"}, "hosts", "nothing", "a list with the name of every host"),
    ({"hosts": ["a"]}, "current_host", "nothing", "the name of this host"),
    ({**HOSTS, "hosts": "a"}, "hosts", '"a"', "a list of strings"),
    ({**HOSTS, "hosts": []}, "hosts", "[]", "at least one name"),
    ({**HOSTS, "hosts": ["a", 7]}, "hosts[1]", "7", "a string that is not empty"),
    ({**HOSTS, "hosts": ["a", ""]}, "hosts[1]", '""', "a string that is not empty"),
    ({**HOSTS, "hosts": ["a", "b", "a"]}, "hosts[2]", '"a" a second time', "each name once"),
    ({**HOSTS, "current_host": "c"}, "current_host", '"c"', ONE_OF),
    ({**HOSTS, "current_host": None}, "current_host", "null", "a string that is not empty"),
    ({**HOSTS, "current_instance_type": 5}, "current_instance_type", "5", "a string that is not empty"),
    ({**HOSTS, "network_interface_name": []}, "network_interface_name", "[]", "a string that is not empty"),
    ({**HOSTS, "instance_groups": {}}, "instance_groups", "{}", "a list of objects"),
    ({**HOSTS, "instance_groups": ["g"]}, "instance_groups[0]", '"g"', "an object"),
    (
        {**HOSTS, "instance_groups": [{"hosts": ["a"]}]},
        "instance_groups[0].instance_group_name",
        "nothing",
        "the group's name",
    ),
    (
        {**HOSTS, "instance_groups": [{"instance_group_name": "g"}]},
        "instance_groups[0].hosts",
        "nothing",
        "the group's hosts",
    ),
    ({**HOSTS, "instance_groups": [{**GROUP, "hosts": ["a", "z"]}]}, "instance_groups[0].hosts[1]", '"z"', ONE_OF),
    (
        {**HOSTS, "instance_groups": [GROUP, {**GROUP, "instance_group_name": "h", "hosts": ["b"]}]},
        "instance_groups[1].hosts[0]",
        '"b", already in group "g"',
        "each host in one group",
    ),
    (
        {**HOSTS, "instance_groups": [{**GROUP, "hosts": ["a"]}, {**GROUP, "hosts": ["b"]}]},
        "instance_groups[1].instance_group_name",
        '"g" a second time',
        "each group once",
    ),
    (
        {**HOSTS, "instance_groups": [GROUP], "current_group_name": "x"},
        "current_group_name",
        '"x"',
        'one of instance_groups, ["g"]',
    ),
    (
        {
            **HOSTS,
            "instance_groups": [{**GROUP, "hosts": ["a"]}, {**GROUP, "instance_group_name": "h", "hosts": ["b"]}],
            "current_group_name": "h",
        },
        "current_group_name",
        '"h"',
        'the group that a is in, "g"',
    ),
    ({**HOSTS, "topology": "x"}, "topology", '"x"', "a list of objects"),
    ({**HOSTS, "topology": [1]}, "topology[0]", "1", "an object with hostName and capacityUnitId"),
    ({**HOSTS, "topology": [{"hostName": 1}]}, "topology[0].hostName", "1", "a string"),
]


@pytest.mark.parametrize(("resources", "field", "found", "expected"), BAD_RESOURCES)
def test_bad_resources(tree: Any, resources: Any, field: str, found: str, expected: str) -> None:
    base = tree(resources)
    check(error_of(base), base, RC, field, found, expected)


def test_missing_resources(tmp_path: pathlib.Path) -> None:
    expected = "the JSON object that names this host and all hosts"
    check(error_of(tmp_path), tmp_path, RC, "", "no such file", expected)


FLAG = "true, True, 1, false, False or 0"
SURROGATE = "text that can be encoded as UTF-8"
NO_NUL = "text without NUL, which no program can be given"
BAD_HYPERPARAMETERS: list[tuple[Any, str, str, str]] = [
    ({"sagemaker_mpi_enabled": "yes"}, "sagemaker_mpi_enabled", '"yes"', FLAG),
    ({"sagemaker_mpi_enabled": "2"}, "sagemaker_mpi_enabled", "2", FLAG),
    ({"sagemaker_mpi_enabled": "1.0"}, "sagemaker_mpi_enabled", "1.0", FLAG),
    ({"sagemaker_mpi_enabled": "null"}, "sagemaker_mpi_enabled", "null", FLAG),
    ({"sagemaker_torch_distributed_enabled": ""}, "sagemaker_torch_distributed_enabled", '""', FLAG),
    ({"sagemaker_program": ["x"]}, "sagemaker_program", '["x"]', "a string"),
    (
        {"sagemaker_container_log_level": "loud"},
        "sagemaker_container_log_level",
        '"loud"',
        "a number such as 20, or DEBUG, INFO, WARNING, ...",
    ),
    (
        {"sagemaker_distribution_instance_groups": "g"},
        "sagemaker_distribution_instance_groups",
        '"g"',
        "a list of strings",
    ),
    ({"a=b": "1"}, "a=b", "'=' in the name", "a name that can be part of an environment variable's"),
    ({"a": "x\0y"}, "a", "a NUL character", NO_NUL),
    ({"a": '{"k": "\\u0000"}'}, "a", "a NUL character", NO_NUL),
    ({"a": '"\\ud800"'}, "a", "half of a surrogate pair", SURROGATE),
    ({"a": "[" * 100_000 + "]" * 100_000}, "a", "JSON nested too deeply to read", "a shallower value"),
]


@pytest.mark.parametrize(("values", "field", "found", "expected"), BAD_HYPERPARAMETERS)
def test_bad_hyperparameters(tree: Any, values: Any, field: str, found: str, expected: str) -> None:
    base = tree(HOSTS, hyperparameters=values)
    check(error_of(base), base, HP, field, found, expected)


def test_unknown_distribution_group(tree: Any) -> None:
    resources = {**HOSTS, "instance_groups": [GROUP]}
    base = tree(resources, hyperparameters={"sagemaker_distribution_instance_groups": '["g", "x"]'})
    field = "sagemaker_distribution_instance_groups[1]"
    check(error_of(base), base, HP, field, '"x"', 'one of instance_groups, ["g"]')


BAD_CHANNELS: list[tuple[Any, str, str, str]] = [
    ({"train": "x"}, "train", '"x"', "an object"),
    ({"../train": {}}, "../train", 'the channel name "../train"', "1 to 64 of A-Z a-z 0-9 . _ -"),
    ({"..": {}}, "..", 'the channel name ".."', "1 to 64 of A-Z a-z 0-9 . _ -"),
    (
        {"train": {}, "Train": {}},
        "Train",
        'a channel that differs from "train" only in case',
        "names that give different SM_CHANNEL_TRAIN variables",
    ),
    (
        {"train": {"TrainingInputMode": "file"}},
        "train.TrainingInputMode",
        '"file"',
        '"File" or "FastFile" or "Pipe"',
    ),
    (
        {"train": {"trainingInputMode": "File"}},
        "train.trainingInputMode",
        'the name "trainingInputMode"',
        'the spelling "TrainingInputMode"',
    ),
    (
        {"train": {"S3DistributionType": 1}},
        "train.S3DistributionType",
        "1",
        '"FullyReplicated" or "ShardedByS3Key"',
    ),
    ({"train": {"RecordWrapperType": None}}, "train.RecordWrapperType", "null", '"None" or "RecordIO"'),
    ({"train": {"ContentType": 3}}, "train.ContentType", "3", "a string"),
]


@pytest.mark.parametrize(("values", "field", "found", "expected"), BAD_CHANNELS)
def test_bad_channels(tree: Any, values: Any, field: str, found: str, expected: str) -> None:
    base = tree(HOSTS, channels=values)
    check(error_of(base), base, IDC, field, found, expected)


def test_both_spellings_of_the_resource_config(tree: Any) -> None:
    base = tree(None, resourceConfig=HOSTS)
    assert read(str(base), {}).resources.file == str(base / "input/config/resourceConfig.json")
    tree(json.dumps(HOSTS, indent=4), resourceConfig=HOSTS)
    assert read(str(base), {}).resources.file == str(base / "input/config/resourceconfig.json")
    tree(HOSTS, resourceConfig={**HOSTS, "current_host": "b"})
    expected = f'"a", as in {base}/input/config/resourceconfig.json, or one file'
    check(error_of(base), base, "resourceConfig.json", "current_host", '"b"', expected)


def test_only_the_resource_config_is_required(tree: Any) -> None:
    base = tree(HOSTS)
    for name in ("train", "eval", ".hidden"):
        (base / "input" / "data" / name).mkdir(parents=True)
    (base / "input" / "data" / "train_0").touch()
    container = read(str(base), {})
    assert (container.user, container.reserved, container.input_data.raw) == ({}, {}, {})
    assert list(container.channels) == ["eval", "train"]
    assert container.channels["train"].path == str(base / "input/data/train")
    resources = container.resources
    assert (resources.current_instance_type, resources.current_group_name) == ("local", "homogeneousCluster")
    assert (resources.network_interface_name, resources.instance_groups, resources.host_rank) == ("eth0", (), 0)
    assert (container.program, container.submit_dir) == (None, str(base / "code"))
    assert (container.log_level, container.region, container.job_name) == (20, None, None)


def test_channels_in_full(tree: Any) -> None:
    fields = {
        "TrainingInputMode": "Pipe",
        "S3DistributionType": "ShardedByS3Key",
        "RecordWrapperType": "RecordIO",
        "ContentType": "text/csv",
        "Later": 1,
    }
    base = tree(HOSTS, channels={"b": fields, "a": {"TrainingInputMode": "FastFile"}})
    (base / "input" / "data" / "unlisted").mkdir(parents=True)
    channels = read(str(base), {}).channels
    assert list(channels) == ["b", "a"]
    path = str(base / "input/data/b")
    assert channels["b"] == Channel("b", path, "Pipe", "ShardedByS3Key", "RecordIO", "text/csv")
    path = str(base / "input/data/a")
    assert channels["a"] == Channel("a", path, "FastFile", "FullyReplicated", "None", "")


def test_groups_order_and_topology(tree: Any) -> None:
    resources = {
        "current_host": "algo-10",
        "hosts": ["algo-2", "algo-10", "algo-1"],
        "instance_groups": [
            {"instance_group_name": "x", "instance_type": "t1", "hosts": ["algo-1"]},
            {"instance_group_name": "y", "instance_type": "t2", "hosts": ["algo-2", "algo-10"]},
        ],
        "topology": [{"hostName": "algo-2", "capacityUnitId": "u"}],
        "added_later": {},
    }
    container = read(str(tree(resources, hyperparameters={"sagemaker_mpi_enabled": "true"})), {})
    assert container.resources.hosts == ("algo-2", "algo-10", "algo-1")
    assert container.resources.host_rank == 1
    assert container.resources.instance_groups[1] == InstanceGroup("y", "t2", ("algo-2", "algo-10"))
    # No group is named as the current one, so it is the one that lists this host.
    assert container.resources.current_group_name == "y"
    assert container.resources.current_group_hosts == ("algo-2", "algo-10")
    assert container.resources.topology == (TopologyEntry("algo-2", "u"),)
    assert (container.distribution_groups, container.distribution_hosts) == (("y",), ("algo-2", "algo-10"))
    assert (container.leader, container.distribution_enabled) == ("algo-2", True)


TYPED: list[tuple[Any, Any]] = [
    ('"SGD"', "SGD"),
    ("SGD", "SGD"),
    ("0.1", 0.1),
    ("1e-3", 0.001),
    ("7", 7),
    ("true", True),
    ("False", "False"),
    ("null", None),
    ("[1, 2]", [1, 2]),
    ('{"a": {"b": 1}}', {"a": {"b": 1}}),
    ("", ""),
    ("{broken", "{broken"),
    ('"\\"twice\\""', '"twice"'),
    (5, 5),
    (0.5, 0.5),
    (True, True),
    (None, None),
    ([1], [1]),
    ("9" * 10_000, "9" * 10_000),
]


@pytest.mark.parametrize(("given", "typed"), TYPED)
def test_typed_values(tree: Any, given: Any, typed: Any) -> None:
    value = read(str(tree(HOSTS, hyperparameters={"v": given})), {}).user["v"]
    assert value == typed
    assert type(value) is type(typed)


def test_not_a_number_is_a_value_of_a_hyperparameter(tree: Any) -> None:
    assert math.isnan(read(str(tree(HOSTS, hyperparameters={"v": "NaN"})), {}).user["v"])


@pytest.mark.parametrize(
    ("given", "on"),
    [
        *((given, True) for given in ("true", "True", '"true"', "1", '"1"', True, 1)),
        *((given, False) for given in ("false", "False", '"False"', "0", False, 0)),
    ],
)
def test_flags(tree: Any, given: Any, on: bool) -> None:
    container = read(str(tree(HOSTS, hyperparameters={"sagemaker_mpi_enabled": given})), {})
    assert container.flag("sagemaker_mpi_enabled") is on
    assert container.flag("sagemaker_pytorch_ddp_enabled") is False
    assert container.distribution_groups == (("homogeneousCluster",) if on else ())


def test_reserved_are_apart_from_the_users(tree: Any) -> None:
    values = {"lr": "1", "sagemaker_x": "2", "_tuning_objective_metric": "acc", "default_user_module_name": "m"}
    container = read(str(tree(HOSTS, hyperparameters=values)), {})
    assert container.user == {"lr": 1}
    assert list(container.reserved) == ["sagemaker_x", "_tuning_objective_metric", "default_user_module_name"]
    assert container.hyperparameters.framework == {"sagemaker_x": 2}


@pytest.mark.parametrize(
    ("given", "level"),
    [("10", 10), ('"10"', 10), ('"\\"20\\""', 20), ("DEBUG", 10), ("warning", 30), (40, 40), ("007", 7), ("0", 0)],
)
def test_log_levels(tree: Any, given: Any, level: int) -> None:
    values = {"sagemaker_container_log_level": given}
    assert read(str(tree(HOSTS, hyperparameters=values)), {}).log_level == level


def test_sources(tree: Any) -> None:
    values = {
        "sagemaker_program": "a.py",
        "sagemaker_region": "r1",
        "sagemaker_job_name": "123",
        "sagemaker_submit_directory": "null",
    }
    base = tree(HOSTS, hyperparameters=values)
    file = str(base / "input/config/hyperparameters.json")
    container = read(str(base), {"AWS_REGION": "r2"})
    assert (container.program, container.region) == ("a.py", "r1")
    assert container.submit_dir == str(base / "code")
    assert container.sources == {"program": f"{file}: sagemaker_program", "region": f"{file}: sagemaker_region"}
    environ = {"SAGEMAKER_PROGRAM": "b.py", "TRAINING_JOB_NAME": "j", "SAGEMAKER_TRAINING_MODULE": "m:f"}
    container = read(str(base), environ)
    assert (container.program, container.job_name, container.framework_module) == ("b.py", "j", "m:f")
    assert container.sources["program"] == "environment SAGEMAKER_PROGRAM"
    # A text that reads as a number is the text.
    assert container.hyperparameters.reserved_text("sagemaker_job_name") == "123"


def test_base_directory(tree: Any, tmp_path: pathlib.Path) -> None:
    base = tree(HOSTS)
    assert read(None, {"SAGEMAKER_BASE_DIR": str(base)}).paths == Paths.at(str(base))
    assert base_dir({}) == base_dir({"SAGEMAKER_BASE_DIR": ""}) == "/opt/ml"
    paths = Paths.at("/opt/ml")
    assert paths.failure_json == "/opt/ml/output/failure.json"
    assert (paths.checkpoints_dir, paths.intermediate_dir) == ("/opt/ml/checkpoints", "/opt/ml/output/intermediate")


def test_reading_writes_nothing(tree: Any) -> None:
    base = tree(HOSTS, hyperparameters={"a": "1"}, channels={"train": {}})
    before = sorted(base.rglob("*"))
    read(str(base), {})
    assert sorted(base.rglob("*")) == before


@pytest.mark.parametrize("start", ["", '{"current_host": "a", "hosts": ["a'])
def test_waits_for_a_file_that_is_being_written(tree: Any, start: str) -> None:
    base = tree(start)
    path = base / "input" / "config" / RC
    writer = threading.Timer(0.1, path.write_text, (json.dumps(HOSTS),))
    writer.start()
    started = time.monotonic()
    assert read(str(base), {}).resources.hosts == ("a", "b")
    assert 0.05 < time.monotonic() - started < 2
    writer.join()


def test_wait_is_bounded_and_only_for_cut_texts(tree: Any) -> None:
    base = tree('{"hosts": [')
    start = time.monotonic()
    with pytest.raises(ContractError, match="cut short"):
        read(str(base), {}, retry_for_s=0.2)
    assert 0.2 <= time.monotonic() - start < 1.5
    tree('{"hosts": nonsense}')
    start = time.monotonic()
    with pytest.raises(ContractError, match="not JSON"):
        read(str(base), {}, retry_for_s=60)
    assert time.monotonic() - start < 5


def test_unreadable_file(tree: Any) -> None:
    base = tree(HOSTS, hyperparameters={})
    path = base / "input" / "config" / HP
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads everything")
    check(error_of(base), base, HP, "", "an unreadable file (Permission denied)", "a readable JSON file")


def test_byte_order_mark(tree: Any) -> None:
    base = tree(b"\xef\xbb\xbf" + json.dumps(HOSTS).encode())
    assert read(str(base), {}).resources.current_host == "a"
