"""The judgement alone: exit records in, one root cause out. No process is started here."""

from __future__ import annotations

import itertools
import random
import signal

import pytest

from launcher.evidence import Evidence, ExitRecord, LostChild
from launcher.record import replace
from launcher.verdict import HEAD_CHARACTERS, judge

MS = 1_000_000
FINISHED, RUNNING = 3, 2


def ended(rank, code=0, at=100, *, sig=0, failed=None, told=0, phase=FINISHED, **more):
    """A rank that ended ``at`` ms with ``code`` or by ``sig``; ``failed``: when its exception left the script."""
    return ExitRecord(
        host=more.pop("host", "algo-1"),
        rank=rank,
        local_rank=rank,
        pid=1000 + rank,
        how="signal" if sig else "exit",
        value=sig or code,
        ended_ns=at * MS,
        failed_ns=(at if failed is None else failed) * MS,
        told_ns=told * MS,
        phase=phase,
        **more,
    )


def told(rank, at=120, since=110, sig=signal.SIGTERM, **more):
    """A rank that ended by the launcher's signal."""
    return ended(rank, at=at, sig=sig, told=since, **more)


def verdict_of(*records, **evidence):
    return judge(list(records), Evidence(**evidence), "train.py")


# ---- success


def test_all_ended_with_zero():
    """Row 13: times apart do not matter."""
    verdict = verdict_of(ended(0, at=100), ended(1, at=300_000))
    assert (verdict.kind, verdict.exit_code, verdict.text) == ("success", 0, "")
    assert verdict.ok and verdict.culprit is None and verdict.victims == {}


def test_oom_kills_of_something_else_do_not_spoil_a_success():
    """Row 7: a counted OOM kill that no rank failed from is no failure."""
    assert verdict_of(ended(0), ended(1), oom_kills=2).exit_code == 0


# ---- rows 1, 3: the first failure


def test_first_failure_wins():
    """Row 1: by time, not by rank."""
    verdict = verdict_of(ended(0, 5, at=103), ended(1, 3, at=101), ended(2, 4, at=102))
    assert (verdict.kind, verdict.exit_code, verdict.culprit.rank) == ("rank", 3, 1)
    assert verdict.victims == {}
    assert "of the other 2 ranks 2 failed too" in verdict.text


def test_one_nanosecond_decides():
    """Row 3: times are nanoseconds, not seconds."""
    first = ended(1, 3)
    second = replace(ended(0, 4), ended_ns=first.ended_ns + 1, failed_ns=first.failed_ns + 1)
    assert judge([second, first], Evidence()).culprit.rank == 1


def test_tie_goes_to_the_lower_rank():
    """Row 3: equal times: the same answer every time."""
    for order in itertools.permutations([ended(2, 4), ended(0, 6), ended(1, 5)]):
        verdict = verdict_of(*order)
        assert (verdict.culprit.rank, verdict.exit_code) == (0, 6)


def test_time_of_the_exception_counts_not_the_end_of_the_process():
    """Row 3: rank 1 raised first, and took half a second to end."""
    verdict = verdict_of(
        ended(0, 1, at=150, failed=150, message="RuntimeError: no answer"),
        ended(1, 1, at=600, failed=100, told=160, message="ValueError: the cause"),
    )
    assert verdict.culprit.rank == 1
    assert verdict.headline == "rank 1 on algo-1 failed: ValueError: the cause (exit code 1)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_culprit_that_was_stopped_in_its_teardown_keeps_its_own_failure(number):
    """Row 3: its exception came before the launcher's signal: that is what it failed of, with Python's code for it."""
    verdict = verdict_of(
        ended(0, 1, at=150, message="BrokenPipeError: [Errno 32] Broken pipe"),
        ended(1, at=600, sig=number, failed=100, told=151, message="ValueError: the cause"),
    )
    assert verdict.culprit.rank == 1
    assert verdict.headline.startswith("rank 1 on algo-1 failed: ValueError: the cause")
    assert "not sent by" not in verdict.text
    assert verdict.exit_code == 1


