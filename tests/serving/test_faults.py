"""Clients, handlers and processes that misbehave: who is answered what, and that the server stays or says why not."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import re
import select
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..faults.test_memory import MIB, Group, memory_group

# A request is [name of a function, its arguments...].
OPERATIONS = """
    import os, signal, sys, time

    def model_fn(model_dir):
        return 0

    def predict_fn(data, model):
        return globals()[data[0]](*data[1:])

    def input_fn(body, content_type):
        import json
        return json.loads(body)

    def echo(value):
        return value

    def pid():
        return os.getpid()

    def begin(path):
        with open(path + ".part", "w") as file:
            file.write(str(os.getpid()))
        os.rename(path + ".part", path)

    def wait(path):
        while not os.path.exists(path):
            time.sleep(0.005)

    def hold(begun, gate, value):
        begin(begun)
        wait(gate)
        return value
"""
METRICS = {"SAGEMAKER_SAFE_PORT_RANGE": "21000-21999"}
JSON = {"Content-Type": "application/json"}


def ask(served: Any, *operation: Any) -> http.client.HTTPConnection:
    """Sends a request; its answer is to be read."""
    link: http.client.HTTPConnection = served.connect()
    link.request("POST", "/invocations", json.dumps(operation), JSON)
    return link


def result(link: http.client.HTTPConnection) -> tuple[int, Any]:
    """The status and the content of the answer that comes next."""
    with link.getresponse() as response:
        return response.status, json.loads(response.read())


def call(served: Any, *operation: Any) -> Any:
    """What an operation gives."""
    answer = served.invoke(json.dumps(operation))
    assert answer.status == 200, answer
    return answer.json()


def metric(served: Any, name: str) -> float:
    """A number of ``/metrics``."""
    port = int(re.search(r"metrics at port (\d+)", served.log())[1])  # type: ignore[index]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def request_text(*operation: Any, version: str = "1.1", more: str = "") -> bytes:
    """A request, as it is sent."""
    body = json.dumps(operation).encode()
    head = f"POST /invocations HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class _Answers(io.BytesIO):
    """Bytes that a response may not close."""

    def makefile(self, mode: str) -> _Answers:
        return self

    def close(self) -> None:
        pass


def answers(text: bytes) -> list[tuple[int, bytes]]:
    """Statuses and bodies of the answers that came one after the other."""
    source, found = _Answers(text), []
    while source.tell() < len(text):
        response = http.client.HTTPResponse(source)  # type: ignore[arg-type]
        response.begin()
        found.append((response.status, response.read()))
    return found


def until_closed(link: socket.socket) -> bytes:
    """All that comes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := link.recv(65536):
            received += piece
    return received


def gate_in(served: Any, name: str) -> Path:
    """A file that a test makes, or waits for."""
    path: Path = served.job.directory / name
    return path


# ---- processes that end


def test_a_worker_that_is_killed_loses_its_own_request_and_no_other(served: Any, wait_until: Any) -> None:
    served.code(OPERATIONS).ready(workers=2)
    begun, gate = gate_in(served, "begun"), gate_in(served, "gate")
    lost = ask(served, "hold", str(begun), str(gate), "lost")
    wait_until(begun.exists, "the handler")
    other_begun = gate_in(served, "other")
    kept = ask(served, "hold", str(other_begun), str(gate), "kept")
    wait_until(other_begun.exists, "the other handler")
    os.kill(int(begun.read_text()), signal.SIGKILL)
    status, content = result(lost)
    assert (status, content["type"]) == (500, "WorkerDied")
    assert "SIGKILL" in content["message"]
    gate.touch()
    assert result(kept) == (200, "kept")
    wait_until(lambda: len(served.workers()) == 2, "another worker")
    assert served.ask("GET", "/ping").status == 200
    assert call(served, "echo", 1) == 1
    assert served.stop() == 0


def test_ping_is_503_while_no_worker_is_alive(served: Any, wait_until: Any) -> None:
    gate = gate_in(served, "gate")
    gate.touch()
    code = OPERATIONS.replace("return 0", f"wait({str(gate)!r})\n        return 0", 1)
    served.code(code).ready()
    gate.unlink()
    os.kill(call(served, "pid"), signal.SIGKILL)
    wait_until(lambda: served.ask("GET", "/ping").status == 503, "a /ping that fails")
    served.error(served.ask("GET", "/ping"), 503, "NotReady", "no worker is alive")
    waiting = ask(served, "echo", "patient")
    gate.touch()
    assert result(waiting) == (200, "patient")
    served.wait_ready()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("os._exit(3)", "ended with code 3"),
        ("os._exit(0)", "ended with code 0"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("os.abort()", "was killed by SIGABRT"),
        ("os.closerange(3, 1000); time.sleep(1000)", "closed its connection"),
    ],
)
def test_a_handler_that_ends_its_worker(served: Any, how: str, said: str) -> None:
    served.code(OPERATIONS + f"\n    def end():\n        {how}\n").ready()
    before = call(served, "pid")
    served.error(served.invoke(b'["end"]'), 500, "WorkerDied", said)
    assert call(served, "pid") != before
    assert served.stop() == 0


def test_a_crash_loop_ends_the_server_with_the_workers_code_and_a_line(served: Any) -> None:
    served.code(OPERATIONS + "\n    def end():\n        os._exit(9)\n").ready("--crash-limit", "3")
    for _ in range(3):
        with contextlib.suppress(http.client.HTTPException, OSError):  # the last may find that the server has ended
            served.error(served.invoke(b'["end"]'), 500, "WorkerDied", "ended with code 9")
    assert served.end() == 9
    verdicts = [line for line in served.log().splitlines() if line.startswith("[launcher] error: ")]
    assert len(verdicts) == 1, served.log()
    assert "3 workers in a row have died" in verdicts[0] and "ended with code 9" in verdicts[0]


