"""Stateful sessions: opened, kept by one worker, closed, expired, lost (contract/serving A3)."""

from __future__ import annotations

import calendar
import json
import os
import re
import signal
import time
from typing import Any

import pytest

ON = {"SAGEMAKER_ENABLE_STATEFUL_SESSIONS": "true"}
HEADER = "X-Amzn-SageMaker-Session-Id"
NEW = "x-amzn-sagemaker-new-session-id"
CLOSED = "x-amzn-sagemaker-closed-session-id"
COUNT = """
    import os
    def model_fn(model_dir):
        return 0
    def predict_fn(data, model, context):
        if data[0] == "pid":
            return os.getpid()
        if data[0] == "fail":
            raise ValueError("as asked")
        context.session["count"] = context.session.get("count", 0) + 1
        return [context.session["count"], os.getpid(), context.session_id]
    def input_fn(body, content_type):
        import json
        return json.loads(body)
"""


def ask(served: Any, session: str = "", body: bytes = b'["count"]', path: str = "/invocations") -> Any:
    """A request of a session."""
    headers = {"Content-Type": "application/json"}
    if session:
        headers[HEADER] = session
    return served.ask("POST", path, body, headers)


def opened(answer: Any) -> str:
    """The id of the session that was opened."""
    assert answer.status == 200, answer
    found = re.fullmatch(r"(\S+); Expires=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)", answer.headers[NEW])
    assert found is not None, answer
    assert len(found[1]) >= 16
    return found[1]


def test_a_session_is_opened_used_and_closed(served: Any) -> None:
    served.code(COUNT).ready(env=ON)
    answer = ask(served, "NEW_SESSION", b'{"requestType": "NEW_SESSION"}')
    session = opened(answer)
    assert answer.body == b""
    for i in range(1, 4):
        answer = ask(served, session)
        assert (answer.json()[0], answer.json()[2]) == (i, session)
        assert NEW not in answer.headers and CLOSED not in answer.headers
    answer = ask(served, session, b'{"requestType": "CLOSE"}')
    assert (answer.status, answer.body, answer.headers[CLOSED]) == (200, b"", session)
    served.error(ask(served, session), 404, "SessionNotFound")
    served.error(ask(served, session, b'{"requestType": "CLOSE"}'), 404, "SessionNotFound")
    assert served.stop() == 0


def test_a_session_is_opened_with_an_ordinary_request(served: Any) -> None:
    served.code(COUNT).ready(env=ON)
    answer = ask(served, "NEW_SESSION")
    session = opened(answer)
    assert answer.json()[0] == 1 and answer.json()[2] == session
    assert ask(served, session).json()[0] == 2


def test_the_end_of_a_session_is_told_as_it_is(served: Any) -> None:
    served.code(COUNT).ready(env={**ON, "SAGEMAKER_SESSIONS_EXPIRATION": "500"})
    before = int(time.time())
    answer = ask(served, "NEW_SESSION")
    after = int(time.time()) + 1
    text = answer.headers[NEW].partition("; Expires=")[2]
    assert before + 500 <= calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")) <= after + 500


def test_requests_without_a_session_share_nothing(served: Any) -> None:
    served.code(COUNT).ready(env=ON)
    session = opened(ask(served, "NEW_SESSION"))
    for _ in range(3):
        answer = ask(served)
        assert answer.json()[0] == 1 and answer.json()[2] == ""
    assert ask(served, session).json()[0] == 2


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_sessions_stick_to_their_workers(served: Any, kind: str) -> None:
    served.code(COUNT.replace("def predict_fn", f"{kind} predict_fn")).ready(env=ON, workers=3)
    sessions = [opened(ask(served, "NEW_SESSION", b'{"requestType": "NEW_SESSION"}')) for _ in range(12)]
    assert len(set(sessions)) == 12
    pids: dict[str, int] = {}
    for i in range(1, 6):
        for session in sessions:
            ask(served)  # others come between
            count, pid, own = ask(served, session).json()
            assert (count, own) == (i, session)
            assert pids.setdefault(session, pid) == pid


def test_sessions_are_spread_over_busy_workers(served: Any, wait_until: Any) -> None:
    gate = served.job.directory / "gate"
    served.code(
        COUNT.replace(
            "return [context.session",
            f"""if len(data) > 1:
            import time
            open(data[1], "w").close()
            while not os.path.exists({str(gate)!r}):
                time.sleep(0.005)
        return [context.session""",
        )
    ).ready(env=ON, workers=3)
    links = []
    for i in range(3):
        begun = served.job.directory / f"begun{i}"
        link = served.connect()
        body = json.dumps(["count", str(begun)])
        link.request("POST", "/invocations", body, {"Content-Type": "application/json", HEADER: "NEW_SESSION"})
        links.append(link)
        wait_until(begun.exists, "the handler")
    gate.touch()
    pids = set()
    for link in links:
        with link.getresponse() as response:
            pids.add(json.loads(response.read())[1])
    assert len(pids) == 3


def test_requests_of_a_session_are_answered_in_order(served: Any) -> None:
    served.code(COUNT).ready(env=ON, workers=2)
    session = opened(ask(served, "NEW_SESSION", b'{"requestType": "NEW_SESSION"}'))
    links = [served.connect() for _ in range(50)]
    for link in links:
        link.request("POST", "/invocations", b'["count"]', {"Content-Type": "application/json", HEADER: session})
    counts = []
    for link in links:
        with link.getresponse() as response:
            counts.append(json.loads(response.read())[0])
    assert sorted(counts) == list(range(1, 51))


def test_an_unknown_session_is_404(served: Any) -> None:
    served.code(COUNT).ready(env=ON)
    for session in ("unknown", "0" * 32, "new_session", "NEW_SESSION ; x", "\xe9"):
        served.error(ask(served, session), 404, "SessionNotFound")


