"""Smooth scales in front of the rounding of rows: which arguments carry them, and numbers against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ascend_blocks import Seen, compiled
from test_documents import through_documents
from test_int8 import CHAIN, E, H, I, Rounded, error
from test_quant import PROBLEM
from torch import Tensor

import moe_compile
from moe_compile.ir import MoeBlock
from moe_compile.ir.stored import Scale
from moe_compile.lowering.ascend import capability, int8, register

register.ensure()
BF = torch.bfloat16


class Smoothed(Rounded):
    """Rows times (or by) smooth scales of each expert, or of all, in `dtype`, before both products."""

    own, divides, dtype, act = True, False, torch.float32, staticmethod(F.silu)

    def __init__(self) -> None:
        super().__init__()
        shape = (E,) if self.own else ()
        for name, n in (("up_smooth", H), ("down_smooth", I)):
            self.register_buffer(name, (torch.rand(*shape, n) + 0.5).to(BF).to(self.dtype))

    def product(self, rows: Tensor, name: str) -> Tensor:
        """[E, T, in] -> [E, T, out], of all experts at once."""
        k = getattr(self, f"{name}_smooth").float()
        k = k[:, None] if self.own else k
        q, s = self.bytes_of(rows.float() / k if self.divides else rows.float() * k)
        scale = getattr(self, f"{name}_scale").float()[:, None]
        return (torch.bmm(q.float(), getattr(self, name).float().transpose(1, 2)) * s * scale).to(rows.dtype)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.gate).float().softmax(-1).topk(2, dim=-1)
        g, u = self.product(x.expand(E, -1, -1), "up").chunk(2, -1)
        y = self.product(self.act(g) * u, "down")
        dense = torch.zeros(x.shape[0], E).scatter_(1, ids, w).to(x.dtype)
        return (y * dense.t()[..., None]).sum(0)


def exact(m: Smoothed, x: Tensor) -> Tensor:
    """In float64, each step of the model written down again."""
    w, ids = F.linear(x, m.gate).float().softmax(-1).topk(2, dim=-1)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for e in range(E):

        def product(rows: Tensor, name: str) -> Tensor:
            k = getattr(m, f"{name}_smooth").double()
            k = k[e] if m.own else k  # noqa: B023
            rows = rows / k if m.divides else rows * k
            s = rows.abs().amax(-1, keepdim=True) / 127
            return ((rows / s).round() * s) @ (getattr(m, name)[e].double() * getattr(m, f"{name}_scale")[e].double()[:, None]).t()  # noqa: B023

        g, u = product(x.double(), "up").chunk(2, -1)
        out += product(m.act(g) * u, "down") * (w * (ids == e)).sum(-1, keepdim=True).to(x.dtype).double()
    return out


def made(**changes: Any) -> tuple[Smoothed, Tensor]:
    m = type("Smoothed", (Smoothed,), changes)()
    m.gate.data = m.gate.data.to(BF)
    return m, torch.randn(9, H, dtype=BF)


# what the model has -> the call that carries the scales of the down projection, and its argument
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "npu_dequant_swiglu_quant", "quant_scale"),
    ({"own": False}, "npu_dequant_swiglu_quant", "quant_scale"),
    ({"divides": True}, "npu_dequant_swiglu_quant", "quant_scale"),
    ({"act": staticmethod(F.gelu), "dtype": BF}, "npu_dynamic_quant", "smooth_scales"),
]


@pytest.mark.parametrize(("changes", "call", "argument"), CASES)
@torch.no_grad()
def test_a_model_with_smooth_scales(changes: dict[str, Any], call: str, argument: str) -> None:
    """The kernel that takes weights in the fractal format cannot carry them and is not taken; as near to float64 as eager is."""
    module, x = made(**changes)
    want = exact(module, x)
    with Seen() as seen:
        out = compiled(module, strict=True, weight_format="nz", dynamic=False)(x)
    nodes = {str(n.target).split(".")[1]: n for n in seen.lowered[0].module.graph.nodes if str(n.target).startswith("npu.")}
    assert nodes["npu_moe_init_routing_v2"].kwargs["scale"].meta["val"].shape == (E, H)
    assert nodes[call].kwargs[argument].meta["val"].shape == (E, I)
    assert call == "npu_dynamic_quant" or seen.calls()[-5:] == CHAIN
    assert error(out, want) <= 1.25 * error(module(x), want) and error(out, want) < 0.02
    if changes == {"own": False} or call == "npu_dynamic_quant":
        torch._dynamo.reset()
        again, _ = through_documents(module, x)
        assert error(again, want) <= 0.02


@pytest.mark.parametrize(("changes", "why"), [
    ({"act": staticmethod(F.gelu)}, "smooth scales between the products are torch.float32"),
    ({"act": staticmethod(F.gelu), "dtype": BF, "divides": True}, "smooth scales between the products divide"),
])  # fmt: skip
@torch.no_grad()
def test_what_no_chain_carries_stays_and_says_so(changes: dict[str, Any], why: str) -> None:
    module, x = made(**changes)
    out = compiled(module, dynamic=False)(x)
    assert error(out, exact(module, x)) <= 1.25 * error(module(x), exact(module, x))
    report = moe_compile.last_report()
    assert any(why in said for said in [*report.notes, *map(str, report.rejected), *(str(b) for b in report.blocks)]), report


def test_laws_of_smooth_scales() -> None:
    for smooth, dtype in ((Scale.TIMES, torch.float32), (Scale.DIVIDES, BF)):
        p = replace(PROBLEM, nz=True, smooth=smooth, smooth_dtype=dtype)
        assert int8.choose(p)[0] is int8.SUMS and "4 bits only" in str(int8.FUSED.refuses(p))
        assert int8.choose(replace(p, inner=64))[0] is None
    assert int8.choose(replace(PROBLEM, inner=64, smooth=Scale.TIMES, smooth_dtype=BF))[0] is int8.STEPS


def test_rows_smoothed_before_one_product_only_are_taken() -> None:
    from test_stored import CONCAT

    from moe_compile.ir import Rows

    rows = Rows(8, torch.int8, floor=1e-8)
    e = replace(CONCAT, dtype=BF, up_rows=replace(rows, smooth=Scale.TIMES), down_rows=rows)
    assert capability.refuses(MoeBlock(None, e)) is None
    assert "before one product" in str(capability.refuses(MoeBlock(None, replace(e, down_rows=None))))
