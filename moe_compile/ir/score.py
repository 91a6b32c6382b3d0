"""Score functions of a router: a row each."""

from __future__ import annotations

import enum

from torch import Tensor

from .scalar import BY_NAME, Scalar


class Score(enum.IntEnum):
    """Score function from router logits to expert scores. The number is part of the op's contract."""

    IDENTITY = 0
    SOFTMAX = 1
    SIGMOID = 2
    SQRT_SOFTPLUS = 3
    SOFTPLUS = 4
    EXP = 5
    TANH = 6
    RELU = 7


# A score s of one logit l: s ** power = f(l). In the order in which a router is tried for them
SCORES: dict[Score, tuple[Scalar, int]] = {
    Score.SIGMOID: (BY_NAME["sigmoid"], 1),
    Score.SQRT_SOFTPLUS: (BY_NAME["softplus"], 2),
    Score.SOFTPLUS: (BY_NAME["softplus"], 1),
    Score.TANH: (BY_NAME["tanh"], 1),
    Score.RELU: (BY_NAME["relu"], 1),
    Score.EXP: (BY_NAME["exp"], 1),
}


def score(kind: Score, x: Tensor) -> Tensor:
    """The score function over the last dim; shape kept."""
    if kind is Score.SOFTMAX:
        return x.softmax(-1)
    if kind is Score.IDENTITY:
        return x
    f, power = SCORES[kind]
    return f.torch(x) if power == 1 else f.torch(x).sqrt()


def score_text(kind: Score) -> str:
    """σ, √softplus, softmax; nothing for the logit itself."""
    if kind in (Score.IDENTITY, Score.SOFTMAX):
        return "softmax" if kind is Score.SOFTMAX else ""
    f, power = SCORES[kind]
    return ("√" if power == 2 else "") + (f.text or f.name)
