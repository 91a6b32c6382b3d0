"""Rows to the ranks whose experts they chose and back, by all-to-all of exactly those rows, in tensors whose shapes are known beforehand.

P ranks hold `count` experts each, in order, and T tokens each. A rank gets at most P T rows, so that a buffer of P T rows holds whatever
routing there is: nothing is ever dropped, and skew costs time, never tokens. Rows that came stand in front, rank by rank; the others are
zeros that chose no expert. How many travel is read by the host inside of the ops (one message of P + 1 numbers a rank): one graph of
Dynamo's, with gradients, that no CUDA graph can hold.

`rows_out` and `rows_back` are each other's transposes, but for the number of ranks that a token goes to: the gradient of one is the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .peer_rows import UNEVEN
from .schemas import library
from .summed import resolved

_WAY = "Tensor ids, Tensor table, int count, str group"
library.define(
    "rows_out(Tensor x, Tensor ids, Tensor weights, int count, str group) -> (Tensor rows, Tensor ids, Tensor weights, Tensor table)"
)
library.define(f"rows_out_bwd(Tensor grad, Tensor grad_weights, {_WAY}) -> (Tensor x, Tensor weights)")
library.define(f"rows_back(Tensor part, {_WAY}) -> Tensor")
library.define(f"rows_back_bwd(Tensor grad, {_WAY}) -> Tensor")


def _tokens(ids: Tensor, count: int, sent: list[int]) -> Tensor:
    """Which tokens go to each rank, rank by rank, each once; `sent`: how many. ids [T, k]; outside of the experts they choose nobody."""
    return torch.nonzero_static(_need(ids, count, len(sent)).T, size=sum(sent))[:, 1]


def _need(ids: Tensor, count: int, ranks: int) -> Tensor:
    owner = torch.where((ids >= 0) & (ids < count * ranks), ids // count, -1)
    return (owner[..., None] == torch.arange(ranks, device=ids.device)).any(-2)


def _send(rows: Tensor, sent: list[int], taken: list[int], group: Any, into: Tensor | None = None) -> Tensor:
    """All-to-all of rows in the ranks' order, into the first rows of `into` if it is given."""
    out = rows.new_empty(sum(taken), *rows.shape[1:]) if into is None else into[: sum(taken)]
    torch.distributed.all_to_all_single(out, rows.contiguous(), taken, sent, group=group)
    return out if into is None else into


def _splits(table: Tensor, group: Any) -> tuple[list[int], list[int]]:
    """(rows sent to each rank, rows taken from each); table [P, P] on the CPU: rows that rank i sends to rank j."""
    return table[group.rank()].tolist(), table[:, group.rank()].tolist()


def _said(ids: Tensor, count: int, group: Any) -> Tensor:
    """The table; every rank's number of tokens is compared on the way."""
    own = torch.cat((torch.full((1,), len(ids), device=ids.device), _need(ids, count, group.size()).sum(0)))
    told = own.new_empty(group.size() * len(own))
    gather = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)  # its name from torch 2.13 on
    gather(told, own, group=group)
    told = told.view(group.size(), -1).cpu()
    if (told[:, 0] != len(ids)).any():
        raise RuntimeError(UNEVEN)
    return told[:, 1:].contiguous()


