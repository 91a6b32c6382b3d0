"""What the compiler did, as data: a `Report`, filled graph by graph (`report` says which graph belongs to which)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .drawing import STYLE
from .findings import BlockReport, Findings, GraphBreak
from .ir import MoeBlock, Rejection
from .ir.text import exchange_text, experts_text, formula, shared_text
from .loops.capture import holds
from .loops.lines import is_given_up_for_one, line_given_up
from .report_html import fragment, page
from .table import render

LEFT_GRAPH = "left graph"  # code of a selection whose experts are in another graph, if anywhere
# refusals of a loop that is read by example, which each trace of it meets; of other blocks there may be as many as there are layers
_ONCE = frozenset(
    "read effects arguments record random confirm rows values modes hooks shared tensors guards repeats budget".split()
    + "experts inside unlike capacity".split()
)


class RecoveredLike(Protocol):
    """One block as the passes hand it over (`moe_compile.passes.pipeline.Recovered`)."""

    ir: MoeBlock
    source: str
    validated: bool
    lowering: str
    note: str


@dataclass
class Report(Findings):
    """What one compilation found, filled graph by graph; `str()` is a table, `to_dict()` is JSON-ready."""

    def __str__(self) -> str:
        return render(self)

    def to_html(self) -> str:
        """One self-contained page: each block drawn before and after, formulas, the lines of code, reasons, seconds of the passes."""
        return page(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"<style>{STYLE}</style>{fragment(self)}"

    # -- filled by the backend ------------------------------------------------------------------------------------------

    def add_blocks(self, recovered: Iterable[RecoveredLike], target: str) -> None:
        """Take over what the passes recovered; graph nodes become their names, so that no graph is kept alive."""
        for r in recovered:
            ir = dataclasses.replace(r.ir, boundary={k: _names(v) for k, v in r.ir.boundary.items()})
            self.blocks.append(
                BlockReport(
                    ir=ir,
                    formula=formula(ir.gating) if ir.gating is not None else f"as written: {ir.routing_note or 'routing not recovered'}",
                    experts=experts_text(ir.experts),
                    shared=_shared(r),
                    target=target,
                    lowering=r.lowering,
                    validated=r.validated,
                    source=r.source,
                    note=r.note,
                    exchange=exchange_text(ir.exchange),
                )
            )

    def add_rejected(self, rejected: Iterable[Rejection]) -> None:
        """Take over rejections without the graph nodes they point at, and with the code that `docs/declined.md` has a section for."""
        self.rejected.extend(Rejection(r.reason, None, r.stage, r.source, code=r.code or r.stage, part=r.part) for r in rejected)

    def add(self, part: Report) -> None:
        """Take over what was found in one more graph. A selection that left an earlier graph, and whose experts are fused in this one, is
        not left as written. What is left is told once: Dynamo may trace the same code several times."""
        for b in part.blocks:
            left = next((r for r in self.rejected if r.code == LEFT_GRAPH), None)
            if b.ir.gating is None and left is not None:
                self.rejected.remove(left)
            # the frame that broke in front of a loop was told by what stands beside it
            self.rejected = [r for r in self.rejected if r.code != "effects" or not holds(r.source, b.source)]
        self.blocks += part.blocks
        again = not part.graph_count  # a frame that gave no graph, of code that other frames have been tried with
        known = {(r.source, r.reason) for r in self.rejected if again or r.code in _ONCE}
        self.rejected += [r for r in part.rejected if (r.source, r.reason) not in known]
        self.graph_count += part.graph_count
        self.add_breaks(part.graph_breaks)
        self.add_seconds(part.seconds)
        self.add_notes(part.notes)

    def add_seconds(self, seconds: dict[str, float]) -> None:
        for k, v in seconds.items():
            self.seconds[k] = self.seconds.get(k, 0.0) + v

    def add_notes(self, notes: Iterable[str]) -> None:
        """What a target has to say; every remark once."""
        self.notes.extend(n for n in dict.fromkeys(notes) if n not in self.notes)

    def add_breaks(self, breaks: Iterable[GraphBreak]) -> None:
        """Layers share code, so the same break comes again for each of them: told once."""
        self.graph_breaks.extend(b for b in dict.fromkeys(breaks) if b not in self.graph_breaks)


def _shared(r: RecoveredLike) -> str:
    """The shared expert, and where it runs."""
    if r.ir.shared is None or not r.ir.shared.coded:
        return shared_text(r.ir.shared) + (", overlapped" if getattr(r, "overlapped", False) else "")
    return shared_text(r.ir.shared) + (", an op of its own" if getattr(r, "own", None) is not None else ", as written")


def _names(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_names(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


# -- graph breaks -----------------------------------------------------------------------------------------------------------


def graph_break_of(gm: torch.fx.GraphModule) -> GraphBreak | None:
    """Why Dynamo ended this graph, if it was a break.

    Read from the graph itself: Dynamo's own counters miss the breaks that come from data-dependent sizes.
    """
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return None
    stack = list(why.user_stack or [])
    # "step_unsupported" is Dynamo's word for "the rest of this frame runs in Python"
    reason = "the frame is left to Python from here on" if why.reason == "step_unsupported" else _headline(why.reason)
    return GraphBreak(reason, f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "")


def _headline(reason: str) -> str:
    """Dynamo's title and explanation on one line, without hints and links."""
    lines = [line.strip() for line in reason.strip().split("\n\n")[0].splitlines() if line.strip()]
    if not lines:
        return "Dynamo gives no reason"
    if lines[0].startswith("generic_jump"):  # Dynamo's name for an instruction of Python's
        return "an `if` or `while` on the values of a tensor"
    kept = [lines[0]] + [line.removeprefix("Explanation: ") for line in lines[1:] if line.startswith("Explanation:")]
    return ": ".join(kept)


def skipped_frame(message: str) -> GraphBreak | None:
    """The break that one of Dynamo's messages tells of; None if it is about another thing."""
    marker = "frame skipped: "
    if marker not in message:
        return None
    where = message.split(marker, 1)[1].split("\n", 1)[0]  # "forward (/path/file.py line 523)"
    name, _, place = where.partition(" (")
    path, _, line = place.rstrip(")").rpartition(" line ")
    frame, cause = f"{path}:{line}", _headline(message).rstrip(".")
    why = "" if "graph break in loop" in cause else f" ({cause})"
    whose = "modules of its class that are left as written" if is_given_up_for_one(frame) else "every module of its class"
    told = f"{name} holds a break inside a loop: it runs in plain Python, in {whose}; nothing in it is compiled{why}"
    return GraphBreak(told, line_given_up(frame) or frame)
