"""Experts from terms: out[t,h] = base[t,h] + Σ_j w(t,j) · down(e) act(up(e) x[t]),  e = ids(t,j)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from ...ir import Experts, Form, Rejection, Rows
from ...ir.operands import Operands
from .. import terms as T
from ..aten import names
from ..aten.element import Puller, dtype_of, shape_of
from ..aten.names import op_name
from ..terms import Term
from . import adapters, coded, smooth, static_rows
from . import scales as channels
from .addends import rolled, slot_variable, split_parts
from .body import Core, parse_core
from .carrier import carrier, feature
from .chain import holds_rows_of_experts, holds_statistics, read_chain
from .copies import EXPERT, OneBody, one_body
from .doubled import as_list
from .forms import layout
from .linear import Linear
from .match import ExpertsMatch, Param
from .merged import apart
from .rounding import Rounding, unrounded
from .rows import (
    NO_EXPERTS,
    UNFIXED_WIDTH,
    Cause,
    No,
    called,
    data_dependent,
    factors,
    fixed_widths,
    ids_atom,
    mapped,
    outer_atoms,
    parted,
    reads,
    row_index,
    row_variable,
    rows,
)
from .ways import Function, Way, read

BESIDE = "beside"  # code of what other numbers of the router than the experts' stand for


def match_experts(p: Puller, out: fx.Node, dense: Any) -> ExpertsMatch | Rejection:
    """Read the experts off the result node `out`; `dense(term)` looks into tensors that hold all experts' outputs."""
    try:
        return _match(p, out, dense)
    except No as e:
        return Rejection(str(e), out, "experts", code=e.code)


def _match(p: Puller, out: fx.Node, dense: Any) -> ExpertsMatch:
    shape = shape_of(out)
    t, h = row_variable(rows(out)), T.named("h", shape[-1])
    term = p.at(out, (*row_index(t, shape[:-1]), h))
    if not any(x.op in ("topk", "sv", "nz", "a") and x.op != "a" or (x.op == "a" and ids_atom(x)) for x in T.walk(term)):
        raise No("the result does not depend on expert ids", NO_EXPERTS)
    parts, base = split_parts(term, dense)
    if not parts:
        raise No("no expert is applied", NO_EXPERTS)
    parts = rolled(parts)
    j, k = slot_variable(parts)
    return _assemble(p, out, one_body(parts), base, t, h, j, k)


def _assemble(p: Puller, out: fx.Node, one: OneBody, base: list[Term], t: Term, h: Term, j: Term, k: int) -> ExpertsMatch:
    ids, identity, body = one.ids, one.identity, one.body
    expert = next((v for v in body.atoms if v.args[0] == EXPERT), None)
    if expert is None:
        raise No("no expert weight is read", NO_EXPERTS)
    count: int = expert.args[1]
    f, rounding = _read(adapters.of_each(apart(body, expert), t, expert), t, h, expert)
    weight = T.subst(f.weight, {expert: ids}) if T.uses(f.weight, expert) else f.weight
    _check_identity(identity, count, weight, f.tokens, h)
    _check_rows(ids, t, j, k, {x.args[1][:-1] for x in f.tokens})
    tokens = token_node(p, f.tokens, t, out)
    if not fixed_widths(tokens, out):
        raise No(UNFIXED_WIDTH)
    experts = Experts(
        num_experts=count,
        hidden=shape_of(tokens)[-1],
        out_features=shape_of(out)[-1],
        num_identity=len(identity),
        ids_mapped=mapped(ids.args[0] if ids.op == "mod" and T.is_c(ids.args[1], count) else ids),
        dtype=compute_dtype(p, tokens, out),
        first=one.first,
        **f.fields,
    )
    experts = _with_rows(experts, rounding.up, rounding.down)
    _check_rounded(experts, dtype_of(tokens))
    scales = {f"{n}_smooth": tuple(_of_rows(experts, rounding, n)) for n in ("up", "down")}
    operands = replace(f.operands(experts), **scales)
    return ExpertsMatch(experts, out, tokens, ids, weight, t, j, k, operands, base_node(p, base, out, t, h), f.join)


