"""What the Trinity example finds, and the tables that show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from throughput import Throughput

REPEATS = 3
GRAPHS = "CUDA graph"


@dataclass
class Result:
    """One backend's figures; differences are against eager on the same inputs. `mode`: of torch.compile; without a prefill of its own
    where that is the default mode's. `weights`: how the experts' lie in memory, where --quantize says so."""

    backend: str
    mode: str = "default"
    first_calls_seconds: float = 0.0
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    perplexity: float = 0.0
    prefill_difference: float = 0.0
    decode_difference: float = 0.0
    same_greedy_tokens: bool = True
    weights: str = ""


@dataclass
class Outcome:
    """Everything the example found, JSON-ready through asdict."""

    model: str
    device: str
    dtype: str
    moe_layers: int
    fused: dict[str, int] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    texts: list[dict[str, str]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    order_difference: float = 0.0
    throughput: list[Throughput] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return bool(self.fused) and all(n == self.moe_layers for n in self.fused.values())


def show_texts(out: Console, outcome: Outcome) -> None:
    for item in outcome.texts:
        out.print()
        out.print(f"[bold]{escape(item['prompt'])}[/bold]{escape(item['text'])}", soft_wrap=True)


def show_results(out: Console, outcome: Outcome) -> None:
    table = Table(title=f"{outcome.model} on {outcome.device}, {outcome.dtype}", title_justify="left", box=box.SIMPLE_HEAD)
    words = ("", "experts", "mode") if any(r.weights for r in outcome.results) else ("", "mode")
    for column in (*words, "max Δ prefill", "max Δ decode", "perplexity", "prefill tok/s", "decode tok/s"):
        table.add_column(column, justify="left" if column in words else "right", overflow="fold")
    for r in outcome.results:
        reference, decoding_only = r.backend == "eager", r.mode == GRAPHS
        table.add_row(
            r.backend,
            *([r.weights] if r.weights else []),
            "-" if reference else r.mode,
            "-" if reference or decoding_only else f"{r.prefill_difference:.1e}",
            "-" if reference else f"{r.decode_difference:.1e}",
            "-" if decoding_only else f"{r.perplexity:.4f}",
            "-" if decoding_only else f"{r.prefill_tokens_per_second:,.0f}",
            f"{r.decode_tokens_per_second:,.0f}",
        )
    out.print()
    out.print(table)
    out.print(
        "Δ: largest difference of a logit from eager's with the same weights, on held-out text.",
        f"Tokens a second: one sequence, median of {REPEATS} rounds.",
    )
    if any(r.mode == GRAPHS for r in outcome.results):
        out.print(f'{GRAPHS}: the compiled decoding step captured and replayed, as the mode "reduce-overhead" does after compiling anew.')
    if outcome.order_difference:
        quantised = " before they are quantised" if outcome.results[0].weights else ""
        out.print(
            f"The weights are random, so rounding alone moves logits far: eager that runs each expert by itself, the same maths in another "
            f"order, differs from eager by {outcome.order_difference:.1e}{quantised}."
        )
        return
    other = [" ".join(filter(None, (r.backend, r.weights))) for r in outcome.results if not r.same_greedy_tokens]
    out.print("Greedy text:", f"differs from eager's under {', '.join(other)}" if other else "the same under all.")


def show_emulated(out: Console, outcome: Outcome) -> None:
    fused = outcome.results[-1]
    out.print(
        f"Emulated on the CPU, against eager on held-out text: largest logit difference {fused.prefill_difference:.1e} in prefill and "
        f"{fused.decode_difference:.1e} in decoding; perplexity {fused.perplexity:.4f}, eager {outcome.results[0].perplexity:.4f}."
    )


def show_throughput(out: Console, rows: list[Throughput]) -> None:
    """Both compilers at every point, and how many times faster moe_fused is."""
    table = Table(title="With CUDA graphs on both sides", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "backend", "ms a step", "tok/s", "max Δ logits", "times Inductor"):
        table.add_column(column, justify="left" if column in ("", "backend") else "right", overflow="fold")
    base = {r.point: r.milliseconds for r in rows if r.backend == "inductor"}
    for r in rows:
        ratio = f"{base[r.point] / r.milliseconds:.2f}" if r.point in base else "-"
        table.add_row(r.point, r.backend, f"{r.milliseconds:.3f}", f"{r.tokens_per_second:,.0f}", f"{r.difference:.1e}", ratio)
    out.print()
    out.print(table)
