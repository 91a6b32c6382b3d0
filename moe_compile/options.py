"""The backend's options: checked once, then plain data."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .errors import OptionError, one_of
from .inductor import inductor
from .lowering import target, targets

BACKEND_NAME = "moe_fused"


@dataclass(frozen=True, init=False)
class Options:
    """What a user may pass as `options=` of `torch.compile(model, backend="moe_fused")`.

    target: which lowering takes the fused ops; "auto" follows the device of the graph's tensors.
    inner: the compiler of everything else: "auto" (Inductor; on Ascend `mode`), the name of any Dynamo backend, or a callable.
    inner_options: handed to `inner` as its own options.
    validate: run every recovered block against its own subgraph before it replaces it.
    strict: raise `NotFused` where a block is left as written.
    overlap_shared: run the shared expert on a side stream ("auto": on Ascend, and on CUDA for few tokens).
    activations: what experts whose weights are in few bits do to their rows at inference: as the model does ("model"), or rounded to "fp8"
        or "int8" before each product, which is another function; the report says what it changes.
    own: target name -> the options that only this target has, where any was given. A user writes them beside the others; what Ascend has
        (mode, quantize, weight_format, combine, core_limit) is told in `moe_compile.lowering.ascend.options.AscendOptions`.
    """

    target: str = "auto"
    inner: str | Callable[..., Any] = "auto"
    inner_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    validate: bool = True
    strict: bool = False
    overlap_shared: bool | str = "auto"
    activations: str = "model"
    own: Mapping[str, Any] = field(init=False, hash=False)

    def __init__(self, **given: Any) -> None:
        """Any option by name, those of targets too. Raises `OptionError` on an unknown name."""
        for key in given:
            _check_known(key)
        for f in _GENERAL:
            object.__setattr__(self, f.name, given.get(f.name, {} if f.default is MISSING else f.default))
        object.__setattr__(self, "own", _own(given))

    @classmethod
    def parse(cls, given: Mapping[str, Any] | Options | None, mode: str | None = None) -> Options:
        """Check what a user gave and return it as `Options`.

        `mode` is torch.compile's: it is checked against the inner compiler here so that a wrong one is told early.
        Raises `OptionError` (a ValueError) naming the option and what is allowed.
        """
        if isinstance(given, Options):
            options = given
        else:
            if given is not None and not isinstance(given, Mapping):
                raise OptionError(f"options must be a dict, got {type(given).__name__}; valid options: {', '.join(_names())}")
            for key in given or {}:
                _check_known(key)  # a key that is no text is no keyword either
            options = cls(**(given or {}))
        _check_values(options)
        _check_inner(options, mode)
        return options

    def with_(self, **changes: Any) -> Options:
        """A copy with some values changed."""
        return Options(**{**self.by_name(), **changes})

    def by_name(self) -> dict[str, Any]:
        """All options as a user gives them."""
        own = {f.name: getattr(o, f.name) for o in self.own.values() for f in fields(o)}
        return {f.name: getattr(self, f.name) for f in _GENERAL} | own

    def of(self, name: str) -> Any:
        """The options that only target `name` has, an instance of its `Target.options`."""
        return self.own[name] if name in self.own else target(name).options()


_GENERAL = tuple(f for f in fields(Options) if f.init)


def _own(given: Mapping[str, Any]) -> dict[str, Any]:
    """Target name -> what was given of its own options. Raises OptionError on a wrong value."""
    found = {}
    for t in targets().values():
        values = {f.name: given[f.name] for f in fields(t.options) if f.name in given}
        if values:
            found[t.name] = t.options(**values)
    return found


def _names() -> list[str]:
    """Of all options, those of every target first."""
    return [*(f.name for f in _GENERAL), *dict.fromkeys(f.name for t in targets().values() for f in fields(t.options))]


def _check_known(key: Any) -> None:
    names = _names()
    if key in names:
        return
    hint = ""
    if isinstance(key, str):
        close = difflib.get_close_matches(key, names, 1)
        if close:
            hint = f"; did you mean {close[0]!r}?"
        elif _is_inductor_option(key):
            hint = f"; it is one of Inductor's: pass it as inner_options={{{key!r}: ...}}"
    raise OptionError(f"unknown option {key!r} for backend {BACKEND_NAME!r}; valid options: {', '.join(names)}{hint}")


def _is_inductor_option(key: str) -> bool:
    return key.replace("-", "_") in _inductor_options()


def _inductor_options() -> list[str]:
    from torch._inductor import config

    return list(config.get_config_copy())


def _check_values(options: Options) -> None:
    one_of("target", options.target, ("auto", *targets()))
    one_of("validate", options.validate, (True, False))
    one_of("strict", options.strict, (True, False))
    one_of("overlap_shared", options.overlap_shared, ("auto", True, False))
    one_of("activations", options.activations, ("model", "fp8", "int8"))
    if not isinstance(options.inner_options, Mapping):
        raise OptionError(f"option 'inner_options' must be a dict, got {type(options.inner_options).__name__}")


def _check_inner(options: Options, mode: str | None) -> None:
    inner = options.inner
    if callable(inner):
        if getattr(inner, "is_moe_fused", False):
            raise OptionError(f"option 'inner' cannot be {BACKEND_NAME!r} itself")
        return
    if not isinstance(inner, str):
        raise OptionError(f"option 'inner' is {inner!r}; allowed: 'auto', the name of a Dynamo backend, or a callable")
    if inner == BACKEND_NAME:
        raise OptionError(f"option 'inner' cannot be {BACKEND_NAME!r} itself")
    if inner in ("auto", "inductor"):
        _check_inductor(options, mode)
        return
    from torch._dynamo.backends.registry import list_backends

    known = list_backends(exclude_tags=())
    if inner not in known:
        raise OptionError(f"option 'inner' is {inner!r}; allowed: 'auto', a callable, or one of {', '.join(known)}")


def _taken_elsewhere(inner_options: Mapping[str, Any]) -> bool:
    """Whether a target that compiles graphs itself, whose device this machine has, takes these options."""
    for t in targets().values():
        if t.finish is None or t.missing():
            continue
        try:
            if t.check_inner is not None:
                t.check_inner(inner_options)
            return True
        except OptionError:
            pass
    return False


def _check_inductor(options: Options, mode: str | None) -> None:
    if not options.inner_options and mode in (None, "default"):
        return
    chosen = target(options.target)
    if options.inner == "auto" and chosen.finish is not None:  # inner_options and mode are the target's
        if chosen.check_inner is not None:
            chosen.check_inner(options.inner_options)
        return
    unknown = [key for key in options.inner_options if not (isinstance(key, str) and _is_inductor_option(key))]
    if unknown and options.inner == options.target == "auto" and _taken_elsewhere(options.inner_options):
        return  # where the tensors are is known when there are some
    if unknown:
        hint = difflib.get_close_matches(str(unknown[0]), _inductor_options(), 3)
        close = f"; close ones: {', '.join(hint)}" if hint else ""
        known = "none of Inductor's (torch._inductor.list_options())"
        raise OptionError(f"option 'inner_options' holds {unknown[0]!r}, which is {known}{close}")
    try:
        inductor(options.inner_options, mode)
    except RuntimeError as e:  # Inductor's own message names the value and what it takes
        what = "option 'inner_options'" if mode in (None, "default") else f"mode={mode!r} or option 'inner_options'"
        raise OptionError(f"{what} is not valid for Inductor: {e}") from None
