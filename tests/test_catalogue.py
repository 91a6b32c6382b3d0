"""Every entry of the catalogue: what it computes, what is recovered from it, and that compiling changes no result."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

import catalogue
import golden
import pytest
import torch
from catalogue import AsWritten, Case, Fused, Rejected, Sound, Untouched, check, naive
from catalogue.compare import experts_differences, fields_of, gating_differences, shared_differences

from moe_compile.ir import Score

torch.set_num_threads(1)
ENTRIES = catalogue.entries()
FUSED = [n for n, c in ENTRIES.items() if isinstance(c.expect, Fused)]
COMPILED = [n for n, c in ENTRIES.items() if check.compiled_here(c)]
GROUPS = sorted({c.group for c in ENTRIES.values() if c.group})
NEAR = [n for n, c in ENTRIES.items() if c.near]
WORDS = {Fused: "fused", AsWritten: "experts fused", Rejected: ("rejected", "left alone"), Untouched: "left alone", Sound: ""}


def representatives() -> list[str]:
    """One entry of each group, and those that stand alone."""
    seen: set[str] = set()
    out = []
    for name in (n for n in FUSED if check.EVERY or not ENTRIES[n].zoo_only):
        cls = ENTRIES[name]
        key = f"{cls.group or name}/{cls.__module__}"
        if key not in seen and cls.dtype is torch.float32 and not getattr(cls, "inference_only", False):
            seen.add(key)
            out.append(name)
    return out


@pytest.mark.parametrize("name", ENTRIES)
def test_docstring_carries_the_verdict(name: str) -> None:
    cls = ENTRIES[name]
    assert "__doc__" in vars(cls) and (cls.__doc__ or "").startswith("Verdict: ")
    assert (cls.__doc__ or "").removeprefix("Verdict: ").startswith(WORDS[type(cls.expect)]), cls.__doc__


@pytest.mark.parametrize("name", [n for n in FUSED if ENTRIES[n].routes_all and (check.EVERY or not ENTRIES[n].zoo_only)])
def test_eager_is_the_naive_reading(name: str) -> None:
    """The module computes what its expected IR says, by a reading that shares no code with the package."""
    cls = ENTRIES[name]
    assert isinstance(cls.expect, Fused)
    case = catalogue.build(cls).eval()
    torch.manual_seed(1)
    first = case.example_inputs()
    for label, inputs in itertools.chain([("first", first)], check.routings(case, tokens=0 if check.EVERY else 4)):
        with torch.no_grad():
            got = check.tensors(case(*inputs))[0]
            want = torch.from_numpy(naive.block(cls.expect.gating, cls.expect.experts, case.parts(*inputs)))
        got = got.double().reshape(want.shape)
        problem = check.difference_problem(got, want) if cls.dtype is torch.float32 else check.loose_problem(got, want, 4e-2)
        assert not problem, f"{label}: {problem}"


@pytest.mark.parametrize("name", NEAR)
def test_near_miss_is_different_maths(name: str) -> None:
    """A near miss really computes something else than its neighbour, on the very same values."""
    cls, other = ENTRIES[name], ENTRIES[ENTRIES[name].near]
    case = catalogue.build(cls).eval()
    torch.manual_seed(1)
    plain = case.example_inputs(24)
    # dtypes of the weights are a difference of rounding only
    limit = 3e-5 if cls.differs != ("gating.weight_dtype",) else 0.0
    assert any(distance(case, other, inputs) > limit for inputs in (plain, (plain[0] * 5, *plain[1:])))


def distance(case: Case, neighbour: type[Case], inputs: tuple[Any, ...]) -> float:
    """Largest relative difference between a module and its neighbour's meaning on the same values."""
    assert isinstance(neighbour.expect, Fused), "a near miss is near something that is fused"
    with torch.no_grad():
        got = check.tensors(case(*inputs))[0].double()
        parts = case.parts(*inputs)
        parts.add = neighbour.extra(case, parts.x).get("add", parts.add)
        try:
            other = torch.from_numpy(naive.block(neighbour.expect.gating, neighbour.expect.experts, parts)).reshape(got.shape)
        except (ValueError, IndexError):  # the neighbour's layout does not even fit these values
            return torch.inf
    return ((got - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("name", [n for n in NEAR if isinstance(ENTRIES[n].expect, Fused) and ENTRIES[n].differs])
def test_near_miss_differs_where_it_says(name: str) -> None:
    cls = ENTRIES[name]
    mine, theirs = cls.expect, ENTRIES[cls.near].expect
    assert isinstance(mine, Fused) and isinstance(theirs, Fused)
    found = gating_differences(mine.gating, theirs.gating) | experts_differences(mine.experts, theirs.experts)
    assert found | shared_differences(mine.shared, theirs.shared) == set(cls.differs)


@pytest.mark.parametrize("name", COMPILED)
def test_verdict(name: str) -> None:
    cls = ENTRIES[name]
    problem = check.verdict_problem(cls, check.compiled(cls).report)
    assert not problem, problem


@pytest.mark.parametrize("name", COMPILED)
def test_outputs_are_eagers(name: str) -> None:
    problem = check.output_problem(check.compiled(ENTRIES[name]))
    assert not problem, problem


@pytest.mark.parametrize("name", [n for n in COMPILED if isinstance(ENTRIES[n].expect, Fused) and check.one_token_too(ENTRIES[n])])
def test_one_token_means_the_same(name: str) -> None:
    """One token is a graph of its own, in which dims of size one are gone."""
    cls = ENTRIES[name]
    run = check.compiled(cls)
    if run.one_token.graph_count and not cls.one_token_is_less:  # else the symbolic graph served
        problem = check.verdict_problem(cls, run.one_token)
        assert not problem, problem


@pytest.mark.parametrize("name", [n for n in COMPILED if n in FUSED and ENTRIES[n].routes_all])
def test_recovered_ir_is_an_oracle(name: str) -> None:
    problem = check.oracle_problem(check.compiled(ENTRIES[name]))
    assert not problem, problem


@pytest.mark.parametrize("name", COMPILED)
def test_golden(name: str) -> None:
    """The IR and the verdict are those of tests/golden.txt, for many tokens and for one."""
    run = check.compiled(ENTRIES[name])
    found, one = golden.verdict(run.report), golden.verdict(run.one_token)
    if run.one_token.graph_count and one != found:
        found = f"{found} || one token: {one}"
    problem = golden.problem(f"catalogue/{name}", found)
    assert not problem, problem


@pytest.mark.parametrize("group", GROUPS)
def test_equal_spellings_are_one_ir(group: str) -> None:
    """Exactly one IR a group: no identities allowed here. Read off the golden file, which `test_golden` holds to what is recovered."""
    kept = golden.rows()
    found: dict[str, list[str]] = {}
    for name, cls in ENTRIES.items():
        for meaning in golden.meanings(kept.get(f"catalogue/{name}", "").partition(" || ")[0]) if cls.group == group else ():
            found.setdefault(meaning, []).append(name)
    assert len(found) == 1, found


# Numbers other than 0 and 1, which often stand for "none" or are the start of an order: another one is no other derivative
NUMBER = re.compile(r"(?<![\w.])(?![01](?:\.0)?(?![\w.]))\d[\d.]*(?:e[-+]?\d+)?")


def with_gradients() -> list[str]:
    """Representatives that bring a value of some field of the IR which none before them has, but for numbers; `make zoo`: all."""
    seen: set[tuple[str, str]] = set()
    out = []
    for name in representatives():
        new = {(path, NUMBER.sub("n", str(value))) for path, value in fields_of(ENTRIES[name].expect)} - seen
        seen |= new
        rounds = ENTRIES[name].expect.experts.up_rows or ENTRIES[name].expect.experts.down_rows  # in training these are left as written
        if check.EVERY or new and not (rounds and len(out) % 8):
            out.append(name)
    return out


@pytest.mark.parametrize("name", with_gradients())
def test_gradients_are_eagers(name: str) -> None:
    problem = check.gradient_problem(ENTRIES[name])
    assert not problem, problem


def test_every_reason_has_an_entry_that_is_compiled() -> None:
    """In CI too: what `check.LONG` leaves out is another entry of the same reason or note."""

    def reasons(names: Iterable[str]) -> set[str]:
        expected = [ENTRIES[n].expect for n in names]
        return {e.reason if isinstance(e, Rejected) else e.note for e in expected if isinstance(e, (Rejected, AsWritten))}

    assert reasons(COMPILED) == reasons(ENTRIES)


def test_every_kind_meets_symbolic_sizes_and_aotautograd_at_once() -> None:
    """Of what CI compiles: each score, normaliser, form of the weights, and so on."""
    here = [n for n in COMPILED if check.in_ci(ENTRIES[n])]
    both = [ENTRIES[n] for n in here if check.symbolic(ENTRIES[n]) and check.options_of(ENTRIES[n]) == check.OPTIONS]
    kinds = {kind for n in here for kind in check.kinds_of(ENTRIES[n])}
    assert {(".gating.score", Score.RELU), (".gating.expert_scale", True), (".experts.weight_on_input", True)} <= kinds
    assert kinds == {kind for cls in both for kind in check.kinds_of(cls)}


def test_long_entries_are_there() -> None:
    assert ENTRIES.keys() >= check.LONG


def test_groups_have_members() -> None:
    for group in GROUPS:
        assert len([c for c in ENTRIES.values() if c.group == group]) > 1, f"{group} has one spelling only"


def test_every_near_miss_has_its_neighbour() -> None:
    for name in NEAR:
        near = ENTRIES[name].near
        assert near in ENTRIES and issubclass(ENTRIES[near], Case), (name, near)


def test_the_golden_file_has_no_stale_lines() -> None:
    assert not (problem := golden.stale("catalogue", ENTRIES)), problem
