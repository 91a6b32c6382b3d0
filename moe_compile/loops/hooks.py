"""Hooks that act before Dynamo captures, so that data-dependent expert loops reach the backend whole.

Installed once, when the backend is looked up; they act only while a graph is traced for this backend, so other backends,
export, and the same model under another backend see no change. ``MOE_COMPILE_CAPTURE=0`` turns them all off, at any time.

- *Whole loops* (`capture`): one call is inlined in place of a loop. A loop that is compiled on its own gets a frame around it, because
  Dynamo never inlines the frame it starts with.
- *Static loops* (`flags`): ops whose output size depends on data stay in the graphs of frames with an expert loop; a frame that cannot be
  compiled so is compiled again without.
- *Lines* (`lines`): frames of code without a file stay in the stacks that Dynamo notes.
- *Writes*: what a model writes to a buffer stays in the graph.

All rest on private names of torch; where one is missing, its hook logs that and stays out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from . import capture, declined, flags, lines, outermost
from .looks import asks, is_candidate
from .sealed_code import is_set

log = logging.getLogger("moe_compile")

_STEPS = ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__", "backend_compile_fn")


after_frame: list[Callable[[Any], None]] = []  # called with what a frame was compiled for, once that is done
around_others: list[Callable[[], AbstractContextManager[None]]] = []  # entered while a frame is compiled for another backend


def enabled() -> bool:
    """Whether the hooks may act: the environment variable MOE_COMPILE_CAPTURE is not 0."""
    return os.environ.get("MOE_COMPILE_CAPTURE", "1") != "0"


def install() -> None:
    """Install all hooks, once per process; they do nothing until a graph is traced for this backend."""
    for hook in (_hook_inlining, _hook_start, _hook_root, _hook_flags, _hook_lines, _hook_writes):
        try:
            hook()
        except (ImportError, AttributeError, TypeError) as e:
            log.info("capture: %s is not available with torch %s: %s", hook.__name__.removeprefix("_hook_"), torch.__version__, e)


def for_us(compiler_fn: Any) -> bool:
    """Whether what Dynamo calls with its graphs ends at this backend, through whatever wraps it: DDP's optimizer is a bound method."""
    return any(getattr(c, "is_moe_fused", False) for c in _behind(compiler_fn))


def _behind(compiler_fn: Any) -> Iterator[Any]:
    """A compiler and what it wraps, and so on, up to this backend."""
    for _ in range(16):
        if compiler_fn is None:
            return
        yield compiler_fn
        if getattr(compiler_fn, "is_moe_fused", False):
            return
        steps = (getattr(c, a, None) for c in (compiler_fn, getattr(compiler_fn, "__self__", None)) for a in _STEPS)
        compiler_fn = next((s for s in steps if s is not None), None)


def asked(compiler_fn: Any) -> tuple[Any, str | None]:
    """The options and the mode that the user gave to what Dynamo calls with its graphs."""
    given: dict[str, Any] = next((c.kwargs for c in _behind(compiler_fn) if isinstance(getattr(c, "kwargs", None), dict)), {})
    return given.get("options"), given.get("mode")


@functools.cache
def _hook_inlining() -> None:
    """Let Dynamo inline a reading in place of an expert loop."""
    from torch._dynamo.symbolic_convert import InliningInstructionTranslator as Inliner

    own = Inliner.__dict__["inline_call"]
    original = own.__func__
    takes_class = isinstance(own, classmethod)

    @functools.wraps(original)
    def inline_call(*all_args: Any, **kw: Any) -> Any:
        head, (parent, func, args, kwargs, *rest) = all_args[:takes_class], all_args[takes_class:]
        try:
            found = capture.instead(parent, func, args, kwargs) if enabled() and for_us(parent.output.compiler_fn) else None
        except Exception as e:  # whatever a look at the call meets, the call itself must go on as it would without us
            log.debug("capture: the call is left alone: %s: %s", type(e).__name__, e)
            found = None
        if found is not None:
            func, args, kwargs = *found, {}
        return original(*head, parent, func, args, kwargs, *rest, **kw)

    Inliner.inline_call = type(own)(inline_call)


