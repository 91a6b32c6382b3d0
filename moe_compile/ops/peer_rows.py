"""`rows_gathered` and `summed_rows`: what an all-gather of rows and a reduce-scatter of sums do, through peers' memory where the ranks of
a group have agreed upon that (`moe_compile.peers`) and it holds them; else by those collectives. The gradient of one is the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .schemas import library
from .summed import ALIGNED, Peers, memory_of, of_group, resolved

MEMORY = memory_of(1 << 27)  # bytes that a group takes on each rank
UNEVEN = (
    "the ranks of a group that divides experts have different numbers of tokens (pad the batches to one length), or one of them runs the "
    "model as written where others run compiled code (as Dynamo does behind torch._dynamo.config.recompile_limit)"
)

library.define("rows_gathered(Tensor x, Tensor ids, Tensor weights, str group) -> (Tensor rows, Tensor ids, Tensor weights, Tensor even)")
library.define("summed_rows(Tensor part, str group) -> Tensor")
library.define("summed_pair(Tensor part, Tensor weights, str group) -> (Tensor part, Tensor weights)")


def _ranks(group: str) -> int:
    return resolved(group).size()  # type: ignore[no-any-return]


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def hello(group: str, number: int) -> Tensor | None:
    """The numbers that the ranks say before they exchange anything else [ranks]; None where the group has no peers' memory."""
    peers = of_group(group)
    return None if peers is None else peers.say(number)


def rows_gathered(x: Tensor, ids: Tensor, weights: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, ...], ids and weights [T, k] of each of P ranks -> those of all by rank, [P T, ·], and whether the ranks have one T [].

    Where they have not the rest is undefined, or this raises."""
    peers = of_group(group)
    if peers is not None and _fits(peers, x, ids, weights):
        *whole, _, even = peers.gather(x.contiguous(), ids.contiguous(), weights.contiguous(), len(x))
        return *whole, even
    even = _even(group, len(x), x.device)
    size = _ranks(group)
    gather, wait = torch.ops._c10d_functional.all_gather_into_tensor, torch.ops._c10d_functional.wait_tensor
    rows, chosen, w = (gather(t.contiguous(), size, group) for t in (x, ids, weights))
    return wait(rows), wait(chosen), wait(w), even


def _fits(peers: Peers, x: Tensor, ids: Tensor, weights: Tensor) -> bool:
    of_ids = -(-_size(ids) * peers.size // ALIGNED) * ALIGNED  # weights begin on a vector's bound
    return peers.holds(_size(x) * peers.size, of_ids + _size(weights) * peers.size)


def _even(group: str, tokens: int, device: torch.device) -> Tensor:
    """Whether the ranks' numbers of tokens are one; stops every rank where they differ, before a collective has other sizes on each."""
    said = hello(group, tokens)
    if said is None:
        own = torch.full((1,), tokens, dtype=torch.int64, device=device)
        said = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_gather_into_tensor(own, _ranks(group), group))
    even = (said == tokens).all()
    torch._assert_async(even, UNEVEN)
    return even


def summed_rows(part: Tensor, group: str) -> Tensor:
    """part [P T, ...] on each of P ranks -> Σ over the ranks of this one's [T, ...]."""
    peers = of_group(group)
    if peers is not None and part.dtype.is_floating_point and peers.holds(_size(part)):
        return peers.scatter(part.contiguous())
    out = torch.ops._c10d_functional.reduce_scatter_tensor(part.contiguous(), "sum", _ranks(group), group)
    return torch.ops._c10d_functional.wait_tensor(out)  # type: ignore[no-any-return]


def summed_pair(part: Tensor, weights: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """`summed_rows` of both, in this order on all ranks: of two ops that do not read each other's results, the schedule of a rank's graph
    may choose either first."""
    return summed_rows(part, group), summed_rows(weights, group)


def _summed_shape(part: Tensor, group: str) -> Tensor:
    return part.new_empty(part.shape[0] // _ranks(group), *part.shape[1:])


def _gathered_shape(x: Tensor, ids: Tensor, weights: Tensor, group: str) -> tuple[Tensor, ...]:
    whole = (t.new_empty(t.shape[0] * _ranks(group), *t.shape[1:]) for t in (x, ids, weights))
    return *whole, torch.empty((), dtype=torch.bool, device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep_group(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1], output[3])


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.group = inputs[-1]


def _gathered_backward(ctx: Any, rows: Tensor, ids: Any, weights: Tensor, even: Any) -> tuple[Any, ...]:
    ops, (of_rows, _, of_weights, _) = torch.ops.moe_compile, ctx.needs_input_grad
    if of_rows and of_weights:
        x, w = ops.summed_pair(rows, weights, ctx.group)
        return x, None, w, None
    one = ops.summed_rows(rows if of_rows else weights, ctx.group)
    return one if of_rows else None, None, one if of_weights else None, None


def _summed_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    none = grad.new_empty(grad.shape[0], 0, dtype=torch.int64)
    return torch.ops.moe_compile.rows_gathered(grad, none, none, ctx.group)[0], None


def _pair_backward(ctx: Any, part: Tensor, weights: Tensor) -> tuple[Any, ...]:
    none = part.new_empty(part.shape[0], 0, dtype=torch.int64)
    rows, _, w, _ = torch.ops.moe_compile.rows_gathered(part, none, weights, ctx.group)
    return rows, w, None


library.impl("rows_gathered", rows_gathered, "CompositeExplicitAutograd")
library.impl("summed_rows", summed_rows, "CompositeExplicitAutograd")
library.impl("summed_pair", summed_pair, "CompositeExplicitAutograd")
torch.library.register_fake("moe_compile::rows_gathered", _gathered_shape, lib=library)
torch.library.register_fake("moe_compile::summed_rows", _summed_shape, lib=library)
torch.library.register_fake(
    "moe_compile::summed_pair", lambda part, weights, group: (_summed_shape(part, group), _summed_shape(weights, group)), lib=library
)
torch.library.register_autograd("moe_compile::rows_gathered", _gathered_backward, setup_context=_keep, lib=library)
torch.library.register_autograd("moe_compile::summed_rows", _summed_backward, setup_context=_keep_group, lib=library)
torch.library.register_autograd("moe_compile::summed_pair", _pair_backward, setup_context=_keep_group, lib=library)
