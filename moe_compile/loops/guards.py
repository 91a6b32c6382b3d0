"""Guards on what a captured function reads beside its arguments and its module's parameters.

Its code is inlined no more, so Dynamo does not see those reads: every place that the reading noted is guarded by value here, and a name
that a class answers is guarded to stay the class's affair. What cannot be guarded, and what the graph itself has set before the call,
is told by `Unguarded`: the loop stays as written.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .libraries import enum_state, home, is_library, notes_reads
from .places import MISSING, MODULE, PLAIN, Place, Space, find, own_attribute

_DEPTH, _MOST = 4, 256


class Unguarded(Exception):
    """A value that a function reads and nothing can watch."""


@contextlib.contextmanager
def or_unguarded() -> Iterator[None]:
    """Where a private name of torch is missing, nothing can be watched."""
    try:
        yield
    except (AttributeError, ImportError, TypeError, NotImplementedError) as e:
        raise Unguarded(f"values beside its arguments ({type(e).__name__}: {e}), which nothing watches") from e


@dataclass
class Guards:
    """Guards for one call that Dynamo (`tx`) is about to inline. roots: the values at the roots of places; sources: Dynamo's for them."""

    tx: Any
    roots: Mapping[str, Any]
    sources: Mapping[str, Any]
    _sources: dict[Place, Any] = field(default_factory=dict)

    def install(self, reads: Iterable[Place]) -> None:
        """Guard every place, and where it is found in an object of a class, that the object has no such name of its own."""
        from torch._dynamo.guards import GuardBuilder

        reads = list(reads)
        pending = _Pending(self.tx)
        for place in reads:
            pending.check(place, self.roots)
        done = set()
        for place in reads:
            value, holder = find(place, self.roots), find(place.holder, self.roots) if place.steps else MISSING
            kind, name = place.steps[-1] if place.steps else ("", "")
            if kind == "attr" and value is MISSING and holder is not MISSING:
                self._guard(place.holder, functools.partial(GuardBuilder.HASATTR, attr=name))
                continue
            if kind == "attr" and not isinstance(holder, type) and own_attribute(holder, name) is MISSING and hasattr(holder, "__dict__"):
                self._own(place, holder, name)
                if (type(holder), name) in done or is_library(home(type(holder))):
                    continue
                done.add((type(holder), name))
                place = place.holder.type().attr(name)
            self._value(place, value)

    def _own(self, place: Place, holder: Any, name: str) -> None:
        """Guard that an object has no such name of its own. Raises `Unguarded` where code of the user's looks it up."""
        from torch._dynamo.guards import GuardBuilder

        of = type(_static(type(holder), name))
        if hasattr(of, "__get__") and not is_library(home(of)):
            raise Unguarded(f"{place}, which a descriptor looks up")
        self._guard(place.holder, functools.partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr=name))

    def _guard(self, place: Place, kind: Any) -> None:
        from torch._dynamo.guards import install_guard

        install_guard(self.source(place).make_guard(kind))

    def _value(self, place: Place, v: Any, depth: int = _DEPTH) -> None:
        from torch._dynamo.guards import GuardBuilder

        if v is MISSING or isinstance(v, types.ModuleType):
            return
        if isinstance(v, torch.Tensor):
            if place.root == MODULE and all(kind == "attr" for kind, _ in place.steps):
                return  # parameters and buffers are inputs of the graph
            raise Unguarded(f"the tensor {place}, which nothing watches")
        if isinstance(v, PLAIN):
            self._guard(place, GuardBuilder.CONSTANT_MATCH)
        elif isinstance(v, types.FunctionType):
            self._guard(place, GuardBuilder.CLOSURE_MATCH)
        elif isinstance(v, (type, types.BuiltinFunctionType)):
            self._guard(place, GuardBuilder.ID_MATCH)
        elif isinstance(v, property):
            self._value(place.attr("fget"), v.fget)
        elif isinstance(v, (list, tuple, dict, set, frozenset)):
            self._container(place, v, depth)
        elif isinstance(v, collections.deque):
            raise Unguarded(f"{place}, a deque, whose items nothing watches")
        elif isinstance(v, (types.MethodType, functools.partial)):
            self._guard(place, GuardBuilder.TYPE_MATCH)
            for name in ("__func__", "__self__") if isinstance(v, types.MethodType) else ("func", "args", "keywords"):
                self._value(place.attr(name), getattr(v, name), depth)
        elif isinstance(v, enum.Enum):
            self._guard(place, GuardBuilder.ID_MATCH)
            for name, x in enum_state(v).items():
                self._value(place.attr(name), x, depth)
        else:  # what was read of an object that notes it has a place of its own
            self._guard(place, GuardBuilder.TYPE_MATCH if notes_reads(v) else GuardBuilder.ID_MATCH)

    def _container(self, place: Place, v: Any, depth: int) -> None:
        from torch._dynamo.guards import GuardBuilder

        if depth == 0 or len(v) > _MOST:
            raise Unguarded(f"{place}, which is too large to be watched")
        if isinstance(v, (set, frozenset)):
            return self._guard(place, GuardBuilder.EQUALS_MATCH)
        if isinstance(v, dict) and not all(isinstance(k, (str, int)) for k in v):
            raise Unguarded(f"{place}, a dictionary whose keys cannot be watched")
        self._guard(place, GuardBuilder.TYPE_MATCH)
        self._guard(place, GuardBuilder.SEQUENCE_LENGTH)
        for k, x in v.items() if isinstance(v, dict) else enumerate(v):
            self._value(place.item(k), x, depth - 1)

    # ---- sources -------------------------------------------------------------------------------------------------------------

    def source(self, place: Place) -> Any:
        """Dynamo's source for a place. Raises `Unguarded` where there is none."""
        if place not in self._sources:
            self._sources[place] = self._made(place)
        return self._sources[place]

    def _made(self, place: Place) -> Any:
        from torch._dynamo import source as s
        from torch._dynamo.variables import ConstantVariable

        if not place.steps:
            found = None if isinstance(place.root, Space) else self.sources.get(place.root)
            if found is None:
                raise Unguarded(f"{place or 'its surroundings'}, which was made in the same graph")
            return found
        kind, key = place.steps[-1]
        if isinstance(place.root, Space) and len(place.steps) == 1:
            return self._global(place.root.names, key)
        base, holder = self.source(place.holder), find(place.holder, self.roots)
        if kind == "type":
            return s.TypeSource(base)
        if kind == "cell":
            return s.AttrSource(s.GetItemSource(s.AttrSource(base, "__closure__"), key), "cell_contents")
        if kind == "default":
            return s.GetItemSource(s.AttrSource(base, "__defaults__"), key)
        if kind == "item" and isinstance(holder, dict) and not ConstantVariable.is_literal(key):
            raise Unguarded(f"{place}, which is found by a key that cannot be watched")
        if kind == "item":
            return s.DictGetItemSource(base, key) if isinstance(holder, dict) else s.GetItemSource(base, key)
        unbound = isinstance(holder, type) and isinstance(_static(holder, key), classmethod)
        return s.AttrSource(s.AttrSource(base, key), "__func__") if unbound else s.AttrSource(base, key)

    def _global(self, names: dict[str, Any], name: str) -> Any:
        from torch._dynamo import source as s

        root = self.tx.output.root_tx
        if root is not None and root.f_globals is names:
            return s.GlobalSource(name)
        module = sys.modules.get(str(names.get("__name__")))
        if module is not None and vars(module) is names:
            return s.AttrSource(self.tx.import_source(module.__name__), name)
        return s.DictGetItemSource(s.GlobalSource(self.tx.output.install_global_by_id("___moe_compile_globals", names)), name)


