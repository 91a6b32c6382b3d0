"""Against the real torch_npu wheel, with CANN stubbed: schemas, shapes, GE graphs, npugraph_ex code. Run by `make test-ascend`."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ascend_blocks import Seen, block, compiled, first, relative, zoo
from goldens import MOE, as_recorded
from hazards import hazards, stages

import moe_compile
from moe_compile.lowering.ascend import dry_run, metas, modes, options, register, schemas
from moe_compile.options import Options

if not schemas.wheel():
    pytest.skip("torch_npu cannot be imported here: see `make test-ascend`", allow_module_level=True)

register.ensure()


@pytest.fixture(autouse=True)
def nothing_is_left_in_the_queue() -> Iterator[None]:
    """Kernels fail on the stub, behind the host's back: the next test that waits for the device would be told."""
    yield
    if torch.npu.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.npu.synchronize()


MODELS = ("afmoe", "deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss", "ernie4_5_moe", "llama4")


# ---- definitions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", schemas.NPU, ids=lambda s: s.split("(")[0])
def test_our_schemas_are_the_wheels(schema: str) -> None:
    name = schema.split("(")[0]
    assert str(getattr(torch.ops.npu, name).default._schema) == str(torch._C.parse_schema(f"npu::{schema}"))


def test_the_ops_of_the_950_are_declared_as_they_are_known() -> None:
    assert schemas.lacking(tuple(schemas.RAISED)) is None


def test_inner_options_that_are_named_without_the_wheel_are_the_wheels() -> None:
    configs = [make(Options(target="ascend")) for make in (modes.ge_config, modes.npugraph_ex_config)]
    has = {name for c in configs for name in vars(c) if not name.startswith("_")}
    assert set(options._INNER) | set(options._PARTS) == has


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


