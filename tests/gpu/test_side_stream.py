"""The shared expert beside the routed ones: values against the float64 oracle, and both streams against one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_ops import Case
from torch import Tensor

pytest.importorskip("triton")

from calls import DEVICE, DTYPES, FACTORS, ON_GPU, TOLERANCE, cover, norm_error, operands

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.lowering.triton import calls as kernels
from moe_compile.lowering.triton import decode_shared, short
from moe_compile.lowering.triton import shared as beside
from moe_compile.lowering.triton.launch import tape

NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="streams of a GPU")
HIDDEN, INTER, SHARED = (96, 80, 112) if ON_GPU else (20, 18, 14)
LAYOUTS = cover({n: FACTORS[n] for n in ("form", "up_transposed", "down_transposed", "up_bias", "down_bias", "add")} | {"gated": (0, 1)}, 2)
ROUTED = ir.Experts(6, HIDDEN, INTER, HIDDEN, ir.Form.CONCAT, act.SWIGLU)


def shared_call(
    tokens: int, dtype: torch.dtype, form: Any = ir.Form.SEPARATE, add: bool = False, gated: int = 0, seed: int = 0,
    routed: ir.Experts = ROUTED, width: int = SHARED, **layout: bool,
) -> tuple[list[Any], Tensor]:  # fmt: skip
    """(the op's arguments without `overlap`, the result in float64)."""
    case = Case("routed", replace(routed, dtype=dtype), tokens, 2, add, dtype=dtype)
    activation = act.relu(act.G) ** 2 if form is ir.Form.SINGLE else act.SWIGLU
    one = ir.Experts(1, routed.hidden, width, routed.hidden, form, activation, stacked=False, dtype=dtype, **layout)
    t, s = operands(case, seed), operands(Case("shared", one, tokens, 1, dtype=dtype), seed + 1)
    gate = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype) if gated else None
    mlp = [s[n] for n in ("up", "down", "up_bias", "down_bias")]
    args = [*t.values(), *ops.experts_args(case.experts), *mlp, gate, *ops.shared_args(one, 0)[:-1]]
    every = torch.zeros(tokens, 1, dtype=torch.int64, device=DEVICE)
    weights = torch.ones(tokens, 1, device=DEVICE) if gate is None else gate
    return args, case.experts.evaluate(*t.values()) + one.evaluate(t["x"], every, weights, *mlp)


def beyond(args: list[Any], overlap: int) -> Tensor | None:
    """By the kernels; None where they do not take the call."""
    out: Tensor | None = kernels.experts_shared(*short.shorten("experts_shared", [*args, overlap]))
    return out


def fused(args: list[Any], overlap: int) -> Tensor:
    out = beyond(args, overlap)
    assert out is not None, "the kernels do not take this call"
    return out


def named(v: Any) -> str:
    return " ".join(str(getattr(x, "name", x)).lower() for x in v.values()) if isinstance(v, dict) else str(v)


