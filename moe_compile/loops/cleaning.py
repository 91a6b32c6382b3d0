"""From the graph that make_fx makes of one run to a recording: named inputs, no reads by the host, nothing that the run left behind.

What was read back to the host decided what the code did next. It may hang on the choice of experts and on nothing else.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir import Rejection
from ..passes.aten.effects import aliased_arg, mutated_args
from ..passes.aten.element import call_args
from ..passes.aten.names import ZEROS

_READS = ("aten::item", "aten::_local_scalar_dense")
_NO_END = (1 << 63) - 1
_SAME = {"to", "type_as", "contiguous", "float", "lift_fresh"}
_ADDS = {"add", "add_"}
_STACKED = {"cat", "concat", "vstack", "row_stack"}
_NO_MEANING = ("aten::resolve_conj", "aten::resolve_neg")


def clean(
    traced: fx.GraphModule, inputs: list[str], params: list[str], flat: list[Tensor], grad: bool
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Named placeholders, gradient switches as a flag on each node; the nodes that were read back to the host apart.

    grad: whether gradients were on at first.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    reads: list[fx.Node] = []
    names = [*inputs, *params]
    for i, n in enumerate(traced.graph.nodes):
        if n.target is torch._C._set_grad_enabled:
            grad = bool(n.args[0])
        elif n.target is torch.amp.autocast_mode._enter_autocast and n.args[2]:
            raise Rejection("it turns autocast on inside", stage="record")
        elif n.target in (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast):
            pass  # autocast off, which it is already
        elif schema_name(n) in _READS:
            reads.append(env[n.args[0]])
        elif schema_name(n) in _NO_MEANING:  # what .tolist() and .numpy() leave behind
            env[n] = env[n.args[0]]
            if not n.users:
                reads.append(env[n])
        else:
            new = env[n] = graph.placeholder(_legal(names[i])) if n.op == "placeholder" else graph.node_copy(n, env.__getitem__)
            if n.op == "placeholder":
                new.meta = {"arg" if i < len(inputs) else "param_path": names[i], "real": flat[i]}
            new.meta.update(val=n.meta.get("val"), grad=grad)
    return fx.GraphModule(traced, graph), reads


def _legal(name: str) -> str:
    """A path as a name: parts of a list are called 0, 1, ..., and a key may be anything."""
    return re.sub(r"\W", "_", name if name[:1].isidentifier() else f"_{name}")


def replay(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """The value of every node on the probes it was recorded with (after in-place ops: as the graph left it)."""
    values: dict[fx.Node, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Keep(gm, garbage_collect_values=False).run(*(n.meta["real"] for n in gm.graph.nodes if n.op == "placeholder"))
    return values


def drop_nothing(gm: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Take out what does nothing: a cast to the type that a tensor has is that tensor, also where it is written to; no rows stacked;
    zeros that something is added to, as many rows as the recording happened to have.
    """
    for n in list(gm.graph.nodes):
        name, source = schema_name(n).removeprefix("aten::"), n.args[0] if n.args else None
        if name in _ADDS and (added := _added_to_zeros(n, values)) is not None:
            n.replace_all_uses_with(added)
            gm.graph.erase_node(n)
        elif name in _SAME and values[n] is values.get(source):  # type: ignore[arg-type]
            n.replace_all_uses_with(source)  # type: ignore[arg-type]
            gm.graph.erase_node(n)
        elif name in _STACKED and isinstance(source, (list, tuple)) and (name in ("vstack", "row_stack") or call_args(n).dim == 0):
            some = [p for p in source if values[p].shape[0]]  # type: ignore[index]
            if some and len(some) < len(source) and values[some[0]].ndim == values[n].ndim:
                if len(some) == 1:
                    n.target, n.kwargs = torch.ops.aten.clone.default, {}
                n.args = (some if len(some) > 1 else some[0], *(n.args[1:] if len(some) > 1 else ()))


def _added_to_zeros(n: fx.Node, values: dict[fx.Node, Any]) -> fx.Node | None:
    """y of 0 + y, where the zeros are nobody else's, and as large and of the same type."""
    zeros, y = n.args[0], n.args[1]
    if not all(isinstance(x, fx.Node) and isinstance(values.get(x), Tensor) for x in (zeros, y)) or n.kwargs:
        return None
    assert isinstance(zeros, fx.Node) and isinstance(y, fx.Node)
    alike = len({(values[x].shape, values[x].dtype) for x in (zeros, y, n)}) == 1
    made = schema_name(zeros).removeprefix("aten::") in ZEROS and set(zeros.users) == {n}
    own = not writes(n) or set(y.users) == {n} and y.op == "call_function"
    return y if alike and made and own else None


def check_result(values: dict[fx.Node, Any], result: Any) -> None:
    """Raise `Rejection` unless the graph computes what the function did."""
    out = next(v for n, v in values.items() if n.op == "output")
    for a, b in zip(pytree.tree_leaves(out), pytree.tree_leaves(result), strict=True):
        if not (torch.allclose(a, b, equal_nan=True) if isinstance(b, Tensor) else a == b):
            raise Rejection("the recorded operations do not give the function's result", stage="record")


