"""A block as npu calls, written as plain torch: run on tensors it computes, run under `record.Recorder` it becomes graph nodes.

Every npu op goes through `call`, which checks the arguments first. Sizes are never read, so token counts stay symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import BiasOn, Form, Norm, Score
from ...ir import scalar as act
from ...ir import score as apply_score
from ..reference import generic, routing
from ..reference.routing import Routing
from . import device, law, schemas
from .rules import check


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """torch.ops.npu.<name>.default (ops of others: torch.ops.custom) on arguments that its rules allow. Raises rules.ArgumentError."""
    space = torch.ops.custom if name in schemas.CUSTOM else torch.ops.npu
    op = getattr(space, name).default
    check(op, args, kwargs)
    return op(*args, **kwargs)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """No node where there is nothing to cast."""
    return t if t.dtype == dtype else t.to(dtype)


# ---- routing -----------------------------------------------------------------------------------------------------------


def route(logits: Tensor, bias: Tensor | None, table: Tensor | None, r: Routing, training: bool = False) -> tuple[Tensor, Tensor]:
    """logits [T, E], bias [E], table [E] -> weights [T, k] in r.weight_dtype, ids [T, k] in int32 (ATen: int64).

    Training takes ATen: the gating ops' backward cannot be traced, or is silently missing.
    """
    row = law.ROUTING[-1] if training else law.choose_routing(case(logits, r))[0]
    weights, ids, done = _ROWS[row.name](logits, bias, r)
    return _finish(weights, ids, bias, table, r, done), ids


def case(logits: Tensor, r: Routing) -> law.Case:
    """What the laws ask about a routing of these logits [T, E]."""
    tokens, experts = logits.shape
    return law.Case(r, experts, tokens if type(tokens) is int else None, device.family())


Routed = tuple[Tensor, Tensor, frozenset[str]]  # weights, ids, what has been done to the weights


def _gating(logits: Tensor, bias: Tensor | None, r: Routing, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """npu_moe_gating_top_k on fp32 logits and bias: a bias in bf16 would reorder near ties."""
    wide = None if bias is None else cast(bias, torch.float32)
    groups = dict(k_group=r.kept_groups, group_count=r.n_groups, group_select_mode=r.group_top - 1) if r.n_groups else {}
    every = dict(k_group=1, group_count=1, group_select_mode=0, renorm=0) | groups | kwargs
    out: tuple[Tensor, Tensor, Tensor] = call("npu_moe_gating_top_k", cast(logits, torch.float32), r.k, bias=wide, **every)
    return out


def _sigmoid(logits: Tensor, bias: Tensor | None, r: Routing) -> Routed:
    """w = s[ids] / (Σ s[ids] + eps) · scale."""
    w, ids, _ = _gating(logits, bias, r, norm_type=1, out_flag=False, routed_scaling_factor=r.scale, eps=r.norm_eps)
    return w, ids, frozenset(("norm", "scale"))


def _sigmoid_raw(logits: Tensor, bias: Tensor | None, r: Routing) -> Routed:
    """w = s[ids]: the op's own weights are renormalised and not used."""
    _, ids, scores = _gating(logits, bias, r, norm_type=1, out_flag=True, routed_scaling_factor=1.0)
    return scores.gather(1, ids.to(torch.int64)), ids, frozenset()


def _softmax(logits: Tensor, _: Tensor | None, r: Routing) -> Routed:
    """w = softmax(l)[ids]."""
    w, ids, _rows = call("npu_moe_gating_top_k_softmax", cast(logits, torch.float32), None, r.k)
    return w, ids, frozenset()


def _softmax_general(logits: Tensor, bias: Tensor | None, r: Routing) -> Routed:
    """w = softmax(l)[ids] · scale; the scale waits where a normaliser or an addend follows."""
    waits = r.norm != Norm.NONE or r.bias_in_weights
    w, ids, _ = _gating(logits, bias, r, norm_type=0, out_flag=False, routed_scaling_factor=1.0 if waits else r.scale)
    return w, ids, frozenset(() if waits else ("scale",))


