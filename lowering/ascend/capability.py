"""What this target can run, from the IR alone, and what it says it makes of it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch

from ...ir import Experts, Form, MoeBlock, Rows
from ...ir import scalar as act
from ...ir.stored import Scale
from ...ir.text import rows_text
from ...ops import route_args
from ..reference.routing import Routing
from . import antiquant, device, int8, law

MAX_FLOOR = 1e-5  # of a row's scale: below it a row's values are nothing beside other rows'
MAX_GROUPED = 1024  # experts of one 3-D weight in npu_grouped_matmul
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def missing() -> str:
    """What keeps the target from running on this machine; "" for nothing. Without an NPU `explain` still shows its calls."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    return "" if getattr(torch, "npu", None) is not None and torch.npu.is_available() else "no NPU"


def refuses(ir: MoeBlock) -> str | None:
    """None when the npu ops can run this block's experts, else the reason."""
    e = ir.experts
    if e.coded and e.adapted:
        return "low-rank pairs (LoRA) beside weights in few bits: no chain of npu_grouped_matmul is written for them"
    for p in _stored(e):
        if (why := _refuses_stored(p, e.rounded)) is not None:
            return why
    if e.dtype not in FLOATS:
        return f"expert weights of {e.dtype}: npu_grouped_matmul takes fp16, bf16 and fp32"
    if e.num_experts > MAX_GROUPED:
        return f"{e.num_experts} experts: npu_grouped_matmul takes {MAX_GROUPED}"
    try:
        act.encode(e.activation)
    except act.UnknownActivation as error:
        return f"activation: {error}"
    if e.rounded and (why := _refuses_rounded(ir)) is not None:
        return f"{rows_text(e.down_rows or e.up_rows)}: {why}"
    if e.num_identity and e.hidden != e.out_features:
        return "identity experts need as many outputs as inputs"
    return None


def _refuses_stored(p: antiquant.Problem, rounded: bool) -> str | None:
    if rounded and not p.float8_rows:
        return antiquant.int8_by_channel(p)
    why, row = antiquant.why_not(p), antiquant.choose(p)
    if why is None and p.float8_rows:
        assert row is not None
        return f"{row.calls}: {row.unknown()}"
    return why


def _stored(e: Experts) -> list[antiquant.Problem]:
    """The projections that are no plain floats."""
    family, halves = device.family(), 2 if e.form in (Form.CONCAT, Form.INTERLEAVED) else 1
    up = (e.up_stored, e.up_transposed, e.hidden, e.intermediate * halves)
    down = (e.down_stored, e.down_transposed, e.intermediate, e.out_features)
    rows = {r.dtype for r in (e.up_rows, e.down_rows) if r is not None}
    float8 = bool(rows) and all(d.is_floating_point for d in rows)
    return [antiquant.Problem(how, t, k, n, e.dtype, family, float8) for how, t, k, n in (up, down) if how is not None]


def _refuses_rounded(ir: MoeBlock) -> str | None:
    """Why the int8 chain cannot run experts that round their rows themselves; there is no other way to run them."""
    e = ir.experts
    if e.num_identity:
        return "identity experts take rows that are not rounded"
    assert e.up_rows is not None or e.down_rows is not None
    if e.up_rows is None or e.down_rows is None or _unsmoothed(e.up_rows) != _unsmoothed(e.down_rows):
        return "rows are rounded before one product as they are not before the other"
    if _unsmoothed(e.up_rows) != Rows(8, torch.int8, floor=e.up_rows.floor, floored=e.up_rows.floored):
        return "npu_dynamic_quant rounds rows to int8 by max / 127 of each"
    if e.up_rows.floor > MAX_FLOOR:
        return f"a row's scale is at least {e.up_rows.floor}, the op's may be anything"
    return int8.why_not(_problem(ir))


def _problem(ir: MoeBlock) -> int8.Problem:
    e = ir.experts
    smooth = Scale.NONE if e.down_rows is None else e.down_rows.smooth
    biases = e.up_bias or e.down_bias
    return int8.Problem(
        "w8a8", e.activation, int(e.form), e.hidden, e.intermediate, biases, e.weight_on_input, e.dtype, smooth=smooth, smooth_dtype=e.dtype
    )


def _unsmoothed(rows: Rows) -> Rows:
    return replace(rows, smooth=Scale.NONE)


def says(ir: MoeBlock) -> str:
    """The calls a block becomes, for the report."""
    routing = "routing as written"
    if ir.gating is not None:
        g = ir.gating
        row, _ = law.choose_routing(law.Case(Routing(*route_args(g)), g.num_experts))
        routing = row.calls
    if ir.experts.rounded:
        chain, _ = int8.choose(_problem(ir))
        assert chain is not None
        return f"{routing}; {chain.calls}"
    products = [form.told for p in _stored(ir.experts) if (form := antiquant.choose(p)) is not None] or ["grouped_matmul"]
    product = " and ".join(dict.fromkeys(products))
    return f"{routing}; {product}, {law.activation_call(ir.experts.activation, ir.experts.form)}"
