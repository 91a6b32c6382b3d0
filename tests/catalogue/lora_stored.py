"""Adapters beside weights in few bits (LoRA on a quantised base): W x + s B (A x), where W is what codes and scales stand for."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from moe_compile.ir import Stored

from .base import E, H, I, Sound, parameter
from .lora import STACKED, R
from .packed import INT4, Int4Offset
from .stored import BLOCKS, F8, RENORM, Fused, Rejected, _Blocks

CHANNELS = Stored(8, F8, rows=1)


def adapted(how: Stored) -> Fused:
    return Fused(RENORM, replace(STACKED, up_stored=how, down_stored=how))


class LoraOnBlocks(_Blocks):
    """Verdict: fused. Adapters of floats beside float8 in blocks."""

    expect = adapted(BLOCKS)

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.up_a, self.up_b, self.down_a, self.down_b = (
            parameter(n, *s) for s in ((R, H), (2 * I, R), (R, I), (H, R))
        )  # fmt: skip

    def weights(self) -> dict[str, list[Tensor]]:
        pairs = {"up_a": [self.up_a], "up_b": [self.up_b], "down_a": [self.down_a], "down_b": [self.down_b]}
        return super().weights() | pairs

    def base(self, name: str, e: int, x: Tensor) -> Tensor:
        return F.linear(x, self.floats(getattr(self, name)[e], getattr(self, f"{name}_scale_inv")[e]))

    def pair(self, name: str, e: int, x: Tensor) -> Tensor:
        return 2.0 * F.linear(F.linear(x, getattr(self, f"{name}_a")[e]), getattr(self, f"{name}_b")[e])

    def project(self, name: str, e: int, x: Tensor) -> Tensor:
        return self.base(name, e, x) + self.pair(name, e, x)

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = self.project("up", e, x).chunk(2, -1)
        return self.project("down", e, F.silu(g) * u)


class LoraOnChannels(LoraOnBlocks):
    """Verdict: fused. A scale for each output channel, which multiplies the base's sum and not the adapter's."""

    how = CHANNELS
    expect = adapted(CHANNELS)

    def base(self, name: str, e: int, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, name)[e].float()) * getattr(self, f"{name}_scale_inv")[e]


class LoraOnMatrices(LoraOnBlocks):
    """Verdict: fused. One number for each matrix, which multiplies the base's sum."""

    how = Stored(8, F8)
    expect = adapted(how)

    def base(self, name: str, e: int, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, name)[e].float()) * getattr(self, f"{name}_scale_inv")[e]


class LoraOnInt4(LoraOnBlocks):
    """Verdict: fused. Adapters beside packed int4 in groups."""

    how = INT4
    expect = adapted(INT4)
    codes, floats, grouped, scales = Int4Offset.codes, Int4Offset.floats, Int4Offset.grouped, Int4Offset.scales

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        Int4Offset.build_experts(self, n)  # type: ignore[arg-type]


class LoraScaledToo(LoraOnChannels):
    """Verdict: either as written or rejected, with a reason: the base's scale multiplies the adapter's sum as well."""

    expect = Sound()
    near = "LoraOnChannels"

    def project(self, name: str, e: int, x: Tensor) -> Tensor:
        whole = F.linear(x, getattr(self, name)[e].float()) + self.pair(name, e, x)
        return whole * getattr(self, f"{name}_scale_inv")[e]


class LoraOfAnotherExpert(LoraOnBlocks):
    """Verdict: rejected. One step from LoraOnBlocks: B of the next expert."""

    expect = Rejected("weights of another expert")
    near = "LoraOnBlocks"

    def pair(self, name: str, e: int, x: Tensor) -> Tensor:
        return 2.0 * F.linear(F.linear(x, getattr(self, f"{name}_a")[e]), getattr(self, f"{name}_b")[(e + 1) % E])
