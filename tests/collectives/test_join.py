"""How ranks become a group: by the launcher's environment or a store; who is missing; what is left behind."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from launcher.collectives.group import file_name, join
from launcher.collectives.place import read_place
from launcher.errors import UsageError

STORE = """
class Files:  # a store in a folder
    def __init__(self, folder, limit_s=20.0):
        self.folder, self.limit_s = folder, limit_s
        os.makedirs(folder, exist_ok=True)
    def path(self, key):
        return os.path.join(self.folder, key.replace("/", "|"))
    def set(self, key, value):
        with open(self.path(key) + f".{os.getpid()}", "wb") as file:
            file.write(value)
        os.rename(file.name, self.path(key))
    def get(self, key):
        try:
            wait_for(lambda: os.path.exists(self.path(key)), self.limit_s)
        except AssertionError:
            raise TimeoutError(f"no {key} after {self.limit_s} s") from None
        with open(self.path(key), "rb") as file:
            return file.read()

def total(group):
    value = np.array([RANK + 1.0])
    pointer = value.ctypes.data
    group.allreduce(pointer, pointer, 1, DType.float64)
    return float(value[0])

"""


def waits_in_join(pid: int, sockets: int = 1) -> bool:
    """Whether the process has at least so many sockets open and sleeps: the meeting's first rank has one for itself and
    one for each rank that came. A rank that has connected says hello before it sleeps."""
    try:
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return sum(link.startswith("socket:") for link in links) >= sockets and state == "S"


def test_who_is_missing_is_told(ranks: Any) -> None:
    """Rank 2 of 3 does not run; later ones join with another name, another size, other members."""
    shown = ranks.start(
        3,
        """
        seen = []
        def attempt(name, *args, timeout_s=0.8, **options):
            try:
                join(name, *args, timeout_s=timeout_s, **options)
                seen.append("joined")
            except CollectiveError as error:
                seen.append(told(error))
        attempt("pair", RANK, 2, ranks=[0, 1], timeout_s=20)  # from here on at the same time
        attempt("all", RANK, 3)
        attempt(f"mine-{RANK}", RANK, 2, ranks=[0, 1])
        show(seen)
        """,
        only=[0, 1],
    ).wait()
    for rank, outcome in enumerate(shown):
        assert outcome.code == 0, outcome
        pair, everybody, own = outcome.shown
        for error, missing in ((everybody, 2), (own, 1 - rank)):
            reason, culprit, host, operation, sequence, text = error
            assert (reason, operation, sequence) == ("timeout", "join", 0), text
            assert culprit == missing and f"rank {missing}" in text, text
            assert host == "algo-1" and "algo-1" in text, text
        assert pair == "joined"
    # Only letters to those that never came, which go with the job's folder.
    assert ranks.left() == ["group-0-all~2~0", "group-0-mine-0~1~0", "group-0-mine-1~0~1"]


TOO_LATE = """
seen = {}
def attempt(name, limits_s, late=None, again="", **options):
    if RANK == late:  # when the others have given up
        marks = [os.path.join(os.environ["MARKS"], f"{name}.{rank}") for rank in range(3) if rank != late]
        wait_for(lambda: all(map(os.path.exists, marks)))
    try:
        group = join(name, RANK, 3, timeout_s=limits_s[RANK], **options)
        seen[name + again] = total(group)
        group.close()
    except CollectiveError as error:
        seen[name + again] = told(error)
    except KeyboardInterrupt:
        seen[name + again] = "interrupted"
    mark(name)

def interrupt(number, frame):
    raise KeyboardInterrupt

