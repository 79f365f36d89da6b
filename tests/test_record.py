"""Records: frozen values with defaults, equality, and a plain form."""

from __future__ import annotations

import copy
import pickle

import pytest

from launcher.record import Record, as_dict, replace


class Point(Record):
    x: int
    y: int = 2


class Line(Record):
    """Two points and a name."""

    start: Point
    rest: tuple[Point, ...]
    names: dict[str, Point]

    @property
    def count(self) -> int:
        return 1 + len(self.rest)


class Named(Point):
    name: str = "n"


LINE = Line(Point(1), (Point(3, 4),), {"a": Point(5)})


def test_positions_names_and_defaults() -> None:
    assert (Point(1).x, Point(1).y) == (1, 2)
    assert Point(1, 5) == Point(y=5, x=1)
    assert Named(1, name="z") == Named(1, 2, "z")
    assert LINE.count == 2


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1,), {"x": 2})])
def test_wrong_arguments(args: tuple[int, ...], kwargs: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="Point"):
        Point(*args, **kwargs)


def test_frozen() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match="replace"):
        point.x = 2
    with pytest.raises(AttributeError, match="frozen"):
        del point.x
    with pytest.raises(AttributeError):
        point.new = 1  # type: ignore[attr-defined]
    assert point == Point(1)


def test_equality_and_hash() -> None:
    assert Point(1) == Point(1) != Point(2)
    assert Point(1, 2) != Named(1, 2)
    assert Point(1) != (1, 2)
    assert len({Point(1), Point(1), Point(2)}) == 2


def test_repr_can_be_read() -> None:
    assert repr(Point(1)) == "Point(x=1, y=2)"
    assert repr(LINE) == "Line(start=Point(x=1, y=2), rest=(Point(x=3, y=4),), names={'a': Point(x=5, y=2)})"


def test_replace_leaves_the_original() -> None:
    assert replace(Point(1), y=9) == Point(1, 9)
    with pytest.raises(TypeError):
        replace(Point(1), z=1)
    assert replace(LINE, start=Point(0)).start == Point(0)
    assert LINE.start == Point(1)


def test_as_dict_goes_to_any_depth() -> None:
    assert as_dict(LINE) == {
        "start": {"x": 1, "y": 2},
        "rest": [{"x": 3, "y": 4}],
        "names": {"a": {"x": 5, "y": 2}},
    }


def test_copies_and_pickles_are_equal() -> None:
    assert copy.deepcopy(LINE) == LINE
    assert pickle.loads(pickle.dumps(Point(1, 7))) == Point(1, 7)  # noqa: S301  # made in this line
