"""The command line of the Trinity example."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from quantised import SCHEMES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Arguments that go together; argparse's own error, which exits with 2, where they do not."""
    p = parser(description)
    args = p.parse_args(argv)
    check_numbers(p, args)
    check_company(p, args)
    return args


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--size", choices=("tiny", "mini"), default="tiny", help="tiny: trained, shipped here; mini: Trinity-Mini's shape")
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="a local AFMoE checkpoint with its tokenizer")
    p.add_argument("--layers", type=int, default=32, help="with --size mini: fewer layers, for smaller machines")
    p.add_argument("--ep", type=int, default=1, metavar="N", help="divide the experts over N processes, under torchrun --nproc-per-node N")
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
    return p


def check_numbers(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Values by themselves."""
    if args.max_new_tokens < 1:
        p.error("--max-new-tokens must be at least 1")
    if args.temperature < 0:
        p.error("--temperature must not be negative")
    if args.windows < 1:
        p.error("--windows must be at least 1")
    if args.threads is not None and args.threads < 1:
        p.error("--threads must be at least 1")
    if args.prompt and not all(args.prompt):
        p.error("--prompt must not be empty")


def check_company(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What goes with what."""
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
    if args.ep < 1:
        p.error("--ep must be at least 1")
    if args.ep > 1 and (args.checkpoint or args.quantize or args.dry_run or args.throughput or args.device == "npu"):
        p.error("--ep goes with --size, --layers, --device cpu or cuda, --seed, --explain and --json alone")
    if args.quantize and (args.device == "npu" or args.target == "ascend" or args.throughput):
        p.error("--quantize goes with --device cpu or cuda, and not with --target ascend or --throughput")
