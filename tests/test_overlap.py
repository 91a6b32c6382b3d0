"""The shared expert inside the experts' op: when the rewrite puts it there, that it is right, and the op's own contract."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue import build, lora, stored
from catalogue import shared as cases
from catalogue.base import H
from torch import Tensor
from torch.library import opcheck

import moe_compile
from moe_compile import ir, ops
from moe_compile.ir import scalar as act

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A model compiled for CUDA whose tensors are on the CPU, where the op is made of others; `calls` of the op in its graphs."""

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        options = {"target": "cuda", "inner": self._keep, "overlap_shared": True, **options}
        self.run = torch.compile(model, backend="moe_fused", options=options)

    def _keep(self, gm: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(gm)
        return gm

    @property
    def calls(self) -> list[torch.fx.Node]:
        return [n for g in self.graphs for n in g.graph.nodes if "_shared.default" in str(n.target)]

    def products(self) -> int:
        """Dense products that are left in the graphs."""
        names = ("linear", "matmul", "mm", "__matmul__")
        return sum(getattr(n.target, "__name__", str(n.target)).split(".")[0] in names for g in self.graphs for n in g.graph.nodes)


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def check(model: torch.nn.Module, x: Tensor, emitted: bool, **options: Any) -> Compiled:
    compiled, eager = Compiled(model, **options), copy.deepcopy(model)
    with torch.no_grad():
        got, want = first(compiled.run(x)), first(eager(x))
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    report = moe_compile.last_report()
    assert report is not None and len(report.blocks) == 1, report
    assert len(compiled.calls) == emitted
    assert report.blocks[0].shared.endswith(", overlapped") is emitted
    return compiled


EMITTED = [
    cases.SharedAfter,
    cases.SharedBefore,
    cases.SharedAsBase,
    cases.SharedTokens3d,
    cases.SharedOutsideBlock,
    cases.SharedGatedAfter,
    cases.SharedGatedBefore,
    cases.SharedConcat,
    cases.SharedWithBias,
    cases.HalfSum,
]


@pytest.mark.parametrize("cls", EMITTED, ids=lambda c: c.__name__)
def test_emitted(cls: Any) -> None:
    """Verdict: one op; of few tokens no dense product is left: the router's op reads it, a gate is a sum, unless its sigmoid is by hand."""
    model = build(cls).eval()
    compiled = check(model, model.example_inputs()[0], emitted=True)
    assert compiled.products() == (cls is cases.SharedGatedBefore)
    methods = [n for g in compiled.graphs for n in g.graph.nodes if n.op == "call_method"]
    values = [n.args[0].meta.get("example_value") for n in methods]  # AOTAutograd's cache keeps no graph where one is missing
    assert all(isinstance(v, Tensor) and v.device.type == "cpu" for v in values)
    assert all(n.meta["example_value"].shape[-1] == H for n in compiled.calls if any(u.op == "call_method" for u in n.users))


class UsedTwice(cases._Shared):
    """Near miss: the shared output is also squared."""

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared(x)
        return self.routed(x) + shared + shared * shared


class InsideUsed(cases._Shared):
    """Near miss: the shared expert's up projection is read by somebody else."""

    def forward(self, x: Tensor) -> Tensor:
        u = self.shared.w3(x)
        return self.routed(x) + self.shared.w2(F.silu(self.shared.w1(x)) * u) + u.sum(-1, keepdim=True)


class OtherInput(cases._Shared):
    """Near miss: gate and up of the shared expert read other tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared.w2(F.silu(self.shared.w1(x)) * self.shared.w3(2 * x + 1))


class Scaled(cases._Shared):
    """Near miss: the shared output is scaled by a number, which the op has no place for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + 2 * self.shared(x)


class Weighted(cases._Shared):
    """Near miss: torch.add with alpha."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.routed(x), self.shared(x), alpha=0.5)


class RoutedUsedTwice(cases._Shared):
    """Near miss: the routed result is read on its own too."""

    def forward(self, x: Tensor) -> Tensor:
        routed = self.routed(x)
        return (routed + self.shared(x)) * routed.sigmoid()


class GateOfResult(cases._SharedGated):
    """Near miss: the gate depends on the routed result."""

    def forward(self, x: Tensor) -> Tensor:
        routed = self.routed(x)
        return routed + F.sigmoid(self.shared_gate(routed)) * self.shared(x)


class WeightsComputed(cases._Shared):
    """Near miss: the shared expert's weights are computed in the graph, maybe by the kernel right before."""

    def forward(self, x: Tensor) -> Tensor:
        w1, w3 = (F.softplus(m.weight) for m in (self.shared.w1, self.shared.w3))
        return self.routed(x) + self.shared.w2(F.silu(F.linear(x, w1)) * F.linear(x, w3))


class _BesideShared(cases.Case):
    """Routed experts as a catalogue entry has them, and a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = cases.SwiGlu()

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        return self.run_experts(x, ids, w) + self.shared(x)


class InFewBits(_BesideShared, stored.BlocksRepeated):
    """The routed experts' weights are codes."""


class WithPairs(_BesideShared, lora.LoraLinears):
    """Near miss: the op of experts with low-rank pairs takes no shared expert."""


NEAR = [WeightsComputed, WithPairs, UsedTwice, InsideUsed, OtherInput, Scaled, Weighted, RoutedUsedTwice, GateOfResult]
NEAR += [cases.SharedInPlace, cases.SharedLiveOutside, cases.SharedMultiplied, cases.SharedOfOtherTokens, cases.SharedSubtracted]


def test_beside_experts_in_few_bits() -> None:
    """Verdict: one op of both; without it where the option says so."""
    model = build(InFewBits).eval()
    (call,) = check(model, model.example_inputs()[0], emitted=True).calls
    assert call.target is torch.ops.moe_compile.experts_stored_shared.default
    torch._dynamo.reset()
    check(model, model.example_inputs()[0], emitted=False, overlap_shared=False)


@pytest.mark.parametrize("cls", NEAR, ids=lambda c: c.__name__)
def test_near_misses(cls: Any) -> None:
    """Verdict: the shared expert stays in the graph, the result is eager's."""
    model = build(cls).eval()
    check(model, model.example_inputs()[0], emitted=False)


def test_a_gate_computed_behind_the_experts_moves_in_front() -> None:
    compiled = check(build(cases.SharedGatedAfter).eval(), torch.randn(7, H), emitted=True)
    (call,) = compiled.calls
    order = {n: i for i, n in enumerate(call.graph.nodes)}
    assert isinstance(call.args[21], torch.fx.Node) and order[call.args[21]] < order[call]


def test_a_write_between_keeps_the_gate_where_it_is() -> None:
    class Written(cases._SharedGated):
        def forward(self, x: Tensor) -> Tensor:
            state = x.clone()
            routed = self.routed(x)
            state.mul_(2)
            return routed + F.sigmoid(self.shared_gate(state / 2)) * self.shared(x)

    check(build(Written).eval(), torch.randn(7, H), emitted=False)


def test_the_option_reaches_the_op() -> None:
    (call,) = check(build(cases.SharedAfter).eval(), torch.randn(7, H), emitted=True).calls
    assert call.args[-1] == 1


def test_auto_leaves_it_to_the_op() -> None:
    (call,) = check(build(cases.SharedAfter).eval(), torch.randn(7, H), emitted=True, overlap_shared="auto").calls
    assert call.args[-1] == ir.Overlap.BY_TOKENS


def test_not_against_the_users_will() -> None:
    check(build(cases.SharedAfter).eval(), torch.randn(7, H), emitted=False, overlap_shared=False)


def test_not_on_the_cpu() -> None:
    check(build(cases.SharedAfter).eval(), torch.randn(7, H), emitted=False, target="cpu")


def test_not_under_autocast() -> None:
    model = build(cases.SharedAfter).eval()
    compiled = Compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled.run(torch.randn(7, H))
    assert not compiled.calls


def test_not_in_training_and_gradients_are_eagers() -> None:
    model = build(cases.SharedGatedAfter)
    eager, x = copy.deepcopy(model), torch.randn(7, H)
    compiled = Compiled(model)
    for run in (compiled.run, eager):
        run(x).square().sum().backward()
    assert not compiled.calls
    assert moe_compile.last_report().blocks[0].shared == "σ(x·g) · SwiGLU 8"
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=2e-5, msg=name)