def test_a_session_expires(served: Any, wait_until: Any) -> None:
    served.code(COUNT).ready(env={**ON, "SAGEMAKER_SESSIONS_EXPIRATION": "1"})
    session = opened(ask(served, "NEW_SESSION"))
    idle = opened(ask(served, "NEW_SESSION"))
    # Each request makes its life longer: the other one, which has none, ends first.
    count = 1

    def idle_is_over() -> bool:
        nonlocal count
        count += 1
        assert ask(served, session).json()[0] == count
        return time.monotonic() > end

    end = time.monotonic() + 1.2
    wait_until(idle_is_over, "the end of the other session")
    served.error(ask(served, idle), 404, "SessionNotFound")
    assert ask(served, session).json()[0] == count + 1


def test_a_session_is_lost_with_its_worker(served: Any, wait_until: Any) -> None:
    served.code(COUNT).ready(env=ON, workers=2)
    sessions = {}
    while len(set(sessions.values())) < 2:
        session = opened(ask(served, "NEW_SESSION", b'{"requestType": "NEW_SESSION"}'))
        sessions[session] = ask(served, session).json()[1]
        if len(sessions) > 1 and len(set(sessions.values())) == 1:
            break  # both at one worker: the other loses none
    lost = next(iter(sessions))
    os.kill(sessions[lost], signal.SIGKILL)
    wait_until(lambda: sessions[lost] not in served.workers() and len(served.workers()) == 2, "another worker")
    for session, pid in sessions.items():
        answer = ask(served, session)
        if pid == sessions[lost]:
            served.error(answer, 404, "SessionNotFound")
        else:
            assert answer.json()[0] == 2
    assert ask(served).status == 200
    assert ask(served, opened(ask(served, "NEW_SESSION"))).json()[0] == 2


def test_requests_that_wait_for_the_worker_of_their_session_are_404_when_it_dies(served: Any, wait_until: Any) -> None:
    begun = served.job.directory / "begun"
    served.code(
        COUNT.replace(
            "def predict_fn(data, model, context):", "def predict_fn(data, model, context):\n        hold(data)"
        )
        + f"""
    def hold(data):
        import time
        if data[0] == "hold":
            open({str(begun)!r}, "w").close()
            time.sleep(1000)
    """
    ).ready(env=ON)
    session = opened(ask(served, "NEW_SESSION"))
    headers = {"Content-Type": "application/json", HEADER: session}
    links = [served.connect() for _ in range(3)]
    links[0].request("POST", "/invocations", b'["hold"]', headers)
    wait_until(begun.exists, "the handler")
    for link in links[1:]:
        link.request("POST", "/invocations", b'["count"]', headers)
    assert served.ask("GET", "/ping").status == 200
    os.kill(served.workers()[0], signal.SIGKILL)
    found = []
    for link in links:
        with link.getresponse() as response:
            found.append((response.status, json.loads(response.read())["type"]))
    assert found == [(500, "WorkerDied"), (404, "SessionNotFound"), (404, "SessionNotFound")]
    assert ask(served).status == 200


def test_a_handler_that_fails_does_not_end_its_session(served: Any) -> None:
    served.code(COUNT).ready(env=ON)
    session = opened(ask(served, "NEW_SESSION"))
    served.error(ask(served, session, b'["fail"]'), 500, "HandlerFailed", "as asked")
    assert ask(served, session).json()[0] == 2


def test_sessions_are_off_unless_asked_for(served: Any) -> None:
    served.code(COUNT).ready()
    for session in ("NEW_SESSION", "unknown"):
        served.error(ask(served, session), 400, "BadInput", "SAGEMAKER_ENABLE_STATEFUL_SESSIONS=true")
    assert ask(served).json()[0] == 1


def test_a_body_that_only_looks_like_a_word_about_the_session_is_the_handlers(served: Any) -> None:
    served.code("""
        def model_fn(model_dir):
            return 0
        def input_fn(body, content_type):
            return body
        def predict_fn(data, model, context):
            return [context.session_id, len(data)]
    """).ready(env=ON)
    headers = {"Content-Type": "application/octet-stream"}
    session = opened(served.ask("POST", "/invocations", b"x", {**headers, HEADER: "NEW_SESSION"}))
    wrong = []
    for body in (
        b'{"requestType":' + b"[" * 1000,
        b'{"requestType": "\xff"}',
        b'["requestType"]',
        b'{"requestType": null}',
        b'{"requestType": {"CLOSE": 1}}',
        b'{"requestType": "close"}',
        b'{"requestType": "CLOSE"}' + b" " * 2000,
    ):
        answer = served.ask("POST", "/invocations", body, {**headers, HEADER: session})
        if answer.status != 200 or answer.json() != [session, len(body)]:
            wrong.append((body[:100], answer))
    assert not wrong


def test_a_session_of_one_model_is_not_one_of_another(served: Any) -> None:
    models = served.job.base / "models"
    for name in ("one", "two"):
        code = models / name / "code"
        code.mkdir(parents=True)
        served.code(COUNT)
        (served.model / "code" / "inference.py").rename(code / "inference.py")
    served.ready(env={**ON, "SAGEMAKER_MULTI_MODEL": "true"})
    for name in ("one", "two"):
        body = json.dumps({"model_name": name, "url": str(models / name)})
        assert served.ask("POST", "/models", body, {"Content-Type": "application/json"}).status == 200
    session = opened(ask(served, "NEW_SESSION", path="/models/one/invoke"))
    assert ask(served, session, path="/models/one/invoke").json()[0] == 2
    served.error(ask(served, session, path="/models/two/invoke"), 404, "SessionNotFound")
    assert ask(served, session, path="/models/one/invoke").json()[0] == 3
