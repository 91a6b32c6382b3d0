"""What each npu op demands of its arguments, as a table: checked on every call that is emitted.

torch_npu's own shape functions accept nearly anything; a wrong call shows on the device, or as wrong numbers. Limits are those of
the oldest kernels known to be in use (910B and 910C, CANN of 2025-11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import is_contiguous_or_false

from .antiquant import NIBBLES
from .shapes import expected_rows, has_shape, of_groups, same

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
FLOAT8S = (torch.float8_e4m3fn, torch.float8_e5m2)


class ArgumentError(ValueError):
    """An npu op is called against its rules: names the op, the argument and the rule."""


@dataclass(frozen=True)
class Rule:
    """`holds(a)` for the bound arguments `a` (an attribute for each), or the call is refused with `text`."""

    argument: str
    text: str
    holds: Callable[[Any], bool]


def check(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Check a call of an npu op on (fake) tensors. Raises ArgumentError on the first rule that does not hold."""
    schema = op._schema
    name = schema.name.split("::")[1]
    bound = SimpleNamespace(**{a.name: a.default_value for a in schema.arguments})
    for a, value in zip(schema.arguments, args):
        setattr(bound, a.name, value)
    for key, value in kwargs.items():
        if not hasattr(bound, key):
            raise ArgumentError(f"{name}: there is no argument {key!r}")
        setattr(bound, key, value)
    if name not in RULES:
        raise ArgumentError(f"{name}: no rules are known for this op")
    if name not in DIFFERENTIABLE and torch.is_grad_enabled():
        _no_gradient(name, vars(bound))
    for rule in RULES[name]:
        if not rule.holds(bound):
            raise ArgumentError(f"{name}: {rule.argument} {rule.text}")


DIFFERENTIABLE = ("npu_swiglu", "npu_moe_token_permute", "npu_moe_token_unpermute")


def _no_gradient(name: str, args: dict[str, Any]) -> None:
    """torch_npu drops the gradient of its other ops with a warning at most."""
    for argument, value in args.items():
        for t in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(t, Tensor) and t.requires_grad:
                raise ArgumentError(f"{name}: {argument} wants a gradient, and the op has none")


def columns(weight: Tensor) -> Any:
    """N of a weight [E, K, N], or [E, K, N / 8] where an int32 holds eight of 4 bits."""
    return weight.shape[2] * (NIBBLES if weight.dtype == torch.int32 else 1)


def _codes(a: Any) -> tuple[torch.dtype, ...]:
    """What weights under rows of floats may be in."""
    return (torch.int8, torch.int32) if a.antiquant_offset else (torch.int8, torch.int32, *FLOAT8S)


def _is_antiquant(given: Sequence[Tensor], a: Any) -> bool:
    (s, *more), w = given, a.weight[0]
    if more or s.dtype != a.x[0].dtype:
        return False
    if s.ndim != 3:
        return has_shape(s, w.shape[0], columns(w))
    return w.dtype == torch.int32 and has_shape(s, w.shape[0], None, columns(w)) and w.shape[1] % s.shape[1] == 0


def _is_index(t: Tensor) -> bool:
    return t.dtype == torch.int32 and t.ndim == 1


