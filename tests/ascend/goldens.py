"""The MoE nodes of a GE graph as recorded in `golden/`; RECORD=1 writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_compile.lowering.ascend.dry_run import GeNode

GOLDEN = Path(__file__).parent / "golden"
MOE = ("MoeGatingTopK", "MoeGatingTopKSoftmax", "MoeGatingTopKSoftmaxV2", "MoeInitRoutingV3", "GroupedMatmul", "SwiGlu", "ClippedSwiglu",
       "MoeFinalizeRoutingV2", "DequantSwigluQuant", "GroupedMatmulSwigluQuantV2", "DynamicQuant", "Bitcast",
       "MoeDistributeDispatchV2", "MoeDistributeCombineV2", "MoeUpdateExpert")  # fmt: skip


def as_recorded(name: str, nodes: Sequence[GeNode]) -> None:
    """Compare the MoE nodes with their golden."""
    got = json.loads(json.dumps([_plain(n) for n in nodes if n.type in MOE]))
    path = GOLDEN / f"{name}.json"
    if "RECORD" in os.environ:
        path.write_text(json.dumps(got, indent=1) + "\n", encoding="utf-8")
    assert got == json.loads(path.read_text(encoding="utf-8"))


def _plain(n: GeNode) -> dict[str, Any]:
    """Placeholders of absent lists as one word."""
    return {"type": n.type, "inputs": ["absent" if i.startswith("Fill") else i for i in n.inputs], "attrs": n.attrs}
