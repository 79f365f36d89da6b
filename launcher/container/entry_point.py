"""What kind of thing the entry point is, and the argument vector that runs it.

Kinds, in the order in which the reference decides: a name ending in ``.sh`` is a command; with a ``setup.py`` in
the code directory the code is a package; a name ending in ``.py`` is a program; all else is a command. ``module``
(``-m``) is only chosen by asking for it.

No shell ever parses a name or an argument: a command is executed itself, or read by the interpreter that its
first line names, or else by ``/bin/sh`` as a script file.
"""

from __future__ import annotations

import os

from launcher.container.reading import shown
from launcher.errors import ContractError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "program"
PACKAGE = "package"
COMMAND = "command"
MODULE = "module"

# Linux reads at most this much of a "#!" line (BINPRM_BUF_SIZE, include/uapi/linux/binfmts.h).
_SHEBANG_BYTES = 256


class EntryPoint(Record):
    """An entry point that was found.

    Attributes:
        kind: "program", "package", "command" or "module".
        name: as given, relative to ``code_dir``; for a module its dotted name.
        code_dir: working directory of the script.
        path: absolute path of the file, "" for packages and modules.
        module: dotted name for ``python -m``, "" for programs and commands.
    """

    kind: str
    name: str
    code_dir: str
    path: str
    module: str


def entry_point_kind(name: str, code_dir: str, *, as_module: bool = False) -> EntryPoint:
    """Classify ``name``, relative to ``code_dir`` (or absolute, but inside it).

    A package's file name becomes its module name: ``.py`` is cut off and slashes turn into dots.

    Args:
        as_module: ``name`` is a dotted module name to be run with ``-m``.

    Raises:
        ContractError: the name is empty, begins with a dash, leads out of ``code_dir``, or names no file.
    """
    if not name:
        raise ContractError(code_dir, "entry point", '""', "the name of a script, such as train.py")
    if name.startswith("-"):
        raise ContractError(code_dir, "entry point", shown(name), "a name that does not begin with a dash")
    if as_module:
        return EntryPoint(kind=MODULE, name=name, code_dir=code_dir, path="", module=name)
    path = _inside(name, code_dir)
    if not name.endswith(".sh") and os.path.exists(os.path.join(code_dir, "setup.py")):
        relative = os.path.relpath(os.path.join(code_dir, name), code_dir)
        module = relative.removesuffix(".py").replace(os.sep, ".")
        return EntryPoint(kind=PACKAGE, name=name, code_dir=code_dir, path="", module=module)
    if not os.path.isfile(path):
        found = f"{shown(name)}, which is a directory" if os.path.isdir(path) else f"{shown(name)}, which is not there"
        raise ContractError(code_dir, "entry point", found, f"one of its files: {_listing(code_dir)}")
    kind = PROGRAM if name.endswith(".py") else COMMAND
    return EntryPoint(kind=kind, name=name, code_dir=code_dir, path=path, module="")


def command_for(
    entry_point: EntryPoint, args: Sequence[str], *, python: str, python_options: Sequence[str] = ()
) -> list[str]:
    """The argument vector. It is to be run with ``entry_point.code_dir`` as the working directory.

    Names stay relative, so that the script finds in ``argv[0]`` what it finds under the reference.

    Args:
        python: the interpreter for programs, packages and modules.
        python_options: the interpreter's own, before the script (``-u``).

    Raises:
        ContractError: a command's file cannot be read, or is a binary without permission to execute it.
    """
    if entry_point.kind == PROGRAM:
        return [python, *python_options, entry_point.name, *args]
    if entry_point.kind in (PACKAGE, MODULE):
        return [python, *python_options, "-m", entry_point.module, *args]
    return [*_command(entry_point), *args]


def make_executable(entry_point: EntryPoint) -> bool:
    """Give a command's file permission to execute to all who may read it. Returns whether that changed anything.

    A file system that refuses is no error here: scripts run without the permission, and for a binary
    :func:`command_for` says so.
    """
    if entry_point.kind != COMMAND:
        return False
    mode = os.stat(entry_point.path).st_mode & 0o7777
    wanted = mode | (mode & 0o444) >> 2
    if wanted == mode:
        return False
    try:
        os.chmod(entry_point.path, wanted)
    except OSError:
        return False
    return True


def _command(entry_point: EntryPoint) -> list[str]:
    name = entry_point.name
    file = name if os.path.isabs(name) else f".{os.sep}{name}"
    try:
        with open(entry_point.path, "rb") as opened:
            start = opened.read(_SHEBANG_BYTES)
    except OSError as error:
        found = f"an unreadable file ({error.strerror})"
        raise ContractError(entry_point.path, "", found, "a readable script or program") from error
    is_script, is_binary = start.startswith(b"#!"), start.startswith(b"\x7fELF")
    if (is_script or is_binary) and os.access(entry_point.path, os.X_OK):
        return [file]
    if is_binary:
        raise ContractError(entry_point.path, "", "a binary without permission to execute", "chmod +x")
    if is_script:
        # What the kernel does with the line: an interpreter, and the rest of the line as one argument.
        interpreter = os.fsdecode(start[2:].split(b"\n", 1)[0]).strip().split(None, 1)
        if interpreter:
            return [*interpreter, file]
    return ["/bin/sh", file]


def _inside(name: str, code_dir: str) -> str:
    """The real path of ``name``, which has to be in ``code_dir`` also after links are followed."""
    root = os.path.realpath(code_dir)
    path = "/" if "\0" in name else os.path.realpath(os.path.join(root, name))
    if path == "/" or os.path.commonpath([root, path]) != root:
        raise ContractError(code_dir, "entry point", shown(name), f"a path inside {code_dir}")
    return path


def _listing(directory: str) -> str:
    """Up to eight of the directory's entries, for an error text."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        return f"(cannot be listed: {error.strerror})"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "(it is empty)") + more
