"""Argument rules: a good call of every op passes, and each rule refuses what breaks it, naming op, argument and rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.lowering.ascend import calls, register, rules, schemas

register.ensure()
register.custom()
BF, F16, F32, I8, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32, torch.int64


def t(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


GOOD: dict[str, dict[str, Any]] = {
    "npu_moe_gating_top_k": dict(x=t(5, 16), k=3, bias=t(16), k_group=2, group_count=4, group_select_mode=1, norm_type=1),
    "npu_moe_gating_top_k_softmax": dict(x=t(5, 16), k=3),
    "npu_moe_gating_top_k_softmax_v2": dict(x=t(5, 16), k=3, renorm=1),
    "npu_moe_init_routing_v2": dict(
        x=t(5, 8, dtype=BF), expert_idx=t(5, 3, dtype=I32), active_num=-1, expert_num=4, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[0, 4], row_idx_type=0),
    "npu_grouped_matmul": dict(
        x=[t(15, 8, dtype=BF)], weight=[t(4, 8, 6, dtype=BF)], bias=[t(4, 6)], group_list=t(4, dtype=I64), group_type=0, split_item=3,
        group_list_type=1),
    "npu_swiglu": dict(input=t(15, 8), dim=-1),
    "npu_clipped_swiglu": dict(x=t(15, 8)),
    "npu_moe_finalize_routing": dict(
        expanded_permuted_rows=t(15, 8, dtype=BF), skip1=t(5, 8, dtype=BF), skip2=None, bias=None, scales=t(5, 3),
        expanded_src_to_dst_row=t(15, dtype=I32), export_for_source_row=None, drop_pad_mode=2),
    "npu_moe_token_permute": dict(tokens=t(5, 8), indices=t(5, 3, dtype=I32)),
    "npu_moe_token_unpermute": dict(permuted_tokens=t(15, 8), sorted_indices=t(15, dtype=I32), probs=t(5, 3)),
    "npu_dynamic_quant": dict(input=t(15, 8, dtype=BF)),
    "npu_grouped_matmul_swiglu_quant_v2": dict(
        x=t(15, 32, dtype=I8), weight=[t(4, 32, 64, dtype=I8)], weight_scale=[t(4, 64)], x_scale=t(15), group_list=t(4, dtype=I64),
        group_list_type=1),
    "npu_dequant_swiglu_quant": dict(
        x=t(15, 512, dtype=I32), weight_scale=t(4, 512), activation_scale=t(15), group_index=t(4, dtype=I64), activate_left=True,
        quant_mode=1),
    "npu_moe_distribute_dispatch_v2": dict(
        x=t(5, 8, dtype=BF), expert_ids=t(5, 3, dtype=I32), group_ep="ep", ep_world_size=2, ep_rank_id=1, moe_expert_num=4,
        shared_expert_num=0),
    "npu_moe_distribute_combine_v2": dict(
        expand_x=t(20, 8, dtype=BF), expert_ids=t(5, 3, dtype=I32), assist_info_for_combine=t(2560, dtype=I32),
        ep_send_counts=t(4, dtype=I32), expert_scales=t(5, 3), group_ep="ep", ep_world_size=2, ep_rank_id=1, moe_expert_num=4,
        shared_expert_num=0),
    "npu_moe_update_expert": dict(expert_ids=t(5, 3, dtype=I32), eplb_table=torch.ones(4, 3, dtype=I32), balance_mode=1),
    "npu_swiglu_clip_quant": dict(x=t(15, 128, dtype=BF), group_index=t(4, dtype=I64), group_alpha=t(4), activate_left=True),
}  # fmt: skip
W8A16 = dict(
    weight=[t(4, 8, 6, dtype=I8)], antiquant_scale=[t(4, 6, dtype=BF)], antiquant_offset=[t(4, 6, dtype=BF)],
)  # fmt: skip
W4A16 = dict(
    weight=[t(4, 8, 2, dtype=I32)], bias=None,
    antiquant_scale=[t(4, 2, 16, dtype=BF)], antiquant_offset=[t(4, 2, 16, dtype=BF)],
)  # fmt: skip
INT8 = dict(
    x=[t(15, 8, dtype=I8)], weight=[t(4, 8, 6, dtype=I8)], bias=None, scale=[t(4, 6, dtype=BF)], per_token_scale=[t(15)], output_dtype=15,
)  # fmt: skip
K_SPLIT = dict(x=[t(8, 15)], weight=[t(15, 6)], bias=None, group_type=2)

# op, what is changed, a part of the message
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("npu_moe_gating_top_k", dict(x=t(5, 16, dtype=torch.float64)), "x must be [T, E]"),
    ("npu_moe_gating_top_k", dict(x=t(5, 4096), bias=t(4096)), "2048 experts"),
    ("npu_moe_gating_top_k", dict(bias=t(15)), "bias must be [E]"),
    ("npu_moe_gating_top_k", dict(bias=t(16, dtype=BF)), "dtype of x"),
    ("npu_moe_gating_top_k", dict(bias=t(16).requires_grad_()), "bias wants a gradient"),
    ("npu_moe_gating_top_k", dict(renorm=1), "renorm must be 0"),
    ("npu_moe_gating_top_k", dict(norm_type=2), "norm_type"),
    ("npu_moe_gating_top_k", dict(k=9), "kept groups"),
    ("npu_moe_gating_top_k", dict(k=0), "kept groups"),
    ("npu_moe_gating_top_k", dict(group_count=5), "divide the experts"),
    ("npu_moe_gating_top_k", dict(k_group=5), "1 to group_count"),
    ("npu_moe_gating_top_k", dict(group_count=16, k_group=8), "two experts a group"),
    ("npu_moe_gating_top_k", dict(x=t(1, 2048), bias=None, group_count=128, k_group=64), "aligned to 32"),
    ("npu_moe_gating_top_k", dict(input_ids=t(5, dtype=I64)), "come together"),
    ("npu_moe_gating_top_k_softmax", dict(k=17), "min(E, 1024)"),
    ("npu_moe_gating_top_k_softmax", dict(finished=t(5)), "bool"),
    ("npu_moe_gating_top_k_softmax_v2", dict(renorm=2), "0 or 1"),
    ("npu_moe_init_routing_v2", dict(expert_idx=t(5, 3, dtype=I64)), "int32"),
    ("npu_moe_init_routing_v2", dict(expert_idx=t(4, 3, dtype=I32)), "[T, k]"),
    ("npu_moe_init_routing_v2", dict(active_num=15), "make the graph static"),
    ("npu_moe_init_routing_v2", dict(active_expert_range=[]), "must be given"),
    ("npu_moe_init_routing_v2", dict(active_expert_range=[0, 5]), "within the experts"),
    ("npu_moe_init_routing_v2", dict(drop_pad_mode=1), "drop_pad_mode"),
    ("npu_moe_init_routing_v2", dict(expert_tokens_num_type=0), "counts"),
    ("npu_moe_init_routing_v2", dict(expert_tokens_num_flag=False), "must be True"),
    ("npu_moe_init_routing_v2", dict(row_idx_type=2), "row_idx_type"),
    ("npu_moe_init_routing_v2", dict(quant_mode=0), "quant_mode"),
    ("npu_moe_init_routing_v2", dict(scale=t(5, dtype=BF)), "scale"),
    ("npu_grouped_matmul", dict(group_type=None), "group_type"),
    ("npu_grouped_matmul", dict(group_list=t(4, dtype=I32)), "int64"),
    ("npu_grouped_matmul", dict(group_list=t(5, dtype=I64)), "entry for each expert"),
    ("npu_grouped_matmul", dict(group_list_type=2), "group_list_type"),
    ("npu_grouped_matmul", dict(group_list=t(1, dtype=I64), weight=[t(1, 8, 6, dtype=BF)]), "0 for a list of one"),
    ("npu_grouped_matmul", dict(split_item=0), "one output"),
    ("npu_grouped_matmul", dict(weight=[t(4, 9, 6, dtype=BF)]), "the K of weight"),
    ("npu_grouped_matmul", dict(weight=[t(4, 8, 6)]), "dtype of x"),
    ("npu_grouped_matmul", dict(x=[t(8, 15, dtype=BF).t()]), "contiguous"),
    ("npu_grouped_matmul", dict(bias=[t(4, 6, dtype=BF)]), "fp32 for bf16"),
    ("npu_grouped_matmul", dict(bias=[t(6)]), "[E, N]"),
    ("npu_grouped_matmul", dict(weight=[t(1025, 8, 6, dtype=BF)], bias=None, group_list=t(1025, dtype=I64)), "1024"),
    ("npu_grouped_matmul", dict(scale=[t(4, 6, dtype=BF)]), "only for int8"),
    ("npu_grouped_matmul", {**K_SPLIT, "scale": [t(4, 6)]}, "neither bias nor scales"),
    ("npu_grouped_matmul", {**INT8, "output_dtype": None}, "must be given for int8"),
    ("npu_grouped_matmul", {**INT8, "scale": [t(4, 6)]}, "bf16 when the output is bf16"),
    ("npu_grouped_matmul", {**INT8, "per_token_scale": [t(15, dtype=BF)]}, "[M] in fp32"),
    ("npu_grouped_matmul", dict(act_type=1), "act_type"),
    ("npu_grouped_matmul", dict(weight=[t(4, 8, 6, dtype=I8)]), "int8 with antiquant_scale"),
    ("npu_grouped_matmul", {**W8A16, "weight": [t(4, 8, 6, dtype=BF)]}, "int8 with antiquant_scale"),
    ("npu_grouped_matmul", {**W8A16, "antiquant_offset": None}, "come together"),
    ("npu_grouped_matmul", {**W8A16, "antiquant_scale": [t(4, 6)]}, "dtype of x"),
    ("npu_grouped_matmul", {**W8A16, "antiquant_offset": [t(4, 1, dtype=BF)]}, "[E, N]"),
    ("npu_grouped_matmul", {**W8A16, "x": [t(15, 8)], "bias": None}, "fp16 and bf16 rows"),
    ("npu_grouped_matmul", {**W8A16, "per_token_scale": [t(15)]}, "without scale and per_token_scale"),
    ("npu_grouped_matmul", {**W8A16, "weight": [t(4, 8, 6, dtype=torch.float8_e4m3fn)]}, "float8: no offset"),
    ("npu_grouped_matmul", {**W4A16, "antiquant_scale": [t(4, 2, 2, dtype=BF)]}, "[E, G, N]"),
    ("npu_grouped_matmul", {**W4A16, "antiquant_scale": [t(4, 3, 16, dtype=BF)]}, "divisor of K"),
    ("npu_grouped_matmul", {**W4A16, "antiquant_offset": [t(4, 16, dtype=BF)]}, "shape of antiquant_scale"),
    ("npu_grouped_matmul", {**W8A16, "antiquant_scale": [t(4, 2, 6, dtype=BF)]}, "of 4 bits [E, G, N]"),
    ("npu_grouped_matmul", {**INT8, "tuning_config": [16]}, "not above all rows"),
    ("npu_grouped_matmul", {**INT8, "tuning_config": [1, 2]}, "one number"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(tuning_config=[-1]), "expected to have"),
    ("npu_swiglu", dict(input=t(15, 7)), "even size"),
    ("npu_swiglu", dict(input=t(8, 16).t()), "contiguous"),
    ("npu_clipped_swiglu", dict(limit=0.0), "positive"),
    ("npu_moe_finalize_routing", dict(drop_pad_mode=0), "permute tokens"),
    ("npu_moe_finalize_routing", dict(expanded_src_to_dst_row=t(15, dtype=I64)), "int32"),
    ("npu_moe_finalize_routing", dict(expanded_permuted_rows=t(14, 8, dtype=BF)), "[T k, H]"),
    ("npu_moe_finalize_routing", dict(skip1=None, skip2=t(5, 8, dtype=BF)), "needs skip1"),
    ("npu_moe_finalize_routing", dict(skip1=t(5, 8)), "dtype of the rows"),
    ("npu_moe_finalize_routing", dict(scales=t(5, 3, dtype=F16)), "dtype of the rows"),
    ("npu_moe_finalize_routing", dict(scales=None, k=3), "without scales"),
    ("npu_moe_token_permute", dict(indices=t(5, 3)), "int32 or int64"),
    ("npu_moe_token_permute", dict(indices=t(5, 513, dtype=I32)), "512"),
    ("npu_moe_token_permute", dict(padded_mode=True), "not supported"),
    ("npu_moe_token_unpermute", dict(permuted_tokens=t(15, 8, dtype=BF)), "NaN gradients"),
    ("npu_moe_token_unpermute", dict(sorted_indices=t(15, dtype=I64)), "int32"),
    ("npu_dynamic_quant", dict(input=t(15, 8)), "fp16 or bf16"),
    ("npu_dynamic_quant", dict(smooth_scales=t(8, dtype=BF)), "beside group_index"),
    ("npu_dynamic_quant", dict(smooth_scales=t(4, 8), group_index=t(4, dtype=I32)), "dtype of input"),
    ("npu_dequant_swiglu_quant", dict(quant_scale=t(4, 8)), "[groups, I]"),
    ("npu_dequant_swiglu_quant", dict(activate_left=False), "right half"),
    ("npu_dequant_swiglu_quant", dict(quant_mode=0), "dynamic"),
    ("npu_dequant_swiglu_quant", dict(weight_scale=None), "must be given for int32"),
    ("npu_dequant_swiglu_quant", dict(x=t(15, 576, dtype=I32), weight_scale=t(4, 576)), "multiple of 64"),
    ("npu_dequant_swiglu_quant", dict(x=t(15, 384, dtype=I32), weight_scale=t(4, 384)), "came out wrong"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(x=t(15, 32)), "in int8"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(weight=[t(4, 32, 64, dtype=I8)] * 2), "one tensor each"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(weight=[t(4, 16, 64, dtype=I8)]), "the K of x"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(weight=[t(4, 32, 48, dtype=I8)], weight_scale=[t(4, 48)]), "16 x 32"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(weight=[t(4, 32, 10272, dtype=I8)], weight_scale=[t(4, 10272)]), "10240"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(weight_scale=[t(4, 32)]), "[E, N]"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(x_scale=t(15, dtype=BF)), "[M] in fp32"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(group_list=t(4, dtype=I32)), "int64"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(group_list_type=2), "counts"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(dequant_mode=1), "channels and rows"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(quant_dtype=0), "quant_dtype int8"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(smooth_scale=t(4, 32)), "4 bits"),
    ("npu_grouped_matmul_swiglu_quant_v2", dict(
        weight=[t(1, 32, 64, dtype=I8)], weight_scale=[t(1, 64)], group_list=t(1, dtype=I64)), "0 for a list of one"),
    ("npu_grouped_matmul", dict(weight=[t(1, 8, 6, dtype=BF)], bias=None, group_list=t(1, dtype=I64)), "0 for a list of one"),
    *[(f"npu_moe_distribute_{name}_v2", change, told) for name in ("dispatch", "combine") for change, told in (
        (dict(expert_ids=t(5, 3, dtype=I64)), "int32"), (dict(expert_ids=t(5, 17, dtype=I32)), "k up to 16"),
        (dict(ep_world_size=1), "2 to 768"), (dict(ep_rank_id=2), "one of ep_world_size"), (dict(group_ep=""), "1 to 127"),
        (dict(moe_expert_num=5), "as many on each rank"), (dict(x_active_mask=t(5)), "bool [T]"),
        (dict(shared_expert_num=1), "added behind"), (dict(expert_scales=t(5, 3, dtype=BF)), "fp32"),
        (dict(zero_expert_num=1), "must be 0"))],
    ("npu_moe_distribute_dispatch_v2", dict(x=t(5, 8)), "fp16 or bf16"),
    ("npu_moe_distribute_dispatch_v2", dict(x=t(513, 8, dtype=BF), expert_ids=t(513, 3, dtype=I32)), "512 at most"),
    ("npu_moe_distribute_dispatch_v2", dict(quant_mode=1), "2 (dynamic)"),
    ("npu_moe_distribute_dispatch_v2", dict(expert_token_nums_type=0), "counts"),
    ("npu_moe_distribute_combine_v2", dict(expand_x=t(20, 8)), "fp16 or bf16"),
    ("npu_moe_distribute_combine_v2", dict(copy_expert_num=1), "ori_x"),
    ("npu_moe_distribute_combine_v2", dict(comm_quant_mode=2), "must be 0"),
    ("npu_moe_update_expert", dict(expert_ids=t(5, 3)), "int32"),
    ("npu_moe_update_expert", dict(eplb_table=t(4, 1, dtype=I32)), "1 + places"),
    ("npu_moe_update_expert", dict(balance_mode=2), "0 (by rank)"),
    ("npu_moe_update_expert", dict(balance_mode=0), "local_rank_id"),
    ("npu_moe_update_expert", dict(expert_scales=t(5, 3)), "not used"),
    ("npu_swiglu_clip_quant", dict(x=t(15, 128, dtype=F16)), "in bf16"),
    ("npu_swiglu_clip_quant", dict(x=t(15, 96, dtype=BF)), "multiple of 64"),
    ("npu_swiglu_clip_quant", dict(x=t(1, 10624, dtype=BF)), "10496 at most"),
    ("npu_swiglu_clip_quant", dict(group_index=t(4, dtype=I32)), "int64 counts"),
    ("npu_swiglu_clip_quant", dict(group_alpha=t(5)), "each group"),
    ("npu_swiglu_clip_quant", dict(activate_left=False), "right half"),
    ("npu_swiglu_clip_quant", dict(quant_mode=0), "dynamic"),
    ("npu_swiglu_clip_quant", dict(clamp_mode=0), "clamp_mode"),
]  # fmt: skip


def op(name: str) -> Any:
    return getattr(torch.ops.custom if name in schemas.CUSTOM else torch.ops.npu, name).default


def check(name: str, **kwargs: Any) -> None:
    rules.check(op(name), (), kwargs)


@pytest.mark.parametrize("name", GOOD)
def test_good_calls_pass(name: str) -> None:
    check(name, **GOOD[name])
    if "distribute" not in name:  # those wait for other ranks: test_exchange.py
        op(name)(**GOOD[name])


def test_other_good_calls_pass() -> None:
    check("npu_grouped_matmul", **{**GOOD["npu_grouped_matmul"], **INT8})
    check("npu_grouped_matmul", **{**GOOD["npu_grouped_matmul"], **K_SPLIT})
    check("npu_grouped_matmul", **{**GOOD["npu_grouped_matmul"], **W8A16})
    check("npu_grouped_matmul", **{**GOOD["npu_grouped_matmul"], **W4A16})
    check(
        "npu_grouped_matmul",
        **{**GOOD["npu_grouped_matmul"], **W4A16, **{f"antiquant_{what}": [t(4, 16, dtype=BF)] for what in ("scale", "offset")}},
    )
    check("npu_moe_init_routing_v2", **{**GOOD["npu_moe_init_routing_v2"], "quant_mode": 1, "scale": t(4, 8)})


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=[f"{n}-{m}" for n, _, m in BAD])
def test_broken_rules_are_named(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(rules.ArgumentError) as e:
        check(name, **{**GOOD[name], **change})
    assert str(e.value).startswith(f"{name}: ") and message in str(e.value)


def test_every_op_that_is_emitted_has_rules() -> None:
    backward = {"npu_swiglu_backward", "npu_moe_token_permute_grad_v2", "_npu_moe_token_unpermute", "npu_moe_token_unpermute_grad_v2"}
    assert {s.split("(")[0] for s in schemas.NPU} - backward | set(schemas.CUSTOM) == set(rules.RULES) == set(GOOD)


def test_calls_are_checked() -> None:
    with pytest.raises(rules.ArgumentError, match="no argument 'kk'"):
        calls.call("npu_swiglu", t(2, 4), kk=1)
    with pytest.raises(rules.ArgumentError, match="even size"):
        calls.call("npu_swiglu", t(2, 3))
