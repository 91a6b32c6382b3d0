"""More than one adapter, adapters beside one frozen base for all experts, adapters with norms, and what is near to them."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import RENORM, Fused, H, I, Rejected, parameter
from .lora import LORA, STACKED, Lora, LoraLinears, R, _Stacks


class Two(Lora):
    """A Linear with two adapters: scales 2 and 0.5, ranks 3 and 2."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.other = Lora(base, R - 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * self.other.b(self.other.a(self.seen(x)))

    def seen(self, x: Tensor) -> Tensor:
        return x


class LoraTwo(LoraLinears):
    """Verdict: fused. Two adapters at once are one of their ranks' sum: 2 b a x + 0.5 d c x = 2 [b, d/4] [a; c] x."""

    def adapted(self, base: nn.Linear) -> nn.Module:
        return Two(base)

    def weights(self) -> dict[str, list[Tensor]]:
        def both(name: str, what: str) -> list[Tensor]:
            adapted = [getattr(m, name) for m in self.experts]
            first, second = ([getattr(x, what).weight for x in xs] for xs in (adapted, [m.other for m in adapted]))
            return [torch.cat((p, q), 0) if what == "a" else torch.cat((p, q * 0.25), 1) for p, q in zip(first, second, strict=True)]

        ups = {f"up_{w}": both("w1", w) + both("w3", w) for w in "ab"}
        return super().weights() | ups | {f"down_{w}": both("w2", w) for w in "ab"}


class LoraTwoOtherInput(LoraTwo):
    """Verdict: rejected. One step from LoraTwo: the second adapter reads its input through an activation."""

    expect = Rejected("reads another input LoRA")
    near = "LoraTwo"
    routes_all = False

    def adapted(self, base: nn.Linear) -> nn.Module:
        class Seen(Two):
            def seen(self, x: Tensor) -> Tensor:
                return torch.tanh(x)

        return Seen(base)


class LoraTwoSomeExperts(LoraLinears):
    """Verdict: rejected. One step from LoraTwo: every other expert has one adapter."""

    expect = Rejected("not the same function")
    near = "LoraLinears"
    routes_all = False

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for i in range(1, n, 2):
            self.experts[i].w2 = Two(self.experts[i].w2.base)