@functools.cache
def _hook_start() -> None:
    """Guard on what was declined in a frame at the start of each attempt at it: the later ones stop before they come to it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    original = InstructionTranslator.run

    @functools.wraps(original)
    def run(self: Any) -> Any:
        try:
            if enabled() and for_us(self.output.compiler_fn):
                declined.again(self)
        except Exception as e:
            log.debug("capture: no guards on what was declined: %s: %s", type(e).__name__, e)
        return original(self)

    InstructionTranslator.run = run  # type: ignore[method-assign]


@functools.cache
def _hook_root() -> None:
    """Put a frame around an expert loop that is compiled on its own: Dynamo inlines only what is called in a frame that it traces."""
    from torch._dynamo.eval_frame import _TorchDynamoContext, innermost_fn

    original = _TorchDynamoContext.__call__

    @functools.wraps(original)
    def call(self: Any, given: Any) -> Any:
        fn = innermost_fn(given)  # what is compiled already is compiled anew, without the frame that it had
        forward, module = _forward_of(fn)
        if isinstance(fn, nn.Module) or not isinstance(forward, types.FunctionType):
            return original(self, given)  # of a module torch compiles `__call__`, which comes here next
        if not enabled() or not for_us(getattr(self, "callback", None)):
            return original(self, given)
        if not (is_candidate(forward.__code__) and asks(forward.__code__) or forward.__code__ in flags.whole_blocks([module])):
            return original(self, given)
        return original(self, functools.wraps(fn)(_frame_around(fn, forward)))

    _TorchDynamoContext.__call__ = call


def _forward_of(fn: Any) -> tuple[Any, Any]:
    """The user's function that would be the first frame, and whose it is: the forward of a module whose call is compiled, or a method
    that is compiled by itself."""
    owner = getattr(fn, "__self__", None)
    if not isinstance(owner, nn.Module):
        return fn, fn
    if fn.__func__ in (nn.Module._call_impl, nn.Module._wrapped_call_impl):
        return getattr(owner.forward, "__func__", None), owner
    ours = not getattr(fn, "__module__", "").startswith("torch.")  # torch's own frames are not traced
    return (fn.__func__, owner) if ours else (fn, fn)


def _frame_around(self: Callable[..., Any], code: types.FunctionType) -> Callable[..., Any]:
    """A frame that calls `self`: that is what reasons call the model. It stands where its `code` does, and has its globals: Dynamo looks
    those of all other frames up by the name of their module, which a class shipped by value need not have here."""

    def frame(*args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    # Dynamo keeps compiled code by code object: one of its own for each function
    at = code.__code__
    own = frame.__code__.replace(co_filename=at.co_filename, co_firstlineno=at.co_firstlineno, co_name=at.co_name)
    new = types.FunctionType(own, code.__globals__, at.co_name, None, frame.__closure__)
    new.moe_compile_calls = self  # type: ignore[attr-defined]
    return new


@functools.cache
def _hook_flags() -> None:
    """Keep ops whose output size depends on data in the graphs of frames with an expert loop."""
    from torch._dynamo import convert_frame

    original: Callable[..., Any] = convert_frame._compile
    signature = _with_compiler(original)

    @functools.wraps(original)
    def compile_frame(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        if not enabled() or not for_us(given.get("compiler_fn")):
            with _around(given.get("compiler_fn")):
                return original(*args, **kwargs)
        capture.met(given["code"], given.get("globals") or {}, _values(given))
        try:
            with lines.kept(), declined.frame(given["code"]):
                way = original if _on_already(given) or not _wants(given) else functools.partial(retried, given)
                return outermost.in_versions(original, signature, given, lambda: way(*args, **kwargs))
        except Exception as e:
            lines.given_up(given["code"], e)
            raise
        finally:
            for f in after_frame:
                f(given["compiler_fn"])

    def retried(given: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        outer = functools.cache(lambda: flags.whole_blocks(_values(given)))
        for last in (False, True):
            try:
                with flags.on(outer, last) as tried:
                    return original(*args, **kwargs)
            except Exception as e:
                if not flags.from_data_dependence(e):
                    raise
                log.info("capture: a frame is compiled again: %s", e)
            if not outer() - tried.for_good():
                break
        return original(*args, **kwargs)

    convert_frame._compile = compile_frame


def _with_compiler(compile_frame: Callable[..., Any]) -> inspect.Signature:
    """The signature of what compiles a frame. Raises AttributeError where it does not say for whom."""
    signature = inspect.signature(compile_frame)
    if "compiler_fn" not in signature.parameters:
        raise AttributeError("_compile has no compiler_fn")
    return signature


def _around(compiler_fn: Any) -> contextlib.ExitStack:
    """What stands around the compilation of a frame for another backend."""
    stack = contextlib.ExitStack()
    for around in () if for_us(compiler_fn) else around_others:
        stack.enter_context(around())
    return stack


@functools.cache
def _hook_lines() -> None:
    lines.install()


@functools.cache
def _hook_writes() -> None:
    """Keep writes to float64 scalars on the CPU: a counter of tokens, a running maximum.

    Where AOT autograd has found a Python float to be a constant, Dynamo traces the frame again and takes the graph's input for it out.
    It knows the input by its value, which an in-place operation returns too, and took ``count.add_(n)`` out where nothing reads the
    result: the buffer kept its old value. Only inputs may go.
    """
    from torch._dynamo.output_graph import OutputGraph

    original = OutputGraph.remove_tensorify_specialized_graphargs

    @functools.wraps(original)
    def remove(self: Any) -> None:
        if not enabled() or not for_us(self.compiler_fn):
            return original(self)
        made = {n: n.meta.pop("example_value") for n in self.graph.nodes if n.op != "placeholder" and "example_value" in n.meta}
        try:
            original(self)
        finally:
            for n, value in made.items():
                n.meta["example_value"] = value

    OutputGraph.remove_tensorify_specialized_graphargs = remove


def _on_already(given: Mapping[str, Any]) -> bool:
    config = torch._dynamo.config
    return bool(given.get("one_graph") or (config.capture_dynamic_output_shape_ops and config.capture_scalar_outputs))


def _wants(given: Mapping[str, Any]) -> bool:
    return flags.wanted(given["code"], given.get("globals") or {}, _values(given))


def _values(given: Mapping[str, Any]) -> list[Any]:
    """What a frame has in its locals and its closure."""
    return [*(given.get("locals") or {}).values(), *(c.cell_contents for c in given.get("closure") or () if is_set(c))]
