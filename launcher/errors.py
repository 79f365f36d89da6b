"""The one exception hierarchy, and the exit codes of the launcher's own (the README has the table).

Every message says what was wrong, where (file and field, option, host or rank), and what to do. Codes 64 to 77
follow sysexits.h in spirit; they are used only when no rank's own failure came first.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher.evidence import Verdict

EXIT_USAGE = 64
EXIT_CONTRACT = 65
EXIT_CLUSTER = 69
EXIT_INTERNAL = 70
EXIT_OUTPUT = 74
EXIT_HANG = 75
EXIT_REFUSED = 77


class LauncherError(Exception):
    """Base of every error raised by this package. ``exit_code`` is what the command line ends with."""

    exit_code = EXIT_INTERNAL


class UsageError(LauncherError):
    """A bad option, option value, or argument of a library call."""

    exit_code = EXIT_USAGE


class ContractError(LauncherError):
    """Missing or malformed input under ``/opt/ml``.

    Attributes:
        file: path of the file that was read.
        field: the field in it (dotted), or ``""`` for the file as a whole.
    """

    exit_code = EXIT_CONTRACT

    def __init__(self, file: str, field: str, found: str, expected: str) -> None:
        self.file, self.field, self.found, self.expected = file, field, found, expected
        where = f"{file}: field {field!r}" if field else file
        super().__init__(f"{where}: found {found}; expected {expected}")

    def __reduce__(self) -> tuple[type[ContractError], tuple[str, str, str, str]]:
        return type(self), (self.file, self.field, self.found, self.expected)


class ClusterError(LauncherError):
    """A host could not be reached, or was lost."""

    exit_code = EXIT_CLUSTER


class OutputError(LauncherError):
    """Output could not be written."""

    exit_code = EXIT_OUTPUT


def of_machine(error: OSError) -> OutputError:
    """The error for a limit of this machine (open files, say) that no place knows more about."""
    place = f": {error.filename}" if error.filename else ""
    return OutputError(f"{error.strerror or error}{place}")


class RefusedError(LauncherError):
    """A peer was refused: authentication, version, or another host list."""

    exit_code = EXIT_REFUSED


class StoppedError(LauncherError):
    """The job was stopped by a signal before any rank was started. ``exit_code`` is 128 plus the signal."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.exit_code = 128 + number
        super().__init__(f"stopped by signal {number} before any rank was started")


class InternalError(LauncherError):
    """A fault of the launcher itself; worth a bug report."""

    exit_code = EXIT_INTERNAL


class CollectiveError(LauncherError):
    """A collective could not be finished. The group is unusable from then on, on every rank of it.

    Attributes:
        reason: ``lost`` (a rank's process ended), ``left`` (a rank closed its end, or gave the group up), ``timeout``
            (a rank was not seen in time), ``mismatch`` (a rank called something else), ``interrupted`` (this rank
            itself stopped waiting), ``closed`` (the call came after the end of the group), ``system`` (the operating
            system refused something the group needs).
        rank: the culprit, as the job numbers it; -1: not known.
        host: the culprit's host; ``""``: not known.
        operation: the collective, ``join`` while the group was being made.
        sequence: number of that collective in its group, from 1; 0 while the group was being made.
    """

    exit_code = EXIT_CLUSTER

    def __init__(
        self,
        message: str,
        reason: str = "system",
        rank: int = -1,
        host: str = "",
        operation: str = "",
        sequence: int = 0,
    ) -> None:
        self.reason, self.rank, self.host, self.operation, self.sequence = reason, rank, host, operation, sequence
        super().__init__(message)

    def __reduce__(self) -> tuple[type[CollectiveError], tuple[str, str, int, str, str, int]]:
        return type(self), (str(self), self.reason, self.rank, self.host, self.operation, self.sequence)


class DataError(LauncherError):
    """A channel's data can not be read, or is not what it should be.

    Attributes:
        problem: ``truncated`` (the file ends inside a record), ``malformed`` (bytes that are none of the format),
            ``mismatch`` (a whole record, but not of the channel's schema), ``changed`` (the file is not as it was),
            ``unreadable`` (the operating system refused it).
        file: its path; ``""``: not one file's matter.
        offset: of the place in the file, in bytes; -1: the file as a whole.
        record: number of the record in its file, from 0; -1: not known.
    """

    exit_code = EXIT_CONTRACT

    PROBLEMS = ("truncated", "malformed", "mismatch", "changed", "unreadable")

    def __init__(
        self, message: str, problem: int | str = "malformed", file: str = "", offset: int = -1, record: int = -1
    ) -> None:
        self.problem = self.PROBLEMS[problem] if isinstance(problem, int) else problem
        self.file, self.offset, self.record = file, offset, record
        super().__init__(message)

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str, int, int]]:
        return type(self), (str(self), self.problem, self.file, self.offset, self.record)


class ServingError(LauncherError):
    """A model could not be served. ``exit_code`` is that of the code that failed, where there is one."""

    def __init__(self, exit_code: int, message: str) -> None:
        self.exit_code = exit_code
        super().__init__(message)

    def __reduce__(self) -> tuple[type[ServingError], tuple[int, str]]:
        return type(self), (self.exit_code, str(self))


class JobFailed(LauncherError):
    """The job ended with a failure. ``verdict`` names the root cause; ``exit_code`` is the culprit's."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.exit_code = verdict.exit_code
        super().__init__(verdict.headline)
