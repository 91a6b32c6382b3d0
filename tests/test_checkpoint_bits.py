"""Blocks whose weights lie in few bits, as checkpoints have them: types named in casts, many groups, bytes at the ends, what is near."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue import packed
from torch import Tensor, nn
from torch._dynamo import reset

import moe_compile
from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import CODED
from moe_compile.lowering.cpu import build
from moe_compile.lowering.cpu import stored as on_cpu
from moe_compile.passes.prove.literals import Literals
from moe_compile.passes.prove.region import effort
from moe_compile.passes.prove.sizes import Script, Sizes, regroup

E, H, I, K, B = 4, 16, 8, 2, 4


class Block(nn.Module):
    """Float8 weights with float32 scales of blocks of B x B, made floats of `dtype`; experts that were hit, or all of them."""

    def __init__(self, dtype: torch.dtype = torch.float32, hit: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype, self.hit = dtype, hit
        self.gate = nn.Linear(H, E, bias=False, dtype=dtype)
        for name, shape in (("up", (2 * I, H)), ("down", (H, I))):
            self.register_buffer(name, (torch.randn(E, *shape) * 3).to(torch.float8_e4m3fn))
            self.register_buffer(f"{name}_s", torch.rand(E, shape[0] // B, shape[1] // B) * 0.1 + 0.01)

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        w = q.float() * s.repeat_interleave(B, 0).repeat_interleave(B, 1)
        return w.to(torch.bfloat16) if self.dtype is torch.bfloat16 else w

    def rows(self, x: Tensor) -> Tensor:
        return x

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = F.linear(self.rows(x), self.floats(self.up[e], self.up_s[e])).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.floats(self.down[e], self.down_s[e]))

    def forward(self, x: Tensor) -> Tensor:
        p, ids = self.gate(x).softmax(-1, dtype=torch.float32).topk(K, -1)
        p = p.to(x.dtype)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist() if self.hit else range(E):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * p[t, j, None])
        return out


class RoundedResult(Block):
    """Near: an expert's result is rounded to float8 before its routing weight."""

    def expert(self, e: Any, x: Tensor) -> Tensor:
        return super().expert(e, x).to(torch.float8_e4m3fn).float()


class RoundedGroups(Block):
    """Near: rows are rounded group by group, and a group of zeros is 0 / 0."""

    def rows(self, x: Tensor) -> Tensor:
        g = x.unflatten(-1, (-1, B))
        s = g.abs().amax(-1, keepdim=True) / 127
        return ((g / s).round() * s).flatten(-2)


