"""The store against clients as they come: Horovod's way of asking, http.client, and bytes of every other kind."""

from __future__ import annotations

import contextlib
import http.client
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.cluster import kvstore
from launcher.cluster.kvstore import JobStore, KeyValueStore
from launcher.errors import ClusterError

from ..hosts.netns import Network, lacking

Wait = Callable[..., object]


class Server:
    """A running store; what is not given back by it within 20 s fails the test."""

    def __init__(self, **options: object) -> None:
        self.store = KeyValueStore("127.0.0.1", lambda address: True, **options)  # type: ignore[arg-type]
        self.port = self.store.start()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def talk(self, data: bytes, *, half_close: bool = True) -> bytes:
        """Everything that the store answers to ``data``, up to its end of the connection."""
        with self.connect() as sock:
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            with connection.getresponse() as response:
                return response.status, response.read()


def read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(1 << 20):
            data += chunk
    return bytes(data)


@pytest.fixture
def make_server() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(**options: object) -> Server:
        servers.append(Server(**options))
        return servers[-1]

    yield make
    for server in servers:
        server.store.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "horovod-store"]


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


def put(path: str, body: bytes) -> bytes:
    """A request as Horovod's C++ client sends it."""
    return f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode()


def answer(status: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


# ---- what Horovod asks for


def test_values_are_given_back_byte_for_byte(server: Server) -> None:
    value = bytes(range(256)) * 5
    assert server.ask("GET", "/global/0") == (404, b"")
    assert server.ask("PUT", "/global/0", value) == (200, b"")
    assert server.ask("GET", "/global/0") == (200, value)
    assert server.ask("GET", "/global/1") == (404, b"")
    assert server.ask("GET", "/local_algo-1/0") == (404, b"")
    assert server.ask("PUT", "/global/0", b"") == (200, b"")
    assert server.ask("GET", "/global/0") == (200, b"")


def test_a_meeting_ends_when_all_its_ranks_are_done(server: Server) -> None:
    for rank in ("0", "1", "2"):
        server.ask("PUT", f"/global/rank_{rank}", b"algo-1")
        server.ask("PUT", f"/global/{rank}", b"address")
    for rank in ("2", "0"):
        assert server.ask("DELETE", f"/global/{rank}") == (200, b"")
    assert server.ask("GET", "/global/2") == (200, b"address"), "rank 1 may still be reading it"
    server.ask("DELETE", "/global/1")
    for key in ("0", "1", "2", "rank_0"):
        assert server.ask("GET", f"/global/{key}") == (404, b"")


def test_a_second_meeting_in_the_same_scope(server: Server) -> None:
    """hvd.shutdown() and hvd.init() once more; of the first meeting nothing may be found."""
    for meeting in (b"first", b"second"):
        for rank in ("0", "1"):
            assert server.ask("GET", f"/cross_0/{rank}") == (404, b"")
        for rank in ("0", "1"):
            server.ask("PUT", f"/cross_0/{rank}", meeting)
        assert server.ask("GET", "/cross_0/1") == (200, meeting)
        for rank in ("0", "1"):
            server.ask("DELETE", f"/cross_0/{rank}")


def test_a_rank_that_comes_back_is_not_done(server: Server) -> None:
    for rank in ("0", "1"):
        server.ask("PUT", f"/global/{rank}", b"old")
    server.ask("DELETE", "/global/0")
    server.ask("PUT", "/global/0", b"new")
    server.ask("DELETE", "/global/1")
    assert server.ask("GET", "/global/0") == (200, b"new")


def test_other_scopes_lose_single_keys(server: Server) -> None:
    for key in ("a", "b"):
        server.ask("PUT", f"/own/{key}", b"value")
    server.ask("DELETE", "/own/a")
    assert server.ask("GET", "/own/a") == (404, b"")
    assert server.ask("GET", "/own/b") == (200, b"value")
    assert server.ask("DELETE", "/own/never-there") == (200, b"")
    assert server.ask("DELETE", "/global/never-there") == (200, b"")


def test_many_ranks_meet_at_once(server: Server) -> None:
    """Each of 48 ranks puts its value and asks for the others' until they are there."""
    ranks = 48
    seen: dict[int, list[bytes]] = {}

    def meet(rank: int) -> None:
        server.ask("PUT", f"/global/{rank}", b"%d" % rank * 100)
        values = []
        for other in range(ranks):
            status = 0
            while status != 200:
                status, value = server.ask("GET", f"/global/{other}")
            values.append(value)
        seen[rank] = values
        server.ask("DELETE", f"/global/{rank}")

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = [b"%d" % rank * 100 for rank in range(ranks)]
    assert all(seen[rank] == expected for rank in range(ranks))
    assert server.ask("GET", "/global/0") == (404, b"")
    assert server.store.counts == {}


# ---- the protocol


def test_keep_alive(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        for number in range(50):
            connection.request("PUT", f"/own/{number}", b"x" * number)
            assert connection.getresponse().read() == b""
            connection.request("GET", f"/own/{number}")
            assert connection.getresponse().read() == b"x" * number


def test_pipelining(server: Server) -> None:
    requests = put("/s/a", b"GET /s/b HTTP/1.1\r\n\r\n") + get("/s/a") + get("/s/b") + put("/s/b", b"") + get("/s/b")
    expected = answer("200 OK") + answer("200 OK", b"GET /s/b HTTP/1.1\r\n\r\n") + answer("404 Not Found")
    assert server.talk(requests) == expected + answer("200 OK") + answer("200 OK")


def test_a_request_in_single_bytes(server: Server) -> None:
    with server.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in put("/s/a", b"value") + get("/s/a"):
            sock.sendall(bytes([byte]))
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == answer("200 OK") + answer("200 OK", b"value")


def test_a_client_that_reads_late(server: Server) -> None:
    """Answers that the client does not take stay with the kernel and one answer here; nothing else waits for it."""
    value = b"v" * (4 << 20)
    with server.connect() as sock:
        sock.sendall(put("/s/big", value) + get("/s/big") * 20)
        assert server.ask("PUT", "/s/small", b"1") == (200, b"")
        assert server.ask("GET", "/s/small") == (200, b"1")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == answer("200 OK") + answer("200 OK", value) * 20


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /s/a HTTP/1.0\r\n\r\n",
        b"GET /s/a HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /s/a HTTP/1.1\r\ncONNECTION:   Close  \r\n\r\n",
    ],
)
def test_the_store_closes_when_asked_to(server: Server, request_bytes: bytes) -> None:
    expected = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    assert server.talk(request_bytes + get("/s/a"), half_close=False) == expected


