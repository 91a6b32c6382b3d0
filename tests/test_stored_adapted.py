"""Low-rank pairs beside weights in few bits (LoRA on a quantised base): the op is the oracle, so are its gradients, and codes get none."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import catalogue
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moe_compile import ir, ops
from moe_compile.ir import Form
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import ADAPTED, STORED_ADAPTED
from moe_compile.lowering.ascend import capability
from moe_compile.lowering.triton import stored as on_cuda
from moe_compile.report import Report, collecting

E, H, I, T, K, R, B = 5, 12, 8, 11, 2, 3, 4
F8 = torch.float8_e4m3fn
BLOCKS = ir.Stored(8, F8, rows=B, columns=B)
INT4 = ir.Stored(4, torch.uint8, rows=1, columns=B, axis=2, order=(0, 1), offset=-8.0)
BOTH = ir.Experts(E, H, I, H, Form.CONCAT, act.SWIGLU, up_stored=BLOCKS, down_stored=BLOCKS, up_pair=2.0, down_pair=-1.5)
MEANINGS = {
    "blocks": BOTH,
    "int4, a list, gate and up apart": replace(BOTH, form=Form.SEPARATE, stacked=False, second_pair=0.5, up_stored=INT4, down_stored=INT4),
    "a pair on one of three": replace(BOTH, form=Form.SEPARATE, up_pair=0.0, second_pair=0.5, down_pair=0.0),
    "biases": replace(BOTH, up_bias=True, down_bias=True),
}
BY_NAME = pytest.mark.parametrize("name", MEANINGS)


def tensors(e: ir.Experts) -> dict[str, Any]:
    """Operands of a call in float64, in the order of the op's schema."""
    gen = torch.Generator().manual_seed(0)
    parts, rows = (2, I) if e.form is Form.SEPARATE else (1, 2 * I)

    def group(parts: int, *shape: int) -> list[Tensor]:
        t = torch.randn(parts * E, *shape, generator=gen, dtype=torch.float64) * shape[-1] ** -0.5
        return list(t.chunk(parts)) if e.stacked else [m.clone() for m in t]

    def codes(how: ir.Stored | None, n: int, k: int, parts: int) -> list[Tensor]:
        assert how is not None
        if how.axis:
            t = torch.randint(0, 256, (parts * E, n, k // 2), generator=gen).to(torch.uint8)
        else:
            t = (torch.randn(parts * E, n, k, generator=gen) * 20).to(F8)
        return list(t.chunk(parts)) if e.stacked else [m.clone() for m in t]

    def scales(how: ir.Stored | None, n: int, k: int, parts: int) -> list[Tensor]:
        assert how is not None
        return [t.abs() / 20 + 0.01 for t in group(parts, *how.scales_of((n, k)))]

    pairs = sum(1 for s in (e.up_pair, e.second_pair) if s)
    made = {
        "x": torch.randn(T, H, generator=gen, dtype=torch.float64),
        "ids": torch.randint(-1, E + 1, (T, K), generator=gen),
        "weights": torch.rand(T, K, generator=gen, dtype=torch.float64),
        "up": codes(e.up_stored, rows, H, parts),
        "down": codes(e.down_stored, H, I, 1),
        "up_bias": group(parts, rows) if e.up_bias else [],
        "down_bias": group(1, H) if e.down_bias else [],
        "up_scale": scales(e.up_stored, rows, H, parts),
        "down_scale": scales(e.down_stored, H, I, 1),
        "up_a": group(pairs, R, H) if pairs else [],
        "up_b": group(pairs, rows, R) if pairs else [],
        "down_a": group(1, R, I) if e.down_pair else [],
        "down_b": group(1, H, R) if e.down_pair else [],
    }
    return {n: made.get(n, []) for n in ("x", "ids", "weights", *STORED_ADAPTED)} | {"add": None}


def call(e: ir.Experts, t: dict[str, Any]) -> Tensor:
    return torch.ops.moe_compile.experts_stored_adapted(*t.values(), *ops.experts_args(e))


def trained(t: dict[str, Any]) -> list[Tensor]:
    """Rows, routing weights, biases and pairs."""
    own = [n for n in ADAPTED if n not in ("up", "down")]
    return [x.requires_grad_() for x in (t["x"], t["weights"], *(x for n in own for x in t[n]))]


@BY_NAME
def test_the_op_is_the_oracle_and_so_are_its_gradients(name: str) -> None:
    e, t = MEANINGS[name], tensors(MEANINGS[name])
    leaves = trained(t)
    grad = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, want = call(e, t), e.evaluate(**t)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad))


