"""How rows reach experts that are divided over the ranks of a group, and come back, by functional collectives (`ir.Way`).

`shared` and `gathered`: static shapes and nothing read back to the host, so that it is one graph, which CUDA graphs can replay. `sent`:
static shapes, one graph of Dynamo's. `by_rows` takes batches of any length. Gradients by collectives as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as fc
from torch import Tensor

from .ir import Way
from .ops import peer_rows as _peer_rows  # noqa: F401 (defines the ops)
from .ops import rows as _rows  # noqa: F401 (likewise)
from .ops import summed as _summed  # noqa: F401 (likewise)
from .ops.peer_rows import UNEVEN

# under the names of torch 2.13, or those that it has grown out of; either way with gradients
_gather = getattr(fc, "all_gather_single", fc.all_gather_tensor)
_gather_rows = getattr(fc, "all_gather_single_autograd", fc.all_gather_tensor_autograd)
_scatter_sums = getattr(fc, "reduce_scatter_single_autograd", fc.reduce_scatter_tensor_autograd)
_scatter = getattr(fc, "reduce_scatter_single", fc.reduce_scatter_tensor)
Local = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows, ids among this rank's experts (their number: none of them), weights -> result


class _SumOfGradients(torch.autograd.Function):
    """x, which all ranks of a group hold alike; each has a part of its gradient, and all of them get the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return fc.wait_tensor(fc.all_reduce(grad.contiguous(), "sum", ctx.group)), None


class _Sum(torch.autograd.Function):
    """Σ over the ranks of a group of x; the gradient of the sum, which all ranks hold alike, is that of each addend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return fc.wait_tensor(fc.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Arrived(torch.autograd.Function):
    """`arrived`, which a collective has made of the ranks' `own` without gradients; the gradient of a rank's own part travels back:
    summed by a reduce-scatter, or by all-to-all of `splits` rows (sent, taken).
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, arrived: Tensor, group: Any, splits: Any) -> Tensor:
        ctx.group, ctx.splits = group, splits
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        grad = grad.contiguous()
        if ctx.splits is None:
            back = fc.wait_tensor(_scatter(grad, "sum", 0, ctx.group))
        else:
            back = fc.wait_tensor(fc.all_to_all_single(grad, *ctx.splits, ctx.group))
        return back, None, None, None


def _message(ids: Tensor, weights: Tensor) -> Tensor:
    """ids and the bits of the weights [T, k] in one message [T, 2 k]; weights narrower than 32 bits are held as they are."""
    ints, wide = _wide(weights)
    return torch.cat((ids.clamp(-1, torch.iinfo(torch.int32).max).to(ints), weights.detach().to(wide).view(ints)), -1)


def _read(message: Tensor, ids: Tensor, weights: Tensor, group: Any, splits: Any = None) -> tuple[Tensor, Tensor]:
    """What messages hold that came from ranks whose own ids and weights are of these dtypes."""
    found, bits = message.split((ids.shape[-1], weights.shape[-1]), -1)
    w = bits.contiguous().view(_wide(weights)[1]).to(weights.dtype)
    return found.to(ids.dtype), _Arrived.apply(weights, w, group, splits)  # type: ignore[no-any-return]


def _wide(weights: Tensor) -> tuple[torch.dtype, torch.dtype]:
    return (torch.int64, torch.float64) if weights.dtype == torch.float64 else (torch.int32, torch.float32)


def shared(x: Tensor, ids: Tensor, weights: Tensor, local: Local, first: int, count: int, group: Any, peers: bool = False) -> Tensor:
    """Σ over the ranks of `local`, for x [T, H], ids and weights [T, k] that all hold alike; a rank has experts from `first` on.

    peers: what `peers.join` has said of the group, to every rank."""
    x, weights = _SumOfGradients.apply(x, group), _SumOfGradients.apply(weights, group)
    part = _own(x, ids, weights, local, first, count)
    if peers:
        return torch.ops.moe_compile.summed(part, group.group_name)  # type: ignore[no-any-return]
    return _Sum.apply(part, group)  # type: ignore[no-any-return]


def gathered(
    x: Tensor, ids: Tensor, weights: Tensor, local: Local, first: int, count: int, group: Any, uneven: str = UNEVEN, peers: bool = False
) -> Tensor:
    """out[r] = Σ_s local_s(x[r]) for each rank's own x [T, H], ids and weights [T, k], with one T. Raises RuntimeError (`uneven`) on every
    rank where T differs, before any row is worked on. peers: what `peers.join` has said of the group, to every rank."""
    return leaving(_own(*arriving(x, ids, weights, group, uneven, peers), local, first, count), group, peers)


