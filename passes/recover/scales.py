"""Scales of output channels, as weights stored in few bits have them: Σ_m x[t,m] q[e,i,m] s[e,i] = s[e,i] Σ_m x[t,m] q[e,i,m].

Scales that differ along the inputs stay in the sum (`grids`). In an expert's inside every other scale is a symbol. It belongs to the
projection whose symbol L it can be put into: the activation must be a function of s · L alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from .. import terms as T
from ..aten import names
from ..aten.element import shape_of
from ..aten.names import op_name
from ..aten.sharded import leaf
from ..terms import Term
from ..terms.arithmetic import constant_part
from .match import Param
from .packed import cuts, is_packed
from .rows import WORDS, Cause, No, factors, nodes_of, reads


@dataclass(frozen=True)
class Channel:
    """The scale s[e, row(i) // rows] of a projection: an atom's node (or E nodes), and which of its dims runs over the rows, if any.

    `divides`: the projection is divided by it.
    """

    node: Any
    dim: int | None
    rows: int = 1
    divides: bool = False


def bare(a: Term) -> Term:
    """s of s and of 1 / s."""
    return a.args[0] if a.op == "pow" and a.args[1] == -1 else a


def is_coded(a: Term) -> bool:
    """Whether an atom reads weights that are stored in few bits: whole numbers (truth values are none) or floats of one byte."""
    if is_packed(a):
        return True
    values = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in nodes_of(a)]
    return all(isinstance(v, torch.Tensor) and (is_whole(v.dtype) or is_small_float(v.dtype)) for v in values)


def is_held(a: Term) -> bool:
    """Whether an atom reads tensors that the graph is given, or words of them: nothing that it has computed, as ids are."""
    found = (n for n in nodes_of(a) if isinstance(n, fx.Node))
    return all(n.op in ("placeholder", "get_attr") or WORDS in n.meta or n.target is leaf for n in found)


def is_integer(a: Term) -> bool:
    """Whether an atom reads whole numbers."""
    return is_coded(a) and not is_packed(a) and all(is_whole(n.meta["val"].dtype) for n in nodes_of(a))


def is_whole(dtype: torch.dtype) -> bool:
    """Whether a type holds whole numbers, truth values apart."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def is_small_float(dtype: torch.dtype) -> bool:
    """Whether a type holds floats of one byte with a mantissa; powers of two (e8m0) are scales."""
    return dtype.is_floating_point and dtype.itemsize == 1 and dtype is not torch.float8_e8m0fnu


def coded_weights(t: Term, expert: Term) -> bool:
    """Whether an expert's inside reads a matrix in few bits."""
    return any(x.op == "a" and len(x.args[1]) > 2 and T.uses(x, expert) and is_coded(x) for x in T.walk(t))


def for_expert(a: Term, expert: Term) -> bool:
    """One number for each expert: s[e], s[e, 0], s[e, 0, 0]."""
    if a.op != "a" or not a.args[1] or a.args[1][0] is not expert or is_coded(a):
        return False
    return all(T.is_c(i, 0) for i in a.args[1][1:]) and all(s == 1 for s in shape_of(nodes_of(a)[0])[1 - isinstance(a.args[0], tuple) :])


def tables(core: Term, weight: Term, expert: Term) -> tuple[Term, Term]:
    """(what stands beside the routing weight as one number for each expert, the routing weight without it).

    Where weights are in few bits these are scales that came out of the experts' sums; a factor of the routing may be among them.
    """
    if not coded_weights(core, expert):
        return T.const(1), weight
    found = [f for f in factors(weight) if for_expert(f.args[0] if f.op == "pow" else f, expert)]
    return T.mul(*found), T.mul(*(f for f in factors(weight) if f not in found))


def channel(a: Term, i: Term, expert: Term, stride: int, offset: int) -> Channel:
    """s or 1 / s as the scale of a projection whose rows are stride · i + offset. Raises No when it is laid out in another way."""
    divides, a = bare(a) is not a, bare(a)
    if a.op != "a":
        raise No("a projection has more than one scale beside its low-rank pair (LoRA)", cause=Cause.PAIR)
    first, *idx = a.args[1]
    if first is not expert:
        raise No(f"a scale is not indexed by its expert first{reads(a)}")
    sizes = shape_of(nodes_of(a)[0])[0 if isinstance(a.args[0], tuple) else 1 :]
    running = [d for d, x in enumerate(idx) if T.uses(x, i)]
    if len(running) > 1 or any(not T.is_c(x, 0) or sizes[d] != 1 for d, x in enumerate(idx) if d not in running):
        raise No(f"a scale is no number for each output channel{reads(a)}")
    if is_integer(a):
        raise No("a scale is an integer")
    if not running:
        return Channel(a.args[0], None, divides=divides)
    rows = block_of(idx[running[0]], T.add(T.mul(T.const(stride), i), T.const(offset)))
    if rows is None:
        raise No("a scale is not laid out like the rows of its projection: it may be another one's")
    return Channel(a.args[0], running[0], rows, divides)


def block_of(index: Term, row: Term) -> int | None:
    """b where index = row // b; None where there is no such number."""
    if index is row:
        return 1
    steps = {x.args[1].args[0] for x in T.walk(index) if x.op == "fdiv" and T.is_c(x.args[1])}
    steps |= {v.args[1] for v in row.atoms} if index.op == "c" else set()  # all rows that are read lie in one block
    strides = {T.coefficient(constant_part(row)[1])[0]}
    found = (b * s for b in steps for s in (1, *strides) if isinstance(b, int) and isinstance(s, int))
    return next((b for b in found if T.fdiv(row, b) is index), None)


def params(c: Channel, experts: int, width: int) -> list[Param]:
    """The scale as an operand [E, width], or [E, 1] for one number an expert; a list: [width] or [1]."""
    rows = -(-width // c.rows) if c.dim is not None else 1
    if isinstance(c.node, tuple):
        for n in c.node:
            _check_size(n, c.dim, rows)
        return [Param.shaped(n, (rows,)) for n in c.node]
    shape = shape_of(c.node)
    _check_size(c.node, None if c.dim is None else c.dim + 1, rows)
    if len(shape) == 2 and shape[0] >= experts:
        return [Param(c.node)]
    if shape[0] != experts:
        raise No(f"expert parameter {c.node} has shape {shape}, used for {experts} experts")
    return [Param(c.node, (experts, rows))]


def _check_size(n: fx.Node, dim: int | None, rows: int) -> None:
    if dim is not None and shape_of(n)[dim] != rows:
        raise No(f"expert parameter {n} has shape {shape_of(n)}, used as the scale of {rows} channels")


_OF_MORE = frozenset({"mul", "stack"})  # read more tensors than one
_BY = frozenset({"div", "true_divide"})  # what is divided is the first
_OF_PACKED = frozenset({"sub", "add", "ldexp"})  # the same, of what packed codes stand for
_OF_GROUPS = frozenset({"index", "index_select"})  # zero points, by an index of groups
_SPREAD = names.VIEW | names.CAST | frozenset({"kron", "index", "index_select"})  # what scales go through on their way to their weight


def made_floats(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that hold weights stored in few bits, or what casts, views and products with scales make of them; and those scales."""
    unpacked = cuts(graph)
    found = set(unpacked)
    for n in graph.nodes:
        v = n.meta.get("val")
        if not isinstance(v, torch.Tensor):
            continue
        if n.op in ("placeholder", "get_attr"):
            if v.ndim > 1 and v.dtype.itemsize == 1 and (is_whole(v.dtype) or is_small_float(v.dtype)):
                found.add(n)
        elif op_name(n) in names.VIEW | names.CAST | _OF_MORE | _BY:
            if any(x in found for x in n.all_input_nodes[: None if op_name(n) in _OF_MORE else 1]):
                found.add(n)
        elif op_name(n) in _OF_PACKED | _OF_GROUPS and not unpacked.isdisjoint(_made_from(n)):
            found.add(n)
        if n in found and any(x in unpacked for x in n.all_input_nodes):
            unpacked.add(n)
    return found | {x for n in found if op_name(n) in _BY | {"mul"} for s in n.all_input_nodes if s not in found for x in _spread(s)}


def _made_from(n: fx.Node) -> list[fx.Node]:
    """The inputs of a node whose elements it holds, an index apart."""
    return n.all_input_nodes[:1] if op_name(n) in _OF_GROUPS else n.all_input_nodes


def says_groups(n: fx.Node, codes: set[fx.Node]) -> bool:
    """Whether whole numbers that the graph is given do nothing but choose scales or zero points, one for each input: no expert ids."""
    ends: list[fx.Node] = []
    shown = [n]
    for x in shown:
        for u in x.users:
            (shown if op_name(u) in names.VIEW | names.CAST else ends).append(u)
    groups = (u in codes and op_name(u) in _OF_GROUPS and not _takes_matrices(u) for u in ends)
    return n.op in ("placeholder", "get_attr") and bool(ends) and all(groups)


def _takes_matrices(u: fx.Node) -> bool:
    """Whether an index chooses whole matrices of a stack, as expert ids do."""
    source, index = u.args[0], u.args[1]
    v = source.meta.get("val") if isinstance(source, fx.Node) else None
    first = index == 0 if isinstance(index, int) else isinstance(index, (list, tuple)) and index[0] is not None
    return isinstance(v, torch.Tensor) and v.ndim > 2 and first


def _spread(n: fx.Node) -> list[fx.Node]:
    """Nodes through which a scale goes before it is multiplied."""
    out: list[fx.Node] = []
    while op_name(n) in _SPREAD and n.args and isinstance(n.args[0], fx.Node):
        out.append(n)
        n = n.args[0]
    return out


# ---- which projection a scale belongs to -------------------------------------------------------------------------------


def put_in(
    expr: sp.Expr, scales: Mapping[sp.Symbol, Term], linears: Mapping[sp.Symbol, Any], expert: Term
) -> tuple[sp.Expr, dict[sp.Symbol, sp.Symbol], sp.Symbol | None]:
    """(the activation over L' = s · L, {L: s}, a scale s[e] of the whole). Raises No where a scale stands apart from every projection.

    A projection with a bias has its scale in `linears[L].scale` already, which is left without it.
    """
    left = set(scales)
    found: dict[sp.Symbol, sp.Expr] = {}
    if not left:
        return expr, {}, None
    for name, lin in linears.items():
        if lin.bias is not None:
            found[name] = sp.Mul(*(b**e for b, e in lin.scale.as_powers_dict().items() if b in left))
            lin.scale = sp.cancel(lin.scale / found[name])
    while (place := _next(expr, set(linears) - set(found), left)) is not None:
        name, choice = place
        kin = {s for n, s in found.items() if linears[n].weight == linears[name].weight}
        found[name] = min(choice, key=lambda s: (s not in kin, for_expert(bare(scales[s]), expert), str(s)))
        expr = expr.subs(name, name / found[name])
    expr, whole = _whole(expr, left)
    if whole is not None and not for_expert(bare(scales[whole]), expert):
        raise No(APART)
    wrong = [s for s in found.values() if s != 1 and s not in left]
    if wrong:
        raise No(f"a projection has more than one scale, or is divided by one: {sp.Mul(*wrong)}")
    return expr, {name: s for name, s in found.items() if s != 1}, whole


APART = "a scale is applied to something else than a projection's sum: over an input channel, behind an activation, or twice"


def _whole(expr: sp.Expr, scales: set[sp.Symbol]) -> tuple[sp.Expr, sp.Symbol | None]:
    """expr = s · rest, with no scale in the rest."""
    powers = expr.as_powers_dict()
    own = [s for s in powers if s in scales]
    rest = expr / sp.Mul(*own)
    if len(own) > 1 or scales & rest.free_symbols:
        raise No(APART)
    return rest, own[0] if own else None


def _next(expr: sp.Expr, open_: set[sp.Symbol], scales: set[sp.Symbol]) -> tuple[sp.Symbol, list[sp.Symbol]] | None:
    """A projection and what may be its scale: the scales in a product in which its symbol is the only open one, to the same power.

    Where there is no such product, two projections are only ever multiplied, and either may have either scale.
    """
    rest: tuple[sp.Symbol, list[sp.Symbol]] | None = None
    for place in sorted((*expr.atoms(sp.Mul), expr), key=lambda e: (sp.count_ops(e), str(e))):
        powers = place.as_powers_dict()
        factor = sorted((b for b in powers if b in open_), key=str)
        for name in factor:
            own = [b for b, e in powers.items() if b in scales and e == powers[name] or b in scales and len(factor) > 1]
            if own and len(factor) == 1:
                return name, own
            rest = rest or ((name, own) if own else None)
    return rest
