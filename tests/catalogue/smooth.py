"""Smooth scales (SmoothQuant): numbers of a projection's inputs in front of the rounding of its rows; and what is near."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir.stored import Scale

from .base import RENORM, E, Fused, H, I, Rejected
from .quantised import BothRowsRounded, scales, stored

ROWS = BothRowsRounded.expect.experts


def rows(smooth: Scale, down: Scale | None = None, **kw: Any) -> Fused:
    up, inner = (replace(r, smooth=s) for r, s in ((ROWS.up_rows, smooth), (ROWS.down_rows, smooth if down is None else down)))
    return Fused(RENORM, replace(ROWS, up_rows=up, down_rows=inner, **kw))


def numbers(*shape: int) -> Tensor:
    return torch.rand(*shape) + 0.5


class SmoothRows(BothRowsRounded):
    """Verdict: fused, with smooth scales before both products, one set for all experts."""

    expect = rows(Scale.TIMES)
    near = ""
    differs = ()
    own: tuple[int, ...] = ()

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.register_buffer("smooth", numbers(*self.own, H))
        self.register_buffer("hidden_smooth", numbers(*self.own, I))

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_smooth": [self.smooth], "down_smooth": [self.hidden_smooth]}

    def smoothed(self, x: Tensor, k: Tensor) -> Tensor:
        return x * (k[:, None] if k.ndim == 2 else k)

    def rounded(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.bytes_of(self.smoothed(x, k))

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up, down = self.matrices(x)
        q, s = self.rounded(x.expand(E, -1, -1), self.smooth)
        g, u = (torch.bmm(q, up.transpose(1, 2)) * s).chunk(2, -1)
        q, s = self.rounded(F.silu(g) * u, self.hidden_smooth)
        y = torch.bmm(q, down.transpose(1, 2)) * s
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)
        return (y * dense.t()[..., None]).sum(0)


class SmoothRowsOfEachExpert(SmoothRows):
    """Verdict: fused. Each expert has smooth scales of its own."""

    own = (E,)


class SmoothRowsListed(SmoothRows):
    """Verdict: fused. Experts are modules, each with its own smooth scales."""

    expect = rows(Scale.TIMES, stacked=False)

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, shape in (("up", (2 * I, H)), ("down", (H, I))):
                self.register_buffer(name, stored(*shape))
                self.register_buffer(f"{name}_scale", scales(shape[0]))
                self.register_buffer(f"{name}_smooth", numbers(shape[1]))

        def product(self, x: Tensor, name: str, rounded: Any) -> Tensor:
            q, s = rounded(x * getattr(self, f"{name}_smooth"))
            return F.linear(q, getattr(self, name).to(x.dtype) * getattr(self, f"{name}_scale")[:, None]) * s

    def build_experts(self, n: int) -> None:
        self.experts = nn.ModuleList([self.Expert() for _ in range(n)])

    def weights(self) -> dict[str, list[Tensor]]:
        names = [f"{p}{what}" for p in ("up", "down") for what in ("", "_scale", "_smooth")]
        return {name: [getattr(e, name) for e in self.experts] for name in names}

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            g, u = expert.product(x[token], "up", self.bytes_of).chunk(2, -1)
            out.index_add_(0, token, expert.product(F.silu(g) * u, "down", self.bytes_of) * w[token, slot, None])
        return out


class _Near(SmoothRows):
    near = "SmoothRows"


class SmoothRowsDivided(_Near):
    """Verdict: fused, other rows: they are divided by the smooth scales."""

    expect = rows(Scale.DIVIDES)
    differs = ("experts.down_rows.smooth", "experts.up_rows.smooth")

    def smoothed(self, x: Tensor, k: Tensor) -> Tensor:
        return x / k


class SmoothTokensOnly(_Near):
    """Verdict: fused, other rows: those between the products have none."""

    expect = rows(Scale.TIMES, Scale.NONE)
    differs = ("experts.down_rows.smooth",)

    def smoothed(self, x: Tensor, k: Tensor) -> Tensor:
        return x * k if k is self.smooth else x


class SmoothTakenBack(SmoothTokensOnly):
    """Verdict: rejected. The rounded rows are divided by the smooth scales again: nothing cancels, the steps are other ones."""

    expect = Rejected("in a way that is not recovered")
    differs = ()

    def rounded(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, s = super().rounded(x, k)
        return (q / k if k is self.smooth else q), s


class SmoothAfterTheScale(_Near):
    """Verdict: rejected. The largest number of a row is that of the row without smooth scales."""

    expect = Rejected("in a way that is not recovered")

    def rounded(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        _, s = self.bytes_of(x)
        return torch.round(x * k / s).clamp(-128, 127), s


class SmoothInPairs(_Near):
    """Verdict: rejected. One number for two channels."""

    expect = Rejected("something else than its up projections")

    def smoothed(self, x: Tensor, k: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, 2)) * k[::2, None]).flatten(-2)


class SmoothTwice(_Near):
    """Verdict: rejected. Two sets of numbers, one on the other."""

    expect = Rejected("something else than its up projections")

    def smoothed(self, x: Tensor, k: Tensor) -> Tensor:
        return x * k * k.flip(0)


class SmoothTakenBackOfOneProjection(SmoothRowsOfEachExpert):
    """Verdict: rejected. Between two products without an activation numbers behind a rounding look like scales of the first product."""

    expect = Rejected("in a way that is not recovered")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.register_buffer("up_of_one", stored(n, I, H))

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up, down = self.up_of_one.to(x.dtype) / 100, self.down.to(x.dtype) * self.down_scale[..., None]
        k = self.hidden_smooth[:, None]
        q, s = self.bytes_of(x)
        q, s = self.bytes_of(torch.bmm(q.expand(E, -1, -1), up.transpose(1, 2)) * s * k)
        y = torch.bmm(q / k**2, down.transpose(1, 2)) * s
        dense = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)
        return (y * dense.t()[..., None]).sum(0)
