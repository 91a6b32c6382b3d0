"""Ahead of time: expert weights of a model into the layout of grouped matmul, in place.

For inference the memory under a parameter changes, and nothing else. For training a parameter itself becomes [E, in, out], because FSDP2
takes contiguous parameters only; the model goes on reading [E, out, in] through a view.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import OptionError
from . import physical
from .store import STORE

log = logging.getLogger("moe_compile")


def prepare(model: nn.Module, training: bool = False, weight_format: str = "nd") -> dict[str, int]:
    """Rearrange the expert weights of `model` in place, so that compiled graphs use them without a copy.

    Shapes, names and values stay as they are, so a state_dict loads and saves as before: a parameter [E, out, in] becomes a view, with
    other strides, of memory that lies as [E, in, out]; matrices of a list of experts come to lie one behind the other. Weights in int8
    may be buffers. One weight at a time is copied. Returns {name: bytes} of what was rearranged. Which weights are experts' is guessed
    from shapes: a wrong guess costs nothing but the copy on first use that there would have been without this call.

    training: see `physical.reparametrise`; lists of experts stay as they are. Raises OptionError where parameters are sharded already.
    Copies that graphs hold are made again: they may be of weights that were written to where versions do not tell (`p.data.copy_`).
    """
    _not_sharded(model)
    STORE.forget(itertools.chain(model.parameters(), model.buffers()))
    if training:
        return _for_training(model, weight_format)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        log.warning("fully_shard refuses parameters that are not contiguous: for FSDP2 use prepare(model, target='ascend', training=True)")
    moved: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for name, p in _out_in_parameters(module).items():
            p.data = _transposed_memory(p.data)
            moved[f"{prefix}.{name}" if prefix else name] = p.numel() * p.element_size()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList)):
            for name, parameters in _equal_parameters(module).items():
                _lay_together(parameters)
                moved[f"{prefix}.*.{name}" if name else f"{prefix}.*"] = sum(p.numel() * p.element_size() for p in parameters)
    return moved


def _for_training(model: nn.Module, weight_format: str) -> dict[str, int]:
    moved: dict[str, int] = {}
    for prefix, module in list(model.named_modules()):
        stored = _pairs(module)
        for name, out_in in {n: way == "out_in" for n, way in stored.items() if isinstance(getattr(module, n), nn.Parameter)}.items():
            p = getattr(module, name)
            size = p.numel() * p.element_size()
            if physical.reparametrise(module, name, out_in, weight_format == "nz"):
                moved[f"{prefix}.{name}" if prefix else name] = size
    return moved


def _not_sharded(model: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    sharded = next((n for n, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise OptionError(f"prepare comes before fully_shard: parameter {sharded!r} is sharded already")


def _out_in_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Of a module's own stacked weights, those that are stored [E, out, in]."""
    return {n: getattr(module, n) for n, way in _pairs(module).items() if way == "out_in"}


def _pairs(module: nn.Module) -> dict[str, str]:
    """A module's own stacked weights [E, a, b] that are an up and a down projection, and how they are stored: "out_in" or "in_out".

    A down projection [E, H, I] stands beside an up projection [E, I or 2 I, H]; stored the other way round they are [E, I, H] and
    [E, H, I or 2 I]. Where shapes allow both, nothing is said.
    """
    own = [*module.named_parameters(recurse=False), *((n, b) for n, b in module.named_buffers(recurse=False) if b.dtype == torch.int8)]
    stacked = {n: p for n, p in own if p.ndim == 3 and (p.is_floating_point() or p.dtype == torch.int8) and p.shape[0] > 1}
    found: dict[str, str] = {}
    for (a, up), (b, down) in itertools.permutations(stacked.items(), 2):
        (e, m, n), (e2, k, i) = up.shape, down.shape
        if e != e2 or up.dtype != down.dtype:
            continue
        out_in = n == k and m in (i, 2 * i)
        in_out = m == i and n in (k, 2 * k)
        if out_in != in_out:
            found.update({a: "out_in", b: "out_in"} if out_in else {a: "in_out", b: "in_out"})
    return found


def _transposed_memory(t: Tensor) -> Tensor:
    """The same tensor over memory in which its last two dims are swapped."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def _equal_parameters(experts: nn.Module) -> dict[str, list[Tensor]]:
    """Matrices (and vectors) that every member of a list has, with equal shapes and dtypes, by name."""
    members: list[dict[str, Tensor]]
    if isinstance(experts, nn.ParameterList):
        members = [{"": p} for p in experts.parameters(recurse=False)]
    else:
        members = [_weights(m) for m in experts.children()]
    if len(members) < 2 or any(m.keys() != members[0].keys() for m in members):
        return {}
    columns = {name: [m[name] for m in members] for name in members[0]}
    return {n: ps for n, ps in columns.items() if 1 <= ps[0].ndim <= 2 and _alike(ps) and _looks_like_experts(members[0])}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters; buffers too where some are matrices of bytes."""
    buffers = dict(module.named_buffers())
    bytes_ = any(b.dtype == torch.int8 and b.ndim == 2 for b in buffers.values())
    return {**dict(module.named_parameters()), **(buffers if bytes_ else {})}


def _looks_like_experts(member: dict[str, Tensor]) -> bool:
    """An MLP: two or three matrices that fit each other, with or without biases. Whole decoder layers are not rearranged."""
    matrices = [p for p in member.values() if p.ndim == 2 and min(p.shape) > 1]
    return len(matrices) in (1, 2, 3) and all(p.ndim <= 2 for p in member.values()) and len(member) <= 6


def _alike(ps: Sequence[Tensor]) -> bool:
    first = ps[0]
    alike = all(p.shape == first.shape and p.dtype == first.dtype and p.device == first.device for p in ps)
    return alike and len(set(map(id, ps))) == len(ps)


def _lay_together(ps: Sequence[Tensor]) -> None:
    """Give all of a list's matrices one block of memory, each [out, in] over [in, out]."""
    first = ps[0]
    block = torch.empty(len(ps), *reversed(first.shape), dtype=first.dtype, device=first.device)
    for i, p in enumerate(ps):
        mine = block[i].t() if first.ndim == 2 else block[i]
        mine.copy_(p.data)
        p.data = mine
