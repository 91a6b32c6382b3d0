"""The routed experts in plain torch: any device, any float dtype. What runs where no kernel does.

One matrix product per active expert over its rows, rows ordered by expert with a stable sort, so results are deterministic.
It reads the row counts on the host (on an accelerator: one synchronisation), which is why a target with kernels of its own
never comes here on its steady path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir import Form
from ...ir import scalar as act
from ...ir.operands import Operands
from ...ir.records import Layout as Layout
from .dual import Dual, run_dual
from .pairs import Pair


def check_sizes(layout: Layout, p: Operands[Any]) -> None:
    """The kernels index by expert number: a parameter with fewer experts than the call says must not reach them."""
    for ts in p.groups():
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

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Experts that have rows, and where these are."""
        start = 0
        for e, count in enumerate(self.counts):
            if count:
                yield e, slice(start, start + count)
            start += count


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
    p: Operands[Tensor],
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
    pre = x.new_zeros(ids.numel(), layout.pre_width(p.down))
    outs = x.new_zeros(ids.numel(), layout.out_features(p.down), dtype=acc)
    for e, here in rows.spans():
        torch.cat(_up(layout, p, e, inputs[here]), -1, out=pre[here])
        a = _activate(layout, pre[here], acc).to(x.dtype)
        y = _down(layout, p, e, a if inner is None else inner(a), acc)
        slots = rows.slots[here]
        outs[slots] = y if layout.weight_on_input else y * w[slots]
    if rows.identity is not None:
        outs[rows.identity] = x[rows.identity // ids.shape[1]].to(acc) * w[rows.identity]
    out = outs.view(*ids.shape, outs.shape[-1]).sum(1)
    return (out if add is None else out + add.to(acc)).to(x.dtype), pre


def _up(layout: Layout, p: Operands[Tensor], e: int, rows: Tensor) -> list[Tensor]:
    """Pre-activations (g, u) or (g,) of expert e's rows."""
    products: list[Tensor] = []
    for part, m in enumerate(up_matrices(layout, p.up, e, rows.dtype)):
        bias = layout.at(p.up_bias, part, e).to(rows.dtype) if p.up_bias else None
        products.extend(split_pre(layout, Pair.of(layout, p, "up", part, e).result(F.linear(rows, m, bias), rows)))
    return products


def _down(layout: Layout, p: Operands[Tensor], e: int, rows: Tensor, acc: torch.dtype) -> Tensor:
    y = F.linear(rows, _down_matrix(layout, p.down, e, rows.dtype))
    y = Pair.of(layout, p, "down", 0, e).result(y, rows).to(acc)
    return y + layout.at(p.down_bias, 0, e).to(acc) if p.down_bias else y


def _down_matrix(layout: Layout, down: Sequence[Tensor], e: int, dtype: torch.dtype) -> Tensor:
    m = layout.at(down, 0, e).to(dtype)
    return m.t() if layout.down_transposed else m


def _activate(layout: Layout, pre: Tensor, acc: torch.dtype) -> Tensor:
    g, u = (*pre.to(acc).chunk(2, -1),) if layout.gated else (pre.to(acc), None)
    return act.run(layout.act_ops, layout.act_consts, g, u)


class Grads:
    """Gradients asked for, in the order x, weights, the parameters in theirs; nothing else is computed."""

    def __init__(self, needs: Sequence[bool], x: Tensor, weights: Tensor, p: Operands[Tensor], layout: Layout) -> None:
        self.x, self.weights, *asked = needs
        self.of_x: Tensor | None = None
        self.of_weights: Tensor | None = None
        wanted = zip(p, asked, strict=True)
        self.of_parameters: Operands[Tensor | None] = p.filled(_zeros(t) if n else None for t, n in wanted)
        self.layout = layout

    def of(self, name: str, part: int, e: int) -> Tensor | None:
        """Where expert e's gradient of a parameter goes, or None when nobody asks."""
        group = getattr(self.of_parameters, name)
        if not group:
            return None
        whole: Tensor | None = group[part if self.layout.stacked else part * self.layout.num_experts + e]
        return whole[e] if whole is not None and self.layout.stacked else whole

    def pair(self, name: str, part: int, e: int) -> tuple[Tensor | None, Tensor | None]:
        """As `of`, of the low-rank pair of a part."""
        before = sum(bool(self.layout.pair(name, i)) for i in range(part))
        return self.of(f"{name}_a", before, e), self.of(f"{name}_b", before, e)

    def asked(self) -> list[Tensor]:
        return [g for g in (self.of_x, self.of_weights, *self.of_parameters) if g is not None]


def _zeros(t: Tensor) -> Tensor:
    return torch.zeros_like(t, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Backward:
    """One backward pass: what was given, and where gradients go. grad_x [T * k, H] and grad_w [T * k] by slot."""

    grad: Tensor
    x: Tensor
    w: Tensor
    p: Operands[Tensor]
    layout: Layout
    grads: Grads
    grad_x: Tensor | None
    grad_w: Tensor

    def expert(self, e: int, slots: Tensor, tokens: Tensor, pre: Tensor) -> None:
        """One expert's share of every gradient, from its rows."""
        layout, acc, dtype = self.layout, self.w.dtype, self.x.dtype
        g_out, row_w, inputs = self.grad[tokens].to(dtype), self.w[slots], self.x[tokens]
        value, *slopes = _activate_dual(layout, pre, acc)
        down = Pair.of(layout, self.p, "down", 0, e)
        grad_a = down.input_gradient(g_out @ _down_matrix(layout, self.p.down, e, dtype), g_out).to(acc)
        if layout.weight_on_input:
            inputs, grad_y = (inputs.to(acc) * row_w).to(dtype), g_out
        else:
            of_bias = g_out.to(acc) @ layout.at(self.p.down_bias, 0, e).to(acc) if self.p.down_bias else 0.0
            self.grad_w[slots] = (grad_a * value).sum(-1) + of_bias
            grad_a, grad_y = grad_a * row_w, (g_out.to(acc) * row_w).to(dtype)
        _store_product(self.grads.of("down", 0, e), grad_y, value.to(dtype), layout.down_transposed)
        _store_sum(self.grads.of("down_bias", 0, e), grad_y)
        down.store(self.grads.pair("down", 0, e), grad_y, value.to(dtype))
        through = [torch.zeros_like(grad_a) if d is None else grad_a * d for d in slopes[: 2 if layout.gated else 1]]
        grad_in = self._up(e, torch.cat(through, -1).to(dtype), inputs)
        if grad_in is None:
            return
        if layout.weight_on_input:
            self.grad_w[slots] = (grad_in * self.x[tokens].to(acc)).sum(-1)
            grad_in = grad_in * row_w
        if self.grad_x is not None:
            self.grad_x[slots] = grad_in

    def _up(self, e: int, grad_pre: Tensor, inputs: Tensor) -> Tensor | None:
        """Gradients of the up projection from those of its results [N, (g | u)]; the rows', where somebody needs them."""
        layout, found = self.layout, None
        for part, (g, m) in enumerate(zip(join_pre(layout, grad_pre), up_matrices(layout, self.p.up, e, self.x.dtype), strict=True)):
            _store_product(self.grads.of("up", part, e), g, inputs, layout.up_transposed)
            _store_sum(self.grads.of("up_bias", part, e), g)
            pair = Pair.of(layout, self.p, "up", part, e)
            pair.store(self.grads.pair("up", part, e), g, inputs)
            if self.grad_x is not None or layout.weight_on_input:
                product = pair.input_gradient(g @ m, g).to(self.w.dtype)
                found = product if found is None else found + product
        return found


def backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    layout: Layout,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of what `needs` flags among x, weights, and the parameters in their order, in that order."""
    acc = accumulate_dtype(x.dtype)
    grads = Grads(needs, x, weights, p, layout)
    rows = group_rows(ids, layout)
    w = weights.reshape(-1, 1).to(acc)
    grad_w = w.new_zeros(w.shape[0])
    grad_x = x.new_zeros(ids.numel(), x.shape[1], dtype=acc) if grads.x else None
    one = _Backward(grad, x, w, p, layout, grads, grad_x, grad_w)
    for e, here in rows.spans():
        one.expert(e, rows.slots[here], rows.tokens[here], pre[here])
    if rows.identity is not None:
        tokens = rows.identity // ids.shape[1]
        grad_w[rows.identity] = (grad[tokens].to(acc) * x[tokens].to(acc)).sum(-1)
        if grad_x is not None:
            grad_x[rows.identity] = grad[tokens].to(acc) * w[rows.identity]
    if grad_x is not None:
        grads.of_x = grad_x.view(*ids.shape, grad_x.shape[-1]).sum(1).to(x.dtype)
    if grads.weights:
        grads.of_weights = grad_w.view_as(ids).to(weights.dtype)
    return grads.asked()


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
