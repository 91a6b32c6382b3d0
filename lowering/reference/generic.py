"""The routed experts in plain torch: any device, any float dtype. What runs where no kernel does.

One matrix product per active expert over its rows, rows ordered by expert with a stable sort; what stands between products is done for
a block of experts at a time. Results are deterministic: a token's rows are added in one order (`rows.TokenSums`).
It reads the row counts on the host (on an accelerator: one synchronisation), which is why a target with kernels of its own
never comes here on its steady path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir import Form
from ...ir import scalar as act
from ...ir.operands import Operands
from ...ir.records import Layout as Layout
from .dual import Dual, run_dual
from .pairs import Pairs, accumulate, store
from .rows import Block, TokenSums, group_rows


def check_sizes(layout: Layout, p: Operands[Any]) -> None:
    """The kernels index by expert number: a parameter with fewer experts than the call says must not reach them."""
    for name, ts in p.by_name().items():
        if name.endswith("_smooth"):  # may be one for all experts
            continue
        short = any(t.shape[0] < layout.num_experts for t in ts) if layout.stacked else bool(ts) and len(ts) < layout.num_experts
        if short:
            raise ValueError(f"moe_compile::experts: num_experts is {layout.num_experts}, but a parameter holds fewer experts")


def check_rows(x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """The kernels read as many rows of one as of another."""
    if not x.shape[0] == ids.shape[0] == weights.shape[0]:
        raise ValueError(f"moe_compile::experts: {x.shape[0]} tokens, {ids.shape[0]} rows of ids, {weights.shape[0]} of weights")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def up_matrices(layout: Layout, up: Sequence[Tensor], e: int, dtype: torch.dtype) -> list[Tensor]:
    """The up projection of expert e as [out, in]: one tensor, or gate and up."""
    mats = [_as(layout.at(up, p, e), dtype) for p in range(layout.halves())]
    return [m.t() for m in mats] if layout.up_transposed else mats


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`to` costs a microsecond even where it has nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def split_pre(layout: Layout, h: Tensor) -> tuple[Tensor, ...]:
    """Columns of one up product as (g, u) or (g,)."""
    if layout.form == Form.CONCAT:
        return h.chunk(2, -1)
    if layout.form == Form.INTERLEAVED:
        return h[..., 0::2], h[..., 1::2]
    return (h,)


def as_stored(layout: Layout, pre: Tensor) -> Sequence[Tensor]:
    """[N, (g | u)] in the column order of the up tensors, one for each of them."""
    if layout.form == Form.INTERLEAVED:
        return [torch.stack(pre.chunk(2, -1), -1).flatten(-2)]
    return pre.chunk(2, -1) if layout.form == Form.SEPARATE else [pre]


def forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    add: Tensor | None,
    layout: Layout,
    outer: Callable[[Tensor, Block], Tensor] | None = None,
    inner: Callable[[Tensor, Block], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """x [T, H] -> (out [T, H_out] in x.dtype, pre-activations [T * k, (g | u)] in x.dtype, ordered by expert, zeros behind).

    `outer`: done to the rows before the up projection. `inner`: done to the activations before the down projection.
    """
    acc = accumulate_dtype(x.dtype)
    rows = group_rows(ids, layout)
    w, early = weights.to(acc), layout.weight_on_input
    pre = x.new_empty(ids.numel(), layout.pre_width(p.down))
    pre[len(rows.slots) :].zero_()
    width = layout.out_features(p.down)
    out = TokenSums(x.new_zeros(x.shape[0], width, dtype=acc) if add is None else add.to(acc, copy=True), ids)
    for block in rows.blocks(_widest(x, pre)):
        inputs, mine = x.index_select(0, block.tokens), pre[block.here]
        if early:
            inputs = (inputs.to(acc) * block.by_row(w)).to(x.dtype)
        _up(layout, p, block, inputs if outer is None else outer(inputs, block), mine)
        a = _activate(layout, mine, acc).to(x.dtype)
        y = x.new_empty(len(mine), width, dtype=acc)
        _down(layout, p, block, a if inner is None else inner(a, block), y)
        out.add(block, y if early else y.mul_(block.by_row(w)))
    if layout.num_identity:
        same = rows.identity
        out.add(same, x.index_select(0, same.tokens).to(acc) * same.by_row(w))
    return out.result().to(x.dtype), pre


def _widest(x: Tensor, pre: Tensor) -> int:
    """Bytes of one row of the widest matrix."""
    return max(x.shape[1], pre.shape[1]) * max(x.element_size(), 4)


def _up(layout: Layout, p: Operands[Tensor], block: Block, inputs: Tensor, pre: Tensor) -> None:
    """pre [N, (g | u)] = x W_upᵀ + s (x aᵀ) bᵀ + b_up"""
    mixed = layout.form == Form.INTERLEAVED
    parts = [torch.empty_like(pre)] if mixed else as_stored(layout, pre)
    pairs = [Pairs.of(layout, p, "up", part) for part in range(layout.halves())]
    for e, mine, *outs in block.each(inputs, *parts):
        for part, (m, out) in enumerate(zip(up_matrices(layout, p.up, e, inputs.dtype), outs, strict=True)):
            if p.up_bias:
                torch.addmm(layout.at(p.up_bias, part, e).to(inputs.dtype), mine, m.t(), out=out)
            else:
                torch.mm(mine, m.t(), out=out)
            if (pair := pairs[part]) is not None:
                pair.add_result(e, out, mine)
    if mixed:
        torch.cat(split_pre(layout, parts[0]), -1, out=pre)


def _down(layout: Layout, p: Operands[Tensor], block: Block, inputs: Tensor, out: Tensor) -> None:
    """out = h W_downᵀ + s (h aᵀ) bᵀ + b_down"""
    pairs = Pairs.of(layout, p, "down", 0)
    for e, mine, y in block.each(inputs, out):
        store(y, mine, _down_matrix(layout, p.down, e, inputs.dtype).t())
        if pairs is not None:
            pairs.add_result(e, y, mine)
        if p.down_bias:
            y.add_(layout.at(p.down_bias, 0, e))


def _down_matrix(layout: Layout, down: Sequence[Tensor], e: int, dtype: torch.dtype) -> Tensor:
    m = _as(layout.at(down, 0, e), dtype)
    return m.t() if layout.down_transposed else m


def _activate(layout: Layout, pre: Tensor, acc: torch.dtype) -> Tensor:
    g, u = (*pre.to(acc).chunk(2, -1),) if layout.gated else (pre.to(acc), None)
    return act.run(layout.act_ops, layout.act_consts, g, u)


class Grads:
    """Gradients asked for, in the order x, weights, the parameters in theirs; nothing else is computed."""

    def __init__(self, needs: Sequence[bool], p: Operands[Tensor], layout: Layout, counts: Sequence[int]) -> None:
        self.x, self.weights, *asked = needs
        self.of_x: Tensor | None = None
        self.of_weights: Tensor | None = None
        self.layout = layout
        places = ((t, i) for group in p.groups() for i, t in enumerate(group))
        wanted = zip(places, asked, strict=True)
        self.of_parameters: Operands[Tensor | None] = p.filled(self._room(t, i, counts) if n else None for (t, i), n in wanted)

    def _room(self, t: Tensor, i: int, counts: Sequence[int]) -> Tensor:
        """Where a parameter's gradient goes: zeros where no rows will write."""
        whole = all(counts) and t.shape[0] == len(counts) if self.layout.stacked else counts[i % len(counts)]
        return (torch.empty_like if whole else torch.zeros_like)(t, memory_format=torch.contiguous_format)

    def wants(self, *names: str) -> bool:
        return any(g is not None for name in names for g in getattr(self.of_parameters, name))

    def of(self, name: str, part: int) -> Sequence[Tensor | None]:
        """Where the gradients of a part go, by expert; None when nobody asks."""
        group = getattr(self.of_parameters, name)
        whole = self.layout.by_expert(group, part) if group else None
        return (None,) * self.layout.num_experts if whole is None else whole

    def asked(self) -> list[Tensor]:
        return [g for g in (self.of_x, self.of_weights, *self.of_parameters) if g is not None]