F16, I8, I32, I64 = torch.bfloat16, torch.int8, torch.int32, torch.int64
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("npu_moe_gating_top_k", (_meta(5, 16), 3), dict(bias=_meta(16), norm_type=1, out_flag=True)),
    ("npu_moe_gating_top_k_softmax", (_meta(5, 16), None, 3), {}),
    ("npu_moe_gating_top_k_softmax_v2", (_meta(5, 16),), dict(k=3, renorm=1)),
    ("npu_moe_init_routing_v2", (_meta(5, 8, dtype=F16), _meta(5, 3, dtype=I32)), dict(
        active_num=-1, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, 4])),
    ("npu_moe_init_routing_v2", (_meta(5, 8, dtype=F16), _meta(5, 3, dtype=I32)), dict(
        active_num=-1, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, 4], quant_mode=1)),
    ("npu_grouped_matmul", ([_meta(15, 8)], [_meta(4, 8, 6)]), dict(
        group_list=_meta(4, dtype=I64), group_type=0, split_item=3, group_list_type=1)),
    ("npu_grouped_matmul", ([_meta(8, 15)], [_meta(15, 6)]), dict(
        group_list=_meta(4, dtype=I64), group_type=2, split_item=3, group_list_type=1)),
    ("npu_grouped_matmul", ([_meta(15, 8, dtype=I8)], [_meta(4, 8, 6, dtype=I8)]), dict(
        scale=[_meta(4, 6, dtype=F16)], per_token_scale=[_meta(15)], output_dtype=15, group_list=_meta(4, dtype=I64), group_type=0,
        split_item=3, group_list_type=1)),
    ("npu_grouped_matmul", ([_meta(15, 8, dtype=F16)], [_meta(4, 8, 6, dtype=I8)]), dict(
        antiquant_scale=[_meta(4, 6, dtype=F16)], antiquant_offset=[_meta(4, 6, dtype=F16)], group_list=_meta(4, dtype=I64), group_type=0,
        split_item=3, group_list_type=1)),
    ("npu_grouped_matmul", ([_meta(15, 8, dtype=F16)], [_meta(4, 8, 2, dtype=I32)]), dict(
        antiquant_scale=[_meta(4, 2, 16, dtype=F16)], antiquant_offset=[_meta(4, 2, 16, dtype=F16)], group_list=_meta(4, dtype=I64),
        group_type=0, split_item=3, group_list_type=1)),
    ("npu_swiglu", (_meta(15, 8), -1), {}),
    ("npu_swiglu_backward", (_meta(15, 4), _meta(15, 8), -1), {}),
    ("npu_clipped_swiglu", (_meta(15, 8),), {}),
    ("npu_moe_finalize_routing", (_meta(15, 8), _meta(5, 8), None, None, _meta(5, 3), _meta(15, dtype=I32), None, 2), {}),
    *[("npu_moe_distribute_dispatch_v2", (_meta(5, 8, dtype=F16), _meta(5, 3, dtype=I32), "ep", 16, 1, 32), dict(
        shared_expert_num=0, **more)) for more in ({}, {"quant_mode": 2}, {"expert_scales": _meta(5, 3)}, {"global_bs": 160})],
    ("npu_moe_distribute_combine_v2", (
        _meta(40, 8, dtype=F16), _meta(5, 3, dtype=I32), _meta(5120, dtype=I32), _meta(8, dtype=I32), _meta(5, 3), "ep", 4, 1, 8), dict(
            shared_expert_num=0)),
    ("npu_moe_update_expert", (_meta(5, 3, dtype=I32), _meta(8, 3, dtype=I32)), dict(balance_mode=1)),
    ("npu_moe_token_permute", (_meta(5, 8), _meta(5, 3, dtype=I32)), {}),
    ("npu_moe_token_permute_grad_v2", (_meta(15, 8), _meta(15, dtype=I32), 5, torch.float32, 3), {}),
    ("_npu_moe_token_unpermute", (_meta(15, 8), _meta(15, dtype=I32), _meta(5, 3)), {}),
    ("npu_moe_token_unpermute_grad_v2", (_meta(5, 8), _meta(15, dtype=I32), 15, torch.float32, _meta(5, 3), False, None, _meta(15, 8)), {}),
    ("npu_dynamic_quant", (_meta(15, 8, dtype=F16),), {}),
    ("npu_dynamic_quant", (_meta(15, 8, dtype=F16),), dict(smooth_scales=_meta(4, 8, dtype=F16), group_index=_meta(4, dtype=I32))),
    ("npu_moe_init_routing_v2", (_meta(5, 8, dtype=F16), _meta(5, 3, dtype=I32)), dict(
        active_num=-1, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, 4], quant_mode=1,
        scale=_meta(4, 8))),
    ("npu_grouped_matmul_swiglu_quant_v2", (
        _meta(15, 32, dtype=I8), [_meta(4, 32, 64, dtype=I8)], [_meta(4, 64)], _meta(15), _meta(4, dtype=I64)), dict(
            dequant_mode=0, dequant_dtype=6, quant_mode=0, quant_dtype=1, group_list_type=1)),
    ("npu_dequant_swiglu_quant", (_meta(15, 512, dtype=I32),), dict(
        weight_scale=_meta(4, 512), activation_scale=_meta(15), group_index=_meta(4, dtype=I64), activate_left=True, quant_mode=1,
        quant_scale=_meta(4, 256))),
    ("npu_dequant_swiglu_quant", (_meta(15, 512, dtype=I32),), dict(
        weight_scale=_meta(4, 512), activation_scale=_meta(15), group_index=_meta(4, dtype=I64), activate_left=True, quant_mode=1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "kwargs"), CALLS, ids=[c[0] for c in CALLS])
def test_our_shapes_are_the_wheels(name: str, args: Any, kwargs: Any) -> None:
    def told(out: Any) -> list[Any]:
        return [(tuple(t.shape), t.dtype) for t in (out if isinstance(out, (list, tuple)) else [out])]

    theirs = told(getattr(torch.ops.npu, name).default(*args, **kwargs))
    assert told(metas.METAS[name](*args, **kwargs)) == theirs


# ---- GE --------------------------------------------------------------------------------------------------------------------


