"""What a training step may do between forward and backward, gradients of gradients, gradients where a function has a corner."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.check import difference_problem
from small import Block, E, H, I, K, T, compiled, told
from torch import Tensor, nn

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import Operands
from moe_compile.report import collecting

torch.set_num_threads(1)


class Balanced(Block):
    """Selection by sigmoid scores plus a bias that the training step moves, weights scaled for each expert."""

    def __init__(self, inside: bool = False, in_weights: bool = False) -> None:
        super().__init__()
        self.inside, self.in_weights = inside, in_weights
        self.register_buffer("bias", torch.zeros(E))
        self.scale = nn.Parameter(torch.ones(E))

    def balance(self, ids: Tensor) -> None:
        count = F.one_hot(ids, E).sum((0, 1)).float()
        self.bias.add_(0.01 * (count.mean() - count).sign())

    def forward(self, x: Tensor) -> Any:
        logits = self.router(x)
        scores = logits.sigmoid()
        ids = (scores + self.bias).topk(K).indices
        w = (scores + self.bias if self.in_weights else scores).gather(1, ids)
        w = w / (w.sum(-1, keepdim=True) + 1e-20) * self.scale[ids]
        if self.inside:
            with torch.no_grad():
                self.balance(ids)
        return self.loop(x, ids, w), ids, w, logits


def stepped(module: Balanced, f: Any, x: Tensor, change: str) -> dict[str, Tensor | None]:
    x = x.clone().requires_grad_()
    y, ids, w, logits = f(x)
    with torch.no_grad():
        if change == "bias":
            module.balance(ids)
        if change == "scale":
            module.scale.mul_(2)
        for name, t in (("ids", ids), ("weights", w), ("logits", logits)):
            if change == name:
                t.zero_()
    (y * torch.linspace(-1, 1, H)).sum().backward()
    return {n: p.grad for n, p in module.named_parameters()} | {"x": x.grad}


@pytest.mark.parametrize("inner", ["aot_eager", "eager", "inductor"])
@pytest.mark.parametrize("change", ["bias", "scale", "weights", "logits", "inside", "bias in weights"])
def test_what_a_step_changes_before_backward(change: str, inner: str) -> None:
    """Verdict: fused, eager's gradients. Backward reads nothing that the training step may write."""
    module, x = Balanced(change == "inside", change == "bias in weights"), torch.randn(T, H)
    twin = copy.deepcopy(module)
    with collecting() as report:
        mine = stepped(module, compiled(module, inner=inner), x, change.split()[0])
    want = stepped(twin, twin, x, change.split()[0])
    assert [b.ir.gating is not None for b in report.blocks] == [True], told(report)
    for name, g in want.items():
        assert g is not None and mine[name] is not None and not difference_problem(mine[name], g, 2e-5), name


def test_gradients_of_gradients_are_eagers() -> None:
    """Verdict: fused. A gradient penalty over a block whose graph runs as it is; AOTAutograd refuses second gradients itself."""
    module, x = Balanced().double(), torch.randn(T, H, dtype=torch.float64)
    twin, found = copy.deepcopy(module), []
    for f, m in ((compiled(module, inner="eager"), module), (twin, twin)):
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(y)[0].square().sum(), y, create_graph=True)
        g.square().sum().backward()
        found.append({n: p.grad for n, p in m.named_parameters()} | {"x": y.grad, "g": g.detach()})
    for name, want in found[1].items():
        assert not difference_problem(found[0][name], want, 1e-9), name


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_second_gradients_of_the_ops(weight_on_input: bool) -> None:
    torch.manual_seed(0)
    e = ir.Experts(3, 4, 3, 4, ir.Form.SINGLE, act.silu(act.G), up_bias=True, weight_on_input=weight_on_input)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 4), (3, 3, 4), (3, 4, 3), (3, 3), (4, 2))]
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]])

    def experts(x: Tensor, up: Tensor, down: Tensor, bias: Tensor, w: Tensor) -> Tensor:
        out: Tensor = torch.ops.moe_compile.experts(x, ids, w, [up], [down], [bias], [], None, *ops.experts_args(e))
        return out

    assert torch.autograd.gradgradcheck(experts, leaves, fast_mode=True)
    norm = ir.Normaliser(ir.Norm.SUM, eps=1e-20)
    g = ir.Gating(4, 2, ir.Score.SIGMOID, norm=norm, expert_scale=True, score_dtype=torch.float64, weight_dtype=torch.float64)
    logits, scale = (torch.rand(s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (4,)))
    assert torch.autograd.gradgradcheck(lambda a, b: torch.ops.moe_compile.route(a, None, b, *ops.route_args(g))[0], (logits, scale))


