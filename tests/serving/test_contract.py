"""The hosting contract: endpoints, headers, environment, limits (contract/serving A1 to A4), over real HTTP."""

from __future__ import annotations

import re
import signal
import socket
import time
import urllib.request
from typing import Any

import pytest

ECHO = """
    def model_fn(model_dir):
        return "the model"

    def input_fn(body, content_type):
        return body

    def predict_fn(data, model):
        return data

    def output_fn(prediction, accept):
        return prediction, "text/plain"
"""


def test_ping_is_503_until_the_model_is_loaded_and_200_after(served: Any, wait_until: Any) -> None:
    gate = served.job.directory / "loaded"
    served.code(f"""
        import os, time
        def model_fn(model_dir):
            while not os.path.exists({str(gate)!r}):
                time.sleep(0.01)
        def predict_fn(data, model):
            return data
    """).start()
    answer = served.ask("GET", "/ping")
    served.error(answer, 503, "NotReady", "no worker is alive")
    gate.touch()
    served.wait_ready()
    answer = served.ask("GET", "/ping")
    assert (answer.status, answer.body) == (200, b"")
    assert served.stop() == 0


def test_check_tells_health_checks_what_ping_says(served: Any, make_job: Any, wait_until: Any) -> None:
    served.code("""
        import os, time

        def model_fn(model_dir):
            while not os.path.exists(model_dir + "/go"):
                time.sleep(0.01)

        predict_fn = lambda data, model: data
    """).start()
    asked = make_job("check")

    def check(*options: str, **env: str) -> int:
        code: int = asked.run("serve", "--check", *options, env=env, own_tree=False)
        assert asked.stdout == ""
        return code

    assert check("--port", str(served.port)) == 1
    assert asked.stderr == f"[launcher] not healthy: /ping at 127.0.0.1 port {served.port} answers 503\n"
    (served.model / "go").touch()
    served.wait_ready()
    assert check(SAGEMAKER_BIND_TO_PORT=str(served.port)) == 0
    assert asked.stderr == ""
    assert served.stop() == 0
    assert check("--port", str(served.port)) == 1
    assert f"no answer from /ping at 127.0.0.1 port {served.port}: [Errno 111] Connection refused" in asked.stderr
    assert check("--prot", "1") == 64


def test_a_request_that_comes_while_the_model_loads_is_answered(served: Any) -> None:
    served.code("""
        import time
        def model_fn(model_dir):
            time.sleep(0.3)
        def predict_fn(data, model):
            return data
    """).start()
    assert served.invoke(b"[1, 2]").json() == [1, 2]


def test_model_and_code_are_found_where_the_contract_has_them(served: Any) -> None:
    served.code("""
        import os
        def model_fn(model_dir):
            with open(os.path.join(model_dir, "weights.txt")) as file:
                return file.read()
        def predict_fn(data, model):
            return [model, os.path.basename(__file__)]
    """)
    (served.model / "weights.txt").write_text("42")
    served.ready()
    assert served.invoke().json() == ["42", "inference.py"]


def test_program_and_submit_directory_are_the_platforms_variables(served: Any) -> None:
    directory = served.job.directory / "elsewhere"
    directory.mkdir()
    (directory / "mine.py").write_text("def model_fn(d): return 1\ndef predict_fn(x, m): return 'mine'\n")
    served.ready(env={"SAGEMAKER_PROGRAM": "mine.py", "SAGEMAKER_SUBMIT_DIRECTORY": f"file://{directory}"})
    assert served.invoke().json() == "mine"