def _softmax_second(logits: Tensor, _: Tensor | None, r: Routing) -> Routed:
    """w = softmax(l)[ids]."""
    w, ids, _none = call("npu_moe_gating_top_k_softmax_v2", cast(logits, torch.float32), k=r.k, renorm=0, output_softmax=False)
    return w, ids, frozenset()


def _softmax_selected(logits: Tensor, _: Tensor | None, r: Routing) -> Routed:
    """w = softmax(l[ids]). A cast to the dtype that the model selects in comes first: two logits may be one there."""
    wide = cast(cast(logits, r.score_dtype), torch.float32)
    w, ids, _none = call("npu_moe_gating_top_k_softmax_v2", wide, k=r.k, renorm=1, output_softmax=False)
    return w, ids, frozenset()


def _by_logits(logits: Tensor, _: Tensor | None, r: Routing) -> Routed:
    """w = score(l)[ids], or score(l[ids]): the op's own weights are not used."""
    _weights, ids, _done = _softmax_selected(logits, None, r)
    raw, score = cast(logits, r.score_dtype), Score(r.score)
    if not r.score_over_selected:
        return apply_score(score, raw).gather(-1, ids.to(torch.int64)), ids, frozenset()
    return apply_score(score, raw.gather(-1, ids.to(torch.int64))), ids, frozenset()


def _aten(logits: Tensor, bias: Tensor | None, r: Routing) -> Routed:
    """As recovered, with ops that every graph mode converts."""
    logits = cast(logits, r.score_dtype)
    raw = logits if r.score_over_selected else apply_score(Score(r.score), logits)
    choice = logits if r.bias_on == BiasOn.LOGIT else raw
    if bias is not None and r.bias_on:
        choice = choice + cast(bias, r.score_dtype)
    ids = routing._keep_groups(choice, r).topk(r.k, -1)[1]
    picked = raw.gather(-1, ids)
    return apply_score(Score(r.score), picked) if r.score_over_selected else picked, ids, frozenset()


_FORMS = (_sigmoid, _sigmoid_raw, _softmax, _softmax_second, _softmax_general, _softmax_selected, _by_logits, _aten)
_ROWS = {row.name: form for row, form in zip(law.ROUTING, _FORMS, strict=True)}


def _finish(w: Tensor, ids: Tensor, bias: Tensor | None, table: Tensor | None, r: Routing, done: frozenset[str]) -> Tensor:
    """What the op has not done, in the order of the meaning: bias, normaliser, scale, table."""
    if r.bias_in_weights and bias is not None:
        w = w + cast(bias, w.dtype)[ids.to(torch.int64)]
    if r.norm != Norm.NONE and "norm" not in done:
        w = w / routing._guarded(routing._reduce(w, r), r)
    if r.scale != 1.0 and "scale" not in done:
        w = w * r.scale
    if table is not None:
        w = w * cast(table, w.dtype)[ids.to(torch.int64)]
    return cast(w, r.weight_dtype)


# ---- experts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """The operands of one product, as npu_grouped_matmul wants them: [E, in, out], biases [E, out] in the dtype the op asks for.

    Weights in few bits have scales, and offsets unless they are float8, [E, out] or [E, groups, out] in the dtype of the rows; int32 holds
    eight of 4 bits along the outputs. low [E, in, r] and high [E, r, out]: a low-rank pair, x W + s (x low) high.
    """

    matrix: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    s: float = 0.0


@dataclass(frozen=True)
class Packed:
    """The expert weights of a block; `up` holds one, or gate and up apart.

    nz: of training, weights are to be used in the fractal format; elsewhere they come in their format.
    """

    up: Sequence[Weight]
    down: Weight
    nz: bool = False

    @classmethod
    def of(cls, found: Mapping[str, Sequence[Tensor]], layout: generic.Layout, nz: bool) -> Packed:
        """Of operands by name, a list each."""

        def weight(name: str, part: int) -> Weight:
            def at(what: str, i: int = part) -> Tensor | None:
                return found[f"{name}{what}"][i] if found.get(f"{name}{what}") else None

            s, place = layout.pair(name, part), layout.pairs_before(name, part)
            pair = (at("_a", place), at("_b", place), s) if s else ()
            return Weight(found[name][part], at("_bias"), at("_scale"), at("_offset"), *pair)

        return cls([weight("up", i) for i in range(layout.halves())], weight("down", 0), nz)


def bias_dtype(dtype: torch.dtype) -> torch.dtype:
    """npu_grouped_matmul adds fp32 biases to bf16 products."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def within(ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Slots of no expert go to expert 0 with weight 0: the combine op needs every row to exist."""
    known = (ids >= 0) & (ids < num_experts)
    return torch.where(known, ids, torch.zeros_like(ids)), torch.where(known, weights, torch.zeros_like(weights))