class Corner(Block):
    """Rows of zeros and biases of zeros: pre-activations lie on the corner of the activation."""

    f: Callable[[Tensor], Tensor]

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.bias = f, nn.Parameter(torch.zeros(E, I))

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(self.f(F.linear(x, self.up[e], self.bias[e])), self.down[e])

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        full = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        return torch.stack([self.expert(x, e) * full[:, e, None] for e in range(E)]).sum(0)


CORNERS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (F.relu, True),
    "clamp": (lambda v: v.clamp(min=0), True),
    "clamp at six": (lambda v: v.clamp(0, 6), True),
    "clamp of the negative": (lambda v: -(-v).clamp(max=0), True),
    "squared": (lambda v: v.clamp(min=0) ** 2, True),
    "half of the sum": (lambda v: (v + v.abs()) / 2, True),
    "maximum": (lambda v: torch.maximum(v, torch.zeros(())), False),
    "minimum": (lambda v: -torch.minimum(-v, torch.zeros(())), False),
    "leaky": (F.leaky_relu, True),
    "relu6": (F.relu6, False),
    "hardtanh": (lambda v: F.hardtanh(v, 0.0, 6.0), False),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CORNERS)
def test_slopes_at_a_corner(name: str, train: bool) -> None:
    """Verdict: fused, or left where a gradient is wanted that no activation of the ops has. At 0 relu has 0, maximum 1/2, clamp 1 or 0."""
    f, fused = CORNERS[name]
    module, x = Corner(f), torch.randn(T, H)
    x[::2] = 0
    twin, found = copy.deepcopy(module), []
    with collecting() as report, torch.set_grad_enabled(train):
        for run, m in ((compiled(module), module), (twin, twin)):
            y = run(x)
            if train:
                (y * torch.linspace(-1, 1, H)).sum().backward()
            found.append({"y": y.detach()} | ({n: p.grad for n, p in m.named_parameters()} if train else {}))
    for key, want in found[1].items():
        assert not difference_problem(found[0][key], want, 2e-5), key
    assert len(report.blocks) == (fused or not train), told(report)


class Faint(Block):
    """Scores so small that their sum's square is nothing."""

    def __init__(self, shift: float, eps: float) -> None:
        super().__init__()
        self.shift, self.eps = shift, eps

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = (self.router(x) - self.shift).sigmoid().topk(K)
        return w / (w.sum(-1, keepdim=True) + self.eps), ids


@pytest.mark.parametrize(("shift", "eps"), [(60.0, 1e-20), (70.0, 0.0), (0.0, 1e-20)])
def test_gradients_through_a_tiny_divisor(shift: float, eps: float) -> None:
    """Verdict: fused. w / d is a division: as w d^-1 its gradient needs d^-2, which overflows."""
    module, x = Faint(shift, eps), torch.randn(T, H)
    twin, found = copy.deepcopy(module), []
    with collecting() as report:
        for f, m in ((compiled(module), module), (twin, twin)):
            f(x).square().sum().backward()
            found.append(m.router.weight.grad)
    assert found[1].isfinite().all() and not difference_problem(found[0], found[1], 2e-4)
    assert len(report.blocks) == 1, told(report)


