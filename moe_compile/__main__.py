"""What the compiler makes of a model, how each pass read it, how fast it is; the fastest tiles of a problem on this machine's GPU.

python -m moe_compile explain --model TYPE          any transformers model type, small, with random weights
python -m moe_compile explain --model FOLDER        a checkpoint's config.json, at its true size: nothing is downloaded or computed
python -m moe_compile explain --model my.py:Block --shape 32,64 [--set hidden=64]
python -m moe_compile trace --model ...             the same, pass by pass: for a model that is left as written
python -m moe_compile bench --model ...             fused against Inductor and eager, on this machine
python -m moe_compile tune --model TYPE | --experts E --hidden H --intermediate I --k K
python -m moe_compile env                           versions, devices, caches, and what each target lacks: for bug reports
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import NotFused, Options, __version__, bench_cli, environment, explain, models, trace, tune_cli
from .lowering import targets


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 (not fused with --strict), 2 (wrong usage)."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and not given[0].startswith("-") and given[0] not in _COMMANDS:
        close = difflib.get_close_matches(given[0], _COMMANDS, 3) or list(_COMMANDS)
        _parser().error(f"there is no command {given[0]!r}; close ones: {', '.join(close)}")
    args = _parser().parse_args(given)
    try:
        return _COMMANDS[args.command](args)
    except NotFused as e:
        print(models.without_hints(e), file=sys.stderr)
        return 1
    except (ImportError, ValueError, OSError) as e:
        print(f"error: {models.without_hints(e)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe_compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    tell = commands.add_parser("explain", help="compile a small random model of a type and tell what was fused")
    _add_model(tell)
    tell.add_argument("--graph", choices=("calls", "fx", "ge"), help="of --target ascend: the npu calls, the FX graph, or GE nodes")
    tell.add_argument("--strict", action="store_true", help="fail where a block is left as written")
    tell.add_argument("--json", action="store_true", help="print JSON instead of a table")
    show = commands.add_parser("trace", help="compile the same model and show what each pass made of it, and where it stopped")
    _add_model(show)
    show.add_argument("--stage", default="", metavar="PASS", help="all that one pass did; without it every pass, long texts cut")
    bench_cli.add_arguments(commands.add_parser("bench", help="measure a model here: fused, under Inductor, and eager"))
    tune_cli.add_arguments(commands.add_parser("tune", help="measure tiles on this machine's GPU and keep the best for later calls"))
    commands.add_parser("env", help="versions, devices, caches, and what each target lacks: for bug reports")
    return parser


def _env(args: argparse.Namespace) -> int:
    print(environment.describe())
    return 0


def _add_model(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("--target", choices=("auto", *targets()), default="auto", help="whose lowering to ask (default: %(default)s)")
    parser.add_argument("--no-validate", action="store_true", help="skip the numeric check of each block")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write everything into one self-contained page")


def _explain(args: argparse.Namespace) -> int:
    models.check_file(args.html, "--html")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = models.load(args)
        options = {"target": args.target, "strict": args.strict, "validate": not args.no_validate}
        with torch.no_grad(), _graphs(args, options) as graphs, models.running(args.model):
            report = explain(model, options=options, **inputs)
    if graphs is not None:
        print(graphs(), end="\n\n")
    if args.html is not None:
        args.html.write_text(report.to_html(), encoding="utf-8")
    print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if args.json else report)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from .trace_text import check_stage

    check_stage(args.stage, "--stage")
    models.check_file(args.html, "--html")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model, inputs = models.load(args)
        with models.running(args.model):
            traced = trace(model, options={"target": args.target, "validate": not args.no_validate}, **inputs)
    if args.html is not None:
        args.html.write_text(traced.to_html(), encoding="utf-8")
    print(traced.text(args.stage) if args.stage or args.html is None else f"{traced.report}\n\nthe trace is in {args.html}")
    return 0


@contextlib.contextmanager
def _graphs(args: argparse.Namespace, options: dict[str, Any]) -> Iterator[Callable[[], str] | None]:
    """What prints the graphs asked for, once they are there. Raises ValueError where the target has none to show."""
    if args.graph is None:
        yield None
        return
    if args.target != "ascend":
        raise ValueError("--graph shows what --target ascend makes of a model")
    from .lowering.ascend import dry_run

    with dry_run.collect() as found:
        if args.graph == "ge":
            options["inner"] = dry_run.ge_backend(Options.parse(options), found.ge.append)
        yield {"calls": found.calls_text, "fx": found.fx_text, "ge": found.ge_text}[args.graph]


_COMMANDS = {"explain": _explain, "trace": _trace, "bench": bench_cli.main, "tune": tune_cli.main, "env": _env}

if __name__ == "__main__":
    sys.exit(main())
