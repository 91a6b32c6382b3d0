"""Trinity with its experts divided over several processes, one device each: what `run_trinity.py --ep N` runs under torchrun.

    torchrun --nproc-per-node 2 examples/run_trinity.py --size mini --device cuda --ep 2

Every process makes its own part of the experts and all of the rest; all hold the same batch. Of mini, whose weights are random, memory and
speed are shown. The results of tiny are compared with those of the undivided model, in each process.
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import trinity
from console import stage
from decoding import Session
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AfmoeForCausalLM

PREFILL, TOKENS, ROUNDS = 256, 64, 5


@dataclass
class Divided:
    """What one run found. `parameter_bytes` and `peak_bytes` (of the device; 0 on the CPU): by rank."""

    model: str
    ranks: int
    moe_layers: int
    fused: int
    exchange: str
    parameter_bytes: list[int]
    undivided_bytes: int
    peak_bytes: list[int] = field(default_factory=list)
    difference: float | None = None
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0

    @property
    def complete(self) -> bool:
        return self.fused == self.moe_layers


def run(args: argparse.Namespace) -> Divided | None:
    """The whole example; None in all processes but the first. Raises ExampleError where it was not started as it should be."""
    device, mesh = start(args)
    try:
        found = measured(args, device, mesh)
        dist.barrier()  # nobody closes its connections while another one still reads from them
        return found if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


def start(args: argparse.Namespace) -> tuple[torch.device, DeviceMesh]:
    if int(os.environ.get("WORLD_SIZE", "1")) != args.ep:
        raise trinity.ExampleError(
            f"--ep {args.ep} wants as many processes: torchrun --nproc-per-node {args.ep} examples/run_trinity.py ..."
        )
    device = trinity.device_of(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    return device, init_device_mesh(device.type, (args.ep,), mesh_dim_names=("ep",))


def measured(args: argparse.Namespace, device: torch.device, mesh: DeviceMesh) -> Divided:
    import moe_compile

    tiny = args.size == "tiny"
    reference, model = (trinity.load_tiny(device), trinity.load_tiny(device)) if tiny else (None, None)
    undivided = nbytes(reference) if reference is not None else 0
    if model is None:
        with torch.device("meta"):
            model = trinity.cast(AfmoeForCausalLM(trinity.mini_config(args.layers)), torch.bfloat16).eval()
        undivided = nbytes(model)
    with stage("dividing the experts"):
        example = torch.zeros(1, 8, dtype=torch.long, device=model.lm_head.weight.device)
        moe_compile.parallelize(model, mesh, example, use_cache=False, shared_batch=True)
    if not tiny:
        with stage("making this process's part of the weights"):
            fill(model, device, args.seed, dist.get_rank())
    how: dict[str, Any] = {"options": {"inner": "eager"}} if args.explain else {"mode": "default"}
    session = Session(model, "moe_fused", PREFILL, PREFILL + TOKENS, **how)
    for kind in ("prefill",) if args.explain else ("prefill", "decode"):
        with stage(f"moe_fused: compiling {kind}"):
            session.warm_up(kind)
    report = moe_compile.last_report()
    layers = sum(layer.moe_enabled for layer in model.model.layers)
    name = "tiny" if tiny else f"mini ({args.layers} layers, random weights)"
    found = Divided(name, args.ep, layers, len(report.blocks), report.blocks[0].exchange if report.blocks else "", [], undivided)
    prompt = trinity.corpus()[1][:PREFILL].to(device)
    if reference is not None:
        found.difference = float(
            (session.prefill(prompt) - Session(reference, "eager", PREFILL, PREFILL + TOKENS).prefill(prompt)).abs().max()
        )
    if not args.explain:
        time_it(session, prompt, found)
    found.parameter_bytes = by_rank(nbytes(model))
    found.peak_bytes = by_rank(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
    return found


def time_it(session: Session, prompt: Tensor, found: Divided) -> None:
    rounds = [session.generate(prompt.tolist(), TOKENS) for _ in range(ROUNDS)]
    found.prefill_tokens_per_second = len(prompt) / statistics.median(prefill for _, prefill, _ in rounds)
    found.decode_tokens_per_second = (TOKENS - 1) / statistics.median(decode for _, _, decode in rounds)


@torch.no_grad()
def fill(model: AfmoeForCausalLM, device: torch.device, seed: int, rank: int) -> None:
    """Random weights on the device: the same in every process but for the experts, of which each makes its own."""
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    alike, own = (torch.Generator(device).manual_seed(s) for s in (seed, seed + 1 + rank))
    for name, p in model.named_parameters():
        part = local(p)
        if part.dim() == 1 and not name.endswith("expert_bias"):
            part.fill_(1.0)
        else:
            std = 0.02 if name.endswith("expert_bias") else model.config.initializer_range
            part.normal_(std=std, generator=alike if part is p else own)


def local(p: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return p.to_local() if hasattr(p, "to_local") else p


def nbytes(model: AfmoeForCausalLM) -> int:
    return sum(local(p).numel() * p.element_size() for p in model.parameters())


def by_rank(number: int) -> list[int]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, number)
    return every


def show(out: Any, found: Divided) -> None:
    out.print(f"{found.model} on {found.ranks} processes: {found.fused} of {found.moe_layers} MoE layers fused; {found.exchange}")
    out.print(f"weights: undivided {found.undivided_bytes / 1e9:.3f} GB")
    for rank, (weights, peak) in enumerate(zip(found.parameter_bytes, found.peak_bytes, strict=True)):
        out.print(f"  rank {rank}: {weights / 1e9:.3f} GB of weights" + (f", peak {peak / 1e9:.3f} GB" if peak else ""))
    if found.difference is not None:
        out.print(f"largest difference of a logit from the undivided model: {found.difference:.2e}")
    if found.decode_tokens_per_second:
        out.print(f"prefill {found.prefill_tokens_per_second:.0f} tokens/s, decode {found.decode_tokens_per_second:.1f} tokens/s")


def as_json(found: Divided) -> dict[str, Any]:
    return asdict(found)
