"""The shared expert on its side stream: every cross-stream use is ordered, no buffer is used again early, and the checker would notice."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.fx as fx
from ascend_blocks import ENTRIES, Seen, block, compiled, first, relative, zoo
from functorch.compile import make_boxed_func
from hazards import hazards, simulate, stages
from test_quant import block as sized
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from moe_compile.lowering.ascend import modes, register, schemas, streams

register.ensure()
DIALECTS = {"npugraph_ex": streams.NpugraphEx, "eager": streams.Eager}


@pytest.fixture(autouse=True)
def stream_ops() -> None:
    if schemas.wheel():
        modes.load("torchair", "torchair.scope._wait_tensor")
        modes.load("npugraph_ex", "npugraph_ex.ops._tagged_event")


class Stack(nn.Module):
    """Two layers, so that the second's side work meets the first's memory."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(name), block(name)])
        self.norms = nn.ModuleList([nn.LayerNorm(zoo.HIDDEN), nn.LayerNorm(zoo.HIDDEN)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.layers, self.norms):
            x = x + first(layer(norm(x))).view_as(x)
        return x


@functools.cache
def of_stack(name: str) -> fx.GraphModule:
    return aten_graph(Stack(name))


def stack(name: str = "afmoe") -> fx.GraphModule:
    """The graph of two layers, compiled once, to be changed."""
    return copy.deepcopy(of_stack(name))


def aten_graph(module: nn.Module, tolerance: float = 1e-5, **options: Any) -> fx.GraphModule:
    """The ATen graph that a graph mode gets to see."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: object) -> object:
        found.append(copy.deepcopy(gm))
        return make_boxed_func(gm.forward)

    x = torch.randn(2, 5, zoo.HIDDEN, dtype=next(module.parameters()).dtype)
    with torch.no_grad():
        inner = aot_autograd(fw_compiler=keep, inference_compiler=keep)
        out = first(compiled(module, inner=inner, overlap_shared=False, **options)(x))
        assert relative(out, first(module(x))) <= tolerance
    return found[0]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["afmoe", "deepseek_v3", "llama4", "qwen2_moe"])
def test_the_stream_program_is_sound(name: str, dialect: str) -> None:
    gm = stack(name)
    assert streams.overlap(gm.graph, DIALECTS[dialect], (8, 16)) == 2
    assert hazards(gm.graph) == [] and stages(gm.graph) == []
    program = simulate(gm.graph)
    on_side = [n for n in program.order if program.steps[n].stream == "moe_shared"]
    assert sum(map(streams.is_product, on_side)) >= 6
    assert not any("npu_" in str(n.target) for n in on_side), "the routed branch stays on the main stream"


@pytest.mark.parametrize(("options", "first_product"), [
    ({"quantize": "w8a8"}, "npu_grouped_matmul"),
    ({"quantize": "w8a8", "weight_format": "nz"}, "npu_grouped_matmul_swiglu_quant_v2"),
])  # fmt: skip
def test_int8_chains_run_beside_the_shared_expert(options: dict[str, str], first_product: str) -> None:
    """In both stages: the event in the middle is recorded behind the activation, whichever op that is in."""
    module = sized("afmoe", moe_intermediate_size=256).to(torch.bfloat16)
    gm = aten_graph(module, 0.1, **options)
    assert streams.overlap(gm.graph, streams.NpugraphEx) == 1
    assert hazards(gm.graph) == [] and stages(gm.graph) == []
    assert first_product in map(streams.name_of, gm.graph.nodes)


@pytest.mark.parametrize("planted", ["tagged_event_record", "tagged_event_wait"])
@pytest.mark.parametrize("which", ["0_in", "0_mid", "0_out", "1_in", "1_mid", "1_out"])
def test_a_missing_event_is_found(planted: str, which: str) -> None:
    """Each of the six events of two layers, its record or its wait taken out. Without the middle one the program is sound, in one stage."""
    gm = stack()
    streams.overlap(gm.graph, streams.NpugraphEx)
    layer, where = which.split("_")
    tags = [n.args[0] for n in gm.graph.nodes if streams.name_of(n) == "tagged_event_wait" and str(n.args[0]).endswith(where)]
    for n in [n for n in gm.graph.nodes if n.args[:1] == (tags[int(layer)],)]:
        if planted == "tagged_event_record" or streams.name_of(n) == planted:  # what waits for no record would wait for nothing
            gm.graph.erase_node(n)
    assert stages(gm.graph)
    assert bool(hazards(gm.graph)) == (where != "mid")


def test_an_event_at_the_wrong_place_is_found() -> None:
    """The middle event recorded behind the second GEMM, the first one behind the dispatch: sound, and nothing overlaps."""
    for where, op in (("mid", "npu_grouped_matmul"), ("in", "npu_moe_init_routing_v2")):
        gm = stack()
        streams.overlap(gm.graph, streams.NpugraphEx)
        record = next(n for n in gm.graph.nodes if streams.name_of(n) == "tagged_event_record" and str(n.args[0]).endswith(where))
        record.prev.append(record)
        behind = [n for n in gm.graph.nodes if streams.name_of(n) == op][1 if where == "mid" else 0]
        behind.next.next.next.next.append(record) if where == "in" else behind.append(record)
        gm.graph.lint()
        assert hazards(gm.graph) == [] and stages(gm.graph)


@pytest.mark.parametrize("dialect", [*DIALECTS.values(), streams.Ge])
def test_a_gate_on_the_tokens_is_no_second_stage(dialect: type[streams.Dialect]) -> None:
    """qwen2_moe weighs its shared expert by sigmoid(x @ w), a product that comes last: down is still the one made of gate and up."""
    gm = aten_graph(block("qwen2_moe"))
    (side,) = streams.find_sides(gm.graph)
    assert side.down() is not [n for n in side.nodes if streams.is_product(n)][-1]
    assert streams.overlap(gm.graph, dialect) == 1
    gm.graph.lint()
    if dialect is streams.Ge:
        late = [n.args[1] for n in gm.graph.nodes if streams.name_of(n) == "wait_tensor"]
        assert streams.name_of(late[1]) == "npu_swiglu"


def test_an_early_side_scope_is_found() -> None:
    """Why the side's nodes are issued late: issued early, its input may be written over while it reads."""
    gm = stack()
    streams.overlap(gm.graph, streams.NpugraphEx)
    graph = gm.graph
    for n in [n for n in graph.nodes if "event" in streams.name_of(n) and n.args[0].endswith("_mid")]:
        graph.erase_node(n)  # one stage: what the second waits for comes later than an early scope
    (side, *_) = [n for n in graph.nodes if streams.name_of(n) == "scope_enter"]
    scope = [side]
    while streams.name_of(scope[-1]) != "scope_exit":
        scope.append(scope[-1].next)
    dispatch = next(n for n in graph.nodes if streams.name_of(n) == "npu_moe_init_routing_v2")
    tail = dispatch.next.next.next.next  # behind its results
    for n in scope:
        tail.prepend(n)
    graph.lint()
    assert any("may write over" in h for h in hazards(graph))


def test_one_side_stream_for_all_layers() -> None:
    gm = stack()
    streams.overlap(gm.graph, streams.NpugraphEx)
    enters = [n for n in gm.graph.nodes if streams.name_of(n) == "scope_enter"]
    assert {tuple(n.args[1]) for n in enters} == {(streams.LABEL, "0")} and len(enters) == 2
    tags = [n.args[0] for n in gm.graph.nodes if streams.name_of(n) == "tagged_event_record"]
    assert len(set(tags)) == len(tags) == 6


def test_ge_gets_scopes_and_two_stages() -> None:
    gm = stack()
    assert streams.overlap(gm.graph, streams.Ge, (8, 16)) == 2
    waits = [n for n in gm.graph.nodes if streams.name_of(n) == "wait_tensor"]
    ids, activated = waits[0].args[1], waits[1].args[1]
    assert len(waits) == 4
    assert "gating" in str(ids.args[0]) and streams.name_of(activated) == "npu_swiglu"
    assert not any("event" in streams.name_of(n) for n in gm.graph.nodes)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_without_a_shared_expert_nothing_happens(name: str) -> None:
    gm = aten_graph(block(name))
    nodes = [n.name for n in gm.graph.nodes]
    assert streams.overlap(gm.graph, streams.NpugraphEx) == 0
    assert [n.name for n in gm.graph.nodes] == nodes


class Branches(nn.Module):
    """What is added is used elsewhere too, or is no product at all."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.moe, self.side, self.used = block("qwen3_moe"), nn.Linear(zoo.HIDDEN, zoo.HIDDEN), used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.side(x) if self.used else x * 2.0
        out = first(self.moe(x)) + shared
        return out * shared if self.used else out


@pytest.mark.parametrize("used", [True, False])
def test_only_a_branch_of_its_own_with_a_product_moves(used: bool) -> None:
    gm = aten_graph(Branches(used))
    assert streams.overlap(gm.graph, streams.NpugraphEx) == 0


@pytest.mark.parametrize("overlap", [True, False])
@torch.no_grad()
def test_eager_mode_runs_with_and_without(overlap: bool) -> None:
    model, inputs = ENTRIES["afmoe"].build(), ENTRIES["afmoe"].make_inputs()
    with Seen() as seen:
        out = zoo.output_of(compiled(model, overlap_shared=overlap, mode="eager")(**inputs))
    assert relative(out, zoo.output_of(model(**inputs))) <= 1e-5
    entered = [n for n in seen.lowered[0].module.graph.nodes if n.target is streams.enter_side]
    assert len(entered) == (2 if overlap else 0)
    assert hazards(seen.lowered[0].module.graph) == []
