"""What this target can run, from the IR alone, and what it says it makes of it."""

from __future__ import annotations

import importlib.util

import torch

from ...ir import MoeBlock, Rows, Stored
from ...ir import scalar as act
from ...ir.stored import ALL
from ...ir.text import rows_text, stored_text
from ...ops import route_args
from ..reference.routing import Routing
from . import int8, law

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
    if e.coded and not (_in_channels(e.up_stored, e.up_transposed) and _in_channels(e.down_stored, e.down_transposed)):
        told = " and ".join(dict.fromkeys(stored_text(s) for s in (e.up_stored, e.down_stored)))
        return f"expert weights stored as {told}: npu_grouped_matmul takes int8 with a scale for each output channel"
    if e.coded and e.dtype not in (torch.float16, torch.bfloat16):
        return f"int8 expert weights with rows of {e.dtype}: npu_grouped_matmul takes int8 with fp16 and bf16"
    if e.adapted:
        return "low-rank pairs (LoRA) beside expert weights: no chain of npu ops for them; merge the adapter into the weights"
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


def _in_channels(stored: Stored | None, transposed: bool) -> bool:
    """Whether weights are int8 with scales of output channels, or of a whole matrix."""
    if stored is None or stored.dtype is not torch.int8 or not stored.plain:
        return False
    out, inner = (stored.columns, stored.rows) if transposed else (stored.rows, stored.columns)
    return out in (1, ALL) and inner == ALL


def _refuses_rounded(ir: MoeBlock) -> str | None:
    """Why the int8 chain cannot run experts that round their rows themselves; there is no other way to run them."""
    e = ir.experts
    if e.num_identity:
        return "identity experts take rows that are not rounded"
    if e.up_rows != e.down_rows:
        return "rows are rounded before one product as they are not before the other"
    assert e.up_rows is not None
    if e.up_rows != Rows(8, torch.int8, floor=e.up_rows.floor):
        return "npu_dynamic_quant rounds rows to int8 by max / 127 of each"
    if e.up_rows.floor > MAX_FLOOR:
        return f"a row's scale is at least {e.up_rows.floor}, the op's may be anything"
    return int8.why_not(_problem(ir))


def _problem(ir: MoeBlock) -> int8.Problem:
    e = ir.experts
    return int8.Problem("w8a8", e.activation, int(e.form), e.hidden, e.intermediate, e.up_bias or e.down_bias, e.weight_on_input, e.dtype)


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
    product = "grouped_matmul (int8 × scale)" if ir.experts.coded else "grouped_matmul"
    return f"{routing}; {product}, {law.activation_call(ir.experts.activation, ir.experts.form)}"
