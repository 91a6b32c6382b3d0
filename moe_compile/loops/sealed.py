"""Sealed copies: a function of the user's is read on copies of everything that it can reach, so that nothing it does reaches the user.

Functions and classes of the user's are made again over copied globals, closures and defaults (`sealed_code`); modules, objects and
containers are copied all the way down. What can be neither copied nor trusted (`libraries`) is `Forbidden`. Names are looked up when
the code asks for them, and noted: `reads` holds every place that an answer came from. `check` tells whether a copy was written to.
"""

from __future__ import annotations

import collections
import enum
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from ..ir import Rejection
from . import rows, sealed_code
from .fewer import Fewer
from .libraries import OF_ENUMS, Forbidden, home, is_library, is_plain_instance, reference_of, safe_builtins, why_not
from .places import FUNCTION, PLAIN, Place

_MOST = 50_000  # objects that are copied
_CONTAINERS = (list, dict, set, collections.deque)
_VALUES = (tuple, int, float, str)  # what a class of the user's may extend


class Sealed:
    """A world of copies. What is forbidden raises `Rejection`, and `check` raises it again in case the code read swallowed it."""

    def __init__(self, listening: bool = False, fewer: Fewer | None = None) -> None:
        self.reads: set[Place] = set()
        self.refused: Rejection | None = None
        self.memo: dict[int, tuple[Any, Any]] = {}  # id -> (what it is the id of, its copy)
        self.places: dict[int, tuple[Any, Place]] = {}  # id of a copy that notes reads -> (the copy, where the original is)
        self.asks_sharded = False  # whether code asked if something is a DTensor
        self.sharded = ""  # the path of a tensor that is one, though its copy is not
        self.fewer = fewer  # numbers and lists of all experts stand for few
        self.later: list[Callable[[], Any]] = []  # what is filled in once everything around it is there
        self.kept: list[tuple[Place, Any, list[Any]]] = []  # (place, a copy, what it held at first)
        self.code = sealed_code.Code(self)
        self.builtins = safe_builtins(self.refuse, self.code.imported)
        self.builtins["type"] = self.code.type_of
        if listening:  # numbers of rows are followed (`rows`)
            self.builtins |= rows.builtins()
            self.code.real |= {int: rows.Int, rows.Count: rows.Int}

    def refuse(self, reason: str) -> NoReturn:
        self.refused = Rejection(reason, stage="effects")
        raise self.refused

    def forbid(self, reason: str) -> Any:
        return Forbidden(reason, self.refuse)

    def seal(self, v: Any, place: Place) -> Any:
        """The copy of a value that is found at `place`."""
        new = self.copy(v, place)
        while self.later:
            self.later.pop()()
        return new

    def function(self, fn: types.FunctionType) -> Any:
        """The copy of the function that is read."""
        return self.seal(fn, Place(FUNCTION))

    def check(self, arguments: Sequence[tuple[Place, Any, list[Any]]] = ()) -> None:
        """Raise `Rejection` if the code used what is forbidden, or wrote to the copy of anything that is not its own."""
        if self.refused is not None:
            raise self.refused
        for place, now, before in (*self.kept, *arguments):
            if not _same(held(now), before):
                raise Rejection(f"it writes to {place}", stage="effects")
        if self.asks_sharded and self.sharded:
            raise Rejection(f"it asks whether tensors are DTensors, and {self.sharded} is one", stage="tensors")
        self.code.check()

    def some(self, items: Any) -> list[Any]:
        """The items of a container; of one that has an item for each expert, those of the few."""
        found = list(items)
        return found if self.fewer is None else found[: self.fewer.counts.get(len(found))]

    def keep(self, place: Place, new: Any) -> Any:
        """Watch a copy for writes from now on."""
        self.kept.append((place, new, held(new)))
        return new

    # ---- values ------------------------------------------------------------------------------------------------------------

    def copy(self, v: Any, place: Place) -> Any:
        """`seal` inside of a copy: what hangs on it may be filled in later."""
        if type(v) in PLAIN:
            return v if self.fewer is None or type(v) is not int else self.fewer.number(v)
        known = self.memo.get(id(v))
        if known is None:
            new = self._new(v, place) if len(self.memo) < _MOST else self.forbid(f"it reads {place}, which holds too much to be copied")
            self.memo[id(v)] = known = v, new
        return known[1]

    def _new(self, v: Any, place: Place) -> Any:
        for kinds, make in _KINDS:
            if isinstance(v, kinds):
                return make(self, v, place)
        if self.code.is_plain_object(v):
            return self._object(v, place)
        if is_plain_instance(v):
            return v
        if isinstance(v, enum.Enum):
            return self.forbid(f"it uses {place}, {OF_ENUMS}")
        if not is_library(home(type(v))):
            return self._object(v, place)
        if isinstance(v, (*_CONTAINERS, tuple, frozenset)):
            return self._container(v, place)
        if type(v).__module__ == "functools" and hasattr(v, "__wrapped__"):  # functools.cache: what it keeps would be probes
            return self.copy(v.__wrapped__, place)
        if (reference := reference_of(v)) is not None:  # the op may have no kernel for the machine that loops are read on
            return reference
        reason = why_not(v, str(place)) if callable(v) else f"it uses {place}, a {type(v).__name__}, which cannot be copied"
        return self.forbid(reason) if reason else v

    def _tensor(self, v: Tensor, place: Place) -> Any:
        return self.forbid(f"it reads the tensor {place}, which is no argument, parameter or buffer")

    def _stranger(self, v: nn.Module, place: Place) -> Any:
        return self.forbid(f"it uses {place}, a module that is not registered as a part of its own")

    def _bound(self, v: types.MethodType, place: Place) -> Any:
        if is_plain_instance(v.__self__) and is_library(home(v.__func__)):
            return v
        parts = [self.copy(v.__func__, place.attr("__func__")), self.copy(v.__self__, place.attr("__self__"))]
        return next((p for p in parts if type(p) is Forbidden), None) or types.MethodType(parts[0], parts[1])

    def _builtin(self, v: Any, place: Place) -> Any:
        owner, reason = getattr(v, "__self__", None), why_not(v, str(place))
        if reason or owner is None or isinstance(owner, (types.ModuleType, type)):
            return self.forbid(reason) if reason else rows.exact(v) if home(v) == "math" else v
        new = self.copy(owner, place.attr("__self__"))
        return new if type(new) is Forbidden else getattr(new, v.__name__)

    def _partial(self, v: functools.partial[Any], place: Place) -> Any:
        fn, args = self.copy(v.func, place.attr("func")), self.copy(v.args, place.attr("args"))
        given = {k: self.copy(x, place.attr("keywords").item(k)) for k, x in v.keywords.items()}  # a copied dict is filled later: too late
        return fn if type(fn) is Forbidden else functools.partial(fn, *args, **given)

    def _container(self, v: Any, place: Place) -> Any:
        if isinstance(v, tuple):
            items = [self.copy(x, place.item(i)) for i, x in enumerate(v)]
            return type(v)(*items) if hasattr(v, "_fields") else type(v)(items)
        if isinstance(v, frozenset):
            return v if all(type(x) in PLAIN for x in v) else self.forbid(f"it reads {place}, a set of objects")
        new: Any = type(v)(maxlen=v.maxlen) if isinstance(v, collections.deque) else type(v)()
        if isinstance(v, collections.defaultdict):
            new.default_factory = self.copy(v.default_factory, place)
        self.later.append(lambda: self._fill(v, new, place))
        return new

    def _object(self, v: Any, place: Place) -> Any:
        """An object of a class of the user's, or one that only has attributes."""
        cls = self.code.watched(type(v)) if is_library(home(type(v))) else self.copy(type(v), place.type())
        base: Any = next(b for b in type.mro(type(v)) if is_library(home(b)))
        items = [self.copy(x, place.item(i)) for i, x in enumerate(v)] if isinstance(v, tuple) else v
        value = (items,) if isinstance(v, _VALUES) else ()
        try:
            new = cls if type(cls) is Forbidden else base.__new__(cls, *value)
        except TypeError:
            return self.forbid(f"it uses {place}, a {type(v).__name__}, which cannot be copied")
        if new is not cls:
            self.places[id(new)] = new, place
            self.later.append(lambda: self._fill(v, new, place))
        return new

    def _fill(self, v: Any, new: Any, place: Place) -> None:
        """What a container or object holds."""
        if isinstance(v, dict):
            for k, x in self.some(dict.items(v)):
                dict.__setitem__(new, k, self.copy(x, place.item(k)))
        elif isinstance(v, (list, collections.deque)):
            new.extend(self.copy(x, place.item(i)) for i, x in enumerate(self.some(v)))
        elif isinstance(v, set):
            set.update(new, (self.copy(x, place) for x in v))
        for name, slot in slots(type(v)).items():
            if hasattr(v, name):
                object.__setattr__(new, name, self.copy(slot.__get__(v), place.attr(name)))
        if hasattr(v, "__dict__"):
            object.__getattribute__(new, "__dict__").update({k: self.copy(x, place.attr(k)) for k, x in vars(v).items()})
        self.keep(place, new)


