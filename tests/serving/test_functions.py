"""The user's functions (contract/serving A5): which are found, what they are given, what their mistakes say."""

from __future__ import annotations

import json
from typing import Any

import pytest

MODEL = "def model_fn(model_dir):\n    return 'model'\n"


def test_each_function_is_called_with_what_it_names_and_in_order(served: Any) -> None:
    served.code("""
        calls = []
        def pre_model_fn(model_dir):
            calls.append("pre_model_fn")
        def model_fn(model_dir):
            calls.append("model_fn")
            return "model"
        def model_warmup_fn(model_dir, model):
            calls.append(f"model_warmup_fn {model}")
        def input_fn(body, content_type):
            calls.append(f"input_fn {body} {type(body).__name__} {content_type}")
            return "data"
        def predict_fn(data, model):
            calls.append(f"predict_fn {data} {model}")
            return "prediction"
        def output_fn(prediction, accept):
            calls.append(f"output_fn {prediction} {accept}")
            return "\\n".join(calls), "text/plain"
    """).ready()
    answer = served.invoke(b"[1]", "Application/JSON; charset=utf-8", "TEXT/CSV;q=0.9, application/xml;q=0.1")
    assert answer.headers["content-type"] == "text/plain"
    assert answer.body.decode().splitlines() == [
        "pre_model_fn",
        "model_fn",
        "model_warmup_fn model",
        "input_fn [1] str application/json",
        "predict_fn data model",
        "output_fn prediction text/csv",
    ]


@pytest.mark.parametrize(
    "definition",
    [
        "def predict_fn(data, model, context): return context.get_request_id()",
        "def predict_fn(data, model, *, context): return context.get_request_id()",
        "def predict_fn(data, model, *, context=None): return context.get_request_id()",
        "def predict_fn(data, model, context=None): return context.get_request_id()",
        "def predict_fn(data, model, ctx): return ctx.get_request_id()",
        "def predict_fn(data, model, context, **more): return context.get_request_id()",
        """
class Predictor:
    def __call__(self, data, model, context): return context.get_request_id()
    def method(self, data, model, context): return context.get_request_id()
predict_fn = Predictor()
""",
        """
class Predictor:
    def method(self, data, model, context): return context.get_request_id()
predict_fn = Predictor().method
""",
        """
import functools
def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs): return function(*args, **kwargs)
    return wrapper
@logged
def predict_fn(data, model, context): return context.get_request_id()
""",
        """
import functools
def predict(extra, data, model, context): return context.get_request_id()
predict_fn = functools.partial(predict, "extra")
""",
    ],
)
def test_the_context_is_given_to_who_asks_for_it(served: Any, definition: str) -> None:
    served.code(MODEL + definition).ready()
    answer = served.invoke()
    assert answer.json() == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "definition",
    [
        "def predict_fn(data, model): return [data, model]",
        "def predict_fn(*args): return list(args)",
        "def predict_fn(data, *args, **kwargs): return [data, *args]",
        "def predict_fn(data, model, threshold=0.5): return [data, model]",
        "def predict_fn(data, model, *, threshold=0.5): return [data, model]",
        "def predict_fn(data, model='other'): return [data, model]",
        "predict_fn = lambda data, model: [data, model]",
    ],
)
def test_who_does_not_ask_for_the_context_is_not_given_it(served: Any, definition: str) -> None:
    served.code(MODEL + "def input_fn(body, content_type): return 'data'\n" + definition).ready()
    assert served.invoke().json() == ["data", "model"]


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        ("def predict_fn(data): return 0", "predict_fn(data); expected predict_fn(data, model) or"),
        ("def predict_fn(a, b, c, d): return 0", "predict_fn(a, b, c, d); expected predict_fn(data, model) or"),
        ("def predict_fn(data, model, *, key): return 0", "predict_fn(data, model, key); expected"),
        ("predict_fn = 3", "field 'predict_fn': found a int; expected a function"),
        (
            "def transform_fn(m, b, c, a): return 0\ndef predict_fn(d, m): return 0",
            "Cannot use transform_fn implementation in conjunction with input_fn, predict_fn, and/or output_fn",
        ),
    ],
)
def test_a_signature_that_does_not_fit_ends_the_server_with_65(served: Any, definition: str, said: str) -> None:
    served.code(MODEL + definition).start()
    assert served.end() == 65
    assert said in served.log()
    assert "inference.py" in served.log()
    assert "Traceback" not in served.log()


def test_transform_fn_does_all(served: Any) -> None:
    served.code(
        MODEL + "def transform_fn(model, body, content_type, accept): return f'{model} {body} {accept}', accept"
    )
    served.ready()
    answer = served.invoke(b"a,b", "text/csv", "text/x-mine")
    assert (answer.headers["content-type"], answer.body) == ("text/x-mine", b"model a,b text/x-mine")


@pytest.mark.parametrize(
    ("made", "body", "content_type"),
    [
        ("b'\\x00\\xff'", b"\x00\xff", "application/json"),
        ("'text'", b"text", "application/json"),
        ("bytearray(b'abc')", b"abc", "application/json"),
        ("{'a': 1}", b'{"a": 1}', "application/json"),
        ("('<x/>', 'application/xml')", b"<x/>", "application/xml"),
        ("({'a': 1}, 'application/x-mine')", b'{"a": 1}', "application/x-mine"),
        ("None", b"", "application/json"),
    ],
)
def test_what_output_fn_returns_becomes_the_body(served: Any, made: str, body: bytes, content_type: str) -> None:
    served.code(MODEL + f"def predict_fn(d, m): return d\ndef output_fn(prediction, accept): return {made}").ready()
    answer = served.invoke()
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, body, content_type)


