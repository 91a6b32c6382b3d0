"""A shared expert in few bits as an op of its own: where it is emitted, that it is right against float64, what is near, what is told."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.base import Case, H, I
from catalogue.packed import G, Int4Offset
from catalogue.quantised import scales, stored
from torch import Tensor, nn

import moe_compile
from moe_compile import ir
from moe_compile.ir import scalar as act
from moe_compile.lowering import target


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Beside(Case):
    """Routed experts of floats, and a shared expert in int8 with a scale for each output channel."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("shared_up", (2 * I, H)), ("shared_down", (H, I))):
            self.register_buffer(name, stored(*shape))
            self.register_buffer(f"{name}_scale", scales(shape[0]))

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return q.to(s.dtype) * s[:, None]

    def matrix(self, name: str, x: Tensor) -> Tensor:
        """In the type of the rows: float64 for the oracle."""
        return self.floats(getattr(self, name), getattr(self, f"{name}_scale").to(x.dtype))

    def shared(self, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.matrix("shared_up", x)).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.matrix("shared_down", x))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        return self.run_experts(x, ids, w) + self.shared(x)


class Gated(Beside):
    """Its result times a sigmoid of the tokens' own; tokens [batch, sequence, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_gate = nn.Linear(H, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, H)
        w, ids = self.route(self.logits(rows))
        return self.run_experts(rows, ids, w).view(x.shape) + self.shared_gate(x).sigmoid() * self.shared(x)


class AsBase(Beside):
    """The routed sum starts from it."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        out = self.shared(x)
        for e in range(self.up.shape[0]):
            token, slot = torch.where(ids == e)
            g, u = F.linear(x[token], self.up[e]).chunk(2, -1)
            out = out.index_add(0, token, F.linear(F.silu(g) * u, self.down[e]) * w[token, slot, None])
        return out


class WithBias(Beside):
    """A bias behind each product."""

    def __init__(self) -> None:
        super().__init__()
        self.b1, self.b2 = nn.Parameter(torch.randn(2 * I)), nn.Parameter(torch.randn(H))

    def shared(self, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.matrix("shared_up", x), self.b1).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.matrix("shared_down", x), self.b2)


