"""Loops over many experts are recorded with few of them: those with weights beside those without, and weights that code casts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import moe_compile
from moe_compile.loops.fewer import MANY, Fewer
from moe_compile.loops.rewrites import cast_stacks

H, I, K, T = 16, 6, 3, 9
E, ALL = MANY + 3, MANY + 8  # experts with weights, and all


class Identity(nn.Module):
    """Verdict: fused. A loop over the experts hit; those from `weighted` on give rows back, and one of the stacks has room for them too."""

    def __init__(self) -> None:
        super().__init__()
        self.weighted, self.all = E, ALL
        self.router, self.up, self.down = nn.Linear(H, ALL), nn.Parameter(_draw(ALL, 2 * I, H)), nn.Parameter(_draw(E, H, I))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        return self.experts(x, ids, w)

    def experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), F.one_hot(ids, self.all).permute(2, 1, 0)
        for e in mask.sum((1, 2)).nonzero():
            j, t = torch.where(mask[e[0]])
            y = x[t] if e >= self.weighted else self.expert(int(e), x[t])
            out.index_add_(0, t, y * w[t, j, None])
        return out

    def expert(self, e: int, x: Tensor) -> Tensor:
        a, b = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(F.silu(a) * b, self.down[e])


class IdentityHalved(Identity):
    """Verdict: as written. Those from `weighted` on give half of their rows back."""

    def experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), F.one_hot(ids, self.all).permute(2, 1, 0)
        for e in mask.sum((1, 2)).nonzero():
            j, t = torch.where(mask[e[0]])
            y = x[t] / 2 if e >= self.weighted else self.expert(int(e), x[t])
            out.index_add_(0, t, y * w[t, j, None])
        return out


class IdentityFromLater(Identity):
    """Verdict: as written. The last expert with weights gives rows back too: as many as no list is long."""

    def experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), F.one_hot(ids, self.all).permute(2, 1, 0)
        for e in mask.sum((1, 2)).nonzero():
            j, t = torch.where(mask[e[0]])
            y = x[t] if e >= self.weighted or e % 7 == 2 else self.expert(int(e), x[t])
            out.index_add_(0, t, y * w[t, j, None])
        return out


class IdentityInList(Identity):
    """Verdict: fused. The experts with weights are modules of a list."""

    def __init__(self) -> None:
        super().__init__()
        del self.up, self.down
        self.list = nn.ModuleList(nn.Sequential(nn.Linear(H, I, bias=False), nn.SiLU(), nn.Linear(I, H, bias=False)) for _ in range(E))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.list[e](x)


class Cast(Identity):
    """Verdict: fused, with stacked weights. In half precision each matrix is cast where it is used, and sums are in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.weighted = E
        self.router, self.up = nn.Linear(H, E), nn.Parameter(_draw(E, 2 * I, H))

    def experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().experts(x.float(), ids, w.float()).to(x.dtype)

    def expert(self, e: int, x: Tensor) -> Tensor:
        a, b = F.linear(x, self.up[e].float()).chunk(2, -1)
        return F.linear(F.silu(a) * b, self.down[e].float())


class CastInList(IdentityInList):
    """Verdict: fused. As `Cast`, with the matrices in a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.router = E, nn.Linear(H, E)

    def experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().experts(x.float(), ids, w.float()).to(x.dtype)

    def expert(self, e: int, x: Tensor) -> Tensor:
        up, act, down = self.list[e]
        return F.linear(act(F.linear(x, up.weight.float())), down.weight.float())


class CastDown(Cast):
    """Verdict: fused as what it is or as written, never as `Cast`: a cast to fewer bits is a rounding."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        a, b = F.linear(x, self.up[e].to(torch.float8_e4m3fn).float()).chunk(2, -1)
        return F.linear(F.silu(a) * b, self.down[e].float())


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


FUSED = [(Identity, torch.float32), (Cast, torch.bfloat16), (IdentityInList, torch.float32), (CastInList, torch.bfloat16)]
NOT = [(IdentityHalved, torch.float32, 0), (IdentityFromLater, torch.float32, 0), (CastDown, torch.bfloat16, None)]


@pytest.mark.parametrize(("cls", "dtype"), FUSED)
def test_few_stand_for_all(cls: type[Identity], dtype: torch.dtype) -> None:
    """Against float64, at 1.25 times eager's own error and no more; every expert is chosen by some token."""
    block, model = compiled(cls, dtype, blocks=1)
    assert block is not None and (block.ir.experts.num_experts, block.ir.experts.num_identity) == (
        model.weighted,
        model.all - model.weighted,
    )
    assert block.ir.experts.stacked == (not issubclass(cls, IdentityInList))


