"""The codec between the IR and the ops' plain arguments: there and back for any meaning, one list of fields behind it all."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.ir.codec import decode, encode, path, place, record_of, schema
from moe_compile.ir.operands import Operands
from moe_compile.ir.records import Layout, Routing, SharedLayout, Storage
from moe_compile.ir.stored import Exponent, Scale, Zero

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
NUMBERS = st.floats(0.001953125, 64, width=32)
GROUPS = st.builds(ir.Groups, st.integers(1, 8), st.integers(1, 4), st.integers(1, 2), st.sampled_from([-math.inf, 0.0, -1.0]))
NORMS = st.builds(ir.Normaliser, st.sampled_from([ir.Norm.SUM, ir.Norm.MAX, ir.Norm.PNORM]), NUMBERS, NUMBERS, NUMBERS)
GATINGS = st.builds(
    ir.Gating,
    num_experts=st.integers(1, 512),
    k=st.integers(1, 16),
    score=st.sampled_from(ir.Score),
    score_over_selected=st.booleans(),
    bias=st.sampled_from(ir.BiasOn),
    bias_in_weights=st.booleans(),
    groups=st.none() | GROUPS,
    norm=st.none() | NORMS,
    scale=NUMBERS,
    expert_scale=st.booleans(),
    score_dtype=FLOATS,
    weight_dtype=FLOATS,
)
ACTIVATIONS = st.sampled_from([act.G, act.SWIGLU, act.G * act.U, act.G + 2 * act.U])
SIZES = st.integers(1, 1024)
STORED = st.builds(
    ir.Stored,
    st.sampled_from([4, 8]),
    st.sampled_from([torch.int8, torch.uint8, torch.float8_e4m3fn]),
    st.sampled_from(Scale),
    st.integers(0, 128),
    st.integers(0, 128),
    axis=st.integers(0, 2),
    order=st.permutations([0, 1]).map(tuple),
    offset=NUMBERS,
    values=st.lists(NUMBERS, max_size=4).map(tuple),
    tabled=st.booleans(),
    zeroed=st.sampled_from(Zero),
    exponents=st.sampled_from(Exponent),
    zero_order=st.permutations([0, 1]).map(tuple),
    zero_offset=NUMBERS,
    second=st.sampled_from(Scale),
    second_rows=st.integers(0, 128),
    second_columns=st.integers(0, 128),
    zero_wraps=st.booleans(),
    shifted=st.booleans(),
)
ROWS = st.builds(
    ir.Rows,
    st.just(8),
    st.sampled_from([torch.int8, torch.float8_e4m3fn]),
    group=st.integers(0, 128),
    floor=NUMBERS,
    power=st.booleans(),
    floored=st.booleans(),
    smooth=st.sampled_from(Scale),
    static=st.booleans(),
    step=NUMBERS,
    low=NUMBERS,
    top=NUMBERS,
)
EXPERTS = st.builds(
    ir.Experts,
    SIZES,
    SIZES,
    SIZES,
    SIZES,
    form=st.sampled_from(ir.Form),
    activation=ACTIVATIONS,
    stacked=st.booleans(),
    up_transposed=st.booleans(),
    down_transposed=st.booleans(),
    weight_on_input=st.booleans(),
    num_identity=st.integers(0, 8),
    up_stored=st.none() | STORED,
    down_stored=st.none() | STORED,
    up_rows=st.none() | ROWS,
    down_rows=st.none() | ROWS,
)


def there_and_back(record: type, meaning: Any) -> Any:
    """`decode(encode(meaning))`, told only what no field of the record says."""
    told = {path(record, f.name).partition(".")[0] for f in fields(record)}
    others = {f.name: getattr(meaning, f.name) for f in fields(meaning) if f.name not in told}
    return decode(type(meaning), record_of(record, encode(record, meaning)), **others)


@given(GATINGS)
def test_a_gating_comes_back(gating):
    assert there_and_back(Routing, gating) == gating


@settings(deadline=None)
@given(EXPERTS)
def test_experts_come_back(experts):
    assert all(there_and_back(record, experts) == experts for record in (Layout, SharedLayout))
    assert record_of(Storage, encode(Storage, experts)).storing == experts.storage


@given(GATINGS, GATINGS)
def test_different_gatings_are_different_arguments(one, other):
    """What no op is told apart."""
    alike = replace(other, num_experts=one.num_experts, expert_scale=one.expert_scale)
    assert (encode(Routing, one) == encode(Routing, alike)) == (one == alike)


@settings(deadline=None)
@given(GATINGS, EXPERTS)
def test_arguments_have_the_types_of_the_schema(gating, experts):
    """What Python would take for the other (True for 1, 1 for 1.0) is what the op's text form tells apart."""
    kinds = {"bool": bool, "int": int, "float": float, "ScalarType": torch.dtype, "int[]": list, "float[]": list}
    for record, meaning in ((Routing, gating), (Layout, experts), (Storage, experts), (SharedLayout, experts)):
        types = [argument.split()[0] for argument in schema(record).split(", ")]
        assert [type(v) for v in encode(record, meaning)] == [kinds[t] for t in types]


@pytest.mark.parametrize("op, record", [("route", Routing), ("experts", Layout), ("route_bwd", Routing), ("experts_bwd", Layout)])
def test_the_ops_take_the_fields_of_the_records(op, record):
    names = [a.name for a in getattr(torch.ops.moe_compile, op).default._schema.arguments]
    own = [f.name for f in fields(record)]
    start = names.index(own[0])
    assert names[start : start + len(own)] == own


def test_an_expression_is_no_argument():
    """Nor a normaliser that no op knows: it follows outside, and the op is told of none."""
    with pytest.raises(act.UnknownActivation):
        encode(Layout, ir.Experts(2, 4, 4, 4, ir.Form.SINGLE, act.sp.asin(act.G)))
    outside = ir.Gating(8, 2, ir.Score.SOFTMAX, norm=ir.Normaliser(ir.Norm.EXPR, expr=ir.W / 2))
    assert ops.route_args(outside) == ops.route_args(replace(outside, norm=None))


def test_the_arguments_as_they_are():
    gating = ir.Gating(8, 2, ir.Score.SIGMOID, groups=ir.Groups(4, 2, 1, 0.0), norm=ir.Normaliser(ir.Norm.SUM, 1e-20), scale=2.5)
    assert ops.route_args(gating)[:9] == [2, int(ir.Score.SIGMOID), False, 0, False, 4, 2, 1, 0.0]
    assert ops.route_args(gating)[9:] == [int(ir.Norm.SUM), 1e-20, 0.0, 1.0, 2.5, torch.float32, torch.float32]
    assert place(Routing, "bias_in_weights") == 4


def test_operands_keep_their_order():
    """What is mapped comes back in the order of iteration, group by group, and groups that are not there stay away."""
    names = Operands(up=("g", "u"), down=("d",), down_bias=("b",))
    assert [*names] == ["g", "u", "d", "b"] and [*names.map(str.upper)] == ["G", "U", "D", "B"]
    assert {k: v for k, v in names.map(len).by_name().items() if v} == {"up": (1, 1), "down": (1,), "down_bias": (1,)}
    assert Operands.of(names) == Operands(**names.by_name()) == names
