"""Loops over wide experts are recorded with narrow matrices: what is read holds at the real widths, or is read there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile.loops import capture
from moe_compile.loops.fewer import Fewer
from moe_compile.loops.narrow import narrow

E, K, H, I, T = 6, 2, 512, 1024, 7


def test_one_number_divides_widths_and_groups() -> None:
    """Dims of stacks behind the first, groups that share a scale and packed words; experts, tables and ranks stay."""
    pairs = narrow([(64, 4096, 2048), (64, 32, 16), (64, 2048, 1024), (16,)], rows=[2048], fixed=[])
    assert pairs == ((16, 2), (32, 4), (1024, 128), (2048, 256), (4096, 512))
    assert narrow([(8, 14336, 4096)], rows=[4096], fixed=[]) == ((4096, 64), (14336, 224))
    assert narrow([(8, 96, 64)], rows=[64], fixed=[]) == narrow([(8, 1021, 2048)], rows=[2048], fixed=[]) == ()


@pytest.mark.parametrize(("fixed", "narrowed"), [([], 64), ([64], 128)])
def test_no_width_becomes_what_another_number_is(fixed: list[int], narrowed: int) -> None:
    assert dict(narrow([(3, 1024, 2048)], rows=[2048], fixed=fixed))[1024] == narrowed


def test_shapes_and_numbers_go_there_and_back() -> None:
    fewer = Fewer(17, 128, ((16, 2), (1024, 128), (2048, 256)))
    assert fewer.shape((128, 2048, 1024)) == (17, 256, 128) and fewer.shape((128, 16, 16)) == (17, 2, 2)
    assert fewer.shape((128, 2048)) == (17, 256) and fewer.shape((16,)) == (16,) and fewer.shape((2048,)) == (256,)
    assert fewer.shape((128, 1024), single=True) == (128, 128)
    assert [fewer.number(v) for v in (128, 2048, 16, 7)] == [17, 256, 16, 7]
    assert [fewer.size(v) for v in (17, 256, 17 * 256, 2, 7)] == [128, 2048, 128 * 2048, 2, 7]


class Wide(nn.Module):
    """Verdict: fused. A hit loop over experts of H -> I -> H."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.hidden = H
        self.gate = nn.Parameter(torch.randn(E, H, generator=g) * 0.1)
        self.up = nn.Parameter(torch.randn(E, I, H, generator=g) * 0.05)
        self.down = nn.Parameter(torch.randn(E, H, I, generator=g) * 0.05)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.gate).softmax(-1).topk(K)
        return self.dispatch(x, ids, w)

    def one(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.up[e])), self.down[e])

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], self.hidden, dtype=x.dtype, device=x.device)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.one(e, x[t]) * w[t, j, None])
        return out


class NamesItsWidth(Wide):
    """Verdict: fused. The code holds the width as a literal: it does not run on narrow matrices."""

    def one(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x.view(-1, 512), self.up[e])), self.down[e]).view(-1, 512)


class DividesByItsWidth(Wide):
    """Verdict: fused, with the factor of the real width: narrow matrices have another."""

    def one(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.up[e]) * (16 / x.shape[-1] ** 0.5)), self.down[e])


class OtherWhenWide(Wide):
    """Verdict: fused, with the activation of wide experts: narrow ones have another."""

    def one(self, e: int, x: Tensor) -> Tensor:
        act = F.gelu if x.shape[-1] > 200 else F.silu
        return F.linear(act(F.linear(x, self.up[e])), self.down[e])


class OneOtherWhenWide(Wide):
    """Verdict: left. One of the middle experts has another activation, and has it only as it is wide."""

    def one(self, e: int, x: Tensor) -> Tensor:
        act = F.gelu if e == 3 and x.shape[-1] > 200 else F.silu
        return F.linear(act(F.linear(x, self.up[e])), self.down[e])


class MixesRows(Wide):
    """Verdict: left. A softmax over features."""

    def one(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.up[e]).softmax(-1), self.down[e])


def compiled(cls: type[Wide]) -> tuple[moe_compile.Report, Tensor, Tensor]:
    torch._dynamo.reset()
    capture._trials.clear()
    model = cls().eval()
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
        return moe_compile.last_report(), got, model.double()(x.double())


@pytest.mark.parametrize("cls", [Wide, NamesItsWidth, DividesByItsWidth, OtherWhenWide])
def test_read_as_at_the_real_widths(cls: type[Wide]) -> None:
    report, got, want = compiled(cls)
    assert len(report.blocks) == 1, str(report)
    experts = report.blocks[0].ir.experts
    assert (experts.hidden, experts.intermediate, experts.out_features, experts.num_experts) == (H, I, H, E)
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_an_expert_that_is_another_when_wide() -> None:
    report, got, want = compiled(OneOtherWhenWide)
    assert not report.blocks, str(report)
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(("cls", "same"), [(Wide, True), (OneOtherWhenWide, False)])
def test_the_programs_of_narrow_and_wide_experts(cls: type[Wide], same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_compile.loops import readers

    real, told = readers.is_same, []
    monkeypatch.setattr(readers, "is_same", lambda *args: (told.append(real(*args)), told[-1])[1])
    compiled(cls)
    assert told == [same]


def test_what_the_maths_decline_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_compile.loops import reading

    real, widths = reading._read, []
    monkeypatch.setattr(reading, "_read", lambda call, reader, recover: (widths.append(reader.fewer), real(call, reader, recover))[1])
    report, got, want = compiled(MixesRows)
    assert "softmax over features" in str(report) and not report.blocks
    assert len(widths) == 1 and widths[0] is not None and widths[0].widths
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()
