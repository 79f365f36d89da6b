"""Media types and Accept fields: what RFC 9110 allows, what it does not, and what is chosen."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
from launcher.serving.media import MOST_CHARACTERS, MediaType, choose, parse_accept, parse_media_type

OFFERED = ("application/json", "text/csv", "application/jsonlines", "application/x-npy")
JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"  # the default of java.net.HttpURLConnection


@pytest.mark.parametrize(
    ("text", "essence", "parameters"),
    [
        ("application/json", "application/json", ()),
        ("Application/JSON", "application/json", ()),
        (" \ttext/csv\t ", "text/csv", ()),
        ("text/csv;charset=UTF-8", "text/csv", (("charset", "UTF-8"),)),
        ("text/csv ; Charset=utf-8 ;header=absent", "text/csv", (("charset", "utf-8"), ("header", "absent"))),
        ('text/plain; charset="utf-8"', "text/plain", (("charset", "utf-8"),)),
        (r'text/plain; title="a \"b\" \\ c; d, e"', "text/plain", (("title", 'a "b" \\ c; d, e'),)),
        ('text/plain; title=""', "text/plain", (("title", ""),)),
        ("text/plain;", "text/plain", ()),
        ("text/plain;; ;a=1;", "text/plain", (("a", "1"),)),
        ("text/plain;a=1;a=2", "text/plain", (("a", "1"), ("a", "2"))),
        ("application/vnd.x+json;q=0.1", "application/vnd.x+json", (("q", "0.1"),)),
        ('text/plain; title="caf\xe9\t"', "text/plain", (("title", "caf\xe9\t"),)),
    ],
)
def test_a_media_type_is_read(text: str, essence: str, parameters: tuple[tuple[str, str], ...]) -> None:
    assert parse_media_type(text) == MediaType(essence, parameters)


def test_parameters_are_found_by_name() -> None:
    found = parse_media_type("text/plain; A=1; b=2; a=3")
    assert (found.parameter("a"), found.parameter("b"), found.parameter("c")) == ("1", "2", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing where a media type"),
        ("   ", "found nothing|found '   '"),
        ("json", "found 'json' where a media type"),
        ("application/", "where a media type"),
        ("/json", "where a media type"),
        ("application /json", "where a media type"),
        ("application/json, text/csv", "found ', text/csv' after application/json"),
        ("application/json charset=utf-8", "found 'charset=utf-8' after application/json"),
        ("text/csv; charset", "found 'charset' where a parameter"),
        ("text/csv; charset =utf-8", "where a parameter"),
        ("text/csv; charset= utf-8", "where a parameter"),
        ('text/csv; a="unfinished', "where a parameter"),
        ('text/csv; a="x"y', "found 'y' after text/csv"),
        ('text/csv; a="\x00"', "where a parameter"),
        ("text/c\xe4v", "found '\xe4v' after text/c"),
        ("*/*", "a range of media types"),
        ("text/*", "a range of media types"),
        ("*/json", "no media range"),
        ("text/csv\n", r"found '\\n' after"),
        ("text/plain;a=" + "x" * MOST_CHARACTERS, "at most 8192"),
    ],
)
def test_what_is_no_media_type_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_media_type(text)


def accepted(text: str) -> list[tuple[str, float]]:
    return [(found.essence, quality) for found, quality in parse_accept(text)]


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("", []),
        (" , ,, ", []),
        ("*/*", [("*/*", 1.0)]),
        ("Text/CSV", [("text/csv", 1.0)]),
        ("text/csv;q=0.5, application/json", [("application/json", 1.0), ("text/csv", 0.5)]),
        (",text/csv,,application/json,", [("text/csv", 1.0), ("application/json", 1.0)]),
        ("a/b;q=0, c/d;Q=1.000, e/f;q=0.001, g/h;q=0.", [("c/d", 1.0), ("e/f", 0.001), ("a/b", 0.0), ("g/h", 0.0)]),
        ("text/*;q=0.3, */*, text/plain", [("*/*", 1.0), ("text/plain", 1.0), ("text/*", 0.3)]),
        (JAVA, [("text/html", 1.0), ("image/gif", 1.0), ("image/jpeg", 1.0), ("*/*", 0.2), ("*/*", 0.2)]),
    ],
)
def test_ranges_come_best_first(text: str, ranges: list[tuple[str, float]]) -> None:
    assert accepted(text) == ranges


def test_quality_is_no_parameter_of_a_range() -> None:
    [(found, quality)] = parse_accept('text/plain; format=flowed;q=0.7; x="a,b;q=0"')
    assert found == MediaType("text/plain", (("format", "flowed"), ("x", "a,b;q=0")))
    assert quality == 0.7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("json", "where a media type"),
        ("text/csv application/json", "expected a comma"),
        ("text/csv;q=2", "text/csv has q='2'; expected 0 to 1"),
        ("text/csv;q=1.001", "expected 0 to 1"),
        ("text/csv;q=0.1234", "up to three digits"),
        ("text/csv;q=-1", "expected 0 to 1"),
        ("text/csv;q=nan", "expected 0 to 1"),
        ("text/csv;q=1e0", "expected 0 to 1"),
        ("text/csv;q=.", "expected 0 to 1"),
        ('text/csv;q=""', "expected 0 to 1"),
        ("text/csv;q=\u0661", "where a parameter"),
        ("text/csv;q=1;q=0", "2 times"),
        ("text/csv;q", "where a parameter"),
        ("*/csv", "no media range"),
        ("text/csv," * 1000, "9000 characters"),
    ],
)
def test_what_is_no_accept_field_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_accept(text)
    with pytest.raises(ValueError, match=message):
        choose(text, OFFERED)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/csv", "text/csv"),
        ("TEXT/CSV", "text/csv"),
        ("text/csv; header=present", "text/csv"),  # parameters are not looked at
        ("text/*", "text/csv"),
        ("application/*", "application/json"),
        ("application/x-npy, application/json", "application/x-npy"),  # equal: the client's order
        ("application/*, text/csv", "text/csv"),  # equal: what is named goes before what a * covers
        ("text/*, application/*", "application/json"),  # equal: the server's order
        ("text/csv;q=0.5, application/jsonlines;q=0.7", "application/jsonlines"),
        ("text/csv;q=0.5, */*;q=0.1", "text/csv"),
        ("application/json;q=0.1, */*", "text/csv"),  # the most specific range gives the quality
        ("*/*, application/json;q=0", "text/csv"),
        ("application/*, application/json;q=0.5, application/jsonlines;q=0", "application/x-npy"),
        ("application/json;q=0", None),
        ("*/*;q=0", None),
        ("text/html, image/*", None),
        ("text/csv;q=0, text/csv;q=0.4, application/json;q=0.3", "text/csv"),  # given twice: the better one
        (JAVA, "application/json"),
    ],
)
def test_the_best_type_is_chosen(accept: str, chosen: str | None) -> None:
    assert choose(accept, OFFERED) == chosen


def test_nothing_offered_is_nothing_chosen() -> None:
    assert choose("", ()) is None
    assert choose("*/*", ()) is None


def test_the_choice_is_as_the_rule_says() -> None:
    """Against the rule spelled out, for many fields."""
    random_ = random.Random(5)
    names = [*OFFERED, "text/*", "application/*", "*/*", "image/png"]
    for _ in range(2000):
        ranges = [
            (name, random_.choice([0, 0.1, 0.5, 1])) for name in random_.sample(names, random_.randint(1, len(names)))
        ]
        accept = ", ".join(f"{name};q={quality}" for name, quality in ranges)
        by_name = dict(ranges)
        best: tuple[float, bool, int] | None = None
        chosen = None
        client_order = [name for name, _ in ranges]
        for number, essence in enumerate(OFFERED):
            wanted = [essence, essence.split("/")[0] + "/*", "*/*"]
            name = next((one for one in wanted if one in by_name), None)
            if name is None or by_name[name] == 0:
                continue
            exact = name == essence
            rank = (by_name[name], exact, -(client_order.index(name) if exact else number))
            if best is None or rank > best:
                best, chosen = rank, essence
        assert choose(accept, OFFERED) == chosen, accept


def test_nothing_but_value_errors_comes_of_junk() -> None:
    random_ = random.Random(6)
    alphabet = [*'abz/*;,=q.019 "\\\t\x00\xe9+-', "application/json", "q=0.5", '"a', "text/*"]
    for _ in range(5000):
        text = "".join(random_.choices(alphabet, k=random_.randint(0, 30)))
        for read in (parse_media_type, parse_accept, lambda text: choose(text, OFFERED)):
            try:
                read(text)
            except ValueError as error:
                assert str(error)


@pytest.mark.parametrize(
    "text", [";" * 8000, "a/b" + "; " * 4000, 'a/b;a="' + "\\" * 8000, "a/b;" + "a" * 8000, "," * 8000]
)
def test_long_fields_take_no_long_time(text: str) -> None:
    """Each would take minutes if an expression went back and forth in it; the time-out of the suite would tell."""
    for read in (parse_media_type, parse_accept):
        try:
            read(text)
        except ValueError:
            pass


def test_nothing_large_is_imported() -> None:
    root = str(Path(launcher.__file__).parent.parent)
    program = f"import sys; sys.path.insert(0, {root!r}); import launcher.serving.codecs; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert not {"numpy", "scipy", "asyncio", "inspect", "dataclasses", "typing", "zipfile"} & set(done.stdout.split())