def test_peer_lost_is_no_cause_even_when_it_is_seen_first():
    """Row 3: the broken pipe can be noticed before the killed rank's end."""
    verdict = verdict_of(
        ended(0, 1, at=100, message="BrokenPipeError: [Errno 32] Broken pipe"), ended(1, at=101, sig=signal.SIGKILL)
    )
    assert (verdict.culprit.rank, verdict.exit_code) == (1, 137)
    assert verdict.victims == {0: "lost its connection to another rank"}
    assert "rank 0: lost its connection to another rank: BrokenPipeError" in verdict.text


@pytest.mark.parametrize(
    "message",
    [
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:1024",
        "torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error",
        "torch.distributed.DistNetworkError: The client socket has timed out after 60s",
        "EOFError",
    ],
)
def test_what_losing_a_peer_looks_like(message):
    """Row 3: texts of Gloo, NCCL, torch and Python."""
    verdict = verdict_of(ended(0, 1, at=100, message=message), ended(1, 3, at=101))
    assert verdict.culprit.rank == 1
    assert list(verdict.victims) == [0]


@pytest.mark.parametrize(
    "line",
    [
        "[algo-1:19939:0:19939]      cma_ep.c:85   process_vm_readv(pid=19947 {0x7fd0,200000}-->{0x7fbe,200000}) "
        "returned -1: No such process",
        "Read -1, expected 131072, errno = 3",
    ],
)
def test_mpi_that_aborts_on_a_killed_neighbour_is_no_cause(line):
    """Row 3: it reads the other's memory, and sees that it is gone before anybody is told of its end."""
    aborted = ended(1, at=100, sig=signal.SIGABRT, stderr_tail=f"{line}\nFatal Python error: Aborted\n")
    verdict = verdict_of(aborted, ended(3, at=101, sig=signal.SIGKILL))
    assert (verdict.culprit.rank, verdict.exit_code) == (3, 137)
    assert verdict.victims == {1: "lost its connection to another rank"}


def test_victims_only():
    """Row 3: everybody lost a peer: the first to say so is the nearest to the cause."""
    verdict = verdict_of(
        ended(0, 1, at=102, message="ConnectionResetError: [Errno 104] Connection reset by peer"),
        ended(1, 1, at=101, message="BrokenPipeError: [Errno 32] Broken pipe"),
        told(2, at=130),
    )
    assert (verdict.culprit.rank, verdict.exit_code) == (1, 1)
    assert set(verdict.victims) == {0, 2}


def test_a_rank_that_was_told_to_end_is_a_victim_whatever_its_code():
    """Row 1: SIGTERM's default, a handler's own code, and an exception from a handler."""
    verdict = verdict_of(
        ended(0, 3, at=100),
        told(1),
        ended(2, 7, at=130, told=110),
        ended(3, 1, at=131, told=110, message="RuntimeError: interrupted"),
        told(4, sig=signal.SIGKILL),
    )
    assert (verdict.culprit.rank, verdict.exit_code) == (0, 3)
    assert verdict.victims[1] == "stopped by the launcher (SIGTERM)"
    assert verdict.victims[2] == "stopped by the launcher (code 7)"
    assert verdict.victims[4] == "stopped by the launcher (SIGKILL)"
    assert set(verdict.victims) == {1, 2, 3, 4}
    assert "of the other 4 ranks 4 stopped by the launcher" in verdict.text


def test_a_threads_old_exception_does_not_make_a_stopped_rank_the_cause():
    """Row 2: it had survived it until the launcher ended it."""
    verdict = verdict_of(
        told(0, failed=20, message="ZeroDivisionError: division by zero", thread="Thread-1", phase=RUNNING),
        ended(1, 7, at=100),
    )
    assert (verdict.culprit.rank, verdict.exit_code) == (1, 7)
    assert 0 in verdict.victims


# ---- rows 5 to 9: signals


