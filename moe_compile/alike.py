"""Ranks that exchange rows leave the same graphs as written: what one of them cannot prove, or refuses, is refused on all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import agreement, divided
from .agreement import Talk, Word
from .ir import Rejection
from .snapshot import Snapshot


@dataclass(frozen=True)
class Verdict:
    """What becomes of a graph. `talks`: the groups whose ranks exchange rows in it; `notes`: of ranks that were not heard.
    `experts`: the fused ops whose rows travel in place of their weights (`divided`). `asked`: whether all ranks have made this one.
    """

    blocks: list[Any]
    rejected: list[Rejection]
    strict: bool
    talks: Sequence[Talk] = ()
    notes: tuple[str, ...] = ()
    experts: Sequence[torch.fx.Node] = ()
    asked: bool = False

    def missed(self) -> list[Rejection]:
        return [r for r in self.rejected if r.stage != "find"]  # a top-k that chooses no experts is no MoE block

    def word(self) -> dict[str, Any]:
        return {
            "fused": [len(self.blocks), [divided.stacks(n) for n in self.experts]],
            "left": [r.reason for r in self.missed()],
            "strict": self.strict,
        }


def among_ranks(gm: torch.fx.GraphModule, before: Snapshot, own: Verdict) -> Verdict:
    """The verdict of all ranks, in graphs whose collectives are those of an exchange of this package; else `own`.

    Where ranks fused different blocks the graph is put back on all of them. Where one of them is strict all are. Graphs of other shapes
    follow what was agreed for the first one (`key_of`). Raises RuntimeError where other collectives are to stand in for those of the
    graph and a rank does not answer, or cannot do what was agreed.
    """
    talks = agreement.of_graph(gm)
    if not talks:
        return own
    own = replace(own, talks=talks, experts=divided.divided(gm))
    topic, key = agreement.topic_of(gm), key_of(gm)
    if not agreement.first_of_its_code() and (not divided.puts_together(gm) or all(key in t.settled for t in talks)):
        own = replace(own, experts=_as_before(talks, topic, key, own.experts))
        return replace(own, blocks=_with_exchange(own))
    others, silent = agreement.agree(talks, topic, own.word())
    if silent and divided.puts_together(gm):
        raise RuntimeError(f"ranks must agree upon what travels in a graph, experts or rows: {'; '.join(silent)}")
    found = _common(before, replace(own, notes=tuple(f"{s}; this rank goes on by itself" for s in silent)), others)
    for t in talks:
        t.settled[key] = [divided.stacks(n) for n in found.experts]
    return replace(found, blocks=_with_exchange(found), asked=not silent)


def _with_exchange(v: Verdict) -> list[Any]:
    """The blocks, told of how their rows travel from now on. (A model whose experts are divided has no others.)"""
    if len(v.experts) != len(v.blocks):
        return v.blocks
    how = [divided.how(n) for n in v.experts]
    return [replace(b, ir=replace(b.ir, exchange=e)) for b, e in zip(v.blocks, how, strict=True)]


def _common(before: Snapshot, own: Verdict, others: Sequence[Word]) -> Verdict:
    differ = [o for o in others if o["fused"] != own.word()["fused"]]
    own = replace(own, strict=own.strict or any(o["strict"] for o in others))
    if differ:
        before.restore()
        return replace(own, blocks=[], experts=(), rejected=[*own.rejected, _told(differ[0], len(own.blocks))])
    left = [o for o in others if o["left"]]
    if own.strict and left and not own.missed():
        return replace(own, rejected=[*own.rejected, _told(left[0], len(own.blocks))])
    return own


def key_of(gm: torch.fx.GraphModule) -> str:
    """What the ranks agree upon: the place of a graph, the weights it puts together, and modes. These are a program's; shapes and numbers
    that code was compiled for are a rank's own."""
    modes = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
    return repr((agreement.topic_of(gm), [divided.name_of(n) for n in gm.graph.nodes if divided.is_whole(n)], modes))


def _as_before(talks: Sequence[Talk], topic: str, key: str, experts: Sequence[torch.fx.Node]) -> Sequence[torch.fx.Node]:
    """Code that is compiled again, for a rank's own shapes, exchanges the rows of those blocks that the ranks agreed upon: nobody else may
    be compiling. Raises RuntimeError where this rank cannot."""
    agreed = {name for t in talks for name in t.settled.get(key, [])}
    own = {divided.stacks(n): n for n in experts}
    if missing := agreed - own.keys():
        rank, first = talks[0].rank, min(missing)
        said = f"{len(agreed)} blocks exchange rows in {topic}, as the ranks agreed"
        raise RuntimeError(f"{said}; compiled again on rank {rank}, that of {first} cannot, and a rank cannot decide that alone")
    return [n for name, n in own.items() if name in agreed]


def _told(other: Word, fused: int) -> Rejection:
    why = f" ({other['left'][0]})" if other["left"] else ""
    ours = f"rank {other['rank']} fused {other['fused'][0]} of this graph's blocks and this rank {fused}{why}"
    return Rejection(f"{ours}: ranks leave a graph as written alike", stage="ranks", code="ranks")