def _align(n: int, to: int) -> int:
    return -(-n // to) * to


def _grouping(a: Any) -> bool:
    return bool(a.group_count > 1 and a.k_group < a.group_count)


def _bias_dtype(x: torch.dtype) -> torch.dtype:
    return {torch.bfloat16: torch.float32, torch.int8: torch.int32}.get(x, x)


_GATING = (
    Rule("x", "must be [T, E] in fp16, bf16 or fp32", lambda a: a.x.ndim == 2 and a.x.dtype in FLOATS),
    Rule("x", "may hold 2048 experts at most", lambda a: a.x.shape[1] <= 2048),
    Rule("bias", "must be [E]", lambda a: has_shape(a.bias, a.x.shape[1])),
    Rule("bias", "must have the dtype of x", lambda a: a.bias is None or a.bias.dtype == a.x.dtype),
    Rule("renorm", "must be 0: the kernel has no other mode", lambda a: a.renorm == 0),
    Rule("norm_type", "must be 0 (softmax) or 1 (sigmoid)", lambda a: a.norm_type in (0, 1)),
    Rule("group_select_mode", "must be 0 (max) or 1 (sum of two)", lambda a: a.group_select_mode in (0, 1)),
    Rule("group_count", "must divide the experts", lambda a: a.group_count >= 1 and a.x.shape[1] % a.group_count == 0),
    Rule("k_group", "must be 1 to group_count", lambda a: 1 <= a.k_group <= a.group_count),
    Rule("k", "must be 1 to the experts of the kept groups", lambda a: 1 <= a.k <= a.k_group * a.x.shape[1] // a.group_count),
    Rule("group_select_mode", "1 needs two experts a group", lambda a: a.group_select_mode == 0 or a.x.shape[1] // a.group_count >= 2),
    Rule(
        "group_count", "of groups aligned to 32 experts may cover 2048 at most",
        lambda a: not _grouping(a) or _align(a.x.shape[1] // a.group_count, 32) * a.group_count <= 2048,
    ),
    Rule("tid2eid", "and input_ids come together", lambda a: (a.input_ids is None) == (a.tid2eid is None)),
)  # fmt: skip
_GATING_SOFTMAX = (
    Rule("x", "must be [T, E] or [B, S, E] in fp16, bf16 or fp32", lambda a: a.x.ndim in (2, 3) and a.x.dtype in FLOATS),
    Rule("k", "must be 1 to min(E, 1024)", lambda a: 1 <= a.k <= min(1024, a.x.shape[-1])),
    Rule("finished", "must be bool", lambda a: a.finished is None or a.finished.dtype == torch.bool),
)
_PERMUTED = (
    Rule("sorted_indices", "must be int32 and one-dimensional", lambda a: _is_index(a.sorted_indices)),
    Rule("padded_mode", "is not supported", lambda a: not a.padded_mode),
)

# experts over ranks: what dispatch and combine must be told alike
_EXCHANGE = (
    Rule("expert_ids", "must be [T, k] in int32, k up to 16", lambda a: a.expert_ids.dtype == torch.int32 and a.expert_ids.ndim == 2
         and 1 <= a.expert_ids.shape[1] <= 16),
    Rule("ep_rank_id", "must be one of ep_world_size ranks, 2 to 768", lambda a: 2 <= a.ep_world_size <= 768
         and 0 <= a.ep_rank_id < a.ep_world_size),
    Rule("group_ep", "must be a name of 1 to 127 characters", lambda a: 1 <= len(a.group_ep) < 128),
    Rule("moe_expert_num", "must be 1024 at most, as many on each rank",
         lambda a: a.moe_expert_num <= 1024 and a.moe_expert_num % a.ep_world_size == 0),
    Rule("x_active_mask", "must be bool [T]", lambda a: a.x_active_mask is None or (
        a.x_active_mask.dtype == torch.bool and has_shape(a.x_active_mask, a.expert_ids.shape[0]))),
    Rule("shared_expert_num", "must be 0: it is added behind", lambda a: a.shared_expert_num == a.shared_expert_rank_num == 0),
    Rule("expert_scales", "must be [T, k] in fp32", lambda a: a.expert_scales is None or (
        a.expert_scales.dtype == torch.float32 and has_shape(a.expert_scales, a.expert_ids.shape[0], a.expert_ids.shape[1]))),
    Rule("zero_expert_num", "and const_expert_num must be 0", lambda a: a.zero_expert_num == a.const_expert_num == 0),
)  # fmt: skip

RULES: dict[str, tuple[Rule, ...]] = {
    "npu_moe_gating_top_k": _GATING,
    "npu_moe_gating_top_k_softmax": _GATING_SOFTMAX,
    "npu_moe_gating_top_k_softmax_v2": (*_GATING_SOFTMAX, Rule("renorm", "must be 0 or 1", lambda a: a.renorm in (0, 1))),
    "npu_moe_init_routing_v2": (
        Rule("x", "must be [T, H] in fp16, bf16, fp32, or int8 without quantisation",
             lambda a: a.x.ndim == 2 and (a.x.dtype in FLOATS or (a.x.dtype == torch.int8 and a.quant_mode == -1))),
        Rule("expert_idx", "must be int32", lambda a: a.expert_idx.dtype == torch.int32),
        Rule("expert_idx", "must be [T, k]", lambda a: has_shape(a.expert_idx, a.x.shape[0], None)),
        Rule("expert_num", "must be 1 to 10240", lambda a: 1 <= a.expert_num <= 10240),
        Rule("active_num", "must be -1: it is a plain int, a token count would make the graph static", lambda a: a.active_num == -1),
        Rule("active_expert_range", "must be given: the default is kept from the first call of the process",
             lambda a: len(a.active_expert_range or ()) == 2),
        Rule("active_expert_range", "must lie within the experts",
             lambda a: 0 <= a.active_expert_range[0] < a.active_expert_range[1] <= a.expert_num),
        Rule("drop_pad_mode", "must be 0: older kernels drop nothing", lambda a: a.drop_pad_mode == 0),
        Rule("expert_tokens_num_type", "must be 1 (counts) or 2 (pairs): older kernels know no other",
             lambda a: a.expert_tokens_num_type in (1, 2)),
        Rule("expert_tokens_num_flag", "must be True: older kernels demand it", lambda a: a.expert_tokens_num_flag is True),
        Rule("row_idx_type", "must be 0 (gather) or 1 (scatter)", lambda a: a.row_idx_type in (0, 1)),
        Rule("quant_mode", "must be -1 (none) or 1 (dynamic)", lambda a: a.quant_mode in (-1, 1)),
        Rule("scale", "must be [T] in fp32 without quantisation, [experts, H] with", lambda a: a.scale is None or (
            a.scale.dtype == torch.float32
            and has_shape(a.scale, *(a.x.shape[:1] if a.quant_mode == -1 else (a.expert_num, a.x.shape[1]))))),
        Rule("offset", "is only for static quantisation", lambda a: a.offset is None),
    ),
    "npu_grouped_matmul": (
        Rule("group_type", "must be 0 (rows) or 2 (the inner dim)", lambda a: a.group_type in (0, 2)),
        Rule("x", "and weight must hold one tensor each", lambda a: len(a.x) == len(a.weight) == 1),
        Rule("group_list", "must be an int64 tensor", lambda a: a.group_list is not None and a.group_list.dtype == torch.int64),
        Rule("group_list_type", "must be 0 (cumulative) or 1 (counts), 0 for a list of one", lambda a: (
            a.group_list_type == 0 or a.group_list_type == 1 and a.group_list.shape[0] != 1)),
        Rule("split_item", "must be 2 or 3: one output", lambda a: a.split_item in (2, 3)),
        Rule("weight", "must be [E, K, N] (rows) or [M, N] (inner dim)", lambda a: a.weight[0].ndim == (3 if a.group_type == 0 else 2)),
        Rule("weight", "must have the dtype of x, or be int8 with antiquant_scale (int32: eight of 4 bits; float8: no offset)",
             lambda a: a.weight[0].dtype in (_codes(a) if a.antiquant_scale else (a.x[0].dtype,))),
        Rule("antiquant_scale", "is for fp16 and bf16 rows, without scale and per_token_scale", lambda a: not a.antiquant_scale or (
            a.x[0].dtype in HALVES and a.group_type == 0 and not a.scale and not a.per_token_scale)),
        Rule("antiquant_scale", "and antiquant_offset come together for int8 and 4 bits", lambda a: (
            bool(a.antiquant_scale) == bool(a.antiquant_offset) or a.weight[0].dtype in FLOAT8S)),
        Rule("antiquant_scale", "and antiquant_offset must be [E, N], of 4 bits [E, G, N] too with G a divisor of K, in the dtype of x",
             lambda a: all(_is_antiquant(s, a) for s in (a.antiquant_scale, a.antiquant_offset) if s)),
        Rule("antiquant_offset", "must have the shape of antiquant_scale",
             lambda a: not a.antiquant_offset or a.antiquant_offset[0].ndim == a.antiquant_scale[0].ndim),
        Rule("weight", "may hold 1024 experts at most", lambda a: a.group_type == 2 or a.weight[0].shape[0] <= 1024),
        Rule("x", "must be [M, K] with the K of weight, in fp16, bf16, fp32 or int8", lambda a: a.x[0].ndim == 2 and
             a.x[0].dtype in (*FLOATS, torch.int8) and (a.group_type == 2 or same(a.x[0].shape[1], a.weight[0].shape[1]))),
        Rule("x", "must be contiguous when rows are grouped", lambda a: a.group_type == 2 or is_contiguous_or_false(a.x[0])),
        Rule("group_list", "must have an entry for each expert", lambda a: a.group_type == 2 or same(
            a.group_list.shape[0], a.weight[0].shape[0])),
        Rule("bias", "must be [E, N]: one tensor for one weight", lambda a: not a.bias or (
            len(a.bias) == 1 and has_shape(a.bias[0], a.weight[0].shape[0], columns(a.weight[0])))),
        Rule("bias", "must be fp16 for fp16, fp32 for bf16 and fp32, int32 for int8",
             lambda a: not a.bias or a.bias[0].dtype == _bias_dtype(a.x[0].dtype)),
        Rule("group_type", "2 takes neither bias nor scales, and no bytes", lambda a: a.group_type == 0 or (
            not a.bias and not a.scale and not a.per_token_scale and a.x[0].dtype != torch.int8)),
        Rule("scale", "must be [E, N], and only for int8", lambda a: not a.scale or (
            a.x[0].dtype == torch.int8 and has_shape(a.scale[0], a.weight[0].shape[0], a.weight[0].shape[2]))),
        Rule("per_token_scale", "must be [M] in fp32, and only for int8", lambda a: not a.per_token_scale or (
            a.x[0].dtype == torch.int8 and a.per_token_scale[0].dtype == torch.float32
            and has_shape(a.per_token_scale[0], a.x[0].shape[0]))),
        Rule("scale", "must be bf16 when the output is bf16, fp32 when it is fp16", lambda a: not a.scale or a.scale[0].dtype == {
            15: torch.bfloat16, 5: torch.float32}.get(a.output_dtype, a.scale[0].dtype)),
        Rule("output_dtype", "must be given for int8", lambda a: a.x[0].dtype != torch.int8 or a.output_dtype in (3, 5, 15)),
        Rule("act_type", "must be 0", lambda a: not a.act_type),
        Rule("tuning_config", "must be the rows that an expert is expected to have: one number, not above all rows", lambda a: (
            expected_rows(a.tuning_config, a.x[0]))),
    ),
    "npu_swiglu": (
        Rule("input", "must be fp16, bf16 or fp32", lambda a: a.input.dtype in FLOATS),
        Rule("dim", "must be the last, of even size", lambda a: a.dim == -1 and a.input.shape[-1] % 2 == 0),
        Rule("input", "must be contiguous", lambda a: is_contiguous_or_false(a.input)),
    ),
    "npu_clipped_swiglu": (
        Rule("x", "must be fp16, bf16 or fp32", lambda a: a.x.dtype in FLOATS),
        Rule("dim", "must be the last, of even size", lambda a: a.dim == -1 and a.x.shape[-1] % 2 == 0),
        Rule("limit", "must be positive", lambda a: a.limit > 0),
        Rule("group_index", "must be int64 counts", lambda a: a.group_index is None or a.group_index.dtype == torch.int64),
    ),
    "npu_moe_finalize_routing": (
        Rule("expanded_permuted_rows", "must be fp16, bf16 or fp32", lambda a: a.expanded_permuted_rows.dtype in FLOATS),
        Rule("drop_pad_mode", "must be 2: rows come from init_routing_v2 with row_idx_type 0, other modes permute tokens",
             lambda a: a.drop_pad_mode == 2),
        Rule("expanded_src_to_dst_row", "must be int32 [T k]", lambda a: _is_index(a.expanded_src_to_dst_row)),
        Rule("expanded_permuted_rows", "must be [T k, H]",
             lambda a: has_shape(a.expanded_permuted_rows, a.expanded_src_to_dst_row.shape[0], None)),
        Rule("skip2", "needs skip1", lambda a: a.skip1 is not None or a.skip2 is None),
        Rule("skip1", "and skip2 must be [T, H] in the dtype of the rows", lambda a: all(
            s is None or (s.dtype == a.expanded_permuted_rows.dtype and has_shape(s, None, a.expanded_permuted_rows.shape[1]))
            for s in (a.skip1, a.skip2))),
        Rule("scales", "must be [T, k]", lambda a: has_shape(a.scales, None, None)),
        Rule("scales", "must have the dtype of the rows, or fp32 when they are bf16", lambda a: a.scales is None or
             a.scales.dtype == a.expanded_permuted_rows.dtype or
             (a.scales.dtype == torch.float32 and a.expanded_permuted_rows.dtype == torch.bfloat16)),
        Rule("k", "must be 1 without scales", lambda a: a.scales is not None or a.k == 1),
        Rule("bias", "needs export_for_source_row", lambda a: a.bias is None or a.export_for_source_row is not None),
    ),
    "npu_moe_token_permute": (
        Rule("indices", "must be int32 or int64", lambda a: a.indices.dtype in (torch.int32, torch.int64)),
        Rule("indices", "must be [T], or [T, k] with k up to 512",
             lambda a: a.indices.ndim == 1 or (a.indices.ndim == 2 and a.indices.shape[1] <= 512)),
        Rule("tokens", "must be [T, H]", lambda a: has_shape(a.tokens, a.indices.shape[0], None)),
        Rule("padded_mode", "is not supported", lambda a: not a.padded_mode),
    ),
    "npu_moe_token_unpermute": (
        *_PERMUTED,
        Rule("probs", "must be [T, k] in the dtype of the rows: fp32 weights of bf16 rows give NaN gradients",
             lambda a: a.probs is None or (a.probs.ndim == 2 and a.probs.dtype == a.permuted_tokens.dtype)),
    ),
    "npu_moe_distribute_dispatch_v2": (
        Rule("x", "must be [T, H] in fp16 or bf16", lambda a: a.x.dtype in HALVES and has_shape(a.x, a.expert_ids.shape[0], None)),
        Rule("x", "must have a fixed number of rows, 512 at most", lambda a: type(a.x.shape[0]) is int and 0 < a.x.shape[0] <= 512),
        Rule("quant_mode", "must be 0 (none) or 2 (dynamic)", lambda a: a.quant_mode in (0, 2)),
        Rule("expert_token_nums_type", "must be 1 (counts)", lambda a: a.expert_token_nums_type == 1),
        *_EXCHANGE,
    ),
    "npu_moe_distribute_combine_v2": (
        Rule("expand_x", "must be [A, H] in fp16 or bf16", lambda a: a.expand_x.ndim == 2 and a.expand_x.dtype in HALVES),
        Rule("ori_x", "must be [T, H] where there are copy experts", lambda a: not a.copy_expert_num or (
            a.ori_x is not None and has_shape(a.ori_x, a.expert_ids.shape[0], a.expand_x.shape[1]))),
        Rule("comm_quant_mode", "must be 0", lambda a: a.comm_quant_mode == 0),
        *_EXCHANGE,
    ),
    "npu_moe_update_expert": (
        Rule("expert_ids", "must be [T, k] in int32", lambda a: a.expert_ids.dtype == torch.int32 and a.expert_ids.ndim == 2),
        Rule("eplb_table", "must be [E, 1 + places] in int32", lambda a: (
            a.eplb_table.dtype == torch.int32 and a.eplb_table.ndim == 2 and a.eplb_table.shape[1] >= 2)),
        Rule("balance_mode", "must be 0 (by rank) or 1 (by token)", lambda a: a.balance_mode in (0, 1)),
        Rule("local_rank_id", "must be one of world_size ranks, 2 to 768, in balance_mode 0", lambda a: a.balance_mode == 1 or (
            2 <= a.world_size <= 768 and 0 <= a.local_rank_id < a.world_size)),
        Rule("expert_scales", "and pruning_threshold are not used", lambda a: a.expert_scales is None and a.pruning_threshold is None),
    ),
    "npu_dynamic_quant": (
        Rule("input", "must be fp16 or bf16", lambda a: a.input.dtype in HALVES),
        Rule("group_index", "must be cumulative counts in int32", lambda a: a.group_index is None or a.group_index.dtype == torch.int32),
        Rule("smooth_scales", "must be [groups, K] in the dtype of input, beside group_index",
             lambda a: of_groups(a.smooth_scales, a.group_index, a.input.shape[1], (a.input.dtype,))),
    ),
    "npu_dequant_swiglu_quant": (
        Rule("x", "must be int32, fp16 or bf16", lambda a: a.x.dtype in (torch.int32, *HALVES)),
        Rule("x", "must have a width of a multiple of 64 and at most 2 x 10496 when grouped",
             lambda a: a.group_index is None or (a.x.shape[1] // 2 <= 10496 and a.x.shape[1] // 2 % 64 == 0)),
        Rule("x", "must have halves of 256 channels at least: few rows of narrower ones came out wrong", lambda a: a.x.shape[1] >= 512),
        Rule("weight_scale", "must be fp32 [E, 2I], and only for int32", lambda a: a.weight_scale is None or (
            a.x.dtype == torch.int32 and a.weight_scale.dtype == torch.float32 and same(a.weight_scale.shape[-1], a.x.shape[1]))),
        Rule("weight_scale", "and activation_scale must be given for int32",
             lambda a: a.x.dtype != torch.int32 or (a.weight_scale is not None and a.activation_scale is not None)),
        Rule("activation_scale", "must be fp32", lambda a: a.activation_scale is None or a.activation_scale.dtype == torch.float32),
        Rule("activate_left", "must be True for [gate | up]: the default activates the right half",
             lambda a: a.activate_left or a.swiglu_mode),
        Rule("quant_mode", "must be 1 (dynamic)", lambda a: a.quant_mode == 1),
        Rule("group_index", "must be int64 counts", lambda a: a.group_index is None or a.group_index.dtype == torch.int64),
        Rule("quant_scale", "must be [groups, I]", lambda a: of_groups(a.quant_scale, a.group_index, a.x.shape[1] // 2, FLOATS)),
    ),
    "npu_grouped_matmul_swiglu_quant_v2": (
        Rule("x", "must be [M, K] in int8, K below 65536", lambda a: a.x.ndim == 2 and a.x.dtype == torch.int8 and a.x.shape[1] < 65536),
        Rule("weight", "and weight_scale must hold one tensor each", lambda a: len(a.weight) == len(a.weight_scale) == 1),
        Rule("weight", "must be [E, K, N] in int8 with the K of x", lambda a: (
            a.weight[0].ndim == 3 and a.weight[0].dtype == torch.int8 and same(a.weight[0].shape[1], a.x.shape[1]))),
        Rule("weight", "must fall into blocks of 16 x 32: it is read in the fractal format",
             lambda a: a.weight[0].shape[1] % 16 == 0 and a.weight[0].shape[2] % 32 == 0),
        Rule("weight", "may have 1024 experts and 10240 channels at most", lambda a: (
            a.weight[0].shape[0] <= 1024 and a.weight[0].shape[2] <= 10240)),
        Rule("weight_scale", "must be [E, N] in fp32, fp16 or bf16", lambda a: (
            a.weight_scale[0].dtype in FLOATS and has_shape(a.weight_scale[0], a.weight[0].shape[0], a.weight[0].shape[2]))),
        Rule("x_scale", "must be [M] in fp32", lambda a: a.x_scale.dtype == torch.float32 and has_shape(a.x_scale, a.x.shape[0])),
        Rule("group_list", "must be int64 with an entry for each expert", lambda a: (
            a.group_list.dtype == torch.int64 and has_shape(a.group_list, a.weight[0].shape[0]))),
        Rule("group_list_type", "must be 0 (cumulative) or 1 (counts), 0 for a list of one", lambda a: (
            a.group_list_type == 0 or a.group_list_type == 1 and a.group_list.shape[0] != 1)),
        Rule("dequant_mode", "and quant_mode must be 0: scales of channels and rows", lambda a: a.dequant_mode == a.quant_mode == 0),
        Rule("dequant_dtype", "must be fp32 and quant_dtype int8", lambda a: (a.dequant_dtype, a.quant_dtype) == (6, 1)),
        Rule("tuning_config", "must be the rows that an expert is expected to have: one number, not above all rows", lambda a: (
            expected_rows(a.tuning_config, a.x))),
        Rule("smooth_scale", "is for weights of 4 bits, bias for none", lambda a: a.smooth_scale is None and a.bias is None),
    ),
    "npu_swiglu_clip_quant": (
        Rule("x", "must be contiguous [M, 2I] in bf16", lambda a: (
            a.x.ndim == 2 and a.x.dtype == torch.bfloat16 and is_contiguous_or_false(a.x))),
        Rule("x", "must have halves of a multiple of 64 and a width of 10496 at most",
             lambda a: a.x.shape[1] // 2 % 64 == 0 and a.x.shape[1] <= 10496),
        Rule("group_index", "must be int64 counts", lambda a: a.group_index.dtype == torch.int64 and a.group_index.ndim == 1),
        Rule("group_alpha", "must be fp32 with an entry for each group", lambda a: (
            a.group_alpha.dtype == torch.float32 and has_shape(a.group_alpha, a.group_index.shape[0]))),
        Rule("activate_left", "must be True for [gate | up]: the default activates the right half", lambda a: a.activate_left),
        Rule("quant_mode", "must be 1 (dynamic)", lambda a: a.quant_mode == 1),
        Rule("clamp_mode", "must be 1: there is no other", lambda a: a.clamp_mode == 1),
    ),
}  # fmt: skip
