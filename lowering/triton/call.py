"""The operands of one call of the routed experts, as the kernels take them, or that they are beyond the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...ir.operands import Operands
from ..reference import generic
from ..reference.generic import Layout
from .weights import Biases, Matrices, down_biases, down_matrices, up_biases, up_matrices

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Late(Protocol):
    """A value to add that is computed beside the experts."""

    def issue(self) -> None:
        """Start computing it; called when the up projection is under way."""

    def join(self) -> Tensor:
        """[T, H], ready on the current stream."""


@dataclass(frozen=True)
class Call:
    """The operands of one call, as the kernels take them."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    up: Matrices
    down: Matrices
    up_bias: Biases | None
    down_bias: Biases | None
    add: Tensor | None
    layout: Layout
    late: Late | None = None

    @property
    def slots(self) -> int:
        return self.ids.numel()


def read(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    add: Tensor | None,
    layout: Layout,
) -> Call | None:
    """The operands for the kernels, or None when they are beyond them (other or mixed dtypes, no contiguous dimension)."""
    if x.dtype not in DTYPES or any(t.dtype != x.dtype for t in p) or x.shape[1] == 0:
        return None
    generic.check_sizes(layout, p)
    u, d = up_matrices(layout, p.up), down_matrices(layout, p.down)
    if u is None or d is None:
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    if add is not None and add.stride(1) != 1:
        add = add.contiguous()
    biases = up_biases(layout, p.up_bias), down_biases(layout, p.down_bias)
    return Call(x, ids.contiguous(), weights.contiguous(), u, d, *biases, add, layout)
