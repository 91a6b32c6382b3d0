"""The CPU target: one call into kernels that group tokens by expert and stream each touched weight once.

What the kernels do not take (float64, mixed dtypes, unusual strides, no compiler on the machine) runs in plain torch
(`generic`): same results, within rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...ir import Experts, MoeBlock
from ...ir import scalar as act
from ...ir.chain import program
from ...ir.operands import Operands
from ..reference import generic
from ..reference.generic import Layout
from . import build, frozen, route
from .call import Call

_MAX_DEPTH = 8  # stack entries of the kernels' activation programs (act.h)
CODED_TYPES = (torch.float32, torch.bfloat16)  # of rows, for weights in few bits
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuses(ir: MoeBlock) -> str | None:
    """None when the CPU ops can run this block, else the reason."""
    if any(s is not None and s.bits > 8 for s in (ir.experts.up_stored, ir.experts.down_stored)):
        return "float expert weights with scales have no CPU lowering"
    if ir.experts.dtype not in _FLOATS:
        return f"expert weights of {ir.experts.dtype} have no CPU lowering"
    try:
        act.encode(ir.experts.activation)
        [program(s) for s in (ir.experts.chain.stages if ir.experts.chain is not None else ())]
    except act.UnknownActivation as e:
        return f"activation: {e}"
    if ir.experts.num_identity and ir.experts.hidden != ir.experts.out_features:
        return "identity experts need as many outputs as inputs"
    return None


def has_kernel(e: Experts) -> bool:
    """Whether experts run in a kernel, where it could be built: on their floats, or on codes."""
    if e.chain is not None or e.adapted or _depth(act.encode(e.activation)[0]) > _MAX_DEPTH:
        return False
    return e.dtype in CODED_TYPES and not (e.num_identity or e.rounded) if e.coded else e.dtype in build.STORAGE


def prepare(ir: MoeBlock) -> None:
    """Start building the kernels for this block in the background; returns at once."""
    route.prepare()
    if ir.experts.coded:
        build.start("coded", ir.experts.dtype)
    elif not ir.experts.adapted and ir.experts.chain is None:
        build.start("forward", ir.experts.dtype)
        if frozen.any_frozen():
            build.start("packed", ir.experts.dtype)


def forward(
    x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout, save: bool
) -> tuple[Tensor, Tensor]:
    """As `generic.forward`; the second result is only filled when `save`."""
    generic.check_rows(x, ids, weights)
    if ids.shape != weights.shape:
        raise ValueError(f"moe_compile::experts: ids are {list(ids.shape)}, weights {list(weights.shape)}")
    found = _kernel("forward" if save else "inference", x, layout, _as_read(p))
    if found is None or not ids.numel():
        return generic.forward(x, ids, weights, p, add, layout)
    library, prepared = found
    x = x if x.stride(1) == 1 else x.contiguous()
    call = prepared.on(x, ids.long().contiguous(), weights.float().contiguous())
    out = x.new_empty(x.shape[0], layout.out_features(p.down))
    call.tensors(out=out, add=None if add is None else add.to(x.dtype).contiguous())
    pre = x.new_empty(ids.numel() if save else 0, layout.pre_width(p.down))
    if save:
        build.start("backward", x.dtype)  # somebody is going to want gradients
        call.tensors(pre=pre)
    if not call.run(library.moe_experts_forward):
        assert call.sources is not None
        call.sources.thaw()
        return forward(x, ids, weights, p, add, layout, save)
    return out, pre


def once(x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout) -> Tensor | None:
    """As `forward` for parameters that are there for one call; None where no kernel takes them."""
    p = _as_read(p)
    library = _library("forward", x, layout, p)
    if library is None:
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    prepared = Call(layout, x.shape[1], p.down)
    prepared.parameters("", p)
    call = prepared.on(x, ids.long().contiguous(), weights.float().contiguous())
    out = x.new_empty(x.shape[0], layout.out_features(p.down))
    call.tensors(out=out, add=None if add is None else add.to(x.dtype).contiguous(), pre=x.new_empty(0, layout.pre_width(p.down)))
    call.run(library.moe_experts_forward)
    return out


def _as_read(p: Operands[Tensor]) -> Operands[Tensor]:
    """The kernels read contiguous biases."""
    return replace(p, up_bias=tuple([t.contiguous() for t in p.up_bias]), down_bias=tuple([t.contiguous() for t in p.down_bias]))


def backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    layout: Layout,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `generic.backward`."""
    found = _kernel("backward", x, layout, _as_read(p))
    if found is None or not ids.numel():
        return generic.backward(grad, pre, x, ids, weights, p, layout, needs)
    library, prepared = found
    x = x if x.stride(1) == 1 else x.contiguous()
    call = prepared.on(x, ids.long().contiguous(), weights.float().contiguous())
    call.tensors(grad=grad.to(x.dtype).contiguous(), pre=pre.contiguous())
    need_x, need_weights, *asked = needs
    grad_x = _target(x) if need_x else None
    grad_weights = torch.empty(ids.shape, dtype=torch.float32) if need_weights else None
    call.tensors(out=grad_x, grad_weights=grad_weights)
    targets = p.filled(_parameter_target(t, layout) if n else None for t, n in zip(p, asked, strict=True))
    call.parameters("grad_", targets)
    call.run(library.moe_experts_backward)
    of_weights = None if grad_weights is None else grad_weights.to(weights.dtype)
    return [g for g in (grad_x, of_weights, *targets) if g is not None]


