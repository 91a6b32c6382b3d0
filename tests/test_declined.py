"""Modules that stay as written, and what their authors are told: the cause in their own words, at their own line, once.

Each class says in its docstring what is odd about it; `says` are words of the reason, `at` the line that it points at.
"""

from __future__ import annotations

import linecache
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile.ir import Rejection
from moe_compile.loops.rows import Listener
from moe_compile.passes.aten.sources import code_of
from moe_compile.passes.aten.spelled import spell
from moe_compile.passes.recover.odd import _odd
from moe_compile.passes.recover.successive import successive
from moe_compile.report import Report, _current_call, collecting

torch.set_num_threads(1)
T, H, I, E, K = 5, 8, 4, 3, 2
INTERNAL = ("arg0", "arg1", "#1", "sum_", "_1[", "expert, ", "internal", "Error", "not captured")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("moe_compile.passes.rewrite.recall.load", lambda key: None)
    torch._dynamo.reset()
    yield


class Odd(nn.Module):
    """A plain block, which is fused; the others change one thing. The loop goes over all experts."""

    training_mode = False
    grad = False
    code = ""
    says: tuple[str, ...] = ()
    at = ""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 2 * I, H) * 0.3)
        self.down = nn.Parameter(torch.randn(E, H, I) * 0.3)
        self.make()

    def make(self) -> None: ...

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return w, ids

    def inner(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.silu(g) * u

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(self.inner(e, x), self.down[e])

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.loop(x, ids, w)


class Hit(Odd):
    """The loop goes over the experts that were hit, which only reading by example can capture."""

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


# ---- inside an expert ----------------------------------------------------------------------------------------------------


class NormOfWeighted(Odd):
    """An RMS norm of rows that the routing weight has multiplied."""

    code, says, at = "experts", ("a routing value enters an expert's function",), "index_add_"

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, F.rms_norm(self.expert(e, x[t]) * w[t, j, None], (H,), None, 0.1))
        return out


class ResidualInside(Odd):
    """A residual around a product in the middle of an expert. (Three products in a row are fused.)"""

    code, says, at = "experts", ("no chain", "a residual or a branch stands around one of them"), "index_add_"

    def make(self) -> None:
        self.middle = nn.Parameter(torch.randn(E, I, I))

    def expert(self, e: int, x: Tensor) -> Tensor:
        h = self.inner(e, x)
        return F.linear(h + F.relu(F.linear(h, self.middle[e])), self.down[e])


class NormInLoop(Hit):
    """A norm over groups of features in a loop over the experts that were hit."""

    code, says, at = "inside", ("group_norm stands inside the expert",), "in ids.unique()"

    def make(self) -> None:
        self.norm = nn.GroupNorm(2, H)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.norm(super().expert(e, x))


class Dropout(Odd):
    """Dropout inside the expert, in training."""

    training_mode, code, says, at = True, "inside", ("dropout is active", "training"), "F.dropout"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.dropout(super().expert(e, x), 0.1, self.training)


class DropoutInLoop(Hit):
    """The same in a loop over the experts that were hit."""

    training_mode, code, says, at = True, "random", ("random",), "in ids.unique()"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.dropout(super().expert(e, x), 0.1, self.training)


class SoftmaxInside(Odd):
    """Features normalised against each other."""

    code, says, at = "inside", ("softmax over features",), "F.softmax"

    def inner(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.softmax(g, -1) * u


class SortInside(Odd):
    """Features sorted."""

    code, says, at = "inside", ("sort of features",), "g.sort"

    def inner(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return g.sort(-1).values * u


class UnknownFunction(Odd):
    """An activation that no table has."""

    code, says, at = "inside", ("special_i0",), "special.i0"

    def inner(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return torch.special.i0(g) * u


class Attention(Odd):
    """Tokens of one expert look at each other."""

    code, says, at = "inside", ("attention stands inside the expert",), "scaled_dot_product_attention"

    def expert(self, e: int, x: Tensor) -> Tensor:
        y = super().expert(e, x)[None]
        return F.scaled_dot_product_attention(y, y, y)[0]


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class CustomFunction(Odd):
    """A custom autograd.Function."""

    training_mode, grad, code, says, at = True, True, "opaque", ("custom autograd.Function",), "x.clone()"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return _Twice.apply(super().expert(e, x))


class _Clipped(_Twice):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-30, 30)


class ClippedFunction(Odd):
    """One whose gradient is its forward pass's but where that is large."""

    training_mode, grad, code, says, at = True, True, "opaque", ("custom autograd.Function",), "x.clone()"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return _Clipped.apply(super().expert(e, x))


class LargestOfAll(Odd):
    """All rows of an expert are divided by the largest number in them, as a dynamic scale of a whole tensor is."""

    code, says, at = "inside", ("mixed with each other",), "index_add_"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x / x.abs().amax().clamp(min=1e-6))


class Reversed(Odd):
    """The token's features in another order are added inside the expert."""

    code, says, at = "experts", ("adds to its output", "the input"), "index_add_"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return x.flip(-1) + super().expert(e, x)


class Tied(Odd):
    """One down projection for all experts."""

    code, says, at = "experts", ("one and the same weight", "self.one"), "index_add_"

    def make(self) -> None:
        self.one = nn.Parameter(torch.randn(H, I) * 0.3)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(self.inner(e, x), self.one)


class SharedMiddle(Odd):
    """down, mid, up, and one mid for all experts."""

    code, says, at = "experts", ("one and the same weight in a product", "self.mid"), "index_add_"

    def make(self) -> None:
        self.mid = nn.Parameter(torch.randn(I, I) * 0.3)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(self.inner(e, x), self.mid)), self.down[e])