def rows_out(x: Tensor, ids: Tensor, weights: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, k] and weights [T, k] of this rank -> rows [P T, H], ids [P T, k] among this rank's experts (`count`: none of
    them), weights [P T, k] (0 for those), and the table of how many rows travelled [P, P].

    Raises RuntimeError, on every rank, where the ranks' numbers of tokens differ, before any row travels.
    """
    own, first = resolved(group), resolved(group).rank() * count
    table = _said(ids, count, own)
    sent, taken = _splits(table, own)
    token, most = _tokens(ids, count, sent), own.size() * len(ids)
    chosen = _send(ids[token], sent, taken, own, ids.new_full((most, ids.shape[1]), -1))
    w = _send(weights[token], sent, taken, own, weights.new_zeros(most, weights.shape[1]))
    foreign = (chosen < first) | (chosen >= first + count)
    rows = _send(x[token], sent, taken, own, x.new_zeros(most, *x.shape[1:]))
    return rows, torch.where(foreign, count, chosen - first), w.masked_fill(foreign, 0.0), table


def rows_out_bwd(grad: Tensor, grad_weights: Tensor, ids: Tensor, table: Tensor, count: int, group: str) -> tuple[Tensor, Tensor]:
    """Gradients of `rows_out`'s rows and weights -> those of x and weights: sums over the ranks a token went to, in the ranks' order."""
    return rows_back(grad, ids, table, count, group), rows_back(grad_weights, ids, table, count, group)


def rows_back(part: Tensor, ids: Tensor, table: Tensor, count: int, group: str) -> Tensor:
    """Results [P T, H] of `rows_out`'s rows -> [T, H]: a token's are summed in float32 or wider, in the ranks' order."""
    own = resolved(group)
    sent, taken = _splits(table, own)
    back = _send(part[: sum(taken)], taken, sent, own)
    out = torch.zeros(len(ids), *part.shape[1:], dtype=torch.promote_types(part.dtype, torch.float32), device=part.device)
    for at, results in zip(_tokens(ids, count, sent).split(sent), back.split(sent), strict=True):  # no token twice in one of them
        out.index_add_(0, at, results.to(out.dtype))
    return out.to(part.dtype)


def rows_back_bwd(grad: Tensor, ids: Tensor, table: Tensor, count: int, group: str) -> Tensor:
    """The gradient [T, H] of sums to each of the results [P T, H] that were summed."""
    own = resolved(group)
    sent, taken = _splits(table, own)
    into = grad.new_zeros(own.size() * len(ids), *grad.shape[1:])
    return _send(grad[_tokens(ids, count, sent)], sent, taken, own, into)


def _shapes_out(x: Tensor, ids: Tensor, weights: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ranks = resolved(group).size()
    table = torch.empty(ranks, ranks, dtype=torch.int64, device="cpu")
    return *(t.new_empty(ranks * t.shape[0], *t.shape[1:]) for t in (x, ids, weights)), table  # type: ignore[return-value]


def _keep_out(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1], output[1], output[3])
    ctx.how = inputs[3:]
    ctx.mark_non_differentiable(output[1], output[3])


def _backward_out(ctx: Any, grad: Tensor, _: Any, grad_weights: Tensor, __: Any) -> tuple[Any, ...]:
    ids, chosen, table = ctx.saved_tensors
    own = grad_weights.masked_fill(chosen >= ctx.how[0], 0.0)
    gx, gw = torch.ops.moe_compile.rows_out_bwd(grad.contiguous(), own, ids, table, *ctx.how)
    return gx, None, gw, None, None


def _keep_back(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.how = inputs[3:]


def _backward_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, table = ctx.saved_tensors
    return torch.ops.moe_compile.rows_back_bwd(grad.contiguous(), ids, table, *ctx.how), None, None, None, None


def _per_token(t: Tensor, ids: Tensor) -> Tensor:
    return t.new_empty(ids.shape[0], *t.shape[1:])


for _name, _run, _fake in (
    ("rows_out", rows_out, _shapes_out),
    ("rows_out_bwd", rows_out_bwd, lambda grad, gw, ids, table, count, group: (_per_token(grad, ids), _per_token(gw, ids))),
    ("rows_back", rows_back, lambda part, ids, table, count, group: _per_token(part, ids)),
    ("rows_back_bwd", rows_back_bwd, lambda g, ids, table, count, group: g.new_empty(resolved(group).size() * len(ids), *g.shape[1:])),
):
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_compile::{_name}", _fake, lib=library)
torch.library.register_autograd("moe_compile::rows_out", _backward_out, setup_context=_keep_out, lib=library)
torch.library.register_autograd("moe_compile::rows_back", _backward_back, setup_context=_keep_back, lib=library)
