"""The routed experts by torch's grouped product, where it is faster than the kernels here: chosen by rule, never by measuring.

That is on matrices [E, in, out] whose depth is no whole number of the warp-specialised kernel's steps: its copies would reach into
the next expert's matrix, and the plain kernel is 1.2 to 1.7 times slower than torch's from a few rows an expert on.

    rows ordered by expert, gathered -> product -> activation -> product -> combine
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ir import Form
from .call import Call
from .combine import combine, early_launch
from .dispatch import Dispatch, dispatch
from .host import capability, cdiv, power_of_2
from .launch.tape import empty, grouped_product, launch
from .pointwise import activate
from .weights import Matrices, tma_fits

LEAST_ROWS = 8  # an expert, on average: below, weights are streamed once and the plain kernel streams them as fast
_FORMS = (Form.CONCAT, Form.SINGLE)
_ROWS = 16  # that a program gathers


def better(c: Call) -> bool:
    """Whether torch's product is faster on these operands, and takes them."""
    layout = c.layout
    plain = layout.stacked and not layout.weight_on_input and c.up_bias is None and c.down_bias is None and Form(layout.form) in _FORMS
    if not plain or c.x.dtype != torch.bfloat16 or capability(c.x.device) < (9, 0):
        return False
    return c.slots >= LEAST_ROWS * layout.num_experts and any(_uneven(w) for w in (c.up, c.down)) and all(map(taken, (c.up, c.down)))


def _uneven(w: Matrices) -> bool:
    return not w.out_in and w.k % 64 != 0


def taken(w: Matrices) -> bool:
    """Rows of whole 16 bytes, as torch's product asks for them; the result's too."""
    return all(map(tma_fits, w.parts)) and w.n % 8 == 0 and w.k % 8 == 0


def run(c: Call, up: Tensor, down: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """(out, pre-activations in the dispatch's row order), for operands that `better` takes; `up` and `down` as the model stores them."""
    layout = c.layout
    rows = dispatch(c.ids, layout.num_experts, ())
    ends = rows.offsets[1:]
    up = up[: layout.num_experts] if layout.up_transposed else up[: layout.num_experts].transpose(1, 2)
    down = down[: layout.num_experts] if layout.down_transposed else down[: layout.num_experts].transpose(1, 2)
    pre = grouped_product(gathered(c, c.x, rows), up, ends)
    a = empty(c.x, c.slots, c.up.n)
    activate(layout, [pre], None, a)
    y = grouped_product(a, down, ends)
    add = c.add if c.late is None else c.late.join()
    combine(y, c.ids, c.weights, c.x, add, out, layout.num_experts, layout.num_identity, weighted=True, early=False, rank=rows.rank)
    return out, pre


def gathered(c: Call, source: Tensor, rows: Dispatch) -> Tensor:
    """Row r is that of sorted row r's token in `source` [T, n]; what lies behind the last expert's rows is anything."""
    width = source.shape[1]
    out = empty(source, c.slots, width)
    block = min(256, power_of_2(width))
    pdl = {"launch_pdl": True} if early_launch(source) else {}
    launch(
        _take, (cdiv(c.slots, _ROWS), cdiv(width, block)),
        source, rows.order, rows.offsets, out, c.layout.num_experts, width, source.stride(0),
        SLOTS=c.ids.shape[1], BM=_ROWS, BN=block, PDL=bool(pdl), num_warps=4, **pdl,
    )  # fmt: skip
    return out


@triton.jit
def _take(
    x, order, offsets, out, num_experts, width: tl.constexpr, stride: tl.constexpr,
    SLOTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    live = rows < tl.load(offsets + num_experts)
    token = (tl.load(order + rows, mask=live, other=0) // SLOTS).to(tl.int64)
    mask = live[:, None] & (columns < width)[None, :]
    values = tl.load(x + token[:, None] * stride + columns[None, :], mask=mask)
    tl.store(out + rows.to(tl.int64)[:, None] * width + columns[None, :], values, mask=mask)
