"""Models that carry int8 weights with scales, and W8A8C8: what is emitted, and numbers against float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from ascend_blocks import Seen, compiled
from torch import Tensor, nn

import moe_compile
from moe_compile.ir import Form
from moe_compile.ir import scalar as act
from moe_compile.lowering.ascend import calls, int8, quant, register, schemas, store, weights

register.ensure()
E, K, H, I = 8, 2, 64, 256
ROUTED = ["npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu", "npu_grouped_matmul", "npu_moe_finalize_routing"]
CHAIN = ["npu_dequant_swiglu_quant" if n == "npu_swiglu" else n for n in ROUTED]


def stored(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape).to(torch.int8)


def scales(*shape: int) -> Tensor:
    return (torch.rand(*shape) + 0.1) / 600


class Stacked(nn.Module):
    """[E, out, in] with scales [E, out], in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(E, H))
        self.register_buffer("up", stored(E, 2 * I, H))
        self.register_buffer("up_scale", scales(E, 2 * I))
        self.register_buffer("down", stored(E, H, I))
        self.register_buffer("down_scale", scales(E, H))

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e].to(x.dtype) * self.up_scale[e][:, None]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e].to(x.dtype)) * self.down_scale[e]

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.gate).float().softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None].to(x.dtype))
        return out


class Dense(Stacked):
    """Every expert on every token."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.gate).float().softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            out = out + self.expert(e, x) * (w * (ids == e)).sum(-1, keepdim=True).to(x.dtype)
        return out


class InOut(Dense):
    """[E, in, out], one scale for each expert of the up projection, [E, 1, out] for the down projection."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_scale = stored(E, H, 2 * I), scales(E)
        self.down, self.down_scale = stored(E, I, H), scales(E, 1, H)

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = (x @ (self.up[e].to(x.dtype) * self.up_scale[e])).chunk(2, -1)
        return (F.silu(g) * u) @ (self.down[e].to(x.dtype) * self.down_scale[e])


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, out, inner in (("w1", I, H), ("w2", H, I), ("w3", I, H)):
            self.register_buffer(name, stored(out, inner))
            self.register_buffer(f"{name}_scale", scales(out, 1))

    def forward(self, x: Tensor) -> Tensor:
        w1, w2, w3 = (getattr(self, n).to(x.dtype) * getattr(self, f"{n}_scale") for n in ("w1", "w2", "w3"))
        return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


class Listed(Dense):
    """A list of MLPs, gate and up apart."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def expert(self, e: int, x: Tensor) -> Tensor:
        out: Tensor = self.experts[e](x)
        return out


class DownUnscaled(Dense):
    """The down projection is stored in int8 and has no scale."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = (F.linear(x, self.up[e].to(x.dtype)) * self.up_scale[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e].to(x.dtype))


