"""The passes themselves: each does one thing to the work on a graph, or to one block; Rejection says that a block goes no further."""

from __future__ import annotations

from dataclasses import replace

import torch.fx as fx

from ..ir import MoeBlock, Rejection
from . import trace
from .aten.element import Puller, dtype_of
from .aten.nearby import nodes_near
from .aten.shadow import Shadow
from .aten.sources import block_source
from .prove.claims import Claims, shared_claim
from .prove.emitted import emitted_claim
from .prove.engine import Claim, prove
from .prove.gradients import with_gradients
from .prove.placed import disproved
from .recover import writes
from .recover.exchange import exchange_of
from .recover.find import LEAVES
from .recover.fused import zero_gradients
from .recover.match import ExpertsMatch
from .recover.output_scale import Fold, fold_of, scaled
from .recover.placed import placed
from .recover.region import Block, routing_nodes
from .recover.routing import GatingMatch, match_gating, where_valid
from .recover.shared import SharedMatch, match_shared
from .rewrite import activations, alone, casts, kept, overlap, router
from .rewrite.plan import BlockPlan, execute
from .work import Candidate, Recovered, Work


def shadow(work: Work) -> None:
    work.read = Shadow(work.gm, nodes_near(work.gm.graph, work.seen.chosen, work.seen.routers))


def find(work: Work) -> None:
    s = work.shadow
    found = trace.finder(s.graph, s.walls, s.memory).run()
    work.candidates = [Candidate(m, p) for m, p in found.matches]
    work.reject(_told_of_transforms(r, s) for r in found.rejected)


def _told_of_transforms(r: Rejection, shadow: Shadow) -> Rejection:
    if r.code != LEAVES or not shadow.transformed:
        return r
    at = next(iter(sorted(shadow.transformed, key=shadow.order.__getitem__)))
    reason = "a transform of torch.func (vmap, grad, jvp, ...) is on where experts are computed: it is not looked through"
    return Rejection(reason, at, r.stage, code="transform")


# ---- routing, shared expert, boundary ------------------------------------------------------------------------------------


def assemble(work: Work, c: Candidate) -> Candidate:
    """Everything about one block; a number that scales the combined result becomes a part of the weights where they are recovered."""
    m, s = c.match, work.shadow
    fold = fold_of(m, s)
    block = _assembled(m, s, c.puller, m.out if fold.last is None else fold.last)
    if fold.last is not None and block.gating is not None:
        gating = replace(block.gating, gating=scaled(block.gating.gating, fold.factor))
        block = replace(block, gating=gating, ir=replace(block.ir, gating=gating.gating), fold=fold)
    return replace(c, found=block)


def _assembled(m: ExpertsMatch, shadow: Shadow, p: Puller, result: fx.Node) -> Block:
    """The gating, the shared expert (added to `result`), the nodes at the boundary."""
    nodes = routing_nodes(m, p)
    ids, weights = nodes.ids, nodes.weights
    found = match_gating(m, shadow.walls)
    masked = False
    if isinstance(found, Rejection) and ids is not None and (valid := where_valid(m)) is not None:
        again = match_gating(valid, shadow.walls)
        found, masked = (again, True) if isinstance(again, GatingMatch) else (found, False)
    place, raw = (None if ids is None else placed(m, ids, shadow.walls)), nodes.raw
    if isinstance(found, Rejection) and place is not None:
        found, raw = match_gating(replace(m, ids=place.chosen), shadow.walls), place.raw
    gating: GatingMatch | None = found if isinstance(found, GatingMatch) else None
    note = found.reason if isinstance(found, Rejection) else ""
    if gating is not None and nodes.partly and not masked:
        weights = None
    if gating is not None and weights is not None:
        gating.gating = replace(gating.gating, weight_dtype=dtype_of(weights))
    shared = None if writes.touched(shadow.memory, m) else match_shared(m, result, shadow.order, shadow.walls)
    told = m.experts if place is None else replace(m.experts, ids_mapped=True)
    ir = MoeBlock(None if gating is None else gating.gating, told, None if shared is None else shared.ir, note)
    ir.boundary.update(tokens=m.tokens, ids=ids, weights=weights, out=m.out, base=m.base)
    ir.boundary.update(m.nodes())
    if gating is not None:
        ir.boundary.update(logits=gating.logits, bias=gating.bias, expert_scale=gating.expert_scale)
    return Block(m, gating, ir, ids, weights, raw, shared, nodes.twins, masked=masked, wraps=nodes.wraps, placed=place)


def as_written(b: Block, note: str) -> Block:
    """The same block with its routing left alone."""
    return replace(b, gating=None, ir=replace(b.ir, gating=None, routing_note=note), fold=Fold(), masked=False)


# ---- capability and proof ------------------------------------------------------------------------------------------------


def lower(work: Work, c: Candidate) -> Candidate:
    reason = work.target.reason(c.block.ir)
    if reason is not None:
        raise Rejection(reason, c.match.out, "lower")
    return c


def hold(work: Work, c: Candidate) -> Candidate:
    """The block as far as it is proved: its routing as written where only that cannot be."""
    try:
        refusal = _disproved(work, c.block)
    except Rejection as r:
        refusal = r
    if refusal is None:
        return c
    if c.block.gating is None or refusal.part != "routing":
        raise refusal
    return hold(work, replace(c, found=as_written(c.block, refusal.reason)))


