"""Router logits to weights and ids in one launch, and the gradient of the logits in another.

    choice = key(score(x) + b)    an integer per expert that orders as torch's topk does: NaN first, -0 equal to 0
    ids    = k times argmax       equal keys: the lowest expert
    w      = norm(score(x[ids])) · scale · expert_scale[ids]

Up to 256 experts a warp takes whole rows, and a step of the selection is one reduction of 32 bits, an instruction of the card, wherever
the best of a row lie within a factor 4 to 16 of each other; elsewhere it is an argmax, as in longer rows that few threads share. Where the
score rises strictly and nothing is added to it, experts are chosen by the logits themselves: the same experts, no score of the others.
Weights are computed from logits gathered again (they are in the cache), not carried through the selection.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .route_scores import (
    NORM_NONE,
    SOFTMAX,
    guarded,
    normaliser_backward,
    pointwise,
    reduction,
    rounded,
    scores_of,
    slope_of,
    softmax_parts,
)
from .route_select import (
    LOWEST,
    NAN_KEY,
    best,
    best_near,
    by_token,
    drop_groups,
    expert_at,
    is_real,
    key_of,
    rows_of_threads,
    rows_of_warps,
)

BIAS_NONE, BIAS_SCORE, BIAS_LOGIT = (tl.constexpr(i) for i in range(3))


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
    real = is_real(p, E, S, SP)
    if ROWS:
        x = rows_of_warps(logits, tokens, stride, 0, EP // 32, BT, KP, EP, E, S, SP).reshape(BT, EP)
    else:
        x = rows_of_threads(rows, inside, 0, EP, CHUNKS, E, S, SP)
    x = rounded(x, DTYPE)
    top = tl.zeros((BT,), tl.float32)
    total = top
    if SCORE == SOFTMAX and not OVER_SELECTED:
        top, total = softmax_parts(x, real)

    choice = x
    if not BY_LOGIT and not OVER_SELECTED and BIAS != BIAS_LOGIT:
        if SCORE == SOFTMAX:
            choice = rounded(tl.exp(x - top[:, None]) / total[:, None], DTYPE)
        else:
            choice = pointwise(x, SCORE, DTYPE)
    if BIAS != BIAS_NONE:
        b = tl.load(bias + expert_at(p, S, SP), mask=real, other=0.0).to(tl.float32)
        choice = rounded(choice + rounded(b, DTYPE)[None, :], DTYPE)
    key = key_of(choice)
    if SCORE == SOFTMAX and BY_LOGIT and not OVER_SELECTED and BIAS != BIAS_LOGIT:
        key = tl.where((total != total)[:, None], NAN_KEY, key)  # one NaN and all scores of the row are
    if SP > 0 or E < EP:
        key = tl.where(real[None, :], key, LOWEST)
    if SP > 0:
        key = drop_groups(key, p, fill, G, S, SP, KEPT, TOP, DTYPE)
    if ROWS:
        found, holds = best_near(key, K, KP)
        if not holds:
            found = best(key, p, K, KP, 32, False)
        found = expert_at(by_token(found, KP), S, SP)
        top_of = top[:, None]
        total_of = total[:, None]
        if SCORE == SOFTMAX and not OVER_SELECTED:
            top_of = by_token(top_of.broadcast_to(BT, 32), KP)
            total_of = by_token(total_of.broadcast_to(BT, 32), KP)
    else:
        found = expert_at(best(key, p, K, KP, KP, WIDE), S, SP)
        top_of = top[:, None]
        total_of = total[:, None]

    slot = tl.arange(0, KP)[None, :]
    used = inside[:, None] & (slot < K)
    w = rounded(tl.load(rows[:, None] + found, mask=used, other=0.0).to(tl.float32), DTYPE)
    w = scores_of(w, used, top_of, total_of, SCORE, OVER_SELECTED, DTYPE)
    if BIAS_IN_WEIGHTS:
        w = rounded(w + rounded(tl.load(bias + found, mask=used, other=0.0).to(tl.float32), DTYPE), DTYPE)
    if NORM != NORM_NONE:
        w = rounded(w / guarded(reduction(w, used, NORM, NORM_P, DTYPE), eps, clamp, DTYPE)[:, None], DTYPE)
    if SCALED:
        w = rounded(w * scale, DTYPE)
    if EXPERT_SCALE:
        w = rounded(w * rounded(tl.load(expert_scale + found, mask=used, other=0.0).to(tl.float32), DTYPE), DTYPE)
    out = t[:, None] * K + slot
    tl.store(weights + out, w.to(weights.dtype.element_ty), mask=used)
    tl.store(ids + out, found.to(tl.int64), mask=used)


# ---- backward -----------------------------------------------------------------------------------------------------


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
        everything = rows_of_threads(rows, inside, 0, EP, 1, E, 0, 0)
        top, total = softmax_parts(everything, p < E)
    s = scores_of(x, used, top[:, None], total[:, None], SCORE, OVER_SELECTED, tl.float32)

    g = tl.load(grad + t[:, None] * stride_grad + slot, mask=used, other=0.0).to(tl.float32) * scale
    if EXPERT_SCALE:
        g *= tl.load(expert_scale + found, mask=used, other=0.0).to(tl.float32)
    if NORM != NORM_NONE:
        w = s
        if BIAS_IN_WEIGHTS:
            w += tl.load(bias + found, mask=used, other=0.0).to(tl.float32)
        g = normaliser_backward(g, w, used, eps, clamp, NORM, NORM_P)
    if SCORE == SOFTMAX:
        s = tl.where(used, s, 0.0)
        dot = tl.sum(tl.where(used, g, 0.0) * s, 1)
        if OVER_SELECTED:
            g = s * (g - dot[:, None])
    else:
        g *= slope_of(x, s, SCORE)

    full = tl.zeros((BT, EP), tl.float32)
    for j in range(K):
        mine = slot == j
        at = tl.sum(tl.where(mine, found, 0), 1)
        full += tl.where(p[None, :] == at[:, None], tl.sum(tl.where(mine, g, 0.0), 1)[:, None], 0.0)
    if SCORE == SOFTMAX and not OVER_SELECTED:
        full = tl.exp(everything - top[:, None]) / total[:, None] * (full - dot[:, None])
    tl.store(out + t[:, None] * E + p[None, :], full.to(out.dtype.element_ty), mask=inside[:, None] & (p < E)[None, :])
