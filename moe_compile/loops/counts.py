"""Numbers of rows as code computes with them: sums of counts, which may meet 0 and 1, and nothing else."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ..ir import Rejection

Form = Mapping[tuple[int, int], int]  # (value in one run, in the other) of a plain count -> how often it is in the sum


class Count(int):
    """A number of rows: `a` now, `b` on another routing. `form`: the counts that it is the sum of, with `rest`; None: it is no sum."""

    a: int
    b: int
    form: Form | None
    rest: int

    def __new__(cls, a: int, b: int, form: Form | None, rest: int = 0) -> Count:
        self = super().__new__(cls, a)
        self.a, self.b, self.form, self.rest = a, b, form, rest
        return self

    def _meets(self, other: Any, op: Callable[[Any, Any], bool]) -> Any:
        if not isinstance(other, (int, float)) and not hasattr(other, "item"):
            return NotImplemented
        d = self - other
        if not isinstance(d, Count):
            return op(d, 0)
        factors = set() if d.form is None else set(d.form.values())
        at = -d.rest if min(factors, default=0) > 0 else d.rest
        if not factors or min(factors) < 0 < max(factors) or not (at <= 0 or at == 1 and factors in ({1}, {-1})):
            met = "another number of rows" if isinstance(other, Count) else other
            refuse(f"it compares a number of rows with {met}, which few rows do not tell")
        return op(self.a, other.a if isinstance(other, Count) else other)

    def __bool__(self) -> bool:
        return bool(self != 0)

    def __add__(self, other: Any) -> Any:
        return _sum(self, other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return _sum(self, other, -1)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __neg__(self) -> Any:
        return self * -1

    def __mul__(self, other: Any) -> Any:
        if type(other) is int and self.form is not None and other:
            return Count(self.a * other, self.b * other, {s: n * other for s, n in self.form.items()}, self.rest * other)
        return _other(operator.mul, self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if type(other) is int and self.form is not None and not any(n % other for n in (*self.form.values(), self.rest)):
            return Count(self.a // other, self.b // other, {s: n // other for s, n in self.form.items()}, self.rest // other)
        return _other(operator.floordiv, self, other)

    def __mod__(self, other: Any) -> Any:
        if type(other) is int and self.form is not None and not any(n % other for n in self.form.values()):
            return self.rest % other
        return _other(operator.mod, self, other)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def item(self) -> Count:
        return self


def _binary(op: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    return lambda self, other: _other(op, self, other), lambda self, other: _other(op, other, self)


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Count, f"__{_name}__", functools.partialmethod(Count._meets, op=getattr(operator, _name)))
for _name in ("truediv", "pow", "lshift", "rshift", "and_", "or_", "xor"):
    _there, _back = _binary(getattr(operator, _name))
    setattr(Count, f"__{_name.rstrip('_')}__", _there)
    setattr(Count, f"__r{_name.rstrip('_')}__", _back)
for _name in ("floordiv", "mod"):
    setattr(Count, f"__r{_name}__", _binary(getattr(operator, _name))[1])


listening = threading.local()


def refuse(reason: str, stage: str = "rows", code: str = "", source: str = "") -> NoReturn:
    """Raise `Rejection`, and have the listener know in case the code swallows it."""
    refusal = Rejection(reason, stage=stage, code=code, source=source)
    if getattr(listening, "listener", None) is not None:
        listening.listener.refused = refusal
    raise refusal


def leak(self: Count, *_: Any) -> NoReturn:
    refuse("it takes its rows one by one, or makes text or a key of their number")


_LEAKS = "int float hash str repr format round trunc floor ceil abs pos invert rdivmod".split()
for _name in (*(f"__{n}__" for n in _LEAKS), "bit_length", "bit_count", "to_bytes", "as_integer_ratio", "conjugate"):
    setattr(Count, _name, leak)


def _both(v: Any) -> tuple[Any, Any]:
    return (v.a, v.b) if isinstance(v, Count) else (v, v)


def _sum(x: Count, y: Any, sign: int) -> Any:
    if not isinstance(y, (Count, int)) and not hasattr(y, "item"):
        return _other(operator.add if sign > 0 else operator.sub, x, y)
    y = y if isinstance(y, Count) else int(y)
    other: Form | None = y.form if isinstance(y, Count) else {}
    a, b = (p + sign * q for p, q in zip(_both(x), _both(y), strict=True))
    if x.form is None or other is None:
        return Count(a, b, None)
    form = {s: n for s in {**x.form, **other} if (n := x.form.get(s, 0) + sign * other.get(s, 0))}
    rest = x.rest + sign * (y.rest if isinstance(y, Count) else y)
    return a if a == b else Count(a, b, form, rest)  # what is the same on two routings is no number of rows


def _other(op: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
    (a, b), (c, d) = _both(x), _both(y)
    a, b = op(a, c), op(b, d)
    if type(a) is not int or type(b) is not int:
        refuse("it computes with a number of rows")
    return Count(a, b, None)
