"""Runs a command under a seccomp filter: limited.py PROFILE COMMAND...

The profiles: ``docker``: what Docker's default profile refuses to a container without extra capabilities;
``docker-before-4.8``: the same on a kernel that is older than the line it draws there; ``pidfd``, ``vm``: single calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

# System calls of x86-64 that Docker's profile (profiles/seccomp/default.json in github.com/moby/moby) does not list, or
# lists for a capability only, as far as a library of collectives could want them.
_OLD = {
    "pivot_root": 155,
    "mount": 165,
    "umount2": 166,
    "get_mempolicy": 239,
    "mbind": 237,
    "set_mempolicy": 238,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "migrate_pages": 256,
    "unshare": 272,
    "move_pages": 279,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "setns": 308,
    "kcmp": 312,
    "bpf": 321,
    "userfaultfd": 323,
}
_NEWEST_OLD = 334  # rseq; from 424 on the numbers of all architectures are the same
# Of the newer ones, those that it allows; a call that a profile does not know is refused.
_NEW_ALLOWED = {424, 434, 436, 437, 439, 441, 444, 445, 446, 447, 448, 449}
_CLONE3, _PIDFD_OPEN, _PTRACE, _VM_READ, _VM_WRITE = 435, 434, 101, 310, 311
_LAST = 600

_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_X86_64 = 0xC000003E
_NR, _ARCH = 0, 4  # offsets in struct seccomp_data
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2


def refused(profile: str) -> dict[int, int]:
    """Number of a system call -> the error it gets."""
    if profile == "pidfd":
        return {_PIDFD_OPEN: errno.ENOSYS}
    if profile == "vm":
        return {_VM_READ: errno.EPERM, _VM_WRITE: errno.EPERM}
    new = {number: errno.EPERM for number in range(_NEWEST_OLD + 1, _LAST) if number not in _NEW_ALLOWED}
    calls = {**new, **dict.fromkeys(_OLD.values(), errno.EPERM), _CLONE3: errno.ENOSYS}
    if profile == "docker-before-4.8":
        calls |= {_PTRACE: errno.EPERM, _VM_READ: errno.EPERM, _VM_WRITE: errno.EPERM, _PIDFD_OPEN: errno.ENOSYS}
    return calls


def program(calls: dict[int, int]) -> bytes:
    """The filter, in the kernel's classic BPF: struct sock_filter is (code, jump if true, jump if false, value)."""

    def step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, true, false, value)

    steps = [step(_LOAD, _ARCH), step(_JUMP_EQUAL, _X86_64, 1, 0), step(_RETURN, _ALLOW), step(_LOAD, _NR)]
    for number, error in calls.items():
        steps += [step(_JUMP_EQUAL, number, 0, 1), step(_RETURN, _ERRNO | error)]
    return b"".join([*steps, step(_RETURN, _ALLOW)])


def install(code: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    text = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(text)))
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(header), 0, 0)):
        words = [word if not isinstance(word, int) else ctypes.c_ulong(word) for word in arguments]
        if libc.prctl(*words) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({arguments[0]})")


def main() -> None:
    profile, *command = sys.argv[1:]
    if platform.machine() != "x86_64":
        sys.exit(f"the profiles are written for x86_64, this is {platform.machine()}")
    install(program(refused(profile)))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
