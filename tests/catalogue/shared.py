"""Shared experts and other things added to the routed sum: before, after, gated, as the accumulator's base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import SharedExpert

from .base import RENORM, SHARED, SWIGLU_EXPERTS, Case, E, Fused, H, I, SwiGlu, mlp, parameter

ROUTED = Fused(RENORM, SWIGLU_EXPERTS)


class _Shared(Case):
    """Verdict: fused with its shared expert: routed + down(silu(gate x) * up x)."""

    expect = Fused(RENORM, SWIGLU_EXPERTS, SHARED)
    group = "shared"

    def __init__(self) -> None:
        super().__init__()
        self.shared = SwiGlu()

    def routed(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        return self.run_experts(x, ids, w)

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": self.shared(x)}


class SharedAfter(_Shared):
    """Verdict: fused with the shared expert. routed + shared(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x)


class SharedBefore(_Shared):
    """Verdict: fused as SharedAfter. shared(x) + routed, computed before the router."""

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared(x)
        return shared + self.routed(x)


class SharedInPlace(_Shared):
    """Verdict: fused as SharedAfter. llama4: out = shared(x); out.add_(routed)."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.shared(x)
        out.add_(self.routed(x))
        return out


class SharedAsBase(_Shared):
    """Verdict: fused as SharedAfter. The accumulator starts as the shared output."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        out = self.shared(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None])
        return out


class SharedTokens3d(_Shared):
    """Verdict: fused as SharedAfter. Shared on [batch, sequence, H], routed on the flat view."""

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        return (torch.randn(1, tokens, H),)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x.reshape(-1, H)).view(x.shape) + self.shared(x)


class SharedOutsideBlock(_Shared):
    """Verdict: fused as SharedAfter. In the layer: norm, MoE and shared MLP on the same normed tokens, then the residual."""

    def normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (H,))

    def forward(self, x: Tensor) -> Tensor:
        h = self.normed(x)
        return x + (self.routed(h) + self.shared(h))

    def parts(self, *inputs: Any) -> Any:
        p = super().parts(self.normed(inputs[0]))
        p.add = p.add + inputs[0]
        return p


class _SharedGated(_Shared):
    """Verdict: fused with a gated shared expert: routed + σ(x · w) shared(x)."""

    expect = Fused(RENORM, SWIGLU_EXPERTS, replace(SHARED, gated=True))
    group = "shared-gated"

    def __init__(self) -> None:
        super().__init__()
        self.shared_gate = nn.Linear(H, 1, bias=False)

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": self.shared_gate(x).sigmoid() * self.shared(x)}


class SharedGatedAfter(_SharedGated):
    """Verdict: fused with the gated shared expert."""

    def forward(self, x: Tensor) -> Tensor:
        routed = self.routed(x)
        return routed + F.sigmoid(self.shared_gate(x)) * self.shared(x)


class SharedGatedBefore(_SharedGated):
    """Verdict: fused as SharedGatedAfter. Operands the other way, sigmoid by hand."""

    def forward(self, x: Tensor) -> Tensor:
        gate = 1 / (1 + torch.exp(-(x @ self.shared_gate.weight.t())))
        return self.shared(x) * gate + self.routed(x)


class SharedConcat(_Shared):
    """Verdict: fused with the shared expert, its gate and up in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_up, self.shared_down = parameter(2 * I, H), parameter(H, I)

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": mlp(x, self.shared_up, self.shared_down)}

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + mlp(x, self.shared_up, self.shared_down)


class SharedWithBias(_Shared):
    """Verdict: fused with a shared expert that has biases."""

    expect = Fused(RENORM, SWIGLU_EXPERTS, SharedExpert(2 * I, SHARED.activation, bias=True))
    group = ""

    def __init__(self) -> None:
        super().__init__()
        self.shared = SwiGlu(intermediate=2 * I, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x)


class SharedOfOtherTokens(_Shared):
    """Verdict: fused without a shared expert: the MLP reads other tokens than the experts (it is just an addend)."""

    expect = ROUTED
    group = ""
    near = "SharedAfter"
    one_token_is_less = True  # one token is itself from behind: a shared expert

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x.flip(0))

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": self.shared(x.flip(0))}


class SharedMultiplied(_Shared):
    """Verdict: fused without a shared expert: the MLP multiplies the routed sum."""

    expect = ROUTED
    group = ""
    near = "SharedAfter"
    routes_all = False

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) * self.shared(x)


class SharedSubtracted(_Shared):
    """Verdict: fused, the shared MLP left outside: routed - shared(x)."""

    expect = ROUTED
    group = ""
    near = "SharedAfter"

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) - self.shared(x)

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": -self.shared(x)}


class SharedLiveOutside(_Shared):
    """Verdict: fused with the shared expert or with its output as an addend: its output is returned too."""

    group = ""
    any_shared = True

    def forward(self, x: Tensor) -> Any:
        shared = self.shared(x)
        return self.routed(x) + shared, shared


class HalfSum(_Shared):
    """Verdict: fused with the shared expert; the half of (routed + shared) stays outside."""

    group = ""
    any_shared = True
    near = "SharedAfter"
    routes_all = False

    def forward(self, x: Tensor) -> Tensor:
        return (self.routed(x) + self.shared(x)) / 2


# Residuals ------------------------------------------------------------------------------------------------------------------


class _Residual(Case):
    """Verdict: fused. x + routed(x): the residual is an addend, never the experts' input by mistake."""

    expect = ROUTED
    group = "stacked"

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": x}


class ResidualAfter(_Residual):
    """Verdict: fused. x + routed(x)."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        return x + self.run_experts(x, ids, w)


class ResidualAsBase(_Residual):
    """Verdict: fused. The accumulator starts as a clone of x."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        out = x.clone()
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None])
        return out


class TwoBlocks(Case):
    """Verdict: fused, both. Two MoE blocks on the same tokens, sharing the router but not the experts' weights."""

    expect = ROUTED
    blocks = 2
    routes_all = False

    def __init__(self) -> None:
        super().__init__()
        self.up2, self.down2 = parameter(E, 2 * I, H), parameter(E, H, I)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        first = self.run_experts(x, ids, w)
        g, u = torch.einsum("th,tkoh->tko", x, self.up2[ids]).chunk(2, dim=-1)
        second = torch.einsum("tki,tkhi,tk->th", F.silu(g) * u, self.down2[ids], w)
        return first + second.tanh()


class TwoLayers(Case):
    """Verdict: fused, both. Two equal blocks one after the other, norm and residual between."""

    expect = ROUTED
    blocks = 2
    routes_all = False

    def __init__(self) -> None:
        super().__init__()
        self.second = _Inner()

    def forward(self, x: Tensor) -> Tensor:
        x = x + super().forward(F.rms_norm(x, (H,)))
        return x + self.second(F.rms_norm(x, (H,)))


class _Inner(Case):
    pass