@pytest.mark.parametrize(
    ("number", "code", "name", "reason"),
    [
        (signal.SIGKILL, 137, "SIGKILL", "SIGKILL not sent by launcher, no OOM record"),
        (signal.SIGSEGV, 139, "SIGSEGV", "native code touched memory"),
        (signal.SIGABRT, 134, "SIGABRT", "native code gave up"),
        (signal.SIGILL, 132, "SIGILL", "an instruction that this CPU does not have"),
        (signal.SIGFPE, 136, "SIGFPE", "division by zero"),
        (signal.SIGBUS, 135, "SIGBUS", "the file was cut short"),
        (signal.SIGTERM, 143, "SIGTERM", "not sent by the launcher"),
        (signal.SIGPIPE, 141, "SIGPIPE", "pipe that nobody reads"),
        (37, 165, "signal 37", ""),
        (77, 205, "signal 77", ""),
    ],
)
def test_signals_by_code_name_and_reason(number, code, name, reason):
    """Rows 5, 8, 9: 128 and the number; unknown ones by their number."""
    verdict = verdict_of(ended(0, sig=int(number)), told(1))
    assert verdict.exit_code == code
    assert verdict.headline == f"rank 0 on algo-1 was killed by {name}"
    assert reason in verdict.text[:HEAD_CHARACTERS]


def test_oom_kill_is_proven_by_the_cgroup():
    """Row 6: without a count, a SIGKILL is not called an OOM kill."""
    killed = ended(3, sig=signal.SIGKILL, max_rss_kib=1536 * 1024)
    verdict = verdict_of(killed, told(0), oom_kills=1, memory_limit=2 << 30)
    assert verdict.headline == (
        "rank 3 on algo-1 was OOM-killed: peak RSS 1.50 GiB of limit 2.00 GiB, cgroup oom_kill +1"
    )
    assert verdict.exit_code == 137
    assert "OOM-killed" not in verdict_of(killed, told(0), memory_limit=2 << 30).text


def test_oom_kill_of_a_child_blames_its_rank():
    """Row 7: also when another child of another rank vanished meanwhile."""
    verdict = verdict_of(
        told(0),
        told(1),
        ended(2, 1, message="RuntimeError: DataLoader worker (pid 77) is killed by signal: Killed."),
        oom_kills=1,
        lost_children=(LostChild(0, 55, "python helper.py", 900_000), LostChild(2, 77, "python train.py", 512_000)),
    )
    assert verdict.culprit.rank == 2
    assert "failed after its child process 77 (python train.py, RSS 500.0 MiB) was OOM-killed" in verdict.headline
    assert "cgroup oom_kill +1" in verdict.headline


def test_the_exception_that_ended_native_code_is_explained():
    """Row 8: by its own text; what the rank wrote before it is not its cause."""
    thrown = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"
    text = verdict_of(ended(0, sig=signal.SIGABRT, stderr_tail=f"bind: Address already in use\n{thrown}")).text
    assert "host memory is exhausted" in text and "port is taken" not in text
    text = verdict_of(ended(0, sig=signal.SIGABRT, stderr_tail="bind: Address already in use\nAborted\n")).text
    assert "native code gave up" in text


def test_oom_kill_of_an_unknown_process_is_told():
    """Row 7: the cgroup has counted a kill, and nobody saw of what."""
    verdict = verdict_of(ended(2, 1, message="RuntimeError: my worker is gone"), told(0), oom_kills=1)
    assert verdict.headline.startswith("rank 2 on algo-1 failed: RuntimeError: my worker is gone")
    assert "oom_kill +1" in verdict.text[:HEAD_CHARACTERS]


def test_full_shared_memory_explains_a_bus_error():
    """Row 9: only when it was full."""
    killed = ended(0, sig=signal.SIGBUS)
    full = verdict_of(killed, shm_total=64 << 20, shm_free=4096).text[:HEAD_CHARACTERS]
    assert "/dev/shm is full (0.0 MiB of 64.0 MiB free)" in full
    assert "num_workers=0" in full
    assert "is full" not in verdict_of(killed, shm_total=8 << 30, shm_free=4 << 30).headline


def test_fatal_stack_is_in_the_text():
    """Row 8: what faulthandler wrote is found among other lines, with the stack of the thread that crashed."""
    idle = "".join(
        f'Thread 0x{number} (most recent call first):\n  File "idle.py", line {number} in wait\n\n'
        for number in range(100, 140)
    )
    stderr = (
        "epoch 1\nFatal Python error: Segmentation fault\n\n"
        + idle
        + 'Current thread 0x7 (most recent call first):\n  File "train.py", line 9 in crash\n\n'
        + "Extension modules: "
        + ", ".join(f"module{number}" for number in range(500))
        + "\n"
        + "a line of native code\n" * 25
    )
    text = verdict_of(ended(0, sig=signal.SIGSEGV, stderr_tail=stderr)).text
    assert "Fatal Python error: Segmentation fault" in text
    assert 'File "train.py", line 9 in crash' in text


