"""The multi-model API: models that come and go, each with code and processes of its own (contract/serving A2)."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

MULTI = {"SAGEMAKER_MULTI_MODEL": "true"}
JSON = {"Content-Type": "application/json"}
ASK_S = 15.0
ECHO = "def model_fn(model_dir): return 0\ndef predict_fn(data, model): return data\n"


class Many:
    """A multi-model server, and the models on its disk."""

    def __init__(self, served: Any) -> None:
        self.served = served
        self.directory: Path = served.job.base / "models"
        self.directory.mkdir(parents=True)

    def ready(self, *options: str, env: dict[str, str] | None = None, **how: Any) -> Many:
        self.served.ready(*options, env={**MULTI, **(env or {})}, **how)
        return self

    def make(self, name: str, code: str = ECHO, **others: str) -> str:
        """A model; returns its directory."""
        directory = self.directory / name / "model"
        (directory / "code").mkdir(parents=True, exist_ok=True)
        (directory / "code" / "inference.py").write_text(code)
        for module, text in others.items():
            (directory / "code" / f"{module}.py").write_text(text)
        return str(directory)

    def load(self, name: str, url: str = "") -> Any:
        body = json.dumps({"model_name": name, "url": url or str(self.directory / name / "model")})
        return self._ask("POST", "/models", body)

    def loaded(self, name: str, code: str = ECHO, **others: str) -> None:
        """Makes and loads a model."""
        self.make(name, code, **others)
        answer = self.load(name)
        assert answer.status == 200, answer

    def unload(self, name: str) -> Any:
        return self._ask("DELETE", f"/models/{name}")

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        link = self.served.connect(ASK_S)
        try:
            return self.served.ask(method, path, body, JSON, link)
        finally:
            link.close()

    def names(self, query: str = "") -> list[str]:
        answer = self.served.ask("GET", f"/models{query}")
        assert answer.status == 200, answer
        return [model["modelName"] for model in answer.json()["models"]]

    def invoke(self, name: str, body: Any = b"[1]", **how: Any) -> Any:
        return self.served.invoke(body, path=f"/models/{name}/invoke", **how)

    def begin(self, name: str, body: bytes = b"[1]") -> http.client.HTTPConnection:
        link: http.client.HTTPConnection = self.served.connect(ASK_S)
        link.request("POST", f"/models/{name}/invoke", body, JSON)
        return link


@pytest.fixture
def many(served: Any) -> Many:
    """Not started yet."""
    return Many(served)


def in_background(function: Any, *arguments: Any) -> tuple[threading.Thread, list[Any]]:
    """A call, and the list that it puts its result into."""
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(function(*arguments))
        except OSError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, results


def holding(begun: Path, gate: Path, result: str = "'held'") -> str:
    return f"""
import os, time
def model_fn(model_dir):
    return 0
def predict_fn(data, model):
    if data[0] == 1:
        open({str(begun)!r}, "w").close()
        while not os.path.exists({str(gate)!r}):
            time.sleep(0.005)
        return {result}
    return os.getpid()
"""


def slow_to_load(begun: Path, gate: Path) -> str:
    return f"""
import os, time
def model_fn(model_dir):
    open({str(begun)!r}, "w").close()
    while not os.path.exists({str(gate)!r}):
        time.sleep(0.005)
    return 0
def predict_fn(data, model):
    return data
