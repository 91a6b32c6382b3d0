"""What one compilation found, as plain data: blocks, rejections, graph breaks, remarks, seconds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from .ir import MoeBlock, Rejection


@dataclass(frozen=True)
class BlockReport:
    """One Mixture-of-Experts block that was recovered and fused.

    `ir` is the meaning, `formula`, `experts`, `shared` and `exchange` (how rows reach experts of other ranks) say it in text; `source` is
    file:line of the user's code.
    """

    ir: MoeBlock
    formula: str
    experts: str
    shared: str
    target: str
    lowering: str
    validated: bool
    source: str
    note: str = ""
    exchange: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the IR included."""
        d = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "ir"}
        return {**d, "ir": _plain(self.ir)}


@dataclass(frozen=True)
class GraphBreak:
    """One place where Dynamo cut the graph: the reason in Dynamo's words (first sentence) and file:line of the user's code."""

    reason: str
    source: str

    def to_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


@dataclass
class Findings:
    """Everything one compilation found, over all of its graphs; `to_dict()` is JSON-ready.

    seconds: "total" (this backend and the inner compiler), "passes" (ours alone), "validate" (part of "passes"), and what else
    the passes measured. notes: remarks of the target's lowering.
    """

    blocks: list[BlockReport] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    graph_count: int = 0
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def fused(self) -> bool:
        """Every block that was seen was fused, and Dynamo delivered the model whole."""
        return bool(self.blocks) and not self.rejected and not self.graph_breaks

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: plain dicts, lists, strings, numbers."""
        return {
            "blocks": [b.to_dict() for b in self.blocks],
            "rejected": [{"reason": r.reason, "source": r.source, "code": r.code, "part": r.part, "stage": r.stage} for r in self.rejected],
            "graph_count": self.graph_count,
            "graph_breaks": [b.to_dict() for b in self.graph_breaks],
            "seconds": {k: round(v, 6) for k, v in self.seconds.items()},
            "notes": list(self.notes),
        }


def _plain(value: Any) -> Any:
    """Dataclasses, enums, dtypes, expressions and tensors' names as JSON-ready values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "name") and hasattr(value, "value"):
        return value.name.lower()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
