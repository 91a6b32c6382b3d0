"""What of Python, torch and numpy may run while a loop is read by example: what computes and does nothing else.

All other code is the user's (`sealed` runs a copy of it) or forbidden: `Forbidden` stands for it and raises at any use.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import enum
import functools
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..passes.aten.contracts import contract_of

_PURE = {
    *("builtins", "math", "cmath", "operator", "_operator", "itertools", "functools", "_functools", "collections", "_collections"),
    *("_collections_abc", "typing", "types", "enum", "dataclasses", "abc", "_abc", "numbers", "fractions", "decimal", "string", "re"),
    *("copy", "contextlib", "heapq", "bisect", "statistics", "typing_extensions", "einops", "numpy"),
}
# names that do more than compute, in modules that otherwise do not
_EFFECTS = {
    "builtins": {
        *("print", "open", "input", "exec", "eval", "compile", "globals", "locals", "vars", "id", "dir", "breakpoint", "memoryview"),
        *("help", "exit", "quit"),
    },
    "contextlib": {"redirect_stdout", "redirect_stderr", "chdir"},
    "numpy": {
        *("random", "save", "savez", "savez_compressed", "savetxt", "load", "loadtxt", "fromfile", "memmap", "seterr", "errstate"),
        *("set_printoptions", "setbufsize", "ctypeslib", "testing", "lib"),
    },
}
_RANDOM = {"random", "_random", "secrets"}
_HEAP = 1 << 9  # of types: made by code, not built in
# torch: modules of functions that compute, of classes, and single names
_COMPUTES = {"torch.functional", "torch.nn.functional", "torch._tensor", "torch.special", "torch.linalg", "torch.fft", "torch.return_types"}
_COMPUTES |= {"torch._C._nn", "torch._C._special", "torch._C._linalg", "torch._C._fft", "torch._refs"}
_CLASSES: tuple[str, ...] = ("torch.nn.modules", "torch.nn.parameter", "torch.nn.utils.parametrize", "torch.nn.utils.parametrizations")
_CLASSES += ("torch.amp", "torch.cuda.amp", "torch.autograd.grad_mode", "torch.autograd.function", "torch.utils._contextlib")
_CLASSES += ("torch.return_types",)
_NAMES = {"Tensor", "Size", "dtype", "device", "finfo", "iinfo", "layout", "memory_format", "FloatTensor", "LongTensor", "BoolTensor"}
_NAMES |= {"_ScalingType", "_SwizzleType"}  # how `scaled_mm` is told to scale
_ASKS = {"is_tensor", "is_grad_enabled", "get_default_dtype", "is_scripting", "is_tracing", "is_storage", "typename", "promote_types"}
_OPS = {"aten", "prims", "prim", "moe_compile"}
# (module, name) -> what it is while Dynamo traces, which is when the captured code runs
_INSTEAD: dict[tuple[str, str], Any] = {
    **{(m, n): lambda: True for m in ("torch.compiler", "torch._dynamo.external_utils") for n in ("is_compiling", "is_dynamo_compiling")},
    ("torch.autograd.profiler", "record_function"): contextlib.nullcontext,
    ("torch.nn.utils.parametrize", "_cache_enabled"): 0,  # what it would keep are probes
}


class Forbidden:
    """In place of what no reading may touch. Any use of it is told to `refuse`, which raises."""

    __slots__ = ("_moe_reason", "_moe_refuse")

    def __init__(self, reason: str, refuse: Callable[[str], NoReturn]) -> None:
        object.__setattr__(self, "_moe_reason", reason)
        object.__setattr__(self, "_moe_refuse", refuse)

    def __getattribute__(self, name: str) -> Any:
        _use(self)

    def __setattr__(self, name: str, value: Any) -> None:
        _use(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_leaves

        for a in tree_leaves((args, kwargs)):
            if type(a) is Forbidden:
                _use(a)


def _use(f: Any, *_: Any, **__: Any) -> NoReturn:
    object.__getattribute__(f, "_moe_refuse")(object.__getattribute__(f, "_moe_reason"))
    raise AssertionError


_TWO = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
_ONE = "call enter exit iter next len bool getitem setitem delitem contains hash eq ne lt le gt ge".split()
_ONE += "int float index str repr format neg pos abs invert".split()
for _name in (*_ONE, *(p + n for n in _TWO for p in ("", "r", "i"))):
    setattr(Forbidden, f"__{_name}__", _use)


def only_asked(world: Any, cls: type) -> type:
    """In place of DTensor: no copy is one, so that `isinstance` says no; where a tensor of the user's is, the world is refused."""

    class OnlyAsked(type):
        def __instancecheck__(self, v: Any) -> bool:
            world.asks_sharded = True
            return False

        def __getattribute__(self, name: str) -> Any:
            return type.__getattribute__(self, name) if name.startswith("__") else world.refuse(f"it uses {cls.__name__}.{name}")

        def __call__(self, *_: Any, **__: Any) -> Any:
            return world.refuse(f"it makes a {cls.__name__}")

    return OnlyAsked(cls.__name__, (), {})


