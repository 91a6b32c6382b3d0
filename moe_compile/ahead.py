"""What can be done to a model before it is compiled."""

from __future__ import annotations

from torch import nn

from .errors import OptionError
from .options import TARGETS


def prepare(model: nn.Module, target: str = "ascend", training: bool = False, weight_format: str = "nd") -> dict[str, int]:
    """Bring the expert weights of `model` into the memory layout that `target` reads, in place, before it is compiled.

    Shapes, names and values do not change, and a state_dict loads and saves as before. Without this call a compiled model makes a copy
    on first use where the target wants another layout. Returns {parameter name: bytes} of what was rearranged; nothing on targets that
    read any layout. Raises `OptionError` (a ValueError) on an unknown target or format.

    training: parameters are laid out so that FSDP2 takes them; call it before `fully_shard`. The state_dict stays what it was,
    the names in `named_parameters()` do not. weight_format="nz": besides, FSDP2 gathers them in Ascend's fractal format (not run on an
    NPU yet).
    """
    if target not in TARGETS or target == "auto":
        raise OptionError(f"target is {target!r}; allowed: {', '.join(repr(t) for t in TARGETS if t != 'auto')}")
    if weight_format not in ("nd", "nz"):
        raise OptionError(f"weight_format is {weight_format!r}; allowed: 'nd', 'nz'")
    if weight_format == "nz" and not training:
        raise OptionError("weight_format='nz' goes with training=True; for inference it is an option of torch.compile")
    if target != "ascend":
        return {}
    from .lowering.ascend.rearrange import prepare as rearrange

    return rearrange(model, training, weight_format)
