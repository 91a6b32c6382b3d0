"""Guards on what a captured function reads beside its arguments, its module's attributes and parameters.

Its code is inlined no more, so Dynamo does not see those reads: globals, and what hangs on them or on the module's attributes (lists,
dictionaries, configurations), are found by the names in the code and guarded by value. What cannot be guarded is told by `Unguarded`.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .fingerprint import PLAIN, values_in

_KEPT = (*PLAIN, list, tuple, dict, set, frozenset, torch.Tensor)
_LIBRARIES = ("torch", "numpy", "moe_compile")
_DEPTH, _MOST = 4, 256


class Unguarded(Exception):
    """A value that a function reads and nothing can watch."""


@contextlib.contextmanager
def or_unguarded() -> Iterator[None]:
    """Where a private name of torch is missing, nothing can be watched."""
    try:
        yield
    except (AttributeError, ImportError, TypeError, NotImplementedError) as e:
        raise Unguarded(f"values beside its arguments ({type(e).__name__}: {e})") from e


def names_of(fn: types.FunctionType, module: nn.Module | None) -> set[str]:
    """Names in the code of a function, and of the user's functions and methods of `module` and its parts that it may call."""
    return {n for f in _functions(fn, module) for n in _names(f)}


def guard_globals(tx: Any, fn: types.FunctionType, module: nn.Module | None) -> None:
    """Guard the global values that a function, and those of the user's that it may call, read. Raises Unguarded."""
    from torch._dynamo.source import AttrSource

    names = names_of(fn, module)
    for f in _functions(fn, module):
        for name in _globals_of(f):
            value = f.__globals__[name]
            if not _skipped(value):
                module = sys.modules.get(f.__globals__.get("__name__", ""))
                if module is None or module.__dict__ is not f.__globals__:
                    raise Unguarded(f"the global {name}")
                guard_value(AttrSource(tx.import_source(module.__name__), name), value, names, name)


def values_of_globals(fn: types.FunctionType, module: nn.Module | None) -> list[Any]:
    """What the globals that `guard_globals` guards hold now; equal for two moments iff nothing was set anew."""
    found = [(n, f.__globals__[n]) for f in _functions(fn, module) for n in _globals_of(f)]
    return [(n, values_in(v)) for n, v in found if not _skipped(v)]


def guard_value(source: Any, value: Any, names: set[str], label: str, depth: int = _DEPTH) -> None:
    """Guard a value that is reached by Dynamo's `source`, and of an object what `names` name. Raises Unguarded."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, DictGetItemSource, GetItemSource

    if _skipped(value):
        return
    inner: list[tuple[Any, Any, str]] = []
    if isinstance(value, torch.Tensor) or depth == 0:
        raise Unguarded(label)
    if isinstance(value, PLAIN):
        install_guard(source.make_guard(GuardBuilder.CONSTANT_MATCH))
    elif isinstance(value, (list, tuple)) and len(value) <= _MOST:
        install_guard(source.make_guard(GuardBuilder.SEQUENCE_LENGTH))
        inner = [(GetItemSource(source, i), v, f"{label}[{i}]") for i, v in enumerate(value)]
    elif isinstance(value, dict) and len(value) <= _MOST and all(isinstance(k, (str, int)) for k in value):
        install_guard(source.make_guard(GuardBuilder.SEQUENCE_LENGTH))
        inner = [(DictGetItemSource(source, k), v, f"{label}[{k!r}]") for k, v in value.items()]
    elif hasattr(value, "__dict__"):
        read = sorted(n for n in names & vars(value).keys())
        inner = [(AttrSource(source, n), vars(value)[n], f"{label}.{n}") for n in read]
    else:
        raise Unguarded(label)
    for s, v, name in inner:
        guard_value(s, v, names, name, depth - 1)


def _skipped(v: Any) -> bool:
    """Code, which is not set anew, and modules, whose attributes and parameters are guarded elsewhere."""
    code = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, nn.Module)
    library = type(v).__module__.partition(".")[0] in ("torch", "logging", "typing", "functools", "builtins")
    return isinstance(v, code) or library and not isinstance(v, _KEPT)


def _functions(fn: types.FunctionType, module: nn.Module | None) -> list[types.FunctionType]:
    """`fn`, and what it may call by a global name, by a method's name, or by calling a part of the module."""
    classes = dict.fromkeys(type(m) for m in module.modules()) if module is not None else {}
    found = [fn]
    for f in found:
        called = [f.__globals__[n] for n in _globals_of(f)]
        called += [inspect.getattr_static(c, n, None) for c in classes for n in (*sorted(_names(f)), "forward")]
        found += [g for g in dict.fromkeys(c for c in called if isinstance(c, types.FunctionType)) if g not in found and not _of_library(g)]
    return found


def _of_library(f: types.FunctionType) -> bool:
    return (f.__module__ or "").partition(".")[0] in _LIBRARIES


def _names(f: types.FunctionType) -> set[str]:
    return {n for c in codes(f.__code__) for n in c.co_names}


def _globals_of(fn: types.FunctionType) -> list[str]:
    found = {i.argval for c in codes(fn.__code__) for i in dis.get_instructions(c) if i.opname == "LOAD_GLOBAL"}
    return sorted(n for n in found if n in fn.__globals__)


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code, and that of the functions made inside it."""
    yield code
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            yield from codes(c)