def _target(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _parameter_target(t: Tensor, layout: Layout) -> Tensor:
    """Where a parameter's gradient goes; rows that no expert of this block uses are zero."""
    g = _target(t)
    if layout.stacked and g.shape[0] > layout.num_experts:
        g[layout.num_experts :].zero_()
    return g


_found: dict[Any, tuple[ctypes.CDLL, Call]] = {}


def _kernel(direction: str, x: Tensor, layout: Layout, p: Operands[Tensor]) -> tuple[ctypes.CDLL, Call] | None:
    """The kernels and a call without its tokens, or None where they do not take these operands; the same operands are looked at once.

    `direction`: "backward", "forward" (keeps what backward needs) or "inference", which reads packed weights where there are.
    Raises ValueError when a parameter holds fewer experts than the call says.
    """
    key = (direction, x.dtype, x.shape[1], layout, *map(_described, p.groups()))
    found = _found.get(key)
    if found is not None and found[1].sources is not None and not found[1].sources.unchanged():
        found[1].sources.thaw()
        found = None
    if found is None:
        generic.check_sizes(layout, p)
        library = _library("backward" if direction == "backward" else "forward", x, layout, p)
        if library is None:
            return None
        if len(_found) > 4096:
            _found.clear()
        call = Call(layout, x.shape[1], p.down)
        call.parameters("", p)
        packed = _packed(call, x.dtype, p) if direction == "inference" else None
        found = _found[key] = packed or library, call
    return found


def _packed(call: Call, dtype: torch.dtype, p: Operands[Tensor]) -> ctypes.CDLL | None:
    """The kernels for packed weights, and `call` made one on them, where `moe_compile.prepare` has allowed for copies of these."""
    sources = frozen.sources(p.up, p.down)
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


def _library(direction: str, x: Tensor, layout: Layout, p: Operands[Tensor]) -> ctypes.CDLL | None:
    """The kernels, when these operands are what they take: one dtype, one stride pattern per list, rows or columns contiguous."""
    dtype = x.dtype
    if dtype not in build.STORAGE or _depth(layout.act_ops) > _MAX_DEPTH or x.shape[1] == 0:
        return None
    for tensors in p.groups():
        strides = tensors[0].stride() if tensors else ()
        if any(t.dtype != dtype or t.stride() != strides for t in tensors):
            return None
    for t in (p.up[0], p.down[0]):
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
