"""``python -m moe_compile tune``: measure the tiles of a problem on this machine's card and keep the best in the user's cache."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .lowering.triton import tune
from .lowering.triton.tune import Choice, Problem, Tile

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
_SIZES = ("experts", "hidden", "intermediate", "k")
Row = tuple[int, Choice, float]  # tokens, choice, microseconds of the routed experts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="TYPE", help="take the sizes of a transformers model type's default configuration")
    for name, text in zip(_SIZES, ("number of experts", "hidden size", "an expert's intermediate size", "experts a token"), strict=True):
        parser.add_argument(f"--{name}", type=_positive, metavar="N", help=f"{text} (overrides the model's)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of tokens and weights (default: %(default)s)")
    parser.add_argument("--tokens", type=_positive, nargs="+", default=list(TOKENS), metavar="T", help="token counts to measure at")
    parser.add_argument("--ungated", action="store_true", help="experts of two matrices, without a gate")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(args: argparse.Namespace) -> int:
    """Measure, store, print. Raises ValueError (missing sizes, no card, no triton) and ImportError with what to do."""
    problem = problem_of(args)
    reason = _missing()
    if reason is not None:
        raise ValueError(f"tune measures on a CUDA device: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    rows = list(measured(problem, sorted(set(args.tokens))))
    if not rows:
        raise ValueError("nothing was measured: no token count fits this card's memory")
    path = tune.remember(tune.card(device), problem, {tokens: choice for tokens, choice, _ in rows})
    if args.json:
        print(json.dumps(told(problem, rows), indent=2))
        return 0
    print(table(problem, rows, torch.cuda.get_device_name(device)))
    print(f"kept in {path}")
    return 0


def problem_of(args: argparse.Namespace) -> Problem:
    """Sizes of the model type, overridden by those given. Raises ValueError naming what is missing."""
    sizes: dict[str, int] = {}
    if args.model:
        from .tiny import moe_sizes

        sizes |= moe_sizes(args.model)
    sizes |= {name: given for name in _SIZES if (given := getattr(args, name)) is not None}
    missing = [f"--{name}" for name in _SIZES if name not in sizes]
    if missing:
        hint = f"the configuration of {args.model!r} does not say" if args.model else "give --model TYPE, or"
        raise ValueError(f"{hint} {' '.join(missing)}")
    if sizes["k"] > sizes["experts"]:
        raise ValueError(f"{sizes['k']} of {sizes['experts']} experts a token cannot be chosen")
    return Problem(sizes["experts"], sizes["hidden"], sizes["intermediate"], sizes["k"], DTYPES[args.dtype], not args.ungated)


def measured(problem: Problem, tokens: Sequence[int]) -> Iterator[Row]:
    """The best choice at each number of tokens; one that does not fit the memory is skipped, and said so."""
    from .lowering.triton import tuner

    with _progress(len(tokens)) as step:
        weights = None
        for t in tokens:
            step(f"{t} token{'s' if t > 1 else ''}")
            try:
                weights = weights or tuner.random_weights(problem)
                inputs = tuner.prepare(problem, t, weights)
                choice, _ = tuner.measure(inputs, t)
                us = tuner.microseconds(tuner.whole_calls(inputs, choice))
            except torch.cuda.OutOfMemoryError:
                print(f"{t} tokens do not fit the card's memory: skipped", file=sys.stderr)
                continue
            yield t, choice, us


def told(problem: Problem, rows: Sequence[Row]) -> dict[str, Any]:
    by_tokens = {str(t): {"microseconds": round(us, 1), "choice": describe(c)} for t, c, us in rows}
    return {"problem": problem.key, "tokens": by_tokens}


def table(problem: Problem, rows: Sequence[Row], card: str) -> str:
    cells = [("tokens", "µs", "up", "down"), *((str(t), f"{us:.1f}", *describe(c)) for t, c, us in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = ["  ".join([row[0].rjust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]), row[3]]).rstrip() for row in cells]
    return "\n".join([f"{problem.key} on {card}", *lines])


def describe(choice: Choice) -> tuple[str, str]:
    """Both projections' tiles: rows x columns x depth, warps and stages, what else is switched on."""
    if choice.decode is not None:
        up, down = (f"few tokens {v.bn}x{v.bk}, {v.warps} warps" for v in choice.decode)
        return up, down
    return _tile(choice.up), _tile(choice.down)


def _tile(t: Tile) -> str:
    extra = [name for name in ("hopper", "tma") if getattr(t, name)][:1]
    extra += [f"group {t.group}"] if t.group != 1 else []
    extra += [f"split {t.split}"] if t.split != 1 else []
    return ", ".join([f"{t.bm}x{t.bn}x{t.bk}", f"{t.warps} warps", f"{t.stages} stages", *extra])


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if torch.cuda.is_available() else "torch finds none here"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr where rich is installed, else a line a step. Call the result with what begins."""
    if importlib.util.find_spec("rich") is None:
        yield lambda text: print(f"measuring {text}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        begun = 0

        def step(text: str) -> None:
            nonlocal begun
            bar.update(task, description=f"measuring {text}", completed=begun)
            begun += 1

        yield step
