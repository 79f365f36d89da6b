"""From a request to its answer: the user's functions, and the defaults for those that there are not.

One path for sync and async functions: it is a coroutine, which a worker without an event loop runs by hand; it never
waits unless a function of the user's does.
"""

from __future__ import annotations

import os
import sys

from launcher.errors import ContractError
from launcher.record import Record
from launcher.serving.context import one_line
from launcher.serving.failures import InvocationError
from launcher.serving.functions import find_functions, import_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import Any

    from launcher.serving.context import Context
    from launcher.serving.functions import Function
    from launcher.serving.media import MediaType

# The reference gives these to input_fn as text, all others as bytes.
_AS_TEXT = ("application/json", "text/csv")
# What an input_fn raises of these is taken for a bad request; all else for a fault of the code.
_BAD_INPUT = (ValueError, KeyError, IndexError, UnicodeError)


# Headers of clients that are kept with what they mean.
_MOST_KEPT = 256
_MOST_SAID = 500  # characters of an error


class WorkerPlan(Record):
    """What a worker is told about its model."""

    model_dir: str
    code_dir: str
    program: str
    program_required: bool
    model_name: str = ""
    gpu: int | None = None
    allow_pickle: bool = False
    batch_size: int = 1
    default_accept: str = "application/json"
    server_version: str = ""
    log_level: str = "info"
    concurrency: int = 64


class Request:
    """One request, as a worker gets it. ``headers``: names and values in turn."""

    __slots__ = ("accept", "body", "content_type", "headers", "id", "request_id", "session_id")

    def __init__(
        self,
        id: int,
        request_id: str,
        content_type: str,
        accept: str,
        session_id: str,
        headers: tuple[str, ...],
        body: bytes,
    ) -> None:
        self.id, self.request_id, self.content_type, self.accept = id, request_id, content_type, accept
        self.session_id, self.headers, self.body = session_id, headers, body


class Answer:
    """``body`` is bytes, or an iterator (``stream``; asynchronous: ``__anext__``) of the user's that gives pieces."""

    __slots__ = ("body", "content_type", "headers", "status", "stream")

    def __init__(self, body: Any, content_type: str, context: Context) -> None:
        self.content_type = one_line(context.content_type or content_type)
        self.status = context.status or 200
        self.headers = context.response_headers
        self.stream = hasattr(body, "__next__") or hasattr(body, "__anext__")
        self.body: Any = body if self.stream else as_bytes(body, self.content_type)


