"""Input that a careful user does not give, and uses that are allowed but rare: the result is eager's, or a clear word."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe_compile

E, K, H, I, T = 8, 2, 32, 16, 13
INF = float("inf")


class Moe(nn.Module):
    """Router, weight gather, batched products. `sigmoid`: σ scores with a selection bias; else softmax."""

    def __init__(self, sigmoid: bool = False, router_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.sigmoid, self.router_dtype = sigmoid, router_dtype
        self.router = nn.Parameter(torch.randn(E, H) * 0.3)
        self.bias = nn.Parameter(torch.randn(E) * 0.1, requires_grad=False)
        self.up = nn.Parameter(torch.randn(E, 2 * I, H) * 0.2)
        self.down = nn.Parameter(torch.randn(E, H, I) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, H)
        w, ids = self.route(x)
        return self.experts(x, w, ids).view(shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.to(self.router.dtype), self.router).float()
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        ids = torch.topk(scores + self.bias if self.sigmoid else scores, K, dim=-1).indices
        w = scores.gather(-1, ids)
        return (w / (w.sum(-1, keepdim=True) + 1e-20)).to(x.dtype), ids

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(K, 0).unsqueeze(-1)
        g, u = torch.bmm(self.up[flat], rows).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down[flat], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class Loop(Moe):
    """The experts in a loop over those that were hit, which is read by example."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            g, u = F.linear(x[token], self.up[e]).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.silu(g) * u, self.down[e]) * w[token, slot, None])
        return out


class TwoMoes(nn.Module):
    """Two blocks in one layer, one after the other, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Moe(), Moe(sigmoid=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(x + self.first(x))


def compiled(model: nn.Module, inner: str = "aot_eager", **options: object) -> nn.Module:
    return torch.compile(model, backend="moe_fused", options={"inner": inner, **options})  # type: ignore[return-value]


def fused(n: int = 1) -> None:
    """The compilation just done fused exactly `n` blocks, each validated."""
    report = moe_compile.last_report()
    assert report is not None and len(report.blocks) == n, str(report)
    assert all(b.validated for b in report.blocks)


def assert_as_good(model: nn.Module, got: Tensor, x: Tensor) -> None:
    """Against float64: no larger an error than 1.25 x eager's own."""
    exact = copy.deepcopy(model).double()(x.double())
    eager = model(x)
    assert got.dtype == eager.dtype and got.shape == eager.shape
    allowed = 1.25 * (eager.double() - exact).abs().max() + 1e-7 * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed


# -- values -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("value", [float("nan"), INF, -INF, 1e38])
def test_bad_values_in_the_tokens(sigmoid, value):
    model, x = Moe(sigmoid), torch.randn(T, H)
    x[3, 5] = value
    x[7] = value
    y = compiled(model)(x)
    fused()
    torch.testing.assert_close(y, model(x), equal_nan=True, rtol=1e-5, atol=1e-6)
    assert y[0].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_an_expert_whose_logits_are_bad(sigmoid, value):
    model, x = Moe(sigmoid), torch.randn(T, H).abs()
    model.router[2] = value
    y = compiled(model)(x)
    fused()
    torch.testing.assert_close(y, model(x), equal_nan=True, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("value", [INF, -INF, -5.0])
def test_selection_bias_that_forces_or_bars_an_expert(value):
    model, x = Moe(sigmoid=True), torch.randn(T, H)
    model.bias[4] = value
    y = compiled(model)(x)
    fused()
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)


