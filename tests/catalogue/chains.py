"""Experts that are more than two products: norms, residuals and further matrices inside, in the ways they are written and stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import Form
from moe_compile.ir import scalar as act
from moe_compile.ir.chain import ROW, Chain, Kind, Matrix, Stage, Vector, mean, product, total, vector

from .base import RENORM, SWIGLU_EXPERTS, Case, E, Fused, H, I, K, Rejected, mlp, parameter

y, z, p, q = product(0), product(1), vector(0), vector(1)
EPS = sp.Rational(1, 100_000)
STACK, LIST, SHARED = Kind.STACKED, Kind.LISTED, Kind.SHARED
UP = Stage(I, (Matrix(0), Matrix(0, 1, I)), (), act.silu(y) * z)
DOWN = Matrix(1)


def rms(v: sp.Expr) -> sp.Expr:
    return v / sp.sqrt(mean(v**2) + EPS)


def standard(v: sp.Expr) -> sp.Expr:
    """A layer norm without its weight."""
    return (v - mean(v)) / sp.sqrt(mean((v - mean(v)) ** 2) + EPS)


def chained(*stages: Stage, kinds: tuple[Kind, ...], **fields: Any) -> Any:
    """The experts of the catalogue with another function."""
    first = next(s.width for s in stages if s.matrices)
    plain = replace(SWIGLU_EXPERTS, form=Form.SINGLE, activation=act.G, intermediate=first, out_features=stages[-1].width)
    return replace(plain, chain=Chain(stages, kinds), stacked=LIST not in kinds, **fields)


def after(expr: sp.Expr, *kinds: Kind) -> Any:
    """A map of the down projection's rows, with as many vectors."""
    vectors = tuple(Vector(2 + i) for i in range(len(kinds)))
    return chained(UP, Stage(H, (DOWN,), vectors, expr), kinds=(STACK, STACK, *kinds))


class _Stacked(Case):
    """Stacked weights, experts in a loop over the rows that chose them."""

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.scale, self.shift = parameter(H), parameter(H)
        self.own, self.inner = parameter(n, H), parameter(n, I)

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.up, self.down]

    def weights(self) -> dict[str, list[Tensor]]:
        return {"up": [], "down": [], "parts": self.parameters_of_chain()}

    def expert(self, e: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


class NormAfter(_Stacked):
    """Verdict: fused. muse_spark: an RMSNorm with one weight on each expert's output, before the routing weight."""

    expect = Fused(RENORM, after(p * rms(y), SHARED))
    group = "norm after"

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.up, self.down, self.scale]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.rms_norm(mlp(x, self.up[e], self.down[e]), (H,), self.scale, 1e-5)


class NormAfterWritten(NormAfter):
    """Verdict: fused as NormAfter. Written out."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        y = mlp(x, self.up[e], self.down[e])
        return self.scale * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5))


class NormAfterVariance(NormAfter):
    """Verdict: fused as NormAfter. y / sqrt(sum(y y) / H + eps)."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        y = mlp(x, self.up[e], self.down[e]).float()
        return (y / ((y * y).sum(-1, keepdim=True) / H + 1e-5).sqrt()) * self.scale


class NormAfterBatched(NormAfter):
    """Verdict: fused as NormAfter. Weights gathered by ids, rows of all slots at once."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).chunk(2, dim=-1)
        y = torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids])
        return (F.rms_norm(y, (H,), self.scale, 1e-5) * w.unsqueeze(-1)).sum(dim=1)


class NormAfterSorted(NormAfter):
    """Verdict: fused as NormAfter. Rows sorted by expert."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        order = ids.flatten().argsort()
        expert, token = ids.flatten()[order], order // K
        g, u = torch.einsum("rh,rih->ri", x[token], self.up[expert]).chunk(2, -1)
        y = torch.einsum("ri,rhi->rh", F.silu(g) * u, self.down[expert])
        y = F.rms_norm(y, (H,), self.scale, 1e-5) * w.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, y)


