"""Blocks that stop gradients on the way: what is fused has eager's gradients, and what has none runs as written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.base import Case, E, H, K, mlp
from catalogue.check import BARE, OPTIONS, Host, difference_problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_compile.report import Report, collecting


class Plain(Case):
    """Nothing is stopped."""


class DetachedMaximum(Case):
    """A stop without effect: the maximum cancels in softmax."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        raised = (logits - logits.amax(-1, keepdim=True).detach()).exp()
        w, ids = torch.topk(raised / raised.sum(-1, keepdim=True), K)
        return w / w.sum(-1, keepdim=True), ids


class ChoiceWithoutGradient(Case):
    """A stop without effect: only the choice is made under no_grad."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        with torch.no_grad():
            ids = torch.topk(scores + self.bias, K).indices
        return scores.gather(-1, ids), ids


class WholeRouterWithoutGradient(Case):
    """The op stands under no_grad too."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            w, ids = self.route(self.logits(x))
        return self.run_experts(x, ids, w)


class DetachedWeights(Case):
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(logits)
        return w.detach(), ids


class DetachedDivisor(Case):
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = torch.topk(logits.softmax(-1), K)
        return w / w.sum(-1, keepdim=True).detach(), ids


class OneOfOne(Case):
    """w / Σw of one expert is 1: a router that learns nothing has a gradient all the same, all zeros."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = torch.topk(logits.softmax(-1), 1)
        return w / w.sum(-1, keepdim=True), ids

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None])
        return out


class One(OneOfOne):
    """The same weights, and no gradient."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = torch.topk(logits.softmax(-1), 1)
        return torch.ones_like(w), ids


class StraightThrough(Case):
    """One forward, the weight's gradient backward."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(logits)
        return w + (1 - w).detach(), ids


class ScoresWithoutGradient(Case):
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return super().route(logits)


class HookOnScores(Case):
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.softmax(-1)
        if scores.requires_grad:
            scores.register_hook(lambda g: g * 0.5)
        w, ids = torch.topk(scores, K)
        return w, ids


class DetachedTokens(Case):
    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(x.detach(), ids, w)


class RowsWithoutGradient(Case):
    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).chunk(2, dim=-1)
            y = torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids])
        return (y * w.unsqueeze(-1)).sum(dim=1)


class FrozenExpert(Case):
    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            up = self.up[e].detach() if e == 3 else self.up[e]
            out.index_add_(0, token, mlp(x[token], up, self.down[e]) * w[token, slot, None])
        return out


class HookOnRows(Case):
    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).chunk(2, dim=-1)
        y = F.silu(g) * u
        if y.requires_grad:
            y.register_hook(lambda g: g * 0.5)
        return (torch.einsum("tki,tkhi->tkh", y, self.down[ids]) * w.unsqueeze(-1)).sum(dim=1)


class ExpertsInCheckpoint(Case):
    """The routing outside, the experts inside a checkpoint."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().run_experts, x, ids, w, use_reentrant=False)  # type: ignore[assignment]
        return out


class OneOfTwoInCheckpoint(Case):
    def forward(self, x: Tensor) -> Tensor:
        x = x + super().forward(x)
        out: Tensor = checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[assignment]
        return x + out


def trained(cls: Callable[[], Case], **options: Any) -> tuple[Report, list[dict[str, Tensor]]]:
    """The report, and the result with all gradients of the compiled module and of eager's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, x = cls(), torch.randn(9, H)
    twin = copy.deepcopy(module)
    fused = torch.compile(Host(module), backend="moe_fused", options=BARE | options)
    found = []
    with collecting() as report:
        for run, owner in ((fused, module), (twin, twin)):
            tokens = x.clone().requires_grad_()
            out: Any = run(tokens)
            (out * torch.linspace(-1, 1, H)).sum().backward()
            grads = {n: p.grad for n, p in owner.named_parameters()} | {"tokens": tokens.grad}
            found.append({"result": out.detach()} | {n: g for n, g in grads.items() if g is not None and g.abs().max() > 0})
    return report, found


def assert_eagers(found: list[dict[str, Tensor]]) -> None:
    mine, theirs = found
    assert mine.keys() == theirs.keys()
    for name, want in theirs.items():
        assert not difference_problem(mine[name], want, 2e-5), name


@pytest.mark.parametrize("cls", [Plain, DetachedMaximum, ChoiceWithoutGradient, WholeRouterWithoutGradient])
def test_stops_without_effect_are_fused(cls: Callable[[], Case]) -> None:
    report, found = trained(cls)
    assert_eagers(found)
    assert [b.ir.gating is not None for b in report.blocks] == [True], str(report)


@pytest.mark.parametrize("cls", [DetachedWeights, DetachedDivisor, StraightThrough, ScoresWithoutGradient])
def test_a_stop_in_the_routing_leaves_that_as_written(cls: Callable[[], Case]) -> None:
    report, found = trained(cls)
    assert_eagers(found)
    assert ["gradients" in b.ir.routing_note for b in report.blocks] == [True], str(report)


@pytest.mark.parametrize(
    ("cls", "told"), [(DetachedTokens, "`x.detach(), ids, w` at"), (RowsWithoutGradient, "no_grad"), (FrozenExpert, "detach")]
)
def test_a_stop_in_the_experts_leaves_the_block_as_written(cls: Callable[[], Case], told: str) -> None:
    report, found = trained(cls)
    assert_eagers(found)
    assert not report.blocks
    assert [r.code for r in report.rejected] == ["gradients"] and told in report.rejected[0].reason, str(report)


@pytest.mark.parametrize("cls", [DetachedWeights, DetachedTokens])
def test_stops_are_told_without_validation_too(cls: Callable[[], Case]) -> None:
    assert_eagers(trained(cls, validate=False)[1])


@pytest.mark.parametrize(("cls", "routed"), [(OneOfOne, False), (One, True)])
def test_gradients_of_constant_weights(cls: Callable[[], Case], routed: bool) -> None:
    """An optimizer decays a weight whose gradient is zero, and passes by one that has none."""
    module, x = cls(), torch.randn(9, H)
    twin = copy.deepcopy(module)
    with collecting() as report:
        torch.compile(Host(module), backend="moe_fused", options=OPTIONS)(x).sum().backward()
    twin(x).sum().backward()
    assert (module.gate.grad is None) == (twin.gate.grad is None) == routed
    assert [b.ir.gating is not None for b in report.blocks] == [routed], str(report)


@pytest.mark.parametrize("cls", [HookOnScores, HookOnRows])
def test_hooks_on_tensors_still_run(cls: Callable[[], Case]) -> None:
    assert_eagers(trained(cls)[1])


@pytest.mark.parametrize("cls", [DetachedWeights, DetachedTokens])
def test_a_stop_means_nothing_in_inference(cls: Callable[[], Case]) -> None:
    torch._dynamo.reset()
    module, x = cls(), torch.randn(9, H)
    with torch.no_grad(), collecting() as report:
        assert not difference_problem(torch.compile(Host(module), backend="moe_fused", options=OPTIONS)(x), module(x))
    assert [b.ir.gating is not None for b in report.blocks] == [True], str(report)


@pytest.mark.parametrize(("cls", "blocks"), [(ExpertsInCheckpoint, 1), (OneOfTwoInCheckpoint, 2)])
def test_checkpoints_beside_a_router(cls: Callable[[], Case], blocks: int) -> None:
    report, found = trained(cls, **OPTIONS)
    assert_eagers(found)
    assert len(report.blocks) == blocks, str(report)
    assert not report.rejected, str(report)
