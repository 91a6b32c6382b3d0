"""The gradient of the routed experts by torch's grouped product, where the warp-specialised kernels take no weight gradient: by rule.

Their tiles are whole groups of 64 rows of a matrix's gradient; widths that are none leave all four products to plain kernels, which are
1.3 to 1.5 times slower than torch's from some rows an expert on.

    dY, x in row order -> dA = dY W_d -> dP, w a, Σ dA a -> dW_d, dW_u, dP W_u
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ir import Form
from ...ir.operands import Operands
from . import activation, hopper_calls
from .backward_kernels import finish_part
from .backward_sums import grad_weights
from .call import Call
from .combine import combine
from .gradients import Pass
from .host import capability, cdiv
from .launch.tape import empty, grouped_product, launch
from .library import gathered, taken

_FORMS = (Form.CONCAT, Form.SINGLE)
LEAST_ROWS = 4  # an expert, on average
_BLOCK = (16, 128)  # rows and columns of the hidden layer that a program finishes


def better(c: Call, p: Operands[Tensor]) -> bool:
    """Whether torch's products are faster on these operands, and take them."""
    layout = c.layout
    plain = layout.stacked and not layout.weight_on_input and c.up_bias is None and c.down_bias is None and Form(layout.form) in _FORMS
    if not plain or c.x.dtype != torch.bfloat16 or capability(c.x.device) < (9, 0) or c.slots < LEAST_ROWS * layout.num_experts:
        return False
    matrices = (p.up[0], p.down[0])
    whole = all(w.shape[0] == layout.num_experts for w in matrices)
    uneven = any(not hopper_calls.weights_fit(layout, *w.shape[1:], w.element_size()) for w in matrices)
    return whole and uneven and taken(c.up) and taken(c.down)


def run(p: Pass) -> None:
    """All gradients that are asked for, into p.out; for operands that `better` takes."""
    c, layout, out, ends = p.call, p.layout, p.out, p.rows.offsets[1:]
    up, down = out.given.up[0], out.given.down[0]
    incoming = gathered(c, p.grad, p.rows)
    d_hidden = grouped_product(incoming, down.transpose(1, 2) if layout.down_transposed else down, ends)
    d_pre, hidden, sums = _finished(p, d_hidden)
    if hidden is not None:
        out.found["down", 0] = _weights(incoming, hidden, layout.down_transposed, ends)
    if d_pre is not None and out.wants("up"):
        out.found["up", 0] = _weights(d_pre, gathered(c, c.x, p.rows), layout.up_transposed, ends)
    if d_pre is not None and out.x:
        rows = grouped_product(d_pre, up.transpose(1, 2) if layout.up_transposed else up, ends)
        identity = (layout.num_experts, layout.num_identity)
        grad_x = empty(c.x, *c.x.shape)
        out.of_x = combine(rows, c.ids, c.weights, p.grad, None, grad_x, *identity, weighted=False, early=False, rank=p.rows.rank)
    if out.weights:
        grad_weights(p, sums)


def _weights(out: Tensor, into: Tensor, transposed: bool, ends: Tensor) -> Tensor:
    """[E]: Σ over e's rows of out[row]ᵀ into[row]; `transposed`: of into[row]ᵀ out[row]."""
    left, right = (into, out) if transposed else (out, into)
    return grouped_product(left.t(), right, ends)


def _finished(p: Pass, d_hidden: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dP, w a, Σ dA a by slot and block of columns), each where it is needed."""
    c, layout, pre, n = p.call, p.layout, p.pre, d_hidden.shape[1]
    blocks = cdiv(n, _BLOCK[1])
    d_pre = empty(pre, *pre.shape) if p.out.x or p.out.wants("up") else None
    hidden = empty(pre, c.slots, n) if p.out.wants("down") else None
    sums = empty(pre, c.slots, blocks, dtype=torch.float32) if p.out.weights else None
    launch(
        _finish, (cdiv(c.slots, _BLOCK[0]), blocks),
        d_hidden, pre, c.weights, d_pre, hidden, sums, p.rows.order, p.rows.offsets, layout.num_experts, blocks, n, pre.stride(0),
        DUAL=activation.functions(layout.act_ops, layout.act_consts).dual, GATED=layout.gated,
        D_PRE=d_pre is not None, HIDDEN=hidden is not None, SUMS=sums is not None, BM=_BLOCK[0], BN=_BLOCK[1], num_warps=4,
    )  # fmt: skip
    return d_pre, hidden, sums


@triton.jit
def _finish(
    d_hidden, pre, weights, d_pre, hidden, sums, order, offsets, num_experts, blocks, n: tl.constexpr, stride_pre: tl.constexpr,
    DUAL: tl.constexpr, GATED: tl.constexpr, D_PRE: tl.constexpr, HIDDEN: tl.constexpr, SUMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    block = tl.program_id(1)
    columns = block * BN + tl.arange(0, BN)
    live = rows < tl.load(offsets + num_experts)
    slots = tl.load(order + rows, mask=live, other=0)
    mask = live[:, None] & (columns < n)[None, :]
    acc = tl.load(d_hidden + rows.to(tl.int64)[:, None] * n + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weights + slots, mask=live, other=0.0).to(tl.float32)
    total = finish_part(acc, rows, rows, live, live, scale, pre, d_pre, None, hidden, block * BN, n, stride_pre,
                         DUAL, GATED, False, True, D_PRE, False, HIDDEN, 0)  # fmt: skip
    if SUMS:
        tl.store(sums + slots.to(tl.int64) * blocks + block, total, mask=live)