# ---- row 12: ranks that leave


def test_left_early():
    """Row 12: one left in the middle of its script, the others ended well."""
    verdict = verdict_of(ended(0, at=200), ended(1, at=200), ended(2, at=100, phase=RUNNING))
    assert (verdict.kind, verdict.exit_code, verdict.culprit.rank) == ("early-exit", 1, 2)
    assert verdict.headline.startswith("rank 2 on algo-1 ended early with 0")


def test_left_early_is_accepted_by_policy():
    """Row 12: --early-exit ok."""
    assert verdict_of(ended(0, at=200), ended(1, phase=RUNNING), early_exit_ok=True).exit_code == 0


def test_all_left_early():
    """Row 12: a script that ends with os._exit(0)."""
    assert verdict_of(ended(0, phase=RUNNING), ended(1, phase=RUNNING, at=200)).exit_code == 0


def test_left_early_is_the_cause_of_a_lost_peer():
    """Row 12: the code is the failed rank's, the blame is not."""
    verdict = verdict_of(
        ended(0, 4, at=200, message="ConnectionResetError: [Errno 104] Connection reset by peer"),
        ended(1, at=100, phase=RUNNING),
    )
    assert (verdict.kind, verdict.exit_code, verdict.culprit.rank) == ("early-exit", 4, 1)
    assert list(verdict.victims) == [0]


def test_a_lost_peer_fails_the_job_whatever_the_policy():
    """Row 12: early exits are accepted, a rank that failed is not."""
    lost = ended(0, 4, at=200, message="ConnectionResetError: [Errno 104] Connection reset by peer")
    verdict = verdict_of(lost, ended(1, at=100, phase=RUNNING), early_exit_ok=True)
    assert (verdict.kind, verdict.exit_code, verdict.culprit.rank) == ("rank", 4, 0)


def test_a_failure_of_its_own_wins_over_an_early_exit():
    """Row 12: an exception is a stronger reason than a quiet end."""
    verdict = verdict_of(ended(0, 1, at=200, message="ValueError: loss is nan"), ended(1, at=100, phase=RUNNING))
    assert (verdict.kind, verdict.culprit.rank) == ("rank", 0)


def test_programs_without_a_status_page_cannot_leave_early():
    """Row 12: binaries and shell scripts."""
    assert verdict_of(ended(0, at=200, phase=None), ended(1, phase=None)).exit_code == 0


# ---- collectives


def gave_up(rank, accused, at=100, call="allreduce #812 of 26,214,400 B", host="algo-2", what="has died", **more):
    """A rank that could not finish a collective of ours."""
    message = f"launcher.errors.CollectiveError: {call}: rank {accused} on {host} (pid 1234) {what}"
    return ended(rank, 1, at=at, message=message, **more)


def test_the_end_of_a_rank_in_a_collective_says_which_and_where():
    inside = {"operation": "allreduce", "sequence": 812}
    killed = ended(3, at=101, sig=signal.SIGKILL, host="algo-2", phase=RUNNING, collective_phase="reducing", **inside)
    verdict = verdict_of(gave_up(0, 3), killed, gave_up(1, 3, at=102))
    assert (verdict.exit_code, verdict.culprit.rank) == (137, 3)
    assert verdict.headline == "rank 3 on algo-2 was killed by SIGKILL during allreduce #812 (reducing)"
    assert verdict.victims == dict.fromkeys((0, 1), "could not finish allreduce #812")
    assert "of the other 2 ranks 2 lost a peer" in verdict.text
    between = verdict_of(gave_up(0, 3), replace(killed, collective_phase="", sequence=811))
    assert between.headline == "rank 3 on algo-2 was killed by SIGKILL"
    assert "the last collective that rank 3 had finished: allreduce #811" in between.text
    assert "rank 0: could not finish allreduce #812: launcher.errors.CollectiveError: allreduce #812" in between.text
    for end, words in (
        ({"code": 5}, "exited with code 5 during allreduce #812 (reducing)"),
        ({"code": 1, "message": "KeyError: 1"}, "failed during allreduce #812 (reducing): KeyError: 1 (exit code 1)"),
    ):
        one = ended(3, phase=RUNNING, collective_phase="reducing", **inside, **end)
        assert verdict_of(gave_up(0, 3), one).headline == f"rank 3 on algo-1 {words}"
    left = ended(3, phase=RUNNING, collective_phase="reducing", **inside)
    assert "ended early with 0 during allreduce #812 (reducing): it left" in verdict_of(gave_up(0, 3), left).headline


