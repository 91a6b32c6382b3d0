"""Numbers of rows that become Python numbers, followed through the user's code: they may meet 0 and 1, and nothing else.

Probes have few rows. ``x.shape[0] > 2500``, ``n % 8``, ``n == m`` show one answer of several there, wherever in the code they stand.
So the function is run twice more on routings in which every expert is hit. The first run is listened to: each number that the code gets
out of a tensor is written down. In the second one a number that comes out otherwise is a `Count`, which knows both its values and what it
is the sum of. A comparison that any other number of rows may decide otherwise raises `Rejection`.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ir import Rejection
from .counts import Count as Count
from .counts import leak, listening, refuse

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

EACH = "it reads what every token chose on the host (.{}()): write `for e in ids.unique().tolist()`, rows by torch.where(ids == e)"
_HERE, _TORCH = (os.path.dirname(f) + os.sep for f in (__file__, torch.__file__))
UNEVEN = "what it does depends on how many rows each expert gets"


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
        listening.listener = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        listening.listener = None
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
        if name in ("tolist", "numpy") and self._of_tokens(flat, self.before[i][1]):
            refuse(EACH.format(name), code="record", source=_line())
        both = self._merge(flat, self.before[i][1])
        if both is flat:
            return out
        if name in _EXACT:
            leak(both)
        if hasattr(out, "tolist"):
            import numpy

            return numpy.array(both, dtype=object)
        return Shape(both) if isinstance(out, tuple) else both

    def _of_tokens(self, a: Any, b: Any) -> bool:
        """Whether there are so many of them for each token, in both runs."""
        sizes = [len(v) for v in (a, b) if isinstance(v, list)]
        return len(sizes) == 2 and any(x % s == y % r == 0 < x and x // s == y // r for s, r in self.tokens for x, y in [sizes])

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


def _line() -> str:
    """file:line of the code that asks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_HERE, _TORCH)):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class FirstCall(TorchFunctionMode):
    """Sees where code first calls what becomes an operation: `at`, its file's name and line; "" where it does not."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.names, self.at = {name, name.removeprefix("linalg_vector_"), name.removeprefix("native_")}, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.at and getattr(func, "__name__", "") in self.names:
            self.at = os.path.basename(_line())
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Counts what code calls of torch."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


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
        listener: Listener | None = getattr(listening, "listener", None)
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
                leak(a)
        return fn(*args, **kwargs)

    return called


def builtins() -> dict[str, Any]:
    """`len`, `int` and `range` for code that is listened to."""

    def length(v: Any) -> Any:
        now: Listener | None = getattr(listening, "listener", None)
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
