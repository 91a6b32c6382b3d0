"""The zoo on other versions of transformers: every MoE block fused and proved, with the logits of eager.

make test-compat                # a dozen architectures on each version, as CI has it
make test-compat COMPAT_ALL=1   # every architecture with every implementation
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import transformers
import zoo
import zoo_run

VERSION = os.environ["COMPAT"]
# One or more of each router class and expert form, with what transformers runs when nothing is asked for, and in turn the others; of these
# the oldest version has all, later ones the first
DOZEN = {
    "qwen2_moe": ("default",),
    "qwen3_moe": ("default", "batched_mm"),
    "mixtral": ("default", "eager"),
    "gemma4": ("default",),
    "granitemoe": ("default", "eager"),
    "gpt_oss": ("default", "eager", "batched_mm"),
    "afmoe": ("default", "eager"),
    "deepseek_v3": ("default", "batched_mm"),
    "deepseek_v2": ("default",),
    "ernie4_5_moe": ("default",),
    "minimax_m2": ("batched_mm",),
    "phimoe": ("default",),
}
LOOP = "its own loop over slices of sorted rows whose bounds are read from a tensor is not captured"
TABLE = "ids come from a table, and that they stay below the number of experts is not known"
# Left as written on these versions, and why; "" for every implementation
OLD = ("5.10", "5.17")
LEFT = {("aria", ""): LOOP, ("deepseek_v4+hash", "default"): TABLE, ("deepseek_v4+hash", "grouped_mm"): TABLE}
# Not to be run on these versions: transformers itself fails, or says other things in eager than under torch's own "eager" backend
BROKEN = {
    ("5.10", "dbrx"): "the size of its experts cannot be set",
    ("5.10", "nemotron_h"): "its attention layers have another name in the configuration",
    ("5.10", "deepseek_v2"): "its block fails in eager: no attribute num_experts",
    ("5.10", "deepseek_ocr2"): "its block fails in eager: no attribute num_experts",
    ("5.10", "glm_moe_dsa"): "its indexer keeps keys from call to call, other ones when compiled",
}


def cases() -> list[object]:
    every = "COMPAT_ALL" in os.environ
    some = None if OLD[0] == VERSION else 1
    pairs = [(e, i) for e in zoo.ENTRIES for i in (e.implementations if every else DOZEN.get(e.name, ())[:some])]
    return [pytest.param(e, i, id=f"{e.name}-{i}", marks=_marks(e.name, i)) for e, i in pairs]


def _marks(name: str, implementation: str) -> list[pytest.MarkDecorator]:
    if why := BROKEN.get((VERSION, name)):
        return [pytest.mark.skip(reason=f"transformers {VERSION}: {why}")]
    why = LEFT.get((name, implementation), LEFT.get((name, ""))) if VERSION in OLD else None
    return [pytest.mark.xfail(strict=True, raises=(AssertionError, ValueError), reason=why)] if why else []


def test_the_version_is_the_one_asked_for() -> None:
    assert transformers.__version__.startswith(f"{VERSION}.")


@pytest.mark.parametrize(("entry", "implementation"), cases())
@torch.no_grad()
def test_fused_as_everywhere(entry: zoo.Entry, implementation: str) -> None:
    if importlib.util.find_spec(f"transformers.models.{entry.package}") is None:
        pytest.skip(f"transformers {VERSION} does not have it")
    report, difference = zoo_run.run_both(entry, implementation, (2, 11))
    assert difference <= 1e-5
    assert len(report.blocks) == entry.blocks, [r.reason for r in report.rejected]
    assert all(b.validated for b in report.blocks)
    assert not entry.gating or all(b.ir.gating is not None for b in report.blocks)
