"""Hooks that act before Dynamo captures, so that data-dependent expert loops reach the backend whole.

Installed once, when the backend is looked up; they act only while a graph is traced for this backend, so other backends,
export, and the same model under another backend see no change. ``MOE_COMPILE_CAPTURE=0`` turns them all off, at any time.

- *Whole loops*: where Dynamo is about to inline a function that dispatches tokens in a loop (with the router outside of it or
  inside), the function is read by example (`reading`); if that is proved, Dynamo inlines the same function with one call of
  ``torch.ops.moe_compile.experts`` for the loop. Otherwise it inlines what the user wrote, and the reason is in `pending()`.
  A loop that is compiled on its own gets a frame around it, because Dynamo never inlines the frame it starts with.
- *Static loops*: ops whose output size depends on data stay in the graph (two of Dynamo's own flags); a frame that cannot be
  compiled so is compiled again without.

Both rest on private names of torch; where one is missing, its hook logs that and stays out.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import logging
import os
import textwrap
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..ir import Rejection
from . import guards
from .bench import Call, Spec, bind, roles_of
from .fingerprint import OF_CLASS, number_of_class, own_attribute
from .reading import Reading, Trial, matches, read

log = logging.getLogger("moe_compile")

# names in code that does more than compute
_ASKS = {"nonzero", "where", "item", "tolist", "numpy", "any", "unique", "bincount", "numel"}  # what an expert loop asks its ids
_EFFECTS = {"print", "breakpoint", "exec", "setattr", "delattr", "logger", "logging", "warnings", "warn"}
_COLLECTIVES = {"dist", "distributed", "all_reduce", "all_gather", "all_to_all", "all_to_all_single", "reduce_scatter", "broadcast"}
_WRITES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"}
_VIEWS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "to", "long", "detach"}  # of ids that repeat none
_INTO = {"setitem", "iadd", "isub", "imul", "ifloordiv", "imod", "iand", "ior", "ixor"}
_UNUSUAL = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

_lock = threading.RLock()
_trials: weakref.WeakKeyDictionary[types.FunctionType, list[tuple[Any, Trial]]] = weakref.WeakKeyDictionary()
_pending: list[Rejection | Reading] = []


def enabled() -> bool:
    """Whether the hooks may act: the environment variable MOE_COMPILE_CAPTURE is not 0."""
    return os.environ.get("MOE_COMPILE_CAPTURE", "1") != "0"


def install() -> None:
    """Install all hooks, once per process; they do nothing until a graph is traced for this backend."""
    for hook in (_hook_inlining, _hook_root, _hook_flags):
        try:
            hook()
        except (ImportError, AttributeError, TypeError) as e:
            log.info("capture: %s is not available with torch %s: %s", hook.__name__.removeprefix("_hook_"), torch.__version__, e)


def pending() -> list[Rejection | Reading]:
    """What came of the loops met since the last call: a `Reading` for each one captured, a `Rejection` for each one left."""
    with _lock:
        found, _pending[:] = list(_pending), []
    return found


def for_us(compiler_fn: Any) -> bool:
    """Whether what Dynamo calls with its graphs ends at this backend."""
    for _ in range(16):
        if compiler_fn is None or getattr(compiler_fn, "is_moe_fused", False):
            break
        steps = (getattr(compiler_fn, a, None) for a in ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__"))
        compiler_fn = next((s for s in steps if s is not None), None)
    return compiler_fn is not None and bool(getattr(compiler_fn, "is_moe_fused", False))


# ---- whole loops -----------------------------------------------------------------------------------------------------


def _recover(gm: torch.fx.GraphModule) -> Any:
    """The passes' answer to a recorded graph: looked up late, because the passes are only needed when a loop was found."""
    from ..passes.pipeline import recover_recorded

    return recover_recorded(gm)


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
            found = _instead(parent, func, args, kwargs) if enabled() and for_us(parent.output.compiler_fn) else None
        except Exception as e:  # whatever a look at the call meets, the call itself must go on as it would without us
            log.debug("capture: the call is left alone: %s: %s", type(e).__name__, e)
            found = None
        if found is not None:
            func, args, kwargs = *found, {}
        return original(*head, parent, func, args, kwargs, *rest, **kw)

    Inliner.inline_call = type(own)(inline_call)