class Handler:
    """The model of a worker and the functions around it."""

    def __init__(self, plan: WorkerPlan) -> None:
        self.plan = plan
        self._model: Any = None
        self._module: ModuleType | None = None
        self._functions: dict[str, Function] = {}
        self._reads: dict[str, MediaType] = {}
        self._writes: dict[str, str] = {}
        self.waits = False  # some function is async
        self.asynchronous = False  # one that is called for requests

    # ---- loading

    def find(self) -> None:
        """Imports the user's code.

        Raises:
            ContractError: what is there can not serve.
            Exception: whatever the import raises.
        """
        self._module = import_program(self.plan.code_dir, self.plan.program, self.plan.program_required)
        self._functions = find_functions(self._module)
        waiting = [name for name, function in self._functions.items() if function.asynchronous]
        self.waits = bool(waiting)
        self.asynchronous = any(name not in _AT_LOAD for name in waiting)
        talk = self._functions.get("bidirectional_fn")
        if talk is not None and self.asynchronous and not talk.asynchronous:
            others = ", ".join(name for name in waiting if name not in _AT_LOAD)
            file = getattr(self._module, "__file__", None) or ""
            raise ContractError(file, "bidirectional_fn", f"one that is not async beside {others}", "async def, too")

    async def load(self, context: Context) -> str:
        """Loads the model and warms it up. Returns a line that says by what code.

        Raises:
            ContractError: there is nothing that could be loaded.
            Exception: whatever the user's code raises.
        """
        plan, functions = self.plan, self._functions
        if "pre_model_fn" in functions:
            await _result(functions["pre_model_fn"](plan.model_dir, context))
        if "model_fn" in functions:
            self._model = await _result(functions["model_fn"](plan.model_dir, context))
        elif "transform_fn" not in functions or self._has_model_file():
            self._model = self._default_model(context)
        if "model_warmup_fn" in functions:
            await _result(functions["model_warmup_fn"](plan.model_dir, self._model, context))
        if self._module is None:
            return f"no code: default functions for {plan.model_dir}"
        return f"{', '.join(functions) or 'no functions'} of {getattr(self._module, '__file__', self._module.__name__)}"

    def prepare(self) -> None:
        """What the first request would else wait for; called when the server knows that this worker is ready."""
        if "input_fn" not in self._functions and "transform_fn" not in self._functions:
            from launcher.serving import codecs, values

            if not values.has_numpy():
                log("NumPy is not installed: JSON stays Python's own values; CSV, NPY, NPZ and records are refused")
            codecs.warm_up()

    def _has_model_file(self) -> bool:
        return os.path.isdir(self.plan.model_dir) and any(
            name.endswith((".pt", ".pth", ".pt2", ".safetensors")) for name in os.listdir(self.plan.model_dir)
        )

    def _default_model(self, context: Context) -> Any:
        from launcher.serving.defaults import load_model

        create = self._functions.get("create_model")
        make = None if create is None else lambda: create(self.plan.model_dir, context)
        return load_model(self.plan.model_dir, self.plan.gpu, self.plan.allow_pickle, make)

    # ---- requests

    async def answer(self, request: Request, context: Context) -> Answer:
        """The answer of one request.

        Raises:
            InvocationError: what to tell the client instead.
        """
        try:
            if "transform_fn" in self._functions:
                return await self._transform(request, context)
            data = await self._input(request, context)
            return await self._output(request, await self._predict(data, context), context)
        except Exception as error:
            raise as_failure(error) from error

    def converse(self, messages: Any, context: Context) -> Answer:
        """The handler's side of a conversation: a generator of messages, text (str) or bytes.

        Args:
            messages: what the client says, an iterator of the same; asynchronous where the function is.

        Raises:
            InvocationError: what to tell the client instead.
        """
        if "bidirectional_fn" not in self._functions:
            raise InvocationError(404, "this model has no bidirectional_fn", "NotFound")
        try:
            made = self._functions["bidirectional_fn"](messages, self._model, context)
        except Exception as error:
            raise as_failure(error) from error
        if not hasattr(made, "__next__") and not hasattr(made, "__anext__"):
            if hasattr(made, "close"):
                made.close()  # a coroutine, of an async function that never says `yield`
            raise InvocationError(500, f"bidirectional_fn gave {type(made).__name__}; expected a generator of messages")
        context.content_type = ""  # messages have none
        return Answer(made, "", context)

    async def answer_together(
        self, requests: Sequence[Request], contexts: Sequence[Context]
    ) -> list[Answer | InvocationError]:
        """The answers of requests that came together: one failure is one request's.

        They are predicted in one call where that can be: with ``batch_predict_fn``, which gets the list of inputs, or
        with arrays of the same columns, whose rows are put together. When such a call fails, each is tried alone.
        """
        results: list[Answer | InvocationError | None] = [None] * len(requests)
        inputs: dict[int, Any] = {}
        for i, request in enumerate(requests):
            try:
                if "transform_fn" in self._functions:
                    results[i] = await self._transform(request, contexts[i])
                else:
                    inputs[i] = await self._input(request, contexts[i])
            except Exception as error:
                results[i] = as_failure(error)
        predictions = await self._predict_together(inputs, contexts)
        for i, data in inputs.items():
            try:
                prediction = predictions[i] if i in predictions else await self._predict(data, contexts[i])
                results[i] = await self._output(requests[i], prediction, contexts[i])
            except Exception as error:
                results[i] = as_failure(error)
        return [result for result in results if result is not None]

    async def _transform(self, request: Request, context: Context) -> Answer:
        accept = first_choice(request.accept, self.plan.default_accept)
        essence, body = _typed_body(request, self._media_type(request))
        made = await _result(self._functions["transform_fn"](self._model, body, essence, accept, context))
        return _answer(made, accept, context)

    async def _input(self, request: Request, context: Context) -> Any:
        if "input_fn" not in self._functions:
            from launcher.serving import codecs

            return codecs.decode(request.body, self._media_type(request))
        essence, body = _typed_body(request, self._media_type(request))
        try:
            return await _result(self._functions["input_fn"](body, essence, context))
        except _BAD_INPUT as error:
            if hasattr(error, "status_code"):
                raise
            raise InvocationError(400, f"input_fn: {_one_line(error)}", "BadInput") from error

    async def _predict(self, data: Any, context: Context) -> Any:
        if "predict_fn" in self._functions:
            return await _result(self._functions["predict_fn"](data, self._model, context))
        if "batch_predict_fn" in self._functions:
            return (await _result(self._functions["batch_predict_fn"]([data], self._model, context)))[0]
        from launcher.serving.defaults import predict

        try:
            return predict(data, self._model)
        except (ValueError, TypeError, IndexError, OverflowError, RuntimeError) as error:
            # Nothing of this is the user's code: what a network or an estimator refuses is the input's shape or kind,
            # but for what PyTorch says of a GPU.
            if isinstance(error, RuntimeError) and (type(error) is not RuntimeError or "CUDA" in str(error)):
                raise
            raise InvocationError(400, f"the model does not take this input: {_one_line(error)}", "BadInput") from error

    async def _predict_together(self, inputs: dict[int, Any], contexts: Sequence[Context]) -> dict[int, Any]:
        """Predictions of as many of ``inputs`` as can be made in one call; none when that call failed."""
        if len(inputs) < 2:
            return {}
        context = contexts[next(iter(inputs))]
        try:
            if "batch_predict_fn" in self._functions:
                made = list(
                    await _result(self._functions["batch_predict_fn"](list(inputs.values()), self._model, context))
                )
                if len(made) != len(inputs):
                    raise ValueError(f"batch_predict_fn gave {len(made)} predictions for {len(inputs)} inputs")
                return dict(zip(inputs, made, strict=True))
            return await self._predict_rows(inputs, context)
        except Exception as error:
            log(f"a batch of {len(inputs)} requests failed ({_one_line(error)}); each is tried alone")
            return {}

    async def _predict_rows(self, inputs: dict[int, Any], context: Context) -> dict[int, Any]:
        numpy = sys.modules.get("numpy")
        arrays = list(inputs.values())
        like = arrays[0]
        if numpy is None or not all(
            isinstance(array, numpy.ndarray)
            and array.ndim >= 2
            and array.shape[1:] == like.shape[1:]
            and array.dtype == like.dtype
            and len(array)
            for array in arrays
        ):
            return {}
        made = await self._predict(numpy.concatenate(arrays), context)
        bounds = numpy.cumsum([len(array) for array in arrays])
        if not hasattr(made, "__getitem__") or isinstance(made, (str, bytes, dict)) or len(made) != bounds[-1]:
            return {}  # not a prediction a row: each is asked alone
        return {i: made[end - len(array) : end] for i, array, end in zip(inputs, arrays, bounds.tolist(), strict=True)}

    async def _output(self, request: Request, prediction: Any, context: Context) -> Answer:
        if "output_fn" in self._functions:
            accept = first_choice(request.accept, self.plan.default_accept)
            return _answer(await _result(self._functions["output_fn"](prediction, accept, context)), accept, context)
        from launcher.serving import codecs, values

        chosen = self._chosen(request.accept)
        if hasattr(prediction, "__next__") or hasattr(prediction, "__anext__"):
            return Answer(prediction, chosen, context)
        try:
            return Answer(codecs.encode(prediction, chosen), chosen, context)
        except values.NotEncodable as error:
            if request.accept in ("", "*/*"):  # the client has no part in it
                raise InvocationError(500, f"{error}; write an output_fn, or let predict_fn return an array") from error
            raise

    def _chosen(self, accept: str) -> str:
        """What the default output_fn writes for an Accept header. Clients send the same one each time: it is kept."""
        if accept in self._writes:
            return self._writes[accept]
        from launcher.serving import codecs, media

        default = self.plan.default_accept
        try:
            essence = media.parse_media_type(default).essence
            offered = sorted(codecs.writable(), key=lambda name: name != essence)
            chosen = media.choose(default if accept in ("", "*/*") else accept, offered)
        except ValueError as error:
            raise InvocationError(400, f"header Accept: {error}") from error
        if chosen is None:
            written = ", ".join(codecs.writable())
            raise InvocationError(406, f"no answer in {accept}; the default output_fn writes {written}")
        if len(self._writes) < _MOST_KEPT:
            self._writes[accept] = chosen
        return chosen

    def _media_type(self, request: Request) -> MediaType:
        """Of the request's body; kept as above."""
        text = request.content_type
        if text in self._reads:
            return self._reads[text]
        from launcher.serving import media

        try:
            # The SDK's clients always send one; without one it is what most of them send.
            kind = media.parse_media_type(text or "application/json")
        except ValueError as error:
            raise InvocationError(400, f"header Content-Type: {error}") from error
        if len(self._reads) < _MOST_KEPT:
            self._reads[text] = kind
        return kind


