"""Who does not know the key, or changes what is sent, ends no more than its own connection."""

from __future__ import annotations

import json
import random
import socket
import struct
from typing import Any

import pytest

from launcher.cluster import wire
from launcher.cluster.wire import Channel

OTHER_KEY = b"o" * 32


def test_member_with_another_secret(wires: Any) -> None:
    leader, member = wires.both(member_key=OTHER_KEY)
    assert wires.ended(leader, "bad-proof") == (
        "127.0.0.1 (claims to be algo-2) could not prove that it knows the job's secret"
    )
    assert "this host's secret is not the leader's" in wires.ended(member, "refused")
    assert (member.refusal, member.refusal_proven) == (wire.WRONG_SECRET, False)
    assert (wires.asked, leader.host) == ([], "")


def test_leader_with_another_secret(wires: Any) -> None:
    """A second leader that lets everyone in, whatever they prove."""
    peer, member = wires.raw_leader()
    member.send({"private": 1})
    peer.heard()
    peer.say(kind="challenge", nonce="11" * 32)
    assert peer.heard()["kind"] == "proof"
    peer.say(kind="proof", proof="22" * 32)
    assert wires.ended(member, "bad-proof") == (
        "the leader at 127.0.0.1 could not prove that it knows the job's secret: it has another one, "
        "or another program listens there"
    )
    peer.sock.setblocking(True)
    assert peer.sock.recv(1 << 16) == b""  # nothing was sent to it


def test_two_leaders(wires: Any) -> None:
    """The right one and one without the secret: the member ends up with the right one."""
    near, far, address = wires.pair()
    impostor = wires.leader(far, address, key=OTHER_KEY)
    lost = wires.member(near)
    wires.ended(lost, "refused")
    assert not lost.refusal_proven
    wires.ended(impostor, "bad-proof")
    leader, member = wires.opened()
    member.send({"hello": 1})
    assert wires.messages(leader, 1) == [{"hello": 1}]


def test_a_refusal_that_is_not_the_leaders_is_not_proven(wires: Any) -> None:
    peer, member = wires.raw_leader()
    peer.heard()
    peer.say(kind="challenge", nonce="11" * 32)
    peer.heard()
    peer.say(kind="no", reason="not in the host list", proof="22" * 32)
    wires.ended(member, "refused")
    assert (member.refusal, member.refusal_proven) == ("not in the host list", False)


def test_a_proof_sent_back_is_none(wires: Any) -> None:
    peer, member = wires.raw_leader()
    peer.say(kind="challenge", nonce=peer.heard()["nonce"])  # even the nonce is the member's own
    peer.say(**peer.heard())
    wires.ended(member, "bad-proof")


def recorded(wires: Any) -> tuple[Any, Any, list[bytes], list[bytes]]:
    """A handshake and two messages through a relay. The two peers of the relay, and what each side said."""
    leader, to_leader = wires.raw_member()
    to_member, member = wires.raw_leader()
    said: tuple[list[bytes], list[bytes]] = ([], [])
    for source, sink, log in ((to_member, to_leader, said[0]), (to_leader, to_member, said[1])) * 2:
        log.append(source.frame())
        sink.send(struct.pack(">I", len(log[-1])) + log[-1])
    wires.until(lambda: leader.open and member.open, "the handshake")
    for number in range(2):
        member.send({"number": number})
        said[0].append(to_member.frame())
    return leader, to_leader, *said


def framed(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def test_a_recorded_handshake_proves_nothing(wires: Any) -> None:
    _, _, said, _ = recorded(wires)
    wires.asked.clear()
    leader, replay = wires.raw_member()
    for payload in said:
        replay.send(framed(payload))
    wires.ended(leader, "bad-proof")
    assert wires.asked == []


def test_recorded_frames_are_taken_once_and_in_order(wires: Any) -> None:
    leader, peer, said, _ = recorded(wires)
    peer.send(framed(said[2]))
    assert wires.messages(leader, 1) == [{"number": 0}]
    peer.send(framed(said[2]))
    assert wires.ended(leader, "replay") == (
        "frame 1 from algo-2 at 127.0.0.1 is not what it sent: altered, repeated or out of order"
    )
    leader, peer, said, _ = recorded(wires)
    peer.send(framed(said[3]))
    wires.ended(leader, "replay")


def test_frames_sent_back_are_refused(wires: Any) -> None:
    leader, peer, _, _ = recorded(wires)
    leader.send({"number": 0})
    peer.send(framed(peer.frame()))
    wires.ended(leader, "replay")


def test_every_altered_bit_is_seen(wires: Any) -> None:
    payload = recorded(wires)[2][2]
    for position in (0, 15, 16, len(payload) - 1):
        leader, peer, said, _ = recorded(wires)
        changed = bytearray(said[2])
        changed[position] ^= 1
        peer.send(framed(bytes(changed)))
        wires.ended(leader, "replay")
    for short in (b"", said[2][:15], said[2][:16], said[2][:-1]):
        leader, peer, _, _ = recorded(wires)
        peer.send(framed(short))
        wires.ended(leader, "replay")


def test_oversized_frames(wires: Any) -> None:
    leader, peer = wires.raw_member()
    peer.send(struct.pack(">I", 2 << 30))
    assert wires.ended(leader, "oversized") == "127.0.0.1 announced a frame of 2147483648 bytes; the limit is 4096"
    leader, peer, _, _ = recorded(wires)
    peer.send(struct.pack(">I", 2 << 30))
    assert "algo-2 at 127.0.0.1 announced a frame of 2147483648 bytes" in wires.ended(leader, "oversized")


GARBAGE = [
    b"[]",
    b"",
    b"\xff\xfe",
    b'"text"',
    b"[" * 4000,
    b'{"a":' * 800,
    b"1" * 4096,
    b'{"kind":"hi"',
    b'{"kind":"hi"}',
    b'{"kind":"proof"}',
    b'{"kind":"no","reason":"x"}',
    b'{"kind":["hi"]}',
    b"NaN",
]


@pytest.mark.parametrize("payload", GARBAGE, ids=lambda payload: repr(payload[:20]))
def test_garbage(wires: Any, payload: bytes) -> None:
    leader, peer = wires.raw_member()
    peer.send(framed(payload))
    assert wires.ended(leader, "garbage").startswith("127.0.0.1 sent a")


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": True},
        {"protocol": "1"},
        {"job": 5},
        {"job": ""},
        {"host": ""},
        {"host": "x" * 256},
        {"host": ["algo-2"]},
        {"host": "a\x1b[31m"},
        {"host": "\ud800"},
        {"nonce": "00"},
        {"nonce": "zz" * 32},
        {"nonce": None},
        {"nonce": "é" * 64},
    ],
    ids=repr,
)
def test_fields_of_hi(wires: Any, changes: dict[str, Any]) -> None:
    leader, peer = wires.raw_member()
    peer.hi(**changes)
    assert wires.ended(leader, "garbage").startswith("127.0.0.1 sent a hi ")