@functools.cache
def _hook_root() -> None:
    """Put a frame around an expert loop that is compiled on its own: Dynamo inlines only what is called in a frame that it traces."""
    from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext

    original = _TorchDynamoContext.__call__

    @functools.wraps(original)
    def call(self: Any, fn: Any) -> Any:
        forward = getattr(getattr(fn, "forward", None), "__func__", None) if isinstance(fn, nn.Module) else fn
        code = getattr(forward, "__code__", None)
        if not enabled() or code is None or not for_us(getattr(self, "callback", None)) or not is_candidate(code) or not _asks(code):
            return original(self, fn)
        if not isinstance(fn, nn.Module):
            return original(self, functools.wraps(fn)(_frame_around(fn)))
        compiled = original(self, fn)
        if isinstance(compiled, OptimizedModule):
            compiled.forward = original(self, _frame_around(fn))
        return compiled

    _TorchDynamoContext.__call__ = call


def _frame_around(fn: Callable[..., Any]) -> Callable[..., Any]:
    def frame(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    frame.__code__ = frame.__code__.replace()  # Dynamo keeps compiled code by code object: one of its own for each function
    return frame


def _dynamo_refuses() -> type[Exception]:
    from torch._dynamo.exc import Unsupported

    return Unsupported


def _instead(parent: Any, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Any]] | None:
    """(function, arguments) to inline in place of this call, as Dynamo's variables; None to leave it alone."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None  # inside torch.func.grad or vmap no probe can be run, and what was read elsewhere is told by nobody
    fn = _function_of(func)
    if fn is None or not is_candidate(fn.__code__) or (_many_processes() and set(fn.__code__.co_names) & _COLLECTIVES):
        return None
    bound = bind(fn, args, kwargs)
    if not bound:
        return None
    owner = None
    if _module_of(next(iter(bound.values()))) is not None:
        owner = bound.pop(next(iter(bound)))
    call = _call(fn, None if owner is None else _module_of(owner), bound)
    if call is None or (roles_of(call.tensors) is None and not _may_be_block(call)):
        return None
    trial = trial_of(call)
    if not trial.about_experts:
        log.debug("capture: no expert loop: %s: %s", call.source, trial.outcome)
        return None
    with _lock:
        if not any(p is trial.outcome for p in _pending):  # layers share an outcome, and Dynamo may trace a call twice
            _pending.append(trial.outcome)
    if isinstance(trial.outcome, Rejection):
        log.info("capture: left as written: %s: %s", trial.outcome.source, trial.outcome.reason)
        return None
    reading = trial.outcome
    roles = roles_of(call.tensors)
    if reading.distinct and roles is not None and not distinct(bound[roles.ids].as_proxy().node):
        with _lock:
            _pending.append(Rejection("a token that had an expert twice would get another result", stage="read", source=call.source))
        return None
    try:
        _guard(parent, owner, reading)
        with guards.or_unguarded():
            _guard_around(parent, owner, fn, reading)
    except guards.Unguarded as e:
        with _lock:
            _pending.append(Rejection(f"it reads {e}, which nothing watches", stage="read", source=call.source))
        return None
    from torch._dynamo.variables import UserFunctionVariable

    params = [_attribute(parent, owner, p) for p in reading.params]
    return UserFunctionVariable(reading.run), [*(bound[n] for n in reading.arguments), *params]


@functools.cache
def is_candidate(code: types.CodeType) -> bool:
    """Whether code may be an expert loop: it has a loop, and does nothing that anyone outside could notice."""
    codes = list(guards.codes(code))
    names = {n for c in codes for n in c.co_names}
    if code.co_flags & _UNUSUAL or names & _EFFECTS:
        return False
    instructions = [i for c in codes for i in dis.get_instructions(c)]
    outer = {i.argval for i in instructions if i.opname == "STORE_DEREF"} & set(code.co_freevars)
    return any(i.opname == "FOR_ITER" for i in instructions) and not outer and not any(i.opname in _WRITES for i in instructions)


@functools.cache
def _asks(code: types.CodeType) -> bool:
    """Whether code asks its tensors for something that depends on data; `where(mask, a, b)` does not, `where(mask)` does."""
    asks = {n for c in guards.codes(code) for n in c.co_names} & _ASKS
    if asks != {"where"}:
        return bool(asks)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError):
        return True
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    return any(getattr(n.func, "attr", getattr(n.func, "id", "")) == "where" and len(n.args) + len(n.keywords) < 2 for n in calls)


def _many_processes() -> bool:
    d = torch.distributed
    return d.is_available() and d.is_initialized() and d.get_world_size() > 1


def _function_of(func: Any) -> types.FunctionType | None:
    if type(func).__name__ not in ("UserFunctionVariable", "UserMethodVariable"):
        return None
    fn = func.get_function()
    return fn if isinstance(fn, types.FunctionType) and not getattr(fn, "_torchdynamo_disable", False) else None


def _module_of(variable: Any) -> nn.Module | None:
    """The module behind one of Dynamo's variables."""
    variable = variable.realize()
    if not type(variable).__name__.endswith("ModuleVariable"):
        return None  # other variables may refuse even the look
    value = getattr(variable, "value", None)
    return value if isinstance(value, nn.Module) else None