class _Part:
    """The backward pass of a part of `up`, or of `down`: its pairs, and where gradients go by expert."""

    def __init__(self, p: Operands[Tensor], layout: Layout, grads: Grads, name: str, part: int) -> None:
        self.pairs, place = Pairs.of(layout, p, name, part), layout.pairs_before(name, part)
        self.of_weight, self.of_bias = grads.of(name, part), grads.of(f"{name}_bias", part)
        self.of_a, self.of_b = grads.of(f"{name}_a", place), grads.of(f"{name}_b", place)
        self.transposed = layout.up_transposed if name == "up" else layout.down_transposed

    def run(self, e: int, grad: Tensor, rows: Tensor, of_rows: Tensor | None) -> None:
        """of_rows += s (g b) a, and the gradients of the weight and of the pair, from the rows and the gradient of their results."""
        if self.pairs is not None:
            self.pairs.backward(e, grad, rows, of_rows, self.of_a[e], self.of_b[e])
        if (out := self.of_weight[e]) is not None:
            store(out, *((rows.t(), grad) if self.transposed else (grad.t(), rows)))


class _Backward:
    """One backward pass: what was given, and where gradients of parameters go."""

    def __init__(self, p: Operands[Tensor], layout: Layout, grads: Grads) -> None:
        self.p, self.layout, self.grads = p, layout, grads
        self.ups = [_Part(p, layout, grads, "up", part) for part in range(layout.halves())]
        self.downs = _Part(p, layout, grads, "down", 0)

    def down(self, block: Block, grad: Tensor, weighted: Tensor, out: Tensor) -> None:
        """out = g W + s (g b) a; of the parameters, with the activations `weighted` by w and `grad` not."""
        for e, g, mine, d in block.each(grad, weighted, out):
            store(d, g, _down_matrix(self.layout, self.p.down, e, grad.dtype))
            self.downs.run(e, g, mine, d)

    def biases(self, block: Block, grad: Tensor, w: Tensor | None, of_rows: Tensor) -> None:
        """Of the biases of the down projection, and their share of the gradients of routing weights, by row."""
        layout, wide = self.layout, grad.to(of_rows.dtype)
        weighted = wide if w is None else wide * w
        for e, g, sums, mine in block.each(wide, of_rows, weighted):
            if w is not None:
                sums.add_(g @ layout.at(self.p.down_bias, 0, e).to(g.dtype))
            _store_sum(self.downs.of_bias[e], mine)

    def up(self, block: Block, grad_pre: Tensor, inputs: Tensor, out: Tensor | None) -> None:
        """out = g W + s (g b) a of the up projections, and of their parameters, from gradients [n, (g | u)] of their results."""
        for e, mine, *given in block.each(inputs, *as_stored(self.layout, grad_pre), *([] if out is None else [out])):
            d = None if out is None else given.pop()
            for i, (part, m, g) in enumerate(zip(self.ups, up_matrices(self.layout, self.p.up, e, inputs.dtype), given, strict=True)):
                if d is not None:
                    (accumulate if i else store)(d, g, m)
                part.run(e, g, mine, d)
                _store_sum(part.of_bias[e], g)


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
    rows = group_rows(ids, layout)
    grads = Grads(needs, p, layout, rows.counts)
    one = _Backward(p, layout, grads)
    w, early = weights.to(accumulate_dtype(x.dtype)), layout.weight_on_input
    grad, of_slots = grad.to(x.dtype), w.new_zeros(ids.numel())
    grad_x = TokenSums(torch.zeros_like(x, dtype=w.dtype), ids) if grads.x else None
    for block in rows.blocks(_widest(x, pre)):
        by_row, inputs = block.by_row(w), x.index_select(0, block.tokens)
        grad_pre, of_rows = _through_down(one, block, grad, pre[block.here], None if early else by_row)
        d = torch.empty_like(inputs, dtype=w.dtype) if grads.x or early and grads.weights else None
        one.up(block, grad_pre, (inputs.to(w.dtype) * by_row).to(x.dtype) if early else inputs, d)
        of_slots[block.slots] = (d * inputs).sum(-1) if early and d is not None else of_rows
        if grad_x is not None and d is not None:
            grad_x.add(block, d.mul_(by_row) if early else d)
    if layout.num_identity:
        same = rows.identity
        kept = grad.index_select(0, same.tokens).to(w.dtype)
        of_slots[same.slots] = (kept * x.index_select(0, same.tokens).to(w.dtype)).sum(-1)
        if grad_x is not None:
            grad_x.add(same, kept * same.by_row(w))
    grads.of_x = None if grad_x is None else grad_x.result().to(x.dtype)
    grads.of_weights = of_slots.view_as(ids).to(weights.dtype) if grads.weights else None
    return grads.asked()


