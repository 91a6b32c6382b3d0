"""Expert parameters that are [E, in, out] themselves, under a model that reads [E, out, in]: for training, and FSDP2.

A parametrisation of torch.nn.utils: the parameter is `original`, what the model reads is `original.transpose(-1, -2)`. Hooks keep the
state_dict what it was, names, shapes and values; the names of `named_parameters()` change.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import shards
from .formats import refuses_nz

log = logging.getLogger("moe_compile")


class OutIn(nn.Module):
    """original [E, in, out] -> [E, out, in], a view."""

    def forward(self, original: Tensor) -> Tensor:
        return original.transpose(-1, -2)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2).contiguous()


def reparametrise(module: nn.Module, name: str, out_in: bool, nz: bool) -> bool:
    """Make the stacked weight `name` a physical [E, in, out]; returns whether anything changed.

    nz: FSDP2 gathers it in the fractal format (`shards`), where its sizes allow; a warning says where they do not. Not run on an NPU.
    """
    if parametrize.is_parametrized(module, name):
        return False
    weight = getattr(module, name)
    wrapped = nz and _may_be_nz(weight, out_in)
    if out_in:
        parametrize.register_parametrization(module, name, OutIn())
        _keep_state_dict(module, name)
    elif wrapped:
        module.register_state_dict_post_hook(lambda _, state, prefix, __: state.update({prefix + name: shards.plain(state[prefix + name])}))
    if wrapped:
        place, key = (module.parametrizations[name], "original") if out_in else (module, name)  # type: ignore[index]
        setattr(place, key, nn.Parameter(shards.FractalShard(getattr(place, key).data), requires_grad=weight.requires_grad))
    return out_in or wrapped


def _may_be_nz(weight: Tensor, out_in: bool) -> bool:
    shape = weight.shape if not out_in else (weight.shape[0], weight.shape[2], weight.shape[1])
    why = refuses_nz(shape, torch.bfloat16)  # whatever it is kept in, it is gathered in 16 bits
    if why is not None:
        log.warning("an expert weight is gathered as it is, not in the fractal format: %s", why)
    return why is None


def _keep_state_dict(module: nn.Module, name: str) -> None:
    """`name` [E, out, in] in the state_dict, where the parametrisation would have it `parametrizations.name.original` [E, in, out]."""
    inner = f"parametrizations.{name}.original"

    def save(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        if prefix + inner in state:
            state[prefix + name] = shards.plain(state.pop(prefix + inner)).transpose(-1, -2)

    def load(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        if prefix + name in state:
            state[prefix + inner] = state.pop(prefix + name).transpose(-1, -2).contiguous()

    module.register_state_dict_post_hook(save)
    module.register_load_state_dict_pre_hook(load)
