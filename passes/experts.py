"""Experts from terms: out[t,h] = base[t,h] + Σ_j w(t,j) · down(e) act(up(e) x[t]),  e = ids(t,j)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from .. import activation as act
from ..ir import Experts, Form, Rejection
from . import terms as T
from .match import ExpertsMatch, Param
from .pull import CONTRACTIONS, Puller, dtype_of, op_name, shape_of
from .terms import Term
from .unify import constant_part, unify


class No(Exception):
    """The first predicate that failed."""


@dataclass
class Part:
    """One addend of the result that depends on experts: expert number (None: any), slot variable, product of factors."""

    expert: int | None
    body: Term
    ids: Term | None


@dataclass
class Linear:
    """Σ_m x[t,m] W[e, row(i), m]: `stride`, `offset` of row(i); `bias` an atom or None."""

    weight: Any
    stride: int
    offset: int
    transposed: bool
    flat: bool
    bias: Any = None


@dataclass
class Core:
    """One expert's function, parsed."""

    down: Linear
    linears: dict[sp.Symbol, Linear]
    expr: sp.Expr
    inner: Any
    on_input: Term | None = None
    tokens: list[Term] = field(default_factory=list)


def match_experts(p: Puller, out: fx.Node, dense: Any) -> ExpertsMatch | Rejection:
    """Read the experts off the result node `out`; `dense(term)` looks into tensors that hold all experts' outputs."""
    try:
        return _match(p, out, dense)
    except No as e:
        return Rejection(str(e), out, "experts")


def _match(p: Puller, out: fx.Node, dense: Any) -> ExpertsMatch:
    shape = shape_of(out)
    t, h = row_variable(rows(out)), T.named("h", shape[-1])
    term = p.at(out, (*row_index(t, shape[:-1]), h))
    if not any(x.op in ("topk", "sv", "nz", "a") and x.op != "a" or (x.op == "a" and _ids_atom(x)) for x in T.walk(term)):
        raise No("the result does not depend on expert ids")
    parts, base = split_parts(term, dense)
    if not parts:
        raise No("no expert is applied")
    parts = rolled(parts)
    j, k = slot_variable(parts)
    body, ids, foreign = one_body(parts, j)
    return _assemble(p, out, body, ids, base, t, h, j, k, foreign)


def row_variable(tokens: Any) -> Term:
    """The token index; with a single token it is 0, as it is wherever a dim of size 1 is read."""
    if isinstance(tokens, sp.Expr):
        tokens = sp.expand(tokens)
    return T.const(0) if tokens == 1 else T.named("t", tokens)


def rows(n: fx.Node) -> Any:
    """Number of rows when all leading dims are flattened."""
    total: Any = 1
    for s in shape_of(n)[:-1]:
        total = total * s
    return total


def is_row(a: Term, d: int) -> bool:
    """Whether dim d of an atom is read at the token itself."""
    i = a.args[1][d]
    if data_dependent(i):
        return False
    if any(v.args[0] == "t" for v in i.atoms):
        return True
    return T.is_c(i, 0) and isinstance(a.args[0], fx.Node) and shape_of(a.args[0])[d] == 1


def row_index(t: Term, lead: tuple[Any, ...]) -> tuple[Term, ...]:
    """t as an index into the leading dims (row-major)."""
    rev: list[Term] = []
    flat = t
    for n, s in enumerate(reversed(lead)):
        last = n == len(lead) - 1
        rev.append(flat if last else T.mod(flat, s))
        flat = flat if last else T.fdiv(flat, s)
    return tuple(rev[::-1])


def _ids_atom(x: Term) -> bool:
    n = x.args[0]
    return isinstance(n, fx.Node) and hasattr(n.meta.get("val"), "dtype") and not n.meta["val"].dtype.is_floating_point


# ---- addends -----------------------------------------------------------------------------------------------------------


def factors(t: Term) -> tuple[Term, ...]:
    return t.args if t.op == "mul" else (t,)


def outer_atoms(t: Term) -> list[Term]:
    """Atoms that are values (not those inside another atom's index), each once."""
    out: dict[Term, None] = {}
    seen: set[Term] = set()
    stack = [t]
    while stack:
        x = stack.pop()
        if x in seen:
            continue
        seen.add(x)
        if x.op == "a":
            out[x] = None
        elif x.op not in ("eq", "lt", "topk"):
            stack.extend(T.children(x))
    return list(out)


