"""Contracts: ops that nothing is known of are read as the plain torch that they are said to be, from outside of the package too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile import ir
from moe_compile.passes.aten import contracts, contracts_float8, contracts_scaled, wrapped
from moe_compile.report import collecting

E, H, I, K, B = 4, 16, 8, 2, 4
F8 = torch.float8_e4m3fn
LIB = torch.library.Library("outside_build_7f3a", "DEF")


def define(schema: str, run: Any, fake: Any) -> None:
    """An op of somebody else's, with a kernel that nothing can look into."""
    LIB.define(schema)
    name = schema.partition("(")[0]
    LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{LIB.ns}::{name}", fake, lib=LIB)


def grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.ops.moe_compile_reference.grouped_mm_fallback(rows, weight, ends)


def combine(base: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    return base.index_add(0, token, rows)


BLOCK = "Tensor A, Tensor B, Tensor Bs, {}SymInt[] block_size, ScalarType? output_dtype=None"
FLOAT8 = {
    "w8a8_block_dynamic_fp8_matmul_grouped": ("Tensor offsets, Tensor tokens_per_expert, ", contracts_float8._block_grouped),
    "w8a8_block_dynamic_fp8_matmul_batched": ("Tensor expert_ids, ", contracts_float8._block_batched),
}
define("rows_by_expert(Tensor rows, Tensor weight, Tensor ends) -> Tensor", grouped, lambda r, w, e: r.new_empty(r.shape[0], w.shape[-1]))
define("put_back(Tensor base, Tensor rows, Tensor token) -> Tensor", combine, lambda b, r, t: torch.empty_like(b))
for _name, (_more, _run) in FLOAT8.items():
    define(f"{_name}({BLOCK.format(_more)}) -> Tensor", _run, lambda A, B, *_: A.new_empty(A.shape[0], B.shape[-2]))
for _name in ("w8a8_mx_dynamic_fp8_matmul_grouped", "w4a8_mx_dynamic_fp4_matmul_grouped"):
    define(
        f"{_name}(Tensor A, Tensor B, Tensor Bs, Tensor offsets, Tensor tokens_per_expert, ScalarType? output_dtype=None) -> Tensor",
        contracts_float8._mx_grouped,
        lambda A, B, *_: A.new_empty(A.shape[0], B.shape[-2]),
    )
define(
    "deterministic_scatter_add(Tensor out, Tensor index, Tensor src) -> Tensor",
    lambda out, index, src: out.scatter_add(0, index, src),
    lambda out, index, src: torch.empty_like(out),
)
OPS = torch.ops.outside_build_7f3a


@pytest.fixture
def own() -> Iterator[None]:
    """Contracts made here are gone behind the test."""
    before = dict(contracts._contracts)
    yield
    contracts._contracts.clear()
    contracts._contracts.update(before)


class Sorted(nn.Module):
    """Sorted rows; the products and what puts rows back are ops from outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(*s) / 4) for s in ((E, H, 2 * I), (E, I, H)))

    def products(self, rows: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        g, u = OPS.rows_by_expert(rows, self.up, ends).chunk(2, -1)
        return OPS.rows_by_expert(F.silu(g) * u, self.down, ends)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K)
        ids, order = torch.sort(ids.flatten())
        ends = torch.histc(ids.float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
        y = self.products(x[order // K], ids, ends) * w.flatten()[order, None]
        return OPS.put_back(torch.zeros_like(x), y, order // K)


def compiled(m: nn.Module, x: Tensor) -> tuple[Tensor, moe_compile.Report]:
    torch._dynamo.reset()
    with torch.no_grad(), collecting() as report:
        return torch.compile(m.eval(), backend="moe_fused", options={"inner": "eager"})(x), report


def test_an_op_from_outside_is_read_by_its_contract(own: None) -> None:
    """Without one the block stays as written; with one it fuses."""
    m, x = Sorted(), torch.randn(9, H)
    assert not compiled(m, x)[1].blocks
    moe_compile.register_contract("outside_build_7f3a::rows_by_expert", grouped)
    moe_compile.register_contract("put_back", combine)
    got, report = compiled(m, x)
    (block,) = report.blocks
    assert block.ir.experts == ir.Experts(E, H, I, H, ir.Form.CONCAT, block.ir.experts.activation, up_transposed=True, down_transposed=True)
    with torch.no_grad():
        torch.testing.assert_close(got, m(x))


class ScattersBack(Sorted):
    """torchtitan's combine: rows in bf16 by counts of a one-hot map, weighed in fp32, added by an op that fixes the order of the sum."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        ids = scores.topk(K, sorted=False).indices
        counts = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ids, True).sum(0)
        order = ids.view(-1).argsort(stable=True)
        rows, ends = x[order // K].bfloat16(), counts.cumsum(0, dtype=torch.int32)
        g, u = F.grouped_mm(rows, self.up.bfloat16(), offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(g) * u, self.down.bfloat16(), offs=ends).type_as(x)
        y = (y.float() * scores.gather(-1, ids).view(-1)[order].view(-1, 1)).to(y.dtype)
        return OPS.deterministic_scatter_add(torch.zeros_like(x), self.places(order).view(-1, 1).expand_as(y), y)

    def places(self, order: Tensor) -> Tensor:
        return order // K


class ScattersElsewhere(ScattersBack):
    """Near miss: rows are added to the place of their row, not of their token. As written."""

    def places(self, order: Tensor) -> Tensor:
        return order % len(order) // (K + 1)


@pytest.mark.parametrize(("cls", "fused"), [(ScattersBack, 1), (ScattersElsewhere, 0)])
def test_rows_added_by_an_op_of_a_library(cls: type[ScattersBack], fused: int) -> None:
    m, x = cls(), torch.randn(9, H)
    got, report = compiled(m, x)
    assert len(report.blocks) == fused
    with torch.no_grad():
        torch.testing.assert_close(got, m(x), rtol=2e-2, atol=2e-2)


def test_a_contract_that_is_not_the_ops_is_found_out(own: None) -> None:
    """The reference is what is proved and what runs: another function than the op's is the user's word. Another shape is no contract."""
    moe_compile.register_contract("rows_by_expert", lambda rows, weight, ends: (rows @ weight[0])[:1])
    moe_compile.register_contract("put_back", combine)
    _, report = compiled(Sorted(), torch.randn(9, H))
    assert not report.blocks


def test_bad_input_has_clear_errors() -> None:
    for name, reference, error, words in (
        (7, grouped, TypeError, "name is 7"),
        ("a b", grouped, ValueError, "'namespace::op'"),
        ("mine::op", 3, TypeError, "a function of plain torch"),
        ("mine::op", lambda *a: a, TypeError, "must name its arguments"),
        ("outside_build_7f3a::rows_by_expert", lambda a, b: a, ValueError, "the op has \\(rows, weight, ends\\)"),
    ):
        with pytest.raises(error, match=words):
            moe_compile.register_contract(name, reference)  # type: ignore[arg-type]


def test_an_op_of_the_name_with_other_arguments_has_none(own: None) -> None:
    contracts._contracts["rows_by_expert"] = contracts.Contract("rows_by_expert", lambda a, b: a)
    op = OPS.rows_by_expert.default
    assert contracts.contract_of(op) is None


class Block(Sorted):
    """Float8 weights in blocks, rows in float8 by four: the kernels that transformers loads for `FP8Experts`, as they are called there."""

    def __init__(self) -> None:
        super().__init__()
        del self.up, self.down
        for name, shape in (("up", (2 * I, H)), ("down", (H, I))):
            self.register_buffer(name, (torch.randn(E, *shape) * 20).to(F8))
            self.register_buffer(f"{name}_scale", (torch.rand(E, shape[0] // B, shape[1] // B) + 0.3) / 40)

    def products(self, rows: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        counts = torch.diff(ends, prepend=ends.new_zeros(1))

        def product(x: Tensor, name: str) -> Tensor:
            q, s = getattr(self, name), getattr(self, f"{name}_scale")
            return OPS.w8a8_block_dynamic_fp8_matmul_grouped(x, q, s, ends, counts, [B, B])

        g, u = product(rows, "up").chunk(2, -1)
        return product(F.silu(g) * u, "down")

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K)
        ids, order = torch.sort(ids.flatten())
        ends = torch.histc(ids.float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
        y = self.products(x[order // K], ids, ends) * w.flatten()[order, None]
        return y[order.argsort()].view(-1, K, H).sum(1)


class Decoding(Block):
    """One row a (token, slot), each with its expert's id."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K)

        def product(rows: Tensor, name: str) -> Tensor:
            q, s = getattr(self, name), getattr(self, f"{name}_scale")
            return OPS.w8a8_block_dynamic_fp8_matmul_batched(rows, q, s, ids.flatten(), [B, B])

        g, u = product(x.repeat_interleave(K, 0), "up").chunk(2, -1)
        y = product(F.silu(g) * u, "down") * w.reshape(-1, 1)
        return y.view(-1, K, H).sum(1)


def _is_no_worse(m: Any, x: Tensor, e: ir.Experts, got: Tensor) -> None:
    """At most 1.25 times as far from the oracle as eager is, in float64."""
    with torch.no_grad():
        want = m(x)
        w, ids = m.gate(x).softmax(-1).topk(K)
        exact = e.evaluate(x, ids, w, [m.up], [m.down], up_scale=[m.up_scale], down_scale=[m.down_scale])
    error = lambda a: float((a.double() - exact).norm() / exact.norm())  # noqa: E731
    assert error(got) <= max(1e-5, 1.25 * error(want))


@pytest.mark.parametrize("kind", [Block, Decoding])
def test_float8_kernels_of_transformers(kind: type[Block]) -> None:
    """Recovered with what the kernels do to rows; a group of zeros, and one beside numbers that are 1000 times as large."""
    m, x = kind(), torch.randn(9, H)
    x[1], x[2, :B], x[3, B : 2 * B] = 0, 0, 1000 * x[3, B : 2 * B]
    got, report = compiled(m, x)
    (block,) = report.blocks
    how, rows = ir.Stored(8, F8, rows=B, columns=B), ir.Rows(8, F8, B, 1e-12, floored=False)
    e = block.ir.experts
    assert (e.up_stored, e.down_stored, e.up_rows, e.down_rows) == (how, how, rows, rows)
    _is_no_worse(m, x, e, got)


class Mx(Block):
    """Weights in groups of 32 inputs with powers of two: float8, or two e2m1 a byte; rows in float8 by 32, powers of two."""

    hidden, inner = 64, 64

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.op = OPS.w4a8_mx_dynamic_fp4_matmul_grouped if packed else OPS.w8a8_mx_dynamic_fp8_matmul_grouped
        self.gate = nn.Linear(self.hidden, E, bias=False)
        for name, (n, k) in (("up", (2 * self.inner, self.hidden)), ("down", (self.hidden, self.inner))):
            codes = torch.randint(-128, 128, (E, n, k // 2)).to(torch.int8) if packed else (torch.randn(E, n, k) * 20).to(F8)
            self.register_buffer(name, codes)
            self.register_buffer(f"{name}_scale", torch.exp2(torch.randint(-8, -3, (E, n, k // 32)).float()).to(torch.float8_e8m0fnu))

    def products(self, rows: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        g, u = self.op(rows, self.up, self.up_scale, ends, counts).chunk(2, -1)
        return self.op(F.silu(g) * u, self.down, self.down_scale, ends, counts)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K)
        ids, order = torch.sort(ids.flatten())
        ends = torch.histc(ids.float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
        y = self.products(x[order // K], ids, ends) * w.flatten()[order, None]
        return y[order.argsort()].view(-1, K, self.hidden).sum(1)


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_of_groups_with_powers_of_two(packed: bool) -> None:
    """MXFP8 and MXFP4 weights beside rows in float8 (transformers' `expert_dtype: fp4`)."""
    m, x = Mx(packed), torch.randn(9, Mx.hidden)
    got, report = compiled(m, x)
    assert len(report.blocks) == 1, report.rejected
    e = report.blocks[0].ir.experts
    how = ir.Stored(4, torch.int8, rows=1, columns=32, axis=2, order=(0, 1), values=wrapped.E2M1)
    rows = ir.Rows(8, F8, 32, 1e-12, power=True)
    how = how if packed else ir.Stored(8, F8, rows=1, columns=32)
    assert (e.up_stored, e.down_stored, e.up_rows, e.down_rows) == (how, how, rows, rows)
    _is_no_worse(m, x, e, got)


def test_training_through_rounded_rows_declines() -> None:
    m = Block()
    x = torch.randn(9, H, requires_grad=True)
    torch._dynamo.reset()
    with collecting() as report:
        torch.compile(m, backend="moe_fused", options={"inner": "eager"})(x)
    assert not report.blocks and any("gradient" in r.reason for r in report.rejected), report.rejected


def test_scaled_products() -> None:
    """What their contracts say, against torch's own where the CPU has it."""
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 32, generator=gen).to(F8) for _ in range(2))
    sa, sb = torch.rand(16, 1, generator=gen) + 0.5, torch.rand(1, 16, generator=gen) + 0.5
    one = torch.tensor(0.5)
    for x, y in ((one, one), (sa, sb)):
        got = contracts_scaled._scaled_mm(a, b.t(), x, y, out_dtype=torch.float32)
        torch.testing.assert_close(got, torch._scaled_mm(a, b.t(), x, y, out_dtype=torch.float32), rtol=1e-2, atol=1e-2)
    w, s = torch.randn(E, 32, 8, generator=gen).to(F8), torch.rand(E, 8, generator=gen)
    ends = torch.tensor([4, 4, 10, 16], dtype=torch.int32)
    got = contracts_scaled._scaled_grouped_mm(a, w, sa[:, 0], s, ends, out_dtype=torch.float32)
    for i, e in enumerate([0] * 4 + [2] * 6 + [3] * 6):
        torch.testing.assert_close(got[i], (a[i].float() * sa[i]) @ (w[e].float() * s[e]))


def test_rows_in_few_bits_on_request() -> None:
    """W8A16 becomes W8A8 where the user asks, with groups as the weights' scales have them, and the report says what that changes."""
    import catalogue

    m = catalogue.build(catalogue.entries()["BlocksRepeated"]).eval()
    x = m.example_inputs(9)
    torch._dynamo.reset()
    with torch.no_grad(), collecting() as report:
        got = torch.compile(m, backend="moe_fused", options={"inner": "eager", "activations": "fp8"})(*x)
        want = m(*x)
    (block,) = report.blocks
    assert block.ir.experts.up_rows == ir.Rows(8, F8, 4, 1e-12) and "activations='fp8'" in block.note, block.note
    told = float(re.search(r": (\S+) of the result's norm", block.note)[1])  # type: ignore[index]
    assert 0.005 < told < 0.1 and 0.005 < float((got - want).norm() / want.norm()) < 0.1
    with pytest.raises(moe_compile.OptionError, match="'model', 'fp8', 'int8'"):
        moe_compile.Options.parse({"activations": "fp4"})
