"""Experts whose weights lie in memory as codes with scales, in plain torch: any device.

Weights become floats one expert at a time, and only for experts that tokens were sent to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ir import Rows, Stored
from ...ir.operands import Operands
from ...ir.records import Storage
from . import generic
from .generic import Layout, accumulate_dtype
from .rows import Block


@dataclass(frozen=True)
class Held:
    """The tensors of one projection, and how weights lie in them."""

    codes: Sequence[Tensor]
    scales: Sequence[Tensor]
    zeros: Sequence[Tensor]
    tables: Sequence[Tensor]
    seconds: Sequence[Tensor]
    groups: Sequence[Tensor]
    how: Stored

    @classmethod
    def of(cls, p: Operands[Tensor], name: str, how: Stored) -> Held:
        codes, scales, zeros, seconds, groups = (getattr(p, f"{name}{what}") for what in ("", "_scale", "_zero", "_second", "_group"))
        return cls(codes, scales, zeros, getattr(p, f"{name}_table"), seconds, groups, how)

    def floats(self, i: int, e: Any, dtype: torch.dtype) -> Tensor:
        """Matrix `e` of tensor i; `...` for all that it holds."""
        scale, zero, second = (ts[i][e] if ts else None for ts in (self.scales, self.zeros, self.seconds))
        group = self.groups[i] if self.groups else None
        group = group[e] if group is not None and group.ndim > 1 else group
        table = self.tables[0] if self.tables and not self.how.shifted else None
        return self.how.matrix(self.codes[i][e], scale, dtype, zero, table, second, group, self.how.shifts_of(self.tables, i))


class _Stacked:
    """A stacked weight that gives expert e's matrix as floats when it is asked for."""

    def __init__(self, held: Held, i: int, dtype: torch.dtype) -> None:
        self.held, self.i, self.dtype = held, i, dtype
        words = held.codes[i].shape
        self.shape = (words[0], *held.how.shape((words[-2], words[-1])))

    def __getitem__(self, e: int) -> Tensor:
        return self.held.floats(self.i, e, self.dtype)


class _Listed(Sequence[Any]):
    """A list of weights, each made floats when it is asked for."""

    def __init__(self, held: Held, dtype: torch.dtype) -> None:
        self.held, self.dtype = held, dtype

    def __len__(self) -> int:
        return len(self.held.codes)

    def __getitem__(self, i: Any) -> Any:
        return self.held.floats(i, ..., self.dtype)


def lazy(p: Operands[Tensor], name: str, stored: Stored | None, stacked: bool, dtype: torch.dtype) -> Sequence[Any]:
    """Weights as `generic` takes them, made floats expert by expert."""
    if stored is None:
        return getattr(p, name)  # type: ignore[no-any-return]
    held = Held.of(p, name, stored)
    return tuple(_Stacked(held, i, dtype) for i in range(len(held.codes))) if stacked else _Listed(held, dtype)


def forward(x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout, storage: Storage) -> Tensor:
    """As `generic.forward`, without pre-activations, rounded to x.dtype once, at the end.

    Raises ValueError where a parameter holds fewer experts than the call says.
    """
    generic.check_sizes(layout, p.of_experts())
    wide = accumulate_dtype(x.dtype)
    both = zip(("up", "down"), storage.stored(), strict=True)
    ups, downs = (lazy(p, name, stored, layout.stacked, wide) for name, stored in both)
    floats: Operands[Any] = _with_pairs(Operands(ups, downs, p.up_bias, p.down_bias), p)  # type: ignore[arg-type]
    smooth = (p.up_smooth, p.down_smooth)
    outer, inner = (None if how is None else _rounding(how, ks, x.dtype) for how, ks in zip(storage.rows(), smooth, strict=True))
    return generic.forward(x.to(wide), ids, weights, floats, add, layout, outer, inner)[0].to(x.dtype)


def _rounding(how: Rows, scales: Sequence[Tensor], dtype: torch.dtype) -> Callable[[Tensor, Block], Tensor]:
    """Rows as a product reads them. They have the type of the tokens before they are rounded, as a model's have."""

    def rounded(rows: Tensor, block: Block) -> Tensor:
        rows = rows.to(dtype).to(rows.dtype)
        if len(scales) == 1 and scales[0].ndim == 1 or not scales:
            return how.rounded(rows, scales[0] if scales else None)
        per = [scales[e] if len(scales) > 1 else scales[0][e] for e in block.experts]
        return how.rounded(rows, torch.stack(per).repeat_interleave(torch.tensor(block.counts, device=rows.device), 0))

    return rounded


def as_floats(p: Operands[Tensor], storage: Storage, dtype: torch.dtype) -> Operands[Tensor]:
    """All weights as floats, with gradients to the scales."""

    def floats(name: str, stored: Stored | None) -> tuple[Tensor, ...]:
        if stored is None:
            return tuple(w.to(dtype) for w in getattr(p, name))
        held = Held.of(p, name, stored)
        return tuple(held.floats(i, ..., dtype) for i in range(len(held.codes)))

    up, down = storage.stored()
    biases = (tuple([b.to(dtype) for b in group]) for group in (p.up_bias, p.down_bias))
    return _with_pairs(Operands(floats("up", up), floats("down", down), *biases), p)


def _with_pairs(floats: Operands[Any], p: Operands[Tensor]) -> Operands[Any]:
    return replace(floats, up_a=p.up_a, up_b=p.up_b, down_a=p.down_a, down_b=p.down_b)
