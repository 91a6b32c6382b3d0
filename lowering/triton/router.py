"""The router's product for a few tokens: l[t, e] = Σ_h x[t, h] W[e, h] + b[e], a program per token and expert.

A library's product takes 5 µs for a matrix of half a megabyte; here every processor reads a row or two, and the routing kernel starts
while this one drains. The matrix is read after the wait for the kernel ahead, which may be the one that has just written it.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .capability import ROUTER_TOKENS
from .combine import early_launch
from .decode import _product, _tile
from .host import cdiv, power_of_2
from .launch.tape import empty, launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DEPTH = 4096  # elements of a row in one go


@triton.jit
def logits_kernel(
    x, w, bias, out, n: tl.constexpr, k: tl.constexpr, stride_x: tl.constexpr, stride_w: tl.constexpr,
    BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    n0 = tl.program_id(1) * BN
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    first = _tile(w, n0, 0, n, k, stride_w, 1, True, BN, BK, EVEN)
    y = _product(first, w, x + t * stride_x, n0, n, k, stride_w, 1, True, EVEN)
    columns = n0 + tl.arange(0, BN)
    if BIAS:
        y += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)
    tl.store(out + t * n + columns, y.to(out.dtype.element_ty), mask=columns < n)


def product(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [T, H], w [E, H], bias [E] or None -> [T, E] in `dtype`, theirs or a wider one, summed in fp32.

    Beyond the kernel: torch's product, in `dtype`.
    """
    if not fits(x, w, bias):
        return torch.nn.functional.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))
    (tokens, k), n = x.shape, w.shape[0]
    out = empty(x, tokens, n, dtype=dtype)
    if not out.numel():
        return out
    pdl = {"launch_pdl": True} if early_launch(x) else {}
    rows = 1 if n <= 256 else 2
    depth = min(_DEPTH, power_of_2(k))
    launch(
        logits_kernel, (tokens, cdiv(n, rows)),
        x, w, bias, out, n, k, x.stride(0), w.stride(0),
        BIAS=bias is not None, BN=rows, BK=depth, EVEN=n % rows == 0 and k % depth == 0, PDL=bool(pdl), num_warps=4, **pdl,
    )  # fmt: skip
    return out


def fits(x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes the product."""
    if x.dtype not in DTYPES or not x.ndim == w.ndim == 2 or not x.shape[1] == w.shape[1] > 0 or x.shape[0] > ROUTER_TOKENS:
        return False
    plain = bias is None or (bias.shape == w.shape[:1] and bias.dtype == x.dtype and bias.stride(0) == 1)
    return plain and x.dtype == w.dtype and x.device == w.device and x.stride(1) == w.stride(1) == 1