_AT_LOAD = ("pre_model_fn", "model_fn", "model_warmup_fn", "create_model")


async def _result(value: Any) -> Any:
    """``value``, or what it gives when it is awaited."""
    return await value if hasattr(value, "__await__") else value


def run(coroutine: Any) -> Any:
    """The result of a coroutine of :class:`Handler` where no function of the user's waits.

    Raises:
        RuntimeError: one does.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("a function that is not `async def` gave something to wait for; declare it with async def")


def first_choice(accept: str, default: str) -> str:
    """The content type that a client wants most, without parameters; ``default`` where it has no wish."""
    from launcher.serving import media

    if accept in ("", "*/*"):
        return default
    try:
        ranges = media.parse_accept(accept)
        home = media.parse_media_type(default).essence
    except ValueError as error:
        raise InvocationError(400, f"header Accept: {error}") from error
    for range_, quality in ranges:
        essence = range_.essence
        if quality <= 0:
            break
        if essence == "*/*" or (essence.endswith("/*") and home.startswith(essence[:-1])):
            return default
        if not essence.endswith("/*"):
            return essence
    raise InvocationError(406, f"header Accept: {accept} names no content type to write")


def _typed_body(request: Request, kind: MediaType) -> tuple[str, str | bytes]:
    """Content type and body for the user's functions: the type in lower case and without parameters."""
    if kind.essence not in _AS_TEXT:
        return kind.essence, bytes(request.body)
    charset = kind.parameter("charset") or "utf-8"
    try:
        return kind.essence, str(request.body, charset)
    except LookupError:
        raise InvocationError(415, f"header Content-Type: charset {charset!r} is not known") from None
    except UnicodeDecodeError as error:
        raise InvocationError(400, f"the body is not {charset}: byte {error.start} ({error.reason})") from None


