"""Expert weights stored in int8 with scales of their output channels, and what looks like it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import Form, Rows, Stored
from moe_compile.ir import scalar as act

from .base import RENORM, SWIGLU_EXPERTS, Case, E, Fused, H, I, K, Rejected, Sound
from .dispatch import GroupedSorted

CHANNELS, COLUMNS, WHOLE = Stored(8, torch.int8, rows=1), Stored(8, torch.int8, columns=1), Stored(8, torch.int8)
INT8 = replace(SWIGLU_EXPERTS, up_stored=CHANNELS, down_stored=CHANNELS)


def stored(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape).to(torch.int8)


def scales(*shape: int) -> Tensor:
    return (torch.rand(*shape) + 0.1) / 160


class _Int8(Case):
    """Stacked int8 buffers in a loop; subclasses say what `expert` e is."""

    def build_experts(self, n: int) -> None:
        self.register_buffer("up", stored(n, 2 * I, H))
        self.register_buffer("up_scale", scales(n, 2 * I))
        self.register_buffer("down", stored(n, H, I))
        self.register_buffer("down_scale", scales(n, H))

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_scale": [self.up_scale], "down_scale": [self.down_scale]}

    def expert(self, e: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


class Int8WeightTimesScale(_Int8):
    """Verdict: fused. The weight is made floats, scaled, and multiplied."""

    expect = Fused(RENORM, INT8)
    group = "int8"

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e].to(x.dtype) * self.up_scale[e][:, None]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e].to(x.dtype) * self.down_scale[e][:, None])


class Int8SumTimesScale(Int8WeightTimesScale):
    """Verdict: fused as Int8WeightTimesScale. The product's result is scaled."""

    near, differs = "StackedOutIn", ("experts.down_stored", "experts.up_stored")

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = (F.linear(x, self.up[e].to(x.dtype)) * self.up_scale[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e].to(x.dtype)) * self.down_scale[e]


class Int8HitExperts(Int8SumTimesScale):
    """Verdict: fused as Int8WeightTimesScale. transformers' loop over the experts that were hit, which no graph holds: read by example."""

    near, differs = "", ()

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for hit in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            e = hit[0]
            slot, token = torch.where(mask[e])
            g, u = F.linear(x[token], self.up[e].to(x.dtype) * self.up_scale[e][:, None]).chunk(2, -1)
            y = F.linear(F.silu(g) * u, self.down[e].to(x.dtype)) * self.down_scale[e]
            out.index_add_(0, token, y * w[token, slot, None])
        return out


class Int8Batched(Int8WeightTimesScale):
    """Verdict: fused as Int8WeightTimesScale. bmm over all experts, scales [E, out] seen as [E, out, 1], dense weights."""

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.up.to(x.dtype) * self.up_scale.unsqueeze(-1), self.down.to(x.dtype) * self.down_scale.unsqueeze(-1)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up, down = self.matrices(x)
        g, u = torch.bmm(x.expand(E, -1, -1), up.transpose(1, 2)).chunk(2, -1)
        y = torch.bmm(F.silu(g) * u, down.transpose(1, 2))
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)
        return (y * dense.t()[..., None]).sum(0)


