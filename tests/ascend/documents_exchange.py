"""npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2 from their documents, for all ranks of a group at once.

Each call is one rank's arguments by the schema's names, calls stand in the order of ranks, and so do results. No rank is one of shared
experts, and there is no exchange between tensor parallel ranks: the pages of CANN no longer have it. What `documents` says of open
values and of precision holds here.
"""

from __future__ import annotations

from operator import mul
from typing import Any, NamedTuple

import torch
from documents_products import NAN, Row, in_bytes, made
from torch import Tensor


class Slot(NamedTuple):
    """A token's copy for one of its experts."""

    expert: int
    rank: int
    token: int
    slot: int


def active(call: dict[str, Any]) -> list[list[bool]]:
    """Which slots take part: x_active_mask of tokens (all true ones first) or of slots, all without one: aclnnMoeDistributeDispatchV4."""
    (tokens, k), mask = call["expert_ids"].shape, call.get("x_active_mask")
    if mask is not None and mask.dim() == 2:
        return [list(row) for row in mask.tolist()]
    listed = [True] * tokens if mask is None else mask.tolist()
    assert listed == sorted(listed, reverse=True), "true has to stand before false"
    return [[on] * k for on in listed]


def special(call: dict[str, Any]) -> list[int]:
    """Ends of the ids of routed, zero, copy and constant experts, which follow each other: aclnnMoeDistributeDispatchV4."""
    ends = [call["moe_expert_num"]]
    for name in ("zero_expert_num", "copy_expert_num", "const_expert_num"):
        ends.append(ends[-1] + call.get(name, 0))
    return ends


