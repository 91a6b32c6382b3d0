"""Logical experts that become physical ones, by a table of replicas (`ir.placement`): npu_moe_update_expert where a law takes it.

The op reads a row of its table [E, F] as `physical` does: a count n >= 1, then places; mode 1: place 1 + t mod n, mode 0: place
1 + rank // ceil(world / n), n = 1: place 1, which both give. Known from CANN's page of aclnnMoeUpdateExpert and the op's public source
(limits: its tiling); the page's formula of mode 1 leaves out the 1 that the source adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir import placement
from . import device
from .calls import call, cast

MAX_TOKENS, MAX_K, MAX_EXPERTS, MAX_WORLD = 512, 16, 1024, 768


@dataclass(frozen=True)
class Case:
    """Ids [tokens, k] of `experts` logical experts, tokens None where not fixed, a table with `width` columns; world 0: tokens in turn."""

    device: str
    tokens: int | None
    k: int
    experts: int
    width: int
    world: int = 0
    rank: int = 0


Check = Callable[[Case], str | None]


def _device(c: Case) -> str | None:
    """CANN's page names the A3; without an NPU it is told what one would run."""
    return None if c.device in ("A3", "") else f"npu_moe_update_expert is for an A3, this is {c.device}"


def _tokens(c: Case) -> str | None:
    if c.tokens is None:
        return "the number of tokens is not fixed"
    return None if 0 < c.tokens <= MAX_TOKENS else f"{c.tokens} tokens, npu_moe_update_expert takes {MAX_TOKENS}"


def _choices(c: Case) -> str | None:
    most = min(MAX_K, c.experts)
    return None if 0 < c.k <= most else f"{c.k} experts a token, npu_moe_update_expert takes {most}"


def _table(c: Case) -> str | None:
    if not 0 < c.experts < MAX_EXPERTS:
        return f"{c.experts} logical experts, npu_moe_update_expert takes fewer than {MAX_EXPERTS}"
    most = c.world or MAX_WORLD
    return None if 2 <= c.width <= most + 1 else f"a table of {c.width} columns, npu_moe_update_expert takes 2 to {most + 1}"


def _ranks(c: Case) -> str | None:
    if not c.world:
        return None
    inside = 2 <= c.world <= MAX_WORLD and 0 <= c.rank < c.world
    return None if inside else f"rank {c.rank} of {c.world}, npu_moe_update_expert takes one of 2 to {MAX_WORLD}"


CHECKS: tuple[Check, ...] = (_device, _tokens, _choices, _table, _ranks)


def refuses(c: Case) -> str | None:
    """Why the op does not take these ids, None where it does."""
    return next((why for check in CHECKS if (why := check(c)) is not None), None)


def case(ids: Tensor, table: Tensor, world: int, rank: int) -> Case:
    """Of ids [T, k] and a table [E, F]."""
    npu = getattr(torch, "npu", None)
    unknown = "a device that is not known" if npu is not None and npu.is_available() else ""
    tokens, k = ids.shape
    fixed = tokens if type(tokens) is int else None
    return Case(device.family() or unknown, fixed, int(k), int(table.shape[0]), int(table.shape[1]), world, rank)


def emitted(ids: Tensor, table: Tensor, world: int, rank: int) -> Tensor:
    """`placement.physical`, by the op where the law takes it, in plain torch elsewhere."""
    if refuses(case(ids, table, world, rank)) is not None:
        return placement.physical(ids, table, world, rank)
    return physical(ids, cast(table, torch.int32), world, rank)


def physical(ids: Tensor, table: Tensor, world: int = 0, rank: int = 0) -> Tensor:
    """ids [T, k] of logical experts -> of physical ones int32 [T, k]; table int32 [E, F]."""
    how = dict(local_rank_id=rank, world_size=world, balance_mode=0) if world else dict(balance_mode=1)
    return call("npu_moe_update_expert", cast(ids, torch.int32), table, **how)[0]  # type: ignore[no-any-return]
