"""Read a data-dependent function by example: run it once on probes that hit every expert and write down what it did.

The function is the user's, as it stands: `.item()`, `.tolist()`, `.numpy()` and iteration over `nonzero()` return the probes'
real values, so its loops unroll into a straight list of pre-dispatch ATen ops, the vocabulary of the shadow. Nothing is
rewritten and nothing of the user's is touched: it runs on a copy of the module whose parameters are probes.
What the list means is for the passes to say; whether it holds for other routings is for the caller to try.
"""

from __future__ import annotations

import contextlib
import operator
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from moe_compile.ir import Rejection

from ..passes.aten.conditions import no_saving_hooks
from ..passes.aten.element import call_args
from .probe import Probe
from .selections import name_selections

_READS = ("aten::item", "aten::_local_scalar_dense")
_NO_END = (1 << 63) - 1
_NO_MEANING = ("aten::resolve_conj", "aten::resolve_neg")
_BOUNDS = {f"aten::{name}" for name in ("clamp", "clamp_max", "minimum", "clamp_", "clamp_max_")}
_COUNTS = {f"aten::{name}" for name in ("bincount", "histc", "sum", "cumsum")}
# where a number from the host may be a row count, which the probe's routing decides
_SIZES = {"view", "reshape", "_unsafe_view", "unflatten", "expand", "repeat", "arange", "split_with_sizes"}
_SIZES |= {prefix + name for prefix in ("", "new_") for name in ("zeros", "ones", "full", "empty")}


@dataclass(frozen=True)
class HostRead:
    """What the function read back to the host: the node it was read from and its value on this probe (nested lists for arrays)."""

    node: fx.Node
    value: Any


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Run user code apart from whatever is being traced: no modes, no hooks of autograd, no autocast, gradients on, no random number drawn.

    Raises `Rejection` if the code moved a random generator; the generators are put back in every case.
    """
    with contextlib.ExitStack() as stack:
        # a context of its own, with one fake mode for all the values noted down: without it make_fx makes one per node
        stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(FakeTensorMode())))
        stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
        stack.enter_context(_no_function_modes())
        for device in {"cpu", *(() if (a := torch.accelerator.current_accelerator()) is None else (a.type,))}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(no_saving_hooks())
        stack.enter_context(_no_random_numbers())
        yield


@contextlib.contextmanager
def _no_function_modes() -> Iterator[None]:
    from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode

    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        yield
    finally:
        for m in reversed(modes):
            _push_mode(m)


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Put every global generator back as it was, and raise `Rejection` if one was used."""
    numpy = sys.modules.get("numpy")
    accelerator = torch.get_device_module() if torch.accelerator.is_available() else None
    if accelerator is not None and not getattr(accelerator, "is_initialized", lambda: False)():
        accelerator = None

    def states() -> list[Any]:
        found = [torch.get_rng_state(), random.getstate()]
        if accelerator is not None:
            found.append(accelerator.get_rng_state())
        if numpy is not None:
            found.append(numpy.random.get_state())
        return found

    before, refused = states(), None
    try:
        yield
    except Rejection as e:
        refused = e
    finally:
        used = not all(_same_state(a, b) for a, b in zip(before, states(), strict=True))
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        if accelerator is not None:
            accelerator.set_rng_state(before[2])
        if numpy is not None:
            numpy.random.set_state(before[-1])
    if used:
        raise Rejection("it draws random numbers", stage="record")
    if refused is not None:
        raise refused


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_same_state(x, y) for x, y in zip(a, b, strict=True))
    if type(a).__name__ == "ndarray":
        return bool((a == b).all())
    return bool(a == b)


# ---- recording ---------------------------------------------------------------------------------------------------------


@neutral()
def record(fn: Callable[..., Any], arguments: Mapping[str, Any], probe: Probe | None = None) -> fx.GraphModule:
    """Straight-line graph of one call ``fn(probe.module, **arguments)`` (without a probe: ``fn(**arguments)``).

    arguments: the call's arguments by name; its tensors become placeholders with ``meta["arg"]``. Parameters and buffers that
    the function reads become placeholders with ``meta["param_path"]``. Every node has ``meta["val"]`` (a fake tensor) and
    ``meta["grad"]`` (whether gradients were on); placeholders also have ``meta["real"]``, the probe itself.
    ``gm.meta["host_reads"]``: every `HostRead`, in order; ``gm.meta["host_values"]``: its values alone.
    Rows picked by numbers from the host are named by what they are (see `selections`).
    Raises `Rejection` if the function fails, draws random numbers, writes to its module or its inputs, or branches on the
    values of its floats.
    """
    inputs = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    params = probe.tensors if probe is not None else {}
    flat = [*inputs.values(), *params.values()]
    versions = [t._version for t in flat]
    results: list[Any] = []

    def call(*_: Tensor) -> Any:
        results.append(fn(*(() if probe is None else (probe.module,)), **arguments))
        return results[0]

    try:
        traced = make_fx(call, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False)(*flat)
    except Rejection:
        raise
    except Exception as e:
        raise Rejection(f"running it on probes raised {type(e).__name__}: {_first_line(e)}", stage="record") from e
    if probe is not None:
        probe.check_unchanged()
    if [t._version for t in flat] != versions:
        raise Rejection("it writes to its inputs or parameters", stage="record")
    gm, reads = _clean(traced, list(inputs), list(params), flat)
    _check_cuts(gm)
    values = replay(gm)
    _check_result(values, results[0])
    gm.meta["host_reads"] = [HostRead(n, _plain(values[n])) for n in reads]
    gm.meta["host_values"] = [r.value for r in gm.meta["host_reads"]]
    for r in gm.meta["host_reads"]:
        _check_read(r.node)
    _fix_indices(gm, values)
    name_selections(gm, values)
    _drop_dead(gm)
    if gm.meta["selections"]:
        _check_result(replay(gm), results[0])
    return gm


