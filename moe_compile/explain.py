"""Ask the compiler what it makes of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .backend import loops_left
from .options import BACKEND_NAME, Options
from .report import collecting, original
from .reported import Report


def explain(model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Compile `model(*args, **kwargs)` and tell what was recognised, proved and fused, and what was not and why.

    model: a module or function, compiled already or not; what the user compiled stays valid. `options` as for
    `torch.compile(..., backend="moe_fused", options=...)`, except that `inner` defaults to "eager": only the graphs are wanted, not
    fast code. The model runs once on the arguments, in the caller's grad mode; the random state is left as it was.
    Raises `OptionError` on a wrong option, `NotFused` with `strict=True`, and whatever the model itself raises.
    """
    return explained(model, args, kwargs, options)[0]


def explained(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any] | None
) -> tuple[Report, Any]:
    """`explain`, and what the model gave."""
    chosen = Options.parse({"inner": "eager", **(options or {})})
    devices = [d for d in range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    compiled = torch.compile(original(model), backend=BACKEND_NAME, options=chosen.by_name(), **_apart())
    loops_left(())  # what was met earlier is not part of this
    with torch.random.fork_rng(devices), collecting() as report:
        out = compiled(*args, **kwargs)
        report.add_rejected(loops_left([b.source for b in report.blocks]))
    return report, out


def _apart() -> dict[str, Any]:
    """Keep our compiled code out of the cache that the user's own compiled code of the same functions lives in (torch 2.13)."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
