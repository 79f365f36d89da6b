"""libsvm's format: rows of a sparse matrix, and what is said about lines that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from launcher.data.text import Libsvm
from launcher.errors import DataError, UsageError

from .text_reading import index_of, read, read_source

ACCESS = ("mapped", "read")


def rows(column: Any) -> list[dict[int, float]]:
    return [dict(zip(keys.tolist(), values.tolist(), strict=True)) for keys, values in column]


@pytest.mark.parametrize("access", ACCESS)
def test_rows(tmp_path: Path, access: str) -> None:
    content = b"1 1:0.5 3:-2e3 # comment 9:9\r\n# 7:7\n\n-1 qid:4 2:.25\n 0\n3\t1:nan"
    batch = read(Libsvm(), content, tmp_path / "a.svm", access=access)
    assert batch["label_values"].tolist() == [[1], [-1], [0], [3]]
    assert batch["values"].shape == (3,)
    found = rows(batch["values"])
    assert found[:3] == [{0: 0.5, 2: -2000}, {1: 0.25}, {}]
    assert list(found[3]) == [0] and numpy.isnan(found[3][0])


@pytest.mark.parametrize(
    "content, base, columns, wanted",
    [
        (b"1 1:1 3:3\n", "auto", 3, [0, 2]),
        (b"1 0:1 3:3\n", "auto", 4, [0, 3]),
        (b"1 1:1 3:3\n", 0, 4, [1, 3]),
        (b"1 1:1 3:3\n", 1, 3, [0, 2]),
    ],
)
def test_f25_base(tmp_path: Path, content: bytes, base: Any, columns: int, wanted: list[int]) -> None:
    """F25: 0- or 1-based is said, or found in all of the data: an index 0 anywhere makes it 0-based."""
    found = read(Libsvm.of({"base": base}), content, tmp_path / "a.svm")["values"]
    assert found.shape == (columns,) and found.keys.tolist() == wanted


def test_f25_base_of_all_files(tmp_path: Path) -> None:
    """F25: the one index 0 may be in another file, the largest index in a third."""
    paths = [tmp_path / f"{number}.svm" for number in range(4)]
    for path, content in zip(paths, (b"1 1:1\n", b"", b"2 0:5\n", b"3 7:1\n4 2:2\n"), strict=True):
        path.write_bytes(content)
    values = read_source(Libsvm().source(index_of(Libsvm(), *paths)))["values"]
    assert values.shape == (8,) and values.keys.tolist() == [1, 0, 7, 2]


@pytest.mark.parametrize(
    "line, offset, problem, said",
    [
        (b"1 3:1 2:1", 14, "mismatch", "index 2 comes after 3; expected indices that grow"),
        (b"1 2:1 2:1", 14, "mismatch", "index 2 comes after 2; expected indices that grow"),
        (b"1 0:1", 10, "mismatch", "index 0 is none of 9 one-based features"),
        (b"1 1:1 10:1 9:1", 14, "mismatch", "index 10 is none of 9 one-based features"),
        (b"1,2 1:1", 8, "mismatch", "several labels, '1,2'"),
        (b"x 1:1", 8, "malformed", "begins with 'x'; expected a label"),
        (b"1:1", 8, "malformed", "begins with '1:1'; expected a label"),
        (b"1 1:x", 10, "malformed", "found '1:x'; expected index:value"),
        (b"1 1:", 10, "malformed", "found '1:'"),
        (b"1 -1:1", 10, "malformed", "found '-1:1'"),
        (b"1 1:1:1", 10, "malformed", "found '1:1:1'"),
        (b"1 5", 10, "malformed", "found '5'"),
        (b"1 99999999999999999999999:1", 10, "malformed", "found '99999999999999999999999:1'"),
        (b"1 qid:x 1:1", 10, "malformed", "found 'qid:x'"),
        (b"1 1:1 qid:1", 14, "malformed", "found 'qid:1'"),
    ],
)
def test_f25_bad_lines(tmp_path: Path, line: bytes, offset: int, problem: str, said: str) -> None:
    """F25: an index out of order or twice, and everything else that is no record: a defined error, never a shift."""
    path = tmp_path / "a.svm"
    with pytest.raises(DataError) as caught:
        read(Libsvm(base=1, columns=9), b"1 1:1\n#\n" + line + b"\n5 9:1\n", path)
    error = caught.value
    assert (error.problem, error.offset, error.record, error.file) == (problem, offset, 1, str(path))
    assert said in str(error) and "(line 3)" in str(error)


def test_queries(tmp_path: Path) -> None:
    content, path = b"1 qid:3 1:1\n2 qid:-9223372036854775808\n", tmp_path / "a.svm"
    assert read(Libsvm(qid=True), content, path)["qid"].tolist() == [3, -(2**63)]
    assert read(Libsvm(), content, path, ["label_values", "values", "qid"])["qid"].dtype == numpy.int64
    assert "qid" not in read(Libsvm(), content, path)
    with pytest.raises(DataError, match="no qid"):
        read(Libsvm(qid=True), content + b"3 1:1\n", path)


def test_columns(tmp_path: Path) -> None:
    content, path = b"1 1:1 5:1\n", tmp_path / "a.svm"
    assert read(Libsvm(columns=20), content, path)["values"].shape == (20,)
    assert read(Libsvm(columns=20, dtype="float64"), content, path)["values"].values.dtype == numpy.float64
    with pytest.raises(UsageError, match="columns is 4, but the largest index, 5, is that of column 5"):
        read(Libsvm(columns=4), content, path)
    with pytest.raises(DataError, match="columns="):
        read(Libsvm(), b"1\n2\n", path)
    assert rows(read(Libsvm(columns=3), b"1\n2\n", path)["values"]) == [{}, {}]


@pytest.mark.parametrize("options", [{"base": 2}, {"base": "x"}, {"columns": -1}, {"dtype": "int64"}, {"zero": 1}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Libsvm.of(options)


def test_fields_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected label_values, values"):
        read(Libsvm(), b"1 1:1\n", tmp_path / "a.svm", ["values"])


def test_f25_fuzz_against_scikit_learn(tmp_path: Path) -> None:
    """F25: a short run of fuzz_libsvm.py."""
    pytest.importorskip("sklearn")
    from . import fuzz_libsvm

    records, _ = fuzz_libsvm.run(1000, 25, tmp_path)
    assert records >= 1000
