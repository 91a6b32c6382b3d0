"""CPU kernels of the npu ops, written from their documented semantics.

They make a lowered graph run, and be compared with eager, on a machine without an NPU. Where the documents leave values undefined the
kernels put NaN, so that nothing can come to rely on them. They say nothing about the device's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_libraries: list[torch.library.Library] = []


def _undefined(t: Tensor) -> Tensor:
    """`t` filled with what no reader may look at."""
    return t.fill_(float("nan") if t.is_floating_point() else 0)


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
    return y.to(x.dtype), idx.int(), s if out_flag else _undefined(torch.empty_like(s))


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


def _quantised_rows(
    x: Tensor, source: Tensor, rows: int, scale: Tensor | None, expert: Tensor, quant_mode: int
) -> tuple[Tensor, Tensor]:
    if quant_mode == 1:
        values = x[source].float()
        if scale is not None:
            values = values * (scale[expert] if scale.shape[0] > 1 else scale).float()
        q, s = _per_row(values)
        expanded, out = torch.zeros(rows, x.shape[1], dtype=torch.int8), _undefined(torch.empty(rows))
        expanded[: len(source)], out[: len(source)] = q, s
        return expanded, out
    expanded = _undefined(x.new_empty(rows, x.shape[1]))
    expanded[: len(source)] = x[source]
    out = _undefined(torch.empty(rows))
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


# ---- experts -----------------------------------------------------------------------------------------------------------


def _counts(group_list: Tensor, kind: int | None) -> list[int]:
    if kind == 0:
        return [int(n) for n in group_list.diff(prepend=group_list.new_zeros(1))]
    if kind == 1:
        return [int(n) for n in group_list]
    raise NotImplementedError("group_list_type 2 is not emitted")


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **unused: Any,
) -> list[Tensor]:
    """Rows of group e times weight[e] (group_type 0), or columns of group e times rows of group e (group_type 2).

    With antiquant the weight is (weight + offset) · scale, in the dtype of the rows.
    """
    assert group_list is not None and len(x) == len(weight) == 1
    (a,), (w,) = x, weight
    counts = _counts(group_list, group_list_type)
    if group_type == 2:
        parts = zip(a.split(counts + [a.shape[1] - sum(counts)], 1), w.split(counts + [w.shape[0] - sum(counts)]))
        return [torch.stack([_product(left, right) for left, right in list(parts)[: len(counts)]]).to(a.dtype)]
    rows, wide = a.shape[0], a.dtype == torch.int8
    out = _undefined(torch.empty(rows, w.shape[2], dtype=torch.int32 if wide else torch.promote_types(a.dtype, torch.float32)))
    start = 0
    for e, n in enumerate(counts):
        m = w[e]
        if antiquant_scale and antiquant_offset:
            m = ((m.float() + antiquant_offset[0][e].float()) * antiquant_scale[0][e].float()).to(a.dtype)
        out[start : start + n] = _product(a[start : start + n], m)
        if bias:
            out[start : start + n] += bias[0][e].to(out.dtype)
        start += n
    return [_scaled(out, scale, per_token_scale, counts, a.dtype, output_dtype)]


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.int8:
        return (a.double() @ b.double()).to(torch.int32)  # sums of products of bytes are exact in a double
    return a.float() @ b.float() if a.dtype != torch.float64 else a @ b


def _scaled(
    out: Tensor, scale: Sequence[Tensor] | None, rows: Sequence[Tensor] | None, counts: list[int], dtype: torch.dtype, wanted: int | None
) -> Tensor:
    target = _DTYPES[wanted] if wanted is not None and wanted >= 0 else dtype
    if dtype == torch.int8 and target == torch.int32:
        return out
    result = out.float() if dtype == torch.int8 else out
    done = sum(counts)
    if scale:
        result[:done] = result[:done] * scale[0].float().repeat_interleave(torch.tensor(counts), 0)
    if rows:
        result[:done] = result[:done] * rows[0].float()[:done, None]
    if dtype == torch.int8:
        result[done:] = float("nan")
    return result.to(target)


_DTYPES = {
    0: torch.uint8, 1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16,
}  # fmt: skip
"""torch's own numbers of dtypes, which is what `output_dtype` takes."""


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    g, u = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(g) * u).to(input.dtype)


