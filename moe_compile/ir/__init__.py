"""The meaning of a Mixture-of-Experts block: small frozen values, each its own oracle.

`evaluate` runs in plain torch in the dtype asked for (float64 by default). Every lowering on every target is tested
against it. Nothing here asks what a kernel can do.

Shapes used throughout: T tokens, E experts, k selected experts a token, H hidden size, I expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .exchange import Exchange, Way, evaluate_world
from .experts import Experts, Form, Overlap, SharedExpert
from .gating import BiasOn, Gating, Groups, MaxK, MinK, Norm, Normaliser, SumK, W, normalise
from .rows import Rows
from .score import Score, score
from .stored import Stored

__all__ = [
    "BiasOn", "Exchange", "Experts", "Form", "Gating", "Groups", "MaxK", "MinK", "MoeBlock", "Norm", "Normaliser", "Overlap",
    "Rejection", "Rows", "Score", "SharedExpert", "Stored", "SumK", "W", "Way", "evaluate_world", "normalise", "score",
]  # fmt: skip


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block: `gating` is None when the routing runs as the user wrote it (`routing_note` says why).

    `boundary` names the graph values at the edge (tokens, logits, ids, weights, parameters, result); it is not part of
    the meaning, so two blocks with the same maths compare equal. `exchange`: how rows reach experts of other ranks; `experts` are this
    rank's own then, and `evaluate_world` tells what each rank is to get.
    """

    gating: Gating | None
    experts: Experts
    shared: SharedExpert | None = None
    routing_note: str = ""
    exchange: Exchange | None = None
    boundary: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def evaluate(
        self,
        x: Tensor,
        logits: Tensor,
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        up_bias: Sequence[Tensor] = (),
        down_bias: Sequence[Tensor] = (),
        bias: Tensor | None = None,
        expert_scale: Tensor | None = None,
        add: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        **others: Sequence[Tensor],
    ) -> Tensor:
        """The oracle of the routed part: x [T, H], logits [T, E] -> [T, H]; the shared expert's output goes in as `add`.

        others: more of `Operands` by name.
        """
        if self.gating is None:
            raise ValueError("this block's routing was left as written: evaluate its experts with the ids and weights of the graph")
        w, ids = self.gating.evaluate(logits, bias, expert_scale, dtype)
        return self.experts.evaluate(x, ids, w, up, down, up_bias, down_bias, add, dtype, **others)


class Rejection(Exception):
    """Why something was left exactly as the user wrote it.

    An exception only so that `strict=True` and deep helpers can raise it; passes return it as a value.
    reason: one sentence naming the first failing predicate: for people, never for control flow. code: what the passes decide by, and part:
    which part of a block is concerned ("routing", "experts", "block", "shared", ...); "" where nothing depends on them.
    source: file:line of the user's code, or "". stage: the pass.
    """

    def __init__(self, reason: str, node: Any = None, stage: str = "recover", source: str = "", *, code: str = "", part: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.stage, self.source, self.code, self.part = reason, node, stage, source, code, part

    def __repr__(self) -> str:
        return f"Rejection({self.stage}: {self.reason} at {self.source or '?'})"
