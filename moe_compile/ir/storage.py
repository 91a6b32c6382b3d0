"""How the weights of both projections lie in memory and what is done to their rows, as whole numbers and constants, for an op's arguments.

    decode(*encode(s)) = s

A part that is not there is a 0, else a 1 and its fields one after the other: a tuple is its length and its items.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from .rows import Rows
from .stored import Stored

_DTYPES = (
    *(torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


@dataclass(frozen=True)
class Storing:
    """Of the up projection and of the down projection; None: plain floats, rows as they are."""

    up: Stored | None = None
    down: Stored | None = None
    up_rows: Rows | None = None
    down_rows: Rows | None = None


_PARTS: tuple[type, ...] = (Stored, Stored, Rows, Rows)
_HINTS = {cls: typing.get_type_hints(cls) for cls in _PARTS}


def encode(storing: Storing) -> tuple[list[int], list[float]]:
    """Raises ValueError for a type that no weights lie in."""
    ints: list[int] = []
    consts: list[float] = []
    for part in (getattr(storing, f.name) for f in fields(Storing)):
        ints.append(int(part is not None))
        for f in fields(part) if part is not None else ():
            value = getattr(part, f.name)
            if isinstance(value, tuple):
                ints.append(len(value))
            for v in value if isinstance(value, tuple) else (value,):
                if isinstance(v, float):
                    consts.append(v)
                else:
                    ints.append(_DTYPES.index(v) if isinstance(v, torch.dtype) else int(v))
    return ints, consts


def decode(ints: tuple[int, ...], consts: tuple[float, ...]) -> Storing:
    numbers, floats = iter(ints), iter(consts)
    return Storing(*(_part(cls, numbers, floats) if next(numbers) else None for cls in _PARTS))


def _part(cls: type, ints: Iterator[int], floats: Iterator[float]) -> Any:
    def value(hint: Any) -> Any:
        if hint is torch.dtype:
            return _DTYPES[next(ints)]
        if typing.get_origin(hint) is tuple:
            item = typing.get_args(hint)[0]
            return tuple([value(item) for _ in range(next(ints))])
        return next(floats) if hint is float else hint(next(ints))

    return cls(**{f.name: value(_HINTS[cls][f.name]) for f in fields(cls)})