def _of_rows(e: Experts, rounding: Rounding, name: str) -> list[Param]:
    """Smooth scales of a projection's rows, or the number that static ones are divided by."""
    rows, k = getattr(e, f"{name}_rows"), getattr(rounding, f"{name}_smooth")
    if rows is not None and rows.static:
        return [] if k is None else static_rows.operands(k, e.stacked, e.num_experts)
    return smooth.operands(k, e.stacked, e.num_experts)


def _read(body: Term, t: Term, h: Term, expert: Term) -> tuple[Function, Rounding]:
    """An expert's function without rounding. Numbers in what is rounded are smooth scales where the function is none of ours with them."""
    try:
        plain = unrounded(body, h, expert)
        return read(WAYS, plain.body, t, h, expert), plain
    except No as e:
        try:
            found = unrounded(body, h, expert, smooth=True)
            if found.up_smooth is found.down_smooth is None:
                raise e
            return read(WAYS, found.body, t, h, expert), found
        except No:
            raise e from None


def _as_two_products(body: Term, t: Term, h: Term, expert: Term) -> Function:
    """Two products with an activation between them."""
    try:
        two = _two_products(body, t, h, expert)
    except No as e:
        if e.cause is Cause.OTHER and holds_statistics(body, expert):
            raise No(str(e), e.code, Cause.ROWS) from None
        raise
    if holds_rows_of_experts(two.weight, expert, two.tokens if two.fields["weight_on_input"] else ()):
        raise No("a routing weight is a number of the experts' own rows", cause=Cause.ROWS)
    return two


def _as_chain(body: Term, t: Term, h: Term, expert: Term) -> Function:
    """A chain of products and maps of rows."""
    try:
        c = read_chain(body, h, expert)
    except No:
        if adapters.normed(body, t, expert):
            raise No(adapters.DORA, cause=Cause.WEIGHTS) from None
        raise
    return Function(c.fields(), [c.tokens], c.weight, lambda _: Operands.named(parts=c.operands))


_ROWS = frozenset({Cause.ROWS})
WAYS = (
    Way("two products", _as_two_products, {}),
    Way("chain", _as_chain, dict.fromkeys(Cause, _ROWS) | {Cause.TELLING: _ROWS | {Cause.OTHER}, Cause.WEIGHTS: frozenset(Cause)}),
)


def _two_products(body: Term, t: Term, h: Term, expert: Term) -> Function:
    parsed, weight = _core_and_weight(body, t, h, expert)
    form, order, expression = layout(parsed)
    ups = [parsed.linears[s] for s in order]
    _check_stored(ups, parsed.down, form)
    fields = dict(
        intermediate=parsed.inner,
        form=form,
        activation=expression,
        stacked=not isinstance(ups[0].weight, tuple),
        up_transposed=ups[0].transposed,
        down_transposed=parsed.down.transposed,
        up_bias=ups[0].bias is not None,
        down_bias=parsed.down.bias is not None,
        weight_on_input=parsed.on_input is not None,
        up_stored=coded.stored(ups),
        down_stored=coded.stored([parsed.down]),
        **adapters.scales(ups, parsed.down, form),
    )
    stored = ups if form is Form.SEPARATE else ups[:1]
    join = adapters.join(stored, parsed.down, expert.args[1])
    return Function(fields, parsed.tokens, weight, lambda e: parameters(e, stored, parsed.down), join)


def _core_and_weight(body: Term, t: Term, h: Term, expert: Term) -> tuple[Core, Term]:
    """body = w(t, e) · core(t, h, e): an expert's own function, and the routing weight, which may stand on the expert's input."""
    core, weight = parted(body, h)
    tables, weight = channels.tables(core, weight, expert)
    parsed = parse_core(core, t, h, expert, weight, tables)
    if not isinstance(parsed.inner, int):
        raise No("the expert's inner size is not a fixed number")
    if parsed.table is not None and parsed.down.channel is None:
        parsed.down.channel = channels.channel(parsed.table, h, expert, 1, 0)
    elif parsed.table is not None:
        weight = T.mul(weight, parsed.table)
    return parsed, weight if parsed.on_input is None else parsed.on_input


