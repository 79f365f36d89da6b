"""One job of many simulated hosts: a real leader in one process, all members in another (see leader.py, members.py)."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jobs import RunFailed, clean_environment, memory_of

_HERE = Path(__file__).resolve().parent
_CODE = 3
IDLE_S = 3.0


class _Process:
    """One of the two; speaks lines of JSON."""

    def __init__(self, script: str, scratch: Path, *arguments: str) -> None:
        self.errors = scratch / f"{script}.stderr"
        with self.errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(_HERE / script), *arguments],
                cwd=scratch,
                env=clean_environment(scratch),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self.pid = self._process.pid

    def answer(self, order: str = "") -> dict[str, Any]:
        """What it says next, after ``order`` was given."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if order:
            self._process.stdin.write(order.encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RunFailed(f"{self.errors.stem} ended:\n{self.errors.read_text(errors='replace')[-1500:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu_s(self) -> float:
        """CPU time of its only thread so far."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def close(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()


def allow_descriptors(hosts: int) -> str:
    """Why so many hosts cannot be simulated here, "" when they can. Raises the soft limit for the processes to come."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hosts + 1200
    if hard != resource.RLIM_INFINITY and hard < wanted:
        return f"{hosts} hosts need {wanted} open files, the hard limit is {hard}"
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return ""


def scale(scratch: Path, hosts: int, ranks: int, secret: bool, idle: bool, profile: str = "") -> dict[str, float]:
    """Form a job of ``hosts`` hosts with ``ranks`` ranks each, and let a rank of the last one fail.

    ``idle``: look at the leader between the two for a while, as it does nothing but keep in touch with all hosts.
    """
    words = (str(hosts), str(ranks), "secret" if secret else "no-secret")
    leader = _Process("leader.py", scratch, *words, *((profile,) if profile else ()))
    members = None
    try:
        port = leader.answer()["port"]
        members = _Process("members.py", scratch, *words, str(port))
        members.answer()
        cpu_s = leader.cpu_s()
        formed = members.answer("connect")
        sample = {"formed_ms": formed["formed_ns"] / 1e6, "forming_cpu_s": leader.cpu_s() - cpu_s}
        if idle:
            cpu_s, began = leader.cpu_s(), time.monotonic()
            time.sleep(IDLE_S)
            sample["idle_cpu_percent"] = 100 * (leader.cpu_s() - cpu_s) / (time.monotonic() - began)
            sample["uss_mb"] = memory_of(leader.pid).private / 1e6
        failed = members.answer("fail")
        led = leader.answer()
        if failed["codes"] != [_CODE] or led["code"] != _CODE:
            raise RunFailed(f"codes {failed['codes']} on the members, {led['code']} on the leader, not {_CODE}")
        sample |= {
            "told_ms": failed["told_ns"] / 1e6,
            "verdict_ms": failed["verdict_ns"] / 1e6,
            "peak_rss_mb": led["peak_bytes"] / 1e6,
        }
        said = leader.errors.read_text(errors="replace")
        sample["warnings"] = float(sum("silent for" in line for line in said.splitlines()))
        return sample
    finally:
        leader.close()
        if members is not None:
            members.close()


def sizes_here(sizes: list[int]) -> list[int]:
    """Those of ``sizes`` that this machine allows; a line on stderr for each other."""
    allowed = []
    for size in sizes:
        reason = allow_descriptors(size)
        if reason:
            print(f"{size} hosts: left out: {reason}", file=sys.stderr)
        else:
            allowed.append(size)
    if os.sysconf("SC_NPROCESSORS_ONLN") < 2:
        print("one core: leader and members share it, which the numbers of `scale` will show", file=sys.stderr)
    return allowed