def data_dependent(i: Term) -> bool:
    """Whether an index term is read from data (an expert id), not computed from loop variables."""
    return any(x.op in ("topk", "sv") or (x.op == "a") for x in T.walk(i))


def split_parts(term: Term, dense: Any) -> tuple[list[Part], list[Term]]:
    """Addends that apply experts, and the rest (the accumulator base)."""
    parts: list[Part] = []
    base: list[Term] = []
    for a in term.args if term.op == "add" else (term,):
        found = _parts_of(a, dense)
        if found:
            parts.extend(found)
        elif not T.is_c(a, 0):
            base.append(a)
    return parts, base


def _parts_of(a: Term, dense: Any) -> list[Part]:
    """Σ_j c · body of one addend, opened into one part for each expert that is named by a condition."""
    a = scaled_input(dense(a)) or a
    sums = [f for f in factors(a) if f.op == "sum" and _routes(f)]
    if len(sums) > 1:  # the other ones are a part of the weights
        sums = [f for f in sums if _has_feature(f)] or [f for f in sums if any(_condition(x) for x in factors(f.args[1]))]
    outer = [f for f in factors(a) if f not in sums[:1]]
    if sums:
        v, inner = sums[0].args
        slot = T.named("slot", v.args[1])
        body = T.mul(*outer, T.subst(inner, {v: slot}))
        if body.op == "add":
            return [q for x in body.args for q in _open(x, dense)]
        return _open(body, dense)
    return _open(a, dense)


def scaled_input(a: Term) -> Term | None:
    """Σ_e F(Σ_j [ids_j = e] g_j, e) = Σ_j F(g_j, ids_j) when F(0, e) = 0: every expert sees every token, scaled by its weight or 0."""
    for s in factors(a):
        if s.op != "sum":
            continue
        v, body = s.args
        for x in T.walk(body):
            found = _gate_of(x, v) if x.atoms <= body.atoms else None
            if found is None or not T.is_c(T.subst(body, {x: T.const(0)}), 0):
                continue
            j, ids, g = found
            inner = T.subst(T.subst(body, {x: g}), {v: ids})
            inner = inner if j is None else T.reduce_("sum", j, inner)
            return T.mul(inner, *(f for f in factors(a) if f is not s))
    return None


def _gate_of(x: Term, v: Term) -> tuple[Term | None, Term, Term] | None:
    """(slot variable or None, ids, g) when x is Σ_j [ids_j = v] g_j, or [ids = v] itself."""
    j, inner = x.args if x.op == "sum" else (None, x)
    for f in factors(inner) if x.op == "sum" else (x,):
        if f.op == "eq":
            for ids, other in (f.args, f.args[::-1]):
                if other is v and data_dependent(ids):
                    g = T.mul(*(y for y in factors(inner) if y is not f)) if x.op == "sum" else T.const(1)
                    return None if T.uses(g, v) else (j, ids, g)
    return None


def _has_feature(t: Term) -> bool:
    return any(v.args[0] == "h" for v in t.atoms)


def _routes(s: Term) -> bool:
    """Whether a sum runs over the selected experts: its variable stands inside expert ids."""
    v = s.args[0]
    for x in T.walk(s.args[1]):
        if x.op == "topk" and any(T.uses(i, v) for i in x.args[1]):
            return True
        if x.op == "a" and _ids_atom(x) and any(T.uses(i, v) for i in x.args[1]):
            return True
    return False


def _open(body: Term, dense: Any) -> list[Part]:
    """Open `[ids = e] · y` and `ite([ids = 0], y0, ite([ids = 1], y1, ...))`."""
    body = dense(body)
    fs = list(factors(body))
    for f in fs:
        chain = _chain(f)
        if chain is not None:
            rest = T.mul(*(g for g in fs if g is not f))
            return [Part(e, T.mul(rest, given(y, ids, e)), ids) for ids, e, y in chain]
    for f in fs:
        hit = _condition(f)
        if hit is not None:
            ids, e = hit
            return [Part(e, given(T.mul(*(g for g in fs if g is not f)), ids, e), ids)]
    if any(data_dependent(i) for a in outer_atoms(body) for i in a.args[1] if not _plain_row(a)):
        return [Part(None, body, None)]
    return []