def test_the_gating_op_divides_twice() -> None:
    """The kernels' gradient of w / Σ with Σ = 1e-24: finite, as torch's own."""
    norm = ir.Normaliser(ir.Norm.SUM)
    g = ir.Gating(4, 2, ir.Score.SIGMOID, norm=norm)
    logits = (torch.randn(5, 4) - 55).requires_grad_()
    w, _ = torch.ops.moe_compile.route(logits, None, None, *ops.route_args(g))
    (got,) = torch.autograd.grad((w * torch.tensor([1.0, 2.0])).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    w, _ = g.evaluate(exact)
    (want,) = torch.autograd.grad((w * torch.tensor([1.0, 2.0])).sum(), exact)
    assert not difference_problem(got, want.float(), 1e-4)


class FrozenResidual(Block):
    """Experts that are not trained, and a residual in place: y = x + moe(x) in the memory of x."""

    def __init__(self, trained: str = "") -> None:
        super().__init__()
        for name, p in self.named_parameters():
            p.requires_grad_(name == trained)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        w, ids = self.route(x)
        return x.add_(self.gathered(x, ids, w.detach()))


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("trained", ["", "down"])
def test_tokens_that_no_gradient_reads_may_be_written(trained: str, inner: str) -> None:
    """Verdict: fused, eager's gradients. Only the up projections' gradient reads the tokens."""
    module, x = FrozenResidual(trained).double(), torch.randn(T, H, dtype=torch.float64)
    twin, found = copy.deepcopy(module), []
    with collecting() as report:
        for f, m in ((compiled(module, inner=inner), module), (twin, twin)):
            y = x.clone().requires_grad_()
            f(y).square().sum().backward()
            found.append({n: p.grad for n, p in m.named_parameters()} | {"x": y.grad})
    for name, want in found[1].items():
        got = found[0][name]
        assert (got is None) == (want is None) and (want is None or not difference_problem(got, want, 1e-9)), name
    assert len(report.blocks) == 1 and not report.rejected, told(report)


class TrainedResidual(Block):
    """Tokens that are written after a loop, which keeps rows that it picked: eager's backward pass goes through."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        w, ids = self.route(x * 1)
        return x.add_(self.loop(x, ids, w))


def test_tokens_that_a_gradient_reads_may_be_written() -> None:
    """Verdict: fused, eager's gradients: the op has a copy of the tokens (it kept them, and backward said that they were modified)."""
    module, x = TrainedResidual().double(), torch.randn(T, H, dtype=torch.float64)
    with collecting() as report:
        found = [torch.autograd.grad(f(x).square().sum(), list(module.parameters())) for f in (compiled(module), module)]
    assert len(report.blocks) == 1 and not report.rejected, told(report)
    for got, want in zip(*found, strict=True):
        assert not difference_problem(got, want, 1e-9)


@pytest.mark.parametrize("reads", ["up", "weights on tokens", "identity", "none"])
def test_the_experts_op_keeps_tokens_where_a_gradient_reads_them(reads: str) -> None:
    """Near misses: the up projections are trained, weights stand on the tokens, or an expert is the identity."""
    torch.manual_seed(0)
    on_input, identity = reads == "weights on tokens", int(reads == "identity")
    e = ir.Experts(3, 4, 3, 4, ir.Form.SINGLE, act.silu(act.G), weight_on_input=on_input, num_identity=identity)
    x, up, down, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 4), (3, 3, 4), (3, 4, 3), (4, 2)))
    up.requires_grad_(reads == "up")
    ids = torch.tensor([[0, 1], [3 if identity else 2, 0], [1, 2], [0, 2]])
    tokens = x * 1
    y = torch.ops.moe_compile.experts(tokens, ids, w, [up], [down], [], [], None, *ops.experts_args(e))
    wanted = [t for t in (x, up, down, w) if t.requires_grad]
    found = torch.autograd.grad(y.sum(), wanted, retain_graph=True, create_graph=True)
    exact = e.run(x, ids, w, Operands.named(up=[up], down=[down]), None, torch.float64)
    for got, want in zip(found, torch.autograd.grad(exact.sum(), wanted), strict=True):
        assert not difference_problem(got.detach(), want, 1e-9)
    with torch.no_grad():
        tokens.zero_()
    if reads == "none":
        torch.autograd.grad(y.sum(), wanted)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), wanted)


def test_a_compiled_training_step_compiles_no_kernels_of_ours() -> None:
    """Verdict: fused; backward inside of the compiled function runs under Dynamo, which must pass by kernels written in Python."""
    module, x = Block(), torch.randn(T, H)
    twin = copy.deepcopy(module)

    def step(m: nn.Module) -> None:
        m(x).square().sum().backward()

    torch._dynamo.reset()
    with collecting() as report:
        torch.compile(step, backend="moe_fused", options={"inner": "eager"})(module)
        step(twin)
    for mine, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert not difference_problem(mine.grad, theirs.grad)
    assert len(report.blocks) == 1 and not report.rejected, told(report)
    assert [b.source.partition(":")[0].rpartition("/")[2] for b in report.graph_breaks] == ["test_autograd_contract.py"]