@functools.cache
def ge_of(name: str, dynamic: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> list[dry_run.GeNode]:
    """The GE graph of an entry's block; its output through the emulated ops is eager's."""
    module, x, found = block(name).to(dtype), torch.randn(2, 5, zoo.HIDDEN, dtype=dtype), []
    inner = dry_run.ge_backend(Options(**options), found.append)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True), Seen() as seen:
        out = first(compiled(module, dynamic=dynamic, inner=inner)(x))
        assert relative(out, first(module(x))) <= (1e-5 if dtype == torch.float32 else 0.03)
    assert len(seen.lowered) == len(found) == 1
    return found[0]


def converted(module: torch.nn.Module, x: torch.Tensor, tolerance: float) -> list[dry_run.GeNode]:
    """The GE graph of a module of the catalogue's."""
    found: list[list[dry_run.GeNode]] = []
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        out = compiled(module, strict=True, inner=dry_run.ge_backend(Options(), found.append))(x)
        assert relative(out, module(x)) <= tolerance
    return found[0]


def test_low_rank_pairs_in_ge() -> None:
    """Three products a projection, weights and pairs as they come in."""
    from catalogue import lora

    nodes = converted(lora.LoraStacks(), torch.randn(7, 16), 1e-5)
    as_recorded("low_rank_pairs", nodes)
    data = {n.name for n in nodes if n.type == "Data"}
    products = [n for n in nodes if n.type == "GroupedMatmul"]
    assert len(products) == 6 and all(n.inputs[1].split(":")[0] in data for n in products)


def test_4_bits_in_ge() -> None:
    """The wheel's converter sees eight codes in an int32: the words become int4 by a bit cast, which copies nothing."""
    from test_antiquant import HalfRows

    module = HalfRows().to(torch.bfloat16)
    graph = converted(module, module.example_inputs()[0], 0.03)
    as_recorded("w4a16", graph)
    nodes = {n.name: n for n in graph}
    products = [n for n in nodes.values() if n.type == "GroupedMatmul"]
    assert len(products) == 2
    for n in products:
        chain = [nodes[n.inputs[1].split(":")[0]]]
        while chain[-1].type != "Data":
            chain.append(nodes[chain[-1].inputs[0].split(":")[0]])
        assert [c.type for c in chain] == ["Reshape", "Bitcast", "Data"]
        assert all(nodes[i.split(":")[0]].type == "Data" for i in n.inputs[5:7]), "scales and offsets"