class Int8Gathered(Int8WeightTimesScale):
    """Verdict: fused as Int8WeightTimesScale. Weights and scales are looked up by the ids."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up = self.up[ids].to(x.dtype) * self.up_scale[ids].unsqueeze(-1)
        g, u = torch.einsum("th,tkoh->tko", x, up).chunk(2, -1)
        y = torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids].to(x.dtype)) * self.down_scale[ids]
        return (y * w[..., None]).sum(1)


class Int8InOut(_Int8):
    """Verdict: fused, both weights transposed: [E, in, out] with scales [E, 1, out]."""

    expect = Fused(RENORM, replace(SWIGLU_EXPERTS, up_transposed=True, down_transposed=True, up_stored=COLUMNS, down_stored=COLUMNS))
    near = "Int8WeightTimesScale"
    differs = tuple(f"experts.{p}_{what}" for p in ("down", "up") for what in ("stored.columns", "stored.rows", "transposed"))

    def build_experts(self, n: int) -> None:
        self.register_buffer("up", stored(n, H, 2 * I))
        self.register_buffer("up_scale", scales(n, 1, 2 * I))
        self.register_buffer("down", stored(n, I, H))
        self.register_buffer("down_scale", scales(n, 1, H))

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_scale": [self.up_scale[:, 0]], "down_scale": [self.down_scale[:, 0]]}

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            g, u = (x @ (self.up[e].to(x.dtype) * self.up_scale[e])).chunk(2, -1)
            y = (F.silu(g) * u) @ (self.down[e].to(x.dtype) * self.down_scale[e])
            out = out + y * (w * (ids == e)).sum(-1, keepdim=True)
        return out


class Int8ScaleOfTheExpert(_Int8):
    """Verdict: fused. One number for each expert, [E, 1, 1] and [E]."""

    expect = Fused(RENORM, replace(INT8, up_stored=WHOLE, down_stored=WHOLE))

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.up_scale, self.down_scale = scales(n, 1, 1), scales(n)

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_scale": [self.up_scale[:, 0]], "down_scale": [self.down_scale[:, None]]}

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e].to(x.dtype) * self.up_scale[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e].to(x.dtype) * self.down_scale[e])


class Int8Linear(nn.Module):
    """A projection with a buffer of bytes, a scale [out, 1] and a bias in floats."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.register_buffer("weight", stored(out, inner))
        self.register_buffer("scale", scales(out, 1))
        self.bias = nn.Parameter(torch.randn(out) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Int8Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = Int8Linear(H, I), Int8Linear(I, H), Int8Linear(H, I)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Int8List(Case):
    """Verdict: fused. A ModuleList of MLPs with buffers, and biases, which are not scaled."""

    expect = Fused(RENORM, replace(INT8, stacked=False, form=Form.SEPARATE, up_bias=True, down_bias=True))

    def build_experts(self, n: int) -> None:
        self.experts = nn.ModuleList([Int8Mlp() for _ in range(n)])

    def weights(self) -> dict[str, list[Tensor]]:
        ups, downs = [m.w1 for m in self.experts] + [m.w3 for m in self.experts], [m.w2 for m in self.experts]
        return {
            "up": [m.weight for m in ups],
            "down": [m.weight for m in downs],
            "up_bias": [m.bias for m in ups],
            "down_bias": [m.bias for m in downs],
            "up_scale": [m.scale[:, 0] for m in ups],
            "down_scale": [m.scale[:, 0] for m in downs],
        }

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return out


class Int8Squared(_Int8):
    """Verdict: fused. No gate, relu², the scale of the sum before the activation; [E, I, H]."""

    expect = Fused(RENORM, replace(INT8, form=Form.SINGLE, activation=act.relu(act.G) ** 2))

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.up, self.up_scale = stored(n, I, H), scales(n, I)

    def expert(self, e: int, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x, self.up[e].to(x.dtype)) * self.up_scale[e]).square()
        return F.linear(h, self.down[e].to(x.dtype)) * self.down_scale[e]


# ---- near misses -------------------------------------------------------------------------------------------------------


class _Near(Int8Batched):
    """bmm over all experts; subclasses make other matrices."""

    group = ""
    near, differs = "Int8Batched", ()


class InputChannelScale(_Near):
    """Verdict: rejected. The scale belongs to the input channels, [E, 1, in]."""

    expect = Rejected("over an input channel")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.in_scale = scales(n, H)

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.up.to(x.dtype) * self.in_scale[:, None, :], super().matrices(x)[1]


class InputChannelScaleOfDown(_Near):
    """Verdict: rejected. The down projection's scale belongs to its input channels, beside the one that the up projection has."""

    expect = Rejected("scale")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.in_scale = scales(n, I)

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().matrices(x)[0], self.down.to(x.dtype) * self.in_scale[:, None, :]


