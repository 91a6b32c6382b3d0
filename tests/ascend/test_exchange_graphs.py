"""Blocks over ranks as graphs: the shared expert beside them, GE's nodes, logical experts that become physical ones on the way."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import sys
import threading
from typing import Any

import pytest
import torch
import torch.fx as fx
from goldens import MOE, as_recorded
from hazards import hazards, stages
from test_exchange import on_ranks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moe_compile.divided import divided_experts
from moe_compile.ir import Form, placement
from moe_compile.ir import scalar as act
from moe_compile.ir.records import Layout
from moe_compile.lowering.ascend import calls, device, exchange, modes, places, register, rewrite, schemas, streams
from moe_compile.lowering.ascend.operands import Choices

register.ensure()
T, K, H, I, E, WORLD = 8, 2, 1024, 32, 16, 16


def layout(identity: int = 0) -> calls.generic.Layout:
    ops, consts = act.encode(act.SWIGLU)
    return calls.generic.Layout(tuple(ops), tuple(consts), int(Form.CONCAT), E, True, True, True, False, identity)


@functools.cache
def traced(row: exchange.Row, masked: bool, identity: int) -> fx.GraphModule:
    """Two layers: experts of 16 ranks, by a table of places, and a shared expert that is added behind."""
    at = exchange.Place("ep", WORLD, 3)

    def layer(x: Tensor, ids: Tensor, w: Tensor, table: Tensor, up: Tensor, down: Tensor, s1: Tensor, s2: Tensor, active: Tensor) -> Tensor:
        shared = torch.nn.functional.silu(x @ s1) @ s2
        chosen = ids if identity else places.physical(ids, table, at.world, at.rank)  # identities stand behind the experts, in no table
        p = calls.Packed([calls.Weight(up)], calls.Weight(down))
        return exchange.experts(x, chosen, w, p, layout(identity), row, at, active if masked else None) + shared

    def two(x: Tensor, *rest: Tensor) -> tuple[Tensor]:
        return (layer(layer(x, *rest), *rest),)

    def half(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    given = (half(T, H), torch.empty(T, K, dtype=torch.int32, device="meta"), torch.empty(T, K, device="meta"),
             torch.empty(E, 2, dtype=torch.int32, device="meta"), half(1, H, 2 * I), half(1, I, H), half(H, I), half(I, H),
             torch.empty(T, dtype=torch.bool, device="meta"))  # fmt: skip
    with torch.no_grad():
        return make_fx(two)(*given)


def graph(row: exchange.Row = exchange.A3, masked: bool = False, identity: int = 0) -> fx.GraphModule:
    return copy.deepcopy(traced(row, masked, identity))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dialect", [streams.NpugraphEx, streams.Eager])
@pytest.mark.parametrize("row", [exchange.A3, exchange.A2], ids=["A3", "A2"])
def test_the_shared_expert_runs_beside_the_exchange(row: exchange.Row, dialect: type[streams.Dialect], masked: bool) -> None:
    """In two stages, joined where it is added; no call over ranks is on the side stream."""
    if schemas.wheel():
        modes.load("npugraph_ex", "npugraph_ex.ops._tagged_event")
    gm = graph(row, masked)
    assert streams.overlap(gm.graph, dialect) == 2
    assert hazards(gm.graph) == [] and stages(gm.graph) == []


def test_an_event_that_is_missing_is_found_here_too() -> None:
    gm = graph()
    streams.overlap(gm.graph, streams.Eager)
    gone = next(n for n in gm.graph.nodes if streams.name_of(n) == "wait_event" and str(n.args[0]).endswith("out"))
    gm.graph.erase_node(gone)
    assert hazards(gm.graph)


def test_another_sum_is_no_join() -> None:
    """Near miss: the residual of a layer behind holds an exchange further up, and what is added to it is another layer's MLP."""
    gm = graph()
    (out,) = [n for n in gm.graph.nodes if n.op == "output"]
    ((x,),) = out.args
    with gm.graph.inserting_before(out):
        mlp = gm.graph.call_function(torch.ops.aten.mm.default, (x, x))
        out.args = ((gm.graph.call_function(torch.ops.aten.add.Tensor, (x, mlp)),),)
    assert len(streams.find_sides(gm.graph)) == 2


