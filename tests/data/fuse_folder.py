"""Serves the files of a folder, read-only, through FUSE: what a FastFile channel is to the kernel.

    python fuse_folder.py FOLDER MOUNTPOINT [FAULT]

Says "ready" when it is mounted, then a line for each request to read: name, offset and bytes. ``FAULT`` is a name and
an offset ("a.bin:4096"): reading from there on fails with EIO. Ends when it is unmounted. The messages are those of
linux/fuse.h, protocol 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from pathlib import Path

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ = 1, 2, 3, 14, 15
_STATFS, _RELEASE, _FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 17, 18, 25, 26, 27, 28, 29
_INTERRUPT, _DESTROY, _BATCH_FORGET = 36, 38, 42
_UNANSWERED = {_FORGET, _BATCH_FORGET, _INTERRUPT}
_EMPTY = {_RELEASE, _RELEASEDIR, _FLUSH, _DESTROY}
_MOST_READ = 1 << 20
_MAX_PAGES = 1 << 22  # a flag of INIT: requests of more than 32 pages
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_REQUEST = struct.Struct("<IIQQIIII")
_ROOT = 1


def _attributes(node: int, path: Path) -> bytes:
    found = path.stat()
    kind = stat.S_IFDIR | 0o755 if path.is_dir() else stat.S_IFREG | 0o644
    times = [value for ns in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns) for value in divmod(ns, 10**9)]
    return struct.pack(
        "<QQQQQQIIIIIIIIII",
        *(node, found.st_size, found.st_blocks, *times[::2], *times[1::2]),
        *(kind, 1, 0, 0, 0, 4096, 0),
    )


class Folder:
    """Answers requests; the files are nodes 2, 3, ... in the order of their names."""

    def __init__(self, folder: Path, fault: str) -> None:
        self.nodes = {_ROOT: folder} | dict(enumerate(sorted(folder.iterdir()), _ROOT + 1))
        self.numbers = {os.fsencode(path.name): node for node, path in self.nodes.items() if node != _ROOT}
        name, _, offset = fault.partition(":")
        self.fault = (name, int(offset or 0))

    def answer(self, operation: int, node: int, body: bytes) -> bytes:
        """Raises OSError: what the kernel is to be told."""
        if operation == _INIT:
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, _MOST_READ, _MAX_PAGES, 16, 12, _MOST_READ, 1, 256, 0, 0)
        if operation == _LOOKUP:
            found = self.numbers.get(body.rstrip(b"\0"))
            if found is None:
                raise OSError(errno.ENOENT, "")
            return struct.pack("<QQQQII", found, 0, 60, 60, 0, 0) + _attributes(found, self.nodes[found])
        if operation == _GETATTR:
            return struct.pack("<QII", 60, 0, 0) + _attributes(node, self.nodes[node])
        if operation in (_OPEN, _OPENDIR):
            return struct.pack("<QIi", 0, 0, 0)
        if operation == _READ:
            return self.read(node, *struct.unpack_from("<8xQI", body))
        if operation == _READDIR:
            return self.entries(*struct.unpack_from("<8xQI", body))
        if operation == _STATFS:
            return struct.pack("<QQQQQIIII24x", 1 << 20, 0, 0, 1 << 10, 0, 4096, 255, 4096, 0)
        if operation in _EMPTY:
            return b""
        raise OSError(errno.ENOSYS, "")

    def read(self, node: int, offset: int, size: int) -> bytes:
        path = self.nodes[node]
        print(path.name, offset, size, flush=True)
        if path.name == self.fault[0] and offset + size > self.fault[1]:
            raise OSError(errno.EIO, "")
        with path.open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    def entries(self, begin: int, size: int) -> bytes:
        out = b""
        for number, (name, node) in enumerate(self.numbers.items()):
            padded = name + b"\0" * (-len(name) % 8)
            entry = struct.pack("<QQII", node, number + 1, len(name), stat.S_IFREG >> 12) + padded
            if number >= begin and len(out) + len(entry) <= size:
                out += entry
        return out


def main() -> None:
    """Mounts and serves."""
    folder, mountpoint = Path(sys.argv[1]), sys.argv[2]
    served = Folder(folder, sys.argv[3] if len(sys.argv) > 3 else ":")
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,max_read={_MOST_READ}".encode()
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    if libc.mount(b"launcher-test", os.fsencode(mountpoint), b"fuse", flags, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    print("ready", flush=True)
    while True:
        try:
            request = os.read(device, _MOST_READ + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return  # unmounted
            raise
        length, operation, unique, node, *_ = _REQUEST.unpack_from(request)
        if operation in _UNANSWERED:
            continue
        failed = 0
        try:
            body = served.answer(operation, node, request[_REQUEST.size : length])
        except OSError as error:
            failed, body = error.errno or errno.EIO, b""
        os.write(device, struct.pack("<IiQ", 16 + len(body), -failed, unique) + body)


if __name__ == "__main__":
    main()
