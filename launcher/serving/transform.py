"""``python -m launcher transform``: a batch-transform job on this machine, with the handlers of the server.

As the platform does it ("Use Batch Transform", AWS developer guide): each file of the input becomes one of the output
with ``.out`` added to its name; a file may be split into records, records put together into requests, and the answers
into the output again.
"""

from __future__ import annotations

import asyncio
import os

from launcher.errors import ContractError, OutputError, ServingError
from launcher.record import Record
from launcher.serving.exchange import Entry
from launcher.serving.failures import InvocationError
from launcher.serving.hub import Hub

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from launcher.serving.pool import Pool
    from launcher.serving.processes import Processes
    from launcher.serving.settings import Settings

NONE, LINE = "None", "Line"
SINGLE, MULTI = "SingleRecord", "MultiRecord"
_MIB = 1 << 20
_SHOWN_ERRORS = 10


class Job(Record):
    """What is to be done.

    Attributes:
        source: a directory, or one file.
        target: the directory for the answers.
        content_type: of each request; "" for that of the file's suffix.
        accept: what the answers shall be; "" for the model's own choice.
        split: NONE (a file is a request) or LINE.
        strategy: SINGLE (a request has one record) or MULTI (as many as fit into ``payload``).
        assemble: NONE (answers one after the other) or LINE (a line break between two).
        payload: bytes of a request at most; 0: no bound.
        together: requests at a time.
    """

    source: str
    target: str
    content_type: str
    accept: str
    split: str
    strategy: str
    assemble: str
    payload: int
    together: int


class Input(Record):
    """A file to be transformed: where it is, the name of its output, and its content type."""

    path: str
    name: str
    content_type: str


_SUFFIXES = {
    ".csv": "text/csv",
    ".json": "application/json",
    ".jsonl": "application/jsonlines",
    ".ndjson": "application/jsonlines",
    ".npy": "application/x-npy",
    ".npz": "application/x-npz",
    ".txt": "text/plain",
    ".pbr": "application/x-recordio-protobuf",
    ".recordio": "application/x-recordio-protobuf",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
}


def find_inputs(job: Job) -> list[Input]:
    """The files of the job, by name.

    Raises:
        ContractError: there are none, or the content type of one is not known.
    """
    if os.path.isfile(job.source):
        found = [(job.source, os.path.basename(job.source))]
    elif os.path.isdir(job.source):
        found = [
            (os.path.join(folder, name), os.path.relpath(os.path.join(folder, name), job.source))
            for folder, _, names in os.walk(job.source)
            for name in names
            if not name.startswith(".")
        ]
    else:
        raise ContractError(job.source, "", "no such file or directory", "what is to be transformed")
    if not found:
        raise ContractError(job.source, "", "an empty directory", "files to transform")
    inputs = []
    for path, name in sorted(found):
        kind = job.content_type or _SUFFIXES.get(os.path.splitext(name)[1].lower(), "")
        if not kind:
            raise ContractError(path, "", "a suffix that tells no content type", "--content-type")
        inputs.append(Input(path, name, kind))
    return inputs


def requests_of(path: str, job: Job) -> Iterator[bytes]:
    """The bodies that a file becomes.

    Raises:
        ContractError: a record that is larger than a request may be.
        OSError: the file can not be read.
    """
    if job.split == NONE:
        with open(path, "rb") as file:
            body = file.read()
        _check_size(path, 1, body, job)
        yield body
        return
    pending: list[bytes] = []
    size = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            record = line.rstrip(b"\r\n")
            if not record:
                continue
            _check_size(path, number, record, job)
            if pending and (job.strategy == SINGLE or (job.payload and size + len(record) + 1 > job.payload)):
                yield b"\n".join(pending)
                pending, size = [], 0
            pending.append(record)
            size += len(record) + 1
    if pending:
        yield b"\n".join(pending)


def _check_size(path: str, number: int, body: bytes, job: Job) -> None:
    if job.payload and len(body) > job.payload:
        found = f"a record of {len(body)} bytes (line {number})" if job.split == LINE else f"{len(body)} bytes"
        raise ContractError(path, "", found, f"{job.payload} at most: --payload-mb, or --split Line")


