"""The commands of docs/migration.md, read from it and run: what the script sees before is what it sees now.

A pair is skipped, saying why, where its other launcher is not installed. Hosts are network namespaces; where another
launcher wants to log in on a host, it finds an `ssh` that enters the namespace.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .hosts.netns import Machine, Network, lacking

DOCUMENT = Path(__file__).parent.parent / "docs" / "migration.md"
DEADLINE_S = 120.0
BIN = os.path.dirname(sys.executable)
PATH = f"{BIN}:{os.environ.get('PATH', os.defpath)}"

Record = dict[str, Any]

# What every script does at last: keep what it saw, and end as it is told.
TELL = """
import json, os, sys

def tell(rank, size, local_rank, local_size, total):
    seen = dict(rank=rank, size=size, local_rank=local_rank, local_size=local_size, total=total)
    seen.update(argv=sys.argv[1:], host=os.uname().nodename, level=os.environ.get("LEVEL"), name=__name__)
    with open(os.path.join({seen!r}, "part%d" % rank), "x") as file:
        json.dump(seen, file)
    os.rename(file.name, os.path.join({seen!r}, "rank%d" % rank))
    if "--fail" in sys.argv and rank == size - 1:
        sys.exit(3)
"""
# Each asks its own library, and lets the ranks add up their numbers, which shows that they have met.
SCRIPTS = {
    "torchrun": """
        import torch, torch.distributed
        torch.distributed.init_process_group("gloo")
        total = torch.tensor([torch.distributed.get_rank() + 1])
        torch.distributed.all_reduce(total)
        torch.distributed.destroy_process_group()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        tell(*(int(os.environ[name]) for name in names), total.item())
    """,
    "horovodrun": """
        import torch, horovod.torch as hvd
        hvd.init()
        total = hvd.allreduce(torch.tensor([hvd.rank() + 1]), op=hvd.Sum).item()
        place = hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()
        hvd.shutdown()
        tell(*place, total)
    """,
    "mpirun": """
        from mpi4py import MPI
        world = MPI.COMM_WORLD
        host = world.Split_type(MPI.COMM_TYPE_SHARED)
        tell(world.rank, world.size, host.rank, host.size, world.allreduce(world.rank + 1))
    """,
    "sagemaker-process": "tell(0, 1, 0, 1, 1)",
}
SCRIPTS["sagemaker-torch"], SCRIPTS["sagemaker-mpi"] = SCRIPTS["torchrun"], SCRIPTS["mpirun"]


# ---- the document


class Pair:
    """Commands of one block: host -> command, "" being the only host."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.before: dict[str, str] = {}
        self.now: dict[str, str] = {}
        hosts: list[str] = []
        side = self.before
        for line in text.splitlines():
            heading = re.fullmatch(r"# (before|now)(?:, on (.+))?", line)
            if heading:
                side = self.before if heading[1] == "before" else self.now
                hosts = (heading[2] or "").split(" and ")
            else:
                for host in hosts:
                    assert host not in side, f"{name}: two commands for {host or 'one host'}"
                    side[host] = line
        assert self.before and self.now, f"{name}: needs a command before and one now"

    @property
    def kind(self) -> str:
        """Whose pair it is: the longest name of a script that the pair's begins with."""
        return max((kind for kind in SCRIPTS if self.name.startswith(kind)), key=len)

    @property
    def hosts(self) -> list[str]:
        return sorted({*self.before, *self.now} - {""})


