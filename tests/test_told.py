"""What the report says beside a block, and when strict=True raises: counts are no block, mixtures and dropped tokens are blocks left."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import catalogue
import pytest
import small
import torch
import torch.nn.functional as F
from catalogue.base import RENORM, SWIGLU_EXPERTS, Case, E, Fused, K
from torch import Tensor, nn

import moe_compile
from moe_compile.errors import NotFused
from moe_compile.loops import flags
from moe_compile.report import Report, collecting

torch.set_num_threads(1)
ENTRIES = catalogue.entries()


def told(case: Case, strict: bool = False) -> Report:
    torch._dynamo.reset()
    with collecting() as report:
        torch.compile(case.eval(), backend="moe_fused", options={"inner": "eager", "strict": strict})(*case.example_inputs())
    return report


@pytest.mark.parametrize("name", [n for n in ENTRIES if n.startswith("Beside")])
def test_counts_are_no_block(name: str) -> None:
    report = told(catalogue.build(ENTRIES[name]), strict=True)
    assert len(report.blocks) == 1
    assert not report.rejected, report.rejected


class CountedForEachToken(Case):
    """Verdict: fused. The second selection is returned as a mask of each token's experts: that is no count."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(self.logits(x))
        other = self.logits(x).sigmoid().topk(K, -1).indices
        return self.run_experts(x, ids, w), F.one_hot(other, E).sum(1)


def test_what_each_token_chose_is_no_count() -> None:
    report = told(catalogue.build(CountedForEachToken))
    assert len(report.blocks) == 1
    assert len(report.rejected) == 1


@pytest.mark.parametrize("name", ["DenseSoftmax", "DenseList", "Thresholds", "CapacityEinsum", "ExpertsChoose"])
def test_what_is_left_is_told_once_and_strict_raises(name: str) -> None:
    report = told(catalogue.build(ENTRIES[name]))
    assert not report.blocks
    assert len(report.rejected) == 1, report.rejected
    assert "test_told" in report.rejected[0].source or "catalogue" in report.rejected[0].source
    with pytest.raises(Exception) as raised:
        told(catalogue.build(ENTRIES[name]), strict=True)
    assert isinstance(raised.value, NotFused) or isinstance(raised.value.__cause__, NotFused)


@pytest.mark.parametrize("name", ["LinearMixture", "HeadsOfAttention"])
def test_what_is_no_mixture_of_experts_is_not_told(name: str) -> None:
    report = told(catalogue.build(ENTRIES[name]), strict=True)
    assert not report.rejected, report.rejected


class Normed(nn.Module):
    """Experts with a BatchNorm, in a loop over a list."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, ids = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, m in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, m(x[token]) * w[token, slot, None])
        return out


@pytest.mark.parametrize("train", [False, True])
def test_a_frame_that_dynamo_gave_up_is_told(train: bool) -> None:
    """A batch norm of as many rows as the data decides is a break inside the loop; in training it moves its statistics. Both are told."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Normed().train(train), torch.randn(30, 8)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x), twin(x))
    report = moe_compile.last_report(model)
    assert report is not None and not report.blocks and not report.fused
    if train:
        assert any("num_batches_tracked" in r.reason for r in report.rejected), str(report)
    else:
        (told,) = (b for b in report.graph_breaks if "break inside a loop" in b.reason)
        line = Path(__file__).read_text().splitlines()[int(told.source.removeprefix(f"{__file__}:")) - 1]
        assert "torch.where(ids == e)" in line and "nonzero" in told.reason, str(report)
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    torch.compile(copy.deepcopy(model), backend="eager")(x)  # what another backend's model breaks at is not told of ours
    torch.compile(model.gate, backend="moe_fused", options={"inner": "eager"})(x)
    after = moe_compile.last_report()
    assert after is not None and after.graph_count == 1 and not after.graph_breaks, str(after)


