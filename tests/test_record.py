"""moe_compile/loops: functions read by example, and what must not be read."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import Rejection
from moe_compile.loops.probe import Probe, candidates
from moe_compile.loops.record import record, record_symbolically

E, K, H, I, T = 6, 2, 16, 8, 23


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, I, H))
        self.down = nn.Parameter(torch.randn(E, H, I))
        self.num_experts = E
        self.seen: list[int] = []

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.silu(x @ self.up[e].t()) @ self.down[e].t()


class Hit(Base):
    """`for e in hit`, one-hot mask: control flow decided by the ids."""

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            if e == self.num_experts:
                continue
            j, t = torch.where(mask[e])
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class Numpy(Base):
    """The ids leave torch: counts in numpy, slices of the sorted tokens, one cat."""

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        ends = ids.view(-1).bincount(minlength=E).cpu().numpy().cumsum(0)
        rows, outs, start = x[order // ids.shape[1]], [], 0
        for e, end in enumerate(ends):
            if start == end:
                continue
            outs.append(self.expert(e, rows[start:end]))
            start = end
        y = torch.cat(outs)
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(*ids.shape, -1) * w.unsqueeze(-1)).sum(1)


class Split(Base):
    """tolist, split, cat."""

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        flat = ids.flatten()
        _, order = flat.sort(stable=True)
        counts = torch.bincount(flat, minlength=E).tolist()
        y = torch.cat([self.expert(e, r) for e, r in enumerate(x[order // K].split(counts))])
        return torch.zeros_like(x).index_add(0, order // K, y * w.flatten()[order, None])


class Buffer(Base):
    """Results copied into slices of a buffer."""

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        _, order = ids.view(-1).sort()
        counts = torch.bincount(ids.view(-1), minlength=E).tolist()
        rows, start = x[order // K], 0
        out = torch.empty_like(rows)
        for e, n in enumerate(counts):
            out[start : start + n] = self.expert(e, rows[start : start + n])
            start += n
        return torch.zeros_like(x).index_add(0, order // K, out * w.flatten()[order, None])


def routing(seed: int, tokens: int = T, experts: int = E) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=g)[:K] for _ in range(tokens)])
    if experts == E:
        ids[: E // K] = torch.arange(E).view(-1, K)
    return dict(x=torch.randn(tokens, H, generator=g), ids=ids, w=torch.rand(tokens, K, generator=g))


def probe_of(m: nn.Module, **kw: Any) -> Probe:
    return Probe(m, torch.device("cpu"), **kw)


def read(m: nn.Module, *seeds: int) -> torch.fx.GraphModule:
    p = probe_of(m)
    return record_symbolically(p.function(type(m).forward), [routing(s) for s in seeds or (0, 1)], p)


def rerun(gm: torch.fx.GraphModule, given: dict[str, Tensor]) -> Tensor:
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return gm(*(given[n.meta["arg"]] if "arg" in n.meta else n.meta["real"] for n in nodes))


@pytest.mark.parametrize("cls", [Hit, Numpy, Split, Buffer])
def test_straight_line_of_aten_ops(cls: type[Base]) -> None:
    m = cls()
    gm = read(m)
    assert all(
        isinstance(n.target, torch._ops.OpOverload) or n.target.__name__ == "getitem" for n in gm.graph.nodes if n.op == "call_function"
    )
    assert {n.meta["param_path"] for n in gm.graph.nodes if "param_path" in n.meta} == {"up", "down"}
    assert [n.meta["arg"] for n in gm.graph.nodes if "arg" in n.meta] == ["x", "ids", "w"]
    assert all(n.meta.get("val") is not None for n in gm.graph.nodes if n.op != "output")
    assert gm.meta["host_reads"] and len(gm.meta["host_values"]) == len(gm.meta["host_reads"])


@pytest.mark.parametrize("cls", [Hit, Numpy, Split, Buffer])
def test_what_was_read_holds_for_other_routings(cls: type[Base]) -> None:
    """Nothing of the probe's routing is left: the recorded graph runs others, even with experts that get nothing."""
    m, probe = cls(), None
    probe = probe_of(m)
    gm = record_symbolically(probe.function(cls.forward), [routing(0), routing(1)], probe)
    for given in (routing(2), routing(3, experts=3)):
        torch.testing.assert_close(rerun(gm, given), cls.forward(probe.module, **given))


@pytest.mark.parametrize("cls", [Numpy, Split, Buffer])
def test_slices_by_host_numbers_become_selections(cls: type[Base]) -> None:
    gm = read(cls())
    assert gm.meta["selections"] >= E
    names = [str(n.target) for n in gm.graph.nodes]
    assert not any("slice" in x or "split" in x for x in names)
    assert sum("eq.Scalar" in x for x in names) == E  # one selection for each expert, shared by all its readers


def test_gradient_switches_become_a_flag() -> None:
    gm = read(Hit())
    off = {str(n.target) for n in gm.graph.nodes if n.meta.get("grad") is False}
    assert any("one_hot" in x for x in off) and not any("matmul" in x for x in off)


