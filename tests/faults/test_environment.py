"""Fault table, rows 33 and 39-42: taken ports, process 1, odd parents, tight limits, and a wall clock that jumps."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent / "helpers"

WAIT = """
    import os, time
    from pathlib import Path
    Path("up" + os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)
"""


def _compile(source: str, directory: Path, *options: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc)")
    built = directory / source.removesuffix(".c")
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", *options, "-o", built, HELPERS / source], check=True)
    return built


def _state(pid: int) -> tuple[str, int]:
    """State letter and parent of a process; ("", 0) when there is none."""
    with contextlib.suppress(OSError):
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        return state, int(parent)
    return "", 0


def _zombies_of(parents: set[int]) -> list[int]:
    states = ((int(entry.name), *_state(int(entry.name))) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid, state, parent in states if state == "Z" and parent in parents]


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _handles_sigterm(pid: int) -> bool:
    with contextlib.suppress(OSError):
        caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
        return bool(caught) and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


# ---- row 33

LISTEN = """
    import os, socket, time
    from pathlib import Path
    rank, port = os.environ["RANK"], int(os.environ["MASTER_PORT"])
    if rank == "0":
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((os.environ["MASTER_ADDR"], port))
            server.listen()
            Path("listening").write_text(str(port))
            connection, _ = server.accept()
            connection.sendall(b"welcome")
            connection.close()
            while not os.path.exists("go"):
                time.sleep(0.01)
    else:
        while not os.path.exists("listening"):
            time.sleep(0.01)
        with socket.create_connection((os.environ["MASTER_ADDR"], port)) as client:
            assert client.recv(100) == b"welcome"
"""


@pytest.mark.parametrize(("family", "address"), [("INET", "127.0.0.1"), ("INET", "0.0.0.0"), ("INET6", "::")])
def test_taken_master_port_is_replaced(job, family, address):
    """Row 33: somebody listens on MASTER_PORT: all ranks get another one, and a line says so."""
    try:
        taken = socket.create_server(
            (address, 0), family=getattr(socket, "AF_" + family), dualstack_ipv6=family == "INET6"
        )
    except (OSError, ValueError) as error:
        pytest.skip(f"cannot listen on {address}: {error}")
    with taken:
        port = taken.getsockname()[1]
        job.script(LISTEN)
        job.start("-n", "2", "--master-port", str(port), "train.py")
        used = int(job.wait_for_file("listening").read_text())
        (job.directory / "go").write_text("go")
        assert job.wait() == 0, job.output()
    assert used != port
    assert f"MASTER_PORT {port} cannot be had (Address already in use); using {used}" in job.stderr


def test_free_master_port_is_used(job):
    """Row 33: a port that can be had is the one that is used, without a word."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    job.script(LISTEN)
    (job.directory / "go").write_text("go")
    assert job.run("-n", "2", "--master-port", str(port), "train.py") == 0, job.output()
    assert (job.directory / "listening").read_text() == str(port)
    assert "MASTER_PORT" not in job.stderr


def test_impossible_master_port_is_a_usage_error(job):
    """Row 33: a number that no port can have is refused before anything is started."""
    job.script("print('not reached')")
    assert job.run("-n", "2", "--master-port", "99999", "train.py") == 64, job.output()
    assert "master_port" in job.stderr.replace("-", "_")
    assert "Traceback" not in job.stderr
    assert "not reached" not in job.stdout


def test_two_jobs_at_once_can_both_listen(make_job):
    """Row 33: two jobs on one host do not get in each other's way."""
    jobs = [make_job("a"), make_job("b")]
    for one in jobs:
        one.script(LISTEN)
        one.start("-n", "2", "train.py")
    ports = {one.wait_for_file("listening").read_text() for one in jobs}
    assert len(ports) == 2
    for one in jobs:
        (one.directory / "go").write_text("go")
    for one in jobs:
        assert one.wait() == 0, one.output()


def test_two_jobs_that_ask_for_the_same_port(make_job, wait_until):
    """Row 33: the second job takes another port although rank 0 of the first does not listen yet."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    first, second = make_job("a"), make_job("b")
    patience = """
    import os, time
    open("up" + os.environ["RANK"], "w").write("up")
    while not os.path.exists("listen"):
        time.sleep(0.01)
