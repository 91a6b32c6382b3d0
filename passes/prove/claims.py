"""What is claimed of a block: its experts and its routing are the recovered formula, and so is its shared expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...ir import Experts, Rejection
from ...ir.operands import Operands
from ..recover.fused import is_fused
from ..recover.match import Param
from ..recover.region import Block
from ..recover.shared import SharedMatch, SharedOperands
from . import probe
from .edge import edge_of, edge_of_shared
from .engine import Claim, Differs, Env
from .region import Region

Side = Callable[[Env], Tensor]


class Claims:
    """The claims of one block. `given`: its ids come from outside, where they repeat none and lie in range.

    Raises Rejection where a region reads something that nobody knows.
    """

    def __init__(self, block: Block, given: bool = False) -> None:
        self.block = block
        self.edge = edge_of(block, mapped=block.match.experts.ids_mapped and not given)

    def of_meaning(self) -> list[Claim]:
        """Experts and routing where tensors lie between the two, else the whole; experts that are fused already were proved then."""
        b = self.block
        routed = b.gating is not None and b.raw_ids is not None
        if is_fused(b.match.out):
            return [self.routing()] if routed and b.weights is not None else []
        if b.ids is not None and (b.weights is not None or b.constant is not None):
            return [self.experts(), *([self.routing()] if routed else [])]
        if b.gating is None:
            what = "ids" if b.ids is None else "weights"
            why = f"{b.ir.routing_note or 'the routing was not recovered'}, and which tensor holds the experts' {what} could not be told"
            advice = "give the loop over the experts a function of its own, of tokens, ids and weights"
            raise Rejection(f"{why}: {advice}", b.match.out, "region")
        return [self.whole()]

    def claim(self, part: str, says: str, edge: list[fx.Node], outs: list[fx.Node], seen: Side, meant: Side, kinds: Any = None) -> Claim:
        region = Region.between(edge, outs)
        if isinstance(region, Rejection):
            raise region
        b = self.block
        key = (replace(b.ir, boundary={}), b.fold.factor, b.masked, b.wraps)
        return Claim(part, says, self.edge, region, seen, meant, key, probe.kinds(self.edge) if kinds is None else kinds)

    def experts(self) -> Claim:
        b = self.block
        says = "the experts and the recovered formula disagree"
        outs = [b.match.out] if b.ends is None or b.ids is None else [b.match.out, b.ids]
        return self.claim("experts", says, b.expert_inputs(), outs, lambda env: env[b.match.out], partial(_experts_of_graph, b))

    def routing(self) -> Claim:
        b = self.block
        outs = [n for n in (b.raw_ids, b.weights, b.ids if b.masked else None) if n is not None]
        says = "the routing and the recovered formula disagree"
        return self.claim("routing", says, b.routing_inputs(), outs, partial(_graph_weights, b), partial(_formula_weights, b), probe.USUAL)

    def whole(self) -> Claim:
        b = self.block
        given = [b.match.tokens, b.match.base, *b.params(), *b.routing_inputs()]
        edge = [n for n in dict.fromkeys(given) if n is not None]
        says = "the block and the recovered formula disagree"
        return self.claim("block", says, edge, [b.match.out], partial(_scaled_result, b), partial(_block_of_formula, b), probe.USUAL)


def shared_claim(tokens: fx.Node, s: SharedMatch, o: SharedOperands) -> Claim | Rejection:
    """The graph's own shared expert is the one that goes into the op."""
    edge = edge_of_shared(tokens, o)
    region = Region.between(list(edge.roles), [s.node])
    if isinstance(region, Rejection):
        return region
    says = "the shared expert and the recovered formula disagree"
    key = (o.experts, o.gate is None)
    return Claim("shared", says, edge, region, lambda env: env[s.node], partial(_shared_formula, tokens, o), key, probe.USUAL[:2])


# ---- experts ------------------------------------------------------------------------------------------------------------