class Layer(small.Block):
    """A frame of its own, whose experts' outputs are added up or, in a `bad` one, combined by their maximum."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        w, ids = self.route(x)
        y = torch.einsum("tki,tkhi->tkh", F.silu(torch.einsum("th,tkih->tki", x, self.up[ids])), self.down[ids]) * w[..., None]
        return y.amax(1) if self.bad else y.sum(1)


def test_a_layer_that_runs_the_code_of_another_is_told_as_that_one() -> None:
    """Compiled layer by layer, the third layer runs what was compiled for the first, not for the second, which is of the same class. One
    that is like none of those that were compiled (near miss: it was never called) is not told as any of them."""
    model, x = nn.ModuleList(map(Layer, (False, True, False))).eval(), torch.randn(9, small.H)
    torch._dynamo.reset()
    with torch.no_grad():
        for layer in model:
            layer.compile(backend="moe_fused", options={"inner": "eager"})
            layer(x)
    report = moe_compile.last_report(model)
    assert report is not None and len(report.blocks) == 2 and [r.code for r in report.rejected] == ["inside"], str(report)
    stranger = Layer(False).double().eval()
    stranger.compile(backend="moe_fused")
    assert moe_compile.last_report(stranger) is None


@pytest.mark.parametrize("bad", [(False, True, False), (True, False)], ids=["good_first", "bad_first"])
def test_all_versions_of_one_piece_of_code_are_told(bad: tuple[bool, ...]) -> None:
    """Layers of one class share their code: the version of a bad one does not hide that of a good one, nor the other way round. Another
    number of tokens (near miss) is the same block, and after a reset none of the old versions is there."""
    model, x = nn.Sequential(*map(Layer, bad)).eval(), torch.randn(9, small.H)
    with torch.no_grad():
        compiled = small.compiled(model)
        torch.testing.assert_close(compiled(x), model(x))
        for report in (moe_compile.last_report(model), moe_compile.last_report()):
            assert report is not None and len(report.blocks) == 1 and [r.code for r in report.rejected] == ["inside"], str(report)
        compiled(torch.randn(7, small.H))
        again = moe_compile.last_report(model)
        assert again is not None and len(again.blocks) == 1 and len(again.rejected) == 1 and again.graph_count == 2, str(again)
        small.compiled(model[bad.index(False)])(x)
        good = moe_compile.last_report(model[bad.index(False)])
        assert good is not None and len(good.blocks) == 1 and not good.rejected
        if not bad[0]:
            model[1].bad = False
            small.compiled(model)(x)
            mended = moe_compile.last_report(model)
            assert mended is not None and len(mended.blocks) == 2 and not mended.rejected, str(mended)


class MultipliedInPlace(small.Block):
    """Verdict: left. Each expert's output multiplies what the others gave, row by row."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.ones_like(x)
        for e in range(len(self.up)):
            t, j = torch.where(ids == e)
            out[t] = out[t] * (w[t, j, None] * self.expert(x[t], e))
        return out


