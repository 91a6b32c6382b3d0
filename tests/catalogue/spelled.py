"""Weights in few bits as reference code spells them: stacks of each expert's floats, products block by block, rows by numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ir import Rows, Stored

from .base import RENORM, E, Fused, H, I, Rejected
from .packed import Int4FloatZero, Int4Offset, Nf4
from .stored import F8, STORED, B, BlocksBatched, BlocksHitExperts, _Blocks, storing

LARGEST = 448.0
WHOLE = Stored(8, F8)


class BlocksStacked(BlocksBatched):
    """Verdict: fused as BlocksRepeated. Each expert's floats, stacked, and one product of all."""

    def all_floats(self, q: Tensor, s: Tensor) -> Tensor:
        return torch.stack([_Blocks.floats(self, q[e], s[e]) for e in range(E)])


class BlocksStackedGathered(BlocksStacked):
    """Verdict: fused as BlocksRepeated. Rows of the stack are looked up by the ids."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up, down = self.all_floats(self.up, self.up_scale_inv)[ids], self.all_floats(self.down, self.down_scale_inv)[ids]
        g, u = torch.einsum("th,tkoh->tko", x, up).chunk(2, -1)
        return (torch.einsum("tki,tkhi->tkh", F.silu(g) * u, down) * w[..., None]).sum(1)


class BlocksStackedOfAnother(BlocksStacked):
    """Verdict: rejected. In the stack expert 3 has expert 2's scales."""

    expect = Rejected("selected indices")
    group, near, differs = "", "BlocksStacked", ()

    def all_floats(self, q: Tensor, s: Tensor) -> Tensor:
        return torch.stack([_Blocks.floats(self, q[e], s[min(e, 2)]) for e in range(E)])


class InBlocks(_Blocks):
    """Verdict: fused, with what is done to rows. Products of blocks of the inputs, each times both scales, added up in Python."""

    rows = Rows(8, F8, B, floor=1e-12 / LARGEST)
    expect = Fused(RENORM, replace(STORED, up_rows=rows, down_rows=rows))
    near, differs = "BlocksRepeated", ("experts.down_rows", "experts.up_rows")
    inference_only = True  # the gradients of its blocks would be added up in float8, which torch has no operation for

    def product(self, x: Tensor, q: Tensor, s: Tensor) -> Tensor:
        t = x.unflatten(-1, (-1, B))
        sa = t.abs().amax(-1).clamp(min=1e-12) / LARGEST
        a = (t / sa[..., None]).to(F8)
        out = torch.zeros(x.shape[0], q.shape[0])
        for k in range(s.shape[1]):
            part = a[:, k].float() @ q[:, k * B : (k + 1) * B].float().t()
            out = out + part * sa[:, k, None] * s[:, k].repeat_interleave(B)
        return out

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = self.product(x, self.up[e], self.up_scale_inv[e]).chunk(2, -1)
        return self.product(F.silu(g) * u, self.down[e], self.down_scale_inv[e])


class InBlocksHit(InBlocks):
    """Verdict: fused as InBlocks. A loop over the experts that were hit, read by example."""

    near, differs = "", ()
    run_experts = BlocksHitExperts.run_experts


class StaticRows(_Blocks):
    """Verdict: fused, with what is done to rows. They are divided by each expert's calibrated number, saturating (static float8)."""

    how = WHOLE
    rows = Rows(8, F8, static=True, low=-LARGEST, top=LARGEST)
    expect = Fused(RENORM, replace(storing(WHOLE).experts, up_rows=rows, down_rows=rows))
    near, differs = "Float8Matrices", ("experts.down_rows", "experts.up_rows")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for name in ("up_input", "down_input"):
            self.register_buffer(name, (torch.rand(n) + 0.2) / 100)

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_smooth": [self.up_input[:, None]], "down_smooth": [self.down_input[:, None]]}

    def number(self, name: str, e: Any) -> Any:
        return getattr(self, f"{name}_input")[e]

    def product(self, x: Tensor, name: str, e: Any) -> Tensor:
        s = self.number(name, e)
        q = (x / s).clamp(-LARGEST, LARGEST).to(F8).float()
        return F.linear(q, getattr(self, name)[e].float()) * (self.back(name, e) * getattr(self, f"{name}_scale_inv")[e])

    def back(self, name: str, e: Any) -> Any:
        return self.number(name, e)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = self.product(x, "up", e).chunk(2, -1)
        return self.product(F.silu(g) * u, "down", e)