def record_symbolically(fn: Callable[..., Any], routings: Sequence[Mapping[str, Any]], probe: Probe | None = None) -> fx.GraphModule:
    """`record` on the first of several routings, with nothing left in it that belongs to that routing.

    Rows picked by host numbers are replaced by selections such as ``nonzero(sorted_ids == e)``; if there were any, or constants
    made from tensors, the function is recorded on the other routings too and must give the same graph but for row counts.
    Raises `Rejection` as `record` does, and when a number in the graph depends on the routing.
    """
    gm = record(fn, routings[0], probe)
    if gm.meta["selections"] or any(n.op == "get_attr" or _cuts_rows(n) for n in gm.graph.nodes):
        for other in routings[1:]:
            _same_graph(gm, record(fn, other, probe))
    return gm


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [""])[0][:200]


# ---- from make_fx's graph to ours ------------------------------------------------------------------------------------


def _clean(traced: fx.GraphModule, inputs: list[str], params: list[str], flat: list[Tensor]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Named placeholders, gradient switches as a flag on each node; the nodes that were read back to the host apart."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    reads: list[fx.Node] = []
    grad, names = True, [*inputs, *params]
    for i, n in enumerate(traced.graph.nodes):
        if n.target is torch._C._set_grad_enabled:
            grad = bool(n.args[0])
        elif n.target is torch.amp.autocast_mode._enter_autocast and n.args[2]:
            raise Rejection("it turns autocast on inside", stage="record")
        elif n.target in (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast):
            pass  # autocast off, which it is already
        elif _schema_name(n) in _READS:
            reads.append(env[n.args[0]])
        elif _schema_name(n) in _NO_MEANING:  # what .tolist() and .numpy() leave behind
            env[n] = env[n.args[0]]
            if not n.users:
                reads.append(env[n])
        else:
            new = env[n] = graph.placeholder(names[i].replace(".", "_")) if n.op == "placeholder" else graph.node_copy(n, env.__getitem__)
            if n.op == "placeholder":
                new.meta = {"arg" if i < len(inputs) else "param_path": names[i], "real": flat[i]}
            new.meta.update(val=n.meta.get("val"), grad=grad)
    return fx.GraphModule(traced, graph), reads


def replay(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """The value of every node on the probes it was recorded with (after in-place ops: as the graph left it)."""
    values: dict[fx.Node, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Keep(gm, garbage_collect_values=False).run(*(n.meta["real"] for n in gm.graph.nodes if n.op == "placeholder"))
    return values


def _check_result(values: dict[fx.Node, Any], result: Any) -> None:
    """Raise `Rejection` unless the graph computes what the function did."""
    out = next(v for n, v in values.items() if n.op == "output")
    for a, b in zip(pytree.tree_leaves(out), pytree.tree_leaves(result), strict=True):
        if not (torch.allclose(a, b, equal_nan=True) if isinstance(b, Tensor) else a == b):
            raise Rejection("the recorded operations do not give the function's result", stage="record")


def _fix_indices(gm: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """A single number that was read back decided what the code did next; where it also goes on as a tensor, it is the same number.

    ``for e in hit: mask[e]; experts[e]``: expert 3 was called because `e` was read as 3, so `mask[e]` is `mask[3]`.
    """
    for n in dict.fromkeys(r.node for r in gm.meta["host_reads"]):
        v = values[n]
        if n.op == "placeholder" or not n.users or v.numel() != 1 or v.is_floating_point() or v.dtype is torch.bool:
            continue
        with gm.graph.inserting_after(n):
            fixed = gm.graph.call_function(torch.ops.aten.full.default, (list(v.shape), v.item()), {"dtype": v.dtype})
        fixed.meta, values[fixed] = dict(n.meta), v
        n.replace_all_uses_with(fixed)


def _plain(v: Any) -> Any:
    return v.tolist() if isinstance(v, Tensor) else v


def _check_read(node: fx.Node) -> None:
    """Raise `Rejection` if what was read back hangs on parameters or on the values of float inputs (but for the choice of experts)."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if "param_path" in n.meta:
            raise Rejection(f"its control flow depends on the value of {n.meta['param_path']}", stage="record")
        if n.op == "placeholder" and n.meta["real"].is_floating_point():
            raise Rejection(f"its control flow depends on the values of {n.meta['arg']}", stage="record")
        if _schema_name(n) in _BOUNDS and not n.meta["val"].is_floating_point() and _counts(n):
            raise Rejection("its control flow depends on a count that it bounds", stage="record")
        if not _chooses(n):
            stack.extend(n.all_input_nodes)


def _counts(n: fx.Node) -> bool:
    """Whether integers are made by counting."""
    stack, seen = [n], {n}
    while stack:
        x = stack.pop()
        if _schema_name(x) in _COUNTS:
            return True
        new = [i for i in x.all_input_nodes if i not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def _chooses(n: fx.Node) -> bool:
    """Integers that come out of comparing floats: expert ids."""
    if n.target is operator.getitem and n.args[1] == 1:
        return isinstance(n.args[0], fx.Node) and _schema_name(n.args[0]) in ("aten::topk", "aten::sort", "aten::max", "aten::min")
    return _schema_name(n) in ("aten::argmax", "aten::argmin", "aten::argsort")


def _drop_dead(gm: fx.GraphModule) -> None:
    for n in reversed(gm.graph.nodes):
        if not n.users and n.op == "call_function" and (not _writes(n) or _is_fresh(n.args[0], n)):
            gm.graph.erase_node(n)
    for n in list(gm.graph.nodes):
        if n.op == "placeholder" and "param_path" in n.meta and not n.users:
            gm.graph.erase_node(n)
    gm.recompile()


def _is_fresh(n: Any, writer: fx.Node) -> bool:
    """Whether `n` made a tensor of its own that nobody but `writer` looks at."""
    schema = getattr(n.target, "_schema", None) if isinstance(n, fx.Node) and n.op == "call_function" else None
    return schema is not None and not any(r.alias_info for r in schema.returns) and set(n.users) == {writer}


def _writes(n: fx.Node) -> bool:
    schema = getattr(n.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _schema_name(n: fx.Node) -> str:
    schema = getattr(n.target, "_schema", None)
    return "" if schema is None else str(schema.name)


# ---- two recordings ----------------------------------------------------------------------------------------------------


def _same_graph(a: fx.GraphModule, b: fx.GraphModule) -> None:
    """Raise `Rejection` unless two recordings differ in row counts only."""
    left, right = list(a.graph.nodes), list(b.graph.nodes)
    if [n.target for n in left if n.op != "get_attr"] != [n.target for n in right if n.op != "get_attr"] or len(left) != len(right):
        raise Rejection("it runs other operations on another routing, even when every expert is hit", stage="record")
    twin = dict(zip(left, right, strict=True))
    for n, m in twin.items():
        if n.op == "get_attr":
            if not torch.equal(getattr(a, str(n.target)), getattr(b, str(m.target))):
                raise Rejection("it makes a tensor from numbers that depend on the routing", stage="record")
            continue
        if _writes(n) or _schema_name(n).removeprefix("aten::") not in _SIZES:
            _same_arguments((n.args, n.kwargs), (m.args, m.kwargs), twin)


def _check_cuts(gm: fx.GraphModule) -> None:
    """Raise `Rejection` where rows are cut at a number that the probe has fewer rows than: with more, it would leave some out."""
    for n in gm.graph.nodes:
        name = _schema_name(n).removeprefix("aten::")
        if name not in ("slice", "split"):
            continue
        a = call_args(n)
        rows = n.args[0].meta["val"].shape[a.dim]
        most = a.split_size if name == "split" else a.end
        first = 0 if name == "split" else a.start or 0
        if isinstance(most, int) and rows < most < _NO_END or isinstance(first, int) and first < -rows:
            raise Rejection(f"it cuts rows at {most if first >= 0 else first}, which no probe reaches", stage="record")


def _cuts_rows(n: fx.Node) -> bool:
    """A run of leading rows taken by numbers, which may have come from the host."""
    name = _schema_name(n).removeprefix("aten::")
    dim = n.args[1:2] if name in ("slice", "narrow") else n.args[2:3]
    return name in ("slice", "narrow", "split", "split_with_sizes", "tensor_split") and (*dim, 0)[0] == 0


def _same_arguments(a: Any, b: Any, twin: Mapping[fx.Node, fx.Node]) -> None:
    xs, how = pytree.tree_flatten(a)
    ys, how_b = pytree.tree_flatten(b)
    if how != how_b or any((twin.get(x) is not y) if isinstance(x, fx.Node) else x != y for x, y in zip(xs, ys, strict=True)):
        raise Rejection("a number in its operations depends on the routing", stage="record")
