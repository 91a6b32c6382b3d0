"""A shared expert of floats beside experts in few bits: in the same two kernels, beside them, in plain torch; against float64 oracles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("triton")

from calls import DEVICE, ON_GPU
from interpreted import interpreted
from test_few_bits import F8, SCHEMES, WIDE, on_device

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import CODED
from moe_compile.ir.stored import Scale
from moe_compile.lowering.triton import calls as kernels
from moe_compile.lowering.triton import coded, coded_shared, codes, shared, short
from moe_compile.lowering.triton.launch import plans

EXTRA: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"gated": True},
    "added, a bias": {"add": True, "down_bias": True},
    "another width, one matrix": {"width": 24, "form": ir.Form.CONCAT},
}


def arguments(
    how: ir.Stored,
    tokens: int,
    gated: bool = False,
    add: bool = False,
    width: int = 16,
    form: ir.Form = ir.Form.SEPARATE,
    experts: ir.Experts = WIDE,
    **layout: bool,
) -> tuple[list[Any], Tensor]:
    """(the op's arguments, the result in float64). Ids of no expert among them."""
    e = replace(experts, up_stored=how, down_stored=how)
    t, gen = on_device(e), torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=gen) * shape[-1] ** -0.5).to(DEVICE, e.dtype)

    t["x"] = normal(tokens, e.hidden) * e.hidden**0.5
    t["ids"] = torch.randint(-1, e.num_experts, (tokens, 2), generator=gen).to(DEVICE)
    t["weights"] = torch.rand(tokens, 2, generator=gen).to(DEVICE)
    t["add"] = normal(tokens, e.out_features) if add else None
    one = ir.Experts(1, e.hidden, width, e.out_features, form, act.SWIGLU, stacked=False, dtype=e.dtype, **layout)
    up = [normal(width, e.hidden) for _ in range(2)] if form is ir.Form.SEPARATE else [normal(2 * width, e.hidden)]
    mlp = [up, [normal(e.out_features, width)], [], [normal(e.out_features)] if one.down_bias else []]
    gate = torch.rand(tokens, 1, generator=gen).to(DEVICE, e.dtype) if gated else None
    args = [*t.values(), *ops.experts_args(e), *mlp, gate, *ops.shared_args(one, ir.Overlap.SIDE)]
    weights = torch.ones(tokens, 1, device=DEVICE) if gate is None else gate
    every = torch.zeros(tokens, 1, dtype=torch.int64, device=DEVICE)
    return args, e.evaluate(**t) + one.evaluate(t["x"], every, weights, *mlp)


def close(got: Tensor | None, want: Tensor, within: float = 1e-5) -> None:
    assert got is not None and float((got.double() - want).abs().max()) <= within * float(want.abs().max())


def by_kernels(args: list[Any]) -> Tensor | None:
    out: Tensor | None = kernels.experts_stored_shared(*short.shorten("experts_stored_shared", args))
    return out