attempt("start", (20, 20, 20))  # from here on at the same time
attempt("last", (0.8, 0.8, 20), late=2)
attempt("first", (20, 0.8, 0.8), late=0)
attempt("impatient", (20, 0.8, 20), late=2)
if RANK == 1:
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
attempt("interrupted", (20, 20, 20), late=2)
attempt("last", (20, 20, 20), again=" again")
attempt("first", (20, 20, 20), again=" again")
attempt("stored", (20, 20, 20), late=1, store=Files("store", 20 if RANK == 1 else 0.8))
show(seen)
"""


def test_who_comes_too_late_hears_why(ranks: Any) -> None:
    """The others have given up, because of it or of another one: it does not wait, and blames none of them."""
    shown = ranks.run(3, STORE + TOO_LATE)
    for rank, seen in enumerate(shown):
        assert seen["start"] == seen["last again"] == seen["first again"] == 6.0
        for name, reason, culprit, late in (
            ("last", "timeout", 2, 2),
            ("first", "timeout", 0, 0),
            ("impatient", "timeout", 2, 2),
            ("interrupted", "left", 1, 2),
            ("stored", "timeout", 1, 1),
        ):
            if name == "interrupted" and rank == 1:
                assert seen[name] == "interrupted"
                continue
            told, who, _, operation, _, text = seen[name]
            assert (told, who, operation) == (reason, culprit, "join"), seen
            assert text.startswith(f"join #0: rank {culprit}"), seen
            assert (" s ago, " in text) == (rank == late), seen
    assert ranks.left() == []


def test_ranks_that_disagree_about_the_group(ranks: Any) -> None:
    shown = ranks.run(
        2,
        """
        try:
            join("group", RANK, 2 + RANK, ranks=range(2 + RANK), timeout_s=1.0)
            show("joined")
        except (CollectiveError, ValueError) as error:
            show(f"{type(error).__name__}: {error}")
        """,
        env=lambda rank: {"WORLD_SIZE": str(2 + rank), "LOCAL_WORLD_SIZE": str(2 + rank)},
    )
    assert all(text.startswith("CollectiveError: ") and "rank" in text for text in shown), shown


def test_a_rank_that_dies_while_the_others_come(ranks: Any, wait_until: Any) -> None:
    """Rank 2 is not there yet, rank 1 is killed: rank 0 is told at once, not after its limit."""
    ranks.start(
        3,
        """
        try:
            join("group", RANK, 3, timeout_s=60)
        except CollectiveError as error:
            show(told(error))
        """,
        only=[0, 1],
    )
    wait_until(lambda: waits_in_join(ranks.processes[0].pid, sockets=2), "rank 1 has come to rank 0")
    wait_until(lambda: waits_in_join(ranks.processes[1].pid), "rank 1 waits")
    ranks.processes[1].kill()
    outcomes = ranks.wait(20)
    reason, culprit, host, operation, _, text = outcomes[0].shown
    assert (reason, culprit, host, operation) == ("lost", 1, "algo-1", "join"), text
    assert ranks.left() == ["group-0-group~2~0"]  # in case that it comes


def test_leftovers_of_a_crash_are_no_hindrance(ranks: Any, wait_until: Any) -> None:
    """All ranks are killed while they join; the next ones, of the same or the next attempt, meet all the same."""
    program = 'group = join("world", RANK, 2, timeout_s=20)\ngroup.barrier()\nshow(group.size)\ngroup.close()\n'
    ranks.start(2, program, only=[0])
    wait_until(lambda: waits_in_join(ranks.processes[0].pid) and ranks.left(), "rank 0 in join")
    ranks.processes[0].kill()
    ranks.processes[0].wait()
    assert ranks.run(2, program) == [2, 2]
    assert ranks.left() == []
    ranks.start(2, program, only=[0])  # one of attempt 0 is still there
    late = ranks.processes[0]
    wait_until(lambda: waits_in_join(late.pid) and ranks.left(), "rank 0 in join")
    try:
        assert ranks.run(2, program, attempt=1) == [2, 2]
        assert late.poll() is None
    finally:
        late.kill()
        late.wait()


def test_long_and_odd_names(ranks: Any) -> None:
    """The path is longer than the 108 bytes of a socket's address, and the name is no file name."""
    ranks.run_dir = ranks.directory / ("d" * 120) / ("e" * 120)
    shown = ranks.run(
        2,
        STORE
        + """
seen = []
for name in ("x" * 300, "../up", "a b/c\\n", "größe", "-", "."):
    group = join(name, RANK, SIZE, timeout_s=20)
    seen.append(total(group))
    group.close()
show(seen)
""",
    )
    assert shown == [[3.0] * 6] * 2
    assert ranks.left() == []


def test_a_folder_that_others_may_enter_is_refused(ranks: Any) -> None:
    ranks.run_dir.mkdir(mode=0o700)
    ranks.run_dir.chmod(0o755)
    shown = ranks.run(
        2,
        """
        try:
            join("world", RANK, 2, timeout_s=1)
            show("joined")
        except (CollectiveError, ValueError, OSError) as error:
            show(f"{type(error).__name__}: {error}")
        """,
    )
    for text in shown:
        assert str(ranks.run_dir) in text and "755" in text, text
    assert stat.S_IMODE(ranks.run_dir.stat().st_mode) == 0o755


