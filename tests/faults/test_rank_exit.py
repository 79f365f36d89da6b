"""Fault table: a rank ends by itself with a code or an exception, or leaves without a word."""

from __future__ import annotations

import json
import signal

import pytest

HEAD = 1024  # what the platform shows of the failure file


def error_json(job, local_rank=0):
    return json.loads(job.rank_file(local_rank, "error.json").read_text())


# ---- row 1: exit codes


def test_exit_code_is_kept_and_the_culprit_named(job):
    """Row 1: one rank calls sys.exit(3) while the others work."""
    job.script("""
        import os, sys, time
        if os.environ["RANK"] == "3":
            print("about to give up", file=sys.stderr)
            sys.exit(3)
        time.sleep(600)
    """)
    assert job.run("-n", "4", "train.py") == 3
    assert job.failure.startswith("rank 3 on algo-1 exited with code 3: about to give up")
    assert "last lines of stderr of rank 3:\nabout to give up" in job.failure
    assert job.failure_json["detail"]["culprit"]["rank"] == 3
    assert set(job.failure_json["detail"]["victims"]) == {"0", "1", "2"}


def test_last_twenty_lines_of_the_culprits_stderr_are_kept(job):
    """Row 1: the failure file holds the last 20 lines of the culprit's stderr, and no line of another rank's."""
    job.script("""
        import os, sys, time
        if os.environ["RANK"] == "1":
            for number in range(30):
                print(f"line-{number:02d}", file=sys.stderr)
            sys.exit(3)
        print("not the culprit", file=sys.stderr)
        time.sleep(600)
    """)
    assert job.run("-n", "2", "train.py") == 3
    lines = job.failure.splitlines()
    assert [line for line in lines if line.startswith("line-")] == [f"line-{number}" for number in range(10, 30)]
    assert "not the culprit" not in job.failure


@pytest.mark.parametrize("code", [1, 2, 63, 64, 126, 127, 128, 255])
def test_every_exit_code_is_kept(job, code):
    """Row 1: the launcher's exit code is the culprit's, whatever it is."""
    job.script(f"raise SystemExit({code})")
    assert job.run("-n", "2", "train.py") == code
    assert f"exited with code {code}" in job.failure.splitlines()[0]


def test_exit_code_of_a_shell_script_is_kept(job):
    """Row 1: a rank that is no Python program."""
    path = job.script('#!/bin/sh\n[ "$RANK" = 1 ] && { echo broken >&2; exit 9; }\nexec sleep 600\n', "train.sh")
    path.chmod(0o755)
    assert job.run("-n", "2", "train.sh") == 9
    assert job.failure.startswith("rank 1 on algo-1 exited with code 9: broken")


def test_a_stop_that_comes_after_the_failure_does_not_hide_it(job):
    """Row 1: the platform stops the job while it is being ended because of rank 1: still rank 1, still its code."""
    job.script("""
        import os, signal, sys, time

        def on_term(number, frame):
            with open("told", "w") as file:
                file.write("x")

        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGTERM, on_term)
            open("ready", "w").close()
        while not os.path.exists("ready"):
            time.sleep(0.01)
        if os.environ["RANK"] == "1":
            sys.exit(3)
        while not os.path.exists("go"):
            time.sleep(0.01)
    """)
    job.start("-n", "2", "train.py")
    job.wait_for_file("told")
    job.process.send_signal(signal.SIGTERM)
    job.wait_for_line("SIGTERM: ", stream="stderr")
    (job.directory / "go").write_text("x")
    assert job.wait() == 3
    assert job.failure.startswith("rank 1 on algo-1 exited with code 3")


# ---- row 2: exceptions


