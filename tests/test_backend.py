"""The frame around the passes: found, safe, and out of the way of the compiler behind it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import tomllib
import weakref
import zipfile
from pathlib import Path

import catalogue
import pytest
import torch
from catalogue import routers
from conftest import Outcome, Recovered
from torch import nn

import moe_compile
from moe_compile.backend import moe_fused, target_of
from moe_compile.ir import Rejection
from moe_compile.options import Options
from moe_compile.passes.prove import engine
from moe_compile.snapshot import Snapshot

ROOT = Path(__file__).parent.parent


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Broken(Mlp):
    """Dynamo cuts this in two."""

    def forward(self, x):
        y = torch.relu(self.a(x))
        torch._dynamo.graph_break()
        return self.b(y)


def nothing(gm, options, target):
    return Outcome()


def half_a_rewrite(gm, options, target):
    """Takes the activation out and then fails."""
    for n in list(gm.graph.nodes):
        if n.target is torch.relu:
            n.replace_all_uses_with(n.args[0])
            gm.graph.erase_node(n)
    gm.recompile()
    raise KeyError("half way")


# -- found ------------------------------------------------------------------------------------------------------------------


def test_entry_point_is_found():
    assert "moe_fused" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("moe_fused") is moe_fused


def test_subpackages_live_inside_the_package():
    import moe_compile.lowering
    import moe_compile.passes

    assert moe_compile.passes.__name__ == "moe_compile.passes" and moe_compile.lowering.__name__ == "moe_compile.lowering"


def test_the_repository_root_runs_its_own_package_with_any_install():
    """Python finds the folder moe_compile/ of the checkout before an installed package: its rooms are found beside it."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import moe_compile, moe_compile.passes.pipeline as p, moe_compile.lowering.reference.generic as g; print(p.__file__, g.__file__)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert out.split() == [str(ROOT / "passes" / "pipeline.py"), str(ROOT / "lowering" / "reference" / "generic.py")]


def test_every_folder_is_installed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for top in ("moe_compile", "passes", "lowering"):
        for folder in [ROOT / top, *(ROOT / top).rglob("*")]:
            if folder.is_dir() and any(folder.glob("*.py")):
                name = ".".join(folder.relative_to(ROOT).parts)
                assert name.removeprefix("moe_compile.") in [p.removeprefix("moe_compile.") for p in packages]


def test_the_wheel_holds_everything(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    kinds = (".py", ".cpp", ".h")
    want = {f"moe_compile/{p.relative_to(ROOT)}" for top in ("passes", "lowering") for p in (ROOT / top).rglob("*") if p.suffix in kinds}
    want |= {str(p.relative_to(ROOT)) for p in (ROOT / "moe_compile").rglob("*") if p.suffix in kinds} | {"moe_compile/py.typed"}
    assert want <= names
    assert not any(n.startswith(("passes/", "lowering/", "tests/")) for n in names)


def test_import_needs_neither_transformers_nor_triton():
    code = "import sys; sys.modules['transformers'] = sys.modules['rich'] = None; import moe_compile, moe_compile.entry as e; e.moe_fused"
    subprocess.run([sys.executable, "-c", code], check=True)


BARE = """
import importlib.metadata as m
found = m.Distribution.discover
m.Distribution.discover = classmethod(lambda cls, **kw: (d for d in found(**kw) if "moe" not in d.metadata["Name"]))
import torch, moe_compile
assert "moe_fused" in torch._dynamo.list_backends()
c = torch.compile(torch.nn.Linear(2, 2), backend="moe_fused", options={"inner": "eager"})
assert c(torch.ones(1, 2)).shape == (1, 2)
try:
    torch.compile(torch.nn.Linear(2, 2), backend="moe_fused", options={"iner": "eager"})
except moe_compile.OptionError:
    pass
else:
    raise AssertionError("a wrong option is told by torch.compile itself")
"""


def test_a_bare_checkout_registers_the_backend_on_import():
    """Without an installed package nobody names the backend to torch: importing moe_compile does."""
    subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, check=True)


# -- safe -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_an_error_in_the_passes_leaves_the_graph_as_written(fake_passes, inner):
    fake_passes(half_a_rewrite)
    model, x = Mlp(), torch.randn(3, 4)
    y = torch.compile(model, backend="moe_fused", options={"inner": inner})(x)
    torch.testing.assert_close(y, model(x))
    (r,) = moe_compile.last_report().rejected
    assert "half way" in r.reason and r.stage == "internal"


def test_an_error_in_the_passes_raises_when_strict(fake_passes):
    fake_passes(half_a_rewrite)
    with pytest.raises(moe_compile.NotFused, match="half way") as e:
        torch.compile(Mlp(), backend="moe_fused", options={"strict": True})(torch.randn(3, 4))
    assert e.value.rejected[0].stage == "internal"


