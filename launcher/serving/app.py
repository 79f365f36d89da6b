"""From HTTP to workers and back: the routes of the hosting contract, as one ASGI application.

It knows no process and no model. Source of the routes: "Use Your Own Inference Code with Hosting Services", "... with
Batch Transform" and "Custom Containers Contract for Multi-Model Hosting" of the AWS developer guide.
"""

from __future__ import annotations

import itertools
import json
import os
import time

from launcher.serving.exchange import Entry
from launcher.serving.failures import InvocationError, error_body
from launcher.serving.models import is_number
from launcher.serving.sessions import CLOSE, NEW

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping
    from typing import Any

    from launcher.serving.exchange import Reply
    from launcher.serving.metrics import Metrics
    from launcher.serving.models import Models
    from launcher.serving.pool import Pool
    from launcher.serving.sessions import Sessions
    from launcher.serving.settings import Settings

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    Headers = list[tuple[bytes, bytes]]

_JSON = b"application/json"
_SESSION = "X-Amzn-SageMaker-Session-Id"
_MOST_TO_LOOK_AT = 1024  # bytes of a body that may ask for a session
_MIB = 1 << 20
_BODILESS = (204, 304)  # RFC 9110, 6.4.1
# Of the connection, not of the answer: the server's own.
_NOT_THE_HANDLERS = frozenset(
    (
        b"connection",
        b"content-length",
        b"content-type",
        b"date",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


# Of request ids: different in each server's life, without asking the kernel for randomness each time.
_ID_PREFIX = os.urandom(4).hex()
_NUMBERS = itertools.count(1)


class Invocation:
    """What is known of a request while it is answered."""

    __slots__ = (
        "accept",
        "begin_s",
        "connection",
        "content_type",
        "head",
        "headers",
        "id",
        "in_bytes",
        "length",
        "model",
        "out_bytes",
        "session",
        "status",
    )

    def __init__(self, scope: Message) -> None:
        self.begin_s = time.perf_counter()
        self.connection = scope.get("launcher.connection")
        self.head = scope.get("method") == "HEAD"  # there is no body to the answer
        self.id = f"{_ID_PREFIX}{next(_NUMBERS):08x}"
        self.content_type = self.accept = self.session = self.model = ""
        self.length = -1
        self.status = self.in_bytes = self.out_bytes = 0
        headers: list[str] = []
        platform_accept = ""
        for name, value in scope["headers"]:
            text = value.decode("latin-1")
            headers += (name.decode("latin-1"), text)
            if name == b"content-type":
                self.content_type = text
            elif name == b"accept":
                self.accept = f"{self.accept}, {text}" if self.accept else text
            elif name == b"content-length":
                self.length = int(text)
            elif name == b"x-amzn-sagemaker-session-id":
                self.session = text
            elif name == b"x-amzn-sagemaker-accept":
                platform_accept = text
        self.accept = platform_accept or self.accept
        self.headers = headers


class App:
    """The application. ``state`` says whether the server is ready, in a word, and why not."""

    def __init__(
        self,
        settings: Settings,
        models: Models,
        single: Pool | None,
        sessions: Sessions | None,
        metrics: Metrics,
        log: Callable[[str], None],
    ) -> None:
        self._settings, self._models, self._single = settings, models, single
        self._sessions, self._metrics, self._log = sessions, metrics, log
        self.state = "loading"

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        request = Invocation(scope)
        if scope["type"] == "websocket" and self._single is not None:
            from launcher.serving.conversation import converse

            await converse(receive, send, request, self._single, self._settings.error_details, self._log)
            self._count(request, timed=False)  # how long people talk is no latency
            return
        try:
            await self._route(scope, receive, send, request)
        except InvocationError as error:
            await self._send_error(send, request, error, scope)
        except Exception as error:  # the boundary: a fault of ours must not pass for the client's or the handler's
            import traceback

            self._log(f"request {request.id}: a fault of the server, please report it\n{traceback.format_exc()}")
            fault = InvocationError(500, f"{type(error).__name__}: {error}; a fault of the server", "ServerFault")
            await self._send_error(send, request, fault, scope)

    async def _route(self, scope: Message, receive: Receive, send: Send, request: Invocation) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/invocations" and self._single is not None:
            _allow(method, "POST")
            await self._invoke(scope, receive, send, request, self._single)
        elif path == "/ping":
            _allow(method, "GET", "HEAD")
            await self._ping(send, request)
        elif path == "/execution-parameters":
            _allow(method, "GET", "HEAD")
            await _send_json(send, request, 200, self._execution_parameters())
        elif self._settings.multi_model and (path == "/models" or path.startswith("/models/")):
            await self._multi_model(scope, receive, send, request, path.split("/")[2:])
        else:
            raise InvocationError(
                404,
                f"no {path} here: {'/models, ' if self._single is None else '/invocations, '}"
                "/ping and /execution-parameters",
            )

    # ---- the platform's questions

    async def _ping(self, send: Send, request: Invocation) -> None:
        # Of many models none is the server's: it lives, and the platform asks for each.
        ready = self.state == "serving" and (self._single is None or self._single.ready > 0)
        if ready:
            await _send(send, request, 200, b"", b"")
            return
        why = "no worker is alive" if self.state == "serving" else f"the server is {self.state}"
        raise InvocationError(503, why, "NotReady")

    def _execution_parameters(self) -> dict[str, object]:
        most = min(self._settings.max_payload // _MIB or 100, 100)
        payload = most if self._settings.batch else min(most, 6)  # the platform's own default
        workers = self._single.size if self._single is not None else 1
        # The platform refuses a product of the two above 100.
        together = self._settings.max_concurrent_transforms or max(1, min(workers, 100 // max(payload, 1)))
        return {
            "MaxConcurrentTransforms": together,
            "BatchStrategy": self._settings.batch_strategy,
            "MaxPayloadInMB": payload,
        }

    # ---- invocations

    async def _invoke(self, scope: Message, receive: Receive, send: Send, request: Invocation, pool: Pool) -> None:
        request.model = pool.plan.model_name
        body = await self._body(receive, request)
        home = 0
        headers: Headers = []
        if request.session:
            home, headers, done = self._session(request, body, pool)
            if done:
                await _send(send, request, 200, b"", b"", headers)
                return
        entry = Entry(
            (request.id, request.content_type, request.accept, request.session, *request.headers),
            body,
            (request.content_type, request.accept),
            home,
        )
        connection = request.connection
        pool.submit(entry)
        if connection is not None:
            connection.on_lost = lambda: pool.give_up(entry)
        try:
            reply = await entry.future
            if reply.stream is not None and reply.status in _BODILESS:
                pool.give_up(entry)
                reply.stream = None
            if reply.stream is not None and scope["http_version"] == "1.0":  # it knows no pieces (RFC 9112, 6.1)
                reply.body, reply.stream = await reply.stream.whole(), None
            if reply.stream is None:
                await self._reply(send, request, reply, headers)
            else:
                await self._stream(send, request, reply, headers, connection, pool)
        finally:
            if connection is not None:
                connection.on_lost = None

    async def _body(self, receive: Receive, request: Invocation) -> bytes:
        most = self._settings.max_payload
        if most and request.length > most:
            raise self._too_large(f"{request.length} bytes")
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvocationError(499, "the client has gone")
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            pieces, length = [body], len(body)
            while message.get("more_body"):
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise InvocationError(499, "the client has gone")
                pieces.append(message.get("body", b""))
                length += len(pieces[-1])
                if most and length > most:
                    raise self._too_large(f"more than {most} bytes")
            body = b"".join(pieces)
        request.in_bytes = len(body)
        return body

    def _too_large(self, what: str) -> InvocationError:
        most = self._settings.max_payload
        return InvocationError(
            413,
            f"a body of {what}; at most {most // _MIB} MB are taken (SAGEMAKER_MAX_PAYLOAD_IN_MB)",
        )

    async def _reply(self, send: Send, request: Invocation, reply: Reply, more: Headers) -> None:
        headers = _encoded(reply.headers) + more if reply.headers else more
        await _send(send, request, reply.status, reply.content_type.encode("latin-1", "replace"), reply.body, headers)
        self._count(request)

    async def _stream(
        self, send: Send, request: Invocation, reply: Reply, more: Headers, connection: Any, pool: Pool
    ) -> None:
        assert reply.stream is not None
        content_type = (b"content-type", reply.content_type.encode("latin-1", "replace"))
        headers = [content_type, (b"x-request-id", request.id.encode()), *_encoded(reply.headers), *more]
        request.status = reply.status
        if connection is not None:
            reply.stream.on_late = connection.break_off  # send() may be waiting for a client that does not read
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        try:
            while (next_one := await reply.stream.next()) is not None:
                if connection is not None and connection.lost:
                    return
                piece, _ = next_one
                request.out_bytes += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except InvocationError:
            # Status and headers are with the client: only an end without the last chunk tells it that this is not all.
            if connection is not None:
                connection.break_off()
            self._count(request)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self._count(request)

    def _count(self, request: Invocation, timed: bool = True) -> None:
        seconds = time.perf_counter() - request.begin_s
        self._metrics.answered(
            request.model, request.status, seconds if timed else None, request.in_bytes, request.out_bytes
        )
        if self._settings.access_log:
            line = {
                "time": time.time(),
                "requestId": request.id,
                "model": request.model,
                "status": request.status,
                "milliseconds": round(seconds * 1000, 3),
                "requestBytes": request.in_bytes,
                "answerBytes": request.out_bytes,
                "contentType": request.content_type,
                "accept": request.accept,
            }
            self._log("\0" + json.dumps(line))

    # ---- sessions

    def _session(self, request: Invocation, body: bytes, pool: Pool) -> tuple[int, Headers, bool]:
        """The worker of the request's session, headers for the answer, and whether that is all there is to do."""
        if self._sessions is None:
            raise InvocationError(
                400,
                f"header {_SESSION}: stateful sessions are off (SAGEMAKER_ENABLE_STATEFUL_SESSIONS=true)",
                "BadInput",
            )
        asked = _session_request(body)
        if request.session == NEW:
            home = pool.pick()
            request.session = self._sessions.open(home)
            value = self._sessions.header(request.session).encode()
            return home, [(b"x-amzn-sagemaker-new-session-id", value)], asked == NEW
        home = self._sessions.find(request.session)
        if asked != CLOSE:
            return home, [], False
        self._sessions.close(request.session)
        pool.close_session(home, request.session)
        return home, [(b"x-amzn-sagemaker-closed-session-id", request.session.encode("latin-1"))], True

    # ---- many models

    async def _multi_model(
        self, scope: Message, receive: Receive, send: Send, request: Invocation, parts: list[str]
    ) -> None:
        method = scope["method"]
        if not parts or parts == [""]:
            _allow(method, "GET", "POST")
            if method == "GET":
                limit, token = _page(scope["query_string"].decode("latin-1"))
                await _send_json(send, request, 200, self._models.list(limit, token))
                return
            name, url = _load_request(await self._body(receive, request))
            await self._models.load(name, url)
            await _send_json(send, request, 200, {"status": f"Model {name} loaded", "modelName": name})
        elif len(parts) == 1:
            _allow(method, "GET", "DELETE")
            if method == "GET":
                await _send_json(send, request, 200, self._models.describe(parts[0]))
                return
            await self._models.unload(parts[0])
            await _send_json(send, request, 200, {"status": f"Model {parts[0]} unloaded"})
        elif len(parts) == 2 and parts[1] == "invoke":
            _allow(method, "POST")
            await self._invoke(scope, receive, send, request, self._models.get(parts[0]))
        else:
            raise InvocationError(404, f"no {scope['path']} here")

    # ---- errors

    async def _send_error(self, send: Send, request: Invocation, error: InvocationError, scope: Message) -> None:
        traceback = error.traceback if self._settings.error_details else ""
        body = error_body(error.status, error.kind, str(error), request.id, traceback)
        headers = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in error.headers]
        if request.status:  # the answer had begun: there is no way to tell but to end it
            scope["launcher.connection"].break_off()
            return
        await _send(send, request, error.status, _JSON, body, headers)
        if scope["path"].endswith(("/invocations", "/invoke")):
            self._count(request)


async def _send(
    send: Send,
    request: Invocation,
    status: int,
    content_type: bytes,
    body: bytes,
    more: Headers | None = None,
) -> None:
    request.status, request.out_bytes = status, len(body)
    headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request.id.encode()),
    ]
    if status in _BODILESS:
        del headers[1]
        body, request.out_bytes = b"", 0
    if not content_type:
        del headers[0]
    if more:
        headers += more
    if request.connection is not None and not request.head:
        request.connection.joining.hold = True  # the body follows at once
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _encoded(headers: tuple[str, ...]) -> Headers:
    """Headers that a handler has set, given as names and values in turn, as they are sent."""
    pairs = zip(headers[::2], headers[1::2], strict=True)
    encoded = [(name.lower().encode("latin-1", "replace"), value.encode("latin-1", "replace")) for name, value in pairs]
    return [pair for pair in encoded if pair[0] not in _NOT_THE_HANDLERS]


async def _send_json(send: Send, request: Invocation, status: int, value: object) -> None:
    await _send(send, request, status, _JSON, json.dumps(value).encode())


def _allow(method: str, *methods: str) -> None:
    if method not in methods:
        allowed = ", ".join(methods)
        raise InvocationError(405, f"method {method}; expected {allowed}", headers=(("allow", allowed),))


def _session_request(body: bytes) -> str:
    """What a body asks of the session itself: NEW_SESSION, CLOSE, or "" for a body that is the handler's."""
    if len(body) > _MOST_TO_LOOK_AT or b"requestType" not in body:
        return ""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    return str(content.get("requestType", "")) if isinstance(content, dict) else ""


def _page(query: str) -> tuple[int, str]:
    from urllib.parse import parse_qs

    values = parse_qs(query)
    limit = values.get("limit", ["100"])[0]
    if not is_number(limit):
        raise InvocationError(400, f"limit {limit!r}: expected a number", "BadInput")
    return int(limit), values.get("next_page_token", [""])[0]


def _load_request(body: bytes) -> tuple[str, str]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvocationError(400, f"the body is not JSON: {error}", "BadInput") from None
    if not isinstance(content, dict):
        raise InvocationError(400, "the body is no JSON object with model_name and url", "BadInput")
    for field in ("model_name", "url"):
        if not isinstance(content.get(field), str) or not content[field]:
            raise InvocationError(400, f"the body has no text {field}", "BadInput")
    return content["model_name"], content["url"]
