"""What only a GPU can show: warp-specialised kernels, every tile, sizes, CUDA graphs, no waiting for the device, the numerics contract."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import bundle
from test_ops import Case, close
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("triton")

from calls import GROUPED, PATHS, TOLERANCE, covered, kernel, layout_of, norm_error, op, operands
from test_experts import ALONE, GATED

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.lowering.triton import call as call_of
from moe_compile.lowering.triton import combine, decode, dispatch, experts, gemm, library, route_kernels, tune, tuner
from moe_compile.lowering.triton.tune import Choice, Problem, Tile

ON_GPU = torch.cuda.is_available()
HOPPER = ON_GPU and torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
GATING = ir.Gating(
    16, 4, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE, norm=ir.Normaliser(ir.Norm.SUM, eps=1e-20), scale=2.826, weight_dtype=torch.float32
)


def swiglu(e: int, hidden: int, inter: int, dtype: torch.dtype = torch.bfloat16, **kw: Any) -> ir.Experts:
    form, activation = kw.pop("form", ir.Form.CONCAT), kw.pop("act", act.SWIGLU)
    return ir.Experts(e, hidden, inter, kw.pop("out_features", hidden), form, activation, dtype=dtype, **kw)


# ---- the warp-specialised kernel ---------------------------------------------------------------------------------

WARP = Tile(128, 128, 64, 8, 4, tma=True, hopper=True, group=8)
SPLIT = Tile(64, 64, 64, 8, 5, tma=True, hopper=True, group=8)  # the consumers split the columns, not the rows
either = pytest.mark.parametrize("tile", [WARP, SPLIT], ids=["rows split", "columns split"])
LAYOUTS: dict[str, Case] = {
    "concat": Case("", swiglu(6, 192, 256), 300, 3),
    "transposed": Case("", swiglu(6, 192, 256, up_transposed=True, down_transposed=True), 300, 3),
    "separate": Case("", swiglu(6, 192, 256, form=ir.Form.SEPARATE, up_transposed=True), 300, 3),
    "single": Case("", swiglu(6, 192, 256, form=ir.Form.SINGLE, act=act.relu(act.G) ** 2), 300, 3),
    "biases": Case("", swiglu(6, 192, 256, up_bias=True, down_bias=True), 300, 3, add=True),
    "interleaved": Case("", swiglu(6, 192, 256, form=ir.Form.INTERLEAVED, up_bias=True), 300, 3),
    "interleaved, transposed": Case("", swiglu(6, 192, 320, form=ir.Form.INTERLEAVED, up_transposed=True, up_bias=True), 300, 3),
    "weight on input": Case("", swiglu(6, 192, 256, weight_on_input=True, up_bias=True), 300, 3),
    "single, transposed, weight on input": Case(
        "", swiglu(6, 192, 256, form=ir.Form.SINGLE, act=act.silu(act.G), up_transposed=True, weight_on_input=True), 300, 3
    ),
    "identity and foreign ids": Case("", swiglu(6, 192, 256, num_identity=2), 300, 3, add=True, foreign=True),
    "columns beyond the last block": Case("", swiglu(5, 64, 320, out_features=200), 300, 3),
    "fewer columns than a block": Case("", swiglu(5, 64, 64, out_features=40), 300, 3),
    "depths that end within a step": Case("", swiglu(6, 200, 264), 300, 3),
    "interleaved, depth that ends within a step": Case("", swiglu(6, 136, 264, form=ir.Form.INTERLEAVED, up_bias=True), 300, 3),
    "a depth shorter than a step": Case("", swiglu(5, 40, 72), 300, 3),
    "one step": Case("", swiglu(4, 64, 64), 200, 2),
    "few rows an expert": Case("", swiglu(40, 192, 256), 64, 3),
    "one expert": Case("", swiglu(1, 256, 128), 130, 1),
    "many tiles": Case("", swiglu(12, 256, 512), 5000, 4),
    "many tiles, transposed": Case("", swiglu(12, 256, 512, up_transposed=True, down_transposed=True), 5000, 4),
}


def both(case: Case, t: dict[str, Any], tile: Tile, monkeypatch: pytest.MonkeyPatch, save: bool = False) -> None:
    """By the warp-specialised kernel, which must have run, and by its twin."""
    seen = []
    run = experts.warp_specialised
    monkeypatch.setattr(experts, "warp_specialised", lambda *a: (seen.append(1), run(*a)))
    out, pre = kernel(case, t, Choice(tile, tile, None), save)
    assert len(seen) == 2, "the tile fell back to the plain kernel"
    twin = replace(tile, hopper=False, bk=64, stages=3)
    want, want_pre = kernel(case, t, Choice(twin, twin, None), save)
    assert torch.equal(out, want) or norm_error(out, want) < 1e-3
    rows = int(((t["ids"] >= 0) & (t["ids"] < case.experts.num_experts)).sum())
    assert not save or torch.equal(pre[:rows], want_pre[:rows]) or norm_error(pre[:rows], want_pre[:rows]) < 1e-3
    close(out, case.experts.evaluate(**t), TOLERANCE[case.dtype])


@on_hopper
@either
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_warp_specialised_is_its_twin(name: str, dtype: torch.dtype, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(LAYOUTS[name], dtype=dtype)
    both(case, operands(case), tile, monkeypatch)


@on_hopper
@either
@pytest.mark.parametrize("name", ["concat", "biases", "single", "interleaved", "weight on input", "columns beyond the last block"])
def test_warp_specialised_saves(name: str, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(LAYOUTS[name], dtype=torch.bfloat16)
    both(case, operands(case), tile, monkeypatch, save=True)


@on_hopper
@pytest.mark.parametrize(
    ("tile", "name"),
    [
        *itertools.product(
            [
                replace(WARP, stages=2, group=1),
                replace(WARP, stages=3, group=4),
                replace(WARP, group=16),
                replace(WARP, bn=64, stages=6),
                replace(WARP, together=2),
                replace(WARP, bn=64, stages=6, together=2),
                replace(SPLIT, together=2),
                replace(SPLIT, stages=2, group=1),
                replace(SPLIT, bn=128, stages=2),
            ],
            ["one step", "concat", "transposed", "few rows an expert", "many tiles"],
        ),
        *itertools.product([replace(WARP, bk=128, stages=2), replace(SPLIT, bk=128, stages=2)], ["many tiles", "many tiles, transposed"]),
        (replace(SPLIT, bn=32, bk=128, stages=4), "many tiles"),
    ],
    ids=lambda v: f"{v.bm}x{v.bn}x{v.bk}, {v.stages} stages by {v.together}, groups of {v.group}" if isinstance(v, Tile) else v,
)
def test_warp_specialised_rings(tile: Tile, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More and fewer steps than the ring has; a stage of one and of two boxes of weights."""
    case = replace(LAYOUTS[name], dtype=torch.bfloat16)
    both(case, operands(case), tile, monkeypatch)


