"""Bidirectional streaming (contract/serving A2): a WebSocket client against a real server, handlers of both kinds."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

client = pytest.importorskip("websockets.sync.client")
exceptions = pytest.importorskip("websockets.exceptions")

PATH = "/invocations-bidirectional-stream"
WAIT_S = 30.0

BLOCKING = """
    import os, time

    def model_fn(model_dir):
        return model_dir

    def predict_fn(data, model):
        return {"pid": os.getpid()}

    def bidirectional_fn(messages, model, context):
        yield f"hello {context.get_request_header(0, 'X-Amzn-SageMaker-Custom-Attributes')}"
        for message in messages:
            if message == "fail":
                raise ValueError("no such thing")
            if message == "end":
                return
            if message == "pid":
                yield str(os.getpid())
            elif message == "die":
                os._exit(7)
            elif message == "json":
                yield {"answer": [1, 2.5]}
            elif message == "many":
                for number in range(1000):
                    yield bytes([number % 256]) * 10_000
            else:
                yield message
        open(model + "/heard-the-end", "w").close()
"""
ASYNC = BLOCKING.replace("def bidirectional_fn", "async def bidirectional_fn").replace(
    "for message in", "async for message in"
)


@pytest.fixture(params=[BLOCKING, ASYNC], ids=["blocking", "async"])
def talking(request: pytest.FixtureRequest, served: Any) -> Any:
    """A server whose model converses."""
    return served.code(request.param).ready("--bidirectional")


@pytest.fixture
def open_socket(served: Any) -> Iterator[Callable[..., Any]]:
    """Opens conversations; they are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def connect(path: str = PATH, **options: Any) -> Any:
            options = {"open_timeout": WAIT_S, "max_size": None, "compression": None, **options}
            return stack.enter_context(client.connect(f"ws://127.0.0.1:{served.port}{path}", **options))

        yield connect


def test_texts_and_bytes_go_both_ways(talking: Any, open_socket: Any) -> None:
    link = open_socket(additional_headers={"X-Amzn-SageMaker-Custom-Attributes": "some"})
    assert link.recv(WAIT_S) == "hello some"
    for message in ("text \u00e4", "", b"\x00\xff", b"", "x" * 100_000, b"y" * (5 << 20)):
        link.send(message)
        assert link.recv(WAIT_S) == message
    link.send("json")
    assert link.recv(WAIT_S) == '{"answer": [1, 2.5]}'
    link.send(["in ", "three ", "fragments"])
    assert link.recv(WAIT_S) == "in three fragments"
    link.send("end")
    with pytest.raises(exceptions.ConnectionClosedOK) as closed:
        link.recv(WAIT_S)
    assert closed.value.rcvd.code == 1000
    # The worker is free, and answers requests as well as conversations, at any path of the caller's.
    assert "pid" in talking.invoke(b"1").json()
    assert open_socket("/my/own?path=1").recv(WAIT_S).startswith("hello")


def test_a_client_that_reads_late_gets_all_and_holds_nobody_up(talking: Any, open_socket: Any) -> None:
    link = open_socket()
    link.recv(WAIT_S)
    link.send("many")
    for number in range(1000):
        assert link.recv(WAIT_S) == bytes([number % 256]) * 10_000


def test_a_handler_that_fails_closes_with_1011_and_the_reason(talking: Any, open_socket: Any) -> None:
    link = open_socket()
    link.recv(WAIT_S)
    link.send("pid")
    pid = link.recv(WAIT_S)
    link.send("fail")
    with pytest.raises(exceptions.ConnectionClosedError) as closed:
        link.recv(WAIT_S)
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1011, "ValueError: no such thing")
    again = open_socket()
    again.recv(WAIT_S)
    again.send("pid")
    assert again.recv(WAIT_S) == pid  # the worker lives
    assert "ValueError: no such thing" in talking.log()


def test_a_worker_that_dies_closes_with_1011_and_another_takes_its_place(talking: Any, open_socket: Any) -> None:
    link = open_socket()
    link.recv(WAIT_S)
    link.send("die")
    with pytest.raises(exceptions.ConnectionClosedError) as closed:
        link.recv(WAIT_S)
    assert closed.value.rcvd.code == 1011
    assert "ended with code 7" in closed.value.rcvd.reason
    assert open_socket().recv(WAIT_S).startswith("hello")


def test_a_client_that_goes_ends_the_handlers_messages(talking: Any, open_socket: Any, wait_until: Any) -> None:
    link = open_socket()
    link.recv(WAIT_S)
    link.close()
    wait_until((talking.model / "heard-the-end").exists, "that the handler has seen the end")
    os.unlink(talking.model / "heard-the-end")
    link = open_socket()
    link.recv(WAIT_S)
    link.socket.close()  # without a word
    wait_until((talking.model / "heard-the-end").exists, "that the handler has seen the end")
    assert "pid" in talking.invoke(b"1").json()