"""
    for one in (first, second):
        one.script(patience + LISTEN)
        one.start("-n", "2", "--master-port", port, "train.py")
        one.wait_for_file("up0")
    for one in (first, second):
        (one.directory / "listen").write_text("now")
        wait_until(lambda one=one: (one.directory / "listening").exists() or one.process.poll() is not None, "rank 0")
    for one in (first, second):
        (one.directory / "go").write_text("go")
        assert one.wait() == 0, one.output()
    assert (first.directory / "listening").read_text() == port
    assert (second.directory / "listening").read_text() != port
    assert f"MASTER_PORT {port} cannot be had" in second.stderr


@pytest.mark.torch
@pytest.mark.slow
def test_two_jobs_at_once_with_stores_of_torch(make_job):
    """Row 33: the same with torch's own store, which rank 0 of each job hosts."""
    pytest.importorskip("torch")
    jobs = [make_job("a"), make_job("b")]
    for one in jobs:
        one.script("""
            import os, time
            import torch.distributed as dist
            rank = int(os.environ["RANK"])
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, rank == 0)
            store.set(f"rank{rank}", os.path.basename(os.getcwd()))
            assert store.get(f"rank{1 - rank}").decode() == os.path.basename(os.getcwd())
            open(f"met{rank}", "w").write("met")
            while not (os.path.exists("../a/met1") and os.path.exists("../b/met1")
                       and os.path.exists("../a/met0") and os.path.exists("../b/met0")):
                time.sleep(0.01)
        """)
        one.start("-n", "2", "train.py")
    for one in jobs:
        assert one.wait(60) == 0, one.output()


# ---- row 39

AS_PID_1 = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@contextlib.contextmanager
def _as_pid_1(job, wait_until, *args: str) -> Iterator[int]:
    """Starts a job whose launcher is process 1 of a namespace; yields its pid as seen from here."""
    job.start(*args, wrapper=AS_PID_1)
    pid = wait_until(lambda: next(iter(_children(job.process.pid)), 0), "the launcher's process")
    try:
        yield pid
    finally:
        if job.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.root
def test_process_1_reaps_orphans(job, as_root, wait_until):
    """Row 39: 1000 orphans of a rank and 100 of a process from outside leave no zombie while the job runs; SIGTERM
    to process 1 ends the job."""
    if shutil.which("nsenter") is None:
        pytest.skip("needs nsenter")
    job.script("""
        import os, time
        from pathlib import Path
        if os.environ["RANK"] == "0":
            for number in range(1000):
                pid = os.fork()
                if pid == 0:
                    if os.fork() == 0:
                        time.sleep(0.001)
                    os._exit(0)
                os.waitpid(pid, 0)
        assert os.getpid() > 1
        Path("up" + os.environ["RANK"]).write_text("up")
        time.sleep(600)
    """)
    with _as_pid_1(job, wait_until, "-n", "2", "--grace", "600", "train.py") as launcher:
        for rank in (0, 1):
            job.wait_for_file(f"up{rank}")
        orphans = "i=0; while [ $i -lt 100 ]; do (sleep 0.01 &) ; i=$((i+1)); done"
        inside = ["nsenter", "--target", str(launcher), "--pid", "--mount"]
        assert subprocess.run([*inside, "sh", "-c", orphans], timeout=30).returncode == 0
        parents = {launcher, *_children(launcher)}
        assert len(parents) > 1

        def only_the_job() -> bool:
            return not _zombies_of(parents) and len(_children(launcher)) == 1

        wait_until(only_the_job, "no zombie and no orphan")
        os.kill(launcher, signal.SIGTERM)
        assert job.wait() == 143, job.output()
    assert job.failure.startswith("stopped by SIGTERM")


@pytest.mark.root
@pytest.mark.parametrize("code", [0, 3])
def test_process_1_ends_with_the_jobs_code(job, as_root, wait_until, code):
    """Row 39: process 1 ends as any launcher does."""
    job.script(f"import sys; sys.exit({code})")
    with _as_pid_1(job, wait_until, "-n", "2", "train.py"):
        assert job.wait() == code, job.output()


@pytest.mark.root
def test_process_1_tells_when_its_guardian_was_killed(job, as_root, wait_until):
    """Row 39: reaping everybody's orphans, process 1 still learns how its own guardian ended."""
    job.script(WAIT)
    with _as_pid_1(job, wait_until, "-n", "2", "train.py") as launcher:
        for rank in (0, 1):
            job.wait_for_file(f"up{rank}")
        os.kill(_children(launcher)[0], signal.SIGKILL)
        assert job.wait() == 70, job.output()
    assert "signal 9" in job.failure


# ---- row 40


