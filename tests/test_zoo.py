"""Every MoE architecture of transformers: recovered, proved, fused, and the logits are eager's."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
import zoo
import zoo_report
import zoo_run
from zoo_run import OPTIONS, relative_difference

import moe_compile

pytest.importorskip("transformers")

OWN_DEFAULT = ("openai_privacy_filter",)  # any other decorated model runs grouped_mm when it is left alone: one case tests both
IMPLEMENTATIONS = [
    (e, i) for e in zoo.ENTRIES for i in e.implementations if i != "grouped_mm" or e.name in OWN_DEFAULT or "COVERAGE_DOC" in os.environ
]
# (batch, tokens): each architecture runs as one sequence and as two, its implementations in turn; no size is a power of two, none a width
SHAPES = {"default": (2, 11), "eager": (1, 7), "batched_mm": (2, 11), "grouped_mm": (1, 7)}
ONE_IMAGE = ("dots3_note+vision",)  # of two, transformers' own loop over images breaks the graph
# Of one implementation only. Of jetmoe `make zoo`: it is whole, and two sequences are the harder case
ONE_SEQUENCE_TOO = ("dbrx", "longcat_flash", "llama4", "step3p7", *(("jetmoe",) if zoo_run.EVERY else ()))
WAITS: dict[tuple[str, int], str] = {}
# CI runs each model as it comes, and its other experts implementations for one of each form.
# `make golden` and `make zoo` run them all.
EACH = ("qwen2_moe", "mixtral", "gpt_oss", "afmoe", "deepseek_v3", "phimoe")


def waiting(name: str, batch: int) -> list[pytest.MarkDecorator]:
    """Marks what is known to be left as written today, so that it is noticed when it heals."""
    why = WAITS.get((name, batch))
    return [] if why is None else [pytest.mark.xfail(strict=True, raises=AssertionError, reason=why)]


CASES = [
    pytest.param(e, i, shape, id=f"{e.name}-{i}-{shape[0]}x{shape[1]}", marks=waiting(e.name, shape[0]))
    for e, i in IMPLEMENTATIONS
    if zoo_run.EVERY or i == e.implementations[0] or e.name in (*EACH, *ONE_SEQUENCE_TOO)
    for shape in ([SHAPES[i], (1, 7)] if e.name in ONE_SEQUENCE_TOO else [(1, 7)] if e.name in ONE_IMAGE else [SHAPES[i]])
]
DECODED = ("gpt_oss", "afmoe", "deepseek_v3", *(("qwen3_moe", "mixtral", "dbrx") if zoo_run.EVERY else ()))


def test_the_golden_file_has_no_stale_lines() -> None:
    assert not (problem := golden.stale("zoo", [f"{e.name}/{i}" for e, i in IMPLEMENTATIONS])), problem


@pytest.fixture(scope="session")
def verdicts() -> Iterator[list[zoo_report.Verdict]]:
    """Collects what every case found; with COVERAGE_DOC set the document is written from it at the end."""
    collected: list[zoo_report.Verdict] = []
    yield collected
    if path := os.environ.get("COVERAGE_DOC"):
        Path(path).write_text(zoo_report.render(collected), encoding="utf-8")


def told(report: Any) -> str:
    return f"{len(report.blocks)} blocks, rejected {[r.reason for r in report.rejected]}, breaks {[b.reason for b in report.graph_breaks]}"


def check_blocks(entry: zoo.Entry, report: Any) -> None:
    """What the report has to say: every block fused and validated, with its routing where that is asked for."""
    assert len(report.blocks) == entry.blocks, told(report)
    assert all(b.validated for b in report.blocks)
    if entry.blocks == 0:
        assert report.rejected and all(r.reason for r in report.rejected), told(report)
    if entry.gating:
        assert all(b.ir.gating is not None for b in report.blocks), [b.formula for b in report.blocks]


@pytest.mark.parametrize(("entry", "implementation", "shape"), CASES)
@torch.no_grad()
def test_inference(entry: zoo.Entry, implementation: str, shape: tuple[int, int], verdicts: list[zoo_report.Verdict]) -> None:
    report, difference = zoo_run.run_both(entry, implementation, shape)
    assert difference <= 1e-5, told(report)
    check_blocks(entry, report)
    problem = golden.problem(f"zoo/{entry.name}/{implementation}", golden.verdict(report))
    assert not problem, problem
    verdict = zoo_report.verdict_of(entry, implementation, report)
    verdicts.append(verdict)
    if "COVERAGE_DOC" not in os.environ:
        assert zoo_report.disagreement(entry, verdict, zoo_report.DOCUMENT.read_text(encoding="utf-8")) == ""


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in zoo.ENTRIES if e.name in DECODED])
@torch.no_grad()
def test_decoding_with_a_kv_cache(entry: zoo.Entry) -> None:
    """A prompt, then single tokens: T = 1 has its own graph, and the MoE blocks are fused in it too."""
    from transformers import DynamicCache

    model = entry.build()
    compiled = torch.compile(model, backend="moe_fused", options=OPTIONS)
    tokens = entry.make_inputs(tokens=8)["input_ids"]
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 8)):
        expected, actual = (f(input_ids=tokens[:, start:end], past_key_values=c).logits for f, c in zip((model, compiled), caches))
        assert relative_difference(actual, expected) <= 1e-5
        if start == 5:
            check_blocks(entry, moe_compile.last_report())


def decorated_packages() -> set[str]:
    """Packages of transformers whose experts are decorated with `use_experts_implementation`."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    files = (Path(spec.origin).parent / "models").glob("*/modeling_*.py")
    return {f.parent.name for f in files if re.search(r"^@use_experts_implementation", f.read_text(encoding="utf-8"), re.M)}


def test_no_architecture_is_forgotten() -> None:
    known = {e.package for e in zoo.ENTRIES} | set(zoo.EXCLUDED)
    assert decorated_packages() <= known


def test_the_settings_bite() -> None:
    """Decorated entries follow `experts_implementation`; every block of an entry has experts and, where grouped, groups that exclude."""
    for entry in zoo.ENTRIES:
        for implementation in entry.implementations:
            model = entry.build(implementation)
            experts = [m for m in model.modules() if hasattr(m, "is_concatenated")]  # set by the decorator
            assert bool(experts) == (entry.implementations == zoo.DECORATED), entry.name
            if implementation == "default" and experts:
                left_alone = {m.config._experts_implementation for m in experts}
                assert (left_alone == {"grouped_mm"}) is (entry.name not in OWN_DEFAULT), entry.name
            if implementation != "default":
                assert {m.config._experts_implementation for m in experts} == {implementation}, entry.name
        if entry.router in ("R4", "R5") and "topk_group" in entry.kwargs:
            gates = [m for m in model.modules() if hasattr(m, "num_group") and hasattr(m, "topk_group")]
            assert gates and all(g.topk_group < g.num_group and g.num_experts > g.num_group for g in gates), entry.name


def test_the_coverage_document_is_whole() -> None:
    if "COVERAGE_DOC" in os.environ:
        pytest.skip("the document is being written")
    text = zoo_report.DOCUMENT.read_text(encoding="utf-8")
    assert text.startswith(zoo_report.HEAD)
    rows = zoo_report.rows_in(text)
    assert set(rows) == {e.name for e in zoo.ENTRIES} | set(zoo.EXCLUDED)
    assert [rows[e.name][5] for e in zoo.ENTRIES] == [", ".join(e.implementations) for e in zoo.ENTRIES]
    assert [rows[n][1] for n in zoo.EXCLUDED] == list(zoo.EXCLUDED.values())
