"""How expert weights are stored and which function of them an expert is. Each on the dispatch that suits it."""

from __future__ import annotations

from dataclasses import replace

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import Form
from moe_compile.ir import scalar as act

from .base import LIST_EXPERTS, RENORM, SWIGLU_EXPERTS, Case, E, Fused, H, I, ListCase, experts, mlp, parameter

CAPPED = act.clamp(act.G, -sp.oo, 7)  # not in a class: sympy's objects are read with the module's class, and their classes are not watched


class _Stored(Case):
    """Verdict: fused. A loop over torch.where(ids == e); subclasses say what `expert` e is."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


class StackedOutIn(_Stored):
    """Verdict: fused. [E, 2I, H] and [E, H, I] through F.linear."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "stacked"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return mlp(x, self.up[e], self.down[e])


class StackedOutInMatmul(StackedOutIn):
    """Verdict: fused as StackedOutIn. x @ W.t(), halves by slicing, silu as x * sigmoid(x), up first in the product."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        h = x @ self.up[e].t()
        g, u = h[:, :I], h[..., I:]
        return torch.mm(u * (g * torch.sigmoid(g)), self.down[e].T)


class StackedOutInWeightHalves(StackedOutIn):
    """Verdict: fused as StackedOutIn. The weight, not the product, is cut in half."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e, :I]), F.linear(x, self.up[e][I:])
        return F.linear(u * (g / (1 + torch.exp(-g))), self.down[e])


class StackedOutInBuffers(StackedOutIn):
    """Verdict: fused as StackedOutIn. Non-contiguous storage: parameters are transposed views of the stored ones."""

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.up = nn.Parameter(self.up.detach().transpose(1, 2).contiguous().transpose(1, 2))


class StackedInOut(_Stored):
    """Verdict: fused, both weights transposed: [E, H, 2I] and [E, I, H] through @."""

    expect = Fused(RENORM, replace(SWIGLU_EXPERTS, up_transposed=True, down_transposed=True))
    group = "stacked-in-out"
    near, differs = "StackedOutIn", ("experts.down_transposed", "experts.up_transposed")

    def build_experts(self, n: int) -> None:
        self.up, self.down = parameter(n, H, 2 * I), parameter(n, I, H)

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = (x @ self.up[e]).chunk(2, -1)
        return (F.silu(g) * u) @ self.down[e]


class StackedInOutLinear(StackedInOut):
    """Verdict: fused as StackedInOut. F.linear on the transposed slice."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e].T).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e].t())


class StackedUpInOut(_Stored):
    """Verdict: fused, the up weight alone transposed."""

    expect = Fused(RENORM, replace(SWIGLU_EXPERTS, up_transposed=True))
    near, differs = "StackedOutIn", ("experts.up_transposed",)

    def build_experts(self, n: int) -> None:
        self.up, self.down = parameter(n, H, 2 * I), parameter(n, H, I)

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = (x @ self.up[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e])


class StackedBias(_Stored):
    """Verdict: fused, with biases on both projections."""

    expect = Fused(RENORM, replace(SWIGLU_EXPERTS, up_bias=True, down_bias=True))
    group = "stacked-bias"
    near, differs = "StackedOutIn", ("experts.down_bias", "experts.up_bias")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.up_bias, self.down_bias = parameter(n, 2 * I), parameter(n, H)

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_bias": [self.up_bias], "down_bias": [self.down_bias]}

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e], self.up_bias[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e], self.down_bias[e])


class StackedBiasAdded(StackedBias):
    """Verdict: fused as StackedBias. Added after the product."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = (x @ self.up[e].T + self.up_bias[e]).chunk(2, -1)
        return (F.silu(g) * u) @ self.down[e].T + self.down_bias[e]


class StackedBiasGathered(StackedBias):
    """Verdict: fused as StackedBias. Batched: weights and biases gathered per slot."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = (torch.einsum("th,tkoh->tko", x, self.up[ids]) + self.up_bias[ids]).chunk(2, -1)
        y = torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids]) + self.down_bias[ids]
        return (y * w[..., None]).sum(1)


class StackedUpBiasOnly(StackedBias):
    """Verdict: fused, a bias on the up projection only."""

    expect = Fused(RENORM, replace(SWIGLU_EXPERTS, up_bias=True))
    group = ""
    near, differs = "StackedBias", ("experts.down_bias",)

    def weights(self) -> dict[str, list[Tensor]]:
        return Case.weights(self) | {"up_bias": [self.up_bias]}

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e], self.up_bias[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e])


class StackedSeparate(_Stored):
    """Verdict: fused. Gate, up and down in three stacked tensors."""

    expect = Fused(RENORM, experts(form=Form.SEPARATE))
    group = "stacked-separate"
    near, differs = "StackedOutIn", ("experts.form",)

    def build_experts(self, n: int) -> None:
        self.w1, self.w3, self.w2 = parameter(n, I, H), parameter(n, I, H), parameter(n, H, I)

    def weights(self) -> dict[str, list[Tensor]]:
        return {"up": [self.w1, self.w3], "down": [self.w2]}

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w1[e])) * F.linear(x, self.w3[e]), self.w2[e])


class StackedSeparateEinsum(StackedSeparate):
    """Verdict: fused as StackedSeparate. Dense einsum over all experts."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        h = F.silu(torch.einsum("th,eih->tei", x, self.w1)) * torch.einsum("th,eih->tei", x, self.w3)
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w)
        return torch.einsum("te,teh->th", dense, torch.einsum("tei,ehi->teh", h, self.w2))