@pytest.mark.parametrize("proof", [None, 5, "", "00", "zz" * 32, "é" * 64])
def test_fields_of_a_proof(wires: Any, proof: Any) -> None:
    leader, peer = wires.raw_member()
    peer.hi(host="ä" * 255)
    assert peer.heard()["kind"] == "challenge"
    peer.say(kind="proof", proof=proof)
    wires.ended(leader, "bad-proof")


@pytest.mark.parametrize(
    "answer",
    [{"kind": "challenge"}, {"kind": "challenge", "nonce": 7}, {"kind": "no"}, {"kind": "no", "reason": "\n"}, {}],
    ids=repr,
)
def test_fields_of_a_leaders_answer(wires: Any, answer: dict[str, Any]) -> None:
    peer, member = wires.raw_leader()
    peer.say(**answer)
    wires.ended(member, "garbage")


def test_garbage_from_who_has_the_key(wires: Any) -> None:
    leader, member = wires.opened()
    member.send({"good": 1})
    member.send(b"[" * 100_000)
    assert "algo-2 at 127.0.0.1 sent a frame that is no JSON object" in wires.ended(leader, "garbage")
    assert wires.got[id(leader)] == [{"good": 1}]


def test_slow_peers_are_dropped(wires: Any) -> None:
    leader, peer = wires.raw_member()
    for byte in struct.pack(">I", 100) + b'{"kind":"hi"':
        peer.send(bytes([byte]))
        wires.turn()
    leader.on_time(104.9)
    assert (leader.closed, leader.deadline_s) == ("", 105.0)
    leader.on_time(105.0)
    assert (leader.cause, leader.fileno()) == ("slow", -1)
    assert leader.closed == "127.0.0.1 did not finish the handshake in time"
    _, member = wires.raw_leader()
    member.on_time(105.0)
    assert member.closed == "the leader at 127.0.0.1 did not finish the handshake in time"
    leader, member = wires.opened()
    leader.on_time(1e9)
    assert leader.open


def test_random_bytes(wires: Any) -> None:
    """Whatever comes in whatever pieces: an end or a wait, never an exception, never a message."""
    random_bytes = random.Random(20_26)
    starts = [b"", framed(b"{}"), framed(json.dumps({"kind": "hi", "protocol": 1, "job": "job-1"}).encode())]
    hi = {"kind": "hi", "protocol": wire.PROTOCOL, "job": "job-1", "host": "h", "nonce": "00" * 32}
    starts.append(framed(json.dumps(hi).encode()))
    ends: dict[str, int] = {}
    for number in range(10_000):
        left, right = socket.socketpair()
        if number % 2:
            channel = Channel.accepted(right, key=b"k", job="job-1", address="", now_s=0.0, admit=lambda _: "")
        else:
            channel = Channel.connecting(right, key=b"k", job="job-1", host="a", now_s=0.0)
        data = random_bytes.choice(starts)
        body = random_bytes.randbytes(random_bytes.randrange(40))
        data += framed(body) if random_bytes.random() < 0.7 else body
        with left, right:
            while data and not channel.closed:
                cut = random_bytes.randrange(1, len(data) + 1)
                left.send(data[:cut])
                assert channel.read(0.0) == []
                data = data[cut:]
            assert not channel.open
            assert bool(channel.closed) == bool(channel.cause) == (channel.fileno() < 0)
            ends[channel.cause] = ends.get(channel.cause, 0) + 1
            channel.close("the test is over")
    assert set(ends) == {"", "garbage", "oversized"}
    assert ends["garbage"] > 1000 and ends["oversized"] > 100 and ends[""] > 100
