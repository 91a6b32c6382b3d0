"""What a recovered expert region is, in terms of graph nodes: the boundary at which the rewrite cuts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from ...ir import Experts
from ...ir.operands import CODED, Operands
from ..terms import Term


@dataclass(frozen=True)
class Param:
    """One expert parameter operand: a node, seen as [E, ...] through `view` when it is stored flattened ([E*I, H])."""

    node: fx.Node
    view: tuple[Any, ...] | None = None


PARAMETERS = CODED


@dataclass
class ExpertsMatch:
    """Experts recovered at `out` (a shadow node of shape [T, H] or [..., H]).

    tokens: node whose rows, flattened to [T, H], are the expert inputs. ids, weight: terms in (t, j); the nodes that hold
    them are found by `routing_node`. base: node added to the result ([T, H] rows like `out`), or None.
    """

    experts: Experts
    out: fx.Node
    tokens: fx.Node
    ids: Term
    weight: Term
    t: Term
    j: Term
    k: int
    up: list[Param]
    down: list[Param]
    up_bias: list[Param]
    down_bias: list[Param]
    base: fx.Node | None = None
    up_scale: list[Param] = field(default_factory=list)
    down_scale: list[Param] = field(default_factory=list)
    up_zero: list[Param] = field(default_factory=list)
    down_zero: list[Param] = field(default_factory=list)
    up_table: list[Param] = field(default_factory=list)
    down_table: list[Param] = field(default_factory=list)

    def operands(self) -> Operands[Param]:
        return Operands.of(self)

    def groups(self) -> tuple[tuple[Param, ...], ...]:
        """Every list of parameters."""
        return self.operands().groups()
