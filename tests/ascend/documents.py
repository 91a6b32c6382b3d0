"""The npu ops a second time, number by number in Python, from the documents that come with torch_npu (`torch_npu._op_plugin_docs`).

No line is shared with `lowering/ascend/emulate*`: lists of Python floats, loops over tokens, slots and channels, no tensor arithmetic.
Where the documents leave a value open it is NaN. Where they say less than this, the sentence is marked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

Row = list[float]
NAN = float("nan")


def _tensor(values: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    return torch.tensor(values, dtype=wide).reshape(shape).to(dtype)


def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def _softmax(row: Row) -> Row:
    top = max(row)
    parts = [math.exp(v - top) for v in row]
    return [p / sum(parts) for p in parts]


def _best(row: Row, k: int) -> list[int]:
    """The k largest, the largest first; of equals the lower index first (not said by the documents: the sorts are stable)."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


# ---- gating ----------------------------------------------------------------------------------------------------------------


def gating_top_k(
    x: Tensor, k: int, *, bias: Tensor | None = None, k_group: int = 1, group_count: int = 1, group_select_mode: int = 0, renorm: int = 0,
    norm_type: int = 0, out_flag: bool = False, routed_scaling_factor: float = 1.0, eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """norm, then groups and top-k of norm + bias; weights are the norm's, after a sigmoid divided by their sum + eps, times the factor."""
    assert renorm == 0
    t, e = x.shape
    ys, ids, norms = [], [], []
    for row in x.float().tolist():
        norm = [_sigmoid(v) for v in row] if norm_type == 1 else _softmax(row)
        chosen = norm if bias is None else [v + b for v, b in zip(norm, bias.float().tolist())]
        if group_count > 1:
            size = e // group_count
            groups = [chosen[g * size : (g + 1) * size] for g in range(group_count)]
            scores = [max(g) if group_select_mode == 0 else sum(sorted(g)[-2:]) for g in groups]
            kept = _best(scores, k_group)
            chosen = [v if i // size in kept else -math.inf for i, v in enumerate(chosen)]
        best = _best(chosen, k)
        y = [norm[i] for i in best]
        total = sum(y) + eps
        ys.append([v / (total if norm_type == 1 else 1.0) * routed_scaling_factor for v in y])
        ids.append(best)
        norms.append(norm if out_flag else [NAN] * e)
    return _tensor(ys, x.dtype, (t, k)), _tensor(ids, torch.int32, (t, k)), _tensor(norms, torch.float32, (t, e))


def gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax, then top-k. row_idx: rows are numbered slot by slot (column by column)."""
    assert finished is None
    t = x.shape[0]
    norms = [_softmax(row) for row in x.float().tolist()]
    ids = [_best(row, k) for row in norms]
    ys = [[row[i] for i in best] for row, best in zip(norms, ids)]
    rows = [[j * t + i for j in range(k)] for i in range(t)]
    return _tensor(ys, x.dtype, (t, k)), _tensor(ids, torch.int32, (t, k)), _tensor(rows, torch.int32, (t, k))


def gating_top_k_softmax_v2(
    x: Tensor, *, k: int = 1, finished: Tensor | None = None, renorm: int = 0, output_softmax: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """renorm 0: softmax, then top-k. 1: top-k, then softmax."""
    assert finished is None and not output_softmax
    if not renorm:
        return (*gating_top_k_softmax(x, None, k)[:2], torch.empty(0))
    found = [(best, _softmax([row[i] for i in best])) for row in x.float().tolist() for best in [_best(row, k)]]
    shape = (x.shape[0], k)
    return _tensor([y for _, y in found], x.dtype, shape), _tensor([b for b, _ in found], torch.int32, shape), torch.empty(0)


# ---- dispatch and combine ----------------------------------------------------------------------------------------------------


def _rounded(row: Row) -> tuple[list[int], float]:
    """scale = max|row| / 127, y = round(row / scale); half to even (not said)."""
    scale = max(map(abs, row)) / 127
    return [round(v / scale) if scale else 0 for v in row], scale


def init_routing_v2(
    x: Tensor, expert_idx: Tensor, *, scale: Tensor | None = None, active_num: int = -1, expert_num: int = -1, drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0, expert_tokens_num_flag: bool = False, quant_mode: int = -1, active_expert_range: Any = (),
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Slots sorted by expert, those outside the range left out; where each slot went (-1: nowhere); how many each expert has."""
    assert active_num == -1 and drop_pad_mode == 0 and expert_tokens_num_type == 1 and expert_tokens_num_flag
    assert scale is None or quant_mode == 1 and scale.dtype == torch.float32 and scale.shape == (expert_num, x.shape[1])
    (t, h), k, (first, last) = x.shape, expert_idx.shape[1], active_expert_range
    slots = [(e, i, j) for i, row in enumerate(expert_idx.tolist()) for j, e in enumerate(row) if first <= e < last]
    slots.sort()  # by expert, then token, then slot
    rows = x.float().tolist()
    expanded, scales, where = [[NAN] * h for _ in range(t * k)], [NAN] * (t * k), [-1] * (t * k)
    for place, (e, i, j) in enumerate(slots):
        expanded[place] = rows[i] if scale is None else [v * k for v, k in zip(rows[i], scale[e - first].tolist(), strict=True)]
        if quant_mode == 1:
            expanded[place], scales[place] = _rounded(expanded[place])  # type: ignore[call-overload]
        if row_idx_type == 0:
            where[i * k + j] = place
        else:
            where[place] = i * k + j
    counts = [sum(e == n for e, _, _ in slots) for n in range(first, last)]
    dtype = torch.int8 if quant_mode == 1 else x.dtype
    clean = [[0.0 if dtype == torch.int8 and v != v else v for v in row] for row in expanded]
    return (
        _tensor(clean, dtype, (t * k, h)), _tensor(where, torch.int32, (t * k,)), _tensor(counts, torch.int64, (last - first,)),
        _tensor(scales, torch.float32, (t * k,)),
    )  # fmt: skip


def finalize_routing(
    rows: Tensor, skip1: Tensor | None, skip2: Tensor | None, bias: Tensor | None, scales: Tensor, index: Tensor, experts: Tensor | None,
    drop_pad_mode: int = 0, k: int = 1,
) -> Tensor:  # fmt: skip
    """out(i) = skip1 + skip2 + Σ_k scales(i, k) · row(index(i + k · rows)); in drop_pad_mode 2 index(i · K + k) (CANN's page)."""
    assert bias is None and experts is None and drop_pad_mode in (0, 2)
    t, slots = scales.shape
    values, places, w = rows.float().tolist(), index.tolist(), scales.float().tolist()
    out = []
    for i in range(t):
        total = [0.0] * rows.shape[1]
        for j in range(slots):
            place = places[i + j * t] if drop_pad_mode == 0 else places[i * slots + j]
            assert 0 <= place < len(values)
            total = [a + w[i][j] * v for a, v in zip(total, values[place])]
        for skip in (skip1, skip2):
            if skip is not None:
                total = [a + b for a, b in zip(total, skip[i].float().tolist())]
        out.append(total)
    return _tensor(out, rows.dtype, (t, rows.shape[1]))


def token_unpermute(rows: Tensor, index: Tensor, probs: Tensor | None = None) -> Tensor:
    """The rows at sorted_indices times probs, summed."""
    assert probs is not None
    return finalize_routing(rows, None, None, None, probs, index, None, 2)


# ---- products ----------------------------------------------------------------------------------------------------------------


def _experts_of(group_list: Tensor, kind: int) -> list[int]:
    """The expert of each row: type 0 is a running sum, type 1 counts."""
    numbers = group_list.tolist()
    counts = numbers if kind == 1 else [b - a for a, b in zip([0, *numbers], numbers)]
    return [e for e, n in enumerate(counts) for _ in range(n)]


def _int4(words: Tensor) -> list[Any]:
    """Eight whole numbers of 4 bits in each int32, the first in the lowest bits (not said: CANN's int4 puts the first lower)."""
    e, k, n = words.shape
    flat = [((w >> (4 * i) & 15) ^ 8) - 8 for w in words.flatten().tolist() for i in range(8)]
    return torch.tensor(flat).reshape(e, k, n * 8).tolist()  # type: ignore[no-any-return]


def grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, bias: Any = None, scale: Any = None, antiquant_scale: Any = None,
    antiquant_offset: Any = None, per_token_scale: Any = None, group_list: Tensor, split_item: int = 0, group_type: int = 0,
    group_list_type: int = 0, output_dtype: int | None = None, tuning_config: Any = None,
) -> list[Tensor]:  # fmt: skip
    """y = x (weight + antiquant_offset) · antiquant_scale + bias; of bytes y = x weight · scale · per_token_scale."""
    assert split_item == 3 and group_type == 0 and (not scale or not bias)
    a, w = x[0], weight[0]
    given = _int4(w) if w.dtype == torch.int32 else w.double().tolist()
    k, n = len(given[0]), len(given[0][0])
    rows, owners, out = a.double().tolist(), _experts_of(group_list, group_list_type), []
    for m, e in enumerate(owners):
        line = []
        for c in range(n):
            column = [given[e][i][c] for i in range(k)]
            if antiquant_scale:
                s, o = antiquant_scale[0], antiquant_offset[0]
                places = [(e, c)] * k if s.ndim == 2 else [(e, i // (k // s.shape[1]), c) for i in range(k)]
                # in the rows' dtype (not said: the kernel's matrix unit takes nothing else)
                column = [float(torch.tensor((v + float(o[p])) * float(s[p])).to(a.dtype)) for v, p in zip(column, places)]
            y = math.fsum(u * v for u, v in zip(rows[m], column))
            y = y * float(scale[0][e, c]) if scale else y
            y = y * float(per_token_scale[0][m]) if per_token_scale else y
            line.append(y + (float(bias[0][e, c]) if bias else 0.0))
        out.append(line)
    out += [[0.0 if output_dtype == 3 else NAN] * n for _ in range(len(rows) - len(out))]
    dtype = {None: a.dtype, 3: torch.int32, 5: torch.float16, 15: torch.bfloat16}[output_dtype]
    return [_tensor(out, dtype, (len(rows), n))]


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """A sigmoid(A) B of the halves A and B."""
    half = x.shape[-1] // 2
    out = [[v * _sigmoid(v) * row[half + i] for i, v in enumerate(row[:half])] for row in x.float().tolist()]
    return _tensor(out, x.dtype, (x.shape[0], half))


def clipped_swiglu(
    x: Tensor, *, dim: int = -1, alpha: float = 1.702, limit: float = 7.0, bias: float = 1.0, interleaved: bool = True
) -> Tensor:
    """A <= limit, |B| <= limit: A sigmoid(alpha A) (B + bias); A and B are every other column, or halves."""
    half, out = x.shape[-1] // 2, []
    for row in x.float().tolist():
        a, b = (row[::2], row[1::2]) if interleaved else (row[:half], row[half:])
        pairs = [(min(u, limit), max(-limit, min(v, limit))) for u, v in zip(a, b)]
        out.append([u * _sigmoid(alpha * u) * (v + bias) for u, v in pairs])
    return _tensor(out, x.dtype, (x.shape[0], half))


# ---- quantisation --------------------------------------------------------------------------------------------------------------


def _quantised(rows: list[Row], total: int, width: int) -> tuple[Tensor, Tensor]:
    found = [_rounded(row) for row in rows]
    q = [q for q, _ in found] + [[0] * width for _ in range(total - len(rows))]
    return _tensor(q, torch.int8, (total, width)), _tensor([s for _, s in found] + [NAN] * (total - len(rows)), torch.float32, (total,))


def dynamic_quant(x: Tensor, *, smooth_scales: Tensor | None = None, group_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """smooth_scales[0] is for rows [0, group_index[0]), smooth_scales[i] for [group_index[i - 1], group_index[i]), all in x's type."""
    rows = x.float().tolist()
    if smooth_scales is not None and group_index is not None:
        assert smooth_scales.dtype == x.dtype and group_index.dtype == torch.int32 and int(group_index[-1]) == x.shape[0]
        ends = group_index.tolist()
        groups = [next(g for g, end in enumerate(ends) if m < end) for m in range(x.shape[0])]
        rows = [[v * k for v, k in zip(row, smooth_scales[g].float().tolist(), strict=True)] for g, row in zip(groups, rows, strict=True)]
    return _quantised(rows, *x.shape)


def dequant_swiglu_quant(
    x: Tensor, *, weight_scale: Tensor, activation_scale: Tensor, group_index: Tensor, activate_left: bool = False, quant_mode: int = 0,
    quant_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x · weight_scale · activation_scale, swish of the left half (or the right one) times the other, smoothed, quantised by row."""
    assert quant_mode == 1
    half, out = x.shape[1] // 2, []
    for m, e in enumerate(_experts_of(group_index, 1)):
        v = [n * float(weight_scale[e, c]) * float(activation_scale[m]) for c, n in enumerate(x[m].tolist())]
        left, right = (v[:half], v[half:]) if activate_left else (v[half:], v[:half])
        smooth = [1.0] * half if quant_scale is None else quant_scale[e].float().tolist()
        out.append([a * _sigmoid(a) * b * k for a, b, k in zip(left, right, smooth, strict=True)])
    return _quantised(out, x.shape[0], half)


def grouped_matmul_swiglu_quant_v2(
    x: Tensor, weight: list[Tensor], weight_scale: list[Tensor], x_scale: Tensor, group_list: Tensor, *, group_list_type: int = 0,
    dequant_mode: int = 0, dequant_dtype: int = 6, quant_mode: int = 0, quant_dtype: int = 0, tuning_config: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The three in one: product of bytes, SwiGLU of the scaled sums (the left half activated), quantised by row."""
    sums = grouped_matmul([x], weight, group_list=group_list, split_item=3, group_list_type=group_list_type, output_dtype=3)[0]
    owners = _experts_of(group_list, group_list_type)
    counts = torch.tensor([owners.count(e) for e in range(weight[0].shape[0])])
    return dequant_swiglu_quant(
        sums, weight_scale=weight_scale[0], activation_scale=x_scale, group_index=counts, activate_left=True, quant_mode=1
    )


def update_expert(
    expert_ids: Tensor, eplb_table: Tensor, *, local_rank_id: int = -1, world_size: int = -1, balance_mode: int = 0
) -> tuple[Tensor, Tensor]:
    """Row e of the table: in how many places expert e is, then the places. Ranks (mode 0) or tokens (mode 1) share them out."""
    out = []
    for t, row in enumerate(expert_ids.tolist()):
        entries = [eplb_table[e].tolist() for e in row]
        turns = [local_rank_id // math.ceil(world_size / e[0]) if balance_mode == 0 else t % e[0] for e in entries]
        out.append([e[turn + 1] for e, turn in zip(entries, turns)])
    return _tensor(out, expert_ids.dtype, expert_ids.shape), torch.zeros(expert_ids.shape, dtype=torch.bool)


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
