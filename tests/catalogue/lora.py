"""Adapters on the experts' projections: W x + s B (A x), in every way they are written and stored, and what is near to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import LIST_EXPERTS, RENORM, SWIGLU_EXPERTS, Case, E, Fused, H, I, ListCase, Rejected, parameter

R = 3
LORA = replace(LIST_EXPERTS, up_pair=2.0, second_pair=2.0, down_pair=2.0)
STACKED = replace(SWIGLU_EXPERTS, up_pair=2.0, down_pair=2.0)


class Lora(nn.Module):
    """A Linear with an adapter."""

    def __init__(self, base: nn.Linear, rank: int = R, scale: float = 2.0) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * self.scale


class LoraLinears(ListCase):
    """Verdict: fused. An adapter on each Linear of each expert."""

    expect = Fused(RENORM, LORA)
    on: ClassVar[tuple[str, ...]] = ("w1", "w3", "w2")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for m in self.experts:
            for name in self.on:
                setattr(m, name, self.adapted(getattr(m, name)))

    def adapted(self, base: nn.Linear) -> nn.Module:
        return Lora(base)

    def weights(self) -> dict[str, list[Tensor]]:
        def of(name: str, what: str) -> list[Tensor]:
            return [getattr(getattr(m, name), what).weight for m in self.experts if hasattr(getattr(m, name), what)]

        def base(name: str) -> list[Tensor]:
            return of(name, "base") or of_plain(name)

        def of_plain(name: str) -> list[Tensor]:
            return [getattr(m, name).weight for m in self.experts]

        return {
            "up": base("w1") + base("w3"),
            "down": base("w2"),
            "up_a": of("w1", "a") + of("w3", "a"),
            "up_b": of("w1", "b") + of("w3", "b"),
            "down_a": of("w2", "a"),
            "down_b": of("w2", "b"),
        }

    def expert(self, e: int, x: Tensor) -> Tensor:
        out: Tensor = self.experts[e](x)
        return out

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


class _Written(LoraLinears):
    """Verdict: fused as LoraLinears. Another way to write the scale."""

    group = "lora"


class LoraScaleInside(_Written):
    """Verdict: fused as LoraLinears. The scale stands between the two products."""

    def adapted(self, base: nn.Linear) -> nn.Module:
        class Inside(Lora):
            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.scale * self.a(x)) + self.base(x)

        return Inside(base)


class LoraScaleOnInput(_Written):
    """Verdict: fused as LoraLinears. The scale multiplies the adapter's input."""

    def adapted(self, base: nn.Linear) -> nn.Module:
        class OnInput(Lora):
            def forward(self, x: Tensor) -> Tensor:
                return torch.add(self.base(x), F.linear(F.linear(x * self.scale, self.a.weight), self.b.weight))

        return OnInput(base)


class LoraRank(_Written):
    """Verdict: fused as LoraLinears. rsLoRA: alpha over the root of the rank."""

    def adapted(self, base: nn.Linear) -> nn.Module:
        return Lora(base, 4, 4 / 4**0.5)


class LoraUp(LoraLinears):
    """Verdict: fused. Adapters on the gate projections only."""

    expect = Fused(RENORM, replace(LORA, second_pair=0.0, down_pair=0.0))
    on = ("w1",)
    near, differs = "LoraLinears", ("experts.down_pair", "experts.second_pair")


class LoraSecond(LoraLinears):
    """Verdict: fused. Adapters on what the gate multiplies."""

    expect = Fused(RENORM, replace(LORA, up_pair=0.0, down_pair=0.0))
    on = ("w3",)
    near, differs = "LoraUp", ("experts.second_pair", "experts.up_pair")


class LoraDown(LoraLinears):
    """Verdict: fused. Adapters on the down projections only, written beside the experts."""

    expect = Fused(RENORM, replace(LORA, up_pair=0.0, second_pair=0.0))
    on = ("w2",)
    near, differs = "LoraLinears", ("experts.second_pair", "experts.up_pair")


class LoraScaleMissing(LoraLinears):
    """Verdict: fused, with another meaning than LoraLinears: no scale."""

    expect = Fused(RENORM, replace(LORA, up_pair=1.0, second_pair=1.0, down_pair=1.0))
    near, differs = "LoraLinears", ("experts.down_pair", "experts.second_pair", "experts.up_pair")

    def adapted(self, base: nn.Linear) -> nn.Module:
        return Lora(base, scale=1.0)


