"""Options: what is allowed, and that a mistake is told early, by name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import moe_compile
from moe_compile import OptionError, Options, lowering, options
from moe_compile.backend import moe_fused
from moe_compile.lowering.ascend.modes import _with_inner_options

WRONG = [
    ({"strikt": True}, None, ["'strikt'", "valid options: target, inner", "did you mean 'strict'"]),
    ({"nonsense": 1}, None, ["'nonsense'", "valid options: target, inner"]),
    ({3: 1}, None, ["3", "valid options"]),
    ({"max_autotune": True}, None, ["'max_autotune'", "inner_options={'max_autotune'"]),
    ({"target": "tpu"}, None, ["'target'", "'tpu'", "'cpu'", "'ascend'"]),
    ({"validate": 1}, None, ["'validate'", "True, False"]),
    ({"validate": None}, None, ["'validate'", "True, False"]),
    ({"strict": "yes"}, None, ["'strict'", "True, False"]),
    ({"overlap_shared": "maybe"}, None, ["'overlap_shared'", "'auto', True, False"]),
    ({"mode": "turbo"}, None, ["'mode'", "'ge'", "'npugraph_ex'"]),
    ({"quantize": "int4"}, None, ["'quantize'", "'w8a8'", "'w8a8c8'"]),
    ({"quantize": ("w8a8c8", 1.5)}, None, ["'quantize'", "0 < alpha <= 1"]),
    ({"quantize": ("w8a8", 0.5)}, None, ["'quantize'", "'w8a8c8', alpha"]),
    ({"weight_format": "nchw"}, None, ["'weight_format'", "'nz'"]),
    ({"combine": "sum"}, None, ["'combine'", "finalize", "unpermute"]),
    ({"core_limit": (8, 0)}, None, ["'core_limit'", "positive"]),
    ({"inner": "no_such_backend"}, None, ["'inner'", "aot_eager", "inductor"]),
    ({"inner": 7}, None, ["'inner'", "callable"]),
    ({"inner": "moe_fused"}, None, ["'inner'", "itself"]),
    ({"inner": moe_fused}, None, ["'inner'", "itself"]),
    ({"inner_options": 3}, None, ["'inner_options'", "dict"]),
    ({"inner_options": {"max_autotun": True}}, None, ["'inner_options'", "'max_autotun'", "max_autotune"]),
    ({"inner_options": {"max_autotune": "please"}}, None, ["'inner_options'", "max_autotune"]),
    ({"inner_options": {"nosuch": 1}}, None, ["'inner_options'", "'nosuch'", "Inductor's"]),
    ({"activations": "x"}, None, ["'activations'", "'x'", "'model', 'fp8', 'int8'"]),
    (["strict"], None, ["dict", "valid options"]),
    (None, "fastest", ["mode='fastest'", "reduce-overhead"]),
]
if importlib.util.find_spec("torch_npu") is None:  # with it, the graph mode's own config tells
    WRONG += [
        ({"inner_options": {"nosuch": 1}, "target": "ascend"}, None, ["'inner_options'", "'nosuch'", "force_eager"]),
        ({"inner_options": {"nosuch.part": 1}, "target": "ascend"}, None, ["'inner_options'", "'nosuch.part'", "experimental_config"]),
    ]


@pytest.mark.parametrize("options, mode, words", WRONG)
def test_wrong_options_name_the_option_and_what_is_allowed(options, mode, words):
    with pytest.raises(ValueError) as e:
        Options.parse(options, mode)
    assert isinstance(e.value, OptionError)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize("options, mode, words", [w for w in WRONG if isinstance(w[0], dict) or w[1]])
def test_torch_compile_itself_tells(options, mode, words):
    kwargs = {"options": options} if options else {"mode": mode}
    with pytest.raises(ValueError, match=words[0].replace("(", r"\(")):
        torch.compile(nn.Linear(2, 2), backend="moe_fused", **kwargs)


def test_the_first_torch_compile_of_a_process_tells_too():
    code = """
import torch
try:
    torch.compile(torch.nn.Linear(2, 2), backend="moe_fused", options={"strikt": True})
except ValueError as e:
    print("told:", e)
try:
    torch.compile(torch.nn.Linear(2, 2), backend="moe_fused", options={"validat": True})
except ValueError as e:
    print("told:", e)
torch.compile(torch.nn.Linear(2, 2), backend="moe_fused", options={"inner": "eager"})
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "told: unknown option 'strikt'" in out and "told: unknown option 'validat'" in out


def test_other_backends_keep_their_own_options():
    torch.compile(nn.Linear(2, 2), backend="inductor", options={"max_autotune": False})
    compiled = torch.compile(nn.Linear(2, 2), backend=lambda gm, inputs, options: gm.forward, options={"strikt": True})
    assert compiled(torch.ones(1, 2)).shape == (1, 2)


def test_a_backend_given_as_a_function_tells_at_the_first_call():
    model = torch.compile(nn.Linear(2, 2), backend=lambda gm, inputs: moe_fused(gm, inputs, options={"strikt": True}))
    with pytest.raises(ValueError, match="strikt"):
        model(torch.ones(1, 2))


def test_defaults_and_good_values():
    assert Options.parse(None) == Options()
    assert Options().target == "auto" and Options().inner == "auto" and Options().validate and not Options().strict
    chosen = Options.parse({"target": "cpu", "inner": "aot_eager", "overlap_shared": False, "validate": False, "strict": True})
    assert (chosen.target, chosen.inner, chosen.overlap_shared, chosen.validate, chosen.strict) == ("cpu", "aot_eager", False, False, True)
    assert Options.parse(chosen) is chosen
    Options.parse({"inner_options": {"max_autotune": True}})
    Options.parse({"inner": lambda gm, inputs: gm.forward, "inner_options": {"anything": 1}})
    Options.parse({"target": "ascend", "inner_options": {"force_eager": True, "experimental_config.frozen_parameter": True}})
    Options.parse(None, "reduce-overhead")


def test_inner_options_of_a_device_that_is_there_pass_with_target_auto(monkeypatch):
    """Which target it is shows where the tensors are: with an NPU its graph modes' options are as good as Inductor's."""
    given = {"inner_options": {"frozen_parameter": True}}
    with pytest.raises(OptionError, match="Inductor"):
        Options.parse(given)
    found = dict(lowering.targets())
    monkeypatch.setattr(options, "targets", lambda: found | {"ascend": replace(found["ascend"], missing=lambda: "")})
    Options.parse(given)
    if importlib.util.find_spec("torch_npu") is None:
        with pytest.raises(OptionError, match="nosuch"):
            Options.parse({"inner_options": {"nosuch": 1}})


def test_a_graph_modes_own_config_tells_what_it_has_not():
    config = SimpleNamespace(mode="", part=SimpleNamespace(level=1))
    assert _with_inner_options(config, Options(inner_options={"part.level": 2})).part.level == 2
    for name, allowed in (("nosuch", "mode, part"), ("part.nosuch", "level"), ("nosuch.level", "mode, part")):
        with pytest.raises(OptionError, match=f"'{name}'.*allowed: {allowed}$"):
            _with_inner_options(config, Options(inner_options={name: 2}))


def test_options_are_immutable_and_hashable():
    with pytest.raises(AttributeError):
        Options().target = "cuda"  # type: ignore[misc]
    assert hash(Options()) == hash(Options())


def test_public_names():
    assert set(moe_compile.__all__) >= {"explain", "last_report", "NotFused", "Report", "BlockReport", "ir", "__version__"}
    assert all(hasattr(moe_compile, name) for name in moe_compile.__all__)
