"""What a recovered expert region is, in terms of graph nodes: the boundary at which the rewrite cuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from ...ir import Experts
from ...ir.operands import Join, Operands
from .. import terms as T
from ..aten.element import Puller, shape_of
from ..terms import Term


@dataclass(frozen=True)
class Param:
    """One expert parameter operand: a node, seen as [E, ...] through `view` when it is stored flattened ([E*I, H]).

    `order`: its dims, once viewed, as the operand has them.
    """

    node: fx.Node
    view: tuple[Any, ...] | None = None
    order: tuple[int, ...] | None = None

    @staticmethod
    def shaped(node: fx.Node, shape: tuple[Any, ...]) -> Param:
        """A node seen in a shape, which may be its own."""
        return Param(node, None if shape_of(node) == shape else shape)

    def stored(self) -> tuple[Any, ...]:
        """The shape before it is put in order."""
        return shape_of(self.node) if self.view is None else self.view

    def shape(self) -> tuple[Any, ...]:
        stored = self.stored()
        return stored if self.order is None else tuple(stored[d] for d in self.order)


@dataclass
class ExpertsMatch:
    """Experts recovered at `out` (a shadow node of shape [T, H] or [..., H]).

    tokens: node whose rows, flattened to [T, H], are the expert inputs. ids, weight: terms in (t, j); the nodes that hold
    them are found by `routing_nodes`. base: node added to the result ([T, H] rows like `out`), or None.
    """

    experts: Experts
    out: fx.Node
    tokens: fx.Node
    ids: Term
    weight: Term
    t: Term
    j: Term
    k: int
    operands: Operands[Param]
    base: fx.Node | None = None
    join: Join | None = None

    def nodes(self) -> dict[str, list[fx.Node]]:
        """The parameters' nodes, by their names."""
        return {name: [q.node for q in group] for name, group in self.operands.by_name().items()}


def outermost(matches: list[tuple[ExpertsMatch, Puller]]) -> list[tuple[ExpertsMatch, Puller]]:
    """Without those whose result goes nowhere but into another one of the same selection: there the routing weight is still to come."""
    chosen = [{x.args[0] for x in T.walk(m.ids) if x.op == "topk"} for m, _ in matches]
    kept = []
    for i, (m, p) in enumerate(matches):
        later = (n for (n, _), c in zip(matches[i + 1 :], chosen[i + 1 :], strict=True) if c & chosen[i])
        if not any(_part_of(m.out, n) for n in later):
            kept.append((m, p))
    return kept


def _part_of(out: fx.Node, m: ExpertsMatch) -> bool:
    """Whether all that is made of `out` is the result of m."""
    seen: set[fx.Node] = set()
    stack = [out]
    while stack and len(seen) < 64:
        n = stack.pop()
        if n is m.out or n in seen:
            continue
        seen.add(n)
        if not n.users or n is m.tokens or n is m.base or n.op == "output":
            return False
        stack.extend(n.users)
    return not stack