# -- layouts and dtypes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_non_contiguous_tokens():
    model = Moe()
    for x in (torch.randn(H, T).t(), torch.randn(T, 2 * H)[:, ::2], torch.randn(1, H).expand(T, H), torch.randn(3, T, H).transpose(0, 1)):
        torch._dynamo.reset()
        y = compiled(model)(x)
        fused()
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_non_contiguous_weights():
    model, x = Moe(), torch.randn(T, H)
    model.up = nn.Parameter(model.up.transpose(1, 2).contiguous().transpose(1, 2))
    model.down = nn.Parameter(torch.randn(E, H, 2 * I)[:, :, ::2] * 0.2)
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-5, atol=1e-6)
    fused()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_other_dtypes(dtype, sigmoid):
    model, x = Moe(sigmoid).to(dtype), torch.randn(T, H, dtype=dtype)
    y = compiled(model)(x)
    fused()
    assert_as_good(model, y, x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_router_in_another_dtype_than_the_experts(dtype):
    model, x = Moe(sigmoid=True).to(dtype), torch.randn(T, H, dtype=dtype)
    model.router.data, model.bias.data = model.router.data.float(), model.bias.data.float()
    y = compiled(model)(x)
    fused()
    assert_as_good(model, y, x)


@torch.no_grad()
def test_no_tokens_and_one_token():
    model = Moe()
    run = compiled(model)
    for tokens in (5, 0, 1, 64):
        x = torch.randn(tokens, H)
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_no_tokens_in_some_shapes():
    model = Moe()
    for shape in ((0, 4, H), (3, 0, H)):
        torch._dynamo.reset()
        assert compiled(model)(torch.ones(shape)).shape == shape
        report = moe_compile.last_report()
        assert report is not None and not any(r.stage == "internal" for r in report.rejected), str(report)


# -- training ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Moe, Loop])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_compiled_block(cls, reentrant):
    """The first call compiles under the checkpoint's hooks, which count what autograd saves; the second call is its recomputation."""
    model = cls()
    run = compiled(model)
    x, y = (torch.linspace(-1, 1, 5 * H).view(5, H).requires_grad_() for _ in range(2))
    checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
    model(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    fused()


def test_gradients_inside_the_compiled_function():
    model, x = Moe(), torch.randn(5, H)

    def gradient(x):
        return torch.func.grad(lambda x: model(x).square().sum())(x)

    got = torch.compile(gradient, backend="moe_fused", options={"inner": "aot_eager"})(x)
    torch.testing.assert_close(got, gradient(x), rtol=1e-4, atol=1e-5)
    report = moe_compile.last_report()
    assert report is not None and not any(r.stage == "internal" for r in report.rejected), str(report)


@pytest.mark.parametrize("frozen", [("up",), ("down", "router"), ("up", "down", "router")])
def test_weights_that_require_no_grad(frozen):
    model, x = Moe(), torch.randn(T, H)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    grads = []
    for run in (model, compiled(model)):
        model.zero_grad()
        tokens = x.clone().requires_grad_()
        run(tokens).square().sum().backward()
        grads.append({"x": tokens.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    fused()
    assert grads[0].keys() == grads[1].keys() and not grads[1].keys() & set(frozen)
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# -- devices ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_meta_tensors():
    model, x = Moe().to("meta"), torch.randn(T, H, device="meta")
    y = compiled(model)(x)
    assert y.device.type == "meta" and y.shape == x.shape and y.dtype == x.dtype


class Split(Moe):
    """The router on one device, the experts on another."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.experts(x.to("meta"), w.to("meta"), ids.to("meta"))


@torch.no_grad()
def test_a_block_on_two_devices_is_told_of():
    model, x = Split(), torch.randn(T, H)
    model.up, model.down = nn.Parameter(model.up.to("meta")), nn.Parameter(model.down.to("meta"))
    y = compiled(model)(x)
    assert y.device.type == "meta" and y.shape == x.shape
    report = moe_compile.last_report()
    (block,) = report.blocks  # the experts are all on one device; the router, on another, stays as written
    assert block.ir.gating is None and "another device" in block.note, str(report)


# -- uses -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_block_compiled_alone(inner):
    model, x = Moe(sigmoid=True), torch.randn(2, T, H)
    y = compiled(model, inner)(x)
    fused()
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_two_blocks_in_one_layer():
    model, x = TwoMoes(), torch.randn(T, H)
    y = compiled(model)(x)
    fused(2)
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)
    first, second = moe_compile.last_report().blocks
    assert first.ir != second.ir


@torch.no_grad()
def test_one_block_used_twice():
    class Twice(Moe):
        def forward(self, x):
            return Moe.forward(self, x + Moe.forward(self, x))

    model, x = Twice(), torch.randn(T, H)
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-5, atol=1e-6)
    fused(2)


@torch.no_grad()
def test_the_same_model_compiled_twice_and_after_a_reset():
    model, x = Moe(), torch.randn(T, H)
    want = model(x)
    for _ in range(2):
        torch.testing.assert_close(compiled(model)(x), want, rtol=1e-5, atol=1e-6)
        fused()
    before = moe_compile.last_report()
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(model)(x), want, rtol=1e-5, atol=1e-6)
    assert moe_compile.last_report() is not before
    fused()


@torch.no_grad()
def test_another_backend_on_the_same_model_sees_nothing_of_us():
    model, x = Moe(), torch.randn(T, H)
    targets = []

    def other(gm, inputs):
        targets.extend(str(n.target) for n in gm.graph.nodes)
        return gm.forward

    compiled(model)(x)
    torch.testing.assert_close(torch.compile(model, backend=other)(x), model(x))
    assert targets and not any("moe_compile" in t for t in targets)


def test_threads():
    models = [TwoMoes() for _ in range(3)]
    x, wrong = torch.randn(T, H), []

    def work(model: nn.Module) -> None:
        try:
            with torch.no_grad():
                run = compiled(model)
                for _ in range(3):
                    torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-6)
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong, wrong


@torch.no_grad()
def test_a_model_without_experts():
    model, x = nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, H)), torch.randn(T, H)
    torch.testing.assert_close(compiled(model, strict=True)(x), model(x))
    fused(0)
    assert moe_compile.last_report().rejected == []


@torch.no_grad()
def test_a_wrong_shape_fails_as_it_does_in_eager():
    model = Moe()
    with pytest.raises(RuntimeError):
        model(torch.randn(T, H + 1))
    with pytest.raises(RuntimeError):
        compiled(model)(torch.randn(T, H + 1))
