"""The activation as a kernel of its own, behind products that are torch's."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...ir import Form
from ..reference.generic import Layout
from . import activation
from .host import cdiv, power_of_2
from .launch.tape import launch
from .weights import Biases


def activate(layout: Layout, pre: Sequence[Tensor], bias: Biases | None, out: Tensor) -> None:
    """out [N, I] = act(g + b_g, u + b_u), from products as they are stored."""
    form, (rows, width) = Form(layout.form), out.shape
    g = u = pre[0]
    if form is Form.SEPARATE:
        u = pre[1]
    elif form is Form.CONCAT:
        u = pre[0][:, width:]
    elif form is Form.INTERLEAVED:
        u = pre[0][:, 1:]
    columns = min(1024, power_of_2(width))
    launch(
        _activate, (rows, cdiv(width, columns)),
        g, u, *((None, None) if bias is None else (bias.parts[0], bias.parts[-1])), out, width, g.stride(0),
        0 if bias is None else bias.stride_n,
        STEP=2 if form is Form.INTERLEAVED else 1, ACT=activation.functions(layout.act_ops, layout.act_consts).act,
        BIAS=bias is not None, BN=columns, num_warps=4,
    )  # fmt: skip


@triton.jit
def _activate(
    g, u, bias_g, bias_u, out, width: tl.constexpr, stride: tl.constexpr, stride_bias, STEP: tl.constexpr, ACT: tl.constexpr,
    BIAS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < width
    a = tl.load(g + t * stride + columns * STEP, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(u + t * stride + columns * STEP, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        a += tl.load(bias_g + columns * stride_bias, mask=inside, other=0.0).to(tl.float32)
        b += tl.load(bias_u + columns * stride_bias, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * width + columns, ACT(a, b).to(out.dtype.element_ty), mask=inside)