def _experts_of_graph(b: Block, env: Env) -> Tensor:
    """The formula on the ids and weights that the graph has."""
    assert b.ids is not None
    ids = (env[b.ids].remainder(b.match.experts.num_experts) if b.wraps else env[b.ids]).reshape(-1, b.match.k)
    if b.weights is None:
        assert b.constant is not None
        return _formula(b, env, ids, torch.full(ids.shape, b.constant, dtype=torch.float64))
    return _formula(b, env, ids, env[b.weights].reshape(-1, b.match.k))


def _formula(b: Block, env: Env, ids: Tensor, w: Tensor) -> Tensor:
    m, e = b.match, env.small.experts
    add = None if m.base is None else env[m.base].reshape(-1, e.out_features)
    x = env[m.tokens].reshape(-1, e.hidden)
    p = values(env, m.operands)
    p = p if m.join is None else m.join.of(p, lambda ts: torch.cat(ts, -2), beside)
    return e.run(x, ids, w, p, add, torch.float64)


def beside(matrices: Sequence[Tensor], numbers: Sequence[float]) -> Tensor:
    """[c_0 m_0, c_1 m_1, ...]."""
    return torch.cat([c * t for c, t in zip(numbers, matrices, strict=True)], -1)


def values(env: Env, operands: Operands[Param]) -> Operands[Tensor]:
    """Parameters as the formula reads them."""

    def value(q: Param) -> Tensor:
        view = env.small.views[q]
        t = env[q.node] if view is None else env[q.node].reshape(view)
        return t if q.order is None else t.permute(q.order)

    return operands.map(value)


def _shared_formula(tokens: fx.Node, o: SharedOperands, env: Env) -> Tensor:
    e: Experts = env.small.experts
    x = env[tokens].reshape(-1, e.hidden)
    ids = torch.zeros(x.shape[0], 1, dtype=torch.int64)
    weights = torch.ones(x.shape[0], 1, dtype=torch.float64) if o.gate is None else env[o.gate].reshape(-1, 1)
    return e.run(x, ids, weights, values(env, o.operands), None, torch.float64)


# ---- routing ------------------------------------------------------------------------------------------------------------


def routing_values(b: Block, env: Env) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logits [T, E], bias [E], expert scale [E]."""
    g = b.gating
    assert g is not None
    logits = env[g.logits].reshape(-1, g.gating.num_experts)
    bias, table = (None if n is None else env[n].reshape(-1) for n in (g.bias, g.expert_scale))
    return logits, bias, table


def graph_choice(b: Block, env: Env) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [T, k], weights [T, k], where ids are experts at all) of the graph."""
    assert b.gating is not None and b.raw_ids is not None and b.weights is not None
    k = b.gating.gating.k
    ids, weights = env[b.raw_ids].reshape(-1, k), env[b.weights].reshape(-1, k)
    valid = torch.ones_like(ids, dtype=torch.bool)
    if b.masked and b.ids is not None:
        mapped, e = env[b.ids].reshape(-1, k), b.match.experts
        valid = (mapped >= e.first) & (mapped < e.first + e.num_experts + e.num_identity)
    return ids, weights, valid


def _graph_weights(b: Block, env: Env) -> Tensor:
    _, weights, valid = graph_choice(b, env)
    return weights * valid * b.fold.factor


def _formula_weights(b: Block, env: Env) -> Tensor:
    """The recovered weights of the experts that the graph chose, which must be a top-k of the recovered criterion (any one at ties)."""
    assert b.gating is not None
    g = b.gating.gating
    ids, _, valid = graph_choice(b, env)
    logits, bias, table = routing_values(b, env)
    choice, raw = g.selection(logits, bias, torch.float64)
    best = choice.topk(g.k, dim=-1).values
    chosen = choice.gather(-1, ids).sort(-1, descending=True).values
    if bool((ids.sort(-1).values.diff(dim=-1) == 0).any()) or not torch.allclose(chosen, best, rtol=1e-9, atol=1e-12):
        raise Differs("other experts are selected")
    return g.weights_of(raw, ids, bias, table) * valid


def _scaled_result(b: Block, env: Env) -> Tensor:
    return env[b.match.out] * b.fold.factor


def _block_of_formula(b: Block, env: Env) -> Tensor:
    assert b.gating is not None
    w, ids = b.gating.gating.evaluate(*routing_values(b, env))
    return _formula(b, env, ids, w)
