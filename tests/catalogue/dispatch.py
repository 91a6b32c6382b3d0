"""Dispatch without a loop: sorted tokens and grouped products, gathered weights, dense products, padded batches."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import scalar as act

from .base import RENORM, SWIGLU_EXPERTS, Case, E, Fused, H, I, K, Rejected, Sound, experts

BF16 = torch.bfloat16


class _Stacked(Case):
    """Verdict: fused. Σ_e w_e · down_e(silu(gate_e x) * up_e x), stacked [E, 2I, H] and [E, H, I]."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "stacked"


# Gathered weights -----------------------------------------------------------------------------------------------------------


class GatherEinsum(_Stacked):
    """Verdict: fused. up[ids] and einsum."""


class GatherFlatBmm(_Stacked):
    """Verdict: fused as GatherEinsum. transformers' batched_mm: one row per (token, slot), bmm with a column vector."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        rows = x.repeat_interleave(K, dim=0)
        flat = ids.reshape(-1)
        g, u = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        y = torch.bmm(self.down[flat], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1).unsqueeze(-1)).view(-1, K, H).sum(dim=1).to(x.dtype)


class GatherTokenIndex(_Stacked):
    """Verdict: fused as GatherEinsum. Rows through a token index arange(T)[:, None].expand(T, k)."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        token = torch.arange(x.shape[0], device=x.device).unsqueeze(1).expand(-1, K).reshape(-1)
        flat = ids.reshape(-1)
        g, u = torch.bmm(x[token].unsqueeze(1), self.up[flat].transpose(1, 2)).squeeze(1).chunk(2, dim=-1)
        y = torch.bmm((F.silu(g) * u).unsqueeze(1), self.down[flat].mT).squeeze(1)
        return torch.zeros_like(x).index_add_(0, token, y * w.reshape(-1, 1))


