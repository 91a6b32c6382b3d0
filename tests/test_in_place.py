"""What is written in place: gradient modes and other views of a result stay eager's; and weights that a mask makes 0 skip their rows."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from catalogue.check import difference_problem
from small import Block, H, K, T, both, compiled, tensors, told
from torch import Tensor

from moe_compile.report import Report, collecting

torch.set_num_threads(1)


class Written(Block):
    """y += the experts' rows, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = torch.nn.Linear(H, H)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.route(x)
        order = ids.flatten().argsort()
        expert, token = ids.flatten()[order], order // K
        h = torch.nn.functional.silu(torch.einsum("rh,rih->ri", x[token], self.up[expert]))
        return token, torch.einsum("ri,rhi->rh", h, self.down[expert]) * w.flatten()[order, None]

    def forward(self, x: Tensor) -> Any:
        token, rows = self.rows(x)
        y = self.shared(x)
        y.index_add_(0, token, rows)
        return y


class WithoutGradient(Written):
    def forward(self, x: Tensor) -> Any:
        token, rows = self.rows(x)
        y = self.shared(x)
        with torch.no_grad():
            y.index_add_(0, token, rows)
        return y


class ViewThenWrite(Written):
    def forward(self, x: Tensor) -> Any:
        token, rows = self.rows(x)
        y = self.shared(x)
        z = y.t()
        y.index_add_(0, token, rows)
        y.mul_(3)
        return y, z


class DetachedThenWrite(Written):
    def forward(self, x: Tensor) -> Any:
        token, rows = self.rows(x)
        y = self.shared(x)
        d = y.detach()
        y.index_add_(0, token, rows)
        y.mul_(2)
        return y.clone(), d * 2


class ZerosViewThenWrite(Written):
    def forward(self, x: Tensor) -> Any:
        token, rows = self.rows(x)
        y = torch.zeros_like(x)
        z = y.view(-1)
        y.index_add_(0, token, rows)
        y.add_(1.0)
        return z * 2


def gradients(module: torch.nn.Module, f: Any, x: Tensor) -> list[Tensor | None]:
    """Results of f, then the gradients of x and of the module's parameters (None: there is none)."""
    x = x.clone().requires_grad_()
    out = tensors(f(x))
    sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum() for y in out if y.requires_grad).backward()
    return [*(y.detach() for y in out), x.grad, *(p.grad for p in module.parameters())]


def check(module: torch.nn.Module, x: Tensor) -> Report:
    module = module.double()
    twin = copy.deepcopy(module)
    with collecting() as report:
        got = gradients(module, compiled(module, inner="aot_eager"), x.double())
    for i, (a, b) in enumerate(zip(got, gradients(twin, twin, x.double()), strict=True)):
        assert (a is None) == (b is None), i
        assert a is None or b is None or not difference_problem(a, b), i
    return report


def test_rows_added_in_place_are_fused() -> None:
    """Verdict: fused. What the others are one step beside of."""
    report = check(Written(), torch.randn(T, H))
    assert len(report.blocks) == 1, told(report)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (WithoutGradient, "gradient"),
        (ViewThenWrite, "another view"),
        (DetachedThenWrite, "another view"),
        (ZerosViewThenWrite, "another view"),
    ],
)
def test_what_else_sees_the_writes_sees_eagers(cls: type[Block], reason: str) -> None:
    """Verdict: rejected, with the reason."""
    report = check(cls(), torch.randn(T, H))
    assert not report.blocks and any(reason in t for t in told(report)), told(report)


class Padded(torch.nn.Module):
    """Rows of padding have weight 0, and the experts are asked only where the weight is not 0."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.gate, self.up, self.down = (torch.nn.Parameter(torch.randn(*s) / 4) for s in ((8, 16), (8, 24, 16), (8, 16, 12)))

    def forward(self, x: Tensor, keep: Tensor) -> Any:
        logits = torch.nn.functional.linear(x, self.gate)
        w, ids = logits.softmax(-1).topk(2)
        if self.how == "where":
            w = torch.where(keep[:, None], w, 0.0)
        elif self.how == "fill":
            w = w.masked_fill(~keep[:, None], 0.0)
        dense = torch.zeros_like(logits).scatter(1, ids, w)
        expert, token = (dense != 0).t().nonzero(as_tuple=True)
        g, u = torch.einsum("rh,rih->ri", x[token], self.up[expert]).chunk(2, -1)
        y = torch.einsum("ri,rhi->rh", torch.nn.functional.silu(g) * u, self.down[expert])
        return torch.zeros_like(x).index_add(0, token, y * dense[token, expert][:, None])


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # as beside a loop over experts
@pytest.mark.parametrize("how", ["where", "fill", "none"])
def test_rows_of_padding_are_not_computed(how: str) -> None:
    """Verdict: rejected where a mask makes weights 0, fused without one: what no expert is asked about may be no number."""
    torch.manual_seed(0)
    x, keep = torch.randn(12, 16, dtype=torch.float64), torch.arange(12) < 9
    if how != "none":
        x[9:] = torch.nan
    with torch.no_grad(), collecting() as report:
        module = Padded(how).double()
        got, want = compiled(module, inner="aot_eager")(x, keep), module(x, keep)
    assert want.isfinite().all() and got.isfinite().all() and not difference_problem(got, want)
    assert len(report.blocks) == (how == "none"), told(report)


class PaddedInPlace(Block):
    """w[token] = 0 where a number of the token says so; the number is no expert's id. A near miss adds 1 there instead."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, segment: Tensor) -> Any:
        w, ids = self.route(x)
        w = w.clone()
        w[segment == 0] = self.value
        return self.gathered(x, ids, w)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_number_of_the_token_is_no_id(value: float) -> None:
    """Verdict: fused, the weights as they were written."""
    report, got, want = both(PaddedInPlace(value), torch.randn(T, H), torch.arange(T) % 3)
    assert len(report.blocks) == 1, told(report)
    assert not difference_problem(got[0], want[0])


class FilledThroughAView(Block):
    """DeepSeek-V2: scores are filled through a view of theirs, and selected and weighed by their own name."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        lost = scores.view(len(x), 2, -1).max(-1).values.topk(1, largest=False).indices
        scores.view(len(x), 2, -1).masked_fill_(torch.arange(2).eq(lost).unsqueeze(-1), 0.0)
        w, ids = scores.topk(K)
        return w, ids


def test_the_line_that_writes_is_told() -> None:
    report, got, want = both(FilledThroughAView(), torch.randn(T, H))
    assert not difference_problem(got[0], want[0])
    lines, first = inspect.getsourcelines(FilledThroughAView)
    line = first + next(i for i, text in enumerate(lines) if "masked_fill_" in text)
    assert any("another view" in r.reason and r.source.endswith(f"test_in_place.py:{line}") for r in report.rejected), told(report)