def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    g, u = input.float().chunk(2, dim)
    s, d = g.sigmoid(), grad_output.float()
    return torch.cat([d * u * (s + g * s * (1 - s)), d * g * s], dim).to(input.dtype)


def clipped_swiglu(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    wide = x.float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim)
    a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    y = (a * torch.sigmoid(alpha * a) * (b + bias)).to(x.dtype)
    if group_index is not None:
        y[int(group_index.sum()) :] = float("nan")
    return y


# ---- quantisation ------------------------------------------------------------------------------------------------------


def _per_row(values: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by row: scale = max|v| / 127."""
    scale = values.abs().amax(-1) / 127.0
    q = (values / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().clamp(-128, 127)
    return q.to(torch.int8), scale


def dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    values = input.float()
    if smooth_scales is not None and group_index is not None:  # cumulative row counts, unlike elsewhere
        experts = torch.bucketize(torch.arange(values.shape[0]), group_index.long(), right=True).clamp(max=smooth_scales.shape[0] - 1)
        values = values * smooth_scales.float()[experts]
    elif smooth_scales is not None:
        values = values * smooth_scales.float()
    return _per_row(values)


def dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """x · weight_scale[g] · activation_scale, SwiGLU, dynamic int8. The right half is activated unless told otherwise."""
    done = x.shape[0] if group_index is None else int(group_index.sum())
    v = x[:done].float()
    if weight_scale is not None:
        by_row = weight_scale.float() if group_index is None else weight_scale.float().repeat_interleave(group_index, 0)
        v = v * by_row
    if activation_scale is not None:
        v = v * activation_scale.float().reshape(-1, 1)[:done]
    left, right = v.chunk(2, -1)
    if swiglu_mode == 0:
        y = torch.nn.functional.silu(left) * right if activate_left else left * torch.nn.functional.silu(right)
    else:
        a, b = (v[..., 0::2], v[..., 1::2]) if swiglu_mode == 1 else (left, right)
        a, b = a.clamp(max=clamp_limit), b.clamp(-clamp_limit, clamp_limit)
        y = a * torch.sigmoid(glu_alpha * a) * (b + glu_bias)
    if quant_scale is not None:
        many = group_index is not None and quant_scale.ndim == 2 and quant_scale.shape[0] > 1
        y = y * (quant_scale.float().repeat_interleave(group_index, 0) if many else quant_scale.float())
    q, s = _per_row(y)
    out, scale = torch.zeros(x.shape[0], y.shape[1], dtype=torch.int8), _undefined(torch.empty(x.shape[0]))
    out[:done], scale[:done] = q, s
    return out, scale


def swiglu_clip_quant(
    x: Tensor, group_index: Tensor, group_alpha: Tensor, *, activate_left: bool = False, quant_mode: int = 1, clamp_mode: int = 1
) -> tuple[Tensor, Tensor]:
    """SwiGLU; by row, with m = alpha[g] · max|y|: y clipped to ±m, then int8 in steps of m / 127."""
    done = int(group_index.sum())
    left, right = x[:done].float().chunk(2, -1)
    y = torch.nn.functional.silu(left) * right if activate_left else left * torch.nn.functional.silu(right)
    limit = y.abs().amax(-1) * group_alpha.float().repeat_interleave(group_index, 0)
    step = (limit / 127.0).clamp(min=torch.finfo(torch.float32).tiny)
    q = (y.clamp(-limit[:, None], limit[:, None]) / step[:, None]).round().clamp(-128, 127)
    out, scale = torch.zeros(x.shape[0], y.shape[1], dtype=torch.int8), _undefined(torch.empty(x.shape[0]))
    out[:done], scale[:done] = q.to(torch.int8), limit / 127.0
    return out, scale


# ---- training ----------------------------------------------------------------------------------------------------------


def token_permute(tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False) -> tuple[Tensor, Tensor]:
    k = 1 if indices.ndim == 1 else indices.shape[1]
    order = indices.reshape(-1).argsort(stable=True)
    total = order.numel()
    wanted = total if not num_out_tokens else num_out_tokens if num_out_tokens > 0 else total + num_out_tokens
    return tokens[order[:wanted] // k], order.argsort().int()


def token_permute_grad_v2(
    grad_permuted_tokens: Tensor, sorted_indices: Tensor, tokens_size_0: int, tokens_dtype: torch.dtype, num_topK: int,
    padded_mode: bool = False,
) -> Tensor:  # fmt: skip
    picked = grad_permuted_tokens.float()[sorted_indices.long()]
    return picked.view(tokens_size_0, num_topK, -1).sum(1).to(tokens_dtype)


def token_unpermute_pair(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """out[i] = Σ_j probs[i, j] · rows[sorted_indices[i k + j]]; the second result is what the gradient wants to see again."""
    return token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape), permuted_tokens.clone()


def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    rows = permuted_tokens[sorted_indices.long()]
    if probs is None:
        return rows
    out = rows.float().view(*probs.shape, -1) * probs.float()[..., None]
    return out.sum(1).to(permuted_tokens.dtype)


def token_unpermute_grad_v2(
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
    permuted_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad, index = grad_unpermuted_tokens.float(), sorted_indices.long()
    out = torch.zeros(permuted_tokens_size_0, grad.shape[-1])
    if probs is None:
        return out.index_copy(0, index, grad).to(permuted_tokens_dtype), torch.empty(0)
    by_slot = (grad[:, None] * probs.float()[..., None]).flatten(0, 1)
    assert permuted_tokens is not None
    d_probs = (permuted_tokens.float()[index].view(*probs.shape, -1) * grad[:, None]).sum(-1)
    return out.index_copy(0, index, by_slot).to(permuted_tokens_dtype), d_probs.to(probs.dtype)


KERNELS: dict[str, Callable[..., Any]] = {
    "npu_moe_gating_top_k": gating_top_k,
    "npu_moe_gating_top_k_softmax": gating_top_k_softmax,
    "npu_moe_gating_top_k_softmax_v2": gating_top_k_softmax_v2,
    "npu_moe_init_routing_v2": init_routing_v2,
    "npu_grouped_matmul": grouped_matmul,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
    "npu_clipped_swiglu": clipped_swiglu,
    "npu_moe_finalize_routing": finalize_routing,
    "npu_moe_token_permute": token_permute,
    "npu_moe_token_permute_grad_v2": token_permute_grad_v2,
    "npu_moe_token_unpermute": token_unpermute,
    "_npu_moe_token_unpermute": token_unpermute_pair,
    "npu_moe_token_unpermute_grad_v2": token_unpermute_grad_v2,
    "npu_dynamic_quant": dynamic_quant,
    "npu_dequant_swiglu_quant": dequant_swiglu_quant,
}


def register_streams(space: str) -> None:
    """Stream scopes and events mean nothing on one stream; graphs keep them because they have effects."""
    lib = torch.library.Library(space, "IMPL")
    for name in ("scope_enter", "scope_exit", "tagged_event_record", "tagged_event_wait"):
        lib.impl(name, lambda *args, **kwargs: None, "CompositeExplicitAutograd")
        torch.fx.node.has_side_effect(getattr(getattr(torch.ops, space), name).default)
    lib.impl("wait_tensor", lambda self, dependency: self.clone(), "CompositeExplicitAutograd")
    _libraries.append(lib)


def register_custom() -> None:
    """Define the ops of other packages, with CPU kernels and shapes: for machines that have none of them."""
    from . import metas, schemas

    lib = torch.library.Library("custom", "FRAGMENT")
    for name, schema in schemas.CUSTOM.items():
        if not hasattr(torch.ops.custom, name):
            lib.define(schema)
            lib.impl(name, CUSTOM_KERNELS[name], "CPU")
            torch.library.register_fake(f"custom::{name}", metas.METAS[name], lib=lib)
    _libraries.append(lib)


CUSTOM_KERNELS: dict[str, Callable[..., Any]] = {"npu_swiglu_clip_quant": swiglu_clip_quant}


def register(own: bool) -> None:
    """Put the kernels on the CPU key; with `own` definitions the shapes and gradients too."""
    lib = torch.library.Library("npu", "IMPL")
    for name, kernel in KERNELS.items():
        # torch_npu decomposes npu_moe_token_unpermute by itself; every other op has one kernel a device
        lib.impl(name, kernel, "CPU")
    _libraries.append(lib)
    if own:
        from . import metas

        metas.register()