class LoraTwoStacks(_Stacks):
    """Verdict: fused. Two pairs of every stack, both added to the weight before the products, as a parametrisation does it."""

    expect = Fused(RENORM, STACKED)
    group = "lora two stacks"

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.up_c, self.up_d, self.down_c, self.down_d = (parameter(n, *s) for s in ((2, H), (2 * I, 2), (2, I), (H, 2)))

    def weights(self) -> dict[str, list[Tensor]]:
        found = super().weights()
        for name in ("up", "down"):
            c, d = getattr(self, f"{name}_c"), getattr(self, f"{name}_d")
            found |= {f"{name}_a": [torch.cat((found[f"{name}_a"][0], c), 1)], f"{name}_b": [torch.cat((found[f"{name}_b"][0], d / 4), 2)]}
        return found

    def merged(self, w: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return w + (torch.bmm(b, a) * 2.0 + torch.bmm(d, c) * 0.5)

    def project(self, x: Tensor, e: int, name: str) -> Tensor:
        made = self.merged(*(getattr(self, f"{name}{what}") for what in ("", "_a", "_b", "_c", "_d")))
        return F.linear(x, made[e])


class LoraTwoStacksInTurn(LoraTwoStacks):
    """Verdict: fused as LoraTwoStacks. One parametrisation after the other."""

    def merged(self, w: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.baddbmm(w, b, a, alpha=2.0) + 0.5 * torch.bmm(d, c)


class LoraDelta(_Stacks):
    """Verdict: fused. What is added to the weights is given whole, and added anew at each access (peft with two adapters)."""

    expect = Fused(RENORM, replace(STACKED, up_pair=0.0, down_pair=0.0))

    def weights(self) -> dict[str, list[Tensor]]:
        found = super().weights()
        return {name: [self.made(name)] for name in found if "_" not in name}

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.up_more, self.down_more = parameter(n, 2 * I, H), parameter(n, H, I)

    def made(self, name: str) -> Tensor:
        w: Tensor = getattr(self, name)
        more: Tensor = getattr(self, f"{name}_more")
        return w + more

    def project(self, x: Tensor, e: int, name: str) -> Tensor:
        return F.linear(x, self.made(name)[e])


class LoraDeltaLast(LoraDelta):
    """Verdict: rejected. One step from LoraDelta: the last expert's weight has the sum twice."""

    expect = Rejected()
    near = "LoraDelta"
    routes_all = False

    def project(self, x: Tensor, e: int, name: str) -> Tensor:
        w = self.made(name)
        return F.linear(x, (w + getattr(self, f"{name}_more") if e == 7 else w)[e])


class LoraTwoOtherExpert(LoraTwoStacks):
    """Verdict: rejected. One step from LoraTwoStacks: the second pair's rows are those of the expert before."""

    expect = Rejected("weights of another expert")
    near, group = "LoraTwoStacks", ""

    def project(self, x: Tensor, e: int, name: str) -> Tensor:
        w, a, b, c, d = (getattr(self, f"{name}{what}") for what in ("", "_a", "_b", "_c", "_d"))
        return F.linear(x, w[e]) + 2 * F.linear(F.linear(x, a[e]), b[e]) + 0.5 * F.linear(F.linear(x, c[e - 1]), d[e - 1])


class Dora(Lora):
    """A Linear whose rows have a length of their own: m / |W + s b a|, the norm of each row."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.length = nn.Parameter(torch.rand(base.out_features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.length / self.norm() * super().forward(x)

    def norm(self) -> Tensor:
        return (self.base.weight + self.scale * self.b.weight @ self.a.weight).norm(dim=1)


class LoraDora(LoraLinears):
    """Verdict: rejected. DoRA: rows of the adapted weight are scaled by numbers that are computed from it."""

    expect = Rejected("DoRA")
    near = "LoraLinears"
    routes_all = False

    def adapted(self, base: nn.Linear) -> nn.Module:
        return Dora(base)


class LoraDoraUp(LoraDora):
    """Verdict: rejected as LoraDora. Only the gate's rows have lengths of their own."""

    on = ("w1",)


class LoraDoraMerged(LoraLinears):
    """Verdict: fused. DoRA made into one weight first: that weight is what the experts read."""

    expect = Fused(RENORM, replace(LORA, up_pair=0.0, second_pair=0.0, down_pair=0.0))
    near, differs = "LoraLinears", ("experts.down_pair", "experts.second_pair", "experts.up_pair")
    routes_all = False

    def adapted(self, base: nn.Linear) -> nn.Module:
        class Merged(Dora):
            def forward(self, x: Tensor) -> Tensor:
                made = self.base.weight + self.scale * self.b.weight @ self.a.weight
                return F.linear(x, (self.length / made.norm(dim=1))[:, None] * made)

        return Merged(base)


class LoraShared(LoraLinears):
    """Verdict: fused as LoraLinears. One frozen MLP for all experts, each expert an adapter on it (a mixture of adapters)."""

    group = "lora"

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for m in self.experts:
            for name in self.on:
                getattr(m, name).base = getattr(self.experts[0], name).base.requires_grad_(False)


class LoraSharedInTurn(LoraShared):
    """Verdict: fused as LoraLinears. Two MLPs, every other expert an adapter on the second."""

    group = "lora"

    def build_experts(self, n: int) -> None:
        LoraLinears.build_experts(self, n)
        for i, m in enumerate(self.experts):
            for name in self.on:
                getattr(m, name).base = getattr(self.experts[i % 2], name).base


class LoraSharedBare(LoraShared):
    """Verdict: rejected. One step from LoraShared: one down projection for all, without adapters: it is no expert's."""

    expect = Rejected("all experts have one and the same")
    near, group = "", ""
    on = ("w1", "w3")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for m in self.experts:
            m.w2 = self.experts[0].w2
