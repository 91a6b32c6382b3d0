"""Text generation with a KV cache in two fixed shapes, so that a compiler sees one prefill and one decode graph.

A prompt is padded on the right to the prefill length; what the padding wrote into the cache lies in the future of every
later query, is masked, and is overwritten as decoding goes on.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AfmoeForCausalLM
from transformers.cache_utils import Cache, StaticLayer


class Step(nn.Module):
    """ids [1, S] at positions [1, S] -> logits [1, S, V]; the cache moves on by S. Masks are made inside, to be compiled too."""

    def __init__(self, model: AfmoeForCausalLM, cache: Cache, length: int) -> None:
        super().__init__()
        self.model, self.cache, self.length = model, cache, length
        self.window = model.config.sliding_window

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        query = positions[0, :, None]
        key = torch.arange(self.length, device=ids.device)[None]
        causal = key <= query
        masks = {"full_attention": causal[None, None], "sliding_attention": (causal & (key > query - self.window))[None, None]}
        out = self.model(ids, attention_mask=masks, position_ids=positions, past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits
        return logits


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; otherwise Gumbel-max sampling with noise that depends on the seed alone."""

    temperature: float = 0.0
    seed: int = 0

    def chooser(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function logits [V] -> id [1, 1], without a host synchronisation."""
        if self.temperature <= 0:
            return lambda logits: logits.argmax(-1).view(1, 1)
        generator = torch.Generator(device).manual_seed(self.seed)

        def choose(logits: Tensor) -> Tensor:
            noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
            return (logits.float() / self.temperature - noise.log()).argmax(-1).view(1, 1)

        return choose


class Session:
    """One model under one backend ("eager" or what torch.compile takes), with its own cache.

    prefill: longest prompt; length: most tokens in all; compile_args: `options`, `mode` or `dynamic` of torch.compile.
    """

    def __init__(self, model: AfmoeForCausalLM, backend: str, prefill: int, length: int, **compile_args: Any) -> None:
        self.model, self.backend, self.prefill_length, self.length = model, backend, prefill, length
        self.device = model.lm_head.weight.device
        self.cache = new_cache(model, length)
        self.first_calls_seconds = 0.0
        self.plain = Step(model, self.cache, length)
        self.step: Callable[[Tensor, Tensor], Tensor] = self.plain
        if backend != "eager":
            self.step = torch.compile(self.plain, backend=backend, **{"dynamic": False, **compile_args})
        self.decode_step = self.step

    def in_graphs(self) -> Session:
        """This session with its decoding step, as it is compiled, in a CUDA graph: what the mode "reduce-overhead" does, without compiling
        a second time. Cache and prefill are the same ones."""
        other = copy.copy(self)
        other.first_calls_seconds = 0.0
        other.decode_step = Replayed(self.decode_step, self.device)
        return other

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """ids [N] with 1 <= N <= prefill_length, into an emptied cache -> logits [N, V]."""
        n = len(ids)
        if not 0 < n <= self.prefill_length:
            raise ValueError(f"a prompt has 1 to {self.prefill_length} tokens, not {n}")
        padded = torch.zeros(1, self.prefill_length, dtype=torch.long, device=self.device)
        padded[0, :n] = ids
        self._set_length(0)
        logits = self.step(padded, torch.arange(self.prefill_length, device=self.device)[None])
        self._set_length(n)
        return logits[0, :n].clone()  # under CUDA graphs the next call overwrites the output

    @torch.no_grad()
    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """token [1, 1] at position [1, 1] -> logits [V]."""
        return self.decode_step(token, position)[0, -1]

    def generate(self, prompt: Sequence[int], new_tokens: int, sampling: Sampling | None = None) -> tuple[list[int], float, float]:
        """(new ids, seconds of prefill, seconds of decoding new_tokens - 1 tokens)."""
        if len(prompt) + new_tokens > self.length:
            raise ValueError(f"{len(prompt)} + {new_tokens} tokens do not fit the cache of {self.length}")
        choose = (sampling or Sampling()).chooser(self.device)
        start = self.now()
        token = choose(self.prefill(torch.tensor(prompt, device=self.device))[-1])
        middle = self.now()
        position = torch.full((1, 1), len(prompt), device=self.device)
        tokens = [token]
        for _ in range(new_tokens - 1):
            token = choose(self.decode(token, position))
            tokens.append(token)
            position = position + 1
        ids = torch.cat(tokens).flatten().tolist()
        return ids, middle - start, self.now() - middle

    def warm_up(self, kind: str) -> None:
        """Run the "prefill" or "decode" step once; what that takes is added to `first_calls_seconds`."""
        start = self.now()
        if kind == "prefill":
            self.prefill(torch.zeros(1, dtype=torch.long, device=self.device))
        else:
            token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self._set_length(0)
            self.decode(token, torch.zeros_like(token))
        self.first_calls_seconds += self.now() - start

    def teacher_forced(self, ids: Tensor, start: int, tokens: int) -> Tensor:
        """Logits [tokens, V] of decoding ids[start : start + tokens] one by one after a prefill of ids[:start]."""
        self.prefill(ids[:start])
        positions = torch.arange(len(ids), device=self.device)[:, None, None]
        return torch.stack([self.decode(ids[i].view(1, 1), positions[i]).clone() for i in range(start, start + tokens)])

    def now(self) -> float:
        """Seconds, after all work queued on the device is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _set_length(self, n: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(n)


def compile_beside(model: AfmoeForCausalLM, backend: str, shape: tuple[int, int], **compile_args: Any) -> Any:
    """A process that compiles a session's two steps for the same weights, which it shares: this process finds the graphs in the compiler's
    cache on disk then, and compiles something else meanwhile. To be joined."""
    process = torch.multiprocessing.get_context("spawn").Process(target=_compile, args=(model, backend, shape, compile_args))
    process.start()
    return process


def _compile(model: AfmoeForCausalLM, backend: str, shape: tuple[int, int], compile_args: dict[str, Any]) -> None:
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    sys.modules.pop("__mp_main__", None)  # the cache's keys name the module that torch's constants are first found in: not this one
    session = Session(model, backend, *shape, **compile_args)
    for kind in ("prefill", "decode"):
        session.warm_up(kind)


class Replayed:
    """A decoding step captured in a CUDA graph at its first call, then replayed; it reads token and position [1, 1] from fixed places.
    The next call overwrites its output."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
        self.step = step
        self.token, self.position = (torch.zeros(1, 1, dtype=torch.long, device=device) for _ in range(2))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None

    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        self.token.copy_(token)
        self.position.copy_(position)
        if self.graph is None:
            self._capture()
        assert self.graph is not None and self.out is not None
        self.graph.replay()
        return self.out

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what libraries set up at a first call cannot be captured
            self.step(self.token, self.position)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.step(self.token, self.position)


def new_cache(model: AfmoeForCausalLM, length: int, batch: int = 1) -> Cache:
    """A static cache of full length for every layer: sliding layers get their window from the mask, so that no Python
    counter changes from step to step and nothing recompiles.
    """
    config = model.config
    cache = Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(config.num_hidden_layers)])
    weight = model.lm_head.weight
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, weight.dtype, weight.device)
    return cache