def identity_addend(x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, num_identity: int) -> Tensor:
    """x · Σ_j w over the slots of identity experts."""
    chosen = (ids >= num_experts) & (ids < num_experts + num_identity)
    w = torch.where(chosen, weights, torch.zeros_like(weights)).sum(-1, keepdim=True)
    wide = generic.accumulate_dtype(x.dtype)
    return cast(cast(x, wide) * cast(w, wide), x.dtype)


def init_routing(
    x: Tensor, ids: Tensor, num_experts: int, quant_mode: int = -1, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, k] int32 -> rows by expert [T k, H], where each slot went [T k], rows per expert [E], scales of the rows [T k].

    quant_mode 1: rows in int8, each with its own scale, multiplied by `smooth` [E, H] of their expert before; -1: as they are.
    """
    return call(  # type: ignore[no-any-return]
        "npu_moe_init_routing_v2", x, ids, active_num=-1, expert_num=num_experts, drop_pad_mode=0, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, quant_mode=quant_mode, active_expert_range=[0, num_experts], row_idx_type=0,
        **({} if smooth is None else {"scale": smooth}),
    )  # fmt: skip


def list_type(counts: Tensor) -> int:
    """1: `group_list` holds counts. A list of one may not be of that type: its count is its running sum too, which is type 0."""
    return 0 if counts.shape[0] == 1 else 1


def groups(counts: Tensor, group_type: int = 0) -> dict[str, Any]:
    """How npu_grouped_matmul is told the rows of each expert; group_type 0: rows are grouped, 2: the inner dim is."""
    return dict(group_list=counts, split_item=3, group_type=group_type, group_list_type=list_type(counts))


def grouped(
    rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, scale: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """rows [M, K] by expert times weight [E, K, N]; with a scale (and offset) times (weight + offset) · scale, the weight in few bits."""
    extra = {} if bias is None else {"bias": [bias]}
    if scale is not None:
        extra |= {"antiquant_scale": [scale]}
    if offset is not None:
        extra |= {"antiquant_offset": [offset]}
    (out,) = call("npu_grouped_matmul", [rows], [weight], **extra, **groups(counts))
    return out  # type: ignore[no-any-return]


def product(rows: Tensor, w: Weight, counts: Tensor) -> Tensor:
    """rows [M, in] by expert -> [M, out]."""
    y = grouped(rows, w.matrix, w.bias, counts, w.scale, w.offset)
    return with_pair(y, rows, w, lambda x, m: grouped(x, m, None, counts))


def with_pair(y: Tensor, rows: Tensor, w: Weight, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """y + s (rows low) high, in the wider of the pair's type and the rows'."""
    if w.low is None or w.high is None:
        return y
    added = multiply(multiply(cast(rows, w.low.dtype), w.low), w.high)
    return cast(torch.add(cast(y, added.dtype), added, alpha=w.s), y.dtype)


def activate(products: Sequence[Tensor], layout: generic.Layout, differentiable: bool = False) -> Tensor:
    """The products of the up projection [M, ·] -> [M, I]. `differentiable`: with ops that have a gradient."""
    expr = act.decode(layout.act_ops, layout.act_consts)
    if law.swiglu(expr, layout.form):
        return call("npu_swiglu", products[0], -1)  # type: ignore[no-any-return]
    c = None if differentiable else law.clipped(expr, layout.form)
    if c is not None:
        apart = layout.form == Form.INTERLEAVED
        return call(  # type: ignore[no-any-return]
            "npu_clipped_swiglu", products[0], dim=-1, alpha=c.alpha, limit=c.limit, bias=c.bias, interleaved=apart
        )
    wide = generic.accumulate_dtype(products[0].dtype)
    parts = [cast(p, wide) for h in products for p in generic.split_pre(layout, h)]
    g, u = (parts[0], None) if layout.form == Form.SINGLE else parts
    return cast(act.run(layout.act_ops, layout.act_consts, g, u), products[0].dtype)


def experts_rows(x: Tensor, ids: Tensor, weights: Tensor, p: Packed, layout: generic.Layout) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, k] int32 within the experts -> output rows by expert, their index, and the weights that are still to be applied."""
    rows, index, counts, _ = init_routing(x, ids, layout.num_experts)
    if layout.weight_on_input:
        wide = generic.accumulate_dtype(x.dtype)
        by_row = torch.zeros_like(weights).reshape(-1).scatter(0, index.to(torch.int64), weights.reshape(-1))
        rows = cast(cast(rows, wide) * cast(by_row, wide)[:, None], x.dtype)
        weights = torch.ones_like(weights)
    return product(activate([product(rows, w, counts) for w in p.up], layout), p.down, counts), index, weights