def test_a_rejection_raises_when_strict_and_only_then(fake_passes):
    reason = Rejection("the fill value is 3.0", stage="gating", source="m.py:7")
    fake_passes(lambda gm, options, target: Outcome(rejected=[reason]))
    model, x = Mlp(), torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(model, backend="moe_fused")(x), model(x))
    assert [r.reason for r in moe_compile.last_report().rejected] == ["the fill value is 3.0"]
    torch._dynamo.reset()
    with pytest.raises(moe_compile.NotFused, match=r"m\.py:7: the fill value is 3\.0 \[gating\]"):
        torch.compile(model, backend="moe_fused", options={"strict": True})(x)


def test_a_raised_rejection_is_a_rejection(fake_passes):
    def run(gm, options, target):
        raise Rejection("no", stage="deep")

    fake_passes(run)
    assert moe_compile.explain(Mlp(), torch.randn(3, 4)).rejected[0].stage == "deep"


def test_an_inner_compiler_that_fails_on_our_graph_gets_the_users(fake_passes):
    def tanh_for_relu(gm, options, target):
        for n in gm.graph.nodes:
            if n.target is torch.relu:
                n.target = torch.tanh
        gm.recompile()
        return Outcome(blocks=[])

    def inner(gm, inputs):
        if any(n.target is torch.tanh for n in gm.graph.nodes):
            raise RuntimeError("no tanh here")
        return gm.forward

    fake_passes(tanh_for_relu)
    model, x = Mlp(), torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(model, backend="moe_fused", options={"inner": inner})(x), model(x))
    assert "no tanh here" in moe_compile.last_report().rejected[0].reason


def test_an_inner_compiler_that_fails_on_the_users_graph_is_the_users_affair(fake_passes):
    def inner(gm, inputs):
        raise RuntimeError("not today")

    fake_passes(nothing)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="not today"):
        torch.compile(Mlp(), backend="moe_fused", options={"inner": inner})(torch.randn(3, 4))


def test_snapshot_restores_what_was_changed():
    gm = torch.fx.symbolic_trace(Mlp())
    x, code = torch.randn(2, 4), gm.code
    want, before = gm(x), Snapshot(gm)
    assert not before.restore()
    with pytest.raises(KeyError):
        half_a_rewrite_of_method(gm)
    assert before.restore()
    assert gm.code == code
    gm.graph.lint()
    torch.testing.assert_close(gm(x), want)


def half_a_rewrite_of_method(gm):
    next(n for n in gm.graph.nodes if n.target is torch.relu).target = torch.tanh
    gm.recompile()
    raise KeyError


# -- out of the way ---------------------------------------------------------------------------------------------------------


def test_inner_callable_gets_graph_inputs_options_and_mode(fake_passes):
    fake_passes(nothing)
    seen = []

    def inner(gm, inputs, **kwargs):
        seen.append((type(gm).__name__, len(inputs), kwargs))
        return gm.forward

    torch.compile(Mlp(), backend="moe_fused", options={"inner": inner, "inner_options": {"level": 3}})(torch.randn(3, 4))
    assert seen[0][0] == "GraphModule" and seen[0][1] > 0 and seen[0][2] == {"options": {"level": 3}}
    moe_fused(torch.fx.symbolic_trace(Mlp()), [torch.randn(3, 4)], options={"inner": inner}, mode="reduce-overhead")
    assert seen[1][2] == {"mode": "reduce-overhead"}


@pytest.mark.parametrize("kwargs", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_autotune": True}}, {}])
def test_inductor_gets_what_torch_compile_would_give_it(fake_passes, monkeypatch, kwargs):
    fake_passes(nothing)
    patches = []

    def compile_fx(gm, inputs, config_patches=None, **rest):
        patches.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    x = torch.randn(3, 4)
    torch.compile(Mlp(), backend="inductor", **kwargs)(x)
    ours = {"options": {"inner_options": kwargs["options"]}} if "options" in kwargs else kwargs
    torch._dynamo.reset()
    torch.compile(Mlp(), backend="moe_fused", **ours)(x)
    assert len(patches) == 2 and patches[0] == patches[1]


def test_the_same_model_compiled_twice_compiles_once(fake_passes):
    calls = []
    fake_passes(lambda gm, options, target: calls.append(1) or Outcome())
    model, x = Mlp(), torch.randn(3, 4)
    for _ in range(2):
        torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
    assert len(calls) == 1
    torch._dynamo.reset()
    torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
    assert len(calls) == 2


def test_target_follows_the_device():
    gm = torch.fx.symbolic_trace(Mlp())
    assert target_of(gm, [torch.ones(1)], Options()) == "cpu"
    assert target_of(gm, [torch.ones(1)], Options(target="cuda")) == "cuda"
    assert target_of(gm.to("meta"), [torch.ones(1, device="meta")], Options()) == moe_compile.lowering.target_for({"meta"}) != "meta"
    assert target_of(gm, [torch.ones(1)], Options()) == "cpu"


def test_threads_compile_side_by_side(fake_passes):
    fake_passes(nothing)
    x, models, wrong = torch.randn(3, 4), [Mlp() for _ in range(4)], []

    def work(model):
        y = torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
        if not torch.equal(y, model(x)) or moe_compile.last_report() is None:
            wrong.append(model)

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_torch_logs_names_this_package(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import torch, sys, types\n"
        "import moe_compile.passes\n"
        "from moe_compile.ir import Rejection\n"
        "m = types.ModuleType('moe_compile.passes.pipeline')\n"
        "m.run = lambda *a: types.SimpleNamespace(blocks=[], rejected=[Rejection('told so')], seconds={})\n"
        "sys.modules[m.__name__] = moe_compile.passes.pipeline = m\n"
        "torch.compile(torch.nn.Linear(2, 2), backend='moe_fused', options={'inner': 'eager'})(torch.ones(1, 2))\n"
    )
    for logs, expected in (({"TORCH_LOGS": "+moe_compile"}, True), ({}, False)):
        env = {**{k: v for k, v in os.environ.items() if k != "TORCH_LOGS"}, **logs}
        err = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True, env=env).stderr
        assert ("told so" in err) is expected


