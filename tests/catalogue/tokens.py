"""Tokens in another order or in parts: the block's input is the tensor that gate and experts both read, whatever made it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RENORM, SWIGLU_EXPERTS, AsWritten, Case, E, Fused, H, K, Rejected, mlp
from .naive import Parts


class _Tokens(Case):
    """Verdict: fused. A loop over the experts, on rows that `rows` takes from a batch of sequences [B, S, H]."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "tokens"

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        return (torch.randn(2, tokens, H, dtype=self.dtype),)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, H)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None])
        return out

    def moe(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.rows(x))

    def parts(self, *inputs: Any) -> Parts:
        return super().parts(self.rows(inputs[0]))


class TokensInOrder(_Tokens):
    """Verdict: fused. The plain batch of sequences, flattened."""


class TokensSequenceFirst(_Tokens):
    """Verdict: fused as TokensInOrder. Megatron's [S, B, H], and a norm in front."""

    def rows(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (H,)).transpose(0, 1).reshape(-1, H)


class TokensAddedToThemselves(_Tokens):
    """Verdict: fused as TokensInOrder. The accumulator starts as a part of the tokens that is in another order than they are."""

    def rows(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(-1, H)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(x, ids, w) + x

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": x}


class TokensOfWindows(_Tokens):
    """Verdict: fused as TokensInOrder. Two windows of each row of an image, one after the other."""

    def rows(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2)).permute(2, 0, 1, 3).reshape(-1, H)


class TokensChannelsFirst(_Tokens):
    """Verdict: fused as TokensInOrder. Channels first: [B, H, S]."""

    def rows(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().flatten(2).transpose(1, 2).reshape(-1, H)


class TokensLast(_Tokens):
    """Verdict: fused as TokensInOrder. The last token of each sequence only."""

    def rows(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.flip(1), (H,))[:, -1]


class TokensBackwards(_Tokens):
    """Verdict: fused as TokensInOrder. In reverse."""

    def rows(self, x: Tensor) -> Tensor:
        return x.flip(1).reshape(-1, H)


class TokensCast(_Tokens):
    """Verdict: fused as TokensInOrder. A cast in front, on tokens in another order."""

    def rows(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).transpose(0, 1).reshape(-1, H).float()


class TokensInChunks(_Tokens):
    """Verdict: fused as TokensInOrder, twice. The flattened tokens in two chunks, each routed by itself."""

    blocks = 2

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.moe(c) for c in self.rows(x).chunk(2)])

    def rows(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (H,)).reshape(-1, H)

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        return (torch.randn(4, max(tokens // 2, 2), H, dtype=self.dtype),)


class TokensChunkedDense(TokensInChunks):
    """Verdict: fused as TokensInOrder, twice. As above, every expert on every token of the chunk."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,eoh->teo", x, self.up).chunk(2, -1)
        y = torch.einsum("tei,ehi->teh", F.silu(g) * u, self.down)
        return torch.einsum("te,teh->th", torch.zeros(x.shape[0], E).scatter(1, ids, w), y)


# One step beside ----------------------------------------------------------------------------------------------------------


class RoutedBeforeChunks(TokensInChunks):
    """Verdict: experts fused, routing as written. All tokens are routed at once, the experts run on chunks of them."""

    expect = AsWritten(SWIGLU_EXPERTS, "another number of tokens")
    group = ""

    def forward(self, x: Tensor) -> Tensor:
        f = self.rows(x)
        w, ids = self.route(self.logits(f))
        return torch.cat([self.run_experts(*c) for c in zip(f.chunk(2), ids.chunk(2), w.chunk(2), strict=True)])


class RoutedInAnotherOrder(_Tokens):
    """Verdict: experts fused, routing as written. The router reads the sequences, the experts the same tokens sequence first."""

    expect = AsWritten(SWIGLU_EXPERTS, "another order")
    group = ""

    def rows(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(-1, H)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        return self.run_experts(self.rows(x), *(self.sequence_first(y) for y in (ids, w)))

    def sequence_first(self, y: Tensor) -> Tensor:
        return y.transpose(0, 1).reshape(-1, K)


class RoutedForOtherTokens(RoutedInAnotherOrder):
    """Verdict: fused as what it is. The ids of the sequences meet rows that are sequence first: each token gets another's experts."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x.reshape(-1, H)))
        return self.run_experts(self.rows(x), ids, w)

    def parts(self, *inputs: Any) -> Parts:
        p = super().parts(*inputs)
        return Parts(p.x, self.logits(inputs[0].reshape(-1, H)), bias=self.bias, **self.weights())


class FeaturesTurned(_Tokens):
    """Verdict: fused as what it is. The router reads the tokens, the experts their features rolled by one."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = ""
    turns = 1

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(x.roll(self.turns, -1), ids, w)

    def parts(self, *inputs: Any) -> Parts:
        x = self.rows(inputs[0])
        return Parts(x.roll(self.turns, -1), self.logits(x), bias=self.bias, **self.weights())


class FeaturesTurnedInside(FeaturesTurned):
    """Verdict: rejected. Each expert rolls the rows that it has gathered: no tensor holds such rows."""

    expect = Rejected("order of the tokens")

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, mlp(x[token].roll(self.turns, -1), self.up[e], self.down[e]) * w[token, slot, None])
        return out


class RowsOfTheNeighbour(_Tokens):
    """Verdict: rejected. In its second slot an expert reads the next token: no tensor holds such rows."""

    expect = Rejected("order of the tokens")
    group, near = "", "TokensInOrder"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            rows = x[(token + slot) % x.shape[0]]
            out = out.index_add(0, token, mlp(rows, self.up[e], self.down[e]) * w[token, slot, None])
        return out


class RowsOfTwoOrders(_Tokens):
    """Verdict: rejected. Gate and up projections read the tokens in different orders."""

    expect = Rejected("different inputs")
    group, near = "", "TokensInOrder"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out, other = torch.zeros_like(x), x.flip(0)
        for e in range(E):
            token, slot = torch.where(ids == e)
            g, u = self.up[e].chunk(2)
            y = F.linear(F.silu(F.linear(x[token], g)) * F.linear(other[token], u), self.down[e])
            out = out.index_add(0, token, y * w[token, slot, None])
        return out
