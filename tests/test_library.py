"""`launcher.launch` and `launcher.init` from a script, as their users call them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_cloudpickle = pytest.mark.skipif(
    importlib.util.find_spec("cloudpickle") is None, reason="not installed: cloudpickle"
)


def python(job: Any, text: str, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script that uses the library, in the test's directory."""
    job.script(text, "user.py")
    return subprocess.run(
        [sys.executable, "user.py", *words],
        cwd=job.directory,
        env=job.environ(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def seen(done: subprocess.CompletedProcess[str]) -> Any:
    """What the script printed as JSON after SEEN."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert len(lines) == 1 and done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(lines[0][5:])


FUNCTION = """
    import json, os, sys
    import launcher
    from launcher import JobFailed

    def work(*args):
        import os
        return os.getpid(), int(os.environ["RANK"]), args

    def fail(rank):
        if int(os.environ["RANK"]) == rank:
            raise ValueError("of the function")
        import time
        time.sleep(600)

    def show(value):
        print("SEEN " + json.dumps(value), flush=True)

    if __name__ == "__main__":
"""


def in_main(body: str) -> str:
    return FUNCTION + "\n".join("        " + line for line in body.strip().splitlines()) + "\n"


# ---- launch


def test_script(job: Any) -> None:
    job.script("import os, sys; print('RANK', os.environ['RANK'], sys.argv[1:], os.environ['EXTRA'])")
    done = python(
        job,
        in_main("""
result = launcher.launch("train.py", ["a", 1], nproc=2, env={"EXTRA": "e"}, job_dir="job")
assert "EXTRA" not in os.environ
logs = [open(rank.stdout_log).read() for rank in result.ranks]
show([result.exit_codes, result.verdict.ok, result.values, logs, result.base_dir, result.verdict.exit_code])
"""),
    )
    assert seen(done) == [
        {"0": 0, "1": 0},
        True,
        [None, None],
        ["RANK 0 ['a', '1'] e\n", "RANK 1 ['a', '1'] e\n"],
        str(job.directory / "job"),
        0,
    ]


def test_function_of_the_script(job: Any) -> None:
    done = python(job, in_main("show([os.getpid(), launcher.launch(work, (1, 'b', {'c': [2]}), nproc=3).values])"))
    own, values = seen(done)
    assert [value[1:] for value in values] == [[rank, [1, "b", {"c": [2]}]] for rank in range(3)]
    assert len({own, *(value[0] for value in values)}) == 4


def test_function_of_a_module(job: Any) -> None:
    job.script("import os\nSTATE = []\ndef work(x):\n    return x * 10 + int(os.environ['RANK'])", "tools.py")
    done = python(
        job, "import json, launcher, tools\nprint('SEEN', json.dumps(launcher.launch(tools.work, [4], nproc=2).values))"
    )
    assert seen(done) == [40, 41]


def test_classes_of_the_script_come_back(job: Any) -> None:
    done = python(
        job,
        """
        import launcher

        class Item:
            def __init__(self, value):
                self.value = value

        def work(item):
            return Item(item.value + 1)

        if __name__ == "__main__":
            values = launcher.launch(work, [Item(1)], nproc=2).values
            assert [type(value) for value in values] == [Item, Item]
            print("SEEN", [value.value for value in values])
        """,
    )
    assert seen(done) == [2, 2]


@needs_cloudpickle
def test_closure_with_cloudpickle(job: Any) -> None:
    done = python(job, in_main("n = 5\nshow(launcher.launch(lambda x: x + n, [1], nproc=2).values)"))
    assert seen(done) == [6, 6]


@pytest.mark.parametrize("target", ["lambda: 1", "local()"])
def test_closure_without_cloudpickle(job: Any, target: str) -> None:
    done = python(
        job,
        in_main(f"""
sys.modules["cloudpickle"] = None
def local():
    def inner():
        return 1
    return inner
try:
    launcher.launch({target}, nproc=1)
except TypeError as error:
    show(str(error))
"""),
    )
    assert "cloudpickle" in seen(done) and "top level of a module" in seen(done)
    assert not (job.directory / "launcher_runs").exists()


def test_failure_of_a_function(job: Any) -> None:
    done = python(
        job,
        in_main("""
try:
    launcher.launch(fail, (1,), nproc=2)
except JobFailed as error:
    verdict = error.verdict
    show([str(error), error.exit_code, verdict.kind, verdict.culprit.rank, list(verdict.victims), len(verdict.records)])
"""),
    )
    text, *rest = seen(done)
    assert text == "rank 1 on algo-1 failed: ValueError: of the function (exit code 1)"
    assert rest == [1, "rank", 1, [0], 2]
    assert "user.py" in done.stderr  # where it was raised


def test_failure_of_a_script_keeps_its_code(job: Any) -> None:
    job.script("import sys; sys.exit(7)")
    done = python(
        job,
        in_main("try:\n    launcher.launch('train.py')\nexcept launcher.LauncherError as e:\n    show(e.exit_code)"),
    )
    assert seen(done) == 7


def test_value_that_cannot_be_returned(job: Any) -> None:
    done = python(
        job,
        """
        import launcher, threading
        def work():
            return threading.Lock()
        if __name__ == "__main__":
            try:
                launcher.launch(work)
            except launcher.JobFailed as error:
                print("SEEN", '"' + str(error).replace('"', "'") + '"')
        """,
    )
    assert "cannot pickle" in seen(done)


def test_restart_of_a_function_returns_the_last_attempt(job: Any) -> None:
    done = python(
        job,
        """
        import launcher, os
        def work():
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                raise ValueError("first attempt")
            return int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if __name__ == "__main__":
            result = launcher.launch(work, nproc=2, max_restarts=1)
            assert all("attempt_1" in rank.stdout_log for rank in result.ranks)
            print("SEEN", result.values)
        """,
    )
    assert seen(done) == [1, 1]


def test_function_that_leaves_early(job: Any) -> None:
    """With early_exit=ok a rank may leave without a value: it has none."""
    done = python(
        job,
        """
        import launcher, os
        def work():
            if os.environ["RANK"] == "1":
                os._exit(0)
            return 5
        if __name__ == "__main__":
            print("SEEN", [value or 0 for value in launcher.launch(work, nproc=2, early_exit="ok").values])
        """,
    )
    assert seen(done) == [5, 0]


@pytest.mark.parametrize(
    ("call", "texts"),
    [
        ("launch('train.py', max_restart=1)", ["max_restart", "did you mean max_restarts?"]),
        ("launch('train.py', max_restarts='many')", ["max_restarts is 'many'", "a whole number"]),
        ("launch('train.py', nproc=0)", ["nproc_per_node", "'0'"]),
        ("launch('missing.py')", ["no such script: missing.py"]),
        ("launch('train.py', early_exit='no')", ["wait, abort, ok"]),
        ("launch('train.py', base_dir='nowhere')", ["nowhere", "resourceconfig.json"]),
    ],
)
def test_bad_calls(job: Any, call: str, texts: list[str]) -> None:
    job.script("print('RAN')")
    done = python(
        job, in_main(f"try:\n    launcher.{call}\nexcept launcher.LauncherError as error:\n    show(str(error))")
    )
    for text in texts:
        assert text in seen(done)
    assert "RAN" not in done.stdout


def test_settings_are_those_of_the_command_line(job: Any) -> None:
    job.script(
        "import os; print(os.environ['TORCHELASTIC_MAX_RESTARTS'], os.environ['SM_CHANNEL_A'], os.environ['ROLE_NAME'])"
    )
    (job.directory / "data").mkdir()
    done = python(
        job,
        in_main("""
result = launcher.launch("train.py", max_restarts=3, channel={"a": "data"}, role="r", job_dir="job", grace=2.5)
show(open(result.ranks[0].stdout_log).read())
"""),
    )
    assert seen(done) == f"3 {job.directory}/job/input/data/a r\n"


def test_from_another_thread(job: Any) -> None:
    done = python(
        job,
        in_main("""
import threading
values = []
def run():
    values.extend(value[1] for value in launcher.launch(work, nproc=2).values)
thread = threading.Thread(target=run)
thread.start()
thread.join()
show(values)
"""),
    )
    assert seen(done) == [0, 1]


def test_caller_is_left_as_it_was(job: Any) -> None:
    """Environment, directory, descriptors, signal handlers, children: also after a failure, and when done often."""
    job.script("")
    job.script("raise ValueError", "bad.py")
    temporary = job.directory / "tmp"
    temporary.mkdir()
    done = python(
        job,
        in_main("""
import signal
def state():
    names = [name for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)]
    fds = sorted((name, os.readlink("/proc/self/fd/" + name)) for name in names)
    with open("/proc/self/task/" + str(os.getpid()) + "/children") as file:
        children = file.read()
    handlers = [str(signal.getsignal(number)) for number in range(1, 32)]
    wakeup = signal.set_wakeup_fd(-1)
    return [dict(os.environ), os.getcwd(), [list(fd) for fd in fds], handlers, wakeup, children, sys.path]
launcher.launch("train.py", job_dir="job")
before = state()
for _ in range(3):
    launcher.launch("train.py", nproc=2, env={"A": "b"}, job_dir="job")
    launcher.launch(work, job_dir="job")
    try:
        launcher.launch("bad.py", job_dir="job")
    except JobFailed:
        pass
    try:
        launcher.launch("missing.py", job_dir="job")
    except launcher.LauncherError:
        pass
after = state()
show([before, after])
"""),
        env={"TMPDIR": str(temporary)},
    )
    before, after = seen(done)
    assert after == before
    assert not list(temporary.glob("launcher-call-*"))


def test_subreaper_is_reset(job: Any) -> None:
    """The caller's later orphans must not fall to it: it does not know that it would have to reap them."""
    job.script("")
    done = python(
        job,
        in_main("""
import ctypes
libc = ctypes.CDLL(None)
def flag():
    value = ctypes.c_int(-1)
    assert libc.prctl(37, ctypes.byref(value), 0, 0, 0) == 0
    return value.value
before = flag()
launcher.launch("train.py", job_dir="job")
show([before, flag()])
"""),
    )
    before, after = seen(done)
    assert after == before == 0


def test_children_of_the_caller_are_its_own(job: Any) -> None:
    """A child that ends while the job runs is still the caller's to wait for."""
    job.script("")
    done = python(
        job,
        in_main("""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"])
os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
launcher.launch("train.py", job_dir="job")
show(child.wait())
"""),
    )
    assert seen(done) == 5


def test_launch_within_a_rank(job: Any) -> None:
    """A rank of one job may start another one; nothing of the outer one leaks into it."""
    job.script(
        "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['LAUNCHER_RUN_DIR'])", "inner.py"
    )
    job.script("""
        import launcher, os
        if os.environ["RANK"] == "1":
            result = launcher.launch("inner.py", nproc=1, job_dir="inner-job")
            text = open(result.ranks[0].stdout_log).read()
            assert text.startswith("0 1 ") and "inner-job" in text, text
            print("NESTED")
    """)
    assert job.run("-n", "2", "train.py") == 0, job.output()
    assert "NESTED" in job.stdout


# ---- import and init


def test_import_is_cheap(job: Any) -> None:
    done = python(
        job,
        """
        import sys
        before = set(sys.modules)
        import launcher
        added = {name.split(".")[0] for name in set(sys.modules) - before}
        print("SEEN", len(added & {"torch", "numpy", "yaml", "json", "asyncio", "subprocess", "psutil"}))
        """,
    )
    assert seen(done) == 0


def test_init_of_a_rank_is_cheap(job: Any) -> None:
    job.script("import launcher, sys; launcher.init(); print('LARGE', {'torch', 'numpy', 'yaml'} & set(sys.modules))")
    assert job.run("train.py") == 0, job.output()
    assert "LARGE set()" in job.stdout


def test_init_without_the_launcher(job: Any) -> None:
    done = python(
        job,
        """
        import json, launcher
        context = launcher.init()
        names = ("rank", "world_size", "local_rank", "local_world_size", "host_rank", "attempt", "host", "hosts",
                 "channels", "hyperparameters", "device", "stop_requested", "stop_deadline", "stop_seconds_left")
        steps = [context.step(), context.step(samples=8)]
        print("SEEN", json.dumps([[getattr(context, name) for name in names], steps, repr(context)]))
        """,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    values, steps, text = seen(done)
    assert values == [0, 1, 0, 1, 0, 0, "localhost", ["localhost"], {}, {}, "cpu", False, None, None]
    assert steps == [1, 2]
    assert text == "Context(rank=0/1, local_rank=0, host='localhost')"
    assert done.stderr == ""
    assert not (job.directory / "model").exists()  # made when it is asked for


CONTEXT = """
    import json, launcher
    context = launcher.init()
    names = ("rank", "world_size", "local_rank", "local_world_size", "host_rank", "attempt", "host", "hosts",
             "channels", "hyperparameters", "model_dir", "output_data_dir", "checkpoint_dir", "device",
             "stop_requested")
    context.step()
    print("SEEN " + json.dumps({name: getattr(context, name) for name in names}))
"""


def test_init_in_a_job(job: Any) -> None:
    job.tree({"rate": 0.5, "batch-size": 8}, channels={"training": {}, "test-set": {}})
    job.script(CONTEXT)
    assert job.run("-n", "2", "--log-prefix", "", "train.py", env={"CUDA_VISIBLE_DEVICES": ""}) == 0, job.output()
    found = sorted((json.loads(line[5:]) for line in job.stdout.splitlines()), key=lambda one: one["rank"])
    base = str(job.base)
    for rank in range(2):
        assert found[rank] == {
            "rank": rank,
            "world_size": 2,
            "local_rank": rank,
            "local_world_size": 2,
            "host_rank": 0,
            "attempt": 0,
            "host": "algo-1",
            "hosts": ["algo-1"],
            "channels": {"training": f"{base}/input/data/training", "test-set": f"{base}/input/data/test-set"},
            "hyperparameters": {"rate": 0.5, "batch-size": 8},
            "model_dir": f"{base}/model",
            "output_data_dir": f"{base}/output/data",
            "checkpoint_dir": f"{base}/checkpoints",
            "device": "cpu",
            "stop_requested": False,
        }


def test_devices_are_dealt_out(job: Any) -> None:
    job.script("import launcher; print(launcher.init().device)")
    for options, expected in (([], ["cuda:0", "cuda:1"]), (["--virtual-local-rank"], ["cuda:0", "cuda:0"])):
        words = ("-n", "2", "--log-prefix", "", *options, "train.py")
        assert job.run(*words, env={"CUDA_VISIBLE_DEVICES": "2,5"}) == 0, job.output()
        assert sorted(job.stdout.split()) == expected


def test_steps_reach_the_verdict(job: Any) -> None:
    job.script("""
        import launcher
        context = launcher.init()
        for _ in range(5):
            context.step(samples=2)
        raise ValueError("at step five")
    """)
    assert job.run("train.py") == 1
    assert job.failure_json["detail"]["culprit"]["steps"] == 5


def test_stop_is_told_with_its_deadline(job: Any) -> None:
    job.script("""
        import launcher, os, time
        context = launcher.init()
        assert not context.stop_requested
        open("ready", "w").write("1")
        while not context.stop_requested:
            time.sleep(0.005)
        while context.stop_deadline is None:
            time.sleep(0.005)
        print("LEFT", 0 < context.stop_seconds_left <= 60, context.stop_deadline > time.monotonic())
    """)
    job.start("--grace", "60", "train.py")
    job.wait_for_file("ready")
    assert job.process is not None
    job.process.terminate()
    assert job.wait() == 0, job.output()
    assert "LEFT True True" in job.stdout


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("SM_HPS", "{"), ("WORLD_SIZE", "1.5")])
def test_init_in_a_broken_environment(job: Any, name: str, value: str) -> None:
    done = python(
        job,
        """
        import json, launcher
        try:
            launcher.init()
        except launcher.LauncherError as error:
            print("SEEN", json.dumps(str(error)))
        """,
        env={name: value},
    )
    assert name in seen(done)


def test_outputs_of_a_test_stay_in_its_directory(job: Any) -> None:
    """Without a directory given, the job tree is made below the working directory, and named in the result."""
    if os.path.exists("/opt/ml/input/config"):
        pytest.skip("this machine has a job tree")
    done = python(job, in_main("show(launcher.launch(work).base_dir)"))
    assert Path(seen(done)).parent == job.directory / "launcher_runs"
