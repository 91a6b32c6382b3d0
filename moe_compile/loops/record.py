"""Read a data-dependent function by example: run it once on probes that hit every expert and write down what it did.

The function is the user's, as it stands: `.item()`, `.tolist()`, `.numpy()` and iteration over `nonzero()` return the probes'
real values, so its loops unroll into a straight list of pre-dispatch ATen ops, the vocabulary of the shadow. Nothing is
rewritten and nothing of the user's is touched: it runs on a copy of the module whose parameters are probes.
What the list means is for the passes to say; whether it holds for other routings is for the caller to try.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..ir import Rejection
from ..passes.aten import contracts
from . import cleaning, thresholds
from .neutral import neutral
from .probe import Probe
from .selections import name_selections

# where a number from the host may be a row count, which the probe's routing decides
_SIZES = {"view", "reshape", "_unsafe_view", "unflatten", "expand", "repeat", "arange", "split_with_sizes"}
INSTEAD = "loop over the experts, and pick the rows of each with torch.where(ids == e)"
_SIZES |= {prefix + name for prefix in ("", "new_") for name in ("zeros", "ones", "full", "empty")}


@dataclass(frozen=True)
class HostRead:
    """What the function read back to the host: the node it was read from and its value on this probe (nested lists for arrays)."""

    node: fx.Node
    value: Any


# ---- recording ---------------------------------------------------------------------------------------------------------


def record(
    fn: Callable[..., Any], arguments: Mapping[str, Any], probe: Probe, grad: bool = True, rows: thresholds.Rows = lambda size: False
) -> fx.GraphModule:
    """Straight-line graph of one call ``fn(probe.module, **arguments)``, where `fn` is sealed (`Probe.function`).

    arguments: the call's arguments by name; its tensors become placeholders with ``meta["arg"]``. Parameters and buffers that
    the function reads become placeholders with ``meta["param_path"]``. Every node has ``meta["val"]`` (a fake tensor) and
    ``meta["grad"]`` (whether gradients were on); placeholders also have ``meta["real"]``, the probe itself.
    ``gm.meta["host_reads"]``: every `HostRead`, in order; ``gm.meta["host_values"]``: its values alone; ``gm.meta["numbered"]``: whether
    the places of rows are among them.
    Rows picked by numbers from the host are named by what they are (see `selections`). rows: whether a dim of a size counts rows.
    Raises `Rejection` if the function fails, draws random numbers, writes to anything but what it makes itself, or branches on the
    values of its floats.
    """
    with neutral(grad):
        inputs = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        traced, result = _traced(fn, arguments, [*inputs.values(), *probe.tensors.values()], probe)
        gm, reads = cleaning.clean(traced, list(inputs), list(probe.tensors), [*inputs.values(), *probe.tensors.values()], grad)
        cleaning.check_writes(gm)
        cleaning.check_cuts(gm)
        values = cleaning.replay(gm)
        cleaning.check_result(values, result)
        cleaning.drop_nothing(gm, values)
        gm.meta["host_reads"] = [HostRead(n, v.tolist() if isinstance(v := values[n], Tensor) else v) for n in reads]
        gm.meta["numbered"] = any(thresholds.numbers(n, rows) for n in reads)
        gm.meta["host_values"] = [r.value for r in gm.meta["host_reads"]]
        cleaning.check_reads(reads)
        thresholds.check(gm, reads, rows)
        cleaning.fix_indices(gm, reads, values)
        name_selections(gm, values)
        cleaning.drop_dead(gm)
        if gm.meta["selections"]:
            cleaning.check_result(cleaning.replay(gm), result)
    return gm


def _traced(fn: Callable[..., Any], arguments: Mapping[str, Any], flat: list[Tensor], probe: Probe) -> tuple[fx.GraphModule, Any]:
    versions = [t._version for t in flat]
    given = [k for k, v in arguments.items() if isinstance(v, Tensor)]
    results: list[Any] = []

    def call(*_: Tensor) -> Any:
        results.append(fn(*(() if probe.module is None else (probe.module,)), **arguments))
        return results[0]

    try:
        traced = make_fx(call, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False)(*flat)
    except Rejection:
        raise
    except Exception as e:
        probe.check()  # a use of what is forbidden may come out as another error
        raise Rejection(f"running it on probes raised {type(e).__name__}: {_first_line(e)}", stage="record") from e
    contracts.expand(traced)
    probe.check()
    written = [name for name, t, v in zip((*given, *probe.tensors), flat, versions, strict=True) if t._version != v]
    if written:
        raise Rejection(f"it writes to its inputs or parameters: {', '.join(written[:3])}{_statistics(written[0])}", stage="effects")
    return traced, results[0]


def _statistics(path: str) -> str:
    """What is added where the first that is written is what a BatchNorm keeps."""
    norm, _, name = path.rpartition(".")
    if name not in ("num_batches_tracked", "running_mean", "running_var"):
        return ""
    return f" (the statistics of a BatchNorm, {norm}, over the rows that its expert got; a LayerNorm or RMSNorm is of one row, and is read)"


def record_symbolically(
    fn: Callable[..., Any],
    routings: Sequence[Mapping[str, Any]],
    probe: Probe,
    grad: bool = True,
    rows: thresholds.Rows = lambda size: False,
) -> fx.GraphModule:
    """`record` on the first of several routings, with nothing left in it that belongs to that routing.

    Rows picked by host numbers are replaced by selections such as ``nonzero(sorted_ids == e)``; if there were any, or constants
    made from tensors, the function is recorded on the other routings too and must give the same graph but for row counts.
    Raises `Rejection` as `record` does, and when a number in the graph depends on the routing.
    """
    gm = record(fn, routings[0], probe, grad, rows)
    if gm.meta["selections"] or any(n.op == "get_attr" or cleaning.cuts_rows(n) for n in gm.graph.nodes):
        for other in routings[1:]:
            _same_graph(gm, record(fn, other, probe, grad, rows))
    return gm


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [""])[0][:200]


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
                raise Rejection(f"it makes a tensor from numbers that depend on the routing: {INSTEAD}", stage="record")
            continue
        if cleaning.writes(n) or cleaning.schema_name(n).removeprefix("aten::") not in _SIZES:
            _same_arguments((n.args, n.kwargs), (m.args, m.kwargs), twin)


def _same_arguments(a: Any, b: Any, twin: Mapping[fx.Node, fx.Node]) -> None:
    xs, how = pytree.tree_flatten(a)
    ys, how_b = pytree.tree_flatten(b)
    if how != how_b or any((twin.get(x) is not y) if isinstance(x, fx.Node) else x != y for x, y in zip(xs, ys, strict=True)):
        raise Rejection(f"which rows are picked depends on the routing, by numbers that were read back: {INSTEAD}", stage="record")
