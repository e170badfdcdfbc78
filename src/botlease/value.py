"""Frozen values like those of :func:`dataclasses.dataclass`, which cost nothing to declare and little to change.

``dataclass`` writes and compiles six methods for each class: 0.45 ms for each of the thirty of :mod:`botlease.model`, a
tenth of every start. ``dataclasses.replace`` asks each field what it is: it was half of what an idle holder did
(measured: 1,128 of the 2,555 lines of a renewal).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

T = TypeVar("T")

if TYPE_CHECKING:
    from dataclasses import replace as replace
else:

    def replace(obj, /, **changes):
        """A copy with other values. Raises TypeError for a field that it does not have."""
        new = object.__new__(type(obj))
        fields = new.__dict__
        fields.update(obj.__dict__, **changes)
        if len(fields) != len(obj.__dict__):
            raise TypeError(f"{type(obj).__name__} has no {', '.join(changes.keys() - obj.__dict__.keys())}")
        return new


@dataclass_transform(frozen_default=True)
def value(cls: type[T]) -> type[T]:
    """A class whose annotations are its fields, in that order; what they are assigned is their default (shared, so it
    must not be changed). Equal are two of the same class with equal fields."""
    names = tuple(cls.__annotations__)
    defaults = {f"_{name}": cls.__dict__[name] for name in names if name in cls.__dict__}
    arguments = "".join(f", {name}=_{name}" if f"_{name}" in defaults else f", {name}" for name in names)
    lines = "".join(f"\n  fields[{name!r}] = {name}" for name in names)
    # Of the methods this one alone is compiled: it is called for each event, and Python checks its arguments.
    exec(f"def __init__(self{arguments}):\n  fields = self.__dict__{lines}", defaults)  # noqa: S102 - names of fields
    setattr(cls, "__init__", defaults["__init__"])  # noqa: B010 - mypy would have it be of one signature
    setattr(cls, "__match_args__", names)  # noqa: B010 - nor does it know this one
    for method in (__eq__, __hash__, __repr__, __setattr__, __delattr__):
        setattr(cls, method.__name__, method)
    return cls


def __eq__(self: Any, other: object) -> bool:
    return type(self) is type(other) and bool(self.__dict__ == other.__dict__)


def __hash__(self: Any) -> int:
    return hash((type(self), *(self.__dict__[name] for name in type(self).__match_args__)))


def __repr__(self: Any) -> str:
    return (
        f"{type(self).__name__}({', '.join(f'{name}={self.__dict__[name]!r}' for name in type(self).__match_args__)})"
    )


def __setattr__(self: Any, name: str, _: object) -> None:
    raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")


def __delattr__(self: Any, name: str) -> None:
    raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be deleted")
