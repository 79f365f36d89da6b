"""engines/mpi.py without an MPI: versions, command lines, options, and what an ssh command may start."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.engines import mpi
from launcher.engines.mpi import HYDRA, OPEN_MPI, Mpirun, RankIdentity
from launcher.engines.torch import RankLaunch
from launcher.errors import UsageError
from launcher.supervisor import adoption
from launcher.topology import limit_slots

FOUR = Mpirun("/usr/bin/mpirun", OPEN_MPI, (4, 1, 4))
FIVE = Mpirun("/opt/bin/mpirun", OPEN_MPI, (5, 0, 11))
MPICH = Mpirun("/opt/bin/mpiexec", HYDRA, (5, 0, 2))


def command(mpirun: Mpirun, options: str = "", hosts=("a", "b"), slots=(2, 1), as_root=False, interface="eth0"):
    custom = mpi.parse_options(options)
    return mpi.command_of(
        mpirun, hosts, slots, agent="/pkg/_agent", interface=interface, custom=custom, as_root=as_root
    )


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


@pytest.mark.parametrize(
    ("text", "family", "version"),
    [
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs to ...", OPEN_MPI, (4, 1, 4)),
        ("mpiexec (Open MPI) 5.0.11rc2\n", OPEN_MPI, (5, 0, 11)),
        ("HYDRA build details:\n    Version:                                 5.0.2\n    CC: gcc", HYDRA, (5, 0, 2)),
        ("HYDRA build details:\n", HYDRA, ()),
        ("GNU bash, version 5.2.15", "", ()),
        ("", "", ()),
    ],
)
def test_versions(text: str, family: str, version: tuple[int, ...]) -> None:
    assert mpi.parse_version(text) == (family, version)


def test_mpirun_is_found_beside_python_before_path(tmp_path: Path) -> None:
    for folder in ("env", "bin"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mpiexec").touch(mode=0o755)
    (tmp_path / "bin" / "mpirun").touch(mode=0o644)  # not executable
    python, path = str(tmp_path / "env" / "python"), str(tmp_path / "bin")
    assert mpi.find_mpirun("", python, path) == str(tmp_path / "env" / "mpiexec")
    assert mpi.find_mpirun("mpiexec", python, path) == str(tmp_path / "bin" / "mpiexec")
    assert mpi.find_mpirun(f"{tmp_path}/bin/mpiexec", python, "") == str(tmp_path / "bin" / "mpiexec")
    with pytest.raises(UsageError, match=r"beside .*python or on PATH; install one"):
        mpi.find_mpirun("", "/nowhere/python", "")
    with pytest.raises(UsageError, match=r"no mpirun\.other on PATH"):
        mpi.find_mpirun("mpirun.other", python, path)


def test_the_command_of_each_family() -> None:
    four, five, hydra = command(FOUR), command(FIVE), command(MPICH)
    assert value_of(four, "plm_rsh_agent") == value_of(five, "plm_ssh_agent") == "/pkg/_agent"
    assert value_of(hydra, "-launcher-exec") == "/pkg/_agent" and value_of(hydra, "-iface") == "eth0"
    assert value_of(four, "oob_tcp_if_include") == value_of(five, "prte_if_include") == "eth0"
    assert value_of(four, "--host") == value_of(five, "--host") == value_of(hydra, "-hosts") == "a:2,b:1"
    for words in (four, five, hydra):
        assert value_of(words, "-np") == "3" and words[-1] == "--rank"
        # Open MPI 5 would take the agent's own name for the beginning of the program.
        assert words[-2] != "/pkg/_agent" and words[-2].startswith("/pkg/") and words.count(words[-2]) == 1
        assert "--allow-run-as-root" not in words
    assert "--allow-run-as-root" in command(FOUR, as_root=True)
    assert "--allow-run-as-root" not in command(MPICH, as_root=True)


def test_one_host_goes_by_no_name() -> None:
    assert value_of(command(FIVE, hosts=("algo-1",), slots=(4,)), "--host") == "localhost:4"
    assert value_of(command(FIVE, hosts=("a", "b"), slots=(4, 0)), "--host") == "localhost:4"


def test_many_hosts_are_all_started_by_the_first() -> None:
    hosts = tuple(f"h{index}" for index in range(65))
    assert value_of(command(FOUR, hosts=hosts, slots=(1,) * 65), "routed_radix") == "65"
    assert value_of(command(FIVE, hosts=hosts, slots=(1,) * 65), "rml_base_radix") == "65"
    assert "routed_radix" not in command(FOUR, hosts=hosts[:64], slots=(1,) * 64)


def test_the_users_options_win() -> None:
    words = command(FOUR, "--bind-to core -mca btl_tcp_if_include eth1 --map-by=node --tag-output")
    assert value_of(words, "btl_tcp_if_include") == "eth1" and words.count("btl_tcp_if_include") == 1
    assert value_of(words, "--bind-to") == "core" and words.count("--bind-to") == 1
    assert "--map-by" not in words and "--map-by=node" in words and "--tag-output" in words
    assert value_of(command(MPICH, "-iface ib0"), "-iface") == "ib0"


def test_variables_among_the_options() -> None:
    custom = mpi.parse_options("--NCCL_DEBUG INFO -x A=1 -x B -genv C 3 --NCCL_DEBUG=WARN -x D=x=y")
    assert custom.exported == {"NCCL_DEBUG": "WARN", "A": "1", "B": None, "C": "3", "D": "x=y"}
    assert custom.words == ()


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ("-np 4", "--mpi-processes"),
        ("--host a,b", "--hosts or --hostfile"),
        ("--hostfile=x", "--hosts or --hostfile"),
        ("-mca plm_rsh_agent ssh", "it is needed"),
        ("-launcher-exec ssh", "it is needed"),
        ("-mca btl", "lacks its value"),
        ("-x", "lacks its value"),
    ],
)
def test_options_that_are_not_the_users(options: str, advice: str) -> None:
    with pytest.raises(UsageError, match=f"mpi_options: .*{advice}"):
        mpi.parse_options(options)


def test_fewer_ranks_than_slots() -> None:
    assert limit_slots((4, 4, 4), 0) == (4, 4, 4)
    assert limit_slots((4, 4, 4), 6) == (4, 2, 0)
    with pytest.raises(UsageError, match="mpi_processes is 13, but the hosts have 12 slots"):
        limit_slots((4, 4, 4), 13)


def test_who_a_rank_is() -> None:
    open_mpi = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in zip(("RANK", "SIZE"), (5, 8), strict=True)}
    assert mpi.identity(open_mpi) is None
    open_mpi.update(OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="4")
    assert mpi.identity(open_mpi) == RankIdentity(5, 8, 1, 4)
    hydra = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
    assert mpi.identity(hydra) == RankIdentity(5, 8, 1, 4)
    assert mpi.identity({**hydra, "PMI_RANK": "-1"}) is None


def test_a_ranks_environment(tmp_path: Path) -> None:
    for folder in ("bin", "lib"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lib" / "libmpi.so.40").touch()
    launch = RankLaunch(
        0, 0, ("python",), {"RANK": "0", "HOME": "/root", "PATH": "/bin"}, "/", (), "", "", "", "", True
    )
    agent = {"PMIX_RANK": "1", "PATH": "/mpi/bin", "HOME": "/elsewhere", "TMPDIR": "/x", "LAUNCHER_AGENT_SOCKET": "/s"}
    daemon = {"HOME": "/elsewhere", "TMPDIR": "/y"}
    custom = mpi.parse_options("-x COLOUR=green")
    adopted = mpi.launch_for(launch, RankIdentity(1, 2, 0, 1), agent, daemon, custom, str(tmp_path / "bin" / "mpirun"))
    assert adopted.rank == 1 and adopted.environ == {
        "RANK": "1",
        "ROLE_RANK": "1",
        "WORLD_SIZE": "2",
        "ROLE_WORLD_SIZE": "2",
        "HOME": "/root",
        "PATH": "/mpi/bin",
        "PMIX_RANK": "1",
        "COLOUR": "green",
        "MPI4PY_LIBMPI": str(tmp_path / "lib" / "libmpi.so.40"),
    }


# ---- daemons

FOUR_WORDS = [
    "algo-2",
    "          PATH=/usr/bin:$PATH ; export PATH ; LD_LIBRARY_PATH=/usr/lib:${LD_LIBRARY_PATH:-} ; "
    "export LD_LIBRARY_PATH ;   /usr/bin/orted",
    *("-mca", "ess", '"env"', "-mca", "orte_hnp_uri", '"4854.0;tcp://192.0.2.2:57597;tcp6://[fd00::2]:36941"'),
    *("-mca", "pmix", '"^s1,s2,cray,isolated"'),
]
FIVE_WORDS = [
    "root@algo-2",
    "PRTE_PREFIX=/opt/mpi;export PRTE_PREFIX;LD_LIBRARY_PATH=/opt/mpi/lib:$LD_LIBRARY_PATH;export LD_LIBRARY_PATH;"
    "/opt/mpi/bin/prted",
    *("--prtemca", "ess_base_nspace", '"prterun-algo-1-28679@0"', "--tree-spawn"),
]


def test_daemons_of_each_family() -> None:
    four = mpi.parse_daemon(FOUR_WORDS, {"PATH": "/bin", "HOME": "/root"})
    assert four.host == "algo-2" and four.name == "orted" and four.argv[0] == "/usr/bin/orted"
    assert four.argv[1:4] == ("-mca", "ess", "env") and "4854.0;tcp://192.0.2.2:57597;" in four.argv[6]
    assert four.environ == {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": "/usr/lib:", "HOME": "/root"}
    five = mpi.parse_daemon(FIVE_WORDS, {"LD_LIBRARY_PATH": "/own"})
    assert five.host == "algo-2" and five.environ["LD_LIBRARY_PATH"] == "/opt/mpi/lib:/own"
    assert five.argv == (
        "/opt/mpi/bin/prted",
        *("--prtemca", "ess_base_nspace", "prterun-algo-1-28679@0"),
        "--tree-spawn",
    )
    hydra = mpi.parse_daemon(["-x", "b", '"/opt/my mpi/hydra_pmi_proxy"', "--proxy-id", "1"], {})
    assert hydra.host == "b" and hydra.argv == ("/opt/my mpi/hydra_pmi_proxy", "--proxy-id", "1")


def test_a_profile_is_not_read() -> None:
    words = ["h", "( test ! -r ./.profile || . ./.profile;", "/usr/bin/orted", "-mca", "x", '"y"', ")"]
    assert mpi.parse_daemon(words, {}).argv == ("/usr/bin/orted", "-mca", "x", "y")


def test_a_daemon_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "prted").touch(mode=0o755)
    assert mpi.parse_daemon(["h", "prted", "-x"], {"PATH": f"/nowhere:{tmp_path}"}).argv == (f"{tmp_path}/prted", "-x")
    with pytest.raises(ValueError, match="orted is not on the PATH"):
        mpi.parse_daemon(["h", "orted"], {"PATH": str(tmp_path)})
    with pytest.raises(ValueError, match="not on the PATH"):
        mpi.parse_daemon(["h", "./prted"], {"PATH": str(tmp_path)})


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-x"],
        ["-D", "8080", "h", "orted"],
        ["h"],
        ["h", "/bin/sh", "-c", "orted"],
        ["h", "rm -rf /; /usr/bin/orted"],
        ["h", "/usr/bin/orted; rm -rf /"],
        ["h", "/usr/bin/orted", "&&", "true"],
        ["h", "/usr/bin/orted | cat"],
        ["h", "/usr/bin/orted", "$(true)"],
        ["h", "/usr/bin/orted", '"`true`"'],
        ["h", "/usr/bin/orted > /etc/passwd"],
        ["h", "/usr/bin/orted\ntrue"],
        ["h", "LD_PRELOAD=/x.so; export LD_PRELOAD; /usr/bin/orted"],
        ["h", "LD_PRELOAD=/x.so /usr/bin/orted"],
        ["h", "export LD_PRELOAD=/x.so; /usr/bin/orted"],
        ["h", "PATH=/x rm; /usr/bin/orted"],
        ["h", "/usr/bin/orted", '"open'],
        ["h", "/usr/bin/orted", "${HOME:-x}"],
        ["h", "/usr/bin/orted", "${HOME"],
        ["h", "/tmp/orted.sh"],
    ],
)
def test_what_is_more_than_a_daemon_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError):  # each with its own text
        mpi.parse_daemon(words, {"HOME": "/root"})


# ---- what MPI says


def test_texts_about_mpi_abort() -> None:
    mpich = (
        "noise\nAbort(7) on node 2 (rank 2 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 7) - process 2\n"
    )
    found = adoption._MPICH_ABORT.search(mpich)
    assert found is not None and found[1] == "7" and found[2].startswith("application called")
    for text in (
        "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n  Proc: [[21959,1],1]\n  Errorcode: 7\n",
        "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\nwith errorcode 7.\n",
    ):
        matched = adoption._OPEN_MPI_ABORT.search(text)
        assert matched is not None and (matched[1], matched[2]) == ("1", "7")
    # Ranks of another communicator say nothing about the job's.
    other = "MPI_ABORT was invoked on rank 1 in communicator MPI COMMUNICATOR 3 SPLIT FROM 0\nwith errorcode 7.\n"
    assert adoption._OPEN_MPI_ABORT.search(other) is None


@pytest.mark.parametrize(("code", "ends"), [(7, 7), (256, 1), (0, 1), (-1, 255), (604004615, 7)])
def test_exit_codes_of_mpi_abort(code: int, ends: int) -> None:
    assert adoption.exit_code(code) == ends
