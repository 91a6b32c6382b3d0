"""The snippets of docs/recipes.md that need other libraries, run where these are installed (`make test-libraries`)."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_compile

DOC = Path(__file__).parents[2] / "docs" / "recipes.md"
LIBRARIES = ("accelerate", "datasets", "lightning", "peft", "trl")
_SECTION = re.compile(r"^## (.+?)$(.*?)(?=^## |\Z)", re.M | re.S)
_VERSIONS = re.compile(r"in an environment of its own \((.*?)\)")


def _snippets() -> dict[str, str]:
    found = {t: re.findall(r"```py\n(.*?)```", body, re.S) for t, body in _SECTION.findall(DOC.read_text(encoding="utf-8"))}
    return {f"{title} {i}": code for title, codes in found.items() for i, code in enumerate(codes)}


def _model() -> Any:
    tf = pytest.importorskip("transformers")
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=8)
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"))


def _tokenizer() -> Any:
    import tokenizers
    import transformers

    words = {w: i for i, w in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("title", _snippets())
def test_a_recipe_of_a_library_runs(title: str, tmp_path: Path) -> None:
    code = _snippets()[title]
    for library in re.findall(r"^(?:from|import) (\w+)", code, re.M):
        pytest.importorskip(library)
    if "Trainer(" in code:
        pytest.importorskip("accelerate")
    torch._dynamo.reset()
    names: dict[str, Any] = {"torch": torch, "moe_compile": moe_compile, "options": {"inner": "eager"}, "folder": str(tmp_path)}
    names |= {"model": _model(), "ids": torch.randint(2, 32, (2, 6))}
    if "tokenizer" in code:
        names["tokenizer"] = _tokenizer()
    exec(compile(code, f"<{title}>", "exec"), names)
    report = names["report"]
    assert report is not None and report.blocks and not report.rejected, str(report)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_peft_on_stacked_weights(experts: str) -> None:
    """Each way of transformers' to run experts fuses with its pairs; loss and gradients are those in float64, and the base has none."""
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    model, ids = _model(), torch.randint(2, 32, (2, 6))
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)  # zeros at first: A would get no gradient
    exact = copy.deepcopy(model).double()  # grouped products take no float64: the loop is the reference
    model.set_experts_implementation(experts)
    model.compile(backend="moe_fused", options={"inner": "aot_eager"})
    loss = []
    for m in (model, exact):
        loss.append(m(ids, labels=ids).loss)
        loss[-1].backward()
    report = moe_compile.last_report(model)
    assert report is not None and len(report.blocks) == 1 and not report.rejected, str(report)
    assert report.blocks[0].ir.experts.up_pair and report.blocks[0].ir.experts.down_pair
    assert abs(float(loss[0]) - float(loss[1])) < 1e-6
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == ("lora" not in name), name
        assert p.grad is None or q.grad is None or float((p.grad - q.grad).norm()) < 1e-5 * float(q.grad.norm()), name


def test_accelerate_takes_no_other_backends_name() -> None:
    """What the recipe says of it: should it take our name one day, the recipe is to say so."""
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="DynamoBackend"):
        accelerate.Accelerator(cpu=True, dynamo_backend="moe_fused")


def test_the_versions_are_those_of_this_environment() -> None:
    """DOCS_WRITE=1 writes them anew."""
    for library in LIBRARIES:
        pytest.importorskip(library)
    says = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    text = DOC.read_text(encoding="utf-8")
    if os.environ.get("DOCS_WRITE") == "1":
        DOC.write_text(_VERSIONS.sub(f"in an environment of its own ({says})", text), encoding="utf-8")
    found = _VERSIONS.search(DOC.read_text(encoding="utf-8"))
    assert found is not None and found[1] == says
