"""What passes look at and make, as text: graphs, elements, blocks, plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx

from ..ir.text import dtype_text, experts_text, formula, shared_text
from . import terms as T
from .aten.element import Puller, shape_of, size_of
from .aten.node import example_value
from .aten.sources import code_of, input_name, source_of
from .recover.match import ExpertsMatch
from .recover.region import Block
from .recover.rows import row_index, row_variable, rows
from .rewrite.plan import BlockPlan
from .terms.text import SAID, line, pretty, said


def graph(nodes: Iterable[fx.Node]) -> str:
    """A line for each node: name, type, call, and the user's line and code that made it. Inputs go by the user's names for them."""
    return "\n".join(map(_line, nodes))


def _line(n: fx.Node) -> str:
    if n.op == "output":
        return f"return {_value(n.args[0])}"
    if n.op == "placeholder":
        return f"{_name(n)}: {_type(n)}"
    if n.op == "get_attr":
        text = str(n.target)
    else:
        given = [*map(_value, n.args), *(f"{k}={_value(v)}" for k, v in n.kwargs.items())]
        text = f"{_target(n)}({', '.join(given)})"
    where, code = source_of(n).rpartition("/")[2], code_of(n)
    comment = f"  # {where}" + (f"  {code}" if code else "") if where else ""
    return f"{n.name}: {_type(n)} = {text}{comment}"


def _name(n: fx.Node) -> str:
    return str(n.meta.get(SAID) or (input_name(n) if n.op == "placeholder" else "") or n.name)


def _target(n: fx.Node) -> str:
    return str(n.target) if n.op == "call_method" else str(getattr(n.target, "__name__", n.target)).removesuffix(".default")


def _value(v: Any) -> str:
    if isinstance(v, (list, tuple)):
        return f"[{', '.join(map(_value, v))}]"
    return _name(v) if isinstance(v, fx.Node) else str(v)


def _type(n: fx.Node) -> str:
    v = example_value(n)
    if isinstance(v, torch.Tensor):
        return f"{dtype_text(v.dtype)}[{', '.join(str(size_of(s)) for s in v.shape)}]"
    return type(v).__name__ if v is not None else "?"


def element(n: fx.Node, p: Puller) -> tuple[str, str]:
    """(what one element of a node is called, its term in normal form, "" if it was not asked for); the token is t, the feature h."""
    shape = shape_of(n)
    at = (*row_index(row_variable(rows(n)), shape[:-1]), T.named("h", shape[-1]))
    term = p.memo.get((n, at))
    return line(T.atom(n, at)), "" if term is None else pretty(term)


def read(p: Puller, n: fx.Node) -> list[fx.Node]:
    """The nodes that were looked into for an element of n, in order."""
    seen = {x for x, _ in p.memo}
    return [x for x in n.graph.nodes if x in seen]


def match(m: ExpertsMatch) -> str:
    """Experts as they were read off a term."""
    given = {"tokens": said(m.tokens), "ids": line(m.ids), "weight": line(m.weight)}
    params = {name: ", ".join(map(said, nodes)) for name, nodes in m.nodes().items()}
    return _table({"experts": experts_text(m.experts), **given, **{k: v for k, v in params.items() if v}})


def block(b: Block) -> str:
    """The meaning of a block as it stands."""
    ir = b.ir
    routing = formula(ir.gating) if ir.gating is not None else f"as written: {ir.routing_note or 'not recovered'}"
    lines = {"routing": routing, "experts": experts_text(ir.experts), "shared": shared_text(ir.shared)}
    return _table({**lines, **({} if b.gating is None else {"logits": said(b.gating.logits)})})


def plan(p: BlockPlan) -> str:
    """A plan: each field that says something."""
    return _table({k: v for k, v in _fields(p) if v not in ("()", "None")})


def _fields(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if f.name in ("route", "shared") or f.name == "experts" and not prefix:
            out += [] if v is None else _fields(v, f"{f.name}.")
        else:
            out.append((prefix + f.name, experts_text(v) if f.name == "experts" else str(v)))
    return out


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(f"{k:<{width}}  {v}" for k, v in rows.items())