def test_grad_mode_without_anything_to_train() -> None:
    """Frozen weights: no gradient can flow, whatever the mode."""
    model = build(cases.SharedAfter).eval().requires_grad_(False)
    compiled = Compiled(model)
    compiled.run(torch.randn(7, H))
    assert len(compiled.calls) == 1


def test_one_compilation_for_each_grad_mode() -> None:
    """A model that was compiled for inference still trains."""
    model = build(cases.SharedAfter)
    eager, x = copy.deepcopy(model), torch.randn(7, H)
    compiled = Compiled(model)
    with torch.no_grad():
        compiled.run(x)
    assert len(compiled.calls) == 1
    for run in (compiled.run, eager):
        run(x).square().sum().backward()
    assert len(compiled.calls) == 1
    torch.testing.assert_close(model.shared.w1.weight.grad, eager.shared.w1.weight.grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["afmoe", "qwen2_moe", "deepseek_v3"])
def test_architectures(name: str) -> None:
    pytest.importorskip("transformers")
    import zoo

    entry = next(e for e in zoo.ENTRIES if e.name == name)
    model, inputs = entry.build(), entry.make_inputs()
    compiled = Compiled(model)
    with torch.no_grad():
        want, got = zoo.output_of(model(**inputs)), zoo.output_of(compiled.run(**inputs))
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert len(compiled.calls) == entry.blocks
    assert all(b.shared.endswith(", overlapped") for b in moe_compile.last_report().blocks)


