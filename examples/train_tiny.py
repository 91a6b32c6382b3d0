#!/usr/bin/env python3
"""Train the byte-level AFMoE that run_trinity.py ships with, through a torch.compile backend of your choice.

    python examples/train_tiny.py --backend moe_fused --out my-tiny     # train and save, about half an hour on two cores
    python examples/train_tiny.py --backend compare --out my-curves     # eager, Inductor and moe_fused from one seed: PNG and JSON

The curves of a comparison lie on each other. They are not equal bit for bit: sums in another order round differently, a
token near a tie then takes another expert, and from there the runs drift apart by about as much as plain Inductor's does.

Experts are balanced without an auxiliary loss, as Trinity does: after each step the bias of an expert that got fewer
tokens than the mean goes up a little, that of a busier one goes down.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import trinity
from console import TrainingBar
from torch import Tensor, nn
from transformers import AfmoeForCausalLM

BACKENDS = ("eager", "inductor", "moe_fused")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run."""

    steps: int = 1800
    batch: int = 16
    context: int = 256
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    bias_step: float = 1e-3
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Run:
    """What one training run leaves behind."""

    backend: str
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    first_step_seconds: float = 0.0
    busiest_expert: list[float] = field(default_factory=list)


def new_model(seed: int) -> AfmoeForCausalLM:
    """A fresh tiny model. The routers start random: all-zero ones, transformers' default, would start with every expert tied."""
    torch.manual_seed(seed)
    model = AfmoeForCausalLM(trinity.tiny_config())
    for router in routers(model):
        nn.init.normal_(router.gate.weight, std=model.config.initializer_range)
    return model


def routers(model: AfmoeForCausalLM) -> list[Any]:
    return [layer.mlp.router for layer in model.model.layers if layer.moe_enabled]


class Balancer:
    """Counts tokens per expert inside the forward and moves the selection bias after each step. No auxiliary loss."""

    def __init__(self, model: AfmoeForCausalLM, step: float) -> None:
        self.step_size = step
        self.blocks = [layer.mlp for layer in model.model.layers if layer.moe_enabled]
        for block in self.blocks:
            block.router.register_buffer("load", torch.zeros(model.config.num_experts), persistent=False)
            block.router.register_forward_hook(_count)

    @torch.no_grad()
    def step(self) -> float:
        """Update every bias; returns the share of the busiest expert over the mean, averaged over layers (1 is even)."""
        worst = 0.0
        for block in self.blocks:
            load = block.router.load
            bias = block.expert_bias
            bias.add_(torch.sign(load.mean() - load), alpha=self.step_size)
            bias.sub_(bias.mean())
            worst += float(load.max() / load.mean().clamp(min=1e-9)) / len(self.blocks)
            load.zero_()
        return worst


