"""The torch.compile backend: passes first, then whoever compiles the rest."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import RestartAnalysis

from . import agreement, artifact, batches, buckets, divided, lowering, versions
from . import report as reports
from .alike import Verdict, among_ranks
from .errors import NotFused, OptionError
from .inner import compile_with
from .ir import Rejection
from .loops import capture, flags, hooks
from .lowering.target import Target
from .options import Options
from .reported import LEFT_GRAPH, Report, graph_break_of
from .snapshot import Snapshot

log = logging.getLogger("moe_compile")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_RESUMED = f" in {capture.RESUMED}"


def moe_fused(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend for ``torch.compile(model, backend="moe_fused", options={...}, mode=...)``.

    Replaces every Mixture-of-Experts block of `gm` that can be proved by fused ops, hands the graph to the inner compiler and
    returns what that makes of it. Options: see `moe_compile.options.Options`.
    Raises `OptionError` (a ValueError) on a wrong option and, with `strict=True`, `NotFused` where a block was left as written.
    """
    started = time.perf_counter()
    chosen = Options.parse(options, mode)
    target = lowering.target(target_of(gm, example_inputs, chosen))
    before = Snapshot(gm)
    if divided.puts_together(gm):
        chosen = chosen.with_(overlap_shared=False)  # rows of experts travel, those of the shared expert do not
    verdict, seconds = _fuse(gm, before, chosen, target)
    seconds["passes"] = time.perf_counter() - started
    blocks, rejected = verdict.blocks, verdict.rejected
    alike, topic = batches.shared(gm) if verdict.asked else [], agreement.topic_of(gm)
    part = Report()
    part.add_notes([*verdict.notes, *(target.remarks(gm, example_inputs) if target.remarks else ())])

    def inner() -> Callable[..., Any]:
        with reports.filling(part):
            return compile_with(chosen, mode, target, gm, example_inputs)

    compiled, failed = _compiled(inner, before, alone=not verdict.experts)
    if failed is not None:
        blocks, rejected = [], [*rejected, failed]
    seconds["total"] = time.perf_counter() - started
    unbuilt = _without_kernels(blocks, target)
    _note(part, target.name, blocks, rejected, unbuilt, seconds)
    _publish(part, gm, [*rejected, *unbuilt], verdict.strict)
    compiled = batches.compared(compiled, alike, verdict.talks, topic)
    return agreement.naming(compiled, verdict.talks) if verdict.talks else compiled


def _compiled(inner: Callable[[], Callable[..., Any]], before: Snapshot, alone: bool) -> tuple[Callable[..., Any], Rejection | None]:
    """What the inner compiler makes of the fused graph, or where it fails of the graph as written, and why.

    `alone`: whether this process may decide that; no rank may whose collectives are not those of the graph as written.
    """
    try:
        return inner(), None
    except (RestartAnalysis, OptionError):
        raise  # Dynamo's own way to say "trace once more"; what the user asked for cannot be had
    except Exception as e:
        if not alone or not before.restore():
            raise  # the graph is as the user wrote it: not our doing
        failed = _internal_error("the inner compiler failed on the fused graph", e)
        return inner(), failed


def _fuse(gm: torch.fx.GraphModule, before: Snapshot, chosen: Options, target: Target) -> tuple[Verdict, dict[str, float]]:
    """What is fused and what is not, told once, agreed upon by the ranks where they exchange experts; and the seconds of the passes."""
    blocks, rejected, seconds = _run_passes(gm, before, chosen, target)
    rejected = told_once(gm, rejected, loops_left([*(b.source for b in blocks), *_fused_at(gm)]))
    try:
        flags.check(gm, rejected)  # may ask for another trace, before the ranks are asked about this one
    except flags.Again:
        capture.not_told()
        raise
    verdict = among_ranks(gm, before, Verdict(blocks, rejected, chosen.strict))
    divided.exchange(gm, verdict.experts)
    return verdict, seconds


