"""Random Mixture-of-Experts blocks: a meaning (`Spec`), one of many ways to write it (`Spelling`), and mutations.

`Composed` is the module that a Spec and a Spelling make. Equal Specs must be recovered as equal IR whatever the Spelling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import BiasOn, Experts, Form, Gating, Norm, Normaliser, Score, SharedExpert
from moe_compile.ir import scalar as act

H, I = 8, 4  # 2I == H on purpose: no orientation can be told from a shape

# How each slot may be written ---------------------------------------------------------------------------------------------

Fn = Callable[..., Any]


def _softmax_by_hand(l: Tensor) -> Tensor:
    e = (l - l.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


SCORES: dict[Score, dict[str, Fn]] = {
    Score.SOFTMAX: {
        "method": lambda l: l.softmax(-1),
        "dtype": lambda l: F.softmax(l, dim=1, dtype=torch.float),
        "logsumexp": lambda l: (l - l.logsumexp(-1, keepdim=True)).exp(),
        "log_softmax": lambda l: F.log_softmax(l, -1).exp(),
        "by hand": _softmax_by_hand,
    },
    Score.SIGMOID: {
        "method": lambda l: l.sigmoid(),
        "function": lambda l: torch.sigmoid(l.float()),
        "exp": lambda l: 1 / (1 + torch.exp(-l)),
        "reciprocal": lambda l: ((-l).exp() + 1).reciprocal(),
        "tanh": lambda l: (torch.tanh(l / 2) + 1) / 2,
    },
    Score.SQRT_SOFTPLUS: {
        "function": lambda l: F.softplus(l).sqrt(),
        "log1p": lambda l: l.exp().log1p().sqrt(),
        "pow": lambda l: torch.log(1 + l.exp()) ** 0.5,
    },
}
SELECT: dict[str, Fn] = {
    "topk": lambda c, k: c.topk(k, dim=-1),
    "unsorted": lambda c, k: torch.topk(c, k, dim=1, sorted=False),
    "sort": lambda c, k: tuple(t[:, :k] for t in c.sort(dim=-1, descending=True)),
    "argsort": lambda c, k: (None, c.argsort(dim=-1, descending=True)[:, :k]),
    "narrow": lambda c, k: (None, torch.argsort(c, -1, True).narrow(1, 0, k)),
}
PICK: dict[str, Fn] = {
    "gather": lambda s, ids: s.gather(1, ids),
    "take": lambda s, ids: torch.take_along_dim(s, ids, dim=-1),
    "index": lambda s, ids: s[torch.arange(s.shape[0])[:, None], ids],
    "one_hot": lambda s, ids: (F.one_hot(ids, s.shape[1]).to(s.dtype) * s[:, None]).sum(-1),
}
SUMS: dict[str, Fn] = {
    "keepdim": lambda w: w.sum(-1, keepdim=True),
    "unsqueeze": lambda w: w.sum(1).unsqueeze(1),
    "mean": lambda w: w.mean(-1, keepdim=True) * w.shape[1],
    "einsum": lambda w: torch.einsum("tk->t", w)[:, None],
}
DIVIDE: dict[str, Fn] = {
    "div": lambda w, d: w / d,
    "reciprocal": lambda w, d: w * d.reciprocal(),
    "in place": lambda w, d: w.clone().div_(d),
    "pow": lambda w, d: d**-1.0 * w,
}
CLAMP: dict[str, Fn] = {
    "clamp": lambda d, m: d.clamp(min=m),
    "clamp_min": lambda d, m: torch.clamp_min(d, m),
}
NORM2: dict[str, Fn] = {
    "norm": lambda w: torch.norm(w, p=2, dim=-1, keepdim=True),
    "vector_norm": lambda w: torch.linalg.vector_norm(w, dim=-1, keepdim=True),
    "by hand": lambda w: (w * w).sum(-1, keepdim=True).sqrt(),
}
MAXIMUM: dict[str, Fn] = {"amax": lambda w: w.amax(-1, keepdim=True), "max": lambda w: w.max(-1, keepdim=True).values}
GROUP_RANK: dict[str, Fn] = {
    "topk": lambda c, n: c.topk(n, dim=-1).values.sum(-1),
    "sort": lambda c, n: c.sort(-1, descending=True).values[..., :n].sum(-1),
    "amax": lambda c, n: c.amax(-1) if n == 1 else c.topk(n, sorted=False)[0].sum(dim=-1),
}
GROUP_MASK: dict[str, Fn] = {
    "scatter": lambda r, best: torch.zeros_like(r).scatter_(1, best, 1).bool(),
    "scatter bool": lambda r, best: torch.zeros_like(r, dtype=torch.bool).scatter(1, best, True),
    "ones": lambda r, best: ~torch.ones_like(r, dtype=torch.bool).scatter(1, best, False),
    "one_hot": lambda r, best: F.one_hot(best, r.shape[1]).sum(1) > 0,
    "compare": lambda r, best: (torch.arange(r.shape[1])[None, None] == best[..., None]).any(1),
}
GROUP_FILL: dict[str, Fn] = {
    "masked_fill": lambda c, kept, fill: c.masked_fill(~kept, fill),
    "where": lambda c, kept, fill: torch.where(kept, c, fill),
    "arithmetic": lambda c, kept, fill: c * kept if fill == 0 else c + torch.zeros_like(c).masked_fill(~kept, fill),
}
SILU: dict[str, Fn] = {
    "silu": F.silu,
    "product": lambda g: g * torch.sigmoid(g),
    "exp": lambda g: g / (1 + torch.exp(-g)),
}
GELU: dict[str, Fn] = {"gelu": F.gelu, "erf": lambda g: g * 0.5 * (1 + torch.erf(g / math.sqrt(2)))}
RELU2: dict[str, Fn] = {"pow": lambda g: F.relu(g) ** 2, "square": lambda g: torch.square(g.clamp(min=0))}


def _capped(inner: Fn) -> Fn:
    def f(g: Tensor, u: Tensor) -> Tensor:
        g, u = g.clamp(max=1.5), u.clamp(-1.0, 1.0)
        return (u + 1) * inner(g)

    return f


# name -> (gated, expression, spellings taking (g, u) or (g,))
ACTIVATIONS: dict[str, tuple[bool, Any, dict[str, Fn]]] = {
    "swiglu": (True, act.SWIGLU, {n: lambda g, u, f=f: f(g) * u for n, f in SILU.items()}),
    "geglu": (True, act.gelu(act.G) * act.U, {n: lambda g, u, f=f: u * f(g) for n, f in GELU.items()}),
    "up first": (True, act.silu(act.U) * act.G, {n: lambda g, u, f=f: f(u) * g for n, f in SILU.items()}),
    "capped": (
        True,
        (act.clamp(act.U, -1, 1) + 1) * act.silu(act.clamp(act.G, -sp.oo, sp.Rational(3, 2))),
        {n: _capped(f) for n, f in SILU.items()},
    ),
    "relu2": (False, act.relu(act.G) ** 2, RELU2),
    "gelu": (False, act.gelu(act.G), GELU),
}
ADD: dict[str, Fn] = {
    "index_add_": lambda out, t, y: out.index_add_(0, t, y),
    "index_add": lambda out, t, y: torch.index_add(out, 0, t, y),
    "scatter_add": lambda out, t, y: out.scatter_add(0, t[:, None].expand(-1, y.shape[1]), y),
    "index_put": lambda out, t, y: out.index_put((t,), out[t] + y),
    "accumulate": lambda out, t, y: out.index_put_((t,), y, accumulate=True),
}
FIND: dict[str, Fn] = {
    "where": lambda ids, e, n: torch.where(ids == e),
    "nonzero": lambda ids, e, n: (ids == e).nonzero().unbind(1),
    "one_hot": lambda ids, e, n: torch.where(F.one_hot(ids, n).permute(2, 0, 1)[e]),
    "sentinel": lambda ids, e, n: torch.where(F.one_hot(ids, n + 1).permute(2, 1, 0)[e])[::-1],
}
DENSE: dict[str, Fn] = {
    "scatter": lambda ids, w, n: torch.zeros(ids.shape[0], n, dtype=w.dtype).scatter(1, ids, w),
    "one_hot": lambda ids, w, n: torch.einsum("tk,tke->te", w, F.one_hot(ids, n).to(w.dtype)),
    "columns": lambda ids, w, n: torch.stack([(w * (ids == e)).sum(-1) for e in range(n)], 1),
}
LOOPS = ("loop", "slots", "dense loop")
DISPATCH = (*LOOPS, "gather", "gather bmm", "dense", "segments")
SCALE_AT = ("after", "numerator", "factor", "output")
SHARED_AT = ("after", "before", "base")


@dataclass(frozen=True)
class Spec:
    """The meaning. `shared`: none, plain or gated."""

    gating: Gating
    experts: Experts
    activation: str
    shared: str = "none"

    def shared_ir(self) -> SharedExpert | None:
        return None if self.shared == "none" else SharedExpert(I, act.SWIGLU, gated=self.shared == "gated")


@dataclass(frozen=True)
class Spelling:
    """One choice per slot; a slot the Spec does not have is ignored."""

    score: str
    select: str = "topk"
    pick: str = "gather"
    over_selected: bool = False
    total: str = "keepdim"
    divide: str = "div"
    clamp: str = "clamp"
    norm2: str = "norm"
    maximum: str = "amax"
    scale_at: str = "after"
    rank: str = "topk"
    mask: str = "scatter"
    fill: str = "masked_fill"
    activation: str = ""
    product: str = "linear"
    dispatch: str = "loop"
    find: str = "where"
    add: str = "index_add_"
    dense: str = "scatter"
    shared_at: str = "after"


class Composed(nn.Module):
    """The module of a Spec, written as a Spelling says. `mutation` breaks one thing; see the lists at the end."""

    def __init__(self, spec: Spec, how: Spelling, mutation: str = "") -> None:
        super().__init__()
        self.spec, self.how, self.mutation = spec, how, mutation
        g, e = spec.gating, spec.experts
        self.gate = nn.Parameter(torch.randn(g.num_experts, H) * 0.6)
        self.other = nn.Parameter(torch.randn(g.num_experts, H) * 0.6)
        # with fill 0 biased scores stay positive, or the masked experts would tie
        positive = g.groups is not None and g.groups.fill == 0.0
        self.register_buffer("bias", torch.rand(g.num_experts) if positive else torch.randn(g.num_experts) * 0.6)
        self.expert_scale = nn.Parameter(torch.rand(g.num_experts) + 0.5)
        width = 2 * I if e.form in (Form.CONCAT, Form.INTERLEAVED) else I
        copies = 2 if e.form is Form.SEPARATE else 1
        self.ups = self._weights(copies, width, H, e.up_transposed)
        self.downs = self._weights(1, H, I, e.down_transposed)
        self.up_biases = self._biases(copies, width) if e.up_bias else None
        self.down_biases = self._biases(1, H) if e.down_bias else None
        self.shared_up, self.shared_down = nn.Linear(H, 2 * I, bias=False), nn.Linear(I, H, bias=False)
        self.shared_gate = nn.Linear(H, 1, bias=False)

    def _weights(self, copies: int, out: int, into: int, transposed: bool) -> nn.ParameterList:
        shape = (into, out) if transposed else (out, into)
        return self._stored(copies, *shape)

    def _biases(self, copies: int, width: int) -> nn.ParameterList:
        return self._stored(copies, width)

    def _stored(self, copies: int, *shape: int) -> nn.ParameterList:
        n = self.spec.experts.num_experts
        if self.spec.experts.stacked:
            return nn.ParameterList([torch.randn(n, *shape) * 0.5 for _ in range(copies)])
        return nn.ParameterList([torch.randn(*shape) * 0.5 for _ in range(copies * n)])

    # Routing -----------------------------------------------------------------------------------------------------------

    def score(self, logits: Tensor) -> Tensor:
        return logits.softmax(0) if self.mutation == "score over tokens" else SCORES[self.spec.gating.score][self.how.score](logits)

    def criterion(self, logits: Tensor, s: Tensor, x: Tensor) -> Tensor:
        """What experts are ranked by, before groups."""
        c = {BiasOn.NONE: s, BiasOn.SCORE: s + self.bias, BiasOn.LOGIT: logits + self.bias}[self.spec.gating.bias]
        return c + F.linear(x, self.other) if self.mutation == "noise" else c

    def route(self, logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        g, how = self.spec.gating, self.how
        if how.over_selected:
            v, ids = SELECT[how.select](self.reversed(logits), g.k)
            w = self.score(logits.gather(1, ids) if v is None or self.mutation else v)
            return self.finish(w, ids), ids
        s = self.score(logits)
        c = self.criterion(logits, s, x)
        weighed = s + self.bias if g.bias_in_weights else s
        limited = self.limit(c) if g.groups is not None else c
        v, ids = SELECT[how.select](self.reversed(limited), g.k)
        from_values = how.pick == "values" and v is not None and not self.mutation
        w = v if from_values else PICK["gather" if how.pick == "values" else how.pick](weighed, ids)
        return self.finish(w, ids), ids

    def reversed(self, c: Tensor) -> Tensor:
        return -c if self.mutation == "smallest" else c

    def limit(self, c: Tensor) -> Tensor:
        groups, how = self.spec.gating.groups, self.how
        assert groups is not None
        by_group = c.view(c.shape[0], groups.count, -1)
        ranks = GROUP_RANK[how.rank](by_group, groups.top)
        kept = GROUP_MASK[how.mask](ranks, ranks.topk(groups.kept, dim=-1)[1])
        if how.mask == "scatter":
            wide = kept[:, :, None].expand(-1, -1, by_group.shape[2]).reshape(c.shape)
            return GROUP_FILL[how.fill](c, wide, groups.fill)
        if how.mask == "ones":
            return GROUP_FILL[how.fill](c, kept.repeat_interleave(by_group.shape[2], dim=1), groups.fill)
        return GROUP_FILL[how.fill](by_group, kept[..., None], groups.fill).flatten(1)

    def divisor(self, w: Tensor, norm: Normaliser) -> Tensor:
        how = self.how
        if self.mutation == "norm over tokens":
            return w.sum(0, keepdim=True)
        if norm.kind is Norm.MAX:
            d = MAXIMUM[how.maximum](w)
        elif norm.kind is Norm.PNORM:
            d = NORM2[how.norm2](w)
        elif norm.kind is Norm.EXPR:
            return (SUMS[how.total](w) + 1).sqrt()
        else:
            d = SUMS[how.total](w)
        if norm.clamp_min:
            d = CLAMP[how.clamp](d, norm.clamp_min)
        return d + norm.eps if norm.eps else d

    def finish(self, w: Tensor, ids: Tensor) -> Tensor:
        g, how = self.spec.gating, self.how
        scaled = g.scale != 1.0 and how.scale_at != "output"
        if g.norm is None or how.over_selected:
            w = w * g.scale if scaled else w
        else:
            d = self.divisor(w, g.norm)
            if scaled and how.scale_at == "numerator":
                w, scaled = w * g.scale, False
            if scaled and how.scale_at == "factor":
                w, scaled = w * (g.scale / d), False
            else:
                w = DIVIDE[how.divide](w, d)
            w = w * g.scale if scaled else w
        if g.expert_scale:
            w = w * self.expert_scale[ids]
        return w

    # Experts -----------------------------------------------------------------------------------------------------------

    def pick(self, stored: nn.ParameterList | None, part: int, e: int) -> Tensor | None:
        if stored is None:
            return None
        n = self.spec.experts.num_experts
        return stored[part][e] if self.spec.experts.stacked else stored[part * n + e]

    def product(self, x: Tensor, w: Any, b: Tensor | None, transposed: bool) -> Tensor:
        if self.how.product == "linear":
            return F.linear(x, w.t() if transposed else w, b)
        y = x @ (w if transposed else w.T)
        return y if b is None else y + b

    def activate(self, parts: list[Tensor]) -> Tensor:
        gated, _, spellings = ACTIVATIONS[self.spec.activation]
        form, h = self.spec.experts.form, parts[0]
        f = spellings[self.how.activation]
        if not gated:
            return f(h)
        if form is Form.SEPARATE:
            return f(parts[0], parts[1])
        if form is Form.CONCAT:
            return f(*h.chunk(2, dim=-1)) if self.how.product == "linear" else f(h[..., :I], h[..., I:])
        return f(h[..., ::2], h[..., 1::2]) if self.how.product == "linear" else f(*h.unflatten(-1, (I, 2)).unbind(-1))

    def expert(self, e: int, x: Tensor) -> Tensor:
        m, copies = self.spec.experts, 2 if self.spec.experts.form is Form.SEPARATE else 1
        ups = [self.product(x, self.pick(self.ups, p, e), self.pick(self.up_biases, p, e), m.up_transposed) for p in range(copies)]
        h = self.activate(ups)
        if self.mutation == "other activation" and e == 1:
            h = h.tanh()
        source = {0: 1, 1: 0}.get(e, e) if self.mutation == "swapped down" else e
        y = self.product(h, self.pick(self.downs, 0, source), self.pick(self.down_biases, 0, e), m.down_transposed)
        return y + self.shared_gate.weight[0] if self.mutation == "one bias" and e == 2 else y

    def batched(self, x: Tensor, up_of: Fn, x_dims: str, w_dims: str, out_dims: str) -> Tensor:
        """Rows x times the weights `up_of` gives, over any batch of experts."""
        m = self.spec.experts

        def times(v: Tensor, stored: nn.ParameterList, biases: nn.ParameterList | None, part: int, transposed: bool, v_dims: str) -> Tensor:
            weight = f"{w_dims}{'io' if transposed else 'oi'}"
            y = torch.einsum(f"{v_dims}i,{weight}->{out_dims}o", v, up_of(stored[part]))
            return y if biases is None else y + up_of(biases[part])

        copies = 2 if m.form is Form.SEPARATE else 1
        h = self.activate([times(x, self.ups, self.up_biases, p, m.up_transposed, x_dims) for p in range(copies)])
        return times(h, self.downs, self.down_biases, 0, m.down_transposed, out_dims)

    def numbers(self) -> list[int]:
        n = list(range(self.spec.experts.num_experts))
        return {"missing": n[:1] + n[2:], "twice": [*n, 0]}.get(self.mutation, n)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor, base: Tensor) -> Tensor:
        how, n = self.how, self.spec.experts.num_experts
        if how.dispatch == "loop":
            return self.loop(x, ids, w, base)
        if how.dispatch == "slots":
            y = torch.zeros(*ids.shape, H, dtype=x.dtype)
            for e in self.numbers():
                token, slot = FIND[how.find](ids, e, n)
                y[token, slot] = self.expert(e, x[token])
            return base + (y * w[..., None]).sum(1)
        dense = DENSE[how.dense](ids, w, n) if how.dispatch.startswith("dense") else None
        if how.dispatch == "dense loop":
            assert dense is not None
            for e in self.numbers():
                base = base + self.expert(e, x) * dense[:, e, None]
            return base
        if how.dispatch == "dense":
            return base + torch.einsum("te,teh->th", dense, self.batched(x, lambda t: t, "t", "e", "te"))
        if how.dispatch == "segments":
            order = ids.flatten().argsort(stable=True)
            chosen, token = ids.flatten()[order], order // ids.shape[1]
            y = self.batched(x[token], lambda t: t[chosen], "n", "n", "n")
            add = "index_add" if how.add == "index_put" else how.add  # a token comes k times here: overwriting is not adding
            return ADD[add](base.clone(), token, y * w.flatten()[order][:, None])
        y = self.gathered(x, ids)
        return base + (torch.einsum("tkh,tk->th", y, w) if how.add == "accumulate" else (y * w.unsqueeze(-1)).sum(1))

    def gathered(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.how.dispatch == "gather":
            return self.batched(x, lambda t: t[ids], "t", "tk", "tk")
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(ids.shape[1], 0)
        return self.batched(rows, lambda t: t.index_select(0, flat), "n", "n", "n").view(*ids.shape, H)

    def loop(self, x: Tensor, ids: Tensor, w: Tensor, out: Tensor) -> Tensor:
        how, n = self.how, self.spec.experts.num_experts
        out = out.clone()
        for e in self.numbers():
            token, slot = FIND[how.find](ids, e, n)
            weight = w[token, (ids.shape[1] - 1 - slot) if self.mutation == "other slot" else slot, None]
            if self.spec.experts.weight_on_input:
                y = self.expert(e, x[token] * weight)
            else:
                y = self.expert(e, x[token]) * weight
            if self.mutation == "other destination":
                token = x.shape[0] - 1 - token
            out = ADD[how.add](out * 0.5, token, y) if self.mutation == "decay" else ADD[how.add](out, token, y)
        return out

    def shared(self, x: Tensor) -> Tensor:
        g, u = self.shared_up(x).chunk(2, -1)
        y = self.shared_down(F.silu(g) * u)
        return self.shared_gate(x).sigmoid() * y if self.spec.shared == "gated" else y

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.gate)
        w, ids = self.route(logits, x)
        if self.mutation == "flipped ids":
            ids = ids.flip(1)
        if self.mutation == "rolled tokens":
            w, ids = w.roll(1, 0), ids.roll(1, 0)
        if self.mutation == "token factor":
            w = w * x.mean(-1, keepdim=True)
        has_shared, at = self.spec.shared != "none", self.how.shared_at
        on_output = self.spec.gating.scale != 1.0 and self.how.scale_at == "output"
        as_base = has_shared and at == "base" and not on_output
        base = self.shared(x) if as_base else torch.zeros_like(x)
        base = base + x if self.mutation == "residual base" else base
        before = self.shared(x) if has_shared and not as_base and at == "before" else None
        out = self.run_experts(x, ids, w, base)
        out = out * self.spec.gating.scale if on_output else out
        if has_shared and not as_base:
            out = before + out if before is not None else out + self.shared(x)
        return out


# Mutations that no Spec says: the routing or the experts are no longer what the Spec means --------------------------------

ROUTING_MUTATIONS = ("score over tokens", "norm over tokens", "smallest", "noise", "flipped ids", "rolled tokens", "token factor")
EXPERT_MUTATIONS = ("swapped down", "missing", "twice", "other activation", "one bias", "other slot", "other destination", "decay")
