"""The differentiable path: permute, grouped matmul with its own gradient, activation, unpermute. Routing stays ATen.

Of the npu ops only permute, unpermute and swiglu have gradients; the others would silently give none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..reference import generic
from . import calls
from .calls import Packed, Weight, call, cast
from .casts import CASTS


class _GroupedMatmul(torch.autograd.Function):
    """y = x_e W_e by rows. dX_e = dY_e W_eᵀ with the weight transposed as a view; dW_e = X_eᵀ dY_e, the K-split form.

    nz: the weight of the first two is in the fractal format. The third has no weight among its operands, which that form demands.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, nz: bool) -> Tensor:
        ctx.owner = (weight if weight._base is None else weight._base) if nz and _is_eager(weight) else None
        ctx.save_for_backward(x, weight, counts)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return calls.grouped(x, _formatted(weight, ctx.owner), bias, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = calls.grouped(grad, _formatted(weight, ctx.owner).transpose(1, 2), None, counts)
        if ctx.needs_input_grad[1]:
            dw = k_split(x, grad, counts)
        if ctx.needs_input_grad[2]:
            db = sum_by_expert(grad, counts).to(ctx.bias_dtype)
        return dx, dw, db, None, None


def _is_eager(weight: Tensor) -> bool:
    """The cast has no shape function: no tracer may meet it."""
    return type(weight) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _formatted(weight: Tensor, owner: Tensor | None) -> Tensor:
    return weight if owner is None else CASTS.get(weight, owner)


def k_split(x: Tensor, grad: Tensor, counts: Tensor) -> Tensor:
    """X_eᵀ dY_e -> [E, K, N]; the operands are row blocks, never a weight, so the ban on NZ is not met."""
    (dw,) = call("npu_grouped_matmul", [x.t()], [grad], **calls.groups(counts, 2))
    return dw  # type: ignore[no-any-return]


def sum_by_expert(rows: Tensor, counts: Tensor) -> Tensor:
    """[M, N] -> [E, N]: 1ᵀ rows_e, the K-split product with a column of ones."""
    return k_split(torch.ones_like(rows[:, :1]), rows, counts)[:, 0]


def grouped_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, nz: bool = False) -> Tensor:
    """x [M, K] rows by expert, weight [E, K, N], bias [E, N], counts [E] -> [M, N], with gradients; nz as in the class above."""
    tensors = tuple(t for t in (x, weight, bias, counts) if t is not None)
    if has_torch_function(tensors):
        return handle_torch_function(grouped_matmul, tensors, x, weight, bias, counts, nz)  # type: ignore[no-any-return]
    return _GroupedMatmul.apply(x, weight, bias, counts, nz)  # type: ignore[no-any-return, no-untyped-call]


def count_rows(ids: Tensor, num_experts: int) -> Tensor:
    """ids [T, k] -> rows per expert [E] int64, with a size that does not depend on data."""
    flat = ids.reshape(-1).to(torch.int64)
    ones = torch.ones_like(flat)
    return flat.new_zeros(num_experts).scatter_add(0, flat, ones)


def start(
    x: Tensor, ids: Tensor, weights: Tensor, p: Packed, layout: generic.Layout, all_known: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """As `calls.start`, with gradients to x, weights and every expert weight."""
    own = []
    if layout.num_identity:
        own.append(calls.identity_addend(x, ids, weights, layout.num_experts, layout.num_identity))
    if layout.num_identity or not all_known:
        ids, weights = calls.within(ids, weights, layout.num_experts)
    counts = count_rows(ids, layout.num_experts)
    rows, index = call("npu_moe_token_permute", x, cast(ids, torch.int32))
    if layout.weight_on_input:
        wide = generic.accumulate_dtype(x.dtype)
        by_row = torch.zeros_like(weights).reshape(-1).scatter(0, index.to(torch.int64), weights.reshape(-1))
        rows = cast(cast(rows, wide) * cast(by_row, wide)[:, None], x.dtype)
        weights = torch.ones_like(weights)
    products = [product(rows, w, counts, p.nz) for w in p.up]
    return product(activate(products, layout), p.down, counts, p.nz), index, weights, own


def product(rows: Tensor, w: Weight, counts: Tensor, nz: bool) -> Tensor:
    """As `calls.product`, with gradients. Low-rank pairs are too narrow for the fractal format."""
    y = grouped_matmul(rows, w.matrix, w.bias, counts, nz)
    return calls.with_pair(y, rows, w, lambda x, m: grouped_matmul(x, m, None, counts))


def activate(products: Sequence[Tensor], layout: generic.Layout) -> Tensor:
    """npu_swiglu has a gradient, npu_clipped_swiglu has none: anything but SwiGLU is pointwise."""
    return calls.activate(products, layout, differentiable=True)
