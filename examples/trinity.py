"""What the Trinity examples share: configurations, models, the byte tokenizer, the text, and perplexity.

AFMoE is the architecture of the Trinity models; transformers has it as `AfmoeForCausalLM`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AfmoeConfig, AfmoeForCausalLM

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny"
TEXT = HERE / "text" / "kjv.txt"
HELD_OUT_FROM = b"Now it came to pass in the days when the judges ruled"  # Ruth and Jonah, never trained on


class ExampleError(Exception):
    """Something the person at the terminal can put right; shown without a traceback."""


class ByteTokenizer:
    """One token a byte of UTF-8 text."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def tiny_config() -> AfmoeConfig:
    """A byte-level AFMoE of 1.8 million parameters with every part of Trinity: one dense layer, then MoE layers with
    sigmoid routing, expert bias, renormalised and scaled weights and a shared expert; three sliding layers to one global.
    """
    return AfmoeConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_dense_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        num_experts=16,
        num_experts_per_tok=4,
        num_shared_experts=1,
        route_scale=2.826,
        global_attn_every_n_layers=4,
        sliding_window=64,
        mup_enabled=True,
    )


def mini_config(layers: int = 32) -> AfmoeConfig:
    """The shape of Trinity-Mini: 26 billion parameters, 3 billion of them active for a token.

    layers: fewer than 32 give the same layers, only not so many, for machines that cannot hold the model.
    """
    return AfmoeConfig(
        vocab_size=200192,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=1024,
        num_hidden_layers=layers,
        num_dense_layers=2,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=131072,
        num_experts=128,
        num_experts_per_tok=8,
        num_shared_experts=1,
        route_scale=2.826,
        global_attn_every_n_layers=4,
        sliding_window=2048,
        mup_enabled=True,
    )


def corpus() -> tuple[Tensor, Tensor]:
    """(training bytes, held-out bytes), each a 1-D int64 tensor."""
    raw = TEXT.read_bytes()
    cut = raw.index(HELD_OUT_FROM)
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    return data[:cut], data[cut:]


def load_state(directory: Path) -> dict[str, Tensor]:
    """Weights of every `*.safetensors` in a directory, by name."""
    from safetensors.torch import load_file

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ExampleError(f"no *.safetensors file in {directory}")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file))
    return state


def save_tiny(model: AfmoeForCausalLM, directory: Path) -> None:
    """Write config.json and model.safetensors: matrices as fp16 (half the size), vectors as they are."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    state = {name: (t.half() if t.dim() > 1 else t).detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = ["AfmoeForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_tiny(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, directory: Path = TINY) -> AfmoeForCausalLM:
    """The trained byte-level model, in eval mode. Raises ExampleError when the weights do not belong to the configuration."""
    config = AfmoeConfig.from_dict(json.loads((directory / "config.json").read_text()))
    model = AfmoeForCausalLM(config)
    missing, unexpected = model.load_state_dict(load_state(directory), strict=False)
    if missing or unexpected:
        raise ExampleError(f"{directory} does not hold this model: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model.to(device=device, dtype=dtype).eval()


@torch.no_grad()
def perplexity(forward: Callable[[Tensor], Tensor], data: Tensor, context: int, rows: int = 16) -> float:
    """exp of the mean cross-entropy a token over whole windows of `data` [N], each of `context` tokens, `rows` windows a call.

    forward: ids [B, context] -> logits [B, context, V]. Only full batches are used, so that a compiled forward sees one shape.
    Raises ExampleError when the text is too short for one batch.
    """
    windows = (len(data) - 1) // context
    rows = min(rows, windows)
    if not rows:
        raise ExampleError(f"perplexity needs more than {context} tokens of text, got {len(data)}")
    inputs = data[: windows * context].view(windows, context)
    targets = data[1 : windows * context + 1].view(windows, context)
    total, count = 0.0, 0
    for i in range(0, windows - rows + 1, rows):
        logits = forward(inputs[i : i + rows]).float()
        total += F.cross_entropy(logits.flatten(0, 1), targets[i : i + rows].flatten().to(logits.device), reduction="sum").item()
        count += rows * context
    return math.exp(total / count)
