#!/usr/bin/env python3
"""Generate text with a Trinity (AFMoE) model through torch.compile(model, backend="moe_fused"), and show what it did.

    python examples/run_trinity.py                                    # the small trained model, on the CPU
    python examples/run_trinity.py --prompt "And Jonah said"          # your own prompts
    python examples/run_trinity.py --explain                          # only what the compiler recovered
    python examples/run_trinity.py --size mini --device cuda          # Trinity-Mini's shape, random weights, 57 GB
    python examples/run_trinity.py --checkpoint DIR --device cuda     # a real checkpoint
    python examples/run_trinity.py --quantize mxfp4                   # experts in few bits, beside the same model as it is
    python examples/run_trinity.py --target ascend --dry-run          # what an NPU would run, shown and emulated on the CPU
    python examples/run_trinity.py --size mini --device npu           # on an NPU, with and without the shared expert beside the others

Prints a row per MoE layer, the generated text (of trained weights), the largest logit difference and the perplexity on held-out
text against eager, and tokens a second for eager, Inductor and moe_fused; on a GPU decoding also in a CUDA graph, as the mode
"reduce-overhead" runs it.
Exits with 1 when a MoE layer was not fused and validated.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import trinity
from console import err, stage
from decoding import Sampling, Session, compile_beside
from quantised import SCHEMES, quantise
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from throughput import POINTS, Throughput
from throughput import measure as measure_throughput
from torch import Tensor
from transformers import AfmoeForCausalLM

PROMPTS = (
    "In the beginning ",
    "And David said unto ",
    "And the word of the LORD came unto Jonah",
    "A certain man had two ",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPEATS = 3
DECODE_TOKENS = 64
GRAPHS = "CUDA graph"
LONGEST = 150  # seconds that are waited for what another process compiles
BLOCK = 64  # lengths are rounded up to a multiple of this


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


@dataclass(frozen=True)
class Subject:
    """The model under test and how to speak to it."""

    name: str
    model: AfmoeForCausalLM
    tokenizer: Any
    device: torch.device
    trained: bool

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    @property
    def moe_layers(self) -> int:
        return sum(layer.moe_enabled for layer in self.model.model.layers)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--size", choices=("tiny", "mini"), default="tiny", help="tiny: trained, shipped here; mini: Trinity-Mini's shape")
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="a local AFMoE checkpoint with its tokenizer")
    p.add_argument("--layers", type=int, default=32, help="with --size mini: fewer layers, for smaller machines")
    p.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu")
    p.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 for tiny, else bfloat16")
    p.add_argument("--quantize", choices=tuple(SCHEMES), help="the experts: e4m3 by 128 x 128, MXFP4 by 32, int4 by 128 inputs")
    p.add_argument("--target", choices=("auto", "ascend"), default="auto", help="whose ops to use; auto: the device's")
    p.add_argument("--dry-run", action="store_true", help="with --target ascend: show the npu calls and emulate them, no NPU needed")
    p.add_argument("--graph-mode", choices=("auto", "ge", "npugraph_ex", "eager"), default="auto", help="with --device npu")
    p.add_argument("--mode", choices=("default", "reduce-overhead", "max-autotune"), default="default", help="of torch.compile")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times; default: some built-in ones")
    p.add_argument("--max-new-tokens", type=int, default=160)
    p.add_argument("--temperature", type=float, default=0.4, help="0 is greedy")
    p.add_argument("--seed", type=int, default=0, help="of sampling and of random weights")
    p.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    p.add_argument("--windows", type=int, default=16, help="windows of held-out text for perplexity and logit difference")
    p.add_argument("--throughput", action="store_true", help="with --size mini on a GPU: also batches and a long prefill, in CUDA graphs")
    p.add_argument("--explain", action="store_true", help="stop after the report")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout instead of tables")
    args = p.parse_args(argv)
    if args.max_new_tokens < 1:
        p.error("--max-new-tokens must be at least 1")
    if args.temperature < 0:
        p.error("--temperature must not be negative")
    if args.windows < 1:
        p.error("--windows must be at least 1")
    if args.threads is not None and args.threads < 1:
        p.error("--threads must be at least 1")
    if args.layers != 32 and (args.size != "mini" or args.checkpoint):
        p.error("--layers goes with --size mini")
    if not 3 <= args.layers <= 32:
        p.error("--layers must be 3 to 32: the first two layers are dense")
    if args.dry_run != (args.target == "ascend" and args.device == "cpu"):
        p.error("--dry-run goes with --target ascend on the CPU, and --target ascend on the CPU is a dry run")
    if args.graph_mode != "auto" and args.device != "npu":
        p.error("--graph-mode goes with --device npu")
    if args.throughput and (args.device != "cuda" or args.size != "mini"):
        p.error("--throughput goes with --size mini --device cuda")
    if args.quantize and (args.device == "npu" or args.target == "ascend" or args.throughput):
        p.error("--quantize goes with --device cpu or cuda, and not with --target ascend or --throughput")
    if args.prompt and not all(args.prompt):
        p.error("--prompt must not be empty")
    return args


def device_of(name: str) -> torch.device:
    """Raises ExampleError, saying what is missing, when the device is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        why = "no GPU is visible" if torch.version.cuda or torch.version.hip else "this torch is built without CUDA"
        raise trinity.ExampleError(f"no CUDA device: {why}; try --device cpu")
    if name == "npu":
        try:
            import torch_npu  # noqa: F401
        except ImportError as error:
            raise trinity.ExampleError(f"no Ascend device: torch_npu cannot be imported ({error}); try --device cpu") from error
        if not torch.npu.is_available():
            raise trinity.ExampleError("no Ascend device: torch_npu is installed, but sees no NPU; try --device cpu")
    return torch.device(name)


