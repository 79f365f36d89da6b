"""What error texts and signals usually mean, in one reviewed table."""

from __future__ import annotations

import re
import signal

# A rank says so when another one is gone: evidence that it is not the cause. Texts of Gloo, NCCL, UCX, Open MPI and of
# the operating system, as they appear in exceptions and on stderr.
PEER_LOST = re.compile(
    r"Connection reset by peer|Connection closed by (?:remote )?peer|Connection refused|Broken pipe|BrokenPipeError"
    r"|ConnectionResetError|ConnectionRefusedError|ConnectionAbortedError|Connection timed out|No route to host"
    r"|remote process exited|ncclRemoteError|NCCL communicator was aborted|Watchdog caught collective operation timeout"
    r"|Socket (?:Timeout|closed)|Broken pipe or Connection reset|failed to recv, got 0 bytes|EOFError(?!:)"
    # memory of a process of this machine, read by UCX and by Open MPI, when that process has just been killed (ESRCH)
    r"|process_vm_(?:readv|writev)\([^\n]{1,200}No such process|Read -1, expected \d{1,20}, errno = 3\b"
    r"|recvValue failed|sendBytes failed|The client socket has (?:failed|timed out)|DistNetworkError"
)

# What a rank's NCCL watchdog says when the others did not come: number and kind of the collective.
WATCHDOG = re.compile(r"Watchdog caught collective operation timeout: WorkNCCL\(SeqNum=(\d{1,20}), OpType=(\w{1,40})")

# How a collective of ours ends on the ranks that cannot finish it: its name and number, the rank to blame and its host
# (CollectiveError; other libraries wrap it in errors of their own, so its class is not asked for).
COLLECTIVE = re.compile(
    r"\b(?P<operation>join|barrier|allreduce|reduce_scatter|all_gather|broadcast|reduce|all_to_all) #"
    r"(?P<sequence>\d{1,19})(?: of [\d,]{1,27} B| of group [^\n:]{1,200})?: "
    r"(?P<reason>rank (?P<rank>\d{1,9})\b(?: on (?P<host>[^\s,:;()]{1,255}))?[^\n]{1,300})"
)

# (pattern, what it is, what to do). The first that is found wins, so the specific ones come first.
_KNOWN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (
            r"DataLoader worker .* is killed by signal: Bus error|insufficient shared memory"
            r"|unable to open shared memory",
            "shared memory is full: a container's /dev/shm is 64 MB and cannot be raised on SageMaker; use "
            "num_workers=0, torch.multiprocessing.set_sharing_strategy('file_system'), or a loader without workers",
        ),
        (
            r"DataLoader worker .* is killed by signal: Killed",
            "a DataLoader worker was killed from outside, most often by the memory limit: fewer workers, smaller "
            "prefetch_factor, or more memory",
        ),
        (
            r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
            "the GPU's memory is full (the message says who holds it): smaller batch, accumulation, checkpointing",
        ),
        (
            r"device-side assert triggered",
            "an index or value check failed on the GPU; rerun with CUDA_LAUNCH_BLOCKING=1 for the true line",
        ),
        (
            r"an illegal memory access was encountered|CUDA_ERROR_ILLEGAL_ADDRESS",
            "a GPU kernel touched memory that is not its own; rerun with CUDA_LAUNCH_BLOCKING=1 for the true line",
        ),
        (
            r"no kernel image is available for execution|sm_\d+ is not compatible",
            "this build has no code for this GPU: install a build for its architecture",
        ),
        (
            r"CUDA driver version is insufficient|NVIDIA driver on your system is too old",
            "the host's driver is older than this CUDA build needs",
        ),
        (
            r"Xid\b.*\b(?:48|63|64|79|94|95)\b|uncorrectable ECC error",
            "the GPU reports a hardware fault: replace the host",
        ),
        (
            r"NCCL WARN.*No space left on device",
            "NCCL found /dev/shm full: set NCCL_SHM_DISABLE=1 or free shared memory",
        ),
        (r"No space left on device", "a disk is full: the message names the file"),
        (r"Address already in use", "a port is taken by another process; --master-port 0 takes a free one"),
        (r"Too many open files", "the limit of open files was reached: raise ulimit -n, or share fewer tensors"),
        (
            r"Cannot allocate memory|std::bad_alloc|MemoryError",
            "host memory is exhausted, or a limit on it was reached (ulimit -v, cgroup)",
        ),
        (
            r"Resource temporarily unavailable|can't start new thread",
            "the limit of processes or threads was reached (ulimit -u)",
        ),
        (
            r"terminate called without an active exception",
            "a thread of native code was still at work when the program ended; torch's Gloo is known for it: call "
            "torch.distributed.destroy_process_group() at the end of the script",
        ),
        (r"ModuleNotFoundError|ImportError", "a package is missing in this image: add it to requirements.txt"),
    )
)

