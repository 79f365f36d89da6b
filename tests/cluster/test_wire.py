"""Channels between two launchers over real connections: what they carry, and how they end."""

from __future__ import annotations

import select
import socket
import struct
from typing import Any

import pytest

from launcher.cluster import wire
from launcher.cluster.wire import Channel
from launcher.errors import ClusterError, InternalError


def test_handshake_and_messages_both_ways(wires: Any) -> None:
    leader, member = wires.both()
    member.send({"early": 1})  # waits for the handshake
    leader.send({"early": 2})
    wires.until(lambda: leader.open and member.open, "the handshake")
    assert (leader.host, member.host, wires.asked) == ("algo-2", "algo-2", ["algo-2"])
    assert (leader.address, member.address, member.local_address) == ("127.0.0.1",) * 3
    message = {"kind": "exit", "rank": 3, "at": 1.5, "list": [1, None, True], "text": "ä\0\n", "big": 1 << 70}
    for number in range(100):
        member.send({**message, "number": number})
        leader.send(wire.encode({"number": number}))
    assert wires.messages(leader, 101) == [{"early": 1}, *({**message, "number": n} for n in range(100))]
    assert wires.messages(member, 101) == [{"early": 2}, *({"number": n} for n in range(100))]
    assert leader.heard_s == member.heard_s == 101.0
    assert leader.deadline_s == float("inf")


def test_half_frames_never_wait(wires: Any) -> None:
    leader, relay = wires.raw_member()
    behind, member = wires.raw_leader()
    # A relay that passes on one byte at a time; the ends must not notice.
    member.send({"from": "member", "text": "x" * 100})

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        try:
            data = source.recv(1 << 16)
        except BlockingIOError:
            return
        for byte in data:
            sink.send(bytes([byte]))
            wires.turn()

    def relayed() -> bool:
        pass_on(relay.sock, behind.sock)
        pass_on(behind.sock, relay.sock)
        return bool(wires.got.get(id(leader)))

    wires.until(relayed, "the message")
    assert wires.got[id(leader)] == [{"from": "member", "text": "x" * 100}]


def test_messages_of_several_mib_and_too_long_ones(wires: Any) -> None:
    leader, member = wires.opened()
    text = "x" * ((4 << 20) - 16 - len('{"text":""}'))
    member.send({"text": text})
    member.send({"after": 1})
    assert wires.messages(leader, 2) == [{"text": text}, {"after": 1}]
    with pytest.raises(InternalError, match="with the fields kind, text is too long"):
        member.send({"kind": "log", "text": text})
    member.send({"still": "open"})
    assert wires.messages(leader, 3)[2] == {"still": "open"}


def test_what_was_said_before_the_end_is_heard(wires: Any) -> None:
    leader, member = wires.opened()
    leader.send({"verdict": "x" * 100_000})
    leader.close("all is said")
    assert (leader.closed, leader.cause, leader.open, leader.fileno()) == ("all is said", "", False, -1)
    for _ in range(3):  # writing to it must not hide what it said
        member.send({"heartbeat": 1})
    assert wires.messages(member, 1) == [{"verdict": "x" * 100_000}]
    wires.until(lambda: member.closed, "the end")
    assert member.cause in ("eof", "reset")
    assert "the leader at 127.0.0.1" in member.closed


def test_a_closed_channel_can_be_called(wires: Any) -> None:
    leader, member = wires.opened()
    member.close("done")
    member.close("again")
    assert member.closed == "done"
    member.send({"lost": 1})
    member.flush()
    member.on_time(1e9)
    assert member.read(102.0) == []
    assert not member.wants_write()
    assert wires.ended(leader, "eof") == "algo-2 at 127.0.0.1 closed the connection"


def test_reset(wires: Any) -> None:
    leader, peer = wires.raw_member()
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.sock.close()
    assert "127.0.0.1 lost during the handshake: Connection reset by peer" in wires.ended(leader, "reset")


def test_end_of_file_during_the_handshake(wires: Any) -> None:
    peer, member = wires.raw_leader()
    peer.heard()
    peer.sock.shutdown(socket.SHUT_WR)
    assert wires.ended(member, "eof") == "the leader at 127.0.0.1 closed the connection during the handshake"


def test_another_job_is_refused(wires: Any) -> None:
    leader, member = wires.both(member_job="job-2")
    assert "another job's launcher listens here" in wires.ended(member, "refused")
    assert (member.refusal, member.refusal_proven) == (wire.OTHER_JOB, False)
    assert wires.ended(leader, "refused").startswith("refused 127.0.0.1: another job's")
    assert wires.asked == []


