"""Codes of four bits behind an op that makes floats of them (as bitsandbytes has for QLoRA), double quantised: stand-ins of its ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
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
    return (y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()]))


@pytest.mark.parametrize("rank", [0, 2])
def test_doubly_quantised_codes_are_read(rank: int) -> None:
    """As stored: no floats of all experts. Against the same module in float64."""
    m = Block(rank=rank)
    x = torch.randn(9, H)
    ours = run(m, x, True)
    (block,) = moe_compile.last_report().blocks
    assert [(s.bits, s.order) for s in (block.ir.experts.up_stored, block.ir.experts.down_stored)] == [(4, (1, 0))] * 2
    for got, want in zip(ours, run(m.double(), x.double(), False), strict=True):
        assert float((got - want).norm()) <= 1e-5 * float(want.norm())


def test_other_codes_stay_behind_their_op() -> None:
    m, x = Block(OtherCodes), torch.randn(9, H)
    (ours,) = run(m, x, True)
    assert not any(b.ir.experts.coded for b in moe_compile.last_report().blocks)
    torch.testing.assert_close(ours, run(m, x, False)[0])
