"""docs/recipes.md, docs/bring_up.md and docs/options.md are true: snippets run, output is as printed, options are all there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_declined import H, Odd, T

import moe_compile
from moe_compile import options

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_SECTION = re.compile(r"^## (.+?)$(.*?)(?=^## |\Z)", re.M | re.S)


def _snippets() -> dict[str, str]:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    found = {title: re.findall(r"```python\n(.*?)```", body, re.S) for title, body in _SECTION.findall(text)}
    return {title: code for title, codes in found.items() for code in codes}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model() -> Any:
    tf = pytest.importorskip("transformers")
    config = tf.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("title", _snippets())
def test_a_recipe_runs(title: str) -> None:
    code = _snippets()[title]
    names: dict[str, Any] = {"torch": torch, "moe_compile": moe_compile, "options": {"inner": "eager"}}
    names |= {"block": Odd(), "x": torch.randn(T, H)}
    if re.search(r"\bmodel\b(?!s)", code):
        names |= {"model": _model(), "ids": torch.randint(2, 32, (1, 6))}
    exec(compile(code, f"<{title}>", "exec"), names)
    report = names["report"]
    assert report is not None and report.blocks and not report.rejected, str(report)


def test_the_steps_of_bring_up_are_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import bring_up

    said: list[str] = []
    bring_up.steps(said.append)
    printed = re.search(r"\$ python examples/bring_up.py\n(.*?)```", (DOCS / "bring_up.md").read_text(encoding="utf-8"), re.S)
    assert printed is not None and "".join(f"{line}\n" for line in said) == printed[1]


def test_graphs_and_breaks_are_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import bring_up

    said: list[str] = []
    bring_up.graphs(said.append)
    assert re.search(r"(\d+) graphs, (\d+) breaks", said[0])
    assert said[1] == "moe_compile.explain:   1 graph, 0 breaks, 2 MoE blocks fused"
    assert said[1] in (DOCS / "bring_up.md").read_text(encoding="utf-8")


def test_every_option_has_a_row_and_every_row_an_option() -> None:
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_]+)` \|", text, re.M)
    assert sorted(rows) == sorted(options._names())
    read = set()
    for folder in ("moe_compile", "passes", "lowering"):
        for path in (ROOT / folder).rglob("*.py"):
            read |= set(re.findall(r'"(MOE_COMPILE_[A-Z_]+)"', path.read_text(encoding="utf-8")))
    assert {name for name in read if not name.endswith("_")} <= set(re.findall(r"MOE_COMPILE_[A-Z_]+", text))
