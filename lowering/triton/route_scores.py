"""The arithmetic of a router, of logits that were chosen already: scores, their slopes, and what divides the weights.

Everything is fp32 that is rounded where torch would round.
"""
# ruff: noqa: SIM300
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

IDENTITY, SOFTMAX, SIGMOID, SQRT_SOFTPLUS, SOFTPLUS, EXP, TANH, RELU = (tl.constexpr(i) for i in range(8))
NORM_NONE, NORM_SUM, NORM_MAX, NORM_PNORM = (tl.constexpr(i) for i in range(4))


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
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
def pointwise(x, SCORE: tl.constexpr, DTYPE: tl.constexpr):
    """The score functions of one logit, rounded where torch rounds."""
    if SCORE == SIGMOID:
        v = tl.sigmoid(x)
    elif SCORE == SQRT_SOFTPLUS:
        v = tl.sqrt(rounded(_softplus(x), DTYPE))
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
    return rounded(v, DTYPE)


@triton.jit
def slope_of(x, s, SCORE: tl.constexpr):
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
def softmax_parts(x, real):
    """(max, Σ e^(x - max)) of every row over the real positions; Σ is NaN where torch's softmax is."""
    top = tl.max(x, 1)
    return top, tl.sum(tl.where(real[None, :], tl.exp(x - top[:, None]), 0.0), 1)


@triton.jit
def scores_of(x, used, top, total, SCORE: tl.constexpr, OVER_SELECTED: tl.constexpr, DTYPE: tl.constexpr):
    """Scores of the selected logits x [BT, KP]; top and total [BT, 1 or KP] are the softmax parts of the whole row."""
    if SCORE == SOFTMAX:
        if OVER_SELECTED:
            x = tl.where(used, x, float("-inf"))
            e = tl.exp(x - tl.max(x, 1)[:, None])
            return rounded(e / tl.sum(tl.where(used, e, 0.0), 1)[:, None], DTYPE)
        else:
            return rounded(tl.exp(x - top) / total, DTYPE)
    else:
        return pointwise(x, SCORE, DTYPE)


# ---- what divides the weights ---------------------------------------------------------------------------------------


@triton.jit
def reduction(w, used, NORM: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
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
    return rounded(d, DTYPE)


@triton.jit
def guarded(d, eps, clamp, DTYPE: tl.constexpr):
    d = rounded(tl.where((clamp != 0.0) & (d < clamp), clamp, d), DTYPE)
    return rounded(d + eps, DTYPE)


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
def normaliser_backward(g, w, used, eps, clamp, NORM: tl.constexpr, P: tl.constexpr):
    """Gradient of w / guard(reduction(w)): g / guard + slope · d guard, where d guard = -Σ g w / guard²."""
    d = reduction(w, used, NORM, P, tl.float32)
    guard = guarded(d, eps, clamp, tl.float32)
    grad_d = -(tl.sum(tl.where(used, g * w, 0.0), 1) / guard) / guard  # guard * guard may be 0
    grad_d = tl.where((clamp != 0.0) & (d < clamp), 0.0, grad_d)
    return g / guard[:, None] + grad_d[:, None] * _reduction_slope(w, used, d, NORM, P)
