"""docs/coverage.md: written from the verdicts of a test run, read back by the tests to see that it is still true.

    COVERAGE_DOC=docs/coverage.md python -m pytest tests/test_zoo.py        # writes the document anew

Without the variable every test compares its own verdict with the committed row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zoo

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
COLUMNS = ("architecture", "class", "routing", "experts", "shared expert", "implementations", "verdict")
OR = " **or** "  # between the forms that the implementations of one architecture take
FUSED, EXPERTS_ONLY, LEFT = "fused", "experts fused, routing as written", "left as written"

HEAD = """# Coverage

Every Mixture-of-Experts architecture of transformers 5.23 as a tiny random model: does the backend recover, prove and fuse all of its
MoE blocks, and are the logits those of eager (float32, 1e-5 relative)? This file is generated from the test run
(`COVERAGE_DOC=docs/coverage.md python -m pytest tests/test_zoo.py`), and every test compares its result with its row here.

*implementations*: the values of transformers' `experts_implementation` that passed, `default` meaning left alone; models whose
experts ignore that setting have `default` only. In the formulas *l* is the router logits, *b* a selection bias per expert, *c* a
scale per expert, Σ the sum over the selected experts. Where a model is not built as the whole causal LM, its name says which part is.

Router classes: R1 softmax then top-k (R1g: own norm and scales, R1d: p-norm), R2 top-k then softmax, R3 score with selection bias
(R3': no bias, or bias on the logits), R4 is R3 with groups of experts, R5 softmax with groups, R6 softmax with selection bias, R7 dense
sigmoid gate on the input, R8 sparsemixer, R9 joint normalisation with the shared experts, R10 hashed token ids, R12 other.
Expert forms: X1 stacked gate-up, X2 transposed, X3 interleaved with clamps, X4 clamps, X5 other activation or numerics, X6 every
expert on every token, X7 a loop of its own.

"""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of one case: what the report said of the model's MoE blocks."""

    name: str
    implementation: str
    routing: str
    experts: str
    shared: str
    verdict: str


def verdict_of(entry: zoo.Entry, implementation: str, report: Any) -> Verdict:
    """Condense a report: equal layers are told once, in order of appearance."""
    blocks = report.blocks

    def once(texts: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(t.replace("|", "¦") for t in texts)) or "–"

    if not blocks:
        return Verdict(entry.name, implementation, "–", "–", "–", LEFT)
    whole = all(b.ir.gating is not None for b in blocks)
    return Verdict(
        entry.name,
        implementation,
        # the report's reason for routing left as written names nodes of one graph; the entry's note says it in words
        once(b.formula if b.ir.gating is not None else "as written" for b in blocks),
        once(b.experts for b in blocks),
        once(b.shared for b in blocks),
        FUSED if whole else EXPERTS_ONLY,
    )


def row_of(entry: zoo.Entry, verdicts: list[Verdict]) -> tuple[str, ...]:
    """The table row of one architecture; its verdicts agree, or the row says in what they differ."""

    def agreed(values: Iterable[str]) -> str:
        return OR.join(dict.fromkeys(values))

    notes = [n for n in (entry.scope if entry.scope != "causal LM" else "", entry.note) if n]
    name = f"`{entry.name}`" + (f" ({'; '.join(notes)})" if notes else "")
    return (
        name,
        f"{entry.router} {entry.experts}",
        agreed(v.routing for v in verdicts),
        agreed(v.experts for v in verdicts),
        agreed(v.shared for v in verdicts),
        ", ".join(v.implementation for v in verdicts),
        agreed(v.verdict for v in verdicts),
    )


def render(verdicts: Iterable[Verdict]) -> str:
    """The whole document."""
    by_name: dict[str, list[Verdict]] = {}
    for v in verdicts:
        by_name.setdefault(v.name, []).append(v)
    order = {i: n for n, i in enumerate(zoo.DECORATED)}
    rows = [row_of(e, sorted(by_name[e.name], key=lambda v: order[v.implementation])) for e in zoo.ENTRIES if e.name in by_name]
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *map(_line, rows)]
    left = ["", "## Left out", "", _line(("architecture", "reason")), _line(("---", "---"))]
    left += [_line((f"`{name}`", reason)) for name, reason in zoo.EXCLUDED.items()]
    return HEAD + "\n".join([*lines, *left]) + "\n"


def rows_in(document: str) -> dict[str, tuple[str, ...]]:
    """Table rows of a rendered document by architecture name."""
    found = {}
    for line in document.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if line.startswith("| `"):
            found[cells[0].split("`")[1]] = tuple(cells)
    return found


def disagreement(entry: zoo.Entry, verdict: Verdict, document: str) -> str:
    """What the committed row says otherwise than this verdict; empty if nothing."""
    row = rows_in(document).get(entry.name)
    if row is None:
        return f"no row for {entry.name}"
    mine = row_of(entry, [verdict])
    implementations = row[5].split(", ")
    told = [c for c in zip(COLUMNS, row, mine) if c[0] != "implementations"]
    differing = [f"{c}: committed {a!r}, now {b!r}" for c, a, b in told if b not in a.split(OR)]
    if verdict.implementation not in implementations:
        differing.append(f"implementation {verdict.implementation} is not in {row[5]!r}")
    return "; ".join(differing)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
