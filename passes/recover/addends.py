"""Addends: a result as base plus one part for each expert (or one part that looks its expert up), each with its slot sum opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from .. import terms as T
from ..terms import Term
from .identity import numbered
from .rows import No, data_dependent, factors, ids_atom, outer_atoms, plain_row
from .scales import is_coded, is_held


@dataclass
class Part:
    """One addend of the result that depends on experts: expert number (None: any), slot variable, product of factors."""

    expert: int | None
    body: Term
    ids: Term | None


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
    sums = [f for f in factors(a) if f.op == "sum" and _routes(f)] or [f for f in factors(a) if _chosen_once(f)]
    if len(sums) > 1:  # the other ones are a part of the weights
        sums = [f for f in sums if has_feature(f)] or [f for f in sums if any(_condition(x) for x in factors(f.args[1]))]
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
    """Σ_e F(Σ_j [ids_j = e] g_j, e) = Σ_j [0 <= ids_j < |e|] F(g_j, ids_j) when F(0, e) = 0 and no j has another's ids.

    Every expert sees every token, scaled by its weight or 0.
    """
    for s in factors(a):
        if s.op != "sum":
            continue
        v, body = s.args
        for x in T.walk(body):
            found = _gate_of(x, v) if x.atoms <= body.atoms else None
            if found is None or not T.is_c(T.subst(body, {x: T.const(0)}), 0):
                continue
            j, ids, g = found
            inner = T.mul(*T.facts().inside(ids, v.args[1]), T.subst(T.subst(body, {x: g}), {v: ids}))
            inner = inner if j is None else T.reduce_("sum", j, inner)
            return T.mul(inner, *(f for f in factors(a) if f is not s))
    return None


def _gate_of(x: Term, v: Term) -> tuple[Term | None, Term, Term] | None:
    """(slot variable or None, ids, g) when x is Σ_j [ids_j = v] g_j with ids of one top-k, or [ids = v] itself."""
    j, inner = x.args if x.op == "sum" else (None, x)
    for f in factors(inner) if x.op == "sum" else (x,):
        if f.op == "eq":
            for ids, other in (f.args, f.args[::-1]):
                if other is v and data_dependent(ids) and (j is None or T.is_slot(ids, j)):
                    g = T.mul(*(y for y in factors(inner) if y is not f)) if x.op == "sum" else T.const(1)
                    return None if T.uses(g, v) else (j, ids, g)
    return None


def has_feature(t: Term) -> bool:
    return any(v.args[0] == "h" for v in t.atoms)


def _chosen_once(f: Term) -> bool:
    """any_j [ids_j = e], which is Σ_j [ids_j = e]: a top-k chooses nothing twice."""
    return f.op == "any" and f.args[1].op == "eq" and any(T.is_slot(x, f.args[0]) for x in f.args[1].args)


def _routes(s: Term) -> bool:
    """Whether a sum runs over the selected experts: its variable stands inside expert ids, and along no weight in few bits.

    Along the inputs of such a weight it may stand inside whole numbers too, which say the group of each input.
    """
    v = s.args[0]
    if any(x.op == "a" and not ids_atom(x) and is_coded(x) and is_held(x) and _runs_along(x, v) for x in T.walk(s.args[1])):
        return False
    for x in T.walk(s.args[1]):
        if x.op == "topk" and any(T.uses(i, v) for i in x.args[1]):
            return True
        if x.op == "a" and ids_atom(x) and any(T.uses(i, v) for i in x.args[1]):
            return True
    return False


def _runs_along(a: Term, v: Term) -> bool:
    return any(T.uses(i, v) and not data_dependent(i) for i in a.args[1])


def _open(body: Term, dense: Any) -> list[Part]:
    """Open `[ids = e] · y` and `ite([ids = 0], y0, ite([ids = 1], y1, ...))`."""
    body = dense(body)
    fs = list(factors(body))
    for f in fs:
        chain = _chain(f)
        if chain is not None:
            rest = T.mul(*(g for g in fs if g is not f))
            return [Part(e, T.mul(rest, given(y, ids, e)), ids) for ids, e, y in chain]
    hits = [(*hit, f) for f in fs if (hit := _condition(f)) is not None and not _masks(hit[0], body)]
    if hits:
        ids, e, f = max(hits, key=lambda hit: _is_selected(hit[0]))
        return [Part(e, given(T.mul(*(g for g in fs if g is not f)), ids, e), ids)]
    free = numbered(body)
    if free is not None:
        ids, copies = free
        return [Part(e, y, ids) for e, y in copies.items()]
    if any(data_dependent(i) for a in outer_atoms(body) for i in a.args[1] if not plain_row(a)):
        return [Part(None, body, None)]
    return []


def _is_selected(ids: Term) -> bool:
    """Whether a selection or a slot is in ids; else a number of the token is asked for, which may be a mask's."""
    return any(x.op == "topk" for x in T.walk(ids)) or any(v.args[0] == "slot" for v in ids.atoms)


def _masks(ids: Term, body: Term) -> bool:
    """Whether [ids = e] chooses tokens (padding) and no expert: the weights are looked up by a selection, and by other ids."""
    looked_up = {x for a in outer_atoms(body) if has_feature(a) for i in a.args[1] for x in T.walk(i)}
    return ids not in looked_up and any(x.op == "topk" for x in looked_up)


def given(t: Term, ids: Term, e: int) -> Term:
    """t where ids = e is known: conditions on ids inside it are decided."""
    mapping = {}
    for x in T.walk(t):
        if x.op in ("eq", "lt") and ids in x.args:
            (c,) = (y for y in x.args if y is not ids)
            if c.op == "c":
                mapping[x] = T.subst(x, {ids: T.const(e)})
    return T.subst(t, mapping) if mapping else t


def _condition(f: Term) -> tuple[Term, int] | None:
    """[ids = e] with a number e."""
    if f.op == "eq":
        for x, c in (f.args, f.args[::-1]):
            if c.op == "c" and isinstance(c.args[0], int) and data_dependent(x):
                return x, c.args[0]
    return None


def _chain(f: Term) -> list[tuple[Term, int, Term]] | None:
    out: list[tuple[Term, int, Term]] = []
    whole = f
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
    if _says_all(out) or T.is_c(f, 0) or (f.op == "a" and isinstance(f.args[0], fx.Node) and "empty" in str(f.args[0].target)):
        return out
    if not has_feature(whole):
        return None  # a routing weight that is another one for some experts
    raise No("rows that no expert writes keep an old value")


def _says_all(cases: list[tuple[Term, int, Term]]) -> bool:
    """Whether one selection's number is one of the cases for certain, so that nothing comes behind them."""
    ids, numbers = {x for x, _, _ in cases}, {e for _, e, _ in cases}
    (first, *others) = ids
    top = T.upper(first) if first.op == "topk" and not others else None
    return top is not None and numbers >= set(range(top + 1))


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
        raise No("what experts compute depends on more than one slot of a token, such as the place of a row among those of its expert")
    (slot,) = slots
    if not isinstance(slot.args[1], int):
        raise No("the number of selected experts is not a fixed number")
    return slot, slot.args[1]
