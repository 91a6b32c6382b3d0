"""Prepared calls on a card: bit for bit what the same call gives step by step, wherever operands lie, on any stream, inside CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ops import Case
from torch import Tensor

pytest.importorskip("triton")

from calls import ON_GPU, operands

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.lowering.triton import calls, short
from moe_compile.lowering.triton.launch import driver, memory, plans

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
BF16 = torch.bfloat16
MEANINGS = {
    "concat": {},
    "both transposed": {"up_transposed": True, "down_transposed": True},
    "interleaved, biases": {"form": ir.Form.INTERLEAVED, "up_bias": True, "down_bias": True},
    "separate": {"form": ir.Form.SEPARATE},
    "single": {"form": ir.Form.SINGLE, "act": act.relu(act.G) ** 2},
    "weight on input, identity": {"weight_on_input": True, "num_identity": 2},
    "odd widths": {"hidden": 200, "inter": 136},
    "unaligned widths": {"hidden": 130, "inter": 70},
}
TOKENS = (1, 3, 17, 300, 2500)
GATING = ir.Gating(16, 4, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE, norm=ir.Normaliser(ir.Norm.SUM, eps=1e-20), weight_dtype=torch.float32)
ROUTE = short.text(ops.route_args(GATING))


@pytest.fixture(autouse=True)
def fresh() -> None:
    assert driver.found() is not None, "the driver's library is not as expected"
    plans.forget()


def meaning(name: str, dtype: torch.dtype = BF16) -> ir.Experts:
    given = dict(MEANINGS[name])
    hidden, inter = given.pop("hidden", 256), given.pop("inter", 192)
    form, activation = given.pop("form", ir.Form.CONCAT), given.pop("act", act.SWIGLU)
    return ir.Experts(12, hidden, inter, hidden, form, activation, dtype=dtype, **given)


def tensors(name: str, tokens: int, dtype: torch.dtype = BF16, add: bool = True, seed: int = 0) -> tuple[dict[str, Any], str]:
    e = meaning(name, dtype)
    return operands(Case(name, e, tokens, 3, add, dtype=dtype, foreign=True), seed), short.text(ops.experts_args(e))


def both(f: Callable[[], Any]) -> None:
    """By a plan, twice, and step by step: the same bits."""
    before = len(plans._plans)
    first = f()
    assert len(plans._plans) > before and None not in plans._plans.values(), "the call has no plan"
    kept = [t.clone() for t in flat(first)]
    second = f()
    with plans.step_by_step():
        want = f()
    for a, b, c in zip(kept, flat(second), flat(want), strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)


def flat(v: Any) -> list[Tensor]:
    return [v] if isinstance(v, Tensor) else list(v)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", MEANINGS)
def test_experts(name: str, tokens: int, dtype: torch.dtype) -> None:
    t, text = tensors(name, tokens, dtype)
    *rest, add = t.values()
    known = (t["ids"] >= 0) & (t["ids"] < 12)
    both(lambda: calls.experts(*rest, add, text))
    rows = int(known.sum())

    def forward() -> list[Tensor]:
        out, pre = calls.experts_fwd(*rest, add, text)
        return [out, pre[:rows]]

    both(forward)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", MEANINGS)
def test_gradients(name: str, tokens: int) -> None:
    t, text = tensors(name, tokens, add=False)
    *rest, _ = t.values()
    out, pre = calls.experts_fwd(*rest, None, text)
    grad, needs = torch.randn_like(out), [True] * (2 + sum(len(ts) for ts in rest[3:]))
    both(lambda: calls.experts_bwd(grad, pre, *rest, text, needs))


@pytest.mark.parametrize("tokens", [1, 4, 100, 5000])
def test_routing(tokens: int) -> None:
    x, w = torch.randn(tokens, 64, device="cuda", dtype=BF16), torch.randn(16, 64, device="cuda", dtype=BF16)
    bias, logits = torch.randn(16, device="cuda"), torch.randn(tokens, 16, device="cuda")
    both(lambda: calls.route(logits, bias, None, ROUTE))
    weights, ids = calls.route(logits, bias, None, ROUTE)
    both(lambda: calls.route_bwd(torch.ones_like(weights), ids, logits, bias, None, ROUTE, [True, False, False]))
    if tokens <= 4:
        both(lambda: calls.route_linear(x, w, None, bias, None, ROUTE))


@pytest.mark.parametrize("overlap", [ir.Overlap.SIDE, ir.Overlap.SERIAL])
@pytest.mark.parametrize("tokens", [1, 3, 17, 300])
def test_the_shared_expert(tokens: int, overlap: ir.Overlap) -> None:
    from test_side_stream import shared_call

    for gated in (0, 1):
        args, _ = shared_call(tokens, BF16, ir.Form.CONCAT, gated=gated)
        row = short.shorten("experts_shared", [*args, overlap])
        both(lambda row=row: calls.experts_shared(*row))


# ---- what changes between calls ------------------------------------------------------------------------------------


def test_weights_that_move() -> None:
    """New storage under the same parameters, at other addresses; a map of the copy engine follows."""
    t, text = tensors("concat", 300)
    *rest, add = t.values()
    calls.experts(*rest, add, text)
    for _ in range(3):
        t["up"][0].data = t["up"][0].data.clone() * 1.5
        t["down"][0].data = t["down"][0].data.clone()
        got = calls.experts(*rest, add, text)
        with plans.step_by_step():
            assert torch.equal(got, calls.experts(*rest, add, text))
    assert len(plans._plans) == 1


def test_an_unaligned_address() -> None:
    """The same strides, two bytes on: another plan, which loads less at a time."""
    t, text = tensors("concat", 17)
    *rest, add = t.values()
    calls.experts(*rest, add, text)
    memory_ = torch.empty(t["up"][0].numel() + 1, device="cuda", dtype=BF16)
    moved = memory_[1:].view_as(t["up"][0]).copy_(t["up"][0])
    args = [*rest[:3], [moved], *rest[4:], add, text]
    got = calls.experts(*args)
    with plans.step_by_step():
        assert torch.equal(got, calls.experts(*args))
    assert len(plans._plans) == 2


def test_streams() -> None:
    """Launched where the caller is: work queued on another stream before is seen, and what follows there sees the result."""
    t, text = tensors("concat", 300)
    *rest, add = t.values()
    want = calls.experts(*rest, add, text)
    x, stream = t["x"].clone(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        t["x"].zero_()
        torch.cuda._sleep(20_000_000)
        t["x"].copy_(x)
        got = calls.experts(*rest, add, text).clone()
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", TOKENS)
def test_graphs(tokens: int) -> None:
    """Captured by a plan, replayed on new values; the plan goes on working outside."""
    t, text = tensors("concat", tokens)
    *rest, add = t.values()
    calls.experts(*rest, add, text)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = calls.experts(*rest, add, text)
    for seed in range(3):
        t["x"].copy_(tensors("concat", tokens, seed=seed)[0]["x"])
        graph.replay()
        assert torch.equal(out, calls.experts(*rest, add, text))


def test_a_plan_made_while_capturing() -> None:
    t, text = tensors("concat", 40)
    *rest, add = t.values()
    with plans.step_by_step():
        want = calls.experts(*rest, add, text)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = calls.experts(*rest, add, text)
    graph.replay()
    assert torch.equal(out, want) and torch.equal(calls.experts(*rest, add, text), want)


def test_large_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer with memory of its own, given back as soon as it may: other tensors take the place at once."""
    monkeypatch.setattr(memory, "LARGE", 1)
    t, text = tensors("concat", 300)
    *rest, add = t.values()
    both(lambda: calls.experts(*rest, add, text))
    out, pre = calls.experts_fwd(*rest, add, text)
    grad = torch.randn_like(out)
    both(lambda: calls.experts_bwd(grad, pre, *rest, text, [True] * 4))


def test_threads() -> None:
    """One plan, several threads, each with a stream and operands of its own."""
    sets = [tensors("concat", 300, seed=s) for s in range(4)]
    with plans.step_by_step():
        want = [calls.experts(*[v for n, v in t.items()], text) for t, text in sets]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def run(i: int) -> None:
        t, text = sets[i]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                out = calls.experts(*t.values(), text)
            torch.cuda.current_stream().synchronize()
        if not torch.equal(out, want[i]):
            wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_triton_hooks_are_heard() -> None:
    """Whoever listens to Triton's launches, as its profiler does, goes on hearing of them."""
    from triton import knobs

    t, text = tensors("concat", 17)
    heard: list[Any] = []
    listen = lambda metadata: heard.append(metadata)  # noqa: E731
    knobs.runtime.launch_enter_hook.add(listen)
    try:
        calls.experts(*t.values(), text)
    finally:
        knobs.runtime.launch_enter_hook.remove(listen)
    assert heard