class NormOfTheSum(_Stacked):
    """Verdict: fused as any block: the norm stands behind the sum over experts."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    routes_all = False

    def expert(self, e: int, x: Tensor) -> Tensor:
        return mlp(x, self.up[e], self.down[e])

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(super().run_experts(x, ids, w), (H,), self.scale, 1e-5)

    def weights(self) -> dict[str, list[Tensor]]:
        return {"up": [self.up], "down": [self.down]}


class NormAfterOtherGuard(NormAfter):
    """Verdict: fused, with another guard than NormAfter."""

    expect = Fused(RENORM, after(p * y / sp.sqrt(mean(y**2) + sp.Rational(1, 10)), SHARED))
    group, near, differs = "", "NormAfter", ("experts.chain.stages",)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.rms_norm(mlp(x, self.up[e], self.down[e]), (H,), self.scale, 0.1)


class NormAfterOwn(NormAfter):
    """Verdict: fused. Each expert has a norm of its own."""

    expect = Fused(RENORM, after(p * rms(y), STACK))
    group = ""

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.up, self.down, self.own]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.rms_norm(mlp(x, self.up[e], self.down[e]), (H,), self.own[e], 1e-5)


class NormOfWeighted(NormAfter):
    """Verdict: fused, with another function than NormAfter: the norm's weight is inside what is normalised."""

    expect = Fused(RENORM, after(p * y / sp.sqrt(mean(p**2 * y**2) + EPS), SHARED))
    group, near, differs = "", "NormAfter", ("experts.chain.stages",)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.rms_norm(mlp(x, self.up[e], self.down[e]) * self.scale, (H,), None, 1e-5)


class LayerNormAfter(_Stacked):
    """Verdict: fused. A LayerNorm with weight and bias behind each expert."""

    expect = Fused(RENORM, after(p + q * standard(y), SHARED, SHARED))
    near, differs = "NormAfter", ("experts.chain.stages", "experts.chain.kinds")

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.up, self.down, self.shift, self.scale]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.layer_norm(mlp(x, self.up[e], self.down[e]), (H,), self.scale, self.shift, 1e-5)


class UnitRows(_Stacked):
    """Verdict: fused. Outputs of length one (F.normalize)."""

    expect = Fused(RENORM, after(y / act.clamp(sp.sqrt(total(y**2)), sp.Rational(1, 100), sp.oo)))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.normalize(mlp(x, self.up[e], self.down[e]), dim=-1, eps=1e-2)


class Centred(_Stacked):
    """Verdict: fused. The mean over features is taken off, which no norm is."""

    expect = Fused(RENORM, after(y - mean(y)))
    near, differs = "LayerNormAfter", ("experts.chain.stages", "experts.chain.kinds")

    def expert(self, e: int, x: Tensor) -> Tensor:
        y = mlp(x, self.up[e], self.down[e])
        return y - y.mean(-1, keepdim=True)


class NormBetween(_Stacked):
    """Verdict: fused. Activated rows are normalised before the down projection, with weights of each expert's own."""

    expect = Fused(
        RENORM,
        chained(
            Stage(I, (Matrix(0), Matrix(0, 1, I)), (Vector(1),), p * rms(act.silu(y) * z)),
            Stage(H, (Matrix(2),), (), y),
            kinds=(STACK, STACK, STACK),
        ),
    )

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.up, self.inner, self.down]

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(F.rms_norm(F.silu(g) * u, (I,), self.inner[e], 1e-5), self.down[e])


class NormBefore(_Stacked):
    """Verdict: fused. Each expert normalises its input with a weight of its own."""

    expect = Fused(
        RENORM,
        chained(
            Stage(H, (), (Vector(0),), p * rms(ROW)),
            Stage(I, (Matrix(1), Matrix(1, 1, I)), (), act.silu(y) * z),
            Stage(H, (Matrix(2),), (), y),
            kinds=(STACK, STACK, STACK),
        ),
    )
    group = "norm before"

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.own, self.up, self.down]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return mlp(F.rms_norm(x, (H,), self.own[e], 1e-5), self.up[e], self.down[e])


class NormBeforeFolded(NormBefore):
    """Verdict: fused as NormBefore. The root stands behind the product."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        r = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
        g, u = (r * F.linear(x * self.own[e], self.up[e])).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e])


class Residual(_Stacked):
    """Verdict: fused. w (x + f(x)): each expert adds its own input."""

    expect = Fused(RENORM, after(ROW + y))
    group = "residual"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return x + mlp(x, self.up[e], self.down[e])


class ResidualBatched(Residual):
    """Verdict: fused as Residual. Rows of all slots at once."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return ((x[:, None] + self.each(x, ids)) * w.unsqueeze(-1)).sum(dim=1)

    def each(self, x: Tensor, ids: Tensor) -> Tensor:
        g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).chunk(2, dim=-1)
        return torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids])


