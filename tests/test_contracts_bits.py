"""Codes of four bits behind an op that makes floats of them (as bitsandbytes has for QLoRA), double quantised: stand-ins of its ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile.passes.aten import own_gradients
from moe_compile.passes.aten.contracts_bits import _NF4

E, K, H, I, RUN, PER = 4, 2, 64, 32, 64, 4


@torch.library.custom_op("four_bits::dequantize_4bit", mutates_args=())
def dequantize_4bit(A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    table = torch.tensor(_NF4 if quant_type == "nf4" else [v**3 for v in _NF4], dtype=torch.float64)
    numbers = [table[c] * absmax.flatten()[n // blocksize] for n, c in enumerate(c for b in A.flatten().tolist() for c in divmod(b, 16))]
    return torch.stack(numbers).view(shape).to(dtype)


@torch.library.custom_op("four_bits::dequantize_blockwise", mutates_args=())
def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return (code[A.long()] * absmax.repeat_interleave(blocksize)).to(dtype)


@dequantize_4bit.register_fake
def _(A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return A.new_empty(shape, dtype=dtype)


@dequantize_blockwise.register_fake
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(A, dtype=dtype)


class Linear(nn.Module):
    """x W: codes [n / 2, 1]; the largest of each run of 64 is a code of 8 bits itself, times a float of several runs, and the mean. A pair
    of low rank beside it where `rank`."""

    kind = "nf4"

    def __init__(self, out: int, inp: int, rank: int = 0) -> None:
        super().__init__()
        self.shape, runs = [out, inp], out * inp // RUN
        self.register_buffer("weight", torch.randint(0, 256, (out * inp // 2, 1)).to(torch.uint8))
        self.register_buffer("absmax", torch.randint(0, 256, (runs,)).to(torch.uint8))
        self.register_buffer("code", torch.linspace(-1, 1, 256))
        self.register_buffer("second", (torch.rand(runs // PER) + 0.1) / 8)
        self.register_buffer("mean", torch.tensor(0.2))
        if rank:
            self.a, self.b = nn.Parameter(torch.randn(rank, inp) / 8), nn.Parameter(torch.randn(out, rank) / 8)

    def floats(self, dtype: torch.dtype) -> Tensor:
        largest = torch.ops.four_bits.dequantize_blockwise(self.absmax, self.second, self.code, PER, dtype) + self.mean
        return torch.ops.four_bits.dequantize_4bit(self.weight, largest, RUN, self.kind, self.shape, dtype)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.floats(x.dtype))
        return y + F.linear(F.linear(x, self.a), self.b) if hasattr(self, "a") else y


class Product(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit: x W, the floats made once more for the gradient of x; codes and scales have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, linear: Linear) -> Tensor:
        ctx.linear, ctx.codes = linear, codes
        return F.linear(x, linear.floats(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return torch.matmul(grad, ctx.linear.floats(grad.dtype)) if ctx.needs_input_grad[0] else None, None, None


class Twice(Product):
    """Near miss: the gradient of the rows is not that of the product."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return 2 * torch.matmul(grad, ctx.linear.floats(grad.dtype)), None, None


class Clipped(Product):
    """Near miss: a large gradient is clipped, which small ones do not show."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return torch.matmul(grad.clamp(-30, 30), ctx.linear.floats(grad.dtype)), None, None


class InFunction(Linear):
    product: type[Product] = Product

    def forward(self, x: Tensor) -> Tensor:
        y = self.product.apply(x, self.weight, self)  # type: ignore[no-untyped-call]
        return y + F.linear(F.linear(x, self.a), self.b) if hasattr(self, "a") else y


class InAnotherFunction(InFunction):
    product = Twice


class InClippedFunction(InFunction):
    product = Clipped


class TrainedScales(InFunction):
    """Near miss: scales are trained, and the function has no gradient for them."""

    def __init__(self, out: int, inp: int, rank: int = 0) -> None:
        super().__init__(out, inp, rank)
        second = self.second
        del self.second
        self.second = nn.Parameter(second)


class OtherCodes(Linear):
    """Near miss: another table, which no contract knows."""

    kind = "fp4"


class Block(nn.Module):
    """Experts of such linears, as a list, in a loop over all of them."""

    def __init__(self, linear: type[Linear] = Linear, rank: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(nn.ModuleList([linear(I, H, rank), linear(I, H, rank), linear(H, I, rank)]) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for e, (gate, up, down) in enumerate(self.experts):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, down(F.silu(gate(x[t])) * up(x[t])) * w[t, j, None])
        return out


def run(m: nn.Module, x: Tensor, compiled: bool) -> tuple[Tensor, ...]:
    """The result; with parameters of low rank also the gradients of the tokens and of all that is trained."""
    x = x.clone().requires_grad_(hasattr(m.experts[0][0], "a"))  # type: ignore[index, union-attr]
    torch._dynamo.reset()
    with torch.set_grad_enabled(x.requires_grad):
        y = (torch.compile(m, backend="moe_fused", options={"inner": "eager"}) if compiled else m)(x)
    if not x.requires_grad:
        return (y,)
    grads = torch.autograd.grad(y.square().sum(), [x, *m.parameters()], allow_unused=True)
    return (y, *(g for g in grads if g is not None))


@pytest.mark.parametrize(("linear", "rank"), [(Linear, 0), (InFunction, 2)])
def test_doubly_quantised_codes_are_read(linear: type[Linear], rank: int) -> None:
    """As stored: no floats of all experts. With gradients through a function that says them itself (QLoRA). Against the same in float64."""
    m = Block(linear, rank)
    x = torch.randn(9, H)
    ours = run(m, x, True)
    (block,) = moe_compile.last_report().blocks
    assert [(s.bits, s.order) for s in (block.ir.experts.up_stored, block.ir.experts.down_stored)] == [(4, (1, 0))] * 2
    for got, want in zip(ours, run(m.double(), x.double(), False), strict=True):
        assert float((got - want).norm()) <= 1e-5 * float(want.norm())


_OTHERS = [(InFunction, True), (InAnotherFunction, False), (InClippedFunction, False), (TrainedScales, False)]


@pytest.mark.parametrize(("linear", "own"), _OTHERS)
def test_a_function_of_other_gradients_stays(linear: type[Linear], own: bool) -> None:
    """What it computes stands in a function's place while its graph is read, where its gradients are those of that; then it does again."""
    seen = []

    def look(gm: fx.GraphModule, inputs: Any) -> Any:
        before = [n.name for n in gm.graph.nodes]
        with own_gradients.opened(gm):
            seen.append(any("dequantize_4bit" in str(n.target) for n in gm.graph.nodes))
        assert [n.name for n in gm.graph.nodes] == before
        return gm.forward

    torch._dynamo.reset()
    m, x = linear(I, H), torch.randn(9, H, requires_grad=True)
    torch.testing.assert_close(torch.compile(m, backend=look)(x), m(x))
    assert seen == [own]


def test_other_codes_stay_behind_their_op() -> None:
    m, x = Block(OtherCodes), torch.randn(9, H)
    (ours,) = run(m, x, True)
    assert not any(b.ir.experts.coded for b in moe_compile.last_report().blocks)
    torch.testing.assert_close(ours, run(m, x, False)[0])
