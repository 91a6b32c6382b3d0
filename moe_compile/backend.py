"""The torch.compile backend: passes first, then whoever compiles the rest."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import RestartAnalysis

from . import report as reports
from .errors import NotFused, OptionError
from .inner import compile_with
from .ir import Rejection
from .loops import capture, flags, hooks
from .lowering import cpu_told
from .options import Options
from .snapshot import Snapshot

log = logging.getLogger("moe_compile")


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
    target = target_of(gm, example_inputs, chosen)
    before = Snapshot(gm)
    blocks, rejected, seconds = _run_passes(gm, before, chosen, target)
    rejected += loops_left([b.source for b in blocks])
    seconds["passes"] = time.perf_counter() - started
    flags.check(gm, rejected)
    report = reports.report_for(gm)
    report.add_notes(cpu_told.packed(gm, example_inputs))
    try:
        compiled = compile_with(chosen, mode, target, gm, example_inputs)
    except (RestartAnalysis, OptionError):
        raise  # Dynamo's own way to say "trace once more"; what the user asked for cannot be had
    except Exception as e:
        if not before.restore():
            raise  # the graph is as the user wrote it: not our doing
        rejected = [*rejected, _internal_error("the inner compiler failed on the fused graph", e)]
        blocks, compiled = [], compile_with(chosen, mode, target, gm, example_inputs)
    seconds["total"] = time.perf_counter() - started
    unbuilt = _without_kernels(blocks) if target == "cpu" else []
    _note(report, target, blocks, rejected, seconds)
    report.add_notes(r.reason for r in unbuilt)
    missed = [r for r in (*rejected, *unbuilt) if r.stage != "find"]  # a top-k that chooses no experts is no MoE block
    if chosen.strict and missed:
        raise NotFused(missed)
    return compiled


def _reset() -> None:
    """torch._dynamo.reset() calls this; CUDA graphs of the inner compiler must go then."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


moe_fused.is_moe_fused = True  # type: ignore[attr-defined]
moe_fused.reset = _reset  # type: ignore[attr-defined]


def _run_passes(
    gm: torch.fx.GraphModule, before: Snapshot, options: Options, target: str
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


def _without_kernels(blocks: list[Any]) -> list[Rejection]:
    """Blocks that run in plain torch because their kernels could not be built: told by their lowering, and refused with strict=True."""
    patience = 1.0 if reports.explaining() else None  # a compiler that is missing is known by then
    missing = []
    for i, b in enumerate(blocks):
        why = cpu_told.lacks(b.ir, patience)
        if why is not None:
            blocks[i] = dataclasses.replace(b, lowering=cpu_told.plain(b.ir))
            missing.append(Rejection(f"fused, but in plain torch, at about half the speed: {why}", stage="lower", source=b.source))
    return missing


def _note(report: reports.Report, target: str, blocks: list[Any], rejected: list[Rejection], seconds: dict[str, float]) -> None:
    report.add_blocks(blocks, target)
    report.add_rejected(rejected)
    report.add_seconds(seconds)
    for b in blocks:
        log.info("fused: %s for %s (%s)", b.source, target, b.lowering)
    for r in rejected:
        log.info("left as written: %s: %s [%s]", r.source or "unknown source", r.reason, r.stage)


def loops_left(fused: Sequence[str]) -> list[Rejection]:
    """The expert loops that capture met since the last graph and left alone, and that no block at the `fused` sources covers.

    One for each loop and reason: Dynamo may trace the same loop several times.
    """
    left = {(r.source, r.reason): r for r in capture.pending() if isinstance(r, Rejection)}
    return [r for r in left.values() if not any(reports.same_function(r.source, s) for s in fused)]


def target_of(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> str:
    """The target for this graph: the option, or where the tensors are (an accelerator if there is one, else the CPU).

    A device that no lowering knows (such as "mps") is its own target, so that `can_lower` says so.
    """
    if options.target != "auto":
        return options.target
    tensors = [t for t in [*example_inputs, *gm.parameters(), *gm.buffers()] if isinstance(t, Tensor)]
    kinds = {t.device.type for t in tensors}
    for device, target in (("npu", "ascend"), ("cuda", "cuda")):
        if device in kinds:
            return target
    return "cpu" if "cpu" in kinds or not kinds else min(kinds)


hooks.install()  # torch.compile() imports this module before anything is traced
