"""Dynamic batching (``--batch-size``, ``--batch-delay``): what comes together, and that each gets its own answer."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

JSON = "application/json"
# A request [0, begun, gate] holds the worker until the gate is there: what comes meanwhile waits, and goes together.
CODE = """
    import json, os, time
    sizes = []

    def model_fn(model_dir):
        return 0

    def input_fn(body, content_type):
        data = json.loads(body)
        if data[0] == "bad":
            raise ValueError("a bad input")
        return data

    def hold(data):
        with open(data[1] + ".part", "w") as file:
            file.write(str(os.getpid()))
        os.rename(data[1] + ".part", data[1])
        while not os.path.exists(data[2]):
            time.sleep(0.005)
"""
BATCHED = (
    CODE
    + """
    {kind} batch_predict_fn(data, model):
        assert isinstance(data, list)
        for one in data:
            if one[0] == "hold":
                hold(one)
            if one[0] == "poison":
                raise LookupError("poisoned")
        return [[one[-1], len(data)] for one in data]
"""
)


class Together:
    """Requests that wait behind one that holds the only worker."""

    def __init__(self, served: Any, wait_until: Any) -> None:
        self.served, self._wait_until = served, wait_until
        self.links: list[http.client.HTTPConnection] = []
        self._begun: Path = served.job.directory / "begun"
        self._gate: Path = served.job.directory / "gate"

    def hold(self) -> None:
        self.holder = self.ask(["hold", str(self._begun), str(self._gate)])
        self.links.clear()
        self._wait_until(self._begun.exists, "the handler")

    def ask(self, data: Any, content_type: str = JSON, accept: str = "") -> http.client.HTTPConnection:
        link: http.client.HTTPConnection = self.served.connect()
        body = data if isinstance(data, bytes) else json.dumps(data)
        headers = {"Content-Type": content_type, **({"Accept": accept} if accept else {})}
        link.request("POST", "/invocations", body, headers)
        # Each request is with the server before the next: its answer to this came behind it.
        assert self.served.ask("GET", "/ping").status == 200
        self.links.append(link)
        return link

    def release(self) -> list[tuple[int, Any]]:
        """The statuses and contents of all answers."""
        self._gate.touch()
        with self.holder.getresponse() as response:
            assert response.status == 200, response.read()
        found = []
        for link in self.links:
            with link.getresponse() as response:
                body = response.read()
                found.append((response.status, json.loads(body) if body else None))
        return found


@pytest.fixture
def together(served: Any, wait_until: Any) -> Together:
    """For a server that a test starts."""
    return Together(served, wait_until)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_batch_predict_fn_gets_what_waits_and_each_its_own_answer(served: Any, together: Together, kind: str) -> None:
    options = () if kind == "def" else ("--concurrency", "1")
    served.code(BATCHED.format(kind=kind)).ready("--batch-size", "8", *options)
    together.hold()
    for i in range(10):
        together.ask(["echo", i])
    assert together.release() == [(200, [i, 8]) for i in range(8)] + [(200, [i, 2]) for i in (8, 9)]
    assert served.stop() == 0


def test_a_batch_waits_for_more_up_to_its_size(served: Any) -> None:
    served.code(BATCHED.format(kind="def")).ready("--batch-size", "4", "--batch-delay", "20")
    links = [served.connect() for _ in range(4)]
    for i, link in enumerate(links):
        link.request("POST", "/invocations", json.dumps(["echo", i]), {"Content-Type": JSON})
    for i, link in enumerate(links):
        with link.getresponse() as response:
            assert json.loads(response.read()) == [i, 4]


def test_a_lone_request_is_held_no_longer_than_the_delay(served: Any) -> None:
    served.code(BATCHED.format(kind="def")).ready("--batch-size", "4", "--batch-delay", "0.3", "--timeout", "30")
    for i in range(3):
        begin = time.monotonic()
        assert served.invoke(json.dumps(["echo", i])).json() == [i, 1]
        assert time.monotonic() - begin < 10  # it came, and not because of the next one


def test_without_batching_each_is_predicted_alone(served: Any, together: Together) -> None:
    served.code(BATCHED.format(kind="def")).ready()
    together.hold()
    for i in range(5):
        together.ask(["echo", i])
    assert together.release() == [(200, [i, 1]) for i in range(5)]


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_bad_request_of_a_batch_fails_alone(served: Any, together: Together, kind: str) -> None:
    options = () if kind == "def" else ("--concurrency", "1")
    served.code(BATCHED.format(kind=kind)).ready("--batch-size", "8", *options)
    together.hold()
    together.ask(["echo", 0])
    together.ask(b"[1, 2")
    together.ask(["bad"])
    together.ask(["poison"])
    together.ask(["echo", 4])
    found = together.release()
    assert [status for status, _ in found] == [200, 400, 400, 500, 200]
    assert [found[i][1][0] for i in (0, 4)] == [0, 4]
    assert "a bad input" in found[2][1]["message"]
    assert "LookupError: poisoned" in found[3][1]["message"]
    assert len({error["requestId"] for _, error in found[1:4]}) == 3
    assert len(served.workers()) == 1 and "WARNING" not in served.log()


def test_a_bad_request_does_not_make_the_others_of_its_batch_lone(served: Any, together: Together) -> None:
    served.code(BATCHED.format(kind="def")).ready("--batch-size", "8")
    together.hold()
    together.ask(["echo", 0])
    together.ask(b"[1, 2")
    together.ask(["echo", 2])
    found = together.release()
    assert [status for status, _ in found] == [200, 400, 200]
    assert (found[0][1], found[2][1]) == ([0, 2], [2, 2])


@pytest.mark.parametrize("made", ["data[:-1]", "data + data[:1]", "[]", "None", "5", "(one for one in data[1:])"])
def test_a_wrong_number_of_predictions_goes_to_nobody(served: Any, together: Together, made: str) -> None:
    served.code(
        CODE
        + f"""
    def batch_predict_fn(data, model):
        if data[0][0] == "hold":
            hold(data[0])
        return list(data) if len(data) == 1 else {made}
    """
    ).ready("--batch-size", "8")
    together.hold()
    for i in range(4):
        together.ask(["echo", i])
    assert together.release() == [(200, ["echo", i]) for i in range(4)]
    served.job.wait_for_line("a batch of 4 requests failed", stream="stderr")


@pytest.mark.parametrize("made", ["[]", "None", "5"])
def test_a_wrong_number_of_predictions_for_one_is_500(served: Any, made: str) -> None:
    served.code(CODE + f"\n    def batch_predict_fn(data, model):\n        return {made}\n").ready("--batch-size", "8")
    served.error(served.invoke(b'["echo", 1]'), 500, "HandlerFailed")
    assert served.ask("GET", "/ping").status == 200


def test_batch_predict_fn_that_exits_is_500_for_all_and_the_worker_stays(served: Any, together: Together) -> None:
    code = BATCHED.format(kind="def").replace('raise LookupError("poisoned")', "raise SystemExit(3)")
    served.code(code).ready("--batch-size", "8")
    workers = served.workers()
    together.hold()
    together.ask(["echo", 0])
    together.ask(["poison"])
    for status, content in together.release():
        assert status == 500 and "sys.exit(3)" in content["message"]
    assert served.invoke(b'["echo", 1]').json() == [1, 1]
    assert served.workers() == workers


ROWS = """
    import os, time
    import numpy
    def model_fn(model_dir):
        return 0
    def predict_fn(data, model):
        if data.ndim == 2 and data[0, 0] == -1:
            open({begun!r}, "w").close()
            while not os.path.exists({gate!r}):
                time.sleep(0.005)
        if (data == 13).any():
            raise LookupError("thirteen")
        {result}
