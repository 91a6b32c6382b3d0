"""The CPU target: one call into kernels that group tokens by expert and stream each touched weight once.

What the kernels do not take (float64, mixed dtypes, unusual strides, no compiler on the machine) runs in plain torch
(`generic`): same results, within rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import activation as act
from ..ir import MoeBlock
from . import cpu_build, generic
from .cpu_call import Call
from .generic import Layout

SCALED = True  # integer weights run in plain torch, made floats one touched expert at a time
_MAX_DEPTH = 8  # stack entries of the kernels' activation programs (act.h)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def can_lower(ir: MoeBlock) -> str | None:
    """None when the CPU ops can run this block, else the reason."""
    if ir.experts.row_bits:
        return f"rows rounded to {ir.experts.row_bits} bits: no CPU kernel, and another order of sums may round another way"
    if ir.experts.scaled and ir.experts.weight_dtype is None:
        return "float expert weights with scales have no CPU lowering"
    if ir.experts.dtype not in _FLOATS:
        return f"expert weights of {ir.experts.dtype} have no CPU lowering"
    try:
        act.encode(ir.experts.activation)
    except act.UnknownActivation as e:
        return f"activation: {e}"
    if ir.experts.num_identity and ir.experts.hidden != ir.experts.out_features:
        return "identity experts need as many outputs as inputs"
    return None


def lowering_name(ir: MoeBlock) -> str:
    """What runs the block, a kernel or plain torch, and the dtype of its products."""
    dtype = str(ir.experts.dtype).removeprefix("torch.")
    if ir.experts.weight_dtype is not None:
        return f"cpu torch ({dtype}, weights {str(ir.experts.weight_dtype).removeprefix('torch.')})"
    ops, _ = act.encode(ir.experts.activation)
    kernel = ir.experts.dtype in cpu_build.STORAGE and _depth(ops) <= _MAX_DEPTH
    return f"cpu {'kernel' if kernel else 'torch'} ({dtype})"


def prepare(ir: MoeBlock) -> None:
    """Start building the kernels for this block in the background; returns at once."""
    if not ir.experts.scaled:
        cpu_build.start("forward", ir.experts.dtype)


def forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    add: Tensor | None,
    layout: Layout,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """As `generic.forward`; the second result is only filled when `save`."""
    generic.check_sizes(layout, up, down, up_bias, down_bias)
    library = _library("forward", x, layout, up, down, up_bias, down_bias) if ids.numel() else None
    if library is None:
        return generic.forward(x, ids, weights, up, down, up_bias, down_bias, add, layout)
    x = x if x.stride(1) == 1 else x.contiguous()
    call = _call(layout, x, ids, weights, up, down, up_bias, down_bias)
    out = x.new_empty(x.shape[0], layout.out_features(down))
    call.tensors(out=out, add=None if add is None else add.to(x.dtype).contiguous())
    pre = x.new_empty(ids.numel() if save else 0, layout.pre_width(down))
    if save:
        cpu_build.start("backward", x.dtype)  # somebody is going to want gradients
        call.tensors(pre=pre)
    call.run(library.moe_experts_forward)
    return out, pre


def backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    layout: Layout,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `generic.backward`."""
    generic.check_sizes(layout, up, down, up_bias, down_bias)
    library = _library("backward", x, layout, up, down, up_bias, down_bias) if ids.numel() else None
    if library is None:
        return generic.backward(grad, pre, x, ids, weights, up, down, up_bias, down_bias, layout, needs)
    x = x if x.stride(1) == 1 else x.contiguous()
    call = _call(layout, x, ids, weights, up, down, up_bias, down_bias)
    call.tensors(grad=grad.to(x.dtype).contiguous(), pre=pre.contiguous())
    wanted = zip((x, weights, *up, *down, *up_bias, *down_bias), needs, strict=True)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) if n else None for t, n in wanted]
    for g in grads[2:]:
        if g is not None and layout.stacked and g.shape[0] > layout.num_experts:
            g[layout.num_experts :].zero_()  # rows that no expert of this block uses
    call.tensors(out=grads[0])
    grad_weights = torch.empty(ids.shape, dtype=torch.float32) if needs[1] else None
    call.tensors(grad_weights=grad_weights)
    rest = iter(grads[2:])
    for_up, for_down, for_up_bias, for_down_bias = ([next(rest) for _ in ts] for ts in (up, down, up_bias, down_bias))
    if any(g is not None for g in for_up):
        call.up("grad_", for_up)
    if any(g is not None for g in for_down):
        call.down("grad_", for_down)
    call.biases("grad_", for_up_bias, for_down_bias)
    call.run(library.moe_experts_backward)
    if grad_weights is not None:
        grads[1] = grad_weights.to(weights.dtype)
    return [g for g in grads if g is not None]


def _call(
    layout: Layout,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
) -> Call:
    call = Call(layout, x, ids.long().contiguous(), weights.float().contiguous(), down)
    call.up("", up)
    call.down("", down)
    call.biases("", [t.contiguous() for t in up_bias], [t.contiguous() for t in down_bias])
    return call


def _library(direction: str, x: Tensor, layout: Layout, *lists: Sequence[Tensor]) -> ctypes.CDLL | None:
    """The kernels, when these operands are what they take: one dtype, one stride pattern per list, rows or columns contiguous."""
    dtype = x.dtype
    if dtype not in cpu_build.STORAGE or _depth(layout.act_ops) > _MAX_DEPTH or x.shape[1] == 0:
        return None
    for tensors in lists:
        strides = tensors[0].stride() if tensors else ()
        if any(t.dtype != dtype or t.stride() != strides for t in tensors):
            return None
    for t in (lists[0][0], lists[1][0]):
        if 1 not in t.stride()[-2:] or 0 in t.stride():
            return None
    return cpu_build.library(direction, dtype)


def _depth(ops: Sequence[int]) -> int:
    """Stack entries an activation program needs."""
    depth = most = 0
    for op in ops:
        if op <= act.OP_CONST:
            depth += 1
        elif op in (act.OP_ADD, act.OP_MUL):
            depth -= 1
        most = max(most, depth)
    return most