def test_answers_between_crashes_are_no_crash_loop(served: Any) -> None:
    served.code(OPERATIONS + "\n    def end():\n        os._exit(9)\n").ready("--crash-limit", "2")
    for _ in range(4):
        served.error(served.invoke(b'["end"]'), 500, "WorkerDied")
        assert call(served, "echo", 1) == 1
    assert served.stop() == 0


def test_workers_that_die_without_a_request_end_the_server_with_a_verdict(served: Any) -> None:
    gate = gate_in(served, "gate")
    served.code(f"""
        import os, threading, time
        def model_fn(model_dir):
            def end():
                while not os.path.exists({str(gate)!r}):
                    time.sleep(0.005)
                os._exit(3)
            threading.Thread(target=end, daemon=True).start()
        def predict_fn(data, model):
            return 0
    """).ready("--crash-limit", "2", workers=2)
    gate.touch()
    assert served.end() == 3
    assert "ended with code 3" in served.log()
    assert sum(line.startswith("[launcher] error: ") for line in served.log().splitlines()) == 1


def guardian_of(served: Any) -> int:
    """The process above the workers."""
    worker = served.workers()[0]
    return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_killed_guardian_ends_the_server_with_70(served: Any) -> None:
    served.code(OPERATIONS).ready("--drain", "600", workers=2)
    os.kill(guardian_of(served), signal.SIGKILL)
    assert served.end() == 70
    assert "the guardian process has ended" in served.log()


def test_a_killed_guardian_ends_the_server_though_a_request_is_in_hand(served: Any, wait_until: Any) -> None:
    served.code(OPERATIONS).ready("--drain", "600", "--timeout", "600")
    begun = gate_in(served, "begun")
    ask(served, "hold", str(begun), str(gate_in(served, "never")), 0)  # nobody will be left to answer it
    wait_until(begun.exists, "the handler")
    os.kill(guardian_of(served), signal.SIGKILL)
    assert served.end() == 70


def test_a_killed_server_leaves_no_worker(served: Any) -> None:
    served.code(OPERATIONS).ready(workers=3)
    assert len(served.workers()) == 3
    served.job.process.kill()
    assert served.end() == -signal.SIGKILL
    served.job.assert_nothing_left()


@pytest.fixture
def group(as_root: None, wait_until: Any) -> Iterator[Group]:
    """A memory cgroup, removed when the test is over."""
    yield from memory_group("serve", 200 * MIB, wait_until)


@pytest.mark.root
def test_a_worker_that_the_memory_limit_kills_is_507(served: Any, group: Group) -> None:
    grow = """
    def grow():
        taken = []
        while True:
            taken.append(b"x" * (1 << 20))
    """
    served.code(OPERATIONS + grow).ready(workers=2, wrapper=group.wrapper)
    answer = served.invoke(b'["grow"]')
    served.error(answer, 507, "InsufficientMemory", "memory limit of 200 MiB")
    assert call(served, "echo", "alive") == "alive"
    killed = call(served, "pid")
    os.kill(killed, signal.SIGKILL)  # a later kill is not taken for another of its kind
    served.job.wait_for_line(f"(pid {killed}) was killed by SIGKILL", stream="stderr")
    assert call(served, "echo", "alive") == "alive"
    assert "WARNING" in served.log() and served.log().count("was killed by the memory limit") == 1
    assert served.stop() == 0