def test_exception_leaves_its_traceback_and_an_error_file(job):
    """Row 2: a rank raises without any decorator."""
    job.script("""
        import os, time

        def train():
            raise ValueError("loss is nan at step 7")

        if os.environ["RANK"] == "1":
            train()
        time.sleep(600)
    """)
    assert job.run("-n", "2", "train.py") == 1
    assert job.failure.startswith("rank 1 on algo-1 failed: ValueError: loss is nan at step 7 (exit code 1)")
    assert "Traceback (most recent call last):" in job.failure
    assert 'train.py", line 5, in train' in job.failure
    assert "boot.py" not in job.failure and "_launcher_shim.py" not in job.failure
    body = error_json(job, 1)
    assert body["message"]["message"] == "ValueError: loss is nan at step 7"
    assert "Traceback (most recent call last):" in body["message"]["extraInfo"]["py_callstack"]
    assert int(body["message"]["extraInfo"]["timestamp"]) > 1_600_000_000
    assert job.failure_json["detail"]["culprit"]["message"] == "ValueError: loss is nan at step 7"


def test_the_traceback_is_on_stderr_as_a_plain_start_shows_it(job):
    """Row 2: nothing of the launcher's own is in what the user sees."""
    job.script("""
        def train():
            raise ValueError("plain")
        train()
    """)
    assert job.run("-n", "1", "train.py") == 1
    tail = job.rank_file(0, "stderr.log").read_text()
    assert tail.startswith("Traceback (most recent call last):\n")
    assert tail.count('  File "') == 2
    assert tail.endswith("ValueError: plain\n")


def test_a_very_long_message_does_not_hide_what_it_is(job):
    """Row 2: 10,000 characters of message; its beginning is in the head, all of it in the file."""
    job.script('raise RuntimeError("abc" * 3333 + "the" + "-end")')
    assert job.run("-n", "1", "train.py") == 1
    assert "RuntimeError: abcabcabc" in job.failure[:HEAD]
    assert "exit code 1" in job.failure[:HEAD]
    assert "the-end" in job.failure


def test_the_last_line_of_a_message_of_many_lines_is_in_the_head(job):
    """Row 2: libraries put the reason at the end ("Last error: ..."); the platform must show it."""
    job.script(r"""
        reason = "Last error: the link " + "is down"
        raise RuntimeError("first " + "line\n" + "detail of no use\n" * 200 + reason)
    """)
    assert job.run("-n", "1", "train.py") == 1
    head = job.failure[:HEAD]
    assert "RuntimeError: first line" in head
    assert "Last error: the link is down" in head


def test_nested_exceptions(job):
    """Row 2: `raise X from Y`: X is the headline, both are in the traceback."""
    job.script("""
        def load():
            raise KeyError("inner-key")
        try:
            load()
        except KeyError as error:
            raise RuntimeError("cannot load the data") from error
    """)
    assert job.run("-n", "1", "train.py") == 1
    assert "RuntimeError: cannot load the data" in job.failure[:HEAD]
    assert "KeyError: 'inner-key'" in job.failure
    assert "direct cause of the following exception" in job.failure
    assert error_json(job)["message"]["message"] == "RuntimeError: cannot load the data"


def test_deep_recursion(job):
    """Row 2: a traceback of a thousand frames does not push its last line out of the head."""
    job.script("""
        def down(depth):
            return down(depth + 1)
        down(0)
    """)
    assert job.run("-n", "1", "train.py") == 1
    assert "RecursionError: maximum recursion depth exceeded" in job.failure[:HEAD]


def test_syntax_error_in_the_script(job):
    """Row 2: the error is named in the head, with the line it is on."""
    job.script("""
        import os
        def broken(:
            pass
    """)
    assert job.run("-n", "2", "train.py") == 1
    head = job.failure[:HEAD]
    assert "SyntaxError" in head.splitlines()[0]
    assert "train.py" in head and "line 3" in head


def test_missing_import(job):
    """Row 2: the module is named, with advice."""
    job.script("import no_such_module_here")
    assert job.run("-n", "1", "train.py") == 1
    head = job.failure[:HEAD]
    assert "ModuleNotFoundError: No module named 'no_such_module_here'" in head
    assert "requirements.txt" in head


def test_exit_with_a_text(job):
    """Row 2: sys.exit("text") is code 1, and the text is the reason."""
    job.script('import sys; sys.exit("the data set is empty")')
    assert job.run("-n", "1", "train.py") == 1
    assert job.failure.splitlines()[0] == "rank 0 on algo-1 exited with code 1: the data set is empty"


