"""Experts whose weights are stored as integers with a scale for each output channel, in plain torch: any device.

Weights become floats one expert at a time, and only for experts that tokens were sent to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.operands import Operands
from . import generic
from .generic import Layout, accumulate_dtype


def dequantised(weight: Tensor, scale: Tensor | None, transposed: bool, dtype: torch.dtype) -> Tensor:
    """weight [.., out, in] ([.., in, out] when transposed) times scale [.., out] or [.., 1], in `dtype`."""
    return weight.to(dtype) if scale is None else weight.to(dtype) * scale.to(dtype).unsqueeze(-2 if transposed else -1)


class _Stacked:
    """A stacked weight that gives expert e's matrix as floats when it is asked for."""

    def __init__(self, weight: Tensor, scale: Tensor | None, transposed: bool, dtype: torch.dtype) -> None:
        self.weight, self.scale, self.transposed, self.dtype = weight, scale, transposed, dtype
        self.shape = weight.shape

    def __getitem__(self, e: int) -> Tensor:
        return dequantised(self.weight[e], None if self.scale is None else self.scale[e], self.transposed, self.dtype)


class _Listed(Sequence[Any]):
    """A list of weights, each made floats when it is asked for."""

    def __init__(self, weights: Sequence[Tensor], scales: Sequence[Tensor], transposed: bool, dtype: torch.dtype) -> None:
        self.weights, self.scales, self.transposed, self.dtype = weights, scales, transposed, dtype

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, i: Any) -> Any:
        return dequantised(self.weights[i], self.scales[i] if self.scales else None, self.transposed, self.dtype)


def lazy(weights: Sequence[Tensor], scales: Sequence[Tensor], stacked: bool, transposed: bool, dtype: torch.dtype) -> Sequence[Any]:
    """Weights as `generic` takes them, made floats expert by expert."""
    if not stacked:
        return _Listed(weights, scales, transposed, dtype)
    return [_Stacked(w, scales[i] if scales else None, transposed, dtype) for i, w in enumerate(weights)]


def forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    add: Tensor | None,
    layout: Layout,
    row_bits: int = 0,
    row_floor: float = 0.0,
) -> Tensor:
    """As `generic.forward`, without pre-activations, rounded to x.dtype once, at the end.

    Raises ValueError where a parameter holds fewer experts than the call says.
    """
    generic.check_sizes(layout, p)
    wide = accumulate_dtype(x.dtype)
    floats: Operands[Any] = Operands(
        tuple(lazy(p.up, p.up_scale, layout.stacked, layout.up_transposed, wide)),
        tuple(lazy(p.down, p.down_scale, layout.stacked, layout.down_transposed, wide)),
        p.up_bias,
        p.down_bias,
    )
    if not row_bits:
        return generic.forward(x.to(wide), ids, weights, floats, add, layout)[0].to(x.dtype)
    if layout.weight_on_input or layout.num_identity:
        raise ValueError("moe_compile::experts_scaled: rows are not rounded with weights on the input or identity experts")

    def rounded(rows: Tensor) -> Tensor:
        return round_rows(rows, row_bits, row_floor)

    return generic.forward(rounded(x.to(wide)), ids, weights, floats, add, layout, rounded)[0].to(x.dtype)


def round_rows(rows: Tensor, bits: int, floor: float) -> Tensor:
    """s · round(x / s) with s = max|x| / (2^(bits - 1) - 1) of each row, at least `floor`; a row of zeros stays one."""
    s = (rows.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=floor)
    return (rows / torch.where(s == 0, 1.0, s)).round() * s


def as_floats(p: Operands[Tensor], layout: Layout, dtype: torch.dtype) -> Operands[Tensor]:
    """All parameters as floats, the scales in them, with gradients to the scales."""

    def floats(weights: Sequence[Tensor], scales: Sequence[Tensor], transposed: bool) -> tuple[Tensor, ...]:
        return tuple([dequantised(w, scales[i] if scales else None, transposed, dtype) for i, w in enumerate(weights)])

    biases = (tuple([b.to(dtype) for b in group]) for group in (p.up_bias, p.down_bias))
    return Operands(floats(p.up, p.up_scale, layout.up_transposed), floats(p.down, p.down_scale, layout.down_transposed), *biases)