class OtherScaleBelow(Beside):
    """The down matrix has one scale for the whole: another record of that projection."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_down_scale = self.shared_down_scale[:1].clone()


class Blocks(Beside):
    """Float8, a scale for each block; rows in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        for name, (out, inner) in (("shared_up", (2 * I, H)), ("shared_down", (H, I))):
            setattr(self, name, (torch.randn(out, inner) * 20).to(torch.float8_e4m3fn))
            setattr(self, f"{name}_scale", (torch.rand(out // 4, inner // 4) + 0.3) / 40)

    def matrix(self, name: str, x: Tensor) -> Tensor:
        q, s = getattr(self, name), getattr(self, f"{name}_scale")
        return (q.to(s.dtype) * s.repeat_interleave(4, 0).repeat_interleave(4, 1)).to(x.dtype)


class Packed(Beside):
    """Eight codes an int32, a scale for each group of inputs."""

    def __init__(self) -> None:
        super().__init__()
        info = torch.iinfo(torch.int32)
        for name, (out, inner) in (("shared_up", (2 * I, H)), ("shared_down", (H, I))):
            setattr(self, name, torch.randint(info.min, info.max, (out, inner // 8)).int())
            setattr(self, f"{name}_scale", (torch.rand(out, inner // G) + 0.3) / 16)

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return ((Int4Offset.codes(self, q) - 8).to(s.dtype).unflatten(-1, (-1, G)) * s[..., None]).flatten(-2)  # type: ignore[arg-type]


class InPlace(Beside):
    """Near miss: the routed sum is added to it in place."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        return self.shared(x).add_(self.run_experts(x, ids, w))


class Unlike(Beside):
    """Near miss: of gate and up, two matrices, one has a scale for each channel and one a scale for the whole."""

    def shared(self, x: Tensor) -> Tensor:
        q, s = self.shared_up, self.shared_up_scale.to(x.dtype)
        g, u = F.linear(x, self.floats(q[:I], s[:I])), F.linear(x, self.floats(q[I:], s[:1]))
        return F.linear(F.silu(g) * u, self.matrix("shared_down", x))


class Transposed(Beside):
    """Near miss: scales of its input channels, which no record says."""

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return q.to(s.dtype) * s[: q.shape[1]].flip(0)


class WithPair(Beside):
    """Near miss: a low-rank pair (LoRA) beside its down projection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, I)), nn.Parameter(torch.randn(H, 2))

    def shared(self, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.matrix("shared_up", x)).chunk(2, -1)
        h = F.silu(g) * u
        return F.linear(h, self.matrix("shared_down", x)) + 0.5 * F.linear(F.linear(h, self.a), self.b)


def compiled(model: nn.Module, *inputs: Tensor, grad: bool = False, **options: Any) -> None:
    """Compile, and hold the results against the model in float64, where float8 codes are what they stand for."""
    exact = copy.deepcopy(model).double()
    run = torch.compile(model, backend="moe_fused", options={"inner": "eager", **options})
    with torch.set_grad_enabled(grad):
        for x in inputs:
            want, base, out = (y.detach().double() for y in (exact(x.double()), model(x), run(x)))
            assert out.shape == base.shape
            assert float((out - want).norm()) <= max(1.25 * float((base - want).norm()), 1e-5 * float(want.norm()))


def told() -> str:
    """The block's note, and what is told of its shared expert."""
    (block,) = moe_compile.last_report().blocks
    return f"{block.note} | {block.shared}"


@pytest.mark.parametrize("cls", [Blocks, AsBase, Gated, WithBias, Packed, Beside, OtherScaleBelow], ids=lambda c: c.__name__)
def test_emitted(cls: Any) -> None:
    """Verdict: an op of its own, right to float64 for one token and for many."""
    torch.manual_seed(1)
    model = cls().eval()
    if cls is Blocks:
        model.gate.data, model.up.data, model.down.data = (p.data.bfloat16() for p in (model.gate, model.up, model.down))
    x = torch.randn(2, 9, H, dtype=model.up.dtype)
    compiled(model, *(x, x[:, :1]) if cls is Gated else (x[0], x[0, :1]) if cls is Packed else (x[0],))
    assert told().endswith(", an op of its own"), told()


NEAR = {
    "written": (InPlace, "the shared expert as written: its result is written in place"),
    "unlike": (Unlike, "| –"),
    "scales of inputs": (Transposed, "| –"),
    "low-rank": (WithPair, "the shared expert as written: it has low-rank pairs (LoRA)"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    """Verdict: as written, with the reason; results are the model's."""
    torch.manual_seed(1)
    cls, why = NEAR[name]
    compiled(cls().eval(), torch.randn(9, H))
    assert "an op of its own" not in told() and why in told(), told()


@pytest.mark.parametrize(
    "why, options",
    [("a gradient may be wanted", {"grad": True}), ("activations='int8' is for the routed experts", {"activations": "int8"})],
    ids=["training", "rows asked for"],
)
def test_what_is_set(why: str, options: dict[str, Any]) -> None:
    """Verdict: as written where gradients are on, or where the user asks for other rows of the routed experts."""
    torch.manual_seed(1)
    compiled(Beside(), torch.randn(9, H), **options)
    assert why in told() and told().endswith(", as written")


def test_what_targets_decode() -> None:
    """Rows that are rounded, matrices [in, out] and devices without such kernels have reasons of their own."""
    how = ir.Stored(8, torch.float8_e4m3fn, rows=4, columns=4)
    e = ir.Experts(1, H, I, H, ir.Form.CONCAT, act.SWIGLU, up_stored=how, down_stored=how)
    rows = ir.Rows(8, torch.float8_e4m3fn, 4)
    cases = {"": e, "rounded": replace(e, up_rows=rows, down_rows=rows), "decode": replace(e, up_transposed=True)}
    for why, one in cases.items():
        assert why in target("cpu").decodes(ir.MoeBlock(None, one)) and (why or not target("cpu").decodes(ir.MoeBlock(None, one)))
    assert not target("cuda").decodes(ir.MoeBlock(None, cases["rounded"]))
    assert "one expert in few bits" in target("ascend").decodes(ir.MoeBlock(None, e))
