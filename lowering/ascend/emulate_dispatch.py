"""CPU kernels of gating, dispatch and combine, from their documented semantics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .emulate_common import per_row, undefined

# ---- gating ------------------------------------------------------------------------------------------------------------


def _first_best(values: Tensor, k: int) -> Tensor:
    """Indices of the k best, sorted; ties go to the lower index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoid: always renormalised. Softmax: never. The scale comes last. The bias takes part in the selection only."""
    s = x.float().softmax(-1) if norm_type == 0 else x.float().sigmoid()
    sel = s if bias is None else s + bias.float()
    if group_count > 1 and k_group < group_count:
        by_group = sel.view(x.shape[0], group_count, -1)
        best = by_group.amax(-1) if group_select_mode == 0 else by_group.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, _first_best(best, k_group), True)
        sel = by_group.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    idx = _first_best(sel, k) if input_ids is None or tid2eid is None else tid2eid[input_ids.long()].long()
    y = s.gather(1, idx)
    if norm_type == 1:
        y = y / (y.sum(-1, keepdim=True) + eps)
    y = y * routed_scaling_factor
    return y.to(x.dtype), idx.int(), s if out_flag else undefined(torch.empty_like(s))


def gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    s = rows.float().softmax(-1)
    idx = _first_best(s, k)
    y = s.gather(1, idx)
    if finished is not None:
        idx = torch.where(finished.reshape(-1, 1), x.shape[-1], idx)
    row_idx = torch.arange(rows.shape[0] * k, dtype=torch.int32).view(k, -1).t().contiguous()
    lead = x.shape[:-1]
    return y.to(x.dtype).view(*lead, k), idx.int().view(*lead, k), row_idx.view(*lead, k)


def gating_top_k_softmax_v2(
    x: Tensor, *, k: int = 1, finished: Tensor | None = None, renorm: int | None = 0, output_softmax: bool | None = False
) -> tuple[Tensor, Tensor, Tensor]:
    """renorm 0: softmax, then top-k. renorm 1: top-k of the logits, then softmax over the k."""
    s = x.float().softmax(-1)
    if renorm:
        idx = _first_best(x.float(), k)
        y = x.float().gather(-1, idx).softmax(-1)
    else:
        idx = _first_best(s, k)
        y = s.gather(-1, idx)
    if finished is not None:
        idx = torch.where(finished[..., None], x.shape[-1], idx)
    return y.to(x.dtype), idx.int(), s if output_softmax and not renorm else s.new_empty(0)


# ---- dispatch and combine ----------------------------------------------------------------------------------------------


def init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows ordered by expert (stable); row i*k+j of the gather index says where token i's slot j went."""
    start, end = active_expert_range or (0, expert_num)
    k, total = expert_idx.shape[1], expert_idx.numel()
    flat = expert_idx.reshape(-1).long()
    inside = (flat >= start) & (flat < end)
    order = torch.where(inside, flat, torch.iinfo(torch.int32).max).argsort(stable=True)
    active, rows = int(inside.sum()), total if active_num <= 0 else min(active_num, total)
    taken = min(active, rows)
    source = order[:taken] // k
    expanded, out_scale = _quantised_rows(x, source, rows, scale, flat[order[:taken]] - start, quant_mode)
    index = torch.full((total,), -1, dtype=torch.int32)
    if row_idx_type == 0:
        index[order[:active]] = torch.arange(active, dtype=torch.int32)
    else:
        index[:active] = order[:active].int()
    counts = torch.bincount(flat[inside] - start, minlength=end - start)
    return expanded, index, _tokens_per_expert(counts, start, expert_tokens_num_type, expert_num), out_scale


def _quantised_rows(x: Tensor, source: Tensor, rows: int, scale: Tensor | None, expert: Tensor, quant_mode: int) -> tuple[Tensor, Tensor]:
    if quant_mode == 1:
        values = x[source].float()
        if scale is not None:
            values = values * (scale[expert] if scale.shape[0] > 1 else scale).float()
        q, s = per_row(values)
        expanded, out = torch.zeros(rows, x.shape[1], dtype=torch.int8), undefined(torch.empty(rows))
        expanded[: len(source)], out[: len(source)] = q, s
        return expanded, out
    expanded = undefined(x.new_empty(rows, x.shape[1]))
    expanded[: len(source)] = x[source]
    out = undefined(torch.empty(rows))
    if scale is not None:
        out[: len(source)] = scale[source]
    return expanded, out


def _tokens_per_expert(counts: Tensor, start: int, kind: int, expert_num: int) -> Tensor:
    if kind == 0:
        return counts.cumsum(0)
    if kind == 1:
        return counts
    pairs = torch.zeros(expert_num, 2, dtype=torch.int64)
    found = counts.nonzero().squeeze(-1)
    pairs[: len(found)] = torch.stack([found + start, counts[found]], -1)
    return pairs


def finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """Σ_j scale · (row + bias) + skips, in fp32. Modes 0 and 1 read the index by columns, 2 and 3 by rows."""
    rows, index = expanded_permuted_rows.flatten(0, -2), expanded_src_to_dst_row.reshape(-1).long()
    slots = scales.shape[1] if scales is not None else int(k or 1)
    tokens = index.numel() // slots
    by_slot = index.view(slots, tokens).t() if drop_pad_mode in (0, 1) else index.view(tokens, slots)
    if drop_pad_mode in (0, 2):
        assert bool((by_slot >= 0).all()), "modes 0 and 2 need every row index to be valid"
    picked = rows[by_slot.clamp(min=0)].float()
    if bias is not None and export_for_source_row is not None:
        picked = picked + bias.float()[export_for_source_row.long()]
    if scales is not None:
        picked = picked * scales.float()[..., None]
    out = picked.masked_fill((by_slot < 0)[..., None], 0.0).sum(1)
    for skip in (skip1, skip2):
        if skip is not None:
            out = out + skip.float()
    return out.to(expanded_permuted_rows.dtype)
