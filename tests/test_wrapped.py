"""Parameters that are wrapper subclasses: read by the tensors that they hold where their products are those of their floats."""

from __future__ import annotations

from typing import Any

import catalogue
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moe_compile import ir
from moe_compile.report import Report, collecting

F8 = torch.float8_e4m3fn


class Float8Tensor(torch.Tensor):
    """A stand-in for torchao's: codes and scales of rows; every operation is that of the floats."""

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor, act_quant_kwargs: Any = None) -> Float8Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.float32, device=qdata.device)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, qdata: Tensor, scale: Tensor, act_quant_kwargs: Any = None) -> None:
        self.qdata, self.scale, self.act_quant_kwargs = qdata, scale, act_quant_kwargs

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["qdata", "scale"], self.act_quant_kwargs

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Float8Tensor:
        return cls(inner["qdata"], inner["scale"], context)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)})"

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.qdata.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].qdata.detach(), args[0].scale.detach(), args[0].act_quant_kwargs)
        args, kwargs = tree_map(lambda t: t.dequantize() if isinstance(t, cls) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


Float8Tensor.__module__ = "torchao.stand_in"


class Quantile(Float8Tensor):
    """One that nobody knows."""


Quantile.__module__ = "torchao.stand_in"


def compiled(entry: str, kind: type[Float8Tensor], inner: str = "eager", **given: Any) -> tuple[float, Report]:
    torch._dynamo.reset()
    model = catalogue.build(catalogue.entries()[entry]).eval()
    for name in ("up", "down"):
        w = getattr(model, name).detach()
        scale = w.abs().amax(-1, keepdim=True) / 448
        held = kind((w / scale).to(F8), scale, **given)
        delattr(model, name)
        setattr(model, name, nn.Parameter(held, requires_grad=False))
    x = model.example_inputs(9)
    with torch.no_grad(), collecting() as report:
        got, want = torch.compile(model, backend="moe_fused", options={"inner": inner})(*x), model(*x)
    return float((got - want).norm() / want.norm()), report


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_codes_and_scales_are_read_out_of_a_parameter(inner: str) -> None:
    """The op takes what the parameter holds, and no floats of all experts are made."""
    error, report = compiled("DenseBmm", Float8Tensor, inner)
    assert len(report.blocks) == 1 and error < 1e-5, (report.rejected, error)
    assert report.blocks[0].ir.experts.up_stored == ir.Stored(8, F8, rows=1)


def test_one_that_rounds_rows_is_left_with_that_reason() -> None:
    error, report = compiled("DenseBmm", Float8Tensor, act_quant_kwargs=("per row",))
    assert not report.blocks and error == 0 and [r.code for r in report.rejected] == ["subclass"]
    assert "rounds or scales the rows" in report.rejected[0].reason


def test_one_that_nobody_knows_is_left_with_that_reason() -> None:
    error, report = compiled("DenseBmm", Quantile)
    assert not report.blocks and error == 0 and "it alone knows" in report.rejected[0].reason


def test_the_parameter_stays_where_nothing_is_fused() -> None:
    """A block that is left as written reads the parameter, as it did."""
    error, report = compiled("LoraOtherExpert", Float8Tensor)
    assert not report.blocks and error == 0, report.rejected
