"""What goes wrong, and what the client is told (contract/serving A7): a status, a type, a line; no guessing."""

from __future__ import annotations

from typing import Any

import pytest

LINEAR = """
    def model_fn(model_dir):
        return 2.0
    def predict_fn(data, model):
        return data * model
"""


@pytest.mark.parametrize(
    ("body", "content_type", "accept", "status", "kind", "text"),
    [
        (b"[1, 2", "application/json", "", 400, "BadRequest", ""),
        (b"\xff\xfe\xfa", "application/json", "", 400, "BadRequest", ""),
        (b"1,2\n3\n", "text/csv", "", 400, "BadRequest", "line 2"),
        (b"", "text/csv", "", 400, "BadRequest", ""),
        (b"\x93NUMPY", "application/x-npy", "", 400, "BadRequest", ""),
        (b"x", "application/x-npz", "", 400, "BadRequest", ""),
        (b"x", "application/x-recordio-protobuf", "", 400, "BadRequest", ""),
        (b"x", "image/png", "", 415, "UnsupportedMediaType", "image/png"),
        (b"x", "nonsense", "", 400, "BadRequest", "Content-Type"),
        (b"1", "text/csv; charset=klingon", "", 415, "UnsupportedMediaType", "klingon"),
        (b"[1]", "application/json", "image/png", 406, "NotAcceptable", "image/png"),
        (b"[1]", "application/json", "*/*;q=0", 406, "NotAcceptable", ""),
        (b"[1]", "application/json", "text", 400, "BadRequest", "Accept"),
        (b"[[[1]]]", "application/json", "text/csv", 406, "NotAcceptable", ""),
    ],
)
def test_a_bad_request_of_the_default_functions(
    served: Any, body: bytes, content_type: str, accept: str, status: int, kind: str, text: str
) -> None:
    served.code(LINEAR).ready()
    served.error(served.invoke(body, content_type, accept), status, kind, text)
    assert served.invoke(b"[1]").json() == [2.0]


@pytest.mark.parametrize(
    ("function", "status", "kind", "text"),
    [
        ("raise ValueError('not\\r\\nso')", 500, "HandlerFailed", "ValueError: not so"),
        ("raise MemoryError('no room')", 507, "InsufficientMemory", "no room"),
        ("import sys; sys.exit(3)", 500, "HandlerFailed", "the handler called sys.exit(3)"),
        ("raise KeyboardInterrupt", 500, "HandlerFailed", "interrupted"),
        (
            "from launcher.serving import InvocationError; raise InvocationError(422, 'too old', 'Stale')",
            422,
            "Stale",
            "too old",
        ),
        ("raise type('Quota', (Exception,), {'status_code': 429})('slow down')", 429, "Quota", "slow down"),
        ("return object()", 500, "HandlerFailed", "object"),
        ("def f(): return f()\n        return f()", 500, "HandlerFailed", "RecursionError"),
    ],
)
def test_a_handler_that_fails(served: Any, function: str, status: int, kind: str, text: str) -> None:
    served.code(f"""
    def model_fn(model_dir):
        return 0
    def predict_fn(data, model):
        if data[0] == 1:
            return "fine"
        {function}
    """).ready()
    worker = served.workers()
    answer = served.invoke(b"[0]")
    served.error(answer, status, kind, text)
    assert "traceback" not in answer.json() and b"Traceback" not in answer.body
    if status in (500, 507) and "SystemExit" not in text and "sys.exit" not in text:
        assert answer.headers["x-request-id"] in served.job.wait_for_line(
            answer.headers["x-request-id"], stream="stderr"
        )
    assert served.invoke(b"[1]").json() == "fine"
    assert served.workers() == worker


def test_a_traceback_is_in_the_log_and_in_the_answer_only_on_request(served: Any) -> None:
    served.code("def model_fn(d): return 0\ndef predict_fn(x, m): return {}['key']").ready("--error-details")
    answer = served.invoke()
    served.error(answer, 500, "HandlerFailed", "KeyError: 'key'")
    assert "in predict_fn" in answer.json()["traceback"]
    served.job.wait_for_line("in predict_fn", stream="stderr")


@pytest.mark.parametrize(
    ("function", "status"),
    [("return int(body)", 400), ("return {}[body]", 400), ("return undefined", 500), ("return body.missing", 500)],
)
def test_what_input_fn_refuses_is_the_clients_and_its_bugs_are_not(served: Any, function: str, status: int) -> None:
    served.code(f"""
    def model_fn(model_dir):
        return 0
    def input_fn(body, content_type):
        {function}
    def predict_fn(data, model):
        return data
    """).ready()
    served.error(served.invoke(b"x", "text/csv"), status)


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        (
            "def model_fn(model_dir): raise RuntimeError('cannot load\\nweights')",
            1,
            "the model could not be loaded: RuntimeError: cannot load weights (inference.py:1, in model_fn)",
        ),
        ("import module_that_is_not_there", 1, "ModuleNotFoundError: No module named 'module_that_is_not_there'"),
        ("def model_fn(model_dir:", 1, "SyntaxError"),
        ("def model_fn(model_dir):\n    import sys\n    sys.exit(7)", 1, "the code called sys.exit(7)"),
        ("def model_fn(model_dir):\n    import os\n    os._exit(9)", 9, "ended with code 9"),
        ("def model_fn(model_dir):\n    import os\n    os.kill(os.getpid(), 11)", 139, "was killed by SIGSEGV"),
        ("def model_fn(d): return 0\ndef model_warmup_fn(d, m): raise ValueError('cold')", 1, "ValueError: cold"),
    ],
)
def test_a_model_that_can_not_be_loaded_ends_the_server(served: Any, code: str, exit_code: int, said: str) -> None:
    served.code(code).start(workers=2)
    assert served.end() == exit_code
    assert said in served.log()
    assert sum("error: " in line and line.startswith("[launcher]") for line in served.log().splitlines()) == 1


def test_a_model_that_takes_too_long_to_load_ends_the_server(served: Any) -> None:
    served.code("import time\ndef model_fn(d): time.sleep(1000)").start(env={"SAGEMAKER_STARTUP_TIMEOUT": "1"})
    assert served.end() == 137
    assert "the model was not loaded within 1 s" in served.log()


def test_a_body_that_is_too_large(served: Any) -> None:
    served.code(LINEAR).ready(env={"SAGEMAKER_MAX_PAYLOAD_IN_MB": "1"})
    served.error(served.invoke(b" " * ((1 << 20) + 1)), 413, "PayloadTooLarge", "1048577 bytes")

    def pieces() -> Any:  # no length is said
        for _ in range(17):
            yield b" " * 65536

    served.error(served.invoke(pieces()), 413, "PayloadTooLarge", "more than 1048576 bytes")


def test_what_is_no_http_is_400(served: Any) -> None:
    served.code(LINEAR).ready()
    for text in (
        b"GARBAGE\r\n\r\n",
        b"POST /invocations HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"\x16\x03\x01\x00\xa5",
    ):
        answer = served.raw(text)
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert b"application/json" in answer


def test_a_header_without_end_is_431(served: Any) -> None:
    served.code(LINEAR).ready()
    link = served.socket()
    link.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n")
    try:
        for i in range(3000):
            link.sendall(b"x-%d: %s\r\n" % (i, b"y" * 100))
    except OSError:
        pass  # the server has ended the connection meanwhile
    answer = b""
    try:
        answer = link.recv(65536)
    except ConnectionResetError:
        return  # our unread bytes made the kernel drop the answer
    assert answer.startswith(b"HTTP/1.1 431 "), answer
