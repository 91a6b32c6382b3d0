"""Expert loops: type A (static, dense), B (static loop, dynamic sizes), C (control flow that reads routing data).

The routing is RenormDiv's throughout; weights are stacked or a ModuleList as each style has them in the wild.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import LIST_EXPERTS, RENORM, SHARED, SOFTMAX, SWIGLU_EXPERTS, Case, E, Fused, K, ListCase, Rejected, Sound, mlp


class _Stacked(Case):
    """Verdict: fused. Σ_e w_e · down_e(silu(gate_e x) * up_e x), stacked [E, 2I, H] and [E, H, I]."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "stacked"


class _List(ListCase):
    """Verdict: fused. The same on a ModuleList of w1, w2, w3 Linears."""

    expect = Fused(RENORM, LIST_EXPERTS)
    group = "list"


class _Module(nn.Module):
    """Experts in a module of their own, called with (tokens, ids, weights), as transformers has them."""

    def __init__(self, up: nn.Parameter, down: nn.Parameter) -> None:
        super().__init__()
        self.up, self.down, self.num_experts = up, down, up.shape[0]


# A: static and dense -----------------------------------------------------------------------------------------------------


class DenseLoopScatter(_Stacked):
    """Verdict: fused. Type A. Every expert runs every token, times a column of the scattered [T, E] weights."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)
        out = torch.zeros_like(x)
        for e in range(E):
            out = out + mlp(x, self.up[e], self.down[e]) * dense[:, e : e + 1]
        return out


class DenseLoopMaskSum(_Stacked):
    """Verdict: fused as DenseLoopScatter. Type A. The weight of expert e is the sum of w over slots where ids == e."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            out += mlp(x, self.up[e], self.down[e]) * (w * (ids == e)).sum(-1, keepdim=True)
        return out


class DenseLoopWhere(_Stacked):
    """Verdict: fused as DenseLoopScatter. Type A. where(ids == e, w, 0) and no accumulator: sum over a stack."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        ys = [mlp(x, self.up[e], self.down[e]) * torch.where(ids == e, w, 0.0).sum(1)[:, None] for e in range(E)]
        return torch.stack(ys).sum(0)


class DenseLoopOneHot(_List):
    """Verdict: fused. Type A, vLLM's iterative form: one-hot weights contracted over the slots, ModuleList."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        dense = torch.einsum("tk,tke->te", w, F.one_hot(ids, E).to(w.dtype))
        out = None
        for e, expert in enumerate(self.experts):
            y = expert(x).mul_(dense[:, e].unsqueeze(1))
            out = y if out is None else out.add_(y)
        assert out is not None
        return out


class DenseLoopBuiltinSum(_List):
    """Verdict: fused as DenseLoopOneHot. Type A. Python's sum(), from the integer 0."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return sum(expert(x) * ((ids == e) * w).sum(-1, keepdim=True) for e, expert in enumerate(self.experts))  # type: ignore[return-value]


# B: static loop, dynamic sizes ---------------------------------------------------------------------------------------------


class LoopWhereOneHot(_List):
    """Verdict: fused as DenseLoopOneHot. Type B, transformers 4: one-hot mask, torch.where, index_add_ for every expert."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            y = self.experts[e](x[None, token].reshape(-1, x.shape[1])) * w[token, slot, None]
            out.index_add_(0, token, y.to(x.dtype))
        return out


class LoopWhereStacked(_Stacked):
    """Verdict: fused as DenseLoopScatter. Type B. torch.where(ids == e) on stacked weights."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            y = mlp(x[token], self.up[e], self.down[e])
            out.index_add_(0, token, y * w[token, slot, None])
        return out


class LoopNonzero(_Stacked):
    """Verdict: fused as DenseLoopScatter. Type B. nonzero(as_tuple=False) and unbind; out-of-place index_add."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = (ids == e).nonzero().unbind(1)
            y = mlp(x.index_select(0, token), self.up[e], self.down[e])
            out = out.index_add(0, token, w[token, slot].unsqueeze(-1) * y)
        return out


class LoopOneHotSentinel(_Stacked):
    """Verdict: fused as DenseLoopScatter. Type B. one_hot over E + 1 classes, the last never met."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E + 1).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            g, u = F.linear(x[token], self.up[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(g) * u, self.down[e]) * w[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class LoopBoolMask(_List):
    """Verdict: fused as DenseLoopOneHot. Type B, DeepSeek's training form: tokens repeated k times, bool masks, view and sum."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        flat = ids.view(-1)
        rep = x.repeat_interleave(K, dim=0)
        y = torch.empty_like(rep)
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(rep[flat == e]).to(y.dtype)
        return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1).to(x.dtype)