def test_a_folder_that_is_not_there(ranks: Any) -> None:
    (text,) = ranks.run(
        1,
        """
        os.environ["LAUNCHER_RUN_DIR"] += "/gone"
        try:
            join("world", 0, 2, ranks=[0, 1], timeout_s=0.3)
        except (CollectiveError, OSError) as error:
            show(f"{type(error).__name__}: {error}")
        """,
        env={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
    )
    assert "gone" in text and "No such file" in text


def without_launcher(ranks: Any) -> dict[str, str]:
    (ranks.directory / "tmp").mkdir(exist_ok=True)
    return {"LAUNCHER_RUN_DIR": "", "LAUNCHER_STATUS_PAGE": "", "TMPDIR": str(ranks.directory / "tmp")}


def test_by_a_store(ranks: Any) -> None:
    """Without the launcher: the ranks tell each other where they are; nothing is left of where they met."""
    shown = ranks.run(
        3,
        STORE
        + """
store = Files("store")
group = join("g", RANK, SIZE, store=store, timeout_s=20)
seen = [type(group).__name__, group.rank, total(group)]
if RANK != 1:
    pair = join("pair", RANK // 2, 2, ranks=[0, 2], store=store, timeout_s=20)
    seen.append(total(pair))
    pair.close()
store.limit_s = 0.2
try:
    join("other", RANK, SIZE + 1, store=store, timeout_s=0.2)
except CollectiveError as error:
    seen.append(told(error))
store.limit_s = 20
try:
    join("sizes", RANK, SIZE + (RANK == 2), store=store, timeout_s=5)
except CollectiveError as error:
    seen.append(told(error))
group.barrier()
group.close()
show(seen)
""",
        env=without_launcher(ranks),
    )
    for rank, (kind, number, sum_of_all, *rest) in enumerate(shown):
        assert (kind, number, sum_of_all) == ("LocalGroup", rank, 6.0)
        if rank != 1:
            assert rest.pop(0) == 4.0
        missing, sizes = rest
        assert missing[:2] == ["timeout", 3] and missing[3] == "join" and "rank 3" in missing[5]
        assert sizes[0] == "mismatch" and sizes[3] == "join", sizes
        assert sizes[1] == (2 if rank < 2 else 0)
    assert list((ranks.directory / "tmp").iterdir()) == []


def test_by_a_store_under_the_launcher(ranks: Any) -> None:
    """The numbers in the job come from the members themselves, the folder is the launcher's."""
    shown = ranks.run(
        2,
        STORE
        + """
group = join("g", 1 - RANK, SIZE, store=Files("store"), timeout_s=20)
seen = total(group)
if RANK == 0:
    group.barrier()
    group.abort("enough")
    show(seen)
else:
    try:
        while True:
            group.barrier()
    except CollectiveError as error:
        show(told(error))
""",
    )
    assert shown[0] == 3.0
    assert shown[1][:3] == ["left", 0, "algo-1"] and "enough" in shown[1][5]
    assert ranks.left() == []


def test_no_folder_can_be_made(ranks: Any) -> None:
    outcomes = ranks.run(
        2,
        STORE
        + """
import tempfile
if RANK == 0:
    tempfile.tempdir = os.path.abspath("nowhere")
try:
    join("g", RANK, SIZE, store=Files("store"), timeout_s=20)
except CollectiveError as error:
    show(told(error))
except OSError as error:
    show(str(error))
""",
        env=without_launcher(ranks),
    )
    assert "nowhere" in outcomes[0]
    reason, culprit, _, operation, _, text = outcomes[1]
    assert (reason, culprit, operation) == ("system", 0, "join") and "nowhere" in text


def test_interrupted_while_it_waits(ranks: Any, wait_until: Any) -> None:
    ranks.start(
        2,
        """
        try:
            join("world", RANK, 2, timeout_s=60)
        except KeyboardInterrupt:
            show("interrupted")
        """,
        only=[0],
    )
    wait_until(lambda: waits_in_join(ranks.processes[0].pid) and ranks.left(), "rank 0 in join")
    ranks.processes[0].send_signal(signal.SIGINT)
    assert ranks.wait(20)[0].shown == "interrupted"
    assert ranks.left() == ["group-0-world~1~0"]


def test_arguments() -> None:
    for arguments in (("", 0, 1), ("g", 1, 1), ("g", -1, 2)):
        with pytest.raises(ValueError, match="expected a name and a rank"):
            join(*arguments)
    with pytest.raises(ValueError, match="timeout_s is 0"):
        join("g", 0, 1, timeout_s=0)
    with pytest.raises(ValueError, match="expected 2 different numbers"):
        join("g", 0, 2, ranks=[1, 1])


def test_without_anything_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAUNCHER_RUN_DIR", raising=False)
    with pytest.raises(UsageError, match="start it with python -m launcher, or pass store="):
        join("g", 0, 2)


def test_file_names() -> None:
    assert file_name("world", 3) == "group-3-world"
    odd = [file_name(name, 0) for name in ("a/b", "a_b", "a\0b", "x" * 40, "x" * 41, "x" * 400, "..", "é")]
    assert len(set(odd)) == len(odd)
    assert all(len(name) < 64 and "/" not in name and "\0" not in name for name in odd)


PLACE = {
    "LAUNCHER_RUN_DIR": "/run/dir",
    "RANK": "3",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "3",
    "SM_CURRENT_HOST": "algo-2",
    "LAUNCHER_ATTEMPT": "2",
}


def test_the_place_of_a_rank() -> None:
    place = read_place(PLACE)
    assert place is not None
    assert (place.rank, place.world_size, place.local_ranks) == (3, 6, (2, 3, 4))
    assert (place.directory, place.host, place.attempt) == ("/run/dir", "algo-2", 2)
    # --virtual-local-rank: all ranks are told that they are the first of their host.
    virtual = read_place({**PLACE, "LOCAL_RANK": "0", "LAUNCHER_STATUS_PAGE": "/run/dir/attempt_2/1/status"})
    assert virtual is not None and virtual.local_ranks == (2, 3, 4)
    assert read_place({"RANK": "0"}) is None
    assert read_place({"LAUNCHER_RUN_DIR": "/run/dir"}) is None


@pytest.mark.parametrize(
    "change", [{"RANK": "x"}, {"RANK": "-1"}, {"RANK": "6"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "5"}]
)
def test_an_environment_that_can_not_be(change: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="launcher sets"):
        read_place({**PLACE, **change})