@pytest.mark.parametrize("name", MODELS)
def test_ge_graphs_are_as_recorded(name: str) -> None:
    as_recorded(name, ge_of(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["afmoe", "deepseek_v3"])
def test_no_expert_weight_is_transposed_cast_or_copied(name: str, dtype: torch.dtype) -> None:
    nodes = ge_of(name, dtype=dtype)
    by_name = {n.name: n for n in nodes}
    weights = [n.inputs[1].split(":")[0] for n in nodes if n.type == "GroupedMatmul"]
    assert len(weights) == 2
    (combine,) = [n for n in nodes if n.type == "MoeFinalizeRoutingV2"]
    assert combine.inputs[2], "the shared expert goes into the combine"
    for w in weights:
        assert by_name[w].type == "Data", f"{by_name[w]} stands between an expert weight and its use"
        assert {n.type for n in nodes if any(i.split(":")[0] == w for i in n.inputs)} == {"GroupedMatmul"}


def test_token_counts_stay_symbolic_in_ge() -> None:
    nodes = ge_of("afmoe", dynamic=True)
    (routing,) = [n for n in nodes if n.type == "MoeInitRoutingV3"]
    assert routing.attrs["active_num"] == -1
    assert [n.type for n in nodes if n.type in MOE].count("GroupedMatmul") == 2


def test_the_shared_expert_has_its_own_stream_in_ge() -> None:
    nodes = ge_of("afmoe", core_limit=(8, 16))
    side = [n for n in nodes if n.attrs.get("_user_stream_label") == "moe_shared"]
    assert [n.type for n in side if n.type == "MatMul"] == ["MatMul"] * 3
    assert not any(n.type in MOE for n in side)
    assert all((n.attrs["_op_aicore_num"], n.attrs["_op_vectorcore_num"]) == ("8", "16") for n in side)
    waits = [n.inputs[1] for n in side if n.type == "Identity"]
    assert waits == ["MoeGatingTopK:-1", "SwiGlu:-1"], "gate and up wait for the routing, down for the activation of the experts"


def test_without_overlap_there_is_one_stream() -> None:
    assert not any("_user_stream_label" in n.attrs for n in ge_of("afmoe", overlap_shared=False))


# ---- npugraph_ex -----------------------------------------------------------------------------------------------------------


@functools.cache
def acl_of(name: str, dynamic: bool = False, **options: Any) -> Any:
    """What npugraph_ex makes of an entry's block: its runner holds the optimised FX graph."""
    import npugraph_ex
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found: list[Any] = []

    def compile_one(gm: Any, example_inputs: Any) -> Any:
        found.append(npugraph_ex.get_compiler(modes.npugraph_ex_config(Options(**options)))(gm, example_inputs).runner)
        return make_boxed_func(gm.forward)

    module, x = block(name), torch.randn(2, 5, zoo.HIDDEN)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        out = first(compiled(module, dynamic=dynamic, inner=aot_autograd(fw_compiler=compile_one, inference_compiler=compile_one))(x))
        assert relative(out, first(module(x))) <= 1e-5
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_npugraph_ex_emits_streams_and_events(dynamic: bool) -> None:
    graph = acl_of("afmoe", dynamic).fx_graph.graph
    assert hazards(graph) == [] and stages(graph) == []  # behind npugraph_ex's own passes, which add events and work in place
    names = [str(n.target) for n in graph.nodes]
    enter, leave = names.index("npugraph_ex.scope_enter.default"), names.index("npugraph_ex.scope_exit.default")
    combine = names.index("npu.npu_moe_finalize_routing.default")
    assert enter < leave < combine
    assert names[enter:leave].count("aten.mm.default") == 3
    assert names[enter:leave].count("npugraph_ex.tagged_event_wait.default") == 3  # the scope's own, the two stages
    assert "npugraph_ex.tagged_event_record.default" in names[enter:leave]
    assert names[leave:combine].count("npugraph_ex.tagged_event_wait.default") == 1


def test_the_generated_code_holds_the_calls() -> None:
    code = acl_of("afmoe").codegen(extend_config={})
    for word in ("npu_moe_gating_top_k", "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_moe_finalize_routing", "moe_shared"):
        assert word in code


def test_the_generated_code_runs_the_shared_expert_in_two_stages() -> None:
    """Main: ids, record in, dispatch, GEMM, activation, record mid, GEMM. Side: wait in, gate, up, wait mid, down, record out."""
    code = acl_of("afmoe").codegen(extend_config={})
    lines = [line for line in code[: code.index("compile_configs = ")].splitlines() if "=" in line or "with " in line]
    words = ("npu_moe_gating_top_k.", "npu_moe_init_routing_v2.", "npu_grouped_matmul.", "npu_swiglu.", "npu_moe_finalize_routing.",
             "aten.mm.", "with torch.npu.stream", "_in'", "_mid'", "_out'")  # fmt: skip
    kind = {"tagged_event_record": "record ", "tagged_event_wait": "wait "}
    seen = [next((k for op, k in kind.items() if op in line), "") + w.strip("._'") for line in lines for w in words if w in line]
    assert seen == [
        "aten.mm", "npu_moe_gating_top_k", "record in", "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu", "record mid",
        "npu_grouped_matmul", "with torch.npu.stream", "wait in", "aten.mm", "aten.mm", "wait mid", "aten.mm", "record out", "wait out",
        "npu_moe_finalize_routing",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), [
    ("afmoe", {}), ("gpt_oss", {}), ("deepseek_v3", {}), ("afmoe", {"quantize": "w8a8"}), ("qwen3_moe", {"weight_format": "nz"}),
])  # fmt: skip
@pytest.mark.parametrize("prepared", [False, True])
def test_npugraph_ex_copies_the_tokens_and_nothing_else(
    name: str, options: dict[str, Any], prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the mode's own entry point: every input that is not static is copied into the graph's memory on each replay."""
    graphs = spied(monkeypatch)
    dtype = torch.bfloat16 if options else torch.float32
    module, x = block(name).to(dtype), torch.randn(2, 5, zoo.HIDDEN, dtype=dtype)
    if prepared:
        moe_compile.prepare(module, target="ascend")
    with torch.no_grad():
        out = first(compiled(module, inner=ran_eagerly(), **options)(x))
        assert relative(out, first(module(x))) <= (1e-5 if not options else 0.1)
    graph = graphs[0]  # what was compiled; the second is the same, made of the generated code
    assert all(g._parameter_user_inputs == graph._parameter_user_inputs for g in graphs)
    placeholders = [n.meta["val"] for n in graph.fx_graph.graph.find_nodes(op="placeholder")]
    copied = [placeholders[i] for i in graph._user_inputs_mapping.values()]
    assert [tuple(t.shape) for t in copied] == [tuple(x.shape)]
    assert len(graph._parameter_user_inputs) == len(placeholders) - 1


def ran_eagerly() -> Any:
    """npugraph_ex as this target sets it up, but for the capture itself: there is nothing to capture here."""
    return modes.npugraph_ex_backend(Options(inner_options={"force_eager": True}))


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every captured graph that npugraph_ex makes from now on."""
    modes.load("npugraph_ex", "npugraph_ex.ops._tagged_event")
    from npugraph_ex._acl_concrete_graph import acl_graph

    found: list[Any] = []
    load = acl_graph.AclGraph.load

    def spy(self: Any, info: Any) -> None:
        load(self, info)
        found.append(self)

    monkeypatch.setattr(acl_graph.AclGraph, "load", spy)
    return found


def test_a_weight_with_other_memory_is_another_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """npugraph_ex looks captures up by the addresses of static inputs, packed weights and all others, because nothing is frozen."""
    graphs = spied(monkeypatch)
    from npugraph_ex._acl_concrete_graph.acl_graph import AclGraph, get_unupdated_input_fn

    keys: list[str] = []
    run = AclGraph.__call__

    def looked_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        keys.append(get_unupdated_input_fn(self._unupdated_sym_input_index, self._parameter_user_inputs, self.config)(*args))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(AclGraph, "__call__", looked_up)
    module, x = block("afmoe"), torch.randn(2, 5, zoo.HIDDEN)
    moe_compile.prepare(module, target="ascend")
    fn = compiled(module, inner=ran_eagerly())
    with torch.no_grad(), Seen() as seen:
        for change in (None, None, module.experts.down_proj, module.gate.weight if hasattr(module, "gate") else module.router.gate.weight):
            if change is not None:
                change.data = change.data * 2
            assert relative(first(fn(x)), first(module(x))) <= 1e-5
        module.experts.down_proj.mul_(0.5)
        fn(x)
    assert len(seen.lowered) == 1 and graphs
    assert keys[0] == keys[1] and len(set(keys)) == 3 and keys[4] == keys[3]


def test_workarounds_are_applied_where_they_are_needed() -> None:
    """What is said to be broken is tried, not looked up by version; behind the workaround it works, and is left alone."""
    from moe_compile.lowering.ascend import workarounds

    modes.load("torchair", "torchair.scope._wait_tensor")
    workarounds.install()
    assert workarounds.apply(workarounds.KNOWN) == []
    mended: list[str] = []
    fine = workarounds.Workaround("fine", lambda: False, lambda: mended.append("fine"))
    broken = workarounds.Workaround("broken", lambda: True, lambda: mended.append("broken"))
    assert workarounds.apply((fine, broken)) == mended == ["broken"]


# ---- int8 and training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def every_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some converters ask CANN which attributes its ops have; the stub knows none."""
    modes.load("torchair", "torchair._ge_concrete_graph.compat_ir")
    monkeypatch.setattr(sys.modules["torchair._ge_concrete_graph.compat_ir"], "is_cann_compat", lambda *args, **kwargs: "")


def int8_chain(weight_format: str, inner: int) -> list[dry_run.GeNode]:
    """The MoE nodes of a block in W8A8."""
    import test_quant

    module, found = test_quant.block("afmoe", moe_intermediate_size=inner).to(torch.bfloat16), []
    x = torch.randn(2, 5, zoo.HIDDEN, dtype=torch.bfloat16)
    backend = dry_run.ge_backend(Options(), found.append)
    with torch.no_grad():
        compiled(module, inner=backend, quantize="w8a8", weight_format=weight_format, strict=True)(x)
    as_recorded(f"w8a8_{weight_format}_{inner}", found[0])
    return [n for n in found[0] if n.type in MOE]


def test_the_int8_chain_in_ge(every_attribute: None) -> None:
    chain = int8_chain("nd", 256)
    assert [n.type for n in chain] == [
        "MoeGatingTopK", "MoeInitRoutingV3", "GroupedMatmul", "DequantSwigluQuant", "GroupedMatmul", "MoeFinalizeRoutingV2",
    ]  # fmt: skip
    _, dispatch, first_product, quantised, second, _ = chain
    assert dispatch.attrs["quant_mode"] == 1
    assert (quantised.attrs["activate_left"], quantised.attrs["quant_mode"]) == (True, "dynamic")
    assert quantised.inputs[0] == "GroupedMatmul:0" and first_product.inputs[0] == "MoeInitRoutingV3:0"
    assert second.inputs[0] == "DequantSwigluQuant:0"


def test_the_fused_int8_chain_in_ge(every_attribute: None) -> None:
    chain = int8_chain("nz", 256)
    assert [n.type for n in chain] == [
        "MoeGatingTopK", "MoeInitRoutingV3", "GroupedMatmulSwigluQuantV2", "GroupedMatmul", "MoeFinalizeRoutingV2",
    ]  # fmt: skip
    _, _, fused, second, _ = chain
    assert (fused.attrs["group_list_type"], fused.attrs["quant_dtype"]) == (1, 2), "GE's number of int8"
    assert second.inputs[0] == "GroupedMatmulSwigluQuantV2:0"


@pytest.mark.parametrize(("name", "changes", "quantised", "place"), [
    ("sums", {"own": False}, "DequantSwigluQuant", 3),
    ("steps", {"act": staticmethod(torch.nn.functional.gelu), "dtype": torch.bfloat16}, "DynamicQuant", 1),
])  # fmt: skip
def test_smooth_scales_in_ge(every_attribute: None, name: str, changes: dict[str, Any], quantised: str, place: int) -> None:
    """They are inputs of the graph, for rows that are sent and for rows between the products, and nothing stands on them."""
    import test_smooth

    module, x = test_smooth.made(**changes)
    found: list[list[dry_run.GeNode]] = []
    with torch.no_grad():
        out = compiled(module, inner=dry_run.ge_backend(Options(), found.append), strict=True, dynamic=False)(x)
        assert test_smooth.error(out, test_smooth.exact(module, x)) <= 0.02
    as_recorded(f"w8a8_smooth_{name}", found[0])
    by_name = {n.name: n for n in found[0]}
    (dispatch,), (rows,) = ([n for n in found[0] if n.type == kind] for kind in ("MoeInitRoutingV3", quantised))
    for scales in (dispatch.inputs[2], rows.inputs[place]):
        assert by_name[scales.split(":")[0]].type == "Data", (dispatch, rows)


def test_small_intermediate_sizes_go_step_by_step_in_ge(every_attribute: None) -> None:
    assert [n.type for n in int8_chain("nd", 64)] == [
        "MoeGatingTopK", "MoeInitRoutingV3", "GroupedMatmul", "SwiGlu", "DynamicQuant", "GroupedMatmul", "MoeFinalizeRoutingV2",
    ]  # fmt: skip


def test_int8_weights_under_rows_of_floats_in_ge() -> None:
    """The bytes and their scales are inputs of the graph, and nothing stands on them."""
    import test_int8

    module, x, exact = test_int8.made(test_int8.Dense, torch.bfloat16)
    found: list[list[dry_run.GeNode]] = []
    with torch.no_grad():
        out = compiled(module, inner=dry_run.ge_backend(Options(), found.append), strict=True)(x)
        assert test_int8.error(out, exact) <= 1.25 * test_int8.error(module(x), exact)
    as_recorded("w8a16", found[0])
    by_name = {n.name: n for n in found[0]}
    products = [n for n in found[0] if n.type == "GroupedMatmul"]
    assert len(products) == 2
    for n in products:
        weight, scale, offset = n.inputs[1], n.inputs[5], n.inputs[6]
        assert [by_name[i.split(":")[0]].type for i in (weight, scale, offset)] == ["Data"] * 3, n
        assert n.attrs["dtype"] == -1


def test_the_joint_graph_of_training() -> None:
    """Forward and backward on fake npu tensors, through torch_npu's own gradients: dX with the weight as a view, dW in the K-split form."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from moe_compile.ir import scalar as act
    from moe_compile.lowering.ascend import calls, training
    from moe_compile.lowering.ascend.calls import Packed, Weight, generic

    ops, consts = act.encode(act.SWIGLU)
    layout = generic.Layout(tuple(ops), tuple(consts), 1, 4, True, True, True, False, 0)

    def step(x: Any, ids: Any, w: Any, up: Any, down: Any) -> Any:
        leaves = [t.detach().requires_grad_() for t in (x, w, up, down)]
        *rows, own = training.start(leaves[0], ids, leaves[1], Packed([Weight(leaves[2])], Weight(leaves[3])), layout, True)
        return torch.autograd.grad(calls.finish(*rows, own, [], fused=False).sum(), leaves)

    with FakeTensorMode():
        x, ids, w = (torch.empty(*s, device="npu") for s in ((5, 8), (5, 2), (5, 2)))
        up, down = torch.empty(4, 8, 12, device="npu"), torch.empty(4, 6, 8, device="npu")
        graph = make_fx(step)(x, ids.int(), w, up, down).graph
    nodes = [n for n in graph.nodes if str(n.target).startswith("npu.")]
    names = [str(n.target).removeprefix("npu.").removesuffix(".default") for n in nodes]
    kinds = [f"{name}:{n.kwargs['group_type']}" if name == "npu_grouped_matmul" else name for name, n in zip(names, nodes)]
    assert kinds == [
        "npu_moe_token_permute", "npu_grouped_matmul:0", "npu_swiglu", "npu_grouped_matmul:0", "_npu_moe_token_unpermute",
        "npu_moe_token_unpermute_grad_v2", "npu_grouped_matmul:0", "npu_grouped_matmul:2", "npu_swiglu_backward", "npu_grouped_matmul:0",
        "npu_grouped_matmul:2", "npu_moe_token_permute_grad_v2",
    ]  # fmt: skip


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_training_on_the_cpu_keeps_its_gradients(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_npu's permute, unpermute and swiglu have gradients on an NPU only: through AOTAutograd they would be zeros and None."""
    monkeypatch.setenv("CXX", "none")  # in plain torch: nothing is built for this
    module, x = block("qwen3_moe"), torch.randn(2, 5, zoo.HIDDEN)
    found = []
    for fn in (module, compiled(module, inner=inner)):
        module.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        first(fn(leaf)).sin().sum().backward()
        found.append({"x": leaf.grad, **{n: p.grad for n, p in module.named_parameters()}})
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-4, atol=1e-5, msg=name)
    assert any("no gradients" in n for n in moe_compile.last_report().notes)
    assert len(moe_compile.last_report().blocks) == 1


