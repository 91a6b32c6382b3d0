"""The IR as plain arguments of an op and back, made from the fields of records (`records`): schema, arguments, record, meaning.

A record's field says by its type what the op takes. It stands in the IR under its own name, or where `AT` says ("groups.count"); where
what holds it is None, its value is 0, or what `ABSENT` says.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import Any, TypeVar

import sympy as sp
import torch

from . import chain, scalar, storage
from .chain import Chain
from .storage import Storing

T = TypeVar("T")
# type of a record's field, as written -> (type in an op's schema, what makes such a value)
_TYPES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bool": ("bool", bool),
    "int": ("int", int),
    "float": ("float", float),
    "torch.dtype": ("ScalarType", lambda d: d),
    "tuple[int, ...]": ("int[]", lambda v: [int(i) for i in v]),
    "tuple[float, ...]": ("float[]", lambda v: [float(c) for c in v]),
}
_PROGRAM = {"tuple[int, ...]": 0, "tuple[float, ...]": 1}  # what part of a program such a field is
_PROGRAMS: dict[Any, Any] = {sp.Expr: scalar, Chain: chain, Chain | None: chain, Storing: storage}  # what encodes and decodes them


def schema(record: type, prefix: str = "") -> str:
    """The arguments of an op for a record: "int k, bool stacked, ..."."""
    return ", ".join(f"{_TYPES[str(f.type)][0]} {prefix}{f.name}" for f in fields(record))


def place(record: type, name: str) -> int:
    """Which of the arguments a field is."""
    return [f.name for f in fields(record)].index(name)


def encode(record: type, meaning: Any) -> list[Any]:
    """The plain arguments for a dataclass of the IR. Raises `scalar.UnknownActivation` for an expression that no program says."""
    return [_TYPES[str(f.type)][1](_read(record, f, meaning)) for f in fields(record)]


def record_of(record: type[T], args: Sequence[Any]) -> T:
    """The record of plain arguments; hashable, equal for equal arguments."""
    return record(*[tuple(a) if isinstance(a, (list, tuple)) else a for a in args])


def decode(meaning: type[T], record: Any, **others: Any) -> T:
    """The dataclass of the IR that a record was made of; `others`: its fields that no op is told.

    decode(cls, record_of(R, encode(R, m)), **others) = m.
    """
    parts: dict[str, dict[str, Any]] = {}
    programs: dict[str, list[Any]] = {}
    hints = typing.get_type_hints(meaning)
    for f in fields(record):
        name, _, inner = path(record, f.name).partition(".")
        value = getattr(record, f.name)
        if inner:
            parts.setdefault(name, {})[inner] = value
        elif str(f.type) in _PROGRAM and hints[name] in _PROGRAMS:
            programs.setdefault(name, []).append(value)
        else:
            others[name] = _typed(hints[name], value)
    for name, values in parts.items():
        others[name] = _part(hints[name], values)
    return meaning(**others, **{name: _PROGRAMS[hints[name]].decode(*program) for name, program in programs.items()})


def path(record: Any, name: str) -> str:
    """Where a field stands in the IR."""
    return getattr(record, "AT", {}).get(name, name)  # type: ignore[no-any-return]


def _read(record: type, f: Field[Any], meaning: Any) -> Any:
    value = meaning
    for name in path(record, f.name).split("."):
        value = getattr(value, name)
        if value is None:
            return getattr(record, "ABSENT", {}).get(f.name, 0)
    coder = next((_PROGRAMS[kind] for kind in (sp.Expr, Chain, Storing) if isinstance(value, kind)), None)
    return value if coder is None else coder.encode(value)[_PROGRAM[str(f.type)]]


def _typed(hint: Any, value: Any) -> Any:
    return value if isinstance(value, (torch.dtype, tuple)) else hint(value)


def _part(hint: Any, values: dict[str, Any]) -> Any:
    """A dataclass inside another, or None: its first field is 0 where it is not there."""
    if not next(iter(values.values())):
        return None
    (cls,) = (a for a in typing.get_args(hint) if a is not type(None))
    hints = typing.get_type_hints(cls)
    return cls(**{name: _typed(hints[name], value) for name, value in values.items()})