@pytest.mark.skipif(not schemas.wheel(), reason="torch_npu converts the graph")
@pytest.mark.parametrize(("name", "row", "masked", "identity"), [
    ("exchange_a3", exchange.A3, True, 0), ("exchange_a3_identity", exchange.A3, False, 2), ("exchange_a2", exchange.A2, False, 0),
])  # fmt: skip
def test_ge_graphs_are_as_recorded(name: str, row: exchange.Row, masked: bool, identity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_compile.lowering.ascend import dry_run
    from moe_compile.options import Options

    torchair = modes.load("torchair", "torchair._ge_concrete_graph.compat_ir")
    monkeypatch.setattr(sys.modules["torchair._ge_concrete_graph.compat_ir"], "is_cann_compat", lambda *args, **kwargs: "")
    gm = graph(row, masked, identity)
    examples = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    nodes = dry_run.ge_nodes(torchair.get_compiler(modes.ge_config(Options()))(gm, examples).runner.graph)
    as_recorded(name, nodes)
    assert [n.type for n in nodes if n.type in MOE] == 2 * [
        *(["MoeUpdateExpert"] if not identity else []), "MoeDistributeDispatchV2", "GroupedMatmul", "SwiGlu", "GroupedMatmul",
        "MoeDistributeCombineV2",
    ]  # fmt: skip


# ---- blocks of a graph that the passes have divided --------------------------------------------------------------------------


def divided_graph(
    tokens: int, hidden: int, shared: bool = False, base: bool = False, written: bool = False, placed: bool = False, rows: bool = False
) -> fx.GraphModule:
    """Dynamo's graph of a block over two ranks: a selection among 8 experts, 4 of which are this rank's; placed: among 6, in 8 places."""
    ops, consts = act.encode(act.SWIGLU)
    local = Layout(tuple(ops), tuple(consts), int(Form.CONCAT), 4, True, False, False, False, 0)
    g = fx.Graph()
    sizes = {"x": (tokens, hidden), "scores": (tokens, 6 if placed else 8), "up": (4, 2 * I, hidden), "down": (4, hidden, I),
             "add": (tokens, hidden), **({"table": (6, 3)} if placed else {})}  # fmt: skip
    p = {name: g.placeholder(name) for name in sizes}
    with FakeTensorMode():
        for name, n in p.items():
            dtype = {"scores": torch.float32, "table": torch.int64}.get(name, torch.bfloat16)
            n.meta["example_value"] = torch.empty(sizes[name], dtype=dtype)
        top = g.call_method("topk", (p["scores"], 2), {"dim": -1})
        top.meta["example_value"] = p["scores"].meta["example_value"].topk(2, dim=-1)
        w, ids = (g.call_function(operator.getitem, (top, i)) for i in (0, 1))
        for i, n in enumerate((w, ids)):
            n.meta["example_value"] = top.meta["example_value"][i]
        if written:
            g.call_method("masked_fill_", (ids, False, -1)).meta["example_value"] = ids.meta["example_value"]
        ids = g.call_function(placement.physical, (ids, p["table"], 0, 0)) if placed else ids
        lists = [[p["up"]], [p["down"]], [], []]
        plain = list(dataclasses.astuple(local))
        out = g.call_function(
            divided_experts, (p["x"], ids, w, lists, p["add"] if base else None, plain, "ep", shared), {"rows": True} if rows else {}
        )
        out.meta["example_value"] = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    g.output((out,))
    return fx.GraphModule({}, g)


@pytest.fixture
def two_a3(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    here = threading.local()
    here.rank = 0
    monkeypatch.setattr(exchange.Place, "of", classmethod(lambda cls, group: cls("test", 2, here.rank)))
    monkeypatch.setattr(device, "family", lambda: "A3")
    return here


@pytest.mark.parametrize("base", [False, True])
@torch.no_grad()
def test_a_divided_block_becomes_dispatch_and_combine(two_a3: threading.local, base: bool) -> None:
    """Each rank's own tokens through the experts of both: what one rank gives that has all of them."""
    up, down = torch.randn(8, 2 * I, H).bfloat16() / 8, torch.randn(8, H, I).bfloat16() / 4
    x, scores, add = torch.randn(2, T, H).bfloat16(), torch.rand(2, T, 8), torch.randn(2, T, H).bfloat16()

    def run(rank: int) -> Tensor:
        two_a3.rank = rank
        lowered = rewrite.lower(divided_graph(T, H, base=base), Choices())
        assert lowered.notes[0].startswith("experts over 2 ranks: npu_moe_distribute_dispatch_v2")
        mine = slice(4 * rank, 4 * rank + 4)
        given = (x[rank], scores[rank], up[mine], down[mine], add[rank])
        inputs = [given[i] if isinstance(i, int) else i.pack([given[s.position] for s in i.sources]) for i in lowered.inputs]
        return lowered.module(*inputs)[0]

    p = calls.Packed([calls.Weight(up.mT.contiguous())], calls.Weight(down.mT.contiguous()))
    whole = dataclasses.replace(layout(), num_experts=8)
    for rank, out in enumerate(on_ranks(2, run)):
        w, ids = scores[rank].topk(2, dim=-1)
        want = calls.experts(x[rank], ids, w, p, [add[rank]] if base else [], whole, all_known=True)
        torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"shared": True}, "the same tokens"), ({"tokens": 600}, "takes 512"), ({"hidden": 64}, "1024 to 8192"),
    ({"written": True}, "distinct experts"),
])  # fmt: skip
def test_what_dispatch_does_not_take_travels_as_written(two_a3: threading.local, changes: dict[str, Any], reason: str) -> None:
    with torch.no_grad():
        lowered = rewrite.lower(divided_graph(**{"tokens": T, "hidden": H, **changes}), Choices())
    assert any("by collectives" in n and reason in n for n in lowered.notes), lowered.notes
    assert any(n.target is divided_experts for n in lowered.module.graph.nodes) and all(isinstance(i, int) for i in lowered.inputs)