@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
@pytest.mark.parametrize("name", ["blocks", "channels", "mxfp4", "int4, zero points"])
def test_one_pair_of_kernels(name: str, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens: no launch more than without a shared expert."""
    seen: list[int] = []
    few = coded_shared.few_together
    monkeypatch.setattr(coded_shared, "few_together", lambda c, *rest: (seen.append(c.ids.numel()), few(c, *rest))[1])
    args, want = arguments(SCHEMES[name], 2, **extra)
    close(by_kernels(args), want)
    assert seen == [4]


ROUNDED = replace(WIDE, up_rows=ir.Rows(8, F8[0], 16), down_rows=ir.Rows(8, F8[0], 16))


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("experts", [WIDE, replace(WIDE, up_bias=True, down_bias=True), ROUNDED], ids=["plain", "biases", "rounded rows"])
def test_beside_them(experts: ir.Experts, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens, or what the pair of kernels does not take: the shared expert on its own, what it gives is added."""
    monkeypatch.setattr(coded_shared, "fits", lambda c, s: False)
    args, want = arguments(SCHEMES["blocks"], tokens, add=True, experts=experts)
    close(by_kernels(args), want, 1e-5 if experts is not ROUNDED else 2e-2)  # a row that is summed otherwise may round otherwise


def test_what_the_pair_does_not_take() -> None:
    """Biases before the activation and rounded rows are left to kernels of their own."""
    for experts in (replace(WIDE, up_bias=True, down_bias=True), ROUNDED):
        args, want = arguments(SCHEMES["blocks"], 1, experts=experts)
        close(by_kernels(args), want, 1e-5 if experts is not ROUNDED else 2e-2)


DIVIDING = replace(SCHEMES["blocks"], scaled=Scale.DIVIDES)


@pytest.mark.parametrize("tokens", [1, 40])
def test_codes_that_no_kernel_decodes(tokens: int) -> None:
    """The routed experts in a workspace, the shared one beside it: started before the turns, awaited and added behind them."""
    assert not codes.takes(DIVIDING, False)
    args, want = arguments(DIVIDING, tokens, add=True)
    close(by_kernels(args), want)
    x, ids, weights, p, _ = ops.bundled(args, CODED)
    record = ops.storage_of(ops.experts_args(replace(WIDE, up_stored=DIVIDING, down_stored=DIVIDING)))
    late = Late(torch.randn(tokens, WIDE.out_features, device=DEVICE), [])
    routed = (x, ids, weights, p, None)
    close(shared._in_workspace(routed, *record, None, late), shared._in_workspace(routed, *record, late.value, None).double())
    assert late.seen == ["issue", "join"]


@dataclass(frozen=True)
class Late:
    """A value that is there at once, and what was asked of it."""

    value: Tensor
    seen: list[str]

    def issue(self) -> None:
        self.seen.append("issue")

    def join(self) -> Tensor:
        self.seen.append("join")
        return self.value


@pytest.mark.parametrize("few", [True, False], ids=["few tokens", "grouped"])
@pytest.mark.parametrize(
    "experts", [replace(WIDE, down_bias=True), replace(WIDE, weight_on_input=True), ROUNDED], ids=["bias", "input", "rounded"]
)
def test_added_late(experts: ir.Experts, few: bool) -> None:
    """What a side stream computes is started once, awaited once, and added as it is."""

    how, more = SCHEMES["blocks"], torch.randn(2, experts.out_features, device=DEVICE)
    late = Late(more, [])
    args, _ = arguments(how, 2, experts=experts)
    x, ids, weights, p, _ = ops.bundled(args, CODED)
    record = ops.storage_of(ops.experts_args(replace(experts, up_stored=how, down_stored=how)))
    c = coded.operands(x, ids, weights, p, None, *record)
    choice = None if c is None else coded.choose(c)
    assert c is not None and choice is not None
    choice = choice if few else replace(choice, few=None)
    want = coded.run(c, choice, torch.empty_like(more)) + more
    close(coded.run(c, choice, torch.full_like(more, float("nan")), late), want.double())
    assert late.seen == ["issue", "join"]


@pytest.mark.skipif(ON_GPU, reason="the interpreter's: on a GPU every test of an op is one of its plans")
@pytest.mark.parametrize("tokens", [2, 9])
def test_prepared(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan, and the second call's values are those of the second call's operands."""
    args, want = arguments(SCHEMES["mxfp4"], tokens, gated=True, add=True)
    with interpreted(monkeypatch) as card:
        close(by_kernels(args), want)
        args[0] = args[0].flip(0).contiguous()
        with plans.step_by_step():
            other = by_kernels(args)
        assert other is not None
        close(by_kernels(args), other.double())
        assert len(plans._plans) == 1 and None not in plans._plans.values() and card.seen


def test_gradients() -> None:
    """Rows, routing weights, what is added, the gate, the shared expert and scales have one though codes have none: that of differences."""
    args, _ = arguments(SCHEMES["blocks"], 3, gated=True, add=True)
    op, floats = torch.ops.moe_compile.experts_stored_shared, [t for t in args if isinstance(t, Tensor) and t.is_floating_point()]
    lists = [a for a in args if isinstance(a, list) and a and isinstance(a[0], Tensor)]
    floats += [lists[2][0], *lists[-2], *lists[-1]]  # a scale of the routed experts; the shared one's two projections
    for t in floats:
        t.requires_grad_()
    out = op(*args)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = torch.autograd.grad(out, floats, grad)
    for t, g in zip(floats, found, strict=True):
        here, way = t.detach().clone(), g.sign() * t.detach().abs() * 1e-2
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                t.copy_(here + sign * way)
                ends.append(float((op(*args).double() * grad).sum()))
                t.copy_(here)
        want = float((g.double() * way).sum())
        assert abs((ends[0] - ends[1]) / 2 - want) <= 1e-2 * want


def test_under_autocast() -> None:
    """Rows and the shared expert's weights take its dtype; codes and scales stay."""
    args, want = arguments(SCHEMES["mxfp4"], 3, gated=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = torch.ops.moe_compile.experts_stored_shared(*args)
    assert out.dtype is torch.bfloat16
    close(out, want, 3e-2)


@pytest.mark.parametrize("tokens", [0, 3])
def test_in_plain_torch(tokens: int) -> None:
    """The op on any device, its schema and its shapes."""
    args, want = arguments(SCHEMES["channels"], tokens, gated=True)
    close(torch.ops.moe_compile.experts_stored_shared(*args), want) if tokens else None
    opcheck(torch.ops.moe_compile.experts_stored_shared.default, tuple(args))


@pytest.mark.skipif(not ON_GPU, reason="bf16 at widths of a model")
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_at_widths_of_a_model(name: str, tokens: int) -> None:
    how = ir.Stored(8, F8[0], rows=128, columns=128) if name == "fp8" else replace(SCHEMES["mxfp4"], columns=32)
    e = replace(WIDE, hidden=1024, intermediate=512, out_features=1024, dtype=torch.bfloat16)
    args, want = arguments(how, tokens, width=512, experts=e, gated=True)
    close(torch.ops.moe_compile.experts_stored_shared(*args), want, 1.5e-2)