_SIGNAL_TEXT: dict[int, str] = {
    signal.SIGSEGV: "native code touched memory that is not its own: an extension module, or a mismatch of two builds",
    signal.SIGABRT: "native code gave up (failed assertion, uncaught C++ exception, or a watchdog): see its last lines",
    signal.SIGILL: "an instruction that this CPU does not have: a binary built for a newer CPU",
    signal.SIGFPE: "an integer division by zero, or the like, in native code",
    signal.SIGTERM: "SIGTERM, not sent by the launcher: something else in this container, or a user, stopped the rank",
    signal.SIGINT: "SIGINT, not sent by the launcher",
    signal.SIGHUP: "SIGHUP, not sent by the launcher",
    signal.SIGPIPE: "it wrote to a pipe that nobody reads",
    signal.SIGXCPU: "the CPU time limit (ulimit -t) was reached",
    signal.SIGXFSZ: "the file size limit (ulimit -f) was reached",
    signal.SIGSYS: "a system call that the sandbox (seccomp) forbids",
}


def known_cause(text: str) -> str:
    """A sentence on what the first known pattern in ``text`` means and what to do; "" when none is known."""
    for pattern, advice in _KNOWN:
        if pattern.search(text):
            return advice
    return ""


def signal_reason(
    number: int, *, oom_kills: int, peak: str, shm: str, shm_full: bool, shm_small: bool, was_stopped: bool
) -> str:
    """What probably sent the signal, or why the kernel did.

    Args:
        oom_kills: kills that the cgroup counted during the attempt.
        peak, shm: the rank's peak memory and the fill of /dev/shm, in words.
        shm_small: whether /dev/shm is so small that a job may well have filled it.
        shm_full: whether /dev/shm had no room when the rank died.
        was_stopped: whether the rank was stopped (SIGSTOP) when the launcher ended it.
    """
    if number == signal.SIGKILL:
        if oom_kills:
            return (
                "the kernel killed it at the container's memory limit: smaller batches, fewer workers, or more memory"
            )
        stopped = "; it had been stopped by SIGSTOP" if was_stopped else ""
        return f"SIGKILL not sent by launcher, no OOM record in its cgroup ({peak}): sent from outside{stopped}"
    if number == signal.SIGBUS:
        if shm_full:
            return (
                f"/dev/shm is full ({shm}): a container's is 64 MB and cannot be raised on SageMaker; use "
                "num_workers=0 or a loader without shared memory, or remove what fills it"
            )
        if shm_small:  # a loader's segments have no name: when their process is dead, the space is free again
            return (
                f"a page of a mapped file could not be had: /dev/shm ({shm} now) was too small (a container's is 64 MB "
                "and cannot be raised on SageMaker; use num_workers=0 or a loader without shared memory), the file was "
                "cut short, or its disk is full"
            )
        return (
            f"a page of a mapped file could not be had: the file was cut short, or its disk is full (/dev/shm: {shm})"
        )
    return _SIGNAL_TEXT.get(number, "")
