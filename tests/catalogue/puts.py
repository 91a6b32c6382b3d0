"""Rows that are put instead of added: tutorials' loops over [B, T, H] with a mask of each expert, and top-1 routing (switch)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LIST_EXPERTS, RENORM, E, Fused, H, K, ListCase, Rejected, Sound, gating

TOP1 = gating(k=1)


class _Tutorial(ListCase):
    """Verdict: fused. x [B, T, H], full -inf, scatter, softmax; masks [B, T] and [B·T] of each expert."""

    expect = Fused(RENORM, LIST_EXPERTS)
    condition = True

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        batch = 3 if tokens % 3 == 0 else 1
        return (torch.randn(batch, tokens // batch, H),)

    def dense(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = logits.topk(K, dim=-1)
        return F.softmax(torch.full_like(logits, float("-inf")).scatter(-1, ids, top), dim=-1), ids

    def chosen(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).any(dim=-1)

    def column(self, e: int) -> int:
        return e

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def put(self, final: Tensor, mask: Tensor, y: Tensor) -> None:
        final[mask] += y

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.dense(self.logits(x))
        final = self.start(x)
        flat_x, flat_weights = x.view(-1, x.size(-1)), weights.view(-1, weights.size(-1))
        for e, expert in enumerate(self.experts):
            mask = self.chosen(ids, e)
            flat_mask = mask.view(-1)
            if not self.condition or flat_mask.any():
                score = flat_weights[flat_mask, self.column(e)].unsqueeze(1)
                self.put(final, mask, (expert(flat_x[flat_mask]) * score).squeeze(1))
        return final


class Tutorial(_Tutorial):
    """Verdict: fused. `if flat_mask.any()`: read by example; no tensor holds the chosen weights, they stand in [B, T, E]."""


class TutorialEvery(_Tutorial):
    """Verdict: fused as Tutorial. Every expert is called, with no rows perhaps."""

    condition = False


class TutorialPut(_Tutorial):
    """Verdict: rejected. `final[mask] = y` with two experts a token: the later expert wins."""

    expect, near = Rejected(), "TutorialEvery"
    condition = False

    def put(self, final: Tensor, mask: Tensor, y: Tensor) -> None:
        final[mask] = y


class TutorialPutRead(TutorialPut):
    """Verdict: rejected. As TutorialPut, read by example."""

    condition = True


class TutorialOnes(_Tutorial):
    """Verdict: rejected. The sum starts from ones."""

    expect, near = Rejected(), "TutorialEvery"
    condition = False

    def start(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class TutorialOtherScore(_Tutorial):
    """Verdict: either. The score of the next expert."""

    expect, near = Sound(), "TutorialEvery"
    condition = False

    def column(self, e: int) -> int:
        return (e + 1) % E


class TutorialOtherScoreRead(TutorialOtherScore):
    """Verdict: either. As TutorialOtherScore, read by example."""

    condition = True


class TutorialNotChosen(_Tutorial):
    """Verdict: either. Experts that were not chosen, with a score of 0 or a part of it: != for ==."""

    expect, near = Sound(), "TutorialEvery"
    condition = False

    def chosen(self, ids: Tensor, e: int) -> Tensor:
        return ~(ids == e).any(dim=-1)


class TutorialFirstChoice(_Tutorial):
    """Verdict: either. all() for any(): no token has an expert twice, so nothing is added."""

    expect, near = Sound(), "TutorialEvery"
    condition = False

    def chosen(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).all(dim=-1)


class TutorialOverTokens(_Tutorial):
    """Verdict: either. The softmax runs over the tokens."""

    expect, near = Sound(), "TutorialEvery"
    condition = False

    def dense(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = logits.topk(K, dim=-1)
        return F.softmax(torch.zeros_like(logits).scatter(-1, ids, top), dim=-2), ids


class TutorialAllWeights(_Tutorial):
    """Verdict: fused. Weights of all experts, of which those of the chosen ones are read."""

    expect = Fused(gating(), LIST_EXPERTS)

    def dense(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights = F.softmax(logits, dim=-1)
        return weights, weights.topk(K, dim=-1).indices


# Top-1 --------------------------------------------------------------------------------------------------------------------


class _Switch(ListCase):
    """Verdict: fused. w = softmax(l)[top1]; a token's row is put by the one expert that it has, and multiplied afterwards."""

    expect = Fused(TOP1, LIST_EXPERTS)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        p, ids = F.softmax(logits, dim=-1).max(dim=-1)
        return p, ids

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out[ids == e] = expert(x[ids == e])
        return out * w[:, None]