class ZeroPoint(_Near):
    """Verdict: rejected. Asymmetric: a zero point is taken off before the scale."""

    expect = Rejected("zero point")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.zero = stored(n, 2 * I)

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.up.to(x.dtype) - self.zero.to(x.dtype)[..., None]) * self.up_scale[..., None], super().matrices(x)[1]


class ScaleInGroups(_Near):
    """Verdict: fused, another storage: a scale for every four inputs of a channel, and one for each channel of the down projection."""

    expect = Fused(RENORM, replace(INT8, up_stored=Stored(8, torch.int8, rows=1, columns=4)))
    differs = ("experts.up_stored.columns",)

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.by_group = scales(n, 2 * I, H // 4)

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_scale": [self.by_group]}

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        up = self.up.to(x.dtype).view(E, 2 * I, H // 4, 4) * self.by_group[..., None]
        return up.view(E, 2 * I, H), super().matrices(x)[1]


class ScaleOfUpOnGate(_Near):
    """Verdict: rejected. The scales of gate and up have changed places."""

    expect = Rejected("not laid out like the rows")

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        s, v = self.up_scale[:, None].chunk(2, -1)
        g, u = h.chunk(2, -1)
        return g * v, u * s

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = self.halves(torch.bmm(x.expand(E, -1, -1), self.up.to(x.dtype).transpose(1, 2)))
        y = torch.bmm(F.silu(g) * u, self.matrices(x)[1].transpose(1, 2))
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)
        return (y * dense.t()[..., None]).sum(0)


class ScaleOfAnotherExpert(Int8SumTimesScale):
    """Verdict: rejected. Expert 3 is scaled by expert 2's numbers."""

    expect = Rejected("weights of another expert")
    group = ""
    near, differs = "Int8SumTimesScale", ()

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            g, u = (F.linear(x, self.up[e].to(x.dtype)) * self.up_scale[2 if e == 3 else e]).chunk(2, -1)
            y = F.linear(F.silu(g) * u, self.down[e].to(x.dtype)) * self.down_scale[e]
            out = out + y * (w * (ids == e)).sum(-1, keepdim=True)
        return out


class ScaleBehindTheActivation(ScaleOfUpOnGate):
    """Verdict: rejected. The gate is scaled after its activation."""

    expect = Rejected("behind an activation")

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        s, v = self.up_scale[:, None].chunk(2, -1)
        g, u = h.chunk(2, -1)
        return torch.tanh(g) * s, u * v


class RowsRounded(_Near):
    """Verdict: rejected. The rows are rounded to 8 bits before the first product, and a row of zeros is 0 / 0: no number."""

    expect = Rejected("disagree")

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        s = x.abs().amax(-1, keepdim=True) / 127
        return super().run_experts(torch.round(x / s) * s, ids, w)


class HiddenRowsRounded(_Near):
    """Verdict: either. The activations are rounded to 8 bits before the second product; a row of zeros is 0 / 0, but times s = 0."""

    expect = Sound()

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up, down = self.matrices(x)
        g, u = torch.bmm(x.expand(E, -1, -1), up.transpose(1, 2)).chunk(2, -1)
        h = F.silu(g) * u
        s = h.abs().amax(-1, keepdim=True) / 127
        y = torch.bmm(torch.round(h / s).to(torch.int8).to(x.dtype), down.transpose(1, 2)) * s
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)
        return (y * dense.t()[..., None]).sum(0)


