"""Fault table, rows 29-31: floods, readers that do not read, disks that are full. And what a log line looks like."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

PREFIX = re.compile(rb"\[algo-1 r(\d+) l(\d+)\] |\[launcher\] ")


class Reader(threading.Thread):
    """Reads a console line by line, keeping what does not belong to rank 0, and checking the rest."""

    def __init__(self, stream) -> None:
        super().__init__(daemon=True)
        self.stream = stream
        self.shown = {0: 0, 1: 0}
        self.kept: list[bytes] = []
        self.broken: list[bytes] = []
        self.start()

    def run(self) -> None:
        with self.stream:
            for line in self.stream:
                found = PREFIX.match(line)
                if found is None or not line.endswith(b"\n"):
                    self.broken.append(line[:200])
                    continue
                rank = int(found[1]) if found[1] else None
                if rank is not None:
                    self.shown[rank] += 1
                if rank != 0:
                    self.kept.append(line)


def _start_piped(job, *args: str) -> BinaryIO:
    """Starts a job with its stdout in a pipe; returns the reading end, which nobody has read yet."""
    fifo = job.directory / "pipe"
    os.mkfifo(fifo)
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reading, True)
    usual, job.stdout_path = job.stdout_path, fifo
    job.start(*args)
    job.stdout_path = usual
    return os.fdopen(reading, "rb")


def _rss_kib(pid: int) -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) if found else 0
    return 0


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@pytest.mark.slow
def test_flood_of_one_rank(job, wait_until):
    """Row 29: 300 MB of bytes, bars and long lines from one rank: little memory, whole lines, a capped file, and every
    line of the other rank."""
    job.script(r"""
        import os, time
        if os.environ["RANK"] == "0":
            binary = bytes(byte for byte in range(256) if byte != 10) * 40 + b"\n"
            bars = b"".join(b"\r%3d%% \xf0\x9f\x9a\x80" % percent for percent in range(100)) + b"\n"
            torn = b"\xe2\x82" * 500 + b"\xff\xfe\n"
            block = (binary + bars + torn) * 80
            written = os.write(1, b"begin\n")
            def put(data):
                view = memoryview(data)
                while view:
                    view = view[os.write(1, view):]
                return len(data)
            written += put(b"\xc3\xa4" * 5_000_000 + b"\n")
            while written < 300_000_000:
                written += put(block)
            put(b"the end\n")
            open("flooded", "w").write("yes")
        else:
            number = 0
            while not os.path.exists("flooded"):
                os.write(1, b"line %06d of rank 1, in one piece\n" % number)
                number += 1
                time.sleep(0.001)
            open("count", "w").write(str(number))
    """)
    reader = Reader(_start_piped(job, "-n", "2", "--log-max-mb", "8", "train.py"))
    launcher = job.process.pid
    peak = 0

    def sample() -> bool:
        nonlocal peak
        guardians = [pid for pid in _children(launcher) if "launcher-guard" in _comm(pid)]
        peak = max(peak, sum(_rss_kib(pid) for pid in (launcher, *guardians)))
        return job.process.poll() is not None

    wait_until(sample, "the end of the flood", 90)
    assert job.process.returncode == 0, job.output()
    reader.join(30)
    assert not reader.broken, reader.broken[:3]
    count = int((job.directory / "count").read_text())
    lines = [line.partition(b"] ")[2] for line in reader.kept if line.startswith(b"[algo-1 r1 l1] ")]
    assert lines == [b"line %06d of rank 1, in one piece\n" % number for number in range(count)]
    assert 0 < peak < 100 * 1024, f"{peak} KiB"
    parts = list(job.rank_file(0, "stdout.log").parent.glob("stdout.log*"))
    assert sum(path.stat().st_size for path in parts) <= 9 << 20
    assert job.rank_file(0, "stdout.log").read_bytes().endswith(b"the end\n")


def _comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def test_every_byte_is_in_the_file(job):
    """Row 29: below its cap the rank's own file holds exactly what the rank wrote, whatever the bytes are."""
    job.script(r"""
        import os, random
        rank = os.environ["RANK"]
        source = random.Random(int(rank))
        pieces = [source.randbytes(3_000_000), b"x" * 10_000_000 + b"\n", b"\r 1%\r 2%\r 3%", b"\n\n\0\0\n\xff\xfe"]
        pieces += [source.randbytes(source.randrange(1, 5000)) for _ in range(500)] + [b"no newline at the end"]
        for fd, name in ((1, "out"), (2, "err")):
            with open(name + rank, "wb") as expected:
                for piece in pieces:
                    view = memoryview(piece)
                    while view:
                        view = view[os.write(fd, view):]
                    expected.write(piece)
    """)
    assert job.run("-n", "2", "train.py", deadline_s=60) == 0
    for rank in (0, 1):
        for name, file in (("out", "stdout.log"), ("err", "stderr.log")):
            got, expected = job.rank_file(rank, file).read_bytes(), (job.directory / f"{name}{rank}").read_bytes()
            assert got == expected, f"rank {rank} {file}: {len(got)} bytes, {len(expected)} expected"


