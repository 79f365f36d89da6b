"""What hosts must have alike to run one job, and what to say when they do not."""

from __future__ import annotations

import hashlib
import os
import re
import sys

from launcher._version import __version__
from launcher.cluster.wire import PROTOCOL
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from launcher.job import Entry

CODE_BYTES = 64 << 20  # beyond that much content, names and sizes stand for the rest
CODE_FILES = 10_000  # what comes after these does not count
_NAMED_HOSTS = 256  # a longer host list is compared by its digest alone
_NAMED_FILES = 256  # more files are compared by one digest, so that a hello stays small
_SHOWN = 5
_DRIVER_FILE = "/proc/driver/nvidia/version"
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh"}


class HostFacts(Record):
    """What one host shows at hello.

    Attributes:
        hosts: the host list; empty when it is too long to be sent, and when it was malformed.
        hosts_count, hosts_digest: of the whole host list, in order.
        entry: kind and name of the entry point.
        args_digest: of the script's arguments.
        code_digest: of the user's code as far as it was read.
        files: path -> digest of each file of the code; empty when there are many.
        packages: normalised name -> version of what is installed for the launcher's Python.
        driver: version of the NVIDIA driver; empty when there is none.
    """

    host: str
    hosts: tuple[str, ...]
    hosts_count: int
    hosts_digest: str
    launcher: str
    protocol: int
    python: str
    entry: str
    args_digest: str
    code_digest: str
    files: dict[str, str]
    packages: dict[str, str]
    driver: str

    def as_message(self) -> dict[str, Any]:
        """The facts as JSON takes them."""
        return {**self.__dict__, "hosts": list(self.hosts)}

    @classmethod
    def from_message(cls, message: object, host: str) -> HostFacts:
        """The facts that ``host`` sent. A missing or malformed field is empty, and so differs from everyone's."""
        given = message if isinstance(message, dict) else {}
        texts = ("hosts_digest", "launcher", "python", "entry", "args_digest", "code_digest", "driver")
        hosts = given.get("hosts")
        if not isinstance(hosts, list) or not all(isinstance(name, str) for name in hosts):
            hosts = []
        return cls(
            host=host,
            hosts=tuple(hosts),
            hosts_count=_number(given.get("hosts_count")),
            protocol=_number(given.get("protocol")),
            files=_texts(given.get("files")),
            packages=_texts(given.get("packages")),
            **{name: value if isinstance(value := given.get(name), str) else "" for name in texts},
        )


def _number(value: object) -> int:
    return value if type(value) is int else -1


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        return {}
    return value


def collect(*, host: str, hosts: Sequence[str], entry: Entry, mode: str, driver_file: str = _DRIVER_FILE) -> HostFacts:
    """This host's facts. Reads the user's code and lists directories; starts nothing.

    Args:
        mode: the launcher's command; with ``train`` the user's code is all of the code directory.
    """
    files = dict(_digests(_code_files(entry, mode)))
    return HostFacts(
        host=host,
        hosts=tuple(hosts) if len(hosts) <= _NAMED_HOSTS else (),
        hosts_count=len(hosts),
        hosts_digest=_digest(hosts),
        launcher=__version__,
        protocol=PROTOCOL,
        python=f"{sys.implementation.name} {'.'.join(map(str, sys.version_info[:3]))}",
        entry=f"{entry.kind} {entry.name}",
        # The argument of a call is a file of this host's own.
        args_digest=_digest(entry.args if entry.kind != "call" else ()),
        code_digest=_digest([text for item in files.items() for text in item]),
        files=files if len(files) <= _NAMED_FILES else {},
        packages=installed(sys.path),
        driver=driver_version(driver_file),
    )


def installed(path: Sequence[str]) -> dict[str, str]:
    """Normalised name -> version of the distributions in the directories of ``path``; the first one found counts."""
    found: dict[str, str] = {}
    for directory in path:
        try:
            names = os.listdir(directory or ".")
        except OSError:
            continue  # zip files, and directories that are not there
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                # name-version.dist-info; an egg-info adds the Python that it is for, or has no version
                parts = name.rpartition(".")[0].split("-")
                if len(parts) > 1:
                    found.setdefault(re.sub(r"[-_.]+", "-", parts[0]).lower(), parts[1])
    return dict(sorted(found.items()))


def driver_version(file: str = _DRIVER_FILE) -> str:
    """Version of the loaded NVIDIA driver; empty without one."""
    try:
        with open(file, encoding="utf-8", errors="replace") as stream:
            found = re.search(r"\b\d+\.\d+(\.\d+)*\b", stream.readline())
    except OSError:
        return ""
    return found[0] if found else ""


# -- the user's code ---------------------------------------------------------------------------------------------


def _code_files(entry: Entry, mode: str) -> Iterator[tuple[str, str]]:
    """(path that means the same on all hosts, path on this one) of the files that are the user's code."""
    if mode == "train":
        return _files_below(entry.directory)
    if entry.kind == "script":
        return _files_of(os.path.join(entry.directory, entry.target))
    if entry.kind in ("module", "function"):
        # A module that is not in the directory is an installed one: its version tells.
        name = entry.target.partition(":")[0].split(".")[0]
        below = os.path.join(entry.directory, name)
        return _files_of(below if os.path.isdir(below) else below + ".py")
    if entry.kind == "command":
        return _command_files(entry)
    return iter(())