_KINDS: tuple[tuple[Any, Callable[[Any, Any, Place], Any]], ...] = (
    (Tensor, Sealed._tensor),
    (nn.Module, Sealed._stranger),
    (types.FunctionType, lambda w, v, place: w.code.function(v, place)),
    (types.MethodType, Sealed._bound),
    ((types.BuiltinFunctionType, types.MethodWrapperType), Sealed._builtin),
    (functools.partial, Sealed._partial),
    (types.ModuleType, lambda w, v, place: w.code.python_module(v, place)),
    (type, lambda w, v, place: w.code.class_(v, place)),
)


def containers(v: Any, place: Place) -> Iterator[tuple[Place, Any, list[Any]]]:
    """The lists, dictionaries and plain objects of an argument, all the way down, as `Sealed.check` takes them."""
    if type(v) is Forbidden:
        return
    if isinstance(v, tuple):
        for i, x in enumerate(v):
            yield from containers(x, place.item(i))
    elif isinstance(v, (list, dict)) or hasattr(v, "__dict__") and not isinstance(v, (Tensor, nn.Module, type)) and not callable(v):
        yield place, v, held(v)
        for k, x in enumerate(v) if isinstance(v, list) else dict.items(v) if isinstance(v, dict) else vars(v).items():
            yield from containers(x, place.item(k))


_slots: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()


def slots(cls: type) -> dict[str, Any]:
    """What a class keeps outside of `__dict__`: name -> descriptor."""
    if cls not in _slots:
        own = [c for c in type.mro(cls) if not is_library(home(c))]
        _slots[cls] = {k: d for c in own for k, d in vars(c).items() if type(d) is types.MemberDescriptorType}
    return _slots[cls]


def held(x: Any) -> list[Any]:
    """What a copy holds now, in a row: equal for two moments iff nothing was written to it."""
    if isinstance(x, types.CellType):
        return [x.cell_contents]
    pairs: list[Any] = list(dict.items(x)) if isinstance(x, dict) else []
    state = vars(x) if isinstance(x, type) else getattr(x, "__dict__", {})
    pairs += list(state.items())
    found = [*(v for pair in pairs for v in pair), *(x if isinstance(x, (list, set, collections.deque)) else ())]
    return found + [d.__get__(x) for name, d in slots(type(x)).items() if hasattr(x, name)]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y or (type(x) in PLAIN and type(x) is type(y) and x == y) for x, y in zip(a, b, strict=True))
