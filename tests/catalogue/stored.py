"""Expert weights in floats of one byte with scales of blocks, channels or matrices, in every way people write the dequantisation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ir import Form, Rows, Stored
from moe_compile.ir.stored import Scale

from .base import RENORM, SWIGLU_EXPERTS, Case, E, Fused, H, I, K, Rejected
from .dispatch import GroupedSorted
from .quantised import Int8Grouped

F8, E8 = torch.float8_e4m3fn, torch.float8_e8m0fnu
B = 4  # rows and columns of a block, where checkpoints have 128
BLOCKS = Stored(8, F8, rows=B, columns=B)
STORED = replace(SWIGLU_EXPERTS, up_stored=BLOCKS, down_stored=BLOCKS)
FLOATS = replace(SWIGLU_EXPERTS, stacked=False)  # that the graph makes of the codes of each expert


def storing(how: Stored, **kw: Any) -> Fused:
    return Fused(RENORM, replace(SWIGLU_EXPERTS, up_stored=how, down_stored=how, **kw))


class _Blocks(Case):
    """Stacked codes and scales in a loop over all experts; subclasses say how one matrix is made of floats."""

    expect = Fused(RENORM, STORED)
    how = BLOCKS

    def to(self, dtype: torch.dtype) -> _Blocks:  # type: ignore[override]
        """Codes and scales keep their types."""
        for p in (self.gate, self.bias):
            p.data = p.data.to(dtype)
        return self

    def build_experts(self, n: int) -> None:
        for name, shape in (("up", (2 * I, H)), ("down", (H, I))):
            self.register_buffer(name, (torch.randn(n, *shape) * 20).to(self.how.dtype))
            self.register_buffer(f"{name}_scale_inv", self.scales(n, *self.how.scales_of(shape)))

    def scales(self, *shape: int) -> Tensor:
        return (torch.rand(*shape) + 0.3) / 40

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_scale": [self.up_scale_inv], "down_scale": [self.down_scale_inv]}

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return q.float() * s.repeat_interleave(B, 0).repeat_interleave(B, 1)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.floats(self.up[e], self.up_scale_inv[e])).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.floats(self.down[e], self.down_scale_inv[e]))

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


class BlocksRepeated(_Blocks):
    """Verdict: fused. Scales are repeated along both dims."""

    group = "blocks"


class BlocksViewed(_Blocks):
    """Verdict: fused as BlocksRepeated. Codes are seen block by block, and back."""

    group = "blocks"

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        n, k = s.shape
        return (q.float().view(n, B, k, B) * s[:, None, :, None]).view(n * B, k * B)


class BlocksLookedUp(_Blocks):
    """Verdict: fused as BlocksRepeated. The scale of row i and column j is looked up at i // B, j // B."""

    group = "blocks"

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[0]) // B, torch.arange(q.shape[1]) // B
        return q.float() * s[i][:, j]


class BlocksKron(_Blocks):
    """Verdict: fused as BlocksRepeated. A Kronecker product with ones."""

    group = "blocks"

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return q.float() * torch.kron(s, torch.ones(B, B))


class BlocksRagged(_Blocks):
    """Verdict: fused. Blocks of 3 in sizes that 3 does not divide: repeated scales are cut."""

    how = Stored(8, F8, rows=3, columns=3)
    expect = storing(how)
    near = "BlocksRepeated"
    differs = tuple(f"experts.{p}_stored.{d}" for p in ("down", "up") for d in ("columns", "rows"))

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return q.float() * s.repeat_interleave(3, 0).repeat_interleave(3, 1)[: q.shape[0], : q.shape[1]]


class BlocksE8M0(_Blocks):
    """Verdict: fused as BlocksRepeated. Scales are powers of two, of one byte."""

    group = "blocks"

    def scales(self, *shape: int) -> Tensor:
        return torch.exp2(torch.randint(-8, -3, shape).float()).to(E8)

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return super().floats(q, s.float())


class BlocksHitExperts(_Blocks):
    """Verdict: fused as BlocksRepeated. transformers' loop over the experts that were hit, which no graph holds: read by example."""

    group = "blocks"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for hit in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            e = hit[0]
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