class Adapted(Block):
    """A low-rank pair beside the codes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(E, 3, H) / 4), nn.Parameter(torch.randn(E, 2 * I, 3) / 4)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        h = F.linear(x, self.floats(self.up[e], self.up_s[e])) + F.linear(F.linear(x, self.a[e]), self.b[e]) * 2
        g, u = h.chunk(2, -1)
        return F.linear(F.silu(g) * u, self.floats(self.down[e], self.down_s[e]))


def compiled(m: nn.Module, x: Tensor) -> tuple[Tensor, moe_compile.Report]:
    """The result, and the report."""
    reset()
    with torch.no_grad():
        report = moe_compile.explain(m.eval(), x, options={"inner": "eager"})
        reset()
        return torch.compile(m, backend="moe_fused", options={"inner": "eager"})(x), report


def test_weights_cast_to_half_precision_by_name_in_a_loop_over_hit_experts() -> None:
    """Trials are in float32; the code says bfloat16, which its tokens are."""
    m, x = Block(torch.bfloat16, hit=True), torch.randn(9, H, dtype=torch.bfloat16)
    got, report = compiled(m, x)
    (block,) = report.blocks
    assert block.ir.experts.up_stored == ir.Stored(8, torch.float8_e4m3fn, rows=B, columns=B), report.rejected
    want = m(x).float()
    assert float((got.float() - want).abs().max()) <= 0.03 * float(want.abs().max())


@pytest.mark.parametrize(("kind", "why"), [(RoundedResult, "float8_e4m3fn"), (RoundedGroups, "")], ids=["result", "groups of zeros"])
def test_what_is_near_runs_as_written(kind: type[Block], why: str) -> None:
    x = torch.randn(9, H)
    x[2, B : 2 * B] = 0
    m = kind()
    got, report = compiled(m, x)
    assert not report.blocks and any(why in r.reason for r in report.rejected)
    assert torch.equal(got.isnan(), (want := m(x)).isnan()) and torch.allclose(got, want, equal_nan=True)


def test_a_low_rank_pair_beside_the_codes() -> None:
    m, x = Adapted(), torch.randn(9, H)
    got, report = compiled(m, x)
    (block,) = report.blocks
    assert block.ir.experts.up_pair == 2.0 and block.ir.experts.up_stored is not None
    torch.testing.assert_close(got, m(x), rtol=1e-5, atol=1e-5)


def test_groups_of_zeros_among_the_weights() -> None:
    m, x = Block(), torch.randn(9, H)
    m.up[1, :B], m.down_s[2, 0], m.down_s[:, 1, 1] = 0, 0, 0
    got, report = compiled(m, x)
    assert len(report.blocks) == 1 and torch.allclose(got, m(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [packed.Mxfp4Table, packed.Mxfp4Bits])
def test_exponents_at_the_ends_of_a_byte(kind: Any) -> None:
    """255 is no number wherever the code has none; 0 is 2^-127, where bits of a float32 have 0: no more than that apart."""
    m, x = kind(), torch.randn(5, packed.H)
    m.down_scale_inv[:, 1], m.down_scale_inv[:, 2] = 0, 255
    got, report = compiled(m, x)
    want = m(x)
    assert len(report.blocks) == 1 and torch.equal(got.isnan(), want.isnan()) and bool(want[:, 2].isnan().all())
    assert float((got - want)[:, 1].abs().max()) < 1e-36 and torch.allclose(got[:, 3:], want[:, 3:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_every_code_is_what_a_cast_makes_of_it(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(dtype)
    got = ir.Stored(8, dtype, scaled=False).matrix(codes, None, torch.float32)
    assert torch.allclose(got, codes.float(), rtol=0, atol=0, equal_nan=True)


def test_as_many_groups_as_a_group_is_wide() -> None:
    """16 inputs are 4 groups of 4; 8 of them on a probe are 2 groups of 4."""
    sizes = Sizes(atoms=((16, 8), (4, 2)), kept=frozenset({4}))
    assert regroup(sizes, (16,), (8,), (4, 4))[0][0] == (2, 4)


def test_it_is_blocks_that_become_fewer() -> None:
    """16 blocks of 128 are 6 of 128 where a probe has 768 of them, however few 16 are."""
    sizes = Sizes(atoms=((2048, 256), (1024, 384)), kept=frozenset({8, 128}))
    assert regroup(sizes, (2048,), (768,), (16, 128))[0][0] == (6, 128)


class Gathered(nn.Module):
    """Verdict: fused. Codes and scales of the experts that each token chose are looked up: as many matrices as choices."""

    def __init__(self, hidden: int, inner: int, block: int) -> None:
        super().__init__()
        self.gate, self.block = nn.Linear(hidden, E, bias=False), block
        for name, shape in (("up", (2 * inner, hidden)), ("down", (hidden, inner))):
            self.register_buffer(name, torch.zeros(E, *shape, dtype=torch.float8_e4m3fn))
            self.register_buffer(f"{name}_s", torch.zeros(E, *(s // block for s in shape)))

    def floats(self, name: str, ids: Tensor) -> Tensor:
        q, s = getattr(self, name)[ids].float(), getattr(self, f"{name}_s")[ids]
        return (q.unflatten(-1, (-1, self.block)).unflatten(-3, (-1, self.block)) * s[..., :, None, :, None]).reshape(q.shape)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K)
        g, u = torch.einsum("th,tkoh->tko", x, self.floats("up", ids)).chunk(2, -1)
        return (torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.floats("down", ids)) * w[..., None]).sum(1)


def test_tokens_are_few_where_they_are_as_many_as_a_width_of_blocks() -> None:
    """On a probe such a width stays several blocks; as many tokens, each with matrices of its own, would be more work than is allowed."""
    reset()
    with torch.device("meta"):
        m, x = Gathered(hidden=2048, inner=1024, block=128), torch.zeros(1024, 2048)
    with torch.no_grad():
        torch.compile(m, backend="moe_fused", options={"inner": "eager", "target": "cpu"})(x)
    report = moe_compile.last_report()
    assert report is not None and len(report.blocks) == 1


def test_an_experts_number_is_itself() -> None:
    """40 is five times 8, which is 2 on a probe: the number that ids are compared with stays 40."""
    graph = torch.fx.symbolic_trace(lambda ids: torch.ops.aten.eq.Scalar(ids, 40)).graph
    ids, n, _ = graph.nodes
    ids.meta["val"], n.meta["val"] = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    literals = Literals(Sizes(atoms=((1024, 256), (8, 2)), kept=frozenset({64})), Script())
    assert literals.sizes.candidates(40)[0] == 10 and literals.of(n, {ids: ids.meta["val"]})[0][1] == 40


def test_a_view_is_no_work() -> None:
    w, x = torch.zeros(64, 8, 4), torch.zeros(3, 4)
    assert effort("select", [w, 0, 1]) == effort("transpose", [w, 0, 1]) == 0
    assert effort("linear", [x, w[0]]) == 3 * 4 * 8 and effort("mul", [w, w]) == 2 * w.numel()


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_take_turns_on_the_cpu(stacked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrices at a time; ids beyond the experts are nobody's."""
    if build.failure("forward", dtype) is not None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(on_cpu, "CHUNK", 2)
    monkeypatch.setattr(on_cpu.stored, "forward", None)  # nothing is left to plain torch
    how = ir.Stored(8, torch.float8_e4m3fn, rows=B, columns=B)
    e = ir.Experts(E, H, I, H, ir.Form.SEPARATE, act.SWIGLU, stacked=stacked, up_stored=how, down_stored=how, dtype=dtype)
    m = Block()
    parts = {"up": m.up.chunk(2, 1), "down": (m.down,), "up_scale": m.up_s.chunk(2, 1), "down_scale": (m.down_s,)}
    lists = {n: list(ts) if stacked else [t[i] for t in ts for i in range(E)] for n, ts in parts.items()}
    x, w, add = torch.randn(7, H, dtype=dtype), torch.rand(7, K), torch.randn(7, H, dtype=dtype)
    ids = torch.randint(0, E + 1, (7, K))
    none: list[Tensor] = []
    t: dict[str, Any] = {"x": x, "ids": ids, "weights": w, **{n: lists.get(n, none) for n in CODED}, "add": add}
    got = torch.ops.moe_compile.experts_stored(*t.values(), *ops.experts_args(e))
    want = replace(e, dtype=torch.float64).evaluate(**t)
    assert float((got.double() - want).abs().max()) <= (1e-5 if dtype is torch.float32 else 0.02) * float(want.abs().max())
