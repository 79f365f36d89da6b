"""A script must not notice who started it: not by the boot shim, and not when it was forked from a preloaded process.

Everything that does not need two ranks is compared with a plain ``python script.py`` of the same file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

STARTS: dict[str, tuple[str, ...]] = {"shim": (), "preload": ("--preload", "json,decimal")}
needs_numpy = pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="not installed: numpy")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="not installed: torch")


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Options of the launcher: one test for each way in which a Python rank starts."""
    return STARTS[request.param]


def plain(job: Any, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The same without the launcher."""
    return subprocess.run(
        [sys.executable, "-u", *words],
        cwd=job.directory,
        env=job.environ(),
        capture_output=True,
        text=True,
        input=stdin,
        check=False,
    )


def own_stderr(job: Any) -> str:
    """The rank's part of standard error."""
    return "".join(line for line in job.stderr.splitlines(keepends=True) if not line.startswith("[launcher] "))


NAMESPACE = """
    'doc string'
    def names():
        import re, sys
        found = {name: re.sub(" at 0x[0-9a-f]+", "", repr(value)) for name, value in globals().items()}
        found["loader"] = sorted(str(item) for item in vars(__loader__).items()) if __loader__ else None
        found["modules"] = str(sys.modules["__main__"].__dict__ is globals())
        return found
    import json, sys
    x: int = 1
    print(json.dumps([names(), sys.argv, sys.path, str(sys.flags), sys.warnoptions]))
"""


@pytest.mark.parametrize(
    "words", [["probe.py", "a"], ["sub/probe.py"], ["-m", "probe", "b"], ["-m", "kit"], ["kit"]], ids=" ".join
)
def test_namespace(job: Any, start: tuple[str, ...], words: list[str]) -> None:
    for name in ("probe.py", "sub/probe.py", "kit/__main__.py"):
        job.script(NAMESPACE, name)
    expected = plain(job, *words)
    assert expected.returncode == 0, expected.stderr
    assert job.run(*start, *words) == 0, job.output()
    found, wanted = json.loads(job.stdout), json.loads(expected.stdout)
    assert found[0] == wanted[0]
    assert found[1:] == wanted[1:]


def test_link_to_a_script(job: Any, start: tuple[str, ...]) -> None:
    job.script(NAMESPACE, "real/probe.py")
    (job.directory / "link.py").symlink_to("real/probe.py")
    assert job.run(*start, "link.py") == 0, job.output()
    assert json.loads(job.stdout) == json.loads(plain(job, "link.py").stdout)


def test_archive(job: Any, start: tuple[str, ...]) -> None:
    with zipfile.ZipFile(job.directory / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", "import inner, sys; print(inner.WORD, sys.argv, __name__, sys.path[0])")
        archive.writestr("inner.py", "WORD = 'inner'")
    assert job.run(*start, "app.pyz", "x") == 0, job.output()
    assert job.stdout == plain(job, "app.pyz", "x").stdout


def test_source_encoding_and_future(job: Any, start: tuple[str, ...]) -> None:
    """A declared encoding is honoured, and no __future__ of the launcher's own leaks into the script."""
    source = "# -*- coding: latin-1 -*-\ndef f(x: undefined_name = 'é'): return x\nprint(ascii(f()))\n"
    (job.directory / "train.py").write_bytes(source.encode("latin-1"))
    assert job.run(*start, "train.py") == 1
    assert own_stderr(job) == plain(job, "train.py").stderr
    (job.directory / "train.py").write_bytes(b"\xef\xbb\xbf" + b"print(ascii('\xc3\xa9'))\n")
    assert job.run(*start, "train.py") == 0
    assert job.stdout == plain(job, "train.py").stdout == "'\\xe9'\n"


# Each ends in its own way; pieces are joined by newlines.
TRACEBACKS: dict[str, tuple[str, ...]] = {
    "simple": (
        "def f():",
        "    raise ValueError('text')",
        "f()",
    ),
    "chained": (
        "try:",
        "    1 / 0",
        "except ZeroDivisionError as error:",
        "    raise KeyError('k') from error",
    ),
    "context": (
        "try:",
        "    1 / 0",
        "except ZeroDivisionError:",
        "    undefined",
    ),
    "syntax": (
        "def f(:",
        "    pass",
    ),
    "indentation": (
        "if True:",
        "pass",
    ),
    "import": ("import no_such_module",),
    "inside an import": ("import broken",),
    "recursion": (
        "def f():",
        "    f()",
        "f()",
    ),
    "own class": (
        "class Own(Exception):",
        "    pass",
        "raise Own('a', 1)",
    ),
    "notes": (
        "e = ValueError('x')",
        "e.__notes__ = ['a note']",
        "raise e",
    ),
    "unicode": ("raise ValueError('ä → \\udcff')",),
    "exit text": (
        "import sys",
        "sys.exit('stopped: no data')",
    ),
    "exit number": (
        "import sys",
        "sys.exit(5)",
    ),
    "exit none": (
        "import sys",
        "sys.exit()",
    ),
    "exit zero": ("raise SystemExit(0)",),
    "exit tuple": ("raise SystemExit((1, 2))",),
    "exit true": ("raise SystemExit(True)",),
    "exit large": ("raise SystemExit(300)",),
    "exit minus": ("raise SystemExit(-1)",),
    "hook": (
        "import sys",
        "sys.excepthook = lambda *a: print('HOOK', a[0].__name__, a[2].tb_frame.f_code.co_filename[-8:], a[2].tb_next)",
        "1 / 0",
    ),
    "hook that fails": (
        "import sys",
        "sys.excepthook = lambda *a: undefined",
        "1 / 0",
    ),
    "atexit": (
        "import atexit",
        "atexit.register(print, 'at exit')",
        "raise ValueError('x')",
    ),
    "atexit that fails": (
        "import atexit",
        "atexit.register(lambda: 1 / 0)",
    ),
    "thread": (
        "import threading",
        "t = threading.Thread(target=lambda: 1 / 0, name='worker')",
        "t.start()",
        "t.join()",
        "print('end')",
    ),
    "thread outlives main": (
        "import threading, sys",
        "e = threading.Event()",
        "t = threading.Thread(target=lambda: (e.wait(), print('joined')))",
        "t.start()",
        "threading.Timer(0.01, e.set).start()",
        "sys.exit(3)",
    ),
    "unraisable": (
        "class A:",
        "    def __del__(self):",
        "        1 / 0",
        "a = A()",
        "del a",
    ),
    "warning": (
        "import warnings",
        "warnings.warn('careful')",
    ),
    "interrupt": ("raise KeyboardInterrupt",),
    "base exception": (
        "class B(BaseException):",
        "    pass",
        "raise B('x')",
    ),
    "cleanup order": (
        "class A:",
        "    def __del__(self):",
        "        print('deleted')",
        "a = A()",
        "print('end')",
    ),
    "traceback module": (
        "import traceback",
        "try:",
        "    1 / 0",
        "except Exception:",
        "    traceback.print_exc()",
    ),
    "own handler": (
        "import sys, traceback",
        "def main():",
        "    try:",
        "        1 / 0",
        "    except Exception:",
        "        traceback.print_exc()",
        "        sys.exit(9)",
        "main()",
    ),
}


@pytest.mark.parametrize("case", TRACEBACKS)
def test_end_of_a_script(job: Any, start: tuple[str, ...], case: str) -> None:
    """Exit code, standard output and standard error are those of a plain start, byte for byte.

    Left out are addresses of objects, and how often a recursion fits on a stack that has the shim's frames below it.
    """

    def same(text: str) -> str:
        return re.sub(r" at 0x[0-9a-f]+|(?<=repeated )\d+", "", text)

    job.script("\n".join(TRACEBACKS[case]))
    job.script("def f():\n    return 1 / 0\nf()", "broken.py")
    expected = plain(job, "train.py")
    code = expected.returncode if expected.returncode >= 0 else 128 - expected.returncode
    assert job.run(*start, "train.py") == code, job.output()
    assert same(own_stderr(job)) == same(expected.stderr)
    assert job.stdout == expected.stdout


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError"])
def test_what_is_left_open_is_written(job: Any, start: tuple[str, ...], end: str) -> None:
    """The interpreter's teardown deletes the script's own objects, and so flushes files that were never closed."""
    job.script(f"""
        import sys
        def unused():
            return file
        file = open("left-open", "w")
        file.write("text")
        {end}
    """)
    job.run(*start, "train.py")
    assert (job.directory / "left-open").read_text() == "text"


def test_classes_of_main_are_pickled(job: Any, start: tuple[str, ...]) -> None:
    job.script("""
        import copyreg, pickle, sys
        class Point:
            def __init__(self, x):
                self.x = x
            def __eq__(self, other):
                return type(self) is type(other) and self.x == other.x
        data = pickle.dumps(Point(3))
        assert b"__main__" in data
        assert pickle.loads(data) == Point(3)
        assert sys.modules["__main__"].Point is Point
        print("PICKLED")
    """)
    assert job.run(*start, "train.py") == 0, job.output()
    assert "PICKLED" in job.stdout


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("words", [["train.py"], ["-m", "kit.train"]], ids=" ".join)
def test_multiprocessing(job: Any, start: tuple[str, ...], method: str, words: list[str]) -> None:
    source = """
        import multiprocessing, os, sys

        class Item:
            def __init__(self, value):
                self.value = value

        def work(item):
            return Item(item.value * 2), os.environ["RANK"], __name__

        if __name__ == "__main__":
            context = multiprocessing.get_context(sys.argv[1])
            with context.Pool(2) as pool:
                results = pool.map(work, [Item(1), Item(2)])
            assert all(type(item) is Item for item, _, _ in results)
            print("RESULT", [item.value for item, _, _ in results], {rank for _, rank, _ in results}, flush=True)
            process = context.Process(target=sys.exit, args=(7,))
            process.start()
            process.join()
            print("CODE", process.exitcode, flush=True)
    """
    job.script(source)
    job.script(source, "kit/train.py")
    assert job.run(*start, *words, method) == 0, job.output()
    assert job.stdout.splitlines() == ["RESULT [2, 4] {'0'}", "CODE 7"]


def test_forked_child_does_not_speak_for_the_rank(job: Any, start: tuple[str, ...]) -> None:
    """A child's exception is the child's: no error file, no phase."""
    job.script("""
        import os
        pid = os.fork()
        if pid == 0:
            raise ValueError("of the child")
        print("STATUS", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)
    assert job.run(*start, "train.py") == 0, job.output()
    assert "STATUS 1" in job.stdout and "ValueError: of the child" in job.stderr
    assert not job.rank_file(0, "error.json").exists()


def test_standard_input(job: Any, start: tuple[str, ...]) -> None:
    job.script("import sys; print('READ', sys.stdin.read())")
    (job.directory / "input").write_text("some text")
    with (job.directory / "input").open() as file:
        assert job.run(*start, "train.py", stdin=file) == 0, job.output()
    assert job.stdout == "READ some text\n"


PLACE = """
    import ctypes, json, os, signal, subprocess, sys, threading
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    print("SEEN " + json.dumps({
        "rank": os.environ["RANK"],
        "native": libc.getenv(b"RANK").decode(),
        "child": subprocess.run(["sh", "-c", "echo $RANK"], capture_output=True, text=True).stdout.strip(),
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "pwd": os.environ.get("PWD"),
        "affinity": sorted(os.sched_getaffinity(0)),
        "session": os.getsid(0) == os.getpid(),
        "main": threading.current_thread() is threading.main_thread() and threading.active_count() == 1,
        "tasks": len(os.listdir("/proc/self/task")),
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{n}").split(":")[0] for n in (0, 1, 2)),
        "open": len(os.listdir("/proc/self/fd")),
        "signals": [str(signal.getsignal(n)) for n in range(1, 32)],
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "name": open("/proc/self/comm").read(),
        "oom": open("/proc/self/oom_score_adj").read(),
        "umask": os.umask(0),
    }), flush=True)
"""


def test_place_of_a_preloaded_rank(job: Any) -> None:
    """All that a rank is given by exec is what it has after fork, too."""
    job.script(PLACE)
    seen = {}
    for name, options in STARTS.items():
        assert job.run(*options, "-n", "2", "--log-prefix", "", "train.py", "x${local_rank}") == 0, job.output()
        found = [json.loads(line[5:]) for line in job.stdout.splitlines() if line.startswith("SEEN ")]
        seen[name] = sorted(found, key=lambda one: one["rank"])
    assert [one["rank"] for one in seen["preload"]] == ["0", "1"]
    for forked, started in zip(seen["preload"], seen["shim"], strict=True):
        assert forked == started
        assert forked["native"] == forked["child"] == forked["rank"]


@pytest.mark.parametrize("name", ["random", pytest.param("numpy", marks=needs_numpy)])
def test_random_numbers_differ_between_ranks(job: Any, name: str) -> None:
    job.script(f"""
        import random
        if {name!r} == "numpy":
            import numpy
            print(numpy.random.random(), numpy.random.default_rng().random())
        else:
            print(random.random(), random.Random().random())
    """)
    assert job.run("-n", "3", "--log-prefix", "", "--preload", name, "train.py") == 0, job.output()
    values = job.stdout.split()
    assert len(values) == len(set(values)) == 6


def test_modules_are_imported_once(job: Any) -> None:
    job.script("import os, sys; print('IMPORTED', os.getpid(), file=open('imports', 'a'))", "heavy.py")
    job.script("import heavy, os; print('RANK', os.environ['RANK'])")
    assert job.run("-n", "3", "--preload", "heavy", "train.py", env={"PYTHONPATH": str(job.directory)}) == 0, (
        job.output()
    )
    assert len((job.directory / "imports").read_text().splitlines()) == 1
    assert job.stdout.count("RANK") == 3


def test_path_of_the_script_is_not_that_of_the_preload(job: Any) -> None:
    job.script("print('SCRIPT'); import sys; print(sys.path[0])", "sub/train.py")
    assert job.run("--preload", "json", "sub/train.py") == 0
    assert f"{job.directory}/sub" in job.stdout


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("import sys; sys.exit(7)", 7, "exited with code 7"),
        ("import os; os._exit(9)", 9, "9"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 139, "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL"),
        ("raise ValueError('x')", 1, "ValueError: x"),
    ],
)
def test_failures_of_preloaded_ranks(job: Any, body: str, code: int, text: str) -> None:
    job.script(f"""
        import os, time
        if os.environ["RANK"] == "1":
            {body}
        time.sleep(600)
    """)
    assert job.run("-n", "2", *STARTS["preload"], "train.py") == code, job.output()
    assert job.failure.startswith("rank 1 on algo-1")
    assert text in job.failure


HOLD = """
    import os, time
    open(f"ready.{os.environ['RANK']}", "w").write(str(os.getpid()))
    time.sleep(600)
"""


def zygote(job: Any) -> int:
    """Its process: forked ranks keep the command line of the one that they were forked from, but are known."""
    ranks = {int(path.read_text()) for path in job.directory.glob("ready.*")}
    (found,) = (pid for pid, command in job.ranks().items() if " zygote " in command and pid not in ranks)
    return found


def test_preload_process_that_is_killed_is_named(job: Any) -> None:
    job.script("open('importing', 'w').write('1')\nimport time\ntime.sleep(600)\n", "to_preload.py")
    job.script(HOLD)
    job.start("-n", "2", "--preload", "to_preload", "train.py", env={"PYTHONPATH": str(job.directory)})
    job.wait_for_file("importing")
    os.kill(zygote(job), signal.SIGKILL)
    assert job.wait() == 137, job.output()
    assert job.failure.startswith("preload of to_preload failed (signal 9)")


def test_ranks_do_not_need_the_preload_process_any_more(job: Any) -> None:
    job.script(HOLD.replace("time.sleep(600)", "\n    while not os.path.exists('go'): time.sleep(0.01)"))
    job.start("-n", "2", *STARTS["preload"], "train.py")
    for rank in range(2):
        job.wait_for_file(f"ready.{rank}")
    os.kill(zygote(job), signal.SIGKILL)
    (job.directory / "go").touch()
    assert job.wait() == 0, job.output()


def test_stop_while_preloading(job: Any) -> None:
    """A module that never finishes its import keeps nobody waiting: neither a stop, nor the guardian's clean-up."""
    job.script("open('importing', 'w').write('1')\nimport time\ntime.sleep(600)\n", "to_preload.py")
    job.script("print('RAN')")
    env = {"PYTHONPATH": str(job.directory), **{f"LONG_{index}": "x" * 100_000 for index in range(4)}}
    job.start("-n", "4", "--preload", "to_preload", "train.py", env=env)
    job.wait_for_file("importing")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143, job.output()
    assert "RAN" not in job.stdout


def test_preload_after_a_restart(job: Any) -> None:
    """The second attempt is forked from a preload process again, also when the first one's has been killed."""
    job.script("""
        import os, signal, sys
        if os.environ["LAUNCHER_ATTEMPT"] == "0":
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    words = open(f"/proc/{pid}/cmdline").read().split("\\0")
                    mine = os.environ["JOB_UNDER_TEST"] in open(f"/proc/{pid}/environ").read()
                except OSError:
                    continue
                if mine and "zygote" in words and int(pid) != os.getpid():
                    os.kill(int(pid), signal.SIGKILL)
            sys.exit(9)
        print("AGAIN", "decimal" in sys.modules)
    """)
    assert job.run("-n", "1", "--preload", "json,decimal", "--max-restarts", "1", "train.py") == 0, job.output()
    assert "AGAIN True" in job.stdout


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (None, "ModuleNotFoundError: No module named 'to_preload'"),
        ("raise ValueError('while importing')", "ValueError: while importing"),
        ("import os; os._exit(3)", "failed (exit 3)"),
        ("import sys; sys.exit('not here')", "not here"),
    ],
)
def test_preload_that_fails(job: Any, source: str | None, text: str) -> None:
    if source is not None:
        job.script(source, "to_preload.py")
    job.script("print('RAN')")
    env = {"PYTHONPATH": str(job.directory)}
    assert job.run("-n", "2", "--preload", "json,to_preload", "train.py", env=env) != 0, job.output()
    assert text in job.failure
    assert "preload" in job.failure.splitlines()[0]
    assert "RAN" not in job.stdout


def test_restart_with_preload(job: Any) -> None:
    job.script("""
        import os, sys
        print("ATTEMPT", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
        sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
    """)
    assert job.run("-n", "2", "--max-restarts", "2", *STARTS["preload"], "train.py") == 0, job.output()
    assert job.stdout.count("ATTEMPT 1") == 2 and "ATTEMPT 2" not in job.stdout


def test_nothing_outlives_a_killed_launcher(job: Any, start: tuple[str, ...], wait_until: Callable[..., Any]) -> None:
    job.script(HOLD)
    job.start("-n", "2", *start, "train.py")
    for rank in range(2):
        job.wait_for_file(f"ready.{rank}")
    assert job.process is not None
    job.process.kill()
    assert job.wait() == -signal.SIGKILL
    wait_until(lambda: not job.ranks(), "no rank left")


def test_stop_reaches_preloaded_ranks(job: Any) -> None:
    job.script("""
        import os, signal, sys, time
        def stop(*_):
            print("STOPPED", os.environ["RANK"], flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        open(f"ready.{os.environ['RANK']}", "w").write("1")
        time.sleep(600)
    """)
    job.start("-n", "2", *STARTS["preload"], "train.py")
    for rank in range(2):
        job.wait_for_file(f"ready.{rank}")
    assert job.process is not None
    job.process.terminate()
    assert job.wait() == 0, job.output()
    assert "STOPPED 0" in job.stdout and "STOPPED 1" in job.stdout


def test_preload_does_not_matter_to_other_programs(job: Any) -> None:
    job.script("echo SH $RANK", "train.sh")
    assert job.run("-n", "2", *STARTS["preload"], "train.sh") == 0, job.output()
    assert sorted(re.findall(r"SH (\d)", job.stdout)) == ["0", "1"]


def test_preload_of_a_module_run(job: Any) -> None:
    job.script("import sys; print('MODULE', __name__, sys.argv[1:])", "tool.py")
    assert job.run(*STARTS["preload"], "-m", "tool", "x") == 0, job.output()
    assert "MODULE __main__ ['x']" in job.stdout


def test_threads_of_an_import_are_said(job: Any) -> None:
    job.script(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()", "busy.py"
    )
    job.script("import busy; print('RAN')")
    assert job.run("--preload", "busy", "train.py", env={"PYTHONPATH": str(job.directory)}) == 0, job.output()
    assert "thread(s) were started by an import" in job.stderr
    assert "RAN" in job.stdout


@pytest.mark.torch
@pytest.mark.slow
@needs_torch
def test_torch_loader_and_ddp(job: Any) -> None:
    """Loader workers, and gradients that are averaged, in ranks forked from a process that has imported torch."""
    job.script("""
        import os
        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data import DataLoader, Dataset, DistributedSampler

        class Numbers(Dataset):
            def __len__(self):
                return 16
            def __getitem__(self, index):
                return torch.tensor([float(index)]), torch.tensor([2.0 * index])

        if __name__ == "__main__":
            dist.init_process_group("gloo")
            torch.manual_seed(0)
            model = DistributedDataParallel(torch.nn.Linear(1, 1))
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            data = Numbers()
            loader = DataLoader(data, batch_size=4, num_workers=2, sampler=DistributedSampler(data, shuffle=False))
            seen = []
            for inputs, targets in loader:
                seen += inputs.flatten().tolist()
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(inputs), targets).backward()
                optimizer.step()
            weights = [None, None]
            dist.all_gather_object(weights, model.module.weight.item())
            threads = str(torch.get_num_threads())
            print("DONE", len(seen), weights[0] == weights[1], threads == os.environ["OMP_NUM_THREADS"])
            dist.destroy_process_group()
    """)
    assert job.run("-n", "2", "--preload", "torch", "train.py", deadline_s=100) == 0, job.output()
    assert job.stdout.count("DONE 8 True True") == 2