def test_scales_that_are_trained_have_gradients_too() -> None:
    t = tensors(BOTH)
    leaves = [t["x"].requires_grad_(), t["up_scale"][0].requires_grad_(), t["down_b"][0].requires_grad_()]
    got, want = (torch.autograd.grad(y.sin().sum(), leaves) for y in (call(BOTH, t), BOTH.evaluate(**t)))
    torch.testing.assert_close(got, want)


@BY_NAME
@pytest.mark.parametrize("tokens", [1, T])
def test_in_turns_on_a_workspace(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA runs, here on the CPU: floats of a few experts at a time, or of each pair, with the pairs of those experts."""
    monkeypatch.setattr(on_cuda, "CHUNK", 2)
    monkeypatch.setattr(on_cuda, "FEW", K)
    monkeypatch.setattr(on_cuda, "_by_kernel", lambda held: False)
    e, t = MEANINGS[name], tensors(MEANINGS[name])
    t |= {n: t[n][:tokens] for n in ("x", "ids", "weights")}
    got = on_cuda.experts_stored_adapted(*t.values(), *ops.experts_args(e))
    torch.testing.assert_close(got, e.evaluate(**t), rtol=1e-5, atol=1e-5)  # floats are made in float32


def test_what_compilers_ask_of_an_op() -> None:
    e = replace(BOTH, up_stored=INT4, down_stored=INT4)  # opcheck multiplies its arguments, which float8 has no product for
    t = tensors(e)
    trained(t)
    opcheck(torch.ops.moe_compile.experts_stored_adapted.default, (*t.values(), *ops.experts_args(e)))


def near(got: Tensor | None, want: Tensor | None, name: str = "") -> None:
    assert got is not None and want is not None, name
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max()), name


def compiled(name: str, train: bool) -> tuple[Any, Any, Report]:
    """An entry of the catalogue and its copy that is compiled, after a step of each on the same rows."""
    torch._dynamo.reset()
    eager = catalogue.build(catalogue.entries()[name])
    fused = copy.deepcopy(eager)
    x = torch.randn(9, eager.example_inputs(9)[0].shape[-1])
    rows = [x.clone().requires_grad_(train) for _ in range(2)]
    with torch.set_grad_enabled(train), collecting() as report:
        got = torch.compile(fused, backend="moe_fused", options={"inner": "aot_eager"})(rows[0])
    with torch.set_grad_enabled(train):
        want = eager(rows[1])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if train:
        for y in (got, want):
            y.square().sum().backward()
        near(rows[0].grad, rows[1].grad)
    return fused, eager, report


@pytest.mark.parametrize("name", ["LoraOnBlocks", "LoraOnChannels"])
def test_training_an_adapter_on_a_stored_base(name: str) -> None:
    """Gradients of rows, of the router and of A and B are eager's; codes and scales have none."""
    fused, eager, report = compiled(name, train=True)
    assert report.blocks and report.blocks[0].ir.experts.adapted and report.blocks[0].ir.experts.coded, report.rejected
    for (n, p), q in zip(fused.named_parameters(), eager.parameters(), strict=True):
        near(p.grad, q.grad, n)
    assert fused.up_a.grad is not None and all(b.grad is None for b in fused.buffers())


def test_rounded_rows_in_training_decline() -> None:
    """W8A8 beside a pair has no gradient: the op says so."""
    rows = ir.Rows(8, F8, B, 1e-12)
    e, t = replace(BOTH, up_rows=rows, down_rows=rows), tensors(BOTH)
    with torch.no_grad():
        call(e, t)
    t["x"].requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient through rounded rows"):
        call(e, t)


def test_ascend_declines_by_name() -> None:
    why = capability.refuses(ir.MoeBlock(None, replace(BOTH, dtype=torch.bfloat16), None, ""))
    assert why is not None and "LoRA" in why
