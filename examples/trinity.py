"""What the Trinity examples share: configurations, models, the byte tokenizer, the text, and perplexity.

AFMoE is the architecture of the Trinity models; transformers has it as `AfmoeForCausalLM`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
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


def device_of(name: str) -> torch.device:
    """Raises ExampleError, saying what is missing, when the device is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        why = "no GPU is visible" if torch.version.cuda or torch.version.hip else "this torch is built without CUDA"
        raise ExampleError(f"no CUDA device: {why}; try --device cpu")
    if name == "npu":
        try:
            import torch_npu  # noqa: F401
        except ImportError as error:
            raise ExampleError(f"no Ascend device: torch_npu cannot be imported ({error}); try --device cpu") from error
        if not torch.npu.is_available():
            raise ExampleError("no Ascend device: torch_npu is installed, but sees no NPU; try --device cpu")
    return torch.device(name)


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
    return cast(model, dtype).to(device).eval()


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


def cast(model: AfmoeForCausalLM, dtype: torch.dtype) -> AfmoeForCausalLM:
    """Matrices to `dtype`; norms, expert biases and rotary frequencies stay float32, as transformers keeps them."""
    for p in model.parameters():
        if p.dim() > 1:
            p.data = p.data.to(dtype)
    return model


def needed_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Memory for the parameters in `dtype`, and a tenth more for cache and activations."""
    return int(sum(p.numel() for p in model.parameters()) * dtype.itemsize * 1.1)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on the device; None when the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "npu":
        return int(torch.npu.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def check_memory(model: nn.Module, device: torch.device, dtype: torch.dtype, hint: str) -> None:
    """Raises ExampleError, before anything is allocated, when the model does not fit. `model` may be on the meta device."""
    need, free = needed_bytes(model, dtype), free_bytes(device)
    if free is not None and need > free:
        name = str(dtype).removeprefix("torch.")
        raise ExampleError(f"this model needs {need / 1e9:.1f} GB in {name}, but {device} has {free / 1e9:.1f} GB free; {hint}")


def build_mini(device: torch.device, dtype: torch.dtype, layers: int = 32, seed: int = 0) -> AfmoeForCausalLM:
    """Trinity-Mini's shape with seeded random weights, made on the device itself: nothing passes through host memory."""
    config = mini_config(layers)
    with torch.device("meta"):
        model = AfmoeForCausalLM(config)
    check_memory(model, device, dtype, "use a device with more memory, or fewer layers (--layers N)")
    cast(model, dtype).to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    _fill(model, torch.Generator(device).manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _fill(model: AfmoeForCausalLM, generator: torch.Generator) -> None:
    """Normal matrices, unit norms, and an expert bias small against the scores yet large enough to change selections."""
    for name, p in model.named_parameters():
        if name.endswith("expert_bias"):
            p.normal_(std=0.02, generator=generator)
        elif p.dim() == 1:
            p.fill_(1.0)
        else:
            p.normal_(std=model.config.initializer_range, generator=generator)


def load_checkpoint(directory: Path, device: torch.device, dtype: torch.dtype) -> tuple[AfmoeForCausalLM, Any]:
    """(model, tokenizer) of a local AFMoE checkpoint. Raises ExampleError when it is none, or does not fit the device."""
    from transformers import AutoTokenizer

    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ExampleError(f"no checkpoint at {directory}: config.json is missing")
    config = AfmoeConfig.from_pretrained(directory)
    if json.loads(config_file.read_text()).get("model_type") != "afmoe":
        raise ExampleError(f"{directory} is not an AFMoE checkpoint: its model_type is not 'afmoe'")
    with torch.device("meta"):
        check_memory(AfmoeForCausalLM(config), device, dtype, "use a device with more memory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AfmoeForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ExampleError(f"{directory} could not be loaded: {str(error).splitlines()[0]}") from error
    return model.to(device).eval(), tokenizer