@pytest.mark.slow
def test_no_answer_goes_to_another_client_while_workers_are_killed(served: Any) -> None:
    served.code(OPERATIONS).ready("--crash-limit", "100", workers=3)
    clients, each = 8, 200
    wrong: list[Any] = []
    counts: dict[int, int] = {}
    lock = threading.Lock()
    done = threading.Event()
    due = threading.Semaphore(0)

    def client(number: int) -> None:
        link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        try:
            for i in range(each):
                identity = f"{number}-{i}-{os.urandom(4).hex()}"
                link.request("POST", "/invocations", json.dumps(["echo", identity]), JSON)
                status, content = result(link)
                with lock:
                    counts[status] = counts.get(status, 0) + 1
                    if sum(counts.values()) % 100 == 0:
                        due.release()
                    right = content == identity if status == 200 else content.get("type") == "WorkerDied"
                    if not right:
                        wrong.append((identity, status, content))
        except Exception as error:
            wrong.append((number, error))
        finally:
            link.close()

    def kill() -> None:
        chosen = random.Random(6)
        while due.acquire() and not done.is_set():
            workers = served.workers()
            if workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chosen.choice(workers), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in (killer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    due.release()
    killer.join()
    assert not wrong
    assert sum(counts.values()) == clients * each
    assert counts[200] > clients * each // 2
    assert "SIGKILL" in served.log()
    assert served.stop() == 0


# ---- clients


def test_a_client_that_leaves_while_it_waits_is_forgotten(served: Any, wait_until: Any) -> None:
    served.code(OPERATIONS).ready(env=METRICS)
    begun, gate, never = (gate_in(served, name) for name in ("begun", "gate", "never"))
    first = ask(served, "hold", str(begun), str(gate), "first")
    wait_until(begun.exists, "the handler")
    gone = ask(served, "begin", str(never))
    wait_until(lambda: metric(served, "launcher_requests_waiting") == 1, "a request that waits")
    gone.close()
    wait_until(lambda: metric(served, "launcher_requests_waiting") == 0, "that it is forgotten")
    gate.touch()
    assert result(first) == (200, "first")
    assert call(served, "echo", 1) == 1
    assert not never.exists()


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_client_that_leaves_while_it_is_answered_harms_nobody(served: Any, wait_until: Any, kind: str) -> None:
    code = OPERATIONS.replace("def predict_fn", f"{kind} predict_fn")
    if kind != "def":
        code += """
    async def hold_async(begun, gate, value):
        import asyncio
        begin(begun)
        try:
            while not os.path.exists(gate):
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            begin(begun + ".cancelled")
            raise
        return value
    """
        code = code.replace("return globals()[data[0]](*data[1:])", "return await globals()[data[0]](*data[1:])")
        code = code.replace("def echo", "async def echo").replace("def pid", "async def pid")
    served.code(code).ready()
    before = call(served, "pid")
    begun, gate = gate_in(served, "begun"), gate_in(served, "gate")
    gone = ask(served, "hold" if kind == "def" else "hold_async", str(begun), str(gate), "nobody's")
    wait_until(begun.exists, "the handler")
    gone.close()
    if kind == "def":
        link = ask(served, "echo", "mine")
        gate.touch()
        assert result(link) == (200, "mine")
    else:
        wait_until(gate_in(served, "begun.cancelled").exists, "that the handler is cancelled")
    assert [call(served, "echo", i) for i in range(5)] == list(range(5))
    assert call(served, "pid") == before


def test_an_async_request_whose_client_left_before_it_began_does_not_cost_the_worker(
    served: Any, wait_until: Any
) -> None:
    served.code("""
        import os, time
        def model_fn(model_dir):
            return 0
        async def predict_fn(data, model):
            if data[0] == 0:
                return os.getpid()
            open(data[1], "w").close()
            while not os.path.exists(data[2]):
                time.sleep(0.005)  # the event loop waits, too
            return "held"
        def input_fn(body, content_type):
            import json
            return json.loads(body)
    """).ready("--timeout", "3", env=METRICS)
    before = served.invoke(b"[0]").json()
    begun, gate = gate_in(served, "begun"), gate_in(served, "gate")
    held = ask(served, 1, str(begun), str(gate))
    wait_until(begun.exists, "the handler")
    gone = ask(served, 0)
    wait_until(lambda: metric(served, "launcher_requests_in_hand") == 2, "that the worker has both")
    gone.close()
    # The server hears of it before it answers anything that is asked later.
    assert served.ask("GET", "/ping").status == 200
    gate.touch()
    assert result(held) == (200, "held")
    wait_until(lambda: metric(served, "launcher_requests_in_hand") == 0, "that no request is in hand")
    assert served.invoke(b"[0]").json() == before
    assert metric(served, "launcher_worker_deaths_total") == 0


def test_a_client_that_leaves_before_the_worker_has_read_its_request(served: Any, wait_until: Any) -> None:
    served.code(OPERATIONS).ready("--timeout", "5")
    (worker,) = served.workers()
    assert call(served, "echo", 1) == 1
    os.kill(worker, signal.SIGSTOP)
    gone = ask(served, "echo", 2)
    assert served.ask("GET", "/ping").status == 200
    gone.close()
    for _ in range(3):  # the server has heard of it before it answers this
        assert served.ask("GET", "/ping").status == 200
    os.kill(worker, signal.SIGCONT)
    assert [call(served, "echo", i) for i in range(3, 6)] == [3, 4, 5]
    assert served.workers() == [worker]


def warm_up(served: Any) -> None:
    """So many quick answers that workers are sent their next request ahead."""
    link = served.connect()
    for i in range(300):
        link.request("POST", "/invocations", json.dumps(["echo", i]), JSON)
        assert result(link) == (200, i)


@pytest.mark.parametrize("fate", ["the other is free", "killed", "hangs"])
def test_a_request_that_was_sent_ahead_is_answered_by_another(served: Any, wait_until: Any, fate: str) -> None:
    served.code(OPERATIONS).ready("--timeout", "2" if fate == "hangs" else "60", workers=2, env=METRICS)
    warm_up(served)
    held = []
    for i in range(2):
        begun = gate_in(served, f"begun{i}")
        held.append((ask(served, "hold", str(begun), str(gate_in(served, f"gate{i}")), i), begun))
        wait_until(begun.exists, "the handler")
    marks = [gate_in(served, f"mark{i}") for i in range(4)]
    behind = [ask(served, "begin", str(mark)) for mark in marks]
    leaves = ask(served, "begin", str(gate_in(served, "never")))
    assert served.ask("GET", "/ping").status == 200
    leaves.close()
    assert served.ask("GET", "/ping").status == 200
    if fate == "killed":
        os.kill(int(held[0][1].read_text()), signal.SIGKILL)
    if fate != "hangs":
        gate_in(served, "gate1").touch()
        assert result(held[1][0]) == (200, 1)
    for link, mark in zip(behind, marks, strict=True):
        status, content = result(link)
        assert (status, content) == (200, None) or (fate == "hangs" and content["type"] == "QueueTimeout"), content
        assert mark.exists() == (status == 200)
    if fate == "killed":
        assert result(held[0][0])[0] == 500
    elif fate == "hangs":
        assert [result(link)[0] for link, _ in held] == [504, 504]
    else:
        gate_in(served, "gate0").touch()
        assert result(held[0][0]) == (200, 0)
    assert [call(served, "echo", i) for i in range(5)] == list(range(5))
    assert not gate_in(served, "never").exists()


STREAMS = """
    import os, time
    def model_fn(model_dir):
        return 0
    def input_fn(body, content_type):
        import json
        return json.loads(body)
    {kind} predict_fn(data, model):
        if data[0] == "pid":
            return str(os.getpid())
        def pieces():
            try:
                while True:
                    yield b"x" * data[1]
                    time.sleep(0.001)
            finally:
                open(data[2], "w").close()
        return pieces() if data[0] == "pieces" else map(lambda i: b"x" * data[1], range(1 << 60))
    def output_fn(prediction, accept):
        return prediction, "text/plain"
"""
ASYNC_PIECES = STREAMS.replace("def pieces", "async def pieces").replace(
    "time.sleep(0.001)", "await __import__('asyncio').sleep(0.001)"
)


@pytest.mark.parametrize("size", [10, 1 << 18])
@pytest.mark.parametrize("kind", ["def", "async def", "async pieces"])
def test_the_generator_of_a_client_that_leaves_is_closed(served: Any, wait_until: Any, kind: str, size: int) -> None:
    code = ASYNC_PIECES.format(kind="async def") if kind == "async pieces" else STREAMS.format(kind=kind)
    served.code(code).ready()
    before = served.invoke(b'["pid"]').body
    for i in range(2):
        closed = gate_in(served, f"closed{i}")
        link = ask(served, "pieces", size, str(closed))
        response = link.getresponse()
        assert response.read(5) == b"xxxxx"
        response.close()
        link.close()
        wait_until(closed.exists, "that the generator is closed")
    assert served.invoke(b'["pid"]').body == before
    assert "Traceback" not in served.log()


def test_an_iterator_that_can_not_be_closed_is_left_without_blame(served: Any) -> None:
    served.code(STREAMS.format(kind="def")).ready()
    before = served.invoke(b'["pid"]').body
    link = ask(served, "map", 1 << 16)
    response = link.getresponse()
    assert response.read(5) == b"xxxxx"
    response.close()
    link.close()
    assert served.invoke(b'["pid"]').body == before
    assert "Traceback" not in served.log() and "broke off" not in served.log()


def trickle(link: socket.socket, pieces: Iterator[bytes]) -> bytes:
    """Sends a little, again and again, until there is an answer."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if select.select([link], [], [], 0.05)[0]:
            return until_closed(link)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(next(pieces))
    pytest.fail("the server let a slow client have its way")


def endless(piece: bytes) -> Iterator[bytes]:
    while True:
        yield piece


def test_a_header_that_comes_slowly_is_408_and_others_are_served(served: Any) -> None:
    served.code(OPERATIONS).ready("--header-timeout", "1")
    slow = [served.socket() for _ in range(50)]
    for link in slow:
        link.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\n")
    for i in range(20):
        assert call(served, "echo", i) == i
    answer = trickle(slow[0], endless(b"X-Slow: 1\r\n"))
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == 408
    for link in slow[1:]:
        assert until_closed(link).startswith(b"HTTP/1.1 408 ")
    # the second request of a connection, too
    link = served.socket()
    link.sendall(request_text("echo", 1))
    assert b" 200 " in link.recv(65536)
    assert trickle(link, iter([b"G", b"E", b"T", *(b" " for _ in range(1000))])).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_does_not_come_is_408_and_others_are_served(served: Any) -> None:
    served.code(OPERATIONS).ready("--body-timeout", "1")
    whole = request_text("echo", "x" * 100)
    slow = [served.socket() for _ in range(50)]
    for link in slow:
        link.sendall(whole[:-50])
    for i in range(20):
        assert call(served, "echo", i) == i
    for link in slow:
        assert until_closed(link).startswith(b"HTTP/1.1 408 ")
    # one that comes slowly, but comes, is answered
    link = served.socket()
    for i in range(len(whole) // 10 + 1):
        select.select([], [], [], 0.06)
        link.sendall(whole[10 * i : 10 * i + 10])
    assert b" 200 " in link.recv(65536)


def test_a_connection_that_says_nothing_is_closed(served: Any) -> None:
    served.code(OPERATIONS).ready("--keep-alive", "1")
    link = served.socket()
    assert until_closed(link) == b""


@pytest.mark.parametrize("asked", [False, True])
def test_a_connection_of_empty_lines_is_closed(served: Any, asked: bool) -> None:
    served.code(OPERATIONS).ready("--keep-alive", "1", "--header-timeout", "1")
    link = served.socket()
    if asked:
        link.sendall(request_text("echo", 1))
        assert b" 200 " in link.recv(65536)
    link.sendall(b"\r\n")
    link.settimeout(15)
    answer = until_closed(link)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")


CHECKSUM = """
    import hashlib
    def model_fn(model_dir):
        return 0
    def input_fn(body, content_type):
        return body
    def predict_fn(data, model):
        return hashlib.sha256(data).hexdigest(), data
    def output_fn(prediction, accept):
        digest, data = prediction
        return (data, "application/x-whole") if accept == "application/x-whole" else (digest, "text/plain")
"""


@pytest.mark.slow
def test_a_body_of_100_mb(served: Any) -> None:
    served.code(CHECKSUM).ready()
    body = os.urandom(1 << 20) * 100
    digest = hashlib.sha256(body).hexdigest()
    kind = "application/octet-stream"
    assert served.invoke(body, kind).body.decode() == digest
    assert hashlib.sha256(served.invoke(body, kind, "application/x-whole").body).hexdigest() == digest
    pieces = (body[i : i + (1 << 20)] for i in range(0, len(body), 1 << 20))
    assert served.invoke(pieces, kind).body.decode() == digest
    link = served.connect()
    answer = served.ask("POST", "/invocations", body + b"x", {"Content-Type": kind}, link)
    served.error(answer, 413, "PayloadTooLarge", "at most 100 MB")
    assert served.ask("POST", "/invocations", b"", {"Content-Type": kind}, link).status == 200


def test_a_thousand_connections_are_kept_and_each_gets_its_own_answers(served: Any) -> None:
    served.code(OPERATIONS).ready()
    links = [served.connect() for _ in range(1000)]
    for turn in range(2):
        for i, link in enumerate(links):
            link.request("POST", "/invocations", json.dumps(["echo", [turn, i]]), JSON)
        sockets = [link.sock for link in links]
        for i, link in enumerate(links):
            assert result(link) == (200, [turn, i])
        assert [link.sock for link in links] == sockets  # none was opened anew


def test_pipelined_requests_are_answered_in_order(served: Any) -> None:
    served.code(OPERATIONS).ready(workers=2)
    texts = [request_text("echo", i) for i in range(20)]
    texts[-1] = request_text("echo", 19, more="Connection: close\r\n")
    assert answers(served.raw(b"".join(texts))) == [(200, str(i).encode()) for i in range(20)]


def test_garbage_behind_a_request_does_not_get_into_its_answer(served: Any, wait_until: Any) -> None:
    gate = gate_in(served, "gate")
    served.code(
        OPERATIONS
        + """
    def pieces(gate):
        yield b"first"
        wait(gate)
        yield b"second"
    def output_fn(prediction, accept):
        return prediction, "text/plain"
    """
    ).ready()
    link = served.socket()
    link.sendall(request_text("pieces", str(gate)))
    received = b""
    while b"first\r\n" not in received:
        received += link.recv(65536)
    link.sendall(b"GARBAGE\r\n\r\n")
    assert served.ask("GET", "/ping").status == 200
    gate.touch()
    rest = until_closed(link)
    head, _, later = rest.partition(b"0\r\n\r\n")
    assert b"HTTP/1.1" not in head, rest
    assert not later or later.startswith(b"HTTP/1.1 400 ")


def test_garbage_behind_a_request_is_not_its_answer(served: Any, wait_until: Any) -> None:
    served.code(OPERATIONS).ready()
    begun, gate = gate_in(served, "begun"), gate_in(served, "gate")
    link = served.socket()
    link.sendall(request_text("hold", str(begun), str(gate), "held"))
    wait_until(begun.exists, "the handler")
    link.sendall(b"GARBAGE\r\n\r\n")
    assert served.ask("GET", "/ping").status == 200
    gate.touch()
    # The first answer on the connection is that of the first request, if there is any.
    received = until_closed(link)
    assert not received or received.startswith(b"HTTP/1.1 200 "), received


def test_expect_100_continue(served: Any) -> None:
    served.code(OPERATIONS).ready(env={"SAGEMAKER_MAX_PAYLOAD_IN_MB": "1"})
    whole = request_text("echo", 5, more="Expect: 100-continue\r\nConnection: close\r\n")
    head, _, body = whole.partition(b"\r\n\r\n")
    link = served.socket()
    link.sendall(head + b"\r\n\r\n")
    assert link.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    link.sendall(body)
    assert answers(until_closed(link)) == [(200, b"5")]
    link = served.socket()
    link.sendall(b"POST /invocations HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9999999\r\n\r\n")
    assert link.recv(65536).startswith(b"HTTP/1.1 413 ")  # before a byte of it was sent


def test_http_1_0(served: Any) -> None:
    served.code(OPERATIONS).ready()
    received = served.raw(request_text("echo", 5, version="1.0"))
    assert answers(received) == [(200, b"5")]


def test_http_1_0_has_no_chunks(served: Any) -> None:
    served.code(OPERATIONS + "\n    def pieces():\n        yield from ('first', 'second')\n").ready()
    received = served.raw(request_text("pieces", version="1.0"))
    head, _, body = received.partition(b"\r\n\r\n")
    assert b" 200 " in head
    assert b"chunked" not in head.lower()  # RFC 9112, 6.1
    assert body == b"firstsecond"


def test_chunked_requests(served: Any) -> None:
    served.code(OPERATIONS).ready()
    body = json.dumps(["echo", "x" * 1000]).encode()

    def pieces() -> Iterator[bytes]:
        for i in range(0, len(body), 7):
            yield body[i : i + 7]

    assert served.invoke(pieces()).json() == "x" * 1000
    text = b"POST /invocations HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    text += b"%x;extension=1\r\n%s\r\n0\r\nTrailer: x\r\n\r\n" % (len(body), body)
    assert answers(served.raw(text)) == [(200, b'"' + b"x" * 1000 + b'"')]
    assert served.raw(text.replace(b"\r\n0\r\n", b"\r\nzzz\r\n")).startswith(b"HTTP/1.1 400 ")


def test_head_has_no_body(served: Any) -> None:
    served.code(OPERATIONS).ready()
    for path in (b"/ping", b"/nowhere", b"/invocations", b"/execution-parameters"):
        received = served.raw(b"HEAD %s HTTP/1.1\r\nConnection: close\r\n\r\n" % path)
        head, _, body = received.partition(b"\r\n\r\n")
        assert re.match(rb"HTTP/1.1 (200|404|405) ", head), received
        assert body == b""


def test_an_offer_to_upgrade_is_passed_over(served: Any) -> None:
    # Java's HttpClient and `curl --http2` send it with each first request.
    served.code(OPERATIONS).ready()
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    link = served.socket()
    for i in range(3):
        link.sendall(request_text("echo", i, more=offer))
        assert answers(link.recv(65536)) == [(200, str(i).encode())]
    link.sendall(b"GET /ping HTTP/1.1\r\n" + offer.encode() + b"\r\n")
    assert answers(link.recv(65536)) == [(200, b"")]


def test_odd_requests_get_an_answer(served: Any) -> None:
    served.code(OPERATIONS).ready()
    wrong = []
    for line in (
        b"OPTIONS * HTTP/1.1",
        b"GET http://elsewhere/ping HTTP/1.1",
        b"GET /%ff%00 HTTP/1.1",
        b"GET /\xff\xfe HTTP/1.1",
        b"CONNECT x:80 HTTP/1.1",
        b"GET /ping?%zz=&&& HTTP/1.1",
        b"PROPFIND /ping HTTP/1.1",
    ):
        received = served.raw(line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
        if not re.match(rb"HTTP/1.1 (200|400|404|405) ", received):
            wrong.append((line, received))
    assert not wrong
    assert served.ask("GET", "/ping").status == 200
    assert "Traceback" not in served.log() and "fault of the server" not in served.log()


def test_many_headers_reach_the_handler(served: Any) -> None:
    served.code("""
        def model_fn(model_dir):
            return 0
        def predict_fn(data, model, context):
            return {name: context.headers[name] for name in context.headers if name.startswith("x-many")}
    """).ready()
    many = {f"x-many-{i}": "v" * i + "\xe9" for i in range(99)}  # the client's own bound is 100
    assert served.ask("POST", "/invocations", b"0", {**JSON, **many}).json() == many
    text = b"".join(b"X-Many-%d: %d\r\n" % (i, i) for i in range(2000))
    received = served.raw(b"POST /invocations HTTP/1.1\r\nConnection: close\r\n" + text + b"Content-Length: 1\r\n\r\n0")
    assert len(json.loads(answers(received)[0][1])) == 2000


# ---- streams


def test_a_stream_that_fails_before_its_first_piece_is_an_error_like_any_other(served: Any) -> None:
    served.code(OPERATIONS + "\n    def pieces():\n        raise LookupError('none')\n        yield 1\n").ready()
    served.error(served.invoke(b'["pieces"]'), 500, "HandlerFailed", "LookupError: none")
    assert call(served, "echo", 1) == 1


@pytest.mark.parametrize("how", ["raise LookupError('midway')", "sys.exit(3)", "os._exit(3)"])
def test_a_stream_that_fails_midway_is_not_whole(served: Any, how: str) -> None:
    served.code(OPERATIONS + f"\n    def pieces():\n        yield 'x' * 10\n        {how}\n        yield 1\n").ready()
    link = served.socket()
    link.sendall(request_text("pieces"))
    received = until_closed(link)
    assert not received or received.startswith(b"HTTP/1.1 200 ")
    assert not received.endswith(b"0\r\n\r\n")
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        served.invoke(b'["pieces"]')
    assert call(served, "echo", 1) == 1
    if "midway" in how:
        assert "the answer broke off: LookupError: midway" in served.log()


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PROGRESS = """
    def pieces(count, progress):
        import hashlib
        with open(progress, "wb", buffering=0) as file:
            for i in range(count):
                file.write(b".")
                yield hashlib.sha256(str(i).encode()).digest() * 8192  # 256 KiB
"""


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_client_that_reads_slowly_slows_its_handler(served: Any, wait_until: Any, kind: str) -> None:
    served.code((OPERATIONS + PROGRESS).replace("def predict_fn", f"{kind} predict_fn")).ready(workers=2)
    progress = gate_in(served, "progress")
    count = 400  # 100 MiB
    before = resident(served.job.process.pid)
    link = ask(served, "pieces", count, str(progress))
    response = link.getresponse()
    wait_until(lambda: progress.exists() and progress.stat().st_size > 4, "some pieces")
    for i in range(200):  # others are served meanwhile
        assert call(served, "echo", i) == i
    assert progress.stat().st_size < 100, "the handler did not wait"
    assert resident(served.job.process.pid) - before < 48 << 20
    digest = hashlib.sha256()
    while piece := response.read(1 << 18):
        digest.update(piece)
    wanted = hashlib.sha256()
    for i in range(count):
        wanted.update(hashlib.sha256(str(i).encode()).digest() * 8192)
    assert digest.digest() == wanted.digest()


def test_a_client_that_does_not_read_costs_no_worker(served: Any, wait_until: Any) -> None:
    served.code(OPERATIONS + PROGRESS).ready("--stream-timeout", "1", "--crash-limit", "1", env=METRICS)
    before = call(served, "pid")
    progress = gate_in(served, "progress")
    link = ask(served, "pieces", 4000, str(progress))
    assert link.getresponse().status == 200
    wait_until(lambda: metric(served, "launcher_requests_in_hand") == 1, "the request")
    wait_until(lambda: metric(served, "launcher_requests_in_hand") == 0, "that it is given up")
    assert call(served, "pid") == before  # the handler waited for the client, not the other way round
    assert served.stop() == 0


# ---- handlers


def test_a_handler_that_leaks_is_replaced_and_no_request_fails(served: Any, wait_until: Any) -> None:
    leak = """
    taken = []
    def leak():
        taken.append(bytearray(b"x" * (8 << 20)))
        return os.getpid()
    """
    served.code(OPERATIONS + leak).ready("--max-worker-mb", "100", workers=2)
    seen = set()

    def replaced() -> bool:
        seen.add(call(served, "leak"))
        return len(seen) > 2

    wait_until(replaced, "a worker in the place of another", 60)
    assert "more than 100: another takes its place" in served.log()
    assert "WARNING" not in served.log()
    assert served.stop() == 0


def test_a_handler_that_hangs_is_504_and_its_worker_replaced(served: Any, wait_until: Any) -> None:
    served.code(OPERATIONS).ready("--timeout", "1")
    before = call(served, "pid")
    begun, never = gate_in(served, "begun"), gate_in(served, "never")
    link = ask(served, "hold", str(begun), str(never), 0)
    wait_until(begun.exists, "the handler")
    behind = [ask(served, "echo", i) for i in range(3)]
    status, content = result(link)
    assert (status, content["type"]) == (504, "AnswerTimeout")
    for i, one in enumerate(behind):
        status, content = result(one)
        assert (status, content) == (200, i) or (status, content["type"]) == (503, "QueueTimeout")
    assert call(served, "pid") != before
    assert served.stop() == 0


def test_an_async_handler_that_hangs_is_504_and_the_others_are_answered(served: Any, wait_until: Any) -> None:
    served.code("""
        import asyncio, os, time
        def model_fn(model_dir):
            return 0
        async def predict_fn(data, model):
            if data == 1:
                await asyncio.sleep(1000)
            if data == 2:
                time.sleep(1000)  # the event loop, too
            return os.getpid()
        def input_fn(body, content_type):
            return int(body)
    """).ready("--timeout", "1")
    before = served.invoke(b"0").json()
    link = served.connect()
    link.request("POST", "/invocations", b"1", JSON)
    assert served.invoke(b"0").json() == before
    assert result(link)[0] == 504
    assert served.invoke(b"0").json() == before  # it could be cancelled
    assert served.invoke(b"2").status == 504
    wait_until(lambda: before not in served.workers(), "the end of the worker that is stuck")
    assert served.invoke(b"0").json() != before


def test_a_long_queue_does_not_kill_workers(served: Any, wait_until: Any) -> None:
    # The first takes the most of the time that the second has: the second's handler has not hung.
    served.code(OPERATIONS).ready("--timeout", "2", env=METRICS)
    before = call(served, "pid")
    begun, gate, second = (gate_in(served, name) for name in ("begun", "gate", "second"))
    first = ask(served, "hold", str(begun), str(gate), 1)
    wait_until(begun.exists, "the handler")
    late = ask(served, "hold", str(second), str(gate_in(served, "later")), 2)
    wait_until(lambda: metric(served, "launcher_requests_waiting") == 1, "a request that waits")
    select.select([], [], [], 1.6)  # work, not waiting for a state
    gate.touch()
    assert result(first) == (200, 1)
    wait_until(second.exists, "the second handler")
    select.select([], [], [], 0.7)
    gate_in(served, "later").touch()
    assert result(late)[0] in (200, 503, 504)  # it may be too late for its client
    assert call(served, "pid") == before
    assert metric(served, "launcher_worker_deaths_total") == 0


FORKS = """
    def fork_and_return():
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return "parent"
        return "child"

    def fork_and_exit():
        child = os.fork()
        if child:
            return os.waitpid(child, 0)[1]
        sys.exit(7)

    def fork_and_raise():
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return "parent"
        raise ValueError("child")

    def fork_in_pieces():
        yield "a"
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            yield "parent"
        else:
            yield "child"

    def fork_and_stay(alone):
        child = os.fork()
        if child:
            return child
        if alone:
            os.setsid()
        while True:
            time.sleep(1)

    def process():
        import multiprocessing
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(abs, [-1, -2, -3])
"""


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_handler_that_forks_gives_one_answer(served: Any, kind: str) -> None:
    code = (OPERATIONS + FORKS).replace("def predict_fn", f"{kind} predict_fn")
    served.code(code).ready("--timeout", "10")
    before = call(served, "pid")
    link = served.connect()

    def again(*operation: Any) -> Any:
        link.request("POST", "/invocations", json.dumps(operation), JSON)
        with link.getresponse() as response:
            body = response.read()
            assert response.status == 200, body
            return body

    for _ in range(2):
        assert again("fork_and_return") == b'"parent"'
        assert again("echo", 1) == b"1"
        again("fork_and_exit")
        assert again("echo", 2) == b"2"
        assert again("fork_and_raise") == b'"parent"'
        assert again("fork_in_pieces") == b"aparent"
        assert json.loads(again("process")) == [1, 2, 3]
        assert again("echo", 3) == b"3"
    assert call(served, "pid") == before
    assert "WARNING" not in served.log()
    assert served.stop() == 0


def test_an_async_handler_whose_forked_child_waits_loses_no_request(served: Any, wait_until: Any) -> None:
    forked = gate_in(served, "forked")
    served.code(f"""
        import asyncio, os, time
        def model_fn(model_dir):
            return 0
        async def predict_fn(data, model):
            if data != 1:
                return data
            loop = asyncio.get_running_loop()
            timer = loop.create_future()
            loop.call_later(0.5, timer.set_result, None)
            child = os.fork()
            if child:
                open({str(forked)!r}, "w").close()
                os.waitpid(child, 0)  # meanwhile the child's event loop is the only one that runs
                return "parent"
            await timer
            return "child"
        def input_fn(body, content_type):
            return int(body)
    """).ready("--timeout", "5")
    link = served.connect()
    link.request("POST", "/invocations", b"1", JSON)
    wait_until(forked.exists, "the child")
    links = [served.connect() for _ in range(5)]
    for i, one in enumerate(links):
        one.request("POST", "/invocations", str(i + 2).encode(), JSON)
    assert [result(one) for one in links] == [(200, i + 2) for i in range(5)]
    assert result(link) == (200, "parent")


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("end", ["worker", "server"])
def test_a_forked_child_that_stays_ends_with_its_worker(
    served: Any, wait_until: Any, alive: Callable[[int], bool], end: str, alone: bool
) -> None:
    served.code(OPERATIONS + FORKS).ready()
    child = call(served, "fork_and_stay", alone)
    assert [call(served, "echo", i) for i in range(10)] == list(range(10))
    assert alive(child)
    if end == "worker" and not alone:  # one that leads a session of its own ends with the server
        os.kill(call(served, "pid"), signal.SIGKILL)
        wait_until(lambda: not alive(child), "the end of the child")
        assert call(served, "echo", 1) == 1
    assert served.stop() == 0
    wait_until(lambda: not alive(child), "the end of the child")


@pytest.mark.parametrize("how", ["return", "import sys; sys.exit(0)", "raise ValueError('child')"])
def test_a_fork_while_the_model_loads(served: Any, how: str) -> None:
    served.code(f"""
        import os
        def model_fn(model_dir):
            child = os.fork()
            if not child:
                {how}
            os.waitpid(child, 0)
            return os.getpid()
        def predict_fn(data, model):
            return [model, os.getpid()]
    """).ready()
    loaded, answered = served.invoke().json()
    assert loaded == answered
    assert "Traceback" not in served.log()


@pytest.mark.parametrize(
    "how",
    [
        "for i in range(10 << 10): print('x' * 1023)",
        "sys.stdout.write('x' * (10 << 20))",
        "sys.stderr.write('x' * (10 << 20))",
        "os.write(1, b'\\xff\\x00\\x1b' * 10)",
    ],
)
def test_a_handler_that_prints_a_lot_is_answered(served: Any, how: str) -> None:
    served.code(OPERATIONS + f"\n    def talk():\n        {how}\n        return 'said'\n").ready()
    before = call(served, "pid")
    assert call(served, "talk") == "said"
    assert call(served, "talk") == "said"
    assert call(served, "pid") == before
    assert served.stop() == 0
    if "print" in how:
        assert served.job.stdout.count("x" * 1023) == 20 << 10


@pytest.mark.parametrize(
    "how",
    [
        "os.closerange(0, 3)",
        "sys.stdout.close()",
        "sys.stdin.close(); sys.stdout.close(); sys.stderr.close()",
        "sys.stdout = sys.stderr = None",
        "os.chdir('/')",
        "os.environ.clear()",
        "sys.setrecursionlimit(150)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "import threading; threading.Thread(target=sys.exit).start()",
        "import threading; threading.Thread(target=time.sleep, args=(1000,)).start()",
        "import threading; threading.Thread(target=lambda: 1 / 0).start()",
    ],
)
def test_a_handler_that_changes_its_process_goes_on(served: Any, how: str) -> None:
    fail = "\n    def fail():\n        raise LookupError('as ever')\n"
    served.code(OPERATIONS + f"\n    def change():\n        {how}\n        return 'done'\n" + fail).ready()
    before = call(served, "pid")
    assert call(served, "change") == "done"
    served.error(served.invoke(b'["fail"]'), 500, "HandlerFailed", "LookupError: as ever")
    assert call(served, "echo", "on") == "on"
    assert call(served, "pid") == before
    assert served.stop() == 0


def test_a_closed_stdout_is_the_handlers_own_error(served: Any) -> None:
    talk = "\n    def talk():\n        sys.stdout.close()\n        print('hello')\n"
    served.code(OPERATIONS + talk).ready()
    served.error(served.invoke(b'["talk"]'), 500, "HandlerFailed", "closed file")
    assert call(served, "echo", 1) == 1


@pytest.mark.parametrize(
    "how",
    [
        "return b'x', 'text/plain\\r\\nX-Other: 1'",
        "return b'x', 'text/\\x01plain'",
        "context.set_response_header(0, 'X-Mine', 'a\\x01b'); return b'x', 'text/plain'",
        "context.set_response_content_type(0, 'text/\\x7fplain'); return b'x'",
    ],
)
def test_a_header_that_can_not_be_sent_is_the_handlers_error(served: Any, how: str) -> None:
    served.code(f"""
        def model_fn(model_dir):
            return 0
        def predict_fn(data, model):
            return data
        def output_fn(prediction, accept, context):
            {how}
    """).ready()
    served.error(served.invoke(b"1"), 500)
    assert served.ask("GET", "/ping").status == 200


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("made", ["'a body'", "iter(['a', 'body'])"])
def test_a_status_without_a_body_has_none(served: Any, status: int, made: str) -> None:
    served.code(f"""
        def model_fn(model_dir):
            return 0
        def predict_fn(data, model, context):
            if data != 1:
                return data
            context.set_response_status({status})
            return {made}
        def input_fn(body, content_type):
            return int(body)
    """).ready()
    link = served.socket()
    request = b"POST /invocations HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 1\r\n"
    link.sendall(request + b"\r\n1")
    link.sendall(request + b"Connection: close\r\n\r\n2")
    found = answers(until_closed(link))
    assert found == [(status, b""), (200, b"2")] or [one for one, _ in found] == [500, 200], found


def test_a_full_queue_is_503_with_retry_after(served: Any, wait_until: Any) -> None:
    served.code(OPERATIONS).ready("--queue", "1", env=METRICS)
    begun, gate = gate_in(served, "begun"), gate_in(served, "gate")
    first = ask(served, "hold", str(begun), str(gate), "first")
    wait_until(begun.exists, "the handler")
    second = ask(served, "echo", "second")
    wait_until(lambda: metric(served, "launcher_requests_waiting") == 1, "a request that waits")
    answer = served.invoke(b'["echo", "third"]')
    served.error(answer, 503, "QueueFull", "--queue")
    assert int(answer.headers["retry-after"]) >= 1
    gate.touch()
    assert result(first) == (200, "first")
    assert result(second) == (200, "second")
    assert call(served, "echo", "fourth") == "fourth"