def _publish(part: Report, gm: torch.fx.GraphModule, rejected: list[Rejection], strict: bool) -> None:
    """The report of a graph of which it is now certain that it will run."""
    reports.add(part, gm)
    artifact.leave(part)
    missed = [r for r in rejected if r.stage != "find"]  # a top-k that chooses no experts is no MoE block
    if strict and missed:
        raise NotFused(missed)


def _reset() -> None:
    """torch._dynamo.reset() calls this; CUDA graphs of the inner compiler must go then, and what is told of dropped code."""
    versions.forget()
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


moe_fused.is_moe_fused = True  # type: ignore[attr-defined]
moe_fused.reset = _reset  # type: ignore[attr-defined]


def _run_passes(
    gm: torch.fx.GraphModule, before: Snapshot, options: Options, target: Target
) -> tuple[list[Any], list[Rejection], dict[str, float]]:
    """The passes behind a safety net: whatever goes wrong inside becomes a rejection and the graph is as it was."""
    try:
        from .passes import pipeline

        outcome = pipeline.run(gm, options, target)
        return list(outcome.blocks), list(outcome.rejected), dict(outcome.seconds)
    except Rejection as r:
        before.restore()
        return [], [r], {}
    except Exception as e:
        before.restore()
        return [], [_internal_error("the passes failed", e)], {}


def _internal_error(what: str, e: Exception) -> Rejection:
    """A fault of this package: the user's program goes on without it, and hears of it."""
    reason = f"internal error, {what}: {type(e).__name__}: {e}"
    log.warning("%s; the graph runs as written", reason, exc_info=True)
    return Rejection(reason, stage="internal")


def _without_kernels(blocks: list[Any], target: Target) -> list[Rejection]:
    """Blocks whose kernels cannot be had, which something slower runs: told by their lowering, and refused with strict=True."""
    if target.lacks is None:
        return []
    patience = 1.0 if reports.explaining() else None  # a compiler that is missing is known by then
    missing = []
    for i, b in enumerate(blocks):
        found = target.lacks(b.ir, patience)
        if found is not None:
            blocks[i] = dataclasses.replace(b, lowering=found[0])
            missing.append(Rejection(found[1], stage="lower", source=b.source))
    return missing


def _note(
    report: Report, target: str, blocks: list[Any], rejected: list[Rejection], unbuilt: list[Rejection], seconds: dict[str, float]
) -> None:
    report.add_blocks(blocks, target)
    report.add_rejected(rejected)
    report.add_notes(r.reason for r in unbuilt)
    report.add_seconds(seconds)
    for b in blocks:
        log.info("fused: %s for %s (%s)", b.source, target, b.lowering)
    for r in rejected:
        log.info("left as written: %s: %s [%s]", r.source or "unknown source", r.reason, r.stage)


def _fused_at(gm: torch.fx.GraphModule) -> set[str]:
    """file:line of every call that leads to experts that are fused: a function on that way needed no reading by example."""
    fused = (n for n in gm.graph.nodes if str(n.target).startswith("moe_compile.experts"))
    return {":".join(f) for n in fused for f in _FRAME.findall(_stack(n))}


