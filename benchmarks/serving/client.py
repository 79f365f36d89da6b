"""Requests to a server: single ones that are looked at closely, and load by wrk."""

from __future__ import annotations

import http.client
import json
import math
import random
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from processes import Failed, Server

HERE = Path(__file__).resolve().parent
ROWS, COLUMNS = 64, 10
POLL_S = 0.002
PING_S = 2.0  # what the platform gives a ping
ANSWER_S = 60.0  # and an answer
HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}
REFUSED, SILENT = "refused", "no answer"


class Question:
    """A request's numbers, and what the matrix makes of them."""

    def __init__(self, matrix: Sequence[Sequence[float]], seed: int) -> None:
        source = random.Random(seed)
        self.values = [round(source.uniform(-1, 1), 6) for _ in range(ROWS)]
        self.body = json.dumps(self.values).encode()
        self.answer = [
            math.fsum(x * row[j] for x, row in zip(self.values, matrix, strict=True)) for j in range(COLUMNS)
        ]

    def answered_by(self, body: bytes) -> bool:
        """The right numbers, up to the order of the sums."""
        try:
            found = json.loads(body)
            pairs = list(zip(found, self.answer, strict=True))
            return all(math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9) for one, other in pairs)
        except (ValueError, TypeError):
            return False


def make_matrix() -> list[list[float]]:
    """Always the same."""
    source = random.Random(64)
    return [[source.gauss(0, 1) for _ in range(COLUMNS)] for _ in range(ROWS)]


def write_npy(path: Path, matrix: Sequence[Sequence[float]]) -> None:
    """NumPy's format, so that the benchmark itself needs no NumPy."""
    header = str({"descr": "<f8", "fortran_order": False, "shape": (len(matrix), len(matrix[0]))})
    header += " " * (-(len(header) + 11) % 64) + "\n"
    data = b"".join(struct.pack(f"<{len(row)}d", *row) for row in matrix)
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data)


def free_ports(count: int) -> list[int]:
    """Of the loopback interface, below those that connections get (and below 49152, where some servers refuse)."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20000, 32000)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def ask(port: int, body: bytes | None, limit_s: float) -> tuple[int, bytes]:
    """One request over a connection of its own: a ping, or with a body an invocation; raises OSError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit_s)
    try:
        if body is None:
            connection.request("GET", "/ping")
        else:
            connection.request("POST", "/invocations", body, HEADERS)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionResetError(str(error)) from None
    finally:
        connection.close()


def until(
    server: Server,
    port: int,
    body: bytes | None,
    good: Callable[[bytes], bool],
    within_s: float,
    each_s: float | None = None,
) -> tuple[int, Counter[str]]:
    """Asks every 2 ms until the answer is 200 and good.

    Returns:
        When that answer was there (CLOCK_MONOTONIC, ns), and how often something else was answered before it.

    Raises:
        Failed: not within ``within_s``, or the server ended.
    """
    each_s = each_s or (PING_S if body is None else ANSWER_S)
    deadline = time.monotonic() + within_s
    before: Counter[str] = Counter()
    what = "/ping" if body is None else "/invocations"
    while (left := deadline - time.monotonic()) > 0:
        began = time.monotonic()
        try:
            status, said = ask(port, body, min(each_s, max(left, 0.01)))
            now = time.monotonic_ns()
            if status == 200 and good(said):
                return now, before
            before[str(status) if status != 200 else "200, wrong"] += 1
        except ConnectionRefusedError:
            before[REFUSED] += 1
        except OSError:
            before[SILENT] += 1
        if server.ended:
            raise server.failed(f"no good answer of {what}")
        time.sleep(max(0.0, POLL_S - (time.monotonic() - began)))
    seen = ", ".join(f"{count} x {name}" for name, count in before.most_common())
    raise server.failed(f"no good answer of {what} within {within_s:g} s (but {seen or 'nothing'})")


def look_at(port: int, questions: Sequence[Question], connections: int) -> None:
    """Asks each question, so many at a time; raises Failed if one gets a wrong answer, or that of another."""
    wrong: list[str] = []

    def some(part: Sequence[Question]) -> None:
        for question in part:
            try:
                status, said = ask(port, question.body, ANSWER_S)
            except OSError as error:
                wrong.append(f"{error}")
                continue
            if status != 200 or not question.answered_by(said):
                wrong.append(f"{status} {said[:100]!r}")

    threads = [threading.Thread(target=some, args=(questions[i::connections],)) for i in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise Failed(f"{len(wrong)} of {len(questions)} answers are wrong, the first: {wrong[0]}")


def ask_many(port: int, questions: Sequence[Question], count: int) -> None:
    """One after the other over one connection, where the server keeps it; raises Failed at a wrong answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        for i in range(count):
            question = questions[i % len(questions)]
            connection.request("POST", "/invocations", question.body, HEADERS)
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != 200 or not question.answered_by(said):
                raise Failed(f"request {i}: {answer.status} {said[:100]!r}")
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"a request was not answered: {error!r}") from None
    finally:
        connection.close()


class Wrk:
    """The load generator, with one thread."""

    def __init__(self, program: str, scratch: Path, question: Question) -> None:
        self._program = program
        self._body, self._wanted = scratch / "body.json", scratch / "wanted.json"
        self._body.write_bytes(question.body)
        self._wanted.write_text(json.dumps(question.answer))

    def run(self, port: int, connections: int, seconds: float, check: bool) -> dict[str, Any]:
        """What load.lua prints; raises Failed."""
        # wrk takes whole seconds
        whole = max(1, round(seconds))
        options = ["-t1", f"-c{connections}", f"-d{whole}s", "--timeout", "10s", "-s", str(HERE / "load.lua")]
        command = [self._program, *options, f"http://127.0.0.1:{port}/invocations", "--", str(self._body)]
        command += [str(self._wanted)] if check else []
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=whole + 30, check=False)
        except subprocess.TimeoutExpired:
            raise Failed(f"wrk did not end within {whole + 30} s") from None
        line = next((line for line in said.stdout.splitlines() if line.startswith("RESULT ")), None)
        if said.returncode or line is None:
            raise Failed(f"wrk: {(said.stderr.strip() or said.stdout.strip() or 'said nothing').splitlines()[-1]}")
        found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
        return found