def test_who_could_not_finish_a_collective_names_the_cause():
    """The culprit has no failure of its own: it was stuck, and the launcher ended it."""
    what = "did not come within 30 s: it is in broadcast #811"
    verdict = verdict_of(gave_up(0, 3, what=what), gave_up(1, 3, at=101, what=what), told(3, host="algo-2"))
    assert (verdict.kind, verdict.exit_code, verdict.culprit.rank) == ("rank", 1, 3)
    assert verdict.headline == f"rank 3 on algo-2 (pid 1234) {what} (told by rank 0 on algo-1, in allreduce #812)"
    assert set(verdict.victims) == {0, 1}


def test_a_rank_that_ended_well_before_the_others_were_done_is_named():
    verdict = verdict_of(gave_up(0, 1, what="left the group", host="algo-1"), ended(1, at=90))
    assert (verdict.kind, verdict.exit_code, verdict.culprit.rank) == ("rank", 1, 1)
    assert verdict.headline.startswith("rank 1 on algo-1 (pid 1234) left the group (told by rank 0")


def test_accusations_are_followed_to_their_source():
    """Rank 2 gives up first; 1 misses it, 0 misses 1. And with two that accuse each other, it comes to an end."""
    chain = (gave_up(0, 1, at=103), gave_up(1, 2, at=102), gave_up(2, 3, at=104, what="did not come within 3 s"))
    verdict = verdict_of(*chain, told(3, host="algo-2", at=140))
    assert verdict.culprit.rank == 3
    assert "(told by rank 2 on algo-1, in allreduce #812)" in verdict.headline
    assert verdict_of(gave_up(0, 1), gave_up(1, 0, at=101)).kind == "rank"


def test_a_mismatch_names_the_rank_that_called_something_else():
    text = "barrier #4: rank 1 called broadcast of 4,096 B where rank 0 called barrier"
    verdict = verdict_of(ended(0, 1, message=f"CollectiveError: {text}"), told(1))
    assert verdict.culprit.rank == 1
    assert verdict.headline.startswith("rank 1 called broadcast of 4,096 B where rank 0 called barrier (told by rank 0")


def test_an_accused_rank_that_is_gone_without_a_record_is_still_named():
    verdict = verdict_of(gave_up(0, 3))
    assert (verdict.exit_code, verdict.culprit) == (1, None)
    assert verdict.headline.startswith("rank 3 on algo-2 (pid 1234) has died (told by rank 0 on algo-1")


def test_who_blames_itself_or_nobody_is_no_victim():
    """A rank whose own caller stopped waiting; and words that only look like ours."""
    own = gave_up(1, 1, what="was interrupted", host="algo-1")
    assert verdict_of(own, gave_up(0, 1, at=99)).culprit.rank == 1
    like = ended(0, 1, message="ValueError: batch #12: rank 3 has bad data")
    assert verdict_of(like, ended(3, 2, at=101)).culprit.rank == 0


def test_a_stop_of_the_platform_is_no_ranks_fault():
    """Ranks leave their loops at different steps."""
    assert verdict_of(gave_up(0, 1), told(1), stop_signal=15).kind == "stopped"


def test_a_straggler_is_in_the_text_of_a_failure():
    line = "rank 3 on algo-2 was the straggler: others waited 41 % of 600 s for it"
    assert line in verdict_of(ended(0, 3), told(1), straggler=line).text


# ---- stop and hang


def test_stopped():
    """Row 19: the platform's stop: 143 when the ranks did not end with 0."""
    verdict = verdict_of(told(0), told(1, sig=signal.SIGKILL), stop_signal=15)
    assert (verdict.kind, verdict.exit_code) == ("stopped", 143)
    assert verdict.culprit is None
    assert "stopped by SIGTERM" in verdict.headline
    assert "killed at the end of the grace period: rank 1" in verdict.headline
    assert verdict_of(told(0), stop_signal=2).exit_code == 130