def _static(cls: type, name: str) -> Any:
    return next((c.__dict__[name] for c in type.mro(cls) if name in c.__dict__), None)


class _Pending:
    """What the graph has written so far, which becomes true for Python after it has run: nothing of it may be read before."""

    def __init__(self, tx: Any) -> None:
        effects = tx.output.side_effects
        self.objects: dict[int, set[Any] | None] = {}  # id -> names that were set; None: any
        self.globals: set[Any] = set()
        for i, variable in effects.id_to_variable.items():
            names = effects.store_attr_mutations.get(variable)
            if names and type(variable).__name__ in ("NewGlobalVariable", "PythonModuleVariable"):
                self.globals |= set(names)
            elif variable.source is not None and effects.is_modified(variable):
                self.objects[i] = set(names) if names else None

    def check(self, place: Place, roots: Mapping[str, Any]) -> None:
        if not self.objects and not self.globals:
            return
        if isinstance(place.root, Space) and place.steps[:1] and place.steps[0][1] in self.globals:
            raise Unguarded(f"{place}, which is set before it in the same graph")
        for n in range(len(place.steps)):
            holder = find(Place(place.root, place.steps[:n]), roots)
            kind, key = place.steps[n]
            if kind == "cell":
                holder, key = _cell_of(holder, key), "cell_contents"
            names = self.objects.get(id(holder), set())
            if names is None or key in names:
                raise Unguarded(f"{place}, which is set before it in the same graph")
        for inner in _inside(find(place, roots)):
            if id(inner) in self.objects and isinstance(inner, (list, dict, set, tuple)):
                raise Unguarded(f"{place}, which is changed before it in the same graph")


def _cell_of(fn: Any, index: int) -> Any:
    closure = getattr(fn, "__closure__", None)
    return closure[index] if closure else None


def _inside(v: Any, depth: int = _DEPTH) -> Iterator[Any]:
    yield v
    if depth and isinstance(v, (list, tuple, dict)) and len(v) <= _MOST:
        for x in v.values() if isinstance(v, dict) else v:
            yield from _inside(x, depth - 1)
