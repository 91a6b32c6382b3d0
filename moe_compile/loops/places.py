"""Places: where code finds the values that it reads beside its arguments.

A place is a root and the steps from there. It can be looked up again (is the value still what it was, does another module answer
alike?), turned into one of Dynamo's sources (`guards`), and said in the user's words.
"""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .libraries import enum_state, notes_reads

MODULE, FUNCTION = "self", "function"  # roots: the module and the function of a call; an argument is the root "argument NAME"
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Step = tuple[str, Any]  # ("attr", name), ("item", key), ("cell", index), ("default", index) or ("type", None)


class Space:
    """The globals of some code, as a root: equal to itself only."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self.names is other.names

    def __hash__(self) -> int:
        return id(self.names)


class Place(NamedTuple):
    root: str | Space
    steps: tuple[Step, ...] = ()

    def attr(self, name: str) -> Place:
        return Place(self.root, (*self.steps, ("attr", name)))

    def item(self, key: Any) -> Place:
        return Place(self.root, (*self.steps, ("item", key)))

    def cell(self, index: int) -> Place:
        return Place(self.root, (*self.steps, ("cell", index)))

    def default(self, index: int) -> Place:
        return Place(self.root, (*self.steps, ("default", index)))

    def type(self) -> Place:
        return Place(self.root, (*self.steps, ("type", None)))

    @property
    def holder(self) -> Place:
        """The place that the last step starts from."""
        return Place(self.root, self.steps[:-1])

    def __str__(self) -> str:
        """As the user would write it: `self.stats.rows`, `SCALES['all']`, `type(self).calls`."""
        text, *steps = _root(self.root), *self.steps
        for kind, key in steps:
            if kind == "type":
                text = f"type({text})"
            elif kind == "item" and not text:
                text = str(key)
            elif kind in ("item", "default"):
                text = f"{text}[{key!r}]"
            elif kind == "cell":
                text = f"a variable around {text or 'it'}"
            else:
                text = f"{text}[{key}]" if key.isdigit() else f"{text}.{key}"
        return text


def _root(root: str | Space) -> str:
    return "" if isinstance(root, Space) else root.removeprefix("argument ")


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


def find(place: Place, roots: Mapping[str, Any]) -> Any:
    """What is at a place now, as Python would find it but without running code of the user's (no properties); `MISSING` for nothing."""
    value = place.root.names if isinstance(place.root, Space) else roots.get(place.root, MISSING)
    for kind, key in place.steps:
        value = _STEPS[kind](value, key)
        if value is MISSING:
            break
    return value


def _attribute(v: Any, name: str) -> Any:
    if isinstance(v, type):
        return v.__mro__ if name == "__mro__" else _unbound(of_class(v, name))
    own = own_attribute(v, name)
    return _unbound(of_class(type(v), name)) if own is MISSING else own


def _item(v: Any, key: Any) -> Any:
    try:
        if isinstance(v, dict):
            return dict.__getitem__(v, key)
        return next(iter(list.__getitem__(v, slice(key, key + 1))), MISSING) if isinstance(v, list) else tuple.__getitem__(v, key)
    except (KeyError, IndexError, TypeError):
        return MISSING


def _cell(v: Any, index: int) -> Any:
    try:
        return v.__closure__[index].cell_contents
    except (AttributeError, IndexError, TypeError, ValueError):
        return MISSING


def _default(v: Any, index: int) -> Any:
    try:
        return v.__defaults__[index]
    except (AttributeError, IndexError, TypeError):
        return MISSING


_STEPS: Mapping[str, Callable[[Any, Any], Any]] = {
    "attr": _attribute,
    "item": _item,
    "cell": _cell,
    "default": _default,
    "type": lambda v, _: type(v),
}


def own_attribute(v: Any, name: str) -> Any:
    """What an object's own state answers for `name`, in Python's order of looking; `MISSING` where its class does, or nobody."""
    of = of_class(type(v), name)
    if isinstance(of, (types.MemberDescriptorType, types.GetSetDescriptorType)):  # __slots__, and what Python's own objects hold
        try:
            return of.__get__(v)
        except AttributeError:
            return MISSING
    state = getattr(v, "__dict__", {})
    if name in state and not isinstance(of, property):
        return state[name]
    if isinstance(v, nn.Module) and of is MISSING:
        for store in (v._parameters, v._buffers, v._modules):
            if name in store:
                return store[name]
    return MISSING


def of_class(cls: type, name: str) -> Any:
    """What a class itself says for `name`, as it is written there (no descriptor is asked)."""
    for c in type.mro(cls) if cls is not type else ():
        if name in c.__dict__:
            return c.__dict__[name]
    return MISSING


def _unbound(v: Any) -> Any:
    return v.__func__ if isinstance(v, (staticmethod, classmethod)) else v


# ---- is it still the same? ------------------------------------------------------------------------------------------------


class _Same:
    """Equal only to itself, for as long as it lives."""

    def __init__(self, value: Any) -> None:
        self.id = id(value)
        try:
            self.ref: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self.ref = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.id == other.id and self.ref() is other.ref() is not None

    __hash__ = None  # type: ignore[assignment]


def mark(v: Any, depth: int = 4) -> Any:
    """A mark of a value: equal for two values iff code that reads them does the same, what it reads of objects inside apart."""
    if isinstance(v, Tensor):
        return "tensor", tuple(v.shape), v.dtype
    if isinstance(v, nn.Module):
        return "module", type(v), len(v._modules), any(getattr(v, h, None) for h in HOOKS)
    if isinstance(v, PLAIN):
        return type(v), v if v == v else "nan"
    if depth and isinstance(v, (list, tuple)):
        return type(v), tuple(mark(x, depth - 1) for x in v)
    if depth and isinstance(v, (set, frozenset)):
        return type(v), frozenset(v)
    if depth and isinstance(v, dict):
        return type(v), tuple((k, mark(x, depth - 1)) for k, x in v.items())
    if v is MISSING or isinstance(v, types.ModuleType) or notes_reads(v) and not callable(v):
        return type(v)  # what was read of an object has a place of its own
    if depth and isinstance(v, functools.partial):
        return type(v), tuple(mark(x, depth - 1) for x in (v.func, v.args, v.keywords))
    if isinstance(v, enum.Enum):
        return _Same(v), tuple(mark(x, depth - 1) for x in enum_state(v).values()) if depth else ()
    if isinstance(v, types.MethodType):
        return mark(v.__func__), mark(v.__self__, depth)
    if isinstance(v, types.FunctionType):
        return _Same(v), v.__code__  # which a notebook that reloads a file puts in place of the old one
    return _Same(v)