class Widths(Odd):
    """Experts of different widths."""

    code, says, at = "unlike", ("other sizes than those of expert 0", "equally wide"), "index_add_"

    def make(self) -> None:
        self.ups = nn.ParameterList(torch.randn(I + e, H) * 0.3 for e in range(E))
        self.downs = nn.ParameterList(torch.randn(H, I + e) * 0.3 for e in range(E))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.ups[e])), self.downs[e])


class MeanOfRows(Hit):
    """A mean over the rows that an expert was given. (`OneIsDifferent` is the near miss: there the experts are unlike.)"""

    code, says, at = "inside", ("the rows of an expert are mixed with each other", "(at test_declined.py:"), "in ids.unique()"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x + x.mean(0, keepdim=True))


class ReplacedWhere(Hit):
    """An output that is set where a condition on it holds; `clamp` is the near miss that fuses."""

    code, says, at = "experts", ("an expert's output is replaced where a condition on it holds", "clamp"), "in ids.unique()"

    def expert(self, e: int, x: Tensor) -> Tensor:
        y = super().expert(e, x)
        y[y > 1] = 1
        return y


class Statistics(Hit):
    """A BatchNorm inside an expert, in training."""

    training_mode, code = True, "effects"
    says, at = ("(the statistics of a BatchNorm, norm, over the rows that its expert got; a LayerNorm or RMSNorm",), "in ids.unique()"

    def make(self) -> None:
        self.norm = nn.BatchNorm1d(H)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, self.norm(x))


class Elu(Odd):
    """An activation that no kernel has."""

    code, says, at = "inside", ("stands inside the expert: elu is no activation that fused experts have",), "F.elu"

    def inner(self, e: int, x: Tensor) -> Tensor:
        return F.elu(F.linear(x, self.up[e]))[:, :I]


class Limited(Odd):
    """relu6 where gradients are wanted: at its limits they are not clamp's."""

    training_mode, grad, code = True, True, "experts"
    says, at = ("no activation is known that uses relu6, hardswish, hardsigmoid or hardtanh, whose gradient at a limit",), "index_add_"

    def inner(self, e: int, x: Tensor) -> Tensor:
        return F.relu6(F.linear(x, self.up[e]))[:, :I]


