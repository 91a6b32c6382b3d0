"""What a user sees of a result's place in memory is eager's; transforms around a block and numbers beyond range cause no error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue.check import OPTIONS, difference_problem
from small import Block, E, H, K, T, assert_equal, both, compiled, told
from torch import Tensor

from moe_compile.report import collecting

torch.set_num_threads(1)


class Loop(Block):
    """zeros_like of a transposed tensor is transposed."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        return self.loop(x, ids, w)


class Seen(Loop):
    """What is read off the layout afterwards."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, torch.tensor(y.stride()), torch.tensor(y.t().is_contiguous()), y.as_strided((3, 3), (2, 1))


class Added(Block):
    """A graph without a loop."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(x[token], e) * w[token, slot, None])
        return out, torch.tensor(out.stride())


class Scaled(Added):
    """A number behind it becomes a part of the weights."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[0] * 2.5


class RowMajor(Block):
    """new_zeros is row-major whatever it is made of."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        return self.loop(x, ids, w, x.new_zeros(x.shape))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cls", [Loop, Seen, Added, Scaled, RowMajor])
def test_strides_are_eagers(cls: type[Block], transposed: bool, inner: str) -> None:
    """Verdict: fused."""
    report, got, want = both(cls(), torch.randn(H, T).t() if transposed else torch.randn(T, H), inner=inner)
    assert_equal(got, want)
    assert len(report.blocks) == 1, told(report)


def test_a_result_with_gaps_stays_as_written() -> None:
    """Verdict: rejected. The rows are added into a part of a wider tensor."""

    class Wide(Block):
        def forward(self, x: Tensor) -> Any:
            w, ids = self.route(x)
            return self.loop(x, ids, w, x.new_zeros(x.shape[0], 2 * H)[:, :H])

    report, got, want = both(Wide(), torch.randn(T, H))
    assert_equal(got, want)
    assert not report.blocks and any("gaps" in t for t in told(report)), told(report)


def test_chunks_of_any_number_of_tokens() -> None:
    """Verdict: fused, each chunk. The last one has T - 4 tokens of a number T that is not fixed, and the proof runs on few."""

    class Chunks(Block):
        def forward(self, x: Tensor) -> Any:
            return torch.cat([Block.forward(self, c) for c in x.split(4)])

    m = Chunks()
    torch._dynamo.reset()
    with torch.no_grad(), collecting() as report:
        run = torch.compile(m, backend="moe_fused", options=OPTIONS, dynamic=True)
        for tokens in (7, 8):
            x = torch.randn(tokens, H)
            assert_equal([run(x)], [m(x)])
    assert len(report.blocks) == 2 and not report.rejected, told(report)


# Transforms ------------------------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Any] = {
    "vmap": lambda m: lambda x: torch.vmap(m)(x),
    "vmap twice": lambda m: lambda x: torch.vmap(torch.vmap(lambda row: m(row[None])))(x),
    "grad": lambda m: lambda x: torch.func.grad(lambda y: m(y).sum())(x[0]),
    "jvp": lambda m: lambda x: torch.func.jvp(m, (x[0].clone(),), (x[1].clone(),)),
}


class Dense(Block):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x.reshape(-1, H))
        full = torch.zeros(ids.shape[0], E).scatter(1, ids, w)
        h = torch.nn.functional.silu(torch.einsum("th,eih->eti", x.reshape(-1, H), self.up))
        return torch.einsum("eth,te->th", torch.einsum("eti,ehi->eth", h, self.down), full)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_blocks_under_a_transform_stay_as_written(name: str) -> None:
    """Verdict: rejected, and told why. Without the transform the block is fused."""
    module, x = Dense(), torch.randn(3, T, H)
    f = TRANSFORMS[name](module)
    with collecting() as report:
        got = compiled(f)(x)
    want = f(x)
    for a, b in zip(got if isinstance(got, tuple) else [got], want if isinstance(want, tuple) else [want], strict=True):
        assert not difference_problem(a.detach(), b.detach())
    assert not report.blocks and any("torch.func" in t for t in told(report)), told(report)
    report, out, expected = both(module, x[0])
    assert_equal(out, expected)
    assert len(report.blocks) == 1


