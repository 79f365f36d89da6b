"""Lines of text as they are, and JSON Lines."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest

from launcher.data.fields import DTYPES, KINDS
from launcher.data.text import JsonLines, Lines
from launcher.errors import DataError, UsageError

from .text_reading import index_of, read, read_source, texts

ACCESS = ("mapped", "read")


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"", []),
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\r\n\r\nb", [b"a", b"", b"b"]),
        (b"\n\n", [b"", b""]),
        (b' \t\n"a\nb"\n,', [b" \t", b'"a', b'b"', b","]),
        (b"\xef\xbb\xbfa\n\xff\x00\n", [b"a", b"\xff\x00"]),
        (b"\r", [b"\r"]),
        (b"x" * 200 + b"\n" + b"y" * 63 + b"\n" + b"z" * 64 + b"\n", [b"x" * 200, b"y" * 63, b"z" * 64]),
    ],
)
def test_lines(tmp_path: Path, content: bytes, wanted: list[bytes], access: str) -> None:
    batch = read(Lines(), content, tmp_path / "a.txt", access=access)
    assert (texts(batch["data"]) if batch else []) == wanted


def test_lines_have_one_field(tmp_path: Path) -> None:
    assert texts(read(Lines(), b"a\n", tmp_path / "a.txt", ["data"])["data"]) == [b"a"]
    with pytest.raises(UsageError, match="the one field of lines is data"):
        read(Lines(), b"a\n", tmp_path / "a.txt", ["text"])
    with pytest.raises(UsageError, match="header"):
        Lines.of({"header": True})


def schema(content: bytes, path: Path, fields: Any = None) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    path.write_bytes(content)
    source = JsonLines().source(index_of(JsonLines(), path), fields)
    return {name: (KINDS[kind], DTYPES[dtype], tuple(shape)) for name, kind, dtype, shape in source.fields}


def test_json_fields_of_the_first_record(tmp_path: Path) -> None:
    line = b'{"a": 1, "b": -2.5, "c": true, "d": "x", "e": [1, 2], "f": [[1, 2, 3], [4, 5, 6.5]], "g": [false]}\n'
    assert schema(b"\n" + line, tmp_path / "a.jsonl") == {
        "a": ("fixed", "int64", ()),
        "b": ("fixed", "float32", ()),
        "c": ("fixed", "bool", ()),
        "d": ("ragged", "uint8", ()),
        "e": ("fixed", "int64", (2,)),
        "f": ("fixed", "float32", (2, 3)),
        "g": ("fixed", "bool", (1,)),
    }
    fields = {"f": "float64", "e": ("int32", None), "z": ("float32", (2, 2)), "d": "text", "a": ("float32", ())}
    assert schema(line, tmp_path / "a.jsonl", fields) == {
        "f": ("fixed", "float64", (2, 3)),
        "e": ("ragged", "int32", ()),
        "z": ("fixed", "float32", (2, 2)),
        "d": ("ragged", "uint8", ()),
        "a": ("fixed", "float32", ()),
    }
    assert list(schema(line, tmp_path / "a.jsonl", ["d", "a"])) == ["d", "a"]


@pytest.mark.parametrize("access", ACCESS)
def test_json_values(tmp_path: Path, access: str) -> None:
    """Keys in any order, others passed over, numbers rounded once, escapes, arrays of any length."""
    content = (
        '{"n": 16777217, "v": [0.1, 1e400], "s": "a\\"\\u00e9\\ud83d\\ude00\\n\u4e2d", "w": [1]}\r\n'
        "\n"
        '  {"x": {"n": [1, {"n": "]}"}]}, "w": [], "s": "", "v": [null, -0.0], "n": 1.00000005960464477539}'
    ).encode()
    fields = {"n": ("float32", ()), "v": ("float64", 2), "s": "text", "w": ("int64", None)}
    batch = read(JsonLines(), content, tmp_path / "a.jsonl", fields, access=access)
    assert batch["n"].tolist() == [16777216.0, 1.0]
    assert batch["v"][0].tolist() == [0.1, numpy.inf]
    assert numpy.isnan(batch["v"][1][0]) and numpy.signbit(batch["v"][1][1])
    assert texts(batch["s"]) == ['a"é😀\n中'.encode(), b""]
    assert [row.tolist() for row in batch["w"]] == [[1], []]


@pytest.mark.parametrize(
    "line, offset, problem, said",
    [
        ('{"a": 1, "b": [1]}', 14, "mismatch", "key 'b': an array of 1 elements; expected 2"),
        ('{"a": 1, "b": [1, 2, 3]}', 14, "mismatch", "key 'b': an array of more than 2 elements"),
        ('{"a": 1}', 8, "mismatch", "key 'b': the record has no such key"),
        ('{"a": 1, "a": 1, "b": [1, 2]}', 13, "mismatch", "key 'a': the key is there twice"),
        ('{"a": "1", "b": [1, 2]}', 6, "mismatch", "key 'a': a string; expected a number"),
        ('{"a": 1.5, "b": [1, 2]}', 6, "mismatch", "'1.5' is no whole number that fits int64"),
        ('{"a": 9223372036854775808, "b": [1, 2]}', 6, "mismatch", "fits int64"),
        ('{"a": null, "b": [1, 2]}', 6, "mismatch", "key 'a': null; expected a number"),
        ('{"a": 1, "b": [1, true]}', 18, "mismatch", "key 'b': true or false; expected a number"),
        ('{"a": 1, "b": [1, 2]', 20, "malformed", "the text ends; expected ',' or '}'"),
        ('{"a": 1, "b": [1, 2]} x', 22, "malformed", "found 'x'; expected the end of the text"),
        ('{"a": 01, "b": [1, 2]}', 7, "malformed", "found '1, "),
        ('{"a": +1, "b": [1, 2]}', 6, "malformed", "found '+1"),
        ('{"a": 1., "b": [1, 2]}', 8, "malformed", "a digit after the point"),
        ('{"a": 1, "b": [1,]}', 17, "malformed", "found ']}'; expected a value"),
        ('{"a": 1, "b": [1, 2],}', 21, "malformed", "expected a string"),
        ('{"a" 1}', 5, "malformed", "expected ':'"),
        ('{"c": nul}', 6, "malformed", "expected a value"),
        ('{"c": "\t"}', 7, "malformed", "no control character"),
        ('{"c": "\\x"}', 7, "malformed", "expected an escape"),
        ('{"c": "\\ud800"}', 7, "malformed", "both halves of a surrogate pair"),
        ('{"c": "\\u12"}', 7, "malformed", "four hexadecimal digits"),
        ('{"c": ' + "[" * 2000 + "]" * 2000 + "}", 1031, "malformed", "nested more than 1024 deep"),
        ("[1]", 0, "malformed", "found '[1]'; expected an object"),
        ("nan", 0, "malformed", "expected an object"),
    ],
)
def test_json_bad_records(tmp_path: Path, line: str, offset: int, problem: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    first = b'{"a": 1, "b": [1, 2]}\n\n'
    with pytest.raises(DataError) as caught:
        read(JsonLines(), first + line.encode() + b"\n", path, {"a": "int64", "b": "float32"})
    error = caught.value
    assert (error.problem, error.record, error.file) == (problem, 1, str(path))
    assert said in str(error) and "(line 3)" in str(error)
    assert error.offset == len(first) + offset


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"a": null}', "key 'a': null, which makes no field; name the fields"),
        ('{"a": {}}', "key 'a': an object, which makes no field"),
        ('{"a": []}', "an array of nothing"),
        ('{"a": [[1], [1, 2]]}', "elements of several lengths"),
        ('{"a": [1, [1]]}', "elements of several lengths"),
        ('{"a": [1, true]}', "numbers and booleans"),
        ('{"a": ["x"]}', "a string, which makes no field"),
        ('{"a": 1, "a": 2}', "there twice"),
        ('{"a": ' + "[" * 40 + "1" + "]" * 40 + "}", "nested more than 32 deep"),
        ('{"a": 1', "the text ends"),
    ],
)
def test_json_first_record_makes_no_fields(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        schema(b"\n" + line.encode(), tmp_path / "a.jsonl")
    assert caught.value.offset > 0 and caught.value.record == 0


@pytest.mark.parametrize(
    "fields, said",
    [
        (["z"], "the first record has no z"),
        ([], "expected names"),
        ({"a": "float16"}, "expected one of float32"),
        ({"s": "float32"}, "the first record has a string"),
        ({"a": ("float32", -1)}, "whole numbers from 0 on"),
        ({"a": ("float32", 1, 2)}, "expected a dtype or"),
        ({"a": ("bool", None)}, "expected one of float32"),
    ],
)
def test_json_fields_that_make_no_sense(tmp_path: Path, fields: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        schema(b'{"a": 1, "s": "x"}', tmp_path / "a.jsonl", fields)


def test_json_no_records(tmp_path: Path) -> None:
    """F10: of no records no fields are known, unless they are said."""
    with pytest.raises(DataError, match="no records"):
        schema(b"\n", tmp_path / "a.jsonl")
    assert schema(b"\n", tmp_path / "a.jsonl", {"a": ("float32", 2)}) == {"a": ("fixed", "float32", (2,))}


def test_json_is_what_python_reads(tmp_path: Path) -> None:
    """Random records, as Python writes them in several ways, with keys that are passed over."""
    draw = random.Random(3)

    def other(depth: int) -> Any:
        form = draw.randrange(7 if depth < 4 else 5)
        if form < 5:
            return [None, True, draw.gauss(0, 1), draw.randint(-9, 9), "".join(draw.choices('a"\\\n{[é😀', k=5))][form]
        inside = [other(depth + 1) for _ in range(draw.randrange(4))]
        return inside if form == 5 else {str(number): value for number, value in enumerate(inside)}

    records, lines = [], []
    for _ in range(500):
        record = {
            "number": draw.choice([draw.gauss(0, 1), draw.uniform(-1, 1) * 10.0 ** draw.randint(-300, 300), 0, -7]),
            "whole": draw.randint(-(2**63), 2**63 - 1),
            "yes": draw.random() < 0.5,
            "text": "".join(draw.choices('ab "\\/\b\n\té中😀\x7f', k=draw.randint(0, 20))),
            "matrix": [[draw.gauss(0, 1) for _ in range(3)] for _ in range(2)],
            "many": [draw.gauss(0, 1) for _ in range(draw.randint(0, 40))],
            **{f"other{number}": other(0) for number in range(draw.randrange(3))},
        }
        records.append(record)
        shuffled = dict(draw.sample(sorted(record.items()), len(record)))
        blanks = draw.choice([(",", ":"), (", ", ": "), (" ,\t", "\t: ")])
        lines.append(json.dumps(shuffled, ensure_ascii=draw.random() < 0.5, separators=blanks))
    fields = {
        "number": ("float64", ()),
        "whole": "int64",
        "yes": "bool",
        "text": "text",
        "matrix": ("float64", (2, 3)),
        "many": ("float64", None),
    }
    content = "\n".join(lines).encode()
    batch = read(JsonLines(), content, tmp_path / "a.jsonl", fields)
    for name in ("number", "whole", "yes", "matrix"):
        assert batch[name].tolist() == [record[name] for record in records]
    assert texts(batch["text"]) == [record["text"].encode() for record in records]
    assert [row.tolist() for row in batch["many"]] == [record["many"] for record in records]
    again = read_source(JsonLines().source(index_of(JsonLines(), tmp_path / "a.jsonl", access="read"), fields))
    assert again["whole"].tolist() == batch["whole"].tolist()
