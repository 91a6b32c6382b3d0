"""Expert ids that are written to after the selection: they may be no experts any more, whichever way the write goes.

A row index of -1 in the combine, or a count at -1, is memory of something else on a device; the emulation refuses both.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ascend_blocks import Seen, compiled, relative
from torch import Tensor, nn

from moe_compile.lowering.ascend import register, schemas

register.ensure()
T, H, I, E, K = 7, 16, 12, 4, 2
Write = Callable[[Tensor, Tensor, Tensor], object]


def copied(ids: Tensor, late: Tensor, _: Tensor) -> None:
    ids.copy_(torch.where(late[:, None], torch.full_like(ids, -1), ids))


def indexed(ids: Tensor, late: Tensor, _: Tensor) -> None:
    ids[late] = -1


def added(ids: Tensor, late: Tensor, _: Tensor) -> None:
    ids += late[:, None] * E


def chunked(ids: Tensor, late: Tensor, _: Tensor) -> None:
    ids.chunk(2, -1)[1].fill_(E)


def viewed(ids: Tensor, late: Tensor, _: Tensor) -> None:
    ids.view(-1)[::3] = -1


def put_out(ids: Tensor, late: Tensor, _: Tensor) -> None:
    torch.sub(ids, 2 * E * late[:, None].long(), out=ids)


# Verdict: every one reaches the ids before the experts read them, so none of them is known to be an expert.
WRITES: dict[str, Write] = {
    "ids[late] = -1": indexed,
    "masked_fill_": lambda ids, late, _: ids.masked_fill_(late[:, None], -1),
    "index_fill_": lambda ids, late, rows: ids.index_fill_(0, rows, -1),
    "copy_": copied,
    "+=": added,
    "fill_ of a slice": lambda ids, late, _: ids[4:].fill_(-1),
    "fill_ of a chunk": chunked,
    "through view(-1)": viewed,
    "through data": lambda ids, late, _: ids.data[4:].fill_(-1),
    "through detach()": lambda ids, late, _: ids.detach()[4:].fill_(-1),
    "through t()": lambda ids, late, _: ids.t().masked_fill_(late, -1),
    "out=": put_out,
}
# Near misses: nothing reaches the ids before they are read.
OTHERS: dict[str, Write] = {
    "nothing": lambda ids, late, _: None,
    "a copy is written": lambda ids, late, _: ids.clone().fill_(-1),
    "the mask is written": lambda ids, late, _: late.fill_(False),
}


class Experts(nn.Module):
    """An expert loop of its own, as transformers has it: ids that are no expert contribute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, 2 * I, H) * 0.3), nn.Parameter(torch.randn(E, H, I) * 0.3)

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, j = torch.where(ids == e)
            g, u = F.linear(x[t], self.up[e]).chunk(2, -1)
            out.index_add_(0, t, F.linear(F.silu(g) * u, self.down[e]) * w[t, j, None])
        return out


class Padded(nn.Module):
    """Tokens from `real` on are padding."""

    def __init__(self, write: Write, after: bool = False) -> None:
        super().__init__()
        self.write, self.after = write, after
        self.gate, self.experts = nn.Parameter(torch.randn(E, H)), Experts()

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        scores = F.linear(x, self.gate).softmax(-1)
        ids = scores.detach().topk(K, dim=-1).indices
        w = scores.gather(1, ids.clone())
        late, rows = torch.arange(T, device=x.device) >= real, torch.tensor([5, 6])
        if not self.after:
            self.write(ids, late, rows)
        out = self.experts(x, ids, w)
        if self.after:
            self.write(ids, late, rows)
        return out


def knows(seen: Seen) -> bool:
    """Whether the lowered graph relies on ids being experts: else slots of no expert are sent elsewhere."""
    graph = seen.lowered[0].module.graph
    dispatch = next(n for n in graph.nodes if "init_routing" in str(n.target) or "token_permute" in str(n.target))
    made, work = set(), list(dispatch.all_input_nodes)
    while work:
        n = work.pop()
        made.add(n)
        work += [a for a in n.all_input_nodes if a not in made]
    return not any(n.target is torch.where for n in made)


@pytest.mark.parametrize("target", ["ascend", "cpu"])
@pytest.mark.parametrize("name", [*WRITES, *OTHERS])
@torch.no_grad()
def test_ids_written_in_place(name: str, target: str) -> None:
    module, x, real = Padded({**WRITES, **OTHERS}[name]), torch.randn(T, H), torch.tensor(4)
    expected = module(x, real)
    with Seen() as seen:
        out = compiled(module, target=target)(x, real)
    assert relative(out, expected) <= 1e-5
    if target == "ascend":
        assert seen.lowered and knows(seen) == (name in OTHERS)


@torch.no_grad()
def test_weights_are_those_of_what_data_was_written() -> None:
    """`ids.data` is the ids' memory: whoever gathers by the ids behind a write through it gets other weights, on every target."""

    class Swapped(Padded):
        def forward(self, x: Tensor, real: Tensor) -> Tensor:
            scores = F.linear(x, self.gate).sigmoid()
            ids = scores.topk(K, dim=-1)[1]
            ids.data[4:].fill_(0)
            return self.experts(x, ids, scores.gather(1, ids))

    module, x = Swapped(copied), torch.randn(T, H)
    assert relative(compiled(module, target="cpu")(x, torch.tensor(4)), module(x, torch.tensor(4))) <= 1e-5


@pytest.mark.parametrize("name", WRITES)
def test_ids_written_in_place_in_training(name: str) -> None:
    if schemas.wheel():
        pytest.skip("torch_npu has gradients on its own device only")
    module, x, real = Padded(WRITES[name]), torch.randn(T, H), torch.tensor(4)
    found = []
    for fn in (module, compiled(module)):
        leaf = x.clone().requires_grad_()
        fn(leaf, real).sin().sum().backward()
        found.append([leaf.grad, *(p.grad for p in module.parameters())])
        module.zero_grad(set_to_none=True)
    for got, want in zip(found[1], found[0]):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_a_write_after_the_experts_changes_nothing(name: str) -> None:
    module, x, real = Padded(WRITES[name], after=True), torch.randn(T, H), torch.tensor(4)
    with Seen() as seen:
        assert relative(compiled(module)(x, real), module(x, real)) <= 1e-5
    assert knows(seen)


def test_only_what_holds_every_id_keeps_them() -> None:
    """`ids.to(dtype)` in a dtype that cannot hold every id is another id."""
    from moe_compile.lowering.ascend.known import all_within

    graph = torch.fx.Graph()
    scores = graph.placeholder("scores")
    top = graph.call_method("topk", (scores, K), {"dim": -1})
    ids = graph.call_function(operator.getitem, (top, 1))
    scores.meta["example_value"] = torch.randn(T, 300)
    ids.meta["example_value"] = scores.meta["example_value"].topk(K).indices
    casts = {}
    for dtype in (torch.int32, torch.int64, torch.int16, torch.uint8, torch.bfloat16, torch.float32):
        casts[dtype] = graph.call_method("to", (ids, dtype))
        casts[dtype].meta["example_value"] = ids.meta["example_value"].to(dtype)
    end = graph.output(None)
    held = {d for d, n in casts.items() if all_within(n, 300, end)}
    assert held == {torch.int32, torch.int64, torch.int16}
    assert not all_within(ids, 299, end)