def _with_rows(e: Experts, up: Rows | None, down: Rows | None) -> Experts:
    if not e.coded and (how := up or down):
        raise No(f"rows are rounded to fewer bits ({how.dtype}) and weights are not".replace("torch.", ""))
    return replace(e, up_rows=up, down_rows=down)


def _check_stored(ups: list[Linear], down: Linear, form: Form) -> None:
    """All of an expert's parameters are stored alike."""
    for x in (*ups, down):
        as_list(x)
    if len({(x.transposed, x.flat, isinstance(x.weight, tuple)) for x in ups}) != 1 or len({x.bias is None for x in ups}) != 1:
        raise No("gate and up projections are stored differently")
    stacked = not isinstance(ups[0].weight, tuple)
    if stacked == isinstance(down.weight, tuple):
        raise No("some expert weights are stacked and some are not")
    if any(x.bias is not None and stacked == isinstance(x.bias, tuple) for x in (*ups, down)):
        raise No("of the experts' weights and biases some are stacked and some are not")
    coded.check(ups, down, form)
    adapters.check(ups, form)


def parameters(e: Experts, store: list[Linear], down: Linear) -> Operands[Param]:
    """The nodes of every parameter. `store`: the up projections as they are stored."""
    count, width = e.num_experts, e.intermediate * (2 if e.form in (Form.CONCAT, Form.INTERLEAVED) else 1)
    up_shape, down_shape = (width, e.hidden), (e.out_features, e.intermediate)

    def weights(x: Linear, shape: tuple[int, int]) -> list[Param]:
        return coded.words(x, count, shape) if x.words is not None else params(x.weight, (count, *shape), x.transposed, x.flat)

    return Operands.named(
        up=[q for x in store for q in weights(x, up_shape)],
        down=weights(down, down_shape),
        up_bias=[q for x in store if x.bias is not None for q in params(x.bias, (count, width), False, False)],
        down_bias=params(down.bias, (count, e.out_features), False, False) if down.bias is not None else [],
        up_scale=[q for x in store for q in coded.scales(x, count, up_shape)],
        down_scale=coded.scales(down, count, down_shape),
        up_zero=[q for x in store for q in coded.zeros(x, count, up_shape)],
        down_zero=coded.zeros(down, count, down_shape),
        up_table=coded.tables(store, count),
        down_table=coded.tables([down], count),
        up_group=[q for x in store for q in coded.groups(x, count, up_shape)],
        down_group=coded.groups(down, count, down_shape),
        up_second=[q for x in store for q in coded.seconds(x, count, up_shape)],
        down_second=coded.seconds(down, count, down_shape),
        **adapters.operands(store, down, width, (e.hidden, e.intermediate, e.out_features)),
    )


def compute_dtype(p: Puller, tokens: fx.Node, out: fx.Node) -> torch.dtype:
    """The dtype the experts' matrix products are computed in: autocast may make it another one than the tokens'."""
    found = {dtype_of(n) for n, _ in p.memo if n.op == "call_function" and op_name(n) in names.CONTRACTION and not p.stop(n)}
    found = {d for d in found if d.is_floating_point}
    return found.pop() if len(found) == 1 else dtype_of(tokens if dtype_of(tokens).itemsize > 1 else out)


def _check_rounded(e: Experts, tokens: torch.dtype) -> None:
    """The op has tokens in the type of its products; rows that the model rounds from a wider one are other rows."""
    if e.up_rows is not None and e.dtype.itemsize < tokens.itemsize:
        raise No(
            f"rows of {tokens} are rounded to {e.up_rows.dtype}, and multiplied in {e.dtype}: the op takes tokens of one type for both"
        )


