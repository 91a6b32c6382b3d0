"""Numbers of rows that become Python numbers, followed through the user's code: they may meet 0 and 1, and nothing else.

Probes have few rows. ``x.shape[0] > 2500``, ``n % 8``, ``n == m`` show one answer of several there, wherever in the code they stand.
So the function is run twice more on routings in which every expert is hit. The first run is listened to: each number that the code gets
out of a tensor is written down. In the second one a number that comes out otherwise is a `Count`, which knows both its values and what it
is the sum of. A comparison that any other number of rows may decide otherwise raises `Rejection`.
"""

from __future__ import annotations

import contextlib
import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ir import Rejection

# what a tensor answers with numbers, and what it answers otherwise on a probe than at the call
_NUMBERS = {"shape", "size", "numel", "nelement", "item", "tolist", "numpy"}
_EXACT = {"__int__", "__index__", "__float__"}
_QUESTIONS = {"requires_grad", "is_leaf", "grad_fn", "grad", "_version", "is_contiguous", "stride", "storage_offset", "data_ptr", "_base"}
_QUESTIONS |= {"is_inference", "untyped_storage", "storage", "is_shared", "is_pinned", "retains_grad", "_is_view", "nbytes"}
# where a number of rows is a size or a place, not a value
_SIZES = {"view", "reshape", "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "arange", "split", "pad"}
_SIZES |= {"split_with_sizes", "tensor_split", "narrow", "__getitem__", "__setitem__", "repeat", "expand", "unflatten", "broadcast_to"}
_SIZES |= {"repeat_interleave", "resize_", "view_as", "range", "unsafe_split", "chunk"}
_VALUES = {"full": 1, "new_full": 2, "__setitem__": 2}  # the argument of them that is a value all the same

UNEVEN = "what it does depends on how many rows each expert gets"
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

    def __eq__(self, other: object) -> Any:
        return self._meets(other, operator.eq)

    def __ne__(self, other: object) -> Any:
        return self._meets(other, operator.ne)

    def __lt__(self, other: Any) -> Any:
        return self._meets(other, operator.lt)

    def __le__(self, other: Any) -> Any:
        return self._meets(other, operator.le)

    def __gt__(self, other: Any) -> Any:
        return self._meets(other, operator.gt)

    def __ge__(self, other: Any) -> Any:
        return self._meets(other, operator.ge)

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


for _name in ("truediv", "pow", "lshift", "rshift", "and_", "or_", "xor"):
    _there, _back = _binary(getattr(operator, _name))
    setattr(Count, f"__{_name.rstrip('_')}__", _there)
    setattr(Count, f"__r{_name.rstrip('_')}__", _back)
for _name in ("floordiv", "mod"):
    setattr(Count, f"__r{_name}__", _binary(getattr(operator, _name))[1])


_now = threading.local()


def refuse(reason: str, stage: str = "rows") -> NoReturn:
    """Raise `Rejection`, and have the listener know in case the code swallows it."""
    refusal = Rejection(reason, stage=stage)
    if getattr(_now, "listener", None) is not None:
        _now.listener.refused = refusal
    raise refusal


def _leak(self: Count, *_: Any) -> NoReturn:
    refuse("it takes its rows one by one, or makes text or a key of their number")


_LEAKS = "int float hash str repr format round trunc floor ceil abs pos invert rdivmod".split()
for _name in (*(f"__{n}__" for n in _LEAKS), "bit_length", "bit_count", "to_bytes", "as_integer_ratio", "conjugate"):
    setattr(Count, _name, _leak)


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


class Listener(TorchFunctionMode):
    """Sees every question that code asks its tensors. `before`: the answers of an earlier run on another routing; None: there is none.

    tokens: the token counts of that run and of this one: a number that is a multiple of one in both is so many of it.
    """

    def __init__(self, before: list[tuple[str, Any]] | None = None, tokens: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__()
        self.before, self.tokens = before, tokens
        self.said: list[tuple[str, Any]] = []
        self.refused: Rejection | None = None
        self.on = True

    def __enter__(self) -> Listener:
        _now.listener = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _now.listener = None
        super().__exit__(*error)
        if self.refused is not None:
            raise self.refused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        name = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
        if self.on and name in _QUESTIONS:
            refuse(f"it asks {name} of a tensor, which a probe answers otherwise than the call")
        args = [self._plain(name, v, i == _VALUES.get(name)) for i, v in enumerate(args)]
        out = func(*args, **{k: self._plain(name, v, k == "fill_value") for k, v in (kwargs or {}).items()})
        return self.answer(name, out) if self.on and name in _NUMBERS | _EXACT else out

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Code of a library asks, which is nobody's affair."""
        was, self.on = self.on, False
        try:
            yield
        finally:
            self.on = was

    def answer(self, name: str, out: Any) -> Any:
        """An answer, written down; with what it was on the other routing where that is known."""
        flat = out.tolist() if hasattr(out, "tolist") else out
        flat = list(flat) if isinstance(flat, (tuple, list)) else flat
        self.said.append((name, flat))
        if self.before is None:
            return out
        i = len(self.said) - 1
        if i >= len(self.before) or self.before[i][0] != name:
            refuse(UNEVEN, "draw")
        both = self._merge(flat, self.before[i][1])
        if both is flat:
            return out
        if name in _EXACT:
            _leak(both)
        if hasattr(out, "tolist"):
            import numpy

            return numpy.array(both, dtype=object)
        return Shape(both) if isinstance(out, tuple) else both

    def _merge(self, a: Any, b: Any) -> Any:
        """`a` with its numbers turned into counts where `b` has others; `a` itself if there are none."""
        if not isinstance(a, list) or not isinstance(b, list):
            same = type(a) is type(b) and (a == b or isinstance(a, float))
            return a if same else self.count(a, b)
        if len(a) != len(b):
            refuse(UNEVEN, "draw")
        merged = [self._merge(x, y) for x, y in zip(a, b, strict=True)]
        if all(x is y for x, y in zip(merged, a, strict=True)):
            return a
        rising = len(a) > 2 and all(type(x) is int for x in (*a, *b)) and a == sorted(a) and b == sorted(b)
        return self._ends(a, b) if rising else merged

    def _ends(self, a: list[int], b: list[int]) -> list[Any]:
        """Rising numbers are where the experts' rows end: each one is the one before and a count."""
        found: list[Any] = []
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            found.append(found[-1] + self.count(x - a[i - 1], y - b[i - 1]) if i else self.count(x, y))
        return found

    def count(self, a: Any, b: Any) -> Any:
        if type(a) is not int or type(b) is not int:
            refuse(UNEVEN, "draw")
        for s in self.tokens if a != b else ():
            if a and a % s[0] == 0 and b % s[1] == 0 and a // s[0] == b // s[1]:
                return Count(a, b, {s: a // s[0]})
        return a if a == b else Count(a, b, {(a, b): 1})

    def _plain(self, name: str, v: Any, value: bool = False) -> Any:
        if isinstance(v, Count):
            if value or self.on and name not in _SIZES | _NUMBERS:
                refuse("it computes with a number of rows")
            return v.a
        if type(v) in (tuple, list, Shape):
            items = [self._plain(name, x, value) for x in v]
            return items if isinstance(v, list) else tuple(items)
        if isinstance(v, slice):
            return slice(*(self._plain(name, x) for x in (v.start, v.stop, v.step)))
        return int if v is Int else v


class Shape(tuple[Any, ...]):
    """A shape with counts in it."""

    def numel(self) -> Any:
        return math.prod(self)


class _IntMeta(type):
    def __call__(cls, *args: Any, **kw: Any) -> Any:
        if args and isinstance(args[0], (Count, Tensor)):
            return args[0].item()
        return int(*args, **kw)

    def __instancecheck__(cls, v: Any) -> bool:
        return isinstance(v, int)

    def __getattr__(cls, name: str) -> Any:
        return getattr(int, name)


class Int(metaclass=_IntMeta):
    """Python's `int` for code that is listened to: counts are numbers."""


def apart(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A library's function, which asks its tensors for itself."""

    def called(*args: Any, **kwargs: Any) -> Any:
        listener: Listener | None = getattr(_now, "listener", None)
        if listener is None:
            return fn(*args, **kwargs)
        with listener.paused():
            return fn(*listener._plain("", args), **{k: listener._plain("", v) for k, v in kwargs.items()})

    return called


def exact(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of plain numbers."""

    def called(*args: Any, **kwargs: Any) -> Any:
        for a in args:
            if isinstance(a, Count):
                _leak(a)
        return fn(*args, **kwargs)

    return called


def builtins() -> dict[str, Any]:
    """`len`, `int` and `range` for code that is listened to."""

    def length(v: Any) -> Any:
        now: Listener | None = getattr(_now, "listener", None)
        if now is None or not now.on:
            return len(v)
        if isinstance(v, Tensor):
            return v.shape[0]
        return now.answer("len", len(v)) if isinstance(v, list) or type(v).__name__ == "ndarray" else len(v)

    def numbers(*args: Any) -> range:
        if any(isinstance(a, Count) for a in args):
            refuse("it goes over its rows one by one: loop over the experts")
        return range(*args)

    return {"len": length, "int": Int, "range": numbers}