def given(t: Term, ids: Term, e: int) -> Term:
    """t where ids = e is known: conditions on ids inside it are decided."""
    mapping = {}
    for x in T.walk(t):
        if x.op == "eq" and ids in x.args:
            (c,) = (y for y in x.args if y is not ids)
            if c.op == "c":
                mapping[x] = T.const(c.args[0] == e)
    return T.subst(t, mapping) if mapping else t


def _plain_row(a: Term) -> bool:
    """Whether an atom has the token row itself as an index (scores and tokens do, weights do not)."""
    return any(is_row(a, d) for d in range(len(a.args[1])))


def _condition(f: Term) -> tuple[Term, int] | None:
    """[ids = e] with a number e."""
    if f.op == "eq":
        for x, c in (f.args, f.args[::-1]):
            if c.op == "c" and isinstance(c.args[0], int) and data_dependent(x):
                return x, c.args[0]
    return None


def _chain(f: Term) -> list[tuple[Term, int, Term]] | None:
    out: list[tuple[Term, int, Term]] = []
    while f.op == "ite":
        hit = _condition(f.args[0])
        if hit is None:
            return None
        out.append((*hit, f.args[1]))
        f = f.args[2]
    if not out:
        return None
    if f.op == "mul":
        hits = [(g, _condition(g)) for g in f.args]
        conds = [(g, c) for g, c in hits if c is not None]
        if len(conds) == 1:
            g, c = conds[0]
            out.append((*c, T.mul(*(x for x in f.args if x is not g))))
            return out
    if T.is_c(f, 0) or (f.op == "a" and isinstance(f.args[0], fx.Node) and "empty" in str(f.args[0].target)):
        return out
    raise No("rows that no expert writes keep an old value")


def rolled(parts: list[Part]) -> list[Part]:
    """Slots that are written out, f(slot 0) + ... + f(slot k-1), as one part (for each expert) in the slot variable."""
    groups: dict[int | None, list[Part]] = {}
    for q in parts:
        groups.setdefault(q.expert, []).append(q)
    k = len(next(iter(groups.values())))
    if k < 2 or any(len(g) != k for g in groups.values()):
        return parts
    out = [_rolled(g, T.named("slot", k)) for g in groups.values()]
    return parts if None in out else [q for q in out if q is not None]


def _rolled(group: list[Part], slot: Term) -> Part | None:
    forms, slots = set(), []
    for q in group:
        terms = [q.body, *([q.ids] if q.ids is not None else [])]
        found = {x for t in terms for x in T.walk(t) if x.op == "topk" and x.args[1][-1].op == "c"}
        if len(found) != 1:
            return None
        (x,) = found
        mapping = {x: T.mk("topk", x.args[0], (*x.args[1][:-1], slot))}
        forms.add((T.canonical(T.subst(q.body, mapping)), None if q.ids is None else T.canonical(T.subst(q.ids, mapping))))
        slots.append(x.args[1][-1].args[0])
    if len(forms) != 1 or sorted(slots) != list(range(len(group))):
        return None
    ((body, ids),) = forms
    return Part(group[0].expert, body, ids)


def slot_variable(parts: list[Part]) -> tuple[Term, int]:
    slots = {
        v for part in parts for t in (part.body, *([part.ids] if part.ids is not None else [])) for v in t.atoms if v.args[0] == "slot"
    }
    if not slots:
        return T.const(0), 1
    if len(slots) > 1:
        raise No("the experts are summed over different numbers of slots")
    (slot,) = slots
    if not isinstance(slot.args[1], int):
        raise No("the number of selected experts is not a fixed number")
    return slot, slot.args[1]


# ---- one function of (t, slot, expert) ---------------------------------------------------------------------------------

EXPERT = "expert"


def one_body(parts: list[Part], j: Term) -> tuple[Term, Term, dict[int, Term]]:
    """(body in the variable `expert`, the ids term, parts of experts that are another function)."""
    named = [q for q in parts if q.expert is not None]
    if named and len(named) != len(parts):
        raise No("some experts are named by number and some are looked up")
    if not named:
        if len(parts) > 1:
            raise No("more than one term looks experts up")
        return _looked_up(parts[0])
    ids = {q.ids for q in named}
    if len(ids) > 1:
        raise No("the experts are chosen by different ids")
    by_expert: dict[int, list[Term]] = {}
    for q in named:
        assert q.expert is not None
        by_expert.setdefault(q.expert, []).append(q.body)
    copies = {e: T.canonical(T.add(*bs)) if len(bs) == 1 else _twice(e) for e, bs in by_expert.items()}
    identity = {e: c for e, c in copies.items() if _is_identity(c)}
    real = {e: c for e, c in copies.items() if e not in identity}
    if not real:
        raise No("no expert is applied")
    if sorted(real) != list(range(len(real))):
        raise No(f"the experts are not 0..{len(real) - 1}, each once: {_brief(sorted(real))}")
    expert = T.named(EXPERT, len(real))
    body = unify(real, expert)
    if isinstance(body, str):
        raise No(body)
    (the_ids,) = ids
    assert the_ids is not None
    return body, the_ids, identity