@torch.no_grad()
def test_rows_by_all_to_all_are_a_dispatch_or_stay_rows(two_a3: threading.local) -> None:
    """`parallelize(rows=True)`: a dispatch sends those rows; where none takes the block the all-to-all stays, and is told."""
    taken, left = (rewrite.lower(divided_graph(tokens, H, rows=True), Choices()) for tokens in (T, 600))
    assert taken.notes[0].startswith("experts over 2 ranks: npu_moe_distribute_dispatch_v2")
    (kept,) = [n for n in left.module.graph.nodes if n.target is divided_experts]
    assert kept.kwargs == {"rows": True} and any("rows travel by all-to-all" in n and "takes 512" in n for n in left.notes)


@pytest.mark.parametrize("told", [True, False])
@torch.no_grad()
def test_logical_experts_become_physical_ones_before_the_dispatch(two_a3: threading.local, told: bool) -> None:
    """That places are distinct is the user's word; without it the ids of a row are not known to differ, and rows travel as written."""
    up, down = torch.randn(8, 2 * I, H).bfloat16() / 8, torch.randn(8, H, I).bfloat16() / 4
    x, scores = torch.randn(2, T, H).bfloat16(), torch.rand(2, T, 6)
    table = torch.tensor([[2, 7, 0], [1, 3, -1], [1, 5, -1], [2, 2, 6], [1, 1, -1], [1, 4, -1]])
    first = rewrite.lower(divided_graph(T, H, placed=True), Choices(distinct_places=told))
    names = [streams.name_of(n) for n in first.module.graph.nodes]
    assert "npu_moe_update_expert" in names and ("npu_moe_distribute_dispatch_v2" in names) == told
    if not told:
        assert any("distinct experts" in n for n in first.notes)
        return

    def run(rank: int) -> Tensor:
        two_a3.rank = rank
        lowered = rewrite.lower(divided_graph(T, H, placed=True), Choices(distinct_places=True))
        mine = slice(4 * rank, 4 * rank + 4)
        given = (x[rank], scores[rank], up[mine], down[mine], x[rank], table)
        inputs = [given[i] if isinstance(i, int) else i.pack([given[s.position] for s in i.sources]) for i in lowered.inputs]
        return lowered.module(*inputs)[0]

    p = calls.Packed([calls.Weight(up.mT.contiguous())], calls.Weight(down.mT.contiguous()))
    for rank, out in enumerate(on_ranks(2, run)):
        w, ids = scores[rank].topk(2, dim=-1)
        whole = dataclasses.replace(layout(), num_experts=8)
        want = calls.experts(x[rank], placement.physical(ids, table, 0, 0), w, p, [], whole, all_known=True)
        torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)


def test_training_travels_as_written(two_a3: threading.local) -> None:
    lowered = rewrite.lower(divided_graph(T, H), Choices(train=True))
    assert any("no gradients" in n for n in lowered.notes)