def received(calls: list[dict[str, Any]]) -> list[list[Slot]]:
    """What each rank gets, in its order: expert e lies on rank e // (experts / ranks).

    Rows of one expert are together, as its count in expert_token_nums requires; within an expert ranks follow each other, as sums so
    far of each expert's rows from each rank require; that a rank's tokens keep their order is assumed.
    """
    first = calls[0]
    world, experts = first["ep_world_size"], first["moe_expert_num"]
    assert [c["ep_rank_id"] for c in calls] == list(range(world)) and experts % world == 0
    assert all(c.get("shared_expert_rank_num", 0) == 0 and c.get("tp_world_size", 0) < 2 for c in calls)
    sizes, everyone = {len(c["expert_ids"]) for c in calls}, first.get("global_bs", 0)
    assert len(sizes) == 1 or everyone % world == 0 and everyone >= world * max(sizes), "sizes that differ need global_bs"
    found: list[Slot] = []
    for rank, call in enumerate(calls):
        last = special(call)[-1]
        for token, (ids, on) in enumerate(zip(call["expert_ids"].tolist(), active(call), strict=True)):
            taken = [e for e, a in zip(ids, on, strict=True) if a]
            # The pages say this of all ids; that those of idle slots are free is assumed.
            assert len(set(taken)) == len(taken) and all(0 <= e < last for e in taken), "ids of a token differ and are experts'"
            found += [Slot(e, rank, token, j) for j, e in enumerate(ids) if on[j] and e < experts]
    found.sort()
    return [[s for s in found if s.expert // (experts // world) == r] for r in range(world)]


def counted(slots: list[Slot], call: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Rows of each local expert, and of each local expert from each rank, the latter as sums so far: npu_moe_distribute_dispatch_v2."""
    world, rank = call["ep_world_size"], call["ep_rank_id"]
    local = range(call["moe_expert_num"] // world * rank, call["moe_expert_num"] // world * (rank + 1))
    sums: list[int] = []
    for e in local:
        for r in range(world):
            sums.append((sums[-1] if sums else 0) + sum(s.expert == e and s.rank == r for s in slots))
    return [sum(s.expert == e for s in slots) for e in local], sums


def dispatch_v2(calls: list[dict[str, Any]]) -> list[tuple[Tensor, ...]]:
    """expand_x = AllToAllV(x), of which mode 2 makes bytes (x scales_e) 127 / max|x scales_e|: npu_moe_distribute_dispatch_v2.

    Of expand_x the first sum(expert_token_nums) rows are given, the others open; how a number becomes a byte is assumed to be the
    nearest. assist_info_for_combine "may differ by product, algorithm and version", so it is open altogether.
    """
    out = []
    for call, slots in zip(calls, received(calls), strict=True):
        (tokens, k), width, world = call["expert_ids"].shape, call["x"].shape[1], call["ep_world_size"]
        mode, everyone = call.get("quant_mode", 0), call.get("global_bs", 0) or tokens * world
        assert mode in (0, 2), "others are for other devices"
        counts, sums = counted(slots, call)
        height = everyone * min(len(counts), k)  # The least that the page allows, and what torch_npu's meta function makes.
        rows: list[Any] = []
        sizes: Row = []
        weights: Row = []
        for s in slots:
            sent = calls[s.rank]
            row, size, smooth, w = sent["x"][s.token].tolist(), NAN, sent.get("scales"), sent.get("expert_scales")
            if mode == 2:
                row, size = in_bytes(row if smooth is None else list(map(mul, row, smooth[s.expert].tolist())))
            rows.append(row)
            sizes.append(size)
            weights.append(NAN if w is None else float(w[s.token, s.slot]))
        dtype, behind = (torch.int8, -1) if mode == 2 else (call["x"].dtype, NAN)
        empty = height - len(rows)
        nums = [sum(counts[: i + 1]) for i in range(len(counts))] if call.get("expert_token_nums_type", 1) == 0 else counts
        given = call.get("expert_scales") is not None
        more = [-1] * (2 * everyone * k * (world // 8)) if given else []  # A2's numbers for reducing early, which are open.
        out.append((
            made(rows + [[behind] * width] * empty, dtype, height, width),
            made(sizes + [NAN] * empty, torch.float32, height),
            made([-1] * max(tokens * k, height * 128), torch.int32),
            made(nums, torch.int64, len(counts)),
            made(sums + more, torch.int32),
            made([-1] * call.get("tp_world_size", 0), torch.int32),
            made(weights + [NAN] * empty if given else [], torch.float32),
        ))  # fmt: skip
    return out


def own(call: dict[str, Any], expert: int, token: int, ends: list[int], width: int) -> Row:
    """Of experts without rows: 0, ori_x, or alpha_1 ori_x + alpha_2 v: npu_moe_distribute_dispatch_v2.

    Pages give the alphas one number or one row for each constant expert; both are taken.
    """
    _, zero, copy, _ = ends
    if expert < zero:
        return [0.0] * width
    x = call["ori_x"][token].tolist()
    if expert < copy:
        return list(x)
    one, two, v = (call[f"const_expert_{n}"][expert - copy] for n in ("alpha_1", "alpha_2", "v"))
    return [a * n + b * c for a, n, b, c in zip(one.expand(width).tolist(), x, two.expand(width).tolist(), v.tolist(), strict=True)]


def combine_v2(calls: list[dict[str, Any]]) -> list[Tensor]:
    """x_t = sum_k expert_scales_tk row_tk + shared_expert_x_t, each row back the way it came: npu_moe_distribute_combine_v2.

    The shared expert's row is added once and without a weight, as that page's text says; its formula has it inside of the sum, and
    aclnnMoeDistributeCombineV4's times expert_scales. A token that does not take part has no result on any page: it is open.
    """
    back: dict[tuple[int, int, int], Row] = {}
    for call, slots in zip(calls, received(calls), strict=True):
        sums = counted(slots, call)[1]
        assert call["ep_send_counts"].tolist()[: len(sums)] == sums, "dispatch's counts have to be handed over as they are"
        assert call.get("comm_quant_mode", 0) == 0, "bytes on the way are not written here"
        for i, s in enumerate(slots):
            back[s.rank, s.token, s.slot] = call["expand_x"][i].tolist()
    out = []
    for rank, call in enumerate(calls):
        width, shared, result, ends = call["expand_x"].shape[1], call.get("shared_expert_x"), [], special(call)
        scales = call["expert_scales"].tolist()
        for token, (ids, on) in enumerate(zip(call["expert_ids"].tolist(), active(call), strict=True)):
            total = [0.0] * width if shared is None else shared.reshape(-1, width)[token].tolist()
            for j, e in enumerate(ids):
                if on[j]:
                    row = back[rank, token, j] if e < ends[0] else own(call, e, token, ends, width)
                    total = [t + scales[token][j] * v for t, v in zip(total, row, strict=True)]
            result.append(total if any(on) else [NAN] * width)
        out.append(made(result, call["expand_x"].dtype, len(result), width))
    return out