def _check_rows(ids: Term, t: Term, j: Term, k: int, tokens: set[tuple[Term, ...]]) -> None:
    """Ids must be those of token t in slot j: [T, k] tensors (or [B, S, k]), read row by row; or one a token, read where the tokens are."""
    for x in T.walk(ids):
        if k == 1 and x.op == "a" and x.args[1] in tokens:
            continue
        if x.op == "topk" or x.op == "a" and len(x.args[1]) > 1:
            *lead, last = x.args[1]
            free = {v for i in x.args[1] for v in i.atoms}
            beyond = bool(free - {t, j})
            if not beyond and any(data_dependent(i) for i in x.args[1]):  # a table, read at a choice that is looked at itself
                continue
            if beyond or (last is not j and T.uses(last, t)) or any(T.uses(i, j) for i in lead if j.op == "v"):
                raise No(f"the expert ids are not one row a token{reads(ids)}")
            if t.op == "v" and len(lead) == 1 and lead[0].op in ("fdiv", "mod") and lead[0].args[1].args[0] == k > 1:
                raise No(f"the expert ids are not one row a token{reads(ids)}")
            if k == 1 and T.uses(last, t):
                raise No(f"the expert ids are not one row a token{reads(ids)}")


def _check_identity(identity: dict[int, Term], count: int, weight: Term, tokens: list[Term], h: Term) -> None:
    """Identity experts must be w · x[t, h], with the same w and x as the others, numbered on from E."""
    if not identity:
        return
    (x,) = {a.args[0] for a in tokens}
    for e, c in identity.items():
        xs = [f for f in factors(c) if f.op == "a" and f.args[0] is x and T.uses(f, h)]
        if len(xs) != 1 or T.mul(*(f for f in factors(c) if f is not xs[0])) is not weight:
            what = "gives the same vector for all tokens" if _is_constant(c, h) else "is neither like the others nor the identity"
            raise No(f"expert {e} {what}: beside experts of one function only the identity (a copy of the token) is read", BESIDE)
    gap = next((e for e in range(count, max(identity)) if e not in identity), None)
    if gap is not None:
        why = f"no expert has number {gap}, and number {max(identity)} is the identity"
        raise No(f"{why}: identity experts are read where their numbers follow the others' without a gap", BESIDE)
    if min(identity) < 0:
        raise No("identity experts come before the others: they are read where their numbers follow the others'", BESIDE)


def _is_constant(c: Term, h: Term) -> bool:
    """Whether an expert's output is a weight of the routing times numbers [H] that no token enters."""
    features = [a for a in outer_atoms(c) if T.uses(a, h)]
    return bool(features) and all(a.args[1] == (h,) for a in features)


def token_node(p: Puller, tokens: list[Term], t: Term, out: fx.Node) -> fx.Node:
    """The node whose flattened rows are the experts' input."""
    if len(set(tokens)) != 1:
        raise No("gate and up projections read different inputs")
    x = tokens[0]
    m = feature(x)
    node = carrier(p, x, t, out) if m is not None and m.args[0] == "m" else None
    if node is None:
        raise No(f"no tensor of the graph holds the experts' input rows in the order of the tokens{reads(x)}")
    return node


def params(nodes: Any, full: tuple[Any, ...], transposed: bool, flat: bool) -> list[Param]:
    """Check a parameter's shape against its use; `full` is [E, rows, cols] (or [E, rows] for a bias)."""
    want = (full[0], *full[1:][::-1]) if transposed else full
    if isinstance(nodes, tuple):
        for n in nodes:
            if shape_of(n) != tuple(want[1:]):
                raise No(f"expert parameter {called(n)} has shape {shape_of(n)}, used as {want[1:]}")
        return [Param(n) for n in nodes]
    if flat:
        if shape_of(nodes)[0] != want[0] * want[1]:
            raise No(f"expert parameter {called(nodes)} has shape {shape_of(nodes)}, used as {want}")
        return [Param(nodes, tuple(want))]
    shape = shape_of(nodes)
    if shape[1:] != tuple(want[1:]) or shape[0] < want[0]:  # rows of identity experts may follow
        raise No(f"expert parameter {called(nodes)} has shape {shape}, used as {want}")
    return [Param(nodes)]


def base_node(p: Puller, base: list[Term], out: fx.Node, t: Term, h: Term) -> fx.Node | None:
    """The accumulator's start: nothing, or one tensor read at the result's own index."""
    if not base:
        return None
    if len(base) == 1 and base[0].op == "a" and isinstance(base[0].args[0], fx.Node) and base[0].args[1][-1:] == (h,):
        node = carrier(p, base[0], t, out)
        if node is not None and dtype_of(node) == dtype_of(out):
            return node
    raise No(f"the accumulator starts from more than one tensor{reads(T.add(*base))}")
