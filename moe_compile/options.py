"""The backend's options: checked once, then plain data."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import OptionError

TARGETS = ("auto", "cpu", "cuda", "ascend")
ASCEND_MODES = ("auto", "ge", "npugraph_ex", "eager")
BACKEND_NAME = "moe_fused"


@dataclass(frozen=True)
class Options:
    """What a user may pass as `options=` of `torch.compile(model, backend="moe_fused")`.

    target: which lowering takes the fused ops; "auto" follows the device of the graph's tensors.
    inner: the compiler of everything else: "auto" (Inductor; on Ascend `mode`), the name of any Dynamo backend, or a callable.
    inner_options: handed to `inner` as its own options.
    validate: run every recovered block against its own subgraph before it replaces it.
    strict: raise `NotFused` where a block is left as written.
    overlap_shared: run the shared expert on a side stream ("auto": on Ascend, and on CUDA for few tokens).
    mode: on Ascend, which graph mode: "ge", "npugraph_ex", "eager" ("auto": npugraph_ex where the wheel has it, else ge; training: eager).
    quantize: on Ascend, "w8a8": experts in int8 with dynamic scales (inference); "w8a8c8": activations clipped besides, where the custom
        op for it is registered, ("w8a8c8", alpha) each row to ±alpha · max (0 < alpha <= 1; alone: 1, no clipping).
    weight_format: on Ascend, "nz": packed expert weights in the fractal format, in training cast where they are used; "nd": as they are.
    combine: on Ascend, the op that sums the experts' rows at inference: "finalize" (npu_moe_finalize_routing, in fp32, shared expert
        inside) or "unpermute" (npu_moe_token_unpermute, what training uses; not with mode "ge"), to tell one from the other.
    core_limit: on Ascend, (cube cores, vector cores) that the side stream of the shared expert may use.
    """

    target: str = "auto"
    inner: str | Callable[..., Any] = "auto"
    inner_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    validate: bool = True
    strict: bool = False
    overlap_shared: bool | str = "auto"
    mode: str = "auto"
    quantize: str | tuple[str, float] | None = None
    weight_format: str = "nd"
    combine: str = "finalize"
    core_limit: tuple[int, int] | None = None

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
                raise OptionError(f"options must be a dict, got {type(given).__name__}; valid options: {_names()}")
            for key in given or {}:
                _check_known(key)
            options = cls(**(given or {}))
        _check_values(options)
        _check_inner(options, mode)
        return options

    def with_(self, **changes: Any) -> Options:
        """A copy with some values changed."""
        return replace(self, **changes)


def _names() -> str:
    return ", ".join(f.name for f in fields(Options))


def _check_known(key: Any) -> None:
    names = [f.name for f in fields(Options)]
    if key in names:
        return
    hint = ""
    if isinstance(key, str):
        close = difflib.get_close_matches(key, names, 1)
        if close:
            hint = f"; did you mean {close[0]!r}?"
        elif _is_inductor_option(key):
            hint = f"; it is one of Inductor's: pass it as inner_options={{{key!r}: ...}}"
    raise OptionError(f"unknown option {key!r} for backend {BACKEND_NAME!r}; valid options: {_names()}{hint}")


def _is_inductor_option(key: str) -> bool:
    return key.replace("-", "_") in _inductor_options()


def _inductor_options() -> list[str]:
    from torch._inductor import config

    return list(config.get_config_copy())


def _check_values(options: Options) -> None:
    _one_of("target", options.target, TARGETS)
    _one_of("validate", options.validate, (True, False))
    _one_of("strict", options.strict, (True, False))
    _one_of("overlap_shared", options.overlap_shared, ("auto", True, False))
    _one_of("mode", options.mode, ASCEND_MODES)
    _check_quantize(options.quantize)
    _one_of("weight_format", options.weight_format, ("nd", "nz"))
    _one_of("combine", options.combine, ("finalize", "unpermute"))
    _check_core_limit(options.core_limit)
    if not isinstance(options.inner_options, Mapping):
        raise OptionError(f"option 'inner_options' must be a dict, got {type(options.inner_options).__name__}")


def _check_quantize(quantize: Any) -> None:
    if isinstance(quantize, (tuple, list)):
        alpha = quantize[1] if len(quantize) == 2 and quantize[0] == "w8a8c8" else None
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= 1:
            raise OptionError(f"option 'quantize' is {quantize!r}; allowed: ('w8a8c8', alpha) with 0 < alpha <= 1")
        return
    _one_of("quantize", quantize, (None, "w8a8", "w8a8c8"))


def _check_core_limit(limit: Any) -> None:
    pair = isinstance(limit, (tuple, list)) and len(limit) == 2 and all(type(n) is int and n > 0 for n in limit)
    if limit is not None and not pair:
        raise OptionError(f"option 'core_limit' is {limit!r}; allowed: None or (cube cores, vector cores), two positive integers")


def _one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    # `is`-like comparison: 1 == True, but `validate=1` is more likely a mistake than a wish
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise OptionError(f"option {name!r} is {value!r}; allowed: {', '.join(repr(a) for a in allowed)}")


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


def _check_inductor(options: Options, mode: str | None) -> None:
    if not options.inner_options and mode in (None, "default"):
        return
    if options.inner == "auto" and options.target == "ascend":
        return
    unknown = [key for key in options.inner_options if not (isinstance(key, str) and _is_inductor_option(key))]
    if unknown:
        hint = difflib.get_close_matches(str(unknown[0]), _inductor_options(), 3)
        close = f"; close ones: {', '.join(hint)}" if hint else ""
        known = "none of Inductor's (torch._inductor.list_options())"
        raise OptionError(f"option 'inner_options' holds {unknown[0]!r}, which is {known}{close}")
    from .inner import inductor

    try:
        inductor(options.inner_options, mode)
    except RuntimeError as e:  # Inductor's own message names the value and what it takes
        what = "option 'inner_options'" if mode in (None, "default") else f"mode={mode!r} or option 'inner_options'"
        raise OptionError(f"{what} is not valid for Inductor: {e}") from None