class GatherTensorSplit(_Stacked):
    """Verdict: fused as GatherEinsum. Gate and up by tensor_split."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).tensor_split(2, dim=-1)
        return (torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids]) * w.unsqueeze(-1)).sum(dim=1)


class GatherTensorSplitSwapped(_Stacked):
    """Verdict: fused, another function: the parts behind given places, the second is the gate."""

    expect = Fused(RENORM, replace(SWIGLU_EXPERTS, activation=act.G * act.silu(act.U)))
    near = "GatherTensorSplit"
    differs = ("experts.activation",)
    group = ""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        u, g, none = torch.einsum("th,tkoh->tko", x, self.up[ids]).tensor_split((I, 2 * I), dim=-1)
        assert none.shape[-1] == 0
        return (torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids]) * w.unsqueeze(-1)).sum(dim=1)


class GatherMatmul(_Stacked):
    """Verdict: fused as GatherEinsum. index_select and matmul broadcasting over [T, k]."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up = self.up.index_select(0, ids.flatten()).view(*ids.shape, 2 * I, H)
        down = self.down.index_select(0, ids.flatten()).view(*ids.shape, H, I)
        g, u = (up @ x[:, None, :, None]).squeeze(-1).split(I, dim=-1)
        y = (down @ (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (w.unsqueeze(1) @ y).squeeze(1)


class GatherPerSlot(_Stacked):
    """Verdict: fused as GatherEinsum. A static loop over the k slots, weights gathered per slot."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for j in range(K):
            h = torch.bmm(self.up[ids[:, j]], x.unsqueeze(2)).squeeze(2)
            g, u = h.chunk(2, -1)
            out = out + torch.bmm(self.down[ids[:, j]], (F.silu(g) * u).unsqueeze(2)).squeeze(2) * w[:, j : j + 1]
        return out


# Dense over all experts ---------------------------------------------------------------------------------------------------


class DenseBmm(_Stacked):
    """Verdict: fused as GatherEinsum. x expanded to [E, T, H], bmm, times the scattered [T, E] weights."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w)
        wide = x.unsqueeze(0).expand(E, -1, -1)
        g, u = torch.bmm(wide, self.up.transpose(1, 2)).chunk(2, dim=-1)
        y = torch.bmm(F.silu(g) * u, self.down.transpose(1, 2))
        return (y * dense.t().unsqueeze(-1)).sum(dim=0)


class DenseEinsum(_Stacked):
    """Verdict: fused as GatherEinsum. Everything an einsum, the weights a one-hot contraction."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        dense = torch.einsum("tk,tke->te", w, F.one_hot(ids, E).to(w.dtype))
        g, u = torch.einsum("th,eoh->teo", x, self.up).chunk(2, dim=-1)
        return torch.einsum("tei,ehi,te->th", F.silu(g) * u, self.down, dense)


class DenseRepeat(_Stacked):
    """Verdict: fused as GatherEinsum. x.repeat(E, 1).view(E, T, H), out summed over dim 0."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        dense = torch.zeros_like(self.logits(x)).scatter_(1, ids, w)
        wide = x.repeat(E, 1).view(E, -1, H)
        g, u = (wide @ self.up.mT).chunk(2, dim=2)
        y = (F.silu(g) * u) @ self.down.mT
        return torch.sum(y * dense.transpose(0, 1)[:, :, None], dim=0)


class DenseThenGather(_Stacked):
    """Verdict: fused as GatherEinsum. All experts run, the k results of a token are gathered."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,eoh->teo", x, self.up).chunk(2, dim=-1)
        y = torch.einsum("tei,ehi->teh", F.silu(g) * u, self.down)
        picked = y.gather(1, ids.unsqueeze(-1).expand(-1, -1, H))
        return torch.einsum("tkh,tk->th", picked, w)


class InputScaledDense(Case):
    """Verdict: fused, weight_on_input. llama4: tokens times their dense weights enter the experts, results summed."""

    expect = Fused(RENORM, replace(experts(), weight_on_input=True, up_transposed=True, down_transposed=True))
    near, differs = "GatherEinsum", ("experts.down_transposed", "experts.up_transposed", "experts.weight_on_input")

    def build_experts(self, n: int) -> None:
        self.up = nn.Parameter(torch.randn(n, H, 2 * I) * 0.4)
        self.down = nn.Parameter(torch.randn(n, I, H) * 0.4)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w)
        wide = x.repeat(E, 1) * dense.transpose(0, 1).reshape(-1, 1)
        g, u = torch.bmm(wide.view(E, -1, H), self.up).chunk(2, dim=-1)
        y = torch.bmm(u * F.silu(g), self.down)
        return y.view(E, -1, H).sum(dim=0)


# Sorted tokens, grouped products ------------------------------------------------------------------------------------------


class _Grouped(Case):
    """Verdict: fused. bf16, since F.grouped_mm is traced in bf16 only."""

    dtype: ClassVar[torch.dtype] = BF16
    expect = Fused(replace(RENORM, weight_dtype=BF16), experts(dtype=BF16))
    group = "grouped-mm"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = logits.softmax(-1, dtype=torch.float).topk(K)
        return (w / w.sum(-1, keepdim=True)).to(logits.dtype), ids

    def product(self, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(a, b, offs=ends)


class GroupedSorted(_Grouped):
    """Verdict: fused. transformers' grouped_mm: sort ids, histc counts, cumsum, two grouped products, inverse order, view, sum."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        sorted_ids, order = torch.sort(flat)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0), device=order.device)
        counts = torch.histc(sorted_ids.int().float(), bins=E, min=0, max=E - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        g, u = self.product(x[order // K], self.up.transpose(-2, -1), ends).chunk(2, dim=-1)
        y = self.product(F.silu(g) * u, self.down.transpose(-2, -1), ends)
        y = (y * w.reshape(-1)[order].unsqueeze(-1))[back]
        return y.view(-1, K, H).sum(dim=1).to(x.dtype)


class GroupedTitan(_Grouped):
    """Verdict: fused as GroupedSorted. torchtitan: stable argsort, gather, torch._grouped_mm, scatter_add."""

    def product(self, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(a, b, offs=ends)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        flat = ids.view(-1)
        counts = torch.bincount(flat, minlength=E)
        order = torch.argsort(flat, stable=True)
        rows = (order // K).reshape(-1, 1).expand(-1, H)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        g, u = self.product(torch.gather(x, 0, rows), self.up.mT, ends).chunk(2, -1)
        y = self.product(F.silu(g) * u, self.down.mT, ends)
        y = (y.float() * w.view(-1)[order].reshape(-1, 1).float()).to(x.dtype)
        return torch.zeros_like(x).scatter_add(0, rows, y)


class GroupedArgsortTwice(_Grouped):
    """Verdict: fused as GroupedSorted. The inverse order is the argsort of the order; counts from one_hot."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        order = ids.flatten().argsort()
        ends = F.one_hot(ids.flatten(), E).sum(0).cumsum(0).to(torch.int32)
        rows = x.unsqueeze(1).expand(-1, K, -1).reshape(-1, H)[order]
        g, u = self.product(rows, self.up.transpose(1, 2), ends).chunk(2, -1)
        y = self.product(F.silu(g) * u, self.down.transpose(1, 2), ends)
        return (y[order.argsort()].view(-1, K, H) * w.unsqueeze(-1)).sum(1)


class SortedPadded(_Stacked):
    """Verdict: fused as GatherEinsum. Padded bmm without dropping: each expert's tokens in a [E, T·k, H] batch."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        flat = ids.flatten()
        hot = F.one_hot(flat, E)
        place = (hot.cumsum(0) * hot).sum(1) - 1  # which of its expert's rows a (token, slot) is
        rows = x.repeat_interleave(K, 0)
        batch = torch.zeros(E, flat.shape[0], H, dtype=x.dtype)
        batch[flat, place] = rows
        g, u = torch.bmm(batch, self.up.mT).chunk(2, -1)
        y = torch.bmm(F.silu(g) * u, self.down.mT)[flat, place]
        return (y.view(-1, K, H) * w[..., None]).sum(1)


class SortedSegments(_Stacked):
    """Verdict: fused as GatherEinsum. Sorted pairs, weights gathered by the sorted ids."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        expert = flat[order]
        rows = x[order // K]
        g, u = torch.einsum("nh,noh->no", rows, self.up[expert]).chunk(2, -1)
        y = torch.einsum("ni,nhi->nh", F.silu(g) * u, self.down[expert])
        return torch.zeros_like(x).index_add_(0, order // K, y * w.flatten()[order, None])


# Tokens [B, T, H], flattened inside -----------------------------------------------------------------------------------------


class SortedBatched(SortedSegments):
    """Verdict: fused as GatherEinsum. SortedSegments on two sequences: the token of a row is order // k, its sequence order // (k T)."""

    def example_inputs(self, tokens: int = 7) -> tuple[Tensor, ...]:
        return (torch.randn(2, tokens, H, dtype=self.dtype),)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, H)
        w, ids = self.route(self.logits(rows))
        return self.run_experts(rows, ids, w).view(x.shape)


class SortedBatchedRepeated(SortedBatched):
    """Verdict: fused as GatherEinsum. Rows repeated k times before they are sorted, put back in their order, summed over the slots."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        order = ids.view(-1).argsort(stable=True)
        expert = ids.view(-1)[order]
        g, u = torch.einsum("nh,noh->no", x.repeat_interleave(K, 0)[order], self.up[expert]).chunk(2, -1)
        y = torch.einsum("ni,nhi->nh", F.silu(g) * u, self.down[expert]) * w.view(-1)[order, None]
        back = torch.zeros(ids.numel(), H)
        back[order] = y
        return back.view(-1, K, H).sum(1)


class SortedBatchedTurned(SortedBatched):
    """Verdict: either, as long as results are eager's: the router reads [B, T], the experts' rows are those of [T, B], another tensor."""

    expect = Sound()
    group = ""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x.view(-1, H)))
        return self.run_experts(x.transpose(0, 1).reshape(-1, H), ids, w).view(x.shape)


class GroupedBatched(GroupedTitan):
    """Verdict: fused as GroupedSorted. GroupedTitan on two sequences."""

    example_inputs = SortedBatched.example_inputs
    forward = SortedBatched.forward


class DenseRepeatedRows(_Stacked):
    """Verdict: fused as GatherEinsum. Every expert gets a copy of all rows, taken by torch.gather with a computed index."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        tokens = x.shape[0]
        scores = torch.zeros(tokens, E).scatter(1, ids, w).t()
        token = torch.arange(tokens).view(1, -1).expand(E, -1).reshape(-1, 1)
        rows = torch.gather(x, 0, self.order(token).expand(-1, H)).view(E, -1, H)
        g, u = torch.bmm(rows, self.up.mT).chunk(2, -1)
        y = torch.bmm(F.silu(g) * u, self.down.mT) * scores[..., None]
        return torch.zeros_like(x).scatter_add(0, token.expand(-1, H), y.reshape(-1, H))

    def order(self, token: Tensor) -> Tensor:
        return token


class DenseShiftedRows(DenseRepeatedRows):
    """Verdict: rejected. One step from DenseRepeatedRows: the copies are out of step with the tokens, expert by expert."""

    expect = Rejected()
    group, near = "", "DenseRepeatedRows"

    def order(self, token: Tensor) -> Tensor:
        n = token.shape[0] // E
        return (token + torch.arange(E).repeat_interleave(n)[:, None]) % n