def test_matrices_are_cast_by_the_op_where_the_target_does_that() -> None:
    """experts(x, cast(W)) = experts(x, W): a whole stack is never made wide for a few experts; with gradients it stays as written."""
    cast, op = torch.ops.aten.to.dtype, torch.ops.moe_compile.experts.default
    for grad in (False, True):
        torch._dynamo.reset()
        model, found = Cast().to(torch.bfloat16), []
        kept: Callable[..., object] = lambda gm, inputs, to=found, **_: to.extend(gm.graph.nodes) or gm.forward  # noqa: E731
        with torch.set_grad_enabled(grad):
            torch.compile(model, backend="moe_fused", options={"inner": kept})(torch.randn(T, H, dtype=torch.bfloat16))
        (experts,) = [n for n in found if n.target is op]
        weights = [w for i in (3, 4) for w in experts.args[i]]
        assert [w.target is cast for w in weights] == [grad] * 2, weights
        assert bool(moe_compile.last_report().notes) is not grad


@pytest.mark.parametrize(("cls", "dtype", "blocks"), NOT)
def test_what_few_do_not_tell(cls: type[Identity], dtype: torch.dtype, blocks: int | None) -> None:
    compiled(cls, dtype, blocks)


def _taken(*casts: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda stack: sum((stack[e].to(d).float() for e, d in enumerate(casts)), torch.zeros(()))


@pytest.mark.parametrize(
    ("casts", "whole"),
    [
        ((torch.float32, torch.float32, torch.float32), True),
        ((torch.float32, torch.float64, torch.float32), False),
        ((torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e4m3fn), False),
        ((torch.float16, torch.float16, torch.float16), False),
        ((torch.float64, torch.float64, torch.float64), True),
    ],
)
def test_a_stack_is_cast_as_its_matrices_are(casts: tuple[torch.dtype, ...], whole: bool) -> None:
    """Law: cast(P[e]) = cast(P)[e], for one cast that keeps every value."""
    stack = torch.randn(3, 4, 5, dtype=torch.bfloat16)
    gm = make_fx(_taken(*casts), pre_dispatch=True)(stack)
    next(iter(gm.graph.nodes)).meta["param_path"] = "stack"
    before, expected = str(gm.graph), gm(stack)
    cast_stacks(gm)
    assert (str(gm.graph) != before) is whole and torch.equal(gm(stack), expected)


def test_a_matrix_that_is_written_after_its_cast_is_its_own() -> None:
    """Near miss: every cast is a copy, in which a later one of the same matrix does not see what was written, through a view or not."""
    stack = torch.randn(3, 4, 5, dtype=torch.bfloat16)
    for written in (lambda s: s[0].float().add_(1) + s[0].float(), lambda s: (s[0].float().t()[:2].mul_(3), s[0].float())[1]):
        gm = make_fx(written, pre_dispatch=True)(stack)
        next(iter(gm.graph.nodes)).meta["param_path"] = "stack"
        cast_stacks(gm)
        assert torch.equal(gm(stack), written(stack))


def test_numbers_of_experts_with_and_without_weights_go_there_and_back() -> None:
    fewer = Fewer(13, 768, (), (512, 7))
    assert [fewer.shape((n, 8, 4)) for n in (768, 512)] == [(13, 8, 4), (7, 8, 4)] and fewer.shape((768, 4)) == (13, 4)
    assert [fewer.number(v) for v in (768, 512, 256, 3)] == [13, 7, 6, 3]
    assert [fewer.size(v) for v in (13, 7, 3)] == [768, 512, 3]


def compiled(cls: type[Identity], dtype: torch.dtype, blocks: int | None = None) -> tuple[moe_compile.FusedBlock | None, Identity]:
    torch.manual_seed(0)
    model, x = cls().to(dtype), torch.randn(ALL, H).to(dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        got, eager = torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x), model(x)
        exact = model.double()(x.double())
    report = moe_compile.last_report()
    assert blocks is None or len(report.blocks) == blocks, report
    assert (got - exact).abs().max() <= 1.25 * (eager - exact).abs().max() + 1e-5 * exact.abs().max(), report
    return (report.blocks[0] if report.blocks else None), model