def test_another_protocol_is_refused(wires: Any) -> None:
    leader, peer = wires.raw_member()
    peer.hi(protocol=99)
    assert peer.heard() == {
        "kind": "no",
        "reason": "protocol 1 is spoken here, not 99: install the same launcher on all hosts",
    }
    wires.ended(leader, "refused")


def test_the_leader_refuses_a_host(wires: Any) -> None:
    wires.admission = "already joined\n\x1b[31m" + "x" * 2000
    leader, member = wires.both()
    text = wires.ended(member, "refused")
    assert text.startswith("the leader at 127.0.0.1 refused this host: already joined  [31mxxx")
    assert len(text) < 400
    assert member.refusal_proven
    assert wires.ended(leader, "refused").startswith("refused 127.0.0.1 (claims to be algo-2): already joined")


def test_a_peer_that_does_not_read_is_dropped(wires: Any) -> None:
    leader, _ = wires.opened()
    text = wire.encode({"text": "x" * (1 << 20)})
    for _ in range(100):
        leader.send(text)
    assert leader.cause == "overflow"
    assert leader.closed.startswith("algo-2 at 127.0.0.1 does not read: ")
    assert not leader.wants_write()
    leader.send(text)
    waiting = Channel.connecting(wires.pair()[0], key=b"", job="", host="a", now_s=0.0)
    for _ in range(100):
        waiting.send(text)
    assert waiting.cause == "overflow"


def test_what_the_socket_does_not_take_is_kept(wires: Any) -> None:
    leader, member = wires.opened()
    text = "x" * (1 << 20)
    for number in range(20):
        leader.send({"number": number, "text": text})
    assert leader.wants_write()
    assert [message["number"] for message in wires.messages(member, 20)] == list(range(20))
    assert not leader.wants_write()


def test_sockets_notice_a_lost_host(wires: Any) -> None:
    near, far, _ = wires.pair()
    wires.leader(far, "127.0.0.1")
    for sock in (near, far):
        options = (socket.TCP_NODELAY, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [1, 1, 1, 3]
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 4000
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert not sock.get_inheritable()


def test_listen_takes_the_next_port(wires: Any) -> None:
    one, first = wire.listen(0)
    wires.sockets.append(one)
    two, second = wire.listen(first, tries=8)
    wires.sockets.append(two)
    assert first < second <= first + 7
    with pytest.raises(ClusterError, match=rf"port {first}: Address already in use; --leader-port"):
        wire.listen(first, tries=1)
    with pytest.raises(ClusterError, match="no such port"):
        wire.listen(70_000)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_listen_is_for_both_families(wires: Any, address: str) -> None:
    listener, port = wire.listen(0)
    wires.sockets.append(listener)
    sock = wire.begin_connect(address, port)
    wires.sockets.append(sock)
    select.select([], [sock], [], 5)
    error = wire.connect_error(sock)
    if address == "::1" and (error or listener.family == socket.AF_INET):
        pytest.skip(f"no IPv6 on this host's loopback: {error}")
    assert error == ""
    accepted = wires.wait_until(lambda: wire.accept(listener), "the connection")
    wires.sockets.append(accepted[0])
    assert accepted[1] == address
    assert wire.accept(listener) is None


def test_connecting_to_nobody(wires: Any) -> None:
    listener, port = wire.listen(0, address="127.0.0.1")
    listener.close()
    sock = wire.begin_connect("127.0.0.1", port)
    wires.sockets.append(sock)
    select.select([], [sock], [], 5)
    assert wire.connect_error(sock) == "Connection refused"
    with pytest.raises(ClusterError, match="'algo-2' is no numeric address"):
        wire.begin_connect("algo-2", port)


def test_connect_that_fails_at_once(wires: Any) -> None:
    sock = wire.begin_connect("255.255.255.255", 9)
    wires.sockets.append(sock)
    assert select.select([], [sock], [], 5)[1]
    assert wire.connect_error(sock) in ("Network is unreachable", "Permission denied")


def test_a_connection_with_itself_is_none(wires: Any) -> None:
    sock = socket.socket()
    wires.sockets.append(sock)
    sock.bind(("127.0.0.1", 0))
    sock.connect(sock.getsockname())
    assert wire.connect_error(sock) == "Connection refused"
