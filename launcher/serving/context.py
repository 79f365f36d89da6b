"""What a user's function may ask about its request, and say about the answer.

The getters and setters are those that handlers of the reference know from its model server, so that they go on
unchanged; ``index`` (the request's place in a batch) is always that of this one request and may be left out.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


# RFC 9110, 5.6.2.
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class RequestProcessor:
    """The headers of the request, as the reference's model server gives them."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def get_request_properties(self) -> dict[str, str]:
        """All headers, by their names as they came."""
        return dict(self._context.headers.items())

    def get_request_property(self, key: str) -> str | None:
        """One header; case does not matter."""
        return self._context.headers.get(key)

    def add_response_property(self, key: str, value: str) -> None:
        """Sets a header of the answer."""
        self._context.set_response_header(0, key, value)

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        """Sets the answer's status."""
        self._context.set_response_status(code, reason_phrase)

    def get_response_status_code(self) -> int:
        """The answer's status so far."""
        return self._context.status or 200

    def get_response_headers(self) -> dict[str, str]:
        """The answer's own headers so far."""
        return dict(self._context.response_headers)


class Headers:
    """Headers of a request: a mapping whose names may be asked in any case."""

    def __init__(self, pairs: tuple[str, ...]) -> None:
        self._pairs = pairs

    def items(self) -> list[tuple[str, str]]:
        """Names as they came, and values, in order."""
        return list(zip(self._pairs[::2], self._pairs[1::2], strict=True))

    def get(self, name: str, default: str | None = None) -> str | None:
        """The first header called ``name``."""
        wanted = name.lower()
        for key, value in zip(self._pairs[::2], self._pairs[1::2], strict=True):
            if key.lower() == wanted:
                return value
        return default

    def __getitem__(self, name: str) -> str:
        value = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __iter__(self) -> Any:
        return iter(self._pairs[::2])

    def __len__(self) -> int:
        return len(self._pairs) // 2


class Metrics:
    """Counters and the like of the reference's context: kept, and told with the server's own metrics.

    Only what has a meaning beyond one request is kept: counts by name.
    """

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}

    def add_counter(self, name: str, value: float, idx: int | None = None, dimensions: Any = None) -> None:
        """Adds to a count."""
        self.counts[name] = self.counts.get(name, 0) + value

    def _ignored(self, *arguments: Any, **named: Any) -> None:
        """A measure that the server takes itself, or that has no place here."""

    add_time = add_size = add_percent = add_error = add_metric = _ignored


class Context:
    """One request.

    Attributes:
        headers: of the request.
        system_properties: model_dir, gpu_id, batch_size, server_name, server_version.
        request_ids: the request's id, by its place in a batch: 0.
        request_processor: the headers, for handlers of the reference.
        metrics: counts of the user's own.
        session_id: of the stateful session that the request is part of; "" for none.
        session: what the user keeps for that session, in this worker's memory; {} for none.
        model_name: of a multi-model server; "" else.
    """

    server_name = "launcher"

    def __init__(
        self,
        system_properties: Mapping[str, Any],
        request_id: str = "",
        headers: tuple[str, ...] = (),
        session_id: str = "",
        session: dict[str, Any] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.system_properties = dict(system_properties)
        self.model_name: str = str(self.system_properties.get("model_name", ""))
        self.headers = Headers(headers)
        self.request_ids = {0: request_id}
        self.session_id, self.session = session_id, {} if session is None else session
        self.metrics = Metrics() if metrics is None else metrics
        self.request_processor = [RequestProcessor(self)]
        self.status = 0  # 0: not said
        self.response_headers: dict[str, str] = {}
        self.content_type = ""

    @property
    def manifest(self) -> dict[str, Any]:
        """Nothing: there is no model archive."""
        return {}

    def get_request_id(self, idx: int = 0) -> str:
        """The request's id, which is also in the answer and in the log."""
        return self.request_ids[0]

    def get_request_header(self, idx: int, key: str) -> str | None:
        """A header of the request; case does not matter."""
        return self.headers.get(key)

    def get_all_request_header(self, idx: int = 0) -> dict[str, str]:
        """All headers of the request."""
        return dict(self.headers.items())

    def set_response_content_type(self, idx: int, value: str) -> None:
        """Sets the answer's content type."""
        self.content_type = one_line(value)

    def get_response_content_type(self, idx: int = 0) -> str:
        """The answer's content type, if it was set."""
        return self.content_type

    def set_response_status(self, code: int = 200, phrase: str | None = "", idx: int = 0) -> None:
        """Sets the answer's status. The phrase is not sent: HTTP/2 has none, and clients ignore it.

        Raises:
            ValueError: no status of an answer, 200 to 599.
        """
        if not 200 <= int(code) <= 599:
            raise ValueError(f"status {code}: expected 200 to 599")
        self.status = int(code)

    def set_all_response_status(self, code: int = 200, phrase: str | None = "") -> None:
        """As :meth:`set_response_status`."""
        self.set_response_status(code, phrase)

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        """Sets a header of the answer. Those that say how it is sent (its length, say) are the server's, and left out.

        Raises:
            ValueError: no name of a header, or a value of more than one line.
        """
        if not key or not all(character in _TOKEN for character in key):
            raise ValueError(f"{key!r} is no name of a header (RFC 9110, 5.1)")
        self.response_headers[key] = one_line(value)


def one_line(text: str) -> str:
    """``text`` as it may stand in a header.

    Raises:
        ValueError: it has a line break or another control character (RFC 9110, 5.5).
    """
    text = str(text)
    if not text.isprintable() and any((ord(one) < 32 and one != "\t") or one == "\x7f" for one in text):
        raise ValueError(f"{text!r:.200} has a control character; a header is one line")
    return text
