"""Contracts of MX kernels with an id for each row, and of one matrix (a shared expert's); ops that share a name alone with torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_contracts import F8, OPS, H, K, Mx, Sorted, _is_no_worse, compiled, define
from torch import Tensor, nn

from moe_compile import ir
from moe_compile.passes.aten import contracts_float8

_TENSORS, _END = "Tensor A, Tensor B, Tensor Bs", "ScalarType? output_dtype=None) -> Tensor"
_NAMES = ("w8a8_mx_dynamic_fp8_matmul", "w4a8_block_dynamic_fp4_matmul")
for _name in _NAMES:
    define(f"{_name}({_TENSORS}, {_END}", contracts_float8._mx_2d, lambda a, b, *_: a.new_empty(*a.shape[:-1], b.shape[-2]))
    _batched = f"{_name}_batched({_TENSORS}, Tensor expert_ids, {_END}"
    define(_batched, contracts_float8._mx_batched, lambda a, b, *_: a.new_empty(a.shape[0], b.shape[-2]))
_SHARED = ("silu", "float", "softmax_")  # one of ATen's, one that a tensor alone has, one in place
for _name in _SHARED:
    define(f"{_name}(Tensor x) -> Tensor", lambda x: 2 * F.silu(x), torch.empty_like)


class Decoding(Mx):
    """One row a (token, slot), each with its expert's id; of one matrix beside them: the first expert's, which all tokens use."""

    def __init__(self, packed: bool) -> None:
        super().__init__(packed)
        self.batched, self.one = (getattr(OPS, _NAMES[packed] + more) for more in ("_batched", ""))
        for name in ("up", "down"):
            self.register_buffer(f"own_{name}", getattr(self, name)[1].clone())
            self.register_buffer(f"own_{name}_scale", getattr(self, f"{name}_scale")[1].clone())

    def routed(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K)
        flat = ids.flatten()
        g, u = self.batched(x.repeat_interleave(K, 0), self.up, self.up_scale, flat).chunk(2, -1)
        y = self.batched(F.silu(g) * u, self.down, self.down_scale, flat) * w.reshape(-1, 1)
        return y.view(-1, K, self.hidden).sum(1)

    def shared(self, x: Tensor) -> Tensor:
        g, u = self.one(x, self.own_up, self.own_up_scale).chunk(2, -1)
        return self.one(F.silu(g) * u, self.own_down, self.own_down_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x)


class Alone(nn.Module):
    """The routed part of it, for the oracle."""

    def __init__(self, m: Decoding) -> None:
        super().__init__()
        self.m = m

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "m" else getattr(self.m, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.m.routed(x)


@pytest.mark.parametrize("packed", [False, True])
def test_an_id_for_each_row_and_one_matrix(packed: bool) -> None:
    """Recovered with what is done to rows, by groups of 32 and powers of two; the shared expert alike."""
    m, x = Decoding(packed), torch.randn(9, Mx.hidden)
    got, report = compiled(m, x)
    assert len(report.blocks) == 1, report.rejected
    block = report.blocks[0].ir
    rows = ir.Rows(8, F8, 32, 1e-12, power=True)
    assert block.shared is not None and block.experts.up_stored is not None and block.experts.up_stored.bits == (4 if packed else 8)
    for e in (block.experts, block.shared):
        assert (e.up_stored, e.down_stored) == (block.experts.up_stored,) * 2 and (e.up_rows, e.down_rows) == (rows, rows)
    with torch.no_grad():
        _is_no_worse(Alone(m), x, block.experts, got - m.shared(x))


class OtherSilu(Sorted):
    """Near miss of every activation and cast: somebody's op called as one of torch's, which is twice SiLU."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op = getattr(OPS, name)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K)
        g, u = torch.einsum("th,tkho->tko", x, self.up[ids]).chunk(2, -1)
        return (torch.einsum("tki,tkih->tkh", self.op(g) * u, self.down[ids]) * w[..., None]).sum(1)


@pytest.mark.parametrize("name", _SHARED)
def test_an_op_that_shares_its_name_with_one_of_torchs(name: str) -> None:
    """Verdict: left as written, named as what it is."""
    m, x = OtherSilu(name), torch.randn(9, H)
    got, report = compiled(m, x)
    with torch.no_grad():
        torch.testing.assert_close(got, m(x))
    (left,) = report.rejected
    assert f"what a custom op (outside_build_7f3a::{name}) computes is told by nothing but its name" in left.reason