@on_hopper
def test_what_lies_behind_a_row_is_not_read() -> None:
    """Tokens, activations and matrices whose rows are parts of longer ones, with NaN behind them, at a depth that ends within a step."""
    case = Case("", swiglu(6, 200, 264), 300, 3, dtype=torch.bfloat16)
    t = operands(case)
    for name in ("x", "up", "down"):
        given = t[name] if name == "x" else t[name][0]
        wide = given.new_full((*given.shape[:-1], given.shape[-1] + 64), float("nan"))
        wide[..., : given.shape[-1]] = given
        t[name] = wide[..., : given.shape[-1]] if name == "x" else [wide[..., : given.shape[-1]]]
    for tile in (WARP, SPLIT):
        close(kernel(case, t, Choice(tile, tile, None))[0], case.experts.evaluate(**t), TOLERANCE[case.dtype])


@on_hopper
@pytest.mark.parametrize("form", [ir.Form.CONCAT, ir.Form.SINGLE])
@pytest.mark.parametrize("foreign", [False, True])
def test_by_torchs_grouped_product(form: ir.Form, foreign: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices [E, in, out] of a depth that is no whole number of steps; from a few rows an expert on; the same gradients."""
    seen = []
    run = library.run
    monkeypatch.setattr(library, "run", lambda *a: (seen.append(1), run(*a))[1])
    plain = act.silu(act.G) if form is ir.Form.SINGLE else act.SWIGLU
    meaning = swiglu(6, 200, 264, form=form, act=plain, up_transposed=True, down_transposed=True, num_identity=2 * foreign)
    for tokens, used in ((9, False), (300, True)):
        case = Case("", meaning, tokens, 3, add=True, dtype=torch.bfloat16, foreign=foreign)
        t = operands(case)
        for _ in range(2):
            close(op(case, t), case.experts.evaluate(**t), TOLERANCE[case.dtype])
        out, pre = experts.forward(*bundle(t), layout_of(case), True)
        want, want_pre = experts.forward(*bundle(t), layout_of(case), True, Choice(GROUPED.up, GROUPED.down, None))
        rows = int(((t["ids"] >= 0) & (t["ids"] < 6)).sum())
        assert norm_error(out, want) < 1e-2 and norm_error(pre[:rows], want_pre[:rows]) < 1e-2
        assert bool(seen) == used


@on_hopper
def test_tiles_are_claimed_again_and_again() -> None:
    """A dispatch may serve any number of products: each leaves the counters at zero. A graph's replays give the first call's bits."""
    case = replace(LAYOUTS["many tiles"], dtype=torch.bfloat16)
    t = operands(case)
    first = kernel(case, t, Choice(WARP, WARP, None))[0]
    rows = dispatch.dispatch(t["ids"], case.experts.num_experts, (128,))
    call = call_of.read(*bundle(t), layout_of(case))
    assert call is not None
    outs = [torch.empty(call.slots, call.up.n, device="cuda", dtype=case.dtype) for _ in range(3)]
    for out in outs:
        experts.grouped_gemm(call.x, call.up, None, rows, out, WARP, call.layout, gather=case.k)
        assert rows.counters.tolist() == [0, 0]
    assert all(torch.equal(out, outs[0]) for out in outs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = kernel(case, t, Choice(WARP, WARP, None))[0]
    for _ in range(50):
        graph.replay()
        assert torch.equal(again, first)


@on_hopper
@either
@pytest.mark.parametrize("kind", ["one expert", "expert 0", "last", "64 rows", "65 rows", "129 rows", "none"])
def test_warp_specialised_routings(kind: str, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of a tile without rows, tiles with one row, no tile at all."""
    case = Case("", swiglu(6, 192, 256), 130, 1, dtype=torch.bfloat16)
    t = operands(case)
    t["ids"].fill_({"one expert": 3, "expert 0": 0, "last": 5, "none": -1}.get(kind, 2))
    if "rows" in kind:
        t["ids"][int(kind.split()[0]) :] = 4
    both(case, t, tile, monkeypatch)


@on_hopper
@pytest.mark.parametrize("name", {**GATED, **ALONE})
def test_warp_specialised_activations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = ir.Form.SINGLE if name in ALONE else ir.Form.CONCAT
    case = Case("", swiglu(4, 64, 128, form=form, act={**GATED, **ALONE}[name]), 90, 2, dtype=torch.float16)
    both(case, operands(case), WARP, monkeypatch)


@on_hopper
def test_operands_that_do_not_fit_run_the_twin() -> None:
    """Unaligned tokens, a depth that is no multiple of the step, matrices one by one."""
    base = Case("", swiglu(6, 200, 256), 300, 3, dtype=torch.bfloat16)
    wide = replace(base, experts=swiglu(6, 192, 256))
    t = operands(wide)
    x = t["x"].new_zeros(300, 193)[:, 1:]
    x.copy_(t["x"])
    listed = replace(base, experts=swiglu(6, 192, 256, stacked=False))
    for case, args in ((base, operands(base)), (wide, {**t, "x": x}), (listed, operands(listed))):
        choice = Choice(WARP, replace(WARP, split=2), None)  # where the plain kernel runs, there is one part
        close(kernel(case, args, choice)[0], case.experts.evaluate(**args), TOLERANCE[case.dtype])


# ---- tiles -------------------------------------------------------------------------------------------------------


def candidates() -> list[tuple[torch.dtype, Tile, bool]]:
    """Every tile that the tuner tries, at any number of rows an expert."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (16, 64, 128, 256, 400, 2048):
            for down in (False, True):
                found |= {(dtype, tile, down): None for tile in tuner.tiles(Problem(8, 256, 256, 2, dtype, True), tokens, down)}
    return list(found)


@pytest.mark.parametrize(("dtype", "tile", "down"), candidates(), ids=str)
def test_every_tile(dtype: torch.dtype, tile: Tile, down: bool) -> None:
    case = Case("", swiglu(8, 256, 384, dtype), 100, 2, dtype=dtype, foreign=True)
    t = operands(case)
    choice = Choice(tile if not down else GROUPED.up, tile if down else GROUPED.down, None)
    try:
        out, _ = kernel(case, t, choice)
    except Exception as e:
        if "out of resource" not in str(e):
            raise
        pytest.skip(f"does not fit this card: {e}")
    close(out, case.experts.evaluate(**t), TOLERANCE[dtype])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("down", "vector"), [(d, v) for d in (False, True) for v in tuner.vectors(d)], ids=str)
def test_every_vector(down: bool, vector: tune.Vector, transposed: bool) -> None:
    case = Case("", swiglu(8, 1032, 520, up_transposed=transposed, down_transposed=transposed), 3, 2, dtype=torch.bfloat16)
    t = operands(case)
    few = PATHS["few tokens"].decode
    assert few is not None
    choice = replace(GROUPED, decode=(few[0], vector) if down else (vector, few[1]))
    close(kernel(case, t, choice)[0], case.experts.evaluate(**t), TOLERANCE[case.dtype])


# ---- sizes and numerics ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("warp", [False, pytest.param(True, marks=on_hopper)])
def test_beyond_32_bits(warp: bool) -> None:
    """T k H and T k 2I beyond 2^31 elements: the last rows of every buffer are the oracle's."""
    tokens, k, hidden, inter = 132_000, 8, 2048, 1024
    case = Case("", swiglu(8, hidden, inter), 64, k, dtype=torch.bfloat16)
    assert tokens * k * hidden > 2**31
    t = operands(case)
    t["x"] = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    t["weights"], t["ids"] = torch.rand(tokens, 8, device="cuda").softmax(-1).topk(k)
    tile = replace(WARP, hopper=warp)
    out, pre = kernel(case, t, Choice(tile, tile, None), save=True)
    assert pre.numel() > 2**31
    some = torch.tensor([0, 1, 70_001, tokens - 2, tokens - 1], device="cuda")
    want = case.experts.evaluate(**{**t, **{n: t[n][some] for n in ("x", "ids", "weights")}})
    close(out[some], want, TOLERANCE[case.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 256, 2048])
def test_numerics_contract(dtype: torch.dtype, tokens: int) -> None:
    """Against float64: at most 1.25 times eager's error in bf16 and fp16, 1e-5 in fp32 (so no tf32)."""
    e, k, hidden, inter = 16, 4, 2048, 1024
    case = Case("", swiglu(e, hidden, inter, dtype), tokens, k, dtype=dtype)
    t = operands(case)
    logits, bias = torch.randn(tokens, e, device="cuda"), torch.zeros(e, device="cuda")
    w, ids = torch.ops.moe_compile.route(logits, bias, None, *ops.route_args(GATING))
    t |= {"weights": w, "ids": ids}
    want = case.experts.evaluate(**t)
    error = norm_error(op(case, t), want)
    if dtype == torch.float32:
        assert error < 1e-5
    else:
        assert error <= 1.25 * norm_error(case.experts.evaluate(**t, dtype=dtype), want)


# ---- the ops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", covered(2, (6, 64, 48), torch.bfloat16)[::3], ids=lambda c: c.name)
def test_opcheck_experts(case: Case) -> None:
    t = operands(case)
    for name in ("x", "weights"):
        t[name].requires_grad_()
    opcheck(torch.ops.moe_compile.experts.default, (*t.values(), *ops.experts_args(case.experts)))


@pytest.mark.parametrize("tokens", [0, 1, 6, 300])
def test_opcheck_route(tokens: int) -> None:
    logits, bias = torch.randn(tokens, 16, device="cuda", requires_grad=True), torch.randn(16, device="cuda")
    opcheck(torch.ops.moe_compile.route.default, (logits, bias, None, *ops.route_args(GATING)))


class Block:
    """Route and experts on fixed buffers: what a captured graph holds."""

    def __init__(self, tokens: int, hidden: int = 512, inter: int = 256) -> None:
        self.case = Case("", swiglu(16, hidden, inter), tokens, 4, dtype=torch.bfloat16, add=True)
        self.t = operands(self.case)
        self.logits = torch.randn(tokens, 16, device="cuda")
        self.bias = torch.randn(16, device="cuda") * 0.1

    def __call__(self) -> Tensor:
        w, ids = torch.ops.moe_compile.route(self.logits, self.bias, None, *ops.route_args(GATING))
        return op(self.case, {**self.t, "weights": w, "ids": ids})

    def refill(self, x: Tensor, logits: Tensor) -> None:
        self.t["x"].copy_(x)
        self.logits.copy_(logits)

    def inputs(self, count: int) -> list[tuple[Tensor, Tensor]]:
        return [(torch.randn_like(self.t["x"]), torch.randn_like(self.logits)) for _ in range(count)]


@pytest.mark.parametrize("tokens", [1, 4, 32, 300, 4096])
def test_two_runs_are_bitwise_equal(tokens: int) -> None:
    block = Block(tokens)
    first = block()
    noise = torch.empty(1 << 24, device="cuda").normal_()  # memory of the first run's buffers holds something else now
    del noise
    assert torch.equal(first, block())


@pytest.mark.parametrize("tokens", [1, 8, 64, 1024])
def test_graph_replays_are_the_eager_run(tokens: int) -> None:
    """1,000 replays with changing tokens and routings, bitwise."""
    block = Block(tokens)
    inputs, want = block.inputs(8), []
    for x, logits in inputs:
        block.refill(x, logits)
        want.append(block())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(1000):
        block.refill(*inputs[i % 8])
        graph.replay()
        wrong += (out != want[i % 8]).any()
    assert int(wrong) == 0


@pytest.mark.parametrize("tokens", [1, 16, 1024, 4096])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_the_host_never_waits(tokens: int, stacked: bool) -> None:
    block = Block(tokens)
    block.case = replace(block.case, experts=replace(block.case.experts, stacked=stacked))
    block.t = operands(block.case)
    block()
    block.t["x"].requires_grad_(False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        block()
        torch.ops.moe_compile.experts_fwd(*block.t.values(), *ops.experts_args(block.case.experts))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled() -> int:
    """How many kernels Triton has built in this process, of those that a forward call launches."""
    jitted = [gemm.grouped_gemm, decode.up_decode, decode.down_decode, combine._combine]
    jitted += [dispatch._sort_few, dispatch._count, dispatch._place]
    jitted += [f for f in vars(route_kernels).values() if hasattr(f, "device_caches")]
    if HOPPER:
        from moe_compile.lowering.triton import hopper

        jitted.append(hopper.grouped_gemm)
    return sum(len(f.device_caches[torch.cuda.current_device()][0]) for f in jitted)


@pytest.mark.parametrize("path", ["few tokens", "grouped", "rows split", "columns split"])
def test_token_counts_do_not_recompile(path: str) -> None:
    """One choice of tiles serves every number of tokens, also 1 and multiples of 16."""
    tile = SPLIT if path == "columns split" else WARP
    choice = PATHS.get(path) or Choice(tile, tile, None)
    experts_ = swiglu(16, 256, 128)

    def at(tokens: int) -> None:
        case = Case("", experts_, tokens, 4, dtype=torch.bfloat16)
        kernel(case, operands(case), choice)

    few, many = (1, 2, 3, 7, 16, 29, 32), (40, 64, 100, 255, 256, 500, 512)
    for tokens in few if path == "few tokens" else (2, 3000, *many):
        at(tokens)
    before = compiled()
    for tokens in (4, 5, 6, 17, 31) if path == "few tokens" else (1, 16, 33, 41, 48, 77, 128, 200, 333, 480, 511, 2500, 4000):
        at(tokens)
    assert compiled() == before, "a number of tokens had a kernel compiled"  # the dispatch's four sizes were seen above


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_gradients_flow(tokens: int) -> None:
    """Through the ops' autograd, against the oracle's; the kernels of the backward pass have their own tests."""
    case = Case("", swiglu(8, 64, 48, torch.float32, up_bias=True), tokens, 2)
    t = operands(case)
    leaves = [t[n].requires_grad_() for n in ("x", "weights")] + [w.requires_grad_() for n in ("up", "down", "up_bias") for w in t[n]]
    grad = torch.randn(tokens, 64, device="cuda")
    got = torch.autograd.grad(op(case, t), leaves, grad)
    want = torch.autograd.grad(case.experts.evaluate(**t), leaves, grad.double())
    for g, w in zip(got, want, strict=True):
        close(g, w, 2e-5)


def run_all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()
    torch.cuda.synchronize()


def test_sanitizer_run() -> None:
    """Every kernel once at a small size with ragged edges: what `make test-cuda` runs under compute-sanitizer."""
    calls: list[Callable[[], object]] = []
    for form in ir.Form:
        e = swiglu(5, 72, 40, form=form, act=act.silu(act.G) if form is ir.Form.SINGLE else act.SWIGLU, up_bias=True, down_bias=True)
        case = Case("", replace(e, stacked=form is not ir.Form.SEPARATE), 7, 3, dtype=torch.bfloat16, add=True, foreign=True)
        t = operands(case)
        calls += [lambda c=case, t=t, path=path: kernel(c, t, path) for path in PATHS.values()]
        calls.append(lambda c=case, t=t: kernel(c, t, GROUPED, save=True))
    ragged = Case("", swiglu(5, 64, 72, out_features=40), 150, 3, dtype=torch.bfloat16, foreign=True)
    t = operands(ragged)
    for tile in (*((WARP, SPLIT) if HOPPER else (GROUPED.up,)), replace(GROUPED.up, tma=True)):
        calls.append(lambda tile=tile: kernel(ragged, t, Choice(tile, tile, None), save=True))
    many = {**t, **{n: t[n].repeat(30, 1)[:4000] for n in ("x", "ids", "weights")}}  # the dispatch of many pairs
    calls.append(lambda: op(ragged, many))
    deep = Case("", swiglu(5, 256, 128, out_features=200), 150, 3, dtype=torch.bfloat16, foreign=True)  # whole steps of depth for all
    given, trained = operands(deep), operands(deep)
    for tile in (replace(SPLIT, bn=128, stages=2), *(replace(t, **how) for t in (WARP, SPLIT) for how in ({"together": 2}, {"split": 2}))):
        calls.append(lambda tile=tile: kernel(deep, given, Choice(replace(tile, split=1), tile, None)))
    leaves = [trained[n].requires_grad_() for n in ("x", "weights")] + [w.requires_grad_() for n in ("up", "down") for w in trained[n]]
    calls.append(lambda: torch.autograd.grad(op(deep, trained).float().square().sum(), leaves))
    calls.append(Block(3))
    run_all(calls)


def test_problem_of_a_call_is_the_tuners() -> None:
    """The key that a call looks up is the one that the tuner stores."""
    case = Case("", swiglu(16, 256, 128), 8, 4, dtype=torch.bfloat16)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "choose", lambda p, tokens, device: (seen.append((p, tokens)), GROUPED)[1])
        experts.forward(*bundle(operands(case)), layout_of(case), False)
    assert seen == [(Problem(16, 256, 128, 4, torch.bfloat16, True), 8)]