def test_stopped_with_all_ranks_ending_well():
    """Row 19: a checkpoint was written in time: that is a success."""
    assert verdict_of(ended(0, told=50), ended(1, told=50), stop_signal=15).exit_code == 0


def test_a_failure_before_the_stop_is_still_the_cause():
    """Row 19: the stop came while the group was being ended because of rank 1."""
    verdict = verdict_of(told(0, since=101), ended(1, 3, at=100), stop_signal=15)
    assert (verdict.kind, verdict.exit_code) == ("rank", 3)
    assert verdict.culprit.rank == 1


def test_hang():
    """Row 26: all ranks were ended because of a hang: its code, and the rank that is suspected."""
    verdict = verdict_of(told(0), told(1), hang="hang: nothing for 60 s", hang_rank=1)
    assert (verdict.kind, verdict.exit_code) == ("hang", 75)
    assert verdict.headline == "hang: nothing for 60 s"
    assert verdict.culprit.rank == 1
    assert list(verdict.victims) == [0]
    assert "not sent by the launcher" not in verdict.text
    assert verdict_of(told(0), told(1), hang="hang: nothing for 60 s").culprit is None


def test_rank_that_all_watchdogs_waited_for():
    """Row 10: the one that says nothing; with two of them, one may have been stopped before its watchdog spoke."""
    waited = "collective 17 (ALLREDUCE)"
    others = [ended(0, sig=signal.SIGABRT, waited_for=waited), told(1, sig=signal.SIGABRT, waited_for=waited)]
    verdict = verdict_of(*others, told(2))
    assert (verdict.kind, verdict.exit_code, verdict.culprit.rank) == ("rank", 134, 2)
    assert verdict.headline.startswith("rank 2 on algo-1 did not reach collective 17 (ALLREDUCE)")
    assert "not sent by the launcher" not in verdict.text
    assert verdict_of(*others, told(2), told(3)).culprit.rank == 0
    assert verdict_of(*others, ended(2, 3, at=101)).culprit.rank == 2


def test_own_failure_before_the_hang_was_noticed():
    """Row 26: a rank's own failure comes first, and 75 is not used."""
    verdict = verdict_of(told(0), ended(1, 3, at=100), hang="hang: nothing for 60 s", hang_rank=0)
    assert (verdict.kind, verdict.exit_code, verdict.culprit.rank) == ("rank", 3, 1)


def test_launcher_error():
    """A fault of the launcher itself is never shown as a rank's."""
    verdict = verdict_of(told(0), launcher_error="the guardian process 7 ended (signal 9)")
    assert (verdict.kind, verdict.exit_code, verdict.culprit) == ("launcher", 70, None)
    assert "the guardian process 7 ended" in verdict.text


# ---- the text


def test_head_holds_what_matters_when_everything_is_long():
    """Row 2: what the platform shows names rank, error, place and code, whatever their lengths."""
    record = ended(
        0,
        1,
        message="RuntimeError: " + "x" * 10_000,
        where="/opt/ml/code/" + "deep/" * 100 + "train.py:7 in main",
        traceback="Traceback (most recent call last):\n" + "  File ...\n" * 1000 + "RuntimeError: " + "x" * 10_000,
        stderr_tail="noise\n" * 1000,
    )
    text = verdict_of(record, told(1)).text
    head = text[:HEAD_CHARACTERS]
    assert head.startswith("rank 0 on algo-1 failed: RuntimeError: xxx")
    assert "train.py:7 in main" in head
    assert "exit code 1" in head
    assert record.traceback in text


def test_last_line_of_a_long_message_is_in_the_head():
    """Row 2: the reason is often the last line of a message."""
    record = ended(0, 1, message="RuntimeError: NCCL error\n" + "detail\n" * 300 + "Last error: link down")
    head = verdict_of(record).text[:HEAD_CHARACTERS]
    assert "RuntimeError: NCCL error" in head
    assert "Last error: link down" in head


