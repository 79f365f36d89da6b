"""TCP sockets between hosts: listening, connecting without waiting, and how soon a lost host is noticed."""

from __future__ import annotations

import errno
import os
import socket

from launcher.errors import ClusterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# What the kernel says when the other host, not its program, is gone.
UNREACHABLE = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}


class _ConnectingSocket(socket.socket):
    """A socket that remembers a connect that failed at once, which SO_ERROR does not tell."""

    failed = 0


def set_options(sock: socket.socket) -> None:
    """Small messages leave at once, and a host that is gone is noticed within 4 s."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 4000)
    except OSError:
        pass  # the connection is gone already: the first read tells


def plain_address(address: str) -> str:
    """A numeric address without what a dual-stack socket (``::ffff:``) or a link (``%eth0``) adds to it."""
    address = address.partition("%")[0]
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def numeric_name(sock: socket.socket, name: Callable[[socket.socket], Any]) -> str:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return ""
    try:
        return plain_address(name(sock)[0])
    except OSError:
        return ""  # reset before we came to ask: the first read tells


def begin_connect(address: str, port: int, source: str = "") -> socket.socket:
    """A socket that connects to a numeric address in the background. Writable: :func:`connect_error` has the outcome.

    Args:
        source: numeric address to come from, if it is one of this host and of the same kind.

    Raises:
        ClusterError: ``address`` is no numeric IPv4 or IPv6 address.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError) as error:
        raise ClusterError(f"{address!r} is no numeric address: {error}") from None
    family, _, _, _, sockaddr = found[0]
    try:
        sock = _ConnectingSocket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ClusterError(f"cannot connect to {address}: {error.strerror}") from error
    sock.setblocking(False)
    set_options(sock)
    if source and (":" in source) == (family == socket.AF_INET6):
        try:
            sock.bind((source, 0))
        except OSError:
            pass  # not this host's (behind a gateway, say): the kernel chooses
    code = sock.connect_ex(sockaddr)
    sock.failed = 0 if code in (0, errno.EINPROGRESS, errno.EINTR) else code
    return sock


def connect_error(sock: socket.socket) -> str:
    """Why a connection of :func:`begin_connect` failed, in words; empty when it stands."""
    code = getattr(sock, "failed", 0) or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        return os.strerror(code)
    try:
        # A connect to a free port of the host's own ephemeral range can meet itself (RFC 9293, 3.5, simultaneous open).
        return os.strerror(errno.ECONNREFUSED) if sock.getsockname() == sock.getpeername() else ""
    except OSError as error:
        return error.strerror or str(error)


def listen(port: int, tries: int = 4, address: str = "") -> tuple[socket.socket, int]:
    """A non-blocking listening socket on ``port``, or on one of the next ``tries - 1``; 0 lets the kernel choose.

    Args:
        address: numeric address to listen on; empty for all, IPv4 and IPv6.

    Raises:
        ClusterError: none of the ports can be had.
    """
    ports = [number for number in range(port, port + tries) if number < 1 << 16] if port else [0]
    reason = "no such port"
    for number in ports:
        try:
            sock = _listening(number, address)
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            return sock, sock.getsockname()[1]
    span = f"port {port}" if len(ports) < 2 else f"ports {ports[0]} to {ports[-1]}"
    where = address or "this host"
    raise ClusterError(f"cannot listen on {where}, {span}: {reason}; --leader-port names another, on all hosts alike")


def _listening(port: int, address: str) -> socket.socket:
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return _bound(family, address, port)
    try:
        return _bound(socket.AF_INET6, "::", port)
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EINVAL):
            raise
    return _bound(socket.AF_INET, "0.0.0.0", port)


def _bound(family: int, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address == "::" else 1)
        sock.bind((address, port))
        sock.listen(4096)
    except OSError:
        sock.close()
        raise
    return sock


def accept(listener: socket.socket) -> tuple[socket.socket, str] | None:
    """The next connection and its numeric peer address; None when there is none (any more).

    Raises:
        ClusterError: this process has no descriptor left; the connection still waits.
    """
    try:
        sock, peer = listener.accept()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            raise ClusterError(f"cannot accept a connection: {error.strerror}; raise `ulimit -n`") from error
        return None
    return sock, plain_address(peer[0]) if isinstance(peer, tuple) else ""