def test_a_block_beside_a_transform_is_fused() -> None:
    """Verdict: fused. Masks are often made by vmap."""

    class Beside(Dense):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.vmap(lambda i: (i % 2).float())(torch.arange(x.shape[0]))
            return super().forward(x * mask[:, None])

    report, got, want = both(Beside(), torch.randn(T, H))
    assert_equal(got, want)
    assert len(report.blocks) == 1, told(report)


# Numbers beyond range --------------------------------------------------------------------------------------------------------

FILLED: dict[str, Any] = {
    "sigmoid": lambda l: l.sigmoid(),
    "softmax": lambda l: l.softmax(-1),
    "exp": lambda l: l.exp(),
    "softplus": lambda l: torch.nn.functional.softplus(l),
    "tanh": lambda l: l.tanh(),
    "square of the square": lambda l: l.square() ** 8,
}


@pytest.mark.parametrize("fill", [-1e9, 1e9, -1e38, float("-inf")])
@pytest.mark.parametrize("name", FILLED)
def test_constants_that_overflow(name: str, fill: float) -> None:
    """Verdict: either, and never an internal error."""

    class Filled(Block):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.router(x).masked_fill(torch.arange(E) == 1, fill)
            w, ids = FILLED[name](logits).topk(K)
            return w / (1 + w.abs()), ids

    report, got, want = both(Filled(), torch.randn(T, H))
    assert not any(t.startswith("internal") for t in told(report)), told(report)
    assert torch.allclose(got[0], want[0], rtol=1e-4, atol=1e-6, equal_nan=True)


class ShiftedWindows(Block):
    """Padded to whole windows and shifted by two; `back` is how far the result is shifted back: 2, or a near miss."""

    def __init__(self, back: int) -> None:
        super().__init__()
        self.back = back

    def forward(self, x: Tensor) -> Any:
        y = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 4)).roll(-2, 0).view(-1, 4, H)
        w, ids = self.route(y.reshape(-1, H))
        return self.gathered(y.reshape(-1, H), ids, w).roll(self.back, 0)[: len(x)] + x


@pytest.mark.parametrize("back", [2, 1])
def test_windows_that_are_padded_and_shifted(back: int) -> None:
    report, got, want = both(ShiftedWindows(back), torch.randn(T, H))
    assert len(report.blocks) == 1, told(report)
    assert_equal(got, want)


class Stacked(Block):
    """Two kinds of tokens, stacked: the experts' rows are those of the stack."""

    def forward(self, x: Tensor) -> Any:
        y = torch.stack([x, x * 2], 1)
        w, ids = self.route(y.reshape(-1, H))
        return self.gathered(y.reshape(-1, H), ids, w).view(y.shape)


class Hashed(Block):
    """A word's number says its expert, and its row of a table is a part of the tokens: one id a token, without a dim for slots."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(20, H)

    def forward(self, x: Tensor, word: Tensor) -> Any:
        h = (self.words(word) + x).view(-1, H)
        ids = (word * 7 % E).view(-1)
        out = torch.zeros_like(h)
        for e in range(E):
            rows = (ids == e).nonzero(as_tuple=True)[0]
            out[rows] = self.expert(h[rows], e)
        return out.view(x.shape)


def test_words_that_are_hashed() -> None:
    report, got, want = both(Hashed(), torch.randn(2, T, H), torch.arange(2 * T).view(2, T))
    assert len(report.blocks) == 1 and report.graph_count == 1, told(report)
    assert_equal(got, want)


class PutBack(Block):
    """Rows in the order of the experts are put back to their places by index_copy, or a near miss: to those of the row before."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        place = ids.flatten().argsort()
        expert = ids.flatten()[place]
        h = torch.nn.functional.silu(torch.einsum("rh,rih->ri", x[place // K], self.up[expert]))
        rows = torch.einsum("ri,rhi->rh", h, self.down[expert])
        back = torch.zeros_like(rows).index_copy(0, place.roll(self.by), rows)
        return (back.view(-1, K, H) * w.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize(("module", "blocks"), [(Stacked(), 1), (PutBack(0), 1), (PutBack(1), 0)])
def test_rows_that_are_put_elsewhere(module: Block, blocks: int) -> None:
    report, got, want = both(module, torch.randn(T, H))
    assert len(report.blocks) == blocks, told(report)
    assert_equal(got, want)