def is_library(name: str | None) -> bool:
    """Whether code of a module of this name is no user's: Python's, torch's, numpy's, einops'. Others' is read as his."""
    top = (name or "").partition(".")[0]
    return top in ("torch", "moe_compile") or top in _PURE or top in sys.stdlib_module_names or top == "__builtin__"


OF_ENUMS = "an Enum with methods or properties of its own, or whose values can change"
PLAIN_OBJECTS = (types.SimpleNamespace, argparse.Namespace)
_NATIVE = "pybind11_builtins"  # the module of C++ classes' own class


def home(v: Any) -> str:
    """The module whose code a function or class is: `functools.wraps` copies names, so a function's globals tell.

    A class that its module does not know by name was made by it for somebody, as a parametrised module's is: it is nobody's, "".
    """
    if isinstance(v, types.FunctionType):
        return str(v.__globals__.get("__name__") or "")
    module = str(getattr(v, "__module__", None) or "")
    if isinstance(v, type) and v.__flags__ & _HEAP:
        found: Any = sys.modules.get(module)
        if type(v).__module__ == _NATIVE:  # its name is that of C++, its module may call it otherwise
            return module if any(x is v for x in vars(found or types).values()) else ""
        for name in v.__qualname__.split("."):
            found = getattr(found, name, None)
        return module if found is v else ""
    return module


