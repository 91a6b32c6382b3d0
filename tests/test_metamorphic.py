"""Equal spellings keep the IR, a changed field changes that field, a mutation is never taken for the original."""

from __future__ import annotations

import torch
from catalogue.check import difference_problem
from composed import EXPERT_MUTATIONS, ROUTING_MUTATIONS, Composed, H, Spec, Spelling
from hypothesis import assume, given, note
from hypothesis import strategies as st
from metamorphic import changed, compile_and_compare, differences, exactly, examples, only_block, specs, spelled, spellings, summary

from moe_compile.ir import MoeBlock, Norm

torch.set_num_threads(1)


def meaning(spec: Spec) -> MoeBlock:
    return MoeBlock(spec.gating, spec.experts, spec.shared_ir())


@examples(16)
@given(spelled(), st.sampled_from([False, False, True]))
def test_any_spelling_has_the_meaning_of_its_spec(pair: tuple[Spec, Spelling], dynamic: bool) -> None:
    """And computes what eager computes."""
    spec, how = pair
    note(summary(spec))
    ir = only_block(compile_and_compare(spec, how, dynamic=dynamic))
    assert not differences(ir, meaning(spec)), ir


@examples(10)
@given(changed())
def test_a_changed_field_changes_exactly_that(pair: tuple[Spec, Spelling, Spec, Spelling]) -> None:
    before, how, after, how_after = pair
    expected = differences(meaning(before), meaning(after))
    assume(expected)
    note(f"{summary(before)}\n-> {sorted(expected)}\n{summary(after)}")
    first, second = only_block(compile_and_compare(before, how)), only_block(compile_and_compare(after, how_after))
    assert differences(first, second) == expected


@st.composite
def routing_mutants(draw: st.DrawFn) -> tuple[Spec, Spelling, str]:
    spec = draw(specs())
    how = draw(spellings(spec))
    mutation = draw(st.sampled_from(ROUTING_MUTATIONS))
    norm = spec.gating.norm
    assume(mutation != "norm over tokens" or (norm is not None and norm.kind is not Norm.EXPR and not how.over_selected))
    assume(mutation != "noise" or not how.over_selected)
    return spec, how, mutation


@examples(12)
@given(routing_mutants())
def test_mutated_routing_is_left_as_written(mutant: tuple[Spec, Spelling, str]) -> None:
    """No reduction over tokens, no run-time bias, no foreign order: whatever is fused has no Gating, or another one."""
    spec, how, mutation = mutant
    note(summary(spec))
    report = compile_and_compare(spec, how, mutation)
    for block in report.blocks:
        assert block.ir.gating is None or differences(block.ir, meaning(spec)), block.formula


@st.composite
def expert_mutants(draw: st.DrawFn) -> tuple[Spec, Spelling, str]:
    mutation = draw(st.sampled_from(EXPERT_MUTATIONS))
    spec = draw(specs())
    how = draw(spellings(spec))
    if mutation in ("other slot", "other destination", "decay"):
        assume(how.dispatch == "loop")
    elif mutation == "twice":
        assume(how.dispatch in ("loop", "dense loop"))  # written into slots, the same row twice is once
    else:
        assume(how.dispatch in ("loop", "slots", "dense loop"))
    assume(mutation != "swapped down" or spec.experts.stacked)  # a list may name its entries in any order
    return spec, how, mutation


@examples(6)
@given(expert_mutants())
def test_mutated_experts_are_left_alone(mutant: tuple[Spec, Spelling, str]) -> None:
    spec, how, mutation = mutant
    note(summary(spec))
    report = compile_and_compare(spec, how, mutation)
    assert not report.blocks, report.blocks[0].experts
    assert report.rejected


@examples(10)
@given(spelled())
def test_residual_as_base_is_added_once(pair: tuple[Spec, Spelling]) -> None:
    """The accumulator may start from the tokens: the same block, with an addend."""
    spec, how = pair
    assume(how.scale_at != "output" or spec.gating.scale == 1.0)
    ir = only_block(compile_and_compare(spec, how, "residual base"))
    assert not differences(ir, meaning(spec))


@examples(16)
@given(spelled())
def test_generator_writes_what_its_spec_says(pair: tuple[Spec, Spelling]) -> None:
    """The modules themselves, in eager, against the naive reading of their Spec."""
    spec, how = pair
    torch.manual_seed(0)
    block, x = Composed(spec, how), torch.randn(4, H)
    with torch.no_grad():
        got = block(x)
        want = torch.from_numpy(exactly(block, x))
    assert not difference_problem(got.double(), want)