def test_sigterm_ends_conversations_with_1012(talking: Any, open_socket: Any) -> None:
    link = open_socket()
    link.recv(WAIT_S)
    stopped = threading.Thread(target=talking.stop)
    stopped.start()
    with pytest.raises(exceptions.ConnectionClosed) as closed:
        link.recv(WAIT_S)
    assert closed.value.rcvd.code == 1012
    stopped.join(WAIT_S)
    assert talking.job.process.returncode == 0
    assert (talking.model / "heard-the-end").exists()


def test_silence_ends_with_the_stream_timeout(served: Any, open_socket: Any) -> None:
    served.code(ASYNC).ready("--bidirectional", "--stream-timeout", "0.5")
    link = open_socket()
    link.recv(WAIT_S)
    with pytest.raises(exceptions.ConnectionClosedError) as closed:
        link.recv(WAIT_S)
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1011, "the handler has not answered within 0.5 s")


def test_a_message_that_is_too_large_is_1009(served: Any, open_socket: Any) -> None:
    served.code(ASYNC).ready("--bidirectional", "--max-payload-mb", "1")
    link = open_socket()
    link.recv(WAIT_S)
    link.send(b"x" * (1 << 20 | 1))
    with pytest.raises(exceptions.ConnectionClosedError) as closed:
        link.recv(WAIT_S)
    assert closed.value.rcvd.code == 1009


def test_conversations_of_async_handlers_do_not_wait_for_each_other(served: Any, open_socket: Any) -> None:
    served.code(ASYNC).ready("--bidirectional", "--concurrency", "20")
    links = [open_socket() for _ in range(20)]
    for link in links:
        link.recv(WAIT_S)
    for number, link in enumerate(links):
        link.send(f"to {number}")
    assert [link.recv(WAIT_S) for link in links] == [f"to {number}" for number in range(20)]


def test_a_blocking_handler_has_one_and_requests_wait_for_another_worker(served: Any, open_socket: Any) -> None:
    served.code(BLOCKING).ready("--bidirectional", workers=2)
    link = open_socket()
    link.recv(WAIT_S)
    link.send("pid")
    busy = int(link.recv(WAIT_S))
    assert {served.invoke(b"1").json()["pid"] for _ in range(10)} == set(served.workers()) - {busy}


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("def predict_fn(data, model): return data", 404, "NotFound"),
        ("def bidirectional_fn(messages, model): return 3", 500, "HandlerFailed"),
        ("def bidirectional_fn(messages, model): raise PermissionError('no')", 500, "HandlerFailed"),
    ],
)
def test_what_can_not_begin_is_refused_with_an_error_of_http(
    served: Any, open_socket: Any, code: str, status: int, kind: str
) -> None:
    served.code(f"model_fn = lambda model_dir: 1\n{code}").ready("--bidirectional")
    with pytest.raises(exceptions.InvalidStatus) as refused:
        open_socket()
    assert refused.value.response.status_code == status
    assert f'"type": "{kind}"'.encode() in refused.value.response.body


def test_without_the_option_there_is_no_websocket(served: Any, open_socket: Any) -> None:
    served.code(BLOCKING).ready()
    with pytest.raises(exceptions.InvalidStatus) as refused:
        open_socket()
    assert refused.value.response.status_code == 404


def test_other_upgrades_and_plain_requests_are_what_they_were(talking: Any) -> None:
    body = b"GET /ping HTTP/1.1\r\nHost: a\r\nConnection: close, upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert talking.raw(body).startswith(b"HTTP/1.1 200 ")
    assert talking.ask("GET", PATH).status == 404
    head = b"Host: a\r\nConnection: close, upgrade\r\nUpgrade: websocket\r\n"
    answer = talking.raw(b"POST /invocations HTTP/1.1\r\n" + head + b"Content-Length: 1\r\n\r\n1")
    assert answer.startswith(b"HTTP/1.1 200 ")
    for bad in (b"Content-Length: 1\r\n\r\n1", b"\r\n", b"Sec-WebSocket-Version: 13\r\n\r\n"):
        assert talking.raw(b"GET / HTTP/1.1\r\n" + head + bad).startswith(b"HTTP/1.1 4")


def test_a_function_that_is_not_async_beside_one_that_is_is_refused_at_the_start(served: Any) -> None:
    served.code(BLOCKING.replace("def predict_fn", "async def predict_fn")).start("--bidirectional")
    assert served.end() == 65
    assert "bidirectional_fn" in served.log()
    assert "async def, too" in served.log()


SLOW = """
    import os, time

    def model_fn(model_dir):
        return model_dir

    def predict_fn(data, model):
        return data

    {}def bidirectional_fn(messages, model):
        yield "begun"
        while not os.path.exists(model + "/go"):
            time.sleep(0.01)
        count = total = 0
        {}for message in messages:
            count, total = count + 1, total + len(message)
        with open(model + "/part", "w") as file:
            file.write(f"{{count}} {{total}}")
        os.rename(model + "/part", model + "/heard")
"""