class Draws(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return F.dropout(super().forward(x, ids, w), 0.5)


class DrawsInPython(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().forward(x, ids, w) * random.random()


class DrawsInNumpy(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().forward(x, ids, w) * float(np.random.rand())


class WritesAttribute(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        self.num_experts = self.num_experts + 1
        return super().forward(x, ids, w)


class WritesList(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        self.seen.append(x.shape[0])
        return super().forward(x, ids, w)


class WritesBuffer(Hit):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E, dtype=torch.long))

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        self.load += torch.bincount(ids.view(-1), minlength=E)
        return super().forward(x, ids, w)


class WritesInput(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().forward(x.mul_(2), ids, w)


class BranchesOnTokens(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().forward(x, ids, w) if x.max().item() < 1e6 else x


class BranchesOnParameter(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().forward(x, ids, w) if self.up.sum() != 0 else x


class Fails(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().forward(x[:, :-1], ids, w)


class ConstantFromRouting(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        first = torch.tensor(ids[:, 0].tolist())
        return super().forward(x, ids, w) + x * first[:, None]


class NumberFromRouting(Hit):
    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        return super().forward(x, ids, w) + x[order[: ids[0].sum().item()] // K].sum()


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Draws, "random numbers"),
        (DrawsInPython, "random numbers"),
        (DrawsInNumpy, "random numbers"),
        (WritesAttribute, "writes to self"),
        (WritesList, "writes to self.seen"),
        (WritesBuffer, "writes to its inputs or parameters"),
        (WritesInput, "writes to its inputs or parameters"),
        (BranchesOnTokens, "values of x"),
        (BranchesOnParameter, "value of up"),
        (Fails, "raised RuntimeError"),
        (ConstantFromRouting, "depend on the routing"),
    ],
)
def test_refusals(cls: type[Base], reason: str) -> None:
    """Refused with the reason; the user's module and all random generators stay as they were."""
    m = cls()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(Rejection, match=reason):
        read(m)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert m.num_experts == E and m.seen == []


def test_a_number_from_the_routing_that_no_selection_explains() -> None:
    p = probe_of(NumberFromRouting())
    with pytest.raises(Rejection, match="depends on the routing"):
        record_symbolically(p.function(NumberFromRouting.forward), [routing(0), {**routing(1), "ids": routing(0)["ids"].flip(0)}], p)


def test_a_real_tensor_attribute_is_not_written_in_place() -> None:
    class Attribute(Hit):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["table"] = torch.zeros(3)

        def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            self.table.add_(1)
            return super().forward(x, ids, w)

    m = Attribute()
    with pytest.raises(Rejection, match="writes to its inputs or parameters"):
        read(m)
    assert not m.table.any()


def test_state_around_a_recording_does_not_matter() -> None:
    """Autocast, no_grad, a fake tensor mode or a device mode of the caller stay outside, and as they were."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    m = Hit()
    plain = [n.target for n in read(m).graph.nodes]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert [n.target for n in read(m).graph.nodes] == plain
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    probe, given = probe_of(m), [routing(0), routing(1)]
    with torch.device("meta"), FakeTensorMode():
        assert [n.target for n in record_symbolically(probe.function(Hit.forward), given, probe).graph.nodes] == plain


# ---- probes --------------------------------------------------------------------------------------------------------


def test_large_weights_cost_one_expert() -> None:
    with torch.device("meta"):
        m = nn.Module()
        m.w = nn.Parameter(torch.empty(64, 512, 512, dtype=torch.bfloat16))
        m.flat = nn.Parameter(torch.empty(64 * 2048, 1024))
    p = probe_of(m)
    w, flat = p.tensors["w"], p.tensors["flat"]
    assert w.shape == m.w.shape and w.dtype is torch.bfloat16 and not w.is_meta
    assert w.untyped_storage().nbytes() < 8 * 512 * 512 * 2 and flat.untyped_storage().nbytes() < 32 << 20
    assert all(w[e].data_ptr() % 16 == 0 for e in range(64))
    assert len({tuple(w[e, 0, :8].tolist()) for e in range(64)}) == 64
    assert not torch.equal(flat.view(64, 2048, 1024)[0], flat.view(64, 2048, 1024)[1])


def test_tables_keep_their_values_and_sharing_is_refused() -> None:
    m = Hit()
    m.register_buffer("table", torch.tensor([2, 0, 1]))
    p = probe_of(m)
    assert torch.equal(p.module.table, m.table) and p.module.table is not m.table
    assert p.module.up is not m.up and isinstance(p.module.up, nn.Parameter) and type(p.module).__name__ == "Hit"
    m.again = m.up
    with pytest.raises(Rejection, match="one tensor"):
        probe_of(m)


def test_hooks_inside_are_refused() -> None:
    m = nn.Sequential(nn.Linear(2, 2))
    m.register_forward_hook(lambda *a: None)
    probe_of(m)  # on the module itself they run outside of its function
    m[0].register_forward_hook(lambda *a: None)
    with pytest.raises(Rejection, match="hooks"):
        probe_of(m)


def test_reads_are_noted() -> None:
    m, p = Hit(), None
    p = probe_of(m)
    record(p.function(Hit.forward), routing(0), p)
    read = {str(place) for place in p.reads}
    assert {"self.num_experts", "self.up", "self.down", "F", "torch"} <= read and "self.seen" not in read


def test_candidates_for_the_number_of_experts() -> None:
    m = nn.Module()
    m.experts, m.total, m.name = nn.ModuleList(nn.Linear(4, 4) for _ in range(7)), 9, "x"
    assert candidates(m, lambda: iter([torch.empty(5, 2, 2)])) == [9, 7, 5]
