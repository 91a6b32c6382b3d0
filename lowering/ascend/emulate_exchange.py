"""CPU kernels of the exchange between ranks, which are threads of one process that meet at a barrier; from the ops' documents."""

from __future__ import annotations

import math
import threading
from typing import Any, ClassVar

import torch
from torch import Tensor

from .emulate_common import per_row, undefined

INFO = 128  # numbers of `assist_info_for_combine` for each row; what they are is the ops' own business


class Fabric:
    """The group `name` of `world` ranks. All of them call an op, and all get what all have brought."""

    groups: ClassVar[dict[str, Fabric]] = {}

    def __init__(self, name: str, world: int) -> None:
        self.brought: list[Any] = [()] * world
        self.barrier = threading.Barrier(world)
        Fabric.groups[name] = self

    def meet(self, rank: int, *values: Any) -> list[Any]:
        self.brought[rank] = values
        self.barrier.wait()
        everything = list(self.brought)
        self.barrier.wait()
        return everything


def dispatch(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    quant_mode: int = 0,
    global_bs: int = 0,
    **unused: Any,
) -> tuple[Tensor, ...]:
    """Rows of this rank's experts, by expert, then by rank and token; behind them nothing is defined."""
    everyone = Fabric.groups[group_ep].meet(ep_rank_id, x, expert_ids, x_active_mask, expert_scales)
    local, k = moe_expert_num // ep_world_size, expert_ids.shape[1]
    most = (global_bs or x.shape[0] * ep_world_size) // ep_world_size
    rows = undefined(x.new_empty(most * ep_world_size * min(local, k), x.shape[1]))
    info: list[tuple[int, int, int]] = []
    scales = undefined(torch.empty(len(rows)))  # of the slots: routing weights
    counts = torch.zeros(local, ep_world_size, dtype=torch.int64)
    for e in range(local):
        for source, (theirs, ids, mask, weights) in enumerate(everyone):
            _check(ids, mask)
            for t, j in (ids == ep_rank_id * local + e).nonzero().tolist():
                if mask is None or bool(mask[t]):
                    rows[len(info)] = theirs[t]
                    scales[len(info)] = 0.0 if weights is None else weights[t, j]
                    counts[e, source] += 1
                    info.append((source, t, j))
    told = torch.full((len(rows), INFO), -1, dtype=torch.int32)
    told[: len(info), :3] = torch.tensor(info, dtype=torch.int32).view(-1, 3)
    expanded, row_scales = _rounded(rows, len(info)) if quant_mode == 2 else (rows, undefined(torch.empty(len(rows))))
    received = counts.flatten().cumsum(0).int()
    return expanded, row_scales, told.flatten(), counts.sum(1), received, torch.zeros(0, dtype=torch.int32), scales


def _check(ids: Tensor, mask: Tensor | None) -> None:
    assert all(len(set(row)) == len(row) for row in ids.tolist()), "an expert twice in a row of ids"
    assert mask is None or mask.int().sort(descending=True).values.tolist() == mask.int().tolist(), "True comes before False"


def _rounded(rows: Tensor, done: int) -> tuple[Tensor, Tensor]:
    q, scale = torch.zeros(rows.shape, dtype=torch.int8), undefined(torch.empty(len(rows)))
    q[:done], scale[:done] = per_row(rows[:done].float())
    return q, scale


def combine(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: Tensor | None = None,
    ori_x: Tensor | None = None,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    **unused: Any,
) -> Tensor:
    """Σ_j w · row in fp32, copy experts w · ori_x; tokens that take no part get nothing that is defined."""
    everyone = Fabric.groups[group_ep].meet(ep_rank_id, expand_x, assist_info_for_combine, int(ep_send_counts[-1]))
    out = torch.zeros(expert_ids.shape[0], expand_x.shape[1])
    for rows, info, done in everyone:
        for place, (source, t, j) in enumerate(info.view(-1, INFO)[:done, :3].tolist()):
            if source == ep_rank_id:
                out[t] += float(expert_scales[t, j]) * rows[place].float()
    if copy_expert_num and ori_x is not None:
        copies = (expert_ids >= moe_expert_num + zero_expert_num) & (expert_ids < moe_expert_num + zero_expert_num + copy_expert_num)
        out += (expert_scales.float() * copies).sum(1, keepdim=True) * ori_x.float()
    if x_active_mask is not None:
        out[~x_active_mask] = float("nan")
    return out.to(expand_x.dtype)


def update_expert(
    expert_ids: Tensor,
    eplb_table: Tensor,
    *,
    expert_scales: Tensor | None = None,
    pruning_threshold: Tensor | None = None,
    active_mask: Tensor | None = None,
    local_rank_id: int = -1,
    world_size: int = -1,
    balance_mode: int = 0,
) -> tuple[Tensor, Tensor]:
    """A row of the table: how many places an expert has, then the places. Which one: mode 0 by rank, mode 1 by token, in turn."""
    count = eplb_table[:, 0].long()[expert_ids.long()]
    if balance_mode == 0:
        each = torch.tensor([math.ceil(world_size / int(c)) for c in count.flatten()]).view_as(count)
        turn = local_rank_id // each
    else:
        turn = torch.arange(len(expert_ids))[:, None] % count
    out = eplb_table[expert_ids.long(), turn + 1].to(expert_ids.dtype)
    mask = torch.zeros(expert_ids.shape, dtype=torch.bool)
    if expert_scales is not None and pruning_threshold is not None:
        w = expert_scales.float()
        mask = w >= pruning_threshold.reshape(1, -1) * w.sum(1, keepdim=True)
        mask = mask if active_mask is None else mask & active_mask[:, None]
    return out, mask