def _call(fn: types.FunctionType, module: nn.Module | None, bound: dict[str, Any]) -> Call | None:
    """The call as `reading` wants it; None if an argument is neither a tensor nor a constant."""
    tensors, constants, device = {}, {}, None
    for name, variable in bound.items():
        variable = variable.realize()
        value = _example_value(variable)
        if isinstance(value, torch.Tensor):
            wide = value.shape[-1:] if value.ndim > 1 else ()  # the only dim of a list counts its rows
            rows = value.shape[: value.ndim - len(wide)]
            tensors[name] = Spec(value.dtype, (*(_size(s) for s in rows), *(_width(s) for s in wide)))
            device = device or value.device
        elif variable.is_python_constant():
            constants[name] = variable.as_python_constant()
        else:
            return None
    if device is None:
        return None
    autocast = torch.get_autocast_dtype(device.type) if device.type != "meta" and torch.is_autocast_enabled(device.type) else None
    return Call(fn, module, tensors, constants, device, autocast, torch.is_grad_enabled())


def _may_be_block(call: Call) -> bool:
    """Whether a function may be a whole MoE block: its tokens are its only tensor, and its code asks for rows that depend on data."""
    specs = list(call.tensors.values())
    if call.module is None or len(specs) != 1 or not _asks(call.fn.__code__):
        return False
    return specs[0].dtype.is_floating_point and 2 <= len(specs[0].shape) <= 3 and isinstance(specs[0].shape[-1], int)


def distinct(ids: fx.Node) -> bool:
    """Whether a row of ids repeats none: they come out of a top-k or a sort, and nothing is written into them on the way."""
    first = ids
    while (name := _called(first)) in _VIEWS or name == "getitem" and first.args[1] != 1:
        first = first.args[0]  # type: ignore[assignment]
    sources = {"argsort"}
    if _called(first) == "getitem":
        first, sources = first.args[0], {"topk", "sort"}  # type: ignore[assignment]
    if _called(first) not in sources:
        return False
    same = {first}
    for n in ids.graph.nodes:
        if n.args and isinstance(n.args[0], fx.Node) and n.args[0] in same:
            if _called(n).endswith("_") or _called(n) in _INTO or "out" in n.kwargs:
                return False
            same.add(n)
    return True


def _called(n: Any) -> str:
    """The name of what a node of Dynamo's graph calls."""
    if not isinstance(n, fx.Node) or n.op not in ("call_function", "call_method"):
        return ""
    return n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")


def _example_value(variable: Any) -> Any:
    if type(variable).__name__ != "TensorVariable":
        return None
    return variable.as_proxy().node.meta.get("example_value")


def _size(s: Any) -> Any:
    if isinstance(s, torch.SymInt):
        e = s.node.expr
        return int(e) if e.is_Integer else e
    return s


def _width(s: Any) -> Any:
    """The last dim: a number if there is any to be had, for the weights that it meets make it one anyway."""
    size = _size(s)
    if isinstance(size, int) or len(size.free_symbols) != 1 or getattr(s.node, "hint", None) is None:
        return size
    return int(s.node.hint)


