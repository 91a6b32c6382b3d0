"""The command line, as a person and as a machine use it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import Outcome, Recovered
from test_report import AFTER_SIGMOID, SWIGLU_EXPERTS

import moe_compile
from moe_compile import environment
from moe_compile.__main__ import main
from moe_compile.ir import MoeBlock, Rejection

MODEL = "qwen3_moe"


@pytest.fixture
def one_block(fake_passes):
    seen = []

    def run(gm, options, target):
        seen.append((options, target))
        block = MoeBlock(AFTER_SIGMOID, SWIGLU_EXPERTS)
        return Outcome([Recovered(block, "m.py:3")], [Rejection("odd fill", stage="gating", source="m.py:9")])

    fake_passes(run)
    return seen


def test_table(one_block, capsys):
    assert main(["explain", "--model", MODEL]) == 0
    out = capsys.readouterr().out
    assert "w = 2.826" in out and "m.py:9: odd fill [gating]" in out and "1 MoE block fused" in out


def test_json(one_block, capsys):
    assert main(["explain", "--model", MODEL, "--json", "--target", "cuda", "--no-validate"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["blocks"][0]["source"] == "m.py:3" and report["rejected"][0]["reason"] == "odd fill"
    options, target = one_block[0]
    assert target.name == "cuda" and not options.validate and options.inner == "eager"


def test_strict_fails(one_block, capsys):
    assert main(["explain", "--model", MODEL, "--strict"]) == 1
    assert "odd fill" in capsys.readouterr().err


def test_unknown_model_lists_close_ones(capsys):
    assert main(["explain", "--model", "qwen3_mo"]) == 2
    err = capsys.readouterr().err
    assert "qwen3_mo" in err and "qwen3_moe" in err and "Traceback" not in err


@pytest.mark.parametrize("command", ["explain", "trace", "bench"])
def test_no_model_was_named(command, capsys):
    assert main([command]) == 2
    assert "no model was named" in capsys.readouterr().err


def test_a_hub_id_that_was_downloaded_once(one_block, tmp_path, monkeypatch, capsys):
    """Told as what it is where it is not here; a config.json in the cache of the hub is taken at its true size."""
    hub = pytest.importorskip("huggingface_hub")
    assert main(["explain", "someone/a-moe"]) == 2
    assert "nothing is downloaded" in capsys.readouterr().err
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": MODEL, "num_hidden_layers": 1, "hidden_size": 64}))
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda name, file: str(config) if (name, file) == ("someone/a-moe", "config.json") else None
    )
    assert main(["explain", "someone/a-moe"]) == 0


def test_without_transformers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["explain", "--model", MODEL]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["explain", "--model", "x", "--target", "tpu"], ["explain", "x", "y"], ["explain", "x", "--model", "y"], ["tell"]]
)
def test_wrong_usage(argv):
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2


def test_version_is_the_packages():
    out = subprocess.run([sys.executable, "-m", "moe_compile", "--version"], check=True, capture_output=True, text=True).stdout
    assert out.strip() == moe_compile.__version__


def test_tiny_models_keep_their_routing():
    from moe_compile.tiny import build

    model, inputs = build(MODEL)
    default = type(model.config)()
    assert model.config.num_experts == default.num_experts and model.config.num_experts_per_tok == default.num_experts_per_tok
    assert sum(p.numel() for p in model.parameters()) < 5e6 and not model.training
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_every_block_of_a_real_model_is_told(capsys):
    """End to end, with the real passes: one row per MoE layer, validated."""
    assert main(["explain", "--model", MODEL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["blocks"]) == 2 and all(b["validated"] for b in report["blocks"]) and report["graph_breaks"] == []
    assert report["blocks"][0]["formula"].startswith("w = softmax(l)[top8]")


OWN = """
import torch
class Own(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.up = torch.nn.Linear(n, n)
    def forward(self, x):
        if x.shape[0] == 3:
            raise RuntimeError("never three")
        return self.up(x)
"""


@pytest.mark.parametrize(
    "argv, words",
    [
        (["explain", "--model", "own.py", "--shape", "4,4"], ["which module of own.py?", "Own"]),
        (["explain", "--model", "own.py:Ow", "--shape", "4,4"], ["'Ow'", "Own"]),
        (["explain", "--model", "own.py:Own", "--shape", "4,4"], ["--set NAME=VALUE", "'n'"]),
        (["explain", "--model", "own.py:Own", "--set", "n=4", "--shape", "3,4"], ["raises RuntimeError", "own.py:9", "never three"]),
        (["bench", "--model", "own.py:Own", "--set", "n=4", "--shape", "4,5", "--sides", "eager"], ["raises RuntimeError", "own.py:10"]),
        (["explain", "--model", "own.py:Own", "--set", "n=4", "--shape=-1,4"], ["-1,4"]),
        (["explain", "--model", "own.py:Own", "--set", "n=4", "--shape", "4,4", "--experts", "eager"], ["--experts"]),
        (["explain", "--model", "wrong.py:Own", "--shape", "4,4"], ["wrong.py cannot be imported", "nosuchmodule", "line 1"]),
        (["explain", "--model", "own.py:Own", "--html", "."], ["--html", "folder"]),
        (["bench", "--model", "own.py:Own", "--device", "nosuch"], ["--device nosuch"]),
        (["bench", "--model", "own.py:Own", "--device", "meta"], ["--device meta"]),
        (["bench", "--model", "own.py:Own", "--plot", "a.xyz"], ["--plot", ".png"]),
    ],
)
def test_what_a_users_file_lacks_is_said(argv, words, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "torch"  # a user's folder may have this name
    folder.mkdir()
    (folder / "own.py").write_text(OWN)
    (folder / "wrong.py").write_text("import nosuchmodule")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and all(w in err for w in words), err


def test_a_configuration_is_for_this_machines_target(one_block, tmp_path):
    """Tensors without numbers stand for such that would be where this machine computes."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": MODEL, "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 32}))
    assert main(["explain", "--model", str(tmp_path)]) == 0
    assert one_block[0][1].name == getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")


@pytest.mark.parametrize(("there", "target"), [(True, "cuda"), (False, "cpu")])
def test_torch_built_for_cuda_is_no_card(there, target, monkeypatch):
    """What pip installs on Linux is built for CUDA, on machines without a card as well."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    assert moe_compile.lowering.target_for({"meta"}) == target


def test_env_names_versions_devices_and_what_is_lacking(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_COMPILE_CACHE_DIR", str(tmp_path / "not" / "there"))
    assert main(["env"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert {
        "moe_compile",
        "python",
        "torch",
        "triton",
        "devices",
        "cache",
        "CPU kernels",
        "target cpu",
        "target cuda",
        "target ascend",
    } <= set(lines)
    assert "not/there" in lines["cache"] and "cannot be written" not in lines["cache"]
    if not torch.cuda.is_available():
        assert lines["target cuda"].strip() in ("no CUDA device", "triton is not installed")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("folder", ["/proc/nope", "/dev/null", "file/below"])
def test_env_tells_a_cache_that_cannot_be_written(folder, monkeypatch, tmp_path):
    """Permissions do not tell: root has all of them in /proc too."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOE_COMPILE_CACHE_DIR", str(tmp_path / folder))
    assert "cannot be written" in environment._cache()