class LoopLitGpt(_List):
    """Verdict: fused as DenseLoopOneHot. Type B, lit-gpt: masks of all experts from one comparison, out[token] += ..."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        masks = ids.unsqueeze(-1) == torch.arange(E, device=x.device)
        out = torch.zeros_like(x)
        for mask, expert in zip(masks.permute(2, 0, 1), self.experts):
            token, slot = torch.where(mask)
            out[token] += w[token, slot, None] * expert(x[token])
        return out


class LoopSplitCat(_List):
    """Verdict: fused as DenseLoopOneHot. Type B: argsort, bincount().tolist(), split, one expert a piece, cat, back."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        order = ids.flatten().argsort()
        sizes = torch.bincount(ids.flatten(), minlength=E).tolist()
        pieces = x[order // K].split(sizes)
        y = torch.cat([expert(piece) for expert, piece in zip(self.experts, pieces)])
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(-1, K, x.shape[1]) * w[..., None]).sum(1)


class LoopJetMoe(_Stacked):
    """Verdict: fused as DenseLoopScatter. Type B, jetmoe: sort, counts as a list, split, F.linear per piece, cat, index_add."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        flat = ids.flatten()
        _, order = flat.sort(0)
        gates = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, 1)
        sizes = gates.long().sum(0).tolist()
        batch = order.div(K, rounding_mode="trunc")
        pieces = x[batch].split(sizes, dim=0)
        hidden = torch.cat([F.linear(pieces[e], self.up[e]) for e in range(E)], dim=0)
        g, u = hidden.chunk(2, dim=-1)
        pieces = (F.silu(g) * u).split(sizes, dim=0)
        y = torch.cat([F.linear(pieces[e], self.down[e]) for e in range(E)], dim=0)
        return torch.zeros_like(x).index_add(0, batch, y * w.flatten()[order][:, None])


# C: control flow that reads routing data -----------------------------------------------------------------------------------


class _HitExperts(_Module):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(ids, num_classes=self.num_experts + 1).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            if e == self.num_experts:
                continue
            slot, token = torch.where(mask[e])
            g, u = F.linear(x[token], self.up[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(g) * u, self.down[e]) * w[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class LoopHit(_Stacked):
    """Verdict: fused as DenseLoopScatter. Type C, transformers 5: `for e in nonzero(...)`, weights indexed by a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _HitExperts(self.up, self.down)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return self.block(x, ids, w)


class _NumelExperts(_Module):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None])
        return out


class LoopNumel(_Stacked):
    """Verdict: fused as DenseLoopScatter. Type C. `if token.numel() == 0: continue`."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _NumelExperts(self.up, self.down)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return self.block(x, ids, w)


class LoopItem(_Stacked):
    """Verdict: fused as DenseLoopScatter. Type C, in the block's own method: `.unique()` and `.item()`."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for hit in ids.unique():
            e = int(hit.item())
            token, slot = torch.where(ids == e)
            out[token] += mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None]
        return out


class LoopMaskAny(_List):
    """Verdict: fused as DenseLoopOneHot. Type C, makeMoE: `if mask.any()` on a [T] mask of every expert."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                out[mask] += expert(x[mask]) * dense[mask, e].unsqueeze(1)
        return out


class LoopMaskAnyPicked(_List):
    """Verdict: fused as DenseLoopOneHot. Type C, MiniMind's training: tokens by `mask.any(-1)`, weights by the [T, k] mask itself. A token
    has an expert once, so both pick as many rows in one order."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                token = mask.any(dim=-1).nonzero().flatten()
                out.index_add_(0, token, expert(x[token]) * w[mask].view(-1, 1))
            else:
                out[0, 0] += 0 * sum(p.sum() for p in expert.parameters())
        return out


class PickedFromTheLast(_List):
    """Verdict: fused as written, or left (near miss of LoopMaskAnyPicked). The mask picks the same weights, but from the last token on."""

    expect = Sound()
    near = "LoopMaskAnyPicked"
    group = ""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            token = mask.any(dim=-1).nonzero().flatten()
            out.index_add_(0, token, expert(x[token]) * w.flip(0)[mask.flip(0)].view(-1, 1))
        return out