def test_bars_become_lines_and_no_rank_breaks_anothers_line(job):
    """Row 29: of a progress bar the console shows its last state; halves of lines wait for their other half."""
    job.script(r"""
        import os, time
        rank = os.environ["RANK"]
        os.write(1, b"first half of " + rank.encode())
        open("half" + rank, "w").write("x")
        while not (os.path.exists("half0") and os.path.exists("half1")):
            time.sleep(0.005)
        os.write(1, b", second half of " + rank.encode() + b"\n")
        for percent in range(0, 101, 10):
            os.write(2, b"\rbar %d%%" % percent)
        os.write(2, b"\n")
        os.write(1, b"ends without a newline")
    """)
    assert job.run("-n", "2", "train.py") == 0
    for rank in (0, 1):
        out = [line for line in job.stdout.splitlines() if line.startswith(f"[algo-1 r{rank} l{rank}] ")]
        assert [line.partition("] ")[2] for line in out] == [
            f"first half of {rank}, second half of {rank}",
            "ends without a newline",
        ]
        assert f"[algo-1 r{rank} l{rank}] bar 100%\n" in job.stderr
    assert "\r" not in job.stderr
    assert len(job.stdout.splitlines()) == 4


def test_unfinished_line_is_shown_while_the_rank_waits(job):
    """Row 29: a line without an end is shown after a while, with its prefix, and not a second time."""
    job.script("""
        import os, time
        if os.environ["RANK"] == "0":
            os.write(1, b"waiting for data ...")
            while not os.path.exists("go"):
                time.sleep(0.01)
            os.write(1, b" got it\\n")
    """)
    job.start("-n", "2", "train.py")
    assert job.wait_for_line("waiting for data ...") == "[algo-1 r0 l0] waiting for data ..."
    (job.directory / "go").write_text("go")
    assert job.wait() == 0
    assert job.stdout.count("waiting for data ...") == 1
    assert "got it" in job.stdout


def test_prompt_of_a_single_rank_is_shown_as_it_is(job, wait_until):
    """A job of one rank writes straight through: a prompt and a bar appear at once, without a prefix."""
    job.script("""
        import os, time
        os.write(1, b"name? ")
        os.write(2, b"\\r 10%")
        while not os.path.exists("go"):
            time.sleep(0.01)
        os.write(1, b"x\\n")
    """)
    job.start("-n", "1", "train.py")
    wait_until(lambda: job.stdout == "name? ", f"the prompt, but: {job.stdout!r}")
    wait_until(lambda: "\r 10%" in job.stderr_path.read_bytes().decode(), "the bar")
    (job.directory / "go").write_text("go")
    assert job.wait() == 0
    assert job.stdout == "name? x\n"


# ---- row 30


def test_reader_that_comes_back_is_told_what_it_missed(job):
    """Row 30: nobody reads the console: the ranks work on; the reader who comes back sees how much was not shown."""
    job.script("""
        import os, time
        rank = os.environ["RANK"]
        total = 40_000 if rank == "0" else 10
        for number in range(total):
            os.write(1, b"line %06d ................................................................\\n" % number)
        open("done" + rank, "w").write("done")
        while not os.path.exists("go"):
            time.sleep(0.01)
        os.write(1, b"back\\n")
    """)
    console = _start_piped(job, "-n", "2", "train.py")
    for rank in (0, 1):
        job.wait_for_file(f"done{rank}")
    reader = Reader(console)
    (job.directory / "go").write_text("go")
    assert job.wait() == 0, job.output()
    reader.join(30)
    assert not reader.broken
    notes = [line for line in reader.kept if line.startswith(b"[launcher] local rank 0: ")]
    dropped = sum(int(re.search(rb"(\d+) lines \(\d+ bytes\) were not shown", note)[1]) for note in notes)
    assert dropped > 0
    assert reader.shown[0] + dropped == 40_001
    assert reader.shown[1] == 11
    assert len(job.rank_file(0, "stdout.log").read_bytes().splitlines()) == 40_001