class OneExpert(Odd):
    """A block of one expert."""

    code, says, at = "unlike", ("there is one expert only, which every token gets: a plain MLP",), "index_add_"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x)[:, :1].softmax(-1).topk(1, dim=-1)
        out = torch.zeros_like(x)
        for e in range(1):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class OneIsDifferent(Odd):
    """Expert 1 has another activation."""

    code, says, at = "unlike", ("expert 1 is not the same function as expert 0",), "index_add_"

    def inner(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return (F.gelu if e == 1 else F.silu)(g) * u


class Forgotten(Odd):
    """Expert 0 is never applied."""

    code, says, at = "experts", ("expert 0 is never applied",), "index_add_"

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(1, E):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


# ---- the routing -----------------------------------------------------------------------------------------------------------


class OneAfterAnother(Odd):
    """An argmax, and another one of what is left: each expert takes the rows of both. (`ArgmaxTwice` below is the near miss.)"""

    code, says, at = "in turn", ("the best of what is left each time (2 times)", "torch.topk(scores, 2)"), "argmax"

    def choices(self, p: Tensor) -> list[Tensor]:
        first = p.argmax(-1)
        return [first, p.scatter(1, first[:, None], -1.0).argmax(-1)]

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        out, both = torch.zeros_like(x), self.choices(p)
        for e in range(E):
            for chosen in both:
                t = torch.where(chosen == e)[0]
                out.index_add_(0, t, self.expert(e, x[t]) * p[t, e, None])
        return out


class OneMaskOfTwo(OneAfterAnother):
    """The same with one mask of both choices."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        first, second = self.choices(p)
        hit = F.one_hot(first, E) + F.one_hot(second, E)
        out = torch.zeros_like(x)
        for e in range(E):
            t = torch.where(hit[:, e] > 0)[0]
            out[t] += self.expert(e, x[t]) * p[t, e, None]
        return out


class EachSlot(Odd):
    """A loop over tokens and slots that reads each id."""

    code, says, at = "record", ("by numbers that were read back: loop over the experts, and pick the rows of each",), "for t in range"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        out = []
        for t in range(x.shape[0]):
            out.append(sum(self.expert(int(ids[t, j]), x[t : t + 1]) * w[t, j] for j in range(K)))
        return torch.cat(out)


class Capacity(Hit):
    """An expert takes two rows and drops the others."""

    code, says, at = "capacity", ("capacity", "dropped"), "in ids.unique()"

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            t, j = t[:2], j[:2]
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class ExpertChoice(Odd):
    """Experts choose their tokens."""

    code, says, at = "expert choice", ("experts choose tokens",), "index_add_"

    def forward(self, x: Tensor) -> Tensor:
        w, rows = self.gate(x).softmax(-1).t().topk(4, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            out.index_add_(0, rows[e], self.expert(e, x[rows[e]]) * w[e][:, None])
        return out


class Soft(Odd):
    """Soft MoE: experts see weighed means of all tokens."""

    code, says, at = "soft", ("soft MoE", "weighed mean"), "softmax(0)"

    def make(self) -> None:
        self.phi = nn.Parameter(torch.randn(H, E * 3))

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.phi
        to_slots, to_tokens = logits.softmax(0), logits.softmax(1)
        slots = (to_slots.t() @ x).view(E, 3, H)
        g, u = torch.einsum("esh,eih->esi", slots, self.up).chunk(2, -1)
        return to_tokens @ torch.einsum("esi,ehi->esh", F.silu(g) * u, self.down).reshape(E * 3, H)


class Threshold(Odd):
    """A token takes every expert above a threshold."""

    code, says, at = "dense", ("threshold",), "index_add_"

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for e in range(E):
            t = torch.where(p[:, e] > 0.3)[0]
            out.index_add_(0, t, p[t, e, None] * self.expert(e, x[t]))
        return out


class Dense(Odd):
    """Every expert on every token."""

    code, says, at = "dense", ("every expert is applied to every token",), "sum("

    def forward(self, x: Tensor) -> Any:
        p = self.gate(x).softmax(-1)
        return sum(p[:, e, None] * self.expert(e, x) for e in range(E))


class Maximum(Odd):
    """The largest of the experts' outputs."""

    code, says, at = "inside", ("combined by their maximum",), "max(1)"

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        every = torch.stack([self.expert(e, x) for e in range(E)], 1)
        return every.gather(1, ids[..., None].expand(-1, -1, H)).max(1).values


# ---- loops -----------------------------------------------------------------------------------------------------------------


class Prints(Hit):
    """print in the loop."""

    code, says, at = "effects", ("calls print",), "print("

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            print("", end="")
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class SetsAttribute(Hit):
    """The last expert is noted."""

    code, says, at = "effects", ("sets last",), "self.last ="

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            self.last = e
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class UpdatesBuffer(Hit):
    """Loads are counted in a buffer, inside the loop."""

    code, says, at = "effects", ("writes to", "load"), "in ids.unique()"

    def make(self) -> None:
        self.register_buffer("load", torch.zeros(E))

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            self.load[e] += t.numel()
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class Branches(Hit):
    """An expert is left out where its weights are small."""

    code, says, at = "values", ("branch of the loop depends on the values of w",), "in ids.unique()"

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            if w[t, j].max().item() > 0.5:
                out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class Lists(Odd):
    """Rows are put into Python lists."""

    code, says, at = "record", ("depend on the routing", "torch.where(ids == e)"), "in enumerate(ids.tolist())"

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        rows: list[list[tuple[int, int]]] = [[] for _ in range(E)]
        for t, chosen in enumerate(ids.tolist()):
            for j, e in enumerate(chosen):
                rows[e].append((t, j))
        out = torch.zeros_like(x)
        for e, pairs in enumerate(rows):
            if pairs:
                at, slot = torch.tensor([t for t, _ in pairs]), torch.tensor([j for _, j in pairs])
                out.index_add_(0, at, self.expert(e, x[at]) * w[at, slot, None])
        return out


class TokenByToken(Odd):
    """A loop over tokens, not over experts."""

    code, says, at = "record", ("depends on the routing", "loop over the experts"), "def loop"

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        rows = [sum(self.expert(ids[t, j].item(), x[t : t + 1]) * w[t, j] for j in range(K)) for t in range(x.shape[0])]
        return torch.cat(rows)


class ByRows(Hit):
    """Small experts take another way."""

    code, says, at = "rows", ("compares a number of rows with 4",), "in ids.unique()"

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            y = self.expert(e, x[t]) if t.numel() > 4 else self.expert(e, x[t]) * 2
            out.index_add_(0, t, y * w[t, j, None])
        return out


class BusyTwice(Hit):
    """Experts with more rows count more: of the experts that were hit in the examples some are another function than others."""

    code, says, at = "rows", ("compares a number of rows with 3",), "in ids.unique()"

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            y = self.expert(e, x[t]) * w[t, j, None]
            out.index_add_(0, t, y * 1.5 if len(t) > 3 else y)
        return out


class SetOfIds(Hit):
    """All tokens' ids are read by Python, and `out` is an input of the rest of the function, which is told with the loop."""

    code, says, at = "record", (".tolist()", "for e in ids.unique().tolist()"), "in set("

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in set(ids.flatten().tolist()):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class IdById(Odd):
    """A loop over tokens, each id made a number: its selection is not told as one without experts."""

    code, says, at = "record", ("depends on the routing", "loop over the experts"), "in range(len(x))"

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t in range(len(x)):
            out[t] += w[t, 0] * (self.down[int(ids[t, 0])] @ x[t, :I])
        return out


class ConstantInFront(Odd):
    """One number of the router stands for a vector, and its tokens get it in front of the experts. (Behind them it is apart.)"""

    code, says, at = "beside", ("expert 3 gives the same vector for all tokens", "only the identity"), "index_add_"

    def make(self) -> None:
        self.gate, self.const = nn.Linear(H, E + 1), nn.Parameter(torch.randn(H))

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out, (t, j) = torch.zeros_like(x), torch.where(ids == E)
        out.index_add_(0, t, self.const.expand(len(t), -1) * w[t, j, None])
        for e in range(E):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class SharedUp(Odd):
    """All experts have one up projection; the down projections are their own."""

    code, says, at = "experts", ("reads something else than its up projections", "self.shared(x)"), "self.down[ids]"

    def make(self) -> None:
        self.shared = nn.Linear(H, I)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return (torch.einsum("ti,tkhi->tkh", F.gelu(self.shared(x)), self.down[ids]) * w[..., None]).sum(1)


class PartOfStack(Odd):
    """Experts use the first rows of their weights only."""

    code, says, at = "experts", ("expert parameter self.up has shape (3, 8, 8), used as (3, 4, 8)",), "self.down[ids]"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        h = F.silu(torch.einsum("th,tkih->tki", x, self.up[ids, :I]))
        return (torch.einsum("tki,tkhi->tkh", h, self.down[ids]) * w[..., None]).sum(1)


class MaskedThroughView(Odd):
    """Scores of groups that were not chosen are put to 0 through a view of the scores, which are read by their own name later."""

    code, says, at = "aliased", ("written through another view",), "masked_fill_"
    elsewhere = False

    def make(self) -> None:
        self.gate = nn.Linear(H, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 2 * I, H)), nn.Parameter(torch.randn(4, H, I))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.gate(x).softmax(-1)
        best = p.view(-1, 2, 2).amax(-1).topk(1).indices
        kept = torch.zeros(len(p), 2).scatter(1, best, 1.0).repeat_interleave(2, 1)
        seen = p.clone().view(-1, 4) if self.elsewhere else p.view(-1, 4)
        seen.masked_fill_(kept == 0, 0.0)
        w, ids = p.topk(K)
        return w, ids


