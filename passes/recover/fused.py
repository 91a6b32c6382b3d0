"""Experts that capture has already put into the graph as the fused op: read back, so that their routing can be recovered too."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch.fx as fx

from ...ir import Experts, Rejection, Stored
from ...ir.codec import decode, record_of
from ...ir.families import FAMILIES, Family
from ...ir.operands import Operands
from ...ir.records import ChainedLayout, Storage
from .. import terms as T
from ..aten import names
from ..aten.conditions import may_train
from ..aten.element import Puller, call_args, dtype_of, shape_of
from ..aten.names import op_name
from .addends import Part, split_parts
from .identity import among
from .match import ExpertsMatch, Param
from .rows import UNFIXED_WIDTH, No, fixed_widths, mapped, row_index, row_variable, rows

_OPS = {f"moe_compile::{family.op}": family for family in FAMILIES}


def is_fused(n: fx.Node) -> bool:
    return _family(n) is not None


def _family(n: fx.Node) -> Family | None:
    return _OPS.get(getattr(getattr(n.target, "_schema", None), "name", "")) if n.op == "call_function" else None


def zero_gradients(m: ExpertsMatch, graph: fx.Graph) -> str:
    """What the report says of a captured loop over a list of experts in training, whose experts without tokens it leaves out."""
    told = is_fused(m.out) and not m.experts.stacked and may_train(graph)
    return "experts that get no token have gradients of zeros, where the loop gives none" if told else ""


def read_fused(n: fx.Node, p: Puller) -> ExpertsMatch | Rejection:
    """The match that an existing `moe_compile::experts` call (or one of its kin) stands for; `out` is the call itself."""
    a, family = call_args(n), _family(n)
    assert family is not None
    x, ids, weights = a.x, a.ids, a.weights
    tokens, k = shape_of(x)[0], shape_of(ids)[-1]
    if not fixed_widths(x, n):
        return Rejection(UNFIXED_WIDTH, n, "experts")
    t, j = row_variable(tokens), T.const(0) if k == 1 else T.named("slot", k)
    ids_term = p.at(ids, (*row_index(t, shape_of(ids)[:-1]), j))
    operands: Operands[Param] = Operands.of(a).map(Param)
    coded = Storage in family.records
    storage = record_of(Storage, [getattr(a, f.name) for f in fields(Storage)]) if coded else None
    up_stored, down_stored = (None, None) if storage is None else storage.stored()
    up_rows, down_rows = (None, None) if storage is None else storage.rows()
    record: Any = record_of(family.records[0], [getattr(a, f.name) for f in fields(family.records[0])])
    others = record.others if isinstance(record, ChainedLayout) else {"intermediate": _inner(a, down_stored)}
    experts = decode(
        Experts,
        record,
        hidden=shape_of(x)[-1],
        **{"out_features": shape_of(n)[-1]} | others,
        up_bias=bool(operands.up_bias),
        down_bias=bool(operands.down_bias),
        ids_mapped=mapped(ids_term),
        dtype=dtype_of(x),
        up_stored=up_stored,
        down_stored=down_stored,
        up_rows=up_rows,
        down_rows=down_rows,
    )
    weight = p.at(weights, (*row_index(t, shape_of(weights)[:-1]), j))
    ids_term, weight = T.canonical(ids_term), T.canonical(weight)
    return ExpertsMatch(experts, n, _unviewed(x), ids_term, weight, t, j, k, operands, a.add)


def with_identity(n: fx.Node, p: Puller, fused: dict[fx.Node, ExpertsMatch], dense: Any) -> ExpertsMatch | None:
    """experts(x, ids, w) + x Σ_j [E <= ids_j < E + z] w_j as the same experts and z identity experts; `fused`: the calls known so far."""
    if not fused or op_name(n) != "add" or len(shape_of(n)) < 2:
        return None
    t, h = row_variable(rows(n)), T.named("h", shape_of(n)[-1])
    try:
        parts, base = split_parts(p.at(n, (*row_index(t, shape_of(n)[:-1]), h)), dense)
    except No:
        return None
    call = _laid_out(base[0].args[0]) if len(base) == 1 and base[0].op == "a" else None
    m = fused.get(call) if isinstance(call, fx.Node) else None
    if m is None or base[0].args[1] != (t, h) or m.experts.num_identity or dtype_of(n) != dtype_of(m.out) or not _goes_only_into(m.out, n):
        return None
    weight = among(m.weight, m.ids, range(m.experts.num_experts))  # of the other ids the call reads none
    copy = T.canonical(T.mul(weight, p.at(m.tokens, (*row_index(t, shape_of(m.tokens)[:-1]), h))))
    if not all(_is_copy(q, m, copy) for q in parts):
        return None
    first = m.experts.num_experts
    if not parts or sorted(q.expert or 0 for q in parts) != list(range(first, first + len(parts))):
        return None
    return replace(m, experts=replace(m.experts, num_identity=len(parts)), out=n, weight=T.canonical(weight))


def _is_copy(q: Part, m: ExpertsMatch, copy: T.Term) -> bool:
    """Whether a part is w · x, by the ids of the experts."""
    return q.ids is not None and T.canonical(q.ids) is m.ids and T.canonical(q.body) is copy


def _laid_out(n: Any) -> Any:
    """y where n is y in the layout of another tensor, empty_like(·).copy_(y); else n."""
    if not isinstance(n, fx.Node) or op_name(n) != "copy" or op_name(n.args[0]) not in names.EMPTY:  # type: ignore[arg-type]
        return n
    y, into = n.args[1], n.args[0]
    same = isinstance(y, fx.Node) and dtype_of(y) == dtype_of(n) and shape_of(y) == shape_of(n)
    return y if same and len(into.users) == 1 else n  # type: ignore[union-attr]


def _goes_only_into(call: fx.Node, n: fx.Node) -> bool:
    """Whether nobody but n reads the call's result: else it would be computed twice."""
    while call is not n and len(call.users) == 1:
        (call,) = call.users
    return call is n


def _unviewed(x: fx.Node) -> fx.Node:
    """The tokens before they were flattened: what a shared expert reads."""
    while op_name(x) in names.RESHAPE and isinstance(x.args[0], fx.Node):
        if shape_of(x.args[0])[-1:] != shape_of(x)[-1:]:
            break
        x = x.args[0]
    return x


def _inner(a: Any, stored: Stored | None) -> int:
    """Intermediate size, off the down projection: [.., out, I], or [.., I, out] when transposed."""
    matrix = shape_of(a.down[0])[-2:]
    out, inner = matrix if stored is None else stored.shape(matrix)  # type: ignore[arg-type]
    return int(out if a.down_transposed else inner)