def test_job_ends_although_nobody_reads(job):
    """Row 30: a console that is never read delays neither the ranks nor the end of the job, and its code is kept."""
    job.script("""
        import os, sys
        for number in range(40_000):
            os.write(1, b"line %06d ................................................................\\n" % number)
        sys.exit(3)
    """)
    with _start_piped(job, "-n", "2", "train.py"):
        assert job.wait() == 3, job.output()
    assert "exited with code 3" in job.stderr


def test_reader_that_goes_away_does_not_end_the_job(job):
    """Row 30: `launcher ... | head -1`: the job runs on, its files are complete."""
    job.script("""
        import os, time
        os.write(1, b"first\\n")
        while not os.path.exists("go"):
            time.sleep(0.01)
        for number in range(5000):
            os.write(1, b"line %06d\\n" % number)
    """)
    with _start_piped(job, "-n", "2", "train.py") as console:
        assert console.readline().endswith(b"first\n")
    (job.directory / "go").write_text("go")
    assert job.wait() == 0, job.output()
    for rank in (0, 1):
        assert len(job.rank_file(rank, "stdout.log").read_bytes().splitlines()) == 5001


# ---- row 31


def _with_mounts(*commands: str) -> tuple[str, ...]:
    """A wrapper that gives the launcher mounts of its own, seen by nobody else."""
    return ("unshare", "--mount", "sh", "-ec", "; ".join((*commands, 'exec "$@"')), "sh")


def _small(path: Path, size: str = "64k", fill: bool = True) -> tuple[str, ...]:
    mount = f"mount -t tmpfs -o size={size} tmpfs '{path}'"
    filler = f"dd if=/dev/zero of='{path}/filler' bs=4096 2>/dev/null || true"
    return (mount, filler) if fill else (mount,)


EXIT_3 = """
    import os, sys, time
    if os.environ["RANK"] == "0":
        print("no space for me", file=sys.stderr)
        sys.exit(3)
    time.sleep(600)
"""


@pytest.mark.root
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_output_directory_that_cannot_be_written(job, as_root, how):
    """Row 31: the failure goes to stderr when output/ is full or read-only, the code is the rank's."""
    job.script(EXIT_3)
    output = job.tree() / "output"
    mounts = (
        _small(output)
        if how == "full"
        else (f"mount --bind '{output}' '{output}'", f"mount -o remount,bind,ro '{output}'")
    )
    code = job.run("--log-dir", job.directory / "logs", "-n", "2", "train.py", wrapper=_with_mounts(*mounts))
    assert code == 3, job.output()
    assert "Traceback" not in job.stderr
    assert "rank 0 on algo-1 exited with code 3: no space for me" in job.stderr
    assert "last lines of stderr of rank 0:" in job.stderr
    reason = "No space left on device" if how == "full" else "Read-only file system"
    assert f"cannot write {output}/failure ({reason})" in job.stderr.replace("failure.json", "failure")


@pytest.mark.root
def test_success_with_an_output_directory_that_cannot_be_written(job, as_root):
    """Row 31: a job that succeeded is one, also when its marker cannot be written."""
    job.script("print('trained')")
    output = job.tree() / "output"
    wrapper = _with_mounts(f"mount -t tmpfs -o ro tmpfs '{output}'")
    assert job.run("--log-dir", job.directory / "logs", "-n", "2", "train.py", wrapper=wrapper) == 0, job.output()
    assert "Traceback" not in job.stderr
    assert "the job succeeded, but cannot write" in job.stderr


