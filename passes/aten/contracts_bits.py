"""Contracts of ops that make floats of codes of four bits (`contracts`): bitsandbytes' NF4, as QLoRA has it.

    w = (table[code] · absmax[n // blocksize]) of element n, seen as `shape`
    a = code[c] · absmax[n // blocksize]       of what is in eight bits itself (double quantisation)

The table is that of Dettmers and others, QLoRA (arXiv 2305.14314), appendix E. The first of two codes is in the high half of its byte.
What `absmax` is made of, codes too or not, is the graph's. Other tables than NF4 have no contract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .contracts import Contract, own

# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def _dequantize_4bit(A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if quant_type != "nf4":
        raise NotImplementedError(f"codes of {quant_type}")
    table, b, numel = torch.tensor(_NF4, device=A.device), A.view(torch.uint8).flatten(), math.prod(shape)
    v = torch.stack([table[(b >> 4).long()], table[(b & 15).long()]], -1).flatten()
    if numel % blocksize:
        return (v[:numel] * absmax.repeat_interleave(blocksize)[:numel]).view(*shape).to(dtype)
    return (v.view(-1, blocksize) * absmax[:, None]).view(*shape).to(dtype)


def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    v = code[A.long()].flatten()
    return (v * absmax.repeat_interleave(blocksize)[: v.shape[0]]).view(A.shape).to(dtype)


own(
    Contract("dequantize_4bit", _dequantize_4bit, own=True),
    Contract("dequantize_blockwise", _dequantize_blockwise, own=True),
)