class FlattenedViews(_Stored):
    """Verdict: fused. dbrx: w1, v1, w2 as [E·I, H], viewed, the last used untransposed."""

    expect = Fused(RENORM, experts(form=Form.SEPARATE, down_transposed=True))
    group = "flattened"

    def build_experts(self, n: int) -> None:
        self.w1, self.v1, self.w2 = parameter(n * I, H), parameter(n * I, H), parameter(n * I, H)

    def weights(self) -> dict[str, list[Tensor]]:
        return {"up": [self.w1.view(E, I, H), self.v1.view(E, I, H)], "down": [self.w2.view(E, I, H)]}

    def expert(self, e: int, x: Tensor) -> Tensor:
        w1, v1, w2 = (t.view(E, I, H)[e] for t in (self.w1, self.v1, self.w2))
        return (F.silu(x.matmul(w1.t())) * x.matmul(v1.t())).matmul(w2)


class FlattenedChunks(FlattenedViews):
    """Verdict: fused as FlattenedViews. The views chunked into a list of E, squeezed."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        w1, v1, w2 = ([c.squeeze(0) for c in t.view(E, I, H).chunk(E, dim=0)][e] for t in (self.w1, self.v1, self.w2))
        return (F.silu(x @ w1.t()) * (x @ v1.t())) @ w2


class FlattenedSlices(FlattenedViews):
    """Verdict: fused as FlattenedViews. Rows e·I to (e+1)·I of the flat tensors."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        rows = slice(e * I, (e + 1) * I)
        return (F.silu(x @ self.w1[rows].t()) * (x @ self.v1[rows].t())) @ self.w2[rows]


class Interleaved(_Stored):
    """Verdict: fused. gpt-oss: gate and up interleaved, biases, clamps, (u + 1) · g · σ(1.702 g), [E, in, out]."""

    expect = Fused(
        RENORM,
        experts(
            form=Form.INTERLEAVED,
            activation=(act.clamp(act.U, -7, 7) + 1) * CAPPED * act.sigmoid(sp.Float(1.702) * CAPPED),
            up_transposed=True,
            down_transposed=True,
            up_bias=True,
            down_bias=True,
        ),
    )
    group = "interleaved"

    def build_experts(self, n: int) -> None:
        self.up, self.down = parameter(n, H, 2 * I, std=1.5), parameter(n, I, H)
        self.up_bias, self.down_bias = parameter(n, 2 * I), parameter(n, H)

    def weights(self) -> dict[str, list[Tensor]]:
        return {"up": [self.up], "down": [self.down], "up_bias": [self.up_bias], "down_bias": [self.down_bias]}

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h[..., ::2], h[..., 1::2]

    def act(self, h: Tensor) -> Tensor:
        g, u = self.halves(h)
        g, u = g.clamp(min=None, max=7.0), u.clamp(min=-7.0, max=7.0)
        return (u + 1) * (g * torch.sigmoid(g * 1.702))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.act(x @ self.up[e] + self.up_bias[e]) @ self.down[e] + self.down_bias[e]


class InterleavedView(Interleaved):
    """Verdict: fused as Interleaved. Even and odd outputs through a view [.., I, 2]."""

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        pairs = h.unflatten(-1, (-1, 2))
        return pairs[..., 0], pairs[..., 1]


class InterleavedUnbind(Interleaved):
    """Verdict: fused as Interleaved. unbind over the last dim, baddbmm over all experts, dense weights."""

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        g, u = h.reshape(*h.shape[:-1], I, 2).unbind(-1)
        return g, u

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        h = torch.baddbmm(self.up_bias.unsqueeze(1), x.expand(E, -1, -1), self.up)
        y = torch.baddbmm(self.down_bias[:, None, :], self.act(h), self.down)
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)
        return (y * dense.t()[..., None]).sum(0)