class Rounded(Dense):
    """Rows in 8 bits before both products: before the loop over experts, and in it."""

    steps = 127

    def bytes_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        s = rows.float().abs().amax(-1, keepdim=True) / self.steps
        return torch.round(rows.float() / s.clamp(min=1e-8)).clamp(-128, 127).to(torch.int8), s.clamp(min=1e-8)

    def product(self, q: Tensor, s: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return (F.linear(q.to(dtype), weight.to(dtype)) * s * scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.gate).float().softmax(-1).topk(K, dim=-1)
        q, s = self.bytes_of(x)
        out = torch.zeros_like(x)
        for e in range(E):
            g, u = self.product(q, s, self.up[e], self.up_scale[e], x.dtype).chunk(2, -1)
            y = self.product(*self.bytes_of(F.silu(g) * u), self.down[e], self.down_scale[e], x.dtype)
            out = out + y * (w * (ids == e)).sum(-1, keepdim=True).to(x.dtype)
        return out


class RoundedByExpert(Rounded):
    """The same inside of each expert, without a floor under the scales."""

    def bytes_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        s = rows.float().abs().amax(-1, keepdim=True) / self.steps
        return torch.round(rows.float() / s).to(torch.int8), s

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = self.product(*self.bytes_of(x), self.up[e], self.up_scale[e], x.dtype).chunk(2, -1)
        return self.product(*self.bytes_of(F.silu(g) * u), self.down[e], self.down_scale[e], x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return Dense.forward(self, x)


class RoundedOverAFloor(RoundedByExpert):
    """A floor under what is divided by, none under what is multiplied by: rows below it are nothing either way."""

    def bytes_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        s = rows.float().abs().amax(-1, keepdim=True) / self.steps
        return torch.round(rows.float() / s.clamp(min=1e-8)).clamp(-128, 127).to(torch.int8), s


def made(cls: type[nn.Module], dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """(module, tokens, the result in float64)."""
    torch.manual_seed(0)
    module = cls().to(dtype).eval()
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(module, name, value.to(dtype))
    x = torch.randn(9, H).to(dtype)
    wide = copy.deepcopy(module).double()
    for name, value in vars(wide).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(wide, name, value.double())
    with torch.no_grad():
        return module, x, wide(x.double())


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def operands(seen: Seen) -> dict[str, weights.Recipe]:
    graph = seen.lowered[0]
    names = [n.name for n in graph.module.graph.find_nodes(op="placeholder")]
    return {name: i for name, i in zip(names, graph.inputs, strict=True) if isinstance(i, weights.Recipe)}


@pytest.mark.parametrize(("cls", "dtype"), [
    (Stacked, torch.bfloat16), (Dense, torch.float16), (InOut, torch.bfloat16), (Listed, torch.bfloat16), (DownUnscaled, torch.bfloat16),
])  # fmt: skip
@torch.no_grad()
def test_int8_weights_under_rows_of_floats(cls: type[nn.Module], dtype: torch.dtype) -> None:
    """W8A16, without being asked: no further from float64 than 1.25 x eager; weights go in as the bytes they are."""
    module, x, exact = made(cls, dtype)
    with Seen() as seen:
        out = compiled(module)(x)
    products = seen.calls()[1:]
    assert [n for n in products if n != "npu_swiglu"] == [n for n in ROUTED[: 1 + (cls is Listed)] + ROUTED[1:] if n != "npu_swiglu"]
    assert error(out, exact) <= 1.25 * error(module(x), exact)
    graph = seen.lowered[0].module.graph
    for n in (n for n in graph.nodes if str(n.target).startswith("npu.npu_grouped_matmul")):
        (weight,), (scale,), (offset,) = n.args[1], n.kwargs["antiquant_scale"], n.kwargs["antiquant_offset"]
        assert weight.op == scale.op == offset.op == "placeholder", "nothing is made on a step"
        assert weight.meta["example_value"].dtype == torch.int8 and scale.meta["example_value"].dtype == dtype
    assert "int8 × scale" in moe_compile.last_report().blocks[0].experts


@pytest.mark.parametrize("cls", [Dense, InOut])
@torch.no_grad()
def test_the_models_own_int8_in_the_w8a8_chain(cls: type[nn.Module]) -> None:
    """Its own bytes and scales, not quantised again; rows in 8 bits: 3 % of the norm is allowed, as for any W8A8."""
    module, x, exact = made(cls, torch.bfloat16)
    with Seen() as seen:
        out = compiled(module, quantize="w8a8", strict=True)(x)
    assert seen.calls()[1:] == CHAIN
    assert error(module(x), exact) < error(out, exact) <= 0.03
    assert sorted(r.part for r in operands(seen).values()) == ["", "", "factors", "factors"]
    assert {r.dtype for r in operands(seen).values() if not r.part} == {torch.int8}


@pytest.mark.parametrize(("cls", "quantize"), [(Rounded, "w8a8c8"), (RoundedByExpert, None), (RoundedOverAFloor, None)])
@torch.no_grad()
def test_a_model_that_rounds_its_rows_is_w8a8_without_being_asked(cls: type[nn.Module], quantize: str | None) -> None:
    """The kernel's rounding is the model's: beside its float64 only roundings at the edge of a step differ; nothing is clipped."""
    module, x, exact = made(cls, torch.bfloat16)
    with Seen() as seen:
        out = compiled(module, quantize=quantize)(x)
    (block,) = moe_compile.last_report().blocks
    assert seen.calls()[1:] == CHAIN and "rows in int8" in block.experts and block.ir.experts.up_rows is not None
    assert error(out, exact) <= 0.01
    assert "int8 grouped_matmul" in block.lowering


@torch.no_grad()
def test_rounded_rows_that_the_chain_does_not_take_stay_as_written() -> None:
    module, x, _ = made(Rounded, torch.float32)
    assert error(compiled(module, inner="eager")(x), module(x)) <= 1e-5
    assert any("rows" in r.reason for r in moe_compile.last_report().rejected)


@torch.no_grad()
def test_gate_and_up_apart_are_quantised_step_by_step() -> None:
    """No op does SwiGLU of two tensors and rounds: each product is scaled, then the activation, then the rows are rounded."""
    module, x, exact = made(Listed, torch.bfloat16)
    with Seen() as seen:
        out = compiled(module, quantize="w8a8", strict=True)(x)
    assert seen.calls()[1:] == [
        "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_grouped_matmul", "npu_dynamic_quant", "npu_grouped_matmul",
        "npu_moe_finalize_routing",
    ]  # fmt: skip
    assert error(module(x), exact) < error(out, exact) <= 0.03


@torch.no_grad()
def test_fp32_rows_stay_as_written() -> None:
    module, x, exact = made(Dense, torch.float32)
    assert error(compiled(module, inner="eager")(x), exact) <= 1e-5
    assert any("fp16 and bf16" in r.reason for r in moe_compile.last_report().rejected)


@torch.no_grad()
def test_token_counts_stay_symbolic() -> None:
    module, x, _ = made(Dense, torch.bfloat16)
    fn = compiled(module, dynamic=True)
    with Seen() as seen:
        for rows in (x, x[:5], x[2:8]):
            assert error(fn(rows), module(rows)) <= 0.02
    assert len(seen.lowered) == 1


def test_training_keeps_the_fused_op_and_its_gradient_to_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "none")  # in plain torch: nothing is built for this
    module, x, _ = made(Dense, torch.float16)
    grads = []
    for fn in (compiled(module, inner="eager"), module):
        leaf = x.clone().requires_grad_()
        fn(leaf).float().square().sum().backward()
        grads.append(leaf.grad)
    assert any("no gradient" in n for n in moe_compile.last_report().notes)
    assert error(grads[0], grads[1]) <= 0.01


@pytest.mark.parametrize("cls", [Dense, Listed])
@torch.no_grad()
def test_prepare_moves_bytes_in_place(cls: type[nn.Module]) -> None:
    """Buffers too; the state_dict is the same, and nothing but scales is copied afterwards."""
    module, x, exact = made(cls, torch.bfloat16)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    moved = moe_compile.prepare(module, target="ascend")
    assert moved
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    used = store.STORE.copied
    assert error(compiled(module)(x), exact) <= 0.02
    assert store.STORE.copied - used <= 8 * E * (2 * I + H), "scales and offsets"
    assert cls is Listed or not any("more memory" in n for n in moe_compile.last_report().notes)


# ---- the arithmetic ------------------------------------------------------------------------------------------------------


def layout() -> calls.generic.Layout:
    ops, consts = act.encode(act.SWIGLU)
    return calls.generic.Layout(tuple(ops), tuple(consts), int(Form.CONCAT), 4, True, True, True, False, 0)


def test_rows_of_floats_times_int8_is_the_product_it_claims() -> None:
    """Scales that are powers of two round nothing: fp32 within 1e-5, but for the fp16 of the result."""
    x, w = torch.randn(12, 32).half(), stored(4, 32, 16)
    scale = 2.0 ** torch.randint(-9, -6, (4, 16))
    counts = torch.tensor([3, 0, 5, 4])
    got = calls.grouped(x, w, None, counts, scale.half(), torch.zeros(4, 16).half())
    want = torch.cat([r.double() @ (w[e].double() * scale[e].double()) for e, r in enumerate(x.split(counts.tolist()))])
    assert torch.equal(got, calls.grouped(x, (w * scale[:, None]).half(), None, counts))
    assert error(got, want.half().double()) <= 1e-3


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_clipped_chain_is_the_arithmetic_it_claims(alpha: float) -> None:
    """Against the same steps in float64: what differs is the first product's rounding to bf16."""
    register.custom()
    t, e, k, h, i = 24, 4, 2, 32, 64
    x, up, down = torch.randn(t, h, dtype=torch.bfloat16), torch.randn(e, h, 2 * i), torch.randn(e, i, h)
    ids = torch.stack([torch.randperm(e)[:k] for _ in range(t)]).int()
    s_up, s_down = (int8.channel_scale(w).to(torch.bfloat16) for w in (up, down))
    q = quant.Quantised([int8.to_int8(up, s_up)], [s_up], int8.to_int8(down, s_down), s_down, int8.CLIPPED, alpha)
    rows, index, w = quant.experts_rows(x, ids, torch.rand(t, k), q, layout())
    out = calls.combine(rows, index, w, [])
    expected = torch.zeros(t, h, dtype=torch.float64)
    for n in range(t):
        s = x[n].double().abs().max() / 127
        for j in range(k):
            m = int(ids[n, j])
            g, u = ((x[n].double() / s).round() @ q.up[0][m].double() * s_up[m].double() * s).chunk(2)
            y = F.silu(g) * u
            limit = alpha * y.abs().max()
            y = (y.clamp(-limit, limit) / (limit / 127)).round() * (limit / 127)
            expected[n] += w[n, j].double() * (y @ q.down[m].double() * s_down[m].double())
    assert error(out, expected) <= 0.01


@pytest.mark.parametrize("own", [True, False], ids=["int8 model", "float model"])
@torch.no_grad()
def test_w8a8c8_where_the_op_is_registered(own: bool) -> None:
    """alpha 1 clips nothing: within the 3 % of W8A8. A smaller one clips, which is the user's to choose."""
    import test_quant

    register.custom()
    module, x, exact = made(Dense, torch.bfloat16)
    if not own:
        module, wide = test_quant.block("qwen3_moe").to(torch.bfloat16), test_quant.block("qwen3_moe", "eager").to(torch.bfloat16).double()
        x = torch.randn(2, 9, test_quant.zoo.HIDDEN, dtype=torch.bfloat16)
        exact = test_quant.first(wide(x.double()))
    errors = []
    for option in ("w8a8c8", ("w8a8c8", 0.5)):
        torch._dynamo.reset()
        with Seen() as seen:
            errors.append(error(test_quant.first(compiled(module, quantize=option, strict=True)(x)), exact))
        assert [n.removeprefix("custom.") for n in map(str, seen.calls())] != CHAIN
        targets = [str(n.target) for n in seen.lowered[0].module.graph.nodes]
        assert "custom.npu_swiglu_clip_quant.default" in targets and "npu.npu_dequant_swiglu_quant.default" not in targets
    assert errors[0] <= 0.03 < errors[1]


@pytest.mark.parametrize(("dtype", "registered", "reason"), [
    (torch.bfloat16, False, "not registered"),
    (torch.float16, True, "takes bf16"),
])  # fmt: skip
@torch.no_grad()
def test_w8a8c8_refused(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, registered: bool, reason: str) -> None:
    """Nothing else is quantised in its place: the block keeps its precision and the report says why."""
    monkeypatch.setattr(schemas, "custom", lambda name: registered)
    module, x, exact = made(Dense, dtype)
    out = compiled(module, quantize="w8a8c8")(x)
    assert error(out, exact) <= 1.25 * error(module(x), exact)
    assert any("not quantised" in n and reason in n for n in moe_compile.last_report().notes)


def test_an_op_of_the_name_with_other_arguments_is_not_taken() -> None:
    register.custom()
    assert schemas.custom("npu_swiglu_clip_quant")
    assert str(torch.ops.custom.npu_swiglu_clip_quant.default._schema) == str(
        torch._C.parse_schema("custom::" + schemas.CUSTOM["npu_swiglu_clip_quant"])
    )
