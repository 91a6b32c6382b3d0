"""Schemas of the npu ops that this target emits, as torch_npu 2.13 and 2.14 declare them.

Where torch_npu can be imported its own definitions are used. Elsewhere the same schemas are defined here, so that graphs can be built,
checked and (through `emulate`) run on any machine (`register`).
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

# torch's own numbers of dtypes, which is what `output_dtype` and its kin take
DTYPES = {
    0: torch.uint8, 1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16,
}  # fmt: skip

_GMM = (
    "Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, Tensor[]? offset=None, Tensor[]? antiquant_scale=None, "
    "Tensor[]? antiquant_offset=None, Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None, "
    "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, int? split_item=0, int? group_type=None, "
    "int? group_list_type=0, int? act_type=0, int[]? tuning_config=None, int? output_dtype=None, int? x_dtype=None, "
    "int? weight_dtype=None, int? scale_dtype=None, int? per_token_scale_dtype=None"
)
_UNPERMUTE = "Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None, bool padded_mode=False, int[]? restore_shape=None"

_GROUP = "str group_ep, int ep_world_size, int ep_rank_id, int moe_expert_num, *, "

NPU = (
    "npu_moe_gating_top_k(Tensor x, int k, *, Tensor? bias=None, Tensor? input_ids=None, Tensor? tid2eid=None, int k_group=1, "
    "int group_count=1, int group_select_mode=0, int renorm=0, int norm_type=0, bool out_flag=False, float routed_scaling_factor=1., "
    "float eps=9.9999999999999995e-21) -> (Tensor, Tensor, Tensor)",
    "npu_moe_gating_top_k_softmax(Tensor x, Tensor? finished=None, int k=1) -> (Tensor, Tensor, Tensor)",
    "npu_moe_gating_top_k_softmax_v2(Tensor x, *, int k=1, Tensor? finished=None, int? renorm=0, bool? output_softmax=False) "
    "-> (Tensor, Tensor, Tensor)",
    "npu_moe_init_routing_v2(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, int active_num=-1, "
    "int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, int expert_tokens_num_type=0, bool expert_tokens_num_flag=False, "
    "int quant_mode=-1, int[2] active_expert_range=[], int row_idx_type=0, int? x_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)",
    f"npu_grouped_matmul({_GMM}) -> Tensor[]",
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor",
    "npu_swiglu_backward(Tensor grad_output, Tensor input, int dim=-1) -> Tensor",
    "npu_clipped_swiglu(Tensor x, *, Tensor? group_index=None, int dim=-1, float alpha=1.702, float limit=7., float bias=1., "
    "bool interleaved=True) -> Tensor",
    "npu_moe_finalize_routing(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2, Tensor? bias, Tensor? scales, "
    "Tensor expanded_src_to_dst_row, Tensor? export_for_source_row, int? drop_pad_mode=0, int? k=1) -> Tensor",
    "npu_moe_token_permute(Tensor tokens, Tensor indices, int? num_out_tokens=None, bool padded_mode=False) -> (Tensor, Tensor)",
    "npu_moe_token_permute_grad_v2(Tensor grad_permuted_tokens, Tensor sorted_indices, SymInt tokens_size_0, ScalarType tokens_dtype, "
    "SymInt num_topK, bool padded_mode=False) -> Tensor",
    f"npu_moe_token_unpermute({_UNPERMUTE}) -> Tensor",
    f"_npu_moe_token_unpermute({_UNPERMUTE}) -> (Tensor unpermuted_tokens, Tensor permuted_tokens_for_backward)",
    "npu_moe_token_unpermute_grad_v2(Tensor grad_unpermuted_tokens, Tensor sorted_indices, SymInt permuted_tokens_size_0, "
    "ScalarType permuted_tokens_dtype, Tensor? probs=None, bool padded_mode=False, int[]? restore_shape=None, "
    "Tensor? permuted_tokens=None) -> (Tensor, Tensor)",
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.) -> (Tensor, Tensor)',
    "npu_grouped_matmul_swiglu_quant_v2(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor x_scale, Tensor group_list, *, "
    "Tensor? smooth_scale=None, Tensor[]? weight_assist_matrix=None, Tensor? bias=None, int? dequant_mode=0, int? dequant_dtype=6, "
    "int? quant_mode=0, int? quant_dtype=1, int? group_list_type=0, int[]? tuning_config=None, int? x_dtype=None, "
    "int? weight_dtype=None, int? weight_scale_dtype=None, int? x_scale_dtype=None) -> (Tensor, Tensor)",
    f"npu_moe_distribute_dispatch_v2(Tensor x, Tensor expert_ids, {_GROUP}Tensor? scales=None, Tensor? x_active_mask=None, "
    'Tensor? expert_scales=None, Tensor? elastic_info=None, Tensor? performance_info=None, str group_tp="", int tp_world_size=0, '
    "int tp_rank_id=0, int expert_shard_type=0, int shared_expert_num=1, int shared_expert_rank_num=0, int quant_mode=0, int global_bs=0, "
    'int expert_token_nums_type=1, str comm_alg="", int zero_expert_num=0, int copy_expert_num=0, int const_expert_num=0, '
    "int? y_dtype=None, int? x_dtype=None, int? scales_dtype=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"npu_moe_distribute_combine_v2(Tensor expand_x, Tensor expert_ids, Tensor assist_info_for_combine, Tensor ep_send_counts, "
    f"Tensor expert_scales, {_GROUP}Tensor? tp_send_counts=None, Tensor? x_active_mask=None, Tensor? expand_scales=None, "
    "Tensor? shared_expert_x=None, Tensor? elastic_info=None, Tensor? ori_x=None, Tensor? const_expert_alpha_1=None, "
    'Tensor? const_expert_alpha_2=None, Tensor? const_expert_v=None, Tensor? performance_info=None, str group_tp="", '
    "int tp_world_size=0, int tp_rank_id=0, int expert_shard_type=0, int shared_expert_num=1, int shared_expert_rank_num=0, "
    'int global_bs=0, int comm_quant_mode=0, str comm_alg="", int zero_expert_num=0, int copy_expert_num=0, int const_expert_num=0) '
    "-> Tensor",
    "npu_moe_update_expert(Tensor expert_ids, Tensor eplb_table, *, Tensor? expert_scales=None, Tensor? pruning_threshold=None, "
    "Tensor? active_mask=None, int local_rank_id=-1, int world_size=-1, int balance_mode=0) -> (Tensor, Tensor)",
    "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, Tensor? bias=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=False, int quant_mode=0, "
    "int? dst_type=None, int? round_mode=None, int? activate_dim=None, int swiglu_mode=0, float clamp_limit=7., float glu_alpha=1.702, "
    "float glu_bias=1.) -> (Tensor, Tensor)",
)

# what the 950 would round rows in float8 with, known from these declarations and the documents: nothing emits them (`antiquant`)
RAISED = {
    name: f"{name}({rest}"
    for name, rest in (
        ("npu_dynamic_block_quant", "Tensor x, *, float min_scale=0., str round_mode=\"rint\", int dst_type=1, int row_block_size=1, "
         "int col_block_size=128, float dst_type_max=0.) -> (Tensor y, Tensor scale)"),
        ("npu_swiglu_group_quant", "Tensor x, *, Tensor? weight=None, Tensor? group_index=None, Tensor? scale=None, int dst_type=291, "
         "int quant_mode=0, int block_size=0, bool round_scale=False, float clamp_limit=-1., float dst_type_max=15., "
         "bool output_origin=False) -> (Tensor, Tensor, Tensor)"),
        ("npu_dynamic_mx_quant", "Tensor input, *, int axis=-1, str round_mode=\"rint\", int dst_type=296, int block_size=32, "
         "int? scale_alg=0, float dst_type_max=0., float max_low_bound=0.) -> (Tensor, Tensor)"),
        ("npu_swiglu_mx_quant", "Tensor x, *, Tensor? group_index=None, int activate_dim=-1, bool activate_left=False, int swiglu_mode=0, "
         "float clamp_limit=7., float glu_alpha=1.702, float glu_bias=1., int group_mode=0, int axis=-1, int dst_type=296, "
         "str round_mode=\"rint\", int scale_alg=0, float max_dtype_value=0) -> (Tensor, Tensor)"),
    )
}  # fmt: skip

# ops of other packages, used where they are registered: this one comes with the custom ops of cann-recipes-infer
CUSTOM = {
    "npu_swiglu_clip_quant": "npu_swiglu_clip_quant(Tensor x, Tensor group_index, Tensor group_alpha, *, bool activate_left=False, "
    "int quant_mode=1, int clamp_mode=1) -> (Tensor, Tensor)",
}

STREAM = (
    "scope_enter(str[] keys, str[] values, bool need_execute=False) -> None",
    "scope_exit(bool need_execute=False) -> None",
    "record(*, Device? device=None) -> Tensor",
    "wait(Tensor[] x) -> ()",
    "tagged_event_record(str tag, bool created_inside=False) -> ()",
    "tagged_event_wait(str tag, bool created_inside=False) -> ()",
    "wait_tensor(Tensor self, Tensor dependency) -> Tensor",
)


@functools.cache
def wheel() -> bool:
    """Whether torch_npu itself is there (it is imported by this call)."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_npu  # noqa: F401
    except Exception:  # no CANN on this machine: torch_npu cannot be loaded
        return False
    return True


def lacking(names: tuple[str, ...]) -> str | None:
    """The first of these ops (of `RAISED`) that torch_npu does not declare here, or with other arguments than are known; None for none."""
    return next((n for n in names if not _declared(n)), None)


def _declared(name: str) -> bool:
    op = getattr(torch.ops.npu, name, None) if wheel() else None
    return op is not None and str(op.default._schema) == str(torch._C.parse_schema(f"npu::{RAISED[name]}"))


def custom(name: str) -> bool:
    """Whether an op of `CUSTOM` is registered now, with the arguments that are known of it."""
    op = getattr(torch.ops.custom, name, None)
    if op is None:
        return False
    return [a.name for a in op.default._schema.arguments] == [a.name for a in torch._C.parse_schema(CUSTOM[name]).arguments]
