"""Dense combines: outputs of all experts for all tokens, weighed by what a selection scattered."""

from __future__ import annotations

import functools
from typing import Any

import torch.fx as fx

from .. import terms as T
from ..aten import names
from ..aten.element import Puller
from ..aten.names import op_name
from ..terms import Term
from .rows import WORDS, data_dependent, is_row, nodes_of, outer_atoms


class DenseReader:
    """Looks into tensors that hold the outputs of experts for all tokens, down to the tokens and the parameters.

    A dense combine multiplies every expert's output by a scattered weight; those outputs do not depend on the selection,
    so the experts' pass stops there. The router's own inputs mark where to stop.
    """

    def __init__(self, walls: set[fx.Node], limit: int, given: frozenset[fx.Node], selection: fx.Node | None) -> None:
        self.walls, self.limit, self.given, self.selection = walls, limit, given, selection

    @functools.cached_property
    def inner(self) -> Puller:
        p = Puller(lambda n: n in self.edge or WORDS in n.meta, self.walls, self.limit)
        p.given = self.given
        return p

    @functools.cached_property
    def edge(self) -> set[fx.Node]:
        """Nodes the selection is computed from: tokens among them, experts' outputs never."""
        out: set[fx.Node] = set()
        frontier: list[Any] = [] if self.selection is None else list(self.selection.all_input_nodes)
        while frontier and len(out) < 400:
            n = frontier.pop()
            if n not in out:
                out.add(n)
                frontier.extend(n.all_input_nodes)
        return out

    def __call__(self, body: Term) -> Term:
        for _ in range(40):
            mapping = {a: self.look(a) for a in outer_atoms(body) if self.hides_experts(a)}
            mapping = {k: v for k, v in mapping.items() if k is not v}
            if not mapping:
                return body
            body = T.subst(body, mapping)
        return body

    def hides_experts(self, a: Term) -> bool:
        n = nodes_of(a)[0]
        if not isinstance(n, fx.Node) or n.op != "call_function" or op_name(n) in names.CREATION or WORDS in n.meta:
            return False
        row = (
            any(is_row(a, d) for d in range(len(a.args[1])))
            if isinstance(a.args[0], fx.Node)
            else any(v.args[0] == "t" for i in a.args[1] if not data_dependent(i) for v in i.atoms)
        )
        feature = (
            any(v.args[0] == "h" for i in a.args[1] for v in i.atoms) or len(a.args[1]) > 2 and any(data_dependent(i) for i in a.args[1])
        )
        return row and feature and n not in self.edge

    def look(self, a: Term) -> Term:
        nodes, idx = a.args
        if isinstance(nodes, tuple):  # one tensor for each expert, stacked
            out = T.const(0)
            for e in range(len(nodes) - 1, -1, -1):
                out = T.ite(T.eq(idx[0], T.const(e)), self.inner.at(nodes[e], idx[1:]), out)
            return out
        return self.inner.at(nodes, idx)