# ---- formats: memory is real on the stub, kernels are not ----------------------------------------------------------------


def _bytes(t: torch.Tensor, size: int) -> bytes:
    """What lies at a tensor's address: the stub's device memory is the host's."""
    import ctypes

    return bytes((ctypes.c_char * size).from_address(t.data_ptr()))


def test_a_gathered_weight_is_laid_over_in_the_fractal_format() -> None:
    """No copy, no memory of its own, the format kept by what FSDP2 does to it, and refilled memory found again."""
    from moe_compile.lowering.ascend import formats

    shape = (8, 32, 48)
    weight = (torch.arange(8 * 32 * 48) % 199).to(torch.bfloat16).view(shape)
    gathered = torch.cat([formats.in_blocks(piece).view(-1) for piece in weight.chunk(4)])  # what four ranks bring
    assert torch.equal(gathered.view(shape), formats.in_blocks(weight))
    wanted, size = bytes(gathered.view(torch.uint8).tolist()), gathered.numel() * 2
    flat = gathered.npu()
    before = torch.npu.memory_allocated()
    nz = formats.over(flat, shape)
    assert formats.is_nz(nz) and not formats.is_nz(flat) and torch.npu.memory_allocated() == before
    p = torch.nn.Parameter(torch.as_strided(nz, shape, (32 * 48, 48, 1), storage_offset=0))
    assert formats.is_nz(p) and formats.is_nz(p.detach()) and formats.is_nz(p.transpose(1, 2).transpose(1, 2))
    assert p.data_ptr() == flat.data_ptr() and _bytes(p, size) == wanted
    version = p._version
    flat.untyped_storage().resize_(0)  # reshard
    held = torch.empty(shape, dtype=torch.bfloat16, device="npu")  # the memory goes elsewhere meanwhile
    flat.untyped_storage().resize_(size)
    flat.copy_(gathered)
    formats.point(p, flat)
    assert p.data_ptr() == nz.data_ptr() == flat.data_ptr() and _bytes(p, size) == wanted
    assert p._version == version and formats.is_nz(p)
    del held
    with pytest.raises(RuntimeError, match="base format"):
        nz.untyped_storage().resize_(0)  # why the gathered memory stays FSDP2's, and the tensor over it is none of its own


