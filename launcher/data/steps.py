"""What all ranks agree upon before step 0, so that none of them waits in an allreduce for one that ran dry.

Each rank tells the others what it has found (or that it has found an error); all of them draw the same conclusion from
the same table: the number of steps, or the same error. The exchange has a time limit and notices a rank that dies.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys

from launcher import _data
from launcher.collectives.group import join
from launcher.collectives.place import read_place
from launcher.data.order import TAILS, Shuffling
from launcher.data.state import State, differing_part, marks
from launcher.errors import EXIT_CONTRACT, CollectiveError, DataError, LauncherError, UsageError
from launcher.record import Record, as_dict, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from launcher.collectives.group import Group, Store

TIMEOUT_S = 1800.0
_UINT8 = 5  # launcher.collectives.elements.DType
_LENGTH_BYTES = 8


class Facts(Record):
    """What one rank knows of a channel.

    Attributes:
        state: of its own data, and where it begins.
        batch: rows of a step.
        tail: a name of order.TAILS.
        sharded: each host has files of its own.
        damage: records that were left out because they are damaged.
        host: its host.
    """

    state: State
    batch: int
    tail: str
    sharded: bool = False
    damage: int = 0
    host: str = ""


class Plan(Record):
    """What the ranks have agreed upon.

    Attributes:
        state: of the whole channel, the same on all ranks, where they begin: what ``state_dict()`` is made from.
        batch, tail: as in Facts.
        records: in this rank's order: of the channel, or where each host has its own files, of this host.
        rank, world: of this rank among those that share these records.
        damage: records left out of the whole channel.
    """

    state: State
    batch: int
    tail: str
    records: int
    rank: int = 0
    world: int = 1
    damage: int = 0

    def steps(self, position: int | None = None) -> int:
        """Steps from ``position`` (without: where the state begins) to the end of the epoch, on every rank."""
        begin = self.state.position if position is None else position
        each = [records for _, records in self.state.hosts] or [self.records]
        tail = TAILS.index(self.tail)
        counts = [_data.steps(records, begin, self.world, self.batch, tail) for records in each]
        return min(counts) if self.tail == "drop" else max(counts)

    def position_after(self, step: int, position: int | None = None) -> int:
        """Where the channel stands after ``step`` steps from ``position`` on: ``State.position``."""
        begin = self.state.position if position is None else position
        most = max(records for _, records in self.state.hosts) if self.state.hosts else self.records
        return min(most, begin + step * self.world * self.batch)


class Agreement:
    """The ranks that read a channel together, and their exchanges. All of them make the same calls in the same order.

    Without others (a world of one) nothing is exchanged. With a launcher, its ranks find each other. Ranks that were
    started otherwise need a ``store``; without, they are not compared, which is said once.
    """

    def __init__(
        self,
        channel: str,
        rank: int = 0,
        world_size: int = 1,
        *,
        timeout_s: float = TIMEOUT_S,
        store: Store | None = None,
    ) -> None:
        """Nothing is exchanged yet.

        Args:
            channel: its name, or any name that is the same on all ranks.
            timeout_s: how long to wait for another rank, in seconds.
            store: reached by all ranks (torch.distributed's, for one), where the launcher does not tell who they are.

        Raises:
            UsageError: rank and world_size make no sense.
        """
        if not 0 <= rank < world_size:
            raise UsageError(f"rank is {rank} and world_size {world_size}; expected a rank from 0 to world_size - 1")
        self.channel, self.rank, self.world_size = channel, rank, world_size
        self._timeout_s, self._store = timeout_s, store
        place = read_place(os.environ)
        self.host = place.host if place else os.uname().nodename
        self._alone = ""  # why the others can not be asked
        if store is None and world_size > 1:
            if place is None:
                self._alone = "they were not started by the launcher"
            elif (rank, world_size) != (place.rank, place.world_size):
                self._alone = f"they are not the job's: this is rank {place.rank} of {place.world_size} there"

    def exchange(self, value: bytes) -> list[bytes]:
        """What each rank has given, by rank.

        Raises:
            CollectiveError: a rank did not come in time, or is gone. It names it.
            UsageError: the ranks can not reach each other.
        """
        if self.world_size == 1:
            return [value]
        if self._alone:
            raise UsageError(
                f"channel {self.channel!r}: the ranks can not ask each other: {self._alone}; start them with python -m "
                "launcher, or pass store="
            )
        try:
            return self._exchange(value)
        except CollectiveError as error:
            raise CollectiveError(
                f"channel {self.channel!r}: the ranks could not agree on what they read: {error}",
                error.reason,
                error.rank,
                error.host,
                error.operation,
                error.sequence,
            ) from error

    def _exchange(self, value: bytes) -> list[bytes]:
        size = self.world_size
        group = join(_next_name(self.channel), self.rank, size, store=self._store, timeout_s=self._timeout_s)
        try:
            lengths = _gather(group, len(value).to_bytes(_LENGTH_BYTES, "little"), [_LENGTH_BYTES] * size)
            counts = [int.from_bytes(length, "little") for length in lengths]
            return _gather(group, value, counts) if any(counts) else [b""] * size
        finally:
            group.close()

    def settle(self, find: Callable[[], Facts], *, allow_empty: bool = False) -> Plan:
        """Agrees on the steps of an epoch. To be called anew when the position has been set by a saved state.

        Args:
            find: what this rank knows; called once. An error of its is told to the others.
            allow_empty: no step at all is no error.

        Raises:
            What ``find`` raises, here; DataError or UsageError on the other ranks.
            DataError: the ranks' data differs; problem ``mismatch``.
            UsageError: they were given different arguments, or there is not enough for one step.
            CollectiveError: as exchange().
        """
        own: LauncherError | None = None
        told: dict[str, Any] = {}
        facts: list[Facts] = []
        try:
            facts.append(replace(find(), host=self.host))
            told["facts"] = as_dict(facts[0])
        except LauncherError as error:
            if self._alone or self.world_size == 1:
                raise
            own, told["error"] = error, _error_told(error, self.host)
        try:
            if self._alone:
                raise UsageError(self._alone)
            table = [json.loads(value) for value in self.exchange(json.dumps(told).encode())]
        except CollectiveError as error:
            if own is not None:
                raise own from error
            raise
        except UsageError as error:  # there is no way to the others: on other hosts without torch or MPI, for one
            if own is not None:
                raise own from error
            self._say_alone(facts[0], str(error))
            return settle(facts * self.world_size, self.rank, self.channel, allow_empty=allow_empty)
        if own is not None:
            raise own
        for rank, other in enumerate(table):
            if "error" in other:
                raise _error_of(rank, other["error"])
        facts = [_facts(other["facts"]) for other in table]
        return settle(facts, self.rank, self.channel, allow_empty=allow_empty)

    def _say_alone(self, facts: Facts, reason: str) -> None:
        """Says, on the first rank, that nothing is compared. Raises UsageError where the ranks must have been asked."""
        if facts.sharded:
            raise UsageError(
                f"each host has files of its own in channel {self.channel!r}, so the ranks must ask each other how "
                f"many records they have, but {reason}; start them with python -m launcher, or pass store="
            )
        key = (os.getpid(), self.channel)
        if self.rank == 0 and key not in _said:
            _said.add(key)
            print(
                f"[launcher] the ranks do not compare what they have of channel {self.channel!r}: {reason}",
                file=sys.stderr,
            )


_said: set[tuple[int, str]] = set()
_exchanges: dict[tuple[int, str], int] = {}


def _next_name(channel: str) -> str:
    """A name that no group of this job has had; the same on all ranks, for they exchange in the same order."""
    key = (os.getpid(), channel)
    _exchanges[key] = _exchanges.get(key, 0) + 1
    return f"data/{channel}/{_exchanges[key]}"


def _gather(group: Group, value: bytes, counts: Sequence[int]) -> list[bytes]:
    source = ctypes.create_string_buffer(value, max(1, len(value)))
    target = ctypes.create_string_buffer(max(1, sum(counts)))
    group.all_gather(ctypes.addressof(source), ctypes.addressof(target), counts, _UINT8)
    everything = target.raw
    parts, begin = [], 0
    for count in counts:
        parts.append(everything[begin : begin + count])
        begin += count
    return parts


def _error_told(error: LauncherError, host: str) -> dict[str, Any]:
    told: dict[str, Any] = {"text": str(error), "host": host, "is_data": error.exit_code == EXIT_CONTRACT}
    if isinstance(error, DataError):
        told |= {"problem": error.problem, "file": error.file, "offset": error.offset, "record": error.record}
    return told


def _error_of(rank: int, told: dict[str, Any]) -> LauncherError:
    text = f"rank {rank} on {told['host']}: {told['text']}"
    if not told["is_data"]:
        return UsageError(text)
    return DataError(
        text, told.get("problem", "malformed"), told.get("file", ""), told.get("offset", -1), told.get("record", -1)
    )


def _facts(told: dict[str, Any]) -> Facts:
    state = told["state"]
    hosts = tuple((name, records) for name, records in state["hosts"])
    state = State(**{**state, "shuffling": Shuffling(**state["shuffling"]), "hosts": hosts})
    return Facts(**{**told, "state": state})


# --- the conclusion: the same on every rank, for it follows from the same table ---------------------------------------


def settle(table: Sequence[Facts], rank: int, channel: str, *, allow_empty: bool = False) -> Plan:
    """The plan that follows from what all ranks have told, by rank.

    Raises:
        DataError, UsageError: as Agreement.settle.
    """
    own = table[rank]
    _check_arguments(table, channel)
    mates = [index for index, other in enumerate(table) if not own.sharded or other.host == own.host]
    hosts = _hosts(table, channel) if own.sharded else {own.host: 0}
    for index, other in enumerate(table):
        _check_same_data(table, hosts[other.host] if own.sharded else 0, index, channel)
    firsts = [table[first] for first in hosts.values()]
    for other in firsts:
        if other.state.records == 0:
            where = f" on host {other.host}" if own.sharded else ""
            raise DataError(
                f"channel {channel!r} has no records{where}; give it files with records, one per host at least"
            )
    plan = Plan(
        state=_joint(firsts) if own.sharded else table[0].state,
        batch=own.batch,
        tail=own.tail,
        records=own.state.records,
        rank=mates.index(rank),
        world=len(mates),
        damage=sum(other.damage for other in firsts),
    )
    if plan.steps(0) == 0 and not allow_empty:
        least = min((records for _, records in plan.state.hosts), default=plan.records)
        raise UsageError(
            f"channel {channel!r} has {least} records{' on a host' if own.sharded else ''}, and a step of {plan.world} "
            f"ranks takes {plan.world * plan.batch} (batch_size {plan.batch}), so with tail='drop' there is none; use "
            "a smaller batch_size, or tail='pad' or 'short', or allow_empty=True"
        )
    return plan


def _who(table: Sequence[Facts], rank: int) -> str:
    return f"rank {rank} on {table[rank].host}"


def _check_arguments(table: Sequence[Facts], channel: str) -> None:
    def given(facts: Facts) -> dict[str, object]:
        state, shuffling = facts.state, facts.state.shuffling
        return {
            "batch_size": facts.batch,
            "tail": facts.tail,
            "the distribution": "ShardedByS3Key" if facts.sharded else "FullyReplicated",
            "shuffle": shuffling.shuffle,
            # Follows from the records of each host, where they differ; then the first one's is everybody's.
            "extent": 0 if facts.sharded else shuffling.extent,
            "window": shuffling.window,
            "lanes": shuffling.lanes,
            "seed": state.seed,
            "epoch": state.epoch,
            "position": state.position,
            "the version of the order": state.order_version,
        }

    first = given(table[0])
    for rank, facts in enumerate(table):
        for name, value in given(facts).items():
            if value != first[name]:
                raise UsageError(
                    f"channel {channel!r}: {name} is {value!r} on {_who(table, rank)} and {first[name]!r} on "
                    f"{_who(table, 0)}; all ranks must pass the same arguments and load the same state"
                )


def _hosts(table: Sequence[Facts], channel: str) -> dict[str, int]:
    """The first rank of each host, by the hosts' names, sorted. All hosts must have as many ranks."""
    first: dict[str, int] = {}
    counts: dict[str, int] = {}
    for rank, facts in enumerate(table):
        first.setdefault(facts.host, rank)
        counts[facts.host] = counts.get(facts.host, 0) + 1
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{host}: {count}" for host, count in sorted(counts.items()))
        raise UsageError(
            f"each host has files of its own in channel {channel!r}, which needs as many ranks on each host, but there "
            f"are {each}; start the job with the same number of processes per host"
        )
    return dict(sorted(first.items()))


def _check_same_data(table: Sequence[Facts], first: int, rank: int, channel: str) -> None:
    one, other = table[first], table[rank]
    same = (one.state.fingerprint, one.state.records) == (other.state.fingerprint, other.state.records)
    if not same:

        def found(facts: Facts) -> str:
            left_out = f" and {facts.damage} left out as damaged" if facts.damage else ""
            return f"{facts.state.records} records in {facts.state.files} files{left_out}"

        raise DataError(
            f"channel {channel!r} is not the same on all ranks: {_who(table, first)} has {found(one)}, "
            f"{_who(table, rank)} has {found(other)}{_first_mark(one.state, other.state)}; give all of them the same "
            "files",
            "mismatch",
        )


def _first_mark(one: State, other: State) -> str:
    """Which part of the files differs first, where both have as many."""
    if one.files != other.files or not one.marks or one.marks == other.marks:
        return ""
    return (
        f"; by name, and counted from 0, they differ first in file {differing_part(one.files, one.marks, other.marks)}"
    )


def _joint(firsts: Sequence[Facts]) -> State:
    """The state of files that are spread over hosts. It does not matter which host has which."""
    whole = hashlib.blake2b(digest_size=8)
    for fingerprint in sorted(facts.state.fingerprint for facts in firsts):
        whole.update(fingerprint.to_bytes(8, "little"))
    return replace(
        firsts[0].state,
        fingerprint=int.from_bytes(whole.digest(), "little"),
        records=sum(facts.state.records for facts in firsts),
        files=len(firsts),
        marks=marks([(facts.host, facts.state.fingerprint, facts.state.records) for facts in firsts]),
        hosts=tuple((facts.host, facts.state.records) for facts in firsts),
    )
