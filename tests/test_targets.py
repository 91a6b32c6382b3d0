"""Targets: those of the package are folders, others come through an entry point, and neither needs a change of any file of ours."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from moe_compile import OptionError, ir, lowering, ops, prepare
from moe_compile.ir import scalar as act
from moe_compile.lowering.target import Target

OUTSIDE = Path(__file__).parent / "outside"
ROOT = Path(__file__).parents[1]
BLOCK = ir.MoeBlock(None, ir.Experts(4, 8, 8, 8, ir.Form.CONCAT, act.SWIGLU))

MODEL = """
import json, torch, moe_compile
from moe_compile import lowering

def block(x, router, up, down):
    weights, ids = torch.softmax(x @ router.t(), -1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    mix = torch.zeros(x.shape[0], up.shape[0], dtype=x.dtype, device=x.device).scatter(-1, ids, weights)
    every = torch.einsum("eoh,eth->eto", down, torch.relu(torch.einsum("eoh,th->eto", up, x)))
    return (every * mix.t()[..., None]).sum(0)

def run(experts, **options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    raw = torch.randn(5, 16), torch.randn(experts, 16), torch.randn(experts, 24, 16), torch.randn(experts, 16, 24)
    want = block(*(t.double() for t in raw))
    toy_target.RAN.clear()
    with torch.no_grad():
        out = torch.compile(block, backend="moe_fused", options={"inner": "eager", **options})(*map(toy_target.Toy, raw)).raw
    return moe_compile.last_report(), list(toy_target.RAN), float((out - want).abs().max() / want.abs().max())

found = list(lowering.targets())
import toy_target
fused, ran, error = run(4, toy_speed="fast")
refused, idle, same = run(9)
try:
    run(4, toy_speed="warp")
except moe_compile.OptionError as e:
    told = str(e)
print(json.dumps(dict(
    found=found, ran=ran, error=error, idle=idle, same=same, told=told,
    blocks=[(b.target, b.lowering, b.validated) for b in fused.blocks], reasons=[r.reason for r in refused.rejected],
    homes=lowering.target("toy").homes,
)))
"""


def installed(folder: Path) -> Path:
    """The toy target as a package manager leaves it: its module, and a dist-info that names the entry point."""
    shutil.copy(OUTSIDE / "toy_target.py", folder)
    info = folder / "toy_target-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-target\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_compile.targets]\ntoy = toy_target:TARGET\n")
    return folder


def test_a_target_from_outside_compiles_a_model(tmp_path):
    """Its device is found, its kernels run behind the fused ops, it refuses, it has an option; all of it without a change here."""
    paths = [str(installed(tmp_path)), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", MODEL], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["found"]) == {"ascend", "cpu", "cuda", "toy"}
    assert told["blocks"] == [["toy", "toy kernel (4 experts)", True]]
    assert told["ran"] == ["route", "experts"] and told["error"] < 1e-5
    assert told["reasons"] == ["9 experts: a toy takes 8"] and told["idle"] == [] and told["same"] < 1e-5
    assert "'toy_speed' is 'warp'" in told["told"]
    assert str(tmp_path / "toy_target.py") in told["homes"], "what is kept on disk is kept for this source"


def test_targets_of_the_package_are_its_folders():
    records = {f.parent.name for f in (ROOT / "lowering").glob("*/__init__.py") if "TARGET = Target(" in f.read_text()}
    assert records == {"ascend", "cpu", "triton"} and set(lowering.own()) == {"ascend", "cpu", "cuda"}


@pytest.mark.parametrize(
    "target, why",
    [
        (None, "not a moe_compile.lowering.target.Target"),
        (Target("cpu", ("cpu",), lambda b: None, lambda b: ""), "already"),
        (Target("odd", (), lambda b: None, lambda b: "", "PrivateUse1", {"gather": print}), "unknown ops: gather"),
        (ImportError("no such library"), "no such library"),
    ],
    ids=["no record", "a name taken", "an op that there is not", "an import that fails"],
)
def test_a_target_that_cannot_be_had_is_left_out(monkeypatch, caplog, target, why):
    def load(self: EntryPoint) -> object:
        if isinstance(target, Exception):
            raise target
        return target

    entry = EntryPoint("odd", "json:loads", lowering.GROUP)
    monkeypatch.setattr(lowering, "entry_points", lambda group: [entry])
    monkeypatch.setattr(EntryPoint, "load", load)
    lowering.targets.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "moe_compile"):
            assert set(lowering.targets()) == {"ascend", "cpu", "cuda"}
    finally:
        lowering.targets.cache_clear()
    assert "'odd'" in caplog.text and why in caplog.text


def test_what_a_target_says():
    cpu = lowering.target("cpu")
    assert cpu.reason(BLOCK) is None and not cpu.shares and lowering.target("cuda").shares
    scaled = ir.MoeBlock(None, replace(BLOCK.experts, up_stored=ir.Stored(8, torch.int8, rows=1)))
    assert replace(cpu, coded=False).reason(scaled) == "int8 × scale expert weights: target 'cpu' has no kernel for them"
    assert lowering.target("mps").reason(BLOCK) == "no lowering for target 'mps' is installed"


def test_the_device_decides():
    assert lowering.target_for({"cpu", "cuda"}) == "cuda" and lowering.target_for({"npu"}) == "ascend"
    assert lowering.target_for({"cpu", "meta"}) == lowering.target_for(set()) == "cpu" and lowering.target_for({"xla"}) == "xla"


def test_a_digest_is_of_the_sources(tmp_path):
    """Plans and compiled graphs on disk are kept for it: of folders with all below, and of modules that stand alone."""
    (tmp_path / "below").mkdir()
    module = tmp_path / "below" / "kernel.py"
    module.write_text("a = 1")
    before = ops.sources.digest(str(tmp_path)), ops.sources.digest(str(module))
    module.write_text("a = 2")
    ops.sources.digest.cache_clear()
    assert not {*before} & {ops.sources.digest(str(tmp_path)), ops.sources.digest(str(module))}
    cpu = lowering.target("cpu")
    assert {Path(h) for h in cpu.homes} >= {ROOT / "lowering", ROOT / "moe_compile" / "ops"} and len(cpu.digest) == 64


def test_prepare_asks_the_target():
    model = torch.nn.Linear(2, 2)
    assert prepare(model, "cpu") == prepare(model, "ascend") == {}
    with pytest.raises(OptionError, match="'ascend', 'cpu', 'cuda'"):
        prepare(model, "tpu")
