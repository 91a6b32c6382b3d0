"""Shapes, dtypes and gradients of the npu ops where torch_npu's own are not there; compared with those in tests/ascend/test_wheel.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .emulate_exchange import INFO
from .rules import columns
from .schemas import CUSTOM, DTYPES


def gating_top_k(x: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    t, e = x.shape
    return x.new_empty(t, k), x.new_empty(t, k, dtype=torch.int32), x.new_empty(t, e, dtype=torch.float32)


def gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    lead = x.shape[:-1]
    return x.new_empty(*lead, k), x.new_empty(*lead, k, dtype=torch.int32), x.new_empty(*lead, k, dtype=torch.int32)


def gating_top_k_softmax_v2(
    x: Tensor, *, k: int = 1, finished: Tensor | None = None, renorm: int | None = 0, output_softmax: bool | None = False
) -> tuple[Tensor, Tensor, Tensor]:
    lead = x.shape[:-1]
    probabilities = x.shape if output_softmax and not renorm else (0,)
    return x.new_empty(*lead, k), x.new_empty(*lead, k, dtype=torch.int32), x.new_empty(probabilities, dtype=torch.float32)


def init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = expert_idx.shape[0] * expert_idx.shape[1]
    rows = total if active_num <= 0 else min(active_num, total)
    start, end = active_expert_range or (0, expert_num)
    counts = (expert_num, 2) if expert_tokens_num_type == 2 else (end - start,)
    expanded = x.new_empty(rows, x.shape[1], dtype=torch.int8 if quant_mode == 1 else x.dtype)
    index = x.new_empty(total, dtype=torch.int32)
    return expanded, index, x.new_empty(counts, dtype=torch.int64), x.new_empty(rows, dtype=torch.float32)


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor | None = None,
    group_type: int | None = None,
    output_dtype: int | None = None,
    **_: Any,
) -> list[Tensor]:
    (a,), (w,) = x, weight
    dtype = DTYPES[output_dtype] if output_dtype is not None and output_dtype >= 0 else a.dtype
    if group_type == 2:
        assert group_list is not None
        return [a.new_empty(group_list.shape[0], a.shape[0], w.shape[1], dtype=dtype)]
    return [a.new_empty(a.shape[0], columns(w), dtype=dtype)]


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    shape = list(input.shape)
    shape[dim] = shape[dim] // 2
    return input.new_empty(shape)


def clipped_swiglu(x: Tensor, *, dim: int = -1, **_: Any) -> Tensor:
    return swiglu(x, dim)


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
    tokens = scales.shape[0] if scales is not None else expanded_src_to_dst_row.shape[0] // int(k or 1)
    return expanded_permuted_rows.new_empty(tokens, expanded_permuted_rows.shape[-1])


def dynamic_quant(input: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input, dtype=torch.int8), input.new_empty(input.shape[:-1], dtype=torch.float32)


def dequant_swiglu_quant(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], x.shape[1] // 2, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def grouped_matmul_swiglu_quant_v2(x: Tensor, weight: Sequence[Tensor], *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight[0].shape[2] // 2, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def swiglu_clip_quant(x: Tensor, group_index: Tensor, group_alpha: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return dequant_swiglu_quant(x)  # type: ignore[no-any-return]


def token_permute(tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False) -> tuple[Tensor, Tensor]:
    total = indices.numel()
    rows = total if not num_out_tokens else num_out_tokens if num_out_tokens > 0 else total + num_out_tokens
    return tokens.new_empty(rows, tokens.shape[1]), tokens.new_empty(total, dtype=torch.int32)


def token_permute_grad_v2(
    grad: Tensor, sorted_indices: Tensor, tokens_size_0: int, tokens_dtype: torch.dtype, num_topK: int, padded_mode: bool = False
) -> Tensor:
    return grad.new_empty(tokens_size_0, grad.shape[1], dtype=tokens_dtype)


def token_unpermute(
    rows: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False, restore_shape: Any = None
) -> Tensor:
    return rows.new_empty(sorted_indices.shape[0] if probs is None else probs.shape[0], rows.shape[1])


def token_unpermute_pair(
    rows: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False, restore_shape: Any = None
) -> tuple[Tensor, Tensor]:
    return token_unpermute(rows, sorted_indices, probs), torch.empty_like(rows)


def token_unpermute_grad_v2(
    grad: Tensor, sorted_indices: Tensor, rows: int, dtype: torch.dtype, probs: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(rows, grad.shape[1], dtype=dtype), grad.new_empty(0) if probs is None else torch.empty_like(probs)


def dispatch(
    x: Tensor, ids: Tensor, group: str, world: int, rank: int, experts: int, *, expert_scales: Tensor | None = None, quant_mode: int = 0,
    global_bs: int = 0, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """An A2 gets `expert_scales`, and tells of the exchange between its nodes."""
    (tokens, hidden), local, k = x.shape, experts // world, ids.shape[1]
    total = global_bs or tokens * world
    rows = total * min(local, k)
    received = world * local + (0 if expert_scales is None else total * 2 * k * (world // 8))
    info, counts, none = (x.new_empty(n, dtype=torch.int32) for n in (rows * INFO, received, 0))
    scales, weights = (x.new_empty(n, dtype=torch.float32) for n in (rows, 0 if expert_scales is None else rows))
    expanded = x.new_empty(rows, hidden, dtype=torch.int8 if quant_mode else x.dtype)
    return expanded, scales, info, x.new_empty(local, dtype=torch.int64), counts, none, weights


def combine(expand_x: Tensor, expert_ids: Tensor, *_: Any, **__: Any) -> Tensor:
    return expand_x.new_empty(expert_ids.shape[0], expand_x.shape[1])


def update_expert(expert_ids: Tensor, eplb_table: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(expert_ids), torch.empty_like(expert_ids, dtype=torch.bool)


METAS: dict[str, Callable[..., Any]] = {
    "npu_moe_gating_top_k": gating_top_k,
    "npu_moe_gating_top_k_softmax": gating_top_k_softmax,
    "npu_moe_gating_top_k_softmax_v2": gating_top_k_softmax_v2,
    "npu_moe_init_routing_v2": init_routing_v2,
    "npu_grouped_matmul": grouped_matmul,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": lambda grad_output, input, dim=-1: torch.empty_like(input),
    "npu_clipped_swiglu": clipped_swiglu,
    "npu_moe_finalize_routing": finalize_routing,
    "npu_moe_distribute_dispatch_v2": dispatch,
    "npu_moe_distribute_combine_v2": combine,
    "npu_moe_update_expert": update_expert,
    "npu_moe_token_permute": token_permute,
    "npu_moe_token_permute_grad_v2": token_permute_grad_v2,
    "npu_moe_token_unpermute": token_unpermute,
    "_npu_moe_token_unpermute": token_unpermute_pair,
    "npu_moe_token_unpermute_grad_v2": token_unpermute_grad_v2,
    "npu_dynamic_quant": dynamic_quant,
    "npu_dequant_swiglu_quant": dequant_swiglu_quant,
    "npu_grouped_matmul_swiglu_quant_v2": grouped_matmul_swiglu_quant_v2,
    "npu_swiglu_clip_quant": swiglu_clip_quant,
}


def register() -> None:
    """Shapes of all ops, gradients of those that have one in torch_npu: permute, unpermute, swiglu. No other op gets one."""
    for name, meta in METAS.items():
        if name in CUSTOM:
            continue
        torch.library.register_fake(f"npu::{name}", meta)
    torch.library.register_autograd("npu::npu_moe_token_permute", _permute_backward, setup_context=_permute_setup)
    torch.library.register_autograd("npu::npu_moe_token_unpermute", _unpermute_backward, setup_context=_unpermute_setup)
    torch.library.register_autograd("npu::npu_swiglu", _swiglu_backward, setup_context=_swiglu_setup)


def _permute_setup(ctx: Any, inputs: Any, output: Any) -> None:
    tokens, indices = inputs[:2]
    ctx.save_for_backward(output[1])
    ctx.tokens, ctx.dtype, ctx.k = tokens.shape[0], tokens.dtype, 1 if indices.ndim == 1 else indices.shape[1]
    ctx.mark_non_differentiable(output[1])


def _permute_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    out = torch.ops.npu.npu_moe_token_permute_grad_v2(grad.contiguous(), index, ctx.tokens, ctx.dtype, ctx.k)
    return out, None, None, None


def _unpermute_setup(ctx: Any, inputs: Any, output: Any) -> None:
    rows, index, probs = (*inputs, None)[:3]
    ctx.save_for_backward(rows, index, probs)


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, index, probs = ctx.saved_tensors
    d_rows, d_probs = torch.ops.npu.npu_moe_token_unpermute_grad_v2(
        grad.contiguous(), index, rows.shape[0], rows.dtype, probs, False, None, rows
    )
    return d_rows, None, d_probs if probs is not None else None, None, None


def _swiglu_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.dim = inputs[1] if len(inputs) > 1 else -1


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.npu.npu_swiglu_backward(grad.contiguous(), x, ctx.dim), None
