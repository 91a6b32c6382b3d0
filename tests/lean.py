"""What a process that compiles much can leave: most of Python's collections, Dynamo's clock, stacks that nobody reads. No check is
touched by it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
import logging
import sys
import traceback
import types
from typing import Any

import torch


def collect_seldom() -> None:
    """What is imported stays: the collector need not look at it again and again, which is a quarter of the time of a compilation."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(300_000, 20, 50)


def time_no_guards() -> None:
    """Dynamo times the guards of each graph, on caches that it empties before: 20 ms a graph, for a number that nobody reads here."""
    from torch._dynamo import guards

    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0


def seed_without_stacks() -> None:
    """`torch.manual_seed` formats the whole stack three times, once for each kind of device that has not been started."""
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if hasattr(device, "traceback"):
            device.traceback = types.SimpleNamespace(format_stack=list)


def log_warnings_only(config: Any) -> None:
    """As pytest's `log_level = "WARNING"`: torch's records of its own tracing are not kept for the report of a failure.

    That setting changes the root's level twelve times a test, and each time all loggers forget what they are enabled for.
    """
    # pytest puts its handlers on loggers that do not propagate. On this one torch takes any for a wish to trace, and prints every graph
    logging.getLogger("torch.__trace").propagate = True
    plugin = config.pluginmanager.get_plugin("logging-plugin")
    for handler in (plugin.caplog_handler, plugin.report_handler) if plugin is not None else ():
        handler.setLevel(logging.WARNING)


def find_builtins_once() -> None:
    """Triton's interpreter looks through all that its language has at each launch, and at each call of a function of a kernel: a third of
    the time of small kernels. What is found there is the same each time; what an outer call has replaced stays as it is, as ever."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or not hasattr(interpreter, "_patch_attr"):
        return
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def builtins_of(part: Any) -> list[tuple[str, Any]]:
        return [(name, member) for name, member in inspect.getmembers(part) if is_builtin(member)]

    def patch(part: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins_of(part):
            if getattr(part, name) is member:
                interpreter._patch_attr(part, name, member, builder, scope)

    interpreter._patch_builtin = patch


def name_dtypes_once() -> None:
    """Triton's interpreter makes a table of all of numpy's dtypes for each value; by the name of the element it is one look-up."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or not hasattr(interpreter, "_get_np_dtype"):
        return
    inner, known = interpreter._get_np_dtype, {}
    pointer, block = interpreter.tl.pointer_type, interpreter.tl.block_type

    def dtype_of(of: Any) -> Any:
        element = of.element_ty if isinstance(of, block) else of
        name = "a pointer" if isinstance(element, pointer) else element.name
        if name not in known:
            known[name] = inner(of)
        return known[name]

    interpreter._get_np_dtype = dtype_of


def fake_once() -> None:
    """What torch keeps of a fake result, to make the same again for the same arguments, it tries at once: a second fake tensor for each.

    It looks whether the two are of one kind, which they are but for subclasses that no test has under a fake mode's cache. And each fake
    mode formats the stack that made it, for a message about two of them at once.
    """
    from torch._subclasses import fake_tensor

    mode = fake_tensor.FakeTensorMode
    if hasattr(mode, "_get_output_info_for_cache_entry") and hasattr(mode, "_output_from_cache_entry"):
        inner = mode._get_output_info_for_cache_entry

        def untried(self: Any, state: Any, key: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
            self._output_from_cache_entry = lambda *_: output
            try:
                return inner(self, state, key, func, args, kwargs, output)
            finally:
                del self._output_from_cache_entry

        mode._get_output_info_for_cache_entry = untried
    if hasattr(fake_tensor, "traceback"):
        fake_tensor.traceback = types.SimpleNamespace(**vars(traceback) | {"extract_stack": traceback.StackSummary})


def trace_without_modules() -> None:
    """`make_fx` replaces `Module.__call__` and `__getattr__` by functions that do the same, and back: torch goes through each class of
    modules that is loaded, four times a trace."""
    from torch.fx import _symbolic_trace as symbolic
    from torch.fx.experimental.proxy_tensor import PythonKeyTracer

    if not hasattr(symbolic, "_Patcher"):
        return
    inner = symbolic._Patcher.patch_method

    def patch_method(self: Any, cls: type, name: str, new_fn: Any, deduplicate: bool = True) -> None:
        free = zip(new_fn.__code__.co_freevars, new_fn.__closure__ or (), strict=True)
        if cls is torch.nn.Module and any(v == "self" and type(c.cell_contents) is PythonKeyTracer for v, c in free):
            return
        inner(self, cls, name, new_fn, deduplicate)

    symbolic._Patcher.patch_method = patch_method


def sleep_longer() -> None:
    """Threads that are started from here on may sleep 2 ms more than they ask for, where the system is Linux (prctl's PR_SET_TIMERSLACK).

    torch_npu has one that polls an empty queue every 2 us. With the 50 us that Linux adds by itself, that is 15 % of the processor time.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(29, ctypes.c_ulong(2_000_000), 0, 0, 0)
