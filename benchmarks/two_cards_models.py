"""Stages of `two_cards.py` that run models: a training step, Trinity-mini's layers, and a model that no card holds."""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_cards_stages import TINY, Bench, Block, apart, without_peers

import moe_compile

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


# ---- training --------------------------------------------------------------------------------------------------------------------


def training(b: Bench) -> None:
    """Tokens a second of a step of Qwen3-MoE: experts divided over two ranks, FSDP2 over the others. Beside transformers' exchange under
    Inductor, and beside the undivided model (every rank holds all of it, gradients averaged) for the losses."""
    config = qwen3(b)
    mesh = init_device_mesh(b.device.type, (b.world // 2, 2), mesh_dim_names=("dp", "ep"))
    ours = "gather, moe_fused"
    what, theirs = f"FSDP2 x EP2, tokens/s{'' if b.world > 2 else ' (EP2 alone)'}", "transformers all_to_all, inductor"
    found: dict[str, float] = {}
    sides = ((ours, "moe_compile", "moe_fused"), (theirs, "all_to_all", "inductor"), ("undivided", "", "inductor"))
    sides += (("FSDP2 over all ranks, moe_fused", "fsdp", "moe_fused"), ("FSDP2 over all ranks, inductor", "fsdp", "inductor"))
    for side, how, backend in sides:
        torch._dynamo.reset()
        of = init_device_mesh(b.device.type, (b.world, 1), mesh_dim_names=("dp", "ep")) if how == "fsdp" else mesh
        losses, ms = steps(b, config, of, how, backend)
        found[side] = b.tokens * b.world / ms * 1e3
        ratio = {"ours over theirs": found[ours] / found[theirs]} if side == theirs else {}
        b.note(what=what, side=side, tokens_per_second=found[side], **ratio, losses=losses, gib=peaks(b))
        gc.collect()


def qwen3(b: Bench) -> Any:
    """Qwen3-MoE's widths, four layers."""
    from transformers import Qwen3MoeConfig

    wide = dict(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, num_attention_heads=32, head_dim=128)
    small = dict(hidden_size=32, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, num_attention_heads=2, head_dim=16)
    more = dict(num_hidden_layers=2, num_key_value_heads=2, vocab_size=64) if b.tiny else dict(num_key_value_heads=4, vocab_size=32768)
    config = Qwen3MoeConfig(**(small if b.tiny else {**wide, "num_hidden_layers": 4}), **more, use_cache=False)
    config._experts_implementation = "grouped_mm"
    return config


def block_grad(b: Bench) -> None:
    """A block and its gradients, 4,096 tokens on each card: undivided, divided through peers' memory and by NCCL. Calls, not graphs."""
    x = b.x(b.tokens, b.rank).requires_grad_()
    given = torch.randn(x.shape, device=b.device, dtype=b.dtype, generator=torch.Generator(b.device).manual_seed(1))
    alone = 0.0
    for side in ("undivided", "divided", "divided, NCCL"):
        torch._dynamo.reset()
        if side.endswith("NCCL"):
            without_peers(b)
        m = b.block(None if side == "undivided" else "own")
        run = b.compiled(m)

        def step(m: nn.Module = m, run: Any = run) -> None:
            m.zero_grad()
            x.grad = None
            run(x).backward(given)

        took = b.time(step, rounds=10, graph=False)
        alone = alone or took["us"]
        b.note(what="block and gradients, own, T=4096", side=side, **took, ratio=took["us"] / alone)
        profile(b, step, f"gradients, {side},")
        del m, run, step
        gc.collect()


class Learner:
    """Qwen3-MoE that learns from random tokens, which are known by the number of the step and the rank."""

    def __init__(self, b: Bench, config: Any, mesh: Any, how: str, backend: str, dynamic: bool | None = False) -> None:
        from transformers import Qwen3MoeForCausalLM

        self.b, self.config, self.mesh, self.how = b, config, mesh, how
        torch.manual_seed(0)
        with b.device:
            self.m = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", dtype=b.dtype)
        for layer in self.m.model.layers:
            if how not in ("", "fsdp"):
                of_rank(b, config, layer.mlp, how, mesh["ep"])
            layer.forward = b.compiled(layer.forward, backend, dynamic)
            if how and mesh["dp"].size() > 1:
                fully_shard(layer, mesh=mesh["dp"])
        if how and mesh["dp"].size() > 1:
            fully_shard(self.m, mesh=mesh["dp"])
        self.optimizer = torch.optim.AdamW(self.m.parameters(), lr=1e-4, fused=not b.tiny)

    def loss(self, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.config.vocab_size, (1, self.b.tokens), generator=g).to(self.b.device)
        return self.m(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    def step(self, n: int) -> tuple[float, float]:
        """(the mean loss of all ranks, milliseconds) of the n-th step."""
        dist.barrier()
        start = time.perf_counter()
        loss = self.loss(n * 10 + self.b.rank)
        loss.backward()
        if self.how != "fsdp":  # which has averaged them
            average(self.m, self.mesh["ep"].get_group() if self.how else dist.group.WORLD, of_all=not self.how)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        return round(float(mean) / self.b.world, 4), (time.perf_counter() - start) * 1e3


def steps(b: Bench, config: Any, mesh: Any, how: str, backend: str) -> tuple[list[float], float]:
    """The mean loss of all ranks, step by step, and the median milliseconds of a step."""
    learner, timed, said = Learner(b, config, mesh, how, backend), contextlib.ExitStack(), []
    for n in range(3 if b.tiny else 10):
        if n == 2:  # what was compiled before is not timed
            timed.enter_context(b.turn())
        said.append(learner.step(n))
    timed.close()
    profile(b, lambda: learner.loss(b.rank).backward(), f"step {how} {backend}")
    return [loss for loss, _ in said], b.slower(statistics.median(ms for _, ms in said[2:]))


def of_rank(b: Bench, config: Any, mlp: Any, how: str, mesh: Any) -> None:
    """A layer's experts become this rank's part of them, behind an exchange."""
    old = mlp.experts
    mlp.experts, implementation = apart(b, config, (old.gate_up_proj, old.down_proj), how, mesh)

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return implementation(hidden, ids, weights)  # type: ignore[no-any-return]

    mlp.experts.forward = forward


def average(m: nn.Module, group: Any, of_all: bool) -> None:
    """Gradients of divided experts are sums over the ranks that divide them, those of other parameters each rank's own: to means."""
    for name, p in m.named_parameters():
        grad = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
        if of_all or "experts" not in name:
            dist.all_reduce(grad, group=group)
        grad /= group.size()


def peaks(b: Bench) -> list[float]:
    """GiB that each rank has allocated at most, since it was asked last."""
    own = 0.0
    if not b.tiny:
        own = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    each: list[Any] = [None] * b.world
    dist.all_gather_object(each, round(own, 2))
    return each


# ---- whole models ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def layers(b: Bench) -> None:
    """Trinity-mini, 32 layers, random weights: prefill of 4,096 tokens, a step of 32 sequences; undivided and divided, of one batch."""
    models = {side: mini(b, side) for side in ("undivided", "divided")}
    config = models["undivided"].config
    g = torch.Generator(b.device).manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, b.tokens), device=b.device, generator=g)
    token, at = torch.randint(config.vocab_size, (32, 1), device=b.device, generator=g), torch.full((1, 1), 256, device=b.device)
    for what in ("decode", "prefill"):
        alone = 0.0
        for side, m in models.items():
            torch._dynamo.reset()
            made: nn.Module = a_step(m, 32) if what == "decode" else Last(m)
            run, given = b.compiled(made), (token, at) if what == "decode" else (ids,)
            took = b.time(functools.partial(run, *given), rounds=10)
            alone = alone or took["us"]
            b.note(what=what, side=side, **took, ratio=took["us"] / alone, fused=len(moe_compile.last_report().blocks), gib=peaks(b))
            del run, made
            gc.collect()


def decode_own(b: Bench) -> None:
    """A step of 32 sequences on one card, beside half of them on each card: attention of a rank's own, experts divided."""
    halves(b, "decode")


def prefill_own(b: Bench) -> None:
    """Two sequences of half of 4,096 tokens on one card, beside one on each."""
    halves(b, "prefill")


@torch.no_grad()
def halves(b: Bench, what: str) -> None:
    alone = 0.0
    for side in ("undivided", OWN):
        torch._dynamo.reset()
        m = mini(b, side)
        made, given = a_call(b, m, what, 1 if side == "undivided" else b.world)
        run = functools.partial(b.compiled(made), *given)
        took = b.time(run, rounds=10)
        alone = alone or took["us"]
        b.note(what=what, side=side, **took, ratio=took["us"] / alone, fused=len(moe_compile.last_report().blocks), gib=peaks(b))
        profile(b, run, f"{what}, {side}")
        del run, made, m
        gc.collect()
        if not b.tiny:
            torch.cuda.empty_cache()


def a_call(b: Bench, m: Any, what: str, parts: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """(what is compiled, what it is called with) for one of `parts` of a batch."""
    g = torch.Generator(b.device).manual_seed(b.rank)
    batch = (32 if what == "decode" else 2) // parts
    ids = torch.randint(m.config.vocab_size, (batch, 1 if what == "decode" else b.tokens // 2), device=b.device, generator=g)
    if what == "decode":
        return a_step(m, batch), (ids, torch.full((1, 1), 256, device=b.device))
    return Last(m), (ids,)


OWN = "divided, half of the batch on each rank"


def mini(b: Bench, side: str) -> Any:
    """Trinity-mini with random weights; a divided one with this rank's part of the experts."""
    import divided
    import trinity
    from transformers import AfmoeForCausalLM

    with torch.device("meta"):
        m = trinity.cast(AfmoeForCausalLM(trinity.tiny_config() if b.tiny else trinity.mini_config()), b.dtype).eval()
    if side != "undivided":
        example = torch.zeros(1, 8, dtype=torch.long, device="meta")
        moe_compile.parallelize(m, b.mesh, example, use_cache=False, shared_batch=side != OWN)
    divided.fill(m, b.device, 0, b.rank if side != "undivided" else 0)
    return m


def a_step(m: Any, batch: int) -> nn.Module:
    from decoding import Step, new_cache

    return Step(m, new_cache(m, 512, batch), 512)


def profile(b: Bench, run: Callable[[], Any], name: str) -> None:
    """Where a call's time on the card goes, by kernel: into a file beside the results."""
    if b.tiny:
        return
    with b.turn(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    if b.rank == 0:
        kernels = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
        b.lines.with_name("".join(c if c.isalnum() else "_" for c in name)[:40] + ".txt").write_text(kernels)


class Last(nn.Module):
    """ids [1, T] -> logits of the last token."""

    def __init__(self, m: Any) -> None:
        super().__init__()
        self.m = m

    def forward(self, ids: Tensor) -> Tensor:
        return self.m(ids, use_cache=False, logits_to_keep=1).logits  # type: ignore[no-any-return]


class Deep(nn.Module):
    """Blocks one after the other, each behind a norm."""

    def __init__(self, make: Callable[[], Block], depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(F.rms_norm(x, x.shape[-1:]))
        return x


@torch.no_grad()
def big(b: Bench) -> None:
    """116 GB of experts that are made where they lie, a part in each rank: memory and the time of 1,024 tokens a rank."""
    widths, depth = (TINY, 2) if b.tiny else ((128, 8, 4096, 2048), 18)
    meta = torch.device("meta")
    m = Deep(lambda: Block(widths, meta, b.dtype), depth)
    whole = sum(p.numel() * p.element_size() for p in m.parameters()) / 2**30
    moe_compile.parallelize(m, b.mesh, torch.empty(16, widths[2], dtype=b.dtype, device=meta))
    m.to_empty(device=b.device)
    for name, p in m.named_parameters():
        part = p.to_local() if hasattr(p, "to_local") else p
        g = torch.Generator(b.device).manual_seed(0 if part is p else 1 + b.rank)
        part.normal_(std=p.shape[-1] ** -0.5, generator=g)
        assert part is not p or "gate" in name, name
    x = b.x(16 if b.tiny else 1024, b.rank, widths[2])
    run = b.compiled(m)
    took = b.time(lambda: run(x), rounds=10)
    b.note(
        what="model of " + (f"{whole:.0f} GiB" if not b.tiny else "a tiny size"),
        side="divided",
        **took,
        fused=len(moe_compile.last_report().blocks),
        gib=peaks(b),
    )
