"""`plan` shows every decision and its source, starts nothing, writes nothing, tells no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.options import OPTIONS


def listing(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below ``directory``; the launcher's own output left out."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(directory.rglob("*"))
        if path.name not in ("stdout", "stderr")
    }


def plan(job: Any, *args: str, **options: Any) -> dict[str, Any]:
    assert job.run("plan", "--json", *args, **options) == 0, job.output()
    return json.loads(job.stdout)


def test_json_holds_topology_environment_and_sources(job: Any) -> None:
    job.script("raise SystemExit('must not run')")
    found = plan(job, "-n", "2", "--rdzv-id", "my-run", "train.py", "--lr", "1", env={"PET_MAX_RESTARTS": "3"})
    assert (found["run_id"], found["mode"]) == ("my-run", "run")
    assert found["topology"]["world_size"] == 2
    assert found["topology"]["hosts"] == ["algo-1"]
    assert [place["rank"] for place in found["topology"]["local"]] == [0, 1]
    assert set(found["settings"]) == {option.name for option in OPTIONS}
    assert found["settings"]["max_restarts"] == {"value": 3, "source": "environment PET_MAX_RESTARTS"}
    assert found["settings"]["grace"] == {"value": None, "source": "default"}
    assert found["entry"]["kind"] == "script"
    assert found["entry"]["args"] == ["--lr", "1"]
    assert found["environment"]["SM_HOSTS"] == '["algo-1"]'
    for rank in found["ranks"]:
        assert rank["environment"]["RANK"] == str(rank["rank"])
        assert rank["environment"]["WORLD_SIZE"] == "2"
        assert rank["argv"][-3:] == ["train.py", "--lr", "1"]
    assert found["grace"] == {"after_failure_s": 30.0, "on_stop_s": 110.0}


def test_plan_says_what_a_run_does(job: Any) -> None:
    """Environment and command of the plan are those of the ranks, but for what is drawn anew for every run."""
    job.script("import json, os, sys; print('SEEN ' + json.dumps([dict(os.environ), sys.argv]))")
    arguments = ("-n", "1", "--rdzv-id", "x", "train.py", "a")
    found = plan(job, *arguments)
    assert job.run(*arguments) == 0
    environ, argv = json.loads(job.stdout.split("SEEN ", 1)[1])
    planned = {**found["environment"], **found["ranks"][0]["environment"]}
    drawn = {"MASTER_PORT", "TORCHELASTIC_ERROR_FILE"} | {name for name in planned if name.startswith("LAUNCHER_")}
    for name in planned.keys() - drawn:
        assert environ[name] == planned[name], name
    assert argv == found["ranks"][0]["argv"][-2:]


def test_table_has_the_same(job: Any) -> None:
    job.script("")
    assert job.run("plan", "-n", "2", "--grace", "7", "train.py") == 0
    lines = [line.split() for line in job.stdout.splitlines()]
    assert ["grace", "7.0", "command", "line"] in lines
    assert ["max_restarts", "0", "default"] in lines
    assert any(words[:2] == ["hosts", "algo-1"] for words in lines)
    for name in ("WORLD_SIZE=2", "RANK=0", "RANK=1", "SM_CURRENT_HOST=algo-1"):
        assert [name] in lines
    assert job.stdout.isascii()


@pytest.mark.parametrize("tree", [True, False])
def test_nothing_is_written_and_nothing_runs(job: Any, tree: bool) -> None:
    job.script("open('RAN', 'w')")
    if tree:
        job.tree({"sagemaker_program": "train.py"})
        (job.base / "code" / "train.py").write_text("open('RAN', 'w')")
        (job.base / "code" / "requirements.txt").write_text("no-such-package-at-all")
        (job.base / "output" / "failure").write_text("of an earlier run")
    before = listing(job.directory)
    for json_word in (["--json"], []):
        assert job.run("plan", *json_word, "train.py") == 0, job.output()
        if tree:
            assert job.run("plan", *json_word) == 0, job.output()
    assert listing(job.directory) == before


def test_paths_are_those_of_the_job(job: Any) -> None:
    """A tree that is yet to be made is shown where it will be made."""
    (job.directory / "data").mkdir()
    job.script("")
    found = plan(job, "--channel", "training=data", "train.py")
    assert found["container"]["base"] == str(job.base)
    assert found["container"]["made_for_this_run"] is True
    assert found["container"]["channels"] == {"training": str(job.base / "input" / "data" / "training")}
    for name, value in found["environment"].items():
        if value.startswith("/") and name.startswith("SM_"):
            assert value.startswith(str(job.base)), f"{name}={value}"
    assert found["container"]["resource_config"].startswith(str(job.base))


def test_secrets_are_masked(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py", "api_key": "hidden-1", "nested": {"password": "hidden-2"}, "rate": 0.5})
    job.script("", "opt-ml/code/train.py")
    for words in (["--json"], []):
        env = {"AWS_SECRET_ACCESS_KEY": "hidden-3", "SM_HP_TOKEN": "hidden-4"}
        assert job.run("plan", *words, env=env) == 0, job.output()
        assert "hidden-" not in job.stdout
        assert "0.5" in job.stdout
    assert job.run("plan", "train.py", "--api-key", "hidden-5", "--token=hidden-6", cwd=job.base / "code") == 0
    assert "hidden-" not in job.stdout
    assert "--api-key" in job.stdout


def test_train_is_planned_without_a_script(job: Any) -> None:
    job.tree({"sagemaker_program": "train.py", "epochs": 3}, channels={"training": {"TrainingInputMode": "File"}})
    job.script("", "opt-ml/code/train.py")
    found = plan(job)
    assert found["mode"] == "train"
    assert found["entry"]["target"] == "train.py"
    assert found["entry"]["args"] == ["--epochs", "3"]
    assert found["container"]["hyperparameters"] == {"epochs": 3}
    assert found["container"]["channels"] == {"training": str(job.base / "input" / "data" / "training")}
    assert "sagemaker_program" in found["container"]["sources"]["program"]


def test_several_hosts_are_planned_from_each(job: Any) -> None:
    hosts = ["algo-1", "algo-2", "algo-10"]
    job.script("")
    for index, host in enumerate(hosts):
        job.tree(resources={"current_host": host, "hosts": hosts})
        found = plan(job, "-n", "2", "train.py")
        assert [place["rank"] for place in found["topology"]["local"]] == [2 * index, 2 * index + 1]
        assert found["topology"]["world_size"] == 6
        assert found["rendezvous"] == {"address": "algo-1", "port": 7777}


def test_unequal_hosts(job: Any) -> None:
    """Row 37: 8 ranks here, 4 there; which ranks are where is shown."""
    job.script("")
    arguments = ("--hosts", "a:8,b:4,c:1", "--host", "b", "train.py")
    found = plan(job, *arguments)
    assert found["topology"]["slots"] == [8, 4, 1]
    assert found["topology"]["world_size"] == 13
    assert [place["rank"] for place in found["topology"]["local"]] == [8, 9, 10, 11]
    assert [rank["environment"]["LOCAL_RANK"] for rank in found["ranks"]] == ["0", "1", "2", "3"]
    assert found["hosts"] == {
        "source": "option --hosts",
        "list": ["a", "b", "c"],
        "this": "b",
        "addresses": {},
        "needed": 3,
        "slots_known": True,
    }
    assert found["environment"]["SM_HOSTS"] == '["a","b","c"]'
    assert found["environment"]["SM_CURRENT_HOST"] == "b"
    assert job.run("plan", *arguments) == 0
    assert "  hosts           a, b, c (this is b; from option --hosts)\n" in job.stdout
    assert "  ranks of hosts  a 0-7, b 8-11, c 12\n" in job.stdout


def test_slots_of_a_list_and_nproc_per_node_must_agree(job: Any) -> None:
    job.script("")
    assert job.run("plan", "--hosts", "a:8,b:4", "--host", "b", "-n", "8", "train.py") == 64
    assert "nproc_per_node is 8 (from command line), but option --hosts gives b 4 slots" in job.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "source", "host_rank"),
    [
        (("--hostfile", "list"), {}, "hostfile list", 1),
        ((), {"LAUNCHER_HOSTS": "203.0.113.1,127.0.0.1"}, "environment LAUNCHER_HOSTS", 1),
        ((), {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "203.0.113.1"}, "PET_*", 1),
        ((), {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODEID": "0"}, "Slurm", 0),
        (
            ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29400"),
            {},
            "torchrun's options (--nnodes, --rdzv-endpoint)",
            0,
        ),
        (
            ("--nnodes=2", "--master-addr=203.0.113.1"),
            {"JOB_COMPLETION_INDEX": "1"},
            "Kubernetes index",
            1,
        ),
    ],
)
def test_source_of_the_hosts(
    job: Any, arguments: tuple[str, ...], env: dict[str, str], source: str, host_rank: int
) -> None:
    job.script("")
    (job.directory / "list").write_text("203.0.113.1\n127.0.0.1  # this one\n")
    found = plan(job, "-n", "2", *arguments, "train.py", env=env)
    assert found["hosts"]["source"] == source
    assert found["topology"]["host_rank"] == host_rank
    assert found["topology"]["world_size"] == 4
    assert found["hosts"]["slots_known"] is False
    # The tree that is made says the same as the list, and is this host's own, were the file system shared.
    assert found["container"]["base"] == str(job.base / found["hosts"]["this"])
    assert json.loads(found["environment"]["SM_HOSTS"]) == found["hosts"]["list"]
    assert found["environment"]["SM_CURRENT_HOST"] == found["hosts"]["this"]


def test_hosts_of_the_platform_train_together(job: Any) -> None:
    """The platform lists groups in every job; only named ones leave hosts out."""
    hosts = ["algo-1", "algo-2"]
    group = {"instance_group_name": "homogeneousCluster", "instance_type": "ml.m5.xlarge", "hosts": hosts}
    resources = {
        "current_host": "algo-2",
        "hosts": hosts,
        "current_group_name": "homogeneousCluster",
        "instance_groups": [group],
        "topology": [{"hostName": "algo-1", "capacityUnitId": "u1"}, {"hostName": "algo-2", "capacityUnitId": "u1"}],
    }
    job.tree({"sagemaker_program": "train.py"}, resources=resources)
    job.script("", "opt-ml/code/train.py")
    assert plan(job)["topology"]["hosts"] == hosts
    together = plan(job, "opt-ml/code/train.py")
    assert together["topology"]["hosts"] == hosts
    assert json.loads(together["environment"]["SM_TOPOLOGY"]) == resources["topology"]
    job.tree({"sagemaker_program": "train.py", "sagemaker_torch_distributed_enabled": True}, resources=resources)
    assert plan(job)["topology"]["hosts"] == hosts


def test_errors_of_a_plan(job: Any) -> None:
    job.script("")
    assert job.run("plan", "-n", "0", "train.py") == 64
    assert job.stdout == ""
    assert "[launcher] error: " in job.stderr
    job.tree(resources={"hosts": ["a"]})
    assert job.run("plan", "train.py") == 65
    assert "current_host" in job.stderr
    assert job.failure == ""


def test_reader_that_leaves(job: Any) -> None:
    """`plan | head -1` is no error worth a traceback."""
    job.script("")
    command = 'exec 3>&1; "$0" -m launcher plan train.py 2>&1 >&3 | cat >&2'
    import sys

    assert job.run(command=("/bin/sh", "-c", f"({command}) | head -1", sys.executable), own_tree=False) == 0
    assert len(job.stdout.splitlines()) == 1
    assert "Traceback" not in job.stderr and "Error" not in job.stderr