def _count(router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward hook: add this batch's tokens per expert to `router.load` [E]."""
    ids = output[2].flatten()
    load = router.load
    assert isinstance(load, Tensor)
    load.scatter_add_(0, ids, torch.ones_like(ids, dtype=load.dtype))


def batches(data: Tensor, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), each [batch, context], the same sequence for the same seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        starts = torch.randint(0, len(data) - recipe.context - 1, (recipe.batch,), generator=generator)
        rows = torch.stack([data[s : s + recipe.context + 1] for s in starts.tolist()])
        yield rows[:, :-1], rows[:, 1:]


def optimizer_for(model: AfmoeForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def loss_of(forward: Callable[..., Any], inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte; scalar."""
    logits = forward(inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train(
    recipe: Recipe,
    backend: str,
    on_step: Callable[[int, float, Run], None],
    save: Callable[[AfmoeForCausalLM, int], None] | None = None,
    options: dict[str, Any] | None = None,
) -> Run:
    """Train a fresh model. `on_step(step, loss, run)` after every step; `save(model, step)` at each tenth of the run.

    options: what torch.compile takes as `options`.
    """
    model = new_model(recipe.seed)
    balancer = Balancer(model, recipe.bias_step)
    torch._dynamo.reset()
    forward: Callable[..., Any] = model if backend == "eager" else torch.compile(model, backend=backend, options=options)
    optimizer = optimizer_for(model, recipe)
    data, held_out = trinity.corpus()
    run, begin = Run(backend), time.perf_counter()
    checkpoints = {round(recipe.steps * tenth / 10) for tenth in range(1, 11)}
    for step, (inputs, targets) in zip(range(recipe.steps), batches(data, recipe), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        loss = loss_of(forward, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.busiest_expert.append(balancer.step())
        run.losses.append(loss.item())
        run.seconds = time.perf_counter() - begin
        if step == 0:
            run.first_step_seconds = run.seconds
        if save is not None and step + 1 in checkpoints:
            run.held_out.append((step + 1, held_out_loss(model, held_out, recipe.context)))
            save(model, step + 1)
        on_step(step, run.losses[-1], run)
    return run


def held_out_loss(model: AfmoeForCausalLM, data: Tensor, context: int) -> float:
    """Nats a byte on text never trained on, in eager mode; leaves the load counters as they were."""
    loads = [router.load.clone() for router in routers(model)]
    nats = math.log(trinity.perplexity(lambda ids: model(ids, use_cache=False).logits, data, context))
    for router, load in zip(routers(model), loads, strict=True):
        router.load.copy_(load)
    return nats


def plot(runs: list[Run], path: Path) -> None:
    """Loss of every run over the steps, and below the difference of each from the first, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(2, 1), layout="constrained")
    steps = range(1, len(runs[0].losses) + 1)
    styles: dict[str, dict[str, Any]] = {
        "eager": {"lw": 4.0, "alpha": 0.4, "color": "tab:blue"},
        "inductor": {"lw": 1.5, "color": "tab:orange"},
        "moe_fused": {"lw": 1.0, "color": "black", "ls": "--"},
    }
    for run in runs:
        above.plot(steps, run.losses, label=run.backend, **styles[run.backend])
    above.set(ylabel="training loss (nats a byte)", title=f"Tiny AFMoE, one seed: {', '.join(run.backend for run in runs)}")
    above.legend()
    for run in runs[1:]:
        below.semilogy(steps, [max(gap, 1e-8) for gap in gaps(runs[0], run)], label=run.backend, **styles[run.backend])
    if runs[1:]:
        below.legend()
    below.set(xlabel="step", ylabel=f"|difference from {runs[0].backend}|")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gaps(reference: Run, other: Run) -> list[float]:
    """Distance of the losses, step by step."""
    return [abs(a - b) for a, b in zip(reference.losses, other.losses, strict=True)]


def summary(recipe: Recipe, runs: list[Run]) -> dict[str, Any]:
    """Numbers of the runs, JSON-ready; with several runs also how far each one's losses lie from the first's."""
    result: dict[str, Any] = {"recipe": asdict(recipe), "torch": torch.__version__, "runs": [asdict(r) for r in runs]}
    result[f"difference_from_{runs[0].backend}"] = {
        run.backend: {"largest": max(apart := gaps(runs[0], run)), "mean": sum(apart) / len(apart)} for run in runs[1:]
    }
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--backend", choices=(*BACKENDS, "compare"), default="moe_fused", help="compare: all of them from one seed")
    p.add_argument("--steps", type=int, help="default: the recipe's own, or 300 with --backend compare")
    p.add_argument("--batch", type=int, default=Recipe.batch)
    p.add_argument("--context", type=int, default=Recipe.context)
    p.add_argument("--lr", type=float, default=Recipe.lr)
    p.add_argument("--seed", type=int, default=Recipe.seed)
    p.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    p.add_argument("--out", type=Path, default=Path("tiny-run"), help="folder for weights, curves and numbers")
    args = p.parse_args(argv)
    if args.steps is None:
        args.steps = 300 if args.backend == "compare" else Recipe.steps
    for name in ("steps", "batch", "context", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name} must be at least 1")
    if args.lr <= 0:
        p.error("--lr must be positive")
    if args.out.exists() and not args.out.is_dir():
        p.error(f"--out {args.out} is a file, not a folder")
    return args


def run_one(recipe: Recipe, backend: str, out: Path, keep: bool) -> Run:
    """One run with its progress shown; `keep` writes the weights to `out` along the way."""
    with TrainingBar(backend, recipe.steps) as bar:
        return train(
            recipe,
            backend,
            on_step=lambda step, loss, run: bar.update(step, loss, run.seconds),
            save=(lambda model, step: trinity.save_tiny(model, out)) if keep else None,
        )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = Recipe(steps=args.steps, batch=args.batch, context=args.context, lr=args.lr, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    compare = args.backend == "compare"
    backends = list(BACKENDS) if compare else [args.backend]
    runs = [run_one(recipe, backend, args.out, keep=not compare) for backend in backends]
    numbers = summary(recipe, runs)
    stem = "loss_curves" if compare else "training"
    (args.out / f"{stem}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    plot(runs, args.out / f"{stem}.png")
    for run in runs:
        tail = f", held-out perplexity {math.exp(run.held_out[-1][1]):.3f}" if run.held_out else ""
        print(f"{run.backend}: loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f} in {run.seconds:.0f} s{tail}")
    for backend, apart in numbers[f"difference_from_{backends[0]}"].items():
        print(f"{backend}: loss differs from {backends[0]}'s by at most {apart['largest']:.1e}, on average {apart['mean']:.1e}")
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
