"""A second reading of the IR: one token at a time, Python floats, no code shared with `moe_compile`.

The dataclasses of `moe_compile.ir` are read as data only. `moe_compile.ir` and every module of the catalogue are held
against these functions, so an error would have to be made twice to go unseen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from moe_compile import ir
from moe_compile.ir import BiasOn, Experts, Form, Gating, MaxK, MinK, MoeBlock, Norm, Normaliser, Score, Stored, SumK

Rows = Sequence[float]


@dataclass
class Parts:
    """The values at a block's edge: tokens [T, H], logits [T, E], parameters, and what is added to the routed result."""

    x: Tensor
    logits: Tensor
    up: list[Tensor]
    down: list[Tensor]
    up_bias: list[Tensor] = field(default_factory=list)
    down_bias: list[Tensor] = field(default_factory=list)
    bias: Tensor | None = None
    expert_scale: Tensor | None = None
    add: Tensor | None = None
    table: Tensor | None = None  # new id of each id the router gives
    padding: Tensor | None = None  # [T] bool: tokens that go to no expert
    up_scale: list[Tensor] = field(default_factory=list)  # of each output channel, [E, out] or [E, 1], or of each block
    down_scale: list[Tensor] = field(default_factory=list)
    up_zero: list[Tensor] = field(default_factory=list)  # laid out as the scales
    down_zero: list[Tensor] = field(default_factory=list)
    up_table: list[Tensor] = field(default_factory=list)  # what each code stands for
    down_table: list[Tensor] = field(default_factory=list)
    up_second: list[Tensor] = field(default_factory=list)  # scales beside those of blocks, [E, out] or [E, 1]
    down_second: list[Tensor] = field(default_factory=list)
    up_group: list[Tensor] = field(default_factory=list)  # the block of scales of each row or column, [E, R] or [R] for all
    down_group: list[Tensor] = field(default_factory=list)
    up_smooth: list[Tensor] = field(default_factory=list)  # of a projection's inputs: [in], [E, in], or one for each expert
    down_smooth: list[Tensor] = field(default_factory=list)
    up_a: list[Tensor] = field(default_factory=list)  # low-rank pairs, of the projections that have one: [E, r, in] and [E, out, r]
    up_b: list[Tensor] = field(default_factory=list)
    down_a: list[Tensor] = field(default_factory=list)
    down_b: list[Tensor] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)  # of experts that are a chain


def sigmoid(v: float) -> float:
    return 1.0 / (1.0 + math.exp(-v)) if v >= 0 else math.exp(v) / (1.0 + math.exp(v))


def softplus(v: float) -> float:
    return max(v, 0.0) + math.log1p(math.exp(-abs(v)))


def scores(kind: Score, row: Rows) -> list[float]:
    """The scores of one token."""
    if kind is Score.SOFTMAX:
        top = max(row)
        weights = [math.exp(v - top) for v in row]
        return [w / sum(weights) for w in weights]
    pointwise = {
        Score.IDENTITY: lambda v: v,
        Score.SIGMOID: sigmoid,
        Score.SQRT_SOFTPLUS: lambda v: math.sqrt(softplus(v)),
        Score.SOFTPLUS: softplus,
        Score.EXP: math.exp,
        Score.TANH: math.tanh,
        Score.RELU: lambda v: max(v, 0.0),
    }
    return [pointwise[kind](v) for v in row]