def _twice(e: int) -> Term:
    raise No(f"expert {e} is applied twice")


def _brief(xs: list[int]) -> str:
    return str(xs) if len(xs) < 12 else f"{xs[:5]}...{xs[-2:]}"


def _is_identity(c: Term) -> bool:
    return not any(x.op == "sum" and any(v.args[0] == "h" for v in x.atoms) for x in T.walk(c))


def _looked_up(part: Part) -> tuple[Term, Term, dict[int, Term]]:
    """Weights are indexed by the ids themselves: name that index `expert`."""
    found: dict[Term, None] = {}
    sizes = []
    core = T.mul(*(f for f in factors(part.body) if _has_feature(f)))
    for a in outer_atoms(core):
        if _plain_row(a) or len(a.args[1]) < 2 or not any(data_dependent(i) for i in a.args[1]):
            continue
        for d, i in enumerate(a.args[1]):
            for piece in i.args if i.op == "add" else (i,):
                if data_dependent(piece):
                    found[T.coefficient(piece)[1]] = None
                    stride = T.coefficient(piece)[0]
                    n = len(a.args[0]) if isinstance(a.args[0], tuple) and d == 0 else _dim(a, d)
                    sizes.append(T.exact_div(n, stride))
    if len(found) != 1:
        raise No("expert weights are indexed by different ids" if found else "no expert weight is indexed by the ids")
    if len(set(sizes)) != 1 or not isinstance(sizes[0], int):
        raise No("expert weights disagree on the number of experts")
    (ids,) = found
    expert = T.named(EXPERT, sizes[0])
    mapping = {}
    for a in outer_atoms(part.body):
        if not _plain_row(a) and len(a.args[1]) > 1 and any(data_dependent(i) for i in a.args[1]):
            mapping[a] = T.atom(a.args[0], tuple(T.subst(i, {ids: expert}) for i in a.args[1]))
    return T.canonical(T.subst(part.body, mapping)), ids, {}


def _dim(a: Term, d: int) -> Any:
    return shape_of(a.args[0])[d]


# ---- the function itself -----------------------------------------------------------------------------------------------


def _assemble(
    p: Puller, out: fx.Node, body: Term, ids: Term, base: list[Term], t: Term, h: Term, j: Term, k: int, identity: dict[int, Term]
) -> ExpertsMatch:
    expert = next((v for v in body.atoms if v.args[0] == EXPERT), None)
    if expert is None:
        raise No("no expert weight is read")
    count: int = expert.args[1]
    is_core = [T.uses(f, h) for f in factors(body)]
    core = T.mul(*(f for f, c in zip(factors(body), is_core, strict=True) if c))
    weight = T.mul(*(f for f, c in zip(factors(body), is_core, strict=True) if not c))
    parsed = parse_core(core, t, h, expert, weight)
    if parsed.on_input is not None:
        weight = parsed.on_input
    weight = T.subst(weight, {expert: ids}) if T.uses(weight, expert) else weight
    _check_identity(identity, count, weight, parsed, t, h)
    _check_rows(ids, t, j, k)
    tokens = token_node(parsed.tokens, t)
    if not T.same_size(rows(tokens), rows(out)):
        raise No("the experts' input has another number of rows than their result")
    form, order, expression = layout(parsed)
    inter = parsed.inner
    if not isinstance(inter, int):
        raise No("the expert's inner size is not a fixed number")
    hidden = shape_of(tokens)[-1]
    ups = [parsed.linears[s] for s in order]
    if len({(x.transposed, x.flat, isinstance(x.weight, tuple)) for x in ups}) != 1 or len({x.bias is None for x in ups}) != 1:
        raise No("gate and up projections are stored differently")
    stacked = not isinstance(ups[0].weight, tuple)
    if stacked == isinstance(parsed.down.weight, tuple):
        raise No("some expert weights are stacked and some are not")
    store = ups if form is Form.SEPARATE else ups[:1]
    width = inter * (2 if form in (Form.CONCAT, Form.INTERLEAVED) else 1)
    experts = Experts(
        num_experts=count,
        hidden=hidden,
        intermediate=inter,
        out_features=shape_of(out)[-1],
        form=form,
        activation=expression,
        stacked=stacked,
        up_transposed=ups[0].transposed,
        down_transposed=parsed.down.transposed,
        up_bias=ups[0].bias is not None,
        down_bias=parsed.down.bias is not None,
        weight_on_input=parsed.on_input is not None,
        num_identity=len(identity),
        ids_mapped=ids.op != "topk" and not (ids.op == "a" and not any(data_dependent(i) for i in ids.args[1])),
        dtype=compute_dtype(p, tokens),
    )
    up = [q for x in store for q in params(x.weight, (count, width, hidden), x.transposed, x.flat)]
    return ExpertsMatch(
        experts=experts,
        out=out,
        tokens=tokens,
        ids=ids,
        weight=weight,
        t=t,
        j=j,
        k=k,
        up=up,
        down=params(parsed.down.weight, (count, experts.out_features, inter), parsed.down.transposed, parsed.down.flat),
        up_bias=[q for x in store if x.bias is not None for q in params(x.bias, (count, width), False, False)],
        down_bias=params(parsed.down.bias, (count, experts.out_features), False, False) if parsed.down.bias is not None else [],
        base=base_node(base, out, t, h),
    )


