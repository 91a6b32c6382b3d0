"""The CPU target: one call into kernels that group tokens by expert and stream each touched weight once.

What the kernels do not take (float64, mixed dtypes, unusual strides, no compiler on the machine) runs in plain torch
(`generic`): same results, within rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir import MoeBlock
from ...ir import scalar as act
from ..reference import generic
from ..reference.generic import Layout
from . import build, frozen, route
from .call import Call

_MAX_DEPTH = 8  # stack entries of the kernels' activation programs (act.h)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuses(ir: MoeBlock) -> str | None:
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


def says(ir: MoeBlock) -> str:
    """What runs the block, a kernel or plain torch, and the dtype of its products."""
    dtype = str(ir.experts.dtype).removeprefix("torch.")
    if ir.experts.weight_dtype is not None:
        return f"cpu torch ({dtype}, weights {str(ir.experts.weight_dtype).removeprefix('torch.')})"
    ops, _ = act.encode(ir.experts.activation)
    kernel = ir.experts.dtype in build.STORAGE and _depth(ops) <= _MAX_DEPTH
    return f"cpu {'kernel' if kernel else 'torch'} ({dtype})"


def prepare(ir: MoeBlock) -> None:
    """Start building the kernels for this block in the background; returns at once."""
    route.prepare()
    if not ir.experts.scaled:
        build.start("forward", ir.experts.dtype)
        if frozen.any_frozen():
            build.start("packed", ir.experts.dtype)


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
    generic.check_rows(x, ids, weights)
    if ids.shape != weights.shape:
        raise ValueError(f"moe_compile::experts: ids are {list(ids.shape)}, weights {list(weights.shape)}")
    biases = [[t.contiguous() for t in ts] for ts in (up_bias, down_bias)]
    found = _kernel("forward" if save else "inference", x, layout, up, down, *biases)
    if found is None or not ids.numel():
        return generic.forward(x, ids, weights, up, down, up_bias, down_bias, add, layout)
    library, prepared = found
    x = x if x.stride(1) == 1 else x.contiguous()
    call = prepared.on(x, ids.long().contiguous(), weights.float().contiguous())
    out = x.new_empty(x.shape[0], layout.out_features(down))
    call.tensors(out=out, add=None if add is None else add.to(x.dtype).contiguous())
    pre = x.new_empty(ids.numel() if save else 0, layout.pre_width(down))
    if save:
        build.start("backward", x.dtype)  # somebody is going to want gradients
        call.tensors(pre=pre)
    if not call.run(library.moe_experts_forward):
        assert call.sources is not None
        call.sources.thaw()
        return forward(x, ids, weights, up, down, up_bias, down_bias, add, layout, save)
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
    biases = [[t.contiguous() for t in ts] for ts in (up_bias, down_bias)]
    found = _kernel("backward", x, layout, up, down, *biases)
    if found is None or not ids.numel():
        return generic.backward(grad, pre, x, ids, weights, up, down, up_bias, down_bias, layout, needs)
    library, prepared = found
    x = x if x.stride(1) == 1 else x.contiguous()
    call = prepared.on(x, ids.long().contiguous(), weights.float().contiguous())
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


_found: dict[Any, tuple[ctypes.CDLL, Call]] = {}


def _kernel(direction: str, x: Tensor, layout: Layout, *lists: Sequence[Tensor]) -> tuple[ctypes.CDLL, Call] | None:
    """The kernels and a call without its tokens, or None where they do not take these operands; the same operands are looked at once.

    `direction`: "backward", "forward" (keeps what backward needs) or "inference", which reads packed weights where there are.
    Raises ValueError when a parameter holds fewer experts than the call says.
    """
    key = (direction, x.dtype, x.shape[1], layout, *map(_described, lists))
    found = _found.get(key)
    if found is not None and found[1].sources is not None and not found[1].sources.unchanged():
        found[1].sources.thaw()
        found = None
    if found is None:
        generic.check_sizes(layout, *lists)
        library = _library("backward" if direction == "backward" else "forward", x, layout, *lists)
        if library is None:
            return None
        if len(_found) > 4096:
            _found.clear()
        call = _call(layout, x.shape[1], *lists)
        packed = _packed(call, x.dtype, *lists[:2]) if direction == "inference" else None
        found = _found[key] = packed or library, call
    return found


def _packed(call: Call, dtype: torch.dtype, up: Sequence[Tensor], down: Sequence[Tensor]) -> ctypes.CDLL | None:
    """The kernels for packed weights, and `call` made one on them, where `moe_compile.prepare` has allowed for copies of these."""
    sources = frozen.sources(up, down)
    library = None if sources is None else build.library("packed", dtype)
    return library if library is not None and sources is not None and call.pack(library, sources) else None


def _forget(address: int | None) -> None:
    """Packed copies of what lay at `address` go; or (None) all that was found, because weights may be packed that were not."""
    for key, (_, call) in list(_found.items()):
        if address is None or call.sources is not None and address in call.sources.weights:
            _found.pop(key, None)


frozen.changed.append(_forget)


def _described(tensors: Sequence[Tensor]) -> Any:
    """Everything about a stack or a list of equal matrices but their values."""
    pointers, strides = tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.stride, tensors))
    return pointers, strides, tuple([t.dtype for t in tensors]), tuple([t.shape for t in tensors[:2]])


def _call(
    layout: Layout, hidden: int, up: Sequence[Tensor], down: Sequence[Tensor], up_bias: Sequence[Tensor], down_bias: Sequence[Tensor]
) -> Call:
    call = Call(layout, hidden, down)
    call.up("", up)
    call.down("", down)
    call.biases("", up_bias, down_bias)
    return call


def _library(direction: str, x: Tensor, layout: Layout, *lists: Sequence[Tensor]) -> ctypes.CDLL | None:
    """The kernels, when these operands are what they take: one dtype, one stride pattern per list, rows or columns contiguous."""
    dtype = x.dtype
    if dtype not in build.STORAGE or _depth(layout.act_ops) > _MAX_DEPTH or x.shape[1] == 0:
        return None
    for tensors in lists:
        strides = tensors[0].stride() if tensors else ()
        if any(t.dtype != dtype or t.stride() != strides for t in tensors):
            return None
    for t in (lists[0][0], lists[1][0]):
        if 1 not in t.stride()[-2:] or 0 in t.stride():
            return None
    return build.library(direction, dtype)


def _depth(ops: Sequence[int]) -> int:
    """Stack entries an activation program needs."""
    depth = most = 0
    for op in ops:
        if op <= act.OP_CONST:
            depth += 1
        elif op in act.OF_TWO:
            depth -= 1
        most = max(most, depth)
    return most
