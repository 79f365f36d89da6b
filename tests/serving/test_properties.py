"""Requests at random, with a seed: a status of the contract for each, and never a 500 that is the client's fault.

The handlers are the default ones, around a model of numpy that takes any array of numbers; so a 500 would be the
server's blame on itself for what the client sent.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import struct
from typing import Any

import pytest

REQUESTS = 3000
CONNECTIONS = 4
STATUSES = {200, 400, 406, 413, 415}
# As an estimator does: what is no array of numbers is refused with a ValueError or TypeError.
MODEL = """
    import numpy
    class Model:
        def predict(self, data):
            array = numpy.asarray(data, dtype=float)
            if array.ndim == 0:
                raise ValueError("expected an array")
            return array * 2
    def model_fn(model_dir):
        return Model()
"""
TYPES = [
    "application/json",
    "application/jsonlines",
    "text/csv",
    "text/plain",
    "application/x-npy",
    "application/x-npz",
    "application/x-recordio-protobuf",
]
BROKEN_TYPES = [
    "",
    "/",
    "json",
    "application/",
    "application/json;",
    "application/json; charset",
    "application/json; charset=",
    'application/json; charset="utf-8',
    "application/json; charset=klingon",
    "application/json; charset=utf-16",
    "text/csv; charset=utf-7",
    "text/csv;charset=rot13",
    "text/csv; charset=idna",
    "text/csv; charset=base64",
    "text/csv; charset=\xff",
    "application/json, text/csv",
    "*/*",
    "text/*",
    "image/png",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "a" * 9000 + "/b",
    "text/csv;" + ";" * 4000,
    "text/csv" + "; a=b" * 1500,
    "\xe9/\xe9",
]
ACCEPTS = [
    "",
    "*/*",
    "*",
    "text/*",
    "application/*;q=0.3, text/csv;q=0.7",
    "text/csv;q=0, */*",
    "*/*;q=0",
    "application/json;q=2",
    "application/json;q=-1",
    "application/json;q=nan",
    "application/json;q=1e3",
    ",,,",
    ", ,text/csv,,",
    "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",
    "image/png",
    "text",
    "text/csv " * 20,
    "\xff",
    "a/b," * 2000,
    'text/csv;x="a,b"',
    "application/json;profile=x;q=0.5;ext=1",
]


def cased(chosen: random.Random, text: str) -> str:
    return "".join(chosen.choice((one.upper(), one.lower())) for one in text)


def content_type(chosen: random.Random, kind: str) -> str:
    """The name of a type as clients write it, or something else."""
    draw = chosen.random()
    if draw < 0.5:
        return kind
    if draw < 0.6:
        return cased(chosen, kind)
    if draw < 0.75:
        more = chosen.choice(
            ("; charset=utf-8", ";charset=UTF-8", ' ; charset="utf-8"', ";header=present", "; v=1;w=2")
        )
        return kind + more
    if draw < 0.85:
        return chosen.choice(TYPES)
    return chosen.choice(BROKEN_TYPES)


def accept(chosen: random.Random) -> str:
    draw = chosen.random()
    if draw < 0.3:
        return ""
    if draw < 0.6:
        return chosen.choice(TYPES)
    if draw < 0.8:
        picked = [f"{cased(chosen, kind)};q={chosen.random():.3f}" for kind in chosen.sample(TYPES, 3)]
        return ", ".join(picked)
    return chosen.choice(ACCEPTS)


def number(chosen: random.Random) -> str:
    return chosen.choice(
        (
            str(chosen.randint(-9, 9)),
            repr(chosen.uniform(-1e3, 1e3)),
            "NaN",
            "Infinity",
            "-Infinity",
            "nan",
            "inf",
            "1e400",
            "-0",
            "0x10",
            "9" * chosen.choice((19, 20, 400, 5000)),
            "1e-999",
            "1_000",
            "",
            "\u0664",
            "null",
            "true",
            '"text"',
        )
    )


def plain(chosen: random.Random) -> str:
    return str(chosen.randint(-99, 99)) if chosen.random() < 0.8 else number(chosen)


def json_body(chosen: random.Random) -> bytes:
    draw = chosen.random()
    if draw < 0.5:
        columns = chosen.randint(1, 4)
        rows = [[plain(chosen) for _ in range(columns)] for _ in range(chosen.randint(1, 4))]
        return ("[" + ",".join("[" + ",".join(row) + "]" for row in rows) + "]").encode()
    if draw < 0.6:
        depth = chosen.choice((1, 30, 31, 32, 33, 64, 65, 900, 1100, 5000, 100000))
        return b"[" * depth + plain(chosen).encode() + b"]" * depth
    if draw < 0.65:
        return b'{"a":' * chosen.choice((1, 1100, 50000)) + b"1" + b"}"
    if draw < 0.75:
        value = {"instances": [[1, 2], [3, 4]], "\ud800": None, "features": {"x": [1, "y", None, True, 1.5]}}
        return json.dumps(chosen.choice((value, value["instances"], [value, value], [[1], [2, 3]], [[], []]))).encode()
    if draw < 0.85:
        return number(chosen).encode("utf-8", "surrogatepass")
    return chosen.choice(
        (b"", b" ", b"\xef\xbb\xbf[1]", b"[1]\0", b"[[1,2],[3]]", b"[1]" * 3, b'"\\ud800"', b"\xff\xfe")
    )


def csv_body(chosen: random.Random) -> bytes:
    columns = chosen.randint(1, 4)
    lines = [",".join(plain(chosen) for _ in range(columns)) for _ in range(chosen.randint(1, 4))]
    ending = chosen.choice(("\n", "\r\n", "\r", "\n\n"))
    text = ending.join(lines) + chosen.choice(("", ending))
    if chosen.random() < 0.2:
        text += chosen.choice(('"open', '"a""b",1', "#comment", ",,,,", "\0", '"a\nb"', "x" * 200000, "," * 200000))
    return text.encode()


def npy_body(chosen: random.Random) -> bytes:
    numpy = pytest.importorskip("numpy")
    kinds = [
        "<f8",
        ">f4",
        "<i2",
        "|u1",
        "|b1",
        "<c16",
        "<U3",
        "|S4",
        "<M8[s]",
        "<f2",
        "<m8[D]",
        [("a", "<i4"), ("b", "<f8")],
    ]
    shape = chosen.choice(((), (0,), (3,), (2, 2), (1, 2, 3), (0, 5), (1,) * 32))
    array = numpy.zeros(shape, dtype=chosen.choice(kinds))
    if array.dtype.kind == "f" and chosen.random() < 0.3:
        array = array + numpy.nan
    file = io.BytesIO()
    numpy.save(file, array, allow_pickle=False)
    return file.getvalue()


def npz_body(chosen: random.Random) -> bytes:
    numpy = pytest.importorskip("numpy")
    file = io.BytesIO()
    arrays = {f"a{i}": numpy.arange(chosen.randint(0, 5)) for i in range(chosen.randint(0, 3))}
    chosen.choice((numpy.savez, numpy.savez_compressed))(file, **arrays)
    return file.getvalue()


def record_body(chosen: random.Random) -> bytes:
    def record(values: list[float]) -> bytes:
        floats = struct.pack(f"<{len(values)}f", *values)
        tensor = b"\x0a" + bytes([len(floats)]) + floats
        value = b"\x12" + bytes([len(tensor)]) + tensor
        entry = b"\x0a\x06values" + b"\x12" + bytes([len(value)]) + value
        return b"\x0a" + bytes([len(entry)]) + entry

    whole = b""
    for _ in range(chosen.randint(1, 3)):
        one = record([chosen.uniform(-9, 9) for _ in range(chosen.randint(1, 4))])
        whole += struct.pack("<II", 0xCED7230A, len(one)) + one + b"\0" * (-len(one) % 4)
    return whole


MAKERS = {
    "application/json": json_body,
    "application/jsonlines": lambda chosen: b"\n".join(json_body(chosen) for _ in range(chosen.randint(1, 4))),
    "text/csv": csv_body,
    "text/plain": lambda chosen: number(chosen).encode("utf-8", "surrogatepass"),
    "application/x-npy": npy_body,
    "application/x-npz": npz_body,
    "application/x-recordio-protobuf": record_body,
}


def mutated(chosen: random.Random, body: bytes) -> bytes:
    """The same with some bytes changed, lost or doubled."""
    changed = bytearray(body)
    for _ in range(chosen.randint(1, 8)):
        at = chosen.randrange(len(changed) + 1)
        what = chosen.randrange(4)
        if what == 0 and changed:
            changed[at % len(changed)] = chosen.randrange(256)
        elif what == 1:
            del changed[at : at + chosen.randint(1, 16)]
        elif what == 2:
            changed[at:at] = chosen.randbytes(chosen.randint(1, 8))
        else:
            changed[at:at] = changed[at : at + 16]
    return bytes(changed)


def request(chosen: random.Random) -> tuple[bytes, dict[str, str]]:
    kind = chosen.choice(TYPES)
    body = MAKERS[kind](chosen)
    draw = chosen.random()
    if draw < 0.3:
        body = mutated(chosen, body)
    elif draw < 0.35:
        body = b""
    elif draw < 0.4:
        body = chosen.randbytes(chosen.randint(1, 300))
    headers = {}
    if chosen.random() < 0.95:
        headers["Content-Type"] = content_type(chosen, kind)
    if wanted := accept(chosen):
        headers["Accept"] = wanted
    return body, headers


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "batch"), [(1, "1"), (2, "4")])
def test_no_500_is_the_clients_fault(served: Any, seed: int, batch: str) -> None:
    seed = int(os.environ.get("SERVING_SEED", seed))
    chosen = random.Random(seed)
    served.code(MODEL).ready("--batch-size", batch, "--log-level", "error", env={"SAGEMAKER_MAX_PAYLOAD_IN_MB": "1"})
    worker = served.workers()
    links: list[http.client.HTTPConnection] = [served.connect() for _ in range(CONNECTIONS)]
    wrong: list[str] = []
    seen: dict[int, int] = {}
    for turn in range(REQUESTS // CONNECTIONS // 2):
        asked = [request(chosen) for _ in links]
        for link, (body, headers) in zip(links, asked, strict=True):
            link.request(
                "POST", "/invocations", body, {name: value.encode("latin-1") for name, value in headers.items()}
            )
        for link, (body, headers) in zip(links, asked, strict=True):
            with link.getresponse() as response:
                answer = response.read()
            seen[response.status] = seen.get(response.status, 0) + 1
            problem = ""
            if response.status not in STATUSES:
                problem = f"status {response.status}"
            elif response.status != 200:
                problem = what_is_wrong_with(response, answer)
            elif response.getheader("content-type") == "application/json":
                with contextlib.suppress(ValueError):
                    json.loads(answer, parse_constant=lambda name: 1 / 0)
            if problem:
                wrong.append(f"seed {seed}, turn {turn}: {problem}: {headers} {body[:200]!r} -> {answer[:300]!r}")
    assert not wrong, f"{len(wrong)} of {seen}:\n" + "\n".join(wrong[:20])
    assert {200, 400, 406, 415} <= set(seen), seen
    assert served.workers() == worker, served.log()
    assert "WARNING" not in served.log()
    assert served.invoke(b"[[1, 2]]").json() == [[2.0, 4.0]]
    assert served.stop() == 0


def what_is_wrong_with(response: http.client.HTTPResponse, body: bytes) -> str:
    """Of an error; "" for nothing."""
    try:
        content = json.loads(body)
    except ValueError as error:
        return f"no JSON: {error}"
    if set(content) != {"code", "type", "message", "requestId"}:
        return f"fields {sorted(content)}"
    if content["code"] != response.status or content["requestId"] != response.getheader("x-request-id"):
        return "another request's"
    if not content["type"] or not content["message"] or "\n" in content["message"]:
        return "type or message"
    if "Traceback" in content["message"] or len(content["message"]) > 2000:
        return "a message that is none"
    return ""


def test_a_body_over_the_limit_is_413_whatever_it_is(served: Any) -> None:
    served.code(MODEL).ready(env={"SAGEMAKER_MAX_PAYLOAD_IN_MB": "1"})
    link = served.connect()
    for kind in [*TYPES, *BROKEN_TYPES[:5]]:
        answer = served.ask("POST", "/invocations", b"[" * ((1 << 20) + 1), {"Content-Type": kind}, link)
        served.error(answer, 413, "PayloadTooLarge")
