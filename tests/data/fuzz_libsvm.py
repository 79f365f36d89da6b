"""Differential fuzz: libsvm's format through our reader and through scikit-learn must give the same rows.

    python tests/data/fuzz_libsvm.py --cases 1000000 --seed 1

A case is a record: a line of a file that is zero- or one-based, has comments, queries and blanks, and perhaps a line
that is damaged. Where load_svmlight_file() refuses a file, so must we; where it takes one, we take it with the same
values. float32 is compared with the C library's strtof: scikit-learn rounds twice.
"""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path
from typing import Any

import numpy
from sklearn.datasets import load_svmlight_file

from launcher.data.text import Libsvm
from launcher.errors import DataError, UsageError

if __package__:
    from .fuzzing import check_files, main
    from .text_reading import nearest_float32, read
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from fuzzing import check_files, main
    from text_reading import nearest_float32, read

NUMBERS = ("0", "-0", "1", "+1", "1e-45", "4.9e-324", "1e400", "-1e400", "1e-400", "inf", "-inf", ".5", "5.", "007")
DAMAGES = (
    "1 3:1 2:1",  # not sorted
    "1 2:1 2:1",  # twice
    "1 -1:1",
    "1 a:1",
    "1 1:",
    "1 1:x",
    "1 :1",
    "1 1",
    "x 1:1",
    "1,2 1:1",
    "1:1 2:1",
    "1 1:1:1",
    "1 99999999999999999999:1",
    "1 qid:x 1:1",  # which scikit-learn looks at only when it is asked for queries
)


def number(draw: random.Random) -> str:
    """A number as programs write it, and some that they seldom write."""
    form = draw.random()
    if form < 0.4:
        return f"{draw.gauss(0, 1):.{draw.randint(0, 9)}f}"
    if form < 0.6:
        return repr(draw.gauss(0, 1) * 10.0 ** draw.randint(-30, 30))
    if form < 0.9:
        return str(draw.randint(-100, 10 ** draw.randint(0, 20)))
    return draw.choice(NUMBERS)


class File:
    """What is drawn for one file."""

    def __init__(self, draw: random.Random, records: int) -> None:
        self.base = draw.randint(0, 1)
        self.queries = draw.random() < 0.3
        self.features = draw.choice([3, 20, 1000, 10**9])
        self.rows: list[tuple[str, int, dict[int, str]]] = []
        self.lines: list[str] = []
        self.damaged = False
        for _ in range(records):
            count = draw.randint(0, min(12, self.features))
            indices = sorted({draw.randrange(self.features) for _ in range(count)})
            row = (number(draw), draw.randint(0, 9), {index + self.base: number(draw) for index in indices})
            self.rows.append(row)
            self.lines.append(self.line(draw, *row))

    def line(self, draw: random.Random, label: str, query: int, values: dict[int, str]) -> str:
        words = [label, *([f"qid:{query}"] if self.queries else [])]
        words += [f"{draw.choice(['', '', '0'])}{index}:{value}" for index, value in values.items()]
        blank = draw.choice([" ", " ", "  ", "\t"])
        comment = draw.choice(["", "", "", " # 1:1", "#"])
        return draw.choice(["", "", " "]) + blank.join(words) + draw.choice(["", "", " "]) + comment

    def content(self, draw: random.Random) -> bytes:
        lines = []
        for line in self.lines:
            while draw.random() < 0.05:
                lines.append(draw.choice(["", "  ", "# a comment", " \t# 3:3"]))
            lines.append(line)
        end = draw.choice(["\n", "\n", "\r\n"])
        return (end.join(lines) + draw.choice([end, end, ""])).encode()


def check(draw: random.Random, file: File, path: Path) -> None:
    """One file: ours, and theirs."""
    content = file.content(draw)
    base = draw.choice(["auto", file.base])
    options: dict[str, Any] = {"zero_based": base if base == "auto" else base == 0, "query_id": file.queries}
    try:
        loaded = load_svmlight_file(io.BytesIO(content), dtype=numpy.float64, **options)
    except (ValueError, OverflowError) as error:
        try:
            read(Libsvm(base=base, qid=file.queries), content, path)
        except (DataError, UsageError):
            return
        raise AssertionError(f"we take what they refuse ({error}): {content!r}") from error
    matrix, labels = loaded[0], loaded[1]
    if matrix.nnz == 0:
        return  # of no columns, as far as they know
    found = read(
        Libsvm(base=base, qid=file.queries, dtype="float64"), content, path, access=draw.choice(["mapped", "read"])
    )
    values = found["values"]
    good = (
        values.shape == (matrix.shape[1],)
        and numpy.array_equal(values.offsets, matrix.indptr)
        and numpy.array_equal(values.keys, matrix.indices)
        and numpy.array_equal(values.values, matrix.data)
        and numpy.array_equal(found["label_values"][:, 0], labels)
        and (not file.queries or numpy.array_equal(found["qid"], loaded[2]))
    )
    if not good:
        raise AssertionError(f"{found} is not {matrix!r}, {labels}\n{content!r}")
    if file.damaged:
        return
    single = read(Libsvm(base=base), content, path)
    wanted = [nearest_float32(text) for _, _, row in file.rows for text in row.values()]
    if not numpy.array_equal(single["values"].values, numpy.array(wanted, numpy.float32)):
        raise AssertionError(f"{single['values'].values} is not {wanted}\n{content!r}")


def run(cases: int, seed: int, folder: Path) -> tuple[int, int]:
    """Checks as many records at least. How many they were, and of how many files."""
    path = folder / "fuzz.libsvm"

    def check_one(draw: random.Random) -> int:
        file = File(draw, draw.randint(1, 60))
        check(draw, file, path)
        file.lines[draw.randrange(len(file.lines))] = draw.choice(DAMAGES if file.queries else DAMAGES[:-1])
        file.damaged = True
        check(draw, file, path)
        return len(file.rows)

    return check_files(cases, seed, check_one)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], run)