class StackOfMirrored(Odd):
    """Each token is there twice, once with its features in reverse order."""

    code, says, at = "experts", ("put together from parts whose features lie in different orders",), "self.down[ids]"

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, x.flip(-1)], 1).view(-1, H)
        w, ids = self.route(x)
        h = F.silu(torch.einsum("th,tkih->tki", x, self.up[ids, :I]))
        return (torch.einsum("tki,tkhi->tkh", h, self.down[ids]) * w[..., None]).sum(1)


class TwoLevels(Odd):
    """A group, then an expert of the group."""

    code, says, at = "experts", ("put together from several selections", "two levels"), "self.down[ids]"

    def make(self) -> None:
        self.group, self.gate = nn.Linear(H, 2), nn.Linear(H, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, I, H)), nn.Parameter(torch.randn(4, H, I))

    def forward(self, x: Tensor) -> Tensor:
        p, g = self.group(x).softmax(-1).max(-1)
        q, e = self.gate(x).view(-1, 2, 2)[torch.arange(len(x)), g].softmax(-1).topk(1)
        ids = 2 * g[:, None] + e
        h = F.silu(torch.einsum("th,tkih->tki", x, self.up[ids]))
        return (torch.einsum("tki,tkhi->tkh", h, self.down[ids]) * (p[:, None] * q)[..., None]).sum(1)