class MultipliedDense(small.Block):
    """Verdict: left. The same of all rows."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.ones_like(x)
        for e in range(len(self.up)):
            out *= (w * (ids == e)).sum(-1, keepdim=True) * self.expert(x, e)
        return out


class RowsLeave(small.Block):
    """Near miss: rows sorted by expert leave the graph, and no expert was applied."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.route(x)
        return x[ids.flatten().argsort() // small.K], w


OTHERWISE = [(MultipliedInPlace, "inside", "product"), (MultipliedDense, "inside", "product"), (RowsLeave, "left graph", "before any")]


@pytest.mark.parametrize("form, code, word", OTHERWISE, ids=lambda p: getattr(p, "__name__", None))
def test_outputs_that_are_multiplied_do_not_leave_as_indices(form: type[small.Block], code: str, word: str) -> None:
    report, got, want = small.both(form(), torch.randn(small.T, small.H))
    small.assert_equal(got, want)
    (told,) = report.rejected
    assert not report.blocks and told.code == code and word in told.reason, str(report)


class OverThreshold(nn.Module):
    """Verdict: left. Experts are modules, with biases; each gets the rows whose score is above a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, 8)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        probs = self.gate(x).softmax(-1)
        mask, out = probs > 0.2, torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t = mask[:, e].nonzero().squeeze(-1)
            out.index_add_(0, t, expert(x[t]) * probs[t, e, None])
        return out


class UnderMask(OverThreshold):
    """Verdict: left. The rows are picked by the mask itself."""

    def forward(self, x: Tensor) -> Tensor:
        probs = self.gate(x).softmax(-1)
        mask, out = probs > 0.2, torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            m = mask[:, e]
            out[m] += expert(x[m]) * probs[m, e, None]
        return out


class LongRows(OverThreshold):
    """Near miss: rows picked by what they are, and no experts."""

    def forward(self, x: Tensor) -> Tensor:
        probs = self.gate(x).softmax(-1)
        return torch.stack([self.experts[0](x[probs[:, e] > 0.2]).sum(0) for e in range(4)])


@pytest.mark.parametrize("form", [OverThreshold, UnderMask, LongRows])
def test_thresholds_in_a_loop_over_modules_are_told(form: type[OverThreshold]) -> None:
    report, got, want = small.both(form(), torch.randn(small.T, 8))
    small.assert_equal(got, want)
    told = [(r.code, "threshold" in r.reason) for r in report.rejected]
    assert told == ([] if form is LongRows else [("dense", True)]) and not report.blocks, str(report)
    assert report.graph_count == 1 or form is LongRows


@torch.library.custom_op("test_told::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    return x.sin()


@odd.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class OddExpert(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return odd(super().forward(x))


class OpInAnExpert(OverThreshold):
    """Verdict: left. A custom op in an expert that is a module, called by a loop in a method of its own; `hit`: over the experts that
    were hit, which no graph has as a whole."""

    def __init__(self, hit: bool) -> None:
        super().__init__()
        self.experts, self.hit = nn.ModuleList(OddExpert(8, 8) for _ in range(4)), hit

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(2)
        return self.loop(x, ids, w)

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist() if self.hit else range(4):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.experts[e](x[t]) * w[t, j, None])
        return out


@pytest.mark.parametrize("hit", [False, True])
def test_a_custom_op_is_told_once(hit: bool) -> None:
    """The second time, what was found in an equal graph is recalled: it is the same cause in the same loop still."""
    for _ in range(2):
        report, got, want = small.both(OpInAnExpert(hit), torch.randn(small.T, 8))
        small.assert_equal(got, want)
        (told,) = report.rejected
        assert told.code == ("effects" if hit else "opaque") and "custom op" in told.reason and "test_told::odd" in told.reason, str(report)


def test_an_op_that_takes_no_unknown_number_is_no_failure_of_the_users() -> None:
    """``down[int(ids[t, 0]), :, 0:1]`` with an id that has no value while it is traced: the frame is compiled as it would be without us."""
    assert flags.from_data_dependence(IndexError("only integers, slices (`:`) and tensors are valid indices (got SymInt)"))
    assert not flags.from_data_dependence(IndexError("index 3 is out of bounds for dimension 0 with size 3"))


class KthBest(Case):
    """Verdict: left. Kept is what is at least the k-th best score; the top-k's indices are not read."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.logits(x).softmax(-1)
        p = torch.where(p >= p.topk(K).values[:, -1:], p, 0.0)
        return sum(p[:, e, None] * F.linear(F.silu(F.linear(x, self.up[e])).chunk(2, -1)[0], self.down[e]) for e in range(E))


def test_the_kth_best_score_as_a_threshold_is_told() -> None:
    (r,) = told(catalogue.build(KthBest), strict=True).rejected
    assert r.code == "no block" and "threshold" in r.reason and "test_told" in r.source


class BesideExperts(small.Block):
    """Verdict: fused. Behind its experts the router has one number for nothing, one for the token itself, and one for a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.const = nn.Linear(small.H, small.E + 3), nn.Parameter(torch.randn(small.H))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = self.loop(x, ids, w)
        t, j = torch.where(ids == small.E + 1)
        out.index_add_(0, t, x[t] * w[t, j, None])
        t, j = torch.where(ids == small.E + 2)
        return out.index_add_(0, t, self.const.expand(len(t), -1) * w[t, j, None])


def test_what_other_numbers_stand_for_is_added_to_the_block() -> None:
    report, got, want = small.both(BesideExperts(), torch.randn(40, small.H))
    small.assert_equal(got, want)
    assert len(report.blocks) == 1 and not report.rejected, str(report)
    gating = report.blocks[0].ir.gating
    assert gating is not None and gating.num_experts == small.E + 3 and report.blocks[0].ir.experts.num_experts == small.E


class TokenByToken(small.Block):
    """Verdict: left. Each token, by itself, through every expert whose score is above a number."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        out = []
        for t in range(len(x)):
            out.append(sum((p[t][e] > 0.2) * p[t][e] * self.expert(x[t], e) for e in range(small.E)))
        return torch.stack(out)


class OneScoreOnly(small.Block):
    """Near miss: two of the scores weigh something, which is no mixture of all experts."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        return torch.stack([p[t][0] * self.expert(x[t], 0) + p[t][1] for t in range(len(x))])


@pytest.mark.parametrize("form", [TokenByToken, OneScoreOnly])
def test_experts_of_each_token_by_itself_are_told(form: type[small.Block]) -> None:
    report, got, want = small.both(form(), torch.randn(3, small.H), strict=True)
    small.assert_equal(got, want)
    assert not report.blocks
    if form is OneScoreOnly:
        assert not report.rejected, str(report)
        return
    (r,) = report.rejected
    line = Path(__file__).read_text().splitlines()[int(r.source.removeprefix(f"{__file__}:")) - 1]
    assert r.code == "dense" and "by itself" in r.reason and "p[t][e]" in line, str(report)


class Residual(small.Block):
    """Verdict: fused. The best expert's output and the token, mixed by how well the token fits the expert's own vector (BASE layers)."""

    def forward(self, x: Tensor) -> Tensor:
        e = self.router(x).argmax(-1)
        p = torch.sigmoid((x * self.router.weight[e]).sum(-1, keepdim=True))
        h = F.silu(torch.bmm(self.up[e], x[..., None]))
        return p * torch.bmm(self.down[e], h)[..., 0] + (1 - p) * x


class ResidualOfAnother(Residual):
    """Near miss: what the token is mixed with is no expert's either, and nothing is fused of it."""

    def forward(self, x: Tensor) -> Tensor:
        e = self.router(x).argmax(-1)
        p = torch.sigmoid((x * self.router.weight[e]).sum(-1, keepdim=True))
        return p * F.silu(x) + (1 - p) * x


@pytest.mark.parametrize("form", [Residual, ResidualOfAnother])
def test_an_expert_mixed_with_its_token_is_one_of_two_summands(form: type[small.Block]) -> None:
    report, got, want = small.both(form(), torch.randn(40, small.H))
    small.assert_equal(got, want)
    assert len(report.blocks) == (form is Residual), str(report)
