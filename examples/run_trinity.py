#!/usr/bin/env python3
"""Generate text with a Trinity (AFMoE) model through torch.compile(model, backend="moe_fused"), and show what it did.

    python examples/run_trinity.py                                    # the small trained model, on the CPU
    python examples/run_trinity.py --prompt "And Jonah said"          # your own prompts
    python examples/run_trinity.py --explain                          # only what the compiler recovered
    python examples/run_trinity.py --size mini --device cuda          # Trinity-Mini's shape, random weights, 57 GB
    python examples/run_trinity.py --checkpoint DIR --device cuda     # a real checkpoint
    python examples/run_trinity.py --quantize mxfp4                   # experts in few bits, beside the same model as it is
    python examples/run_trinity.py --target ascend --dry-run          # what an NPU would run, shown and emulated on the CPU
    torchrun --nproc-per-node 2 examples/run_trinity.py --size mini --device cuda --ep 2    # its experts over two cards
    python examples/run_trinity.py --size mini --device npu           # on an NPU, with and without the shared expert beside the others

Prints a row per MoE layer, the generated text (of trained weights), the largest logit difference and the perplexity on held-out
text against eager, and tokens a second for eager, Inductor and moe_fused; on a GPU decoding also in a CUDA graph, as the mode
"reduce-overhead" runs it.
Exits with 1 when a MoE layer was not fused and validated.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import divided
import torch
import trinity
from arguments import DTYPES, parse
from ascend_calls import lowered_calls, show_ge
from console import err, stage
from decoding import Sampling, Session, compile_beside
from quantised import quantise
from results import GRAPHS, REPEATS, Outcome, Result, show_emulated, show_results, show_texts, show_throughput
from rich.console import Console
from throughput import POINTS
from throughput import measure as measure_throughput
from torch import Tensor
from transformers import AfmoeForCausalLM

PROMPTS = (
    "In the beginning ",
    "And David said unto ",
    "And the word of the LORD came unto Jonah",
    "A certain man had two ",
)
DECODE_TOKENS = 64
LONGEST = 150  # seconds that are waited for what another process compiles
BLOCK = 64  # lengths are rounded up to a multiple of this


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


def load(args: argparse.Namespace) -> Subject:
    device = trinity.device_of(args.device)
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
    subject: Subject, shape: tuple[int, int], fused: Session, outcome: Outcome, args: argparse.Namespace, weights: str = ""
) -> list[Result]:
    """A result for eager, Inductor and moe_fused; `weights`: for eager and moe_fused alone, before weights of that kind are quantised.
    Fills outcome.order_difference, once."""
    sessions = open_sessions(subject, shape, fused, args, inductor=not weights)
    windows = held_out(subject, shape[0], args.windows)
    results = {name: Result(*name.split(", ") if GRAPHS in name else [name]) for name in sessions}
    for result in results.values():
        result.weights = weights or args.quantize or ""
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
        before = measure(subject, shape, session, outcome, args, weights=outcome.dtype)
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


def time_throughput(subject: Subject, outcome: Outcome) -> None:
    """Fills outcome.throughput."""
    for point in POINTS:
        with stage(f"timing {point.name}"):
            outcome.throughput += measure_throughput(subject.model, point, ("inductor", "moe_fused"))


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
    with lowered_calls(out, args.dry_run):
        fused, report = compile_fused(subject, shape, outcome, args)
    out.print(report, markup=False, soft_wrap=True)
    for kind, count in outcome.fused.items():
        out.print(f"{kind} graph: {count} of {outcome.moe_layers} MoE layers fused and validated")
    if args.dry_run:
        show_ge(out, subject.model)
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
        show_results(out, outcome)
        if args.throughput:
            del fused  # its cache and graphs
            time_throughput(subject, outcome)
            show_throughput(out, outcome.throughput)
    return outcome


def run_divided(args: argparse.Namespace) -> int:
    """The experts over several processes (`--ep`); the first of them tells what came of it."""
    found = divided.run(args)
    if found is None:
        return 0
    if args.json:
        print(json.dumps(divided.as_json(found), indent=2))
    else:
        divided.show(Console(highlight=False), found)
    return 0 if found.complete else 1


def main(argv: list[str] | None = None) -> int:
    args = parse(argv, (__doc__ or "").split("\n\n")[0])
    # transformers asks for its library versions inside the forward; Dynamo's remark on that is not the reader's business
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    try:
        if args.ep > 1:
            return run_divided(args)
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
