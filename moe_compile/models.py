"""The model that a command line names: a transformers type, a configuration on disk, or a class in a file of the user's."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import inspect
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from . import lowering, passes
from .errors import NotFused, OptionError
from .tiny import TOKENS, NoSuchModel, build, build_full, field, model_of

WHAT = "a transformers type (qwen3_moe), a config.json, the folder or cached hub id of a checkpoint, or FILE.py:NAME with --shape"


class _One(argparse.Action):
    """A model may be named in two ways, and once."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest, ""):
            parser.error(f"two models: {getattr(namespace, self.dest)} and {values}")
        setattr(namespace, self.dest, values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load` reads."""
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, action=_One, metavar="MODEL", help=WHAT)
    parser.add_argument("--model", default="", action=_One, metavar="MODEL", help="the same")
    parser.add_argument("--full", action="store_true", help="at its true size: nothing is computed, all tensors are on the meta device")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of a configuration, an argument of a class"
    )
    parser.add_argument("--shape", action="append", default=[], metavar="N,N,..", help="of FILE.py:NAME: of each input, such as 32,64")
    parser.add_argument("--experts", metavar="NAME", help="transformers' experts implementation: eager, batched_mm or grouped_mm")


def load(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model and keyword arguments for one call of it.

    A configuration is built at its true size, on the meta device; a type small, with random weights, unless `--full` is given.
    Raises ImportError without transformers where it is needed, and ValueError that names what was given and what is allowed.
    """
    if not args.model:
        raise ValueError(f"no model was named; MODEL or --model takes {WHAT}")
    path, colon, name = args.model.rpartition(":")
    if not colon and name.endswith(".py"):
        path, name = name, ""
    if path.endswith(".py"):
        if args.experts:
            raise ValueError("--experts goes with models of transformers, FILE.py:NAME has its own")
        model, inputs = _of_file(Path(path), name, args.set, args.shape, args.full)
    elif args.shape:
        raise ValueError("--shape goes with FILE.py:NAME: models of transformers are given token ids")
    elif (config := _config_file(args.model)) is not None:
        model, inputs = _of_config(config, args.set)
    elif args.set and not args.full:
        raise ValueError("--set goes with --full, a config.json or FILE.py:NAME: a small model has sizes of its own")
    else:
        model, inputs = _of_type(args.model, args.full, args.set)
    if args.experts:
        model.set_experts_implementation(args.experts)
    return model, inputs


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """A model is called: what it raises itself is an error of usage, told with the last line that is not torch's or ours.

    What fails in this package, or in the compiler behind it, is no affair of the model's: RuntimeError, which no command takes for an
    error of usage, with both tracebacks.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # pages of it, beside what it raises
    try:
        yield
    except (NotFused, OptionError):
        raise
    except Exception as e:
        if _is_ours(e):
            raise RuntimeError(
                f"{name} could not be compiled, by a fault of the compiler's and none of the model's: please report this"
            ) from e
        own = [f for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith(_not_own())]
        at = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
        cause = re.search(r"got (\w+\(.*\))$", without_hints(e), re.M)  # what Dynamo met while it ran the model on shapes
        said = cause[1] if cause else without_hints(e).partition("\n\n")[0]
        raise ValueError(f"{name} raises {type(e).__name__}{at}: {said}") from e


def _is_ours(e: BaseException) -> bool:
    """Whether an error comes from where a graph is compiled, or was raised by a line of this package."""
    seen: list[BaseException] = []
    while e not in seen:
        seen.append(e)
        e = e.__cause__ or e
    last = traceback.extract_tb(e.__traceback__)[-1:]
    ours = tuple(f for f in _not_own() if not f.startswith((str(Path(torch.__file__).parent), str(contextlib.__file__))))
    return any(isinstance(x, BackendCompilerFailed) for x in seen) or any(f.filename.startswith(ours) for f in last)


def _not_own() -> tuple[str, ...]:
    """Where code lies that is not the user's. (A checkout of this package, or a folder called torch, may well hold some.)"""
    packages = [Path(__file__).parent, Path(torch.__file__).parent, *map(Path, [*passes.__path__, *lowering.__path__])]
    return (str(contextlib.__file__), *(f"{folder}{os.sep}" for folder in packages))


def without_hints(e: BaseException) -> str:
    """What an exception says, without the hints that Dynamo appends to whatever passes through it."""
    return str(e).split("\n\nSet TORCHDYNAMO_VERBOSE")[0].strip()


def check_file(path: Path | None, option: str, kinds: Sequence[str] = ()) -> None:
    """Raise ValueError where nothing can be written to the path that an option gives, before anything is computed."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder")
    if kinds and path.suffix not in kinds:
        raise ValueError(f"{option}: {path} must end with {' or '.join(kinds)}")


def _of_type(name: str, full: bool, fields: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    if "/" in name or "\\" in name or name.endswith(".json"):
        raise NoSuchModel(f"there is no {name!r} here, and nothing is downloaded: MODEL takes {WHAT}")
    return build_full(name, fields) if full else build(name)


# ---- a configuration on disk -----------------------------------------------------------------------------------------------


def _config_file(name: str) -> Path | None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NoSuchModel(f"the folder {name} holds no config.json")
        return path / "config.json"
    if path.is_file():
        return path if path.suffix == ".json" else None
    return _cached(name) if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _cached(hub_id: str) -> Path | None:
    """config.json of a checkpoint that was downloaded once."""
    with contextlib.suppress(ImportError):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(hub_id, "config.json")
        return Path(found) if isinstance(found, str) else None
    return None


def _of_config(path: Path, fields: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a configuration at its true size, on the meta device."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise NoSuchModel(f"{path} is no JSON: {e}") from None
    if not isinstance(given, dict) or not isinstance(given.get("model_type"), str):
        raise NoSuchModel(f"{path} has no model_type")
    given |= dict(map(field, fields))
    model = model_of(given.pop("model_type"), given, torch.device("meta"))
    return model, {"input_ids": torch.zeros(1, TOKENS, dtype=torch.int64, device="meta"), "use_cache": False}


# ---- a class or function in a file -----------------------------------------------------------------------------------------


def _of_file(path: Path, name: str, fields: Sequence[str], shapes: Sequence[str], full: bool) -> tuple[Any, dict[str, Any]]:
    """An instance of a class (or what a function without arguments returns), and random inputs by the names of its forward's arguments."""
    if not path.is_file():
        raise NoSuchModel(f"there is no file {path}")
    maker = _named(_imported(path), name, path)
    device = torch.device("meta" if full else "cpu")
    torch.manual_seed(0)
    try:
        with device:
            model = maker(**dict(map(field, fields)))
    except Exception as e:
        raise ValueError(f"{name}{inspect.signature(maker)} cannot be made of {_words(fields)}: {e}{_at(e, path)}") from e
    model = model.eval() if isinstance(model, nn.Module) else model
    call: Callable[..., Any] = model.forward if isinstance(model, nn.Module) else model
    names = list(inspect.signature(call).parameters)
    if not shapes or len(shapes) > len(names):
        raise ValueError(f"{name}'s inputs are {', '.join(names)}: give a --shape for each that is needed, in this order")
    return model, {n: torch.randn(_shape(s), device=device) for n, s in zip(names, shapes, strict=False)}


def _words(fields: Sequence[str]) -> str:
    return " ".join(f"--set {f}" for f in fields) or "nothing: --set NAME=VALUE gives an argument"


def _imported(path: Path) -> Any:
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise ValueError(f"{path} cannot be imported: {type(e).__name__}: {e}{_at(e, path)}") from e
    return module


def _at(e: BaseException, path: Path) -> str:
    """Where in a file an exception comes from: " (line 3)"; "" if it does not."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).name == path.name]
    return f" (line {frames[-1].lineno})" if frames else ""


def _named(module: Any, name: str, path: Path) -> Callable[..., Any]:
    found = getattr(module, name, None) if name else None
    if callable(found):
        return found  # type: ignore[no-any-return]
    own = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, nn.Module) and v.__module__ == module.__name__]
    close = difflib.get_close_matches(name, own, 5) or own
    if not name:
        raise NoSuchModel(f"which module of {path}? --model {path}:NAME; there are: {', '.join(own) or 'none'}")
    raise NoSuchModel(f"{path} has no {name!r}; close ones: {', '.join(close) or 'none'}")


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(n) for n in text.split(","))
        if min(sizes) >= 0:
            return sizes
        raise ValueError
    except ValueError:
        raise ValueError(f"--shape {text!r} is no list of numbers such as 32,64") from None
