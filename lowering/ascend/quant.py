"""W8A8: experts in int8, weights by output channel, rows by token, both symmetric.

dispatch with dynamic quantisation -> int8 product, raw sums -> dequantise, SwiGLU, quantise again in one op -> int8 product, scaled back.
Only what these ops take is quantised; a block that does not fit stays in its own precision, and the report says why.
Weights that a model stores in int8 are used as they are, with its own scales.

W8A8C8: the first product comes out scaled, then one op does SwiGLU, clips each row to alpha times its largest value and quantises it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import scalar as act
from .. import generic
from . import calls, law, schemas
from .calls import call

Quantize = str | tuple[str, float] | None  # the option: a chain, or a chain with its alpha
CLIP = "npu_swiglu_clip_quant"
MAX_INNER = 10496  # of npu_dequant_swiglu_quant with groups
_ENUM = {torch.int32: 3, torch.float16: 5, torch.bfloat16: 15}  # torch's own numbers of dtypes


@dataclass(frozen=True)
class Quantised:
    """Weights [E, in, out] in int8 and scales [E, out]: fp32 for the first product, what the output asks for in the second."""

    up: Tensor
    up_scale: Tensor
    down: Tensor
    down_scale: Tensor


@dataclass(frozen=True)
class Clipped(Quantised):
    """W8A8C8: scales of both products in the dtype that the outputs ask for; rows are clipped to `alpha` · max."""

    alpha: float


def chain_of(quantize: Quantize) -> tuple[str | None, float]:
    """(chain, alpha) of the option; alpha 1 clips nothing."""
    return quantize if isinstance(quantize, (tuple, list)) else (quantize, 1.0)


def refuses_chain(chain: str, inner: int, dtype: torch.dtype) -> str | None:
    """What a chain demands beyond `refuses`, or None."""
    if chain != "w8a8c8":
        return None
    if not schemas.custom(CLIP):
        return f"torch.ops.custom.{CLIP} is not registered: it comes with the custom ops of cann-recipes-infer"
    if dtype != torch.bfloat16:
        return f"{CLIP} takes bf16, not {dtype}"
    return f"an intermediate size of {inner}: {CLIP} takes {MAX_INNER // 2} at most" if 2 * inner > MAX_INNER else None


def refuses(layout: generic.Layout, inner: int, biases: bool, dtype: torch.dtype) -> str | None:
    """Why a block cannot be quantised, or None."""
    if not law.swiglu(act.decode(layout.act_ops, layout.act_consts), layout.form):
        return "npu_dequant_swiglu_quant is SwiGLU of [gate | up]"
    if biases:
        return "biases would have to be quantised with the weights"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the quantised product gives fp16 or bf16, not {dtype}"
    if inner % 64 or inner > MAX_INNER:
        return f"an intermediate size of {inner}: it must be a multiple of 64, {MAX_INNER} at most"
    return "the routing weight is applied to the input" if layout.weight_on_input else None


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """npu_grouped_matmul wants bf16 scales for bf16 outputs, fp32 ones for fp16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def channel_scale(weight: Tensor) -> Tensor:
    """[E, in, out] -> [E, out]: max |w| / 127 over the inner dim, in fp32."""
    return weight.float().abs().amax(1) / 127.0


def to_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """[E, in, out] -> int8; `scale` [E, out] is the one that is multiplied back, in the precision it is kept in."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    return (weight.float() / safe[:, None]).round().clamp(-128, 127).to(torch.int8)


def _dequantised(
    rows: Tensor, row_scale: Tensor, q: Quantised, counts: Tensor, grouped: dict[str, Any], _: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of the first product, activated and quantised again, with their scales: raw sums between the two."""
    (sums,) = call("npu_grouped_matmul", [rows], [q.up], **grouped, output_dtype=_ENUM[torch.int32])
    out: tuple[Tensor, Tensor] = call(
        "npu_dequant_swiglu_quant", sums, weight_scale=q.up_scale, activation_scale=row_scale, group_index=counts, activate_left=True,
        quant_mode=1,
    )  # fmt: skip
    return out


def _clipped(
    rows: Tensor, row_scale: Tensor, q: Quantised, counts: Tensor, grouped: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `_dequantised`, the sums scaled by the product itself, rows clipped before they are quantised."""
    assert isinstance(q, Clipped)
    (h,) = call(
        "npu_grouped_matmul", [rows], [q.up], scale=[q.up_scale], per_token_scale=[row_scale], **grouped, output_dtype=_ENUM[dtype]
    )
    alpha = torch.full((q.up.shape[0],), q.alpha, dtype=torch.float32, device=rows.device)
    out: tuple[Tensor, Tensor] = call(CLIP, h, counts, alpha, activate_left=True, quant_mode=1, clamp_mode=1)
    return out


def experts_rows(x: Tensor, ids: Tensor, weights: Tensor, q: Quantised, layout: generic.Layout) -> tuple[Tensor, Tensor, Tensor]:
    """As `calls.experts_rows`, in int8."""
    rows, index, counts, row_scale = call(
        "npu_moe_init_routing_v2", x, ids, active_num=-1, expert_num=layout.num_experts, drop_pad_mode=0, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, quant_mode=1, active_expert_range=[0, layout.num_experts], row_idx_type=0,
    )  # fmt: skip
    grouped = dict(group_list=counts, split_item=3, group_type=0, group_list_type=1)
    first = _clipped if isinstance(q, Clipped) else _dequantised
    inner, inner_scale = first(rows, row_scale, q, counts, grouped, x.dtype)
    (y,) = call(
        "npu_grouped_matmul", [inner], [q.down], scale=[q.down_scale], per_token_scale=[inner_scale], **grouped, output_dtype=_ENUM[x.dtype]
    )
    return y, index, weights


def start(
    x: Tensor, ids: Tensor, weights: Tensor, q: Quantised, layout: generic.Layout, all_known: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """As `calls.start`, in int8."""
    return calls.start(x, ids, weights, q, layout, all_known, experts_rows)


def finish(rows: Tensor, index: Tensor, weights: Tensor, own: Sequence[Tensor], addends: Sequence[Tensor]) -> Tensor:
    return calls.finish(rows, index, weights, own, addends)
