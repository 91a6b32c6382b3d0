"""Blocks at the edges of sizes and storage: no token, one choice a token that always weighs 1, what is read of them then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.packed import Int4FloatZero, Int8InWords
from catalogue.stored import BlocksHitExperts
from small import Block, E, H, both
from torch import Tensor, nn


class GroupedOfOne(Block):
    """One choice, normalised: each weight is 1, in the tokens' order and in the order of rows sorted by expert alike."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(1)
        w = w / w.sum(-1, keepdim=True)
        flat, order = torch.sort(ids.reshape(-1))
        ends = torch.cumsum(torch.histc(flat.float(), E, 0, E - 1), 0, dtype=torch.int32)
        up, down = (p.bfloat16().transpose(-2, -1) for p in (self.up, self.down))
        h = F.silu(F.grouped_mm(x[order].bfloat16(), up, offs=ends))
        y = F.grouped_mm(h, down, offs=ends).to(x.dtype) * w.reshape(-1)[order, None]
        return y[order.argsort()].view(-1, 1, H).sum(1)


class Left(Block):
    """Each expert's result once more through a function that no experts have: left as written."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return super().expert(x, e).cumsum(-1)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.loop(x, ids, w)


@pytest.mark.parametrize(("module", "tokens", "fused"), [(GroupedOfOne(), 9, 1), (Left(), 0, 0)])
def test_edges(module: nn.Module, tokens: int, fused: int) -> None:
    """Weights of 1 in another order were taken for the tokens'; of no token a count of elements was 0 / 0, an internal error."""
    report, ours, theirs = both(module, torch.randn(tokens, H))
    assert len(report.blocks) == fused and not any(r.code in ("internal", "differs") for r in report.rejected)
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=2e-2)


class Int8InWordsHit(Int8InWords):
    """As Int8InWords, in a loop over the experts that were hit. 128 is taken off codes, whatever else has that size."""

    run_experts = BlocksHitExperts.run_experts


def test_numbers_that_meet_codes_are_no_sizes() -> None:
    """Found by example, the formula was refuted by probes on which another number was taken off."""
    module = Int8InWordsHit()
    report, (ours,), (theirs,) = both(module, *module.example_inputs())
    assert [b.ir.experts.up_stored for b in report.blocks] == [Int8InWords.how] and not report.rejected
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


class ZeroBehindTheScale(Int4FloatZero):
    """q * s - z * s: a zero point that is taken off behind the scale, as no storage has it. In a loop over the experts that were hit."""

    run_experts = BlocksHitExperts.run_experts

    def matrix(self, name: str, e: Any) -> Tensor:
        b = getattr(self, name)[e].int()
        q = torch.stack([b & 15, b >> 4], -1).flatten(-2).float().unflatten(-1, (-1, 4))
        s, z = (getattr(self, f"{name}_{of}")[e][..., None] for of in ("scale_inv", "zero"))
        return (q * s - z * s).flatten(-2)


def test_what_is_said_of_a_zero_point() -> None:
    module, why = ZeroBehindTheScale(), "a zero point of packed codes is neither"
    report, (ours,), (theirs,) = both(module, *module.example_inputs())
    assert [why in r.reason for r in report.rejected] == [True], report
    torch.testing.assert_close(ours, theirs)


class RowsInFloat8(Block):
    """Codes and rows in float8, a number for each matrix and each row; products in `dtype`, results in the tokens' type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("codes_up", self.up.detach().to(torch.float8_e4m3fn))
        self.register_buffer("codes_down", self.down.detach().to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.rand(E) + 0.5)

    def product(self, x: Tensor, codes: Tensor, e: int) -> Tensor:
        s = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
        rows = (x.float() / s).to(torch.float8_e4m3fn).float() * s
        return F.linear(rows.to(self.dtype), (codes[e].float() * self.scale[e]).to(self.dtype))

    def expert(self, x: Tensor, e: int) -> Tensor:
        return self.product(F.silu(self.product(x, self.codes_up, e)), self.codes_down, e).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.loop(x, ids, w.to(x.dtype))


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, 1), (torch.bfloat16, 0)])
def test_rows_that_are_rounded_from_a_wider_type(dtype: torch.dtype, fused: int) -> None:
    """float32 tokens are rounded to float8 as they are, and not to bfloat16 first: their codes would be others."""
    report, (ours,), (theirs,) = both(RowsInFloat8(dtype), torch.randn(9, H))
    assert len(report.blocks) == fused and any("and multiplied in" in r.reason for r in report.rejected) != fused
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