class SingleRelu2(_Stored):
    """Verdict: fused. No gate: down(relu(up x)²)."""

    expect = Fused(RENORM, experts(form=Form.SINGLE, activation=act.relu(act.G) ** 2))
    group = "relu2"

    def build_experts(self, n: int) -> None:
        self.up, self.down = parameter(n, I, H), parameter(n, H, I)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.up[e])).pow(2), self.down[e])


class SingleRelu2Product(SingleRelu2):
    """Verdict: fused as SingleRelu2. clamp(min=0) times itself."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        h = (x @ self.up[e].T).clamp(min=0)
        return (h * h) @ self.down[e].T


class UpFirst(_Stored):
    """Verdict: fused: the first half is the one not activated, so the expression is g · silu(u)."""

    expect = Fused(RENORM, experts(activation=act.silu(act.U) * act.G))
    near, differs = "StackedOutIn", ("experts.activation",)

    def expert(self, e: int, x: Tensor) -> Tensor:
        u, g = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e])


class GeluErf(_Stored):
    """Verdict: fused. GeGLU, erf."""

    expect = Fused(RENORM, experts(activation=act.gelu(act.G) * act.U))
    group = "gelu"
    near, differs = "StackedOutIn", ("experts.activation",)

    def act(self, g: Tensor) -> Tensor:
        return F.gelu(g)

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(self.act(g) * u, self.down[e])


class GeluErfByHand(GeluErf):
    """Verdict: fused as GeluErf. x / 2 (1 + erf(x / √2))."""

    def act(self, g: Tensor) -> Tensor:
        return g * 0.5 * (1.0 + torch.erf(g / 2**0.5))


class GeluTanh(GeluErf):
    """Verdict: fused, another function than GeluErf: the tanh approximation."""

    expect = Fused(RENORM, experts(activation=act.gelu_tanh(act.G) * act.U))
    group = ""
    near, differs = "GeluErf", ("experts.activation",)

    def act(self, g: Tensor) -> Tensor:
        return F.gelu(g, approximate="tanh")


class ListSeparate(ListCase):
    """Verdict: fused. A ModuleList of w1, w2, w3 Linears."""

    expect = Fused(RENORM, LIST_EXPERTS)
    group = "list"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return out


class ListStackedAtRunTime(ListCase):
    """Verdict: fused; the layout may be either: Linears' weights stacked by torch.stack in the forward."""

    expect = Fused(RENORM, LIST_EXPERTS)
    any_layout = True

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        w1, w2, w3 = (torch.stack([getattr(m, n).weight for m in self.experts]) for n in ("w1", "w2", "w3"))
        h = F.silu(torch.einsum("th,tkih->tki", x, w1[ids])) * torch.einsum("th,tkih->tki", x, w3[ids])
        return torch.einsum("tki,tkhi,tk->th", h, w2[ids], w)


class ListBias(ListSeparate):
    """Verdict: fused. Linears with biases, which a kernel must not drop."""

    has_bias = True
    expect = Fused(RENORM, replace(LIST_EXPERTS, up_bias=True, down_bias=True))
    group = ""
    near, differs = "ListSeparate", ("experts.down_bias", "experts.up_bias")


class ListSequential(Case):
    """Verdict: fused. nanoMoE / makeMoE experts: Sequential(Linear, ReLU, Linear) with biases, a SINGLE list."""

    expect = Fused(RENORM, experts(form=Form.SINGLE, stacked=False, activation=act.relu(act.G), up_bias=True, down_bias=True))

    def build_experts(self, n: int) -> None:
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H), nn.Dropout(0.0)) for _ in range(n)])

    def weights(self) -> dict[str, list[Tensor]]:
        firsts, lasts = [m[0] for m in self.experts], [m[2] for m in self.experts]
        return {
            "up": [m.weight for m in firsts],
            "up_bias": [m.bias for m in firsts],
            "down": [m.weight for m in lasts],
            "down_bias": [m.bias for m in lasts],
        }

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return out


class ListFusedLinear(Case):
    """Verdict: fused. A list of Linears with gate and up in one matrix."""

    expect = Fused(RENORM, experts(stacked=False))
    near, differs = "StackedOutIn", ("experts.stacked",)

    def build_experts(self, n: int) -> None:
        self.ups = nn.ModuleList([nn.Linear(H, 2 * I, bias=False) for _ in range(n)])
        self.downs = nn.ModuleList([nn.Linear(I, H, bias=False) for _ in range(n)])

    def weights(self) -> dict[str, list[Tensor]]:
        return {"up": [m.weight for m in self.ups], "down": [m.weight for m in self.downs]}

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            g, u = self.ups[e](x[token]).chunk(2, -1)
            out.index_add_(0, token, self.downs[e](F.silu(g) * u) * w[token, slot, None])
        return out