class Transform:
    """One job."""

    def __init__(
        self, job: Job, settings: Settings, processes: Processes, make: Callable[[Callable[[int, str], None]], Pool]
    ) -> None:
        self._job, self._settings, self._processes = job, settings, processes
        self._pool = make(self._fatal)
        self._hub = Hub(processes, lambda: [self._pool], lambda: self._fatal(70, "the guardian process has ended"))
        self._broken: asyncio.Future[None] | None = None
        self._code, self._line = 0, ""
        self.errors: list[str] = []
        self.requests = 0

    def run(self, inputs: Sequence[Input], slots: Sequence[int]) -> None:
        """Transforms all ``inputs``.

        Raises:
            ServingError: the model could not be served, or requests failed; the message has each.
            OutputError: an answer could not be written.
        """
        asyncio.run(self._run(inputs, slots))
        if self._code:
            raise ServingError(self._code, self._line)
        if self.errors:
            shown = "".join(f"\n  {error}" for error in self.errors[:_SHOWN_ERRORS])
            more = f"\n  and {len(self.errors) - _SHOWN_ERRORS} more" if len(self.errors) > _SHOWN_ERRORS else ""
            raise ServingError(
                1, f"{len(self.errors)} of {self.requests} requests failed; their files have no output:{shown}{more}"
            )

    def _fatal(self, code: int, line: str) -> None:
        self._code, self._line = code, line
        if self._broken is not None and not self._broken.done():
            self._broken.set_result(None)

    async def _run(self, inputs: Sequence[Input], slots: Sequence[int]) -> None:
        self._broken = asyncio.get_running_loop().create_future()
        await self._hub.open()
        self._pool.start(slots)
        room = asyncio.Semaphore(self._job.together)
        work = asyncio.ensure_future(self._all(inputs, room))
        await asyncio.wait([work, self._broken], return_when=asyncio.FIRST_COMPLETED)
        try:
            if work.done():
                work.result()
            else:
                work.cancel()
        finally:
            await self._pool.close(self._settings.drain_s)
            self._hub.close()

    async def _all(self, inputs: Sequence[Input], room: asyncio.Semaphore) -> None:
        """Reads one file after the other; its requests go out as there is room, also while older ones are answered."""
        files: set[asyncio.Task[None]] = set()
        try:
            for one in inputs:
                answers: list[asyncio.Task[bytes | None]] = []
                for body in requests_of(one.path, self._job):
                    await room.acquire()
                    self.requests += 1
                    answers.append(asyncio.ensure_future(self._ask(one, len(answers), body, room)))
                files.add(asyncio.ensure_future(self._finish(one, answers)))
                for done in [task for task in files if task.done()]:
                    files.discard(done)
                    done.result()
            await asyncio.gather(*files)
        except OSError as error:
            raise ContractError(one.path, "", error.strerror or str(error), "a file that can be read") from error
        finally:
            for task in files:
                task.cancel()

    async def _finish(self, one: Input, answers: list[asyncio.Task[bytes | None]]) -> None:
        parts = await asyncio.gather(*answers)
        whole = [part for part in parts if part is not None]
        if len(whole) == len(parts):
            self._write(one, whole)

    async def _ask(self, one: Input, number: int, body: bytes, room: asyncio.Semaphore) -> bytes | None:
        try:
            request_id = f"{one.name}#{number}"
            texts = (request_id, one.content_type, self._job.accept, "")
            entry = Entry(texts, body, (one.content_type, self._job.accept))
            self._pool.submit(entry)
            reply = await entry.future
            answer = reply.body if reply.stream is None else await reply.stream.whole()
            if reply.status >= 400:
                raise InvocationError(reply.status, answer[:200].decode("utf-8", "replace"))
            return answer
        except InvocationError as error:
            self.errors.append(f"{one.path}, request {number + 1}: {error.status} {error.kind}: {error}")
            return None
        finally:
            room.release()

    def _write(self, one: Input, parts: list[bytes]) -> None:
        path = os.path.join(self._job.target, one.name + ".out")
        if self._job.assemble == LINE:
            content = b"".join(part if part.endswith(b"\n") else part + b"\n" for part in parts)
        else:
            content = b"".join(parts)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = path + ".tmp"
            with open(temporary, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
