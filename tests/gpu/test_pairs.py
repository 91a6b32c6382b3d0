"""Experts with low-rank pairs by the kernels: values and gradients of the float64 oracle, in every layout that they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import close

pytest.importorskip("triton")

from calls import DEVICE, DTYPES, ON_GPU, TOLERANCE
from interpreted import interpreted
from test_adapted import BY_NAME, MEANINGS, leaves, tensors

from moe_compile import ops
from moe_compile.ir.operands import ADAPTED
from moe_compile.lowering.reference import generic
from moe_compile.lowering.triton import adapted, adapted_calls
from moe_compile.lowering.triton.launch import plans, warm
from moe_compile.lowering.triton.launch.tape import Fill, Launch


def moved(name: str, dtype: torch.dtype, pairs: torch.dtype | None = None) -> dict[str, Any]:
    t = tensors(MEANINGS[name], dtype, pairs)
    t["weights"] = t["weights"].float()

    def to(v: Any) -> Any:
        return [to(i) for i in v] if isinstance(v, list) else v.to(DEVICE)

    return {n: to(v) if v is not None else None for n, v in t.items()}


def run(name: str, t: dict[str, Any], needs: list[bool] | None = None) -> tuple[Any, Any]:
    """(result and gradients by the kernels, those of the oracle)."""
    e = MEANINGS[name]
    layout = ops.adapted_of(ops.experts_args(e))
    for x in leaves(t):
        x.requires_grad_()
    want = e.evaluate(**t)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, t["x"].dtype)
    theirs = torch.autograd.grad(want, leaves(t), grad.double(), allow_unused=True, materialize_grads=True)
    x, ids, weights, p, rest = ops.bundled([*t.values()], ADAPTED)
    with torch.no_grad():
        out, pre = adapted.forward(x, ids, weights, p, *rest, layout)
        needs = [True] * (2 + len([*p])) if needs is None else needs
        ours = adapted.backward(grad, pre, x, ids, weights, p, layout, needs)
    return [out, *ours], [want, *(g for g, n in zip(theirs, needs, strict=True) if n)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BY_NAME
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    for got, want in zip(*run(name, moved(name, dtype)), strict=True):
        close(got, want, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["list", "stacked"])
def test_the_kernels_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not plain torch, which would be right as well; frozen weights have no gradient made."""
    monkeypatch.setattr(generic, "forward", None)
    monkeypatch.setattr(generic, "backward", None)
    made: list[str] = []
    room = adapted.Gradients.empty
    monkeypatch.setattr(adapted.Gradients, "empty", lambda self, n, part: (made.append(n), room(self, n, part))[1])
    t = moved(name, torch.float32)
    p = ops.bundled([*t.values()], ADAPTED)[3]
    needs = [True, True, *(n.endswith(("_a", "_b")) for n, group in p.by_name().items() for _ in group)]
    for got, want in zip(*run(name, t, needs), strict=True):
        close(got, want, 4e-5)
    assert set(made) == {"up_a", "up_b", "down_a", "down_b"}


def test_pairs_in_float32_beside_halves() -> None:
    for got, want in zip(*run("list", moved("list", torch.float16, torch.float32)), strict=True):
        close(got, want, 1e-2)


def test_no_tokens() -> None:
    t = moved("stacked", torch.float32)
    t = {**t, "x": t["x"][:0], "ids": t["ids"][:0], "weights": t["weights"][:0]}
    x, ids, weights, p, rest = ops.bundled([*t.values()], ADAPTED)
    assert adapted.forward(x, ids, weights, p, *rest, ops.adapted_of(ops.experts_args(MEANINGS["stacked"])))[0].shape == (0, 12)


@pytest.mark.parametrize("name", ["stacked", "interleaved"])
def test_calls_are_planned(name: str) -> None:
    """Forward and backward of stacks are launches alone: a plan holds them."""
    e = MEANINGS[name]
    layout = ops.adapted_of(ops.experts_args(e))
    x, ids, weights, p, _ = ops.bundled([*moved(name, torch.float32).values()], ADAPTED)
    pre = x.new_empty(ids.numel(), layout.pre_width(p.down))
    needs = (True, True, *(n.endswith(("_a", "_b")) for n, group in p.by_name().items() for _ in group))
    grad = torch.empty(x.shape[0], layout.out_features(p.down), device=DEVICE)
    forward = (x, ids, weights, None, *p)
    tape, results = plans.record(adapted_calls._forward, adapted_calls._how(layout, x, p), forward, [0] * len(forward))
    assert [r.shape for r in results] == [grad.shape, pre.shape]
    backward = (grad, pre, x, ids, weights, *p)
    more, results = plans.record(adapted_calls._backward, adapted_calls._how(layout, x, p, needs), backward, [0] * len(backward))
    assert len(results) == sum(needs) and all(isinstance(s, (Launch, Fill)) for s in (*tape.steps, *more.steps))


@pytest.mark.skipif(ON_GPU, reason="the interpreter's: on a GPU test_ops_run_by_plans")
def test_plans_do_what_calls_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits through a plan, with other operands of the same layout too."""
    layout = ops.adapted_of(ops.experts_args(MEANINGS["concat"]))
    with interpreted(monkeypatch):
        for _ in range(2):
            x, ids, weights, p, _ = ops.bundled([*moved("concat", torch.float32).values()], ADAPTED)
            x = torch.randn_like(x)
            needs = (True, True, *(n.endswith(("_a", "_b")) for n, group in p.by_name().items() for _ in group))
            got = adapted_calls.forward(x, ids, weights, p, None, layout)
            grad = torch.randn_like(got[0])
            back = adapted_calls.backward(grad, got[1], x, ids, weights, p, layout, needs)
            with plans.step_by_step():
                want = adapted_calls.forward(x, ids, weights, p, None, layout)
                again = adapted_calls.backward(grad, want[1], x, ids, weights, p, layout, needs)
            rows = int(((ids >= 0) & (ids < layout.num_experts)).sum())
            assert torch.equal(got[0], want[0]) and torch.equal(got[1][:rows], want[1][:rows])
            assert all(map(torch.equal, back, again))
        assert len(plans._plans) == 2 and None not in plans._plans.values()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_ops_run_by_plans() -> None:
    e, t = MEANINGS["concat"], moved("concat", torch.bfloat16)
    plans.forget()
    with torch.no_grad():
        got = torch.ops.moe_compile.experts_adapted(*t.values(), *ops.experts_args(e))
    close(got, e.evaluate(**t), 4 * TOLERANCE[torch.bfloat16])
    assert len(plans._plans) == 1 and None not in plans._plans.values()


@pytest.mark.skipif(ON_GPU, reason="the interpreter's")
def test_kernels_are_begun_when_the_op_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without values, forward and backward: what a call will launch is known before it comes."""
    e = MEANINGS["concat"]
    args = [*moved("concat", torch.float32).values(), *ops.experts_args(e)]
    begun: list[str] = []
    with interpreted(monkeypatch):
        monkeypatch.setattr(warm, "start", lambda build, how, tensors: begun.append(build.__name__))
        adapted_calls.compile_ahead("experts_adapted_fwd", args)
        out, pre, *_ = ops.shapes.experts_adapted_fwd(*args)
        rest = [a for a in args if a is not None]  # the backward op has no `add`
        adapted_calls.compile_ahead("experts_adapted_bwd", [out, pre, *rest, [True] * 8])
    assert begun == ["_forward", "_backward"]