def _disproved(work: Work, b: Block) -> Rejection | None:
    """The first claim about the block that does not hold."""
    validate = bool(work.options.validate)
    claims = Claims(b).of_meaning()
    elsewhere = next((r for c in claims if (r := written_elsewhere(c, b, work.shadow)) is not None), None)
    if elsewhere is not None:
        return elsewhere
    whole = [with_gradients(c, b, work.shadow, all_of_them=validate) for c in claims]
    refusal = proved([c for c in whole if isinstance(c, Claim) and (validate or c.leaves)], b)
    return refusal or next((r for r in whole if isinstance(r, Rejection)), None)


def proved(claims: list[Claim], b: Block) -> Rejection | None:
    refusal = prove(claims, b.match.out)
    trace.claims(claims, refusal)
    return refusal


def written_elsewhere(claim: Claim, b: Block, shadow: Shadow) -> Rejection | None:
    """Whether a tensor of the block is written through another view: its name in the shadow does not tell its value."""
    seen = {*claim.region.edge, *claim.region.nodes}
    if writes.harmless(shadow.memory, seen, b.match):
        return None
    what = {"routing": "the routing", "experts": "the experts"}.get(claim.part, "the block")
    return Rejection(f"{what} has a tensor that is written through another view", b.match.out, "validate", code="aliased", part=claim.part)


# ---- plan and rewrite ----------------------------------------------------------------------------------------------------


def plan(work: Work, c: Candidate) -> Candidate:
    """How the block is rewritten, with its routing as written where the op could not stand in for it."""
    b = c.block
    try:
        return replace(c, how=work.planner.plan(b))
    except Rejection as r:
        if b.gating is None or b.ids is None or b.weights is None:
            raise
        kept = as_written(b, r.reason)
        return replace(c, found=kept, how=work.planner.plan(kept))


def emit(work: Work, c: Candidate) -> Candidate:
    """What the plan emits is what the block computes; ids come out of a table of replicas where the target has an op for that."""
    if not work.options.validate:
        return _with_places(work, c)
    claim = emitted_claim(c.block, c.plan, work.shadow)
    refusal = proved([claim], c.block) if isinstance(claim, Claim) else claim
    if refusal is not None:
        raise refusal
    return _with_places(work, c)


def _with_places(work: Work, c: Candidate) -> Candidate:
    """The plan with the physical ids made of the logical ones and the table, where that is wanted and proved, else as they are."""
    b, p = c.block, c.block.placed
    if not work.target.places or p is None or p.how is None or b.ids is None:
        return c
    why = disproved(p, b.ids)
    try:
        how = c.plan if why else work.planner.placed(b, c.plan)
    except Rejection as r:
        how, why = c.plan, r.reason
    return replace(c, how=how, found=replace(b, placed=replace(p, how=None, why=why)) if why else b)


def share(work: Work, c: Candidate) -> Candidate:
    """The shared expert goes into the op of the block, or in few bits becomes one of its own, where that is wanted and proved."""
    shared = c.block.shared
    if shared is not None and shared.ir.coded:
        why, own = _alone(work, c, shared)
        return replace(c, how=own, stays=why)
    how = overlap.mode(work.gm.graph, work.options, work.target)
    taken = overlap.takes(c.match.experts, work.target)
    found = overlap.plan_shared(c.block, work.planner, how) if how is not None and taken else None
    if found is not None and work.options.validate:
        assert c.block.shared is not None and c.block.shared.operands is not None
        claim = shared_claim(c.match.tokens, c.block.shared, c.block.shared.operands)
        found = found if isinstance(claim, Claim) and proved([claim], c.block) is None else None
    return replace(c, how=replace(c.plan, shared=found))


def _alone(work: Work, c: Candidate, s: SharedMatch) -> tuple[str, BlockPlan]:
    """Why a shared expert in few bits runs as written, "" where it does not; the plan."""
    why = alone.stays(s, work.planner, work.options, work.target)
    if why or s.operands is None:
        return why, c.plan
    if work.options.validate:
        claim = shared_claim(c.match.tokens, s, s.operands)
        refusal = proved([claim], c.block) if isinstance(claim, Claim) else claim
        if refusal is not None:
            return refusal.reason, c.plan
    try:
        return "", replace(c.plan, alone=alone.plan_alone(c.block, s.operands, work.planner))
    except Rejection as r:
        return r.reason, c.plan


def keep(work: Work, c: Candidate) -> Candidate:
    """What is told of the block, and its plan among those that are carried out."""
    b = c.block
    source = block_source(b.match.out, b.gating.choice if b.gating is not None else b.raw_ids)
    out, tokens = (work.shadow.origin.get(n) for n in (b.match.out, b.match.tokens))
    exchange = exchange_of(tokens[0], out[0]) if tokens and out else None
    ir, rows = activations.requested(replace(b.ir, exchange=exchange), work.options.activations, work.target)
    places = f"physical experts stay a gather: {b.placed.why}" if work.target.places and b.placed is not None and b.placed.why else ""
    shared = f"the shared expert as written: {c.stays}" if c.stays else ""
    note = "; ".join(filter(None, (b.ir.routing_note, zero_gradients(b.match, work.gm.graph), rows, places, shared)))
    own = None if c.plan.alone is None or b.shared is None or b.shared.operands is None else alone.block_of(b.shared.operands)
    told = Recovered(ir, source, bool(work.options.validate), work.target.says(ir), note, c.plan.shared is not None, own)
    work.plans.append(c.plan)
    work.out.blocks.append(told)
    return replace(c, told=told)


def rewrite(work: Work) -> None:
    if work.plans:
        execute(work.gm, work.plans)
        activations.apply(work.gm.graph, work.options.activations)
        router.take_products(work.gm, work.target)
        casts.leave_narrow(work.gm, work.target)
        kept.keep_tokens(work.gm)