class Draws(Hit):
    """Noise inside the loop."""

    code, says, at = "random", ("random numbers",), "in ids.unique()"

    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x + torch.rand_like(x))


class ReadRows(Odd):
    """The rows of an expert are read into Python, row by row."""

    code, says, at = "record", ("is read back into Python, one by one", "torch.where(ids == e)"), "in enumerate"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, _ in enumerate(self.up):
            for t, j in (ids == e).nonzero().tolist():
                out[t] += w[t, j] * self.expert(e, x[t])
        return out


class MaskOfMasked(Odd):
    """A mask picks among rows that another one has picked: not read by example, since Dynamo could unroll the loop, which it cannot."""

    code, says, at = "experts", ("depends on more than one slot",), "in enumerate"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, _ in enumerate(self.up):
            hit = (ids == e).any(-1)
            out[hit] = out[hit] + self.expert(e, x[hit]) * w[hit][ids[hit] == e][:, None]
        return out


class PlacesInQueues(Odd):
    """A buffer has a place for each token and slot in the queue of each expert; no place is compared with how many there are."""

    code, says, at = "capacity", ("none is dropped", "not read by places"), "cumsum(0)"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        flat, room = ids.flatten(), len(x) * K
        hot = F.one_hot(flat, E)
        at = flat * room + ((hot.cumsum(0) - 1) * hot).sum(-1)
        rows = x.new_zeros(E * room, H).index_add(0, at, x.repeat_interleave(K, 0)).view(E, room, H)
        y = torch.bmm(F.silu(torch.bmm(rows, self.up[:, :I].mT)), self.down.mT).view(-1, H)
        return (y[at].view(-1, K, H) * w[..., None]).sum(1)


class Depths(Odd):
    """Some tokens go through the layer, in the order of the text; the others pass by."""

    code, says, at = "expert choice", ("tokens are chosen here, not experts (mixture of depths)",), "scatter_add"

    def forward(self, x: Tensor) -> Tensor:
        x = x[None]
        scores = x @ self.gate.weight[0]
        at = scores.topk(2, 1).indices.sort(1)[0]
        rows = at[..., None].expand(-1, -1, H)
        y = self.expert(0, x.gather(1, rows)) * scores.gather(1, at).sigmoid()[..., None]
        return x.scatter_add(1, rows, y)[0]


class BlocksOfOne(Odd):
    """The experts are blocks of one layer's features, and a mask of the chosen ones multiplies what all of them gave."""

    code, says, at = "dense", ("masks blocks of one product's features",), "hot[..., None]"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        hot = torch.zeros(len(x), E).scatter(1, ids, w)
        h = F.relu(F.linear(x, self.up.flatten(0, 1))).view(-1, E, 2 * I) * hot[..., None]
        return F.linear(h.flatten(1), self.down.transpose(0, 1).repeat(1, 1, 2).flatten(1))


