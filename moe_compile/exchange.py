"""How rows reach experts that are divided over the ranks of a group, and come back, by functional collectives (`ir.Way`).

Static shapes and nothing read back to the host, so that it is one graph, which CUDA graphs can replay; gradients by collectives as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as fc
from torch import Tensor

# under the names of torch 2.13, or those that it has grown out of; either way with gradients
_gather = getattr(fc, "all_gather_single", fc.all_gather_tensor)
_gather_rows = getattr(fc, "all_gather_single_autograd", fc.all_gather_tensor_autograd)
_scatter_sums = getattr(fc, "reduce_scatter_single_autograd", fc.reduce_scatter_tensor_autograd)
Local = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows, ids among this rank's experts (their number: none of them), weights -> result
UNEVEN = "the ranks of a group that divides experts have different numbers of tokens; pad the batches to one length"


class _SumOfGradients(torch.autograd.Function):
    """x, which all ranks of a group hold alike; each has a part of its gradient, and all of them get the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return fc.wait_tensor(fc.all_reduce(grad.contiguous(), "sum", ctx.group)), None


class _Sum(torch.autograd.Function):
    """Σ over the ranks of a group of x; the gradient of the sum, which all ranks hold alike, is that of each addend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return fc.wait_tensor(fc.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def shared(x: Tensor, ids: Tensor, weights: Tensor, local: Local, first: int, count: int, group: Any) -> Tensor:
    """Σ over the ranks of `local`, for x [T, H], ids and weights [T, k] that all hold alike; a rank has experts from `first` on."""
    x, weights = _SumOfGradients.apply(x, group), _SumOfGradients.apply(weights, group)
    return _Sum.apply(_own(x, ids, weights, local, first, count), group)  # type: ignore[no-any-return]


def gathered(x: Tensor, ids: Tensor, weights: Tensor, local: Local, first: int, count: int, group: Any, uneven: str = UNEVEN) -> Tensor:
    """out[r] = Σ_s local_s(x[r]) for each rank's own x [T, H], ids and weights [T, k], with one T. Raises RuntimeError (`uneven`) on every
    rank where T differs, before any row travels."""
    sizes = _gather(ids.new_full((1,), ids.shape[0]), 0, group)
    torch._assert_async((sizes == ids.shape[0]).all(), uneven)
    rows, w = (_gather_rows(t.contiguous(), 0, group) for t in (x, weights))
    part = _own(rows, _gather(ids.contiguous(), 0, group), w, local, first, count)
    return _scatter_sums(part.contiguous(), "sum", 0, group)


def _own(rows: Tensor, ids: Tensor, weights: Tensor, local: Local, first: int, count: int) -> Tensor:
    """This rank's experts on rows of any rank: other ids are `count`, with weight 0."""
    foreign = (ids < first) | (ids >= first + count)
    return local(rows, torch.where(foreign, count, ids - first), weights.masked_fill(foreign, 0.0))