class BlocksBatched(_Blocks):
    """Verdict: fused as BlocksRepeated. All experts' floats at once, bmm, dense weights."""

    group = "blocks"

    def all_floats(self, q: Tensor, s: Tensor) -> Tensor:
        return (q.float().unflatten(-1, (-1, B)).unflatten(-3, (-1, B)) * s[..., :, None, :, None]).reshape(q.shape)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up, down = self.all_floats(self.up, self.up_scale_inv), self.all_floats(self.down, self.down_scale_inv)
        g, u = torch.bmm(x.expand(E, -1, -1), up.transpose(1, 2)).chunk(2, -1)
        y = torch.bmm(F.silu(g) * u, down.transpose(1, 2))
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)
        return (y * dense.t()[..., None]).sum(0)


class BlocksGathered(BlocksBatched):
    """Verdict: fused as BlocksRepeated. Codes and scales are looked up by the ids."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,tkoh->tko", x, self.all_floats(self.up[ids], self.up_scale_inv[ids])).chunk(2, -1)
        y = torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.all_floats(self.down[ids], self.down_scale_inv[ids]))
        return (y * w[..., None]).sum(1)


class BlocksGrouped(BlocksBatched):
    """Verdict: fused. Sorted rows, grouped products of all experts' floats in bf16."""

    expect = Fused(GroupedSorted.expect.gating, replace(STORED, dtype=torch.bfloat16))
    group = ""
    dtype = torch.bfloat16
    faint_logits = False

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        _, order, ends = Int8Grouped.sorted_ids(self, ids)  # type: ignore[arg-type]
        up, down = (self.all_floats(q, s).to(x.dtype).transpose(-2, -1) for q, s in self.stacks())
        g, u = F.grouped_mm(x[order // K], up, offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(g) * u, down, offs=ends) * w.reshape(-1)[order].unsqueeze(-1)
        return y[order.argsort()].view(-1, K, H).sum(dim=1)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return GroupedSorted.route(self, logits)  # type: ignore[arg-type]

    def stacks(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.up, self.up_scale_inv), (self.down, self.down_scale_inv)]


class GroupsOfInputs(_Blocks):
    """Verdict: fused. A power of two for every four inputs of a channel (MXFP8)."""

    how = Stored(8, F8, rows=1, columns=B)
    expect = storing(how)
    scales = BlocksE8M0.scales

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return (q.float().unflatten(-1, (-1, B)) * s.float()[..., None]).flatten(-2)


class Float8Channels(_Blocks):
    """Verdict: fused. A scale for each output channel, which multiplies the sum."""

    how = Stored(8, F8, rows=1)
    expect = storing(how)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = (F.linear(x, self.up[e].to(x.dtype)) * self.up_scale_inv[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e].to(x.dtype)) * self.down_scale_inv[e]


class Float8Matrices(_Blocks):
    """Verdict: fused. One number for each matrix."""

    how = Stored(8, F8)
    expect = storing(how)

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return q.float() * s


class WiderFloat8(_Blocks):
    """Verdict: fused, other codes: e5m2 has more range and fewer digits than e4m3."""

    how = replace(BLOCKS, dtype=torch.float8_e5m2)
    expect = storing(how)


class OtherZeros(_Blocks):
    """Verdict: fused, other codes: e4m3fnuz has another bias of the exponent than e4m3fn, and half the numbers for the same bytes."""

    how = replace(BLOCKS, dtype=torch.float8_e4m3fnuz)
    expect = storing(how)


class EmptyBlocks(_Blocks):
    """Verdict: fused as BlocksRepeated. Some blocks have codes and scales of zero."""

    group = "blocks"

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for name in ("up", "down"):
            q, s = getattr(self, name).float(), getattr(self, f"{name}_scale_inv")
            q[:, :B, B:], s[:, 0, 1:] = 0, 0
            setattr(self, name, q.to(F8))


class GateAndUpApart(_Blocks):
    """Verdict: fused. Gate and up are two tensors with grids of their own, in blocks that do not divide the intermediate size."""

    how = Stored(8, F8, rows=3, columns=3)
    expect = storing(how, form=Form.SEPARATE)
    floats = BlocksRagged.floats

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for name in ("gate_codes", "up"):
            self.register_buffer(name, (torch.randn(n, I, H) * 20).to(F8))
        for name in ("gate_scale_inv", "up_scale_inv"):
            self.register_buffer(name, self.scales(n, *self.how.scales_of((I, H))))

    def weights(self) -> dict[str, list[Tensor]]:
        both = {"up": [self.gate_codes, self.up], "up_scale": [self.gate_scale_inv, self.up_scale_inv]}
        return super().weights() | both

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = (F.linear(x, self.floats(q[e], s[e])) for q, s in zip(self.weights()["up"], self.weights()["up_scale"], strict=True))
        return F.linear(F.silu(g) * u, self.floats(self.down[e], self.down_scale_inv[e]))


# ---- near misses: the weights are floats that the graph computes ------------------------------------------------------------------


class _Floats(_Blocks):
    """Another function of codes and scales, which no storage says."""

    expect = Fused(RENORM, FLOATS)
    near, differs = "BlocksRepeated", ("experts.down_stored", "experts.stacked", "experts.up_stored")

    def weights(self) -> dict[str, list[Tensor]]:
        stacks = ((self.up, self.up_scale_inv), (self.down, self.down_scale_inv))
        return {name: [self.floats(q[e], s[e]) for e in range(E)] for name, (q, s) in zip(("up", "down"), stacks, strict=True)}


class GridTransposed(_Floats):
    """Verdict: fused, the weights being floats. The grid of scales lies with rows and columns exchanged, which square matrices hide."""

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for name in ("up_scale_inv", "down_scale_inv"):
            setattr(self, name, getattr(self, name).transpose(-2, -1).contiguous())

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return super().floats(q, s.t())


class BlocksDivided(_Blocks):
    """Verdict: fused, another function: the scale divides."""

    how = replace(BLOCKS, scaled=Scale.DIVIDES)
    expect = storing(how)
    near, differs = "BlocksRepeated", ("experts.down_stored.scaled", "experts.up_stored.scaled")

    def scales(self, *shape: int) -> Tensor:
        return (torch.rand(*shape) + 0.3) * 40

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return q.float() / s.repeat_interleave(B, 0).repeat_interleave(B, 1)


class OneGridForTwo(_Floats):
    """Verdict: fused, the weights being floats. Blocks begin anew at the up half, in blocks that do not divide the intermediate size."""

    how = Stored(8, F8, rows=3, columns=3)

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.register_buffer("up_scale_inv", self.scales(n, 2 * -(-I // 3), -(-H // 3)))

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        if q.shape != (2 * I, H):
            return BlocksRagged.floats(self, q, s)  # type: ignore[arg-type]
        spread = s.repeat_interleave(3, 1)[:, :H].repeat_interleave(3, 0)
        half = spread.shape[0] // 2
        return q.float() * torch.cat([spread[:I], spread[half : half + I]])


class BytesAsScales(_Floats):
    """Verdict: fused, the weights being floats. Scales are bytes that are read as numbers, not as exponents."""

    def scales(self, *shape: int) -> Tensor:
        return torch.randint(1, 256, shape).to(torch.uint8)

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return super().floats(q, s.float() / 4000)


class CodedRowsInFloat8(_Blocks):
    """Verdict: fused, other rows: those of the first product are rounded to float8, by a scale of each row's own."""

    expect = Fused(RENORM, replace(STORED, up_rows=Rows(8, F8, floor=1e-12 / 448)))
    near, differs = "BlocksRepeated", ("experts.up_rows",)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        s = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
        return super().expert(e, (x / s).to(F8).float() * s)


class CodedResultsInFloat8(_Blocks):
    """Verdict: rejected. The weighted result of an expert is rounded to float8."""

    expect = Rejected("float8_e4m3fn")
    near = "BlocksRepeated"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, (self.expert(e, x[token]) * w[token, slot, None]).to(F8).float())
        return out
