"""Expert parameters that are [E, in, out] themselves: the model, its state_dict and the compiled block stay what they were."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from ascend_blocks import ENTRIES, Seen, block, compiled, first, relative, zoo

import moe_compile
from moe_compile.lowering.ascend import physical, register, schemas, shards
from moe_compile.lowering.ascend.store import Store
from moe_compile.lowering.ascend.weights import Recipe

register.ensure()
OUT_IN = ("afmoe", "qwen3_moe", "deepseek_v3", "jamba")  # stored [E, out, in]


@pytest.mark.parametrize("name", OUT_IN)
@torch.no_grad()
def test_the_model_reads_what_it_read(name: str) -> None:
    module, x = block(name), torch.randn(2, 5, zoo.HIDDEN)
    expected, before = first(module(x)), {k: v.clone() for k, v in module.state_dict().items()}
    moved = moe_compile.prepare(module, target="ascend", training=True)
    assert moved and all(k in before for k in moved)
    assert relative(first(module(x)), expected) <= 1e-5  # other strides round otherwise
    parameters = dict(module.named_parameters())
    originals = [p for n, p in parameters.items() if n.endswith(".original")]
    assert len(originals) == len(moved) and all(p.is_contiguous() and p.requires_grad for p in originals)
    assert all(p.is_contiguous() for p in parameters.values()), "FSDP2 takes no others"
    after = module.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert moe_compile.prepare(module, target="ascend", training=True) == {}  # once more is no harm


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_a_state_dict_of_either_form_loads_into_either(assign: bool) -> None:
    plain, prepared, x = block("afmoe"), block("afmoe"), torch.randn(2, 5, zoo.HIDDEN)
    moe_compile.prepare(prepared, target="ascend", training=True)
    for p in plain.parameters():
        p.mul_(1.5)
    prepared.load_state_dict({k: v.clone() for k, v in plain.state_dict().items()}, assign=assign)
    assert relative(first(prepared(x)), first(plain(x))) <= 1e-5
    other = block("afmoe")
    other.load_state_dict(prepared.state_dict())
    assert torch.equal(first(other(x)), first(plain(x)))
    assert all(p.is_contiguous() for p in prepared.parameters())
    with pytest.raises(RuntimeError, match="gate_up_proj"):
        prepared.load_state_dict({k: v for k, v in plain.state_dict().items() if "gate_up_proj" not in k})


@pytest.mark.parametrize("name", OUT_IN)
@torch.no_grad()
def test_inference_uses_the_parameters_as_they_are(name: str, store: Store) -> None:
    module, x = block(name), torch.randn(2, 5, zoo.HIDDEN)
    expected = first(module(x))
    moe_compile.prepare(module, target="ascend", training=True)
    assert relative(first(compiled(module, strict=True)(x)), expected) <= 1e-5
    assert store.copied == 0 and not any("more memory" in n for n in moe_compile.last_report().notes)


@pytest.mark.skipif(schemas.wheel(), reason="torch_npu has gradients on its own device only")
@pytest.mark.parametrize("name", OUT_IN)
def test_training_makes_no_copy_and_gives_physical_gradients(name: str) -> None:
    plain, module, x = block(name), block(name), torch.randn(2, 5, zoo.HIDDEN)
    moe_compile.prepare(module, target="ascend", training=True)
    with Seen() as seen:
        first(compiled(module, strict=True)(x)).sin().sum().backward()
    first(plain(x)).sin().sum().backward()
    wanted = dict(plain.named_parameters())
    for n, p in module.named_parameters():
        if n.endswith(".original"):
            want = wanted[n.replace("parametrizations.", "").removesuffix(".original")].grad.transpose(-1, -2)
            assert p.grad.is_contiguous()
        else:
            want = wanted[n].grad
        assert (p.grad is None) == (want is None) and (want is None or relative(p.grad, want) <= 1e-4), n
    recipes = [r for r in seen.lowered[0].inputs if isinstance(r, Recipe)]
    inputs = [p for n, p in module.named_parameters() if n.endswith(".original")]
    views = [r.view([next(p for p in inputs if p.shape == shape(r, p))]) for r in recipes for _ in (0,) if any(shape(r, p) for p in inputs)]
    assert len(views) == 2 and all(v.is_contiguous() for v in views), "the weight is seen through its transposition"


def shape(r: Recipe, p: torch.Tensor) -> torch.Size | None:
    """A parameter's shape, where the recipe makes something of it."""
    try:
        return p.shape if r.view([p]).is_contiguous() and r.view([p]).untyped_storage()._cdata == p.untyped_storage()._cdata else None
    except (RuntimeError, IndexError):
        return None


@torch.no_grad()
def test_weights_stored_in_out_are_left_alone() -> None:
    module = block("llama4")
    assert moe_compile.prepare(module, target="ascend", training=True) == {}


@torch.no_grad()
def test_a_whole_model_saves_and_loads(tmp_path) -> None:
    pytest.importorskip("safetensors.torch")
    entry = ENTRIES["qwen3_moe"]
    model = entry.build()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    moe_compile.prepare(model, target="ascend", training=True)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert set(again) == set(expected) and all(torch.equal(again[k], v) for k, v in expected.items())


@torch.no_grad()
def test_a_copy_of_the_model_is_a_model_of_its_own() -> None:
    module, x = block("afmoe"), torch.randn(2, 5, zoo.HIDDEN)
    moe_compile.prepare(module, target="ascend", training=True)
    twin = copy.deepcopy(module)
    for p in twin.parameters():
        p.mul_(2)
    assert not torch.allclose(first(twin(x)), first(module(x)))
    assert torch.equal(twin.state_dict()["experts.gate_up_proj"], 2 * module.state_dict()["experts.gate_up_proj"])


# ---- in the fractal format -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
@torch.no_grad()
def test_shards_are_ordinary_parameters_but_for_the_gather(name: str) -> None:
    from test_quant import block as sized

    module, x = sized(name, **({"moe_intermediate_size": 32} if name == "qwen3_moe" else {"intermediate_size": 32})), torch.randn(2, 5, 32)
    expected, before = first(module(x)), {k: v.clone() for k, v in module.state_dict().items()}
    moved = moe_compile.prepare(module, target="ascend", training=True, weight_format="nz")
    assert len(moved) == 2
    assert sum(isinstance(p.data, shards.FractalShard) for p in module.parameters()) == 2
    assert relative(first(module(x)), expected) <= 1e-5  # other strides round otherwise
    after = module.state_dict()
    assert all(type(v) is torch.Tensor for v in after.values())
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
    module.load_state_dict({k: v * 2 for k, v in before.items()})
    assert torch.equal(module.state_dict()["experts.down_proj"], 2 * before["experts.down_proj"])


def test_sizes_that_are_no_blocks_stay_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    module = torch.nn.Module()
    module.up, module.down = torch.nn.Parameter(torch.randn(4, 24, 40)), torch.nn.Parameter(torch.randn(4, 40, 24))
    with caplog.at_level(logging.WARNING, "moe_compile"):
        assert physical.reparametrise(module, "up", True, True)
    assert "blocks of 16 x 16" in caplog.text and not any(isinstance(p.data, shards.FractalShard) for p in module.parameters())


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"weight_format": "zn"}, "allowed: 'nd', 'nz'"), ({"weight_format": "nz"}, "training=True"),
])  # fmt: skip
def test_wrong_arguments_are_told(kwargs: dict, message: str) -> None:
    with pytest.raises(moe_compile.OptionError, match=message):
        moe_compile.prepare(torch.nn.Linear(2, 2), **kwargs)
