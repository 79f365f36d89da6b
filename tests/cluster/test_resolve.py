"""Names to addresses in the background. Nothing here needs a name server."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any

from launcher.cluster.resolve import Resolved, Resolver


def outcomes(resolver: Resolver, count: int, wait_until: Callable[..., Any]) -> dict[str, Resolved]:
    found: dict[str, Resolved] = {}

    def taken() -> bool:
        if select.select([resolver], [], [], 0)[0]:
            found.update((one.name, one) for one in resolver.take())
        return len(found) >= count

    wait_until(taken, f"{count} names")
    return found


def test_names_and_addresses(wait_until: Callable[..., Any]) -> None:
    names = ["localhost", "127.0.0.7", "::1", "algo-9", "algo-1.invalid", "a" * 300, "x..y"]
    resolver = Resolver(names, {"algo-9": "10.1.2.3"})
    found = outcomes(resolver, len(names), wait_until)
    assert found["localhost"].error == ""
    assert set(found["localhost"].addresses) <= {"127.0.0.1", "::1"}
    assert found["127.0.0.7"] == Resolved("127.0.0.7", ("127.0.0.7",), "")
    assert found["::1"] == Resolved("::1", ("::1",), "")
    assert found["algo-9"] == Resolved("algo-9", ("10.1.2.3",), "")
    assert found["algo-1.invalid"].addresses == ()
    assert found["algo-1.invalid"].error.startswith("algo-1.invalid: ")
    assert found["a" * 300].error.endswith("is no host name")
    assert found["x..y"].error.endswith("is no host name")
    assert resolver.take() == []
    assert not resolver.pending
    assert select.select([resolver], [], [], 0)[0] == []
    resolver.ask(["127.0.0.7"])  # once more
    assert outcomes(resolver, 1, wait_until)["127.0.0.7"].addresses == ("127.0.0.7",)
    resolver.close()


def test_many_names_in_few_threads(wait_until: Callable[..., Any]) -> None:
    before = len(os.listdir("/proc/self/task"))
    names = [f"127.0.{number // 250}.{number % 250}" for number in range(2000)]
    resolver = Resolver(names + names)
    assert len(os.listdir("/proc/self/task")) <= before + 8
    found = outcomes(resolver, len(names), wait_until)
    assert {name: one.addresses for name, one in found.items()} == {name: (name,) for name in names}
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= before, "the threads to end")
    resolver.close()


def test_closed(wait_until: Callable[..., Any]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    resolver = Resolver(f"host-{number}.invalid" for number in range(50))
    resolver.close()
    resolver.close()
    resolver.ask(["localhost"])
    assert (resolver.take(), resolver.pending, resolver.fileno()) == ([], frozenset(), -1)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the descriptors to be closed")