# In the interpreter one form is enough for float16
ROWS = [(row, d) for row in LAYOUTS for d in DTYPES if ON_GPU or d is torch.float32 or row["form"] is ir.Form.CONCAT]


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize(("row", "dtype"), ROWS, ids=named)
def test_values(row: dict[str, Any], tokens: int, dtype: torch.dtype) -> None:
    args, want = shared_call(tokens, dtype, **row)
    assert norm_error(fused(args, ir.Overlap.SIDE), want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("form", [ir.Form.SEPARATE, ir.Form.CONCAT, ir.Form.INTERLEAVED], ids=lambda f: f.name.lower())
@pytest.mark.parametrize("extra", [{}, {"gated": 1}, {"add": True, "down_bias": True}], ids=lambda d: " ".join(d) or "plain")
@pytest.mark.parametrize("width", [INTER, SHARED, 3])
def test_one_pair_of_kernels(form: ir.Form, extra: dict[str, Any], width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens: the shared expert, wider or narrower, in the kernels of the routed ones."""
    seen: list[int] = []
    few = decode_shared.few_together
    monkeypatch.setattr(decode_shared, "few_together", lambda c, *rest: (seen.append(c.slots), few(c, *rest))[1])
    args, want = shared_call(2, torch.float32, form, width=width, **extra)
    assert norm_error(fused(args, ir.Overlap.SIDE), want) <= TOLERANCE[torch.float32]
    assert seen == [4]


@pytest.mark.parametrize("shared", [{"form": ir.Form.SINGLE}, {"up_bias": True}, {"up_transposed": True}], ids=str)
def test_other_kinds_go_to_the_side(shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another activation, a bias before it, another orientation: two kernels of its own."""
    monkeypatch.setattr(decode_shared, "few_together", None)
    args, want = shared_call(1, torch.float32, **shared)
    assert norm_error(fused(args, ir.Overlap.SIDE), want) <= TOLERANCE[torch.float32]


def test_no_tokens_is_left_to_the_other_path() -> None:
    args, _ = shared_call(0, torch.float32)
    assert beyond(args, ir.Overlap.SERIAL) is None
    assert torch.ops.moe_compile.experts_shared(*args, ir.Overlap.SERIAL).shape == (0, HIDDEN)


def test_rows_of_one_token_expanded_go_by_products_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    args, _ = shared_call(5, torch.float16)
    args[0] = args[0][:1].expand(5, -1)
    want = fused([args[0].contiguous(), *args[1:]], ir.Overlap.SIDE)
    monkeypatch.setattr(beside.One, "run", None)
    assert norm_error(fused(args, ir.Overlap.SIDE), want) <= TOLERANCE[torch.float16]


def test_mixed_dtypes_are_left_to_the_other_path() -> None:
    args, _ = shared_call(3, torch.float32)
    args[17] = [t.double() for t in args[17]]
    assert beyond(args, ir.Overlap.SERIAL) is None


# ---- two streams ---------------------------------------------------------------------------------------------------------

BIG = ir.Experts(16, 512, 256, 512, ir.Form.CONCAT, act.SWIGLU)
TOKENS = (1, 3, 16, 64, 256)


@NEEDS_GPU
@pytest.mark.parametrize(("tokens", "beside_it"), [(16, True), (256, True), (4096, True), (4097, False)])
def test_auto_goes_by_the_number_of_tokens(tokens: int, beside_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A side stream for few tokens, the main one beyond; the same values."""
    forks: list[int] = []
    side = beside.Side
    monkeypatch.setattr(beside, "Side", lambda *args: (forks.append(1), side(*args))[1])
    args = big(tokens)
    assert torch.equal(through_op(args, ir.Overlap.BY_TOKENS), through_op(args, ir.Overlap.SERIAL))
    assert forks == [1] * beside_it


def big(tokens: int, seed: int = 0, **kwargs: Any) -> list[Any]:
    return shared_call(tokens, torch.bfloat16, seed=seed, routed=BIG, width=1024, **kwargs)[0]


def through_op(args: list[Any], overlap: int) -> Tensor:
    out: Tensor = torch.ops.moe_compile.experts_shared(*args, overlap)
    return out


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [15, 33, 70, 300])
def test_values_by_each_kind_of_tile(tokens: int, dtype: torch.dtype) -> None:
    """Of the shared expert's rows: plain tiles, the warp-specialised kernel's of 64 rows and of 128, whose rows come by a tensor map."""
    for layout in ({}, {"up_bias": True, "down_bias": True}, {"up_transposed": True, "down_transposed": True, "gated": 1}):
        args, want = shared_call(tokens, dtype, routed=BIG, width=1024, **layout)  # type: ignore[arg-type]
        assert norm_error(fused(args, ir.Overlap.SIDE), want) <= TOLERANCE[dtype]


def captured(args: list[Any], overlap: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of three layers, each on the result of the one before, so that buffers are handed on."""

    def layers() -> Tensor:
        x = args[0]
        for _ in range(3):
            x = through_op([x * 0.5, *args[1:]], overlap)
        return x

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers()
    return graph, out


@NEEDS_GPU
@pytest.mark.parametrize("tokens", TOKENS)
def test_graph_replays_are_bitwise_serial(tokens: int) -> None:
    """1,000 replays with changing tokens, ids and gates: side stream against one stream, bit by bit."""
    args = big(tokens, gated=1)
    (serial, want), (parallel, got) = captured(args, ir.Overlap.SERIAL), captured(args, ir.Overlap.SIDE)
    x, ids, gate = args[0], args[1], args[21]
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        x.normal_()
        ids.random_(0, BIG.num_experts)
        gate.uniform_()
        serial.replay()
        parallel.replay()
        wrong += (want != got).sum() + (~want.isfinite()).sum()
    assert int(wrong) == 0


@NEEDS_GPU
@pytest.mark.parametrize("tokens", TOKENS)
def test_memory_is_not_handed_out_too_early(tokens: int) -> None:
    """Between calls the main stream frees, takes and poisons memory of every size the branches use; nothing waits on the host."""
    calls = [big(tokens, seed, gated=seed % 2, add=seed % 3 == 0) for seed in range(6)]
    want = [through_op(args, ir.Overlap.SERIAL) for args in calls]
    torch.cuda.synchronize()
    sizes = (1, 8 * tokens, tokens * 512, tokens * 1024, tokens * 2048, tokens * 4096)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for turn in range(200):
        args, exact = calls[turn % 6], want[turn % 6]
        poison = [torch.full((n,), float("nan"), dtype=torch.bfloat16, device=DEVICE) for n in sizes]
        del poison
        x = args[0] * 1.0  # a fresh input, freed while the side branch may still read it
        out = through_op([x, *args[1:]], ir.Overlap.SIDE)
        del x
        poison = [torch.full((n,), float("nan"), dtype=torch.bfloat16, device=DEVICE) for n in sizes]
        wrong += (out != exact).sum()
        del poison, out
    assert int(wrong) == 0


@NEEDS_GPU
def test_both_streams_are_ordered() -> None:
    """The side branch waits for the tokens' producer, the result for the side branch, however long each takes."""
    args = big(64)
    source, want = args[0].clone(), through_op(args, ir.Overlap.SERIAL)
    through_op(args, ir.Overlap.SIDE)
    torch.cuda.synchronize()
    for slow_side in (False, True):
        args[0].fill_(float("nan"))
        if slow_side:
            for first in (False, True):
                with torch.cuda.stream(tape.side_stream(args[0].device, first)):
                    torch.cuda._sleep(20_000_000)
        else:
            torch.cuda._sleep(20_000_000)
        args[0].copy_(source)
        out = through_op(args, ir.Overlap.SIDE)
        args[0].fill_(float("nan"))  # the main stream goes on: the side branch has read its tokens by now
        assert torch.equal(out, want)


@NEEDS_GPU
def test_two_side_streams_for_all_layers() -> None:
    each = [tape.side_stream(torch.device("cuda"), first) for first in (False, True)]
    assert each == [tape.side_stream(torch.device("cuda", torch.cuda.current_device()), first) for first in (False, True)]
    assert len({torch.cuda.current_stream(), *each}) == 3 and each[1].priority < each[0].priority


@NEEDS_GPU
@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_model(graphs: bool) -> None:
    """Through torch.compile, with and without Inductor's CUDA graphs: the serial form's values."""
    from catalogue import build
    from catalogue.shared import SharedGatedAfter

    import moe_compile

    model = build(SharedGatedAfter).eval().cuda()
    results = []
    for overlap in (False, True):
        torch._dynamo.reset()
        run = torch.compile(model, backend="moe_fused", options={"overlap_shared": overlap, "inner_options": {"triton.cudagraphs": graphs}})
        torch.manual_seed(0)
        inputs = [torch.randn(5, 16, device=DEVICE) for _ in range(6)]
        with torch.no_grad():
            results.append([run(x).clone() for x in inputs])
        assert moe_compile.last_report().blocks[0].shared.endswith("overlapped") is overlap
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@NEEDS_GPU
@pytest.mark.parametrize("tokens", [1, 4])
def test_kernels_that_start_early_wait_for_what_they_read(tokens: int) -> None:
    """Router, routing, few-token experts, three layers in a graph: 1,000 replays are bitwise the calls with a wait between any two."""
    gating = ops.route_args(ir.Gating(BIG.num_experts, 2, ir.Score.SIGMOID, norm=ir.Normaliser(ir.Norm.SUM)))
    args = big(tokens)
    router = torch.randn(BIG.num_experts, BIG.hidden, device=DEVICE).bfloat16()
    source = args[0]

    def layers(between: Callable[[], None]) -> Tensor:
        x = source
        for _ in range(3):
            weights, ids = torch.ops.moe_compile.route_linear(x, router, None, None, None, *gating)
            between()
            x = through_op([x, ids, weights.float(), *args[3:]], ir.Overlap.BY_TOKENS)
            between()
            x = x / x.float().norm(dim=-1, keepdim=True).clamp(min=1e-3).to(x.dtype)
        return x

    layers(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layers(lambda: None)
    for _ in range(1000):
        source.normal_()
        graph.replay()
        want = layers(torch.cuda.synchronize)
        assert torch.equal(want, got) and bool(got.isfinite().all())