@pytest.mark.parametrize("kind", ["", "async "], ids=["blocking", "async"])
@pytest.mark.parametrize(("count", "size"), [(50, 100_000), (20_000, 0)])
def test_a_slow_handler_hears_all_that_was_said_before_the_client_went(
    served: Any, open_socket: Any, wait_until: Any, kind: str, count: int, size: int
) -> None:
    """More than may be under way, also of messages without a byte."""
    served.code(SLOW.format(kind, kind)).ready("--bidirectional")
    link = open_socket()
    link.recv(WAIT_S)

    def talk() -> None:
        for _ in range(count):
            link.send(b"x" * size)
        link.close()

    talker = threading.Thread(target=talk)
    talker.start()
    (served.model / "go").touch()
    wait_until((served.model / "heard").exists, "the end of the messages")
    talker.join(WAIT_S)
    assert (served.model / "heard").read_text() == f"{count} {count * size}"


def test_a_client_that_never_reads_is_broken_off(served: Any, open_socket: Any, wait_until: Any) -> None:
    psutil = pytest.importorskip("psutil")
    served.code(ASYNC).ready("--bidirectional", "--stream-timeout", "1")
    link = open_socket(max_queue=1, close_timeout=0.1)
    link.recv(WAIT_S)
    link.send("many")
    link.send("end")
    server = psutil.Process(served.job.process.pid)

    def gone() -> bool:
        return not any(
            one.status == "ESTABLISHED" and one.laddr.port == served.port for one in server.net_connections()
        )

    wait_until(gone, "that the connection is ended")
    assert "pid" in served.invoke(b"1").json()


def test_a_conversation_waits_for_no_batch(served: Any, open_socket: Any) -> None:
    served.code(BLOCKING).ready("--bidirectional", "--batch-size", "4", "--batch-delay", "1000", "--timeout", "2000")
    assert open_socket().recv(WAIT_S).startswith("hello")


def test_a_full_queue_refuses_and_says_when_to_try_again(served: Any, open_socket: Any, wait_until: Any) -> None:
    served.code(BLOCKING).ready("--bidirectional", "--queue", "1")
    first = open_socket()
    first.recv(WAIT_S)
    heard: list[str] = []
    refusals: list[Any] = []

    def come() -> None:
        try:
            heard.append(open_socket().recv(WAIT_S))
        except exceptions.InvalidStatus as refused:
            refusals.append(refused.response)

    two = [threading.Thread(target=come) for _ in range(2)]
    for one in two:
        one.start()
    (refused,) = wait_until(lambda: refusals, "that one of them finds the queue full")
    assert refused.status_code == 503
    assert b'"type": "QueueFull"' in refused.body
    assert "retry-after" in refused.headers
    first.send("end")
    for one in two:
        one.join(WAIT_S)
    assert heard == ["hello None"]


def test_an_opening_in_pieces_and_one_behind_a_request(served: Any) -> None:
    served.code(ASYNC).ready("--bidirectional")
    rest = b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    rest += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    link = served.socket()
    link.sendall(b"GET /a HTTP/1.1\r\nHost: a\r\n")
    assert served.ask("GET", "/ping").status == 200  # the server has seen the first piece
    link.sendall(rest)
    assert link.recv(100).startswith(b"HTTP/1.1 101 ")
    post = b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n1"
    link = served.socket()
    link.sendall(post + b"GET /a HTTP/1.1\r\nHost: a\r\n" + rest)
    got = b""
    while got.count(b"HTTP/1.1 ") < 2 and (piece := link.recv(65536)):
        got += piece
    assert b"HTTP/1.1 200 " in got
    assert b"HTTP/1.1 404 " in got


def test_an_async_function_that_yields_nothing_is_said(served: Any, open_socket: Any) -> None:
    served.code("model_fn = lambda model_dir: 1\nasync def bidirectional_fn(messages, model): return 3").ready(
        "--bidirectional"
    )
    with pytest.raises(exceptions.InvalidStatus) as refused:
        open_socket()
    assert refused.value.response.status_code == 500
    assert b"bidirectional_fn gave coroutine; expected a generator of messages" in refused.value.response.body


def test_a_request_that_is_taken_back_during_a_conversation_is_not_begun() -> None:
    """What came while the handler listened is looked at in the order in which it came."""
    code = """
import _socket
from launcher.serving import wire
from launcher.serving.worker import Channel, Request, Stream

ours, theirs = _socket.socketpair()
channel = Channel(theirs)
frames = [(wire.REQUEST, 2, ("id", "", "", "")), (wire.MESSAGE, 1, ()), (wire.CANCEL, 2, ()), (wire.STOP, 0, ())]
for kind, number, texts in frames:
    ours.send(wire.pack(kind, number, texts=texts))
request = Request(1, "id", "", "", "", (), b"")
assert next(Stream(channel, request, conversation=True).messages()) == b""
print(channel.take_wanted().kind == wire.STOP)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.stdout == "True\n", done.stderr
