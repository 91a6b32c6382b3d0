"""Contracts of the float8 kernels that transformers loads for `FP8Experts`.

References say which numbers are multiplied; in which order a kernel sums them is its own affair. Rows are float8 codes times their scales:

    y = Σ_m (q_m · s[m // group]) W[n, m],   q = e4m3(x / max(s, 1e-12)),   s = max|x| / 448 of each group
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .contracts import Contract, own

_LARGEST = 448.0  # of float8_e4m3fn
_LEAST = 1e-12  # that rows are divided by
_MX = 32  # inputs that share a scale in MX formats
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LIBRARY = torch.library.Library("moe_compile_reference", "DEF")
_LIBRARY.define("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor")


def _grouped(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """input [S, K], weight [E, K, N], rows of expert e end at offs[e]; any dtype, where torch's own takes bfloat16."""
    out = input.new_zeros(input.shape[0], weight.shape[-1])
    start = 0
    for e, end in enumerate(offs.tolist()):
        out[start:end] = input[start:end] @ weight[e]
        start = end
    return out


_LIBRARY.impl("grouped_mm_fallback", _grouped, "CompositeExplicitAutograd")
torch.library.register_fake(
    "moe_compile_reference::grouped_mm_fallback",
    lambda input, weight, offs: input.new_empty(input.shape[0], weight.shape[-1]),
    lib=_LIBRARY,
)


# ---- rows and weights as the floats that they stand for ------------------------------------------------------------------


def rounded(x: Tensor, group: int, power: bool = False, floored: bool = False) -> Tensor:
    """x [S, K] in float8, each group of a row by its own scale; `power`: scales are rounded up to powers of two."""
    t = x.float().unflatten(-1, (-1, group))
    s = t.abs().amax(-1, keepdim=True) / _LARGEST
    least = s.clamp(min=_LEAST)
    if power:
        s = least = torch.exp2(torch.ceil(torch.log2(least)))
    q = (t / least).to(torch.float8_e4m3fn).float()
    return (q * (least if floored else s)).flatten(-2)


def weights(codes: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    """codes [.., N, K], scale [.., N / bn, K / bk], each rounded up -> [.., N, K]."""
    n, k = codes.shape[-2:]
    s = scale.float().repeat_interleave(block[0], -2)[..., :n, :].repeat_interleave(block[1], -1)[..., :k]
    return codes.float() * s


def _of_matrix(codes: Tensor, scale: Tensor) -> Tensor:
    """One number for each matrix."""
    lead = codes.shape[:-2]
    return codes.float() * scale.float().reshape(*lead, 1, 1)


def _mx(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [.., N, K] in float8 or [.., N, K / 2] of two e2m1, the even element in the low bits; scale [.., N, K / 32], exponents."""
    powers = torch.exp2(scale.float() - 127) if scale.dtype is torch.uint8 else scale.float()
    if codes.dtype is torch.float8_e4m3fn:
        values = codes.float()
    else:
        table = torch.tensor((*_E2M1, *(-v for v in _E2M1)), device=codes.device)
        both = codes.view(torch.uint8).int()
        values = table[torch.stack([both & 15, both >> 4], -1).flatten(-2)]
    return (values.unflatten(-1, (-1, _MX)) * powers.unsqueeze(-1)).flatten(-2)


def _block(A: Tensor, B: Tensor, Bs: Tensor, block_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    return rounded(A, block_size[1]), weights(B, Bs, block_size)


def _tensor(A: Tensor, B: Tensor, Bs: Tensor) -> tuple[Tensor, Tensor]:
    return rounded(A, A.shape[-1], floored=True), _of_matrix(B, Bs)


def _groups(A: Tensor, B: Tensor, Bs: Tensor) -> tuple[Tensor, Tensor]:
    return rounded(A, _MX, power=True), _mx(B, Bs)


# ---- the three products ------------------------------------------------------------------------------------------------


def _matmul(A: Tensor, floats: tuple[Tensor, Tensor], dtype: Any) -> Tensor:
    rows, w = (t.to(A.dtype) for t in floats)
    return torch.nn.functional.linear(rows, w).to(dtype or A.dtype)


def _grouped_matmul(A: Tensor, floats: tuple[Tensor, Tensor], ends: Tensor, dtype: Any) -> Tensor:
    rows, w = (t.to(A.dtype) for t in floats)
    return torch.ops.moe_compile_reference.grouped_mm_fallback(rows, w.transpose(-2, -1), ends).to(dtype or A.dtype)  # type: ignore[no-any-return]


def _batched_matmul(A: Tensor, floats: tuple[Tensor, Tensor], ids: Tensor, dtype: Any) -> Tensor:
    rows, w = (t.to(A.dtype) for t in floats)
    return torch.einsum("sk,snk->sn", rows, w[ids.long()]).to(dtype or A.dtype)


def _block_2d(A, B, Bs, block_size, output_dtype=None):  # type: ignore[no-untyped-def]
    return _matmul(A, _block(A, B, Bs, block_size), output_dtype)


def _block_grouped(A, B, Bs, offsets, tokens_per_expert, block_size, output_dtype=None):  # type: ignore[no-untyped-def]
    return _grouped_matmul(A, _block(A, B, Bs, block_size), offsets, output_dtype)


def _block_batched(A, B, Bs, expert_ids, block_size, output_dtype=None):  # type: ignore[no-untyped-def]
    return _batched_matmul(A, _block(A, B, Bs, block_size), expert_ids, output_dtype)


def _three(floats: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Callable[..., Tensor], ...]:
    """The references of the product with one matrix, with one for each group of rows, with one for each row."""
    return (
        lambda A, B, Bs, output_dtype=None: _matmul(A, floats(A, B, Bs), output_dtype),
        lambda A, B, Bs, offsets, tokens_per_expert, output_dtype=None: _grouped_matmul(A, floats(A, B, Bs), offsets, output_dtype),
        lambda A, B, Bs, expert_ids, output_dtype=None: _batched_matmul(A, floats(A, B, Bs), expert_ids, output_dtype),
    )


_tensor_2d, _tensor_grouped, _tensor_batched = _three(_tensor)
_mx_2d, _mx_grouped, _mx_batched = _three(_groups)
_MX_NAMES = ("mxfp_dynamic_matmul", "w4a8_mx_dynamic_fp4_matmul", "w8a8_mx_dynamic_fp8_matmul", "w4a8_block_dynamic_fp4_matmul")
_OF: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "w8a8_block_dynamic_fp8_matmul": (_block_2d, _block_grouped, _block_batched),
    "w8a8_tensor_dynamic_fp8_matmul": (_tensor_2d, _tensor_grouped, _tensor_batched),
    **dict.fromkeys(_MX_NAMES, (_mx_2d, _mx_grouped, _mx_batched)),
}
own(*(Contract(f"{name}{of}", f, own=True) for name, fs in _OF.items() for of, f in zip(("", "_grouped", "_batched"), fs, strict=True)))
