"""Tokens a second on a GPU: decoding in batches and a long prefill, each step captured in a CUDA graph, whatever compiled it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from decoding import Step, new_cache
from torch import Tensor
from transformers import AfmoeForCausalLM

PROMPT = 64  # tokens already in the cache when decoding is timed
DECODE_STEPS = 48
ROUNDS = 5


@dataclass(frozen=True)
class Point:
    """What is timed: decoding a batch, one token a sequence and step, or one prefill."""

    kind: str
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}" if self.kind == "decode" else f"prefill, {self.tokens:,} tokens"


POINTS = (Point("decode", 1, 1), Point("decode", 32, 1), Point("prefill", 1, 4096))


@dataclass
class Throughput:
    """One backend at one point. `milliseconds` a step; `difference`: largest logit difference from eager at the first step."""

    backend: str
    point: str
    milliseconds: float
    tokens_per_second: float
    difference: float


def measure(model: AfmoeForCausalLM, point: Point, backends: tuple[str, ...]) -> list[Throughput]:
    """Time `backends` (names torch.compile takes) at a point, on the model's CUDA device; logits are compared with eager's."""
    device = model.lm_head.weight.device
    length = PROMPT + DECODE_STEPS * 2 if point.kind == "decode" else point.tokens
    generator = torch.Generator(device).manual_seed(7)
    ids = torch.randint(0, model.config.vocab_size, (point.batch, point.tokens), device=device, generator=generator)
    reference, results = None, []
    for backend in ("eager", *backends):
        cache = new_cache(model, length, point.batch)
        _fill(cache, generator.manual_seed(8))
        step: Callable[[Tensor, Tensor], Tensor] = Step(model, cache, length)
        if backend != "eager":
            step = torch.compile(step, backend=backend, dynamic=False)
        run = Run(step, cache, ids, PROMPT if point.kind == "decode" else 0)
        logits = run.first()
        reference = logits if reference is None else reference
        if backend != "eager":
            ms = run.milliseconds(DECODE_STEPS if point.kind == "decode" else 4)
            difference = (logits - reference).abs().max().item()
            results.append(Throughput(backend, point.name, ms, 1000 * point.batch * point.tokens / ms, difference))
        del run, step, cache, logits
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return results


class Run:
    """A step captured in a CUDA graph: it reads its ids and positions from fixed places; decoding writes the next ones there."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], cache: object, ids: Tensor, start: int) -> None:
        self.step, self.cache, self.start = step, cache, start
        self.given, self.ids = ids, ids.clone()
        self.first_positions = (start + torch.arange(ids.shape[1], device=ids.device)).expand(ids.shape).contiguous()
        self.positions = self.first_positions.clone()

    @torch.no_grad()
    def first(self) -> Tensor:
        """Logits [batch, V] in fp32 of the last token of the first step."""
        self.rewind()
        return self.step(self.ids, self.positions)[:, -1].float()

    @torch.no_grad()
    def milliseconds(self, steps: int) -> float:
        """Median over rounds of `steps` replays, a step."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.rewind()
                self.advance()
        torch.cuda.current_stream().wait_stream(side)
        self.rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.advance()
        seen = []
        for _ in range(ROUNDS):
            self.rewind()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(steps):
                graph.replay()
                if self.ids.shape[1] > 1:
                    self.rewind()
            end.record()
            end.synchronize()
            seen.append(start.elapsed_time(end) / steps)
        return statistics.median(seen)

    def advance(self) -> None:
        """One step; decoding goes on with the most likely token."""
        logits = self.step(self.ids, self.positions)
        if self.ids.shape[1] == 1:
            self.ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
            self.positions.add_(1)

    def rewind(self) -> None:
        self.ids.copy_(self.given)
        self.positions.copy_(self.first_positions)
        for layer in self.cache.layers:  # type: ignore[attr-defined]
            layer.cumulative_length.fill_(self.start)


def _fill(cache: object, generator: torch.Generator) -> None:
    """Some past for decoding to look at: the same for every backend."""
    for layer in cache.layers:  # type: ignore[attr-defined]
        for t in (layer.keys, layer.values):
            t.normal_(generator=generator)