def blocks(marker: str) -> dict[str, str]:
    """name -> text of the fenced blocks whose first line ends with ``marker=name``."""
    text = DOCUMENT.read_text()
    return dict(re.findall(rf"^```\w+ {marker}=(\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


PAIRS = {name: Pair(name, text) for name, text in blocks("pair").items()}


def exit_codes() -> dict[str, tuple[int, int]]:
    """Launcher -> its exit code and ours, from the table in the document."""
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: (int(before), int(now)) for name, before, now in rows}


def test_all_blocks_are_read() -> None:
    text = DOCUMENT.read_text()
    assert len(PAIRS) == len(re.findall(r"^```sh", text, re.MULTILINE)) >= 13
    assert set(blocks("hyperparameters")) == {name for name in PAIRS if name.startswith("sagemaker")}
    assert {pair.kind for pair in PAIRS.values()} == set(SCRIPTS)


# ---- running them


def missing(kind: str) -> str:
    """What is not installed for this kind of pair, "" for nothing."""
    if kind.startswith("sagemaker") and not Path(os.environ.get("SAGEMAKER_TRAINING_BIN", ""), "train").is_file():
        return "sagemaker-training (SAGEMAKER_TRAINING_BIN: the bin directory of an environment of its own)"
    if kind == "sagemaker-mpi" and not os.path.exists("/usr/sbin/sshd"):
        return "sshd, which sagemaker-training starts"
    if kind == "sagemaker-mpi" and "(Open MPI) 4." not in version_of_mpirun():
        return "mpirun of Open MPI 4 on PATH, whose options sagemaker-training gives"
    tool = {"sagemaker-torch": "torchrun", "sagemaker-mpi": "mpirun", "sagemaker-process": "python"}.get(kind, kind)
    module = {"torchrun": "torch", "horovodrun": "horovod", "mpirun": "mpi4py", "python": "launcher"}[tool]
    if importlib.util.find_spec(module) is None:
        return f"module {module}"
    return "" if shutil.which(tool, path=PATH) else tool


def version_of_mpirun() -> str:
    path = shutil.which("mpirun")
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout if path else ""


class Place:
    """Where one command of a pair is run: a directory with the script, and hosts."""

    def __init__(self, directory: Path, kind: str, machines: dict[str, Machine]) -> None:
        self.directory, self.kind, self.machines = directory, kind, machines
        self.seen = directory / "seen"
        self.seen.mkdir(parents=True)
        self.outputs: list[Path] = []
        script = TELL.format(seen=str(self.seen)) + textwrap.dedent(SCRIPTS[kind])
        (directory / "train.py").write_text(script)
        for name, text in blocks("file").items():
            (directory / name).write_text(text)
        self._write_ssh()
        for machine in machines.values():
            self._write_contract(machine, script)

    def _write_ssh(self) -> None:
        cases = "".join(f"{name}) pid={machine.pid} ;;\n" for name, machine in self.machines.items())
        path = self.directory / "bin" / "ssh"
        path.parent.mkdir()
        path.write_text(
            "#!/bin/sh\n"
            'options() { skip=0; while [ "${1#-}" != "$1" ]; do skip=$((skip + 1))\n'
            "  case $1 in -[opil]) shift; skip=$((skip + 1)) ;; esac; shift; done; }\n"
            'options "$@"; shift $skip\n'
            f"case $1 in\n{cases}*) echo unknown host >&2; exit 255 ;;\nesac\n"
            "shift\n"
            'options "$@"; shift $skip\n'
            'exec nsenter -t "$pid" --net --mount --uts env -i HOME="$HOME" PATH="$PATH" sh -c "$*"\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def _write_contract(self, machine: Machine, script: str) -> None:
        hyperparameters = blocks("hyperparameters").get(f"{self.kind}")
        if hyperparameters is None:
            return
        encoded = {name: json.dumps(value) for name, value in json.loads(hyperparameters).items()}
        resources = {
            "current_host": machine.name,
            "hosts": sorted(self.machines),
            "network_interface_name": "eth0",
            "current_instance_type": "ml.m5.large",
            "current_group_name": "homogeneousCluster",
            "instance_groups": [
                {
                    "instance_group_name": "homogeneousCluster",
                    "instance_type": "ml.m5.large",
                    "hosts": sorted(self.machines),
                }
            ],
        }
        shutil.rmtree(machine.base / "output", ignore_errors=True)
        for name in ("input/config", "input/data", "output/data", "model", "code"):
            (machine.base / name).mkdir(parents=True, exist_ok=True)
        config = machine.base / "input" / "config"
        (config / "hyperparameters.json").write_text(json.dumps(encoded))
        (config / "resourceconfig.json").write_text(json.dumps(resources))
        (config / "inputdataconfig.json").write_text("{}")
        (machine.base / "code" / "train.py").write_text(script)

    def run(self, commands: dict[str, str], path: str = PATH) -> list[int]:
        """Runs each host's command at the same time; their exit codes."""
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(
                ("LAUNCHER_", "SM_", "SAGEMAKER_", "PET_", "TORCHELASTIC_", "OMP_", "OMPI_", "PMIX_")
            )
        }
        environ.update(
            PATH=f"{self.directory / 'bin'}:{path}",
            HOME=str(self.directory),
            OMPI_ALLOW_RUN_AS_ROOT="1",
            OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
            OMPI_MCA_rmaps_base_oversubscribe="1",
        )
        if not any(commands):  # Open MPI 5 would put all ranks of several hosts on the first one
            environ["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
        running: list[subprocess.Popen[bytes]] = []
        try:
            for host, command in commands.items():
                wrapper = self.machines[host].wrapper(str(self.directory)) if host else ()
                output = self.directory / f"output-{host or 'here'}"
                self.outputs.append(output)
                with output.open("wb") as file:
                    running.append(
                        subprocess.Popen(
                            [*wrapper, "sh", "-c", command],
                            cwd=self.directory,
                            env=environ,
                            stdin=subprocess.DEVNULL,
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            return [process.wait(DEADLINE_S) for process in running]
        except subprocess.TimeoutExpired:
            pytest.fail(f"{commands} did not end in {DEADLINE_S} s\n{self.output()}")
        finally:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def output(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in self.outputs)

    def records(self) -> list[Record]:
        found = [json.loads(path.read_text()) for path in self.seen.glob("rank*")]
        return sorted(found, key=lambda record: record["rank"])


@pytest.fixture
def make_place(tmp_path: Path) -> Iterator[Callable[[str, str, list[str]], Place]]:
    """``make_place("now", kind, hosts)``: a directory, and the named hosts, new ones for each place."""
    with contextlib.ExitStack() as stack:

        def make(side: str, kind: str, hosts: list[str]) -> Place:
            machines: dict[str, Machine] = {}
            if hosts:
                network = stack.enter_context(Network(tmp_path / f"{side}-hosts", len(hosts)))
                machines = {machine.name: machine for machine in network.machines}
                assert sorted(machines) == hosts
            return Place(tmp_path / side, kind, machines)

        yield make


def path_of(side: str, kind: str) -> str:
    if kind.startswith("sagemaker") and side == "before":
        return f"{os.environ['SAGEMAKER_TRAINING_BIN']}:{os.environ.get('PATH', os.defpath)}"
    return PATH


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PAIRS)
def test_pair(name: str, make_place: Callable[[str, str, list[str]], Place]) -> None:
    pair = PAIRS[name]
    lacks = missing(pair.kind)
    if lacks:
        pytest.skip(f"not installed: {lacks}")
    if pair.hosts and lacking():
        pytest.skip(lacking())
    records = {}
    for side, commands in (("before", pair.before), ("now", pair.now)):
        place = make_place(side, pair.kind, pair.hosts)
        codes = place.run(commands, path_of(side, pair.kind))
        assert codes == [0] * len(commands), f"{side}: {codes}\n{place.output()}"
        records[side] = place.records()
        if name == "torchrun-c10d":  # which numbers the hosts as they come
            for record in records[side]:
                del record["host"]
    assert records["before"]
    assert records["now"] == records["before"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launcher", exit_codes())
def test_exit_code(launcher: str, make_place: Callable[[str, str, list[str]], Place]) -> None:
    lacks = missing(launcher)
    if lacks:
        pytest.skip(f"not installed: {lacks}")
    pair = PAIRS[f"{launcher}-one-host"]
    codes = []
    for side, commands in (("before", pair.before), ("now", pair.now)):
        place = make_place(side, launcher, [])
        codes += place.run({"": f"{commands['']} --fail"})
    assert tuple(codes) == exit_codes()[launcher]
