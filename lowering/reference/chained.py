"""Experts that are a chain of products and maps of whole rows, in plain torch on any device.

Rows are ordered by expert once. A product is one matrix product per active expert, a map runs over all rows of a block of experts; maps
are computed in float32 (float64 for float64). Backward computes the rows of a block again and leaves their gradients to autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...ir.chain import Kind, Matrix, Stage, Vector, elements_of, rows_of, run
from ...ir.records import ChainedLayout
from .generic import accumulate_dtype, check_rows
from .rows import Block, Rows, group_rows

_AUTOGRAD = [getattr(torch._C.DispatchKey, name) for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")]
Parameter = Callable[[int, int], Tensor]  # (parameter, expert) -> its tensor


def forward(x: Tensor, ids: Tensor, weights: Tensor, parts: Sequence[Tensor], add: Tensor | None, layout: ChainedLayout) -> Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H_out] in x.dtype.

    Raises ValueError where a parameter holds fewer experts than the call says, or rows do not match.
    """
    _check(x, ids, weights, parts, layout)
    rows, acc = group_rows(ids, layout), accumulate_dtype(x.dtype)
    w, width = weights.to(acc), layout.chain.stages[-1].width
    out = x.new_zeros(x.shape[0], width, dtype=acc) if add is None else add.to(acc, copy=True)
    parameter = _as_stored(layout, parts)
    for block in rows.blocks(_widest(x, layout)):
        with torch.no_grad():
            y = _block(layout, block, x.index_select(0, block.tokens), parameter)
            out.index_add_(0, block.tokens, y * block.by_row(w))
    if layout.num_identity:
        same = rows.identity
        out.index_add_(0, same.tokens, x.index_select(0, same.tokens).to(acc) * same.by_row(w))
    return out.to(x.dtype)


def _check(x: Tensor, ids: Tensor, weights: Tensor, parts: Sequence[Tensor], layout: ChainedLayout) -> None:
    check_rows(x, ids, weights)
    starts = layout.chain.starts(layout.num_experts)
    stacks = [parts[start] for start, kind in zip(starts, layout.chain.kinds, strict=False) if kind is Kind.STACKED]
    if len(parts) != starts[-1] or any(t.shape[0] < layout.num_experts for t in stacks):
        raise ValueError(f"moe_compile::experts_chained: num_experts is {layout.num_experts}, but a parameter holds fewer experts")


def _widest(x: Tensor, layout: ChainedLayout) -> int:
    """Bytes of all rows that a stage makes of one, at the most."""
    made = [s.width * max(len(s.matrices), 1) for s in layout.chain.stages]
    return max(x.shape[1], *made) * max(x.element_size(), 4)


def _as_stored(layout: ChainedLayout, parts: Sequence[Tensor]) -> Parameter:
    starts, kinds = layout.chain.starts(layout.num_experts), layout.chain.kinds

    def parameter(i: int, e: int) -> Tensor:
        found = parts[starts[i] + (e if kinds[i] is Kind.LISTED else 0)]
        return found[e] if kinds[i] is Kind.STACKED else found

    return parameter


def _block(layout: ChainedLayout, block: Block, x: Tensor, parameter: Parameter) -> Tensor:
    """A block's rows x [n, H] through its experts, [n, H_out] in the wide dtype; differentiable."""
    acc = accumulate_dtype(x.dtype)
    wide = v = x.to(acc)
    for s in layout.chain.stages:
        ys = _products(s, block, v.to(x.dtype), parameter, acc) if s.matrices else []
        ps = [_elements(layout, s, p, block, parameter).to(acc) for p in s.vectors]
        v = run(s, ys, ps, wide)
    return v


def _products(s: Stage, block: Block, rows: Tensor, parameter: Parameter, acc: torch.dtype) -> list[Tensor]:
    """[n, width] for each matrix; those that lie in one parameter are one product."""
    whole: dict[tuple[int, bool], Tensor] = {}
    for m in s.matrices:
        if (key := (m.operand, m.transposed)) not in whole:
            weights = [_matrix(parameter(m.operand, e), m, rows.dtype).t() for e in block.experts]
            whole[key] = _product(block, rows, weights).to(acc)
    return [rows_of(whole[m.operand, m.transposed].t(), Matrix(0, m.stride, m.offset), s.width).t() for m in s.matrices]


