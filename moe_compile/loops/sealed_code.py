"""Sealed copies of code: functions over copied globals and closures, classes, the namespaces that their names are looked up in."""

from __future__ import annotations

import enum
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import nn

from ..ir import Rejection
from ..passes.aten.sharded import sharded_class
from . import rows
from .libraries import OF_ENUMS, PLAIN_OBJECTS, Forbidden, home, instead, is_library, is_plain_instance, only_asked, why_not
from .places import PLAIN, Place, Space

MODULE_STATE = frozenset(nn.Module().__dict__) - {"training"}  # what torch's own code looks up in every module
# names by which code looks around behind its own data
_BEHIND = {"__dict__", "__globals__", "__closure__", "__code__", "__subclasses__", "__builtins__", "__mro__", "gi_frame", "f_back"}
_OF_MODULES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # whose parts may be the user's
_OF_THE_METACLASS = {"_backward_cls"}  # what `torch.autograd.function.FunctionMeta` makes for every class, which points back at it
# What Python looks up in an object's class by itself, past `__getattribute__`, so that nothing else notes that it was read.
_UNASKED = {f"__{n}__" for n in ("call", "getitem", "len", "iter", "next", "contains", "bool", "enter", "exit")}
_PROXIES = ("torch", "numpy", "contextlib", "math")  # libraries of which some names may be used and others not


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code, and that of the functions made inside it."""
    yield code
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            yield from codes(c)


class World(Protocol):
    """What copies of code ask of the world that they are made for (`sealed.Sealed`)."""

    reads: set[Place]
    memo: dict[int, tuple[Any, Any]]
    places: dict[int, tuple[Any, Place]]
    later: list[Callable[[], Any]]
    builtins: dict[str, Any]
    asks_sharded: bool

    def seal(self, v: Any, place: Place) -> Any: ...
    def copy(self, v: Any, place: Place) -> Any: ...
    def keep(self, place: Place, new: Any) -> Any: ...
    def forbid(self, reason: str) -> Any: ...
    def refuse(self, reason: str) -> NoReturn: ...


class Names(dict[str, Any]):
    """The globals of a sealed function: a name is sealed when the code first asks for it."""

    def __init__(self, code: Code, space: Space) -> None:
        super().__init__(__builtins__=code.world.builtins)
        self.code, self.space, self.given = code, space, dict(self)

    def __missing__(self, name: str) -> Any:
        value = self.code.named(self.space, name)
        self.given[name] = self[name] = value
        return value


class Proxy:
    """A Python module in sealed code: its names are sealed, and judged, one by one."""

    def __init__(self, code: Code, module: types.ModuleType) -> None:
        vars(self).update(_code=code, _module=module)

    def __getattr__(self, name: str) -> Any:
        code, module = vars(self)["_code"], vars(self)["_module"]
        if name not in vars(module):
            getattr(module, name)  # a library may make names when they are asked for; AttributeError is the answer otherwise
        value = code.named(Space(vars(module)), name)
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)["_code"].world.refuse(f"it writes to {vars(self)['_module'].__name__}.{name}")


class Code:
    """Copies of code for a `Sealed` world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._spaces: list[Names] = []
        self._rests: dict[int, tuple[Any, set[Place]]] = {}  # id of a function's copy -> (it, the places of its closure and defaults)
        self._classes: set[type] = set()
        self._noted: dict[tuple[int, str], Place] = {}  # (id of what was asked for a name, the name) -> where it is
        self._metas: dict[type, type] = {}
        self._watched: dict[type, type] = {}
        self.real: dict[type, type] = {}
        self.type_of = _type_of(self.real)

    def check(self) -> None:
        for names in self._spaces:
            for name in names.keys() | names.given.keys():
                if names.get(name) is not names.given.get(name):
                    raise Rejection(f"it writes to the global {name}", stage="effects")

    # ---- functions -----------------------------------------------------------------------------------------------------------

    def function(self, fn: types.FunctionType, place: Place) -> Any:
        """A function that is found as a value: it counts as used."""
        new = self._function(fn, place, None)
        self._use(new)
        return new

    def _function(self, fn: types.FunctionType, place: Place, own_class: types.CellType | None) -> Any:
        world, name, source = self.world, fn.__qualname__, home(fn)
        if getattr(fn, "_dynamo_marked_constant", False):
            return self._constant(fn)
        if source.startswith("torch._dynamo") and (inner := vars(fn).get("_torchdynamo_inline")) is not None:
            return world.copy(inner, place.attr("_torchdynamo_inline"))  # torch.compile: Dynamo looks through it as well
        if getattr(fn, "_torchdynamo_disable", False) or source.startswith("torch._dynamo"):
            return world.forbid(f"it calls {name}, which is kept from being compiled")
        if is_library(source) and not fn.__closure__:
            reason = why_not(fn, str(place))
            return world.forbid(reason) if reason else rows.apart(fn) if source.startswith("einops") else fn
        behind = {n for c in codes(fn.__code__) for n in c.co_names} & _BEHIND
        if behind and not is_library(source):
            return world.forbid(f"{name} uses {sorted(behind)[0]}")
        places: set[Place] = set()
        cells = [
            own_class if n == "__class__" and own_class is not None else self._cell(c, place.cell(i), places)
            for i, (n, c) in enumerate(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        ]
        new = types.FunctionType(fn.__code__.replace(), self._names(fn.__globals__), fn.__name__, None, tuple(cells))
        new.__qualname__, new.__module__ = name, fn.__module__
        places |= {place.default(i) for i in range(len(fn.__defaults__ or ()))}
        places |= {place.attr(n) for n in ("__kwdefaults__", *(k for k in vars(fn) if not k.startswith("_"))) if getattr(fn, n) is not None}
        self._rests[id(new)] = new, places
        world.memo[id(fn)] = fn, new
        world.later.append(lambda: self._rest(fn, new, place))
        return new

    def _constant(self, fn: types.FunctionType) -> Callable[..., Any]:
        """`torch._dynamo.assume_constant_result`: Dynamo asks it itself, and takes the answer for a constant."""

        def ask(*args: Any, **kwargs: Any) -> Any:
            answer = fn(*args, **kwargs) if all(type(a) in PLAIN for a in (*args, *kwargs.values())) else self
            return answer if type(answer) in PLAIN else self.world.refuse(f"it calls {fn.__qualname__}, whose answer is no plain value")

        return ask

    def _rest(self, fn: types.FunctionType, new: types.FunctionType, place: Place) -> None:
        """Defaults and attributes, which may hold the function itself."""
        copy = self.world.copy
        new.__defaults__ = fn.__defaults__ and tuple(copy(d, place.default(i)) for i, d in enumerate(fn.__defaults__))
        new.__kwdefaults__ = fn.__kwdefaults__ and {k: copy(d, place.attr("__kwdefaults__").item(k)) for k, d in fn.__kwdefaults__.items()}  # type: ignore[assignment]
        vars(new).update({k: copy(v, place.attr(k)) for k, v in vars(fn).items() if k != "__wrapped__"})
        self.world.keep(place, new)

    def _cell(self, cell: types.CellType, place: Place, places: set[Place]) -> types.CellType:
        places.add(place)
        known = self.world.memo.get(id(cell))
        if known is not None:
            return known[1]  # type: ignore[no-any-return]
        new = types.CellType()
        self.world.memo[id(cell)] = cell, new

        def fill() -> None:
            new.cell_contents = self.world.copy(cell.cell_contents, place)
            self.world.keep(place, new)

        if is_set(cell):
            self.world.later.append(fill)
        return new

    def _use(self, fn: Any) -> None:
        """Note what a function finds around itself, whichever way it was reached."""
        if type(fn) is Forbidden:
            return
        for f in (fn, getattr(fn, "__func__", None), getattr(fn, "fget", None), getattr(fn, "func", None)):
            self.world.reads |= self._rests.get(id(f), (f, set()))[1]

    # ---- namespaces ----------------------------------------------------------------------------------------------------------

    def _names(self, names: dict[str, Any]) -> Names:
        known = self.world.memo.get(id(names))
        if known is None:
            known = self.world.memo[id(names)] = names, Names(self, Space(names))
            self._spaces.append(known[1])
        return known[1]  # type: ignore[no-any-return]

    def named(self, space: Space, name: str) -> Any:
        """What a namespace says for `name`, sealed. Raises KeyError if nothing."""
        value, place, module = space.names[name], Place(space).item(name), str(space.names.get("__name__"))
        other = instead(module, name)
        if other is not NotImplemented:
            return other
        if not name.startswith("__") and not is_library(module):
            self.world.reads.add(place)
        return self.world.seal(value, place)

    def python_module(self, v: types.ModuleType, place: Place) -> Any:
        if not is_library(v.__name__):
            return Proxy(self, v)
        reason = why_not(v, v.__name__)
        return self.world.forbid(reason) if reason else Proxy(self, v) if v.__name__.partition(".")[0] in _PROXIES else v

    def imported(self, name: str, names: Any = None, _locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """`import` in sealed code: only what is imported already, for an import runs a module's code."""
        if level:
            name = importlib.util.resolve_name("." * level + name, (names or {}).get("__package__"))
        if name not in sys.modules:
            self.world.refuse(f"it imports {name}, which nothing has imported yet")
        module = sys.modules[name if fromlist else name.partition(".")[0]]
        return self.world.seal(module, Place(Space(vars(module))))

    # ---- classes -------------------------------------------------------------------------------------------------------------

    def class_(self, cls: type, place: Place) -> Any:
        if cls is sharded_class():
            return only_asked(self.world, cls)
        if is_library(home(cls)):
            reason = why_not(cls, str(place))
            return self.world.forbid(reason) if reason else cls
        if not is_library(home(type(cls))) or "__getattribute__" in vars(cls):
            return self.world.forbid(f"{cls.__name__} makes its instances or looks up their attributes in a way of its own")
        if issubclass(cls, enum.Enum):
            plain = all(map(is_plain_instance, cls.__members__.values()))
            return cls if plain else self.world.forbid(f"it uses {place}, {OF_ENUMS}")
        bases = [self.world.copy(b, place.attr("__mro__").item(i)) for b in cls.__bases__ for i in [cls.__mro__.index(b)]]
        if any(type(b) is Forbidden for b in bases):
            return next(b for b in bases if type(b) is Forbidden)
        own = types.CellType()
        left_out = {"__dict__", "__weakref__", "__annotations__", "__init_subclass__", *(n for n, v in vars(cls).items() if _is_slot(v))}
        left_out |= _OF_THE_METACLASS if issubclass(cls, torch.autograd.Function) else set()
        names = {k: self._of_class(v, place.attr(k), own) for k, v in vars(cls).items() if k not in left_out}
        if not self._classes.intersection(bases):
            names["__getattribute__"] = self._noting(bases[0])
        try:
            new = self._meta(type(cls))(cls.__name__, tuple(bases), names)
        except (TypeError, RuntimeError, ValueError) as e:
            return self.world.forbid(f"{cls.__name__} reacts to being subclassed: {e}")
        own.cell_contents = new
        self._classes.add(new)
        self.world.places[id(new)] = new, place
        self.world.later.append(lambda: self.world.keep(place, new))
        of_instance = any(kind == "type" for kind, _ in place.steps)
        for k in names:
            if k.startswith("__") and not (of_instance and k in ("__init__", "__new__")):  # Python calls these without asking by name
                self._use(vars(new).get(k))
            if k in _UNASKED and type(names[k]) is types.FunctionType:  # what is forbidden refuses where it is asked for its class
                self.world.reads.add(place.attr(k))
        return new

    def _of_class(self, v: Any, place: Place, own: types.CellType) -> Any:
        if isinstance(v, types.FunctionType):
            known = self.world.memo.get(id(v))
            return self._function(v, place, own) if known is None else known[1]
        if isinstance(v, (staticmethod, classmethod)):
            return type(v)(self._of_class(v.__func__, place, own))
        if isinstance(v, property):
            made = (None if f is None else self._of_class(f, place.attr(n), own) for n, f in (("fget", v.fget), ("fset", v.fset)))
            return property(*made)
        if isinstance(v, functools.cached_property):
            return functools.cached_property(self._of_class(v.func, place.attr("func"), own))
        return self.world.copy(v, place)

    def note(self, place: Place, name: str, asked: Any) -> None:
        """An object or class was asked for a name."""
        key = id(asked), name
        if self._noted.get(key) is place:
            return
        self._noted[key] = place  # `world.places` keeps what was asked
        self.world.reads |= {place, place.attr(name)}
        for c in type.mro(asked if isinstance(asked, type) else type(asked)):
            if name in c.__dict__:
                self._use(c.__dict__[name])
                return

    def _noting(self, base: type) -> Callable[[Any, str], Any]:
        places, note = self.world.places, self.note
        lookup: Any = base.__getattribute__
        own = MODULE_STATE if issubclass(base, nn.Module) else frozenset()

        def __getattribute__(self: Any, name: str) -> Any:
            known = places.get(id(self))
            if known is not None and name not in own and not name.startswith("__"):
                note(known[1], name, self)
            return lookup(self, name)

        return __getattribute__

    def _meta(self, meta: type) -> Any:
        """A metaclass whose classes note what they are asked for themselves, as in `type(self).calls`."""
        if meta not in self._metas:
            places, note, lookup = self.world.places, self.note, cast(Any, meta).__getattribute__

            def __getattribute__(cls: Any, name: str) -> Any:
                known = places.get(id(cls))
                if known is not None and not name.startswith("__"):
                    note(known[1], name, cls)
                return lookup(cls, name)

            self._metas[meta] = type(meta.__name__, (meta,), {"__getattribute__": __getattribute__})
        return self._metas[meta]

    def is_plain_object(self, v: Any) -> bool:
        return isinstance(v, PLAIN_OBJECTS)

    def watched(self, cls: type) -> type:
        """A class of a library, for instances that note what they are asked for. Sealed code takes it for the class itself."""
        if cls not in self._watched:
            names: dict[str, Any] = {"__getattribute__": self._noting(cls), "__class__": property(lambda self: cls)}
            if issubclass(cls, nn.Module) and cls not in _OF_MODULES:
                names["__call__"] = lambda self, *args, **kwargs: rows.apart(cls.__call__)(self, *args, **kwargs)
            names |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
            self._watched[cls] = new = type(cls)(cls.__name__, (cls,), names)
            self.real[new] = cls
        return self._watched[cls]


def is_set(cell: types.CellType) -> bool:
    """Whether a closure's variable has a value yet."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _is_slot(v: Any) -> bool:
    return type(v) is types.MemberDescriptorType


def _type_of(real: dict[type, type]) -> Any:
    """Python's `type`, which takes watched classes for those they watch."""

    class Meta(type):
        def __call__(cls, *args: Any, **kw: Any) -> Any:
            found = type(*args, **kw)
            return real.get(found, found) if len(args) == 1 else found

        def __instancecheck__(cls, v: Any) -> bool:
            return isinstance(v, type)

        def __getattr__(cls, name: str) -> Any:
            return getattr(type, name)

    return Meta("type", (), {})
