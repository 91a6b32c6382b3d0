"""Codes in words, spelled as in no catalogue entry: tables in lists of numbers with `dynamic=True`, words with more dims than two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import moe_compile
from moe_compile.ir.stored import Exponent
from moe_compile.passes.recover import packed

E, K, H, I, G = 2, 1, 16, 8, 4
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLE = [*E2M1, *(-v for v in E2M1)]


class Mxfp4(nn.Module):
    """Experts in e2m1 pairs and exponents, gpt-oss's layout: words [.., N, K / G, G / 2], the table a list of numbers of the module's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.values = list(TABLE)
        for name, rows, columns in (("up", 2 * I, H), ("down", H, I)):
            self.register_buffer(name, torch.randint(0, 256, (E, rows, columns // G, G // 2), dtype=torch.uint8))
            self.register_buffer(f"{name}_scale", torch.randint(122, 127, (E, rows, columns // G), dtype=torch.uint8))

    def floats(self, words: Tensor, scale: Tensor, values: list[float]) -> Tensor:
        table = torch.tensor(values)
        v = torch.stack([table[(words & 15).long()], table[(words >> 4).long()]], -1).flatten(-2)
        return torch.ldexp(v, scale.int()[..., None] - 127).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        up, down = (self.floats(getattr(self, n), getattr(self, f"{n}_scale"), self.values) for n in ("up", "down"))
        g, u = torch.einsum("th,eoh->eto", x, up).chunk(2, -1)
        y = torch.einsum("eti,ehi->eth", F.silu(g) * u, down)
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)
        return (y * dense.t()[..., None]).sum(0)

    def numbers(self, words: Tensor) -> list[list[float]]:
        """What the codes of one matrix stand for, word by word in plain Python."""
        return [[self.values[c] for w in row for c in (w & 15, w >> 4)] for row in words.flatten(1).tolist()]

    def factor(self, scale: float) -> float:
        return float(2.0 ** (scale - 127))

    def matrix(self, name: str, e: int) -> Tensor:
        """[out, in] of one expert in float64."""
        numbers, scales = self.numbers(getattr(self, name)[e]), getattr(self, f"{name}_scale")[e].tolist()
        rows = [[v * self.factor(s[j // G]) for j, v in enumerate(row)] for row, s in zip(numbers, scales, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    def reference(self, x: Tensor) -> Tensor:
        x = x.double()
        w, ids = (x @ self.gate.weight.double().t()).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e in range(E):
            g, u = (x @ self.matrix("up", e).t()).chunk(2, -1)
            out += (F.silu(g) * u) @ self.matrix("down", e).t() * torch.where(ids == e, w, 0).sum(-1, keepdim=True)
        return out


class Expert(nn.Module):
    """One expert's own words and numbers."""

    def __init__(self, of: Mxfp4, e: int) -> None:
        super().__init__()
        self.values, self.floats = list(of.values), of.floats
        for name in ("up", "up_scale", "down", "down_scale"):
            self.register_buffer(name, getattr(of, name)[e].clone())

    def forward(self, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.floats(self.up, self.up_scale, self.values)).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.floats(self.down, self.down_scale, self.values))


class Listed(Mxfp4):
    """Experts as modules in a list; a matrix of words [N, K / G, G / 2] is no stack."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(self, e) for e in range(E))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return out


def held(model: Mxfp4, report: Any) -> None:
    (block,) = report.blocks
    stored = block.ir.experts.up_stored
    assert stored is not None and stored.values == tuple(model.values) and stored.columns == G


class Float8(Mxfp4):
    """MXFP8 whose exponents are bytes, seen as e8m0 (DeepSeek's `ue8m0` checkpoints)."""

    def __init__(self) -> None:
        super().__init__()
        self.values = []
        for name, rows, columns in (("up", 2 * I, H), ("down", H, I)):
            setattr(self, name, torch.randn(E, rows, columns).to(torch.float8_e4m3fn))

    def floats(self, words: Tensor, scale: Tensor, values: list[float]) -> Tensor:
        return (words.float().unflatten(-1, (-1, G)) * scale.view(torch.float8_e8m0fnu).float()[..., None]).flatten(-2)

    def numbers(self, words: Tensor) -> list[list[float]]:
        return words.double().tolist()  # type: ignore[no-any-return]


class Divided(Float8):
    """A byte divides: 2^(127 - b)."""

    def floats(self, words: Tensor, scale: Tensor, values: list[float]) -> Tensor:
        return (words.float().unflatten(-1, (-1, G)) / scale.view(torch.float8_e8m0fnu).float()[..., None]).flatten(-2)

    def factor(self, scale: float) -> float:
        return float(2.0 ** (127 - scale))


class BytesAsNumbers(Float8):
    """The near miss: the bytes are the scales."""

    def floats(self, words: Tensor, scale: Tensor, values: list[float]) -> Tensor:
        return (words.float().unflatten(-1, (-1, G)) * (scale.float()[..., None] / 4096)).flatten(-2)

    def factor(self, scale: float) -> float:
        return scale / 4096


class RoundedFirst(Float8):
    """Codes and scales are rounded to bf16, and once more their product, before the fp32 product."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("up", "down"):
            setattr(self, f"{name}_scale", torch.rand(getattr(self, f"{name}_scale").shape) + 0.5)

    def floats(self, words: Tensor, scale: Tensor, values: list[float]) -> Tensor:
        return (words.bfloat16().unflatten(-1, (-1, G)) * scale.bfloat16()[..., None]).flatten(-2).float()

    def factor(self, scale: float) -> float:
        return scale


class Across(RoundedFirst):
    """Codes of 3 bits in bytes, eight in three of them: two of each eight lie across."""

    def __init__(self) -> None:
        super().__init__()
        for name, rows, columns in (("up", 2 * I, H), ("down", H, I)):
            setattr(self, name, torch.randint(0, 256, (E, rows, columns // 8 * 3), dtype=torch.uint8))

    def floats(self, words: Tensor, scale: Tensor, values: list[float]) -> Tensor:
        a, b, c = words.int().unflatten(-1, (-1, 3)).unbind(-1)
        codes = [a, a >> 3, a >> 6 | b << 2, b >> 1, b >> 4, b >> 7 | c << 1, c >> 2, c >> 5]
        q = torch.stack([x & 7 for x in codes], -1).flatten(-2) - 4
        return (q.float().unflatten(-1, (-1, G)) * scale[..., None]).flatten(-2)


def check(cls: type[Mxfp4], **how: Any) -> tuple[Mxfp4, Any, list[Any]]:
    """(a model, what is compiled of it, the graphs so far), right at two token counts."""
    model, graphs = cls(), []
    fused = torch.compile(model, backend="moe_fused", options={"inner": lambda gm, _: graphs.append(gm) or gm.forward}, **how)
    for tokens in (5, 12):
        x = torch.randn(tokens, H)
        torch.testing.assert_close(fused(x).double(), model.reference(x), rtol=1e-5, atol=1e-5)
    (block,) = moe_compile.last_report().blocks
    stored = block.ir.experts.up_stored
    assert stored is not None and stored.values == tuple(model.values) and stored.columns == G
    return model, fused, graphs


@torch.no_grad()
def test_a_table_of_numbers_that_dynamo_keeps_variable() -> None:
    """One compilation for two token counts; other numbers are another graph."""
    model, fused, graphs = check(Mxfp4, dynamic=True)
    assert len(graphs) == 1
    model.values[3] = 1.75
    x = torch.randn(4, H)
    torch.testing.assert_close(fused(x).double(), model.reference(x), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2 and moe_compile.last_report().blocks[0].ir.experts.up_stored.values == tuple(model.values)


@torch.no_grad()
def test_a_matrix_of_words_by_groups_is_no_stack() -> None:
    check(Listed, dynamic=None)


@torch.no_grad()
def test_exponents_in_bytes_beside_float8() -> None:
    """MXFP8: read as stored by what every byte stands for; bytes that are numbers are not."""
    for cls, exponents in ((Float8, Exponent.VALUE), (Divided, Exponent.VALUE), (BytesAsNumbers, None)):
        model, x = cls(), torch.randn(5, H)
        got, want = compiled(model)(x).double(), model.reference(x)
        assert (got - want).norm() <= 1e-5 * want.norm()
        blocks = moe_compile.last_report().blocks
        stored = [b.ir.experts.up_stored for b in blocks]
        assert [s.exponents for s in stored if s is not None] == ([] if exponents is None else [exponents])


@torch.no_grad()
def test_a_product_that_is_rounded_first_is_not() -> None:
    """codes · scales, each rounded to bf16 by the model, are what is stored: nearer to float64 than eager is."""
    model, x = RoundedFirst(), torch.randn(5, H)
    got, want, eager = compiled(model)(x).double(), model.reference(x), model(x).double()
    assert (got - want).norm() <= 1e-5 * want.norm() and (eager - want).norm() >= 1e-3 * want.norm()


@torch.no_grad()
def test_codes_across_words_are_told_as_that() -> None:
    model, x = Across(), torch.randn(5, H)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert "lie across words: 8 of them in 3" in moe_compile.last_report().rejected[0].reason


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="moe_fused", options={"inner": "eager"})


def test_a_table_for_each_half_of_a_byte_is_no_table() -> None:
    """The near miss beside it: two tables that are operands are read as two, though nothing is known of what they hold."""

    def f(words: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a[(words & 15).long()], b[(words >> 4).long()]], -1).flatten(-2)

    words, a, b = torch.zeros(E, H, I, dtype=torch.uint8), torch.randn(16), torch.randn(16)
    for graph, tables in ((make_fx(f)(words, a, b).graph, 2), (make_fx(lambda words, a: f(words, a, a))(words, a).graph, 1)):
        leaf, *_ = given = [n for n in graph.nodes if n.op == "placeholder"]
        (out,) = (n.args[0] for n in graph.nodes if n.op == "output")
        assert len(given) == 1 + tables
        found = packed.read(out, leaf, None, E)
        assert found is None if tables == 2 else found is not None and found.table is given[1]
