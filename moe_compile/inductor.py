"""Inductor, with what torch.compile would give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Compiler = Callable[..., Callable[..., Any]]


def inductor(options: Mapping[str, Any], mode: str | None) -> Compiler:
    """Inductor with exactly what `torch.compile(mode=..., options=...)` gives it.

    Raises RuntimeError (Inductor's own) on an unknown option, value type or mode.
    """
    # torch.compile routes backend="inductor" through this wrapper, which turns mode and options into config patches;
    # going through the same door keeps every mode meaning what users expect of it.
    return torch._TorchCompileInductorWrapper(mode, dict(options), None)
