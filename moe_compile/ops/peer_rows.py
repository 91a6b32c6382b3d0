"""`rows_gathered` and `summed_rows`: what an all-gather of rows and a reduce-scatter of sums do, through peers' memory where the ranks of
a group have agreed upon that (`moe_compile.peers`) and it holds them; else by those collectives. The gradient of one is the other.

A rank's memory holds the message of its choices in front, the first row of which is the number of its tokens, and rows behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .schemas import library
from .summed import ALIGNED, Peers, of_group, resolved

MESSAGE = 1 << 22  # bytes for ids and weights
MEMORY = MESSAGE + (1 << 27)  # bytes that a group takes on each rank
UNEVEN = (
    "the ranks of a group that divides experts have different numbers of tokens (pad the batches to one length), or one of them runs the "
    "model as written where others run compiled code (as Dynamo does behind torch._dynamo.config.recompile_limit)"
)

library.define("rows_gathered(Tensor x, Tensor message, str group) -> (Tensor rows, Tensor message)")
library.define("summed_rows(Tensor part, str group) -> Tensor")


def _ranks(group: str) -> int:
    return resolved(group).size()  # type: ignore[no-any-return]


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _holds(peers: Peers, rows: int) -> bool:
    """Whether memory takes so many bytes of rows of all ranks; vectors are of whole rows."""
    return 0 < rows <= len(peers.memory) - MESSAGE and rows % (ALIGNED * peers.size) == 0


def hello(group: str, number: int, device: torch.device) -> Tensor | None:
    """The numbers that the ranks say before they exchange anything else [ranks]; None where the group has no peers' memory."""
    peers = of_group(group)
    if peers is None:
        return None
    (each,) = peers.gather((0, torch.full((2,), number, dtype=torch.int64, device=device)))
    return each


def rows_gathered(x: Tensor, message: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """x [T, ...] and message [T + 1, m] of each of P ranks -> those of all by rank, [P T, ...] and [P (T + 1), m].

    message: its first row is T; where ranks' T differ the first rows tell, and the rest is undefined."""
    peers = of_group(group)
    if peers is not None and _holds(peers, _size(x) * peers.size) and _size(message) <= MESSAGE:
        rows, told = peers.gather((MESSAGE, x.contiguous()), (0, message.contiguous()))
        return rows, told
    _alike(group, len(x), x.device)
    size = _ranks(group)
    gather, wait = torch.ops._c10d_functional.all_gather_into_tensor, torch.ops._c10d_functional.wait_tensor
    rows, told = gather(x.contiguous(), size, group), gather(message.contiguous(), size, group)
    return wait(rows), wait(told)


def _alike(group: str, tokens: int, device: torch.device) -> None:
    """Stops every rank where their numbers of tokens differ, before a collective does that has other sizes on each."""
    said = hello(group, tokens, device)
    if said is None:
        own = torch.full((1,), tokens, dtype=torch.int64, device=device)
        said = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_gather_into_tensor(own, _ranks(group), group))
    torch._assert_async((said == tokens).all(), UNEVEN)


def summed_rows(part: Tensor, group: str) -> Tensor:
    """part [P T, ...] on each of P ranks -> Σ over the ranks of this one's [T, ...]."""
    peers = of_group(group)
    if peers is not None and _holds(peers, _size(part)):
        return peers.scatter(MESSAGE, part.contiguous())
    out = torch.ops._c10d_functional.reduce_scatter_tensor(part.contiguous(), "sum", _ranks(group), group)
    return torch.ops._c10d_functional.wait_tensor(out)  # type: ignore[no-any-return]


def _gathered_shape(x: Tensor, message: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return tuple(t.new_empty(t.shape[0] * _ranks(group), *t.shape[1:]) for t in (x, message))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.group = inputs[-1]
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])


def _gathered_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return torch.ops.moe_compile.summed_rows(grad, ctx.group), None, None


def _summed_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    head = grad.new_full((1, 4), grad.shape[0], dtype=torch.int32)
    return torch.ops.moe_compile.rows_gathered(grad, head, ctx.group)[0], None


library.impl("rows_gathered", rows_gathered, "CompositeExplicitAutograd")
library.impl("summed_rows", summed_rows, "CompositeExplicitAutograd")
torch.library.register_fake("moe_compile::rows_gathered", _gathered_shape, lib=library)
torch.library.register_fake(
    "moe_compile::summed_rows", lambda p, group: p.new_empty(p.shape[0] // _ranks(group), *p.shape[1:]), lib=library
)
torch.library.register_autograd("moe_compile::rows_gathered", _gathered_backward, setup_context=_keep, lib=library)
torch.library.register_autograd("moe_compile::summed_rows", _summed_backward, setup_context=_keep, lib=library)
