"""A server under test: a real process, asked over real sockets by the standard library's client."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

START_S = 60.0
ASK_S = 60.0


class Answer:
    """An answer, read to its end."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    def json(self) -> Any:
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"{self.status} {self.headers} {self.body[:2000]!r}"


class Served:
    """A server with the code and the model of a test below ``job.base``."""

    def __init__(self, job: Any, wait_until: Callable[..., Any]) -> None:
        self.job, self._wait_until = job, wait_until
        self.model = job.base / "model"
        self.port = 0
        self._open: list[Any] = []

    def code(self, text: str, name: str = "inference.py") -> Served:
        """Writes a file of the model's code."""
        path = self.model / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return self

    def start(self, *options: str, env: dict[str, str] | None = None, workers: int = 1, **popen: Any) -> Served:
        """Starts it, and waits until it listens."""
        self.model.mkdir(parents=True, exist_ok=True)
        environ = {
            "SAGEMAKER_BASE_DIR": str(self.job.base),
            "SAGEMAKER_MODEL_SERVER_WORKERS": str(workers),
            "LAUNCHER_SERVE_PORT": "0",
            **(env or {}),
        }
        self.job.start("serve", *options, env=environ, own_tree=False, **popen)
        line = self.job.wait_for_line("serving at port ", stream="stderr", deadline_s=START_S)
        match = re.search(r"port (\d+)", line)
        assert match is not None
        self.port = int(match[1])
        return self

    def ready(self, *options: str, **how: Any) -> Served:
        """Starts it, and waits until ``/ping`` says that it is ready."""
        self.start(*options, **how)
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.job.process.poll() is None, self.job.output()
            return self.ask("GET", "/ping").status == 200

        self._wait_until(ready, "ready", START_S)

    def connect(self, timeout_s: float = ASK_S) -> http.client.HTTPConnection:
        """A connection, closed at the end of the test."""
        self._open.append(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s))
        return self._open[-1]

    def socket(self, timeout_s: float = ASK_S) -> socket.socket:
        """As :meth:`connect`, without HTTP."""
        self._open.append(socket.create_connection(("127.0.0.1", self.port), timeout_s))
        return self._open[-1]

    def raw(self, text: bytes) -> bytes:
        """What comes back for some bytes, until the server ends the connection."""
        link = self.socket()
        link.sendall(text)
        return b"".join(iter(lambda: link.recv(65536), b""))

    def close(self) -> None:
        """Closes the connections."""
        for one in self._open:
            one.close()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """One request, on a connection of its own unless one is given."""
        link = connection or self.connect()
        try:
            link.request(method, path, body, headers or {})
            return Answer(link.getresponse())
        finally:
            if connection is None:
                link.close()

    def invoke(
        self,
        body: Any = b"[1, 2, 3]",
        content_type: str = "application/json",
        accept: str = "",
        path: str = "/invocations",
        **headers: str,
    ) -> Answer:
        """A request to the model."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if content_type:
            named["Content-Type"] = content_type
        if accept:
            named["Accept"] = accept
        return self.ask("POST", path, body, named)

    def error(self, answer: Answer, status: int, kind: str = "", text: str = "") -> None:
        """Checks an error's answer: its status and its body."""
        assert answer.status == status, answer
        assert answer.headers["content-type"] == "application/json", answer
        content = answer.json()
        assert content["code"] == status, answer
        assert not kind or content["type"] == kind, answer
        assert text in content["message"], answer
        assert content["requestId"] == answer.headers["x-request-id"], answer

    def workers(self) -> list[int]:
        """The pids of the workers."""
        return sorted(pid for pid, command in self.job.ranks().items() if "launcher.serving.worker" in command)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, and waits for the end; the exit code."""
        self.job.process.send_signal(number)
        code: int = self.job.wait()
        return code

    def end(self) -> int:
        """Waits for an end that comes by itself; the exit code."""
        code: int = self.job.wait()
        return code

    def log(self) -> str:
        return str(self.job.stderr)


@pytest.fixture
def served(job: Any, wait_until: Callable[..., Any]) -> Iterator[Served]:
    """A server that is not started yet."""
    one = Served(job, wait_until)
    yield one
    one.close()
