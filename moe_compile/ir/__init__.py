"""The meaning of a Mixture-of-Experts block: small frozen values, each its own oracle.

`evaluate` runs in plain torch in the dtype asked for (float64 by default). Every lowering on every target is tested
against it. Nothing here asks what a kernel can do.

Shapes used throughout: T tokens, E experts, k selected experts a token, H hidden size, I expert intermediate size.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from . import scalar as act
from .score import Score as Score
from .score import score as score


class BiasOn(enum.IntEnum):
    """Where the selection bias [E] enters: nowhere, on the scores, on the logits (selection only)."""

    NONE = 0
    SCORE = 1
    LOGIT = 2


class Norm(enum.IntEnum):
    """Reduction over the k weights that they are divided by."""

    NONE = 0
    SUM = 1
    MAX = 2
    PNORM = 3
    EXPR = 4  # a recovered expression that no kernel knows: evaluated outside the gating op


class Form(enum.IntEnum):
    """How the up projection of one expert is stored."""

    SINGLE = 0  # one matrix, no gate
    CONCAT = 1  # [g; u] along the output dim
    INTERLEAVED = 2  # g0 u0 g1 u1 ...
    SEPARATE = 3  # two tensors (stacked) or 2E tensors (list: E gates, then E ups)


class Overlap(enum.IntEnum):
    """Where the op `experts_shared` runs the shared expert."""

    SERIAL = 0  # on the main stream
    SIDE = 1  # on a side stream, beside the routed experts
    BY_TOKENS = 2  # on a side stream for few tokens


@dataclass(frozen=True)
class Groups:
    """Group-limited selection (DeepSeek-V3 technical report, section 2.1.2).

    Experts fall into `count` equal groups; a group's score is the sum of its `top` best selection scores (`top=1` is the
    max); the `kept` best groups stay, all other experts' selection scores become `fill`.
    """

    count: int
    kept: int
    top: int
    fill: float


@dataclass(frozen=True)
class Normaliser:
    """w -> w / guard(reduction(w)); the guard is `+ eps` or `max(·, clamp_min)`.

    `expr` (kind EXPR only) is the new weight as a sympy expression in the symbol `w` and the reductions
    SumK, MaxK, MinK over the k weights of a token.
    """

    kind: Norm
    eps: float = 0.0
    clamp_min: float = 0.0
    p: float = 1.0
    expr: sp.Expr | None = None


class SumK(sp.Function):  # type: ignore[misc]
    """Sum over the k selected experts of one token."""

    nargs = 1


class MaxK(sp.Function):  # type: ignore[misc]
    nargs = 1


class MinK(sp.Function):  # type: ignore[misc]
    nargs = 1


W = sp.Symbol("w", real=True)


@dataclass(frozen=True)
class Gating:
    """Router logits to (weights, ids).

    s = score(logits) over all experts, or over the selected ones when `score_over_selected` (top-k, then score);
    ids = topk(groups(s + bias)), or topk(logits + bias) with `BiasOn.LOGIT`; w = s[ids] (+ bias[ids] when `bias_in_weights`);
    w = normalise(w) * scale * expert_scale[ids].
    """

    num_experts: int
    k: int
    score: Score
    score_over_selected: bool = False
    bias: BiasOn = BiasOn.NONE
    bias_in_weights: bool = False
    groups: Groups | None = None
    norm: Normaliser | None = None
    scale: float = 1.0
    expert_scale: bool = False
    score_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32

    def evaluate(
        self, logits: Tensor, bias: Tensor | None = None, expert_scale: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor]:
        """logits [T, E], bias [E], expert_scale [E] -> weights [T, k] in `dtype`, ids [T, k] int64."""
        choice, raw = self.selection(logits, bias, dtype)
        ids = choice.topk(self.k, dim=-1).indices
        return self.weights_of(raw, ids, bias, expert_scale), ids

    def selection(self, logits: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """([T, E] what top-k chooses by, [T, E] what the weights are gathered from)."""
        logits = logits.to(dtype)
        raw = logits if self.score_over_selected else score(self.score, logits)
        choice = logits if self.bias is BiasOn.LOGIT else raw
        if self.bias is not BiasOn.NONE:
            assert bias is not None
            choice = choice + bias.to(dtype)
        if self.groups is not None:
            g = self.groups
            by_group = choice.unflatten(-1, (g.count, -1))
            best = by_group.topk(g.top, dim=-1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(g.kept, dim=-1).indices, True)
            choice = by_group.masked_fill(~kept[..., None], g.fill).flatten(-2)
        return choice, raw

    def weights_of(self, raw: Tensor, ids: Tensor, bias: Tensor | None = None, expert_scale: Tensor | None = None) -> Tensor:
        """Weights [T, k] of given ids: gather, score, normalise, scale."""
        w = raw.gather(-1, ids)
        if self.score_over_selected:
            w = score(self.score, w)
        if self.bias_in_weights:
            assert bias is not None
            w = w + bias.to(w.dtype)[ids]
        if self.norm is not None:
            w = normalise(self.norm, w)
        if self.scale != 1.0:
            w = w * self.scale
        if self.expert_scale:
            assert expert_scale is not None
            w = w * expert_scale.to(w.dtype)[ids]
        return w


def normalise(norm: Normaliser, w: Tensor) -> Tensor:
    """w [T, k] -> [T, k]."""
    if norm.kind is Norm.NONE:
        return w
    if norm.kind is Norm.EXPR:
        return _evaluate_norm(norm.expr, w)
    if norm.kind is Norm.SUM:
        d = w.sum(-1, keepdim=True)
    elif norm.kind is Norm.MAX:
        d = w.amax(-1, keepdim=True)
    else:
        d = torch.linalg.vector_norm(w, ord=norm.p, dim=-1, keepdim=True)
    if norm.clamp_min:
        d = d.clamp(min=norm.clamp_min)
    return w / (d + norm.eps)


def _evaluate_norm(expr: Any, w: Tensor) -> Tensor:
    """Evaluate a recovered normaliser expression on w [T, k]."""
    reductions: dict[Any, Any] = {SumK: torch.sum, MaxK: torch.amax, MinK: torch.amin}

    def full(v: Any) -> Tensor:
        return v if isinstance(v, Tensor) else torch.full_like(w, v)

    def known(e: Any, go: Any) -> Any:
        if e.func in reductions:
            return reductions[e.func](full(go(e.args[0])).expand_as(w), -1, keepdim=True)
        return w if e == W else None

    return full(act.fold(expr, act.Tensors(), known)).expand_as(w)


@dataclass(frozen=True)
class Experts:
    """out[t] = Σ_j w[t,j] · down[e] act(up[e] x[t]) with e = ids[t,j]; ids outside [0, E) contribute nothing.

    With `num_identity` = z > 0 ids E .. E+z-1 are identity experts, contributing w · x[t].
    `up_transposed`: the up weight is stored [..., in, out] instead of [..., out, in]; `down_transposed` likewise.
    `stacked`: one 3-D tensor [E, ·, ·] (two for SEPARATE), else a list of E (2E) matrices.
    `weight_on_input`: the routing weight multiplies x instead of the expert's output.
    `ids_mapped`: ids go through a table or a mask after the top-k (logical to physical experts, padding tokens).
    `up_scale`, `down_scale`: the projection's sum is multiplied, before its bias, by a number for each output channel (or one for each
    expert): s[e,i] Σ_m x[m] W[e,i,m]. `weight_dtype`: what such weights are stored in when it is no float.
    `row_bits` = 8: each row that goes into a product is rounded, to s · round(x / s) with s = max|x| / 127, at least `row_floor`.
    """

    num_experts: int
    hidden: int
    intermediate: int
    out_features: int
    form: Form
    activation: sp.Expr
    stacked: bool = True
    up_transposed: bool = False
    down_transposed: bool = False
    up_bias: bool = False
    down_bias: bool = False
    weight_on_input: bool = False
    num_identity: int = 0
    ids_mapped: bool = False
    dtype: torch.dtype = torch.float32
    up_scale: bool = False
    down_scale: bool = False
    weight_dtype: torch.dtype | None = None
    row_bits: int = 0
    row_floor: float = 0.0

    @property
    def scaled(self) -> bool:
        """Whether a projection has scales."""
        return self.up_scale or self.down_scale

    def expert(
        self,
        e: int,
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        up_bias: Sequence[Tensor],
        down_bias: Sequence[Tensor],
        up_scale: Sequence[Tensor] = (),
        down_scale: Sequence[Tensor] = (),
    ) -> dict[str, Any]:
        """The matrices of one expert as [out, in]: gate, up (None for SINGLE), down, and the biases and scales or None."""
        n = self.num_experts

        def pick(ts: Sequence[Tensor], part: int) -> Tensor | None:
            if not ts:
                return None
            return ts[part][e] if self.stacked else ts[part * n + e]

        def split(t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            if t is None or self.form is Form.SINGLE:
                return t, None
            if t.ndim == 1 and t.shape[0] == 1:  # one scale for all channels
                return t, t
            if self.form is Form.CONCAT:
                return t[: self.intermediate], t[self.intermediate :]
            return t[0::2], t[1::2]

        def orient(t: Tensor | None, transposed: bool) -> Tensor | None:
            return t.t() if transposed and t is not None else t

        if self.form is Form.SEPARATE:
            g, u = orient(pick(up, 0), self.up_transposed), orient(pick(up, 1), self.up_transposed)
            gb, ub = pick(up_bias, 0), pick(up_bias, 1)
            gs, us = pick(up_scale, 0), pick(up_scale, 1)
        else:
            g, u = split(orient(pick(up, 0), self.up_transposed))
            gb, ub = split(pick(up_bias, 0))
            gs, us = split(pick(up_scale, 0))
        d, db, ds = orient(pick(down, 0), self.down_transposed), pick(down_bias, 0), pick(down_scale, 0)
        return dict(g=g, u=u, gb=gb, ub=ub, d=d, db=db, gs=gs, us=us, ds=ds)

    def apply(self, x: Tensor, m: dict[str, Any]) -> Tensor:
        """One expert's function on rows x [N, H] -> [N, H], with the matrices `expert` returned."""

        def project(rows: Tensor, name: str) -> Tensor:
            w, b, s = (None if t is None else t.to(x.dtype) for t in (m[name], m[name + "b"], m[name + "s"]))
            assert w is not None
            rows = self.round_rows(rows) if self.row_bits else rows
            if s is None:
                return F.linear(rows, w, b)
            out = F.linear(rows, w) * s
            return out if b is None else out + b

        u = None if m["u"] is None else project(x, "u")
        return project(act.evaluate(self.activation, project(x, "g"), u), "d")

    def round_rows(self, rows: Tensor) -> Tensor:
        """rows [N, ·] in 2^row_bits steps, symmetric; a row of zeros stays one."""
        steps = 2 ** (self.row_bits - 1) - 1
        s = (rows.abs().amax(-1, keepdim=True) / steps).clamp(min=self.row_floor)
        return (rows / torch.where(s == 0, 1, s)).round() * s

    def evaluate(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        up_bias: Sequence[Tensor] = (),
        down_bias: Sequence[Tensor] = (),
        add: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        up_scale: Sequence[Tensor] = (),
        down_scale: Sequence[Tensor] = (),
    ) -> Tensor:
        """x [T, H], ids [T, k], weights [T, k] -> [T, H] in `dtype`; `add` [T, H] is added to the result.

        Scales are stored as biases are, [E, out] (a list: [out]), or [E, 1] ([1]) for one number an expert.
        """
        x, weights = x.to(dtype), weights.to(dtype)
        out = x.new_zeros(x.shape[0], self.out_features) if add is None else add.to(dtype).clone()
        for e in range(self.num_experts):
            t, j = torch.where(ids == e)
            if not len(t):
                continue
            w = weights[t, j, None]
            m = self.expert(e, up, down, up_bias, down_bias, up_scale, down_scale)
            y = self.apply(x[t] * w, m) if self.weight_on_input else w * self.apply(x[t], m)
            out = out.index_add(0, t, y)
        if self.num_identity:
            t, j = torch.where((ids >= self.num_experts) & (ids < self.num_experts + self.num_identity))
            out = out.index_add(0, t, x[t] * weights[t, j, None])
        return out