def compute_dtype(p: Puller, tokens: fx.Node) -> torch.dtype:
    """The dtype the experts' matrix products are computed in: autocast may make it another one than the tokens'."""
    found = {dtype_of(n) for n, _ in p.memo if n.op == "call_function" and op_name(n) in CONTRACTIONS and not p.stop(n)}
    found = {d for d in found if d.is_floating_point}
    return found.pop() if len(found) == 1 else dtype_of(tokens)


def _check_rows(ids: Term, t: Term, j: Term, k: int) -> None:
    """Ids must be those of token t in slot j: [T, k] tensors (or [B, S, k]), read row by row."""
    for x in T.walk(ids):
        if x.op == "topk" or x.op == "a" and len(x.args[1]) > 1:
            *lead, last = x.args[1]
            free = {v for i in x.args[1] for v in i.atoms}
            if free - {t, j} or (last is not j and T.uses(last, t)) or any(T.uses(i, j) for i in lead if j.op == "v"):
                raise No(f"the expert ids are not one row a token: {_clip(ids)}")
            if t.op == "v" and any(i.op in ("fdiv", "mod") and i.args[1].args[0] == k for i in lead) and k > 1:
                raise No(f"the expert ids are not one row a token: {_clip(ids)}")
            if k == 1 and T.uses(last, t):
                raise No(f"the expert ids are not one row a token: {_clip(ids)}")


def _check_identity(identity: dict[int, Term], count: int, weight: Term, parsed: Core, t: Term, h: Term) -> None:
    """Identity experts must be w · x[t, h], with the same w and x as the others, numbered on from E."""
    if not identity:
        return
    if sorted(identity) != list(range(count, count + len(identity))):
        raise No("identity experts are not numbered on from the others")
    (x,) = {a.args[0] for a in parsed.tokens}
    for e, c in identity.items():
        xs = [f for f in factors(c) if f.op == "a" and f.args[0] is x and T.uses(f, h)]
        if len(xs) != 1 or T.mul(*(f for f in factors(c) if f is not xs[0])) is not weight:
            raise No(f"expert {e} is neither like the others nor the identity")


def parse_core(core: Term, t: Term, h: Term, expert: Term, outside: Term | None = None) -> Core:
    """down[e, h, i] · act(...) summed over i, plus a bias [e, h].

    `outside`: what multiplies it. It belongs to the activation when the routing weight scales the expert's input.
    """
    sums, bias = [], None
    for part in core.args if core.op == "add" else (core,):
        if part.op == "sum":
            sums.append(part)
        elif part.op == "a" and T.uses(part, expert) and T.uses(part, h) and bias is None:
            bias = part
        else:
            raise No(f"an expert's output has a term that is no projection: {_clip(part)}")
    if len(sums) != 1:
        raise No("an expert's output is not one down projection")
    i, inner = sums[0].args
    downs = [f for f in factors(inner) if f.op == "a" and T.uses(f, expert) and T.uses(f, h)]
    if len(downs) != 1:
        raise No("an expert's down projection reads no single weight")
    rest = T.mul(*(f for f in factors(inner) if f is not downs[0]))
    down = linear_of(downs[0], h, i, expert)
    if down.stride != 1 or down.offset != 0:
        raise No("the down projection reads a part of its weight")
    if bias is not None:
        down.bias = bias.args[0]
    reader = Reader(t, i, expert)
    expr = reader.read(rest)
    if reader.scalars and outside is not None:
        if bias is not None:
            raise No("a routing weight on the input of experts whose output has a bias")
        expr = expr * reader.read(outside)
    expr, on_input = _input_weight(expr, reader)
    return Core(down, reader.linears, expr, i.args[1], on_input, reader.tokens)