class SwitchMax(_Switch):
    """Verdict: fused. max over the probabilities, puts by mask."""


class SwitchOntoTokens(_Switch):
    """Verdict: fused as SwitchMax. Put onto a copy of the tokens: each of them has an expert, so that no row of the copy is left."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = x.clone()
        for e, expert in enumerate(self.experts):
            out[ids == e] = expert(x[ids == e])
        return out * w[:, None]


class SwitchOntoTokensButOne(_Switch):
    """Verdict: rejected. Tokens of the last expert pass by."""

    expect, near = Rejected("keep an old value"), "SwitchOntoTokens"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = x.clone()
        for e, expert in enumerate(self.experts[:-1]):
            out[ids == e] = expert(x[ids == e])
        return out * w[:, None]


class SwitchTopOne(_Switch):
    """Verdict: fused as SwitchMax. topk(1)."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        p, ids = F.softmax(logits, dim=-1).topk(1, dim=-1)
        return p.squeeze(-1), ids.squeeze(-1)


class SwitchArgmax(_Switch):
    """Verdict: fused as SwitchMax. argmax and gather; puts by lists of rows made before any expert runs."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = F.softmax(logits, dim=-1)
        ids = probabilities.argmax(dim=-1)
        return probabilities.gather(-1, ids[:, None]).squeeze(-1), ids

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        rows = [torch.eq(ids, e).nonzero(as_tuple=True)[0] for e in range(E)]
        results = [self.experts[e](x[rows[e], :]) for e in range(E)]
        for e in range(E):
            out[rows[e], :] = results[e]
        return out * w.view(-1, 1)


class SwitchHit(_Switch):
    """Verdict: fused as SwitchMax. `if rows.numel() == 0: continue`; the loop is read by example, ids and weights are [T]."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).nonzero().squeeze(-1)
            if rows.numel() == 0:
                continue
            out[rows] = expert(x[rows]) * w[rows].unsqueeze(-1)
        return out


class SwitchMaxAndArgmax(_Switch):
    """Verdict: fused as SwitchMax. max().values of the probabilities and argmax of the logits; index_add."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return F.softmax(logits, dim=-1).max(dim=-1).values, logits.argmax(dim=-1)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            (rows,) = torch.where(ids == e)
            out.index_add_(0, rows, expert(x[rows]) * w[rows, None])
        return out


class SwitchAmax(SwitchMaxAndArgmax):
    """Verdict: fused as SwitchMax. amax and argmax."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        p = F.softmax(logits, dim=-1)
        return p.amax(dim=-1), p.argmax(dim=-1)