# -- one compilation, one report --------------------------------------------------------------------------------------------


def test_a_model_in_pieces_is_one_report(fake_passes):
    fake_passes(lambda gm, options, target: Outcome(seconds={"validate": 0.5}))
    model = torch.compile(Broken(), backend="moe_fused", options={"inner": "eager"})
    model(torch.randn(3, 4))
    report = moe_compile.last_report()
    assert report.graph_count == 2 and len(report.graph_breaks) == 1 and report.seconds["validate"] == 1.0
    assert "graph_break" in report.graph_breaks[0].reason.lower().replace(" ", "_")
    assert report.graph_breaks[0].source.startswith(__file__)


def test_another_model_and_another_shape_start_a_new_report(fake_passes):
    fake_passes(nothing)
    model = torch.compile(Mlp(), backend="moe_fused", options={"inner": "eager"}, dynamic=False)
    reports = []
    for rows in (3, 5, 5):
        model(torch.randn(rows, 4))
        reports.append(moe_compile.last_report())
    assert reports[0] is not reports[1] and reports[1] is reports[2]
    torch.compile(Mlp(), backend="moe_fused", options={"inner": "eager"})(torch.randn(3, 4))
    assert moe_compile.last_report() is not reports[1] and moe_compile.last_report().graph_count == 1


def test_explain_leaves_the_users_compiled_code_alone(fake_passes):
    calls = []
    fake_passes(lambda gm, options, target: calls.append(1) or Outcome())
    model, x = Mlp(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="moe_fused", options={"inner": "eager"})
    compiled(x)
    state = torch.get_rng_state()
    assert moe_compile.explain(compiled, x).graph_count == 1 and len(calls) == 2
    assert torch.equal(state, torch.get_rng_state())
    compiled(x)
    assert len(calls) == 2


def test_explain_of_a_function_and_with_keyword_arguments(fake_passes):
    fake_passes(nothing)
    assert moe_compile.explain(lambda x, scale: x * scale, torch.ones(2), scale=torch.ones(2)).graph_count == 1


def test_nothing_of_a_model_outlives_it():
    """What was proved is remembered, without the graphs and parameters it was proved on."""
    model = catalogue.build(routers.SoftmaxTopk)
    parameter = weakref.ref(model.up)
    engine.forget()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):  # a kept plan needs no proof
        torch.compile(model, backend="moe_fused", options={"inner": "eager"})(*model.example_inputs())
    assert len(moe_compile.last_report().blocks) == 1 and engine._proved
    del model
    torch._dynamo.reset()
    gc.collect()
    assert parameter() is None
    assert not any(isinstance(n, torch.fx.Node) for key in engine._proved for n in _held(key))


def _held(key):
    """Everything in a key, boundaries of blocks included."""
    for x in key:
        yield x
        yield from _held(x) if isinstance(x, tuple) else ()
        for v in getattr(x, "boundary", {}).values():
            yield from v if isinstance(v, list) else [v]


def test_blocks_of_the_report_hold_no_graph(fake_passes):
    from test_report import AFTER_SIGMOID, SWIGLU_EXPERTS

    from moe_compile.ir import MoeBlock

    graphs = []

    def run(gm, options, target):
        graphs.append(weakref.ref(gm.graph))
        block = MoeBlock(AFTER_SIGMOID, SWIGLU_EXPERTS, boundary={"tokens": next(iter(gm.graph.nodes)), "up": list(gm.graph.nodes)[:2]})
        return Outcome(blocks=[Recovered(block)], rejected=[Rejection("why", node=next(iter(gm.graph.nodes)))])

    fake_passes(run)
    report = moe_compile.explain(Mlp(), torch.randn(3, 4))
    torch._dynamo.reset()
    gc.collect()
    assert graphs[0]() is None
    assert all(isinstance(v, (str, list)) for v in report.blocks[0].ir.boundary.values())
