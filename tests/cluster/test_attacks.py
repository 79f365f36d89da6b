"""Attacks on running jobs: real launchers, while hosts are missing and while ranks run.

A job ends as if nothing had happened, and the leader counts and names what it refused. Only a member that has proven
that it belongs to the job, and then misbehaves, is a failure of the job: as that host's loss, never as our fault.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.evidence import Evidence, ExitRecord, HostReport
from launcher.record import as_dict, replace

from .fleet import RELAY, SECRET, FakeLeader, Fleet, Peer, Relay, Stranger, framed, said

EXIT_CLUSTER = 69
NONE_AT_ALL = "127.0.7.7"  # no host's address


@pytest.fixture
def served() -> Iterator[list[Any]]:
    """What is put here is closed at the end."""
    kept: list[Any] = []
    yield kept
    for one in kept:
        one.close()


# ---- who does not know the secret


def attack(fleet: Fleet, recorded: list[bytes]) -> None:
    """All that a stranger can do; returns when the leader is rid of every connection."""
    wrong = [
        *(said(kind="hi", protocol=1, job="x", host="algo-3", nonce="00" * 32) for _ in range(2)),
        framed(b"[" * 4000),
        framed(random.Random(3).randbytes(100)),
        b"GET / HTTP/1.1\r\nHost: algo-1\r\n\r\n",
        struct.pack(">I", 2 << 30) + b"x" * 100_000,
        b"".join(recorded),
    ]
    strangers = [Stranger(fleet, data) for data in wrong]
    for peer in (Peer(fleet, "algo-3", secret="a guess"), Peer(fleet, "algo-3", secret="")):
        assert "secret is not the leader's" in peer.closed()
    assert "another job" in Peer(fleet, "algo-3", job="another").closed()
    assert "not in the host list" in Peer(fleet, "algo-9").closed()
    slow = Stranger(fleet)
    silent = [Stranger(fleet) for _ in range(300)]
    drops = iter(said(kind="hi"))
    next_s = time.monotonic()

    def over() -> bool:
        nonlocal next_s
        if time.monotonic() >= next_s:  # one byte a second
            next_s += 1.0
            slow.send(bytes([next(drops)]))
        return all(stranger.gone() for stranger in (slow, *silent))

    fleet.wait_until(over, "the leader to be rid of those that are slow")
    for stranger in strangers:
        stranger.refused()
    for stranger in (slow, *silent):
        stranger.sock.close()


def assert_counted(fleet: Fleet) -> None:
    counts = fleet.refused()
    assert counts["wrong secret"] == 3, counts  # two guesses and the recorded handshake
    assert counts["sent no message of this protocol"] == 2, counts
    assert counts["announced a frame that is too long"] == 2, counts
    assert counts["refused"] + counts["too slow"] >= 4 + 301, counts
    leader = fleet.jobs["algo-1"].stderr
    for text in ("could not prove that it knows the job's secret", "no JSON object", "announced a frame of"):
        assert leader.count(text) == 1, leader  # the first of each kind is told


@pytest.mark.slow
@pytest.mark.parametrize("running", [False, True], ids=["forming", "running"])
def test_strangers(make_fleet: Any, served: list[Any], running: bool) -> None:
    fleet = make_fleet(3)
    relay = Relay(fleet)
    served.append(relay)
    fleet.start("algo-1")
    fleet.listening()  # lest the relay refuses algo-2, which then tries the next port: the leader's own
    fleet.start("algo-2", leader=RELAY)
    if running:
        fleet.start("algo-3")
        fleet.up()
    else:
        fleet.wait_until(lambda: relay.said and len(relay.said[-1]) > 3, "algo-2 to be in")
    attack(fleet, relay.said[-1][:3])
    if not running:
        fleet.start("algo-3")
        fleet.up()
    fleet.finish()
    assert_counted(fleet)


@pytest.mark.parametrize("running", [False, True], ids=["forming", "running"])
def test_without_a_secret_only_the_hosts_addresses_are_let_in(make_fleet: Any, running: bool) -> None:
    fleet = make_fleet(2)
    fleet.start("algo-1", secret="")
    if running:
        fleet.start("algo-2", secret="")
        fleet.up()
        assert "algo-2 is here already" in Peer(fleet, "algo-2", secret="", source=NONE_AT_ALL).closed()
    else:
        fleet.jobs["algo-1"].wait_for_line("no secret was given", "stderr")
        peer = Peer(fleet, "algo-2", secret="", source=NONE_AT_ALL).hello()
        assert f"{NONE_AT_ALL} is no address of the host list" in peer.told("wait")["text"]
        peer.closed()
        fleet.start("algo-2", secret="")
        fleet.up()
    fleet.finish()
    assert fleet.refused()["refused"] == 1


def test_a_host_with_another_secret(make_fleet: Any) -> None:
    """A real launcher; it says what is wrong and gives up after its time."""
    fleet = make_fleet(2)
    fleet.start("algo-1")
    other = fleet.start("algo-2", "--join-timeout=1", secret="another", job=fleet.job("other", "algo-2"))
    assert other.wait() == EXIT_CLUSTER
    assert "this host's secret is not the leader's" in other.failure
    assert "secret" not in other.failure.replace("this host's secret is not the leader's", "")
    fleet.start("algo-2")
    fleet.up()
    fleet.finish()
    assert fleet.refused()["wrong secret"] >= 1


@pytest.mark.slow
def test_few_descriptors(make_fleet: Any) -> None:
    """Fewer than silent connections: the leader keeps some for its hosts, and counts each once."""
    fleet = make_fleet(2)
    fleet.start("algo-1", wrapper=("prlimit", "--nofile=96:96"))
    fleet.listening()
    silent = [Stranger(fleet) for _ in range(200)]
    fleet.wait_until(lambda: any(stranger.gone() for stranger in silent), "the first one to be dropped")
    fleet.start("algo-2")
    fleet.up()
    fleet.wait_until(lambda: all(stranger.gone() for stranger in silent), "all of them to be dropped")
    for stranger in silent:
        stranger.sock.close()
    fleet.finish()
    assert sum(fleet.refused().values()) == 200


# ---- who sits between two hosts


def twice(frame: bytes) -> list[bytes]:
    return [frame, frame]


def one_bit(frame: bytes) -> list[bytes]:
    return [frame[:-3] + bytes([frame[-3] ^ 1]) + frame[-2:]]


def left_out(frame: bytes) -> list[bytes]:
    return []


def endless(frame: bytes) -> list[bytes]:
    return [struct.pack(">I", 2 << 30), frame]


CHANGES = pytest.mark.parametrize("change", [twice, one_bit, left_out, endless])


@CHANGES
@pytest.mark.parametrize("from_member", [True, False], ids=["to leader", "to member"])
def test_frames_are_changed_while_hosts_are_missing(
    make_fleet: Any, served: list[Any], change: Any, from_member: bool
) -> None:
    """The connection ends, is named, and the host comes back."""
    fleet = make_fleet(3)
    relay = Relay(fleet)
    served.append(relay)
    fleet.start("algo-1")
    fleet.listening()  # lest the relay refuses algo-2, which then tries the next port: the leader's own
    fleet.start("algo-2", leader=RELAY)
    fleet.wait_until(lambda: relay.said and len(relay.said[-1]) > 3, "algo-2 to be in")
    relay.change(from_member, change)
    line = fleet.jobs["algo-1"].wait_for_line("algo-2 has left", "stderr")
    fleet.start("algo-3")
    fleet.up()
    fleet.finish()
    if from_member:
        assert ("announced a frame of 2147483648 bytes" if change is endless else "altered, repeated or out of") in line


@CHANGES
@pytest.mark.parametrize("from_member", [True, False], ids=["to leader", "to member"])
def test_frames_are_changed_while_ranks_run(make_fleet: Any, served: list[Any], change: Any, from_member: bool) -> None:
    """Who can change frames can cut the connection too: the host is lost, and nothing that was changed has effect."""
    fleet = make_fleet(3)
    relay = Relay(fleet)
    served.append(relay)
    fleet.start("algo-1")
    fleet.listening()  # lest the relay refuses algo-2, which then tries the next port: the leader's own
    fleet.start("algo-2", leader=RELAY)
    fleet.start("algo-3")
    fleet.up()
    relay.change(from_member, change)
    assert fleet.codes() == [EXIT_CLUSTER] * 3, fleet.output()
    assert relay.changed
    failures = [fleet.jobs[name].failure for name in fleet.names]
    assert failures[0].startswith("algo-2 (rank 1) is "), failures[0]
    assert failures[2] == failures[0]
    assert failures[1].startswith("algo-1 (rank 0) is "), failures[1]
    fleet.assert_clean()


# ---- a second leader


def test_fake_leaders_on_the_ports_that_are_tried_first(make_fleet: Any, served: list[Any]) -> None:
    fleet = make_fleet(3)
    served += [
        FakeLeader(fleet.port, said(kind="challenge", nonce="11" * 32) + said(kind="proof", proof="22" * 32)),
        FakeLeader(fleet.port + 1, said(kind="no", reason="the job is over, go home")),
        FakeLeader(fleet.port + 2, struct.pack(">I", 2 << 30) + b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    ]
    for name in fleet.names:
        fleet.start(name)
    fleet.up()
    fleet.finish()
    assert all(fake.calls >= 2 for fake in served)
    assert "it has another one, or another program listens there" in fleet.jobs["algo-2"].stderr


@pytest.mark.slow
def test_a_fake_leader_that_says_nothing(make_fleet: Any, served: list[Any]) -> None:
    fleet = make_fleet(2)
    served.append(FakeLeader(fleet.port, b""))
    for name in fleet.names:
        fleet.start(name)
    fleet.up()
    fleet.finish()


@pytest.mark.parametrize("running", [False, True], ids=["forming", "running"])
@pytest.mark.parametrize("host", ["algo-1", "algo-2"])
def test_a_second_launcher_for_one_host(make_fleet: Any, host: str, running: bool) -> None:
    """It knows the secret, and is one too many: it waits, in vain."""
    fleet = make_fleet(3)
    fleet.start("algo-1")
    fleet.listening()
    fleet.start("algo-2")
    if running:
        fleet.start("algo-3")
        fleet.up()
    else:
        _joined(fleet, "algo-2")
    second = fleet.start(host, "--join-timeout=2", job=fleet.job("second", host))
    assert second.wait() == EXIT_CLUSTER, second.output()
    if host == "algo-1":
        assert "2 of 3 hosts did not come" in second.failure
    else:
        assert "algo-2 is here already" in second.failure
    if not running:
        fleet.start("algo-3")
        fleet.up()
    fleet.finish()
    if host == "algo-2":
        assert fleet.refused()["refused"] >= 1


def _joined(fleet: Fleet, host: str) -> None:
    """Waits until the leader has ``host``: then it refuses another of that name."""

    def refused() -> bool:
        peer = Peer(fleet, host)
        peer.until(lambda: peer.channel.open or peer.channel.closed, "an answer")
        peer.channel.close("seen")
        return bool(peer.channel.refusal)

    fleet.wait_until(refused, f"{host} to be in")


# ---- a member that misbehaves

INFINITE = float("inf")
HUGE = 10**400
DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
LONG = "\N{SNOWMAN}" * 600_000  # six bytes each in JSON

BAD_HELLOS: list[dict[str, Any]] = [
    {"kind": "start"},
    {"kind": None},
    {"kind": DEEP},
    {"kind": LONG},
    {"slots": "many"},
    {"slots": INFINITE},
    {"slots": HUGE},
    {"slots": True},
    {"slots": 0},
    {"slots": -1},
    {"slots": 1 << 16},
    {"slots": None},
]

RECORD = ExitRecord("algo-2", 1, 0, 100, "exit", 3, 1, 1)
REPORT = HostReport("algo-2", 0, (RECORD,), Evidence(), 1.0, False)


def ended(**changes: Any) -> dict[str, Any]:
    return {"kind": "ended", "record": {**as_dict(RECORD), **changes}}


def over(cut: Any = (), **changes: Any) -> dict[str, Any]:
    return {"kind": "over", "report": {**as_dict(REPORT), **changes}, "cut": cut}


def over_with(**changes: Any) -> dict[str, Any]:
    return over(records=[{**as_dict(RECORD), **changes}])


BAD_MESSAGES: list[dict[str, Any]] = [
    {},
    {"kind": "hello", "facts": {}, "slots": 1},
    {"kind": "verdict", "verdict": {}},
    {"kind": DEEP},
    {"kind": LONG},
    {"kind": "pong"},
    {"kind": "pong", "sent": INFINITE, "member_ns": 0},
    {"kind": "pong", "sent": 0, "member_ns": HUGE},
    {"kind": "pong", "sent": 0, "member_ns": "soon"},
    {"kind": "ended", "record": []},
    {"kind": "ended", "record": None},
    {"kind": "ended", "record": {}},
    ended(rank="one"),
    ended(rank=0),
    ended(rank=HUGE),
    ended(rank=[1]),
    ended(value=256),
    ended(value=-1),
    ended(how="magic"),
    ended(how="signal", value=0),
    ended(message=5),
    ended(host="algo-1"),
    ended(unheard_of=1),
    {"kind": "stopping", "number": 99_999, "forced": False},
    {"kind": "stopping", "number": 19, "forced": False},
    {"kind": "stopping", "number": HUGE, "forced": False},
    {"kind": "stopping", "number": 15, "forced": "yes"},
    {"kind": "quiet"},
    {"kind": "quiet", "still": LONG},
    {"kind": "waited"},
    {"kind": "waited", "shares": 5},
    {"kind": "waited", "shares": [[1, 2.0]]},
    {"kind": "waited", "shares": [[0, 0.5]]},  # another host's rank
    {"kind": "stacked", "progress": 5, "cut": []},
    {"kind": "stacked", "progress": [5], "cut": []},
    {"kind": "stacked", "progress": [{"rank": "x", "inside": None, "step": 0}], "cut": []},
    {"kind": "stacked", "progress": [{"rank": 0, "inside": None, "step": 0}], "cut": []},
    {"kind": "stacked", "progress": [], "cut": 5},
    {"kind": "over"},
    {"kind": "over", "report": [], "cut": []},
    {"kind": "over", "report": "all well", "cut": []},
    over(host="algo-1"),
    over(attempt=7),
    over(attempt=None),
    over(lasted_s="long"),
    over(lasted_s=INFINITE),
    over(lasted_s=float("nan")),
    over(stuck="no"),
    over(records=5),
    over(records=[[]]),
    over(evidence=None),
    over(evidence={"stop_signal": 77_777}),
    over(evidence={"memory_trends": {"x": "y"}}),
    over(evidence={"launcher_error": "x", "launcher_code": 0}),
    over(evidence={"oom_kills": HUGE}),
    over(evidence={"aborted_rank": 0, "aborted_code": 256}),
    over(records=[as_dict(RECORD), as_dict(RECORD)]),
    over(cut=None),
    over_with(rank=0),
    over_with(rank="one"),
    over_with(value=256),
    over_with(value=None),
    over_with(ended_ns=HUGE),
    over_with(failed_ns="x"),
    over_with(max_rss_kib=HUGE),
    over_with(cpu_s=float("nan")),
    over_with(host="algo-1"),
    {"kind": "failed", "text": LONG, "code": 0},
    {"kind": "failed", "text": "x", "code": 256},
    {"kind": "failed", "text": "x", "code": "seven"},
    {"kind": "failed", "text": "x", "code": INFINITE},
]


def _id(message: dict[str, Any]) -> str:
    return repr(message)[:60] if message else "nothing"


@pytest.mark.parametrize("message", BAD_MESSAGES, ids=_id)
def test_a_members_nonsense_while_ranks_run(make_fleet: Any, message: dict[str, Any]) -> None:
    """The host counts as lost: one verdict, in bounded words, with the code for it."""
    fleet = make_fleet(2)
    fleet.start("algo-1", "--peer-check=off", "--max-restarts=3")
    fleet.listening()
    peer = Peer(fleet, "algo-2").hello()
    peer.told("start")
    fleet.up("algo-1")
    peer.channel.send(message)
    peer.closed()
    assert fleet.codes("algo-1") == [EXIT_CLUSTER], fleet.output()
    leader = fleet.jobs["algo-1"]
    assert leader.failure.startswith("algo-2 (rank 1) is "), leader.failure
    assert "message" in leader.failure and len(leader.stderr) < 20_000, leader.failure
    fleet.assert_clean()


def test_members_nonsense_while_hosts_are_missing(make_fleet: Any) -> None:
    """Each time the connection ends, and the true host has its place."""
    fleet = make_fleet(3)
    fleet.start("algo-1", "--peer-check=off")
    fleet.listening()
    for message in BAD_HELLOS:
        Peer(fleet, "algo-2").hello(**message).closed()
    early = [ended(), over(), {"kind": "quiet", "still": True}, {"kind": "stacked", "progress": [], "cut": []}]
    early += [bad for bad in BAD_MESSAGES if bad.get("kind") != "quiet" or "still" in bad]
    for message in early:
        peer = Peer(fleet, "algo-2").hello()
        peer.told("ping")
        peer.channel.send(message)
        assert peer.closed(), message
    for name in ("algo-2", "algo-3"):
        fleet.start(name, "--peer-check=off")
    fleet.up()
    fleet.finish()
    assert len(fleet.jobs["algo-1"].stderr) < 100_000


@pytest.mark.parametrize("check", ["warn", "refuse"])
def test_facts_that_are_too_many(make_fleet: Any, check: str) -> None:
    """What differs is told in bounded words, also when it is megabytes."""
    fleet = make_fleet(2)
    fleet.start("algo-1", f"--peer-check={check}")
    fleet.listening()
    peer = Peer(fleet, "algo-2").hello(facts={"packages": {LONG: "1"}, "python": "x\ny", "hosts": [DEEP]})
    if check == "warn":
        peer.told("start")
        peer.channel.close("enough")
        assert fleet.codes("algo-1") == [EXIT_CLUSTER]
    else:
        assert fleet.codes("algo-1") == [77], fleet.output()
        assert fleet.jobs["algo-1"].failure.startswith("RefusedError: algo-2 is not like algo-1")
    assert len(fleet.jobs["algo-1"].stderr) < 20_000
    fleet.assert_clean()


def test_a_member_that_joins_twice(make_fleet: Any) -> None:
    """Two connections prove themselves before either says hello: the first hello counts."""
    fleet = make_fleet(2)
    fleet.start("algo-1", "--peer-check=off")
    fleet.listening()
    first, second = Peer(fleet, "algo-2"), Peer(fleet, "algo-2")
    second.until(lambda: second.channel.open, "the handshake")
    first.hello().told("start")
    second.hello()
    assert second.told("wait")["text"] == "algo-2 is here already"
    second.closed()
    report = replace(REPORT, records=(replace(RECORD, value=0),))
    fleet.go.touch()
    first.channel.send({"kind": "over", "report": as_dict(report), "cut": []})
    assert first.told("verdict")["verdict"]["exit_code"] == 0
    first.channel.close("the verdict is here")
    assert fleet.codes("algo-1") == [0], fleet.output()
    assert SECRET not in fleet.jobs["algo-1"].output()