def trial_of(call: Call) -> Trial:
    """The reading of a call's function, made once per function and configuration."""
    shapes = {n: (s.dtype, len(s.shape), s.shape[-1] if isinstance(s.shape[-1], int) else None) for n, s in call.tensors.items() if s.shape}
    roles = roles_of(call.tensors)
    handed_in = {n: tuple(map(str, call.tensors[n].shape)) for n in (roles.params if roles is not None else ())}  # weights as arguments
    state = (call.device.type, call.autocast, call.grad, torch.get_default_dtype())
    key = (type(call.module), shapes, handed_in, roles, dict(call.constants), state, guards.values_of_globals(call.fn, call.module))
    with _lock:
        known = _trials.setdefault(call.fn, [])
        for k, trial in known:
            if k == key and matches(trial, call.module):
                return trial
        trial = read(call, _recover)
        known.append((key, trial))
        return trial


def _guard(parent: Any, owner: Any, reading: Reading) -> None:
    """Make Dynamo guard on the attributes that the reading rests on: reading them as Dynamo's variables does."""
    module = None if owner is None else _module_of(owner)
    if module is None:
        return
    for path, name in reading.reads:
        part = module.get_submodule(path)
        value = own_attribute(part, name)
        # parameters are guarded where they are used, and modules that hold some with them
        if (
            (value is OF_CLASS and number_of_class(type(part), name) is None)
            or isinstance(value, torch.Tensor)
            or (isinstance(value, nn.Module) and next(value.parameters(), None) is not None)
        ):
            continue
        _attribute(parent, owner, f"{path}.{name}" if path else name).realize()


def _guard_around(parent: Any, owner: Any, fn: types.FunctionType, reading: Reading) -> None:
    """Guard what the function finds in globals and in its module's attributes that are neither modules nor tensors."""
    module = None if owner is None else _module_of(owner)
    guards.guard_globals(parent, fn, module)
    if module is None:
        return
    from torch._dynamo.source import AttrSource

    names = guards.names_of(fn, module)
    for path, name in reading.reads:
        value = own_attribute(module.get_submodule(path), name)
        if value is not OF_CLASS and not isinstance(value, (torch.Tensor, nn.Module)):
            part = owner.realize() if not path else _attribute(parent, owner, path).realize()
            guards.guard_value(AttrSource(part.source, name), value, names, f"{path}.{name}" if path else name)


def _attribute(parent: Any, owner: Any, path: str) -> Any:
    """The variable of ``owner.path``, with Dynamo's guards and sources."""
    from torch._dynamo.variables.builder import SourcelessBuilder

    look_up = SourcelessBuilder.create(parent, getattr)  # a variable's own method for it has another name in torch 2.14
    variable = owner
    for part in path.split("."):
        variable = look_up.call_function(parent, [variable.realize(), SourcelessBuilder.create(parent, part)], {})
    return variable


# ---- flags -----------------------------------------------------------------------------------------------------------


@functools.cache
def _hook_flags() -> None:
    """Keep ops whose output size depends on data in the graphs that are traced for this backend."""
    from torch._dynamo import convert_frame

    original: Callable[..., Any] = convert_frame._compile
    signature = inspect.signature(original)
    if "compiler_fn" not in signature.parameters:
        raise AttributeError("_compile has no compiler_fn")

    @functools.wraps(original)
    def compile_frame(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        config = torch._dynamo.config
        on_already = given.get("one_graph") or (config.capture_dynamic_output_shape_ops and config.capture_scalar_outputs)
        if on_already or not enabled() or not for_us(given.get("compiler_fn")):
            return original(*args, **kwargs)
        try:
            with config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
                return original(*args, **kwargs)
        except Exception as e:
            if not _from_data_dependence(e):
                raise
            log.info("capture: a frame is compiled again without data-dependent sizes: %s", e)
        return original(*args, **kwargs)

    convert_frame._compile = compile_frame


def _from_data_dependence(e: BaseException | None) -> bool:
    """Whether a failed compilation may have failed only because sizes that depend on data were allowed in."""
    seen = 0
    while e is not None and seen < 8:
        if type(e).__name__ in ("GuardOnDataDependentSymNode", "DataDependentOutputException", "BackendCompilerFailed"):
            return True
        if any(word in str(e) for word in ("data-dependent", "data dependent", "unbacked", "Unbacked")):
            return True
        e, seen = e.__cause__ or e.__context__, seen + 1
    return False
