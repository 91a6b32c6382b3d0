"""What can be done to a model before it is compiled."""

from __future__ import annotations

from torch import nn

from .errors import OptionError
from .options import TARGETS


def prepare(model: nn.Module, target: str = "ascend") -> dict[str, int]:
    """Bring the expert weights of `model` into the memory layout that `target` reads, in place, before it is compiled.

    Shapes, names and values do not change, and a state_dict loads and saves as before. Without this call a compiled model makes a copy
    on first use where the target wants another layout. Returns {parameter name: bytes} of what was rearranged; nothing on targets that
    read any layout. Raises `OptionError` (a ValueError) on an unknown target.
    """
    if target not in TARGETS or target == "auto":
        raise OptionError(f"target is {target!r}; allowed: {', '.join(repr(t) for t in TARGETS if t != 'auto')}")
    if target != "ascend":
        return {}
    from .lowering.ascend.rearrange import prepare as rearrange

    return rearrange(model)
