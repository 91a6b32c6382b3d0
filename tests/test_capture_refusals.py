"""moe_compile/capture.py: what is not proved stays as written."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import captured
import pytest
import sympy
import torch
import torch.nn.functional as F
from captured import Counter, E, H, I, K, Loop, compiled
from torch import Tensor, nn

from moe_compile.ir import Experts, Form, MoeBlock, Rejection
from moe_compile.ir import scalar as act
from moe_compile.loops import capture, looks
from moe_compile.loops.bench import primes
from moe_compile.loops.call import Roles, Spec, roles_of
from moe_compile.report import collecting


@pytest.fixture(autouse=True)
def nothing_pending() -> Iterator[None]:
    capture.pending()
    yield
    capture.pending()


# ---- what is left as written -------------------------------------------------------------------------------------------


class Dropout(Loop):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, F.dropout(self.expert(e, x[t]), 0.5, self.training) * w[t, j, None])
        return out


class Capacity(Loop):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            t, j = t[:3], j[:3]
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class LoneTokenDoubled(Loop):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            y = self.expert(e, x[t])
            out.index_add_(0, t, (y * 2 if t.numel() == 1 else y) * w[t, j, None])
        return out


class BranchOnValues(Loop):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            y = self.expert(e, x[t])
            out.index_add_(0, t, (y * 2 if x.max().item() > 1e6 else y) * w[t, j, None])
        return out


class Detached(Loop):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x.detach())


class Counting(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            self.load[e] += t.numel()
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class RoomForSixty(Loop):
    """What comes after an expert's first 60 rows is dropped, which few tokens do not tell."""

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            t, j = self.kept(t, j)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out

    def kept(self, t: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        return t[:60], j[:60]


class RoomAsked(RoomForSixty):
    def kept(self, t: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        return (t[:60], j[:60]) if t.numel() > 60 else (t, j)


class RoomForTheBest(RoomForSixty):
    def kept(self, t: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(t.numel()) if t.numel() <= 60 else torch.arange(t.numel()).flip(0)[:60]
        return t[rows], j[rows]


class ManyTokensDoubled(RoomForSixty):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().dispatch(x, ids, w * 2 if x.shape[0] > 200 else w)


class FirstTokensOnly(Loop):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids[:200] == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class BoundedCounts(Loop):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out, flat = torch.zeros_like(x), ids.view(-1)
        order, counts = flat.argsort(stable=True), torch.bincount(flat, minlength=E)
        starts = (counts.cumsum(0) - counts).tolist()
        for e, n in enumerate(counts.clamp(max=60).tolist()):
            rows = order[starts[e] : starts[e] + n]
            out.index_add_(0, rows // K, self.expert(e, x[rows // K]) * w.view(-1)[rows][:, None])
        return out


class TokensInPieces(Loop):
    """Nothing is dropped, but a reading of few tokens has one piece only."""

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        pieces = zip(x.split(64), ids.split(64), w.split(64), strict=True)
        return torch.cat([super(TokensInPieces, self).dispatch(*p) for p in pieces])


@pytest.mark.parametrize(
    "cls", [RoomForSixty, RoomAsked, RoomForTheBest, ManyTokensDoubled, FirstTokensOnly, BoundedCounts, TokensInPieces]
)
@torch.no_grad()
def test_what_many_tokens_do_is_not_told_by_few(cls: type[Loop]) -> None:
    m, counter = cls(), Counter()
    c = compiled(m, counter, dynamic=True)
    for tokens in (9, 300):
        x = torch.randn(tokens, H)
        torch.testing.assert_close(c(x), m(x))
    assert counter.ops == 0 or cls is TokensInPieces  # each piece may well be fused


@torch.no_grad()
def test_a_number_of_the_class_is_guarded() -> None:
    class Scaled(Loop):
        scale = 1.0

        def expert(self, e: int, x: Tensor) -> Tensor:
            return super().expert(e, x) * self.scale

    m, counter, x = Scaled(), Counter(), torch.randn(9, H)
    c = compiled(m, counter)
    for Scaled.scale in (1.0, 3.0):
        torch.testing.assert_close(c(x), m(x))


@pytest.mark.parametrize("cls", [Dropout, Capacity, LoneTokenDoubled, BranchOnValues, Detached, Counting])
def test_near_misses_run_as_written(cls: type[Loop]) -> None:
    m, twin, counter, x = cls(), cls(), Counter(), torch.randn(9, H)
    twin.load_state_dict(m.state_dict())
    c = compiled(m, counter)
    for _ in range(2):
        torch.manual_seed(3)
        out = c(x)
        torch.manual_seed(3)
        torch.testing.assert_close(out, twin(x))
    assert counter.ops == 0
    for a, b in zip(m.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    rejected = [t.outcome for _, t in capture._trials[cls.dispatch] if isinstance(t.outcome, Rejection)]
    assert rejected and all(r.reason and r.source.startswith((__file__, captured.__file__)) for r in rejected)


def test_dropout_is_read_again_in_evaluation() -> None:
    m, counter, x = Dropout().eval(), Counter(), torch.randn(9, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 1


def test_hooks_of_experts_still_run() -> None:
    class Modules(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))

        def expert(self, e: int, x: Tensor) -> Tensor:
            return self.experts[e](x)  # type: ignore[no-any-return]

    m, x, calls = Modules(), torch.randn(9, H), []
    m.experts[0].register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad():
        c = compiled(m, counter := Counter())
        torch.testing.assert_close(c(x), m(x))
    assert counter.ops == 0 and len(calls) == 2


def test_disabled_functions_stay_disabled() -> None:
    class Disabled(Loop):
        @torch.compiler.disable
        def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            return super().dispatch(x, ids, w)

    m, x, counter = Disabled(), torch.randn(9, H), Counter()
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 0


def test_code_with_side_effects_is_no_candidate() -> None:
    def prints(x: Tensor) -> None:
        for _ in x:
            print("x")

    def writes(self: Any, x: Tensor) -> None:
        for self.last in x:
            pass

    def generates(x: Tensor) -> Any:
        for r in x:
            yield r + 1

    assert looks.is_candidate(Loop.dispatch.__code__)
    assert not any(looks.is_candidate(f.__code__) for f in (prints, writes, generates, Loop.forward))


CLAMPED = act.silu(act.clamp(act.G, -sympy.oo, 7)) * act.U


def _meaning(gm: torch.fx.GraphModule, **changes: Any) -> Any:
    """What the passes say of `Loop.dispatch`, with changes that make it wrong."""
    at = {n.meta.get("arg") or n.meta.get("param_path"): n for n in gm.graph.nodes if n.op == "placeholder"}
    out = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    experts = Experts(**{**dict(num_experts=E, hidden=H, intermediate=I, out_features=H, form=Form.CONCAT, activation=CLAMPED), **changes})
    boundary = dict(tokens=at["x"], ids=at["ids"], weights=at["w"], up=[at["up"]], down=[at["down"]], out=out)
    return types.SimpleNamespace(ir=MoeBlock(None, experts, boundary=boundary))


@pytest.mark.parametrize(
    ("changes", "ops"),
    [
        ({}, 1),
        (dict(activation=act.gelu(act.G) * act.U), 0),
        (dict(activation=CLAMPED * sympy.Rational(1001, 1000)), 0),
        (dict(activation=act.SWIGLU), 0),
        (dict(form=Form.INTERLEAVED), 0),
        (dict(num_experts=E - 1), 0),
        (dict(weight_on_input=True), 0),
    ],
)
def test_a_wrong_reading_is_caught(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], ops: int) -> None:
    monkeypatch.setattr(capture, "_recover", lambda gm: _meaning(gm, **changes))
    monkeypatch.setattr(capture, "_trials", type(capture._trials)())
    m, counter, x = Loop(), Counter(), torch.randn(9, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == ops


def test_a_fault_of_ours_is_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_recover", lambda gm: 1 / 0)
    monkeypatch.setattr(capture, "_trials", type(capture._trials)())
    m, counter, x = Loop(), Counter(), torch.randn(9, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    (_, trial), *_ = capture._trials[Loop.dispatch]
    assert counter.ops == 0 and "ZeroDivisionError" in trial.outcome.reason


# ---- arguments -----------------------------------------------------------------------------------------------------------

f32, i64, s = torch.float32, torch.int64, sympy.Symbol("s", positive=True, integer=True)


@pytest.mark.parametrize(
    ("tensors", "roles"),
    [
        (dict(x=Spec(f32, (9, 16)), i=Spec(i64, (9, 2)), w=Spec(f32, (9, 2))), Roles("x", "i", "w", (), 2)),
        (dict(w=Spec(f32, (s, 2)), i=Spec(i64, (s, 2)), x=Spec(f32, (s, 16))), Roles("x", "i", "w", (), 2)),
        (dict(x=Spec(f32, (3, s, 16)), i=Spec(i64, (3 * s, 2)), w=Spec(f32, (3 * s, 2))), Roles("x", "i", "w", (), 2)),
        (dict(x=Spec(f32, (s, 16)), i=Spec(i64, (4 * s,)), w=Spec(f32, (4 * s, 1))), Roles("x", "i", "w", (), 4)),
        (
            dict(x=Spec(f32, (9, 16)), u=Spec(f32, (6, 8, 16)), i=Spec(i64, (9, 2)), w=Spec(f32, (9, 2))),
            Roles("x", "i", "w", ("u",), 2),
        ),
        (dict(x=Spec(f32, (9, 16)), i=Spec(i64, (8, 2)), w=Spec(f32, (8, 2))), None),  # other tokens
        (dict(x=Spec(f32, (9, 16)), i=Spec(f32, (9, 2)), w=Spec(f32, (9, 2))), None),  # no ids
        (dict(x=Spec(f32, (9, 16)), i=Spec(i64, (9, 2))), None),  # no weights
        (
            dict(x=Spec(f32, (9, 16)), y=Spec(f32, (9, 16)), i=Spec(i64, (9, 2)), w=Spec(f32, (9, 2))),
            Roles("x", "i", "w", (), 2, ("y",)),  # two of them: the first may be the tokens, which the probes tell
        ),
    ],
)
def test_roles_of_arguments(tensors: dict[str, Spec], roles: Roles | None) -> None:
    assert roles_of(tensors)[:1] == (() if roles is None else (roles,))


def test_token_counts_are_told_from_all_other_sizes() -> None:
    small, large = primes(17, taken={16, 5 * 64, 19}, count=2)
    assert (small, large) == (7, 17)
    assert primes(17, taken={17 * 8, 19, 64}) == [23]


# ---- an expert twice for a token ---------------------------------------------------------------------------------------


class Puts(Loop):
    """out[t] += y counts an expert that a token has twice once, where the op counts it twice."""

    def edit(self, ids: Tensor) -> Tensor:
        return ids

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return self.dispatch(x, self.edit(ids), w)

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out[t] += self.expert(e, x[t]) * w[t, j, None]
        return out


class Viewed(Puts):
    def edit(self, ids: Tensor) -> Tensor:
        return ids.view(-1, K).to(torch.int64).contiguous()


class Written(Puts):
    def edit(self, ids: Tensor) -> Tensor:
        ids[0] = 0
        return ids


class WrittenThroughAView(Puts):
    def edit(self, ids: Tensor) -> Tensor:
        ids.view(-1)[:K].fill_(1)
        return ids


class Clamped(Puts):
    def edit(self, ids: Tensor) -> Tensor:
        return ids.clamp(max=1)


class WrittenButAdded(Written):
    """index_add_ counts it twice as well."""

    dispatch = Loop.dispatch


@pytest.mark.parametrize(
    ("cls", "ops"), [(Puts, 1), (Viewed, 1), (WrittenButAdded, 1), (Written, 0), (WrittenThroughAView, 0), (Clamped, 0)]
)
def test_an_expert_twice_for_a_token(cls: type[Puts], ops: int) -> None:
    m, counter, x = cls(), Counter(), torch.randn(9, H)
    with collecting() as report:
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == ops
    assert ops or any("had an expert twice" in r.reason for r in report.rejected), str(report)
