"""The routed experts in plain torch: any device, any float dtype. What runs where no kernel does.

One matrix product per active expert over its rows, rows ordered by expert with a stable sort, so results are deterministic.
It reads the row counts on the host (on an accelerator: one synchronisation), which is why a target with kernels of its own
never comes here on its steady path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir import Form
from ...ir import scalar as act
from ...ir.records import Layout as Layout

Dual = tuple[Tensor, Tensor | None, Tensor | None]  # value, d/dg, d/du; None is a derivative of zero


def check_sizes(layout: Layout, *lists: Sequence[Tensor]) -> None:
    """The kernels index by expert number: a parameter with fewer experts than the call says must not reach them."""
    for ts in lists:
        short = any(t.shape[0] < layout.num_experts for t in ts) if layout.stacked else bool(ts) and len(ts) < layout.num_experts
        if short:
            raise ValueError(f"moe_compile::experts: num_experts is {layout.num_experts}, but a parameter holds fewer experts")


def check_rows(x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """The kernels read as many rows of one as of another."""
    if not x.shape[0] == ids.shape[0] == weights.shape[0]:
        raise ValueError(f"moe_compile::experts: {x.shape[0]} tokens, {ids.shape[0]} rows of ids, {weights.shape[0]} of weights")


@dataclass(frozen=True)
class Rows:
    """The (token, slot) pairs ordered by expert; pairs of no expert are left out."""

    slots: Tensor  # [N] position t * k + j
    tokens: Tensor  # [N]
    counts: list[int]  # rows per expert
    identity: Tensor | None  # [M] slots of identity experts


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_rows(ids: Tensor, layout: Layout) -> Rows:
    """Order the pairs of ids [T, k] by expert."""
    n = layout.num_experts
    flat = ids.reshape(-1).long()
    known = torch.where((flat >= 0) & (flat < n), flat, n)
    slots = known.argsort(stable=True)
    counts: list[int] = torch.bincount(known, minlength=n + 1)[:n].tolist()
    slots = slots[: sum(counts)]
    identity = None
    if layout.num_identity:
        identity = ((flat >= n) & (flat < n + layout.num_identity)).nonzero().squeeze(-1)
    return Rows(slots, slots // max(ids.shape[1], 1), counts, identity)


def up_matrices(layout: Layout, up: Sequence[Tensor], e: int, dtype: torch.dtype) -> list[Tensor]:
    """The up projection of expert e as [out, in]: one tensor, or gate and up."""
    mats = [layout.at(up, p, e).to(dtype) for p in range(layout.halves())]
    return [m.t() for m in mats] if layout.up_transposed else mats


def split_pre(layout: Layout, h: Tensor) -> tuple[Tensor, ...]:
    """Columns of one up product as (g, u) or (g,)."""
    if layout.form == Form.CONCAT:
        return h.chunk(2, -1)
    if layout.form == Form.INTERLEAVED:
        return h[..., 0::2], h[..., 1::2]
    return (h,)


def join_pre(layout: Layout, pre: Tensor) -> list[Tensor]:
    """[N, (g | u)] back in the column order of the up tensors."""
    if layout.form == Form.INTERLEAVED:
        return [torch.stack(pre.chunk(2, -1), -1).flatten(-2)]
    return list(pre.chunk(2, -1)) if layout.form == Form.SEPARATE else [pre]


def forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    add: Tensor | None,
    layout: Layout,
    inner: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """x [T, H] -> (out [T, H_out] in x.dtype, pre-activations [T * k, (g | u)] in x.dtype, ordered by expert, zeros behind).

    `inner`: done to the activations before the down projection.
    """
    acc = accumulate_dtype(x.dtype)
    rows = group_rows(ids, layout)
    w = weights.reshape(-1, 1).to(acc)
    inputs = x[rows.tokens]
    if layout.weight_on_input:
        inputs = (inputs.to(acc) * w[rows.slots]).to(x.dtype)
    pre = x.new_zeros(ids.numel(), layout.pre_width(down))
    outs = x.new_zeros(ids.numel(), layout.out_features(down), dtype=acc)
    start = 0
    for e, count in enumerate(rows.counts):
        if not count:
            continue
        here = slice(start, start + count)
        start += count
        parts: list[Tensor] = []
        for p, m in enumerate(up_matrices(layout, up, e, x.dtype)):
            bias = layout.at(up_bias, p, e).to(x.dtype) if up_bias else None
            parts.extend(split_pre(layout, F.linear(inputs[here], m, bias)))
        torch.cat(parts, -1, out=pre[here])
        a = _activate(layout, pre[here], acc).to(x.dtype)
        y = F.linear(a if inner is None else inner(a), _down(layout, down, e, x.dtype)).to(acc)
        if down_bias:
            y = y + layout.at(down_bias, 0, e).to(acc)
        slots = rows.slots[here]
        outs[slots] = y if layout.weight_on_input else y * w[slots]
    if rows.identity is not None:
        outs[rows.identity] = x[rows.identity // ids.shape[1]].to(acc) * w[rows.identity]
    out = outs.view(*ids.shape, outs.shape[-1]).sum(1)
    return (out if add is None else out + add.to(acc)).to(x.dtype), pre


def _down(layout: Layout, down: Sequence[Tensor], e: int, dtype: torch.dtype) -> Tensor:
    m = layout.at(down, 0, e).to(dtype)
    return m.t() if layout.down_transposed else m


def _activate(layout: Layout, pre: Tensor, acc: torch.dtype) -> Tensor:
    g, u = (*pre.to(acc).chunk(2, -1),) if layout.gated else (pre.to(acc), None)
    return act.run(layout.act_ops, layout.act_consts, g, u)


class Grads:
    """Gradients asked for, in the order x, weights, *up, *down, *up_bias, *down_bias; nothing else is computed."""

    def __init__(self, needs: Sequence[bool], tensors: Sequence[Tensor], sizes: Sequence[int], layout: Layout) -> None:
        self.out = [torch.zeros_like(t, memory_format=torch.contiguous_format) if n else None for t, n in zip(tensors, needs, strict=True)]
        self.first = [2 + sum(sizes[:i]) for i in range(len(sizes))]
        self.sizes, self.layout = sizes, layout

    def of(self, which: int, part: int, e: int) -> Tensor | None:
        """Where expert e's gradient of list `which` (up, down, up_bias, down_bias) goes, or None when nobody asks."""
        if not self.sizes[which]:
            return None
        at = self.first[which] + (part if self.layout.stacked else part * self.layout.num_experts + e)
        whole = self.out[at]
        return whole[e] if whole is not None and self.layout.stacked else whole

    def asked(self) -> list[Tensor]:
        return [g for g in self.out if g is not None]


def backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    layout: Layout,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of what `needs` flags among x, weights, *up, *down, *up_bias, *down_bias, in that order."""
    acc = accumulate_dtype(x.dtype)
    lists = (up, down, up_bias, down_bias)
    grads = Grads(needs, [x, weights, *up, *down, *up_bias, *down_bias], [len(t) for t in lists], layout)
    rows = group_rows(ids, layout)
    w = weights.reshape(-1, 1).to(acc)
    grad_w = w.new_zeros(w.shape[0])
    grad_x = x.new_zeros(ids.numel(), x.shape[1], dtype=acc) if needs[0] else None
    start = 0
    for e, count in enumerate(rows.counts):
        if count:
            slots, tokens = rows.slots[start : start + count], rows.tokens[start : start + count]
            _expert_backward(e, slots, tokens, pre[start : start + count], grad, x, w, lists, layout, grads, grad_x, grad_w, acc)
            start += count
    if rows.identity is not None:
        tokens = rows.identity // ids.shape[1]
        grad_w[rows.identity] = (grad[tokens].to(acc) * x[tokens].to(acc)).sum(-1)
        if grad_x is not None:
            grad_x[rows.identity] = grad[tokens].to(acc) * w[rows.identity]
    if grad_x is not None:
        grads.out[0] = grad_x.view(*ids.shape, grad_x.shape[-1]).sum(1).to(x.dtype)
    if needs[1]:
        grads.out[1] = grad_w.view_as(ids).to(weights.dtype)
    return grads.asked()


def _expert_backward(
    e: int,
    slots: Tensor,
    tokens: Tensor,
    pre: Tensor,
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    lists: tuple[Sequence[Tensor], ...],
    layout: Layout,
    grads: Grads,
    grad_x: Tensor | None,
    grad_w: Tensor,
    acc: torch.dtype,
) -> None:
    """One expert's share of every gradient, from its rows."""
    up, down, _, down_bias = lists
    g_out, row_w, inputs = grad[tokens].to(x.dtype), w[slots], x[tokens]
    value, dg, du = _activate_dual(layout, pre, acc)
    grad_a = (g_out @ _down(layout, down, e, x.dtype)).to(acc)
    if layout.weight_on_input:
        inputs, grad_y = (inputs.to(acc) * row_w).to(x.dtype), g_out
    else:
        grad_w[slots] = (grad_a * value).sum(-1) + (g_out.to(acc) @ layout.at(down_bias, 0, e).to(acc) if down_bias else 0.0)
        grad_a, grad_y = grad_a * row_w, (g_out.to(acc) * row_w).to(x.dtype)
    _store_product(grads.of(1, 0, e), grad_y, value.to(x.dtype), layout.down_transposed)
    _store_sum(grads.of(3, 0, e), grad_y)
    slopes = (dg, du) if layout.gated else (dg,)
    grad_pre = torch.cat([torch.zeros_like(grad_a) if d is None else grad_a * d for d in slopes], -1).to(x.dtype)
    grad_in = None
    for p, (part, m) in enumerate(zip(join_pre(layout, grad_pre), up_matrices(layout, up, e, x.dtype), strict=True)):
        _store_product(grads.of(0, p, e), part, inputs, layout.up_transposed)
        _store_sum(grads.of(2, p, e), part)
        if grad_x is not None or layout.weight_on_input:
            product = (part @ m).to(acc)
            grad_in = product if grad_in is None else grad_in + product
    if grad_in is None:
        return
    if layout.weight_on_input:
        grad_w[slots] = (grad_in * x[tokens].to(acc)).sum(-1)
        grad_in = grad_in * row_w
    if grad_x is not None:
        grad_x[slots] = grad_in