class StaticRowsHit(StaticRows):
    """Verdict: fused as StaticRows. A loop over the experts that were hit, read by example."""

    near, differs = "", ()
    run_experts = BlocksHitExperts.run_experts


class StaticRowsByConstants(StaticRows):
    """Verdict: fused, other rows: numbers that are written in the code, one for each projection."""

    expect = Fused(
        RENORM,
        replace(StaticRows.expect.experts, **{f"{n}_rows": replace(StaticRows.rows, step=s) for n, s in (("up", 0.25), ("down", 0.5))}),
    )
    near, differs = "StaticRows", ("experts.down_rows.step", "experts.up_rows.step")

    def weights(self) -> dict[str, list[Tensor]]:
        return _Blocks.weights(self)

    def number(self, name: str, e: Any) -> Any:
        return 0.25 if name == "up" else 0.5


class StaticRowsOfAnother(StaticRows):
    """Verdict: rejected. What rows were divided by is not what the sum is multiplied by."""

    expect = Rejected("in a way that is not recovered")
    near, differs = "StaticRows", ()

    def back(self, name: str, e: Any) -> Any:
        return self.number("down" if name == "up" else "up", e)


class Nf4Hit(Nf4):
    """Verdict: fused as Nf4. A loop over the experts that were hit, whose matrices lie flattened: read by example."""

    run_experts = BlocksHitExperts.run_experts


class Nf4Doubled(Nf4):
    """Verdict: fused, as a list of matrices. The number of each run is a code itself, of a table of 256, times a number for each four, and
    one more is added (bitsandbytes' double quantisation): the graph makes floats of these, expert by expert."""

    expect = Fused(RENORM, replace(storing(Nf4.how).experts, stacked=False))
    near, differs = "Nf4", ("experts.stacked",)
    per = 4

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.register_buffer("nested", torch.linspace(-1, 1, 256))
        for name in ("up", "down"):
            runs = getattr(self, f"{name}_scale_inv").shape[1]
            self.register_buffer(f"{name}_codes", torch.randint(0, 256, (n, runs)).to(torch.uint8))
            self.register_buffer(f"{name}_second", torch.rand(n, runs // self.per) + 0.1)

    def weights(self) -> dict[str, list[Tensor]]:
        found = super().weights()
        for name, rows in (("up", 2 * I), ("down", H)):
            found |= {name: list(found[name][0]), f"{name}_scale": [self.absmax(name, e).view(rows, -1) for e in range(E)]}
        return found

    def absmax(self, name: str, e: Any) -> Tensor:
        floats = self.nested[getattr(self, f"{name}_codes")[e].long()].unflatten(0, (-1, self.per))
        return (floats * getattr(self, f"{name}_second")[e][:, None]).flatten() + getattr(self, f"{name}_scale_inv")[e][0]

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.floats(self.up[e], self.absmax("up", e))).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.floats(self.down[e], self.absmax("down", e)))


class Nf4DoubledHit(Nf4Doubled):
    """Verdict: fused as Nf4Doubled. A loop over the experts that were hit, read by example."""

    near, differs, zoo_only = "", (), True
    run_experts = BlocksHitExperts.run_experts


class Nf4OwnTables(Nf4):
    """Verdict: rejected. Each expert's table is a buffer of its own."""

    expect = Rejected("in a table of its own")
    near, differs = "", ()

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for e in range(n):
            self.register_buffer(f"code{e}", self.code.clone())

    def expert(self, e: Any, x: Tensor) -> Tensor:
        self.code = getattr(self, f"code{e}")
        return super().expert(e, x)