def _input_weight(expr: sp.Expr, reader: Reader) -> tuple[sp.Expr, Term | None]:
    """act(w·a, w·b) with one routing weight w: the weight multiplies the expert's input."""
    if not reader.scalars:
        return expr, None
    scalars = set(reader.scalars)
    for weight in _products(expr, set(reader.linears), scalars):
        fresh = {s: sp.Symbol(f"in_{s.name}", real=True) for s in reader.linears}
        out = expr.subs({s: f / weight for s, f in fresh.items()}, simultaneous=True)
        out = sp.powsimp(sp.expand_power_base(out)) if scalars & out.free_symbols else out
        if not scalars & out.free_symbols:
            powers = weight.as_powers_dict()
            term = T.mul(*(T.power(reader.scalars[s], int(e)) for s, e in powers.items() if s in scalars))
            return out.subs({f: s for s, f in fresh.items()}, simultaneous=True), term
    raise No("a routing value enters an expert's activation")


def _products(expr: sp.Expr, linears: set[sp.Symbol], scalars: set[sp.Symbol]) -> list[sp.Expr]:
    """What multiplies a projection inside the activation: candidates for the routing weight."""
    out: dict[sp.Expr, None] = {}
    for place in (*expr.atoms(sp.Mul), expr):
        found = [s for s in linears if s in place.free_symbols]
        if len(found) == 1 and place.is_Mul:
            ratio = sp.cancel(place / found[0])
            weight = sp.Mul(*(b**e for b, e in ratio.as_powers_dict().items() if b in scalars))
            if weight != 1 and not linears & ratio.free_symbols:
                out[weight] = None
    return list(out)


def linear_of(a: Term, out: Term, inp: Term, expert: Term) -> Linear:
    """How a weight atom is laid out, from its index: [e, out, in], [e, in, out], or [e * rows + out, in]."""
    idx = list(a.args[1])
    flat = False
    if idx and idx[0] is expert:
        idx = idx[1:]
    else:
        pieces = list(idx[0].args) if idx[0].op == "add" else [idx[0]]
        own = [x for x in pieces if T.uses(x, expert)]
        if len(own) != 1 or any(T.uses(x, expert) for x in idx[1:]):
            raise No(f"a weight is not indexed by its expert first: {_clip(a)}")
        idx[0] = T.add(*(x for x in pieces if x is not own[0]))
        flat = True
    if len(idx) != 2:
        raise No(f"an expert weight is no matrix: {_clip(a)}")
    for transposed, (r, c) in ((False, idx), (True, idx[::-1])):
        if c is inp and T.uses(r, out):
            stride, offset = affine(r, out)
            return Linear(a.args[0], stride, offset, transposed, flat)
    raise No(f"an expert weight is indexed in an unknown way: {_clip(a)}")


def affine(r: Term, v: Term) -> tuple[int, int]:
    """r = stride * v + offset."""
    offset, rest = constant_part(r)
    stride, body = T.coefficient(rest)
    if body is not v or not isinstance(stride, int) or not isinstance(offset, int):
        raise No("a projection's rows are not a simple slice")
    return stride, offset


