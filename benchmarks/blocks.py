"""The MoE blocks that are measured: those of well-known models, as transformers writes them, and one written here for any widths.

A block takes tokens [1, T, hidden] and gives as much; some of transformers' also give router logits, which are left out.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """Sizes of a block, and who writes it: a transformers model type and class, or (None) `Plain`."""

    experts: int
    k: int
    hidden: int
    intermediate: int
    shared: int = 0  # intermediate size of the shared expert
    model: str | None = None
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False  # weights [E, in, out], in `Plain`

    @property
    def expert_elements(self) -> int:
        return 3 * self.hidden * self.intermediate


BLOCKS = {
    "OLMoE": Block(64, 8, 2048, 1024, 0, "olmoe", "OlmoeSparseMoeBlock", {"num_experts": 64, "intermediate_size": 1024}),
    "DeepSeek-V2-Lite": Block(
        64, 6, 2048, 1408, 2816, "deepseek_v2", "DeepseekV2Moe",
        {"n_routed_experts": 64, "n_shared_experts": 2, "topk_method": "greedy", "routed_scaling_factor": 1.0, "norm_topk_prob": False},
    ),
    "gpt-oss-20b": Block(32, 4, 2880, 2880, 0, "gpt_oss", "GptOssMLP", {"num_local_experts": 32, "intermediate_size": 2880}),
    "gpt-oss-120b": Block(128, 4, 2880, 2880, 0, "gpt_oss", "GptOssMLP", {"num_local_experts": 128, "intermediate_size": 2880}),
    "Qwen1.5-MoE-A2.7B": Block(
        60, 4, 2048, 1408, 5632, "qwen2_moe", "Qwen2MoeSparseMoeBlock", {"num_experts": 60, "shared_expert_intermediate_size": 5632}
    ),
    "Phi-3.5-MoE": Block(
        16, 2, 4096, 6400, 0, "phimoe", "PhimoeSparseMoeBlock",
        {"num_local_experts": 16, "intermediate_size": 6400, "router_jitter_noise": 0.0},
    ),
    "Jamba": Block(16, 2, 4096, 14336, 0, "jamba", "JambaSparseMoeBlock", {"num_experts": 16, "intermediate_size": 14336}),
    "Granite-3": Block(40, 8, 1536, 512, 0, "granitemoe", "GraniteMoeMoE", {"num_local_experts": 40, "intermediate_size": 512}),
    "Ernie-4.5-21B": Block(
        64, 6, 2560, 1536, 3072, "ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock",
        {"moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2},
    ),
    "2056 x 1416": Block(60, 4, 2056, 1416),
    "2056 x 1416, [E,in,out]": Block(60, 4, 2056, 1416, transposed=True),
    "2050 x 700": Block(60, 4, 2050, 700),
    "2050 x 700, [E,in,out]": Block(60, 4, 2050, 700, transposed=True),
    "OLMoE, [E,in,out]": Block(64, 8, 2048, 1024, transposed=True),
    "Qwen3-30B": Block(128, 8, 2048, 768, 0, "qwen3_moe", "Qwen3MoeSparseMoeBlock", {"num_experts": 128}),
    "Trinity-mini": Block(
        128, 8, 2048, 1024, 1024, "afmoe", "AfmoeSparseMoeBlock", {"num_experts": 128, "num_shared_experts": 1, "route_scale": 2.826}
    ),
    "GLM-Air-like": Block(
        128, 8, 4096, 1408, 1408, "glm4_moe", "Glm4MoeMoE",
        {"n_routed_experts": 128, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
    ),
}  # fmt: skip
_SIZES = {"hidden_size": "hidden", "num_experts_per_tok": "k", "moe_intermediate_size": "intermediate"}


class Plain(nn.Module):
    """Softmax routing with the chosen weights made to sum to one, and a gated MLP for each expert, on torch's grouped product."""

    def __init__(self, b: Block) -> None:
        super().__init__()
        up, down = (b.experts, 2 * b.intermediate, b.hidden), (b.experts, b.hidden, b.intermediate)
        self.k, self.transposed = b.k, b.transposed
        self.router = nn.Parameter(torch.empty(b.experts, b.hidden))
        self.up = nn.Parameter(torch.empty(up[0], up[2], up[1]) if b.transposed else torch.empty(up))
        self.down = nn.Parameter(torch.empty(down[0], down[2], down[1]) if b.transposed else torch.empty(down))
        self.experts = b.experts

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, ids = torch.topk(F.linear(x, self.router).softmax(-1, dtype=torch.float32), self.k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        flat = ids.reshape(-1)
        order = torch.argsort(flat)
        ends = torch.histc(flat.int().float(), self.experts, 0, self.experts - 1).cumsum(0).to(torch.int32)
        up = self.up if self.transposed else self.up.transpose(1, 2)
        down = self.down if self.transposed else self.down.transpose(1, 2)
        g, u = self._product(x[order // self.k], up, ends).chunk(2, -1)
        y = self._product(F.silu(g) * u, down, ends) * weights.reshape(-1, 1)[order]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return y[back].view(x.shape[0], self.k, -1).sum(1).to(x.dtype).view_as(hidden)

    def _product(self, rows: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        """torch's grouped product takes bf16 and rows of whole 16 bytes only; else what transformers falls back to."""
        if rows.dtype == torch.bfloat16 and rows.shape[1] % 8 == 0 and w.shape[2] % 8 == 0:
            return torch._grouped_mm(rows, w, offs=ends)
        product: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, w, offs=ends)
        return product


def build(b: Block, dtype: torch.dtype, device: str) -> nn.Module:
    """A random block on the device, in eval mode. Raises ImportError or AttributeError where transformers does not have it."""
    importlib.import_module("transformers.integrations.moe")  # defines what `Plain` falls back to
    torch.manual_seed(0)
    with torch.device(device):
        module = Plain(b) if b.model is None else _of_transformers(b)
    for name, p in module.named_parameters():
        with torch.no_grad():
            p.zero_() if "bias" in name or p.ndim < 2 else p.normal_(std=p.shape[-2 if b.transposed and p.ndim == 3 else -1] ** -0.5)
    return module.to(dtype).eval()


def _of_transformers(b: Block) -> nn.Module:
    modeling = importlib.import_module(f"transformers.models.{b.model}.modeling_{b.model}")
    configuration = importlib.import_module(f"transformers.models.{b.model}.configuration_{b.model}")
    cls = getattr(modeling, b.name)
    config_name = next(n for n in dir(configuration) if n.endswith("Config") and n.lower().startswith(b.name.lower()[:4]))
    sizes = {theirs: getattr(b, ours) for theirs, ours in _SIZES.items()}
    config = getattr(configuration, config_name)(**{**sizes, **b.config})
    config._experts_implementation = "grouped_mm"
    return First(cls(config))


class First(nn.Module):
    """A block without what it gives besides the tokens."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return out[0] if isinstance(out, tuple) else out
