"""Codecs: what a body becomes, what a prediction becomes, and that damage of any kind is an error that says so."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import random
import struct
import sys
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest

from launcher.data.fields import Ragged, Sparse
from launcher.serving.codecs import (
    CSV,
    DECODED,
    ENCODED,
    JSON,
    JSON_LINES,
    NPY,
    NPZ,
    RECORDS,
    TEXT,
    decode,
    encode,
    warm_up,
)
from launcher.serving.media import parse_media_type
from launcher.serving.values import CodecError, MalformedBody, NotEncodable, UnsupportedMediaType

SURROGATE = "\ud800"


def read(body: bytes | str, content_type: str) -> Any:
    return decode(body.encode() if isinstance(body, str) else body, parse_media_type(content_type))


def same(found: Any, expected: Any) -> None:
    """The same type, dtype, shape and values; nan equals nan."""
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


class Tensor:
    """What a tensor of torch on another device looks like from here."""

    def __init__(self, array: Any, steps: tuple[str, ...] = ("detach", "cpu", "numpy")) -> None:
        self._array, self._steps = array, steps

    def __getattr__(self, name: str) -> Any:
        if not self._steps or name != self._steps[0]:
            raise AttributeError(name)
        if name == "numpy":
            return lambda: self._array
        return lambda: Tensor(self._array, self._steps[1:])


# --- which types there are --------------------------------------------------------------------------------------------


def test_json_is_preferred_and_the_sets_are_what_they_should_be() -> None:
    assert DECODED[0] == ENCODED[0] == JSON
    wanted = {JSON, CSV, JSON_LINES, NPY, NPZ, TEXT, RECORDS}
    aliases = {"application/x-jsonlines", "application/jsonl", "application/x-ndjson"}
    assert set(DECODED) == set(ENCODED) == wanted | aliases


@pytest.mark.parametrize("content_type", ["image/png", "application/x-python-pickle", "text/html", "image/svg+json"])
def test_unknown_types_are_unsupported(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match=r"not supported; supported: application/json, text/csv"):
        read(b"", content_type)
    with pytest.raises(UnsupportedMediaType, match=r"can not be written; supported: application/json"):
        encode([1], content_type)


def test_bytes_are_answers_already() -> None:
    for essence in (*ENCODED, "image/png"):
        assert encode(b"\x00any", essence) == b"\x00any"
    assert encode(bytearray(b"a"), JSON) == encode(memoryview(b"a"), JSON) == b"a"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("essence", [JSON, CSV, JSON_LINES, NPY, NPZ, RECORDS])
def test_bodies_of_all_kinds_and_arrays_that_can_be_written_to(kind: Any, essence: str) -> None:
    array = np.array([[1.5, 2.5], [3.5, 4.5]])
    found = decode(kind(encode({"values": array} if essence == RECORDS else array, essence)), parse_media_type(essence))
    if essence in (NPZ, RECORDS):
        [found] = found.values()
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, array)
    found += 1
    assert found.dtype.isnative and found.flags.writeable


def test_warm_up_does_no_harm() -> None:
    warm_up()
    assert "numpy" in sys.modules


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", np.array(1)),
        ("-1.5", np.array(-1.5)),
        ("true", np.array(True)),
        ("[]", np.empty(0)),
        ("[[], []]", np.empty((2, 0))),
        ("[[[], []]]", np.empty((1, 2, 0))),
        ("[1, 2]", np.array([1, 2])),
        ("[1, 2.5]", np.array([1, 2.5])),
        ("[[1], [2.5]]", np.array([[1], [2.5]])),
        ("[true, false]", np.array([True, False])),
        ("[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]", np.arange(1, 9).reshape(2, 2, 2)),
        ("[NaN, Infinity, -Infinity]", np.array([np.nan, np.inf, -np.inf])),
        ("[9223372036854775807, -9223372036854775808]", np.array([2**63 - 1, -(2**63)])),
        ("[9223372036854775808, 0.5]", np.array([2.0**63, 0.5])),
        # The rest is what Python's parser gives.
        ("[9223372036854775808]", [2**63]),
        ("9223372036854775808", 2**63),
        ("[1, true]", [1, True]),
        ("[1, null]", [1, None]),
        ('[1, "a"]', [1, "a"]),
        ('["1", "2"]', ["1", "2"]),
        ("[[1, 2], [3]]", [[1, 2], [3]]),
        ("[[1, 2], 3]", [[1, 2], 3]),
        ("[[], [1]]", [[], [1]]),
        ('{"a": [1, 2]}', {"a": [1, 2]}),
        ('{"a": 1, "a": 2}', {"a": 2}),
        ('[{"a": 1}]', [{"a": 1}]),
        ("null", None),
        ('"text"', "text"),
    ],
)
def test_json_is_read(text: str, expected: Any) -> None:
    same(read(text, JSON), expected)
    same(read(f" {text}\r\n", "application/json; charset=utf-8"), expected)
    same(read(text, "application/vnd.company.v2+json"), expected)


def test_lists_too_deep_for_an_array_stay_lists() -> None:
    value = read("[" * 40 + "1" + "]" * 40, JSON)
    for _ in range(40):
        [value] = value
    assert value == 1


def test_json_of_all_encodings() -> None:
    for charset in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        assert read('["\xe4\U0001f600"]'.encode(charset), JSON) == ["\xe4\U0001f600"]  # RFC 4627, 3
    assert read('["\xe4"]'.encode("latin-1"), "application/json; charset=ISO-8859-1") == ["\xe4"]
    assert read("\ufeff[1]".encode(), "application/json; charset=utf-8") == [1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "line 1, column 1: Expecting value"),
        (b"[1,\n 2", "line 2, column 3: Expecting ',' delimiter"),
        (b"[1] 2", "line 1, column 5: Extra data"),
        (b"{'a': 1}", "line 1, column 2"),
        (b'["\xff"]', "not utf-8: byte 2: invalid start byte"),
        (b'["\xed\xa0\x80"]', "not utf-8: byte 2"),  # half a character, which json.loads(bytes) lets pass
        (b'["a\x00"]', "line 1, column 4: Invalid control character"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "a number can not be read"),
    ],
)
def test_malformed_json_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(MalformedBody, match=message):
        read(body, JSON)


@pytest.mark.parametrize("charset", ["klingon", "rot13", "hex", "idna", "punycode", "unicode_escape", "undefined"])
@pytest.mark.parametrize("essence", [JSON, CSV, JSON_LINES, TEXT])
def test_charsets_that_are_none_are_unsupported(essence: str, charset: str) -> None:
    with pytest.raises(UnsupportedMediaType, match=f"charset '{charset}' is not supported"):
        read(b"1", f"{essence}; charset={charset}")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        ("a\xe4\n", '"a\\u00e4\\n"'),
        (True, "true"),
        (np.bool_(True), "true"),
        (np.float32(0.5), "0.5"),
        (np.int64(3), "3"),
        ([1, (2.5, "x")], '[1, [2.5, "x"]]'),
        (np.array([0.1, 2.0]), "[0.1, 2.0]"),
        (np.array(7), "7"),
        (np.empty((2, 0)), "[[], []]"),
        ({"a": np.array([[1, 2]]), "b": [np.float64(0.5), np.int8(1)]}, '{"a": [[1, 2]], "b": [0.5, 1]}'),
        (np.array(["a", "b"]), '["a", "b"]'),
        (np.array([{"a": 1}, None], dtype=object), '[{"a": 1}, null]'),
        ({1: 2, "a": 3, None: 4}, '{"1": 2, "a": 3, "null": 4}'),
        ({np.int64(1): 0.5}, '{"1": 0.5}'),
        ({np.str_("a"): 0.5}, '{"a": 0.5}'),
        # JSON has no such numbers.
        (float("nan"), "null"),
        (np.array([1.0, np.nan, np.inf, -np.inf]), "[1.0, null, null, null]"),
        ({"a": [np.float32("nan"), (np.array([[np.nan]]), 1)]}, '{"a": [null, [[[null]], 1]]}'),
        (Tensor(np.array([1.5, 2.5])), "[1.5, 2.5]"),
        ({"logits": Tensor(np.array([[1.5, np.nan]]))}, '{"logits": [[1.5, null]]}'),
    ],
)
def test_json_is_written(value: Any, text: str) -> None:
    assert encode(value, JSON) == text.encode()


def test_json_is_written_as_the_reference_does() -> None:
    """Byte for byte what ``json.dumps(default=tolist)`` gives, as long as it is JSON."""
    generator = np.random.default_rng(3)
    for dtype in ("float64", "float32", "float16", "int64", "uint8", "bool"):
        array = (generator.standard_normal((5, 3)) * 100).astype("int64" if dtype == "uint8" else dtype).astype(dtype)
        value = {"predictions": array, "text": "\u20ac", "n": 5}
        assert encode(value, JSON) == json.dumps(value, default=lambda one: one.tolist()).encode()


def circular() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "type set"),
        ([b"a"], "type bytes"),
        (object(), "type object"),
        (1j, "type complex"),
        (np.array([1j]), "type complex"),
        ({"a": datetime.date(2026, 1, 1)}, r"type datetime\.date"),
        (circular(), "contains itself"),
        ({(1, 2): 3}, "keys must be"),
        ({float("nan"): 3}, "no form in JSON"),
        ([float("nan"), {1}], "type set"),
    ],
)
def test_what_json_can_not_hold(value: Any, message: str) -> None:
    with pytest.raises(NotEncodable, match=message):
        encode(value, JSON)
    with pytest.raises(NotEncodable, match=message):
        encode([value], JSON_LINES)


def random_value(random_: random.Random, depth: int = 3) -> Any:
    kind = random_.randrange(8 if depth else 5)
    if kind < 5:
        number = random_.choice([random_.gauss(0, 1), random_.uniform(-1e300, 1e300)])
        return [None, random_.random() < 0.5, random_.randint(-(2**53), 2**53), number, random_text(random_)][kind]
    items = [random_value(random_, depth - 1) for _ in range(random_.randrange(4))]
    return {random_text(random_): item for item in items} if kind == 5 else items


def random_text(random_: random.Random) -> str:
    return "".join(random_.choices('ab ,"\n\r\t\xe4\u20ac\U0001f600;\\/', k=random_.randrange(6)))


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def test_any_json_value_comes_back() -> None:
    random_ = random.Random(1)
    for _ in range(500):
        value = random_value(random_)
        body = encode(value, JSON)
        assert plain(read(body, JSON)) == json.loads(body) == value
        lines = [random_value(random_) for _ in range(random_.randrange(5))]
        assert plain(read(encode(lines, JSON_LINES), JSON_LINES)) == lines


def test_arrays_of_any_shape_come_back_from_json() -> None:
    random_, generator = random.Random(2), np.random.default_rng(2)
    for _ in range(200):
        shape = tuple(random_.randrange(1, 4) for _ in range(random_.randrange(5)))
        dtype = random_.choice(["float64", "int64", "bool"])
        array = (generator.standard_normal(shape) * 10).astype(dtype)
        same(read(encode(array, JSON), JSON), np.array(array))
        if shape:
            same(read(encode(array, JSON_LINES), JSON_LINES), array)


# --- CSV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", np.array([[1]])),
        ("1,2\n", np.array([[1, 2]])),
        ("1\n2\n3\n", np.array([[1], [2], [3]])),
        ("1,2\r\n3,4\r\n", np.array([[1, 2], [3, 4]])),
        ("1,2\r3,4\r", np.array([[1, 2], [3, 4]])),
        ("1,2\n\n \n\t\r\n", np.array([[1, 2]])),
        ('"1"\r\r \r', np.array([[1]])),
        ("a, \n", np.array([["a", " "]])),
        (" 1 ,\t2\n+3,-4", np.array([[1, 2], [3, -4]])),
        ("1,2.5\n3,4", np.array([[1, 2.5], [3, 4]])),
        ("1,\n,4", np.array([[1, np.nan], [np.nan, 4]])),
        (",\n", np.array([[np.nan, np.nan]])),
        ("1,nan\ninf,-1e3", np.array([[1, np.nan], [np.inf, -1000]])),
        ("9223372036854775808", np.array([[2.0**63]])),
        ("1\n\n3", np.array([[1], [np.nan], [3]])),
        ('"1","2"\n"3","4"\n', np.array([[1, 2], [3, 4]])),
        ('1\n""\n3\n', np.array([[1], [np.nan], [3]])),
        # Texts stay as they are, all of them: no header row, no comments.
        ("a,b\n1,2", np.array([["a", "b"], ["1", "2"]])),
        ("#1,2\n", np.array([["#1", "2"]])),
        (" a ,1\n", np.array([[" a ", "1"]])),
        ("1_000,2", np.array([["1_000", "2"]])),
        ("0x10", np.array([["0x10"]])),
        ("\u0661", np.array([["\u0661"]])),
        ("True", np.array([["True"]])),
        ('"a,b","c ""d"" e","f\r\ng"\n', np.array([["a,b", 'c "d" e', "f\r\ng"]])),
        ('a,"b\n\n"\n\n', np.array([["a", "b\n\n"]])),
        ('x\n\n"y"', np.array([["x"], [""], ["y"]])),
        ("\x0b,a\x1cb\x85\u2028c", np.array([["\x0b", "a\x1cb\x85\u2028c"]])),  # none of these ends a line
    ],
)
def test_csv_is_read(text: str, expected: Any) -> None:
    same(read(text, CSV), expected)
    same(read("\ufeff" + text, "text/csv; charset=utf-8; header=absent"), expected)
    same(read(text.encode("utf-16"), "text/csv; charset=UTF-16"), expected)


def test_the_shape_does_not_hang_on_the_number_of_rows() -> None:
    for rows in (1, 2, 3):
        for columns in (1, 2, 3):
            body = "\n".join([",".join(["1"] * columns)] * rows)
            assert read(body, CSV).shape == (rows, columns)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "it has no rows"),
        (b" \n\r\n\t", "it has no rows"),
        (b"1,2\n3", "line 2 has 1 cell, and the first row has 2"),
        (b"1\n2\n3,4,5\n", "line 3 has 3 cells, and the first row has 1"),
        (b"1,2,3\n4,5\n6,7,8,9\n", "line 2 has 2 cells, and the first row has 3"),  # as many commas as there should be
        (b"1,2\n\n3,4", "line 2 has 1 cell, and the first row has 2"),
        (b'"1",2\n3', "line 2 has 1 cell, and the first row has 2"),
        (b'"a\nb",2\n3', "line 3 has 1 cell"),
        (b'"a', "line 1: unexpected end of data"),
        (b'1,2\n"a"b,3', "line 2: ',' expected after '\"'"),
        (b'"' + b"a" * 200_000 + b'"', "field larger than field limit"),
        (b"\xff", "not utf-8: byte 0"),
    ],
)
def test_malformed_csv_is_refused(body: bytes, message: str) -> None:
    before = csv.field_size_limit()
    with pytest.raises(MalformedBody, match=message):
        read(body, CSV)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1\n"),
        (0.1, "0.1\n"),
        (np.float32(0.1), "0.1\n"),
        (None, '""\n'),
        ("a,b", '"a,b"\n'),
        ([], ""),
        (np.empty((0, 3)), ""),
        ([1, 2.5, "x"], "1\n2.5\nx\n"),
        ([True, None], 'True\n""\n'),
        ([[1, None], ["", "b"]], "1,\n,b\n"),
        ((("a\nb", 'c"d'), ("\r", "e")), '"a\nb","c""d"\n"\r",e\n'),
        (["", " "], '""\n" "\n'),
        (np.array([0.1, np.nan, np.inf, 1e-300]), "0.1\nnan\ninf\n1e-300\n"),
        (np.array([[0.1, 2]], dtype=np.float32), "0.1,2.0\n"),
        (np.array([0.1], dtype=np.float16), "0.1\n"),
        (np.array([[1, 2], [3, 4]]), "1,2\n3,4\n"),
        (np.array([True, False]), "True\nFalse\n"),
        (np.array(["a", "b,c"]), 'a\n"b,c"\n'),
        (np.array([["a", 1.5], [None, np.float64(2.5)]], dtype=object), "a,1.5\n,2.5\n"),
        ([np.array([1, 2]), np.array([3, 4])], "1,2\n3,4\n"),
        ([np.float64(0.1), np.int64(1)], "0.1\n1\n"),
        (Tensor(np.array([[1.5, 2.5]])), "1.5,2.5\n"),
        ([Tensor(np.array([1.5, 2.5]))], "1.5,2.5\n"),
    ],
)
def test_csv_is_written(value: Any, text: str) -> None:
    assert encode(value, CSV) == text.encode()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 2, 2)), "3 dimensions"),
        ([[[1]]], "type list"),
        ({"a": 1}, "a dict"),
        ([{"a": 1}], "type dict"),
        ([[1, 2], [3]], "rows of different lengths"),
        ([[1], 2], "type list"),
        (np.empty((3, 0)), "rows without columns"),
        (np.array([1j]), "complex128"),
        (np.array([b"a"]), r"\|S1"),
        ([b"a"], "type bytes"),
        ({1}, "type set"),
        (SURROGATE, "half a character"),
        (object(), "type object"),
    ],
)
def test_what_csv_can_not_hold(value: Any, message: str) -> None:
    with pytest.raises(NotEncodable, match=message):
        encode(value, CSV)


def test_numbers_come_back_from_csv() -> None:
    random_, generator = random.Random(4), np.random.default_rng(4)
    for _ in range(200):
        shape = (random_.randrange(1, 6), random_.randrange(1, 6))
        floats = generator.standard_normal(shape) * 10.0 ** generator.integers(-300, 300, shape)
        floats[generator.random(shape) < 0.1] = np.nan
        whole = generator.integers(-(2**63), 2**63 - 1, shape)
        same(read(encode(floats, CSV), CSV), floats)
        same(read(encode(whole, CSV), CSV), whole)
        narrow = generator.standard_normal(shape).astype(np.float32)
        same(read(encode(narrow, CSV), CSV).astype(np.float32), narrow)


def test_texts_come_back_from_csv() -> None:
    random_ = random.Random(5)
    for _ in range(500):
        columns = random_.randrange(1, 4)
        rows = [[random_text(random_) for _ in range(columns)] for _ in range(random_.randrange(1, 5))]
        rows[0][0] = "x"  # else they might all be empty: numbers
        body = encode(rows, CSV)
        assert read(body, CSV).tolist() == rows
        # With bare \r in quotes, other readers agree as well.
        assert list(csv.reader(io.StringIO(body.decode(), newline=""), strict=True)) == rows


def test_csv_is_what_pandas_and_numpy_read() -> None:
    pandas = pytest.importorskip("pandas")
    generator = np.random.default_rng(6)
    array = generator.standard_normal((50, 7))
    body = encode(array, CSV)
    same(read(body, CSV), np.loadtxt(io.BytesIO(body), delimiter=",", ndmin=2))
    np.testing.assert_allclose(read(body, CSV), pandas.read_csv(io.BytesIO(body), header=None).to_numpy())
    frame = pandas.DataFrame(array)
    assert encode(frame, CSV) == body == frame.to_csv(header=False, index=False).encode()
    same(read(frame.to_csv(header=False, index=False, quoting=csv.QUOTE_ALL), CSV), array)


def test_one_long_cell_takes_no_room_in_all_of_them() -> None:
    body = b"a,b\n" * 50_000 + b"c," + b"x" * 500_000 + b"\n"
    tracemalloc.start()
    found = read(body, CSV)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.dtype == object and found.shape == (50_001, 2)
    assert found[-1].tolist() == ["c", "x" * 500_000]
    assert peak < 100 * len(body)
    assert read("a\x00\n", CSV)[0, 0] == "a\x00"  # which an array of str would drop


# --- JSON Lines, plain text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", np.empty(0)),
        ("1\n2\n", np.array([1, 2])),
        ("[1, 2]\r\n\n \n[3.5, 4]", np.array([[1, 2], [3.5, 4]])),
        ("[1]", np.array([[1]])),
        ('{"a": 1}\n{"b": [2]}\n', [{"a": 1}, {"b": [2]}]),
        ('"a\\nb"\nnull', ["a\nb", None]),
        ("[1]\n[2, 3]", [[1], [2, 3]]),
    ],
)
@pytest.mark.parametrize("essence", [JSON_LINES, *DECODED[-3:]])
def test_json_lines_are_read(text: str, expected: Any, essence: str) -> None:
    same(read(text, essence), expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"1\n\n[2\n3", "line 3, column 3"),
        (b"1, 2", "line 1, column 2: Extra data"),
        (b"1\n" + b"[" * 100_000, "line 2: .*nested too deeply"),
        (b"1\n" + b"9" * 5000, "line 2: a number"),
        (b"\xff", "not utf-8"),
    ],
)
def test_malformed_lines_are_named(body: bytes, message: str) -> None:
    with pytest.raises(MalformedBody, match=message):
        read(body, JSON_LINES)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([], ""),
        (1.5, "1.5\n"),
        ("a\nb", '"a\\nb"\n'),
        (None, "null\n"),
        ({"a": np.array([1])}, '{"a": [1]}\n'),
        ([{"a": 1}, np.array([1.5, np.nan])], '{"a": 1}\n[1.5, null]\n'),
        (np.array([[1, 2], [3, 4]]), "[1, 2]\n[3, 4]\n"),
        (np.array(5), "5\n"),
        (Tensor(np.array([1.5, 2.5])), "1.5\n2.5\n"),
    ],
)
def test_json_lines_are_written(value: Any, text: str) -> None:
    assert encode(value, JSON_LINES) == encode(value, "application/x-ndjson") == text.encode()


def test_plain_text() -> None:
    assert read("\ufeffgr\xfc\xdf dich\n", TEXT) == "gr\xfc\xdf dich\n"
    assert read(b"gr\xfc\xdf", "text/plain; charset=iso-8859-1") == "gr\xfc\xdf"
    with pytest.raises(MalformedBody, match="not utf-8: byte 2"):
        read(b"gr\xfc\xdf", TEXT)
    for value, text in (
        ("gr\xfc\xdf", "gr\xfc\xdf"),
        (1.5, "1.5"),
        (True, "True"),
        (np.float32(0.1), "0.1"),
        (np.array(3), "3"),
        (["a", "b"], "a\nb\n"),
        (np.array(["a", "b"]), "a\nb\n"),
    ):
        assert encode(value, TEXT) == text.encode()
    for wrong in (None, {"a": 1}, [1, 2], np.zeros(2), SURROGATE, object()):
        with pytest.raises(NotEncodable, match=r"no plain text|half a character"):
            encode(wrong, TEXT)


# --- NPY, NPZ ---------------------------------------------------------------------------------------------------------


def saved(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes((version, 0)) + length + header.encode("latin-1") + data


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", "i1", ">i4", "u8", "?", "c8", "U3", ">U3", "S3", "M8[s]"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (0, 784), (2, 0, 3)])
def test_npy_as_numpy_writes_it(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(max(1, np.prod(shape, dtype=int)))[: np.prod(shape, dtype=int)].reshape(shape).astype(dtype)
    for one in (array, np.array(array, order="F")):
        found = read(saved(one), NPY)
        same(found, array.astype(array.dtype.newbyteorder("=")))
        assert found.flags.writeable
    assert encode(array, NPY) == saved(array)


def test_npy_of_all_versions() -> None:
    for version in (1, 2, 3):
        file = io.BytesIO()
        np.lib.format.write_array(file, np.arange(3), version=(version, 0))
        same(read(file.getvalue(), NPY), np.arange(3))


HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "does not begin as"),
        (b"\x93NUMPY\x01\x00", "does not begin as"),
        (b"PK\x03\x04" + bytes(20), "does not begin as"),
        (npy(HEADER, bytes(16), version=4), "version 4.0"),
        (npy(HEADER, bytes(15)), "tells of 16 bytes of data .*; the body has 15"),
        (npy(HEADER, bytes(17)), "the body has 17"),
        (npy(HEADER)[:30], "the NPY header claims 58 bytes; the body has 20"),
        (npy(HEADER.replace("(2,)", f"({2**50},)"), bytes(16)), "tells of 9007199254740992 bytes"),
        (npy(HEADER.replace("(2,)", f"({2**40}, {2**40})"), bytes(16)), "tells of"),
        (npy(HEADER.replace("(2,)", f"({2**62}, 0)")), "very large array without data"),
        (npy(HEADER.replace("(2,)", f"(0, {2**62}, {2**62})")), "shape"),
        (npy(HEADER.replace("(2,)", f"({2**64}, 0)")), "shape"),
        (npy(HEADER.replace("(2,)", "(-2,)"), bytes(16)), "shape"),
        (npy(HEADER.replace("(2,)", "(True,)"), bytes(8)), "shape"),
        (npy(HEADER.replace("(2,)", "[2]"), bytes(16)), "shape"),
        (npy(HEADER.replace("(2,)", f"({'1,' * 40})"), bytes(8)), "shape"),
        (npy(HEADER.replace("False", "0"), bytes(16)), "fortran_order 0"),
        (npy(HEADER.replace("<f8", "|O"), bytes(16)), r"dtype '\|O': objects would be pickled"),
        (npy(HEADER.replace("<f8", "<f3"), bytes(6)), "dtype '<f3'"),
        (npy(HEADER.replace("<f8", "|S0")), "of no bytes"),
        (npy(HEADER.replace("<f8", "<U999999999")), "dtype|tells of"),
        (npy(HEADER.replace("<f8", "<f8,<f8"), bytes(32)), "dtype '<f8,<f8'"),
        (npy(HEADER.replace("'<f8'", "[('a', '<f8')]"), bytes(16)), "dtype .*NPZ"),
        (npy(HEADER.replace("<f8", "<U2"), b"\xff" * 16), "characters that do not exist"),
        (npy("__import__('os').system('false')\n"), "not the dict"),
        (npy("{}\n"), "not the dict"),
        (npy("{'descr': '<f8'\n"), "not the dict"),
        (npy("(" * 5000), "not the dict"),
        (npy(HEADER + " " * 20_000, bytes(16)), "header claims"),
    ],
)
def test_malformed_npy_is_refused_before_memory_is_taken(body: bytes, message: str) -> None:
    tracemalloc.start()
    with pytest.raises(MalformedBody, match=message):
        read(body, NPY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_pickles_are_never_loaded() -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a pickle was loaded",))

    with pytest.raises(MalformedBody, match="objects"):
        read(saved(np.array([Trap()], dtype=object), allow_pickle=True), NPY)
    file = io.BytesIO()
    np.savez(file, a=np.array([Trap()], dtype=object))
    with pytest.raises(MalformedBody, match=r"'a.npy': .*objects"):
        read(file.getvalue(), NPZ)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([{}], dtype=object), "of objects"),
        ({"a": 1}, "type dict is no array"),
        (None, "of objects"),
        ({1}, "of objects"),
        ([[1, 2], [3]], "type list is no array"),
    ],
)
def test_what_npy_can_not_hold(value: Any, message: str) -> None:
    with pytest.raises(NotEncodable, match=message):
        encode(value, NPY)
    with pytest.raises(NotEncodable):
        encode({"a": value}, NPZ)


def test_npz_as_numpy_writes_and_reads_it() -> None:
    arrays = {"x": np.arange(6.0).reshape(2, 3), "ids": np.array(["a", "bc"]), "file": np.array(5)}
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, x=arrays["x"], ids=arrays["ids"])
        found = read(file.getvalue(), NPZ)
        assert list(found) == ["x", "ids"]
        same(found["x"], arrays["x"])
        same(found["ids"], arrays["ids"])
    body = encode(arrays, NPZ)
    with np.load(io.BytesIO(body), allow_pickle=False) as loaded:
        assert {name: loaded[name].tolist() for name in loaded} == {n: a.tolist() for n, a in arrays.items()}
    assert read(body, NPZ).keys() == arrays.keys()
    same(read(encode([1, 2], NPZ), NPZ)["arr_0"], np.array([1, 2]))
    assert read(encode({}, NPZ), NPZ) == {}
    for name in (1, SURROGATE):
        with pytest.raises(NotEncodable):
            encode({name: [1]}, NPZ)


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as written:
        for name, data in members.items():
            written.writestr(name, data)
    return file.getvalue()


def test_malformed_npz_is_refused() -> None:
    good = saved(np.arange(100))
    for body, message in (
        (b"", "not NPZ"),
        (b"PK\x03\x04", "not NPZ"),
        (archive({"a.npy": good})[:-10], "not NPZ"),
        (archive({"a.txt": b"a"}), "'a.txt', which is no .npy"),
        (archive({"a.npy": good}, zipfile.ZIP_LZMA), "'a.npy', which is no .npy as NumPy writes it"),
        (archive({"a.npy": good[:-1]}), "'a.npy': the NPY header tells of 800 bytes"),
        (archive({"a.npy": good}).replace(good[-8:], bytes(8)), "Bad CRC-32"),
    ):
        with pytest.raises(MalformedBody, match=message):
            read(body, NPZ)


def test_zip_bombs_are_not_unpacked() -> None:
    zeros = saved(np.zeros(1 << 20))
    body = archive({f"{number}.npy": zeros for number in range(33)}, zipfile.ZIP_DEFLATED)
    assert len(body) < 2 << 20
    with pytest.raises(MalformedBody, match="would unpack to more than 268435456 bytes"):
        read(body, NPZ)
    # A member whose header says that it is small: no more than that is unpacked.
    small = archive({"a.npy": saved(np.zeros(64 << 17))}, zipfile.ZIP_DEFLATED)
    lying = small.replace(struct.pack("<I", (64 << 20) + 128), struct.pack("<I", 200))
    assert lying != small
    tracemalloc.start()
    with pytest.raises(MalformedBody):
        read(lying, NPZ)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("form", ["csr", "csc", "bsr", "coo", "dia"])
@pytest.mark.parametrize("kind", ["matrix", "array"])
def test_sparse_matrices_come_back(form: str, kind: str) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    dense = np.array([[0, 1.5, 0, 0], [2.5, 0, 0, 0], [0, 0, 0, 3.5]])
    matrix = getattr(sparse, f"{form}_{kind}")(dense)
    file = io.BytesIO()
    sparse.save_npz(file, matrix)
    for body in (file.getvalue(), encode(matrix, NPZ)):
        found = read(body, NPZ)
        assert (type(found), found.dtype) == (type(matrix), matrix.dtype)
        np.testing.assert_array_equal(found.toarray(), dense)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": np.array("xyz")}, "format 'xyz'"),
        ({"format": np.array(["csr"])}, "format None"),
        ({"format": np.array(b"coo")}, r"coo without row\.npy"),
        ({"indices": np.array([0, 7])}, "that is none"),
        ({"indices": np.array([0, -1])}, "that is none"),
        ({"indices": np.array([0.0, 1.0])}, "no whole numbers"),
        ({"indptr": np.array([0, 9, 2])}, "that is none"),
        ({"indptr": np.array([0, 2])}, "that is none"),
        ({"data": np.array(["a", "b"])}, "expected numbers"),
        ({"shape": np.array([2, 2, 2])}, "no whole numbers"),
        ({"shape": np.array([-2, 2])}, "that is none"),
        ({"format": np.array("coo"), "row": np.array([0, 9]), "col": np.array([0, 1])}, "that is none"),
        ({"format": np.array("dia"), "data": np.ones((1, 2)), "offsets": np.array([99])}, "that is none"),
    ],
)
def test_sparse_matrices_that_point_outside_are_refused(changed: dict[str, Any], message: str) -> None:
    pytest.importorskip("scipy.sparse")
    arrays = {
        "format": np.array("csr"),
        "shape": np.array([2, 2]),
        "data": np.array([1.0, 2.0]),
        "indices": np.array([0, 1]),
        "indptr": np.array([0, 1, 2]),
    }
    assert read(encode(arrays, NPZ), NPZ).toarray().tolist() == [[1, 0], [0, 2]]
    with pytest.raises(MalformedBody, match=message):
        read(encode({**arrays, **changed}, NPZ), NPZ)


def test_without_scipy_sparse_matrices_are_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"format": np.array("csr"), "shape": np.array([2, 2]), "data": np.array([1.0, 2.0])}
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(UnsupportedMediaType, match="needs SciPy"):
        read(encode(arrays, NPZ), NPZ)
    found = read(records_of(("values", 2, 0, [9]), np.ones(1, np.float32), [0, 1], [5]), RECORDS)
    assert isinstance(found, Sparse)
    assert found.to_dense().tolist() == [[0, 0, 0, 0, 0, 1, 0, 0, 0]]


# --- RecordIO-protobuf ------------------------------------------------------------------------------------------------


def records_of(field: tuple[str, int, int, list[int]], values: Any, offsets: Any = None, keys: Any = None) -> bytes:
    from launcher import _data

    rows = len(values) if offsets is None else len(offsets) - 1
    offsets = None if offsets is None else np.array(offsets, np.int64)
    keys = None if keys is None else np.array(keys, np.uint64)
    return _data.encode_record_proto([(field, values, offsets, keys)], 0, rows)


@pytest.mark.parametrize(("number", "dtype"), [(0, "float32"), (1, "float64"), (7, "int32")])
@pytest.mark.parametrize("rows", [1, 5])
def test_features_alone_are_an_array(number: int, dtype: str, rows: int) -> None:
    array = np.arange(rows * 3).reshape(rows, 3).astype(dtype)
    same(read(records_of(("values", 0, number, [3]), array), RECORDS), array)
    same(read(records_of(("other", 0, number, [3]), array), RECORDS)["other"], array)


def test_sparse_features_are_a_matrix() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    values = np.array([1.5, 2.5, 3.5], np.float32)
    found = read(records_of(("values", 2, 0, [10**9]), values, [0, 1, 1, 3], [5, 7, 10**9 - 1]), RECORDS)
    assert isinstance(found, sparse.csr_matrix) and found.shape == (3, 10**9)
    assert (found[0, 5], found[2, 7], found[2, 10**9 - 1], found.nnz) == (1.5, 2.5, 3.5, 3)
    found = read(records_of(("values", 2, 0, [2, 5]), values, [0, 1, 1, 3], [5, 7, 9]), RECORDS)
    assert isinstance(found, Sparse) and found.shape == (2, 5)


def test_bytes_are_ragged() -> None:
    found = read(records_of(("image", 1, 5, []), np.frombuffer(b"abcde", np.uint8), [0, 2, 5]), RECORDS)["image"]
    assert isinstance(found, Ragged)
    assert [bytes(one) for one in found] == [b"ab", b"cde"]


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (np.array([[0.5, 1.5], [2.5, 3.5]], np.float32), {"score": np.array([[0.5, 1.5], [2.5, 3.5]], np.float32)}),
        (np.array([[0.5], [1.5]]), {"score": np.array([[0.5], [1.5]], np.float32)}),
        ([1, 2], {"score": np.array([[1], [2]], np.int32)}),
        (np.array([True]), {"score": np.array([[1]], np.int32)}),
        (0.5, {"score": np.array([[0.5]], np.float32)}),
        (np.array([[1e300, 1]]), {"score": np.array([[1e300, 1]])}),  # which float32 has not
        (np.array([[np.inf, np.nan]]), {"score": np.array([[np.inf, np.nan]], np.float32)}),
        (np.zeros((2, 3, 4), np.float16), {"score": np.zeros((2, 3, 4), np.float32)}),
        (
            {"score": np.array([0.1, 0.2]), "kind": [1, 2]},
            {"score": np.array([[0.1], [0.2]]), "kind": np.array([[1], [2]], np.int32)},
        ),
        (Tensor(np.array([[1.5]])), {"score": np.array([[1.5]], np.float32)}),
    ],
)
def test_predictions_are_labels(value: Any, labels: dict[str, Any]) -> None:
    found = read(encode(value, RECORDS), RECORDS)
    assert found.keys() == {f"label_{name}" for name in labels}
    for name, expected in labels.items():
        same(found[f"label_{name}"], expected)


def test_a_record_is_what_sagemakers_clients_parse() -> None:
    """aialgs.data.Record: label (2), entry of key (1) and Value (2), Float32Tensor (2), packed values (1)."""
    tensor = b"\x0a\x08" + struct.pack("<2f", 0.5, 1.5)
    value = b"\x12" + bytes((len(tensor),)) + tensor
    entry = b"\x0a\x05score\x12" + bytes((len(value),)) + value
    message = b"\x12" + bytes((len(entry),)) + entry
    framed = struct.pack("<II", 0xCED7230A, len(message)) + message + bytes(-len(message) % 4)
    assert encode(np.array([[0.5, 1.5]]), RECORDS) == framed


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a"], "is of <U1"),
        ([2**40], "more than 32 bits"),
        ({}, r"labels of \[\] rows"),
        ({"a": [1], "b": [1, 2]}, r"labels of \[1, 2\] rows"),
        ({1: [1]}, "name 1 is no text"),
        ({SURROGATE: [1]}, "half a character"),
        ([[1, 2], [3]], "is no array"),
        (None, "of objects"),
    ],
)
def test_what_records_can_not_hold(value: Any, message: str) -> None:
    with pytest.raises(NotEncodable, match=message):
        encode(value, RECORDS)


def test_damaged_records_are_refused_with_their_place() -> None:
    body = records_of(("values", 0, 0, [3]), np.ones((4, 3), np.float32))
    frame = len(body) // 4
    for damaged, message in (
        (b"", "no record"),
        (b"junkjunkjunk", "byte 0: record 0: .*magic"),
        (body[:-3], f"byte {3 * frame}: record 3: truncated"),
        (body[:frame] + b"x" + body[frame + 1 :], f"byte {frame}: record 1"),
        (body + records_of(("values", 0, 0, [2]), np.ones((1, 2), np.float32)), r"record 4: .*"),
        (body + records_of(("other", 0, 0, [3]), np.ones((1, 3), np.float32)), r"record 4: .*"),
    ):
        with pytest.raises(MalformedBody, match=message) as caught:
            read(damaged, RECORDS)
        assert "/proc" not in str(caught.value) and "on_bad" not in str(caught.value)


def test_keys_outside_of_the_shape_are_refused() -> None:
    good = records_of(("values", 2, 0, [99]), np.ones(1, np.float32), [0, 1], [98])
    assert read(good, RECORDS).shape == (1, 99)
    with pytest.raises(MalformedBody, match="record 0"):
        read(good.replace(b"\x62", b"\x63"), RECORDS)  # its 98 is nowhere else


def test_reading_records_leaves_nothing_open() -> None:
    good = records_of(("values", 0, 0, [3]), np.ones((4, 3), np.float32))
    before = len(os.listdir("/proc/self/fd"))
    for body in (good, good[:-3], b"junk", b"") * 5:
        try:
            read(body, RECORDS)
        except MalformedBody:
            pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_large_first_record_asks_for_no_more_memory_than_there_can_be() -> None:
    first = records_of(("values", 0, 0, [250_000]), np.ones((1, 250_000), np.float32))
    others = records_of(("values", 0, 0, [1]), np.ones((50_000, 1), np.float32))
    with pytest.raises(MalformedBody, match="more values than"):
        read(first + others, RECORDS)


# --- other libraries' values ------------------------------------------------------------------------------------------


def test_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1, 2], "b": [0.5, np.nan]})
    mixed = pandas.DataFrame({"a": [1, 2], "b": ["x", "y,z"]})
    series = pandas.Series([1.5, 2.5])
    assert encode(frame, JSON) == b"[[1.0, 0.5], [2.0, null]]"
    assert encode(mixed, JSON) == b'[[1, "x"], [2, "y,z"]]'
    assert encode(series, JSON) == b"[1.5, 2.5]"
    assert encode({"out": series}, JSON) == b'{"out": [1.5, 2.5]}'
    assert encode(frame, CSV) == b"1.0,0.5\n2.0,nan\n"
    assert encode(mixed, CSV) == b'1,x\n2,"y,z"\n'
    assert encode(series, CSV) == b"1.5\n2.5\n"
    assert encode(mixed, JSON_LINES) == b'[1, "x"]\n[2, "y,z"]\n'
    same(read(encode(series, NPY), NPY), np.array([1.5, 2.5]))
    with pytest.raises(NotEncodable, match="objects"):
        encode(mixed, NPY)


@pytest.mark.torch
def test_torch() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([[0.5, 1.5]], requires_grad=True)
    for value in (tensor, tensor.detach(), tensor.to(torch.bfloat16)):
        assert encode(value, JSON) == encode([value[0]], JSON) == b"[[0.5, 1.5]]"
        assert encode(value, CSV) == encode([value[0]], CSV) == b"0.5,1.5\n"
        assert encode(value, JSON_LINES) == b"[0.5, 1.5]\n"
        same(read(encode(value, NPY), NPY), np.array([[0.5, 1.5]], np.float32))
        same(read(encode(value, RECORDS), RECORDS)["label_score"], np.array([[0.5, 1.5]], np.float32))
    assert encode(torch.tensor(0.1), CSV) == encode(torch.tensor(0.1), TEXT).strip() + b"\n" == b"0.1\n"
    assert encode({"x": torch.tensor([float("nan")])}, JSON) == b'{"x": [null]}'
    # What is read can be a tensor without a copy or a warning.
    for body, essence in ((b"[[1, 2]]", JSON), (b"1,2", CSV), (saved(np.zeros((1, 2), ">f4")), NPY)):
        assert torch.from_numpy(read(body, essence)).shape == (1, 2)
    for essence in (JSON, CSV, NPY):
        with pytest.raises(NotEncodable):
            encode(torch.eye(2).to_sparse(), essence)


# --- damage -----------------------------------------------------------------------------------------------------------


def valid_bodies() -> dict[str, list[bytes]]:
    array = np.arange(12.0).reshape(4, 3) / 7
    found = {
        JSON: [b'{"a": [1, 2.5, "x\\u00e4", null, true]}', encode(array, JSON), b"[[1, 2], [3, 4]]"],
        CSV: [encode(array, CSV), b'a,"b ""c""",3\r\n"x\ny",,5\r\n', b"1,2\n3,4\n"],
        JSON_LINES: [encode(array, JSON_LINES), b'{"a": 1}\n[2]\n'],
        NPY: [saved(array), saved(np.array(["ab", "c"])), saved(np.array(5)), saved(np.asfortranarray(array))],
        NPZ: [
            encode({"x": array, "y": np.array(["ab"])}, NPZ),
            archive({"x.npy": saved(array)}, zipfile.ZIP_DEFLATED),
        ],
        TEXT: ["gr\xfc\xdf \u20ac \U0001f600".encode()],
        RECORDS: [
            encode({"score": array, "kind": [1, 2, 3, 4]}, RECORDS),
            records_of(("values", 2, 0, [9]), np.ones(3, np.float32), [0, 1, 3], [5, 7, 8]),
            records_of(("values", 1, 5, []), np.frombuffer(b"abcde", np.uint8), [0, 2, 5]),
        ],
    }
    try:
        from scipy import sparse
    except ImportError:
        return found
    for form in ("csr", "csc", "bsr", "coo", "dia"):
        file = io.BytesIO()
        sparse.save_npz(file, getattr(sparse, f"{form}_matrix")(np.eye(3)), compressed=False)
        found[NPZ].append(file.getvalue())
    return found


