"""MoE blocks of transformers' models, one for each class of routing, for the Ascend tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import zoo

ENTRIES = {e.name: e for e in zoo.ENTRIES}
# router class -> an entry of it; sigmoid, softmax, groups, biases, top-k first, weights on the input, identity experts
CLASSES = {
    "R1": "qwen3_moe",
    "R1 without renormalisation": "jamba",
    "R1 with a table": "gemma4",
    "R1 of lists": "dbrx",
    "R2": "gpt_oss",
    "R3": "afmoe",
    "R3 in two places": "minimax_m2",
    "R3 with a bias on the logits": "kolibri1",
    "R4": "deepseek_v3",
    "R4 filled with 0": "axk2",
    "R5": "deepseek_v2",
    "R6": "ernie4_5_moe",
    "R6 with identity experts": "longcat_flash",
    "R7": "llama4",
}


def block(name: str, implementation: str = "default") -> nn.Module:
    """The first module of an entry's model that holds experts and takes hidden states alone."""
    model = ENTRIES[name].build(implementation)
    return next(m for m in model.modules() if hasattr(m, "experts") and not isinstance(m, nn.ModuleList))


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def compiled(fn: Callable[..., Any], dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend="moe_fused", dynamic=dynamic, options={"target": "ascend", **options})


class Seen:
    """Collects every lowered graph while it is open."""

    def __init__(self) -> None:
        self.lowered: list[Any] = []

    def __enter__(self) -> Seen:
        from moe_compile.lowering.ascend import modes

        modes.SINKS.append(self.lowered.append)
        return self

    def __exit__(self, *_: object) -> None:
        from moe_compile.lowering.ascend import modes

        modes.SINKS.remove(self.lowered.append)

    def calls(self) -> list[str]:
        """Names of the npu ops of the first graph, in order."""
        graph = self.lowered[0].module.graph
        return [str(n.target).removeprefix("npu.").removesuffix(".default") for n in graph.nodes if str(n.target).startswith("npu.")]