class LoopMaskSum(_List):
    """Verdict: fused as DenseLoopOneHot. Type C: `if mask.sum() == 0: continue`."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.sum() == 0:
                continue
            token, slot = mask.nonzero(as_tuple=True)
            out[token] = out[token] + expert(x[token]) * w[token, slot].unsqueeze(-1)
        return out


class LoopHitModuleList(_List):
    """Verdict: fused as DenseLoopOneHot. Type C, late transformers 4: hit experts as numbers into a ModuleList."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        hit = (mask.sum(dim=(-1, -2)) > 0).nonzero(as_tuple=True)[0].tolist()
        for e in hit:
            slot, token = torch.where(mask[e])
            y = self.experts[e](x[token]) * w[token, slot, None]
            out.index_add_(0, token, y)
        return out


class LoopRootFrame(_List):
    """Verdict: fused as DenseLoopOneHot. Type C. Router and loop in one forward, as Mixtral had it in transformers 4."""

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.gate)
        w = F.softmax(logits, dim=1, dtype=torch.float)
        w, ids = torch.topk(w, K, dim=-1)
        w /= w.sum(dim=-1, keepdim=True)
        w = w.to(x.dtype)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            if token.numel() > 0:
                y = self.experts[e](x[None, token].reshape(-1, x.shape[-1])) * w[token, slot, None]
                out.index_add_(0, token, y.to(x.dtype))
        return out


class LoopRootShape(_List):
    """Verdict: fused as DenseLoopOneHot. Type C. Router and loop in one forward, which keeps a number of rows and asks for that."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.gate).softmax(-1).topk(K)
        w = w / w.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            n = token.shape[0]
            if not n:
                continue
            out.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return out


class LoopRootRows(_List):
    """Verdict: fused as DenseLoopOneHot. Type C. Nothing but `if y.shape[0] > 0` in a loop over masks asks for what depends on data."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.gate).softmax(-1).topk(K, sorted=False)
        w = w / w.sum(-1, keepdim=True)
        rows, flat = x.repeat_interleave(K, dim=0), ids.view(-1)
        out = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            y = expert(rows[flat == e])
            if y.shape[0] > 0:
                out[flat == e] = y.to(out.dtype)
        return (out.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


class LoopRootFewLeftOut(_List):
    """Verdict: rejected. As LoopRootShape, but an expert with few rows is left out too."""

    expect = Rejected()
    group = ""
    near = "LoopRootShape"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.gate).softmax(-1).topk(K)
        w = w / w.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            if token.shape[0] > 12:
                out.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return out


class NanoCapacity(_Stacked):
    """Verdict: rejected. nanoMoE: experts have a capacity, tokens over it are dropped, so a row depends on the others."""

    expect = Rejected()
    group = ""
    near = "DenseLoopScatter"
    capacity = 2

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        hot = F.one_hot(ids.t().reshape(-1), E)  # first choices first
        rank = (hot.cumsum(0) - 1) * hot
        keep = ((rank < self.capacity) * hot).view(K, -1, E)
        position = (rank * hot).sum(-1).view(K, -1)
        place = F.one_hot(position, self.capacity + x.shape[0])[..., : self.capacity]
        combine = torch.einsum("tk,kte,ktc->tec", w, keep.to(w.dtype), place.to(w.dtype))
        batch = torch.einsum("tec,th->ech", (combine != 0).to(x.dtype), x)
        g, u = torch.bmm(batch, self.up.transpose(1, 2)).chunk(2, dim=-1)
        return torch.einsum("tec,ech->th", combine, torch.bmm(F.silu(g) * u, self.down.transpose(1, 2)))


class LoopOntoShared(_List):
    """Verdict: fused, the first expert twice. Rows are added in place to its own output, which is that of a shared expert here."""

    expect = Fused(RENORM, LIST_EXPERTS, SHARED)
    group = ""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = self.experts[0](x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += expert(x[token]) * w[token, slot, None]
        return out

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": self.experts[0](x)}


class EndsAsNumbers(Case):
    """Verdict: fused. Rows lie sorted by expert, and Python makes a number of each expert's end, ``int(ends[e])``."""

    expect = Fused(SOFTMAX, SWIGLU_EXPERTS)
    moves = True

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = logits.softmax(-1).topk(K, dim=-1)
        return w, ids

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        ends = torch.histc(ids.float(), E, 0, E - 1).long().cumsum(0)
        rows = x.index_select(0, order // K)
        y, first = torch.zeros_like(rows), 0
        for e in range(E):
            last = int(ends[e])
            y[first:last] = mlp(rows[first:last], self.up[e], self.down[e])
            first = last if self.moves else first
        return torch.zeros_like(x).index_add(0, order // K, y * w.flatten()[order, None])


class EndsThatDoNotMove(EndsAsNumbers):
    """Verdict: either. Every expert's rows begin with the first, so that only the last one's are left."""

    expect, near = Sound(), "EndsAsNumbers"
    moves = False