@dataclass(frozen=True)
class SharedExpert:
    """An MLP on the same tokens, added to the routed result: [sigmoid(x·w_gate)] · down act(up x)."""

    intermediate: int
    activation: sp.Expr
    gated: bool = False
    bias: bool = False


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block: `gating` is None when the routing runs as the user wrote it (`routing_note` says why).

    `boundary` names the graph values at the edge (tokens, logits, ids, weights, parameters, result); it is not part of
    the meaning, so two blocks with the same maths compare equal.
    """

    gating: Gating | None
    experts: Experts
    shared: SharedExpert | None = None
    routing_note: str = ""
    boundary: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def evaluate(
        self,
        x: Tensor,
        logits: Tensor,
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        up_bias: Sequence[Tensor] = (),
        down_bias: Sequence[Tensor] = (),
        bias: Tensor | None = None,
        expert_scale: Tensor | None = None,
        add: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        up_scale: Sequence[Tensor] = (),
        down_scale: Sequence[Tensor] = (),
    ) -> Tensor:
        """The oracle of the routed part: x [T, H], logits [T, E] -> [T, H]; the shared expert's output goes in as `add`."""
        if self.gating is None:
            raise ValueError("this block's routing was left as written: evaluate its experts with the ids and weights of the graph")
        w, ids = self.gating.evaluate(logits, bias, expert_scale, dtype)
        return self.experts.evaluate(x, ids, w, up, down, up_bias, down_bias, add, dtype, up_scale, down_scale)


NO_FILL = -math.inf


class Rejection(Exception):
    """Why something was left exactly as the user wrote it.

    An exception only so that `strict=True` and deep helpers can raise it; passes return it as a value.
    reason: one sentence naming the first failing predicate: for people, never for control flow. code: what the passes decide by, and part:
    which part of a block is concerned ("routing", "experts", "block", "shared", ...); "" where nothing depends on them.
    source: file:line of the user's code, or "". stage: the pass.
    """

    def __init__(self, reason: str, node: Any = None, stage: str = "recover", source: str = "", *, code: str = "", part: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.stage, self.source, self.code, self.part = reason, node, stage, source, code, part

    def __repr__(self) -> str:
        return f"Rejection({self.stage}: {self.reason} at {self.source or '?'})"
