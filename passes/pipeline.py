"""The way through the passes: shadow, find, read the gating, validate, rewrite. `run` is what the backend calls."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from ..ir import MoeBlock, Rejection
from ..lowering import can_lower, lowering_name, prepare
from . import terms as T
from .aten.conditions import no_saving_hooks
from .aten.effects import Memory
from .aten.element import Puller, dtype_of
from .aten.shadow import Shadow, example_value
from .prove.claims import Claims, shared_claim
from .prove.emitted import emitted_claim
from .prove.engine import Claim, prove
from .prove.gradients import with_gradients
from .recover import materialise as held
from .recover import writes
from .recover.find import Finder
from .recover.fused import zero_gradients
from .recover.match import PARAMETERS, ExpertsMatch
from .recover.output_scale import Fold, fold_of, scaled
from .recover.region import Block, routing_nodes
from .recover.routing import GatingMatch, match_gating, where_valid
from .recover.shared import match_shared
from .rewrite import overlap, recall, router
from .rewrite.plan import BlockPlan, SharedPlan, execute
from .rewrite.planner import Planner
from .terms import unify
from .terms.deep import deep_recursion

__all__ = ["Outcome", "Recovered", "recover_recorded", "run"]


@dataclass
class Recovered:
    """One fused block. `source`: file:line of the user's code; `note`: what was left as written inside it.

    `overlapped`: the shared expert is in the op, which may run it beside the routed experts.
    """

    ir: MoeBlock
    source: str
    validated: bool
    lowering: str
    note: str = ""
    overlapped: bool = False


@dataclass
class Outcome:
    blocks: list[Recovered] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def run(gm: fx.GraphModule, options: Any, target: str) -> Outcome:
    """Recover, prove and replace every MoE block of a Dynamo graph, in place. What is not proved stays as it is.

    `options`: `moe_compile.options.Options`; `target`: "cpu", "cuda" or "ascend". Raises nothing that a user's model can cause.
    """
    out = Outcome()
    for body in bodies(gm):
        _merge(out, run(body, options.with_(overlap_shared=False), target))
    if not might_route(gm.graph):
        return out
    with _timed(out.seconds, "recall"):
        key = recall.key_of(gm.graph, (target, bool(options.validate), overlap.mode(gm.graph, options, target)))
        kept = recall.load(key)
    if kept is not None:
        plans, blocks, rejected = kept
        out.blocks.extend(blocks)
        out.rejected.extend(rejected)
    else:
        here = Outcome(seconds=out.seconds)
        plans = search(gm, options, target, here)
        recall.save(key, (plans, _portable(here.blocks), [_bare(r) for r in here.rejected]))
        out.blocks.extend(here.blocks)
        out.rejected.extend(here.rejected)
    for b in out.blocks:
        prepare(b.ir, target)
    with _timed(out.seconds, "rewrite"):
        if plans:
            execute(gm, plans)
            router.take_products(gm, target)
    return out


def bodies(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """Graphs inside this one that are called by a checkpoint: the same code, run once more in the backward pass."""
    found: list[fx.GraphModule] = []
    for n in gm.graph.nodes:
        body = getattr(gm, str(n.target), None) if n.op == "get_attr" else None
        if isinstance(body, fx.GraphModule) and any("checkpoint" in str(u.target) for u in n.users):
            found.append(body)
    return found


def _merge(out: Outcome, part: Outcome) -> None:
    out.blocks.extend(part.blocks)
    out.rejected.extend(part.rejected)
    for name, spent in part.seconds.items():
        out.seconds[name] = out.seconds.get(name, 0.0) + spent


def search(gm: fx.GraphModule, options: Any, target: str, out: Outcome) -> list[BlockPlan]:
    """Find and prove the blocks; what is found goes into `out`."""
    plans: list[BlockPlan] = []
    with deep_recursion(), no_saving_hooks():
        _fresh_terms()
        with _timed(out.seconds, "shadow"):
            shadow = Shadow(gm)
        with _timed(out.seconds, "recover"):
            found = Finder(shadow.graph, shadow.walls, shadow.memory).run()
            blocks = []
            for m, p in found.matches:
                try:
                    blocks.append(assemble(m, shadow, p))
                except T.TooLarge as e:
                    found.rejected.append(Rejection(str(e), m.out))
        out.rejected.extend(_located(r, shadow) for r in found.rejected)
        planner = Planner(shadow)
        for b in blocks:
            plan = _take(b, planner, options, target, out)
            if plan is not None:
                plans.append(plan)
        _fresh_terms()
    return plans


def _portable(blocks: list[Recovered]) -> list[Recovered]:
    """Blocks without graph nodes: names only."""

    def name(v: Any) -> Any:
        return v.name if isinstance(v, fx.Node) else [name(x) for x in v] if isinstance(v, list) else v

    return [replace(b, ir=replace(b.ir, boundary={k: name(v) for k, v in b.ir.boundary.items()})) for b in blocks]


def _bare(r: Rejection) -> Rejection:
    return Rejection(r.reason, None, r.stage, r.source, code=r.code, part=r.part)


def _fresh_terms() -> None:
    T.reset()
    unify.reset()


def might_route(graph: fx.Graph) -> bool:
    """Whether a graph selects anything at all: a cheap look, so that other graphs cost nothing."""
    words = ("topk", "sort", "argmax", "max", "grouped_mm", "moe_compile")
    calls = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    return any(any(w in str(n.target) for w in words) or _looks_up_ids(n) for n in calls)


def _looks_up_ids(n: fx.Node) -> bool:
    """Whether a node reads rows of integers from a table: expert ids perhaps."""
    if not any(w in str(n.target) for w in ("getitem", "index", "embedding", "gather")):
        return False
    v = example_value(n)
    return isinstance(v, torch.Tensor) and v.ndim >= 2 and v.dtype in (torch.int64, torch.int32)


def _take(b: Block, planner: Planner, options: Any, target: str, out: Outcome) -> BlockPlan | None:
    """Validate and plan one block, or say why not."""
    refusal, plan = None, None
    reason = can_lower(b.ir, target)
    if reason is not None:
        refusal = Rejection(reason, b.match.out, "lower")
    else:
        with _timed(out.seconds, "validate"):
            b, refusal = _checked(b, planner.shadow, bool(options.validate))
    if refusal is None:
        try:
            b, plan = _planned(b, planner)
            if options.validate:
                with _timed(out.seconds, "validate"):
                    refusal = _emits_the_same(b, plan, planner.shadow)
        except Rejection as r:
            refusal = r
    if refusal is not None:
        out.rejected.append(_located(refusal, planner.shadow))
        return None
    assert plan is not None
    shared = _shared(b, planner, options, target, out)
    plan = replace(plan, shared=shared)
    source = block_source(b.match.out, b.gating.choice if b.gating is not None else b.raw_ids)
    note = "; ".join(filter(None, (b.ir.routing_note, zero_gradients(b.match, planner.shadow.dynamo.graph))))
    out.blocks.append(Recovered(b.ir, source, bool(options.validate), lowering_name(b.ir, target), note, shared is not None))
    return plan


def _planned(b: Block, planner: Planner) -> tuple[Block, BlockPlan]:
    """The plan of a block, with its routing as written where the op could not stand in for it; raises Rejection where there is no plan."""
    try:
        return b, planner.plan(b)
    except Rejection as r:
        if b.gating is None or b.ids is None or b.weights is None:
            raise
        kept = as_written(b, r.reason)
        return kept, planner.plan(kept)


def _shared(b: Block, planner: Planner, options: Any, target: str, out: Outcome) -> SharedPlan | None:
    """How the shared expert goes into the op of the block, where that is wanted and proved."""
    how = overlap.mode(planner.shadow.dynamo.graph, options, target)
    plan = None if how is None else overlap.plan_shared(b, planner, how)
    if plan is None or not options.validate:
        return plan
    assert b.shared is not None and b.shared.operands is not None
    with _timed(out.seconds, "validate"):
        claim = shared_claim(b.match.tokens, b.shared, b.shared.operands)
        return plan if isinstance(claim, Claim) and prove([claim], b.match.out) is None else None


def _checked(b: Block, shadow: Shadow, validate: bool) -> tuple[Block, Rejection | None]:
    """The block, with its routing as written where only that cannot be proved, and what is wrong with it."""
    try:
        refusal = _disproved(b, shadow, validate)
    except Rejection as r:
        refusal = r
    if refusal is not None and b.gating is not None and refusal.part == "routing":
        return _checked(as_written(b, refusal.reason), shadow, validate)
    return b, refusal


def _disproved(b: Block, shadow: Shadow, validate: bool) -> Rejection | None:
    """The first claim about the block that does not hold."""
    claims = Claims(b).of_meaning()
    elsewhere = next((r for c in claims if (r := written_elsewhere(c, b, shadow)) is not None), None)
    if elsewhere is not None:
        return elsewhere
    whole = [with_gradients(c, b, shadow, all_of_them=validate) for c in claims]
    refusal = prove([c for c in whole if isinstance(c, Claim) and (validate or c.leaves)], b.match.out)
    return refusal or next((r for r in whole if isinstance(r, Rejection)), None)


def _emits_the_same(b: Block, plan: BlockPlan, shadow: Shadow) -> Rejection | None:
    claim = emitted_claim(b, plan, shadow)
    return prove([claim], b.match.out) if isinstance(claim, Claim) else claim


def written_elsewhere(claim: Claim, b: Block, shadow: Shadow) -> Rejection | None:
    """Whether a tensor of the block is written through another view: its name in the shadow does not tell its value."""
    seen = {*claim.region.edge, *claim.region.nodes}
    if writes.harmless(shadow.memory, seen, b.match):
        return None
    what = {"routing": "the routing", "experts": "the experts"}.get(claim.part, "the block")
    return Rejection(f"{what} has a tensor that is written through another view", b.match.out, "validate", code="aliased", part=claim.part)


def assemble(m: ExpertsMatch, shadow: Shadow, p: Puller) -> Block:
    """Everything about one block; a number that scales the combined result becomes a part of the weights where they are recovered."""
    fold = fold_of(m, shadow)
    block = _assemble(m, shadow, p, m.out if fold.last is None else fold.last)
    if fold.last is None or block.gating is None:
        return block
    gating = replace(block.gating, gating=scaled(block.gating.gating, fold.factor))
    return replace(block, gating=gating, ir=replace(block.ir, gating=gating.gating), fold=fold)


def _assemble(m: ExpertsMatch, shadow: Shadow, p: Puller, result: fx.Node) -> Block:
    """The gating, the shared expert (added to `result`), the nodes at the boundary."""
    nodes = routing_nodes(m, p)
    ids, weights = nodes.ids, nodes.weights
    found = match_gating(m, shadow.walls)
    masked = False
    if isinstance(found, Rejection) and ids is not None and (valid := where_valid(m)) is not None:
        again = match_gating(valid, shadow.walls)
        found, masked = (again, True) if isinstance(again, GatingMatch) else (found, False)
    gating: GatingMatch | None = found if isinstance(found, GatingMatch) else None
    note = found.reason if isinstance(found, Rejection) else ""
    if gating is not None and weights is not None:
        gating.gating = replace(gating.gating, weight_dtype=dtype_of(weights))
    shared = None if writes.touched(shadow.memory, m) else match_shared(m, result, shadow.order, shadow.walls)
    ir = MoeBlock(None if gating is None else gating.gating, m.experts, None if shared is None else shared.ir, note)
    ir.boundary.update(tokens=m.tokens, ids=ids, weights=weights, out=m.out, base=m.base)
    ir.boundary.update({name: [q.node for q in getattr(m, name)] for name in PARAMETERS})
    if gating is not None:
        ir.boundary.update(logits=gating.logits, bias=gating.bias, expert_scale=gating.expert_scale)
    return Block(m, gating, ir, ids, weights, nodes.raw, shared, nodes.twins, masked=masked, wraps=nodes.wraps)


def as_written(b: Block, note: str) -> Block:
    """The same block with its routing left alone."""
    return replace(b, gating=None, ir=replace(b.ir, gating=None, routing_note=note), fold=Fold(), masked=False)


# ---- loops read by example ---------------------------------------------------------------------------------------------


def recover_recorded(gm: fx.GraphModule) -> Recovered | Rejection:
    """Experts of a recorded function: ATen calls with `meta["val"]`. With `gm.meta["roles"]` ids [T, k] are among its placeholders,
    without them the router is in the recording too.

    The result's `ir.boundary` maps tokens, ids, weights, up, down, up_bias, down_bias, base to nodes of `gm`, `views` to the
    shapes in which flattened parameters are read.
    """
    with deep_recursion():
        for _ in range(3):  # ids and weights may have to be put into tensors of their own
            _fresh_terms()
            found = Finder(gm.graph, set(), Memory(gm.graph), id_inputs="roles" in gm.meta).run()
            if not found.matches:
                return found.rejected[0] if found.rejected else Rejection("the recorded function takes no expert ids", None, "record")
            (m, p), *more = found.matches
            if more:
                return Rejection("the recorded function holds more than one block of experts", m.out, "record")
            nodes = routing_nodes(m, p)
            if not held.hold(m, p, nodes):
                break
        ids, weights = nodes.ids, nodes.weights
        if ids is None or weights is None:
            return Rejection("no tensor of the recorded function holds its ids or weights", m.out, "record")
        if nodes.wraps:
            return Rejection("ids that index expert weights may be negative", m.out, "record")
        count, possible = m.experts.num_experts + m.experts.num_identity, T.upper(m.ids) if m.ids.op == "topk" else None
        if possible is not None and possible >= count:
            return Rejection(f"only {count} of {possible + 1} experts were hit when it was recorded", m.out, "record")
        ir = MoeBlock(None, m.experts, None, "")
        ir.boundary.update(tokens=m.tokens, ids=ids, weights=weights, out=m.out, base=m.base)
        for name in PARAMETERS:
            ir.boundary[name] = [q.node for q in getattr(m, name)]
        ir.boundary["views"] = {q.node: q.view for group in m.groups() for q in group if q.view is not None}
        block = Block(m, None, ir, ids, weights, ids, None, nodes.twins)
        try:
            refusal = prove(Claims(block, given=True).of_meaning(), m.out)
        except Rejection as r:
            refusal = r
        return refusal if refusal is not None else Recovered(ir, "", True, "")


# ---- sources -----------------------------------------------------------------------------------------------------------

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def _frames(n: Any) -> list[tuple[str, str]]:
    trace = n.meta.get("stack_trace") if isinstance(n, fx.Node) else None
    return _FRAME.findall(trace or "")


def source_of(n: Any) -> str:
    """file:line of the innermost frame of the user's code that made a node, or ""."""
    frames = _frames(n)
    return ":".join(frames[-1]) if frames else ""


def block_source(out: fx.Node, choice: fx.Node | None) -> str:
    """The line of the function that holds both the routing and the experts: where their stacks part."""
    a, b = _frames(out), _frames(choice)
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    frame = a[min(common, len(a) - 1)] if a else None
    return ":".join(frame) if frame else ""


def _located(r: Rejection, shadow: Shadow) -> Rejection:
    n = r.node
    if n in shadow.transformed:
        r = Rejection("a transform of torch.func (vmap, grad, jvp, ...) is on around it", n, r.stage)
    if not r.source and isinstance(n, fx.Node):
        r.source = source_of(n) or next((source_of(d) for d in shadow.origin.get(n, ()) if source_of(d)), "")
    return r
