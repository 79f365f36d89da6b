"""A conversation with the model: the platform's bidirectional streaming, as WebSocket (RFC 6455) messages.

Source: "Invoke models for inference with bidirectional streaming" of the AWS developer guide. The path is the caller's
choice; the platform's own is ``/invocations-bidirectional-stream``.
"""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from launcher.serving.exchange import Entry, Talk
from launcher.serving.failures import InvocationError, error_body

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from launcher.serving.app import Invocation, Receive, Send
    from launcher.serving.exchange import Stream
    from launcher.serving.pool import Pool

_SWITCHING = 101
_NORMAL, _FAILED = 1000, 1011  # RFC 6455, 7.4.1
_MOST_REASON_BYTES = 123  # RFC 6455, 5.5
_CLOSE_S = 12.0  # for the client's answer to a close; uvicorn waits 10 s, and then for all to be read


class SocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's, with a word when the client has gone."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.on_lost: Callable[[], None] | None = None

    def handle_connect(self, event: Any) -> None:
        """A client asks for a conversation."""
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["launcher.connection"] = self  # type: ignore[typeddict-unknown-key]

    def data_received(self, data: bytes) -> None:
        """Some bytes of the client's."""
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            # No opening at all (it has a body, for one), of which uvicorn says nothing.
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def break_off(self) -> None:
        """Ends the connection at once: the client does not read."""
        self.transport.abort()


async def converse(
    receive: Receive,
    send: Send,
    request: Invocation,
    pool: Pool,
    details: bool,
    log: Callable[[str], None],
) -> None:
    """One conversation, from the client's opening to its end; ``request.status`` says how it went.

    Args:
        details: whether a refusal has the traceback.
    """
    request.model = pool.plan.model_name
    connection = cast("SocketProtocol", request.connection)
    await receive()  # the opening
    entry = Entry((request.id, "", "", "", *request.headers), b"", (request.id, ""))
    entry.talk = Talk()
    try:
        try:
            pool.submit(entry)
            connection.on_lost = lambda: pool.give_up(entry)
            stream = (await entry.future).stream
            if stream is None:
                raise InvocationError(500, "the worker answered, but did not begin a conversation", "ServerFault")
        except InvocationError as error:
            await _refuse(send, request, error, details)
            return
        connection.on_lost = None  # _listen() is told, after all that was said before
        request.status = _SWITCHING
        await send({"type": "websocket.accept", "headers": [(b"x-request-id", request.id.encode())]})
        listening = asyncio.ensure_future(_listen(receive, request, entry, entry.talk, pool))
        try:
            await _tell(send, request, entry, stream, pool, connection)
        finally:
            listening.cancel()
    except OSError:  # uvicorn's word for a client that has gone, before it was told that it may speak
        request.status = 499
        pool.hang_up(entry)
    except Exception as error:  # the boundary: a fault of ours must not pass for the client's or the handler's
        import traceback

        request.status = 500
        log(f"conversation {request.id}: a fault of the server, please report it: {error}\n{traceback.format_exc()}")
        connection.break_off()
        pool.hang_up(entry)


async def _refuse(send: Send, request: Invocation, error: InvocationError, details: bool) -> None:
    request.status = error.status
    body = error_body(error.status, error.kind, str(error), request.id, error.traceback if details else "")
    request.out_bytes = len(body)
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request.id.encode())]
    headers += [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in error.headers]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


async def _listen(receive: Receive, request: Invocation, entry: Entry, talk: Talk, pool: Pool) -> None:
    while (message := await receive())["type"] == "websocket.receive":
        text = message.get("text")
        said = message["bytes"] if text is None else text.encode()
        request.in_bytes += len(said)
        pool.heard(entry)
        await talk.say(entry, said, text is not None)
    pool.hang_up(entry)


async def _tell(
    send: Send, request: Invocation, entry: Entry, stream: Stream, pool: Pool, connection: SocketProtocol
) -> None:
    loop = asyncio.get_running_loop()

    async def say(message: dict[str, Any]) -> None:
        if entry.given_up:
            return  # the client has gone; the handler may come to its end
        # A client that does not read would keep what is told to it, and the connection, for ever.
        late = loop.call_later(pool.settings.stream_timeout_s, connection.break_off)
        try:
            await send(message)
        except OSError:
            entry.given_up = True
        finally:
            late.cancel()

    code, reason = _NORMAL, ""
    try:
        while (next_one := await stream.next()) is not None:
            message, text = next_one
            pool.heard(entry)
            request.out_bytes += len(message)
            content = {"text": message.decode(errors="replace")} if text else {"bytes": message}
            await say({"type": "websocket.send", **content})
    except InvocationError as error:
        request.status = error.status
        code, reason = _FAILED, str(error).encode(errors="replace")[:_MOST_REASON_BYTES].decode(errors="ignore")
    await say({"type": "websocket.close", "code": code, "reason": reason})
    loop.call_later(_CLOSE_S, connection.break_off)