class Int4FloatZeroStacked(Int4FloatZero):
    """Verdict: fused as Int4FloatZero. Each expert's floats, stacked, einsum, dense weights; many numbers to be told from sizes."""

    near, differs = "", ()

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        full = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, w)
        up, down = (torch.stack([self.matrix(name, e) for e in range(E)]) for name in ("up", "down"))
        g, u = torch.einsum("th,enh->etn", x, up).chunk(2, -1)
        y = torch.bmm(F.silu(g) * u, down.transpose(1, 2))
        return torch.einsum("eth,te->th", y, full)


class Int4Written(Int4Offset):
    """Verdict: fused as Int4Offset. Codes are written into every eighth place of a buffer (compressed-tensors' unpack_from_int32)."""

    near, differs = "", ()

    def codes(self, q: Tensor) -> Tensor:
        out = torch.zeros((q.shape[0], q.shape[1] * 8), dtype=torch.int32)
        for i in range(8):
            out[:, i::8] = (q >> (4 * i)) & 15
        return out


class Int4WrittenAgain(Int4Written):
    """Verdict: rejected. The first places are written once more, with other codes."""

    expect = Rejected("is no matrix")
    near, differs = "Int4Offset", ()

    def codes(self, q: Tensor) -> Tensor:
        out = super().codes(q)
        out[:, :1] = 3
        return out


class Int4ShiftsInABuffer(Int4Offset):
    """Verdict: fused. By how much codes are shifted lies in a buffer (AutoGPTQ's `wf`), which stays an operand."""

    how = replace(Int4Offset.how, shifted=True)
    expect = storing(how)
    near, differs = "Int4Offset", ("experts.down_stored.shifted", "experts.up_stored.shifted")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.register_buffer("wf", torch.arange(0, 32, 4, dtype=torch.int32)[None])

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_table": [self.wf], "down_table": [self.wf]}

    def codes(self, q: Tensor) -> Tensor:
        return (torch.bitwise_right_shift(q.unsqueeze(-1), self.wf.unsqueeze(0)) & 15).flatten(-2)


class Int4ShiftsOfAnother(Int4ShiftsInABuffer):
    """Verdict: rejected. What is in the buffer is half of it: codes are shifted by what is computed of it."""

    expect = Rejected("shifted by numbers that are computed of a tensor's")
    near, differs = "Int4ShiftsInABuffer", ()

    def weights(self) -> dict[str, list[Tensor]]:
        return Int4Offset.weights(self)

    def codes(self, q: Tensor) -> Tensor:
        return (torch.bitwise_right_shift(q.unsqueeze(-1), self.wf // 2 + 1) & 15).flatten(-2)


class StaticRowsThatWrap(StaticRows):
    """Verdict: rejected. Rounded to int8 with nothing that keeps rows within it: what lies beyond wraps around."""

    expect = Rejected("nothing keeps within int8")
    near, differs = "StaticRows", ()

    def product(self, x: Tensor, name: str, e: Any) -> Tensor:
        s = self.number(name, e)
        q = (x / s).round().to(torch.int8).float()
        return F.linear(q, getattr(self, name)[e].float()) * (s * getattr(self, f"{name}_scale_inv")[e])


class StaticRowsKeptTooWide(StaticRows):
    """Verdict: rejected. Kept within more than int8 holds, so that what lies beyond that wraps around all the same."""

    expect = Rejected("nothing keeps within int8")
    near, differs = "StaticRows", ()

    def product(self, x: Tensor, name: str, e: Any) -> Tensor:
        s = self.number(name, e)
        q = (x / s).clamp(-200, 200).round().to(torch.int8).float()
        return F.linear(q, getattr(self, name)[e].float()) * (s * getattr(self, f"{name}_scale_inv")[e])