def best(values: Rows, n: int) -> list[int]:
    """Indices of the n largest values, largest first."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:n]


def route_token(g: Gating, logits: Rows, bias: Rows, expert_scale: Rows) -> tuple[list[float], list[int]]:
    """(weights, ids) of one token."""
    all_scores = list(logits) if g.score_over_selected else scores(g.score, logits)
    choice = list(logits) if g.bias is BiasOn.LOGIT else list(all_scores)
    if g.bias is not BiasOn.NONE:
        choice = [c + b for c, b in zip(choice, bias)]
    if g.groups is not None:
        size = g.num_experts // g.groups.count
        chunks = [choice[i : i + size] for i in range(0, g.num_experts, size)]
        ranks = [sum(sorted(c, reverse=True)[: g.groups.top]) for c in chunks]
        kept = best(ranks, g.groups.kept)
        choice = [c if i // size in kept else g.groups.fill for i, c in enumerate(choice)]
    ids = best(choice, g.k)
    w = [all_scores[i] for i in ids]
    if g.score_over_selected:
        w = scores(g.score, w)
    if g.bias_in_weights:
        w = [v + bias[i] for v, i in zip(w, ids)]
    if g.norm is not None:
        w = normalised(g.norm, w)
    w = [v * g.scale for v in w]
    if g.expert_scale:
        w = [v * expert_scale[i] for v, i in zip(w, ids)]
    return w, ids


def normalised(n: Normaliser, w: list[float]) -> list[float]:
    if n.kind is Norm.NONE:
        return w
    if n.kind is Norm.EXPR:
        return [float(v) for v in np.broadcast_to(printed_weights(n.expr)(np.array(w)), len(w))]
    reduction = {
        Norm.SUM: lambda: math.fsum(w),
        Norm.MAX: lambda: max(w),
        Norm.PNORM: lambda: math.fsum(abs(v) ** n.p for v in w) ** (1.0 / n.p),
    }[n.kind]()
    if n.clamp_min:
        reduction = max(reduction, n.clamp_min)
    return [divided(v, reduction + n.eps) for v in w]


@functools.cache
def printed_weights(expr: sp.Expr) -> Callable[[np.ndarray], np.ndarray]:
    """A normaliser's expression of all of a token's weights as numpy's code."""
    return sp.lambdify(sp.Symbol("w", real=True), expr, [{"SumK": np.sum, "MaxK": np.max, "MinK": np.min}, "numpy"])


def divided(a: float, b: float) -> float:
    """IEEE division."""
    return float(np.divide(a, b)) if b else math.copysign(math.inf, a) if a else math.nan


def activation(expr: sp.Expr, g: np.ndarray, u: np.ndarray | None) -> np.ndarray:
    """The activation expression through sympy's own code printer."""
    return through_printer(expr, {"g": g, "u": g if u is None else u}, g.shape)


def through_printer(expr: sp.Expr, values: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """An expression of arrays through sympy's own code printer; `mean` and `total` are over all that there is."""
    return np.broadcast_to(printed(expr, tuple(values), shape)(*values.values()), shape)


@functools.cache
def printed(expr: sp.Expr, names: tuple[str, ...], shape: tuple[int, ...]) -> Callable[..., np.ndarray]:
    """The expression as numpy's code: a function of the arrays by these names."""
    functions = {
        "mean": lambda v: np.broadcast_to(v, shape).mean(),
        "total": lambda v: np.broadcast_to(v, shape).sum(),
        "sigmoid": lambda v: 1.0 / (1.0 + np.exp(-v)),
        "relu": lambda v: np.maximum(v, 0.0),
        "softplus": lambda v: np.logaddexp(v, 0.0),
        "gelu_tanh": lambda v: 0.5 * v * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v**3))),
        "clamp": lambda v, lo, hi: np.minimum(np.maximum(v, float(lo)), float(hi)),
        "erf": np.vectorize(math.erf, otypes=[float]),
        "log1p": np.log1p,
        "expm1": np.expm1,
        "exp2": np.exp2,
    }
    return sp.lambdify([sp.Symbol(name, real=True) for name in names], expr, [functions, "numpy"])


def chain_row(e: Experts, p: Parts, index: int, x: np.ndarray) -> np.ndarray:
    """One expert that is a chain, on one token."""
    assert e.chain is not None
    own, at = [], 0
    for kind in e.chain.kinds:
        mine = array(p.parts[at + index * (kind == 1)])
        own.append(mine[index] if kind == 0 else mine)
        at += e.num_experts if kind == 1 else 1
    v = x
    for s in e.chain.stages:
        values = {"x": x}
        for i, m in enumerate(s.matrices):
            weight = own[m.operand].T if m.transposed else own[m.operand]
            values[f"y{i}"] = np.array([weight[m.offset + m.stride * r] @ v for r in range(s.width)])
        for i, q in enumerate(s.vectors):
            values[f"p{i}"] = np.array([own[q.operand][q.offset + q.stride * r] for r in range(s.width)])
        v = through_printer(s.map, values, (s.width,))
    return v


def array(t: Tensor) -> np.ndarray:
    return t.detach().double().numpy()


