"""Router logits to weights and ids in one launch, and the gradient of the logits in another.

    choice = key(score(x) + b)    an integer per expert that orders as torch's topk does: NaN first, -0 equal to 0
    ids    = k times argmax       equal keys: the lowest expert
    w      = norm(score(x[ids])) · scale · expert_scale[ids]

Up to 256 experts a warp takes whole rows, and a step of the selection is one reduction of 32 bits, an instruction of the card, wherever
the best of a row lie within a factor 4 to 16 of each other; elsewhere it is an argmax, as in longer rows that few threads share. Where the
score rises strictly and nothing is added to it, experts are chosen by the logits themselves: the same experts, no score of the others.
Weights are computed from logits gathered again (they are in the cache), not carried through the selection.
"""
# ruff: noqa: SIM300
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

IDENTITY, SOFTMAX, SIGMOID, SQRT_SOFTPLUS, SOFTPLUS, EXP, TANH, RELU = (tl.constexpr(i) for i in range(8))
BIAS_NONE, BIAS_SCORE, BIAS_LOGIT = (tl.constexpr(i) for i in range(3))
NORM_NONE, NORM_SUM, NORM_MAX, NORM_PNORM = (tl.constexpr(i) for i in range(4))
LOWEST = tl.constexpr(-(2**31))  # below the key of every number
LOWEST_PAIR = tl.constexpr(-(2**63))
NAN_KEY = tl.constexpr(2**31 - 1)


# ---- arithmetic ---------------------------------------------------------------------------------------------------


@triton.jit
def _rounded(v, DTYPE: tl.constexpr):
    """v as a tensor of DTYPE would hold it, in fp32."""
    if DTYPE == tl.float32:
        return v
    else:
        return v.to(DTYPE).to(tl.float32)


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e^-|x|), log1p(z) = 2 artanh(z / (2 + z)) as a series: exact in small z, where log(1 + z) is not."""
    z = tl.exp(-tl.abs(x))
    s = z / (2.0 + z)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15 + q / 17)))))))
    return tl.where(x < 0, 0.0, x) + 2.0 * s * series


@triton.jit
def _tanh(x):
    """Near 0 the series, where 1 - e^-2|x| would cancel."""
    q = x * x
    small = x * (1.0 - q * (1 / 3 - q * (2 / 15 - q * (17 / 315 - q * (62 / 2835 - q * (1382 / 155925))))))
    z = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - z) / (1.0 + z)
    return tl.where(tl.abs(x) < 0.3, small, tl.where(x < 0, -large, large))


@triton.jit
def _pointwise(x, SCORE: tl.constexpr, DTYPE: tl.constexpr):
    """The score functions of one logit, rounded where torch rounds."""
    if SCORE == SIGMOID:
        v = tl.sigmoid(x)
    elif SCORE == SQRT_SOFTPLUS:
        v = tl.sqrt(_rounded(_softplus(x), DTYPE))
    elif SCORE == SOFTPLUS:
        v = _softplus(x)
    elif SCORE == EXP:
        v = tl.exp(x)
    elif SCORE == TANH:
        v = _tanh(x)
    elif SCORE == RELU:
        v = tl.where(x < 0, 0.0, x)
    else:
        v = x
    return _rounded(v, DTYPE)


@triton.jit
def _slope(x, s, SCORE: tl.constexpr):
    """d score / d x of the pointwise scores, s = score(x)."""
    if SCORE == SIGMOID:
        return s * (1.0 - s)
    elif SCORE == SQRT_SOFTPLUS:
        return tl.sigmoid(x) / (2.0 * s)
    elif SCORE == SOFTPLUS:
        return tl.sigmoid(x)
    elif SCORE == EXP:
        return s
    elif SCORE == TANH:
        return 1.0 - s * s
    elif SCORE == RELU:
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return x * 0.0 + 1.0


@triton.jit
def _key(v):
    """An int32 that orders like v; every NaN is the greatest, -0 is 0."""
    bits = (v + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 = 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(v != v, NAN_KEY, key)


@triton.jit
def _value(key):
    """The number of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