def arriving(
    x: Tensor, ids: Tensor, weights: Tensor, group: Any, uneven: str = UNEVEN, peers: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], ids and weights [T, k] of each of P ranks, with one T -> those of all, [P T, ·], by rank. Raises as `gathered`.

    This and `leaving` are all that travels in a gather.
    """
    if peers:
        *arrived, even = torch.ops.moe_compile.rows_gathered(x, ids, weights, group.group_name)
        torch._assert_async(even, uneven)
        return tuple(arrived)  # type: ignore[return-value]
    sizes = _gather(ids.new_full((1,), ids.shape[0], dtype=torch.int64), 0, group)
    torch._assert_async((sizes == ids.shape[0]).all(), uneven)
    rows = _gather_rows(x.contiguous(), 0, group)
    return rows, *_read(_gather(_message(ids, weights), 0, group), ids, weights, group)


def leaving(part: Tensor, group: Any, peers: bool = False) -> Tensor:
    """Each rank's sums [P T, H] for the tokens of all -> the sums over the ranks [T, H] for this one's own."""
    if peers:
        return torch.ops.moe_compile.summed_rows(part, group.group_name)  # type: ignore[no-any-return]
    return _scatter_sums(part.contiguous(), "sum", 0, group)  # type: ignore[no-any-return]


def sent(x: Tensor, ids: Tensor, weights: Tensor, local: Local, count: int, group: Any) -> Tensor:
    """out[r] = Σ_s local_s(x[r]), where rank s has experts s · count to (s + 1) · count: a row travels once to each rank of an expert it
    chose, and `local` gets P T of them, whatever routing there is (`ops.rows`). One T on all ranks: raises RuntimeError on every rank else.

    One graph with static shapes; how many rows travel is read by the host inside of an op, so that no CUDA graph can hold it.
    """
    rows, chosen, w, table = torch.ops.moe_compile.rows_out(x, ids, weights, count, group.group_name)
    return torch.ops.moe_compile.rows_back(local(rows, chosen, w), ids, table, count, group.group_name)  # type: ignore[no-any-return]


def by_rows(x: Tensor, ids: Tensor, weights: Tensor, local: Local, count: int, group: Any) -> Tensor:
    """out[r] = Σ_s local_s(x[r]), where rank s has experts s · count to (s + 1) · count: a row travels once to each rank of an expert it
    chose. T may differ among the ranks and be 0. How many rows travel is read back to the host: no CUDA graphs, several Dynamo graphs.

    Results are summed in float32 or wider, in the ranks' order, so that equal inputs give the same bits.
    """
    owner = torch.where((ids >= 0) & (ids < count * group.size()), ids // count, -1)
    need = (owner[..., None] == torch.arange(group.size(), device=ids.device)).any(-2)  # [T, ranks]
    token = need.T.nonzero()[:, 1]  # by rank
    counts = need.sum(0)
    sent, taken = torch.stack((counts, fc.wait_tensor(fc.all_to_all_single(counts, None, None, group)))).tolist()
    arrived = fc.wait_tensor(fc.all_to_all_single(_message(ids[token], weights[token]), taken, sent, group))
    chosen, w = _read(arrived, ids, weights[token], group, (sent, taken))
    rows = fc.all_to_all_single_autograd(x[token], taken, sent, group)
    part = _own(rows, chosen, w, local, group.rank() * count, count)
    back = fc.all_to_all_single_autograd(part.contiguous(), sent, taken, group)
    out = torch.zeros(x.shape[0], back.shape[-1], dtype=torch.promote_types(back.dtype, torch.float32), device=x.device)
    for at, results in zip(token.split(sent), back.split(sent), strict=True):  # no token twice in one of them
        out = out.index_add(0, at, results.to(out.dtype))
    return out.to(x.dtype)


NVLINK, NODE, READ = 366e9, 8, 40e-6  # bytes/s and ranks of a node; seconds to exchange counts and read them (benchmarks/exchange_model.py)
SKEW = 1.35  # rows of the slowest rank over the mean, at 8 ranks and a popularity of experts ~ 1/rank


def cheapest(ranks: int, experts: int, k: int, tokens: int, row: int) -> Way:
    """The way of least modelled time for ranks of one node with batches of their own; `tokens` a rank (the same number on all ranks: they
    must choose alike), `row`: bytes of a token's row. Not measured. Raises ValueError for more ranks than a node has.

    gather: (P - 1) rows a token. by_rows: p (P - 1) and the counts, p = 1 - C(E - E/P, k) / C(E, k), at a skew of 1.35.
    """
    if ranks > NODE:
        raise ValueError(f"ranks: {ranks}, while the model is of one node of {NODE}; see docs/distributed.md for several nodes")
    p = 1 - math.comb(experts - experts // ranks, k) / math.comb(experts, k)
    gather = tokens * (ranks - 1) * row / NVLINK
    return Way.ROWS if p * SKEW * gather + READ < gather else Way.GATHER


def _own(rows: Tensor, ids: Tensor, weights: Tensor, local: Local, first: int, count: int) -> Tensor:
    """This rank's experts on rows of any rank."""
    return local(rows, *among_own(ids, weights, first, count))


def among_own(ids: Tensor, weights: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """ids among the `count` experts from `first` on; others are `count`, with weight 0."""
    foreign = (ids < first) | (ids >= first + count)
    return torch.where(foreign, count, ids - first), weights.masked_fill(foreign, 0.0)