def code(how: Stored, words: np.ndarray, i: int, j: int, shifts: Tensor | None = None) -> int:
    """The code at (i, j), dug out of the word that it lies in."""
    per = len(how.order)
    (a, b), n = ((i // per, j), i) if how.axis == 1 else ((i, j // per), j)
    place = how.order[n % per]
    return int(words[a, b]) // 2 ** (how.bits * place if shifts is None else int(shifts.flatten()[place])) % 2**how.bits


def unpacked_zeros(how: Stored, zeros: np.ndarray | None, shifts: Tensor | None) -> np.ndarray | None:
    """Zero points one by one."""
    if zeros is None or not how.zero_order:
        return zeros
    axis, per = int(how.zeroed) - 1, len(how.zero_order)
    one = Stored(how.bits, torch.int32, axis=axis, order=how.zero_order)
    rows, columns = zeros.shape[0] * (per if axis == 1 else 1), zeros.shape[1] * (per if axis == 2 else 1)
    found = np.array([[code(one, zeros, i, j, shifts) + how.zero_offset for j in range(columns)] for i in range(rows)])
    return found % 2**how.bits if how.zero_wraps else found


def decoded(
    how: Stored,
    words: np.ndarray,
    scales: np.ndarray | None,
    zeros: np.ndarray | None,
    table: np.ndarray | None,
    seconds: np.ndarray | None = None,
    group: np.ndarray | None = None,
    shifts: tuple[Tensor | None, Tensor | None] = (None, None),
) -> np.ndarray:
    """[R, C]: what is stored, element by element."""
    per, table = len(how.order), np.array(how.values) if how.values else table
    zeros = unpacked_zeros(how, zeros, shifts[1])
    rows, columns = words.shape[0] * (per if how.axis == 1 else 1), words.shape[1] * (per if how.axis == 2 else 1)
    out = np.empty((rows, columns))
    for i in range(rows):
        for j in range(columns):
            q = code(how, words, i, j, shifts[0]) if how.axis else words[i, j]
            row, column = ((i if group is None or how.indexed == 2 else group[i]), (j if group is None or how.indexed == 1 else group[j]))
            at = tuple([int(n) // b for n, b in ((row, how.rows), (column, how.columns)) if b] or [0])
            zero, added = 0 if zeros is None else zeros[at], how.zeroed == ir.stored.Zero.ADDED
            value = (q if table is None else table[int(q)]) + how.offset - (0 if added else zero)
            scale = 1.0 if scales is None else 2.0 ** (scales[at] - 127) if how.exponents else scales[at]
            if how.exponents == ir.stored.Exponent.BITS and scales[at] == 0:
                scale = 0.0
            value = (value / scale if how.scaled == ir.stored.Scale.DIVIDES else value * scale) + (zero if added else 0)
            if seconds is not None:
                second = seconds[tuple([n // b for n, b in ((i, how.second_rows), (j, how.second_columns)) if b] or [0])]
                value = value / second if how.second == ir.stored.Scale.DIVIDES else value * second
            out[i, j] = value
    return out


def rounded(how: ir.Rows | None, x: np.ndarray, smooth: np.ndarray | None = None) -> np.ndarray:
    """One row as a product reads it, group by group."""
    if how is None:
        return x
    if how.static:
        s = how.step or (1.0 if smooth is None else float(smooth[0]))
        q = torch.from_numpy(np.clip(x / s, how.low, how.top))
        return (q.to(how.dtype).double() if how.dtype.is_floating_point else q.round()).numpy() * s
    if smooth is not None and how.smooth:
        x = x / smooth if how.smooth == ir.stored.Scale.DIVIDES else x * smooth
    out = np.empty_like(x)
    size = how.group or len(x)
    largest = torch.finfo(how.dtype).max if how.dtype.is_floating_point else 127
    for i in range(0, len(x), size):
        group = x[i : i + size]
        bare = float(np.abs(group).max()) / largest
        s = max(bare, how.floor)
        if how.power:
            bare = s = 2.0 ** math.ceil(math.log2(s))
        q = torch.from_numpy(np.divide(group, s))
        q = q.to(how.dtype).double() if how.dtype.is_floating_point else q.round()
        out[i : i + size] = q.numpy() * (s if how.floored else bare)
    return out


def expert_row(e: Experts, p: Parts, index: int, x: np.ndarray) -> np.ndarray:
    """One expert on one token."""
    if e.chain is not None:
        return chain_row(e, p, index, x)

    def at(ts: list[Tensor], part: int = 0) -> np.ndarray:
        return array(ts[part][index] if e.stacked else ts[part * e.num_experts + index])

    def product(weight: np.ndarray, transposed: bool, v: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        y = v @ weight if transposed else weight @ v
        return y if bias is None else y + bias

    def bias(ts: list[Tensor], part: int = 0) -> np.ndarray | None:
        return at(ts, part) if (e.down_bias if ts is p.down_bias else e.up_bias) else None

    def matrix(name: str, part: int = 0) -> np.ndarray:
        how, words = getattr(e, f"{name}_stored"), at(getattr(p, name), part)
        if how is None:
            return words
        scales, zeros, seconds = (at(ts, part) if (ts := getattr(p, f"{name}_{what}")) else None for what in ("scale", "zero", "second"))
        table = getattr(p, f"{name}_table")
        groups = getattr(p, f"{name}_group")
        group = None if not groups else array(groups[part]) if e.stacked and groups[part].ndim == 1 else at(groups, part)
        shifts: tuple[Tensor | None, Tensor | None] = (None, None)
        if how.shifted:
            one = part if e.stacked else part * e.num_experts + index
            shifts, table = (table[one], table[len(table) // 2 + one] if how.zero_order else None), []
        return decoded(how, words, scales, zeros, array(table[0]) if table else None, seconds, group, shifts)

    def pair(s: float, a: list[Tensor], b: list[Tensor], v: np.ndarray, part: int = 0) -> np.ndarray | float:
        return s * (at(b, part) @ (at(a, part) @ v)) if s else 0.0

    def smooth(ts: list[Tensor]) -> np.ndarray | None:
        if not ts:
            return None
        k = array(ts[index] if len(ts) > 1 else ts[0])
        return k[index] if k.ndim > 1 else k

    x = rounded(e.up_rows, x, smooth(p.up_smooth))
    up = product(matrix("up"), e.up_transposed, x, bias(p.up_bias)) + pair(e.up_pair, p.up_a, p.up_b, x)
    halves: dict[Form, tuple[np.ndarray, np.ndarray | None]] = {
        Form.SINGLE: (up, None),
        Form.CONCAT: (up[: e.intermediate], up[e.intermediate :]),
        Form.INTERLEAVED: (up[0::2], up[1::2]),
    }
    if e.form is Form.SEPARATE:
        second = pair(e.second_pair, p.up_a, p.up_b, x, int(e.up_pair != 0))
        g, u = up, product(matrix("up", 1), e.up_transposed, x, bias(p.up_bias, 1)) + second
    else:
        g, u = halves[e.form]
    a = rounded(e.down_rows, activation(e.activation, g, u), smooth(p.down_smooth))
    y = product(matrix("down"), e.down_transposed, a, bias(p.down_bias))
    return y + pair(e.down_pair, p.down_a, p.down_b, a)


def experts(e: Experts, p: Parts, ids: list[list[int]], weights: list[list[float]]) -> np.ndarray:
    """[T, H_out] in float64."""
    x = array(p.x)
    out = np.zeros((len(ids), e.out_features)) if p.add is None else array(p.add).copy()
    for t, (row_ids, row_weights) in enumerate(zip(ids, weights)):
        for i, w in zip(row_ids, row_weights):
            i -= e.first
            if e.num_experts <= i < e.num_experts + e.num_identity:
                out[t] += w * x[t]
            elif 0 <= i < e.num_experts:
                out[t] += expert_row(e, p, i, w * x[t]) if e.weight_on_input else w * expert_row(e, p, i, x[t])
    return out


def block(gating: Gating, e: Experts, p: Parts) -> np.ndarray:
    """A whole block with its routing, [T, H_out] in float64."""
    bias = [] if p.bias is None else p.bias.double().tolist()
    per_expert = [] if p.expert_scale is None else p.expert_scale.double().tolist()
    routed = [route_token(gating, row, bias, per_expert) for row in p.logits.double().tolist()]
    weights, ids = [list(w) for w, _ in routed], [list(i) for _, i in routed]
    if p.table is not None:
        ids = [[int(p.table[i]) for i in row] for row in ids]
    if p.padding is not None:
        ids = [[-1] * gating.k if pad else row for pad, row in zip(p.padding.tolist(), ids)]
    return experts(e, p, ids, weights)


def of_ir(ir: MoeBlock, p: Parts) -> Tensor:
    """`block` for a recovered block, as a tensor."""
    assert ir.gating is not None
    return torch.from_numpy(block(ir.gating, ir.experts, p))


__all__ = ["MaxK", "MinK", "Parts", "SumK", "block", "experts", "of_ir", "route_token"]