def test_keyboard_interrupt(job):
    """Row 2: a KeyboardInterrupt of the script's own ends as Python ends on one."""
    job.script("raise KeyboardInterrupt")
    assert job.run("-n", "1", "train.py") == 128 + signal.SIGINT
    assert "KeyboardInterrupt" in job.failure[:HEAD]
    assert "SIGINT" in job.failure[:HEAD]


def test_exception_in_a_thread_that_ends_the_rank(job):
    """Row 2: the main thread gives up because a thread has failed; the thread's exception is the reason."""
    job.script("""
        import sys, threading

        def feed():
            raise OSError("shard 7 is unreadable")

        thread = threading.Thread(target=feed, name="feeder")
        thread.start()
        thread.join()
        sys.exit(5)
    """)
    assert job.run("-n", "2", "train.py") == 5
    head = job.failure[:HEAD]
    assert "OSError: shard 7 is unreadable" in head
    assert "(thread feeder)" in head
    assert "Traceback (most recent call last):" in job.failure


def test_exception_in_a_thread_that_the_script_survives(job):
    """Row 2: a thread's exception alone is no failure."""
    job.script("""
        import threading
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        print("trained")
    """)
    assert job.run("-n", "2", "train.py") == 0
    assert job.failure == ""


def test_a_survived_thread_exception_does_not_make_a_stopped_rank_the_culprit(job):
    """Row 2: rank 0 lives on after a thread's exception; rank 1 fails later and is the cause."""
    job.script("""
        import os, sys, threading, time
        if os.environ["RANK"] == "0":
            thread = threading.Thread(target=lambda: 1 / 0)
            thread.start()
            thread.join()
            open("survived", "w").write("x")
            time.sleep(600)
        while not os.path.exists("survived"):
            time.sleep(0.01)
        sys.exit(7)
    """)
    assert job.run("-n", "2", "train.py") == 7
    assert job.failure.startswith("rank 1 on algo-1 exited with code 7")
    assert "0" in job.failure_json["detail"]["victims"]


@pytest.mark.torch
def test_error_file_is_read_by_torch(job):
    """Row 2: torch's own ProcessFailure understands the error file."""
    errors = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")
    job.script('raise ValueError("loss is nan")')
    assert job.run("-n", "1", "train.py") == 1
    path = job.rank_file(0, "error.json")
    failure = errors.ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    assert failure.message["message"] == "ValueError: loss is nan"
    assert failure.timestamp == int(error_json(job)["message"]["extraInfo"]["timestamp"])


@pytest.mark.torch
@pytest.mark.slow
def test_torchs_record_decorator_still_works(job):
    """Row 2: a script that was written for torchrun, with its decorator."""
    pytest.importorskip("torch")
    job.script("""
        from torch.distributed.elastic.multiprocessing.errors import record

        @record
        def main():
            raise ValueError("decorated")

        main()
    """)
    assert job.run("-n", "1", "train.py") == 1
    assert "ValueError: decorated" in job.failure[:HEAD]
    assert "in main" in job.failure


# ---- row 3: who was first

PEERS = """
    import atexit, os, signal, socket, sys, time

    rank = int(os.environ["RANK"])

    def pid_of(other):
        path = f"pid-{other}"
        while not os.path.exists(path) or not open(path).read():
            time.sleep(0.005)
        return int(open(path).read())

    def wait_for_end(pid):
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.005)

    with open(f"pid-{rank}", "w") as file:
        file.write(str(os.getpid()))
    if rank == 0:
        server = socket.socket(socket.AF_UNIX)
        server.bind("peer.part")
        server.listen()
        os.rename("peer.part", "peer")
        link, _ = server.accept()
    else:
        while not os.path.exists("peer"):
            time.sleep(0.005)
        link = socket.socket(socket.AF_UNIX)
        link.connect("peer")
"""


