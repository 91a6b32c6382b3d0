"""The combine: out[t] = add[t] + Σ_j w[t, j] Σ_p Y[p][t·k + j], one pass, summed in fp32 in slot order (so it is deterministic).

The loop over slots is unrolled: with few tokens all that counts is that the rows of all slots are on their way together.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .host import capability, cdiv, power_of_2
from .launch.tape import launch

UNROLLED = tl.constexpr(16)  # slots of a token


@triton.jit
def _slot(
    total, j, t, columns, inside, y, rank, ids, weights, x, tokens, width: tl.constexpr, k: tl.constexpr,
    num_experts, num_identity, stride_x,
    SORTED: tl.constexpr, WEIGHTED: tl.constexpr, IDENTITY: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """total + what slot j of tokens t adds."""
    mask = inside[:, None] & (columns < width)[None, :]
    slot = t * k + j
    e = tl.load(ids + slot, mask=inside, other=-1)
    w = tl.load(weights + slot, mask=inside, other=0.0).to(tl.float32)
    known = (e >= 0) & (e < num_experts)
    at = slot
    if SORTED:
        at = tl.load(rank + slot, mask=inside & known, other=0).to(tl.int64)
    row = tl.load(y + at[:, None] * width + columns[None, :], mask=mask & known[:, None], other=0.0).to(tl.float32)
    for p in tl.static_range(1, SPLIT):
        part = y + (at + p * tokens.to(tl.int64) * k)[:, None] * width
        row += tl.load(part + columns[None, :], mask=mask & known[:, None], other=0.0).to(tl.float32)
    total += tl.where(known[:, None], row * w[:, None], 0.0) if WEIGHTED else row  # a slot of no expert may hold any weight
    if IDENTITY:
        same = (e >= num_experts) & (e < num_experts + num_identity)
        total += tl.load(x + t[:, None] * stride_x + columns[None, :], mask=mask & same[:, None], other=0.0).to(tl.float32) * w[:, None]
    return total


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    y, rank, ids, weights, x, add, out,
    tokens, width: tl.constexpr, k: tl.constexpr, num_experts, num_identity,
    stride_x, stride_add,
    SORTED: tl.constexpr, WEIGHTED: tl.constexpr, ADD: tl.constexpr, IDENTITY: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = t < tokens
    mask = inside[:, None] & (columns < width)[None, :]
    total = tl.zeros((BT, BN), tl.float32)
    if k <= UNROLLED:
        for j in tl.static_range(k):
            total = _slot(total, j, t, columns, inside, y, rank, ids, weights, x, tokens, width, k, num_experts, num_identity, stride_x,
                          SORTED, WEIGHTED, IDENTITY, SPLIT)  # fmt: skip
    else:
        for j in range(k):
            total = _slot(total, j, t, columns, inside, y, rank, ids, weights, x, tokens, width, k, num_experts, num_identity, stride_x,
                          SORTED, WEIGHTED, IDENTITY, SPLIT)  # fmt: skip
    if ADD:
        total += tl.load(add + t[:, None] * stride_add + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + t[:, None] * width + columns[None, :], total.to(out.dtype.element_ty), mask=mask)


def early_launch(x: Tensor) -> bool:
    """Programmatic dependent launch: the next kernel starts while this one drains, and waits for it before it reads anything."""
    return capability(x.device) >= (9, 0)


def combine(
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    x: Tensor,
    add: Tensor | None,
    out: Tensor,
    num_experts: int,
    num_identity: int,
    weighted: bool,
    early: bool = True,
    rank: Tensor | None = None,
) -> Tensor:
    """y [s·T·k, H], ids and weights [T, k], x [T, H] (read for identity experts), add [T, H] or None -> out [T, H].

    `weighted` False: the weights are in y already (identity experts still take theirs). Slots of no expert are not read.
    The s products of parts of the depth, T·k rows of y each, are added up. `early`: it may start while the kernel before it still runs.
    `rank` [T·k]: the row of y that holds a slot; None: y is by slot.
    """
    tokens, k = ids.shape
    width = out.shape[1]
    columns = min(1024, power_of_2(width))
    split = max(1, y.shape[0] // max(1, tokens * k))
    grid = (tokens, cdiv(width, columns))
    warps = max(1, columns // 256)
    pdl = {"launch_pdl": True} if early and early_launch(x) else {}
    launch(
        _combine, grid,
        y, rank, ids, weights, x, add, out, tokens, width, k, num_experts, num_identity,
        x.stride(0), add.stride(0) if add is not None else 0,
        SORTED=rank is not None, WEIGHTED=weighted, ADD=add is not None, IDENTITY=num_identity > 0,
        BT=1, BN=columns, SPLIT=split, PDL=bool(pdl), num_warps=warps, **pdl,
    )  # fmt: skip
    return out
