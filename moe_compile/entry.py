"""What the entry point names: torch.compile loads it on the first `backend="moe_fused"` of a process. Where the package is not installed,
as in a bare checkout, nobody names it, and `import moe_compile` registers the backend.

torch.compile hands a backend its options only with the first graph, long after the line that holds the mistake. Here they are checked
inside `torch.compile()` itself. `torch._TorchCompileWrapper` is the object through which every backend but Inductor goes: its
constructor is wrapped for later uses, and for the very first one, which is running already while this module loads, its arguments are
read from its frame. Where torch has no such class, a wrong option is told at the first call instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch._dynamo.backends import registry

from . import backend
from .options import Options


def __getattr__(name: str) -> Any:
    if name != "moe_fused":
        raise AttributeError(name)
    constructor = _wrap_constructor()
    frame = sys._getframe()
    while constructor is not None and frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_qualname == constructor.__qualname__:
            Options.parse(frame.f_locals.get("options"), frame.f_locals.get("mode"))
            break
    return backend.moe_fused


def register() -> None:
    """Give torch.compile the backend's name where no installed package does, nor anybody before."""
    if not _named() and "moe_fused" not in registry._COMPILER_FNS:
        _wrap_constructor()
        registry.register_backend(backend.moe_fused, name="moe_fused")


def _named() -> bool:
    """Whether an installed package has the entry point. (torch would register it a second time.)"""
    try:
        return any(e.group == "torch_dynamo_backends" and e.name == "moe_fused" for e in metadata.distribution("moe-compile").entry_points)
    except metadata.PackageNotFoundError:
        return False


@functools.cache
def _wrap_constructor() -> Callable[..., Any] | None:
    """Wrap the constructor once and return the original; None where there is no such class."""
    wrapper = getattr(torch, "_TorchCompileWrapper", None)
    original = None if wrapper is None else wrapper.__init__
    if original is None or not hasattr(original, "__code__"):
        return None

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if getattr(self, "compiler_fn", None) is backend.moe_fused:
            Options.parse(self.kwargs.get("options"), self.kwargs.get("mode"))

    wrapper.__init__ = init  # type: ignore[union-attr, misc]
    return original