def damaged(random_: random.Random, body: bytes) -> bytes:
    """``body`` with one to three changes: bytes changed, put in, left out, doubled, cut off."""
    changed = bytearray(body)
    for _ in range(random_.randint(1, 3)):
        at, many = random_.randrange(len(changed) + 1), random_.randint(1, 4)
        kind = random_.randrange(6)
        if kind == 0:
            changed[at : at + many] = random_.randbytes(len(changed[at : at + many]))
        elif kind == 1 and at < len(changed):
            changed[at] ^= 1 << random_.randrange(8)
        elif kind == 2:
            changed[at:at] = random_.choice([b'"', b",", b"\n", b"9", b"-", b"[", b"\x00", b"\xff", b"e9", b"{"])
        elif kind == 3:
            del changed[at : at + many]
        elif kind == 4:
            changed[at:at] = changed[at : at + 8 * many]
        elif random_.random() < 0.2:
            del changed[at:]
    return bytes(changed)


@pytest.mark.parametrize("essence", [JSON, CSV, JSON_LINES, NPY, NPZ, TEXT, RECORDS])
def test_damage_is_never_anything_but_an_error_of_the_codec(essence: str) -> None:
    """Thousands of bodies with a few changes each; what can still be read can be written, too, or is refused."""
    random_ = random.Random(essence)
    bodies = valid_bodies()[essence]
    refused = 0
    for _ in range(800):
        body = damaged(random_, random_.choice(bodies))
        try:
            found = read(body, essence)
        except CodecError as error:
            assert str(error) and len(str(error)) < 500
            refused += 1
            continue
        for wanted in (JSON, CSV, NPY, NPZ, TEXT, RECORDS):
            try:
                encode(found, wanted)
            except CodecError as error:
                assert str(error)
    assert refused


def test_the_errors_have_one_base() -> None:
    for kind in (UnsupportedMediaType, MalformedBody, NotEncodable):
        assert issubclass(kind, CodecError)
        assert not issubclass(kind, ValueError)
