"""Who is not in: connections to the leader that prove nothing, which are counted, and hosts that are missing."""

from __future__ import annotations

from launcher.cluster.probe import Probe, probed_port
from launcher.cluster.resolve import Resolver
from launcher.cluster.sockets import plain_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.cluster.options import ClusterPlan
    from launcher.cluster.resolve import Resolved
    from launcher.cluster.wire import Channel

MISSING_ASKED = 64  # missing hosts that are looked for at a time
_ASK_AGAIN_S = 2.0
_NAMED = 8

_WORDS = {
    "eof": "left during the handshake",
    "reset": "left during the handshake",
    "bad-proof": "wrong secret",
    "garbage": "sent no message of this protocol",
    "oversized": "announced a frame that is too long",
    "replay": "repeated or altered a frame",
    "slow": "too slow",
    "refused": "refused",
    "no-descriptor": "no file descriptor left",
}


class Guests:
    """The leader's book of strangers. Where there is no secret, it also tells the hosts' addresses from others."""

    def __init__(self, plan: ClusterPlan, unproven: int, say: Callable[[str], None]) -> None:
        """``unproven``: how many connections that prove nothing there may be."""
        self._plan, self._most, self._say = plan, unproven, say
        self._unproven: dict[Channel, None] = {}  # oldest first
        self._counts: dict[str, int] = {}
        self._found: dict[str, Resolved] = {}
        self._known: set[str] = set()  # addresses of all hosts
        self._resolver: Resolver | None = None
        self._probe: Probe | None = None
        self._silent: set[str] = set()
        self._asked_s = 0.0

    def open(self) -> None:
        """The door is open: where there is no secret, says by what hosts are let in, and looks their addresses up."""
        plan, say = self._plan, self._say
        if plan.secret:
            return
        if plan.named:
            say("no secret was given (LAUNCHER_SECRET): hosts are let in by the addresses of the host list")
            self._resolver = Resolver([host for host in plan.hosts if host != plan.host], plan.addresses)
        else:
            say(
                "WARNING: no secret was given (LAUNCHER_SECRET), and there is no host list: whoever reaches port "
                f"{plan.leader_port} can join"
            )

    def serve(self, now_s: float, missing: Sequence[str]) -> None:
        """Looks after the names and addresses of hosts that are ``missing``."""
        if self._resolver is not None:
            for result in self._resolver.take():
                self._found[result.name] = result
                self._known.update(self._addresses(result.name))
        if not missing or not self._plan.named or now_s < self._asked_s + _ASK_AGAIN_S:
            return
        first, self._asked_s = not self._asked_s, now_s
        if first:
            return
        if self._resolver is None:
            self._resolver = Resolver((), self._plan.addresses)
        self._resolver.ask(host for host in missing[:MISSING_ASKED] if not self._addresses(host))
        if self._probe is None or self._probe.done(now_s):
            self._silent = set() if self._probe is None else self._probe.silent
            known = {host: self._addresses(host)[0] for host in missing[:MISSING_ASKED] if self._addresses(host)}
            self._probe = Probe(known, probed_port(self._plan.leader_port), now_s)

    def arrived(self, channel: Channel) -> Channel | None:
        """A connection came in. Returns the oldest that has to make room for it."""
        self._unproven[channel] = None
        if len(self._unproven) <= self._most:
            return None
        return next(iter(self._unproven))

    def joined(self, channel: Channel) -> None:
        """It has become a member."""
        self._unproven.pop(channel, None)

    def left(self, channel: Channel) -> None:
        """It was closed before that."""
        self._unproven.pop(channel, None)
        self.count(channel.cause or "refused", channel.closed)

    def count(self, cause: str, text: str) -> None:
        """Counts a refusal; the first of each kind is told."""
        seen = self._counts[cause] = self._counts.get(cause, 0) + 1
        if seen == 1:
            self._say(f"WARNING: refused a connection: {text} (more of this kind are only counted)")

    def tell_counts(self) -> None:
        """Says how many were refused, if there were any."""
        if self._counts:
            kinds = ", ".join(f"{count} {_WORDS.get(cause, cause)}" for cause, count in sorted(self._counts.items()))
            self._say(f"refused connections: {sum(self._counts.values())} ({kinds})")

    def unknown(self, channel: Channel) -> str:
        """Why the address of ``channel`` is that of no host in the list; "" when it is one, or need not be."""
        if self._plan.secret or not self._plan.named:
            return ""
        if channel.address in self._known:
            return ""
        found = self._found.get(channel.host)
        own = ", ".join(self._addresses(channel.host))
        told = "has not been resolved yet" if found is None else found.error or f"resolves to {own}"
        return (
            f"{channel.address} is no address of the host list ({channel.host} {told}); "
            "set LAUNCHER_SECRET on all hosts to let in hosts of any address"
        )

    def why_missing(self, missing: Sequence[str]) -> str:
        """The missing hosts, each with what is known of it."""
        told = []
        for host in missing[:_NAMED]:
            found = self._found.get(host)
            if not self._plan.named or found is None:
                why = "has not called"
            elif found.error:
                why = f"its name does not resolve: {found.error}"
            elif host in self._silent:
                why = f"{found.addresses[0]} does not answer"
            else:
                why = f"{found.addresses[0]} has not called: its launcher is not up, or cannot reach this host"
            told.append(f"{host} ({why})")
        return ", ".join(told) + (f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")

    def close(self) -> None:
        """Ends what goes on in the background."""
        if self._resolver is not None:
            self._resolver.close()
            self._resolver = None
        if self._probe is not None:
            self._probe.done(float("inf"))

    def _addresses(self, host: str) -> tuple[str, ...]:
        found = self._found.get(host)
        return tuple(plain_address(address) for address in found.addresses) if found is not None else ()