class AsManyInEach(BlocksOfOne):
    """Each block has as many features as there are experts."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(H, E * E), nn.Linear(E * E, H)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        hot = torch.zeros(len(x), E).scatter(1, ids, w)
        return self.narrow((F.relu(self.wide(x)).unflatten(-1, (E, E)) * hot[..., None]).flatten(-2))  # type: ignore[no-any-return]


class Vmap(Odd):
    """Experts under torch.func.vmap."""

    code, says, at = "transform", ("torch.func",), "vmap"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        every = torch.func.vmap(lambda up, down: F.linear(F.silu(F.linear(x, up[:I])), down))(self.up, self.down)
        return (torch.zeros(x.shape[0], E).scatter(1, ids, w).t()[..., None] * every).sum(0)


CASES = [c for c in list(globals().values()) if isinstance(c, type) and issubclass(c, Odd) and c.says]


def told(m: nn.Module, grad: bool = False, **options: Any) -> Report:
    with torch.set_grad_enabled(grad), collecting() as report:
        torch.compile(m, backend="moe_fused", options={"inner": "eager", **options})(torch.randn(T, H))
    return report


@pytest.mark.parametrize("cls", CASES, ids=lambda c: c.__name__)
def test_the_reason_is_the_authors(cls: type[Odd]) -> None:
    report = told(cls().train(cls.training_mode), cls.grad)
    assert not report.blocks and len(report.rejected) == 1, str(report)
    (r,) = report.rejected
    path, _, line = r.source.rpartition(":")
    assert path == __file__ and cls.at in linecache.getline(path, int(line)), f"{r.source}: {linecache.getline(path, int(line))}"
    assert all(words in r.reason for words in cls.says), r.reason
    assert not any(word in r.reason for word in INTERNAL), r.reason
    assert r.code == cls.code


class ArgmaxTwice(OneAfterAnother):
    """Both choices as the columns of one tensor of ids: fused, with the routing as written."""

    says = ()

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        ids = torch.stack(self.choices(p), -1)
        return self.loop(x, ids, p.gather(1, ids))


@torch.no_grad()
def test_products_between_two_choices_are_not_counted() -> None:
    """Of 250 experts each has a mask of the first choice and a product that reads it; the second choice is among what is left."""
    g = fx.Graph()
    scores = g.placeholder("scores")
    first = g.call_function(torch.ops.aten.argmax.default, (scores, -1))
    masks = [g.call_function(torch.ops.aten.eq.Scalar, (first, e)) for e in range(250)]
    for m in masks:
        g.call_function(torch.ops.aten.mm.default, (m, scores))
    left = g.call_function(torch.ops.aten.masked_fill.Scalar, (scores, masks[0], 0.0))
    g.output(g.call_function(torch.ops.aten.argmax.default, (left, -1)))
    scores.meta["val"] = left.meta["val"] = torch.empty(6, 250, device="meta")
    found = successive(first)
    assert found is not None and "(2 times)" in found.reason


def test_two_choices_in_one_tensor_of_ids_are_fused() -> None:
    assert len(told(ArgmaxTwice()).blocks) == 1


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_softmin_is_written_out_bit_by_bit() -> None:
    """No dim is dim 1 of [tokens, experts]; of [batch, tokens, experts] it is the batch, whatever one meant (near miss)."""

    class Softmin(Odd):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            w, ids = F.softmin(self.gate(x), None).topk(K, dim=-1)
            return w, ids

    m, x = Softmin(), torch.randn(T, H)
    report = told(m)
    assert len(report.blocks) == 1 and report.blocks[0].formula == "w = softmax(l)[top2]"
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(m, backend="moe_fused", options={"inner": "eager"})(x), m(x))
    # `dim`, then what torch calls `_stacklevel`, and `dtype`
    for z, given in ((x, (1,)), (x, (-1, 3, torch.float64)), (x, (None,)), (x[None], ()), (x[None], (None,)), (x[0], ())):
        graph = torch.fx.Graph()
        graph.output(graph.call_function(F.softmin, (graph.placeholder("x"), *given)))
        for n in graph.nodes:
            n.meta["example_value"] = z
        gm = torch.fx.GraphModule(nn.Module(), graph)
        spell(gm)
        gm.recompile()
        assert "functional.softmin" not in gm.code and torch.equal(gm(z), F.softmin(z, *given))


class MaskedElsewhere(MaskedThroughView):
    """Near miss: a copy of the scores is masked, and no expert is chosen from it."""

    says, elsewhere = (), True

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,tkih->tki", x, self.up[ids]).chunk(2, -1)
        return (torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids]) * w[..., None]).sum(1)


def test_groups_that_no_expert_is_chosen_from_are_told() -> None:
    report = told(MaskedElsewhere())
    assert len(report.blocks) == 1 and [r.code for r in report.rejected] == ["no block"], str(report)


class ScaledByAnother(Hit):
    """The function that chooses experts and loops over them takes a tensor beside its tokens."""

    says = ()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out * scale


def test_a_function_of_more_tensors_is_told_what_to_take_out() -> None:
    with torch.no_grad(), collecting() as report:
        torch.compile(ScaledByAnother(), backend="moe_fused", options={"inner": "eager"})(torch.randn(T, H), torch.ones(1))
    (r,) = report.rejected
    assert r.code == "arguments" and "takes 2 tensors (x, scale)" in r.reason and "a function of its own" in r.reason


# ---- routing that is left while the experts are fused ---------------------------------------------------------------------


class ThresholdRead(nn.Module):
    """Scores above a number choose experts, and Python reads which. Nothing proves that these are experts: `strict` does not raise."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E), nn.ModuleList(nn.Linear(H, H) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        p, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        for t, e in (p > 0.25).nonzero().tolist():
            out[t] += p[t, e] * self.experts[e](x[t])
        return out