def _command_files(entry: Entry) -> Iterator[tuple[str, str]]:
    # Programs belong to the image; scripts are the user's.
    if _is_script(entry.target):
        yield from _files_of(entry.target)
    elif entry.args and os.path.basename(entry.target) in _SHELLS:
        yield from _files_of(os.path.join(entry.directory, entry.args[0]))


def _is_script(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return False


def _files_of(path: str) -> Iterator[tuple[str, str]]:
    if os.path.isdir(path):
        yield from _files_below(path, os.path.basename(os.path.normpath(path)) + "/")
    elif os.path.isfile(path):
        yield os.path.basename(path), path


def _files_below(directory: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """In an order that is the same on all hosts. Hidden names and what Python or pip makes by itself are left out."""
    try:
        with os.scandir(directory) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError:
        return
    names = {entry.name for entry in entries}
    made = {"__pycache__", *(("build",) if names & {"setup.py", "pyproject.toml"} else ())}
    for entry in entries:
        if entry.name.startswith(".") or entry.name in made or entry.name.endswith((".pyc", ".egg-info")):
            continue
        if entry.is_dir(follow_symlinks=False):  # a link to a directory may lead back up
            yield from _files_below(entry.path, f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield prefix + entry.name, entry.path


def _digests(files: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    left = CODE_BYTES
    for count, (name, path) in enumerate(files):
        if count == CODE_FILES:
            return
        try:
            size = os.stat(path).st_size
            if size > left:
                yield name, f"{size} bytes"
                continue
            left -= size
            with open(path, "rb") as file:
                yield name, hashlib.blake2b(file.read(size), digest_size=8).hexdigest()
        except OSError as error:
            yield name, f"unreadable: {error.strerror}"


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(4, "big") + data)
    return digest.hexdigest()


# -- comparing ---------------------------------------------------------------------------------------------------


def differences(mine: HostFacts, theirs: HostFacts) -> list[str]:
    """What the two hosts do not have alike, a line each; empty when they may work together."""
    a, b = mine.host, theirs.host
    lines = []
    for what, ours, other in (
        ("launcher", mine.launcher, theirs.launcher),
        ("launcher protocol", str(mine.protocol), str(theirs.protocol)),
        ("Python", mine.python, theirs.python),
        ("entry point", mine.entry, theirs.entry),
    ):
        if ours != other:
            lines.append(f"{what}: {ours} on {a}, {other or 'nothing'} on {b}")
    if mine.args_digest != theirs.args_digest:
        lines.append(f"script arguments: others on {b} than on {a}")
    lines += _host_list_differences(mine, theirs)
    if mine.code_digest != theirs.code_digest:
        lines += _code_differences(mine, theirs)
    if mine.packages != theirs.packages:
        changed = sorted(
            name for name in {*mine.packages, *theirs.packages} if mine.packages.get(name) != theirs.packages.get(name)
        )
        absent = "not installed"
        each = [
            f"{name}: {mine.packages.get(name, absent)} on {a}, {theirs.packages.get(name, absent)} on {b}"
            for name in changed
        ]
        lines += _cut(each, "packages")
    # Hosts with and without GPUs may train together.
    if mine.driver and theirs.driver and mine.driver != theirs.driver:
        lines.append(f"NVIDIA driver: {mine.driver} on {a}, {theirs.driver} on {b}")
    return lines


def _host_list_differences(mine: HostFacts, theirs: HostFacts) -> list[str]:
    if mine.hosts_digest == theirs.hosts_digest:
        return []
    a, b = mine.host, theirs.host
    if not mine.hosts or not theirs.hosts:
        return [f"host list: {mine.hosts_count} hosts on {a}, {theirs.hosts_count} on {b}, not the same ones"]
    here = [name for name in mine.hosts if name not in theirs.hosts]
    there = [name for name in theirs.hosts if name not in mine.hosts]
    if here or there:
        parts = [f"only {a} lists {_names(here)}"] if here else []
        parts += [f"only {b} lists {_names(there)}"] if there else []
        return [f"host list: {'; '.join(parts)}"]
    return [f"host list: the same hosts in another order: {_names(mine.hosts)} on {a}, {_names(theirs.hosts)} on {b}"]


def _code_differences(mine: HostFacts, theirs: HostFacts) -> list[str]:
    a, b = mine.host, theirs.host
    if not mine.files or not theirs.files:
        return [f"code: others on {b} than on {a}"]
    lines = []
    for name in sorted({*mine.files, *theirs.files}):
        if name not in theirs.files:
            lines.append(f"{name}: on {a}, not on {b}")
        elif name not in mine.files:
            lines.append(f"{name}: on {b}, not on {a}")
        elif mine.files[name] != theirs.files[name]:
            lines.append(f"{name}: another content on {b} than on {a}")
    return _cut(lines, "files")


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _cut(lines: list[str], what: str) -> list[str]:
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], f"and {more} more {what}"] if more > 0 else lines
