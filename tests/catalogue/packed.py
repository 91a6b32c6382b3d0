"""Expert weights packed several codes a word, and what a code stands for: numbers less an offset, tables, bits of a float."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ir import Form, Stored
from moe_compile.ir.stored import Exponent, Scale, Zero

from .base import E, H, I, Rejected
from .constant_near_misses import capped
from .stored import F8, FLOATS, RENORM, BlocksBatched, BlocksHitExperts, Fused, _Blocks, storing

G = 4  # inputs that share a scale, where checkpoints have 32 or 128
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*E2M1, *(-v for v in E2M1))
MXFP4 = Stored(4, torch.uint8, True, 1, G, 2, (0, 1), values=VALUES, exponents=Exponent.VALUE)
INT4 = Stored(4, torch.int32, True, 1, G, 2, tuple(range(8)), offset=-8.0)


class _Packed(_Blocks):
    """Words [E, N, K / codes a word] and scales [E, N, K / G] in a loop over all experts."""

    near, differs = "", ()
    how = INT4

    def build_experts(self, n: int) -> None:
        for name, shape in (("up", (2 * I, H)), ("down", (H, I))):
            words = (n, shape[0], shape[1] // len(self.how.order))
            info = torch.iinfo(self.how.dtype)
            self.register_buffer(name, torch.randint(info.min, info.max + 1, words).to(self.how.dtype))
            self.register_buffer(f"{name}_scale_inv", self.scales(n, *self.how.scales_of(shape)))

    def scales(self, *shape: int) -> Tensor:
        return (torch.rand(*shape) + 0.3) / 16

    def grouped(self, v: Tensor, s: Tensor) -> Tensor:
        return (v.unflatten(-1, (-1, G)) * s[..., None]).flatten(-2)


class Int4Offset(_Packed):
    """Verdict: fused. Eight codes an int32 along the inputs, less 8 (compressed-tensors)."""

    expect = storing(INT4)

    def codes(self, q: Tensor) -> Tensor:
        return (q[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15).flatten(-2)

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return self.grouped((self.codes(q) - 8).float(), s)


class Int4OffsetHit(Int4Offset):
    """Verdict: fused as Int4Offset. A loop over the experts that were hit, read by example."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for hit in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            e = hit[0]
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


class Int4OffByOne(Int4Offset):
    """Verdict: fused, another function: less 7."""

    expect = storing(replace(INT4, offset=-7.0))
    near, differs = "Int4Offset", ("experts.down_stored.offset", "experts.up_stored.offset")

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return self.grouped((self.codes(q) - 7).float(), s)