def test_bytes_and_text_are_given_by_content_type(served: Any) -> None:
    served.code(
        MODEL + "def input_fn(body, content_type): return [type(body).__name__, content_type]\n"
        "def predict_fn(data, model): return data"
    ).ready()
    for content_type, kind in (
        ("application/json", "str"),
        ("text/csv; charset=latin-1", "str"),
        ("application/octet-stream", "bytes"),
        ("IMAGE/PNG", "bytes"),
        ("", "str"),
    ):
        essence = content_type.split(";")[0].lower() or "application/json"
        assert served.invoke(b"\xe9" if "latin" in content_type else b"1", content_type).json() == [kind, essence]
    served.error(served.invoke(b"\xff", "application/json"), 400, text="the body is not utf-8: byte 0")
    served.error(served.invoke(b"1", "text/csv; charset=klingon"), 415, text="charset 'klingon' is not known")


def test_async_functions_are_answered_together(served: Any) -> None:
    served.code("""
        import asyncio
        waiting = []
        async def model_fn(model_dir):
            await asyncio.sleep(0)
            return "model"
        async def predict_fn(data, model):
            waiting.append(asyncio.get_running_loop().create_future())
            if len(waiting) == 8:
                for one in waiting:
                    one.set_result(None)
            await waiting[len(waiting) - 1]  # all eight are here at a time, in one process
            return [model, len(waiting)]
    """).ready()
    links = [served.connect() for _ in range(8)]
    for link in links:
        link.request("POST", "/invocations", b"1", {"Content-Type": "application/json"})
    assert [json.loads(link.getresponse().read()) for link in links] == [["model", 8]] * 8


def test_async_generators_are_streamed(served: Any) -> None:
    served.code("""
        import asyncio
        def model_fn(model_dir):
            return 0
        async def predict_fn(data, model):
            return data
        async def output_fn(prediction, accept):
            async def pieces():
                for i in range(3):
                    await asyncio.sleep(0)
                    yield {"piece": i}
            return pieces(), "application/jsonlines"
    """).ready()
    answer = served.invoke(b"1")
    assert answer.headers["content-type"] == "application/jsonlines"
    assert [json.loads(line) for line in answer.body.splitlines()] == [{"piece": i} for i in range(3)]


def test_only_model_fn_may_be_async(served: Any) -> None:
    served.code("async def model_fn(d): return 5\ndef predict_fn(x, m): return m").ready()
    assert served.invoke().json() == 5


def test_something_to_wait_for_from_a_plain_function_is_an_error_that_says_so(served: Any) -> None:
    served.code(
        MODEL
        + """
async def work():
    import asyncio
    await asyncio.sleep(0)
predict_fn = lambda data, model: work()
"""
    ).ready()
    served.error(served.invoke(), 500, text="declare it with async def")


def test_modules_beside_the_program_are_imported(served: Any) -> None:
    served.code("VALUE = 7", "helper.py").code("import helper\n" + MODEL + "def predict_fn(d, m): return helper.VALUE")
    served.ready()
    assert served.invoke().json() == 7


def test_a_program_that_is_named_and_not_there_ends_the_server(served: Any) -> None:
    served.code("", "other.py").start(env={"SAGEMAKER_PROGRAM": "missing.py"})
    assert served.end() == 65
    assert "found no missing.py" in served.log() and "there: other.py" in served.log()


def test_no_code_and_no_model_is_said(served: Any) -> None:
    served.start()
    assert served.end() == 65
    assert "Please provide a model_fn implementation" in served.log()


# ---- default functions


def test_a_pickled_model_is_loaded_only_when_that_is_allowed(served: Any) -> None:
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    model = linear.LinearRegression().fit([[0.0], [1.0]], [1.0, 3.0])
    served.model.mkdir(parents=True)
    joblib.dump(model, served.model / "model.joblib")
    served.start()
    assert served.end() == 65
    assert "a pickled model, which may run any code" in served.log() and "--allow-pickle" in served.log()
    served.ready("--allow-pickle")
    assert served.invoke(b"[[2.0], [3.0]]").json() == pytest.approx([5.0, 7.0])
    answer = served.invoke(b"2\n3\n", "text/csv", "text/csv")
    assert [float(line) for line in answer.body.split()] == pytest.approx([5.0, 7.0])
    served.error(served.invoke(b"[[1.0, 2.0]]"), 400, "BadInput", "features")


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["script", "state", "safetensors"])
def test_models_of_pytorch_are_loaded_without_code_of_their_own(served: Any, kind: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    network = torch.nn.Linear(2, 1)
    with torch.no_grad():
        network.weight[:] = torch.tensor([[2.0, 3.0]])
        network.bias[:] = 1.0
    served.model.mkdir(parents=True)
    if kind == "script":
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, and what users have
            torch.jit.script(network).save(str(served.model / "model.pt"))
    else:
        served.code("import torch\ndef create_model(model_dir): return torch.nn.Linear(2, 1)")
        if kind == "state":
            torch.save(network.state_dict(), served.model / "model.pth")
        else:
            pytest.importorskip("safetensors", reason="safetensors is not installed")
            from safetensors.torch import save_file

            save_file(network.state_dict(), served.model / "model.safetensors")
    served.ready()
    assert served.invoke(b"[[1, 1], [2, 0]]").json() == [[6.0], [5.0]]
    served.error(served.invoke(b"[[1, 1, 1]]"), 400, "BadInput", "the model does not take this input")


@pytest.mark.torch
def test_weights_without_a_network_are_said(served: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    served.model.mkdir(parents=True)
    torch.save(torch.nn.Linear(2, 1).state_dict(), served.model / "model.pth")
    served.start()
    assert served.end() == 65
    assert "weights without a network" in served.log() and "create_model(model_dir)" in served.log()
