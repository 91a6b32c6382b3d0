"""Parameters that are wrapper subclasses (torchao's): what they hold, and the floats that it stands for, as nodes of the graph.

    W  =  dequantize(qdata, scale, ...)

While a graph is read, the floats stand in the place of such a parameter, made from its own tensors by the operations of its own
`dequantize`. What is recovered reads those tensors, as if the model held them; everything else gets the parameter back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .node import example_value, traced

_PACKAGE = "torchao."
# Their products are those of their floats where nothing is done to rows
_FLOATS = frozenset("Float8Tensor Int8Tensor Int4Tensor Int4PlainInt32Tensor IntxUnpackedToInt8Tensor NVFP4Tensor".split())
_ROWS = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale", "activation_quantization")  # what says that something is
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_HALF, *(-x for x in _HALF))
WHY, HELD = "why a parameter is not unwrapped", "is a tensor that a parameter holds"  # in a node's notes


def why_not(t: Tensor) -> str:
    """Why a wrapper subclass stays as it is, "" where its floats may stand for it."""
    kind = type(t).__name__
    if not type(t).__module__.startswith(_PACKAGE) or kind not in _FLOATS:
        return f"a parameter of the block is a {kind}: it holds other tensors, and it alone knows what they stand for"
    rows = next((name for name in _ROWS if getattr(t, name, None) is not None), None)
    if rows is not None:
        return f"a parameter of the block is a {kind} that rounds or scales the rows of its products ({rows})"
    return ""


@contextlib.contextmanager
def unwrapped(gm: fx.GraphModule) -> Iterator[None]:
    """Inside, the floats of wrapper subclasses stand in their places; afterwards they themselves do again."""
    stands: list[tuple[fx.Node, fx.Node, list[fx.Node]]] = []
    for n in [n for n in gm.graph.nodes if n.op == "placeholder" and n.users]:
        v = example_value(n)
        if not isinstance(v, Tensor) or not is_traceable_wrapper_subclass(v) or type(v).__module__.startswith("torch."):
            continue
        why = why_not(v)
        floats = None if why else _floats(gm.graph, n, v)
        if floats is None:
            n.meta[WHY] = why or f"a parameter of the block is a {type(v).__name__} whose dequantize() is made of no known operations"
        else:
            readers = [u for u in n.users if u.target is not getattr]
            for u in readers:
                u.replace_input_with(n, floats)
            stands.append((n, floats, readers))
    try:
        yield
    finally:
        for n, floats, readers in stands:
            _back(n, floats, readers)
        if stands:
            gm.graph.lint()
            gm.recompile()


def _floats(graph: fx.Graph, n: fx.Node, v: Any) -> fx.Node | None:
    """The floats of a parameter in its place; None where they cannot be told."""
    names, context = v.__tensor_flatten__()
    inner = [getattr(v, name) for name in names]
    if any(is_traceable_wrapper_subclass(t) for t in inner):
        return None
    made = _dequantized(v, names, context, inner)
    if made is None:
        return None
    env: dict[fx.Node, Any] = {}
    with graph.inserting_before(next(x for x in graph.nodes if x.op != "placeholder")):
        held = iter(zip(names, inner, strict=True))
        for x in made.graph.nodes:
            if x.op == "placeholder":
                name, value = next(held)
                env[x] = graph.call_function(getattr, (n, name))
                env[x].meta.update({"example_value": value, HELD: True})
            elif x.op == "call_function":
                env[x] = graph.node_copy(x, env.__getitem__)
                env[x].meta = {"example_value": x.meta.get("val")}
    (out,) = (x.args[0] for x in made.graph.nodes if x.op == "output")
    return env[out]


def _dequantized(v: Any, names: list[str], context: Any, inner: list[Tensor]) -> fx.GraphModule | None:
    """`dequantize` on the tensors that are held, None where it fails or holds tensors of its own."""

    def run(*tensors: Tensor) -> Tensor:
        if type(v).__name__ == "NVFP4Tensor":
            return _nvfp4(v, **dict(zip(names, tensors, strict=True)))
        whole = type(v).__tensor_unflatten__(dict(zip(names, tensors, strict=True)), context, v.shape, v.stride())
        return whole.dequantize()  # type: ignore[no-any-return]

    with torch.no_grad():
        made = traced(run, inner)
    if made is None:
        return None
    out = next(x.meta.get("val") for x in reversed(made.graph.nodes) if x.op != "output")
    whole = all(x.op != "get_attr" for x in made.graph.nodes) and isinstance(out, Tensor)
    return made if whole and out.shape == v.shape and out.dtype == v.dtype else None


def _nvfp4(v: Any, qdata: Tensor, scale: Tensor, per_tensor_scale: Tensor | None = None, **_: Tensor) -> Tensor:
    """Two e2m1 a byte, the even element in the low bits; a float8 for each group, and a number for all. torchao's own is made of bits."""
    if v.is_swizzled_scales or not v.qdata.is_contiguous():
        raise NotImplementedError
    table = torch.stack([torch.full((), x, device=qdata.device) for x in E2M1])
    codes = qdata.int()
    values = table[torch.stack([codes & 15, codes >> 4], -1).flatten(-2)]
    factor = scale.float() if per_tensor_scale is None else scale.float() * per_tensor_scale
    return (values.unflatten(-1, (scale.shape[-1], -1)) * factor.unsqueeze(-1)).flatten(-2).to(v.dtype)


def _back(n: fx.Node, floats: fx.Node, readers: list[fx.Node]) -> None:
    """Those who read the parameter do so again; its floats go where nothing new reads them."""
    for u in readers:
        if not u._erased:
            u.replace_input_with(floats, n)
    left = [floats]
    while left:
        x = left.pop()
        if x.op == "call_function" and not x.users and not x._erased:
            inputs = x.all_input_nodes
            x.graph.erase_node(x)
            left += inputs
