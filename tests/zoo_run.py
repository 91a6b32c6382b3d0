"""Running a zoo model compiled beside eager: the whole model, or its MoE blocks alone."""

from __future__ import annotations

import os
from typing import Any

import torch
import zoo
from torch import Tensor, nn

import moe_compile

EVERY = any(name in os.environ for name in ("ZOO_ALL", "GOLDEN_WRITE", "COVERAGE_DOC", "COMPAT_ALL"))
OPTIONS, PLAIN = {"inner": "aot_eager"}, {"inner": "eager"}
# Compiled within the whole model as it comes, and through AOTAutograd: one of each expert form, and where the shared expert stands outside
# of the block or the block is odd. Of the others, and of other experts implementations, the blocks alone, since attention and norms are
# most of Dynamo's time (`make zoo`: all whole as they come)
WHOLE = (
    *("qwen2_moe", "mixtral", "aria", "gpt_oss", "minimax_m3_vl", "afmoe", "deepseek_v3", "nemotron_h", "phimoe", "inkling", "zaya"),
    *("gemma4", "granitemoe_swa", "granitemoeshared", "granitemoehybrid", "deepseek_v4+hash", "muse_spark"),
)
# Compiled whole as they come, since there is more than the blocks to find: selections of attention, blocks without a name, a shared expert
SEEN_WHOLE = ("jetmoe", "ernie4_5_vl_moe", "deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note", "mistral_large4")


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| over max|b|; NaN counts as infinite."""
    difference = float((a - b).abs().max() / b.abs().max())
    return difference if difference == difference else float("inf")


class Blocks(nn.Module):
    """The MoE blocks of a model alone: the innermost modules that hold router and experts, each with what the model calls it with."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        names = [n.rpartition(".")[0] for n, _ in model.named_modules() if n.rpartition(".")[2] == "experts"]
        met: list[tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]] = []  # some have experts that these inputs do not meet
        hooks = [model.get_submodule(n).register_forward_pre_hook(lambda m, a, k: met.append((m, (a, k))), with_kwargs=True) for n in names]
        model(**inputs)
        for h in hooks:
            h.remove()
        self.blocks, self.calls = nn.ModuleList(m for m, _ in met), [call for _, call in met]

    def forward(self, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Tensor]:
        outputs = [b(*args, **kwargs) for b, (args, kwargs) in zip(self.blocks, calls)]
        return [o[0] if isinstance(o, tuple) else o for o in outputs]


def run_both(entry: zoo.Entry, implementation: str, shape: tuple[int, int]) -> tuple[Any, float]:
    """The report, and the relative difference from eager, of the whole model or of its blocks."""
    model, inputs = entry.build(implementation), entry.make_inputs(*shape)
    options = OPTIONS if entry.name in WHOLE else PLAIN
    named = any(n.rpartition(".")[2] == "experts" for n, _ in model.named_modules())  # not so in every version of transformers
    whole = EVERY or entry.name in (*WHOLE, *SEEN_WHOLE) if implementation == "default" else EVERY and entry.name in WHOLE
    if whole or not named:
        expected = [zoo.output_of(model(**inputs))]
        actual = [zoo.output_of(torch.compile(model, backend="moe_fused", options=options)(**inputs))]
    else:
        alone = Blocks(model, inputs)
        expected = alone(alone.calls)
        actual = torch.compile(alone, backend="moe_fused", options=options)(alone.calls)
    return moe_compile.last_report(), max(relative_difference(a, e) for a, e in zip(actual, expected, strict=True))
