"""What every entry of the catalogue is made of: a tiny module, its verdict, and how to hold it against the naive reading."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import BiasOn, Experts, Form, Gating, Groups, Norm, Normaliser, Score, SharedExpert
from moe_compile.ir import scalar as act

from .naive import Parts

# Deliberately awkward: 2I == H and E == I, so no shape tells an orientation or a dim apart.
E, K, H, I = 8, 2, 16, 8


@dataclass(frozen=True)
class Fused:
    """One fused block with exactly this meaning. `shared` is compared too."""

    gating: Gating
    experts: Experts
    shared: SharedExpert | None = None


@dataclass(frozen=True)
class AsWritten:
    """The experts are fused, the routing runs as the user wrote it, and the note says why (substring, any case).

    Or the part of it that no Gating says runs as written, and its result is the input ("logits") of a Gating that scores
    nothing: the identity.
    """

    experts: Experts
    note: str = ""
    shared: SharedExpert | None = None


@dataclass(frozen=True)
class Rejected:
    """No block is fused, and one rejection's reason contains each of these words (any case)."""

    reason: str = ""


@dataclass(frozen=True)
class Untouched:
    """Not a Mixture-of-Experts block: nothing is fused; nothing need be said either."""


@dataclass(frozen=True)
class Sound:
    """Either verdict is right as long as outputs equal eager's and no IR is the neighbour's; the docstring says why."""


Verdict = Fused | AsWritten | Rejected | Untouched | Sound


def gating(score: Score = Score.SOFTMAX, norm: Normaliser | None = None, **kw: Any) -> Gating:
    """A Gating with the catalogue's sizes."""
    return Gating(**({"num_experts": E, "k": K, "score": score, "norm": norm} | kw))


def norm_sum(eps: float = 0.0, clamp_min: float = 0.0) -> Normaliser:
    return Normaliser(Norm.SUM, eps=eps, clamp_min=clamp_min)


def experts(**kw: Any) -> Experts:
    """SwiGLU experts, gate and up concatenated and stacked [E, 2I, H], down [E, H, I], unless said otherwise."""
    base: dict[str, Any] = {
        "num_experts": E,
        "hidden": H,
        "intermediate": I,
        "out_features": H,
        "form": Form.CONCAT,
        "activation": act.SWIGLU,
    }
    return Experts(**(base | kw))


SOFTMAX = gating()
RENORM = gating(norm=norm_sum())
SIGMOID = gating(Score.SIGMOID, norm_sum())
SIGMOID_BIAS = gating(Score.SIGMOID, norm_sum(1e-20), bias=BiasOn.SCORE, scale=2.5)
GROUPED = replace(SIGMOID_BIAS, num_experts=12, k=4, groups=Groups(3, 2, 2, -math.inf))
GROUPED_ZERO = replace(GROUPED, groups=Groups(3, 2, 2, 0.0))
GROUPED_SOFTMAX = gating(num_experts=12, groups=Groups(3, 2, 1, 0.0), scale=16.0)
SWIGLU_EXPERTS = experts()
SHARED = SharedExpert(I, act.SWIGLU)
LIST_EXPERTS = experts(stacked=False, form=Form.SEPARATE)


def parameter(*shape: int, std: float = 0.4) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


class Case(nn.Module):
    """One spelling. `expect` is the verdict of the docstring for machines.

    group: entries of one group must be recovered as one IR.
    near: the entry this one is a near miss of; differs: the IR fields in which the two differ, when both are fused.
    """

    expect: ClassVar[Verdict]
    group: ClassVar[str] = ""
    near: ClassVar[str] = ""
    differs: ClassVar[tuple[str, ...]] = ()
    dtype: ClassVar[torch.dtype] = torch.float32
    num_experts: ClassVar[int] = E
    local_experts: ClassVar[int] = 0  # experts with weights, where that is not num_experts
    huge_logits: ClassVar[bool] = True  # False: not comparable there, the entry says why
    one_token_is_less: ClassVar[bool] = False  # True: of a single token more is known, the entry says why
    faint_logits: ClassVar[bool] = True  # False: they tie
    zoo_only: ClassVar[bool] = False  # True: CI neither runs nor compiles it, `make zoo` does
    routes_all: ClassVar[bool] = True  # False: no naive reading exists (not a MoE block)

    gate: nn.Parameter
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gate = parameter(self.num_experts, H, std=0.5)
        self.register_buffer("bias", torch.randn(self.num_experts))
        self.build_experts(self.local_experts or self.num_experts)

    def build_experts(self, n: int) -> None:
        self.up = parameter(n, 2 * I, H)
        self.down = parameter(n, H, I)

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        return (torch.randn(tokens, H, dtype=self.dtype),)

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gate)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> weights [T, k], ids [T, k]."""
        w, ids = torch.topk(logits.softmax(-1), K, dim=-1)
        return w / w.sum(-1, keepdim=True), ids

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        """Weight gather and batched products: the plainest form, used wherever the router is the subject."""
        g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).chunk(2, dim=-1)
        y = torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids])
        return (y * w.unsqueeze(-1)).sum(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        return self.run_experts(x, ids, w)

    # What the naive reading needs ------------------------------------------------------------------------------------

    def weights(self) -> dict[str, list[Tensor]]:
        """up, down, up_bias, down_bias in the layout the expected IR declares."""
        return {"up": [self.up], "down": [self.down]}

    def extra(self, x: Tensor) -> dict[str, Any]:
        """Further fields of `Parts`: add, table, padding."""
        return {}

    def parts(self, *inputs: Any) -> Parts:
        x = inputs[0].reshape(-1, H)
        return Parts(x, self.logits(x), bias=self.bias, **self.weights(), **self.extra(x))


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU with gate and up in one matrix."""
    g, u = F.linear(x, up).chunk(2, dim=-1)
    return F.linear(F.silu(g) * u, down)


class SwiGlu(nn.Module):
    """The Linear-module form: w2(silu(w1 x) * w3 x)."""

    def __init__(self, hidden: int = H, intermediate: int = I, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, intermediate, bias=bias)
        self.w2 = nn.Linear(intermediate, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, intermediate, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ListCase(Case):
    """Experts as a ModuleList of SwiGLU modules."""

    has_bias: ClassVar[bool] = False

    def build_experts(self, n: int) -> None:
        self.experts = nn.ModuleList([SwiGlu(bias=self.has_bias) for _ in range(n)])

    def weights(self) -> dict[str, list[Tensor]]:
        m: list[Any] = list(self.experts)
        out = {"up": [e.w1.weight for e in m] + [e.w3.weight for e in m], "down": [e.w2.weight for e in m]}
        if self.has_bias:
            out |= {"up_bias": [e.w1.bias for e in m] + [e.w3.bias for e in m], "down_bias": [e.w2.bias for e in m]}
        return out
