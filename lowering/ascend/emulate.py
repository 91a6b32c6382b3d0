"""CPU kernels of the npu ops, written from their documented semantics.

They make a lowered graph run, and be compared with eager, on a machine without an NPU. Where the documents leave values undefined the
kernels put NaN, so that nothing can come to rely on them. They say nothing about the device's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import emulate_dispatch as dispatch
from . import emulate_exchange as exchange
from . import emulate_experts as experts
from . import emulate_training as training

KERNELS: dict[str, Callable[..., Any]] = {
    "npu_moe_gating_top_k": dispatch.gating_top_k,
    "npu_moe_gating_top_k_softmax": dispatch.gating_top_k_softmax,
    "npu_moe_gating_top_k_softmax_v2": dispatch.gating_top_k_softmax_v2,
    "npu_moe_init_routing_v2": dispatch.init_routing_v2,
    "npu_moe_finalize_routing": dispatch.finalize_routing,
    "npu_grouped_matmul": experts.grouped_matmul,
    "npu_grouped_matmul_swiglu_quant_v2": experts.grouped_matmul_swiglu_quant_v2,
    "npu_swiglu": experts.swiglu,
    "npu_swiglu_backward": experts.swiglu_backward,
    "npu_clipped_swiglu": experts.clipped_swiglu,
    "npu_dynamic_quant": experts.dynamic_quant,
    "npu_dequant_swiglu_quant": experts.dequant_swiglu_quant,
    "npu_moe_distribute_dispatch_v2": exchange.dispatch,
    "npu_moe_distribute_combine_v2": exchange.combine,
    "npu_moe_update_expert": exchange.update_expert,
    "npu_moe_token_permute": training.token_permute,
    "npu_moe_token_permute_grad_v2": training.token_permute_grad_v2,
    "npu_moe_token_unpermute": training.token_unpermute,
    "_npu_moe_token_unpermute": training.token_unpermute_pair,
    "npu_moe_token_unpermute_grad_v2": training.token_unpermute_grad_v2,
}
CUSTOM_KERNELS: dict[str, Callable[..., Any]] = {"npu_swiglu_clip_quant": experts.swiglu_clip_quant}
