"""The router's product for one token, written as a sum: the inner compiler makes one small kernel of it and of what stands around it,
where a matrix product would go to a library, which has none for a single row of so few columns (docs/kernels.md).

    l[e] = Σ_h x[h] W[e, h] + b[e], products and sum in fp32, rounded once: as a library's kernel does it
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from .overlap import may_train
from .shadow import example_value

_SAME_VALUES = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "contiguous", "to", "float", "type")
_LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)  # type: ignore[attr-defined]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def as_sum(gm: fx.GraphModule, options: Any, target: str) -> int:
    """Rewrite the products that make the logits of a recovered routing; how many there were.

    Only where Inductor compiles the rest for CUDA, for one token known when compiling, when no gradient may be wanted.
    """
    graph = gm.graph
    if target != "cuda" or options.inner not in ("auto", "inductor") or may_train(graph) or _autocast(graph):
        return 0
    routes = [n for n in graph.nodes if n.target is torch.ops.moe_compile.route.default]
    products = list(dict.fromkeys(p for n in routes if (p := _product(n.args[0])) is not None and _one_row(p)))
    for p in products:
        _rewrite(graph, p)
    if products:
        graph.lint()
        gm.recompile()
    return len(products)


def _autocast(graph: fx.Graph) -> bool:
    return torch.is_autocast_enabled("cuda") or any("autocast" in str(n.target) for n in graph.nodes)


def _product(logits: Any) -> fx.Node | None:
    """The product whose values the logits are, maybe in another shape or dtype."""
    while isinstance(logits, fx.Node) and logits.target not in _LINEAR:
        name = logits.target if logits.op == "call_method" else getattr(logits.target, "__name__", "")
        logits = logits.args[0] if logits.args and name in _SAME_VALUES else None
    return logits


def _operands(p: fx.Node) -> tuple[Any, Any, Any]:
    """x, W and b, or None."""
    given = dict(zip(("input", "weight", "bias"), p.args, strict=False)) | p.kwargs
    return given["input"], given["weight"], given.get("bias")


def _one_row(p: fx.Node) -> bool:
    """Whether one token meets a matrix, both of one dtype, all sizes known."""
    x, w, _ = _operands(p)
    row, matrix = (example_value(n) if isinstance(n, fx.Node) else None for n in (x, w))
    if not (isinstance(row, torch.Tensor) and isinstance(matrix, torch.Tensor) and row.dtype == matrix.dtype in _DTYPES):
        return False
    known = all(isinstance(d, int) for d in (*row.shape, *matrix.shape))
    return known and matrix.ndim == 2 and row.ndim >= 1 and row.numel() == row.shape[-1] == matrix.shape[1]


def _rewrite(graph: fx.Graph, p: fx.Node) -> None:
    x, w, b = _operands(p)
    shape = [*example_value(x).shape[:-1], example_value(w).shape[0]]
    with graph.inserting_before(p):
        terms = graph.call_function(torch.mul, (_fp32(graph, x), _fp32(graph, w)))
        total = graph.call_function(torch.sum, (graph.call_method("reshape", (terms, [shape[-1], -1])), -1))
        if b is not None:
            total = graph.call_function(torch.add, (total, _fp32(graph, b)))
        total = graph.call_method("to", (total, example_value(w).dtype))
        out = graph.call_method("reshape", (total, shape))
    out.meta.update(p.meta)
    p.replace_all_uses_with(out)
    graph.erase_node(p)


def _fp32(graph: fx.Graph, n: fx.Node) -> fx.Node:
    return graph.call_method("to", (n, torch.float32))