"""


def rows(served: Any, result: str) -> str:
    directory = served.job.directory
    return ROWS.format(begun=str(directory / "begun"), gate=str(directory / "gate"), result=result)


def hold_rows(together: Together, wait_until: Any) -> None:
    together.holder = together.ask([[-1, -1]])
    together.links.clear()
    wait_until((together.served.job.directory / "begun").exists, "the handler")


def test_rows_of_arrays_are_predicted_together(served: Any, together: Together, wait_until: Any) -> None:
    count = "return numpy.stack([data.sum(axis=1), numpy.full(len(data), len(data))], axis=1)"
    served.code(rows(served, count)).ready("--batch-size", "8")
    hold_rows(together, wait_until)
    together.ask([[1, 2]])
    together.ask([[3, 4], [5, 6]])
    together.ask([[7, 8], [9, 10], [11, 12]])
    assert together.release() == [
        (200, [[3, 6]]),
        (200, [[7, 6], [11, 6]]),
        (200, [[15, 6], [19, 6], [23, 6]]),
    ]


def test_arrays_that_do_not_fit_together_are_predicted_alone(served: Any, together: Together, wait_until: Any) -> None:
    served.code(rows(served, "return [data.shape, data.sum()]")).ready("--batch-size", "8")
    hold_rows(together, wait_until)
    bodies: list[Any] = [[[1, 2]], [[1, 2, 3]], [1, 2], [[0.5, 0.5]], 5]
    for body in bodies:
        together.ask(body)
    assert together.release() == [
        (200, [[1, 2], 3]),
        (200, [[1, 3], 6]),
        (200, [[2], 3]),
        (200, [[1, 2], 1.0]),
        (200, [[], 5]),
    ]


@pytest.mark.parametrize("result", ["return data.sum()", "return {'rows': len(data)}", "return 'x' * 4", "return [1]"])
def test_what_is_no_prediction_a_row_is_not_cut(served: Any, together: Together, wait_until: Any, result: str) -> None:
    served.code(rows(served, result)).ready("--batch-size", "8")
    alone = served.invoke(b"[[1, 2], [3, 4]]")
    hold_rows(together, wait_until)
    links = [together.ask([[1, 2], [3, 4]]) for _ in range(2)]
    (served.job.directory / "gate").touch()
    for link in links:
        with link.getresponse() as response:
            assert (response.status, response.read()) == (200, alone.body)


def test_a_row_that_makes_predict_raise_fails_alone(served: Any, together: Together, wait_until: Any) -> None:
    served.code(rows(served, "return data.sum(axis=1)")).ready("--batch-size", "8")
    hold_rows(together, wait_until)
    together.ask([[1, 2]])
    together.ask([[13, 0]])
    together.ask([[3, 4]])
    together.ask(b"[[1, 2]")
    found = together.release()
    assert [status for status, _ in found] == [200, 500, 200, 400]
    assert (found[0][1], found[2][1]) == ([3], [7])
    assert "thirteen" in found[1][1]["message"]


def test_different_types_are_not_mixed(served: Any, together: Together, wait_until: Any) -> None:
    served.code(rows(served, "return numpy.full((len(data), 1), len(data))")).ready("--batch-size", "8")
    hold_rows(together, wait_until)
    kinds = [(JSON, JSON), ("text/csv", JSON), (JSON, "text/csv"), ("text/csv", "text/csv")]
    links = []
    for _ in range(2):
        for content_type, accept in kinds:
            body = b"[[1, 2]]" if content_type == JSON else b"1,2\n"
            links.append((accept, together.ask(body, content_type, accept)))
    (served.job.directory / "gate").touch()
    for accept, link in links:
        with link.getresponse() as response:
            assert response.getheader("content-type") == accept
            assert response.read() == (b"[[2]]" if accept == JSON else b"2\n")  # two of a kind went together


def test_headers_and_statuses_are_each_requests_own(served: Any, together: Together) -> None:
    served.code(
        BATCHED.format(kind="def")
        + """
    def output_fn(prediction, accept, context):
        context.set_response_header(0, "X-Mine", f"{prediction[0]} {context.headers['x-asked']}")
        context.set_response_status(200 + len(str(prediction[0])))
        return json.dumps(prediction), accept
    """
    ).ready("--batch-size", "8")
    directory = served.job.directory
    holder = served.connect()
    held = json.dumps(["hold", str(directory / "begun"), str(directory / "gate")])
    holder.request("POST", "/invocations", held, {"Content-Type": JSON, "X-Asked": "0"})
    together._wait_until((directory / "begun").exists, "the handler")
    links = []
    for i in (1, 22, 333):
        links.append(served.connect())
        headers = {"Content-Type": JSON, "X-Asked": f"asked-{i}"}
        links[-1].request("POST", "/invocations", json.dumps(["echo", i]), headers)
        assert served.ask("GET", "/ping").status == 200
    (directory / "gate").touch()
    for i, link in zip((1, 22, 333), links, strict=True):
        with link.getresponse() as response:
            assert response.status == 200 + len(str(i))
            assert response.getheader("x-mine") == f"{i} asked-{i}"
            assert json.loads(response.read()) == [i, 3]


def test_async_requests_are_batched_while_others_are_answered(served: Any, wait_until: Any) -> None:
    gate = served.job.directory / "gate"
    served.code(f"""
        import asyncio, json, os
        def model_fn(model_dir):
            return 0
        def input_fn(body, content_type):
            return json.loads(body)
        async def batch_predict_fn(data, model):
            if data[0][0] == "wait":
                open(data[0][1], "w").close()
                while not os.path.exists({str(gate)!r}):
                    await asyncio.sleep(0.005)
            return [[one[-1], len(data)] for one in data]
    """).ready("--batch-size", "4")
    begun = served.job.directory / "begun"
    slow = served.connect()
    slow.request("POST", "/invocations", json.dumps(["wait", str(begun)]), {"Content-Type": JSON})
    wait_until(begun.exists, "the handler")
    assert served.invoke(b'["echo", 5]').json() == [5, 1]  # the same worker has both in hand
    gate.touch()
    with slow.getresponse() as response:
        assert json.loads(response.read()) == [str(begun), 1]


@pytest.mark.parametrize("leaves", [0, 1])
def test_a_client_that_leaves_takes_no_other_of_its_batch_along(served: Any, wait_until: Any, leaves: int) -> None:
    gate = served.job.directory / "gate"
    begun = served.job.directory / "begun"
    served.code(f"""
        import asyncio, json, os
        def model_fn(model_dir):
            return 0
        def input_fn(body, content_type):
            return json.loads(body)
        async def batch_predict_fn(data, model):
            open({str(begun)!r}, "w").close()
            while not os.path.exists({str(gate)!r}):
                await asyncio.sleep(0.005)
            return [[one, len(data)] for one in data]
    """).ready("--batch-size", "3", "--batch-delay", "20", "--timeout", "5")
    workers = served.workers()
    links = [served.connect() for _ in range(3)]
    for i, link in enumerate(links):
        link.request("POST", "/invocations", json.dumps(i), {"Content-Type": JSON})
        assert served.ask("GET", "/ping").status == 200
    wait_until(begun.exists, "the handler")
    links[leaves].close()
    assert served.ask("GET", "/ping").status == 200
    gate.touch()
    for i, link in enumerate(links):
        if i != leaves:
            with link.getresponse() as response:
                assert (response.status, json.loads(response.read())) == (200, [i, 3])
    assert served.workers() == workers


def test_a_client_that_leaves_before_its_batch_is_sent_is_not_in_it(served: Any, together: Together) -> None:
    served.code(BATCHED.format(kind="def")).ready("--batch-size", "8")
    together.hold()
    together.ask(["echo", 0])
    together.ask(["echo", 1]).close()
    together.ask(["echo", 2])
    assert served.ask("GET", "/ping").status == 200
    del together.links[1]
    assert together.release() == [(200, [0, 2]), (200, [2, 2])]


def test_streams_of_a_batch_come_one_after_the_other_and_whole(served: Any, together: Together) -> None:
    served.code(
        BATCHED.format(kind="def")
        + """
    def output_fn(prediction, accept):
        def pieces():
            for i in range(100):
                yield f"{prediction[0]}".ljust(1 << 15, ".")
        return pieces(), "text/plain"
    """
    ).ready("--batch-size", "8")
    directory = served.job.directory
    holder = together.ask(["hold", str(directory / "begun"), str(directory / "gate")])
    together._wait_until((directory / "begun").exists, "the handler")
    links = [together.ask(["echo", i]) for i in range(4)]
    links[1].close()
    (directory / "gate").touch()
    with holder.getresponse() as response:
        response.read()
    for i in (0, 2, 3):
        with links[i].getresponse() as response:
            assert response.read() == str(i).encode().ljust(1 << 15, b".") * 100


def test_a_worker_killed_with_a_batch_fails_all_of_it_and_nobody_else(served: Any, wait_until: Any) -> None:
    code = BATCHED.format(kind="def")
    served.code(code).ready("--batch-size", "3", "--batch-delay", "1", "--timeout", "4", workers=2)
    begun, gate = served.job.directory / "begun", served.job.directory / "gate"
    links = [served.connect() for _ in range(3)]
    bodies: list[Any] = [["echo", 0], ["hold", str(begun), str(gate)], ["echo", 2]]
    for link, body in zip(links, bodies, strict=True):
        link.request("POST", "/invocations", json.dumps(body), {"Content-Type": JSON})
        assert served.ask("GET", "/ping").status == 200
    wait_until(begun.exists, "the handler")
    os.kill(int(begun.read_text()), signal.SIGKILL)
    for link in links:
        with link.getresponse() as response:
            assert response.status == 500
            assert json.loads(response.read())["type"] == "WorkerDied"
    links = [served.connect() for _ in range(3)]
    for i, link in enumerate(links):
        link.request("POST", "/invocations", json.dumps(["echo", i]), {"Content-Type": JSON})
    for i, link in enumerate(links):
        with link.getresponse() as response:
            assert json.loads(response.read()) == [i, 3]


def test_a_client_that_leaves_before_the_worker_has_read_its_batch(served: Any, wait_until: Any) -> None:
    served.code(BATCHED.format(kind="def")).ready("--batch-size", "3", "--batch-delay", "1", "--timeout", "5")
    (worker,) = served.workers()
    os.kill(worker, signal.SIGSTOP)
    links = [served.connect() for _ in range(3)]
    for i, link in enumerate(links):
        link.request("POST", "/invocations", json.dumps(["echo", i]), {"Content-Type": JSON})
        assert served.ask("GET", "/ping").status == 200
    links[1].close()
    for _ in range(3):  # the server has heard of it before it answers this
        assert served.ask("GET", "/ping").status == 200
    os.kill(worker, signal.SIGCONT)
    for i in (0, 2):
        with links[i].getresponse() as response:
            status, content = response.status, json.loads(response.read())
            assert (status, content[0]) == (200, i), content
    assert served.invoke(b'["echo", 5]').json() == [5, 1]
    assert served.workers() == [worker]