class Reader:
    """Turns the inside of one expert, a term in i, into an activation expression over its up projections."""

    def __init__(self, t: Term, i: Term, expert: Term) -> None:
        self.t, self.i, self.expert = t, i, expert
        self.linears: dict[sp.Symbol, Linear] = {}
        self.by_key: dict[Any, sp.Symbol] = {}
        self.tokens: list[Term] = []
        self.scalars: dict[sp.Symbol, Term] = {}
        self.memo: dict[Term, sp.Expr] = {}

    def read(self, x: Term) -> sp.Expr:
        out = self.memo.get(x)
        if out is None:
            out = self.memo[x] = self._read(x)
        return out

    def _read(self, x: Term) -> sp.Expr:
        if x.op == "c":
            return sp.sympify(x.args[0])
        if not T.uses(x, self.i):
            return self.scalar(x)
        if x.op == "sum":
            return self.linear(x, None)
        if x.op == "add":
            return self.add(x)
        if x.op == "mul":
            return sp.Mul(*(self.read(f) for f in x.args))
        if x.op == "pow":
            return self.read(x.args[0]) ** sp.nsimplify(x.args[1])
        if x.op == "fn":
            return function(x.args[0], [self.read(a) for a in x.args[1]], x.args[2])
        raise No(f"an expert's activation holds {x.op}: {_clip(x)}")

    def scalar(self, x: Term) -> sp.Expr:
        """A value that is the same for all features: factor by factor a symbol."""
        if x.op == "mul":
            return sp.Mul(*(self.read(f) for f in x.args))
        if x.op == "pow" and x.args[1] == int(x.args[1]):
            return self.read(x.args[0]) ** int(x.args[1])
        if T.uses(x, self.expert) and not (x.op == "a" and len(x.args[1]) == 1):
            raise No(f"an expert's inside reads a parameter that is no projection: {_clip(x)}")
        for s, term in self.scalars.items():
            if term is x:
                return s
        symbol = sp.Symbol(f"w{len(self.scalars)}", positive=True)
        self.scalars[symbol] = x
        return symbol

    def add(self, x: Term) -> sp.Expr:
        """A sum of pointwise terms, where `Σ_m ... + b[e, i]` is one projection with its bias."""
        sums = [a for a in x.args if a.op == "sum"]
        biases = [a for a in x.args if a.op == "a"]
        rest = [self.read(a) for a in x.args if a not in sums and a not in biases]
        if biases and (len(sums) != 1 or len(biases) != 1):
            raise No("a bias that belongs to no single projection")
        return sp.Add(*rest, *(self.linear(s, biases[0] if biases else None) for s in sums))

    def linear(self, s: Term, bias: Term | None) -> sp.Symbol:
        m, inner = s.args
        fs = factors(inner)
        ws = [f for f in fs if f.op == "a" and T.uses(f, self.expert)]
        xs = [f for f in fs if f not in ws]
        if len(ws) != 1 or len(xs) != 1 or xs[0].op != "a":
            raise No(f"a projection is not token times weight: {_clip(s)}")
        lin = linear_of(ws[0], self.i, m, self.expert)
        self.tokens.append(T.subst(xs[0], {m: T.named("m", m.args[1])}))
        if bias is not None:
            if bias.args[1][0] is not self.expert or len(bias.args[1]) != 2 or affine(bias.args[1][1], self.i) != (lin.stride, lin.offset):
                raise No("a bias is not laid out like its projection")
            lin.bias = bias.args[0]
        key = (lin.weight, lin.stride, lin.offset, lin.bias)
        if key not in self.by_key:
            symbol = sp.Symbol(f"L{len(self.by_key)}", real=True)
            self.by_key[key] = symbol
            self.linears[symbol] = lin
        return self.by_key[key]


HEADS: dict[str, Any] = {
    "sigmoid": act.sigmoid,
    "relu": act.relu,
    "softplus": act.softplus,
    "gelu_tanh": act.gelu_tanh,
    "tanh": sp.tanh,
    "exp": sp.exp,
    "log": sp.log,
    "erf": sp.erf,
    "abs": sp.Abs,
}


def function(name: str, args: list[sp.Expr], consts: tuple[Any, ...]) -> sp.Expr:
    if name == "clamp":
        lo, hi = (sp.oo if c == float("inf") else -sp.oo if c == -float("inf") else sp.nsimplify(c) for c in consts)
        return act.clamp(args[0], lo, hi)
    if name == "erf":
        (x,) = args
        k, rest = x.as_coeff_Mul()
        return sp.erf(rest / sp.sqrt(2)) if abs(float(k) - 0.5**0.5) < 1e-9 else sp.erf(x)
    head = HEADS.get(name)
    if head is None:
        raise No(f"no activation is known that uses {name}")
    return head(*args)


