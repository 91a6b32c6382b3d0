"""A tiny Qwen3-MoE that transformers itself shards (tensor and expert parallelism), beside the same model in one process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import cells
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

import moe_compile

SIZES = dict(
    vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, max_position_embeddings=32, use_cache=False,
    initializer_range=0.3,
)  # fmt: skip
CONFIGS = {
    "tp": dict(tp_size=2, tp_plan="auto"),
    "ep, all_reduce": dict(tp_size=2, tp_plan="auto", ep_size=2, ep_implementation="all_reduce"),
    "ep, all_to_all": dict(tp_size=2, tp_plan="auto", ep_size=2, ep_implementation="all_to_all"),
    "ep, moe_compile": dict(tp_size=2, tp_plan="auto", ep_size=2, ep_implementation="moe_compile"),
    "fsdp and ep, moe_compile": dict(fsdp_size=2, ep_size=2, ep_implementation="moe_compile"),
    "fsdp and ep, moe_compile_rows": dict(fsdp_size=2, ep_size=2, ep_implementation="moe_compile_rows"),
}
# Left to `make zoo`: the loop in training, grouped products without gradients, AOTAutograd of all but ours.
# Dynamo breaks in the exchange of all_to_all, and each layer around it becomes graphs of its own: the block alone is compiled
EVERY = "ZOO_ALL" in os.environ
INFERENCE = ("ep, moe_compile", "tp", "ep, all_reduce", "ep, all_to_all") if EVERY else ("ep, moe_compile",)
BLOCK_ALONE = () if EVERY else ("ep, all_to_all",)


def spellings(name: str, train: bool) -> tuple[str, ...]:
    """Of a configuration, those of the experts that run in a mode."""
    if not train and name not in INFERENCE:
        return ()
    if name == "ep, all_to_all":
        return ("grouped_mm",)
    return ("grouped_mm", "eager") if EVERY else ("grouped_mm",) if train else ("eager",)


def table(rank: int, world: int, *names: str) -> Iterator[tuple[str, Any]]:
    import moe_compile.integrations.transformers  # noqa: F401 (registers its implementation)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES))
    folder = tempfile.TemporaryDirectory()  # of this run alone: others of this machine write theirs
    if rank == 0:
        model.save_pretrained(folder.name)
    shared = [folder.name]
    dist.broadcast_object_list(shared, 0)
    for name in names or CONFIGS:
        for train in (True, False):
            for spelling in spellings(name, train):
                found = cell(shared[0], name, spelling, train, rank)
                yield f"{name} / {spelling} / {'training' if train else 'inference'}", found


def cell(path: str, name: str, spelling: str, train: bool, rank: int) -> dict[str, Any]:
    torch._dynamo.reset()
    config, apart = CONFIGS[name], "fsdp" in name
    kwargs = dict(experts_implementation=spelling, attn_implementation="eager")
    one = AutoModelForCausalLM.from_pretrained(path, **kwargs).train(train)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**config), **kwargs).train(train)
    batches = [torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(5 + r * apart)) for r in range(dist.get_world_size())]
    ops: list[int] = []
    options = {"backend": "moe_fused", "options": {"inner": cells.counting(ops, cells.EVERY or name == "ep, moe_compile")}}
    alone = name in BLOCK_ALONE
    for layer in model.model.layers if apart or alone else ():
        (layer.mlp if alone else layer).compile(**options)
    run = model if apart or alone else torch.compile(model, **options)
    with torch.enable_grad() if train else torch.no_grad():
        out, want = run(input_ids=batches[rank]).logits, [one(input_ids=b).logits for b in batches]
        if train:
            loss(out).backward()
            (sum(loss(y) for y in want) / len(want)).backward()  # type: ignore[union-attr]
    left = [r.reason for r in moe_compile.last_report().rejected]
    return {
        "fused": sum(ops),
        "graphs": len(ops),
        "out": cells.worst(out, want[rank]),
        "grad": gradients(model, one) if train else 0.0,
        "left": left,
        "exchange": [b.exchange for b in moe_compile.last_report().blocks],
    }


def loss(logits: Tensor) -> Tensor:
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    return (logits.float() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).mean()


def gradients(model: torch.nn.Module, one: torch.nn.Module) -> float:
    found = dict(model.named_parameters())
    return max(cells.worst(found[n].grad, p.grad) for n, p in one.named_parameters() if p.grad is not None)
