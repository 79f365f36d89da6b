"""Where the host list comes from, which of the hosts this one is, and the texts of refusals: literals in and out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from launcher.container.resources import parse_resource_config
from launcher.errors import UsageError
from launcher.hosts import Here, HostList, fewest, find, here, parse_hostfile, parse_hosts, parse_slurm, slots, which
from launcher.job import Setting

NAMES = {"a": ["10.0.0.1"], "b": ["10.0.0.2", "fd00::2"], "c": ["10.0.0.3"]}


def host(
    name: str = "pod-x", addresses: tuple[str, ...] = ("127.0.0.1", "10.9.9.9"), full: str = "", **names: list[str]
) -> Here:
    known = {**NAMES, **names}
    return Here(name, lambda: full or name, lambda: addresses, lambda asked: known.get(asked, []))


def settings(source: str = "command line", **values: Any) -> dict[str, Setting]:
    return {name: Setting(value, source) for name, value in values.items()}


def found(
    given: dict[str, Setting] | None = None,
    environ: dict[str, str] | None = None,
    me: Here | None = None,
    resources: Any = None,
    training: tuple[str, ...] = (),
) -> HostList:
    return find(given or {}, resources, training, environ or {}, me or host())


def container(current: str, *hosts: str) -> Any:
    raw = {"current_host": current, "hosts": list(hosts)}
    return parse_resource_config("/opt/ml/input/config/resourceconfig.json", raw)


# ---- parsers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", 0)]),
        ("a:8,b:8", [("a", 8), ("b", 8)]),
        ("a:8, b:4", [("a", 8), ("b", 4)]),
        ("10.0.0.1:2,node-1.cluster.local:1", [("10.0.0.1", 2), ("node-1.cluster.local", 1)]),
        ("[fd00::1]:8,[fe80::1%eth0]:4", [("fd00::1", 8), ("fe80::1%eth0", 4)]),
        ("[::1]", [("::1", 0)]),
    ],
)
def test_hosts(text: str, expected: list[tuple[str, int]]) -> None:
    assert parse_hosts(text, "option --hosts") == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,,b", "found ''"),
        ("a:8,b", "a has slots, b has none"),
        ("a:0", "'0' slots"),
        ("a:", "'' slots"),
        ("a:-1", "'-1' slots"),
        ("a:x", "'x' slots"),
        ("a:²", "'²' slots"),
        ("a:99999999", "'99999999' slots"),
        ("a,b,A", "A is there twice"),
        ("a:1:2", "an IPv6 address in brackets"),
        ("fd00::1", "an IPv6 address in brackets"),
        ("[fd00::1", "expected [IPv6 address]"),
        ("[fd00::1]8", "expected [IPv6 address]"),
        ("[10.0.0.1]", "'10.0.0.1' in brackets is not an IPv6 address"),
        ("[a:b]", "'a:b' in brackets is not an IPv6 address"),
        ("user@a", "'user@a' is not the name"),
        ("-x", "'-x' is not the name"),
        ("a b", "'a b' is not the name"),
        ("a;reboot", "'a;reboot' is not the name"),
    ],
)
def test_hosts_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_hosts(text, "option --hosts")
    assert str(error.value).startswith("option --hosts: ")
    assert problem in str(error.value)


HOSTFILE = """\
# of the cluster
algo-1 slots=8