class BothRowsRounded(_Near):
    """Verdict: fused, with what is done to rows. In 8 bits by max / 127 of each, before both products."""

    expect = Fused(RENORM, replace(INT8, up_rows=Rows(8, torch.int8, floor=1e-9), down_rows=Rows(8, torch.int8, floor=1e-9)))
    differs = ("experts.down_rows", "experts.up_rows")
    steps = 127

    def bytes_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        s = (rows.abs().amax(-1, keepdim=True) / self.steps).clamp(min=1e-9)
        return torch.round(rows / s).clamp(-128, 127).to(torch.int8).to(rows.dtype), s

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up, down = self.matrices(x)
        q, s = self.bytes_of(x)
        g, u = (torch.bmm(q.expand(E, -1, -1), up.transpose(1, 2)) * s).chunk(2, -1)
        q, s = self.bytes_of(F.silu(g) * u)
        y = torch.bmm(q, down.transpose(1, 2)) * s
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)
        return (y * dense.t()[..., None]).sum(0)


class BothRowsRoundedFurther(BothRowsRounded):
    """Verdict: rejected. In steps of max / 100, which no 8-bit scale is."""

    expect = Rejected("in a way that is not recovered")
    differs = ()
    steps = 100


class Int8LoopWithZeroPoint(_Int8):
    """Verdict: fused, the weights being floats that the graph computes: how they are stored is not recovered."""

    expect = Fused(RENORM, replace(SWIGLU_EXPERTS, stacked=False))
    near, differs = "Int8SumTimesScale", ("experts.down_stored", "experts.stacked", "experts.up_stored")

    def floats(self, e: int) -> tuple[Tensor, Tensor]:
        up, down = self.up[e].to(torch.float32), self.down[e].to(torch.float32)
        return (up - 3) * self.up_scale[e][:, None], down * self.down_scale[e][:, None]

    def weights(self) -> dict[str, list[Tensor]]:
        both = [self.floats(e) for e in range(E)]
        return {"up": [u for u, _ in both], "down": [d for _, d in both]}

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            up, down = self.floats(e)
            token, slot = torch.where(ids == e)
            g, u = F.linear(x[token], up).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.silu(g) * u, down) * w[token, slot, None])
        return out


# ---- grouped products --------------------------------------------------------------------------------------------------


class Int8Grouped(GroupedSorted):
    """Verdict: fused. Sorted rows, grouped products of weights made floats and scaled; scales are kept in bf16, as the tokens are."""

    expect = Fused(GroupedSorted.expect.gating, replace(INT8, dtype=torch.bfloat16))
    group = "int8-grouped"

    def build_experts(self, n: int) -> None:
        _Int8.build_experts(self, n)  # type: ignore[arg-type]

    def weights(self) -> dict[str, list[Tensor]]:
        return Case.weights(self) | {"up_scale": [self.up_scale], "down_scale": [self.down_scale]}

    def sorted_ids(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sorted_ids, order = torch.sort(ids.reshape(-1))
        counts = torch.histc(sorted_ids.float(), bins=E, min=0, max=E - 1)
        return sorted_ids, order, torch.cumsum(counts, dim=0, dtype=torch.int32)

    def products(self, rows: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        up = self.up.to(rows.dtype) * self.up_scale[..., None]
        down = self.down.to(rows.dtype) * self.down_scale[..., None]
        g, u = self.product(rows, up.transpose(-2, -1), ends).chunk(2, dim=-1)
        return self.product(F.silu(g) * u, down.transpose(-2, -1), ends)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        sorted_ids, order, ends = self.sorted_ids(ids)
        y = self.products(x[order // K], sorted_ids, ends) * w.reshape(-1)[order].unsqueeze(-1)
        return y[order.argsort()].view(-1, K, H).sum(dim=1)


class Int8GroupedSumTimesScale(Int8Grouped):
    """Verdict: fused as Int8Grouped. The scales of each row's expert multiply the products."""

    def products(self, rows: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        up, down = self.up.to(rows.dtype).transpose(-2, -1), self.down.to(rows.dtype).transpose(-2, -1)
        g, u = (self.product(rows, up, ends) * self.up_scale[ids]).chunk(2, dim=-1)
        return self.product(F.silu(g) * u, down, ends) * self.down_scale[ids]