def test_port_is_the_platforms(served: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served.code(ECHO).ready(env={"LAUNCHER_SERVE_PORT": "", "SAGEMAKER_BIND_TO_PORT": str(port)})
    assert served.port == port


def test_what_handlers_count_is_in_the_metrics(served: Any) -> None:
    served.code("""
        def model_fn(model_dir):
            return 0
        def predict_fn(data, model, context):
            context.metrics.add_counter("rows", len(data))
            context.metrics.add_time("ignored", 1)
            return 0
    """).ready(env={"SAGEMAKER_SAFE_PORT_RANGE": "21000-21999"})
    for _ in range(3):
        assert served.invoke(b"[1, 2]").status == 200
    port = int(re.search(r"metrics at port (\d+)", served.log())[1])
    wanted = 'launcher_user_total{model="",name="rows"} 6'
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert wanted in answer.read().decode()


def test_metrics_are_at_the_first_free_port_of_the_safe_range(served: Any) -> None:
    taken = socket.socket()
    taken.bind(("0.0.0.0", 0))
    taken.listen()
    first = taken.getsockname()[1]
    served.code(ECHO).ready(env={"SAGEMAKER_SAFE_PORT_RANGE": f"{first}-{min(first + 50, 65535)}"})
    assert served.invoke(b"x", "text/plain").status == 200
    assert served.invoke(b"x", "???").status == 400
    port = int(re.search(r"metrics at port (\d+)", served.log())[1])
    assert first < port <= first + 50
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    assert 'launcher_invocations_total{model="",status="200"} 1' in text
    assert 'launcher_invocations_total{model="",status="400"} 1' in text
    assert 'launcher_invocation_seconds_count{model=""} 2' in text
    assert 'launcher_workers_ready{model=""} 1' in text
    taken.close()


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/invocations", 405, "POST"),
        ("POST", "/ping", 405, "GET, HEAD"),
        ("GET", "/nowhere", 404, ""),
        ("GET", "/models", 404, ""),
        ("POST", "/invocations/more", 404, ""),
    ],
)
def test_other_paths_and_methods_are_refused(served: Any, method: str, path: str, status: int, allow: str) -> None:
    served.code(ECHO).ready()
    answer = served.ask(method, path)
    served.error(answer, status)
    assert answer.headers.get("allow", "") == allow


def test_head_of_ping(served: Any) -> None:
    served.code(ECHO).ready()
    assert served.ask("HEAD", "/ping").status == 200


def test_execution_parameters(served: Any) -> None:
    served.code(ECHO).ready(workers=2)
    assert served.ask("GET", "/execution-parameters").json() == {
        "MaxConcurrentTransforms": 2,
        "BatchStrategy": "MULTI_RECORD",
        "MaxPayloadInMB": 6,
    }


def test_variables_of_batch_transform_are_honoured(served: Any) -> None:
    served.code(ECHO).ready(
        env={
            "SAGEMAKER_BATCH": "true",
            "SAGEMAKER_MAX_PAYLOAD_IN_MB": "1",
            "SAGEMAKER_BATCH_STRATEGY": "SINGLE_RECORD",
            "SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": "7",
        }
    )
    assert served.ask("GET", "/execution-parameters").json() == {
        "MaxConcurrentTransforms": 7,
        "BatchStrategy": "SINGLE_RECORD",
        "MaxPayloadInMB": 1,
    }
    assert served.invoke(b"x" * (1 << 20), "text/plain").status == 200
    served.error(served.invoke(b"x" * ((1 << 20) + 1), "text/plain"), 413, "PayloadTooLarge", "at most 1 MB")


def test_headers_reach_the_handler_and_its_own_reach_the_client(served: Any) -> None:
    served.code("""
        def model_fn(model_dir, context):
            return context.system_properties["model_dir"]
        def predict_fn(data, model, context):
            context.set_response_header(0, "X-Amzn-SageMaker-Custom-Attributes", "answered")
            context.set_response_header(0, "Content-Length", "7")  # how it is sent is not the handler's
            context.set_response_status(201)
            properties = context.request_processor[0].get_request_properties()
            return {
                "attribute": context.get_request_header(0, "x-AMZN-sagemaker-custom-attributes"),
                "id": context.headers["X-Amzn-SageMaker-Inference-Id"],
                "same": properties["x-amzn-sagemaker-inference-id"],
                "request": context.request_ids[0],
                "model_dir": model,
            }
    """).ready()
    answer = served.invoke(X_Amzn_SageMaker_Custom_Attributes="asked", X_Amzn_SageMaker_Inference_Id="i-1")
    assert answer.status == 201
    assert answer.headers["x-amzn-sagemaker-custom-attributes"] == "answered"
    assert answer.json() == {
        "attribute": "asked",
        "id": "i-1",
        "same": "i-1",
        "request": answer.headers["x-request-id"],
        "model_dir": str(served.model),
    }


