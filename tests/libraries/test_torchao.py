"""torchao's tensors as experts' parameters, as the wheel has them: what they hold is read, what is not understood has its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile import ir
from moe_compile.ir.stored import Scale
from moe_compile.passes.aten import wrapped
from moe_compile.report import collecting

torchao = pytest.importorskip("torchao.quantization")
from torchao.prototype.mx_formats.mx_tensor import MXTensor  # noqa: E402
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor  # noqa: E402
from torchao.quantization.granularity import PerRow, PerTensor  # noqa: E402
from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs  # noqa: E402

E, H, I, K = 4, 64, 32, 2
F8, FLOATS = torch.float8_e4m3fn, None
NVFP4 = ir.Stored(4, torch.uint8, rows=1, columns=16, axis=2, order=(0, 1), values=wrapped.E2M1)


class Block(nn.Module):
    """A router and experts of two products; parameters as `make` has them: stacks, or a Linear each."""

    def __init__(self, make: Callable[[Tensor], Tensor], stacked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E, bias=False)
        up, down = torch.randn(E, 2 * I, H) / 8, torch.randn(E, H, I) / 6
        if stacked:
            self.up, self.down = (nn.Parameter(make(w), requires_grad=False) for w in (up, down))
        else:
            self.up, self.down = (nn.ParameterList([nn.Parameter(make(w), requires_grad=False) for w in ws]) for ws in (up, down))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for e in range(E):
            t, j = torch.where(ids == e)
            g, u = F.linear(x[t], self.up[e]).chunk(2, -1)
            out.index_add_(0, t, F.linear(F.silu(g) * u, self.down[e]) * w[t, j, None])
        return out


MAKES: dict[str, tuple[Callable[[Tensor], Tensor], bool, Any]] = {
    "float8, scales of rows, a stack": (lambda w: torchao.Float8Tensor.from_hp(w, granularity=PerRow()), True, ir.Stored(8, F8, rows=1)),
    "float8, scales of rows": (lambda w: torchao.Float8Tensor.from_hp(w, granularity=PerRow()), False, ir.Stored(8, F8, rows=1)),
    "float8, one scale": (lambda w: torchao.Float8Tensor.from_hp(w, granularity=PerTensor()), False, ir.Stored(8, F8)),
    "nvfp4": (NVFP4Tensor.to_nvfp4, False, NVFP4),
    "nvfp4, two scales": (
        lambda w: NVFP4Tensor.to_nvfp4(w, per_tensor_scale=torch.tensor(0.01)), False, replace(NVFP4, second=Scale.TIMES),
    ),
    "int8 less zero points": (lambda w: torchao.Int8Tensor.from_hp(w, PerRow()), False, FLOATS),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKES)
def test_what_a_parameter_holds_is_read(name: str) -> None:
    make, stacked, how = MAKES[name]
    torch._dynamo.reset()
    m, x = Block(make, stacked), torch.randn(7, H)
    with torch.no_grad(), collecting() as report:
        got, want = torch.compile(m, backend="moe_fused", options={"inner": "aot_eager"})(x), m(x)
    assert len(report.blocks) == 1, report.rejected
    assert report.blocks[0].ir.experts.up_stored == how
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_is_not_read_has_its_reason() -> None:
    """Products that round their rows; a tensor whose products nothing is known of."""
    w = torch.randn(2 * I, H)
    rounding = torchao.Float8Tensor.from_hp(w, granularity=PerRow(), act_quant_kwargs=QuantizeTensorToFloat8Kwargs())
    assert "act_quant_kwargs" in wrapped.why_not(rounding)
    assert "MXTensor" in wrapped.why_not(MXTensor.to_mx(w, F8, 32))