"""


def test_ping_is_200_without_a_model_and_nothing_is_there_to_invoke(many: Many) -> None:
    served = many.ready().served
    answer = served.ask("GET", "/ping")
    assert (answer.status, answer.body) == (200, b"")
    assert served.ask("GET", "/models").json() == {"models": []}
    served.error(served.invoke(b"[1]"), 404)
    served.error(many.invoke("none"), 404, "ModelNotFound", "none")
    served.error(served.ask("GET", "/models/none"), 404, "ModelNotFound")
    served.error(many.unload("none"), 404, "ModelNotFound")
    assert served.stop() == 0


def test_a_model_is_loaded_described_invoked_and_unloaded(many: Many) -> None:
    served = many.ready().served
    url = many.make("one")
    assert many.load("one").status == 200
    assert served.ask("GET", "/models/one").json() == {"modelName": "one", "modelUrl": url}
    assert served.ask("GET", "/models").json() == {"models": [{"modelName": "one", "modelUrl": url}]}
    answer = many.invoke("one", b"[1, 2]")
    assert (answer.status, answer.json()) == (200, [1, 2])
    served.error(many.load("one"), 409, "ModelAlreadyLoaded", "one")
    assert many.unload("one").status == 200
    served.error(many.invoke("one"), 404, "ModelNotFound")
    served.error(many.unload("one"), 404, "ModelNotFound")
    assert served.ask("GET", "/ping").status == 200
    assert many.load("one").status == 200  # again
    assert many.invoke("one", b"[3]").json() == [3]
    assert served.stop() == 0


def test_the_target_model_header_and_the_url_reach_the_handler(many: Many) -> None:
    many.ready()
    many.make(
        "one",
        "def model_fn(model_dir): return model_dir\n"
        "def predict_fn(data, model, context):\n"
        "    return [model, context.model_name, context.headers['X-Amzn-SageMaker-Target-Model']]\n",
    )
    url = "file://" + many.make("two").replace("two", "one")
    assert many.load("a name, with; signs?", url).status == 200
    answer = many.invoke("a%20name,%20with;%20signs%3F", X_Amzn_SageMaker_Target_Model="target.tar.gz")
    assert answer.json() == [url[7:], "a name, with; signs?", "target.tar.gz"]


def test_models_are_listed_in_pages_by_name(many: Many) -> None:
    served = many.ready().served
    url = many.make("one")
    for name in ("d", "b", "e", "a", "c"):
        assert many.load(name, url).status == 200
    assert many.names() == ["a", "b", "c", "d", "e"]
    seen: list[str] = []
    query = "?limit=2"
    while query:
        page = served.ask("GET", f"/models{query}").json()
        assert len(page["models"]) <= 2
        seen += [model["modelName"] for model in page["models"]]
        query = f"?limit=2&next_page_token={page['nextPageToken']}" if "nextPageToken" in page else ""
    assert seen == ["a", "b", "c", "d", "e"]
    assert "nextPageToken" not in served.ask("GET", "/models?limit=5").json()
    assert many.names("?next_page_token=4") == ["e"]
    assert many.names("?next_page_token=100") == []


def test_a_page_that_is_none_is_400(many: Many) -> None:
    served = many.ready().served
    link = served.connect()
    wrong = {}
    for value in ("x", "-1", "1.5", "%C2%B2", "9" * 5000, "%00"):
        for name in ("limit", "next_page_token"):
            answer = served.ask("GET", f"/models?{name}={value}", connection=link)
            if answer.status != 400 or answer.json()["type"] != "BadInput":
                wrong[f"{name}={value[:20]}"] = answer
    for value in (0, 101):
        served.error(served.ask("GET", f"/models?limit={value}", connection=link), 400, "BadInput", str(value))
    assert not wrong


NO_LOADS = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"[" * 100000, "JSON"),
    (b"\xff\xfe", "JSON"),
    (b"[]", "JSON object"),
    (b'{"url": "/tmp"}', "model_name"),
    (b'{"model_name": "x"}', "url"),
    (b'{"model_name": "", "url": "/tmp"}', "model_name"),
    (b'{"model_name": 1, "url": "/tmp"}', "model_name"),
    (b'{"model_name": "x", "url": ["/tmp"]}', "url"),
    (b'{"model_name": "a/b", "url": "/tmp"}', "without slashes"),
    (b'{"model_name": "a\\u0000b", "url": "/tmp"}', "model_name"),
    (b'{"model_name": "a\\nb", "url": "/tmp"}', "model_name"),
    (b'{"model_name": "\\ud800", "url": "/tmp"}', "model_name"),
    (b'{"model_name": "x", "url": "/nowhere/at/all"}', "no such directory"),
    (b'{"model_name": "x", "url": "s3://bucket/model.tar.gz"}', "no such directory"),
    (b'{"model_name": "x", "url": "/etc/passwd"}', "no such directory"),
    (b'{"model_name": "x", "url": "/tmp\\u0000"}', "no such directory"),
    (b'{"model_name": "x", "url": "/\\ud800"}', "no such directory"),
    (b'{"model_name": "' + b"x" * 2000 + b'", "url": "/tmp"}', "model_name"),
]


def test_a_request_to_load_that_is_none_is_400(many: Many) -> None:
    served = many.ready().served
    link = served.connect()
    wrong = []
    for body, text in NO_LOADS:
        answer = served.ask("POST", "/models", body, JSON, link)
        if (answer.status, answer.json()["type"]) != (400, "BadInput") or text not in answer.json()["message"]:
            wrong.append((body[:100], answer))
    assert not wrong
    assert many.names() == []
    many.loaded("fine")
    assert many.invoke("fine", b"[7]").json() == [7]


def test_other_paths_and_methods(many: Many) -> None:
    served = many.ready().served
    many.loaded("one")
    for method, path, status in (
        ("PUT", "/models", 405),
        ("POST", "/models/one", 405),
        ("GET", "/models/one/invoke", 405),
        ("POST", "/models/one/other", 404),
        ("POST", "/models/one/invoke/more", 404),
        ("POST", "/invocations", 404),
        ("POST", "/modelsx", 404),
    ):
        served.error(served.ask(method, path), status)


@pytest.mark.parametrize(
    ("failure", "status", "kind", "text"),
    [
        ("raise MemoryError('it does not fit')", 507, "InsufficientMemory", "it does not fit"),
        ("raise RuntimeError('no weights')", 500, "ModelNotLoaded", "RuntimeError: no weights"),
        ("import not_there", 500, "ModelNotLoaded", "No module named 'not_there'"),
        ("import sys; sys.exit(3)", 500, "ModelNotLoaded", "sys.exit(3)"),
        ("import os; os._exit(3)", 500, "ModelNotLoaded", "ended with code 3"),
        ("import os; os.kill(os.getpid(), 11)", 500, "ModelNotLoaded", "SIGSEGV"),
    ],
)
def test_a_model_that_can_not_be_loaded_harms_nobody(
    many: Many, wait_until: Any, failure: str, status: int, kind: str, text: str
) -> None:
    served = many.ready("--drain", "600").served
    many.loaded("other")
    many.make("bad", f"def model_fn(model_dir):\n    {failure}\ndef predict_fn(data, model): return 0\n")
    served.error(many.load("bad"), status, kind, text)
    served.error(many.invoke("bad"), 404, "ModelNotFound")
    assert many.names() == ["other"]
    assert many.invoke("other", b"[1]").json() == [1]
    assert len(served.workers()) == 1
    many.loaded("bad")  # mended
    assert many.invoke("bad", b"[2]").json() == [2]
    assert served.stop() == 0


def test_a_model_without_code_that_has_none_of_its_own_files_is_500(many: Many) -> None:
    served = many.ready("--drain", "600").served
    (many.directory / "empty" / "model").mkdir(parents=True)
    served.error(many.load("empty"), 500, "ModelNotLoaded", "model_fn")
    assert many.names() == []


def test_each_model_has_its_own_code(many: Many) -> None:
    many.ready()
    for name in ("one", "two"):
        many.loaded(
            name,
            "import os, helper\n"
            "def model_fn(model_dir): return os.path.basename(os.path.dirname(model_dir))\n"
            "def predict_fn(data, model): return [model, helper.NAME, helper.other()]\n",
            helper=f"NAME = {name!r}\ndef other():\n    import more\n    return more.VALUE\n",
            more=f"VALUE = {name + '!'!r}\n",
        )
    for name in ("one", "two", "one"):
        assert many.invoke(name).json() == [name, name, name + "!"]


def test_an_unloaded_models_memory_is_free(many: Many, alive: Any) -> None:
    served = many.ready("--drain", "600", workers=2).served
    many.loaded(
        "one", "import os\ndef model_fn(d): return bytearray(b'x' * (64 << 20))\ndef predict_fn(x, m): return 0"
    )
    many.loaded("two")
    before = served.workers()
    assert len(before) == 4
    assert many.unload("one").status == 200
    left = served.workers()  # when the answer is there, they are gone
    assert len(left) == 2 and set(left) < set(before)
    assert many.invoke("two", b"[2]").json() == [2]
    assert served.stop() == 0


def test_a_request_in_hand_is_answered_though_its_model_is_unloaded(many: Many, wait_until: Any) -> None:
    served = many.ready("--drain", "600").served
    begun, gate = served.job.directory / "begun", served.job.directory / "gate"
    many.loaded("one", holding(begun, gate))
    link = many.begin("one")
    wait_until(begun.exists, "the handler")
    thread, results = in_background(many.unload, "one")
    wait_until(lambda: many.names() == [], "that it is not listed")
    served.error(many.invoke("one"), 404, "ModelNotFound")
    assert not results
    gate.touch()
    with link.getresponse() as response:
        assert (response.status, response.read()) == (200, b'"held"')
    thread.join()
    assert results[0].status == 200
    assert served.workers() == []
    assert served.stop() == 0


def test_a_stream_in_hand_is_whole_though_its_model_is_unloaded(many: Many, wait_until: Any) -> None:
    served = many.ready("--drain", "600").served
    gate = served.job.directory / "gate"
    many.loaded(
        "one",
        f"""