def test_syntax_error_is_named_first():
    """Row 2: Python puts the place before the error."""
    record = ended(
        0, 1, message='File "train.py", line 3\n    def broken(:\n               ^\nSyntaxError: invalid syntax'
    )
    headline = verdict_of(record).headline
    assert "SyntaxError: invalid syntax" in headline
    assert "\n" not in headline


def test_exit_without_an_exception_shows_its_last_words():
    """Row 1: the last line of stderr."""
    verdict = verdict_of(ended(0, 3, stderr_tail="warning\nthe data set is empty\n\n"))
    assert verdict.headline == "rank 0 on algo-1 exited with code 3: the data set is empty"


def test_text_without_stderr_shows_stdout():
    """Row 1: a rank that only prints."""
    verdict = verdict_of(ended(0, 3, stdout_tail="step 1\nstep 2\n"))
    assert "last lines of stdout of rank 0:\nstep 1\nstep 2" in verdict.text


# ---- properties


MESSAGES = ("", "ValueError: no", "ConnectionResetError: [Errno 104] Connection reset by peer")


def random_job(dice):
    """Records and evidence as a host could see them: at most one moment at which the launcher told everybody."""
    since = dice.choice((0, 105))
    records = []
    for rank in range(dice.randint(1, 6)):
        at = dice.randint(100, 110)
        number = dice.choice((0, 0, 9, 11, 15))
        code = 0 if number else dice.choice((0, 0, 1, 3))
        failing = bool(number or code)
        records.append(
            ended(
                rank,
                code,
                at,
                sig=number,
                failed=at - dice.choice((0, 0, 7)),
                told=since if since and since <= at else 0,
                phase=dice.choice((None, RUNNING, FINISHED, FINISHED)),
                message=dice.choice(MESSAGES) if failing else "",
            )
        )
    evidence = Evidence(
        stop_signal=dice.choice((0, 0, 15)) if since else 0,
        hang="hang: nothing for 60 s" if since and not dice.randint(0, 4) else "",
        hang_rank=dice.choice((None, 0)),
        oom_kills=dice.choice((0, 0, 1)),
        early_exit_ok=dice.choice((False, False, True)),
    )
    return records, evidence


def test_order_of_the_records_does_not_matter():
    """The verdict is a function of the set of records."""
    dice = random.Random(1)
    for _ in range(1000):
        records, evidence = random_job(dice)
        expected = judge(records, evidence, "train.py")
        dice.shuffle(records)
        assert judge(records, evidence, "train.py") == expected


def test_no_verdict_is_a_success_with_a_failed_rank():
    """Whatever the evidence: the code is not 0 and there is a text."""
    dice = random.Random(2)
    for _ in range(1000):
        records, evidence = random_job(dice)
        verdict = judge(records, evidence, "train.py")
        if any(record.failed for record in records):
            assert 0 < verdict.exit_code <= 255, (records, evidence)
        assert verdict.ok == (verdict.kind == "success") == (not verdict.text), (records, evidence)


def test_culprit_and_victims_are_apart():
    """A culprit is no victim, a victim has failed, and the headline is one line, first in the text."""
    dice = random.Random(3)
    for _ in range(1000):
        records, evidence = random_job(dice)
        verdict = judge(records, evidence, "train.py")
        failed = {record.rank for record in records if record.failed}
        assert set(verdict.victims) <= failed, (records, evidence)
        assert verdict.culprit is None or verdict.culprit.rank not in verdict.victims, (records, evidence)
        assert "\n" not in verdict.headline, (records, evidence)
        assert verdict.ok or verdict.text.startswith(verdict.headline), (records, evidence)


def test_no_culprit_is_later_than_a_failure_that_needs_no_explanation():
    """Who failed of itself, told by nobody and with no peer lost, is the culprit, or later than it."""
    dice = random.Random(4)
    for _ in range(1000):
        records, evidence = random_job(dice)
        verdict = judge(records, evidence, "train.py")
        if verdict.kind == "rank":
            own = [one for one in records if one.failed and not one.told_ns and not one.message.startswith("Conn")]
            assert all(verdict.culprit.failed_ns <= one.failed_ns for one in own), (records, evidence)


def test_no_record_at_all_is_no_success():
    """A job of which nothing is known has not succeeded."""
    assert judge([], Evidence()).exit_code != 0