def test_default_accept_is_the_platforms_and_the_clients_word_wins(served: Any) -> None:
    served.code("def model_fn(d): return 0\ndef predict_fn(x, m): return x")
    served.ready(env={"SAGEMAKER_DEFAULT_INVOCATIONS_ACCEPT": "text/csv"})
    for accept, content_type, body in (
        ("", "text/csv", b"1\n2\n"),
        ("*/*", "text/csv", b"1\n2\n"),
        ("Application/JSON; q=0.4, text/plain;q=0", "application/json", b"[1, 2]"),
        ("text/*;q=0.1, application/json", "application/json", b"[1, 2]"),
    ):
        answer = served.invoke(b"[1, 2]", accept=accept)
        assert (answer.status, answer.headers["content-type"], answer.body) == (200, content_type, body)
    answer = served.ask(
        "POST", "/invocations", b"[1]", {"Content-Type": "application/json", "X-Amzn-SageMaker-Accept": "text/csv"}
    )
    assert answer.headers["content-type"] == "text/csv"


def test_streamed_answers_come_piece_by_piece(served: Any) -> None:
    gate = served.job.directory / "second"
    served.code(f"""
        import os, time
        def model_fn(model_dir):
            return 0
        def predict_fn(data, model):
            yield "first\\n"
            while not os.path.exists({str(gate)!r}):
                time.sleep(0.01)
            yield "second\\n"
        def output_fn(prediction, accept):
            return prediction, "text/plain"
    """).ready()
    link = served.connect()
    link.request("POST", "/invocations", b"[]", {"Content-Type": "application/json"})
    response = link.getresponse()
    assert (response.status, response.getheader("transfer-encoding")) == (200, "chunked")
    assert response.readline() == b"first\n"  # the handler has not made the second yet
    gate.touch()
    assert response.read() == b"second\n"
    assert served.invoke(b"[]").body == b"first\nsecond\n"


def test_sigterm_answers_what_is_in_hand_and_ends_with_0(served: Any, wait_until: Any) -> None:
    gate = served.job.directory / "go"
    begun = served.job.directory / "begun"
    served.code(f"""
        import os, time
        def model_fn(model_dir):
            return 0
        def predict_fn(data, model):
            open({str(begun)!r}, "w").close()
            while not os.path.exists({str(gate)!r}):
                time.sleep(0.01)
            return "late, but here"
    """).ready()
    link = served.connect()
    link.request("POST", "/invocations", b"[]", {"Content-Type": "application/json"})
    wait_until(begun.exists, "the handler")
    served.job.process.send_signal(signal.SIGTERM)
    served.job.wait_for_line("SIGTERM: ending after 1 requests in hand", stream="stderr")
    gate.touch()
    response = link.getresponse()
    assert (response.status, response.read()) == (200, b'"late, but here"')
    assert served.end() == 0
    with pytest.raises(ConnectionRefusedError):
        served.socket()


def test_a_drain_that_takes_too_long_ends_with_143(served: Any, wait_until: Any) -> None:
    begun = served.job.directory / "begun"
    served.code(f"""
        import time
        def model_fn(model_dir):
            return 0
        def predict_fn(data, model):
            open({str(begun)!r}, "w").close()
            time.sleep(1000)
    """).ready("--drain", "1")
    link = served.connect()
    link.request("POST", "/invocations", b"[]", {"Content-Type": "application/json"})
    wait_until(begun.exists, "the handler")
    assert served.stop() == 143
    assert "1 requests were not answered in time" in served.log()