import os, time
def model_fn(model_dir): return 0
def predict_fn(data, model):
    yield "first,"
    while not os.path.exists({str(gate)!r}):
        time.sleep(0.005)
    for i in range(100):
        yield str(i) + ","
""",
    )
    link = many.begin("one")
    with link.getresponse() as response:
        assert response.read(6) == b"first,"
        thread, results = in_background(many.unload, "one")
        wait_until(lambda: many.names() == [], "that it is not listed")
        gate.touch()
        assert response.read() == "".join(f"{i}," for i in range(100)).encode()
    thread.join()
    assert results[0].status == 200


def test_a_worker_that_dies_while_its_model_is_unloaded_fails_its_request(many: Many, wait_until: Any) -> None:
    served = many.ready("--drain", "600", "--timeout", "600").served
    begun, gate = served.job.directory / "begun", served.job.directory / "gate"
    many.loaded("one", holding(begun, gate))
    link = many.begin("one")
    wait_until(begun.exists, "the handler")
    thread, results = in_background(many.unload, "one")
    wait_until(lambda: many.names() == [], "that it is not listed")
    os.kill(served.workers()[0], signal.SIGKILL)
    with link.getresponse() as response:
        assert response.status == 500
        assert json.loads(response.read())["type"] == "WorkerDied"
    thread.join()
    assert results[0].status == 200


def test_a_name_is_loaded_once_however_often_it_is_asked_for(many: Many, wait_until: Any) -> None:
    served = many.ready().served
    begun, gate = served.job.directory / "begun", served.job.directory / "gate"
    many.make("one", slow_to_load(begun, gate))
    thread, results = in_background(many.load, "one")
    wait_until(begun.exists, "that it is being loaded")
    served.error(many.load("one"), 409, "ModelAlreadyLoaded")
    assert served.ask("GET", "/ping").status == 200
    gate.touch()
    thread.join()
    assert results[0].status == 200
    assert many.invoke("one", b"[4]").json() == [4]
    assert len(served.workers()) == 1


def test_many_loads_at_a_time_have_one_winner(many: Many) -> None:
    served = many.ready().served
    many.make("one")
    running = [in_background(many.load, "one") for _ in range(8)]
    for thread, _ in running:
        thread.join()
    assert sorted(results[0].status for _, results in running) == [200, *[409] * 7]
    assert len(served.workers()) == 1


def test_a_request_while_its_model_is_loaded_is_answered_or_404(many: Many, wait_until: Any) -> None:
    served = many.ready().served
    begun, gate = served.job.directory / "begun", served.job.directory / "gate"
    many.make("one", slow_to_load(begun, gate))
    thread, results = in_background(many.load, "one")
    wait_until(begun.exists, "that it is being loaded")
    link = many.begin("one", b"[5]")
    gate.touch()
    with link.getresponse() as response:
        assert (response.status, response.read()) == (200, b"[5]") or response.status == 404
    thread.join()
    assert results[0].status == 200


def test_unloading_what_is_being_loaded_answers_both(many: Many, wait_until: Any) -> None:
    served = many.ready("--drain", "600").served
    begun, gate = served.job.directory / "begun", served.job.directory / "gate"
    many.make("one", slow_to_load(begun, gate))
    thread, results = in_background(many.load, "one")
    wait_until(begun.exists, "that it is being loaded")
    assert many.unload("one").status in (200, 404, 409)
    wait_until(lambda: results or not many.names(), "that it is not listed, or loaded")
    gate.touch()
    thread.join()
    answer = results[0]
    assert not isinstance(answer, OSError), "who asked for the load is never answered"
    assert answer.status == 200 or (answer.status >= 400 and answer.json()["code"] == answer.status)
    assert served.stop() == 0


def test_sigterm_ends_a_load_that_goes_on(many: Many, wait_until: Any) -> None:
    served = many.ready("--drain", "2").served
    begun, gate = served.job.directory / "begun", served.job.directory / "gate"
    many.make("one", slow_to_load(begun, gate))
    link = served.connect()
    body = json.dumps({"model_name": "one", "url": str(many.directory / "one" / "model")})
    link.request("POST", "/models", body, JSON)
    wait_until(begun.exists, "that it is being loaded")
    assert served.stop() in (0, 143)


def test_a_model_whose_worker_dies_harms_no_other(many: Many, wait_until: Any) -> None:
    served = many.ready().served
    pid = "import os\ndef model_fn(d): return 0\ndef predict_fn(data, model): return os.getpid()\n"
    many.loaded("one", pid)
    many.loaded("two", pid)
    one, two = many.invoke("one").json(), many.invoke("two").json()
    os.kill(one, signal.SIGKILL)
    assert many.invoke("two").json() == two
    again = many.invoke("one")
    if again.status != 200:
        served.error(again, 500, "WorkerDied")
    wait_until(lambda: many.invoke("one").status == 200, "another worker")
    assert many.invoke("one").json() not in (one, two)
    assert many.invoke("two").json() == two
    assert served.ask("GET", "/ping").status == 200


def test_a_model_in_a_crash_loop_is_gone_with_its_workers_and_harms_no_other(many: Many, wait_until: Any) -> None:
    served = many.ready("--crash-limit", "2", workers=3).served
    many.loaded("two")
    others = served.workers()
    crash = "import os\ndef model_fn(d): return 0\ndef predict_fn(data, model): os._exit(9)\n"
    many.loaded("one", crash)
    for _ in range(2):
        served.error(many.invoke("one"), 500, "WorkerDied", "ended with code 9")
    wait_until(lambda: many.names() == ["two"], "that the model is gone")
    served.error(many.invoke("one"), 404, "ModelNotFound")
    wait_until(lambda: served.workers() == others, "that its workers are gone", 10)
    assert "one: " in served.log() and "ended with code 9" in served.log()
    assert many.invoke("two", b"[2]").json() == [2]
    assert served.ask("GET", "/ping").status == 200
    many.loaded("one")
    assert many.invoke("one", b"[3]").json() == [3]
    assert served.stop() == 0


def test_a_model_whose_handler_hangs_harms_no_other(many: Many, wait_until: Any) -> None:
    served = many.ready("--timeout", "1").served
    begun = served.job.directory / "begun"
    many.loaded("one", holding(begun, served.job.directory / "never"))
    many.loaded("two")
    before = many.invoke("one", b"[0]").json()
    link = many.begin("one")
    wait_until(begun.exists, "the handler")
    assert many.invoke("two", b"[2]").json() == [2]
    with link.getresponse() as response:
        assert response.status == 504
        response.read()
    assert many.invoke("one", b"[0]").json() != before


def test_models_are_counted_apart(many: Many) -> None:
    served = many.ready(env={"SAGEMAKER_SAFE_PORT_RANGE": "22000-22999"}).served
    for name in ("one", 'two"\\'):
        many.make("code")
        assert many.load(name, str(many.directory / "code" / "model")).status == 200
    assert many.invoke("one", b"[1]").status == 200
    assert many.invoke("two%22%5C", b"[1").status == 400
    port = int(re.search(r"metrics at port (\d+)", served.log())[1])  # type: ignore[index]
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    link.request("GET", "/metrics")
    with link.getresponse() as response:
        text = response.read().decode()
    link.close()
    assert 'launcher_invocations_total{model="one",status="200"} 1' in text
    assert 'launcher_invocations_total{model="two\\"\\\\",status="400"} 1' in text


def test_load_and_unload_again_and_again(many: Many) -> None:
    served = many.ready("--drain", "600").served
    many.make("one")
    files = Path(f"/proc/{served.job.process.pid}/fd")

    def turn() -> int:
        assert many.load("one").status == 200
        assert many.invoke("one", b"[1]").json() == [1]
        assert many.unload("one").status == 200
        return len(list(files.iterdir()))

    counts = [turn() for _ in range(10)]
    assert max(counts) <= counts[0] + 2
    assert served.workers() == []
