"""The fractal format NZ of a matrix: blocks of 16 rows by 16 columns (32 for bytes), block columns one behind the other.

[K, N] lies as [N / n, K / 16, 16, n] with n = 16, or 32 for int8 (CANN, "FRACTAL_NZ"). npu_grouped_matmul takes weights that way, and
picks its kernel by the format. A matrix whose sizes are no multiples of the blocks crashes there: it stays as it is, and a note says so.
A stack [E, K, N] is its matrices one behind the other, so the bytes of some experts are a piece of those of all.
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


def has_formats(t: Tensor) -> bool:
    """Whether tensors of this one's device have formats."""
    return t.device.type == "npu"


def is_nz(t: Tensor) -> bool:
    if not has_formats(t):
        return False
    import torch_npu

    return int(torch_npu.get_npu_format(t)) == FRACTAL_NZ


def to_nz(t: Tensor) -> Tensor:
    """A packed weight [E, K, N] in the fractal format, on an NPU; elsewhere there is no such format, and it stays as it is.

    There is no shape function for the cast, so it cannot be part of a graph.
    """
    return _format_cast(t.contiguous()) if has_formats(t) else t


def _format_cast(t: Tensor) -> Tensor:
    import torch_npu

    torch_npu.npu.config.allow_internal_format = True  # without it the cast does nothing but warn
    out: Tensor = torch_npu.npu_format_cast(t, FRACTAL_NZ)
    return out


# ---- by hand -----------------------------------------------------------------------------------------------------------


def in_blocks(t: Tensor) -> Tensor:
    """[E, K, N] -> the same elements in the order of the fractal format, contiguous, as [E, K, N]: an ordinary copy, no cast."""
    e, k, n = t.shape
    rows, columns = BLOCK[t.dtype]
    return t.reshape(e, k // rows, rows, n // columns, columns).permute(0, 3, 1, 2, 4).contiguous().view(e, k, n)


def out_of_blocks(t: Tensor) -> Tensor:
    """The inverse of `in_blocks`."""
    e, k, n = t.shape
    rows, columns = BLOCK[t.dtype]
    return t.reshape(e, n // columns, k // rows, rows, columns).permute(0, 2, 3, 1, 4).contiguous().view(e, k, n)


def over(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape in the fractal format over the memory of `blocks`, which holds its elements in blocks: nothing is copied.

    The memory stays that of `blocks`, which must outlive every use. Found with torch_npu 2.13 and 2.14 on stubbed CANN libraries, where
    memory is real and kernels are not; not run on an NPU.
    """
    import torch_npu

    torch_npu.npu.config.allow_internal_format = True
    out: Tensor = torch_npu.empty_with_format(tuple(shape), dtype=blocks.dtype, device=blocks.device, acl_format=FRACTAL_NZ)
    point(out, blocks)
    return out


def point(nz: Tensor, blocks: Tensor) -> None:
    """Let a tensor that `over` has made look at the memory of `blocks` from here on: its own may be freed and made anew."""
    import torch_npu

    torch_npu.npu_change_data_ptr(nz, blocks, 0)