class Int4OtherOrder(Int4Offset):
    """Verdict: fused, another function: codes lie in the order 0 2 4 6 1 3 5 7 (AWQ's)."""

    expect = storing(replace(INT4, order=(0, 4, 1, 5, 2, 6, 3, 7)))
    near, differs = "Int4Offset", ("experts.down_stored.order", "experts.up_stored.order")

    def codes(self, q: Tensor) -> Tensor:
        return (q[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15)[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2)


class Int2Offset(_Packed):
    """Verdict: fused. Sixteen codes of 2 bits an int32, along the outputs, less 2."""

    how = Stored(2, torch.int32, True, 1, G, 1, tuple(range(16)), offset=-2.0)
    expect = storing(how)

    def build_experts(self, n: int) -> None:
        for name, shape in (("up", (2 * I, H)), ("down", (H, I))):
            info = torch.iinfo(torch.int32)
            self.register_buffer(name, torch.randint(info.min, info.max + 1, (n, shape[0] // 16, shape[1])).int())
            self.register_buffer(f"{name}_scale_inv", self.scales(n, *self.how.scales_of(shape)))

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        codes = q[:, None] >> torch.arange(0, 32, 2, dtype=torch.int32)[:, None] & 3
        return self.grouped((codes.flatten(0, 1) - 2).float(), s)


class Int8InWords(Int2Offset):
    """Verdict: fused. Four codes of 8 bits an int32, along the inputs, less 128 (AutoGPTQ at 8 bits, shifts being constants)."""

    how = Stored(8, torch.int32, True, 1, G, 2, tuple(range(4)), offset=-128.0)
    expect = storing(how)

    def build_experts(self, n: int) -> None:
        _Packed.build_experts(self, n)

    def scales(self, *shape: int) -> Tensor:
        return super().scales(*shape) / 16

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        codes = q[..., None] >> torch.arange(0, 32, 8, dtype=torch.int32) & 255
        return self.grouped((codes.flatten(-2) - 128).float(), s)


class Int4FloatZero(_Packed):
    """Verdict: fused. Two codes a byte, a float zero point of each group (hqq, tinygemm)."""

    how = Stored(4, torch.uint8, True, 1, G, 2, (0, 1), zeroed=Zero.PLAIN)
    expect = storing(how)

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for name, shape in (("up", (2 * I, H)), ("down", (H, I))):
            self.register_buffer(f"{name}_zero", torch.rand(n, *self.how.scales_of(shape)) * 8)

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_zero": [self.up_zero], "down_zero": [self.down_zero]}

    def matrix(self, name: str, e: Any) -> Tensor:
        b = getattr(self, name)[e].int()
        q = torch.stack([b & 15, b >> 4], -1).flatten(-2).float().unflatten(-1, (-1, G))
        return ((q - getattr(self, f"{name}_zero")[e][..., None]) * getattr(self, f"{name}_scale_inv")[e][..., None]).flatten(-2)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.matrix("up", e)).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.matrix("down", e))


class Int4ZeroAdded(Int4FloatZero):
    """Verdict: fused, another function: a float of each group is added to codes less 8, times the scale (tinygemm)."""

    how = replace(Int4FloatZero.how, offset=-8.0, zeroed=Zero.ADDED)
    expect = storing(how)
    near, differs = "Int4FloatZero", tuple(f"experts.{p}_stored.{f}" for p in ("down", "up") for f in ("offset", "zeroed"))

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for zero in (self.up_zero, self.down_zero):  # of a weight's size, not of a code's
            zero.sub_(4).div_(64)

    def matrix(self, name: str, e: Any) -> Tensor:
        b = getattr(self, name)[e].int()
        q = (torch.stack([b & 15, b >> 4], -1).flatten(-2) - 8).float().unflatten(-1, (-1, G))
        return (q * getattr(self, f"{name}_scale_inv")[e][..., None] + getattr(self, f"{name}_zero")[e][..., None]).flatten(-2)


class Int4PackedZeros(_Packed):
    """Verdict: fused. AWQ: codes along the outputs in the order 0 2 4 6 1 3 5 7, weights [in, out], packed zero points of each group."""

    order = (0, 4, 1, 5, 2, 6, 3, 7)
    how = Stored(4, torch.int32, True, G, 1, 2, order, zeroed=Zero.COLUMNS, zero_order=order)
    expect = storing(how, up_transposed=True, down_transposed=True)
    less = 0

    def build_experts(self, n: int) -> None:
        for name, (out, inner) in (("up", (2 * I, H)), ("down", (H, I))):
            info = torch.iinfo(torch.int32)
            for what, rows in ((name, inner), (f"{name}_zero", inner // G)):
                self.register_buffer(what, torch.randint(info.min, info.max + 1, (n, rows, out // 8)).int())
            self.register_buffer(f"{name}_scale_inv", self.scales(n, inner // G, out))

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_zero": [self.up_zero], "down_zero": [self.down_zero]}

    def codes(self, q: Tensor) -> Tensor:
        return (q[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15)[..., list(self.order)].flatten(-2)

    def matrix(self, name: str, e: Any) -> Tensor:
        z = self.codes(getattr(self, f"{name}_zero")[e]) + self.less
        s = getattr(self, f"{name}_scale_inv")[e].repeat_interleave(G, 0)
        return ((self.codes(getattr(self, name)[e]) - z.repeat_interleave(G, 0)) * s).t()

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.matrix("up", e)).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.matrix("down", e))


class Int4ZerosLessOne(Int4PackedZeros):
    """Verdict: fused, another function: zero points are stored less one (GPTQ v1)."""

    how = replace(Int4PackedZeros.how, zero_offset=1.0)
    expect = storing(how, up_transposed=True, down_transposed=True)
    near, differs = "Int4PackedZeros", ("experts.down_stored.zero_offset", "experts.up_stored.zero_offset")
    less = 1


class Mxfp4Table(_Packed):
    """Verdict: fused. e2m1 pairs, low nibble first, looked up in a table of numbers; exponents by ldexp (gpt-oss)."""

    how = MXFP4
    expect = storing(MXFP4)

    def scales(self, *shape: int) -> Tensor:
        return torch.randint(118, 124, shape).to(torch.uint8)

    def values(self, q: Tensor) -> Tensor:
        table = torch.tensor(VALUES)
        return torch.stack([table[(q & 15).long()], table[(q >> 4).long()]], -1).flatten(-2)

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return torch.ldexp(self.values(q).unflatten(-1, (-1, G)), s.int()[..., None] - 127).flatten(-2)


class Mxfp4Bits(Mxfp4Table):
    """Verdict: fused. Values and exponents are put together as bits of float32, where an exponent of 0 is the number 0."""

    expect = storing(replace(MXFP4, exponents=Exponent.BITS))
    near, differs = "", ()  # beside Mxfp4Table 2^-127 times a code is no difference that float32 shows

    def scales(self, *shape: int) -> Tensor:
        some = super().scales(*shape)
        return torch.where(torch.rand(shape) < 0.1, 0, some).to(torch.uint8)

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        b = q.int()
        c = torch.stack([b & 15, b >> 4], -1).flatten(-2)
        v = (((c & 8) << 28) | ((c & 7) << 22)).view(torch.float32) * 2.0**126
        return self.grouped(v, (s.int() << 23).view(torch.float32))


class Mxfp4Buffer(Mxfp4Table):
    """Verdict: fused. The table is a buffer, whose values may be others: it stays an operand."""

    how = replace(MXFP4, values=(), tabled=True)
    expect = storing(how)

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.register_buffer("table", torch.tensor(VALUES))

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_table": [self.table], "down_table": [self.table]}

    def values(self, q: Tensor) -> Tensor:
        return torch.stack([self.table[(q & 15).long()], self.table[(q >> 4).long()]], -1).flatten(-2)


class Nvfp4(Mxfp4Table):
    """Verdict: fused. e2m1 pairs, a float8 for every group of inputs and a number for each matrix (NVFP4)."""

    how = replace(MXFP4, exponents=Exponent.NONE, second=Scale.TIMES)
    expect = storing(how)

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for name in ("up", "down"):
            self.register_buffer(f"{name}_scale_2", torch.rand(n) + 0.5)

    def scales(self, *shape: int) -> Tensor:
        return ((torch.rand(*shape) + 0.3) / 16).to(F8)

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_second": [self.up_scale_2[:, None]], "down_second": [self.down_scale_2[:, None]]}

    def both(self, s: Tensor, whole: Tensor) -> Tensor:
        return s.float() * whole

    def matrix(self, name: str, e: Any) -> Tensor:
        s = self.both(getattr(self, f"{name}_scale_inv")[e], getattr(self, f"{name}_scale_2")[e])
        return self.grouped(self.values(getattr(self, name)[e]), s)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.matrix("up", e)).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.matrix("down", e))


class Nvfp4Hit(Nvfp4):
    """Verdict: fused as Nvfp4. A loop over the experts that were hit, read by example."""

    run_experts = BlocksHitExperts.run_experts


class Nvfp4Divided(Nvfp4):
    """Verdict: fused, another function: the number of a matrix divides (compressed-tensors' global scale)."""

    expect = storing(replace(Nvfp4.how, second=Scale.DIVIDES))
    near, differs = "Nvfp4", ("experts.down_stored.second", "experts.up_stored.second")

    def both(self, s: Tensor, whole: Tensor) -> Tensor:
        return s.float() / whole


class Mxfp4Batched(Mxfp4Table):
    """Verdict: fused as Mxfp4Table. All experts' floats at once, bmm, dense weights."""

    run_experts = BlocksBatched.run_experts

    def all_floats(self, q: Tensor, s: Tensor) -> Tensor:
        return self.floats(q, s)


class Mxfp4HighFirst(Mxfp4Table):
    """Verdict: fused, another function: the high nibble comes first."""

    expect = storing(replace(MXFP4, order=(1, 0)))
    near, differs = "Mxfp4Table", ("experts.down_stored.order", "experts.up_stored.order")

    def values(self, q: Tensor) -> Tensor:
        table = torch.tensor(VALUES)
        return torch.stack([table[(q >> 4).long()], table[(q & 15).long()]], -1).flatten(-2)


class Mxfp4HalvesApart(Mxfp4Table):
    """Verdict: rejected. Low nibbles are the first half of each group, high ones the second (GGUF's order)."""

    expect = Rejected("unpacked in an unknown way")
    near, differs = "Mxfp4Table", ()

    def values(self, q: Tensor) -> Tensor:
        table, groups = torch.tensor(VALUES), q.unflatten(-1, (-1, G // 2))
        return torch.cat([table[(groups & 15).long()], table[(groups >> 4).long()]], -1).flatten(-2)


class Mxfp4OtherBias(Mxfp4Table):
    """Verdict: fused, the weights being floats: exponents are less 128, which no storage says."""

    expect = Fused(RENORM, FLOATS)
    near, differs = "Mxfp4Table", ("experts.down_stored", "experts.stacked", "experts.up_stored")

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        v = torch.ldexp(self.values(q).unflatten(-1, (-1, G)), s.int()[..., None] - 128)
        return v.flatten(-2) + torch.zeros(())

    def weights(self) -> dict[str, list[Tensor]]:
        stacks = ((self.up, self.up_scale_inv), (self.down, self.down_scale_inv))
        return {name: [self.floats(q[e], s[e]) for e in range(E)] for name, (q, s) in zip(("up", "down"), stacks, strict=True)}


class GptOssMxfp4(Mxfp4Table):
    """Verdict: fused. gpt-oss as its checkpoint lies, made floats by its own maths: blocks [.., K / G, G / 2], gate and up in turn."""

    expect = Fused(RENORM, replace(storing(MXFP4).experts, form=Form.INTERLEAVED, up_bias=True, down_bias=True, activation=capped(7)))

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for name in ("up", "down"):
            setattr(self, name, getattr(self, name).unflatten(-1, (-1, G // 2)))
            self.register_buffer(f"{name}_bias", torch.randn(n, 2 * I if name == "up" else H) / 2)

    def weights(self) -> dict[str, list[Tensor]]:
        codes = {"up": [self.up.flatten(-2)], "down": [self.down.flatten(-2)]}
        return super().weights() | codes | {"up_bias": [self.up_bias], "down_bias": [self.down_bias]}

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return torch.ldexp(self.values(q), s.int()[..., None] - 127).flatten(-2)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        h = F.linear(x, self.floats(self.up[e], self.up_scale_inv[e]), self.up_bias[e])
        g, u = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
        return F.linear((u + 1) * (g * torch.sigmoid(g * 1.702)), self.floats(self.down[e], self.down_scale_inv[e]), self.down_bias[e])

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return BlocksHitExperts.run_experts(self, x, ids, w)  # type: ignore[arg-type]


class GptOssHalvesSideBySide(GptOssMxfp4):
    """Verdict: fused, another layout: all gates first."""

    expect = Fused(RENORM, replace(GptOssMxfp4.expect.experts, form=Form.CONCAT))
    near, differs = "GptOssMxfp4", ("experts.form",)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.floats(self.up[e], self.up_scale_inv[e]), self.up_bias[e]).chunk(2, -1)
        g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
        return F.linear((u + 1) * (g * torch.sigmoid(g * 1.702)), self.floats(self.down[e], self.down_scale_inv[e]), self.down_bias[e])


class Nf4(_Packed):
    """Verdict: fused. A table of 16 numbers, the high nibble first, matrices flattened, a number for each run (NF4, its absmax plain)."""

    table = tuple(-1 + i * (i + 9) / 180 for i in range(16))  # any 16 numbers do
    how = Stored(4, torch.uint8, True, 1, G, 2, (1, 0), tabled=True)
    expect = storing(how)

    def build_experts(self, n: int) -> None:
        for name, shape in (("up", (2 * I, H)), ("down", (H, I))):
            self.register_buffer(name, torch.randint(0, 256, (n, shape[0] * shape[1] // 2)).to(torch.uint8))
            self.register_buffer(f"{name}_scale_inv", torch.rand(n, shape[0] * shape[1] // G) + 0.3)
        self.register_buffer("code", torch.tensor(self.table))

    def weights(self) -> dict[str, list[Tensor]]:
        stacks = (("up", self.up, self.up_scale_inv, 2 * I), ("down", self.down, self.down_scale_inv, H))
        found = {name: [q.view(E, rows, -1)] for name, q, _, rows in stacks}
        found |= {f"{name}_scale": [s.view(E, rows, -1)] for name, _, s, rows in stacks}
        return super().weights() | found | {"up_table": [self.code], "down_table": [self.code]}

    def nibbles(self, b: Tensor) -> Tensor:
        return torch.stack([b >> 4, b & 15], -1).flatten()

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        flat = self.code[self.nibbles(q).long()] * s.repeat_interleave(G)
        return flat.view(2 * I if q.numel() == I * H else H, -1)


class Nf4LowFirst(Nf4):
    """Verdict: fused, another function: the low nibble comes first."""

    how = replace(Nf4.how, order=(0, 1))
    expect = storing(how)
    near, differs = "Nf4", ("experts.down_stored.order", "experts.up_stored.order")

    def nibbles(self, b: Tensor) -> Tensor:
        return torch.stack([b & 15, b >> 4], -1).flatten()
