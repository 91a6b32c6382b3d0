"""Loops over wide experts are recorded with narrow matrices: what is read holds at the real widths, or is read there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from catalogue import build
from catalogue.spelled import Nf4Hit
from torch import Tensor, nn

import moe_compile
from moe_compile.loops import capture, probe
from moe_compile.loops.fewer import Fewer
from moe_compile.loops.narrow import narrow
from moe_compile.report import collecting

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


def test_experts_are_no_groups_though_a_width_is_a_power_of_two_of_them() -> None:
    """The rows of a router are experts; what lies inside a stack is a grid of scales, as many as it may be."""
    assert dict(narrow([(64, 2048, 2048), (64, 2048)], rows=[2048], fixed=[])) == {2048: 128}


def test_words_of_one_group_are_as_many_in_a_smaller_model() -> None:
    pairs = narrow([(8, 4096, 64, 16), (8, 4096, 64)], rows=[2048], fixed=[])
    assert pairs == ((64, 2), (2048, 64), (4096, 128))
    fewer = Fewer(8, 8, pairs)
    assert fewer.view((8, 128, 2, 16), (8, 128, 32)) == [8, 4096, 1024] and fewer.view((8, 128, 2, 16), (1024, 32)) == [8 * 4096, 1024]
    assert fewer.view((8, 128, 64), (8, 128, 64)) == [8, 4096, 2048]


def test_a_table_of_groups_names_those_that_are_left() -> None:
    fewer, groups = Fewer(8, 8, ((16, 2), (2048, 256))), torch.arange(2048) // 128
    assert fewer.table(groups.flip(0)[:256], groups).unique().tolist() == [0, 1]
    others = torch.arange(2048) % 15  # as many as no width has groups
    assert torch.equal(fewer.table(others[:256], others), others[:256])
    assert torch.equal(fewer.table(groups, groups), groups)


class Wide(nn.Module):
    """Verdict: fused. A hit loop over experts of H -> I -> H."""

    experts = E

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


class Packed(Wide):
    """Verdict: fused. Eight codes a word and a scale for 32 inputs, gate and up in one matrix: no dim is the intermediate size.
    Experts are as many as a width has groups of 64, and as a narrow one has packed words."""

    experts = 8

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.gate = nn.Parameter(torch.randn(8, H, generator=g) * 0.1)
        for name, n, k in (("up", 2 * I, H), ("down", H, I)):
            delattr(self, name)
            self.register_buffer(name, torch.randint(-(1 << 31), 1 << 31, (8, n, k // 8), generator=g).int())
            self.register_buffer(f"{name}_scale", torch.rand(8, n, k // 32, generator=g) / 64)

    def matrix(self, q: Tensor, s: Tensor) -> Tensor:
        codes = (q[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15).flatten(-2) - 8
        return (codes.to(s.dtype).unflatten(-1, (-1, 32)) * s[..., None]).flatten(-2)

    def one(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.matrix(self.up[e], self.up_scale[e])).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.matrix(self.down[e], self.down_scale[e]))


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


class RoundsSomeRows(Wide):
    """Verdict: left. Rows are rounded to eight bits before one of the up projections only."""

    def one(self, e: int, x: Tensor) -> Tensor:
        s = x.abs().amax(-1, keepdim=True) / 127
        g = F.linear((x / s).round() * s, self.up[e])
        return F.linear(F.silu(g) * F.linear(x, self.up[e]), self.down[e])


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
    assert (experts.hidden, experts.intermediate, experts.out_features, experts.num_experts) == (H, I, H, cls.experts)
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_packed_matrices_are_read_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_compile.loops import reading

    real, widths = reading._read, []
    monkeypatch.setattr(reading, "_read", lambda call, reader, recover: (widths.append(reader.fewer), real(call, reader, recover))[1])
    test_read_as_at_the_real_widths(Packed)
    assert len(widths) == 1 and widths[0] is not None and dict(widths[0].widths)[H] < H


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


@pytest.mark.parametrize(("cls", "why"), [(MixesRows, "softmax over features"), (RoundsSomeRows, "some of the up projections only")])
def test_what_the_maths_decline_is_not_read_again(cls: type[Wide], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never with the block around it, nor at its real widths where those cannot matter."""
    from moe_compile.loops import reading

    real, read = reading._read, []
    monkeypatch.setattr(
        reading, "_read", lambda c, reader, recover: (read.append((c.fn.__name__, reader.fewer)), real(c, reader, recover))[1]
    )
    report, got, want = compiled(cls)
    assert any(why in r.reason for r in report.rejected) and not report.blocks
    assert {name for name, _ in read} == {"dispatch"} and read[0][1] is not None and read[0][1].widths
    assert len(read) == 1
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(("code", "final"), [("budget", True), ("rounded in part", True), ("", False)])
def test_what_took_too_much_work_is_not_read_again(code: str, final: bool) -> None:
    """Terms are as large at any width, and larger with more experts."""
    from moe_compile.loops import reading

    refused = moe_compile.ir.Rejection("why", stage="experts", code=code)
    assert reading._for_good(refused, Fewer(11, 64, ((2048, 128),))) is final


def test_packed_matrices_too_large_for_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that lie flattened, one for each expert, are two dims of bytes as a table of groups is: codes, where they are many."""
    monkeypatch.setattr(probe, "_TABLE", 256)
    torch._dynamo.reset()
    model = build(Nf4Hit).eval()
    with torch.no_grad(), collecting() as report:
        torch.compile(model, backend="moe_fused", options={"inner": "eager"})(torch.randn(5, 16))
    assert report.graph_count == 1 and report.blocks and "4 bits" in report.blocks[0].experts, report.rejected
