"""``python -m launcher serve --check``: what an image's HEALTHCHECK calls."""

from __future__ import annotations

import http.client

from launcher.serving.settings import resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_TIMEOUT_S = 5.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def check(words: Sequence[str], environ: Mapping[str, str], log: Callable[[str], None]) -> int:
    """Asks ``/ping`` of the server that these settings name; returns 0 when it answers 200, else 1 (and says why).

    Raises:
        UsageError: an option.
    """
    settings, _ = resolve(words, environ)
    host = _ANY_ADDRESS.get(settings.host, settings.host)
    connection = http.client.HTTPConnection(host, settings.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/ping")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        log(f"not healthy: no answer from /ping at {host} port {settings.port}: {error}")
        return 1
    finally:
        connection.close()
    if status != 200:
        log(f"not healthy: /ping at {host} port {settings.port} answers {status}")
        return 1
    return 0
