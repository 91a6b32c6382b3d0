"""The fractal format NZ of a matrix: blocks of 16 rows by 16 columns (32 for bytes), block columns one behind the other.

[K, N] lies as [N / n, K / 16, 16, n] with n = 16, or 32 for int8 (CANN, "FRACTAL_NZ"). npu_grouped_matmul takes weights that way, and
picks its kernel by the format. A matrix whose sizes are no multiples of the blocks crashes there: it stays as it is, and a note says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FRACTAL_NZ = 29  # ACL's number of the format
BLOCK = {torch.float16: (16, 16), torch.bfloat16: (16, 16), torch.int8: (16, 32)}  # rows and columns of a block


def refuses_nz(shape: Sequence[Any], dtype: torch.dtype) -> str | None:
    """Why a packed weight [E, K, N] cannot be in the fractal format, or None."""
    if dtype not in BLOCK:
        return f"{str(dtype).removeprefix('torch.')} has no fractal format, fp16, bf16 and int8 have"
    k, n = (int(s) for s in shape[-2:])
    rows, columns = BLOCK[dtype]
    if k % rows or n % columns:
        return f"[{k}, {n}] does not fall into blocks of {rows} x {columns}"
    return None


def to_nz(t: Tensor) -> Tensor:
    """A packed weight [E, K, N] in the fractal format, on an NPU; elsewhere there is no such format, and it stays as it is.

    There is no shape function for the cast, so it cannot be part of a graph.
    """
    return _format_cast(t.contiguous()) if t.device.type == "npu" else t


def _format_cast(t: Tensor) -> Tensor:
    import torch_npu

    torch_npu.npu.config.allow_internal_format = True  # without it the cast does nothing but warn
    out: Tensor = torch_npu.npu_format_cast(t, FRACTAL_NZ)
    return out