class LoraScaleTwice(LoraLinears):
    """Verdict: fused, with another meaning than LoraLinears: the scale stands on both products."""

    expect = Fused(RENORM, replace(LORA, up_pair=4.0, second_pair=4.0, down_pair=4.0))
    near, differs = "LoraLinears", ("experts.down_pair", "experts.second_pair", "experts.up_pair")

    def adapted(self, base: nn.Linear) -> nn.Module:
        class Twice(Lora):
            def forward(self, x: Tensor) -> Tensor:
                return self.base(x) + 2 * self.b(2 * self.a(x))

        return Twice(base)


class LoraBias(LoraLinears):
    """Verdict: fused. The base has biases."""

    expect = Fused(RENORM, replace(LORA, up_bias=True, down_bias=True))
    has_bias = True
    near, differs = "LoraLinears", ("experts.down_bias", "experts.up_bias")

    def weights(self) -> dict[str, list[Tensor]]:
        m: list[Any] = list(self.experts)
        biases = {"up_bias": [e.w1.base.bias for e in m] + [e.w3.base.bias for e in m], "down_bias": [e.w2.base.bias for e in m]}
        return super().weights() | biases


class _Stacks(Case):
    """Verdict: fused. Stacked weights with stacked adapters."""

    expect = Fused(RENORM, STACKED)

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.up_a, self.up_b, self.down_a, self.down_b = (
            parameter(n, *s) for s in ((R, H), (2 * I, R), (R, I), (H, R))
        )  # fmt: skip

    def weights(self) -> dict[str, list[Tensor]]:
        pairs = {"up_a": [self.up_a], "up_b": [self.up_b], "down_a": [self.down_a], "down_b": [self.down_b]}
        return {"up": [self.up], "down": [self.down]} | pairs

    def project(self, x: Tensor, e: int, name: str) -> Tensor:
        w, a, b = (getattr(self, f"{name}{what}") for what in ("", "_a", "_b"))
        return F.linear(x, w[e]) + 2.0 * F.linear(F.linear(x, a[e]), b[e])

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            g, u = self.project(x[token], e, "up").chunk(2, -1)
            out = out.index_add(0, token, self.project(F.silu(g) * u, e, "down") * w[token, slot, None])
        return out


class LoraStacks(_Stacks):
    """Verdict: fused. Expert e reads row e of every stack; gate and up have one pair as they have one weight."""


class LoraStacksBatched(_Stacks):
    """Verdict: fused as LoraStacks. All experts by batched products, the chosen ones summed."""

    group = "lora stacks"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        def project(rows: Tensor, name: str) -> Tensor:
            base, a, b = (getattr(self, f"{name}{what}").transpose(1, 2) for what in ("", "_a", "_b"))
            return torch.bmm(rows, base) + 2.0 * torch.bmm(torch.bmm(rows, a), b)

        g, u = project(x.expand(E, -1, -1), "up").chunk(2, -1)
        y = project(F.silu(g) * u, "down")
        weight = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        return torch.einsum("eth,te->th", y, weight)


class LoraOtherExpert(_Stacks):
    """Verdict: rejected. One step from LoraStacks: B of the next expert."""

    expect = Rejected("weights of another expert")
    near = "LoraStacks"

    def project(self, x: Tensor, e: int, name: str) -> Tensor:
        w, a, b = (getattr(self, f"{name}{what}") for what in ("", "_a", "_b"))
        return F.linear(x, w[e]) + 2.0 * F.linear(F.linear(x, a[e]), b[(e + 1) % E])


class LoraSomeExperts(LoraLinears):
    """Verdict: rejected. One step from LoraLinears: every other expert has no adapter."""

    expect = Rejected("not the same function")
    near = "LoraLinears"
    routes_all = False

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for m in list(self.experts)[1::2]:
            m.w2 = m.w2.base


class LoraRanks(LoraLinears):
    """Verdict: rejected. One step from LoraLinears: the experts' adapters have different ranks."""

    expect = Rejected("other sizes")
    near = "LoraLinears"
    routes_all = False

    def build_experts(self, n: int) -> None:
        ListCase.build_experts(self, n)
        for i, m in enumerate(self.experts):
            m.w2 = Lora(m.w2, R + i % 2)