def test_shell_that_ignores_sigterm(job, alive, wait_until):
    """Row 40: SIGTERM ignored at exec: the launcher handles it all the same, ranks have it back at its default, and
    orphans are collected by the launcher's side, not by the shell's."""
    job.script("""
        import os, signal, time
        from pathlib import Path
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        middle = os.fork()
        if middle == 0:
            if os.fork() == 0:
                Path("orphan" + os.environ["RANK"]).write_text(str(os.getpid()))
                time.sleep(600)
            os._exit(0)
        os.waitpid(middle, 0)
        Path("up" + os.environ["RANK"]).write_text(str(os.getpid()))
        time.sleep(600)
    """)
    shell = ("sh", "-c", "trap '' TERM; \"$@\" & echo $! > pid; wait $!; exit $?", "sh")
    job.start("-n", "2", "--grace", "600", "train.py", wrapper=shell)
    launcher = int(job.wait_for_file("pid").read_text())
    orphans = [int(job.wait_for_file(f"orphan{rank}").read_text()) for rank in (0, 1)]
    for rank in (0, 1):
        job.wait_for_file(f"up{rank}")
    ours = {launcher, *_children(launcher)}
    assert all(_state(orphan)[1] in ours for orphan in orphans)
    wait_until(lambda: _handles_sigterm(launcher), "a handler of SIGTERM")
    os.kill(launcher, signal.SIGTERM)
    assert job.wait() == 143, job.output()
    assert not [pid for pid in orphans if alive(pid)]
    assert job.failure.startswith("stopped by SIGTERM")


def test_job_follows_its_parent(job, alive, wait_until):
    """Row 40: with --follow-parent on, the end of the process that started the launcher ends the job."""
    job.script(WAIT)
    shell = ("sh", "-c", '"$@" & echo $! > pid; wait', "sh")
    job.start("-n", "2", "--follow-parent", "on", "train.py", wrapper=shell)
    launcher = int(job.wait_for_file("pid").read_text())
    ranks = [int(job.wait_for_file(f"up{rank}").read_text()) for rank in (0, 1)]
    wait_until(lambda: _handles_sigterm(launcher) and _state(launcher)[0] == "S", "a launcher that waits")
    job.process.kill()
    wait_until(lambda: not [pid for pid in (launcher, *ranks) if alive(pid)], "the end of the job")
    job.process.wait()
    assert job.failure.startswith("stopped by SIGTERM")


# ---- row 41


def test_few_descriptors_are_enough(job):
    """Row 41: 4 ranks under ulimit -n 256."""
    job.script("import os; print('rank', os.environ['RANK'])")
    few = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    assert job.run("-n", "4", "train.py", wrapper=few) == 0, job.output()
    assert len(job.stdout.splitlines()) == 4


@pytest.mark.parametrize("limit", [8, 10, 12, 16, 24, 32])
def test_too_few_descriptors(job, limit):
    """Row 41: with too few descriptors for the ranks the job ends, says which limit it was, and leaves nothing."""
    job.script("import time; time.sleep(600)")
    few = ("sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh")
    assert job.run("-n", "12", "train.py", wrapper=few) not in (0, -signal.SIGABRT, -signal.SIGSEGV), job.output()
    assert "open files" in job.stderr
    assert not [line for line in job.stderr.splitlines() if line.startswith(("Traceback", "terminate called"))]


@pytest.mark.root
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6, 7, 9, 12])
def test_too_few_processes(job, as_root, limit):
    """Row 41: wherever the limit of processes strikes, the job ends with a line that names it, and leaves nothing."""
    if not (shutil.which("setpriv") and shutil.which("prlimit")):
        pytest.skip("needs setpriv and prlimit")
    # The limit does not hold for root. The other user may read and write everything, so that it finds its interpreter.
    capabilities = "-all,+dac_read_search,+dac_override"
    user = ("--reuid", "54321", "--regid", "54321", "--clear-groups")
    other = ("setpriv", *user, f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}")
    job.script("import time; time.sleep(600)")
    code = job.run("-n", "6", "train.py", wrapper=(*other, "prlimit", f"--nproc={limit}"))
    assert code not in (0, -signal.SIGABRT, -signal.SIGSEGV), job.output()
    assert not [line for line in job.stderr.splitlines() if line.startswith(("Traceback", "terminate called"))]
    assert re.search("limit of processes|Resource temporarily unavailable", job.stderr), job.stderr
    assert "reinstall" not in job.stderr


@pytest.mark.root
def test_without_shared_memory_and_with_proc_sys_read_only(job, as_root):
    """Row 41: no /dev/shm, /proc/sys not writable: nothing of ours needs them, on success and on failure."""
    job.script("""
        import os, signal, time
        assert not os.path.exists("/dev/shm")
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGBUS)
        time.sleep(600)
    """)
    bare = job.directory / "dev"
    bare.mkdir()
    devices = " ".join(("null", "zero", "random", "urandom"))
    mounts = (
        f"mount -t tmpfs tmpfs '{bare}'",
        f"for name in {devices}; do touch '{bare}'/$name; mount --bind /dev/$name '{bare}'/$name; done",
        f"mount --rbind '{bare}' /dev",
        "mount --bind /proc/sys /proc/sys",
        "mount -o remount,bind,ro /proc/sys",
        'exec "$@"',
    )
    wrapper = ("unshare", "--mount", "sh", "-ec", "; ".join(mounts), "sh")
    assert job.run("-n", "2", "train.py", wrapper=wrapper) == 128 + signal.SIGBUS, job.output()
    assert "SIGBUS" in job.failure
    assert "Traceback" not in job.stderr


