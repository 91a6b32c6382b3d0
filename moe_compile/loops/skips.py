"""Frames that Dynamo gives up: for one module, not for all of its class.

A break inside a loop makes Dynamo skip a frame, and with it the code: no other module of the class would be looked at, and versions
that were compiled before would run no more. A loop over experts that was declined in one layer may be read in the next. So such a frame
is skipped for the module it was tried with (in training or not, with gradients or without), until `MOST` times are over, or no new one has
come for a while; from then on nothing new is compiled, and what there is goes on running.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .looks import asks, has_loop
from .places import of_class

log = logging.getLogger("moe_compile")
MOST = 4
_CALLS = 16  # of modules that were tried before, in a row


@dataclass
class _Tried:
    modules: weakref.WeakKeyDictionary[nn.Module, set[tuple[bool, bool]]] = field(default_factory=weakref.WeakKeyDictionary)
    times: int = 0
    calls: int = 0

    def had(self, module: nn.Module) -> bool:
        return _modes(module) in self.modules.get(module, ())


_tried: weakref.WeakKeyDictionary[types.CodeType, _Tried] = weakref.WeakKeyDictionary()


def forget() -> None:
    """Dynamo forgets what it compiled and what it skips."""
    _tried.clear()


def _modes(module: nn.Module) -> tuple[bool, bool]:
    return module.training, torch.is_grad_enabled()


def again(given: Mapping[str, Any]) -> bool:
    """Whether a frame was given up with this very module, a little while ago."""
    known, module = _tried.get(given["code"]), _module(given)
    if known is None or module is None or not known.had(module):
        return False
    known.calls += 1
    return known.calls < _CALLS


def once() -> Any:
    """What tells Dynamo to skip a frame this time."""
    from torch._dynamo.types import ConvertFrameReturn

    return ConvertFrameReturn(apply_to_code=False, skip_reason="an expert loop that was given up with this module")


def in_place_of(given: Mapping[str, Any], e: Exception) -> Any:
    """What Dynamo is told of a frame that it cannot compile in place of the error, which would skip its code for good; None: the error."""
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.types import ConvertFrameReturn

    box = given.get("convert_frame_box")
    if not isinstance(e, Unsupported) or e.frame_exec_strategy is not None or getattr(box, "error_on_graph_break", True):
        return None
    for_good = ConvertFrameReturn(skip_reason="a break in a loop")
    told = limited(given, for_good)
    return None if told is for_good else told


def limited(given: Mapping[str, Any], found: Any) -> Any:
    """What Dynamo is told of a frame, where `found` says that its code is to be skipped for good."""
    code, module = given["code"], _module(given)
    if module is None or getattr(found, "guarded_code", found) is not None or not getattr(found, "apply_to_code", False):
        return found
    if not (has_loop(code) and asks(code)):
        return found
    from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy

    known = _tried.setdefault(code, _Tried())
    if not known.had(module) and known.times < MOST:
        known.modules.setdefault(module, set()).add(_modes(module))
        known.times, known.calls = known.times + 1, 0
        return once()
    del _tried[code]
    return ConvertFrameReturn(FrameExecStrategy(FrameAction.RUN_ONLY, FrameAction.DEFAULT), skip_reason=found.skip_reason)


def _module(given: Mapping[str, Any]) -> nn.Module | None:
    """The module whose forward a frame is."""
    code, values = given["code"], given.get("locals") or {}
    module = values.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(module, nn.Module) or given.get("one_graph") or given.get("export"):
        return None
    return module if getattr(of_class(type(module), "forward"), "__code__", None) is code else None