def test_a_body_before_a_close(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(b"PUT /s/a HTTP/1.0\r\nContent-Length: 5\r\n\r\nva")
        assert server.ask("GET", "/s/a")[0] == 404  # the store has been at work in between
        sock.sendall(b"lue")
        read_all(sock)
    assert server.ask("GET", "/s/a") == (200, b"value")


TURNED_DOWN = {
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "no version": (b"GET /s/a\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "lower case": (b"get /s/a HTTP/1.1\r\n\r\n", 400),
    "two spaces": (b"GET  /s/a HTTP/1.1\r\n\r\n", 400),
    "bare line feeds": (b"GET /s/a HTTP/1.1\nHost: x\n\n\r\n\r\n", 400),
    "no key": (b"GET /s HTTP/1.1\r\n\r\n", 400),
    "empty key": (b"GET /s/ HTTP/1.1\r\n\r\n", 400),
    "a third part": (b"GET /s/a/b HTTP/1.1\r\n\r\n", 400),
    "a query": (b"GET /s/a?b HTTP/1.1\r\n\r\n", 400),
    "an escape": (b"GET /s/%2e%2e HTTP/1.1\r\n\r\n", 400),
    "a whole address": (b"GET http://host/s/a HTTP/1.1\r\n\r\n", 400),
    "a long key": (b"GET /s/" + b"k" * 257 + b" HTTP/1.1\r\n\r\n", 400),
    "no colon": (b"GET /s/a HTTP/1.1\r\nHost\r\n\r\n", 400),
    "a folded field": (b"GET /s/a HTTP/1.1\r\nHost: x\r\n y\r\n\r\n", 400),
    "a space before the colon": (b"GET /s/a HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    "a NUL": (b"GET /s/a HTTP/1.1\r\nHost: \0\r\n\r\n", 400),
    "two lengths": (b"PUT /s/a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
    "a signed length": (b"PUT /s/a HTTP/1.1\r\nContent-Length: +1\r\n\r\nx", 400),
    "a negative length": (b"PUT /s/a HTTP/1.1\r\nContent-Length: -1\r\n\r\nx", 400),
    "a length in other digits": ("PUT /s/a HTTP/1.1\r\nContent-Length: ١\r\n\r\nx".encode(), 400),
    "an endless length": (b"PUT /s/a HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nx", 400),
    "another method": (b"POST /s/a HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
    "no length": (b"PUT /s/a HTTP/1.1\r\n\r\nvalue", 411),
    "an oversized body": (put("/s/a", b"")[:-5] + b"99999999\r\n\r\n" + b"x" * 100_000, 413),
    "a length of terabytes": (put("/s/a", b"")[:-5] + b"9999999999999\r\n\r\n", 413),
    "an expectation": (b"PUT /s/a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n", 417),
    "an endless field": (b"GET /s/a HTTP/1.1\r\nHost: " + b"x" * 70_000, 431),
    "a chunked body": (b"PUT /s/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", 501),
    "a length and chunks": (
        b"PUT /s/a HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        501,
    ),
}


@pytest.mark.parametrize("name", TURNED_DOWN)
def test_turned_down(server: Server, name: str) -> None:
    data, status = TURNED_DOWN[name]
    reply = server.talk(data + get("/s/a"), half_close=False)  # nothing after it is taken
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == b"%d" % status
    assert b"\r\nConnection: close" in head
    assert body == b""
    assert sum(server.store.counts.values()) == 1
    assert server.ask("GET", "/s/a") == (404, b"")


def test_dots_are_only_a_name(server: Server) -> None:
    for path in ("/../..", "/./.", "/../etc"):
        server.ask("PUT", path, path.encode())
    assert server.ask("GET", "/../..") == (200, b"/../..")
    assert server.ask("GET", "/./.") == (200, b"/./.")


def test_random_bytes_do_no_harm(server: Server) -> None:
    pieces = [
        get("/global/0"),
        put("/global/0", b"value"),
        b"\r\n\r\n",
        b"Content-Length: 7\r\n",
        b" HTTP/1.1\r\n",
        b"\0",
    ]
    generator = random.Random(3)
    for _ in range(200):
        data = b"".join(generator.choice([*pieces, generator.randbytes(9)]) for _ in range(generator.randrange(1, 8)))
        server.talk(data)
    assert server.ask("PUT", "/global/0", b"still here") == (200, b"")
    assert server.ask("GET", "/global/0") == (200, b"still here")


# ---- limits


def test_slow_clients_are_dropped(make_server: Callable[..., Server], wait_until: Wait) -> None:
    server = make_server(request_timeout_s=0.2)
    silent, slow, deaf = server.connect(), server.connect(), server.connect()
    with silent, slow, deaf:
        slow.sendall(b"PUT /s/a HTTP/1.1\r\nContent-Length: 1000\r\n\r\nonly this")
        deaf.sendall(put("/s/big", b"v" * (6 << 20)) + get("/s/big") * 3)
        assert read_all(slow) == b""
        assert read_all(silent) == b""
        wait_until(lambda: server.store.counts.get("too slow") == 2, "two clients counted as too slow")
    assert server.ask("GET", "/s/a") == (404, b"")


def test_dripping_bytes_do_not_win_time(make_server: Callable[..., Server], wait_until: Wait) -> None:
    server = make_server(request_timeout_s=0.3)
    with server.connect() as sock:

        def dropped() -> bool:
            try:
                sock.sendall(b"G")
            except (BrokenPipeError, ConnectionResetError):
                return True
            return bool(server.store.counts)

        wait_until(dropped, "the dripping client dropped")
    assert server.store.counts == {"too slow": 1}


def test_memory_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore, "MAX_STORED", 100_000)
    assert server.ask("PUT", "/s/a", b"x" * 60_000)[0] == 200
    assert server.ask("PUT", "/s/b", b"x" * 60_000)[0] == 507
    assert server.store.counts == {"Insufficient Storage": 1}
    server.ask("DELETE", "/s/a")
    assert server.ask("PUT", "/s/b", b"x" * 60_000)[0] == 200


def test_bodies_on_their_way_count(server: Server, monkeypatch: pytest.MonkeyPatch, wait_until: Wait) -> None:
    monkeypatch.setattr(kvstore, "MAX_STORED", 100_000)
    with server.connect() as sock:
        sock.sendall(put("/s/a", b"x" * 60_000)[:-1])
        wait_until(lambda: server.ask("PUT", "/s/b", b"x" * 60_000)[0] == 507, "the awaited body counted")
    # The one that would have sent it is gone, and so is its claim.
    wait_until(lambda: server.ask("PUT", "/s/b", b"x" * 60_000)[0] == 200, "room again")
    assert server.store.counts["cut short"] == 1


def test_connections_are_bounded(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    """Those above the limit wait until one of the others is dropped; none is turned away."""
    monkeypatch.setattr(kvstore, "MAX_CONNECTIONS", 4)
    server = make_server(request_timeout_s=0.5)
    idle = [server.connect() for _ in range(4)]
    try:
        assert server.ask("PUT", "/s/a", b"1") == (200, b"")
        assert read_all(idle[0]) == b""
    finally:
        for sock in idle:
            sock.close()


def test_only_admitted_addresses(make_server: Callable[..., Server]) -> None:
    asked = []

    def admit(address: str) -> bool:
        asked.append(address)
        return address != "127.0.0.2"

    store = KeyValueStore("127.0.0.1", admit)
    port = store.start()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20, source_address=("127.0.0.2", 0)) as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(get("/s/a"))
            assert read_all(sock) == b""
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            sock.sendall(get("/s/a"))
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == answer("404 Not Found")
    finally:
        store.close()
    assert asked == ["127.0.0.2", "127.0.0.1"]
    assert store.counts == {"address not admitted": 1}


# ---- its life


def test_reset_forgets_and_moves(server: Server) -> None:
    server.ask("PUT", "/global/0", b"attempt 0")
    with server.connect() as late:
        late.sendall(b"PUT /global/1 HTTP/1.1\r\nContent-Length: 9\r\n\r\natt")
        old, server.port = server.port, server.store.reset()
        assert server.port != old
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            late.sendall(b"empt 0")
        assert read_all(late) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", old), timeout=20)
    assert server.ask("GET", "/global/0") == (404, b"")
    assert server.ask("GET", "/global/1") == (404, b"")


def test_close_ends_open_connections_and_can_be_repeated(server: Server) -> None:
    with server.connect() as sock:
        server.store.close()
        server.store.close()
        assert read_all(sock) == b""


def test_store_of_a_job() -> None:
    """Each attempt's hosts are let in, and find nothing of the attempt before."""
    said: list[str] = []
    job = JobStore(several=True, say=said.append)

    def ask(port: int, source: str, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(source, 0)) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    try:
        first = job.open("10.0.0.1", ["10.0.0.2"])
        assert ask(first, "127.0.0.1", put("/global/0", b"old")) == answer("200 OK")
        second = job.open("10.0.0.1", ["10.0.0.3"])
        assert ask(second, "127.0.0.1", get("/global/0")) == answer("404 Not Found")
        with pytest.raises(ConnectionRefusedError):
            ask(first, "127.0.0.1", get("/global/0"))
        ask(second, "127.0.0.1", b"garbage\r\n\r\n")
    finally:
        job.release()
        job.release()
    assert said == ["Horovod's key-value store turned down connections or requests (Bad Request: 1)"]


@pytest.mark.root
def test_store_of_a_job_between_hosts(as_root: None, tmp_path: Path) -> None:
    """Only the attempt's hosts reach it."""
    if lacking():
        pytest.skip(lacking())
    script = tmp_path / "leader.py"
    script.write_text(
        "import sys\n"
        "from launcher.cluster.kvstore import JobStore\n"
        "print(JobStore(several=True, say=print).open(sys.argv[1], [sys.argv[2]]), flush=True)\n"
        "sys.stdin.read()\n"
    )
    client = (
        "import http.client, sys\n"
        "connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=20)\n"
        "connection.request('GET', '/global/0')\n"
        "print(connection.getresponse().status)\n"
    )
    with Network(tmp_path / "hosts", 3) as network:
        leader, member, stranger = network.machines
        command = [*leader.wrapper("/"), sys.executable, str(script), leader.address, member.address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            port = process.stdout.readline().decode().strip()
            asked = [
                machine.run(sys.executable, "-c", client, leader.address, port, check=False)
                for machine in (leader, member, stranger)
            ]
            process.kill()
    assert [done.stdout.strip() for done in asked] == ["404", "404", ""]
    assert "RemoteDisconnected" in asked[2].stderr or "ConnectionResetError" in asked[2].stderr


def test_store_of_a_job_without_ipv4() -> None:
    with pytest.raises(ClusterError, match=r"by IPv6 \(fd77::1\), but Horovod's Gloo controller speaks IPv4 only"):
        JobStore(several=True, say=print).open("fd77::1", ["fd77::2"])


@pytest.mark.parametrize("address", ["192.0.2.1", "::1", "no-such-host.invalid"])
def test_address_that_is_not_ours(address: str) -> None:
    with pytest.raises(ClusterError, match=r"cannot listen on .*; it needs an IPv4 address of this host"):
        KeyValueStore(address, lambda peer: True).start()


def test_signals_go_to_the_main_thread(tmp_path: Path) -> None:
    """With every signal blocked in the store's thread, one that arrives ends the main thread's wait."""
    script = tmp_path / "main.py"
    script.write_text(
        "import os, select, signal, sys\n"
        "from launcher.cluster.kvstore import KeyValueStore\n"
        "def stop(*_): sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "store = KeyValueStore('127.0.0.1', lambda address: True)\n"
        "store.start()\n"
        "assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "masks = [open(f'/proc/self/task/{task}/status').read().split('SigBlk:')[1].split()[0]\n"
        "         for task in os.listdir('/proc/self/task') if int(task) != os.getpid()]\n"
        "assert len(masks) == 1 and int(masks[0], 16) & (1 << (signal.SIGTERM - 1)), masks\n"
        "print('ready', flush=True)\n"
        "select.poll().poll()\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 7
