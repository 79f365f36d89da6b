"""What all faces of the collectives stand on: a group of ranks that moves memory, and how ranks become one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from typing import Protocol

from launcher.collectives.place import Place, identity, read_place, status_page
from launcher.errors import CollectiveError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any


class Group(Protocol):
    """One rank's end of a group of ranks.

    Pointers are addresses of CPU memory as ``int``, counts are in elements, ``dtype`` and ``op`` are
    :class:`~launcher.collectives.elements.DType` and :class:`~launcher.collectives.elements.ReduceOp`. Unless a method
    says otherwise, source and target are the same address or do not overlap, and may be unaligned.

    All ranks call the same operations in the same order. A call blocks until this rank's part of the result is in
    place and its buffers may be used again; it releases the GIL. One thread at a time calls a group (Executor sees to
    it); ``abort`` may be called beside. ``prescale`` multiplies this rank's input, ``postscale`` the folded result,
    both in the type of accumulation; floating point only. Results are the same bits on every rank.

    Raises:
        CollectiveError: a rank is gone, was not seen in time, or called something else; the group is unusable then.
        ValueError: an argument is out of range, or the type does not have the operation.
        OSError: the operating system refused memory.
    """

    @property
    def rank(self) -> int:
        """This rank's number in the group."""

    @property
    def size(self) -> int:
        """Number of ranks in the group."""

    timeout_s: float
    """How long a call waits for another rank, in seconds."""

    def allreduce(
        self,
        source: int,
        target: int,
        count: int,
        dtype: int,
        op: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> None:
        """target[i] = fold of all ranks' source[i], i < count."""

    def allreduce_coalesced(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        counts: Sequence[int],
        dtype: int,
        op: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> None:
        """:meth:`allreduce` of many pieces as one message."""

    def reduce_scatter(
        self,
        source: int,
        target: int,
        counts: Sequence[int],
        dtype: int,
        op: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> None:
        """Folds sum(counts) elements; rank r gets the counts[r] that follow those of the ranks before it.

        ``target`` may be this rank's part of ``source``.
        """

    def all_gather(self, source: int, target: int, counts: Sequence[int], dtype: int) -> None:
        """Rank r gives counts[r] elements; every rank gets all of them, in rank order.

        ``source`` may be this rank's part of ``target``.
        """

    def broadcast(self, pointer: int, count: int, dtype: int, root: int) -> None:
        """Everybody's memory becomes as that of rank ``root``."""

    def reduce(
        self,
        source: int,
        target: int,
        count: int,
        dtype: int,
        root: int,
        op: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> None:
        """:meth:`allreduce` for rank ``root`` alone; ``target`` is not touched on the others."""

    def all_to_all(
        self, source: int, target: int, send_counts: Sequence[int], receive_counts: Sequence[int], dtype: int
    ) -> None:
        """send_counts[j] elements go to rank j, receive_counts[j] come from it; parts follow in rank order.

        ``source`` and ``target`` do not overlap.
        """

    def barrier(self) -> None:
        """Returns when all ranks have called it."""

    def allocate(self, nbytes: int) -> int:
        """Address of zeroed, page-aligned memory that all ranks map: messages in it are not copied."""

    def release(self, address: int) -> None:
        """Gives back what :meth:`allocate` gave."""

    def register(self, address: int, nbytes: int, fd: int) -> None:
        """Makes memory that is mapped MAP_SHARED from ``fd``, from its begin on, as good as allocated here."""

    def unregister(self, address: int) -> None:
        """Forgets registered memory. The mapping stays the caller's."""

    def statistics(self) -> dict[str, Any]:
        """``calls`` and ``bytes`` by path (small, pipelined, shared, pulled), and what was measured."""

    def set_path(self, name: str) -> None:
        """For tests and benchmarks, on all ranks alike: automatic, small, pipelined, shared or pulled."""

    def abort(self, reason: str) -> None:
        """Makes every other rank's call fail at once, naming this rank and ``reason``. From any thread."""

    def close(self) -> None:
        """Leaves the group; calls of others that need this rank fail. A second call does nothing."""


class Store(Protocol):
    """A key-value store that all ranks of a group reach, torch's for one."""

    def set(self, key: str, value: bytes) -> None:
        """Makes ``value`` visible under ``key``."""

    def get(self, key: str) -> bytes:
        """Blocks until ``key`` was set; raises on the store's own timeout."""


def join(
    name: str,
    rank: int,
    size: int,
    *,
    ranks: Sequence[int] | None = None,
    store: Store | None = None,
    timeout_s: float = 1800.0,
    leg: str = "auto",
    wire: str = "none",
    independent: bool = False,
) -> Group:
    """Makes a group; blocks until all its members have called it.

    Args:
        name: of the group: the same on all members, used once in a job (a restart of all ranks may use it again).
        rank, size: of this process in the group.
        ranks: the members' numbers in the job, in the order of the group. Without it: all ranks of the job, or, with a
            ``store``, what the members tell each other.
        store: reached by all members. Without it the launcher's environment says where the others are; without a
            launcher a group of one can be made.
        timeout_s: how long this and the group's later calls wait for another rank, in seconds.
        leg, wire, independent: for groups on several hosts; see launcher.collectives.hierarchy.

    Returns:
        The group of shared memory itself (_native.LocalGroup) when all members are on this host, else one that has
        such a group inside and an engine's leg across.

    Raises:
        CollectiveError: a member did not come in time, was lost, or came with other arguments.
        UsageError: the environment does not tell where the others are.
        ValueError: rank, size, ranks or timeout_s make no sense.
        OSError: the operating system refused memory, or a folder to meet in.
    """
    if not name or not 0 <= rank < size:
        raise ValueError(f"group {name!r}: rank {rank} of {size}; expected a name and a rank from 0 to size - 1")
    if not timeout_s > 0:
        raise ValueError(f"group {name!r}: timeout_s is {timeout_s}; expected more than 0 seconds")
    if ranks is not None and (len(ranks) != size or len(set(ranks)) != size or min(ranks) < 0):
        raise ValueError(f"group {name!r}: ranks is {list(ranks)}; expected {size} different numbers, none negative")
    place = read_place(os.environ)
    if store is not None:
        members = _introduce(name, rank, size, ranks, store, place)
    elif place is not None:
        ranks = _checked(name, rank, size, ranks, place)
        if set(ranks) <= set(place.local_ranks):
            members = [Member(number, place.host, "") for number in ranks]
        else:
            from launcher.collectives.hierarchy import job_store

            store = job_store(place, timeout_s)
            members = _introduce(name, rank, size, ranks, store, place)
    elif size == 1:
        members = [Member(ranks[0] if ranks else 0, os.uname().nodename, "")]
    else:
        raise UsageError(
            f"group {name!r} of {size} ranks: this process was not started by the launcher, so nothing tells where the "
            "others are; start it with python -m launcher, or pass store="
        )
    from launcher._native import LocalGroup

    hosts: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        hosts.setdefault(member.identity, []).append(index)
    here = hosts[members[rank].identity]
    with _meeting_place(name, rank, here, members, store, place) as (directory, file_name):
        local = LocalGroup(
            directory,
            file_name,
            here.index(rank),
            len(here),
            ranks=[members[index].rank for index in here],
            host=members[rank].host,
            timeout_s=timeout_s,
            status_page=status_page(os.environ),
        )
    if len(hosts) == 1:
        return local
    from launcher.collectives.hierarchy import make

    assert store is not None  # members of other hosts were learnt from it
    try:
        return make(
            local,
            name,
            rank,
            size,
            ranks=[member.rank for member in members],
            hosts=list(hosts.values()),
            names=[members[indices[0]].host for indices in hosts.values()],
            store=store,
            timeout_s=timeout_s,
            leg=leg,
            wire=wire,
            independent=independent,
        )
    except BaseException as error:
        local.abort(f"the hosts could not be connected: {error}")
        local.close()
        raise


class Member(Record):
    """One rank of a group that is being made. ``rank``: in the job; ``identity``: see place.identity."""

    rank: int
    host: str
    identity: str


def _checked(name: str, rank: int, size: int, ranks: Sequence[int] | None, place: Place) -> Sequence[int]:
    """The members, when the environment alone says who they are."""
    if ranks is None:
        if size != place.world_size:
            raise UsageError(
                f"group {name!r} has {size} of the job's {place.world_size} ranks; pass ranks= to say which they are"
            )
        ranks = range(size)
    if ranks[rank] != place.rank or max(ranks) >= place.world_size:
        raise ValueError(
            f"group {name!r}: ranks is {list(ranks)}, so rank {rank} of the group is rank {ranks[rank]} of the job, "
            f"but this process is rank {place.rank} of {place.world_size}"
        )
    return ranks


def _introduce(
    name: str, rank: int, size: int, ranks: Sequence[int] | None, store: Store, place: Place | None
) -> list[Member]:
    """Who the members are and which of them share a host, told by each of them through the store.

    One that gives up says so there: who comes later would find everybody's word, and wait for those that are gone.
    """
    mine: dict[str, Any] = {
        "rank": ranks[rank] if ranks is not None else place.rank if place else rank,
        "size": size,
        "host": place.host if place else os.uname().nodename,
        "identity": identity(place),
        "visit": os.urandom(8).hex(),
    }
    store.set(_key(name, f"member/{rank}"), json.dumps(mine).encode())
    found = {rank: mine}
    try:
        for index in range(size):
            if index != rank:
                who = f"rank {ranks[index] if ranks is not None else index}"
                found[index] = _fetch(store, name, f"member/{index}", who)
                _check_member(name, rank, mine, who, found[index])
    except BaseException as error:
        visits = {str(index): said.get("visit") for index, said in found.items()}
        gave_up = {**_last_words(error, mine["rank"], mine["host"]), "visits": visits}
        _leave_word(store, _key(name, f"member/{rank}"), {**mine, "gave_up": gave_up})
        raise
    return [Member(int(said["rank"]), str(said["host"]), str(said["identity"])) for _, said in sorted(found.items())]


def _check_member(name: str, rank: int, mine: dict[str, Any], who: str, said: dict[str, Any]) -> None:
    """Raises when the group can not be made with a member that says this of itself."""
    if said.get("size") != mine["size"]:
        raise CollectiveError(
            f"join #0: {who} on {said.get('host')} joins a group of {said.get('size')} ranks, this rank one of "
            f"{mine['size']}; all members must pass the same size (group {name!r})",
            "mismatch",
            rank=int(said.get("rank", -1)),
            host=str(said.get("host", "")),
            operation="join",
        )
    gave_up = said.get("gave_up")
    if gave_up is not None:
        seen = gave_up["visits"].get(str(rank))
        if seen in (None, mine["visit"]):  # else it gave up on an earlier visit of this rank
            one_host = said["identity"] == mine["identity"]  # and with it one clock
            when = f" {max(0.0, time.time() - gave_up['at']):.3g} s ago" if one_host else ""
            raise _passed_on(gave_up, said["rank"], said["host"], when)


def _last_words(error: BaseException, rank: int, host: str) -> dict[str, Any]:
    """What a member that gives up leaves in the store."""
    if isinstance(error, CollectiveError):
        words = {"reason": error.reason, "rank": error.rank, "host": error.host, "text": str(error)}
    else:
        text = f"join #0: rank {rank} on {host} could not take part: {type(error).__name__}: {error}"
        reason = "system" if isinstance(error, OSError) else "left"
        words = {"reason": reason, "rank": rank, "host": host, "text": text}
    return {**words, "at": time.time()}


def _leave_word(store: Store, key: str, words: dict[str, Any]) -> None:
    # An error is on its way already, and may be that the store is gone.
    with contextlib.suppress(OSError, RuntimeError):
        store.set(key, json.dumps(words).encode())


def _passed_on(words: dict[str, Any], rank: int, host: str, when: str) -> CollectiveError:
    return CollectiveError(
        f"{words['text']}; rank {rank} on {host} gave up{when}, before this rank was there",
        "left" if words["reason"] == "interrupted" else str(words["reason"]),
        rank=int(words["rank"]),
        host=str(words["host"]),
        operation="join",
    )


def _key(name: str, what: str) -> str:
    return f"launcher/{os.environ.get('LAUNCHER_ATTEMPT', '0')}/{name}/{what}"


def _fetch(store: Store, name: str, what: str, who: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(store.get(_key(name, what)))
    except (OSError, RuntimeError, LookupError) as error:  # what stores raise on their timeout
        number = int(who.removeprefix("rank ")) if who.startswith("rank ") else -1
        raise CollectiveError(
            f"join #0: {who} did not come: {error}; see whether it is still alive, and whether all members join groups "
            f"in the same order (group {name!r})",
            "timeout",
            rank=number,
            operation="join",
        ) from error
    return value


def file_name(name: str, attempt: int) -> str:
    """A name for a file of group ``name``: short, plain, and different for different names and attempts."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name):
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", name[:20]) + "+" + digest
    return f"group-{attempt}-{name}"


@contextlib.contextmanager
def _meeting_place(
    name: str, rank: int, here: list[int], members: list[Member], store: Store | None, place: Place | None
) -> Iterator[tuple[str, str]]:
    """Folder and file name where the members on this host meet; what was made for it is removed afterwards."""
    plain, first = file_name(name, place.attempt if place else 0), members[here[0]]
    if store is not None and rank != here[0]:
        found = _fetch(store, name, f"place/{here[0]}", f"rank {first.rank}")
        if "gave_up" in found:
            raise _passed_on(found["gave_up"], first.rank, first.host, "")
        yield found["directory"], found["name"]
        return
    made = ""
    try:
        if place is None:
            made = _make_folder()
        directory = place.directory if place else made
        if store is not None:
            # The token keeps apart groups of one name that were made with different stores.
            plain = f"{plain}-{os.urandom(4).hex()}"
            store.set(_key(name, f"place/{here[0]}"), json.dumps({"directory": directory, "name": plain}).encode())
        yield directory, plain
    except BaseException as error:
        if store is not None:
            _leave_word(store, _key(name, f"place/{here[0]}"), {"gave_up": _last_words(error, first.rank, first.host)})
        raise
    finally:
        if made:
            import shutil

            shutil.rmtree(made, ignore_errors=True)


def _make_folder() -> str:
    import tempfile

    return tempfile.mkdtemp(prefix="launcher-group-")  # its mode is 0700