def why_not(v: Any, label: str) -> str:
    """Why a function, class, operator or module of a library may not be used; "" if it may."""
    name = getattr(v, "__name__", type(v).__name__)
    if isinstance(v, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        space = str(v).partition(".")[0].partition("::")[0]
        return "" if space in _OPS or reference_of(v) is not None else f"it calls torch.ops.{v}, which cannot be looked into"
    if isinstance(v, torch.library.CustomOpDef):
        return f"it calls the custom op {getattr(v, '_qualname', name)}, which cannot be looked into"
    module = v.__name__ if isinstance(v, types.ModuleType) else home(v)
    top = module.partition(".")[0]
    if top in _RANDOM or module.startswith("numpy.random") or isinstance(getattr(v, "__self__", None), _random_class()):
        return "it draws random numbers"
    if top == "torch":
        if module.startswith("torch.utils.checkpoint"):
            return "it checkpoints inside (torch.utils.checkpoint): checkpoint the whole block instead"
        return "" if _of_torch(v, module, name) else f"it uses {_said(v, label)}, whose answer or effect is not the loop's own"
    if top in _PURE and name not in _EFFECTS.get(top, ()):
        return ""
    return f"it uses {_said(v, label)}, which may do more than compute"


@functools.cache
def _random_class() -> type:
    import random

    return random.Random


def _said(v: Any, label: str) -> str:
    return label or getattr(v, "__qualname__", None) or getattr(v, "__name__", None) or f"a {type(v).__name__}"


def _of_torch(v: Any, module: str, name: str) -> bool:
    if isinstance(v, types.ModuleType):
        return not module.startswith(("torch.backends", "torch.random", "torch.distributed", "torch._dynamo", "torch.multiprocessing"))
    if isinstance(v, type):
        return module.startswith(_CLASSES) or module.startswith("torch") and name in _NAMES or issubclass(v, torch.autograd.Function)
    if name in _ASKS or (module == "torch.cuda" and name in ("is_available", "device_count")):
        return True
    if isinstance(v, types.BuiltinFunctionType):
        return module in _COMPUTES or getattr(torch._C._VariableFunctions, name, None) is v
    return module in _COMPUTES or module == "torch._jit_internal"


def reference_of(v: Any) -> Any:
    """What an op with a contract computes, in plain torch; None for everything else."""
    op = getattr(v, "default", None) if isinstance(v, torch._ops.OpOverloadPacket) else v
    contract = contract_of(op) if isinstance(op, torch._ops.OpOverload) else None
    return None if contract is None else contract.reference


def instead(module: str, name: str) -> Any:
    """What stands for a name of a library's module while a loop is read; `NotImplemented` for most: itself."""
    return _INSTEAD.get((module, name), NotImplemented)


def is_plain_instance(v: Any) -> bool:
    """Whether an object of a library's class is a value, or computes and keeps nothing."""
    cls = type(v)
    if isinstance(v, enum.Enum):
        return not any(_is_code(f) for c in cls.__mro__ for f in vars(c).values()) and all(map(_is_fixed, enum_state(v).values()))
    if v is Ellipsis or v is NotImplemented or isinstance(v, (range, slice, torch.finfo, torch.iinfo, torch.layout, torch.memory_format)):
        return True
    if cls.__module__.startswith(("torch.autograd.grad_mode", "torch.amp", "torch.cuda.amp")) or isinstance(v, torch.jit.ScriptFunction):
        return True
    if cls.__name__ == "_tuplegetter":  # the names of a named tuple's items
        return True
    return cls.__module__ in ("typing", "types", "operator", "re", "dataclasses") or _is_numpy_value(v)


def enum_state(v: enum.Enum) -> dict[str, Any]:
    """The value of an enum's member, and attributes of its own."""
    return {k: x for k, x in vars(v).items() if k not in ("_name_", "__objclass__", "_sort_order_")}


def _is_code(f: Any) -> bool:
    """Whether what a class holds is the user's code, a method or a property."""
    parts = (f, *(getattr(f, n, None) for n in ("__func__", "fget", "func")))
    return any(isinstance(g, types.FunctionType) and not is_library(home(g)) for g in parts)


def _is_fixed(v: Any) -> bool:
    """Whether a value of an enum's member can not change, all the way down."""
    if isinstance(v, (tuple, frozenset)):
        return all(map(_is_fixed, v))
    if isinstance(v, enum.Enum):
        return is_plain_instance(v)
    is_name = isinstance(v, (type, types.FunctionType, types.BuiltinFunctionType)) and is_library(home(v)) and why_not(v, "") is None
    return is_name or isinstance(v, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))


def notes_reads(v: Any) -> bool:
    """Whether the copy of an object notes what it is asked for; others are one value as a whole."""
    if isinstance(v, (enum.Enum, functools.partial, types.MethodType)):
        return False
    return isinstance(v, (torch.nn.Module, *PLAIN_OBJECTS)) or hasattr(v, "__dict__") and not is_library(home(type(v)))


def _is_numpy_value(v: Any) -> bool:
    """A number, type or function of numpy. Arrays and generators of random numbers are written by those who use them."""
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(v, (numpy.generic, numpy.dtype, numpy.ufunc))


def safe_builtins(refuse: Callable[[str], NoReturn], find_module: Callable[..., Any]) -> dict[str, Any]:
    """Python's builtins for code that is read: those that do more than compute are forbidden, imports only look up."""
    found = dict(vars(builtins))
    for name in _EFFECTS["builtins"] & found.keys():
        found[name] = Forbidden(f"it calls {name}", refuse)
    return {**found, "__import__": find_module}
