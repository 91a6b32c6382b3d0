"""A call of the user's as it was seen while tracing: its function, what hangs on each argument, and which tensor is which."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
from torch import nn

from .looks import line_of_loop
from .places import Place, mark


class Spec(NamedTuple):
    """A tensor argument: sizes are ints, or expressions where they are dynamic."""

    dtype: torch.dtype
    shape: tuple[Any, ...]


class Leaf(NamedTuple):
    """A tensor in an argument, by its name among `Call.tensors`."""

    name: str


class Owner(NamedTuple):
    """The module, where it is handed in."""


class Fields(NamedTuple):
    """A named tuple: its class and items."""

    cls: type
    items: Sequence[Any]
    place: Place


class Given(NamedTuple):
    """A constant or an object of the user's, and where it is found."""

    value: Any
    place: Place


class Made(NamedTuple):
    """An object that the graph made: its class and attributes."""

    cls: type
    attributes: Mapping[str, Any]
    place: Place


@dataclass(frozen=True)
class Call:
    """One call: `arguments` by name are trees of Leaf, Owner, Given, Made and Fields in tuples, lists and dictionaries."""

    fn: types.FunctionType
    module: nn.Module | None
    arguments: Mapping[str, Any]
    tensors: Mapping[str, Spec]
    device: torch.device
    autocast: torch.dtype | None = None
    grad: bool = True
    roots: Mapping[str, Any] = field(default_factory=dict)  # root of a place -> what is there, for objects among the arguments

    @property
    def source(self) -> str:
        """file:line of the loop, or of the function that it is in."""
        return f"{self.fn.__code__.co_filename}:{line_of_loop(self.fn.__code__)}"

    def filled(self, leaf: Callable[[str], Any], given: Callable[[Any, Place], Any], owner: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments: tensors by `leaf(name)`, constants and objects by `given(value, place)`."""

        def fill(v: Any) -> Any:
            if isinstance(v, Leaf):
                return leaf(v.name)
            if isinstance(v, Given):
                return given(v.value, v.place)
            if isinstance(v, Owner):
                return owner
            if isinstance(v, Made):
                new = object.__new__(given(v.cls, v.place.type()))
                new.__dict__.update({k: fill(x) for k, x in v.attributes.items()})
                return new
            if isinstance(v, Fields):
                cls, items = given(v.cls, v.place.type()), [fill(x) for x in v.items]
                return cls(*items) if hasattr(v.cls, "_fields") else cls(items)
            if isinstance(v, dict):
                return {k: fill(x) for k, x in v.items()}
            return type(v)(fill(x) for x in v)

        bound = inspect.BoundArguments(inspect.signature(self.fn), {k: fill(v) for k, v in self.arguments.items()})  # type: ignore[arg-type]
        return bound.args, bound.kwargs

    def mark(self) -> Any:
        """Equal for two calls iff what is read of one holds for the other, but for what is noted while it is read."""

        def of(v: Any) -> Any:
            if isinstance(v, Leaf):
                s = self.tensors[v.name]
                return s.dtype, len(s.shape), s.shape[-1] if s.shape and isinstance(s.shape[-1], int) else None
            if isinstance(v, Given):
                return mark(v.value)
            if isinstance(v, Made):
                return v.cls, {k: of(x) for k, x in v.attributes.items()}
            if isinstance(v, dict):
                return {k: of(x) for k, x in v.items()}
            if isinstance(v, Fields):
                return v.cls, tuple(of(x) for x in v.items)
            return type(v), () if isinstance(v, Owner) else tuple(of(x) for x in v)

        roles = roles_of(self.tensors)
        handed_in = {n: tuple(map(str, self.tensors[n].shape)) for r in roles for n in r.params}  # weights as arguments
        state = (self.fn.__code__, self.device.type, self.autocast, self.grad, torch.get_default_dtype())
        return type(self.module), {k: of(v) for k, v in self.arguments.items()}, handed_in, roles, state


# ---- which tensor is which ---------------------------------------------------------------------------------------------


class Roles(NamedTuple):
    """Which argument is what: tokens [.., H], ids [T, k] or [T*k], weights of as many elements, and the weights handed in.

    extras: tensors of each token beside them: masks [T], scores [T, E], other weights [T, k].
    """

    tokens: str
    ids: str
    weights: str
    params: tuple[str, ...]
    k: int
    extras: tuple[str, ...] = ()


def roles_of(tensors: Mapping[str, Spec]) -> tuple[Roles, ...]:
    """The ways to see these arguments as a dispatch, the likeliest first; no more than four of them."""
    found = dict.fromkeys(_roles(tensors))
    return tuple(sorted(found, key=lambda r: (tensors[r.tokens].shape[-1] == r.k, list(tensors).index(r.tokens))))[:4]


def _roles(tensors: Mapping[str, Spec]) -> Iterator[Roles]:
    floats = {n: s for n, s in tensors.items() if s.dtype.is_floating_point and s.shape}
    for ids, spec in tensors.items():
        if spec.dtype not in (torch.int64, torch.int32) or not 1 <= len(spec.shape) <= 2:
            continue
        for tokens, x in floats.items():
            k = _per_token(x, spec)
            for w, s in floats.items() if k is not None else ():
                if w != tokens and s.shape in (spec.shape, (*spec.shape, 1)):
                    rest = [n for n in tensors if n not in (tokens, ids, w)]
                    rows = sympy.Mul(*x.shape[:-1])
                    extras = [n for n in rest if _is_extra(tensors[n], rows)]
                    for beside in (extras, [n for n in extras if n not in floats or len(floats[n].shape) < 2]):
                        params = tuple(n for n in rest if n not in beside)  # with as many tokens as experts, either is possible
                        if all(n in floats and len(floats[n].shape) >= 2 for n in params):
                            yield Roles(tokens, ids, w, params, int(k), tuple(beside))  # type: ignore[arg-type]


def _is_extra(s: Spec, rows: Any) -> bool:
    """Whether a tensor has a row for each token: [T] or [T, n]."""
    return 1 <= len(s.shape) <= 2 and sympy.expand(rows - s.shape[0]) == 0 and all(isinstance(d, int) for d in s.shape[1:])


def _per_token(x: Spec, ids: Spec) -> int | None:
    """k, if `x` [.., H] holds the tokens that `ids` is for."""
    if not 2 <= len(x.shape) <= 3 or not isinstance(x.shape[-1], int):
        return None
    rows = sympy.Mul(*x.shape[:-1])
    if len(ids.shape) == 2:
        return ids.shape[1] if isinstance(ids.shape[1], int) and sympy.expand(rows - ids.shape[0]) == 0 else None
    k = sympy.cancel(sympy.sympify(ids.shape[0]) / rows)
    return int(k) if k.is_Integer and k >= 1 else None


def bind(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments by name (a tuple for *args, a dictionary for **kwargs), or None where the call does not fit."""
    try:
        return dict(inspect.signature(fn).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return None