def _through_down(one: _Backward, block: Block, grad: Tensor, pre: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gradients of the pre-activations [n, (g | u)], those of the routing weights by row [n]); w is None where it is on the input."""
    layout, acc = one.layout, accumulate_dtype(grad.dtype)
    value, *slopes = _activate_dual(layout, pre, acc)
    weighted = value if w is None or not one.grads.wants("down", "down_a", "down_b") else value * w
    weighted = weighted.to(grad.dtype)
    g_out = grad.index_select(0, block.tokens)
    d = torch.empty_like(value)
    one.down(block, g_out, weighted, d)
    of_rows = (d * value).sum(-1) if w is not None else d.new_zeros(len(d))
    if one.p.down_bias:
        one.biases(block, g_out, w, of_rows)
    if w is not None:
        d.mul_(w)
    grad_pre = torch.empty_like(pre)
    for slope, half in zip(slopes, grad_pre.chunk(2, -1) if layout.gated else (grad_pre,), strict=False):
        if slope is None:
            half.zero_()
        else:
            torch.mul(d, slope, out=half)
    return grad_pre, of_rows


def _store_sum(out: Tensor | None, rows: Tensor) -> None:
    if out is not None:
        out.copy_(rows.sum(0, dtype=accumulate_dtype(rows.dtype)))


def _activate_dual(layout: Layout, pre: Tensor, acc: torch.dtype) -> Dual:
    """(value, d/dg, d/du) of the activation on pre [N, (g | u)], in `acc`."""
    g, u = (*pre.to(acc).chunk(2, -1),) if layout.gated else (pre.to(acc), None)
    return run_dual(layout.act_ops, layout.act_consts, g, u)
