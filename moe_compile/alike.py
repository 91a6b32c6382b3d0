"""Ranks that exchange rows leave the same graphs as written: what one of them cannot prove, or refuses, is refused on all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import agreement
from .agreement import Talk, Word
from .ir import Rejection
from .snapshot import Snapshot


@dataclass(frozen=True)
class Verdict:
    """What becomes of a graph. `talks`: the groups whose ranks exchange rows in it; `notes`: of ranks that were not heard."""

    blocks: list[Any]
    rejected: list[Rejection]
    strict: bool
    talks: Sequence[Talk] = ()
    notes: tuple[str, ...] = ()

    def missed(self) -> list[Rejection]:
        return [r for r in self.rejected if r.stage != "find"]  # a top-k that chooses no experts is no MoE block


def among_ranks(gm: torch.fx.GraphModule, before: Snapshot, own: Verdict) -> Verdict:
    """The verdict of all ranks, in graphs whose collectives are those of an exchange of this package; else `own`.

    Where ranks fused different blocks the graph is put back on all of them. Where one of them is strict all are.
    """
    talks = agreement.of_graph(gm)
    if not talks:
        return own
    own = replace(own, talks=talks)
    if not agreement.first_of_its_code():
        return own
    word = {"fused": len(own.blocks), "left": [r.reason for r in own.missed()], "strict": own.strict}
    others, silent = agreement.agree(talks, agreement.topic_of(gm), word)
    differ = [o for o in others if o["fused"] != word["fused"]]
    own = replace(own, strict=own.strict or any(o["strict"] for o in others), notes=tuple(silent))
    if differ:
        before.restore()
        return replace(own, blocks=[], rejected=[*own.rejected, _told(differ[0], len(own.blocks))])
    left = [o for o in others if o["left"]]
    if own.strict and left and not own.missed():
        return replace(own, rejected=[*own.rejected, _told(left[0], len(own.blocks))])
    return own


def _told(other: Word, fused: int) -> Rejection:
    why = f" ({other['left'][0]})" if other["left"] else ""
    reason = f"rank {other['rank']} fused {other['fused']} of this graph's blocks and this rank {fused}{why}: ranks leave a graph as written alike"
    return Rejection(reason, stage="ranks", code="ranks")