def test_a_second_signal_ends_at_once(served: Any, wait_until: Any) -> None:
    begun = served.job.directory / "begun"
    served.code(f"""
        import time
        def model_fn(model_dir):
            return 0
        def predict_fn(data, model):
            open({str(begun)!r}, "w").close()
            time.sleep(1000)
    """).ready()
    link = served.connect()
    link.request("POST", "/invocations", b"[]", {"Content-Type": "application/json"})
    wait_until(begun.exists, "the handler")
    served.job.process.send_signal(signal.SIGTERM)
    served.job.wait_for_line("SIGTERM: ending", stream="stderr")
    assert served.stop() == 143


@pytest.mark.parametrize(
    ("options", "env", "text"),
    [
        (("--prot", "1"), {}, "did you mean --port?"),
        (("--port", "x"), {}, "expected a whole number"),
        (("--port", "99999"), {}, "expected a port"),
        ((), {"SAGEMAKER_SAFE_PORT_RANGE": "5-1"}, "SAGEMAKER_SAFE_PORT_RANGE"),
        ((), {"SAGEMAKER_MODEL_SERVER_WORKERS": "many"}, "SAGEMAKER_MODEL_SERVER_WORKERS"),
        (("--batch-size", "0"), {}, "--batch-size is 0"),
        (("--log-level", "loud"), {}, "log level 'loud'"),
        ((), {"SAGEMAKER_BATCH_STRATEGY": "SOME"}, "SAGEMAKER_BATCH_STRATEGY"),
    ],
)
def test_bad_settings_are_one_line_and_64(job: Any, options: tuple[str, ...], env: dict[str, str], text: str) -> None:
    code = job.run("serve", *options, env={"SAGEMAKER_BASE_DIR": str(job.tree()), **env}, own_tree=False)
    assert code == 64
    assert text in job.stderr
    assert len(job.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_said(job: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = job.run("serve", "--port", str(port), env={"SAGEMAKER_BASE_DIR": str(job.tree())}, own_tree=False)
    assert code == 64
    assert re.search(rf"--port {port}: cannot listen on 0.0.0.0: Address already in use", job.stderr)


def test_a_model_that_is_not_there_is_said(job: Any) -> None:
    env = {"SAGEMAKER_BASE_DIR": str(job.directory / "nowhere"), "LAUNCHER_SERVE_PORT": "0"}
    assert job.run("serve", env=env, own_tree=False) == 65
    assert f"{job.directory}/nowhere/model: found no such directory" in job.stderr


def test_requirements_are_installed_and_their_failure_ends_the_server(served: Any) -> None:
    served.code(ECHO).code("./no-such-directory-of-a-package\n", "requirements.txt")
    served.job.start("serve", "--port", "0", env={"SAGEMAKER_BASE_DIR": str(served.job.base)}, own_tree=False)
    assert served.end() == 1
    assert "no-such-directory-of-a-package" in served.log()


def test_log_level_is_the_users_loggings(served: Any) -> None:
    served.code("""
        import logging
        def model_fn(model_dir):
            logging.getLogger("mine").debug("loading, at length")
        def predict_fn(data, model):
            logging.getLogger("mine").debug("predicting, at length")
            return 0
    """).ready(env={"SAGEMAKER_CONTAINER_LOG_LEVEL": "10"})
    assert served.invoke().status == 200
    served.job.wait_for_line("loading, at length", stream="stderr")
    served.job.wait_for_line("predicting, at length", stream="stderr")


def test_access_log_is_off_unless_asked_for_and_json(served: Any) -> None:
    served.code(ECHO).ready("--access-log")
    answer = served.invoke(b"abc", "text/plain")
    line = served.job.wait_for_line(answer.headers["x-request-id"])
    import json

    entry = json.loads(line)
    assert entry["status"] == 200
    assert entry["requestBytes"] == entry["answerBytes"] == 3
    assert abs(entry["time"] - time.time()) < 60


def test_workers_share_the_cpus(served: Any) -> None:
    served.code("""
        import os
        def model_fn(model_dir):
            return 0
        def predict_fn(data, model):
            return [os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"], os.getpid()]
    """).ready(workers=4, env={"MKL_NUM_THREADS": "3"})
    omp, mkl, pid = served.invoke().json()
    assert (omp, mkl) == ("1", "3")
    assert pid in served.workers()
