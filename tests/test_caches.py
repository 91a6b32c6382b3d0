"""Inductor's and AOTAutograd's on-disk caches work through this backend, and never serve graphs of older ops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from test_bad_input import TwoMoes, T, H
import moe_compile, moe_compile.inner
if len(sys.argv) > 2:
    moe_compile.inner.__version__ = sys.argv[2]
torch.manual_seed(0)
model, x = TwoMoes(), torch.randn(T, H)
compiled = torch.compile(model, backend="moe_fused")
if sys.argv[1] == "train":
    y = compiled(x)
    y.sum().backward()
else:
    with torch.no_grad():
        y = compiled(x)
torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)
from torch._dynamo.utils import counters
print(json.dumps({"blocks": len(moe_compile.last_report().blocks), **counters["aot_autograd"], **counters["inductor"]}))
"""


def run(tmp_path: Path, *args: str) -> dict[str, int]:
    here = Path(__file__).parent
    # for two kernels in a folder of their own no headers are compiled ahead, and no compiler is tried on each kind of vectors
    plain = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    env = {**os.environ, **plain, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(here)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *args], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("phase, graphs", [("train", 2), *([("infer", 1)] if "ZOO_ALL" in os.environ else [])])
def test_the_second_process_finds_everything_and_one_with_other_ops_nothing(tmp_path, phase, graphs):
    first, second = run(tmp_path, phase), run(tmp_path, phase)
    assert first["blocks"] == second["blocks"] == 2
    assert first["autograd_cache_saved"] == 1 and "autograd_cache_bypass" not in first and "fxgraph_cache_bypass" not in first
    assert second["autograd_cache_hit"] == 1 and second["fxgraph_cache_hit"] == graphs
    assert "autograd_cache_miss" not in second and "fxgraph_cache_miss" not in second
    if phase == "infer":  # and one with other ops compiles afresh
        assert run(tmp_path, "infer", "0.0.0-other").get("autograd_cache_hit", 0) == 0