def layout(c: Core) -> tuple[Form, list[sp.Symbol], sp.Expr]:
    """Storage form of the up projection, its symbols (first, second), and the activation in G and U."""
    symbols = list(c.linears)
    if len(symbols) == 1:
        lin = c.linears[symbols[0]]
        if (lin.stride, lin.offset) != (1, 0):
            raise No("a single projection reads a part of its weight")
        return Form.SINGLE, symbols, _tidy(c.expr.subs(symbols[0], act.G))
    if len(symbols) != 2:
        raise No(f"an expert has {len(symbols)} up projections")
    a, b = symbols
    la, lb = c.linears[a], c.linears[b]
    if la.weight == lb.weight:
        if la.offset > lb.offset:
            a, b, la, lb = b, a, lb, la
        if (la.stride, la.offset, lb.stride, lb.offset) == (1, 0, 1, c.inner):
            form = Form.CONCAT
        elif (la.stride, la.offset, lb.stride, lb.offset) == (2, 0, 2, 1):
            form = Form.INTERLEAVED
        else:
            raise No("gate and up rows are neither halves nor interleaved")
    else:
        if (la.stride, la.offset, lb.stride, lb.offset) != (1, 0, 1, 0):
            raise No("gate and up weights are read in parts")
        form = Form.SEPARATE
        if _is_gate(b, c.expr) and not _is_gate(a, c.expr):
            a, b = b, a
    return form, [a, b], _tidy(c.expr.subs({a: act.G, b: act.U}, simultaneous=True))


def _is_gate(s: sp.Symbol, expr: sp.Expr) -> bool:
    return any(s in f.free_symbols for f in expr.atoms(sp.Function))


def _tidy(expr: sp.Expr) -> sp.Expr:
    """Numbers as exact as they were written: 0.5 is 1/2, 1.702 stays itself."""
    return expr.replace(lambda e: e.is_Float, lambda e: sp.nsimplify(e, rational=True) if sp.nsimplify(e, rational=True).q < 10**6 else e)


def token_node(tokens: list[Term], t: Term) -> fx.Node:
    """The node whose flattened rows are the experts' input."""
    if len(set(tokens)) != 1:
        raise No("gate and up projections read different inputs")
    x = tokens[0]
    node, idx = x.args
    lead = shape_of(node)[:-1]
    m = idx[-1]
    if m.op != "v" or m.args[0] != "m" or idx[:-1] != _clamped(row_index(t, lead), lead):
        raise No(f"the experts' input rows are not the tokens in order: {_clip(x)}")
    return node


def _clamped(idx: tuple[Term, ...], lead: tuple[Any, ...]) -> tuple[Term, ...]:
    return tuple(T.const(0) if s == 1 and len(lead) > 1 else i for i, s in zip(idx, lead, strict=True))


def params(nodes: Any, full: tuple[Any, ...], transposed: bool, flat: bool) -> list[Param]:
    """Check a parameter's shape against its use; `full` is [E, rows, cols] (or [E, rows] for a bias)."""
    want = (full[0], *full[1:][::-1]) if transposed else full
    if isinstance(nodes, tuple):
        for n in nodes:
            if shape_of(n) != tuple(want[1:]):
                raise No(f"expert parameter {n} has shape {shape_of(n)}, used as {want[1:]}")
        return [Param(n) for n in nodes]
    if flat:
        if shape_of(nodes)[0] != want[0] * want[1]:
            raise No(f"expert parameter {nodes} has shape {shape_of(nodes)}, used as {want}")
        return [Param(nodes, tuple(want))]
    shape = shape_of(nodes)
    if shape[1:] != tuple(want[1:]) or shape[0] < want[0]:  # rows of identity experts may follow
        raise No(f"expert parameter {nodes} has shape {shape}, used as {want}")
    return [Param(nodes)]


def base_node(base: list[Term], out: fx.Node, t: Term, h: Term) -> fx.Node | None:
    """The accumulator's start: nothing, or one tensor read at the result's own index."""
    if not base:
        return None
    if len(base) == 1 and base[0].op == "a" and isinstance(base[0].args[0], fx.Node):
        node, idx = base[0].args
        lead = shape_of(node)[:-1]
        if (
            T.same_size(rows(node), rows(out))
            and idx[-1] is h
            and idx[:-1] == _clamped(row_index(t, lead), lead)
            and dtype_of(node) == dtype_of(out)
        ):
            return node
    raise No(f"the accumulator starts from more than one tensor: {_clip(T.add(*base))}")


def _clip(t: Term) -> str:
    s = T.show(t)
    return s if len(s) < 120 else s[:117] + "..."