def test_the_extension_is_called_as_fsdp2_calls_it() -> None:
    """Shards of npu tensors: in blocks before the gather, one tensor of the format behind it, the same one at the next gather."""
    from types import SimpleNamespace

    from moe_compile.lowering.ascend import formats, shards

    shape = torch.Size((4, 16, 32))
    flat = torch.zeros(shape.numel(), dtype=torch.bfloat16).npu()
    shard = shards.FractalShard(torch.zeros(2, 16, 32, dtype=torch.bfloat16))
    full, inner = shard.fsdp_post_all_gather((flat,), (shape, True), torch.bfloat16)
    assert formats.is_nz(full) and full.shape == shape and inner == ()
    other = torch.zeros(shape.numel(), dtype=torch.bfloat16).npu()
    assert shard.fsdp_post_all_gather((other,), (shape, True), torch.bfloat16, out=full) is None
    assert full.data_ptr() == other.data_ptr()
    plain, _ = shard.fsdp_post_all_gather((flat,), (shape, False), torch.bfloat16)
    assert not formats.is_nz(plain) and plain.data_ptr() == flat.data_ptr()
    policy = SimpleNamespace(param_dtype=torch.bfloat16)
    (piece,), (_, nz) = shard.fsdp_pre_all_gather(SimpleNamespace(size=lambda: 2), shape, None, None, policy)
    assert not nz and piece.shape == (2, 16, 32), "a shard on the CPU has no formats"


def test_a_cast_in_training_is_of_the_format() -> None:
    from moe_compile.lowering.ascend import casts, formats

    store = casts.Casts()
    owner = torch.nn.Parameter(torch.zeros(2, 16, 32, dtype=torch.bfloat16).npu())
    nz = store.get(owner, owner)
    assert formats.is_nz(nz) and store.get(owner, owner) is nz and store.get(nz, nz) is nz
