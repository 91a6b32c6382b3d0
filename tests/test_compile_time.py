"""What keeps compile time in bounds, counted and not timed (for seconds see benchmarks/compile_time.py)."""

from __future__ import annotations

import pytest
import torch
from conftest import Outcome
from test_bad_input import H, K, Moe, T
from torch import Tensor, nn

import moe_compile
from moe_compile.calls import is_write
from moe_compile.passes import steps
from moe_compile.passes.prove import engine, probe
from moe_compile.passes.prove.engine import forget
from moe_compile.passes.rewrite import recall
from moe_compile.passes.terms import budget


class Layers(nn.Module):
    """Equal MoE layers with a residual."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Moe(sigmoid=True) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class StaticLoop(nn.Module):
    """Every expert on every token, masked by its share: Dynamo unrolls it."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(H, experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(H, 2 * H, bias=False) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(H, H, bias=False) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = torch.topk(self.router(x).softmax(-1), K, dim=-1)
        w = w / w.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down)):
            g, u = up(x).chunk(2, -1)
            out = out + torch.where(ids == e, w, 0.0).sum(-1, keepdim=True) * down(nn.functional.silu(g) * u)
        return out


def graph_after(model: nn.Module, x: Tensor) -> list[str]:
    """What the inner compiler is given, by op."""
    seen: list[str] = []

    def inner(gm, inputs):
        seen.extend(str(n.target) for n in gm.graph.nodes if n.op == "call_function")
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend="moe_fused", options={"inner": inner})(x)
    return seen


def test_an_unrolled_loop_shrinks_to_a_few_nodes():
    """Inductor's time follows the node count: 64 experts must not cost more of it than 8."""
    sizes = {experts: len(graph_after(StaticLoop(experts), torch.randn(T, H))) for experts in (8, 64)}
    assert sizes[8] == sizes[64] <= 20, sizes
    assert len(moe_compile.last_report().blocks) == 1


def test_unrolled_layers_one_after_the_other():
    """x + moe(x) with no norm between: what later layers add is no shared expert of an earlier one, nor searched for one."""
    layers = [StaticLoop(16) for _ in range(3)]

    def model(x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer(x)
        return x

    x = torch.randn(T, H)
    with torch.no_grad():
        got = torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
        torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)
    report = moe_compile.last_report()
    assert [b.ir.shared for b in report.blocks] == [None] * 3 and not report.rejected


FAR = 20


