"""What can go wrong with a request, as it is told to the client: a status, a type and one line."""

from __future__ import annotations

import json

# Types, by status, of what the server itself has to say. docs/serving.md has the table with the cases of each.
TYPES = {
    400: "BadRequest",
    404: "NotFound",
    405: "MethodNotAllowed",
    406: "NotAcceptable",
    408: "RequestTimeout",
    409: "Conflict",
    413: "PayloadTooLarge",
    415: "UnsupportedMediaType",
    431: "HeaderTooLarge",
    500: "HandlerFailed",
    503: "ServiceUnavailable",
    504: "AnswerTimeout",
    507: "InsufficientMemory",
}


_MOST_SAID = 1000  # characters of a message: some repeat what the client has sent


class InvocationError(Exception):
    """A request that is answered with an error. User's functions may raise it: ``raise InvocationError(422, "...")``.

    Attributes:
        status: of the answer, 400 to 599.
        kind: one word that programs can test, "" for that of the status.
        headers: for the answer.
    """

    def __init__(self, status: int, message: str, kind: str = "", headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message if len(message) <= _MOST_SAID else message[:_MOST_SAID] + " ...")
        if not 400 <= status <= 599:
            raise ValueError(f"status {status}: an error has 400 to 599")
        self.status, self.kind, self.headers = status, kind or TYPES.get(status, "Error"), headers
        self.traceback = ""

    @property
    def status_code(self) -> int:
        """As :attr:`status`: errors of the reference have it by this name."""
        return self.status


def error_body(status: int, kind: str, message: str, request_id: str, traceback: str = "") -> bytes:
    """The body of an error's answer: JSON with code, type, message and requestId."""
    content: dict[str, object] = {"code": status, "type": kind, "message": message, "requestId": request_id}
    if traceback:
        content["traceback"] = traceback
    return json.dumps(content).encode() + b"\n"
