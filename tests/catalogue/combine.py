"""Combine: how the experts' rows become one row a token. Same loop and weights in each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RENORM, SWIGLU_EXPERTS, Case, E, Fused, H, K, mlp


class _Combine(Case):
    """Verdict: fused. `add(out, token, rows)` puts one expert's weighted rows into the result."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "stacked"

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = self.start(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = self.add(out, token, mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None])
        return out


class CombineIndexAddInPlace(_Combine):
    """Verdict: fused. out.index_add_."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_add_(0, token, rows)


class CombineIndexAdd(_Combine):
    """Verdict: fused as CombineIndexAddInPlace. torch.index_add."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return torch.index_add(out, 0, token, rows)


class CombineScatterAdd(_Combine):
    """Verdict: fused as CombineIndexAddInPlace. scatter_add with the index expanded over H."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.scatter_add(0, token.unsqueeze(-1).expand(-1, H), rows)


class CombineScatterAddInPlace(_Combine):
    """Verdict: fused as CombineIndexAddInPlace. scatter_add_ with the index repeated."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.scatter_add_(0, token.view(-1, 1).repeat(1, H), rows)


class CombineIndexPut(_Combine):
    """Verdict: fused as CombineIndexAddInPlace. out[token] += rows: an expert meets a token once, so overwriting is adding."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        out[token] += rows
        return out


class CombineIndexPutRead(_Combine):
    """Verdict: fused as CombineIndexAddInPlace. out[token] = out[token] + rows."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        out[token] = out[token] + rows
        return out


class CombineIndexPutAccumulate(_Combine):
    """Verdict: fused as CombineIndexAddInPlace. index_put_(accumulate=True)."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_put_((token,), rows, accumulate=True)


class CombineEmptyZero(CombineIndexAddInPlace):
    """Verdict: fused as CombineIndexAddInPlace. The base is x.new_empty(...).zero_()."""

    def start(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape).zero_()


class CombineZerosTimes(CombineIndexAdd):
    """Verdict: fused as CombineIndexAddInPlace. The base is new_zeros, cast, viewed."""

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0] * H).view(-1, H).to(torch.float32)


class _Slots(Case):
    """Verdict: fused. Results in a [T, k, H] table first; subclasses sum over the slots."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "stacked"

    def total(self, y: Tensor, w: Tensor) -> Tensor:
        raise NotImplementedError

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], K, H, dtype=x.dtype)
        for e in range(E):
            token, slot = torch.where(ids == e)
            y[token, slot] = mlp(x[token], self.up[e], self.down[e])
        return self.total(y, w)


class SlotsSum(_Slots):
    """Verdict: fused as CombineIndexAddInPlace. (y * w[..., None]).sum(1)."""

    def total(self, y: Tensor, w: Tensor) -> Tensor:
        return (y * w[..., None]).sum(1)


class SlotsEinsum(_Slots):
    """Verdict: fused as CombineIndexAddInPlace. einsum over the slots."""

    def total(self, y: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("tkh,tk->th", y, w)


class SlotsBmm(_Slots):
    """Verdict: fused as CombineIndexAddInPlace. A row of weights times a matrix of results."""

    def total(self, y: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(w.unsqueeze(1), y)[:, 0]


class SlotsMean(_Slots):
    """Verdict: fused as CombineIndexAddInPlace. k times the mean over the slots."""

    def total(self, y: Tensor, w: Tensor) -> Tensor:
        return (y * w.unsqueeze(2)).mean(1) * K


class SlotsColumns(_Slots):
    """Verdict: fused as CombineIndexAddInPlace. One slot after the other."""

    def total(self, y: Tensor, w: Tensor) -> Tensor:
        return y[:, 0] * w[:, 0:1] + y[:, 1] * w[:, 1:2]


class WeightOnHidden(Case):
    """Verdict: fused as CombineIndexAddInPlace. The weight multiplies the activated rows: down has no bias, so it commutes."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "stacked"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            g, u = F.linear(x[token], self.up[e]).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.silu(g) * u * w[token, slot, None], self.down[e]))
        return out