@pytest.mark.root
def test_log_disk_that_fills_up(job, as_root):
    """Row 31: the disk of the log files fills up during the run: said once per file; console and code are right."""
    job.script("""
        import os, sys
        for number in range(2000):
            print(f"line {number} " + 1000 * "x")
        if os.environ["RANK"] == "0":
            raise ValueError("the real failure")
        import time
        time.sleep(600)
    """)
    logs = job.directory / "logs"
    logs.mkdir()
    wrapper = _with_mounts(*_small(logs, "256k", fill=False))
    assert job.run("--log-dir", logs, "-n", "2", "train.py", wrapper=wrapper) == 1, job.output()
    assert "ValueError: the real failure" in job.failure
    assert job.failure.startswith("rank 0 on algo-1 ")
    assert "[algo-1 r0 l0] line 1999 " in job.stdout
    notes = [line for line in job.stderr.splitlines() if "stdout.log: No space left on device" in line]
    assert 1 <= len(notes) <= 2
    assert not [line for line in job.stderr.splitlines() if line.startswith("Traceback")]


@pytest.mark.root
@pytest.mark.parametrize("how", ["full", "no room for the ranks", "read-only"])
def test_log_directory_that_is_useless_from_the_start(job, as_root, how):
    """Row 31: a log directory chosen by the user in which nothing can be made: a clear line, code 74, no traceback."""
    job.script("print('not reached')")
    logs = job.directory / "logs"
    logs.mkdir()
    mounts = {
        "full": _small(logs),
        "no room for the ranks": (f"mount -t tmpfs -o size=64k,nr_inodes=3 tmpfs '{logs}'",),
        "read-only": (f"mount -t tmpfs -o ro tmpfs '{logs}'",),
    }[how]
    code = job.run("--log-dir", logs, "-n", "2", "train.py", wrapper=_with_mounts(*mounts))
    assert "Traceback" not in job.stderr, job.stderr
    assert code == 74, job.output()
    assert str(logs) in job.stderr
    assert "not reached" not in job.stdout


# ---- which stream of which rank goes where

ECHO = '#!/bin/sh\necho "out $LOCAL_RANK"; echo "err $LOCAL_RANK" >&2\n'


def _echo(job, *options: str) -> tuple[set[int], set[int]]:
    """Runs 12 ranks of a shell script; which local ranks' stdout and stderr reached the console."""
    job.script(ECHO, "echo.sh").chmod(0o755)
    assert job.run("-n", "12", *options, "echo.sh") == 0, job.output()
    shown = []
    for text, word in ((job.stdout, "out"), (job.stderr, "err")):
        lines = re.findall(rf"^\[algo-1 r(\d+) l(\d+)\] {word} (\d+)$", text, re.MULTILINE)
        assert all(rank == local == said for rank, local, said in lines)
        assert len(lines) == len(set(lines))
        shown.append({int(rank) for rank, _, _ in lines})
    return shown[0], shown[1]


@pytest.mark.parametrize(
    ("options", "out", "err"),
    [
        ((), range(12), range(12)),
        (("--redirects", "3"), (), ()),
        (("--redirects", "1"), (), range(12)),
        (("--redirects", "0-9:3,10:1"), (11,), (10, 11)),
        (("--redirects", "3", "--tee", "10-11:3,2:1"), (2, 10, 11), (10, 11)),
        (("--local-ranks-filter", "0,9-11"), (0, 9, 10, 11), (0, 9, 10, 11)),
        (("--redirects", "8-11:1", "--local-ranks-filter", "7-9"), (7,), (7, 8, 9)),
    ],
)
def test_maps_of_streams_reach_beyond_rank_9(job, options, out, err):
    """A 51: --redirects, --tee and --local-ranks-filter with ranges; files hold everything whatever is shown."""
    assert _echo(job, *options) == (set(out), set(err))
    for rank in range(12):
        assert job.rank_file(rank, "stdout.log").read_text() == f"out {rank}\n"
        assert job.rank_file(rank, "stderr.log").read_text() == f"err {rank}\n"


def test_no_log_files_at_all(job):
    """--log-dir /dev/null keeps no output in files; console and failure are as ever."""
    job.script(EXIT_3)
    scratch = job.directory / "scratch"
    scratch.mkdir()
    assert job.run("--log-dir", os.devnull, "-n", "2", "train.py", env={"TMPDIR": str(scratch)}) == 3
    assert "[algo-1 r0 l0] no space for me" in job.stderr
    assert "no space for me" in job.failure
    assert not [*scratch.rglob("*.log"), *job.base.rglob("*.log")]
    assert "logs of all ranks" not in job.stderr
