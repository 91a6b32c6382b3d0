"""Layout of results: what the user can see of a tensor's strides stays as eager has it.

The ops write row-major results. Where the value that one takes the place of lies in memory in another order of dims (`zeros_like` of a
transposed tensor), the result is copied into that order: permute, contiguous, permute back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from ...ir import Rejection
from .calls import method


def dims_by_stride(v: Any, node: fx.Node | None = None) -> tuple[int, ...] | None:
    """The dims of a dense tensor from the outermost in memory to the innermost; None when that is row-major.

    Raises Rejection, at `node`, for a tensor whose elements do not lie one after the other.
    """
    if not isinstance(v, torch.Tensor) or v.layout is not torch.strided:
        return None
    sizes, strides = [_hint(s) for s in v.shape], [_hint(s) for s in v.stride()]
    if None in sizes or None in strides or 0 in sizes:
        return None
    order = tuple(sorted(range(v.ndim), key=lambda d: (-strides[d], d)))
    step = 1
    for d in reversed(order):
        if sizes[d] != 1 and strides[d] != step:
            raise Rejection("the result lies in memory with gaps, or over itself", node, "rewrite")
        step *= sizes[d]
    real = [d for d in order if sizes[d] != 1]
    return None if real == sorted(real) else order


def _hint(s: Any) -> Any:
    return s.node.hint if isinstance(s, torch.SymInt) else s


def restrided(g: fx.Graph, n: fx.Node, order: tuple[int, ...] | None) -> fx.Node:
    """n (row-major) with its dims in memory in the given order."""
    if order is None:
        return n
    back = tuple(order.index(d) for d in range(len(order)))
    for name, args in (("permute", order), ("contiguous", ()), ("permute", back)):
        n = method(g, name, (n, *args), n)
    return n


def of_its_own(value: torch.Tensor) -> torch.Tensor:
    """A fake tensor like the result in memory of its own: what the region wrote into the result's memory is then read by nobody."""
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return value
    with mode, torch.no_grad():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
