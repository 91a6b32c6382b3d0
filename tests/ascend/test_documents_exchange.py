"""Dispatch and combine: two emulations against each other, and against the sum that is meant, over worlds of 1, 2 and 4 ranks.

What assist_info_for_combine holds is each emulation's own affair, and so are numbers that documents leave open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import documents_exchange
import pytest
import torch
from torch import Tensor

from moe_compile.lowering.ascend import emulate
from moe_compile.lowering.ascend.emulate_exchange import Fabric

E, K, H, T = 8, 3, 4, 5
DISPATCH, COMBINE = (emulate.KERNELS[f"npu_moe_distribute_{name}_v2"] for name in ("dispatch", "combine"))


def in_threads(op: Callable[..., Any], calls: list[dict[str, Any]]) -> list[Any]:
    """The result of each rank, of kernels that meet each other."""
    fabric, out, failed = Fabric("documents", len(calls)), [None] * len(calls), []

    def one(rank: int) -> None:
        try:
            out[rank] = op(**calls[rank])
        except Exception as e:
            failed.append(e)
            fabric.barrier.abort()

    threads = [threading.Thread(target=one, args=(r,)) for r in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]
    return out


def ids(tokens: int, experts: int = E) -> Tensor:
    return torch.stack([torch.randperm(experts)[:K] for _ in range(tokens)]).int() if tokens else torch.zeros(0, K, dtype=torch.int32)


def group(world: int, **more: Any) -> list[dict[str, Any]]:
    """A call of dispatch for each rank; `more` is the same for all, or a function of the rank."""
    calls = [dict(x=torch.randn(T, H), expert_ids=ids(T), group_ep="documents", ep_world_size=world, ep_rank_id=r, moe_expert_num=E)
             for r in range(world)]  # fmt: skip
    return [c | {name: v(c["ep_rank_id"]) if callable(v) else v for name, v in more.items()} for c in calls]


def sized(world: int) -> list[dict[str, Any]]:
    """Ranks with 1, 2 .. tokens."""
    calls = group(world, global_bs=world * world)
    return [c | dict(x=c["x"][: r + 1], expert_ids=c["expert_ids"][: r + 1]) for r, c in enumerate(calls)]


CASES: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "all": group,
    "bf16": lambda w: group(w, x=lambda r: torch.randn(T, H).bfloat16()),
    "of two experts": lambda w: group(w, expert_ids=lambda r: ids(T, K)),
    "masked": lambda w: group(w, x_active_mask=lambda r: torch.arange(T) < (2, 5, 1, 3)[r]),
    "a rank without tokens": lambda w: group(w, x_active_mask=lambda r: torch.full((T,), r != w - 1)),
    "no one has tokens": lambda w: group(w, x_active_mask=torch.zeros(T, dtype=torch.bool)),
    "all on one rank": lambda w: group(w, expert_ids=lambda r: torch.tensor([[0, 1, 0]] * T).int()[:, :2] + (E - 2)),
    "one token": lambda w: group(w, x=lambda r: torch.randn(1, H), expert_ids=lambda r: ids(1)),
    "of several sizes": sized,
    "with weights": lambda w: group(w, expert_scales=lambda r: torch.rand(T, K)),
    "copies": lambda w: group(w, expert_ids=lambda r: ids(T, E + 2), copy_expert_num=2),
    "zeros and copies": lambda w: group(w, expert_ids=lambda r: ids(T, E + 3), zero_expert_num=2, copy_expert_num=1),
    "copies and a mask": lambda w: group(
        w, expert_ids=lambda r: ids(T, E + 2), copy_expert_num=2, x_active_mask=lambda r: torch.arange(T) <= r),
}  # fmt: skip


def computed(call: dict[str, Any], result: tuple[Tensor, ...]) -> Tensor:
    """Expert e makes (e + 1) x of x; rows behind the counts stay what they are."""
    local, rows = call["moe_expert_num"] // call["ep_world_size"], result[0].clone()
    owner = torch.arange(local).repeat_interleave(result[3]) + local * call["ep_rank_id"]
    rows[: len(owner)] *= (owner[:, None] + 1).to(rows.dtype)
    return rows


def returned(call: dict[str, Any], result: tuple[Tensor, ...], w: Tensor) -> dict[str, Any]:
    """The call of combine that belongs to one of dispatch."""
    same = {k: v for k, v in call.items() if k not in ("x", "quant_mode", "expert_scales")}
    return same | dict(expand_x=computed(call, result), assist_info_for_combine=result[2], ep_send_counts=result[4], expert_scales=w,
                       ori_x=call["x"], expand_scales=result[6])  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_both_say_the_same(name: str, world: int) -> None:
    calls = CASES[name](world)
    first, second = in_threads(DISPATCH, calls), documents_exchange.dispatch_v2(calls)
    for a, b in zip(first, second, strict=True):
        done = int(b[3].sum())
        assert [t.dtype for t in a] == [t.dtype for t in b] and [t.shape for t in a[:6]] == [t.shape for t in b[:6]]
        assert torch.equal(a[0][:done], b[0][:done]) and torch.equal(a[3], b[3]) and torch.equal(a[4], b[4])
        assert bool(a[0][done:].isnan().all()) and bool(b[0][done:].isnan().all())
        if len(b[6]):
            torch.testing.assert_close(a[6], b[6], rtol=0, atol=0, equal_nan=True)
    weights = [torch.rand(c["expert_ids"].shape) for c in calls]
    ours = in_threads(COMBINE, [returned(*each) for each in zip(calls, first, weights, strict=True)])
    theirs = documents_exchange.combine_v2([returned(*each) for each in zip(calls, second, weights, strict=True)])
    for call, w, a, b in zip(calls, weights, ours, theirs, strict=True):
        near = dict(rtol=0.02, atol=0.02) if a.dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, equal_nan=True, **near)
        chosen, zeros = call["expert_ids"], call.get("zero_expert_num", 0)
        factor = torch.where(chosen < E, chosen + 1, chosen >= E + zeros)
        want = (w * factor).sum(1, keepdim=True) * call["x"].float()
        on = call.get("x_active_mask", torch.ones(len(w), dtype=torch.bool))
        torch.testing.assert_close(b[on].float(), want[on], **near)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_in_bytes(world: int) -> None:
    """Mode 2: bytes at most one step apart, scales as float32 has them."""
    calls = group(world, quant_mode=2, x=lambda r: torch.randn(T, H).bfloat16())
    for a, b in zip(in_threads(DISPATCH, calls), documents_exchange.dispatch_v2(calls), strict=True):
        done = int(b[3].sum())
        assert a[0].dtype == b[0].dtype == torch.int8 and torch.equal(a[3], b[3])
        assert int((a[0][:done].int() - b[0][:done].int()).abs().max()) <= 1
        torch.testing.assert_close(a[1], b[1], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("call", [dict(expert_ids=torch.ones(T, K).int()), dict(x_active_mask=torch.arange(T) > 1)])
def test_both_refuse(call: dict[str, Any]) -> None:
    """An expert twice for a token, and an idle token before others."""
    calls = group(2, **call)
    for op in (documents_exchange.dispatch_v2, lambda c: in_threads(DISPATCH, c)):
        with pytest.raises(AssertionError):
            op(calls)
