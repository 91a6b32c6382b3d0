"""Someone's new MoE, from "declined, because" to fused, in five steps: what the report says of each, and what is changed for the next.

python examples/bring_up.py            the five steps
python examples/bring_up.py --graphs   a transformers model: graphs and breaks of plain Dynamo, and of this backend
"""

from __future__ import annotations

import argparse
import linecache
import logging
import textwrap
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile

TOKENS, HIDDEN, INNER, EXPERTS, K = 12, 16, 8, 4, 2


class Found(nn.Module):
    """As it was found: token by token, loads counted on the way, a softmax in each expert."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)
        self.register_buffer("load", torch.zeros(EXPERTS))

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x.softmax(-1), self.up[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e])

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return self.experts(x, w, ids)

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for j in range(K):
                e = int(ids[t, j])
                self.load[e] += 1
                out[t] += w[t, j] * self.expert(e, x[t : t + 1])[0]
        return out


class CountedBefore(Found):
    """Count the loads in front of the loop."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        self.load += F.one_hot(ids, EXPERTS).sum((0, 1))
        return self.experts(x, w, ids)

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for j in range(K):
                e = int(ids[t, j])
                out[t] += w[t, j] * self.expert(e, x[t : t + 1])[0]
        return out


class ByExpert(CountedBefore):
    """Loop over the experts, not over the tokens."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(1, EXPERTS):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, w[t, j, None] * self.expert(e, x[t]))
        return out


class SoftmaxInFront(ByExpert):
    """Take the softmax out of the experts: it is the same for all of them, and can be done once for each token."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down[e])

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        self.load += F.one_hot(ids, EXPERTS).sum((0, 1))
        return self.experts(x.softmax(-1), w, ids)


class Fused(SoftmaxInFront):
    """Start at expert 0: step 3 had forgotten it, and the report found that."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, w[t, j, None] * self.expert(e, x[t]))
        return out


STEPS = (Found, CountedBefore, ByExpert, SoftmaxInFront, Fused)


def told(report: moe_compile.Report) -> str:
    """What a report says, with the line that it points at in place of its number."""
    lines = []
    for r in report.rejected:
        path, _, line = r.source.rpartition(":")
        lines.append(f"declined, because {r.reason} [{r.code}]\n  at  {linecache.getline(path, int(line)).strip()}")
    lines += [f"fused: {b.formula}; {b.experts}" for b in report.blocks]
    return "\n".join(lines)


def steps(say: Callable[[str], None] = print) -> None:
    """All five, each compared with eager."""
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    for number, cls in enumerate(STEPS, 1):
        torch._dynamo.reset()
        say(f"{number}. {cls.__name__}: {' '.join((cls.__doc__ or '').split())}")
        with torch.no_grad():
            report = moe_compile.explain(cls(), x)
            compiled = torch.compile(cls(), backend="moe_fused", options={"inner": "eager"})
            torch.testing.assert_close(compiled(x), cls()(x), rtol=1e-4, atol=1e-5)
        say(textwrap.indent(told(report), "   "))


def graphs(say: Callable[[str], None] = print) -> None:
    """Graphs and breaks of a transformers model with the eager loop over experts, under plain Dynamo and under this backend."""
    from moe_compile.tiny import build

    model, inputs = build("mixtral")
    model.set_experts_implementation("eager")
    with torch.no_grad():
        plain = torch._dynamo.explain(model)(**inputs)
        torch._dynamo.reset()
        ours = moe_compile.explain(model, **inputs)
    say(f"torch._dynamo.explain: {plain.graph_count} graphs, {plain.graph_break_count} breaks")
    say(f"moe_compile.explain:   {ours.graph_count} graph, {len(ours.graph_breaks)} breaks, {len(ours.blocks)} MoE blocks fused")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", action="store_true", help="graphs and breaks of a transformers model instead of the steps")
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it warns of the breaks that the reports tell of
    graphs() if parser.parse_args().graphs else steps()