class SwitchMaxOfSome(SwitchMaxAndArgmax):
    """Verdict: either. The weight is the maximum over half of the experts."""

    expect, near = Sound(), "SwitchAmax"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        p = F.softmax(logits, dim=-1)
        return p[:, : E // 2].amax(dim=-1), p.argmax(dim=-1)


class SwitchMaxOfFalling(SwitchMaxAndArgmax):
    """Verdict: either. The weight is the maximum of 1 - p, which is another expert's."""

    expect, near = Sound(), "SwitchAmax"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        p = F.softmax(logits, dim=-1)
        return (1 - p).amax(dim=-1), p.argmax(dim=-1)


class SwitchMaxOfBiased(SwitchMaxAndArgmax):
    """Verdict: either. The choice is by logits and a bias, the maximum is one without."""

    expect, near = Sound(), "SwitchAmax"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return F.softmax(logits, dim=-1).amax(dim=-1), (logits + self.bias).argmax(dim=-1)


class SwitchTwoPuts(_Switch):
    """Verdict: either. Two choices a token, put one after the other: the later expert wins."""

    expect, near = Sound(), "SwitchMax"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        p, ids = F.softmax(logits, dim=-1).topk(2, dim=-1)
        return p[:, 0], ids

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            out[mask] = expert(x[mask])
        return out * w[:, None]


class SwitchOnesLeft(_Switch):
    """Verdict: either. The last expert puts nothing, and the buffer held ones."""

    expect, near = Sound(), "SwitchMax"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.ones_like(x)
        for e, expert in enumerate(self.experts[: E - 1]):
            out[ids == e] = expert(x[ids == e])
        return out * w[:, None]


class SwitchNotChosen(_Switch):
    """Verdict: either. Rows of all other experts: the last two win."""

    expect, near = Sound(), "SwitchMax"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out[ids != e] = expert(x[ids != e])
        return out * w[:, None]


class SwitchPutElsewhere(_Switch):
    """Verdict: either. Each expert's rows are put where another expert's rows are read."""

    expect, near = Sound(), "SwitchMax"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out[ids.flip(0) == e] = expert(x[ids == e])
        return out * w[:, None]


# Writes to a part of the tokens or of the result --------------------------------------------------------------------------


class _Written(ListCase):
    """Verdict: fused. The block of RENORM over index_add, with x[:, 0] = 0 or the like around it, all in one function."""

    expect = Fused(RENORM, LIST_EXPERTS)
    routes_all = False  # what is written before and after is no part of the block

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        self.before(x)
        w, ids = self.weights_of(x)
        self.between(x)
        out = torch.zeros_like(x)
        old = out[:, :2]
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
            self.meanwhile(x, out, e)
        return self.after(out, old)

    def weights_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.route(self.logits(x))

    def before(self, x: Tensor) -> None:
        pass

    def between(self, x: Tensor) -> None:
        pass

    def meanwhile(self, x: Tensor, out: Tensor, e: int) -> None:
        pass

    def after(self, out: Tensor, old: Tensor) -> Tensor:
        return out


class WrittenBefore(_Written):
    """Verdict: fused. A column of the tokens is zeroed before anything reads them."""

    def before(self, x: Tensor) -> None:
        x[:, 0] = 0


class WrittenAfter(_Written):
    """Verdict: fused. A column of the result is zeroed."""

    def after(self, out: Tensor, old: Tensor) -> Tensor:
        out[:, 0] = 0
        return out


class _WrittenInside(_Written):
    expect, near, routes_all = Rejected("written through another view"), "DenseLoopOneHot", True


class WrittenBetween(_WrittenInside):
    """Verdict: rejected. A column of the tokens is zeroed after some experts have read them."""

    def meanwhile(self, x: Tensor, out: Tensor, e: int) -> None:
        if e == 3:
            x[:, 0] = 0


class WrittenAfterRouter(_WrittenInside):
    """Verdict: rejected. A column of the tokens is zeroed between router and experts, both of which read them."""

    def between(self, x: Tensor) -> None:
        x[:, 0] = 0


class WrittenInLoop(_WrittenInside):
    """Verdict: rejected. A column of the sum is zeroed after every expert."""

    def meanwhile(self, x: Tensor, out: Tensor, e: int) -> None:
        if e < E - 1:
            out[:, 0] = 0


class WrittenWeights(_WrittenInside):
    """Verdict: rejected. A column of the weights is zeroed."""

    def weights_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.route(self.logits(x))
        w = w.clone()
        w[:, 0] = 0
        return w, ids


class WrittenOldView(_WrittenInside):
    """Verdict: rejected. A view of the buffer from before the sum is read after a column of the result was written."""

    def after(self, out: Tensor, old: Tensor) -> Tensor:
        out[:, 0] = 3
        return out + old.sum()
