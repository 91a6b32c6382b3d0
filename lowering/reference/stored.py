"""Experts whose weights lie in memory as codes with scales, in plain torch: any device.

Weights become floats one expert at a time, and only for experts that tokens were sent to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir import Stored
from ...ir.operands import Operands
from ...ir.records import Storage
from . import generic
from .generic import Layout, accumulate_dtype


class _Stacked:
    """A stacked weight that gives expert e's matrix as floats when it is asked for."""

    def __init__(self, codes: Tensor, scale: Tensor | None, stored: Stored, dtype: torch.dtype) -> None:
        self.codes, self.scale, self.stored, self.dtype = codes, scale, stored, dtype
        self.shape = codes.shape

    def __getitem__(self, e: int) -> Tensor:
        return self.stored.matrix(self.codes[e], None if self.scale is None else self.scale[e], self.dtype)


class _Listed(Sequence[Any]):
    """A list of weights, each made floats when it is asked for."""

    def __init__(self, codes: Sequence[Tensor], scales: Sequence[Tensor], stored: Stored, dtype: torch.dtype) -> None:
        self.codes, self.scales, self.stored, self.dtype = codes, scales, stored, dtype

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, i: Any) -> Any:
        return self.stored.matrix(self.codes[i], self.scales[i] if self.scales else None, self.dtype)


def lazy(codes: Sequence[Tensor], scales: Sequence[Tensor], stored: Stored | None, stacked: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    """Weights as `generic` takes them, made floats expert by expert."""
    if stored is None:
        return tuple(codes)
    if not stacked:
        return (_Listed(codes, scales, stored, dtype),)
    return tuple(_Stacked(w, scales[i] if scales else None, stored, dtype) for i, w in enumerate(codes))


def forward(x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout, storage: Storage) -> Tensor:
    """As `generic.forward`, without pre-activations, rounded to x.dtype once, at the end.

    Raises ValueError where a parameter holds fewer experts than the call says.
    """
    generic.check_sizes(layout, p)
    wide = accumulate_dtype(x.dtype)
    ups, downs = (
        lazy(codes, scales, stored, layout.stacked, wide)
        for codes, scales, stored in zip((p.up, p.down), (p.up_scale, p.down_scale), storage.stored(), strict=True)
    )
    floats: Operands[Any] = Operands(ups if layout.stacked else ups[0], downs if layout.stacked else downs[0], p.up_bias, p.down_bias)
    if not storage.row_bits:
        return generic.forward(x.to(wide), ids, weights, floats, add, layout)[0].to(x.dtype)
    if layout.weight_on_input or layout.num_identity:
        raise ValueError("moe_compile::experts_stored: rows are not rounded with weights on the input or identity experts")

    def rounded(rows: Tensor) -> Tensor:
        return round_rows(rows, storage.row_bits, storage.row_floor)

    return generic.forward(rounded(x.to(wide)), ids, weights, floats, add, layout, rounded)[0].to(x.dtype)


def round_rows(rows: Tensor, bits: int, floor: float) -> Tensor:
    """s · round(x / s) with s = max|x| / (2^(bits - 1) - 1) of each row, at least `floor`; a row of zeros stays one."""
    s = (rows.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=floor)
    return (rows / torch.where(s == 0, 1.0, s)).round() * s


def as_floats(p: Operands[Tensor], storage: Storage, dtype: torch.dtype) -> Operands[Tensor]:
    """All weights as floats, with gradients to the scales."""

    def floats(codes: Sequence[Tensor], scales: Sequence[Tensor], stored: Stored | None) -> tuple[Tensor, ...]:
        if stored is None:
            return tuple(w.to(dtype) for w in codes)
        return tuple(stored.matrix(w, scales[i] if scales else None, dtype) for i, w in enumerate(codes))

    up, down = storage.stored()
    biases = (tuple([b.to(dtype) for b in group]) for group in (p.up_bias, p.down_bias))
    return Operands(floats(p.up, p.up_scale, up), floats(p.down, p.down_scale, down), *biases)
