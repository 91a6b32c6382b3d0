"""Experts in few bits on CUDA: the matrices of the experts that tokens were sent to become floats in a workspace of bounded size, and the
kernels for floats run on it. Nothing is read back to the host.

With few (token, slot) pairs each pair has a matrix of its own in the workspace. Else the experts take turns, `CHUNK` at a time, and of
those only the ones that were hit are made floats: the workspace is `CHUNK` matrices however many experts there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...ir import Stored
from ...ir.operands import CODED, Operands
from ...ir.records import Layout, Storage
from ...ops import bundled, storage_of
from ..reference import generic

CHUNK = 16  # experts whose matrices are floats at the same time
FEW = 32  # (token, slot) pairs that have a matrix each


def experts_stored(*args: Any) -> Tensor:
    """As the op of this name, for what `capability.refuses` does not."""
    x, ids, weights, p, (add, *plain) = bundled(args, CODED)
    with torch.cuda.device(x.device):
        return forward(x, ids, weights, p, add, *storage_of(plain))


def forward(x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout, storage: Storage) -> Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H_out] in x.dtype. Raises ValueError where a parameter holds too few experts."""
    generic.check_sizes(layout, p)
    experts = layout.num_experts
    ids = torch.where((ids >= 0) & (ids < experts), ids, -1)
    if layout.stacked and ids.numel() <= FEW:
        own = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        return _run(x, torch.where(ids < 0, -1, own), weights, p, add, layout, storage, ids.flatten(), 0)
    hit = torch.zeros(experts + 1, dtype=torch.bool, device=ids.device)
    hit[ids.flatten()] = True  # -1 is the one behind the last
    numbers = torch.where(hit[:experts], torch.arange(experts, device=ids.device), -1)
    out = torch.zeros(x.shape[0], layout.out_features(p.down), dtype=torch.float32, device=x.device)
    for first in range(0, experts, CHUNK):
        here = torch.where((ids >= first) & (ids < first + CHUNK), ids - first, -1)
        out += _run(x, here, weights, p, None, layout, storage, numbers[first : first + CHUNK], first)
    return (out if add is None else out + add).to(x.dtype)


def _run(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    add: Tensor | None,
    layout: Layout,
    storage: Storage,
    experts: Tensor,
    first: int,
) -> Tensor:
    """The experts' op on a workspace; matrix i of it is that of expert `experts[i]`, of none where that is -1."""
    count = experts.shape[0]
    up, down = storage.stored()
    halves = layout.halves()

    def floats(codes: Sequence[Tensor], scales: Sequence[Tensor], how: Stored | None, parts: int) -> list[Tensor]:
        if layout.stacked:
            return [_workspace(w, scales[i] if scales else None, how, experts, x.dtype) for i, w in enumerate(codes)]
        return [_taken(codes, scales, how, part * layout.num_experts + first, experts, x.dtype) for part in range(parts)]

    def biases(tensors: Sequence[Tensor], parts: int) -> list[Tensor]:
        at = experts.clamp(min=0)
        if layout.stacked:
            return [b[at] for b in tensors]
        starts = [part * layout.num_experts + first for part in range(parts)] if tensors else []
        return [torch.stack([tensors[start + i] for i in range(count)]) for start in starts]

    workspace = Operands.named(
        up=floats(p.up, p.up_scale, up, halves),
        down=floats(p.down, p.down_scale, down, 1),
        up_bias=biases(p.up_bias, halves),
        down_bias=biases(p.down_bias, 1),
    )
    plain = replace(layout, num_experts=count, stacked=True)
    return torch.ops.moe_compile.experts(x, ids, weights, *workspace.lists(), add, *vars(plain).values())  # type: ignore[no-any-return]


def _workspace(codes: Tensor, scales: Tensor | None, how: Stored | None, experts: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, R, C]: matrices of a stack."""
    if how is None:
        return codes[experts.clamp(min=0)]
    out = torch.empty(experts.shape[0], *codes.shape[-2:], dtype=dtype, device=codes.device)
    _dequantise(codes, scales, how, experts, out)
    return out


def _taken(
    codes: Sequence[Tensor], scales: Sequence[Tensor], how: Stored | None, start: int, experts: Tensor, dtype: torch.dtype
) -> Tensor:
    """[n, R, C]: matrices of a list, from `start` on."""
    here = range(start, start + experts.shape[0])
    if how is None:
        return torch.stack([codes[i] for i in here])
    out = torch.empty(experts.shape[0], *codes[start].shape, dtype=dtype, device=codes[start].device)
    for i, n in enumerate(here):
        _dequantise(codes[n], scales[n] if scales else None, how, experts[i : i + 1], out[i : i + 1])
    return out


def _dequantise(codes: Tensor, scales: Tensor | None, how: Stored, experts: Tensor, out: Tensor) -> None:
    from . import stored_kernels  # triton is looked up here

    stored_kernels.dequantise(codes, scales, how, experts, out)
