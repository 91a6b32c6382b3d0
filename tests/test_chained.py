"""Experts that are a chain of products and maps of rows: the op is the oracle, so are its gradients, and records hold all of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck

import moe_compile
from moe_compile import ir, ops
from moe_compile.ir import Form
from moe_compile.ir import scalar as act
from moe_compile.ir.chain import ROW, Chain, Kind, Matrix, Stage, Vector, mean, product, total, vector
from moe_compile.ir.codec import decode, record_of
from moe_compile.ir.records import ChainedLayout

E, H, I, T, K = 5, 8, 6, 11, 2
y, z, p, q = product(0), product(1), vector(0), vector(1)
EPS = sp.Rational(1, 1000)
RMS = y / sp.sqrt(mean(y**2) + EPS)
CHAINS = {
    "three stages, all kinds": Chain(
        (
            Stage(H, (), (Vector(0),), ROW / sp.sqrt(mean(ROW**2) + EPS) * p),
            Stage(I, (Matrix(1), Matrix(1, 1, I)), (), act.silu(y) * z),
            Stage(I, (Matrix(2, transposed=True),), (Vector(3),), act.relu(y) + p),
            Stage(H, (Matrix(4),), (Vector(5), Vector(6, 0)), ROW + p * (RMS - mean(y)) + q),
        ),
        (Kind.SHARED, Kind.STACKED, Kind.STACKED, Kind.LISTED, Kind.LISTED, Kind.STACKED, Kind.SHARED),
    ),
    "interleaved, a unit row": Chain(
        (
            Stage(I, (Matrix(0, 2), Matrix(0, 2, 1)), (), act.relu(y) * z),
            Stage(H, (Matrix(1),), (), y / act.clamp(sp.sqrt(total(y**2)), sp.Rational(1, 10), sp.oo)),
        ),
        (Kind.STACKED, Kind.STACKED),
    ),
}
SHAPES = {
    "three stages, all kinds": [(H,), (E, 2 * I, H), (E, I, I), *[(I,)] * E, *[(H, I)] * E, (E, H), (1,)],
    "interleaved, a unit row": [(E, 2 * I, H), (E, H, I)],
}
BY_NAME = pytest.mark.parametrize("name", CHAINS)


def experts(name: str, **fields: Any) -> ir.Experts:
    return ir.Experts(E, H, I, H, Form.SINGLE, act.G, chain=CHAINS[name], stacked=Kind.LISTED not in CHAINS[name].kinds, **fields)


def tensors(e: ir.Experts, name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    ids = torch.randint(-1, E + e.num_identity + 1, (T, K), generator=gen)
    return {"x": random(T, H), "ids": ids, "weights": random(T, K), "parts": [random(*s) for s in SHAPES[name]], "add": None}


def call(e: ir.Experts, t: dict[str, Any]) -> Tensor:
    return torch.ops.moe_compile.experts_chained(*t.values(), *ops.experts_args(e))


def oracle(e: ir.Experts, t: dict[str, Any]) -> Tensor:
    return e.evaluate(t["x"], t["ids"], t["weights"], (), (), add=t["add"], parts=t["parts"])


@BY_NAME
@pytest.mark.parametrize("identity", [0, 2])
def test_the_op_is_the_oracle_and_so_are_its_gradients(name: str, identity: int) -> None:
    e = experts(name, num_identity=identity)
    t = tensors(e, name)
    t["add"] = torch.randn(T, H, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (t["x"], t["weights"], t["add"], *t["parts"])]
    out, want = call(e, t), oracle(e, t)
    torch.testing.assert_close(out, want)
    g = torch.randn_like(out)
    theirs = torch.autograd.grad(want, leaves, g, allow_unused=True)
    for got, grad, leaf in zip(torch.autograd.grad(out, leaves, g), theirs, leaves, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(leaf) if grad is None else grad)


@pytest.mark.parametrize("name", [n for n in CHAINS if n != "three stages, all kinds"])  # that one takes 20 s
def test_a_gradient_has_one_itself(name: str) -> None:
    e = experts(name)
    t = tensors(e, name)
    assert torch.autograd.gradgradcheck(
        lambda x, w: call(e, t | {"x": x, "weights": w}), (t["x"].requires_grad_(), t["weights"].requires_grad_())
    )


@BY_NAME
def test_a_record_holds_all_of_it(name: str) -> None:
    e = experts(name)
    record = record_of(ChainedLayout, ops.experts_args(e))
    back = decode(ir.Experts, record, hidden=H, **record.others)
    t = tensors(e, name)
    torch.testing.assert_close(oracle(back, t), oracle(e, t))
    assert back.chain is not None and back.chain.kinds == CHAINS[name].kinds
    assert [s.matrices for s in back.chain.stages] == [s.matrices for s in CHAINS[name].stages]


def test_torch_checks_the_op() -> None:
    e = experts("three stages, all kinds")
    t = tensors(e, "three stages, all kinds", torch.float32)
    opcheck(torch.ops.moe_compile.experts_chained.default, (*t.values(), *ops.experts_args(e)))
    for x in (t["x"], *t["parts"]):
        x.requires_grad_()
    opcheck(torch.ops.moe_compile.experts_chained.default, (*t.values(), *ops.experts_args(e)))


def test_half_precision_is_rounded_at_products_only() -> None:
    name = "three stages, all kinds"
    e = experts(name)
    t = tensors(e, name, torch.bfloat16)
    wide = {k: [x.double() for x in v] if isinstance(v, list) else v.double() if k == "x" else v for k, v in t.items()}
    out, want = call(e, t), oracle(e, wide)
    assert out.dtype is torch.bfloat16
    assert float((out - want).abs().max() / want.abs().max()) < 2e-2


def test_fewer_experts_in_a_parameter_are_told() -> None:
    name = "interleaved, a unit row"
    t = tensors(experts(name), name)
    t["parts"][0] = t["parts"][0][:3]
    with pytest.raises(ValueError, match="holds fewer experts"):
        call(experts(name), t)


def test_a_row_of_zeros_has_the_gradient_of_a_norm() -> None:
    """F.normalize's gradient at a row of zeros is 0, and no NaN."""
    name = "interleaved, a unit row"
    e = experts(name)
    t = tensors(e, name)
    t["x"] = torch.zeros(T, H, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(call(e, t).sum(), t["x"])
    assert bool(torch.isfinite(grad).all())


class Spark(nn.Module):
    """A loop over the experts that were hit, an RMSNorm behind each: muse_spark's experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.norm = nn.Linear(H, E, bias=False), nn.RMSNorm(H, eps=1e-6)
        self.up, self.down = nn.Parameter(torch.randn(E, 2 * I, H)), nn.Parameter(torch.randn(E, H, I))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            g, u = F.linear(x[t], self.up[e]).chunk(2, -1)
            out.index_add_(0, t, self.norm(F.linear(F.silu(g) * u, self.down[e])) * w[t, j, None])
        return out


def test_training_through_a_captured_loop() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Spark()
    nn.init.normal_(model.norm.weight)
    eager = copy.deepcopy(model)
    fused = torch.compile(model, backend="moe_fused", options={"inner": "aot_eager"})
    x = torch.randn(T, H)
    both = [m(x) for m in (fused, eager)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)
    for out in both:
        (out * torch.arange(H)).sum().backward()
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
    (block,) = moe_compile.last_report().blocks
    assert block.ir.experts.chain is not None and block.validated


def test_a_target_without_kernels_for_it_says_so() -> None:
    block = ir.MoeBlock(None, experts("interleaved, a unit row"))
    from moe_compile import lowering

    told = lowering.target("ascend").reason(block)
    assert told is not None and told.startswith("norms, residuals or more than two products in an expert")
    assert lowering.target("cpu").reason(block) is None
