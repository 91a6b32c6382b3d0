"""Every meaning of the catalogue that becomes npu ops, through the emulation that is written from the documents alone.

The graph is made of the expected IR, so nothing here depends on what is recovered; the oracle is the naive reading in float64.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import catalogue
import documents
import pytest
import torch
import torch.fx as fx
from catalogue import Fused, naive
from catalogue.base import H
from catalogue.naive import Parts
from torch import Tensor

from moe_compile.ir import Experts, Gating, MoeBlock, Norm, families
from moe_compile.lowering.ascend import capability, law, register
from moe_compile.lowering.ascend.operands import Choices
from moe_compile.lowering.ascend.rewrite import lower
from moe_compile.lowering.ascend.weights import Recipe
from moe_compile.lowering.reference.routing import Routing
from moe_compile.ops import experts_args, route_args

register.ensure()
ops = torch.ops.moe_compile


def meant(verdict: Fused) -> tuple[Gating, Experts] | None:
    """A block in a type that the npu ops take it in; None where they take it in none."""
    g, e = verdict.gating, verdict.experts
    if g is None or e.hidden != H or e.chain is not None or e.ids_mapped or e.first or g.norm is not None and g.norm.kind is Norm.EXPR:
        return None
    e = replace(e, dtype=torch.bfloat16 if e.coded else torch.float32)
    return None if capability.refuses(MoeBlock(g, e)) else (replace(g, weight_dtype=torch.float32, score_dtype=torch.float32), e)


@functools.cache
def meanings() -> dict[str, str]:
    """One entry of the catalogue for each meaning."""
    found: dict[str, str] = {}
    for name, cls in catalogue.entries().items():
        if isinstance(cls.expect, Fused) and not cls.zoo_only and (block := meant(cls.expect)) is not None:
            found.setdefault(repr(block), name)
    return {name: key for key, name in found.items()}


def graph_of(g: Gating, e: Experts, p: Parts) -> tuple[fx.GraphModule, list[Tensor]]:
    """x, logits, parameters -> the block, as the passes leave it."""
    graph, given = fx.Graph(), []

    def put(t: Tensor | None) -> fx.Node | None:
        if t is None:
            return None
        n = graph.placeholder(f"t{len(given)}")
        n.meta["example_value"] = t
        given.append(t)
        return n

    family = families.family_of(e)
    x, logits, bias, table, add = (put(t) for t in (p.x, p.logits, p.bias if g.bias else None, p.expert_scale, p.add))
    lists = [[put(t) for t in getattr(p, name)] for name in family.names]

    def call(value: Any, f: Callable[..., Any], *args: Any) -> fx.Node:
        n = graph.call_function(f, args)
        n.meta["example_value"] = value
        return n

    tokens = len(p.x)
    values = torch.zeros(tokens, g.k), torch.zeros(tokens, g.k, dtype=torch.int64)
    routed = call(values, ops.route.default, logits, bias, table, *route_args(g))
    w, ids = (call(v, operator.getitem, routed, i) for i, v in enumerate(values))
    out = p.x.new_zeros(tokens, e.out_features)
    graph.output((call(out, getattr(ops, family.op).default, x, ids, w, *lists, add, *experts_args(e)),))
    return fx.GraphModule({}, graph), given


def test_the_laws_all_occur() -> None:
    """Of the rows of the gating's laws those that the catalogue can reach without an NPU."""
    cases = [meant(catalogue.entries()[n].expect) for n in meanings()]  # type: ignore[arg-type]
    rows = {law.choose_routing(law.Case(Routing(*route_args(g)), g.num_experts))[0].name for g, _ in cases if g is not None}
    assert len(meanings()) > 40 and len(rows) >= 6, rows


@pytest.mark.parametrize("name", meanings())
@torch.no_grad()
def test_a_meaning_through_the_documents(name: str) -> None:
    """fp32 within 1e-5 of float64; weights in few bits and rows in 8 bits in bf16, whose own rounding is 2^-9."""
    cls = catalogue.entries()[name]
    g, e = meant(cls.expect)  # type: ignore[arg-type, misc]
    torch.manual_seed(2)
    case = catalogue.build(cls).eval()
    p = case.parts(*case.example_inputs(5))
    smooth = {f: [k.to(e.dtype) for k in getattr(p, f)] for f in ("up_smooth", "down_smooth")}
    tensors = {f: getattr(p, f).to(e.dtype) for f in ("x", "add") if getattr(p, f) is not None}
    wide = replace(p, **tensors, **smooth, logits=p.logits.float())
    gm, given = graph_of(g, e, wide)
    lowered = lower(gm, Choices())
    inputs = [i.pack([given[s.position] for s in i.sources]) if isinstance(i, Recipe) else given[i] for i in lowered.inputs]
    run = documents.Interpreter(lowered.module)
    (out,) = run.run(*inputs)
    want = naive.of_ir(MoeBlock(g, e), wide)
    assert "npu_moe_init_routing_v2" in run.called and run.called[-1] == "npu_moe_finalize_routing"
    assert float((out.double() - want).abs().max() / want.abs().max()) <= (1e-5 if e.dtype == torch.float32 else 0.03)
