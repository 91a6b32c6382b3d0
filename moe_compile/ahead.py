"""What can be done to a model before it is compiled."""

from __future__ import annotations

import importlib.util

from torch import nn

from . import lowering
from .errors import OptionError


def prepare(model: nn.Module, target: str = "auto", training: bool = False, weight_format: str = "nd") -> dict[str, int]:
    """Bring the expert weights of `model` into the memory layout that `target` reads, before it is compiled.

    On Ascend they are rearranged in place. On the CPU, for inference, their memory stays what it is and kernels read packed copies, made
    at the first call: as many bytes once more. A weight that is written to afterwards is noticed and read as the model holds it, until
    this is called again; so is one that loses its memory (`p.data = ...`). On CUDA nothing is to be done.
    Shapes, names and values do not change, and a state_dict loads and saves as before. Returns {parameter name: bytes} of what is
    rearranged or copied. Raises `OptionError` (a ValueError) on an unknown target or format, and for the CPU where a parameter was made
    under `torch.inference_mode()`, which keeps no count of writes.

    target: "auto" is "ascend" where torch_npu is installed or a parameter lies on an NPU, else the device of the parameters.
    training: on Ascend, parameters are laid out so that FSDP2 takes them; call it before `fully_shard`. The state_dict stays what it was,
    the names in `named_parameters()` do not. weight_format="nz": besides, FSDP2 gathers them in Ascend's fractal format (not run on an
    NPU yet). On the CPU weights that are trained are not packed.
    """
    known = lowering.targets()
    if target not in ("auto", *known):
        raise OptionError(f"target is {target!r}; allowed: {', '.join(map(repr, ('auto', *known)))}")
    if weight_format not in ("nd", "nz"):
        raise OptionError(f"weight_format is {weight_format!r}; allowed: 'nd', 'nz'")
    if weight_format == "nz" and not training:
        raise OptionError("weight_format='nz' goes with training=True; for inference it is an option of torch.compile")
    rearrange = lowering.target(_target_of(model) if target == "auto" else target).rearrange
    return {} if rearrange is None else rearrange(model, training, weight_format)


def _target_of(model: nn.Module) -> str:
    if importlib.util.find_spec("torch_npu") is not None:
        return "ascend"  # models are prepared before they are moved
    return lowering.target_for({p.device.type for p in model.parameters()})
