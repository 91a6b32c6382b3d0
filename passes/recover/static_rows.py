"""Rows that a model divides by a number which is none of theirs before it rounds them: q = round(y / s), s a constant or a parameter.

Checkpoints with calibrated activation scales hold them (FP8 with `activation_scheme: static`, SmoothQuant's per-tensor mode).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from ...ir import Rows
from .. import terms as T
from ..aten.element import shape_of
from ..aten.names import op_name
from ..aten.node import reached
from ..terms import Term
from . import scales as channels
from .match import Param
from .rows import No, factors, nodes_of
from .selections import unviewed

Limits = tuple[float, float]


def divided(arg: Term, expert: Term, dtype: torch.dtype, limits: Limits) -> tuple[Term, Rows, Term] | None:
    """(s, the record, what runs along the row) of y / s, kept within limits; None where s is no number of the model's own.

    A constant has a variable in its place, which nothing else reads.
    """
    steps = [f.args[0] for f in factors(arg) if f.op == "pow" and f.args[1] == -1 and is_step(f.args[0], expert)]
    if any(f.op == "pow" and any(x.op == "max" for x in T.walk(f.args[0])) for f in factors(arg)):
        return None  # by the rows' own largest numbers, in some way
    k, _ = T.coefficient(arg)
    along = [v for v in arg.atoms if v is not expert and v.args[0] not in ("t", "slot")]
    if len(along) != 1 or len(steps) > 1 or steps and k != 1 or not steps and float(k) <= 0:
        return None
    rows = Rows(8, dtype, static=True, step=0.0 if steps else 1 / float(k), low=float(limits[0]), top=float(limits[1]))
    return (steps[0] if steps else T.var(1, "step")), rows, along[0]


def is_step(a: Term, expert: Term) -> bool:
    """s of all experts, or s[e]: floats that the graph is given, one number of them."""
    if a.op != "a" or channels.is_coded(a) or not channels.is_held(a):
        return False
    if channels.for_expert(a, expert):
        return True
    sizes = shape_of(nodes_of(a)[0])
    return not isinstance(a.args[0], tuple) and all(T.is_c(i, 0) and n == 1 for i, n in zip(a.args[1], sizes, strict=True))


def is_own_number(n: fx.Node) -> bool:
    """Whether a node is one number, made of numbers that the graph is given and of constants: a scale of rows times one of weights."""
    made = reached([n], lambda x: x.all_input_nodes if _is_number(x) else ())
    return _is_number(n) and all(_is_number(x) or unviewed(x).op in ("placeholder", "get_attr") for x in made)


def _is_number(n: fx.Node) -> bool:
    v = n.meta.get("val")
    floats = isinstance(v, torch.Tensor) and v.dtype.is_floating_point
    return op_name(n) in ("mul", "div") and floats and shape_of(n) in ((), (1,))


def operands(a: Term, stacked: bool, count: int) -> list[Param]:
    """The number as an operand [1], of each expert [E, 1], or a list like the weights'. Raises No where it lies otherwise than they do."""
    nodes: Any = a.args[0]
    if isinstance(nodes, tuple):
        if stacked:
            raise No("the numbers that rows are divided by are a list and the weights are stacked")
        return [Param.shaped(n, (1,)) for n in nodes]
    if not any(x.op == "v" for x in a.args[1]):
        return [Param.shaped(nodes, (1,))]
    if shape_of(nodes)[0] != count:
        raise No(f"{nodes} has numbers for {shape_of(nodes)[0]} experts, and there are {count}")
    return [Param.shaped(nodes, (count, 1))]