# ---- the op --------------------------------------------------------------------------------------------------------------


def arguments(form: ir.Form, gated: bool, bias: bool, add: bool, grad: bool = False, tokens: int = 5) -> tuple[list[Any], list[Tensor]]:
    """(arguments of the op, those that float)."""
    gen = torch.Generator().manual_seed(0)
    leaves: list[Tensor] = []

    def leaf(*shape: int) -> Tensor:
        leaves.append(torch.randn(*shape, generator=gen).requires_grad_(grad))
        return leaves[-1]

    routed = ir.Experts(4, 8, 6, 8, ir.Form.CONCAT, act.SWIGLU)
    activation = act.relu(act.G) ** 2 if form is ir.Form.SINGLE else act.SWIGLU
    one = ir.Experts(1, 8, 10, 8, form, activation, stacked=False, up_bias=bias, down_bias=bias)
    parts, width = (2, 10) if form is ir.Form.SEPARATE else (1, 10 if form is ir.Form.SINGLE else 20)
    x, ids, weights = leaf(tokens, 8), torch.randint(0, 4, (tokens, 2), generator=gen), leaf(tokens, 2)
    up, down, addend = [leaf(4, 12, 8)], [leaf(4, 8, 6)], leaf(tokens, 8) if add else None
    mlp = [
        [leaf(width, 8) for _ in range(parts)],
        [leaf(8, 10)],
        [leaf(width) for _ in range(parts * bias)],
        [leaf(8) for _ in range(bias)],
    ]
    gate = leaf(tokens, 1) if gated else None
    args = [x, ids, weights, up, down, [], [], addend, *ops.experts_args(routed), *mlp, gate, *ops.shared_args(one, 1)]
    return args, [t for t in leaves if grad]


FORMS = [
    (f, g, b, a) for f in (ir.Form.SEPARATE, ir.Form.CONCAT, ir.Form.SINGLE) for g, b, a in ((False, False, False), (True, True, True))
]


@pytest.mark.parametrize(("form", "gated", "bias", "add"), FORMS)
def test_op_contract(form: ir.Form, gated: bool, bias: bool, add: bool) -> None:
    args, _ = arguments(form, gated, bias, add)
    opcheck(torch.ops.moe_compile.experts_shared.default, tuple(args))


def reference(args: list[Any]) -> Tensor:
    """The same in plain torch."""
    x, ids, weights, (up,), (down,), _, _, add = args[:8]
    s_up, (s_down,), s_up_bias, s_down_bias, gate = args[17:22]
    g, u = torch.einsum("th,tkoh->tko", x, up[ids]).chunk(2, -1)
    out = torch.einsum("tki,tkhi,tk->th", F.silu(g) * u, down[ids], weights)
    pre = torch.cat([F.linear(x, w, b) for w, b in zip(s_up, s_up_bias or [None] * len(s_up), strict=True)], -1)
    a = pre.relu() ** 2 if pre.shape[-1] == s_down.shape[-1] else F.silu(pre.chunk(2, -1)[0]) * pre.chunk(2, -1)[1]
    y = F.linear(a, s_down, s_down_bias[0] if s_down_bias else None)
    return out + (y if gate is None else y * gate) + (0 if add is None else add)


@pytest.mark.parametrize(("form", "gated", "bias", "add"), FORMS)
def test_op_values_and_gradients(form: ir.Form, gated: bool, bias: bool, add: bool) -> None:
    args, leaves = arguments(form, gated, bias, add, grad=True)
    got, want = torch.ops.moe_compile.experts_shared(*args), reference(args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), leaves) for o in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_op_without_gradient_is_one_call() -> None:
    args, _ = arguments(ir.Form.SEPARATE, True, False, False)
    assert not torch.ops.moe_compile.experts_shared(*args).requires_grad


def test_op_under_autocast_computes_in_its_dtype() -> None:
    args, _ = arguments(ir.Form.SEPARATE, True, True, False)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.ops.moe_compile.experts_shared(*args)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), reference(args), rtol=0.05, atol=0.5)


@pytest.mark.parametrize("tokens", [0, 1])
def test_op_with_few_tokens(tokens: int) -> None:
    args, _ = arguments(ir.Form.CONCAT, False, False, False, tokens=tokens)
    torch.testing.assert_close(torch.ops.moe_compile.experts_shared(*args), reference(args), rtol=1e-4, atol=1e-4)