def tuning(rows: Tensor, counts: Tensor) -> dict[str, list[int]]:
    """How many rows an expert has on average, which int8 products choose their tiles by: told where the number of rows is fixed."""
    total = rows.shape[0]
    return {"tuning_config": [-(-total // counts.shape[0])]} if type(total) is int and total > 0 else {}


def unpermute(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Σ_j w · row -> [T, H], weights in the dtype of the rows: fp32 ones of bf16 rows give NaN gradients."""
    return call("npu_moe_token_unpermute", rows, index, cast(weights, rows.dtype))  # type: ignore[no-any-return]


def combine(rows: Tensor, index: Tensor, weights: Tensor, addends: Sequence[Tensor]) -> Tensor:
    """Σ_j w · row + addends -> [T, H]. fp32 weights of bf16 rows stay fp32, as the kernel accumulates in fp32."""
    keeps = weights.dtype == torch.float32 and rows.dtype == torch.bfloat16
    skips: list[Tensor | None] = [cast(a, rows.dtype) for a in addends]
    while len(skips) < 2:
        skips.append(None)
    scales = weights if keeps else cast(weights, rows.dtype)
    return call("npu_moe_finalize_routing", rows, *skips, None, scales, index, None, 2)  # type: ignore[no-any-return]


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, p: Packed, addends: Sequence[Tensor], layout: generic.Layout, all_known: bool = False
) -> Tensor:
    """The whole routed part: x [T, H], ids [T, k], weights [T, k] -> [T, H_out]. `all_known`: every id is within the experts."""
    return finish(*start(x, ids, weights, p, layout, all_known), addends)


def start(
    x: Tensor, ids: Tensor, weights: Tensor, p: Any, layout: generic.Layout, all_known: bool, rows: Callable[..., Any] = experts_rows
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Everything up to the combine: rows, index, weights, and addends that the block has by itself.

    `p`: the packed weights, in the form that `rows` (experts_rows, or the quantised one) takes.
    """
    own = []
    if layout.num_identity:
        own.append(identity_addend(x, ids, weights, layout.num_experts, layout.num_identity))
    if layout.num_identity or not all_known:
        ids, weights = within(ids, weights, layout.num_experts)
    return (*rows(x, cast(ids, torch.int32), weights, p, layout), own)


def finish(rows: Tensor, index: Tensor, weights: Tensor, own: Sequence[Tensor], addends: Sequence[Tensor], fused: bool = True) -> Tensor:
    """The combine with at most two addends inside; more are added behind it. Not `fused`, which training cannot be: all of them are."""
    every = [*own, *addends]
    inside = every[:2] if fused else []
    out = combine(rows, index, weights, inside) if fused else unpermute(rows, index, weights)
    for a in every[len(inside) :]:
        out = out + cast(a, out.dtype)
    return out