class Residuals(nn.Module):
    """MoE layers in a residual stream that is no plain sum; each layer must be cut off from the next."""

    def __init__(self, kind: str, n: int) -> None:
        super().__init__()
        self.kind, self.layers = kind, nn.ModuleList(Moe(sigmoid=True) for _ in range(n))
        self.first, self.mix, self.key = nn.Linear(H, H), nn.Linear(H, 4), nn.Linear(H, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.kind == "keys":  # tokens attend to the best T // 2 of themselves
                best = (self.key(x) @ x.mT).topk(T // 2).indices
                mask = torch.zeros(T, T, device=x.device, dtype=torch.bool).scatter(-1, best, True) & torch.ones_like(
                    best[:1, :1], dtype=torch.bool
                )
                x = x + torch.where(mask, x @ x.mT, -torch.inf).softmax(-1) @ x
            if self.kind == "transform":
                x = x + torch.func.vmap(torch.sin)(self.key(x))
            for _ in range(FAR):
                x = x.tanh()
            x = self.first(x)
            normed = nn.functional.rms_norm(x, (H,))
            if self.kind == "mixed":  # two streams, as hyper-connections have them
                streams = torch.stack((x, 2 * x), 1)
                comb = self.mix(normed).view(T, 2, 2).softmax(-1)
                x = (0.5 * layer(normed).unsqueeze(1) + comb.mT @ streams).sum(1)
            else:
                x = x * 0.7 + layer(normed) * 0.3
        return x


@pytest.mark.parametrize("kind", ["scaled", "mixed", "keys", "transform"])
def test_what_stands_between_layers_is_not_read(monkeypatch, kind):
    """However the residual stream goes on, and whatever else selects: FAR nodes between two layers are left out."""
    left: list[int] = []
    near = steps.nodes_near

    def counted(graph, *places):
        read = near(graph, *places)
        left.append(0 if read is None else len(graph.nodes) - len(read))
        return read

    monkeypatch.setattr(steps, "nodes_near", counted)
    monkeypatch.setattr(recall, "folder", lambda: None)
    torch._dynamo.reset()
    model, x = Residuals(kind, 2), torch.randn(T, H)
    with torch.no_grad():
        got = torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
    report = moe_compile.last_report()
    assert len(report.blocks) == 2 and all(r.stage == "find" for r in report.rejected), report.rejected
    assert left[0] >= 2 * FAR, left


@pytest.mark.parametrize("shared", ["projection", "scale", "tokens"])
def test_a_router_whose_sides_have_something_in_common(shared):
    """It selects experts all the same, not tokens by tokens as the keys of attention are."""

    def model(x: Tensor) -> Tensor:
        x = x + (x @ weight.mT).tanh()
        other = {"projection": centre @ weight.mT, "scale": centre * scale, "tokens": centre * x.mean(0)}[shared]
        scores = {"projection": x @ weight.mT, "scale": x * scale, "tokens": x}[shared] @ other.mT
        w, ids = scores.softmax(-1).topk(K)
        h = torch.einsum("th,tkih->tki", x, up[ids]).relu()
        return x + torch.einsum("tki,tkhi,tk->th", h, down[ids], w)

    weight, centre, scale, up, down = (torch.randn(s) / 4 for s in ((H, H), (8, H), (H,), (8, 6, H), (8, H, 6)))
    x = torch.randn(T, H)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
    report = moe_compile.last_report()
    assert len(report.blocks) == 1 and not report.rejected, report.rejected


def test_and_is_no_write():
    """Python's own `a & b` ends in an underscore as torch's in-place operations do."""
    graph = torch.fx.symbolic_trace(lambda a, b: ((a & b) | b, a.add_(b))).graph
    assert [str(n.target) for n in graph.nodes if is_write(n)] == ["add_"]


def test_layers_cost_the_same_each():
    per_layer = {n: len(graph_after(Layers(n), torch.randn(T, H))) / n for n in (2, 6)}
    assert abs(per_layer[2] - per_layer[6]) <= 2, per_layer


def test_equal_layers_share_one_op_signature():
    """No op carries a layer's name or number: what differs between layers are tensors only."""
    constants = []

    def inner(gm, inputs):
        for n in gm.graph.nodes:
            if str(n.target).startswith("moe_compile."):
                plain = torch.fx.map_arg(n.args, lambda _: "tensor")
                constants.append((str(n.target), str(plain)))
        return gm.forward

    with torch.no_grad():
        torch.compile(Layers(4), backend="moe_fused", options={"inner": inner})(torch.randn(T, H))
    assert constants and len(set(constants)) == len(constants) / 4


def test_no_more_graphs_than_inductor_over_token_counts():
    def graphs(backend) -> int:
        torch._dynamo.reset()
        count = 0

        def counting(gm, inputs):
            nonlocal count
            count += 1
            return gm.forward

        kwargs = {"backend": counting} if backend == "plain" else {"backend": "moe_fused", "options": {"inner": counting}}
        model = torch.compile(Moe(), **kwargs)
        with torch.no_grad():
            for tokens in (1, 2, 7, 64, 129):
                model(torch.randn(tokens, H))
        return count

    assert graphs("ours") <= graphs("plain")


def test_seconds_are_reported():
    # a plan kept from an earlier run needs no validation
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(Moe(), backend="moe_fused", options={"inner": "eager"})(torch.randn(T, H))
    seconds = moe_compile.last_report().seconds
    assert 0 < seconds["validate"] < seconds["passes"] <= seconds["total"]


class Clock:
    """Processor seconds that pass at each look from the `slow`th on."""

    def __init__(self, slow: int) -> None:
        self.looks, self.slow = 0, slow

    def thread_time(self) -> float:
        self.looks += 1
        return 1000.0 * max(self.looks - self.slow, 0)


@pytest.mark.parametrize("slow", [1, 30])
def test_processor_time_is_bounded(monkeypatch, tmp_path, slow):
    """Whichever pass is slow: the graph is given up with that reason, runs as written, and nothing of it is remembered."""
    monkeypatch.setattr(recall, "folder", lambda: tmp_path)
    forget()
    torch._dynamo.reset()
    model, x = Moe(), torch.randn(T, H)
    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(budget, "time", clock := Clock(slow))
            got = torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
            report = moe_compile.last_report()
            assert clock.looks > slow and not report.blocks
            assert [r.code for r in report.rejected] == ["budget"] and "processor time" in report.rejected[0].reason
            assert report.rejected[0].source
        torch.testing.assert_close(got, model(x))
        torch._dynamo.reset()
        torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
    assert len(moe_compile.last_report().blocks) == 1


def test_probes_are_paid_for_before_they_are_drawn(monkeypatch):
    """Where nothing can be reduced the values of a probe alone may take seconds: the block declines, and none is drawn."""
    monkeypatch.setattr(recall, "folder", lambda: None)
    monkeypatch.setattr(engine, "WORK", 1000)
    monkeypatch.setattr(probe, "values", lambda *_: pytest.fail("drawn"))
    forget()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Moe(), backend="moe_fused", options={"inner": "eager"})(torch.randn(T, H))
    report = moe_compile.last_report()
    assert not report.blocks and [r.code for r in report.rejected] == ["budget"], report.rejected
    forget()


class CastTwice(Moe):
    """Tokens [1, T, H] in bf16, cast to float32 where they are routed and where they are computed with."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1).float()[:, 0] + 0 * x.transpose(0, 1).float()[:, 0]).to(x.dtype)


def test_equal_casts_with_sizes_in_symbols():
    """Strides of a transposed tensor are symbols where the token count is one."""
    with torch.no_grad():
        torch.compile(CastTwice(), backend="moe_fused", dynamic=True, options={"inner": "eager"})(torch.randn(1, T, H).bfloat16())
    report = moe_compile.last_report()
    assert len(report.blocks) == 1 and not report.rejected


def test_passes_run_once_per_graph(fake_passes):
    calls = []
    fake_passes(lambda gm, options, target: calls.append(1) or Outcome())
    model = torch.compile(Layers(2), backend="moe_fused", options={"inner": "eager"})
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(T, H))
    assert len(calls) == 1
