"""What the rewrite emits is held against the user's own operations, and numbers that Dynamo keeps variable are guarded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import catalogue
import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from catalogue import check
from torch import Tensor, nn

from moe_compile.passes.rewrite import planner as rewrite
from moe_compile.report import collecting

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_kept_plans() -> Iterator[None]:
    """A plan that is kept on disk has been checked when it was made."""
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def compiled(model: nn.Module, x: Tensor, **kw: Any) -> tuple[Any, Tensor, Any]:
    """(the compiled model, its first output, the report)."""
    fused = torch.compile(model, backend="moe_fused", options=check.OPTIONS, **kw)
    with torch.no_grad(), collecting() as report:
        out = fused(x)
    return fused, out, report


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, 1), (8, 1.0), (13, 1.5), (1, 3)],
    ids=["k", "group fill", "scale", "score"],
)
def test_a_wrong_number_in_the_emitted_op_is_found(monkeypatch: pytest.MonkeyPatch, place: int, value: Any) -> None:
    """The IR is right, the arguments written into the graph are not: the block stays as written."""
    right = rewrite.route_args

    def wrong(gating: Any) -> Any:
        args = list(right(gating))
        assert args[place] != value
        args[place] = value
        return args

    monkeypatch.setattr(rewrite, "route_args", wrong)
    model = catalogue.build(catalogue.entries()["GroupScatterMaskedFill" if place == 8 else "ScaleAfter"]).eval()
    x = model.example_inputs(9)[0]
    _, out, report = compiled(model, x)
    assert not report.blocks
    assert any("the emitted operations" in r.reason for r in report.rejected), [r.reason for r in report.rejected]
    with torch.no_grad():
        assert not check.difference_problem(out, model(x))


def test_a_wrong_layout_in_the_emitted_op_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape fits, the weights multiply another thing."""
    right = rewrite.Planner._experts

    def wrong(self: Any, b: Any) -> Any:
        plan = right(self, b)
        return replace(plan, experts=replace(plan.experts, weight_on_input=True))

    monkeypatch.setattr(rewrite.Planner, "_experts", wrong)
    model = Scaled(at_output=False).eval()
    _, _, report = compiled(model, torch.randn(5, 8))
    assert not report.blocks and any("the emitted operations" in r.reason for r in report.rejected)


class Scaled(nn.Module):
    """Sigmoid routing whose scale is a plain float attribute, on the weights or behind a view of the result; gathered experts."""

    def __init__(self, at_output: bool) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 8))
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 8) * 0.3), nn.Parameter(torch.randn(4, 8, 8) * 0.3)
        self.scale, self.at_output = 2.5, at_output

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.gate).sigmoid().topk(2)
        w = w / w.sum(-1, keepdim=True)
        w = w if self.at_output else w * self.scale
        g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).chunk(2, dim=-1)
        y = torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids])
        out = (y * w[..., None]).sum(1)
        return out.view(1, *out.shape) * self.scale if self.at_output else out


@pytest.mark.parametrize("at_output", [False, True])
def test_a_variable_float_is_read_and_guarded(at_output: bool) -> None:
    """dynamic=True makes an input of the float: it is in the gating, and another value is another graph."""
    model = Scaled(at_output).eval()
    x = torch.randn(5, 8)
    fused, out, report = compiled(model, x, dynamic=True)
    (block,) = report.blocks
    assert block.ir.gating is not None and block.ir.gating.scale == 2.5
    with torch.no_grad():
        assert not check.difference_problem(out, model(x))
        for scale in (1.25, 2.5, 3.0):
            model.scale = scale
            assert not check.difference_problem(fused(x), model(x))


class Loop(nn.Module):
    """A data-dependent loop, scaled behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 8) * 0.3), nn.Parameter(torch.randn(4, 8, 8) * 0.3)

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        hit = F.one_hot(ids, 4).permute(2, 1, 0).sum((1, 2)).nonzero()
        for e in hit:
            e = int(e)
            slot, token = torch.where((ids == e).T)
            g, u = F.linear(x[token], self.up[e]).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.silu(g) * u, self.down[e]) * w[token, slot, None])
        return out


class LoopBlock(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.gate, self.experts, self.in_place = nn.Parameter(torch.randn(4, 8)), Loop(), in_place

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = F.linear(x, self.gate).softmax(-1).topk(2)
        out = self.experts(x, ids, w)
        out = out.mul_(3) if self.in_place else out * 3
        return out, w


@pytest.mark.parametrize("in_place", [False, True])
def test_the_scale_behind_a_captured_loop_is_in_the_gating(in_place: bool) -> None:
    """The weights that somebody else reads keep their own value."""
    model = LoopBlock(in_place).eval()
    x = torch.randn(7, 8)
    _, (out, w), report = compiled(model, x)
    (block,) = report.blocks
    assert block.ir.gating is not None and block.ir.gating.scale == 3.0
    with torch.no_grad():
        want, want_w = model(x)
    assert not check.difference_problem(out, want) and torch.equal(w, want_w)
