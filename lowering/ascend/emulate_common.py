"""Shared by the CPU kernels of the npu ops."""

from __future__ import annotations

import torch
from torch import Tensor


def undefined(t: Tensor) -> Tensor:
    """`t` filled with what no reader may look at."""
    return t.fill_(float("nan") if t.is_floating_point() else 0)


def per_row(values: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by row: scale = max|v| / 127."""
    scale = values.abs().amax(-1) / 127.0
    q = (values / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().clamp(-128, 127)
    return q.to(torch.int8), scale
