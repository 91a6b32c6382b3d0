"""A second emulation of the npu ops that inference uses, written from their documents alone, number by number.

A page of the form npu_* is the op's text in torch_npu's own documentation, one of the form aclnn* is CANN's. Values that the pages
leave open are NaN, or -1 where there is no NaN. Precision inside an op is open as well: everything is Python's double, rounded once
into the result, except where a page names a float32 result on the way. Here: gating, tokens to experts and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from documents_products import (
    NAN,
    Row,
    clipped_swiglu,
    dequant_swiglu_quant,
    dynamic_quant,
    grouped_matmul,
    grouped_matmul_swiglu_quant_v2,
    in_bytes,
    made,
    sigmoid,
    single,
    swiglu,
)
from torch import Tensor

# ---- gating ------------------------------------------------------------------------------------------------------------------


def softmax(row: Row) -> Row:
    """e^v over the sum of them all."""
    powers = [math.exp(v - max(row)) for v in row]
    return [p / sum(powers) for p in powers]


def best(scores: Row, k: int) -> list[int]:
    """Places of the k highest, highest first; no page says who wins a tie, and this assumes the lower place."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def in_groups(scores: Row, count: int, keep: int, mode: int) -> Row:
    """Scores outside of the `keep` best groups become -inf; a group counts as its highest (0) or its two highest's sum (1)."""
    size = len(scores) // count
    parts = [scores[g * size : (g + 1) * size] for g in range(count)]
    kept = best([max(p) if mode == 0 else sum(sorted(p)[-2:]) for p in parts], keep)
    return [s if i // size in kept else -math.inf for i, s in enumerate(scores)]


def gating_top_k(
    x: Tensor, k: int, *, bias: Tensor | None = None, k_group: int = 1, group_count: int = 1, group_select_mode: int = 0,
    renorm: int = 0, norm_type: int = 0, out_flag: bool = False, routed_scaling_factor: float = 1.0, eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Top k of norm(x) + bias within groups; y = norm[ids] (sigmoid: / (sum + eps)) * factor: aclnnMoeGatingTopK."""
    assert renorm == 0, "the page takes 0 only"
    y, ids, norms = [], [], []
    added = [0.0] * x.shape[1] if bias is None else bias.tolist()
    for row in x.detach().tolist():
        # The page gives the norm's result as float32; that the sum with the bias is float32 too is assumed.
        norm = [single(v) for v in (softmax(row) if norm_type == 0 else [sigmoid(v) for v in row])]
        scores = [single(v + b) for v, b in zip(norm, added, strict=True)]
        if group_count > 1:
            scores = in_groups(scores, group_count, k_group, group_select_mode)
        chosen = best(scores, k)
        taken = [norm[i] for i in chosen]
        # The page sums "normOut" here; that it means the chosen ones is assumed from the result's shape.
        total = sum(taken) + eps if norm_type == 1 else 1.0
        y.append([v / total * routed_scaling_factor for v in taken])
        ids.append(chosen)
        # Without the flag "the output is empty", yet it has the shape of x.
        norms.append(norm if out_flag else [NAN] * len(row))
    t = len(y)
    return made(y, x.dtype, t, k), made(ids, torch.int32, t, k), made(norms, torch.float32, t, x.shape[1])


def softmax_top_k(x: Tensor, finished: Tensor | None, k: int, before: bool) -> tuple[Tensor, Tensor, list[Row]]:
    """Softmax, then its k highest, or the k highest and softmax of them; a finished row's ids are all the number of experts."""
    y, ids, all_scores, experts = [], [], [], x.shape[-1]
    done = [False] * (x.numel() // experts) if finished is None else finished.flatten().tolist()
    for row, over in zip(x.detach().reshape(-1, experts).tolist(), done, strict=True):
        scores = [single(v) for v in softmax(row)] if before else row
        chosen = best(scores, k)
        taken = [scores[i] for i in chosen]
        # What stands in y of a finished row is not said; this assumes that only ids change.
        y.append(taken if before else softmax(taken))
        ids.append([experts] * k if over else chosen)
        all_scores.append(scores)
    shape = (*x.shape[:-1], k)
    return made(y, x.dtype, *shape), made(ids, torch.int32, *shape), all_scores


def gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """y, ids = topK(softmax(x)), row_idx = arange(T K).reshape(K, T).transpose: aclnnMoeGatingTopKSoftmax."""
    y, ids, _ = softmax_top_k(x, finished, k, True)
    tokens = y.numel() // k  # The page speaks of two axes; of three the first two are assumed to be one.
    return y, ids, made([[j * tokens + i for j in range(k)] for i in range(tokens)], torch.int32, *y.shape)


def gating_top_k_softmax_v2(
    x: Tensor, *, k: int = 1, finished: Tensor | None = None, renorm: int = 0, output_softmax: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """topK(softmax(x)) for renorm 0, softmax(topK(x)) for 1, and all of softmax(x) when asked with 0: aclnnMoeGatingTopKSoftmaxV2."""
    y, ids, scores = softmax_top_k(x, finished, k, renorm == 0)
    if renorm == 0 and output_softmax:
        return y, ids, made(scores, torch.float32, *x.shape)
    return y, ids, made([], torch.float32, 0)  # "Not output"; the shape is that of torch_npu's meta function.


# ---- tokens to experts and back ----------------------------------------------------------------------------------------------


def init_routing_v2(
    x: Tensor, expert_idx: Tensor, *, scale: Tensor | None = None, active_num: int = -1, expert_num: int = -1, drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0, expert_tokens_num_flag: bool = False, quant_mode: int = -1, active_expert_range: Any = (),
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Slots of active experts sorted by expert; expanded_x[i] = x[slot_i // K], in bytes for mode 1: aclnnMoeInitRoutingV3."""
    assert drop_pad_mode == 0 and quant_mode in (-1, 1), "other modes are not for these devices, or not written here"
    first, end = active_expert_range or (0, expert_num)  # Without a range it is all: the counts' shape in torch_npu's meta function.
    flat, rows, k = expert_idx.flatten().tolist(), x.detach().tolist(), expert_idx.shape[1]
    # The page says "sort" only; that slots of one expert stay in their order is assumed.
    order = sorted((s for s, e in enumerate(flat) if first <= e < end), key=lambda s: flat[s])
    smooth = scale.tolist() if scale is not None else None
    expanded: list[Any] = []
    scales: Row = []
    for s in order:
        row, size = rows[s // k], NAN if smooth is None or quant_mode == 1 else smooth[s // k]
        if quant_mode == 1:
            # The page divides x, not x * scale, by max|x * scale| / 127; as in aclnnDynamicQuant the product is assumed to be meant.
            # One row of scales stands for all experts: the shape is torch_npu's, not the page's.
            factors = [1.0] * len(row) if smooth is None else smooth[flat[s] - first if len(smooth) > 1 else 0]
            row, size = in_bytes([v * f for v, f in zip(row, factors, strict=True)])
        expanded.append(row)
        scales.append(size)
    height = len(flat) if active_num <= 0 else min(active_num, len(flat))
    dtype = torch.int8 if quant_mode == 1 else x.dtype
    expanded += [[NAN if dtype.is_floating_point else -1] * x.shape[1]] * len(flat)
    counts = tokens_of(flat, first, end, expert_num, expert_tokens_num_type) if expert_tokens_num_flag else made(-1, torch.int64)
    at = {s: i for i, s in enumerate(order)}
    places = order + [-1] * len(flat) if row_idx_type == 1 else [at.get(s, -1) for s in range(len(flat))]
    out = made(expanded[:height], dtype, height, x.shape[1])
    scales = (scales + [NAN] * len(flat))[:height]
    return out, made(places[: len(flat)], torch.int32, len(flat)), counts, made(scales, torch.float32, height)


def tokens_of(flat: Sequence[int], first: int, end: int, experts: int, kind: int) -> Tensor:
    """Slots of each active expert: sums so far (0), counts (1), or pairs of an expert and its count closed by (0, 0) (2)."""
    counts = [sum(e == i for e in flat) for i in range(first, end)]
    if kind == 2:
        pairs = [[first + i, n] for i, n in enumerate(counts) if n] + [[0, 0]] + [[-1, -1]] * experts
        return made(pairs[:experts], torch.int64, experts, 2)
    return made([sum(counts[: i + 1]) for i in range(len(counts))] if kind == 0 else counts, torch.int64, end - first)


def finalize_routing(
    rows: Tensor, skip1: Tensor | None, skip2: Tensor | None, bias: Tensor | None, scales: Tensor, index: Tensor,
    experts: Tensor | None, drop_pad_mode: int = 0, k: int = 1,
) -> Tensor:  # fmt: skip
    """out_i = skip1_i + skip2_i + sum_k scales_ik (rows[place_ik] + bias[expert_ik]): aclnnMoeFinalizeRoutingV2.

    Place ik is index[i + k T] in modes 0 and 1 and index[i K + k] in 2 and 3. In 1 and 3 the place -1 is a dropped slot, which is
    assumed to add nothing, its bias neither; in 0 and 2 such a place is outside of the range that the page names, so it is open.
    """
    width, places = rows.shape[-1], index.tolist()
    k = k if scales is None else scales.shape[1]
    tokens = len(places) // k
    listed, given = rows.detach().reshape(-1, width).tolist(), None if scales is None else scales.detach().tolist()
    skips = [s.detach().tolist() for s in (skip1, skip2) if s is not None]
    out = []
    for i in range(tokens):
        total = [sum(s[i][h] for s in skips) for h in range(width)]
        for j in range(k):
            place = places[i + j * tokens] if drop_pad_mode < 2 else places[i * k + j]
            if place == -1 and drop_pad_mode in (1, 3):
                continue
            row = listed[place] if 0 <= place < len(listed) else [NAN] * width
            added = [0.0] * width if bias is None or experts is None else bias[experts[i, j]].tolist()
            weight = 1.0 if given is None else given[i][j]
            total = [t + weight * (v + b) for t, v, b in zip(total, row, added, strict=True)]
        out.append(total)
    return made(out, rows.dtype, tokens, width)


def token_unpermute(rows: Tensor, index: Tensor, probs: Tensor | None = None) -> Tensor:
    """out_i = sum_j probs_ij rows[index[i K + j]], K = 1 and weight 1 without probs: aclnnMoeTokenUnpermute."""
    k = 1 if probs is None else probs.shape[1]
    places, listed, width = index.tolist(), rows.detach().tolist(), rows.shape[1]
    weights = [[1.0]] * len(places) if probs is None else probs.detach().tolist()
    out = []
    for i in range(len(places) // k):
        total = [0.0] * width
        for j in range(k):
            place = places[i * k + j]
            row = listed[place] if 0 <= place < len(listed) else [NAN] * width
            total = [t + weights[i][j] * v for t, v in zip(total, row, strict=True)]
        out.append(total)
    return made(out, rows.dtype, len(out), width)


def update_expert(
    expert_ids: Tensor, eplb_table: Tensor, *, local_rank_id: int = -1, world_size: int = -1, balance_mode: int = 0
) -> tuple[Tensor, Tensor]:
    """table[id][rank // ceil(world / count) + 1] for mode 0, table[id][token % count + 1] for 1: the example of npu_moe_update_expert."""
    table, out = eplb_table.tolist(), []
    for i, ids in enumerate(expert_ids.tolist()):
        turns = [local_rank_id // -(-world_size // table[e][0]) if balance_mode == 0 else i % table[e][0] for e in ids]
        out.append([table[e][turn + 1] for e, turn in zip(ids, turns, strict=True)])
    # The second result "is valid" with scales and a threshold only. A bool cannot be open: it is False, which no one could use by mistake.
    mask = [[False] * len(ids) for ids in out]
    return made(out, expert_ids.dtype, *expert_ids.shape), made(mask, torch.bool, *expert_ids.shape)


OPS: dict[str, Callable[..., Any]] = {
    "npu_moe_gating_top_k": gating_top_k,
    "npu_moe_gating_top_k_softmax": gating_top_k_softmax,
    "npu_moe_gating_top_k_softmax_v2": gating_top_k_softmax_v2,
    "npu_moe_init_routing_v2": init_routing_v2,
    "npu_moe_finalize_routing": finalize_routing,
    "npu_moe_token_unpermute": token_unpermute,
    "npu_grouped_matmul": grouped_matmul,
    "npu_swiglu": swiglu,
    "npu_clipped_swiglu": clipped_swiglu,
    "npu_dynamic_quant": dynamic_quant,
    "npu_dequant_swiglu_quant": dequant_swiglu_quant,
    "npu_grouped_matmul_swiglu_quant_v2": grouped_matmul_swiglu_quant_v2,
    "npu_moe_update_expert": update_expert,
}


class Interpreter(fx.Interpreter):
    """Runs a lowered graph with these in the ops' place; `called` says which."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.called: list[str] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(target).removeprefix("npu.").removesuffix(".default")
        if str(target).startswith("npu."):
            self.called.append(name)
            return OPS[name](*args, **kwargs)
        return super().call_function(target, args, kwargs)
