"""Experts whose ids the graph does not make: inputs, rows that came in the order of their experts, another device's experts masked.

Each spelling with its verdict; near misses beside them. What is fused gives eager's result and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single

import moe_compile
from moe_compile import exchange
from moe_compile.passes.recover.given_ids import choosers
from moe_compile.report import Report

E, K, H, I, T = 4, 2, 16, 16, 9
Fn = Callable[..., Tensor]


def weights(experts: int = E) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple((torch.randn(*s, generator=g) * 0.3).requires_grad_() for s in ((experts, 2 * I, H), (experts, H, I)))  # type: ignore[return-value]


def routed(experts: int = E) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randperm(experts)[:K] for _ in range(T)])
    return ids, torch.rand(T, K)


def act(h: Tensor) -> Tensor:
    g, u = h.chunk(2, -1)
    return F.silu(g) * u


def gathered(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Fused: weights gathered by ids that are an input."""
    return torch.einsum("tki,tkhi,tk->th", act(torch.einsum("th,tkih->tki", x, up[ids])), down[ids], w)


def loop_from_a_number_on(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Fused, ids less 4: the experts of the second of two devices, the offset in the loop."""
    out = torch.zeros_like(x)
    for e in range(E):
        c = (w * (ids == e + E)).sum(-1, keepdim=True)
        out = out + c * F.linear(act(F.linear(x, up[e])), down[e])
    return out


def masked_gather(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Fused: ids of other devices' experts are clamped and weigh nothing."""
    foreign = ids // E != 1
    return gathered(x, torch.where(foreign, E, ids % E).clamp(0, E - 1), w.masked_fill(foreign, 0.0), up, down)


def crossed(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Left: the two projections are chosen by different ids."""
    return torch.einsum("tki,tkhi,tk->th", act(torch.einsum("th,tkih->tki", x, up[ids])), down[ids.flip(-1)], w)


def of_other_rows(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Left: a token's experts are those of the token after it."""
    return gathered(x, ids.roll(1, 0)[:, :1].expand(-1, K) + 0 * ids, w, up, down).roll(1, 0).cumsum(0)


def pairs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(E, 2 * I, 3, generator=g) * 0.3, torch.randn(E, 3, H, generator=g) * 0.3


def adapted(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Fused: low-rank pairs are added to the stacked weights before they are gathered (peft's target_parameters, batched_mm)."""
    return gathered(x, ids, w, torch.baddbmm(up, *pairs(), alpha=2.0), down)


def adapted_by_another(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Left: the pair of another expert."""
    b, a = pairs()
    both = torch.baddbmm(up, b, a, alpha=2.0)[ids] + (b @ a)[ids.flip(-1)]
    return torch.einsum("tki,tkhi,tk->th", act(torch.einsum("th,tkih->tki", x, both)), down[ids], w)


def compiled(f: Fn, *args: Any) -> tuple[Tensor, Report]:
    out = torch.compile(f, backend="moe_fused", options={"inner": "eager"})(*args)
    return out, moe_compile.last_report()


@pytest.mark.parametrize(("f", "first", "fused"), [
    (gathered, 0, True), (loop_from_a_number_on, 4, True), (masked_gather, 0, True), (crossed, 0, False), (of_other_rows, 0, False),
    (adapted, 0, True), (adapted_by_another, 0, False),
])  # fmt: skip
def test_given_ids(f: Fn, first: int, fused: bool) -> None:
    """The verdict, and eager's result and gradients."""
    up, down = weights()
    ids, w = routed(2 * E if f in (loop_from_a_number_on, masked_gather) else E)
    x = torch.randn(T, H, requires_grad=True)
    leaves = [x, up, down, w.requires_grad_()]
    out, report = compiled(f, x, ids, w, up, down)
    assert len(report.blocks) == fused and (not fused or ("ids − 4" in report.blocks[0].experts) == (first == 4))
    want = f(x, ids, w, up, down)
    grads = [torch.autograd.grad((y * torch.arange(H)).sum(), leaves) for y in (out, want)]
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def products(x: Tensor, ends: Tensor, again: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """torchtitan's GroupedExperts: rows in the order of the experts, products in bf16, casts made anew for each."""
    g = F.grouped_mm(x.bfloat16(), up[:, :I].bfloat16().mT, offs=ends)
    u = F.grouped_mm(x.bfloat16(), up[:, I:].bfloat16().mT, offs=ends)
    return F.grouped_mm(F.silu(g) * u, down.bfloat16().mT, offs=again).type_as(x)


def by_counts(x: Tensor, counts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Fused: group sizes are an input."""
    ends = counts.cumsum(0, dtype=torch.int32)
    return products(x, ends, ends, up, down)


def by_other_counts(x: Tensor, counts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Left: the rows of the second product are grouped otherwise."""
    return products(x, counts.cumsum(0, dtype=torch.int32), counts.flip(0).cumsum(0, dtype=torch.int32), up, down)


@pytest.mark.parametrize(("f", "fused"), [(by_counts, True), (by_other_counts, False)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_in_order(f: Fn, fused: bool, dynamic: bool) -> None:
    """With an expert without rows and rows of nobody behind the last one."""
    up, down = weights()
    counts, x = torch.tensor([3, 0, 5, 2]), torch.randn(12, H, requires_grad=True)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    run = torch.compile(f, backend="moe_fused", options={"inner": "aot_eager"})
    out, want = run(x, counts, up, down)[:10], f(x, counts, up, down)[:10]
    assert len(moe_compile.last_report().blocks) == fused
    weigh = torch.randn(10, H)
    grads = [torch.autograd.grad((y * weigh).sum(), (x, up, down)) for y in (out, want)]
    for a, b in zip((out, *grads[0]), (want, *grads[1]), strict=True):
        a, b = (a[:10], b[:10]) if a.shape == x.shape else (a, b)
        assert float((a - b).detach().norm() / b.detach().norm()) < 0.02  # both in bf16


def of_every_rank(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor, counted: bool = True) -> Tensor:
    """Fused: what `integrations.torchtitan` does with gathered rows: choices of other ranks' experts behind the last group, and zeros."""
    ids, w = exchange.among_own(ids, w, 0, E)
    choices = ids.view(-1)
    order = choices.argsort(stable=True)
    token, own = order // K, (choices[order] < E).unsqueeze(-1)
    if counted:
        counts = choices.new_zeros(E + 1).scatter_add(0, choices, torch.ones_like(choices))[:E]
    else:
        counts = torch.zeros(len(x), E + 1, dtype=torch.bool).scatter(-1, ids, True).sum(0)[:E]
    ends = counts.cumsum(0, dtype=torch.int32)
    y = products(torch.where(own, x[token], 0), ends, ends, up, down)
    weighed = torch.where(own, y.float() * w.view(-1)[order].unsqueeze(-1), 0)
    return torch.zeros_like(x).index_add(0, token, weighed)


def of_tokens_that_are_counted_once(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Left: a token that chose an expert twice is counted once and has two rows; nobody knows that no token of another rank did."""
    return of_every_rank(x, ids, w, up, down, counted=False)


@pytest.mark.parametrize(("f", "fused"), [(of_every_rank, True), (of_tokens_that_are_counted_once, False)])
def test_rows_of_every_rank(f: Fn, fused: bool) -> None:
    ids, w = routed(2 * E)
    x = torch.randn(T, H)
    with torch.no_grad():
        out, report = compiled(f, x, ids, w, *weights())
        want = f(x, ids, w, *weights())
    assert len(report.blocks) == fused and [r.code for r in report.rejected] == ["differs"] * (not fused), str(report)
    assert float((out - want).norm() / want.norm()) < 0.02


def exchanged(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, again: int = 0) -> Tensor:
    """Fused behind the exchange: torchtitan's all-to-all, counts first; rows arrive rank by rank and are sorted by expert."""
    group, own = dist.group.WORLD, torch.ops._c10d_functional
    w, ids = (x @ gate.mT).sigmoid().topk(K)
    order = ids.view(-1).argsort(stable=True)
    counts = torch.zeros(len(x), E, dtype=torch.bool).scatter_(-1, ids, True).sum(0)
    came = own.wait_tensor(all_to_all_single(counts.view(1, -1), None, None, group=group)).reshape(-1)
    there, here = counts.view(1, -1).sum(1).tolist(), came.view(1, -1).sum(1).tolist()
    rows = all_to_all_single(x[order // K], here, there, group)
    part = torch.arange(E).repeat_interleave(came, output_size=rows.shape[0])
    starts = came.cumsum(0) - came
    place = starts[part] + torch.arange(part.shape[0]) - starts[part]
    ends = came.view(1, -1).sum(0).cumsum(0, dtype=torch.int32)
    y = products(rows[place, :], ends, came.flip(0).cumsum(0, dtype=torch.int32) if again else ends, up, down)
    back = y.new_empty(rows.shape)
    back[place, :] = y
    back = all_to_all_single(back, there, here, group) * w.view(-1)[order][:, None]
    return torch.zeros_like(x).index_add(0, order // K, back)


def exchanged_by_other_counts(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Left: the rows of the second product are grouped otherwise."""
    return exchanged(x, gate, up, down, again=1)


@pytest.mark.parametrize(("f", "fused"), [(exchanged, True), (exchanged_by_other_counts, False)])
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_rows_that_came_from_other_devices(f: Fn, fused: bool) -> None:
    """In a world of one; what is said of the selection is that its rows go elsewhere."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        up, down = weights()
        x, gate = torch.randn(T, H), torch.randn(E, H)
        with torch.no_grad():
            out, report = compiled(f, x, gate, up, down)
            want = f(x, gate, up, down)
    finally:
        dist.destroy_process_group()
    assert len(report.blocks) == fused and any("the selected rows go to other devices" in r.reason for r in report.rejected)
    assert float((out - want).norm() / want.norm()) < 0.02


def by_rows(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor, more: bool = False) -> Tensor:
    """Fused: what `exchange.by_rows` does, its number of rows read by the host and handed to a view."""

    def local(rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        n = rows.shape[0]
        e, order = chosen.reshape(-1).sort()
        ends = torch.histc(e.float(), bins=E, min=0, max=E - 1).cumsum(0).int()
        g, u = F.grouped_mm(rows[order // K].bfloat16(), up.bfloat16().mT, offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(g) * u, down.bfloat16().mT, offs=ends).float() * weights.reshape(-1)[order, None]
        return (y[order.argsort()].view(n, K, -1) * (n if more else 1)).sum(1)

    return exchange.by_rows(x, ids, w, local, E, dist.group.WORLD)


def by_rows_times_their_number(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Left: the number of rows is a factor too."""
    return by_rows(x, ids, w, up, down, more=True)


@pytest.mark.parametrize(("f", "fused"), [(by_rows, True), (by_rows_times_their_number, False)])
@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
def test_rows_by_all_to_all(f: Fn, fused: bool) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x, w, ids = torch.randn(T, H), torch.rand(T, K), torch.randn(T, E).topk(K).indices
        with torch.no_grad():
            out, report = compiled(f, x, ids, w, *weights())
            want = f(x, ids, w, *weights())
    finally:
        dist.destroy_process_group()
    assert [b.exchange for b in report.blocks] == ["rank 0 of 1: rows by all-to-all"] * fused, str(report)
    assert float((out - want).norm() / want.norm()) < 0.02


def test_op_of_rows_in_order_is_experts_in_float64() -> None:
    """experts_sorted(x, ends) = down_e act(up_e x[r]) with e the expert of row r, 0 behind the last end; gradients of x and all weights."""
    from moe_compile.ir import Experts, Form
    from moe_compile.ir import scalar as act_of
    from moe_compile.ops import experts_args

    e = Experts(E, H, I, H, Form.CONCAT, act_of.SWIGLU)
    up, down = (t.double().detach().requires_grad_() for t in weights())
    x, ends = torch.randn(12, H, dtype=torch.float64, requires_grad=True), torch.tensor([3, 3, 8, 10])
    out = torch.ops.moe_compile.experts_sorted(x, ends, [up], [down], [], [], None, *experts_args(e))
    ids = torch.tensor([0] * 3 + [2] * 5 + [3] * 2 + [E] * 2)[:, None]
    want = e.evaluate(x, ids, torch.ones(12, 1), [up], [down])
    torch.testing.assert_close(out, want)
    grads = [torch.autograd.grad(y.sin().sum(), (x, up, down)) for y in (out, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_input_ids_of_a_model_are_no_experts() -> None:
    """Nothing is said of token ids: an embedding, a rotary table, a padding mask compared with two numbers."""

    def f(tokens: Tensor, table: Tensor, cache: Tensor) -> Tensor:
        x = F.embedding(tokens, table) * ((tokens == 0) | (tokens == 1)).unsqueeze(-1)
        return x @ cache[0].mT

    _, report = compiled(f, torch.randint(0, 8, (2, 5)), torch.randn(8, H), torch.randn(3, 5, H))
    assert not report.blocks and not report.rejected


def test_what_rows_are_looked_up_in_is_walked_once() -> None:
    """y = y * y, sixty times, has 2^60 ways down to the input: weights and their masks are found on none of them, or on the first."""
    v = torch.empty(E, I, H, device="meta")
    for weights_below in (False, True):
        g = fx.Graph()
        y = g.placeholder("y")
        y = y if weights_below else g.call_function(torch.sin, (y,))
        ids = g.placeholder("ids")
        for _ in range(60):
            y.meta["val"] = v
            y = g.call_function(torch.ops.aten.mul.Tensor, (y, y))
        y.meta["val"], ids.meta["val"] = v, torch.zeros(T, dtype=torch.int64)
        g.output(g.call_function(torch.ops.aten.index.Tensor, (y, [ids])))
        assert list(choosers(g)) == ([ids] if weights_below else [])


def test_evaluate_world_is_the_undivided_experts() -> None:
    """Σ_s over ranks of the experts they hold = all experts; the same expert on two ranks is refused."""
    from moe_compile.ir import Experts, Form, evaluate_world
    from moe_compile.ir import scalar as act_of
    from moe_compile.ir.operands import Operands

    up, down = (t.detach() for t in weights(2 * E))
    kinds = [Experts(E, H, I, H, Form.CONCAT, act_of.SWIGLU, first=first) for first in (0, E)]
    params = [Operands.named(up=[up[e.first :][:E]], down=[down[e.first :][:E]]) for e in kinds]
    (ids, w), x = routed(2 * E), torch.randn(T, H)
    rows = [slice(0, 4), slice(4, T)]
    out = evaluate_world(kinds, params, [x[r] for r in rows], [ids[r] for r in rows], [w[r] for r in rows])
    whole = Experts(2 * E, H, I, H, Form.CONCAT, act_of.SWIGLU).evaluate(x, ids, w, [up], [down])
    torch.testing.assert_close(torch.cat(out), whole)
    with pytest.raises(ValueError, match="two ranks hold the same expert"):
        evaluate_world([kinds[0]] * 2, params, [x, x], [ids, ids], [w, w])
    with pytest.raises(ValueError, match="one entry a rank"):
        evaluate_world(kinds, params, [x], [ids], [w])
