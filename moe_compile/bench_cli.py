"""`python -m moe_compile bench`: a model of the user's, fused against Inductor and eager, on this machine."""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import models
from .options import BACKEND_NAME
from .report import last_report

ROUNDS = 15
_SIDES = ("eager", "inductor", BACKEND_NAME)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("--sides", default=",".join(_SIDES), help="which to measure, of eager, inductor, moe_fused (default: all)")
    parser.add_argument("--inner", default="auto", help="what compiles the rest of moe_fused (default: Inductor)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of all sides in turns (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="bars as PNG or SVG (needs matplotlib)")


def main(args: argparse.Namespace) -> int:
    """Measure and print. Raises ValueError for what cannot be measured."""
    sides = args.sides.split(",")
    if unknown := [s for s in sides if s not in _SIDES]:
        raise ValueError(f"--sides has {unknown[0]!r}; allowed: {', '.join(_SIDES)}")
    if args.full:
        raise ValueError("--full computes nothing: bench needs a model with numbers in it")
    if args.rounds < 1:
        raise ValueError("--rounds must be 1 or more")
    models.check_file(args.plot, "--plot", (".png", ".svg"))
    device = _device(args.device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model, inputs = models.load(args)
        model, inputs = _placed(model, inputs, device, getattr(torch, args.dtype))
        calls = {s: _side(s, model, args.inner) for s in sides}
        with models.running(args.model):
            seconds = measure({s: lambda f=f: f(**inputs) for s, f in calls.items()}, args.device, args.rounds)  # type: ignore[misc]
    print(table(seconds))
    report = last_report(model)
    if BACKEND_NAME in sides and report is not None:
        print(f"\n{report}")
    if args.plot is not None:
        _plot(seconds, args.model, args.plot)
    return 0


def _device(name: str) -> torch.device:
    """The device of a name. Raises ValueError where torch has none such here."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError("--device meta: nothing is computed there")
    return device


def _placed(model: Any, inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    if any(isinstance(v, torch.Tensor) and v.is_meta for v in inputs.values()):
        raise ValueError("a configuration is built without numbers: bench takes a type or FILE.py:NAME")
    if isinstance(model, torch.nn.Module):
        model = model.to(device, dtype)
    return model, {
        k: v.to(device, dtype if v.is_floating_point() else v.dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }


def _side(name: str, model: Any, inner: str) -> Callable[..., Any]:
    if name == "eager":
        return model  # type: ignore[no-any-return]
    options = {"inner": inner} if name == BACKEND_NAME else None
    return torch.compile(model, backend=name, options=options)  # type: ignore[no-any-return, call-overload]


def measure(calls: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, all in turns, so that what else the machine does falls on all of them alike. Two calls of each
    come before, which compile."""
    out: dict[str, list[float]] = {s: [] for s in calls}
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for n in range(rounds + 2):
        for side, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if n >= 2:
                out[side].append(time.perf_counter() - start)
    return out


def table(seconds: dict[str, list[float]]) -> str:
    """Milliseconds a call: the median, the fastest, and how many times as fast as the first side: by the fastest calls, which others on
    the machine disturb least."""
    first = min(next(iter(seconds.values())))
    lines = [f"{'':12}{'median ms':>12}{'fastest ms':>12}{'speed-up':>10}"]
    for side, runs in seconds.items():
        mid = statistics.median(runs)
        lines.append(f"{side:12}{mid * 1e3:12.3f}{min(runs) * 1e3:12.3f}{first / min(runs):9.2f}x")
    if any(statistics.median(r) > 2 * min(r) for r in seconds.values()):
        lines.append("medians are far above the fastest: the machine was busy with something else")
    return "\n".join(lines)


def _plot(seconds: dict[str, list[float]], title: str, path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    figure, axis = plt.subplots(figsize=(6, 1.2 + 0.5 * len(seconds)))
    least = [min(r) * 1e3 for r in seconds.values()]
    more = [statistics.median(r) * 1e3 - v for r, v in zip(seconds.values(), least, strict=True)]
    bars = axis.barh(list(seconds), least, color="#1a7f4b", xerr=([0.0] * len(more), more), capsize=3)
    axis.bar_label(bars, [f"{v:.3g} ms, {least[0] / v:.2f}x" for v in least], padding=3, fontsize=8)
    axis.margins(x=0.35)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("milliseconds a call: the fastest, and up to the median")
    axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
