"""Frozen values: what dataclasses promise of theirs, and that they are cheap."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from botlease.value import replace, value


@value
class Point:
    x: int
    y: int = 0

    @property
    def sum(self) -> int:
        return self.x + self.y


@value
class Other:
    x: int
    y: int = 0


@value
class Nothing:
    pass


def test_fields_are_given_by_place_or_by_name_and_have_defaults() -> None:
    assert (Point(1).x, Point(1).y, Point(1, y=2).y, Point(y=3, x=1).sum) == (1, 0, 2, 4)
    assert repr(Point(1)) == "Point(x=1, y=0)" and repr(Nothing()) == "Nothing()"


@pytest.mark.parametrize(
    ("args", "named"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1,), {"x": 1}), ((), {"y": 1})]
)
def test_what_does_not_fit_the_fields_is_refused(args: tuple[int, ...], named: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="argument"):
        Point(*args, **named)


def test_equal_are_two_of_the_same_class_with_equal_fields() -> None:
    assert Point(1) == Point(1, 0) and hash(Point(y=0, x=1)) == hash(Point(1)) and copy.copy(Point(1)) == Point(1)
    assert Point(1) != Point(2) and Point(1) != Other(1) and Nothing() != Point(1)
    assert Nothing() and len({Point(1), Other(1), Nothing(), Point(1)}) == 3


def test_a_value_is_not_changed_and_a_copy_with_other_fields_is() -> None:
    point = Point(1, 2)
    with pytest.raises(AttributeError, match="frozen"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        del point.x
    assert replace(point, y=5) == Point(1, 5) and point == Point(1, 2)
    with pytest.raises(TypeError, match="Point has no z"):
        replace(point, z=1)


def test_values_are_matched_by_place_and_by_name() -> None:
    def found(v: Any) -> Any:
        match v:
            case Nothing():
                return "nothing"
            case Point(1, y=y):
                return y
            case Point(x, _):
                return -x

    assert [found(v) for v in (Nothing(), Point(1, 7), Point(2))] == ["nothing", 7, -2]
