"""The measurements. Each case lists its variants (who, with which options) and measures one run of one variant."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contenders import Contender
from flood import Drain
from jobs import RANKS, Job, Memory, memory_of

Sample = dict[str, float]
SETTLE_S = (0.3, 0.4)  # from "all ranks run" to the fault; drawn, since some launchers look only each 100 ms


@dataclass(frozen=True)
class Variant:
    """A contender with options; ``label`` names it in the tables."""

    contender: Contender
    label: str
    options: tuple[str, ...] = ()

    def command(self, nproc: int, script: Path, *arguments: str) -> list[str]:
        """Build the command line of a run."""
        return self.contender.command(nproc, script, *arguments, options=self.options)


@dataclass(frozen=True)
class Case:
    """What is measured, how, and which numbers come out (name -> (unit, meaning)), the decisive one first."""

    name: str
    title: str
    measure: Callable[[Variant, Path], Sample]
    columns: dict[str, tuple[str, str]]
    variants: Callable[[list[Contender]], list[Variant]]
    few_runs: frozenset[str] = frozenset()  # labels that take minutes a run, and are run at most 3 times


def plain(contenders: list[Contender]) -> list[Variant]:
    """Every contender as it comes."""
    return [Variant(contender, contender.name) for contender in contenders]


def supervising(contenders: list[Contender]) -> list[Variant]:
    """Every contender that watches its ranks (the shell only starts them)."""
    return [variant for variant in plain(contenders) if variant.label != "shell"]


def _ms(ns: float) -> float:
    return ns / 1e6


def first_line(variant: Variant, scratch: Path) -> Sample:
    """Two ranks that import nothing heavy: time to their first lines, and to the end of the job."""
    with Job(variant.command(2, RANKS / "first_line.py"), 2, scratch) as job:
        ended = job.wait()
        if job.process.returncode != 0:
            raise job.fail(f"ended with {job.process.returncode}")
        lines = [int(text) - job.started_ns for text in job.read_ranks("first", 1.0)]
        return {"last_ms": _ms(max(lines)), "first_ms": _ms(min(lines)), "job_ms": _ms(ended - job.started_ns)}


def _after_fault(job: Job, fault_ns: int, ends: tuple[int, int]) -> Sample:
    return {
        "gone_ms": _ms(max(ends) - fault_ns),
        "launcher_ms": _ms(ends[0] - fault_ns),
        "code": float(job.process.returncode),
    }


def exit_code(variant: Variant, scratch: Path) -> Sample:
    """Rank 1 ends with 3 while rank 0 sleeps: time until the launcher and all ranks are gone."""
    with Job(variant.command(2, RANKS / "hold.py", "exit3"), 2, scratch) as job:
        job.meet_ranks()
        job.watch_ranks()
        time.sleep(random.uniform(*SETTLE_S))
        job.go()
        ends = job.wait_with_ranks()
        return _after_fault(job, int((job.dir / "failed.1").read_text()), ends)


def killed(variant: Variant, scratch: Path) -> Sample:
    """Rank 1 is killed with SIGKILL while rank 0 sleeps: time until the launcher and all ranks are gone."""
    with Job(variant.command(2, RANKS / "hold.py"), 2, scratch) as job:
        job.meet_ranks()
        job.watch_ranks()
        time.sleep(random.uniform(*SETTLE_S))
        fault_ns = time.monotonic_ns()
        os.kill(job.ranks[1], signal.SIGKILL)
        return _after_fault(job, fault_ns, job.wait_with_ranks())


def memory(variant: Variant, scratch: Path) -> Sample:
    """What the launcher and its helper processes hold while two ranks sleep."""
    with Job(variant.command(2, RANKS / "hold.py"), 2, scratch) as job:
        job.meet_ranks()
        time.sleep(1.0)
        held = job.launcher_memory()
        return {
            "uss_mb": held.private / 1e6,
            "pss_mb": held.share / 1e6,
            "processes": float(1 + len(job.helpers())),
        }


def import_torch(variant: Variant, scratch: Path) -> Sample:
    """Four ranks that import torch: time to the last rank's line after the import, and what the ranks then hold.

    Helper processes count as the ranks' (a zygote that the ranks are forked from holds what they share); only
    the launcher's own process does not. The sum of PSS also holds what is private to the group but shared inside it.
    """
    with Job(variant.command(4, RANKS / "import_torch.py"), 4, scratch) as job:
        lines = [int(text) - job.started_ns for text in job.read_ranks("first")]
        job.meet_ranks()
        time.sleep(0.2)
        held = sum((memory_of(pid) for pid in (*job.ranks, *job.helpers())), Memory())
        whole = held + memory_of(job.process.pid)
        job.go()
        job.wait()
        return {
            "last_ms": _ms(max(lines)),
            "first_ms": _ms(min(lines)),
            "ranks_uss_mb": held.private / 1e6,
            "ranks_pss_mb": held.share / 1e6,
            "job_pss_mb": whole.share / 1e6,
        }


def import_variants(contenders: list[Contender]) -> list[Variant]:
    """Ours with and without preload; the others as they come."""
    variants = []
    for contender in contenders:
        if contender.name == "launcher":
            variants.append(Variant(contender, "launcher --preload torch", ("--preload", "torch")))
        variants.append(Variant(contender, contender.name))
    return variants


def flood_variants(contenders: list[Contender]) -> list[Variant]:
    """All as they come (torchrun's ranks then write to its own stdout); torchrun with its two log paths too."""
    variants = []
    for contender in contenders:
        if contender.name == "accelerate":
            continue  # torchrun's agent without options for logs: the row of torchrun says it
        variants.append(Variant(contender, contender.name))
        if contender.name == "torchrun":
            variants.append(Variant(contender, "torchrun --tee 3", ("--tee", "3")))
            variants.append(Variant(contender, "torchrun --redirects 3", ("--redirects", "3")))
    return variants


def flood(variant: Variant, scratch: Path) -> Sample:
    """One rank writes lines as fast as it can, the other one line each 50 ms: what reaches the reader, and when."""
    drain = Drain(scratch)
    command = variant.command(2, RANKS / "flood.py", str(drain.seconds), str(drain.max_bytes))
    with Job(command, 2, scratch, pipe=True) as job:
        return drain.run(job)


CASES = {
    case.name: case
    for case in (
        Case(
            "first-line",
            "Start: exec of the launcher to the first line of a script, 2 ranks, nothing heavy imported",
            first_line,
            {
                "last_ms": ("ms", "last rank's first line"),
                "first_ms": ("ms", "first rank's first line"),
                "job_ms": ("ms", "whole job"),
            },
            plain,
        ),
        Case(
            "exit",
            "A rank ends with exit(3), the other sleeps: to the launcher's exit with all ranks gone",
            exit_code,
            {
                "gone_ms": ("ms", "launcher and all ranks gone"),
                "launcher_ms": ("ms", "launcher gone"),
                "code": ("", "launcher's exit code"),
            },
            supervising,
        ),
        Case(
            "kill",
            "A rank is killed with SIGKILL, the other sleeps: to the launcher's exit with all ranks gone",
            killed,
            {
                "gone_ms": ("ms", "launcher and all ranks gone"),
                "launcher_ms": ("ms", "launcher gone"),
                "code": ("", "launcher's exit code"),
            },
            supervising,
        ),
        Case(
            "memory",
            "Memory of the launcher and all its helper processes while 2 ranks sleep",
            memory,
            {
                "uss_mb": ("MB", "private (USS)"),
                "pss_mb": ("MB", "with its share of shared pages (PSS)"),
                "processes": ("", "processes"),
            },
            supervising,
        ),
        Case(
            "import",
            "4 ranks that import torch",
            import_torch,
            {
                "last_ms": ("ms", "last rank's first line after the import"),
                "first_ms": ("ms", "first rank's"),
                "ranks_uss_mb": ("MB", "private memory of ranks and helpers (sum of USS)"),
                "ranks_pss_mb": ("MB", "ranks and helpers, sum of PSS"),
                "job_pss_mb": ("MB", "the same with the launcher"),
            },
            import_variants,
        ),
        Case(
            "flood",
            "One rank floods its stdout, the other writes a line each 50 ms; the launcher's stdout is a pipe",
            flood,
            {
                "delay_p99_ms": ("ms", "delay of the other rank's lines, p99"),
                "delay_median_ms": ("ms", "median"),
                "delay_max_ms": ("ms", "max"),
                "missing_lines": ("", "of 80 such lines never came"),
                "mixed_lines": ("", "came inside a line of the flood"),
                "flood_mb_s": ("MB/s", "flood written"),
                "through_share": ("", "share of the flood that came through in time"),
                "peak_rss_mb": ("MB", "launcher's peak resident size"),
                "peak_uss_mb": ("MB", "launcher's peak private memory"),
            },
            flood_variants,
            frozenset({"torchrun --tee 3"}),
        ),
    )
}
