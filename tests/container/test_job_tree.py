"""The job tree that the launcher makes, read back."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest

from launcher.container import make_job_tree, read
from launcher.errors import OutputError, UsageError


def test_is_read_back_as_given(tmp_path: pathlib.Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.csv").write_text("1")
    values: dict[str, Any] = {"lr": 0.1, "name": "SGD", "digits": "007", "on": True, "list": [1], "none": None}
    base = str(tmp_path / "job")
    paths = make_job_tree(base, {"train": str(data), "labels": str(data / "a.csv")}, values)
    container = read(base, {})
    assert container.paths == paths
    assert container.user == values
    assert (container.resources.hosts, container.resources.current_host) == (("algo-1",), "algo-1")
    assert container.resources.network_interface_name == "lo"
    channels = {name: channel.path for name, channel in container.channels.items()}
    assert os.listdir(channels["train"]) == os.listdir(channels["labels"]) == ["a.csv"]
    assert os.readlink(channels["train"]) == str(data)
    for directory in (paths.code_dir, paths.model_dir, paths.checkpoints_dir, paths.output_data_dir):
        assert os.path.isdir(directory)


def test_again_with_other_sources(tmp_path: pathlib.Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    base = str(tmp_path / "job")
    paths = make_job_tree(base, {"train": str(tmp_path / "one")}, {"a": 1}, host="x", hosts=["y", "x"])
    (pathlib.Path(paths.model_dir) / "m").touch()
    make_job_tree(base, {"train": str(tmp_path / "two")}, {"b": 2}, host="x", hosts=["y", "x"])
    container = read(base, {})
    assert container.user == {"b": 2}
    assert (container.resources.hosts, container.resources.host_rank) == (("y", "x"), 1)
    assert os.readlink(container.channels["train"].path) == str(tmp_path / "two")
    assert os.listdir(paths.model_dir) == ["m"]
    # The first source was linked, not moved or emptied.
    assert (tmp_path / "one").is_dir()


def test_a_file_channel_after_a_directory_channel_leaves_the_directory_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    base = str(tmp_path / "job")
    make_job_tree(base, {"c": str(tmp_path / "dir")}, {})
    make_job_tree(base, {"c": str(tmp_path / "file")}, {})
    assert os.listdir(tmp_path / "dir") == []
    assert os.listdir(tmp_path / "job" / "input" / "data" / "c") == ["file"]


def test_errors(tmp_path: pathlib.Path) -> None:
    base = tmp_path / "job"
    with pytest.raises(UsageError, match="channel 'train': there is no file or directory /no/such"):
        make_job_tree(str(base), {"train": "/no/such"}, {})
    assert not base.exists()
    real = base / "input" / "data" / "train"
    real.mkdir(parents=True)
    (real / "kept").touch()
    with pytest.raises(UsageError, match="exists and is not a link"):
        make_job_tree(str(base), {"train": str(tmp_path)}, {})
    assert (real / "kept").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot make a job tree under"):
        make_job_tree(str(tmp_path / "file"), {}, {})