def _product(block: Block, rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Each expert's rows times its weight."""
    pieces = rows.split(block.counts)
    if torch.is_grad_enabled():
        return torch.cat([mine @ w for mine, w in zip(pieces, weights, strict=True)])
    out = rows.new_empty(len(rows), weights[0].shape[1])
    for mine, w, into in zip(pieces, weights, out.split(block.counts), strict=True):
        torch.mm(mine, w, out=into)
    return out


def _matrix(weight: Tensor, m: Matrix, dtype: torch.dtype) -> Tensor:
    w = weight.t() if m.transposed else weight
    return w if w.dtype == dtype else w.to(dtype)


def _elements(layout: ChainedLayout, s: Stage, p: Vector, block: Block, parameter: Parameter) -> Tensor:
    """[n, width] of a vector of each expert's own, [width] of one for all."""
    if layout.chain.kinds[p.operand] is Kind.SHARED:
        return elements_of(parameter(p.operand, 0), p, s.width)
    own = torch.stack([elements_of(parameter(p.operand, e), p, s.width) for e in block.experts])
    return own.repeat_interleave(torch.tensor(block.counts, device=own.device), 0, output_size=sum(block.counts))


class _Leaves:
    """Parameters as autograd's leaves for one block, by (parameter, expert); for a shared one the expert is 0."""

    def __init__(self, layout: ChainedLayout, parts: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.layout, self.stored = layout, _as_stored(layout, parts)
        self.starts = layout.chain.starts(layout.num_experts)
        self.wanted = needs
        self.grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) if n else None for t, n in zip(parts, needs, strict=True)]
        self.made: dict[tuple[int, int], Tensor] = {}

    def __call__(self, i: int, e: int) -> Tensor:
        key = (i, 0 if self.layout.chain.kinds[i] is Kind.SHARED else e)
        if key not in self.made:
            place = self._place(*key)
            self.made[key] = self.stored(i, e).detach().requires_grad_(self.wanted[place])
        return self.made[key]

    def _place(self, i: int, e: int) -> int:
        return self.starts[i] + (e if self.layout.chain.kinds[i] is Kind.LISTED else 0)

    def asked(self) -> dict[tuple[int, int], Tensor]:
        return {key: t for key, t in self.made.items() if t.requires_grad}

    def take(self, key: tuple[int, int], grad: Tensor | None) -> None:
        """Add a leaf's gradient to its parameter's."""
        into = self.grads[self._place(*key)]
        if grad is not None and into is not None:
            (into[key[1]] if self.layout.chain.kinds[key[0]] is Kind.STACKED else into).add_(grad)


def backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, parts: Sequence[Tensor], layout: ChainedLayout, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of what `needs` flags among x, weights and the parameters in their order, in that order."""
    need_x, need_w, *asked = needs
    rows, acc = group_rows(ids, layout), accumulate_dtype(x.dtype)
    w, leaves = weights.to(acc), _Leaves(layout, parts, asked)
    of_x, of_slots = torch.zeros_like(x, dtype=acc), w.new_zeros(ids.numel())
    for block in rows.blocks(_widest(x, layout)):
        leaves.made = {}
        of_rows, of_slots[block.slots] = _through(layout, block, grad, x, block.by_row(w), leaves, need_x)
        if of_rows is not None:
            of_x.index_add_(0, block.tokens, of_rows.to(acc))
    if layout.num_identity:
        _through_identity(rows, grad, x, w, of_x, of_slots)
    found = [of_x.to(x.dtype) if need_x else None, of_slots.view_as(ids).to(weights.dtype) if need_w else None, *leaves.grads]
    return [g for g in found if g is not None]


def _through(
    layout: ChainedLayout, block: Block, grad: Tensor, x: Tensor, w: Tensor, leaves: _Leaves, need_x: bool
) -> tuple[Tensor | None, Tensor]:
    """(gradients of a block's rows [n, H], those of their weights [n])."""
    with _recording():
        inputs = x.index_select(0, block.tokens).detach().requires_grad_(need_x)
        y = _block(layout, block, inputs, leaves)
        given = grad.index_select(0, block.tokens).to(y.dtype)
        own = leaves.asked()
        asked = [*([inputs] if need_x else []), *own.values()]
        found = list(torch.autograd.grad(y, asked, given * w, allow_unused=True)) if asked else []
    of_rows = found.pop(0) if need_x else None
    for key, g in zip(own, found, strict=True):
        leaves.take(key, g)
    return of_rows, (given * y.detach()).sum(-1)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Autograd at work inside an op, which is called below it."""
    below = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        below = below.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), below), torch.enable_grad():
        yield


def _through_identity(rows: Rows, grad: Tensor, x: Tensor, w: Tensor, of_x: Tensor, of_slots: Tensor) -> None:
    same = rows.identity
    kept = grad.index_select(0, same.tokens).to(w.dtype)
    of_slots[same.slots] = (kept * x.index_select(0, same.tokens).to(w.dtype)).sum(-1)
    of_x.index_add_(0, same.tokens, kept * same.by_row(w))
