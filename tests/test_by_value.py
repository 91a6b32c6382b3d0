"""Code that no file and no module holds: shipped by value, made by exec, in notebooks, doctests, on stdin. Loops in it are captured or
left with a reason, and the lines told are its own."""

from __future__ import annotations

import linecache
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from moe_compile.report import Report, collecting

torch.set_num_threads(1)
H = 16
SOURCE = """import torch, torch.nn.functional as F
from torch import nn
E, K, H, I, LIMIT = 6, 2, 16, 8, 7.0
def act(x):
    return F.silu(x.clamp(max=LIMIT))
class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 2 * I, H) * 0.3)
        self.down = nn.Parameter(torch.randn(E, H, I) * 0.3)
    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return self.dispatch(x, ids, w)
    def dispatch(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out
    def expert(self, e, x):
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(act(g) * u, self.down[e])
class Whole(Loop):
    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out
"""
LINE = {"Loop": 14, "Whole": 25}
NAMES = ("__main__", "no_module_of_this_name", "math", None)
FILES = ("<string>", "<stdin>", "<ipython-input-1-0a1b>", "/tmp/ipykernel_1/2.py", "<doctest m[0]>", "<dynamic-code>", "/nowhere/gone.py")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def made(file: str, name: str | None) -> dict[str, Any]:
    names: dict[str, Any] = {} if name is None else {"__name__": name}
    exec(compile(SOURCE, file, "exec"), names)
    return names


def told(m: nn.Module) -> Report:
    x = torch.randn(9, H)
    with torch.no_grad(), collecting() as report:
        out = torch.compile(m, backend="moe_fused", options={"inner": "eager"})(x)
        torch.testing.assert_close(out, m(x))
    return report


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cls", ["Loop", "Whole"])
def test_made_by_exec(cls: str, name: str | None) -> None:
    report = told(made("<string>", name)[cls]())
    assert report.fused and report.graph_count == 1
    assert [b.source for b in report.blocks] == [f"<string>:{LINE[cls]}"]


@pytest.mark.parametrize("file", FILES)
def test_lines_are_the_users(file: str) -> None:
    """The same graph from each of them: what is kept of one tells no lines of it for another."""
    assert [b.source for b in told(made(file, "__main__")["Loop"]()).blocks] == [f"{file}:14"]


@pytest.mark.parametrize("known", [True, False])
def test_a_notebook_cell_that_is_left(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reason, at the line of the cell, whether its text can be had or not."""
    file = f"<ipython-input-{known}>"
    if known:
        monkeypatch.setitem(linecache.cache, file, (len(SOURCE), None, SOURCE.splitlines(True), file))
    names = made(file, "__main__")
    m = names["Loop"]()
    m.expert = lambda e, x: torch.zeros_like(x).normal_()  # drawn anew in each call
    m.dispatch = types.MethodType(lambda self, x, ids, w: names["Loop"].dispatch(self, x, ids, w) * 0, m)
    report = told(m)
    assert not report.blocks and report.rejected
    assert all(r.source.startswith((f"{file}:", __file__)) for r in report.rejected), report.rejected


def test_shipped_by_value() -> None:
    """As Ray, Dask and notebook launchers ship a class: where it arrives, no module knows it."""
    cloudpickle = pytest.importorskip("cloudpickle")
    module = types.ModuleType("shipped")
    exec(compile(SOURCE, "/elsewhere/shipped.py", "exec"), module.__dict__)
    sys.modules["shipped"] = module
    try:
        cloudpickle.register_pickle_by_value(module)
        data = cloudpickle.dumps((module.Loop(), module.Whole()))
    finally:
        del sys.modules["shipped"]
    for m, line in zip(pickle.loads(data), (14, 25)):
        report = told(m)
        assert report.fused and report.blocks[0].source.endswith(f":{line}")  # cloudpickle keeps no file