def _store_product(out: Tensor | None, rows: Tensor, inputs: Tensor, transposed: bool) -> None:
    """out [n, k] (or [k, n]) = Σ over rows of rows [N, n] x inputs [N, k]."""
    if out is not None:
        left, right = (inputs, rows) if transposed else (rows, inputs)
        out.copy_(left.t() @ right)


def _store_sum(out: Tensor | None, rows: Tensor) -> None:
    if out is not None:
        out.copy_(rows.sum(0, dtype=accumulate_dtype(rows.dtype)))


def _activate_dual(layout: Layout, pre: Tensor, acc: torch.dtype) -> Dual:
    """(value, d/dg, d/du) of the activation on pre [N, (g | u)], in `acc`."""
    g, u = (*pre.to(acc).chunk(2, -1),) if layout.gated else (pre.to(acc), None)
    return run_dual(layout.act_ops, layout.act_consts, g, u)


def run_dual(ops: Sequence[int], consts: Sequence[float], g: Tensor, u: Tensor | None) -> Dual:
    """A postfix activation program with its two derivatives carried along: (value, d/dg, d/du)."""
    stack: list[Dual] = []
    const = iter(consts)
    for op in ops:
        if op == act.OP_G:
            stack.append((g, torch.ones_like(g), None))
        elif op == act.OP_U:
            assert u is not None
            stack.append((u, None, torch.ones_like(u)))
        elif op == act.OP_CONST:
            stack.append((torch.full_like(g, next(const)), None, None))
        elif op == act.OP_ADD:
            (b, bg, bu), (a, ag, au) = stack.pop(), stack.pop()
            stack.append((a + b, _sum(ag, bg), _sum(au, bu)))
        elif op == act.OP_MUL:
            (b, bg, bu), (a, ag, au) = stack.pop(), stack.pop()
            stack.append((a * b, _sum(_times(ag, b), _times(bg, a)), _sum(_times(au, b), _times(bu, a))))
        elif op == act.OP_DIV:
            (b, bg, bu), (a, ag, au) = stack.pop(), stack.pop()
            v = a / b
            stack.append((v, *(_over(_sum(x, _times(y, -v)), b) for x, y in ((ag, bg), (au, bu)))))
        elif op == act.OP_POW:
            p = next(const)
            v, vg, vu = stack.pop()
            slope = p * v ** (p - 1)
            stack.append((v**p, _times(vg, slope), _times(vu, slope)))
        elif op == act.OP_CLAMP:
            lo, hi = next(const), next(const)
            v, vg, vu = stack.pop()
            slope = ((v >= lo) & (v <= hi)).to(v.dtype)
            stack.append((v.clamp(lo, hi), _times(vg, slope), _times(vu, slope)))
        else:
            v, vg, vu = stack.pop()
            value = act.FUNCTIONS[op - act.OP_UNARY].torch(v)
            slope = SLOPES[op - act.OP_UNARY](v, value)
            stack.append((value, _times(vg, slope), _times(vu, slope)))
    return stack[-1]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _over(a: Tensor | None, b: Tensor) -> Tensor | None:
    return None if a is None else a / b


def _times(a: Tensor | None, b: Tensor) -> Tensor | None:
    return None if a is None else a * b


def _gelu_tanh_slope(v: Tensor, _: Tensor) -> Tensor:
    c, q = 0.7978845608028654, 0.044715
    t = torch.tanh(c * (v + q * v**3))
    return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * c * (1 + 3 * q * v * v)


# in the order of scalar.FUNCTIONS: the slope from (argument, value)
SLOPES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda _, s: s * (1 - s),  # sigmoid
    lambda _, s: 1 - s * s,  # tanh
    lambda _, s: s,  # exp
    lambda v, _: 1 / v,  # log
    lambda v, _: 1.1283791670955126 * torch.exp(-v * v),  # erf
    lambda v, _: (v > 0).to(v.dtype),  # relu
    lambda v, _: torch.sigmoid(v),  # softplus
    _gelu_tanh_slope,
    lambda v, _: torch.sign(v),  # abs
    lambda v, _: 1 / (1 + v),  # log1p
    lambda _, s: s + 1,  # expm1
    lambda _, s: 0.6931471805599453 * s,  # exp2
]
