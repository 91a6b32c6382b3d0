"""What a backward pass sums beside its products: the gradients of biases and of routing weights."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backward_row_kernels as kernels
from .gradients import Pass
from .host import cdiv, power_of_2
from .launch.tape import empty, launch


def bias_grads(p: Pass, d_pre: Tensor | None) -> None:
    if d_pre is not None:
        for part, columns in enumerate(d_pre.chunk(p.layout.halves(), -1)):
            if p.out.wants("up_bias", part):
                _row_sum(p, "up_bias", part, columns, gather=False)
    if p.out.wants("down_bias"):
        _row_sum(p, "down_bias", 0, p.grad, gather=True)


def _row_sum(p: Pass, name: str, part: int, source: Tensor, gather: bool) -> None:
    targets = p.out.empty(name, part)
    n = source.shape[1]
    whole = targets[0] if p.layout.stacked else empty(source, p.layout.num_experts, n)
    block = min(128, power_of_2(n))
    launch(
        kernels.row_sum, (p.layout.num_experts, cdiv(n, block)),
        source, p.call.weights, whole, p.rows.order, p.rows.offsets, p.starts, n, source.stride(0),
        GATHER=gather, PAD=0 if gather else p.pad, WEIGHTED=gather and not p.layout.weight_on_input, SLOTS=p.k,
        BK=32, BN=block, num_warps=4,
    )  # fmt: skip
    if not p.layout.stacked:
        torch._foreach_copy_(targets, list(whole.unbind(0)))


def grad_weights(p: Pass, sums: Tensor | None) -> None:
    c, layout = p.call, p.layout
    out = empty(c.weights, *c.weights.shape)
    bias = c.down_bias if not layout.weight_on_input else None
    blocks = sums.shape[1] if sums is not None else 0
    launch(
        kernels.slot_weight, (cdiv(c.slots, 8),),
        sums, c.ids, p.grad, c.x, bias.parts[0] if bias is not None else None, out,
        c.slots, blocks, p.grad.shape[1], layout.num_experts, layout.num_identity, p.grad.stride(0), c.x.stride(0),
        *((bias.stride_e, bias.stride_n) if bias is not None else (0, 0)),
        SLOTS=p.k, SUMS=sums is not None, BIAS=bias is not None, IDENTITY=layout.num_identity > 0,
        BS=8, BB=power_of_2(max(blocks, 1)), BN=min(512, power_of_2(p.grad.shape[1])), num_warps=4,
    )  # fmt: skip
    p.out.of_weights = out