algo-2   slots=4  max_slots=8   # the smaller one
algo-3:2
[fd00::4] slots=1
"""


def test_hostfile() -> None:
    expected = [("algo-1", 8), ("algo-2", 4), ("algo-3", 2), ("fd00::4", 1)]
    assert parse_hostfile(HOSTFILE, "hostfile x") == expected
    assert parse_hostfile("a\nb\r\n", "hostfile x") == [("a", 0), ("b", 0)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "hostfile x: no hosts in it"),
        ("# nothing\n\n", "hostfile x: no hosts in it"),
        ("a slots=8\nb slots=\n", "hostfile x, line 2: '' slots"),
        ("a\n\nb gpus=8\n", "hostfile x, line 3: found 'gpus=8'"),
        ("a 8\n", "hostfile x, line 1: found '8'"),
        ("a:8 slots=8\n", "hostfile x, line 1: slots are given twice"),
        ("a slots=8\na slots=8\n", "hostfile x: a is there twice"),
        ("a slots=8\nb\n", "hostfile x: a has slots, b has none"),
        ("[a]:8\n", "hostfile x, line 1: 'a' in brackets"),
    ],
)
def test_hostfile_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_hostfile(text, "hostfile x")
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("m1", ["m1"]),
        ("n[001-003,7],m1", ["n001", "n002", "n003", "n7", "m1"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[01-02]-ib,x", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib", "x"]),
        ("a,b.c-d_e", ["a", "b.c-d_e"]),
        ("n[5]", ["n5"]),
    ],
)
def test_slurm_lists(text: str, expected: list[str]) -> None:
    assert parse_slurm(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "n[1-2", "n1-2]", "n[[1]]", "n[]", "n[a]", "n[3-1]", "n[1-2],n2", "n[0-99999999]", "a b", "n[1-²]"),
        *("r[1-9999]n[1-9999]", "n[1-]", "n[-1]"),
    ],
)
def test_slurm_lists_refused(text: str) -> None:
    with pytest.raises(UsageError, match="Slurm's node list"):
        parse_slurm(text)


@pytest.mark.parametrize("seed", range(30))
def test_slurm_lists_are_what_their_members_are(seed: int) -> None:
    chance = random.Random(seed)
    pieces, expected = [], []
    for group in "abcd"[: chance.randint(1, 4)]:
        width, numbers, inside = chance.randint(1, 4), sorted(chance.sample(range(40), chance.randint(1, 12))), []
        while numbers:
            run = [numbers.pop(0)]
            while numbers and numbers[0] == run[-1] + 1:
                run.append(numbers.pop(0))
            ends = [f"{number:0{width}d}" for number in (run[0], run[-1])]
            inside.append(ends[0] if len(run) == 1 else "-".join(ends))
            # A range has the width of its first number.
            expected += [f"{group}{number:0{len(ends[0])}d}" for number in run]
        pieces.append(f"{group}[{','.join(inside)}]")
    assert parse_slurm(",".join(pieces)) == expected


# ---- sources, strongest first


def test_sources_in_their_order(tmp_path: Path) -> None:
    """Each source is taken away in turn; the next one wins."""
    path = tmp_path / "hosts"
    path.write_text("a\nfile-2\n")
    me = host("a")
    given = settings(hosts="a,list-2", hostfile=str(path), nnodes="2", node_rank="1", master_addr="10.0.0.1")
    environ = {"SLURM_NODELIST": "a,slurm-2", "SLURM_NODEID": "0", "JOB_COMPLETION_INDEX": "1"}
    resources = container("a", "a", "tree-2")

    def winner(**without: Any) -> tuple[str, tuple[str, ...]]:
        left = {name: setting for name, setting in given.items() if name not in without}
        result = find(left, without.get("tree", resources), ("a", "tree-2"), without.get("environ", environ), me)
        return result.source, result.hosts

    assert winner() == ("option --hosts", ("a", "list-2"))
    assert winner(hosts=1) == (f"hostfile {path}", ("a", "file-2"))
    assert winner(hosts=1, hostfile=1) == ("resourceconfig.json", ("a", "tree-2"))
    assert winner(hosts=1, hostfile=1, tree=None) == ("Slurm", ("a", "slurm-2"))
    source, names = winner(hosts=1, hostfile=1, tree=None, environ={"JOB_COMPLETION_INDEX": "1"})
    assert source == "torchrun's options (--nnodes, --node-rank, --master-addr)"
    assert len(names) == 2
    index = {"JOB_COMPLETION_INDEX": "1"}
    assert winner(hosts=1, hostfile=1, tree=None, environ=index, node_rank=1)[0] == "Kubernetes index"
    assert winner(hosts=1, hostfile=1, tree=None, environ={}, node_rank=1, nnodes=1) == ("this host alone", ("algo-1",))


def test_standalone_wins() -> None:
    given = settings(standalone=True, hosts="a,b")
    assert found(given, me=host("a")).hosts == ("algo-1",)
    alone = found(given, resources=container("b", "a", "b"), training=("a", "b"))
    assert (alone.hosts, alone.source) == (("b",), "this host alone (option --standalone)")


def test_this_host_alone() -> None:
    assert found() == HostList(("algo-1",), "algo-1", "this host alone")
    assert found(settings(host="x")).hosts == ("x",)


def test_listed_hosts_with_slots() -> None:
    result = found(settings(hosts="a:8,b:4"), me=host("b"))
    assert result == HostList(("a", "b"), "b", "option --hosts", slots=(8, 4))
    assert (result.host_rank, result.leader, result.slots_or(1)) == (1, "a", (8, 4))
    result = found(settings("environment LAUNCHER_HOSTS", hosts="a,b"), me=host("b"))
    assert (result.source, result.slots, result.slots_or(3)) == ("environment LAUNCHER_HOSTS", (), (3, 3))


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_hostfile_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "hosts"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"option --hostfile: cannot read .*hosts: (No such file|not a text file)"):
        found(settings(hostfile=str(path)))


# ---- the container's list


def test_hosts_of_the_container() -> None:
    resources = container("algo-2", "algo-1", "algo-2", "algo-10")
    result = found(resources=resources, training=("algo-1", "algo-2"))
    assert result == HostList(("algo-1", "algo-2"), "algo-2", "resourceconfig.json")
    alone = found(resources=resources, training=("algo-1", "algo-10"))
    assert alone.hosts == ("algo-2",)
    assert alone.source == "resourceconfig.json: of 3 hosts, this one does not train with others"
    with pytest.raises(UsageError, match=r"option --host is 'algo-1', but /opt/ml/.* says that this is algo-2"):
        found(settings(host="algo-1"), resources=resources, training=("algo-1", "algo-2"))


@pytest.mark.parametrize(
    ("nnodes", "accepted"),
    [("3", True), ("1:4", True), ("3:3", True), ("", True), ("2", False), ("4:8", False), ("1:2", False)]
    + [(wrong, False) for wrong in ("two", "1:x", ":", "3:", "0", "4:2", "0:3", "³")],
)
def test_nnodes_must_agree_with_the_host_list(nnodes: str, accepted: bool) -> None:
    given, resources = settings(nnodes=nnodes), container("b", "a", "b", "c")
    if accepted:
        assert found(given, resources=resources, training=("a", "b", "c")).hosts == ("a", "b", "c")
    else:
        with pytest.raises(UsageError, match=f"nnodes is '?{nnodes}"):
            found(given, resources=resources, training=("a", "b", "c"))


def test_nnodes_without_anything_else_says_what_is_missing() -> None:
    with pytest.raises(UsageError, match=r"nnodes is 3, but the host list has 1: algo-1 .*--node-rank and --master"):
        found(settings(nnodes="3"))


def test_how_many_hosts_are_enough() -> None:
    three = HostList(("a", "b", "c"), "a", "x")
    assert fewest({}, three) == 3
    assert fewest(settings(min_hosts=0, nnodes="2:4"), three) == 2
    assert fewest(settings(min_hosts=1, nnodes="2:4"), three) == 1
    assert fewest(settings(min_hosts=0, nnodes="3"), three) == 3
    assert fewest(settings(min_hosts=0, nnodes="1:4"), HostList(("a",), "a", "x")) == 1
    with pytest.raises(UsageError, match="option --min-hosts is 4, but there are 3 hosts"):
        fewest(settings(min_hosts=4), three)


def test_slots_of_the_list_and_counted_ones() -> None:
    listed = HostList(("a", "b"), "b", "option --hosts", slots=(8, 4))
    assert slots(listed, 1, Setting("auto", "default")) == (8, 4)
    assert slots(listed, 4, Setting("4", "command line")) == (8, 4)
    assert slots(HostList(("a", "b"), "b", "x"), 2, Setting("2", "command line")) == (2, 2)
    with pytest.raises(UsageError, match=r"nproc_per_node is 8 \(from command line\), but option --hosts gives b 4"):
        slots(listed, 8, Setting("8", "command line"))


# ---- Slurm

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environ", "hosts", "this"),
    [
        ({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NODEID": "2"}, ("n1", "n2", "n3"), "n3"),
        ({"SLURM_NODELIST": "n[1-3]", "SLURMD_NODENAME": "n2", "SLURM_NODEID": "0"}, ("n1", "n2", "n3"), "n2"),
        (
            {**STEP, "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NODEID": "1"},
            ("n1", "n2"),
            "n2",
        ),
        (
            {**STEP, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "1(x2)"},
            ("n1", "n2"),
            "n1",
        ),
        # srun's own count, not that of the allocation
        (
            {
                **STEP,
                "SLURM_JOB_NODELIST": "n[1-2]",
                "SLURM_NODEID": "0",
                "SLURM_TASKS_PER_NODE": "8(x2)",
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            },
            ("n1", "n2"),
            "n1",
        ),
    ],
)
def test_slurm(environ: dict[str, str], hosts: tuple[str, ...], this: str) -> None:
    assert found(environ=environ) == HostList(hosts, this, "Slurm")


def test_slurm_with_a_name_given() -> None:
    environ = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NODEID": "0"}
    assert found(settings(host="n3"), environ).host == "n3"
    with pytest.raises(UsageError, match=r"this host is not in Slurm's node list .*looked for --host x"):
        found(settings(host="x"), environ)


@pytest.mark.parametrize(
    "environ", [{"SLURM_TASKS_PER_NODE": "4(x2)"}, {"SLURM_TASKS_PER_NODE": "1,2"}, {"SLURM_LOCALID": "1"}]
)
def test_several_tasks_a_node_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="srun --ntasks-per-node=1"):
        found(environ={"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODEID": "0", **environ})


@pytest.mark.parametrize("environ", [{}, {"SLURM_NODEID": "5"}, {"SLURMD_NODENAME": "m1"}, {"SLURM_NODEID": "x"}])
def test_a_host_that_slurm_does_not_list(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"not in Slurm's node list \(n1, n2\): looked for SLURMD_NODENAME"):
        found(environ={"SLURM_JOB_NODELIST": "n[1-2]", **environ})


def test_a_batch_script_starts_no_launcher_on_the_other_hosts() -> None:
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_NODEID": "0",
        "SLURM_TASKS_PER_NODE": "8(x4)",
    }
    result = found(environ=environ)
    assert (result.hosts, result.source) == (("algo-1",), "this host alone (in a Slurm job, but not started by srun)")


# ---- torchrun


@pytest.mark.parametrize(
    ("values", "rank", "address"),
    [
        ({"nnodes": "3", "node_rank": "0", "master_addr": "10.0.0.1"}, 0, "10.0.0.1"),
        ({"nnodes": "3", "node_rank": "2", "master_addr": "a"}, 2, "a"),
        ({"nnodes": "3", "node_rank": "2", "rdzv_endpoint": "a:29500", "master_addr": "b"}, 2, "a"),
        ({"nnodes": "1:3", "node_rank": "1", "rdzv_endpoint": "a"}, 1, "a"),
        ({"nnodes": "2", "node_rank": "1", "rdzv_endpoint": "[fd00::1]:29400"}, 1, "fd00::1"),
        ({"nnodes": "2", "node_rank": "1", "rdzv_endpoint": "fd00::1"}, 1, "fd00::1"),
        ({"nnodes": "2", "node_rank": "0"}, 0, ""),
        # c10d: the hosts are not numbered; who has the endpoint's address is the first
        ({"nnodes": "2", "rdzv_endpoint": "10.9.9.9:29400"}, 0, "10.9.9.9"),
        ({"nnodes": "2", "rdzv_endpoint": "pod-x:29400"}, 0, "pod-x"),
        ({"nnodes": "3", "rdzv_endpoint": "localhost:29400"}, 0, "localhost"),
        ({"nnodes": "2", "rdzv_endpoint": "a:29400"}, 1, "a"),
    ],
)
def test_torchruns_command_lines(values: dict[str, str], rank: int, address: str) -> None:
    result = found(settings(**values), me=host(localhost=["127.0.0.1"]))
    count = int(values["nnodes"].rpartition(":")[2])
    assert result.hosts == tuple(f"host-{number}" for number in range(count))
    assert (result.host_rank, result.named) == (rank, False)
    assert result.addresses == ({"host-0": address} if address else {})


def test_torchruns_variables() -> None:
    pet = {
        name: Setting(value, f"environment PET_{name.upper()}")
        for name, value in {"nnodes": "2", "node_rank": "1", "master_addr": "10.0.0.1"}.items()
    }
    assert found(pet).source == "PET_*"
    pet["node_rank"] = Setting("1", "command line")
    assert found(pet).source == "torchrun's options (--nnodes, --node-rank, --master-addr)"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"nnodes": "2", "node_rank": "2", "master_addr": "a"}, "option --node-rank is '2'; expected .* from 0 to 1"),
        ({"nnodes": "2", "node_rank": "-1", "master_addr": "a"}, "option --node-rank is '-1'"),
        ({"nnodes": "2", "node_rank": "1"}, "nothing says where the first host is; give --master-addr"),
        ({"nnodes": "3", "rdzv_endpoint": "a:1"}, "which of the others this one is, nothing says; give --node-rank"),
        ({"nnodes": "2", "node_rank": "1", "master_addr": "a", "host": "x"}, "option --host is 'x', but by torchrun's"),
    ],
)
def test_torchruns_command_lines_refused(values: dict[str, str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        found(settings(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"nnodes": "1", "node_rank": "0", "master_addr": "a"},
        {"nnodes": "1:1", "rdzv_endpoint": "localhost:0"},
        {"rdzv_endpoint": "a:1"},
        {"node_rank": "3"},
    ],
)
def test_torchruns_command_lines_for_one_host(values: dict[str, str]) -> None:
    assert found(settings(**values)).source == "this host alone"


# ---- Kubernetes


def test_indexed_job_with_a_service() -> None:
    me = host("train-2", full="train-2.workers.team.svc.cluster.local")
    result = found(settings(nnodes="3"), {"JOB_COMPLETION_INDEX": "2"}, me)
    assert result.hosts == ("train-0.workers", "train-1.workers", "train-2.workers")
    assert (result.host, result.source, result.named) == ("train-2.workers", "Kubernetes index", True)


def test_indexed_job_with_the_leaders_address() -> None:
    index = {"JOB_COMPLETION_INDEX": "1"}
    result = found(settings(nnodes="2", master_addr="leader.svc"), index, host("my-job-1"))
    assert result.hosts == ("my-job-0", "my-job-1")
    assert (result.host, result.named, result.addresses) == ("my-job-1", False, {"my-job-0": "leader.svc"})
    assert found(settings(nnodes="2", master_addr="leader.svc"), index, host("odd")).hosts == ("host-0", "host-1")


def test_indexed_job_without_either() -> None:
    for me in (host("train-1"), host("other-7", full="other-7.workers.x"), host("odd")):
        with pytest.raises(UsageError, match=r"JOB_COMPLETION_INDEX is 1 of 2 hosts.*give the job a headless service"):
            found(settings(nnodes="2"), {"JOB_COMPLETION_INDEX": "1"}, me)
    with pytest.raises(UsageError, match="environment JOB_COMPLETION_INDEX is '2'; expected a number from 0 to 1"):
        found(settings(nnodes="2"), {"JOB_COMPLETION_INDEX": "2"}, host("train-2"))


def test_index_alone_means_one_host() -> None:
    assert found(environ={"JOB_COMPLETION_INDEX": "3"}).source == "this host alone"


# ---- which of them this host is


@pytest.mark.parametrize(
    ("hosts", "me", "expected"),
    [
        ("abc", host("b"), "b"),
        ("abc", host("b.cluster.local"), "b"),
        (["x.cluster", "b.cluster"], host("b"), "b.cluster"),
        (["b", "b.cluster"], host("b.cluster"), "b.cluster"),
        (["10.0.0.1", "10.9.9.9"], host(), "10.9.9.9"),
        (["fd00::1", "fd00:0::2"], host(addresses=("fd00::2",)), "fd00:0::2"),
        ("abc", host(addresses=("10.0.0.3",)), "c"),
        ("abc", host(addresses=("fd00::2",)), "b"),
        (["localhost", "b"], host(localhost=["127.0.0.1"]), "localhost"),
        (["localhost", "b"], host("b", localhost=["127.0.0.1"]), "b"),
        (["127.0.0.1"], host(), "127.0.0.1"),
    ],
)
def test_which_host_this_is(hosts: Any, me: Here, expected: str) -> None:
    assert which(hosts, me, "option --hosts") == expected


def test_a_host_that_is_not_listed_says_what_was_tried() -> None:
    with pytest.raises(UsageError) as error:
        which(["10.1.1.1", "a", "unknown"], host("pod-x"), "option --hosts")
    for text in (
        "option --hosts",
        "10.1.1.1",
        "a (10.0.0.1)",
        "unknown (does not resolve)",
        "pod-x",
        "10.9.9.9",
        "--host",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize("hosts", [["127.0.0.1", "127.0.0.2"], ["pod-x.one", "pod-x.two"]])
def test_several_entries_that_are_this_host(hosts: list[str]) -> None:
    with pytest.raises(UsageError, match="are all this host, pod-x; --host says which one it is"):
        which(hosts, host("pod-x"), "option --hosts")
    given = {**settings(hosts=",".join(hosts)), **settings(host=hosts[1])}
    assert found(given).host == hosts[1]


def test_a_name_that_is_not_in_the_list() -> None:
    with pytest.raises(UsageError, match="option --host is 'z', which is not in option --hosts: a, b"):
        found(settings(hosts="a,b", host="z"))


def test_this_very_host() -> None:
    me = here()
    assert which([me.hostname, "other"], me, "x") == me.hostname
    assert which(["203.0.113.9", "127.0.0.1"], me, "x") == "127.0.0.1"
    assert me.full_name()


# ---- addresses


def test_addresses_given() -> None:
    given = settings(hosts="a,b", host="a", host_addresses={"a": "127.0.0.1", "b": "127.0.0.2"})
    assert found(given).addresses == {"a": "127.0.0.1", "b": "127.0.0.2"}
    given = settings(nnodes="2", node_rank="1", master_addr="a", host_addresses={"host-1": "10.0.0.9"})
    assert found(given).addresses == {"host-0": "a", "host-1": "10.0.0.9"}
    with pytest.raises(UsageError, match="option --host-addresses: z is not one of the hosts, a, b"):
        found(settings(hosts="a,b", host="a", host_addresses={"z": "127.0.0.1"}))