class ThresholdOfOthers(ThresholdRead):
    """Near miss: a loop over rows that asks for no scores is told as a graph break, and as nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t in (self.gate(x)[:, 0] > 0.25).nonzero().flatten().tolist():
            out[t] += self.experts[0](x[t])
        return out


@pytest.mark.parametrize("cls", [ThresholdRead, ThresholdOfOthers])
def test_a_threshold_that_python_reads_is_told(cls: type[nn.Module]) -> None:
    report = told(cls(), strict=True)
    assert report.graph_breaks and [r.code for r in report.rejected] == ["values"] * (cls is ThresholdRead), str(report)
    for r in report.rejected:
        path, _, line = r.source.rpartition(":")
        assert "nonzero().tolist()" in linecache.getline(path, int(line)) and "no top-k chooses experts here" in r.reason


class Timed(Odd):
    """The loop is timed and the time is kept; Dynamo breaks at the clock, and what comes behind it is fused."""

    def forward(self, x: Tensor) -> Tensor:
        start = time.perf_counter()
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        self.took = time.perf_counter() - start
        return out


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_block_that_is_fused_is_not_told_as_left() -> None:
    report = told(Timed())
    assert len(report.blocks) == 1 and report.graph_breaks and not report.rejected, str(report)


class CapacityOfWeights(Odd):
    """Weights of rows beyond a capacity are 0."""

    says = ()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        hot = F.one_hot(ids, E).transpose(0, 1).reshape(-1, E)
        place = (hot.cumsum(0) * hot).sum(-1).view(K, -1).t()
        return w * (place <= 3), ids


class OfTheBatch(Odd):
    """Weights divided by the largest of the batch."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        return w / w.max(), ids


class Hashed(Odd):
    """Ids from the token, by arithmetic."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = ((x[:, 0].abs() * 100).long() % E)[:, None]
        return torch.ones_like(ids, dtype=x.dtype), ids


class Sampled(Odd):
    """Ids that are drawn."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.gate(x).softmax(-1)
        ids = torch.multinomial(p, K)
        return p.gather(1, ids), ids


class Smallest(Odd):
    """The experts with the smallest scores."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1, largest=False)
        return w, ids


@pytest.mark.parametrize(
    "cls, words",
    [
        (CapacityOfWeights, "capacity"),
        (OfTheBatch, "something else than experts, such as other tokens"),
        (Hashed, "do not come from one top-k"),
        (Sampled, "do not come from one top-k"),
        (Smallest, "smallest scores"),
    ],
)
def test_the_note_on_a_routing_is_the_authors(cls: type[Odd], words: str) -> None:
    report = told(cls())
    assert len(report.blocks) == 1 and not report.rejected, str(report)
    assert words in report.blocks[0].note
    assert not any(word in report.blocks[0].note for word in INTERNAL), report.blocks[0].note


# ---- a router in the same function as its loop ------------------------------------------------------------------------------


class OneFunction(Odd):
    """Router and loop in one function; what is odd is in the router."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class Jitter(OneFunction):
    """The router's input is shaken."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().route(x * torch.empty_like(x).uniform_(0.9, 1.1))


class Drawn(OneFunction):
    """Ids are drawn."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.gate(x).softmax(-1)
        ids = torch.multinomial(p, K)
        return p.gather(1, ids), ids


@pytest.mark.parametrize("cls", [Jitter, Drawn])
def test_a_router_that_stops_its_loop_is_told_once_with_a_way_out(cls: type[Odd]) -> None:
    (r,) = told(cls()).rejected
    assert r.code == "random" and "random numbers" in r.reason and "a function of its own" in r.reason


def test_counts_of_one_hot_stay_beside_a_loop_in_one_function() -> None:
    """The size of one_hot with a number of classes does not depend on data: a balancing loss is no hindrance."""

    class Balanced(OneFunction):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            w, ids = self.route(x)
            out = torch.zeros_like(x)
            for e in ids.unique().tolist():
                t, j = torch.where(ids == e)
                out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
            return out, F.one_hot(ids, E).float().mean((0, 1))

    assert told(Balanced()).fused


@pytest.mark.parametrize("name", ["tolist", "numpy"])
def test_ids_of_all_tokens_are_no_rows_of_an_expert(name: str) -> None:
    """So many numbers for each token, on both routings; near miss: as many as an expert has rows, which is another matter."""
    asked = [torch.zeros(n, 2, dtype=torch.long) for n in (7, 11)]
    for values, code, says in ((asked, "record", "ids.unique().tolist()"), ([v.flatten()[1:] for v in asked], "", "how many rows")):
        with Listener() as first:
            getattr(values[1], name)()
        with pytest.raises(Rejection, match=re.escape(says)) as told, Listener(first.said, ((7, 11),)):
            getattr(values[0], name)()
        assert told.value.code == code
        assert not code or told.value.source.startswith(f"{__file__}:")


