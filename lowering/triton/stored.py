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
from ...ir.operands import ADAPTED, PLAIN, STORED_ADAPTED, Operands
from ...ir.records import AdaptedLayout, Layout, Storage
from ...ops.records import bundled, stored_adapted_of
from ..reference import generic
from ..reference import stored as reference
from ..reference.stored import Held
from . import capability
from .launch.later import Later, NotRecorded

CHUNK = 16  # experts whose matrices are floats at the same time
FEW = 32  # (token, slot) pairs that have a matrix each


def experts_stored_adapted(*args: Any) -> Tensor:
    """As the op of this name: low-rank pairs beside a workspace of floats."""
    x, ids, weights, p, (add, *plain) = bundled(args, STORED_ADAPTED)
    return forward(x, ids, weights, p, add, *stored_adapted_of(plain))


def forward(x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout, storage: Storage) -> Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H_out] in x.dtype. Raises ValueError where a parameter holds too few experts."""
    if isinstance(x, Later):
        raise NotRecorded("a workspace of floats")
    generic.check_sizes(layout, p.of_experts())
    if any(storage.rows()):
        return reference.forward(x, ids, weights, p, add, layout, storage)
    experts = layout.num_experts
    ids = torch.where((ids >= 0) & (ids < experts), ids, -1)
    if layout.stacked and ids.numel() <= FEW:
        own = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        return _run(x, torch.where(ids < 0, -1, own), weights, p, add, layout, storage, ids.flatten(), 0)
    hit = torch.zeros(experts + 1, dtype=torch.bool, device=ids.device)
    hit.index_fill_(0, torch.where(ids < 0, experts, ids).flatten(), True)  # no copy from the host: a graph may be captured
    numbers = torch.where(hit[:experts], torch.arange(experts, device=ids.device), -1)
    out: Any = 0.0 if add is None else add
    for first in range(0, experts, CHUNK):
        here = torch.where((ids >= first) & (ids < first + CHUNK), ids - first, -1)
        out = out + _run(x, here, weights, p, None, layout, storage, numbers[first : first + CHUNK], first).float()
    return out.to(x.dtype)  # type: ignore[no-any-return]


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

    def floats(name: str, how: Stored | None, parts: int) -> list[Tensor]:
        codes = getattr(p, name)
        starts = [part * layout.num_experts + first for part in range(parts)] if codes else []
        if how is None:
            return _plain(codes, experts, None if layout.stacked else starts)
        held = Held.of(p, name, how)
        if layout.stacked:
            return [_workspace(held, i, experts, x.dtype) for i in range(len(codes))]
        return [_taken(held, start, experts, x.dtype) for start in starts]

    workspace = Operands.named(
        up=floats("up", up, halves),
        down=floats("down", down, 1),
        up_bias=floats("up_bias", None, halves),
        down_bias=floats("down_bias", None, 1),
    )
    plain = replace(layout, num_experts=count, stacked=True)
    if isinstance(layout, AdaptedLayout):
        workspace = replace(workspace, **{name: tuple(_pairs(getattr(p, name), experts, layout, first)) for name in ADAPTED[len(PLAIN) :]})
        return torch.ops.moe_compile.experts_adapted(  # type: ignore[no-any-return]
            x, ids, weights, *workspace.lists(ADAPTED), add, *vars(plain).values()
        )
    return torch.ops.moe_compile.experts(x, ids, weights, *workspace.lists(), add, *vars(plain).values())  # type: ignore[no-any-return]


def _pairs(matrices: Sequence[Tensor], experts: Tensor, layout: Layout, first: int) -> list[Tensor]:
    """[n, ..] of low-rank pairs, of each part that has one."""
    starts = [part * layout.num_experts + first for part in range(len(matrices) // layout.num_experts)]
    return _plain(matrices, experts, None if layout.stacked else starts)


def _plain(weights: Sequence[Tensor], experts: Tensor, starts: list[int] | None) -> list[Tensor]:
    """[n, ..] of parameters that are floats: of stacks, or of a list from each of the starts on."""
    if starts is None:
        return [w[experts.clamp(min=0)] for w in weights]
    return [torch.stack([weights[start + i] for i in range(experts.shape[0])]) for start in starts]


def _workspace(held: Held, i: int, experts: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, R, C]: matrices of a stack."""
    codes, how = held.codes[i], held.how
    if not _by_kernel(held):
        return held.floats(i, experts.clamp(min=0), dtype=torch.float32).to(dtype)
    out = torch.empty(experts.shape[0], *codes.shape[-2:], dtype=dtype, device=codes.device)
    _dequantise(codes, held.scales[i] if held.scales else None, how, experts, out)
    return out


def _taken(held: Held, start: int, experts: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, R, C]: matrices of a list, from `start` on."""
    here = range(start, start + experts.shape[0])
    if not _by_kernel(held):
        return torch.stack([held.floats(n, ..., dtype=torch.float32).to(dtype) for n in here])
    out = torch.empty(experts.shape[0], *held.codes[start].shape, dtype=dtype, device=held.codes[start].device)
    for i, n in enumerate(here):
        _dequantise(held.codes[n], held.scales[n] if held.scales else None, held.how, experts[i : i + 1], out[i : i + 1])
    return out


def _by_kernel(held: Held) -> bool:
    """Whether the kernel knows such codes; plain torch makes floats of the others."""
    return held.how.plain and held.how.dtype in capability.CODES


def _dequantise(codes: Tensor, scales: Tensor | None, how: Stored, experts: Tensor, out: Tensor) -> None:
    from . import stored_kernels  # triton is looked up here

    stored_kernels.dequantise(codes, scales, how, experts, out)
