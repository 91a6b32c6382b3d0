"""Rows that already stand in the order of their experts: the op `experts_sorted`, and which expert a row is of.

Both are made of other ops, for every device and in both directions: gradients, shapes and kernels are those of `experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.codec import schema
from ..ir.operands import PLAIN
from ..ir.records import Layout
from .schemas import library, lists

library.define("expert_of_row(Tensor ends, Tensor x) -> Tensor")
library.define(f"experts_sorted(Tensor x, Tensor ends, {lists(PLAIN)}, Tensor? add, {schema(Layout)}) -> Tensor")


def expert_of_row(ends: Tensor, x: Tensor) -> Tensor:
    """ends [E], the number of rows up to each expert's last, ascending; x [R, ·] -> [R]: the expert of each row, E behind the last end."""
    rows = torch.arange(x.shape[0], device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, rows, right=True)


def experts_sorted(x: Tensor, ends: Tensor, *rest: Any) -> Tensor:
    """x [R, H], ends [E] as in `expert_of_row` -> [R, H]: down_e act(up_e x[r]) with e the expert of row r; 0 behind the last end."""
    ids = expert_of_row(ends, x).unsqueeze(-1)
    return torch.ops.moe_compile.experts(x, ids, x.new_ones(x.shape[0], 1), *rest)  # type: ignore[no-any-return]


library.impl("expert_of_row", expert_of_row, "CompositeImplicitAutograd")
library.impl("experts_sorted", experts_sorted, "CompositeImplicitAutograd")