class ResidualOfPart(_Stacked):
    """Verdict: fused, differs from Residual in how much of its input an expert adds: each has a gate of its own (ReZero)."""

    expect = Fused(RENORM, chained(UP, Stage(H, (DOWN,), (Vector(2, 0),), p * y + ROW), kinds=(STACK, STACK, STACK)))
    near, differs = "Residual", ("experts.chain.stages", "experts.chain.kinds")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.gates = parameter(n, 1)

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.up, self.down, self.gates]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return x + self.gates[e] * mlp(x, self.up[e], self.down[e])


class PreNormResidual(_Stacked):
    """Verdict: fused. x + f(norm(x)), as a block of a transformer is."""

    expect = Fused(
        RENORM,
        chained(
            Stage(H, (), (Vector(0), Vector(1)), p + q * standard(ROW)),
            Stage(I, (Matrix(2), Matrix(2, 1, I)), (), act.silu(y) * z),
            Stage(H, (Matrix(3),), (), ROW + y),
            kinds=(SHARED, SHARED, STACK, STACK),
        ),
    )

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.shift, self.scale, self.up, self.down]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return x + mlp(F.layer_norm(x, (H,), self.scale, self.shift, 1e-5), self.up[e], self.down[e])


class ThreeMatrices(_Stacked):
    """Verdict: fused. down relu(mid swiglu(up x)), with a bias between."""

    expect = Fused(
        RENORM,
        chained(
            UP,
            Stage(I, (Matrix(1),), (Vector(2),), act.relu(p + y)),
            Stage(H, (Matrix(3),), (), y),
            kinds=(STACK, STACK, STACK, STACK),
        ),
    )

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.middle = parameter(n, I, I)

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.up, self.middle, self.inner, self.down]

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(F.relu(F.linear(F.silu(g) * u, self.middle[e], self.inner[e])), self.down[e])


class ThreeLinears(_Stacked):
    """Verdict: fused. Three Linears with biases and a LayerNorm in a module for each expert, all of other widths."""

    expect = Fused(
        RENORM,
        chained(
            Stage(6, (Matrix(0),), (Vector(1),), act.silu(p + y)),
            Stage(4, (Matrix(2),), (Vector(3), Vector(4), Vector(5)), p + q * standard(y + vector(2))),
            Stage(H, (Matrix(6),), (Vector(7),), p + y),
            kinds=(LIST,) * 8,
        ),
    )

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        layers = [nn.Sequential(nn.Linear(H, 6), nn.SiLU(), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, H)) for _ in range(n)]
        self.experts = nn.ModuleList(layers)
        for m in self.experts:
            nn.init.normal_(m[3].weight)
            nn.init.normal_(m[3].bias)

    def parameters_of_chain(self) -> list[Tensor]:
        names = ("0.weight", "0.bias", "2.weight", "3.bias", "3.weight", "2.bias", "4.weight", "4.bias")
        return [m.get_parameter(name) for name in names for m in self.experts]

    def expert(self, e: int, x: Tensor) -> Tensor:
        out: Tensor = self.experts[e](x)
        return out


class SoftmaxInside(_Stacked):
    """Verdict: rejected. A softmax over features: without its shift it overflows."""

    expect = Rejected()
    near = "NormBetween"

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(g.softmax(-1) * u, self.down[e])

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.up, self.inner, self.down]


class NormOfRouted(_Stacked):
    """Verdict: rejected. The routing weight is inside what is normalised."""

    expect = Rejected()
    near = "NormAfter"

    def parameters_of_chain(self) -> list[Tensor]:
        return [self.up, self.down, self.scale]

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            y = mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None]
            out = out.index_add(0, token, F.rms_norm(y, (H,), self.scale, 1e-2))
        return out


class ResidualOfAnother(_Stacked):
    """Verdict: rejected. What an expert adds is the input of the token before."""

    expect = Rejected()
    near = "Residual"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return mlp(x, self.up[e], self.down[e])

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out, other = torch.zeros_like(x), x.roll(1, 0)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, (other[token] + self.expert(e, x[token])) * w[token, slot, None])
        return out