class LoraScales(LoraLinears):
    """Verdict: rejected. One step from LoraLinears: the experts' adapters have different scales."""

    expect = Rejected("not the same function")
    near = "LoraLinears"
    routes_all = False

    def build_experts(self, n: int) -> None:
        ListCase.build_experts(self, n)
        for i, m in enumerate(self.experts):
            m.w2 = Lora(m.w2, scale=1.0 + i % 2)


class LoraOtherInput(LoraLinears):
    """Verdict: rejected. One step from LoraLinears: the adapter reads its input through an activation."""

    expect = Rejected("reads another input LoRA")
    near = "LoraLinears"
    routes_all = False

    def adapted(self, base: nn.Linear) -> nn.Module:
        class Other(Lora):
            def forward(self, x: Tensor) -> Tensor:
                return self.base(x) + 2.0 * self.b(self.a(torch.tanh(x)))

        return Other(base)


class LoraActivated(LoraLinears):
    """Verdict: rejected. One step from LoraLinears: an activation inside the adapter (a bottleneck adapter, no low-rank pair)."""

    expect = Rejected()
    near = "LoraLinears"
    routes_all = False

    def adapted(self, base: nn.Linear) -> nn.Module:
        class Activated(Lora):
            def forward(self, x: Tensor) -> Tensor:
                return self.base(x) + 2.0 * self.b(torch.relu(self.a(x)))

        return Activated(base)


class LoraOnGate(ListCase):
    """Verdict: fused. An adapter on the router: its logits are a sum."""

    expect = Fused(RENORM, LIST_EXPERTS)

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.low, self.high = parameter(R, H), parameter(E, R)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) + 2.0 * F.linear(F.linear(x, self.low), self.high)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return out


class LoraMerged(_Written):
    """Verdict: fused as LoraLinears. The adapter is added to the weight before the product: the pair is read out of the sum."""

    def adapted(self, base: nn.Linear) -> nn.Module:
        class Merged(Lora):
            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.base.weight + self.scale * self.b.weight @ self.a.weight)

        return Merged(base)


class LoraStacksMerged(_Stacks):
    """Verdict: fused as LoraStacks. Whole stacks are merged, once for each access as a parametrisation does it."""

    group = "lora stacks"

    def project(self, x: Tensor, e: int, name: str) -> Tensor:
        w, a, b = (getattr(self, f"{name}{what}") for what in ("", "_a", "_b"))
        return F.linear(x, torch.baddbmm(w, b, a, alpha=2.0)[e])


class LoraFlattened(_Stacks):
    """Verdict: fused as LoraStacks. Adapters as two Linears for all experts, A [E·r, in] and B [out, r·E], merged by an einsum (peft)."""

    group = "lora stacks"

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.flat = nn.ModuleDict({name: nn.ParameterList([parameter(E * R, i), parameter(o, R * E)]) for name, o, i in self.sizes})
        del self.up_a, self.up_b, self.down_a, self.down_b

    sizes = (("up", 2 * I, H), ("down", H, I))

    def weights(self) -> dict[str, list[Tensor]]:
        pairs = {}
        for name, (a, b) in self.flat.items():
            pairs |= {f"{name}_a": [a.view(E, R, -1)], f"{name}_b": [b.view(-1, R, E).permute(2, 0, 1)]}
        return {"up": [self.up], "down": [self.down]} | pairs

    def project(self, x: Tensor, e: int, name: str) -> Tensor:
        a, b = self.flat[name]
        delta = torch.einsum("o r e, e r i -> e o i", b.reshape(b.shape[0], -1, E), a.reshape(E, -1, a.shape[-1])) * 2.0
        return F.linear(x, (getattr(self, name) + delta)[e])


class LoraMergedActivated(LoraMerged):
    """Verdict: fused, and not as LoraMerged: the delta goes through a function, so what is added is no pair and the sum is the weight."""

    expect = Fused(RENORM, LIST_EXPERTS)
    group = ""
    near, differs = "LoraMerged", ("experts.down_pair", "experts.second_pair", "experts.up_pair")
    routes_all = False

    def adapted(self, base: nn.Linear) -> nn.Module:
        class Activated(Lora):
            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.base.weight + torch.tanh(self.b.weight @ self.a.weight))

        return Activated(base)