def fix_indices(gm: fx.GraphModule, reads: Iterable[fx.Node], values: dict[fx.Node, Any]) -> None:
    """A single number that was read back decided what the code did next; where it also goes on as a tensor, it is the same number.

    ``for e in hit: mask[e]; experts[e]``: expert 3 was called because `e` was read as 3, so `mask[e]` is `mask[3]`.
    """
    for n in dict.fromkeys(reads):
        v = values[n]
        if n.op == "placeholder" or not n.users or v.numel() != 1 or v.is_floating_point() or v.dtype is torch.bool:
            continue
        with gm.graph.inserting_after(n):
            fixed = gm.graph.call_function(torch.ops.aten.full.default, (list(v.shape), v.item()), {"dtype": v.dtype})
        fixed.meta, values[fixed] = dict(n.meta), v
        n.replace_all_uses_with(fixed)


def check_reads(reads: Iterable[fx.Node]) -> None:
    """Raise `Rejection` if what was read back hangs on parameters or on the values of float inputs (but for the choice of experts)."""
    given = (n for n in behind(reads) if n.op == "placeholder")
    for n in sorted(given, key=lambda n: ("param_path" in n.meta) and n.meta["real"].is_floating_point()):  # inputs and tables first
        if "param_path" in n.meta:
            path = n.meta["param_path"]
            if not n.meta["real"].is_floating_point():
                raise Rejection(f"which experts run is read from {path}, a table, and not chosen by scores (topk, argmax)", stage="values")
            raise Rejection(f"a branch of the loop depends on the value of {path}: its control flow is data", stage="values")
        if n.meta["real"].is_floating_point():
            raise Rejection(
                f"a branch of the loop depends on the values of {n.meta['arg']}: its control flow is data",
                stage="values",
            )


def behind(reads: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that what was read back hangs on, up to the choice of experts."""
    seen: set[fx.Node] = set()
    stack = list(reads)
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack += () if chooses(n) else n.all_input_nodes
    return seen


def check_writes(gm: fx.GraphModule) -> None:
    """Raise `Rejection` if an in-place operation changes an input or parameter, by whichever view of its memory."""
    root: dict[fx.Node, fx.Node] = {}
    for n in gm.graph.nodes:
        source = aliased_arg(n)
        root[n] = n if source is None else root[source]
        for m in mutated_args(n):
            if root[m].op == "placeholder":
                name = root[m].meta.get("arg") or root[m].meta["param_path"]
                raise Rejection(f"it writes to its inputs or parameters: {name}", stage="effects")


def chooses(n: fx.Node) -> bool:
    """Integers that come out of comparing floats: expert ids."""
    if n.target is operator.getitem and n.args[1] == 1:
        return isinstance(n.args[0], fx.Node) and schema_name(n.args[0]) in ("aten::topk", "aten::sort", "aten::max", "aten::min")
    return schema_name(n) in ("aten::argmax", "aten::argmin", "aten::argsort")


def drop_dead(gm: fx.GraphModule) -> None:
    for n in reversed(gm.graph.nodes):
        if not n.users and n.op == "call_function" and (not writes(n) or _is_fresh(n.args[0], n)):
            gm.graph.erase_node(n)
    for n in list(gm.graph.nodes):
        if n.op == "placeholder" and "param_path" in n.meta and not n.users:
            gm.graph.erase_node(n)
    gm.recompile()


def _is_fresh(n: Any, writer: fx.Node) -> bool:
    """Whether `n` made a tensor of its own that nobody but `writer` looks at."""
    schema = getattr(n.target, "_schema", None) if isinstance(n, fx.Node) and n.op == "call_function" else None
    return schema is not None and not any(r.alias_info for r in schema.returns) and set(n.users) == {writer}


def writes(n: fx.Node) -> bool:
    schema = getattr(n.target, "_schema", None)
    return schema is not None and schema.is_mutable


def schema_name(n: fx.Node) -> str:
    schema = getattr(n.target, "_schema", None)
    return "" if schema is None else str(schema.name)


def check_cuts(gm: fx.GraphModule) -> None:
    """Raise `Rejection` where rows are cut at a number that the probe has fewer rows than: with more, it would leave some out."""
    for n in gm.graph.nodes:
        name = schema_name(n).removeprefix("aten::")
        if name not in ("slice", "split"):
            continue
        a = call_args(n)
        rows = n.args[0].meta["val"].shape[a.dim]
        most = a.split_size if name == "split" else a.end
        first = 0 if name == "split" else a.start or 0
        if isinstance(most, int) and rows < most < _NO_END or isinstance(first, int) and first < -rows:
            raise Rejection(f"it cuts rows at {most if first >= 0 else first}, which no probe reaches", stage="record")


def cuts_rows(n: fx.Node) -> bool:
    """A run of leading rows taken by numbers, which may have come from the host."""
    name = schema_name(n).removeprefix("aten::")
    dim = n.args[1:2] if name in ("slice", "narrow") else n.args[2:3]
    return name in ("slice", "narrow", "split", "split_with_sizes", "tensor_split") and (*dim, 0)[0] == 0