def test_sandbox_without_pidfd(job, wait_until):
    """Row 41: pidfd_open is refused: said once, and ends, stops and sweeps work as ever."""
    sandbox = _compile("without_pidfd.c", job.directory)
    job.script("""
        import os, signal, sys, time
        from pathlib import Path
        try:
            os.pidfd_open(os.getpid())
        except PermissionError:
            pass
        else:
            raise SystemExit("pidfd_open works here")
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path("grandchild").write_text(str(os.getpid()))
            time.sleep(600)
        if os.environ["RANK"] == "0":
            while not os.path.exists("go"):
                time.sleep(0.01)
            sys.exit(3)
        time.sleep(600)
    """)
    job.start("-n", "2", "train.py", wrapper=(sandbox,))
    job.wait_for_file("grandchild")
    (job.directory / "go").write_text("go")
    assert job.wait() == 3, job.output()
    assert job.failure.startswith("rank 0 on algo-1 exited with code 3")
    assert job.stderr.count("pidfd_open") == 1


def test_launcher_killed_in_a_sandbox_without_pidfd(job, alive, wait_until):
    """Row 41: without a pidfd the guardian notices the launcher's death by the end of its pipe."""
    sandbox = _compile("without_pidfd.c", job.directory)
    job.script(WAIT)
    job.start("-n", "2", "train.py", wrapper=(sandbox,))
    pids = [int(job.wait_for_file(f"up{rank}").read_text()) for rank in (0, 1)]
    job.process.kill()
    job.process.wait()
    wait_until(lambda: not [pid for pid in pids if alive(pid)], "the end of all ranks")


# ---- row 42


def _clock_environment(job) -> dict[str, str]:
    shim = _compile("shift_clock.c", job.directory, "-shared", "-fPIC")
    environment = {"LD_PRELOAD": str(shim), "SHIFT_CLOCK_TRIGGER": str(job.directory / "an-hour-back")}
    look = "import time; print(time.time())"
    times = [float(subprocess.check_output([sys.executable, "-c", look], env=environment))]
    (job.directory / "an-hour-back").write_text("now")
    times.append(float(subprocess.check_output([sys.executable, "-c", look], env=environment)))
    (job.directory / "an-hour-back").unlink()
    assert times[1] < times[0] - 3000, "the shim does not work here"
    return environment


def test_order_of_failures_when_the_wall_clock_steps_back(job):
    """Row 42: the rank that failed first is the culprit although its wall time is the later one and its end is too."""
    environment = _clock_environment(job)
    job.script("""
        import atexit, os, signal, sys, time
        from pathlib import Path

        def until(path):
            while not os.path.exists(path):
                time.sleep(0.005)

        def slow_teardown():  # runs after the failure has been recorded
            Path(os.environ["SHIFT_CLOCK_TRIGGER"]).write_text("now")
            until("second")

        if os.environ["RANK"] == "1":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            atexit.register(slow_teardown)
            raise ValueError("first")
        atexit.register(lambda: Path("second").write_text("x"))
        until(os.environ["SHIFT_CLOCK_TRIGGER"])
        raise RuntimeError("second")
    """)
    assert job.run("-n", "2", "train.py", env=environment) == 1, job.output()
    assert job.failure.startswith("rank 1 on algo-1 failed: ValueError: first")
    culprit = job.failure_json["detail"]["culprit"]
    others = [record for record in job.failure_json["detail"]["records"] if record["rank"] == 0]
    assert others[0]["timestamp"] == 0 or others[0]["timestamp"] < culprit["timestamp"] - 3000


def test_grace_when_the_wall_clock_steps_back(job):
    """Row 42: the grace period is neither cut nor stretched by a step of the wall clock."""
    environment = _clock_environment(job)
    job.script("""
        import os, signal, time
        from pathlib import Path
        def on_term(*_):
            Path(os.environ["SHIFT_CLOCK_TRIGGER"]).write_text("now")
            Path("told").write_text(Path(os.environ["LAUNCHER_STOP_DEADLINE"]).read_text())
        signal.signal(signal.SIGTERM, on_term)
        Path("up").write_text("up")
        while True:
            time.sleep(600)
    """)
    job.start("-n", "1", "--grace", "1", "train.py", env=environment)
    job.wait_for_file("up")
    sent = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143, job.output()
    assert time.monotonic() - sent >= 1
    assert int((job.directory / "told").read_text()) >= sent * 1e9 + 1e9