# ---- rows of experts ----------------------------------------------------------------------------------------------
# A row has EP positions, a power of two. SP = 0: position p is expert p. SP > 0: groups of S experts, each padded to SP positions.


@triton.jit
def _expert(p, S: tl.constexpr, SP: tl.constexpr):
    if SP == 0:
        return p
    else:
        return (p // SP) * S + p % SP


@triton.jit
def _real(p, E: tl.constexpr, S: tl.constexpr, SP: tl.constexpr):
    if SP == 0:
        return p < E
    else:
        return (p % SP < S) & (_expert(p, S, SP) < E)


@triton.jit
def _rows(rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, E: tl.constexpr, S: tl.constexpr, SP: tl.constexpr):
    """Logits [BT, WIDTH] in fp32, -inf outside. Each chunk is one load; a thread holds its part of every chunk."""
    if CHUNKS == 1:
        p = FIRST + tl.arange(0, WIDTH)
        mask = inside[:, None] & _real(p, E, S, SP)[None, :]
        return tl.load(rows[:, None] + _expert(p, S, SP)[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    else:
        low = _rows(rows, inside, FIRST, WIDTH // 2, CHUNKS // 2, E, S, SP)
        high = _rows(rows, inside, FIRST + WIDTH // 2, WIDTH // 2, CHUNKS // 2, E, S, SP)
        return tl.join(low, high).permute(0, 2, 1).reshape(rows.shape[0], WIDTH)


@triton.jit
def _token(row, BT: tl.constexpr, KP: tl.constexpr):
    """The token of a program that is row `row` of its warps, such that `_by_token` moves nothing between threads."""
    GROUPS: tl.constexpr = BT // (32 // KP)
    return row % GROUPS * (BT // GROUPS) + row // GROUPS


@triton.jit
def _lanes(
    logits, tokens, stride, FIRST: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr,
    E: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Logits [BT * 32, R] of rows of warps at the positions FIRST + lane * (EP // 32) + [0, R), fp32, -inf outside.

    A thread holds neighbours of a row. Two dimensions, or the compiler would lay the threads along the rows.
    """
    if R > 4:  # a load takes four
        low = _lanes(logits, tokens, stride, FIRST, R // 2, BT, KP, EP, E, S, SP)
        high = _lanes(logits, tokens, stride, FIRST + R // 2, R // 2, BT, KP, EP, E, S, SP)
        return tl.join(low, high).permute(0, 2, 1).reshape(BT * 32, R)
    else:
        thread = tl.arange(0, BT * 32)
        t = tl.program_id(0).to(tl.int64) * BT + _token(thread // 32, BT, KP)
        p = FIRST + (thread % 32)[:, None] * (EP // 32) + tl.arange(0, R)[None, :]
        mask = (t < tokens)[:, None]
        if SP > 0 or E < EP:
            mask = mask & _real(p, E, S, SP)
        return tl.load(logits + (t * stride)[:, None] + _expert(p, S, SP), mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _softmax_parts(x, real):
    """(max, Σ e^(x - max)) of every row over the real positions; Σ is NaN where torch's softmax is."""
    top = tl.max(x, 1)
    return top, tl.sum(tl.where(real[None, :], tl.exp(x - top[:, None]), 0.0), 1)


# ---- selection ----------------------------------------------------------------------------------------------------


@triton.jit
def _first_where(hit, p, NONE: tl.constexpr, AXIS: tl.constexpr):
    return tl.min(tl.where(hit, p, NONE), AXIS)


@triton.jit
def _drop_groups(
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
    rank = tl.where(group < G, _key(_rounded(total, DTYPE)), LOWEST)
    kept = tl.zeros((BT, GP), tl.int32)
    for _ in range(KEPT):
        winner = _first_where(rank == tl.max(rank, 1)[:, None], group, GP, 1)[:, None]
        kept = tl.where(group == winner, 1, kept)
        rank = tl.where(group == winner, LOWEST, rank)
    filled = tl.where(kept[:, :, None] == 1, keys, _key(_rounded(tl.full((1, 1, 1), fill, tl.float32), DTYPE)))
    return tl.where((member < S) & (group < G)[:, :, None], filled, LOWEST).reshape(BT, key.shape[1])


@triton.jit
def _top(key, p, K: tl.constexpr, KP: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr):
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
def _top_near(key, K: tl.constexpr, KP: tl.constexpr):
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
def _by_token(v, KP: tl.constexpr):
    """Rows of warps to rows of tokens: [BT, 32], row i * (BT // G) + g -> [BT, KP], row g * G + i, G = 32 // KP."""
    BT: tl.constexpr = v.shape[0]
    G: tl.constexpr = 32 // KP
    i = tl.arange(0, G)[:, None, None]
    mine = tl.arange(0, 32)[None, None, :] // KP == i
    return tl.sum(tl.where(mine, v.reshape(G, BT // G, 32), 0), 0).reshape(BT, KP)


# ---- weights ------------------------------------------------------------------------------------------------------


@triton.jit
def _reduction(w, used, NORM: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """The reduction [BT] over the K weights of a row."""
    if NORM == NORM_SUM:
        d = tl.sum(tl.where(used, w, 0.0), 1)
    elif NORM == NORM_MAX:
        d = tl.max(tl.where(used, w, float("-inf")), 1)
        d = tl.where(tl.max(tl.where(used & (w != w), 1, 0), 1) == 1, float("nan"), d)
    else:
        size = tl.where(used, tl.abs(w), 0.0)
        if P == 1.0:
            d = tl.sum(size, 1)
        elif P == float("inf"):
            d = tl.max(size, 1)
        elif P == 2.0:
            d = tl.sqrt(tl.sum(size * size, 1))
        else:
            d = tl.sum(tl.where(size == 0.0, 0.0, tl.exp(P * tl.log(size))), 1)
            d = tl.where(d == 0.0, 0.0, tl.exp(tl.log(d) / P))
    return _rounded(d, DTYPE)


@triton.jit
def _guarded(d, eps, clamp, DTYPE: tl.constexpr):
    d = _rounded(tl.where((clamp != 0.0) & (d < clamp), clamp, d), DTYPE)
    return _rounded(d + eps, DTYPE)


@triton.jit
def _scores(x, used, top, total, SCORE: tl.constexpr, OVER_SELECTED: tl.constexpr, DTYPE: tl.constexpr):
    """Scores of the selected logits x [BT, KP]; top and total [BT, 1 or KP] are the softmax parts of the whole row."""
    if SCORE == SOFTMAX:
        if OVER_SELECTED:
            x = tl.where(used, x, float("-inf"))
            e = tl.exp(x - tl.max(x, 1)[:, None])
            return _rounded(e / tl.sum(tl.where(used, e, 0.0), 1)[:, None], DTYPE)
        else:
            return _rounded(tl.exp(x - top) / total, DTYPE)
    else:
        return _pointwise(x, SCORE, DTYPE)


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits, bias, expert_scale, weights, ids, tokens, stride, fill, eps, clamp, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SCORE: tl.constexpr, OVER_SELECTED: tl.constexpr,
    BIAS: tl.constexpr, BIAS_IN_WEIGHTS: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, KEPT: tl.constexpr,
    TOP: tl.constexpr, NORM: tl.constexpr, NORM_P: tl.constexpr, SCALED: tl.constexpr, EXPERT_SCALE: tl.constexpr, BY_LOGIT: tl.constexpr,
    DTYPE: tl.constexpr, BT: tl.constexpr, CHUNKS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
    BEHIND: tl.constexpr,
):  # fmt: skip
    """ROWS: a warp takes whole rows, `_top_near`; else a row is spread over the threads that CHUNKS leaves it, `_top`.

    `BEHIND`: the kernel before is the router's product, which lets this one start after its own wait: so the next one may start now.
    """
    if PDL:
        if BEHIND:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        else:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = t < tokens
    rows = logits + t * stride
    p = tl.arange(0, EP)
    real = _real(p, E, S, SP)
    if ROWS:
        x = _lanes(logits, tokens, stride, 0, EP // 32, BT, KP, EP, E, S, SP).reshape(BT, EP)
    else:
        x = _rows(rows, inside, 0, EP, CHUNKS, E, S, SP)
    x = _rounded(x, DTYPE)
    top = tl.zeros((BT,), tl.float32)
    total = top
    if SCORE == SOFTMAX and not OVER_SELECTED:
        top, total = _softmax_parts(x, real)

    choice = x
    if not BY_LOGIT and not OVER_SELECTED and BIAS != BIAS_LOGIT:
        if SCORE == SOFTMAX:
            choice = _rounded(tl.exp(x - top[:, None]) / total[:, None], DTYPE)
        else:
            choice = _pointwise(x, SCORE, DTYPE)
    if BIAS != BIAS_NONE:
        b = tl.load(bias + _expert(p, S, SP), mask=real, other=0.0).to(tl.float32)
        choice = _rounded(choice + _rounded(b, DTYPE)[None, :], DTYPE)
    key = _key(choice)
    if SCORE == SOFTMAX and BY_LOGIT and not OVER_SELECTED and BIAS != BIAS_LOGIT:
        key = tl.where((total != total)[:, None], NAN_KEY, key)  # one NaN and all scores of the row are
    if SP > 0 or E < EP:
        key = tl.where(real[None, :], key, LOWEST)
    if SP > 0:
        key = _drop_groups(key, p, fill, G, S, SP, KEPT, TOP, DTYPE)
    if ROWS:
        found, holds = _top_near(key, K, KP)
        if not holds:
            found = _top(key, p, K, KP, 32, False)
        found = _expert(_by_token(found, KP), S, SP)
        top_of = top[:, None]
        total_of = total[:, None]
        if SCORE == SOFTMAX and not OVER_SELECTED:
            top_of = _by_token(top_of.broadcast_to(BT, 32), KP)
            total_of = _by_token(total_of.broadcast_to(BT, 32), KP)
    else:
        found = _expert(_top(key, p, K, KP, KP, WIDE), S, SP)
        top_of = top[:, None]
        total_of = total[:, None]

    slot = tl.arange(0, KP)[None, :]
    used = inside[:, None] & (slot < K)
    w = _rounded(tl.load(rows[:, None] + found, mask=used, other=0.0).to(tl.float32), DTYPE)
    w = _scores(w, used, top_of, total_of, SCORE, OVER_SELECTED, DTYPE)
    if BIAS_IN_WEIGHTS:
        w = _rounded(w + _rounded(tl.load(bias + found, mask=used, other=0.0).to(tl.float32), DTYPE), DTYPE)
    if NORM != NORM_NONE:
        w = _rounded(w / _guarded(_reduction(w, used, NORM, NORM_P, DTYPE), eps, clamp, DTYPE)[:, None], DTYPE)
    if SCALED:
        w = _rounded(w * scale, DTYPE)
    if EXPERT_SCALE:
        w = _rounded(w * _rounded(tl.load(expert_scale + found, mask=used, other=0.0).to(tl.float32), DTYPE), DTYPE)
    out = t[:, None] * K + slot
    tl.store(weights + out, w.to(weights.dtype.element_ty), mask=used)
    tl.store(ids + out, found.to(tl.int64), mask=used)


# ---- backward -----------------------------------------------------------------------------------------------------


@triton.jit
def _reduction_slope(w, used, d, NORM: tl.constexpr, P: tl.constexpr):
    """d reduction / d w [BT, KP]; equal maxima share it evenly."""
    if NORM == NORM_SUM:
        slope = w * 0.0 + 1.0
    elif NORM == NORM_MAX or P == float("inf"):
        size = w if NORM == NORM_MAX else tl.abs(w)
        hit = tl.where(used & (size == d[:, None]), 1.0, 0.0)
        sign = 1.0 if NORM == NORM_MAX else tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
        slope = hit * sign / tl.sum(hit, 1)[:, None]
    else:
        sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
        ratio = tl.where(d == 0.0, 0.0, 1.0)[:, None] * tl.abs(w) / tl.where(d == 0.0, 1.0, d)[:, None]
        slope = sign * tl.where(ratio == 0.0, 1.0 if P == 1.0 else 0.0, tl.exp((P - 1.0) * tl.log(ratio)))
    return slope


@triton.jit
def _normaliser_backward(g, w, used, eps, clamp, NORM: tl.constexpr, P: tl.constexpr):
    """Gradient of w / guard(reduction(w)): g / guard + slope · d guard, where d guard = -Σ g w / guard²."""
    d = _reduction(w, used, NORM, P, tl.float32)
    guard = _guarded(d, eps, clamp, tl.float32)
    grad_d = -(tl.sum(tl.where(used, g * w, 0.0), 1) / guard) / guard  # guard * guard may be 0
    grad_d = tl.where((clamp != 0.0) & (d < clamp), 0.0, grad_d)
    return g / guard[:, None] + grad_d[:, None] * _reduction_slope(w, used, d, NORM, P)


@triton.jit(do_not_specialize=["tokens"])
def route_backward_kernel(
    grad, ids, logits, bias, expert_scale, out, tokens, stride, stride_grad, eps, clamp, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SCORE: tl.constexpr, OVER_SELECTED: tl.constexpr,
    BIAS_IN_WEIGHTS: tl.constexpr, NORM: tl.constexpr, NORM_P: tl.constexpr, EXPERT_SCALE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = t < tokens
    rows = logits + t * stride
    p = tl.arange(0, EP)
    slot = tl.arange(0, KP)[None, :]
    used = inside[:, None] & (slot < K)
    found = tl.load(ids + t[:, None] * K + slot, mask=used, other=0).to(tl.int32)
    x = tl.load(rows[:, None] + found, mask=used, other=0.0).to(tl.float32)
    top = tl.zeros((BT,), tl.float32)
    total = top
    if SCORE == SOFTMAX and not OVER_SELECTED:
        everything = _rows(rows, inside, 0, EP, 1, E, 0, 0)
        top, total = _softmax_parts(everything, p < E)
    s = _scores(x, used, top[:, None], total[:, None], SCORE, OVER_SELECTED, tl.float32)

    g = tl.load(grad + t[:, None] * stride_grad + slot, mask=used, other=0.0).to(tl.float32) * scale
    if EXPERT_SCALE:
        g *= tl.load(expert_scale + found, mask=used, other=0.0).to(tl.float32)
    if NORM != NORM_NONE:
        w = s
        if BIAS_IN_WEIGHTS:
            w += tl.load(bias + found, mask=used, other=0.0).to(tl.float32)
        g = _normaliser_backward(g, w, used, eps, clamp, NORM, NORM_P)
    if SCORE == SOFTMAX:
        s = tl.where(used, s, 0.0)
        dot = tl.sum(tl.where(used, g, 0.0) * s, 1)
        if OVER_SELECTED:
            g = s * (g - dot[:, None])
    else:
        g *= _slope(x, s, SCORE)

    full = tl.zeros((BT, EP), tl.float32)
    for j in range(K):
        mine = slot == j
        at = tl.sum(tl.where(mine, found, 0), 1)
        full += tl.where(p[None, :] == at[:, None], tl.sum(tl.where(mine, g, 0.0), 1)[:, None], 0.0)
    if SCORE == SOFTMAX and not OVER_SELECTED:
        full = tl.exp(everything - top[:, None]) / total[:, None] * (full - dot[:, None])
    tl.store(out + t[:, None] * E + p[None, :], full.to(out.dtype.element_ty), mask=inside[:, None] & (p < E)[None, :])