def told_once(gm: torch.fx.GraphModule, seen: list[Rejection], left: list[Rejection]) -> list[Rejection]:
    """What the passes left in a graph and the loops that capture left, each block once: a loop whose body is in the graph is told as it is
    seen there, and a selection that leaves the graph by what stopped its loop from being captured, or by what ends the graph. The rest of
    a loop that was left is no block of its own, and a selection that goes into one is not told apart."""
    resumed = any(_RESUMED in _stack(n) for n in gm.graph.nodes)
    before = reports.told_before(gm) if resumed and any(r.stage == "rewrite" for r in seen) else []
    seen = [r for r in seen if r.stage != "rewrite" or not any(capture.holds(e.source, r.source) for e in before)]
    seen = [r for r in seen if r.code != "no block" or not _goes_into(gm, r, left)]
    blocks = [r for r in seen if r.code != LEFT_GRAPH]
    places = [p for r in blocks for p in _frames(r)]
    said = tuple(b.reason for b in blocks)  # a loop's may go on with a line
    loops = [r for r in left if not any(capture.holds(r.source, p) for p in places) and not r.reason.startswith(said)]
    told = blocks + loops if loops else seen
    if told and buckets.is_part():
        return [Rejection(f"{r.reason} ({buckets.ADVICE})", r.node, r.stage, r.source, code=r.code) for r in told]
    if loops:
        return told
    earlier = reports.told_before(gm) if blocks != seen else []
    around = _running() if earlier else []  # a function that Dynamo gave up runs in Python, and calls what is compiled here
    seen = [r for r in seen if r.code != LEFT_GRAPH or not any(capture.holds(e.source, p) for e in earlier for p in [*_frames(r), *around])]
    cut = graph_break_of(gm)
    why = "" if cut is None else f" ({cut.reason})"
    return [r if r.code != LEFT_GRAPH else Rejection(r.reason + why, r.node, r.stage, r.source, code=r.code) for r in seen]


def _frames(r: Rejection) -> list[str]:
    """file:line of a rejection, and of every call that leads to its node."""
    return [r.source, *(":".join(f) for f in _FRAME.findall(_stack(r.node)))]


def _running() -> list[str]:
    """file:line of every call in Python that is under way."""
    return [f"{f.f_code.co_filename}:{line}" for f, line in traceback.walk_stack(None)]


def _goes_into(gm: torch.fx.GraphModule, selection: Rejection, loops: Sequence[Rejection]) -> bool:
    """Whether something is made of what stands at the line of a selection inside the function of one of these loops."""
    made: set[torch.fx.Node] = set()
    for n in gm.graph.nodes if loops else ():
        at = [":".join(f) for f in _FRAME.findall(_stack(n))]
        if not made.isdisjoint(n.all_input_nodes) or at[-1:] == [selection.source]:
            made.add(n)
            if any(capture.holds(r.source, p) for r in loops for p in at):
                return True
    return False


def _stack(node: Any) -> str:
    return (node.meta.get("stack_trace") if isinstance(node, torch.fx.Node) else None) or ""


def of_no_graph(compiler_fn: Any) -> None:
    """A frame has been compiled: loops that were met in it and reached no graph are told of now, before another model is compiled, and so
    is that Dynamo gave up on it.

    Raises `NotFused` with `strict=True`.
    """
    left = loops_left(())
    if not left and not reports.untold():
        return
    part = Report()
    part.add_rejected(left)
    reports.add(part, None)
    missed = [r for r in left if r.stage != "find"]  # as in a graph: nothing proves that these were experts
    if missed and Options.parse(*hooks.asked(compiler_fn)).strict:
        raise NotFused(missed)


def loops_left(fused: Sequence[str]) -> list[Rejection]:
    """The expert loops that capture met since the last graph and left alone, and that no block at the `fused` sources covers.

    One for each loop and reason: Dynamo may trace the same loop several times.
    """
    left: dict[tuple[str, str], Rejection] = {}
    for r in capture.pending():
        if isinstance(r, Rejection) and not any(r.reason == reason and capture.holds(at, r.source) for at, reason in left):
            left[r.source, r.reason] = r
    return [r for r in left.values() if not any(capture.holds(r.source, s) for s in fused)]


def target_of(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> str:
    """The target for this graph: the option, or where the tensors are (an accelerator if there is one, else the CPU).

    A device that no target takes (such as "mps") is a name of its own, of a target that refuses everything.
    """
    if options.target != "auto":
        return options.target
    tensors = [t for t in [*example_inputs, *gm.parameters(), *gm.buffers()] if isinstance(t, Tensor)]
    return lowering.target_for({t.device.type for t in tensors})


lowering.own()  # the ops get their kernels
hooks.after_frame.append(of_no_graph)
hooks.around_others.append(reports.of_others)
hooks.install()  # torch.compile() imports this module before anything is traced
