"""docs/quantisation.md: what its tables say of each scheme is what targets say of its records, and what golden.txt has for each source."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import catalogue
import golden
import torch
from catalogue.base import RENORM
from catalogue.packed import Int4FloatZero, Int4OtherOrder

from moe_compile import ir
from moe_compile.ir.stored import Scale, Zero
from moe_compile.lowering import target

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "quantisation.md").read_text(encoding="utf-8")
# What a scheme's row begins with, in the order in which a record is asked
SCHEMES = {
    "any of these whose shifts": lambda s: s.shifted,
    "any of these with scales that divide": lambda s: s.scaled == Scale.DIVIDES,
    "NVFP4": lambda s: bool(s.second),
    "any of these with groups by an index": lambda s: bool(s.indexed),
    "int4, a float added": lambda s: s.zeroed == Zero.ADDED,
    "int4, float zero point": lambda s: s.zeroed == Zero.PLAIN,
    "int4, packed zero points": lambda s: bool(s.zeroed),
    "MXFP4": lambda s: bool(s.axis and s.exponents),
    "NF4": lambda s: s.tabled,
    "2 or 8 bits packed": lambda s: bool(s.axis) and s.bits in (2, 8),
    "int4 packed": lambda s: bool(s.axis),
    "MXFP8": lambda s: s.dtype.is_floating_point and s.rows == 1 and bool(s.columns),
    "float8 (": lambda s: s.dtype.is_floating_point and s.grid,
    "float8, a scale": lambda s: s.dtype.is_floating_point,
    "int8, groups": lambda s: s.grid,
    "int8, a scale": lambda s: True,
}
# What a target's report (or its reason) has, by the words of a cell
TARGETS = {
    "cpu": {"kernels": r"^cpu kernel \(\w+, weights", "torch makes the floats": "floats made in torch"},
    "cuda": {"decode": r"^triton \(\w+, weights", "torch makes floats|torch makes the floats": "floats made of"},
    "ascend": {"declined": "^expert weights stored as", "npu_grouped_matmul": "; grouped_matmul"},
}
# The words of a column's head -> what an entry's code has, in the order in which they are looked for
SOURCES = {
    "loop over the experts that were hit": r"nonzero\(\)|HitExperts\.run_experts\(",
    "grouped products": r"grouped_mm|sorted_ids",
    "gathered by ids": r"\[ids\]",
    "dense": "bmm|einsum",
    "static loop": r"for e in range",
}
# The rows of the second table: the schemes that each is about
ABOUT = {
    "float8:": ["float8 (", "float8, a scale"],
    "MXFP8": ["MXFP8", "int8, groups", "int8, a scale"],
    "int4, MXFP4": ["int4 packed", "int4, float zero point", "int4, a float added", "int4, packed zero points", "MXFP4"],
    "NVFP4": ["NVFP4"],
    "GPTQ": ["any of these with groups by an index", "any of these whose shifts", "NF4"],
}
# Cells that no entry of the catalogue shows: the file and the test that does
ELSEWHERE = {
    ("float8:", "an op with a contract"): "tests/test_float8_experts.py::test_each_gate_and_each_way",
    ("float8:", "a wrapper subclass"): "tests/libraries/test_torchao.py::test_what_a_parameter_holds_is_read",
    ("MXFP8", "an op with a contract"): "tests/test_contracts.py::test_kernels_of_groups_with_powers_of_two",
    ("MXFP8", "a wrapper subclass"): "tests/libraries/test_torchao.py::test_what_a_parameter_holds_is_read",
    ("NVFP4", "a wrapper subclass"): "tests/libraries/test_torchao.py::test_what_a_parameter_holds_is_read",
}


def table(first: str) -> Iterator[list[str]]:
    """The rows of the table whose head begins with these words, the head among them."""
    body = TEXT[TEXT.index(first) :].split("\n\n")[0].splitlines()
    yield from ([c.strip() for c in line.strip()[1:-1].split("|")] for line in (body[0], *body[2:]))


def scheme(how: ir.Stored) -> str:
    return next(name for name, holds in SCHEMES.items() if holds(how))


def read_as_stored() -> dict[str, ir.Experts]:
    """What is read of entries of the catalogue, without low-rank pairs and rounded rows."""
    found = {n: getattr(cls.expect, "experts", None) for n, cls in catalogue.entries().items()}
    return {n: e for n, e in found.items() if e is not None and e.coded and not (e.adapted or e.rounded)}


def said(e: ir.Experts, name: str) -> str:
    """What a target does beside tokens in bf16: the words of a cell."""
    block, asked = ir.MoeBlock(RENORM, replace(e, dtype=torch.bfloat16)), target(name)
    text = asked.reason(block) or asked.says(block)
    found = [w for w, pattern in TARGETS[name].items() if re.search(pattern, text)]
    assert len(found) == 1, (name, text)
    return found[0]


def test_what_each_target_does_with_each_scheme() -> None:
    """The words of a cell are those of the catalogue's entries of its scheme, all of them and no other."""
    read = read_as_stored()
    zeros = replace(Int4FloatZero.how, dtype=torch.int32, order=Int4OtherOrder.expect.experts.up_stored.order)
    read["float zero points, another order"] = replace(read["Int4FloatZero"], up_stored=zeros, down_stored=zeros)
    kinds: dict[str, list[str]] = {}
    for name, e in read.items():
        kinds.setdefault(scheme(e.up_stored), []).append(name)
    cells = [""] * 5
    for row in [*table("| scheme | written as")][1:]:
        cells = [above if c == "as above" else c for c, above in zip(row, cells, strict=True)]
        names = kinds.pop(next(s for s in SCHEMES if row[0].startswith(s)))
        for where, cell in zip(TARGETS, cells[2:], strict=True):
            found = {n: said(read[n], where) for n in names}
            assert {w for w in TARGETS[where] if re.search(w, cell)} == set(found.values()), (row[0], where, cell, found)
    assert not kinds, "schemes that the table does not have"


def source(cls: type[catalogue.Case]) -> str:
    """By what an entry's experts are reached: the words of a column's head."""
    code = inspect.getsource(cls.run_experts)
    return next(words for words, pattern in SOURCES.items() if re.search(pattern, code))


def test_what_becomes_of_each_scheme_from_each_source() -> None:
    """Each scheme of a cell that says `read` has an entry that tests/golden.txt has as read so; an empty cell and `left` have none."""
    lines, shown = golden.rows(), set()
    for name, e in read_as_stored().items():
        assert f"up_stored={golden._text(e.up_stored)}" in lines[f"catalogue/{name}"]
        shown.add((scheme(e.up_stored), source(catalogue.entries()[name])))
    head, *body = table("| scheme | static loop")
    for begins, kinds in ABOUT.items():
        (row,) = [r for r in body if r[0].startswith(begins)]
        for words, cell in zip(head[1:], row[1:], strict=True):
            known = next((w for w in SOURCES if words.startswith(w)), "")
            if known:
                missing = [k for k in kinds if (k, known) not in shown]
                assert cell.startswith("read") and not missing, (row[0], words, cell, missing)
            elif cell:
                file, test = ELSEWHERE[begins, words].split("::")
                assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (row[0], words)
    assert len(body) == len(ABOUT) + 1
