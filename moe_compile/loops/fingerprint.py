"""Fingerprints: what code can learn from a module, so that a reading made on one module holds for another."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class _Same:
    """Equal only to itself, for as long as it lives."""

    def __init__(self, value: Any) -> None:
        self.id = id(value)
        self.plain = values_in(value)
        try:
            self.ref: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self.ref = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.id == other.id and self.ref() is other.ref() is not None and self.plain == other.plain

    __hash__ = None  # type: ignore[assignment]


def values_in(v: Any, depth: int = 4) -> Any:
    """The plain values that an object or container holds, and those in what it holds."""
    if isinstance(v, PLAIN):
        return type(v), v
    if depth == 0 or isinstance(v, (Tensor, nn.Module, type, types.FunctionType, types.ModuleType)):
        return None
    if isinstance(v, (list, tuple)):
        return [values_in(x, depth - 1) for x in v]
    held = v if isinstance(v, dict) else getattr(v, "__dict__", {})
    return {k: values_in(x, depth - 1) for k, x in held.items()}


OF_CLASS = object()


def own_attribute(module: nn.Module, name: str) -> Any:
    """What a module's own state answers for `name`, in Python's order of looking; `OF_CLASS` where its class does."""
    if name in module.__dict__:
        return module.__dict__[name]
    if not hasattr(type(module), name):
        for store in (module._parameters, module._buffers, module._modules):
            if name in store:
                return store[name]
    return OF_CLASS


def fingerprint(module: nn.Module, path: str, name: str) -> Any:
    """What a module answers when its submodule `path` is asked for `name`: equal for two modules iff code cannot tell them apart."""
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return None
    value = own_attribute(owner, name)
    if value is OF_CLASS:
        value = number_of_class(type(owner), name)
        return (type(owner),) if value is None else (type(owner), _print(value))
    return type(owner), _print(value)


def number_of_class(cls: type, name: str) -> Any:
    """What a class itself says for `name`, if that is a number or a string, which may be set anew; None for all else."""
    value = inspect.getattr_static(cls, name, None)
    return value if isinstance(value, (bool, int, float, str)) else None


def _print(v: Any) -> Any:
    if isinstance(v, Tensor):
        return "tensor", tuple(v.shape), v.dtype
    if isinstance(v, nn.Module):
        return "module", type(v), len(v._modules)
    if isinstance(v, PLAIN):
        return type(v), v
    if type(v) in (list, tuple):
        return type(v), tuple(_print(x) for x in v)
    if type(v) is dict:
        return type(v), tuple((k, _print(x)) for k, x in v.items())
    return _Same(v)