@pytest.mark.parametrize("ignores_term", [False, True], ids=["ends on SIGTERM", "finishes its teardown"])
def test_first_exception_wins_over_the_first_exit(job, ignores_term):
    """Row 3: rank 1 raises, and is slow to end; rank 0's broken pipe comes 50 ms later, but it ends first."""
    job.script(
        PEERS
        + f"""
    if rank == 0:
        link.recv(1)  # "" when rank 1 has closed its end
        time.sleep(0.05)
        link.sendall(b"gradient")
        raise SystemExit("the send did not fail")
    if {ignores_term}:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    atexit.register(wait_for_end, pid_of(0))  # the teardown lasts until rank 0 is gone
    atexit.register(link.close)  # runs first: the exception has left the script by now
    raise ValueError("the root cause")
    """
    )
    code = job.run("-n", "2", "train.py")
    assert job.failure.startswith("rank 1 on algo-1 failed: ValueError: the root cause"), job.failure
    detail = job.failure_json["detail"]
    assert detail["culprit"]["rank"] == 1
    assert list(detail["victims"]) == ["0"]
    assert "rank 0: lost its connection to another rank: BrokenPipeError" in job.failure
    assert code == 1


def test_a_killed_rank_is_the_cause_of_its_peers_connection_error(job):
    """Row 3: rank 1 is killed with SIGKILL, rank 0 gets ConnectionResetError from the socket between them."""
    job.script(
        PEERS
        + """
    if rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher may be faster than this rank's own error
        link.sendall(b"1, and bytes that are never read")  # which make the end of the peer a reset
        link.recv(1)
        raise SystemExit("the receive did not fail")
    link.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    )
    assert job.run("-n", "2", "train.py") == 137
    assert job.failure.startswith("rank 1 on algo-1 was killed by SIGKILL")
    assert list(job.failure_json["detail"]["victims"]) == ["0"]
    assert "ConnectionResetError" in job.rank_file(0, "stderr.log").read_text()


# ---- row 12: os._exit(0)

LEAVER = """
    import os, time
    if os.environ["RANK"] == "2":
        with open("pid-2", "w") as file:
            file.write(str(os.getpid()))
        os._exit(0)
    while not os.path.exists("go"):
        time.sleep(0.01)
    print("finished")
"""


def test_early_exit_wait_is_no_success(job):
    """Row 12: rank 2 leaves by os._exit(0); the others may finish, and the job has still failed."""
    job.script(LEAVER)
    job.start("-n", "3", "train.py")
    job.wait_for_line("rank 2 ended early with 0", stream="stderr")
    (job.directory / "go").write_text("x")
    assert job.wait() == 1
    assert job.failure.startswith("rank 2 on algo-1 ended early with 0")
    assert job.stdout.count("finished") == 2
    assert job.failure_json["detail"]["culprit"]["rank"] == 2


def test_early_exit_abort_stops_the_others(job):
    """Row 12: policy abort ends the others at once, and blames the one that left."""
    job.script(LEAVER)
    assert job.run("-n", "3", "--early-exit", "abort", "train.py") == 1
    assert job.failure.startswith("rank 2 on algo-1 ended early with 0")
    assert set(job.failure_json["detail"]["victims"]) == {"0", "1"}
    assert "finished" not in job.stdout


def test_early_exit_ok_accepts_it(job, wait_until, alive):
    """Row 12: policy ok: the others finish, and the job has succeeded."""
    job.script(LEAVER)
    job.start("-n", "3", "--early-exit", "ok", "train.py")
    early = int(job.wait_for_file("pid-2").read_text())
    wait_until(lambda: not alive(early), "the end of rank 2")
    (job.directory / "go").write_text("x")
    assert job.wait() == 0
    assert job.failure == ""
    assert job.stdout.count("finished") == 2


@pytest.mark.parametrize("policy", ["wait", "ok"])
def test_all_ranks_leaving_early_is_a_success(job, policy):
    """Row 12: a script whose last line is os._exit(0) in every rank."""
    job.script("""
        import os
        print("finished", flush=True)
        os._exit(0)
    """)
    assert job.run("-n", "3", "--early-exit", policy, "train.py") == 0
    assert job.failure == ""
    assert job.stdout.count("finished") == 3


PEER_LEAVES = (
    PEERS
    + """
    if rank == 0:
        link.recv(1)
        wait_for_end(pid_of(1))
        link.sendall(b"gradient")
    os._exit(0)
    """
)


def test_peers_that_fail_after_an_early_exit_are_not_the_cause(job):
    """Row 12: rank 0 fails on its broken connection to rank 1, which left: the code is rank 0's, the blame rank 1's."""
    job.script(PEER_LEAVES)
    assert job.run("-n", "2", "train.py") == 1
    assert job.failure.startswith("rank 1 on algo-1 ended early with 0")
    assert list(job.failure_json["detail"]["victims"]) == ["0"]


def test_a_lost_peer_is_a_failure_even_where_early_exits_are_accepted(job):
    """Row 12: never 0 with a lost peer: policy ok accepts that rank 1 left, not that rank 0 failed because of it."""
    job.script(PEER_LEAVES)
    assert job.run("-n", "2", "--early-exit", "ok", "train.py") == 1
    assert job.failure.startswith("rank 0 on algo-1 failed: BrokenPipeError")


def test_a_script_that_forks_is_not_taken_for_one_that_left_early(job):
    """Row 12: a forked child's os._exit(0) or sys.exit(0) says nothing about its rank."""
    job.script("""
        import os, sys
        for leave in (os._exit, sys.exit):
            pid = os.fork()
            if pid == 0:
                leave(0)
            assert os.waitpid(pid, 0)[1] == 0
        print("finished")
    """)
    assert job.run("-n", "2", "train.py") == 0
    assert job.stdout.count("finished") == 2


@pytest.mark.parametrize("policy", ["wait", "abort"])
def test_a_script_that_becomes_another_program_has_not_left_early(job, policy):
    """Row 12: rank 0 is replaced (exec) by a program that ends with 0; that program's end is no early exit."""
    job.script("""
        import os, time
        if os.environ["RANK"] == "0":
            try:
                os.execvp("no-such-program", ["no-such-program"])
            except FileNotFoundError:
                os.execvp("sh", ["sh", "-c", "echo $$ >pid-0"])
        while not os.path.exists("go"):
            time.sleep(0.01)
        print("finished")
    """)
    job.start("-n", "2", "--early-exit", policy, "train.py")
    job.wait_for_file("pid-0")
    (job.directory / "go").write_text("x")
    assert job.wait() == 0, job.output()
    assert "ended early" not in job.stderr
    assert job.stdout.count("finished") == 1


def test_a_failed_exec_leaves_the_script_where_it_was(job):
    """Row 12: a rank that leaves early after a failed exec has still left early."""
    job.script("""
        import os, time
        if os.environ["RANK"] == "1":
            while not os.path.exists("pid0") or os.path.exists("/proc/" + open("pid0").read()):
                time.sleep(0.01)
        else:
            with open("pid0.part", "w") as file:
                file.write(str(os.getpid()))
            os.rename("pid0.part", "pid0")
            try:
                os.execv("/no-such-program", ["no-such-program"])
            except FileNotFoundError:
                os._exit(0)
    """)
    assert job.run("-n", "2", "train.py") == 1
    assert job.failure.startswith("rank 0 on algo-1 ended early with 0")


# ---- row 13: ranks that end apart

APART = """
    import os, time
    with open("pid-" + os.environ["RANK"], "w") as file:
        file.write(str(os.getpid()))
    while os.environ["RANK"] == "1" and not os.path.exists("go"):
        time.sleep(0.01)
"""


def test_ranks_that_end_apart_are_waited_for(job, wait_until, alive):
    """Row 13: rank 0 is gone while rank 1 works on; nothing is stopped, the code is 0."""
    job.script(APART)
    job.start("-n", "2", "train.py")
    early = int(job.wait_for_file("pid-0").read_text())
    late = int(job.wait_for_file("pid-1").read_text())
    wait_until(lambda: not alive(early), "the end of rank 0")
    assert alive(late)
    (job.directory / "go").write_text("x")
    assert job.wait() == 0
    assert job.failure == ""


@pytest.mark.slow
def test_a_line_says_who_is_waited_for(job):
    """Row 13: ten seconds after the first rank's end a line says which are waited for."""
    job.script(APART)
    job.start("-n", "2", "train.py")
    line = job.wait_for_line("waiting for rank", stream="stderr")
    assert "rank 0 ended with 0; waiting for rank 1" in line
    (job.directory / "go").write_text("x")
    assert job.wait() == 0
