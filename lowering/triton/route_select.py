"""The experts of a row: the k greatest keys, greatest first, of equal ones the lowest expert.

A key is an integer that orders as torch's topk orders numbers. A row has EP positions, a power of two. SP = 0: position p is expert p.
SP > 0: groups of S experts, each padded to SP positions.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .route_scores import rounded

LOWEST = tl.constexpr(-(2**31))  # below the key of every number
LOWEST_PAIR = tl.constexpr(-(2**63))
NAN_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def key_of(v):
    """An int32 that orders like v; every NaN is the greatest, -0 is 0."""
    bits = (v + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 = 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(v != v, NAN_KEY, key)


@triton.jit
def _value(key):
    """The number of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


# ---- rows of experts ----------------------------------------------------------------------------------------------


@triton.jit
def expert_at(p, S: tl.constexpr, SP: tl.constexpr):
    if SP == 0:
        return p
    else:
        return (p // SP) * S + p % SP


@triton.jit
def is_real(p, E: tl.constexpr, S: tl.constexpr, SP: tl.constexpr):
    if SP == 0:
        return p < E
    else:
        return (p % SP < S) & (expert_at(p, S, SP) < E)


@triton.jit
def rows_of_threads(
    rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, E: tl.constexpr, S: tl.constexpr, SP: tl.constexpr
):
    """Logits [BT, WIDTH] in fp32, -inf outside. Each chunk is one load; a thread holds its part of every chunk."""
    if CHUNKS == 1:
        p = FIRST + tl.arange(0, WIDTH)
        mask = inside[:, None] & is_real(p, E, S, SP)[None, :]
        return tl.load(rows[:, None] + expert_at(p, S, SP)[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    else:
        low = rows_of_threads(rows, inside, FIRST, WIDTH // 2, CHUNKS // 2, E, S, SP)
        high = rows_of_threads(rows, inside, FIRST + WIDTH // 2, WIDTH // 2, CHUNKS // 2, E, S, SP)
        return tl.join(low, high).permute(0, 2, 1).reshape(rows.shape[0], WIDTH)


@triton.jit
def _token(row, BT: tl.constexpr, KP: tl.constexpr):
    """The token of a program that is row `row` of its warps, such that `_by_token` moves nothing between threads."""
    GROUPS: tl.constexpr = BT // (32 // KP)
    return row % GROUPS * (BT // GROUPS) + row // GROUPS


@triton.jit
def rows_of_warps(
    logits, tokens, stride, FIRST: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr,
    E: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Logits [BT * 32, R] of rows of warps at the positions FIRST + lane * (EP // 32) + [0, R), fp32, -inf outside.

    A thread holds neighbours of a row. Two dimensions, or the compiler would lay the threads along the rows.
    """
    if R > 4:  # a load takes four
        low = rows_of_warps(logits, tokens, stride, FIRST, R // 2, BT, KP, EP, E, S, SP)
        high = rows_of_warps(logits, tokens, stride, FIRST + R // 2, R // 2, BT, KP, EP, E, S, SP)
        return tl.join(low, high).permute(0, 2, 1).reshape(BT * 32, R)
    else:
        thread = tl.arange(0, BT * 32)
        t = tl.program_id(0).to(tl.int64) * BT + _token(thread // 32, BT, KP)
        p = FIRST + (thread % 32)[:, None] * (EP // 32) + tl.arange(0, R)[None, :]
        mask = (t < tokens)[:, None]
        if SP > 0 or E < EP:
            mask = mask & is_real(p, E, S, SP)
        return tl.load(logits + (t * stride)[:, None] + expert_at(p, S, SP), mask=mask, other=float("-inf")).to(tl.float32)


# ---- selection ----------------------------------------------------------------------------------------------------


@triton.jit
def _first_where(hit, p, NONE: tl.constexpr, AXIS: tl.constexpr):
    return tl.min(tl.where(hit, p, NONE), AXIS)


@triton.jit
def drop_groups(
    key, p, fill, G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, KEPT: tl.constexpr, TOP: tl.constexpr, DTYPE: tl.constexpr
):
    """Keys [BT, EP] with those of the losing groups set to fill's: a group's score is the sum of its TOP best."""
    BT: tl.constexpr = key.shape[0]
    GP: tl.constexpr = key.shape[1] // SP
    keys = key.reshape(BT, GP, SP)
    member = tl.arange(0, SP)[None, None, :]
    group = tl.arange(0, GP)[None, :]
    left = keys
    total = tl.zeros((BT, GP), tl.float32)
    for _ in range(TOP):
        best = tl.max(left, 2)
        total += _value(best)
        if TOP > 1:
            left = tl.where(member == _first_where(left == best[:, :, None], member, SP, 2)[:, :, None], LOWEST, left)
    rank = tl.where(group < G, key_of(rounded(total, DTYPE)), LOWEST)
    kept = tl.zeros((BT, GP), tl.int32)
    for _ in range(KEPT):
        winner = _first_where(rank == tl.max(rank, 1)[:, None], group, GP, 1)[:, None]
        kept = tl.where(group == winner, 1, kept)
        rank = tl.where(group == winner, LOWEST, rank)
    filled = tl.where(kept[:, :, None] == 1, keys, key_of(rounded(tl.full((1, 1, 1), fill, tl.float32), DTYPE)))
    return tl.where((member < S) & (group < G)[:, :, None], filled, LOWEST).reshape(BT, key.shape[1])


@triton.jit
def best(key, p, K: tl.constexpr, KP: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr):
    """Positions [BT, SLOTS], slot modulo KP, of the K greatest keys, greatest first, of equal ones the first.

    WIDE packs key and position in 64 bits: one reduction a step, the shortest way. Else two of 32 bits: the fewest instructions.
    """
    BT: tl.constexpr = key.shape[0]
    EP: tl.constexpr = key.shape[1]
    slot = tl.arange(0, SLOTS)[None, :] % KP
    found = tl.zeros((BT, SLOTS), tl.int32)
    at = p[None, :]
    if WIDE:
        pairs = (key.to(tl.int64) << 32) | (at ^ (EP - 1)).to(tl.int64)
        for j in range(K):
            winner = (tl.max(pairs, 1) & (EP - 1)).to(tl.int32) ^ (EP - 1)
            found = tl.where(slot == j, winner[:, None], found)
            pairs = tl.where(at == winner[:, None], LOWEST_PAIR, pairs)
    else:
        for j in range(K):
            winner = _first_where(key == tl.max(key, 1)[:, None], at, EP - 1, 1)
            found = tl.where(slot == j, winner[:, None], found)
            key = tl.where(at == winner[:, None], LOWEST, key)
    return found


@triton.jit
def best_near(key, K: tl.constexpr, KP: tl.constexpr):
    """(as `_top`, [BT, 32] with slot j of a row at the lanes l with l % KP = j; whether it holds), a warp a row, EP <= 256.

    Distance to the greatest key and position in one unsigned number, x = min(d, FAR) · EP + p: exact unless one of the K is FAR, and all
    different. The next one after m is m + 1 + min(x - (m + 1)), as what is not greater than m wraps around.
    """
    BT: tl.constexpr = key.shape[0]
    EP: tl.constexpr = key.shape[1]
    FAR: tl.constexpr = 2**32 // EP - 1
    slot = tl.arange(0, 32)[None, :] % KP
    lanes = key.reshape(BT, 32, EP // 32)
    p = tl.arange(0, 32)[:, None] * (EP // 32) + tl.arange(0, EP // 32)[None, :]
    far = (tl.max(tl.max(lanes, 2), 1)[:, None, None] - lanes).to(tl.uint32, bitcast=True)
    x = tl.minimum(far, FAR) * EP + p[None, :, :].to(tl.uint32)
    found = tl.zeros((BT, 32), tl.uint32)
    after = tl.zeros((BT,), tl.uint32)
    for j in tl.static_range(K):
        m = after + tl.min(tl.min(x - after[:, None, None], 2), 1)
        found = tl.where(slot == j, m[:, None], found)
        after = m + 1
    return (found & (EP - 1)).to(tl.int32), tl.max((m >= FAR * EP).to(tl.int32), 0) == 0


@triton.jit
def by_token(v, KP: tl.constexpr):
    """Rows of warps to rows of tokens: [BT, 32], row i * (BT // G) + g -> [BT, KP], row g * G + i, G = 32 // KP."""
    BT: tl.constexpr = v.shape[0]
    G: tl.constexpr = 32 // KP
    i = tl.arange(0, G)[:, None, None]
    mine = tl.arange(0, 32)[None, None, :] // KP == i
    return tl.sum(tl.where(mine, v.reshape(G, BT // G, 32), 0), 0).reshape(BT, KP)