def _answer(made: Any, accept: str, context: Context) -> Answer:
    """Of what output_fn or transform_fn returned: an answer, or a pair of it and its content type."""
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], str) and "/" in made[1]:
        return Answer(made[0], made[1], context)
    return Answer(made, accept, context)


def as_bytes(value: Any, content_type: str) -> bytes:
    """A body, or a piece of one: text in UTF-8, bytes as they are, all else as its content type has it."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if value is None:
        return b""
    from launcher.serving import codecs, media

    try:
        essence = media.parse_media_type(content_type).essence
    except ValueError:
        essence = ""
    return codecs.encode(value, essence if essence in codecs.ENCODED else "application/json")


def as_failure(error: BaseException) -> InvocationError:
    """``error`` as the client is told: its own status where it has one, or what its kind says."""
    if isinstance(error, InvocationError):
        failure = error
    else:
        status = getattr(error, "status_code", None)
        codec = _codec_status(error)
        if codec:
            failure = InvocationError(codec, _one_line(error))
        elif isinstance(status, int) and 400 <= status <= 599:
            failure = InvocationError(status, _one_line(error, named=False), type(error).__name__)
        elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the second is PyTorch's
            failure = InvocationError(507, f"out of memory: {_one_line(error)}")
        else:
            failure = InvocationError(500, _one_line(error))
    if not failure.traceback and (failure.status >= 500 or not isinstance(error, InvocationError)):
        import traceback

        failure.traceback = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return failure


def _codec_status(error: BaseException) -> int:
    values = sys.modules.get("launcher.serving.values")
    if values is None or not isinstance(error, values.CodecError):
        return 0
    if isinstance(error, values.UnsupportedMediaType):
        return 415
    return 406 if isinstance(error, values.NotEncodable) else 400


def _one_line(error: BaseException, named: bool = True) -> str:
    text = " ".join(str(error).split())
    if len(text) > _MOST_SAID:  # some errors repeat what they were given
        text = text[:_MOST_SAID] + " ..."
    values = sys.modules.get("launcher.serving.values")
    if not named or isinstance(error, ContractError) or (values is not None and isinstance(error, values.CodecError)):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def log(text: str) -> None:
    """A line of the launcher's own, among the worker's output."""
    try:
        os.write(2, f"{text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        return  # the user's code has closed it