def load(args: argparse.Namespace) -> Subject:
    device = device_of(args.device)
    tiny = args.size == "tiny" and args.checkpoint is None
    dtype = DTYPES.get(args.dtype, torch.float32 if tiny else torch.bfloat16)
    if args.checkpoint is not None:
        with stage(f"loading {args.checkpoint}"):
            model, tokenizer = trinity.load_checkpoint(args.checkpoint, device, dtype)
        return Subject(args.checkpoint.name, model, tokenizer, device, True)
    if tiny:
        return Subject("tiny", trinity.load_tiny(device, dtype), trinity.ByteTokenizer(), device, True)
    with stage(f"building Trinity-Mini's shape, {args.layers} layers, on {device}"):
        model = trinity.build_mini(device, dtype, args.layers, args.seed)
    return Subject(f"mini ({args.layers} layers, random weights)", model, trinity.ByteTokenizer(), device, False)


def lengths(subject: Subject, prompts: list[list[int]], new_tokens: int) -> tuple[int, int]:
    """(prefill length, cache length) that hold every prompt. Raises ExampleError when the model cannot go that far."""
    longest = max(map(len, prompts))
    prefill = max(256, -(-longest // BLOCK) * BLOCK)
    length = max(prefill + DECODE_TOKENS, -(-(longest + new_tokens) // BLOCK) * BLOCK)
    limit = subject.model.config.max_position_embeddings
    if length > limit:
        raise trinity.ExampleError(f"the longest prompt and the new tokens need {length} positions, the model has {limit}")
    return prefill, length


def fused_layers(report: Any) -> int:
    return sum(1 for block in report.blocks if block.validated)


def compile_fused(subject: Subject, shape: tuple[int, int], outcome: Outcome, args: argparse.Namespace) -> tuple[Session, str]:
    """A moe_fused session, warmed up, and its report as text. Fills outcome.fused and outcome.report."""
    import moe_compile

    if subject.device.type == "npu":
        with stage("laying out the expert weights"):
            moe_compile.prepare(subject.model, target="ascend")
    how = compile_args(subject, args)
    session = Session(subject.model, "moe_fused", *shape, **how)
    text = ""
    for kind in ("prefill", "decode"):
        with stage(f"moe_fused: compiling {kind}"):
            session.warm_up(kind)
        report = moe_compile.last_report()
        outcome.fused[kind] = sum(block.validated for block in report.blocks) if report else 0
        if report and not text:
            outcome.report, text = report.to_dict(), str(report)
    return session, text


def compile_args(subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """What torch.compile gets for the fused session."""
    if args.explain:  # nothing runs afterwards, so the inner compiler's work would be wasted
        return {"options": {"inner": "eager"}}
    if args.dry_run:
        return {"options": {"target": "ascend", "mode": "eager"}}
    return {"options": {"mode": args.graph_mode}} if subject.device.type == "npu" else {"mode": args.mode}


def open_sessions(
    subject: Subject, shape: tuple[int, int], fused: Session, args: argparse.Namespace, inductor: bool = True
) -> dict[str, Session]:
    """What the fused session is compared with, each warmed up, in the order of the table: Inductor, or on an NPU no overlap."""
    sessions = {"eager": Session(subject.model, "eager", *shape)}
    if subject.device.type == "npu":
        options = {"mode": args.graph_mode, "overlap_shared": False}
        sessions["moe_fused, one stream"] = Session(subject.model, "moe_fused", *shape, options=options)
    elif not args.dry_run and inductor:
        # as quantised experts are written, Inductor gets a graph for a part of each expert's work, on as many rows as it was sent
        dynamic = None if args.quantize else False
        sessions["inductor"] = Session(subject.model, "inductor", *shape, mode=args.mode, dynamic=dynamic)
    for name, session in sessions.items():
        for kind in ("prefill", "decode"):
            with stage(f"{name}: {'compiling' if name != 'eager' else 'warming up'} {kind}"):
                session.warm_up(kind)
    sessions["moe_fused"] = fused
    if subject.device.type == "cuda" and args.mode == "default":
        for name in ("moe_fused",) if args.quantize else ("inductor", "moe_fused"):  # as written, quantised experts wait for the host
            sessions[f"{name}, {GRAPHS}"] = session = sessions[name].in_graphs()
            with stage(f"{name}, {GRAPHS}: capturing decode"):
                session.warm_up("decode")
    return sessions


def in_another_order(subject: Subject, session: Session, row: Tensor) -> float:
    """Largest difference of a logit between eager and eager that runs each expert by itself: the same maths, other orders of sums."""
    reference = session.prefill(row).float()
    before = subject.model.config._experts_implementation
    try:
        subject.model.config._experts_implementation = "eager"
        return (session.prefill(row).float() - reference).abs().max().item()
    finally:
        subject.model.config._experts_implementation = before


def held_out(subject: Subject, context: int, count: int) -> Tensor:
    """[windows, context + 1] tokens of text the tiny model was never trained on."""
    ids = subject.encode(bytes(trinity.corpus()[1].tolist()).decode())
    count = min(count, (len(ids) - 1) // context)
    if not count:
        raise trinity.ExampleError(f"the held-out text has {len(ids)} tokens under this tokenizer, not one window of {context}")
    rows = [ids[i * context : (i + 1) * context + 1] for i in range(count)]
    return torch.tensor(rows, device=subject.device)


def compare(sessions: dict[str, Session], windows: Tensor, results: dict[str, Result]) -> None:
    """Perplexity of every session, and its largest logit difference from eager, in prefill and token by token."""
    nats = dict.fromkeys(sessions, 0.0)
    for row in windows:
        reference = None
        for name, session in sessions.items():
            if results[name].mode == GRAPHS:
                continue  # the prefill is the default mode's
            logits = session.prefill(row[:-1]).float()
            nats[name] += torch.nn.functional.cross_entropy(logits, row[1:]).item() / len(windows)
            reference = logits if reference is None else reference
            results[name].prefill_difference = max(results[name].prefill_difference, (logits - reference).abs().max().item())
    reference = None
    for name, session in sessions.items():
        logits = session.teacher_forced(windows[0], start=32, tokens=32).float()
        reference = logits if reference is None else reference
        results[name].decode_difference = (logits - reference).abs().max().item()
        if results[name].mode != GRAPHS:
            results[name].perplexity = float(torch.tensor(nats[name]).exp())


def time_all(sessions: dict[str, Session], prompt: list[int], results: dict[str, Result]) -> None:
    """Median tokens a second over a few rounds, the sessions taking turns, so that a busy machine slows all of them alike."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    tokens: dict[str, list[int]] = {}
    for _ in range(REPEATS):
        for name, session in sessions.items():
            tokens[name], prefill, decode = session.generate(prompt, DECODE_TOKENS)
            seconds[name].append((prefill, decode))
    for name, result in results.items():
        result.prefill_tokens_per_second = len(prompt) / statistics.median(s[0] for s in seconds[name])
        result.decode_tokens_per_second = (DECODE_TOKENS - 1) / statistics.median(s[1] for s in seconds[name])
        result.same_greedy_tokens = tokens[name] == tokens["eager"]
        result.first_calls_seconds = sessions[name].first_calls_seconds


def measure(
    subject: Subject, shape: tuple[int, int], fused: Session, outcome: Outcome, args: argparse.Namespace, inductor: bool = True
) -> list[Result]:
    """A result for eager, Inductor and moe_fused. Fills outcome.order_difference, once."""
    sessions = open_sessions(subject, shape, fused, args, inductor)
    windows = held_out(subject, shape[0], args.windows)
    results = {name: Result(*name.split(", ") if GRAPHS in name else [name]) for name in sessions}
    if not subject.trained and not outcome.order_difference:
        with stage("comparing eager with eager in another order"):
            outcome.order_difference = in_another_order(subject, sessions["eager"], windows[0, :-1])
    with stage("comparing logits and perplexity on held-out text"):
        compare(sessions, windows, results)
    if args.dry_run:  # emulated ops: their speed means nothing
        return list(results.values())
    with stage("timing"):
        time_all(sessions, windows[0, :-1].tolist(), results)
    return list(results.values())


def in_few_bits(subject: Subject, shape: tuple[int, int], outcome: Outcome, args: argparse.Namespace) -> list[Result]:
    """Quantise the subject's experts in place; what was measured of them before, eager and moe_fused, where anything is to be measured.
    One after the other, since memory may not hold both."""
    before: list[Result] = []
    if not args.explain:
        session, _ = compile_fused(subject, shape, outcome, args)
        before = measure(subject, shape, session, outcome, args, inductor=False)
        for result in before:
            result.weights = outcome.dtype
        del session
        torch._dynamo.reset()
        gc.collect()
    with stage(f"quantising the experts: {args.quantize}"):
        quantise(subject.model, args.quantize)
    if subject.device.type == "cuda":
        torch.cuda.empty_cache()
    return before


def generate(subject: Subject, session: Session, prompts: list[str], args: argparse.Namespace) -> list[dict[str, str]]:
    """One text for each prompt, cut at the end-of-text token if the model has one."""
    ends = subject.model.config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    texts = []
    for i, prompt in enumerate(prompts):
        with stage(f"generating {i + 1} of {len(prompts)}"):
            ids, _, _ = session.generate(subject.encode(prompt), args.max_new_tokens, Sampling(args.temperature, args.seed + i))
        end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
        texts.append({"prompt": prompt, "text": subject.decode(ids[:end])})
    return texts


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
        "Δ: largest difference of a logit from eager's with the same weights, on held-out text. Tokens a second: one sequence, median of", REPEATS, "rounds."
    )
    if any(r.mode == GRAPHS for r in outcome.results):
        out.print(f'{GRAPHS}: the compiled decoding step captured and replayed, as the mode "reduce-overhead" does after compiling anew.')
    if outcome.order_difference:
        out.print(
            f"The weights are random, so rounding alone moves logits far: eager that runs each expert by itself, the same maths in another "
            f"order, differs from eager by {outcome.order_difference:.1e}."
        )
        return
    other = [" ".join(filter(None, (r.backend, r.weights))) for r in outcome.results if not r.same_greedy_tokens]
    out.print("Greedy text:", f"differs from eager's under {', '.join(other)}" if other else "the same under all.")


@contextlib.contextmanager
def lowered_calls(args: argparse.Namespace, out: Console) -> Iterator[None]:
    """Print the npu calls of the first MoE layer of what is compiled inside, on a dry run."""
    if not args.dry_run:
        yield
        return
    from moe_compile.lowering.ascend import dry_run

    with dry_run.collect() as found:
        yield
    for graph in found.lowered[:1]:
        out.print("npu calls of one MoE layer:\n\n" + dry_run.calls_text(graph.module.graph, blocks=1) + "\n", markup=False, soft_wrap=True)


def show_ge(out: Console, subject: Subject) -> None:
    """The GE nodes of one MoE layer, where torch_npu can be imported."""
    from moe_compile.lowering.ascend import dry_run, schemas
    from moe_compile.options import Options

    if not schemas.wheel():
        out.print("GE nodes: torch_npu cannot be imported here, so there are none to show.")
        return
    layer = next(layer.mlp for layer in subject.model.model.layers if layer.moe_enabled)
    weight = subject.model.lm_head.weight
    found: list[list[dry_run.GeNode]] = []
    inner = dry_run.ge_backend(Options(target="ascend"), found.append)
    with torch.no_grad():
        x = torch.zeros(1, 8, weight.shape[1], dtype=weight.dtype)
        torch.compile(layer, backend="moe_fused", options={"target": "ascend", "inner": inner})(x)
    nodes = [str(n) for n in found[0] if n.type not in ("Const", "Fill", "Cast", "Data")]
    out.print("GE nodes of one MoE layer:\n\n" + "\n".join(nodes) + "\n", markup=False, soft_wrap=True)


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


def run(args: argparse.Namespace) -> Outcome:
    """The whole example. Raises ExampleError for what the person at the terminal can put right."""
    out = Console(highlight=False, quiet=args.json)
    if not out.is_terminal:
        out.width = 120
    if args.threads:
        torch.set_num_threads(args.threads)
    subject = load(args)
    dtype = str(subject.model.lm_head.weight.dtype).removeprefix("torch.")
    outcome = Outcome(subject.name, str(subject.device), dtype, subject.moe_layers)
    prompts = args.prompt or list(PROMPTS)
    shape = lengths(subject, [subject.encode(p) for p in prompts], args.max_new_tokens)
    before = in_few_bits(subject, shape, outcome, args) if args.quantize else []
    beside = None
    if subject.device.type == "cuda" and not args.explain and not args.quantize:
        beside = compile_beside(subject.model, "inductor", shape, mode=args.mode)
    with lowered_calls(args, out):
        fused, report = compile_fused(subject, shape, outcome, args)
    out.print(report, markup=False, soft_wrap=True)
    for kind, count in outcome.fused.items():
        out.print(f"{kind} graph: {count} of {outcome.moe_layers} MoE layers fused and validated")
    if args.dry_run:
        show_ge(out, subject)
        outcome.results = measure(subject, shape, fused, outcome, args)
        show_emulated(out, outcome)
    elif not args.explain:
        if subject.trained:
            outcome.texts = generate(subject, fused, prompts, args)
            show_texts(out, outcome)
        if beside is not None:
            with stage("waiting for Inductor's graphs, compiled beside"):
                beside.join(LONGEST)
                beside.kill()
        outcome.results = before + measure(subject, shape, fused, outcome, args)
        for result in outcome.results[len(before) :]:
            result.weights = args.quantize or ""
        show_results(out, outcome)
        if args.throughput:
            del fused  # its cache and graphs
            for point in POINTS:
                with stage(f"timing {point.name}"):
                    outcome.throughput += measure_throughput(subject.model, point, ("inductor", "moe_fused"))
            show_throughput(out, outcome.throughput)
    return outcome


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # transformers asks for its library versions inside the forward; Dynamo's remark on that is not the reader's business
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    try:
        outcome = run(args)
    except trinity.ExampleError as error:
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    if args.json:
        print(json.dumps(asdict(outcome), indent=2))
    if not outcome.complete:
        err.print(f"not every MoE layer was fused and validated: {outcome.fused} of {outcome.moe_layers}", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