@pytest.mark.parametrize(
    "line, mark, code",
    [
        ("p = g(x).softmax(-1); v, i = p.sort()", "g(x).softmax(-1); v, i = p.sort()", "g(x).softmax(-1)"),
        ("y = f(x, ';'); z = 1", "f(x, ';'); z = 1", "f(x, ';')"),
        ("y = (g(x).topk(2))", "g(x).topk(2))", "g(x).topk(2)"),
    ],
)
def test_what_is_quoted_is_one_statement(line: str, mark: str, code: str) -> None:
    """Dynamo's marks may reach to the end of the line; near miss: a semicolon inside of a text ends nothing."""
    n = torch.fx.Graph().placeholder("x")
    n.meta["stack_trace"] = f'  File "model.py", line 3, in route\n    {line}\n    {" " * line.index(mark)}{"^" * len(mark)}\n'
    assert code_of(n) == code


@pytest.mark.parametrize("shape, dim, says", [((5, H), 0, "rows of an expert are mixed"), ((5, K, H), 1, "combined by their maximum")])
def test_a_maximum_of_rows_is_none_of_experts(shape: tuple[int, ...], dim: int, says: str) -> None:
    x = torch.fx.Graph().placeholder("x")
    x.meta["val"] = torch.empty(shape)
    found = _odd(x.graph.call_function(torch.ops.aten.amax.default, (x, [dim])), set())
    assert found is not None and says in found


# ---- whose reasons ---------------------------------------------------------------------------------------------------------


def test_nothing_leaks_from_one_model_into_another() -> None:
    """The first gives no graph at all: its loop is left, in Python. The second is strict, and whole."""
    first = torch.compile(_LoopAlone(), backend="moe_fused", options={"inner": "eager"})
    with torch.no_grad():
        first(torch.randn(T, H))
        left = moe_compile.last_report()
        torch.compile(Hit(), backend="moe_fused", options={"inner": "eager", "strict": True})(torch.randn(T, H))
    assert left is not None and any("calls print" in r.reason for r in left.rejected), str(left)
    report = moe_compile.last_report()
    assert report is not None and report is not left and report.fused


class _LoopAlone(Prints):
    """The frame that is compiled has the loop in it, and a break in the loop."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            print("", end="")
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


def test_strict_sees_a_frame_that_gave_no_graph() -> None:
    with torch.no_grad(), pytest.raises(moe_compile.NotFused, match="print"):
        torch.compile(_LoopAlone(), backend="moe_fused", options={"inner": "eager", "strict": True})(torch.randn(T, H))


def test_a_report_for_each_model() -> None:
    """Regions compiled one by one, and two models in turns: what is told of a model is all of it, and of no other."""
    a, b = nn.Sequential(Hit(), nn.Identity(), Odd()), nn.Sequential(Hit())
    for m in (a[0], a[2], b[0]):
        m.compile(backend="moe_fused", options={"inner": "eager"})
    with torch.no_grad():
        for _ in range(2):
            a(torch.randn(T, H))
            b(torch.randn(T, H))
            a(torch.randn(T + 2, H))
    of_a, of_b = moe_compile.last_report(a), moe_compile.last_report(b)
    assert of_a is not None and of_b is not None
    assert len(of_a.blocks) == 2 and of_a.graph_count == 2, str(of_a)
    assert len(of_b.blocks) == 1 and of_b.graph_count == 1 and moe_compile.last_report(nn.Linear(1, 1)) is None


def test_a_call_is_no_other_call() -> None:
    """Also where the frame of the next call lies at the address of the last one."""
    marks: list[object] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        twice = [_current_call() for _ in range(2)]
        assert twice[0] == twice[1] is not None
        marks.append(twice[1].mark)
        return gm.forward

    for _ in range(20):
        torch._dynamo.reset()
        torch.compile(torch.neg, backend=backend)(torch.zeros(1))
    assert len(set(marks)) == len(marks) == 20


def test_graphs_that_did_not_run_are_not_counted() -> None:
    """The inner compiler refuses each graph at first: Dynamo makes another."""
    seen = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(gm)
        if len(seen) == 1:
            raise torch._dynamo.exc.RestartAnalysis(restart_reason="once more")
        return gm.forward

    with torch.no_grad():
        torch.compile(Odd(), backend="moe_fused", options={"inner": inner})(torch.randn(T, H))
    report = moe_compile.last_report()
    assert report is not None and report.graph_count == 1 and len(report.blocks) == 1
