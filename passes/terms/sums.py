"""Sums over index variables, simplified until no dispatch is left.

Σ_p f(perm p)            = Σ_q f(q)                    sorted order is a permutation
Σ_n f(nz_n)              = Σ_i M(i) f(i)               rows where a mask is true
Σ_p [p // K = t] f(p)    = Σ_j f(t K + j)              flattened pairs
Σ_v [v = a] f(v)         = f(a)                        one-hot
Σ_q [k_q = k_p] [q is as far down its group as p] f(q) = f(p)    rows in a padded batch
Σ_v (Σ_j [b = v] g) f(v) = Σ_j g f(b)                  scattered weights
"""

from __future__ import annotations

from typing import Any

import sympy as sp

from .. import terms as T
from . import Term, add, const, mk, mul, subst, uses


def sum_over(v: Term, body: Term) -> Term:
    """Σ_v body, simplified."""
    if T.is_c(body, 0):
        return body
    if not uses(body, v):
        return mul(const(v.args[1]), body)
    if v.args[1] == 1:
        return subst(body, {v: const(0)})
    if body.op in ("ite", "mul") and (cases := _cases(v, body)) is not None:
        return add(*cases)
    if body.op == "eq" and any(_is_slot(a, v) and not uses(b, v) for a, b in (body.args, body.args[::-1])):
        return mk("any", v, body)  # choices are distinct: at most one slot matches
    for rule in (_permuted, _masked_rows, _factor_out, _same_place, _one_hot, _scattered):
        out = rule(v, body)
        if out is not None:
            return out
    if body.op == "add" and any(_distributes(a, v) for a in body.args):
        return add(*(sum_over(v, a) for a in body.args))
    return mk("sum", v, body)


def _distributes(t: Term, v: Term) -> bool:
    return not uses(t, v) or any(f.op in ("eq", "sum") for f in (t.args if t.op == "mul" else (t,)))


def _permuted(v: Term, body: Term) -> Term | None:
    """v occurs only as perm(S, v) and sorted(key, v): sum over unsorted positions instead."""
    found = [t for t in T.walk(body) if t.op in ("perm", "sv") and t.args[-1] is v]
    sort = next((t for t in found if t.op == "perm"), None)
    if sort is None and len(found) == 1:
        q = T.var(v.args[1], "q")
        out = subst(body, {found[0]: T.at_key(found[0].args[0], q)})
        return None if uses(out, v) else sum_over(q, out)
    if sort is None:
        return None
    q = T.var(v.args[1], "q")
    out = subst(body, {v: T.inv(sort.args[0], sort.args[1], q)})
    if any(t.op == "inv" and t.args[2] is q for t in T.walk(out)):
        return None
    return sum_over(q, out)


def _masked_rows(v: Term, body: Term) -> Term | None:
    """v counts the true elements of a mask M and occurs only in its coordinates."""
    rows = [t for t in T.walk(body) if t.op == "nz" and t.args[1] is v]
    masks = {t.args[0] for t in rows}
    if len(masks) != 1:
        return None
    (mask,) = masks
    coords = tuple(T.var(n, "c") for n in mask.shape)
    out = subst(body, {t: coords[t.args[2]] for t in rows})
    if uses(out, v):
        return None
    out = mul(mask.at(coords), out)
    for c in reversed(coords):
        out = sum_over(c, out)
    return out


def _factor_out(v: Term, body: Term) -> Term | None:
    if body.op != "mul":
        return None
    outside = [f for f in body.args if not uses(f, v) and f.op != "c"]  # a number stays where it was written
    if not outside:
        return None
    return mul(*outside, sum_over(v, mul(*(f for f in body.args if f not in outside))))


def _one_hot(v: Term, body: Term) -> Term | None:
    """A factor [v = a], or [v // K = t], or one inside any_j, fixes v."""
    for f in body.args if body.op == "mul" else (body,):
        if f.op != "eq":
            continue
        rest = mul(*(g for g in body.args if g is not f)) if body.op == "mul" else const(1)
        for a, b in (f.args, f.args[::-1]):
            if uses(b, v):
                continue
            if a is v:
                if b.op == "v" and not T.same_size(b.args[1], v.args[1]) and not T.below(b, v.args[1]):
                    continue  # b goes further than the sum does
                return subst(rest, {v: b})
            if T.same_choice(a, b, v):
                return subst(rest, {v: b.args[1][-1]})
            if a.op == "fdiv" and a.args[0] is v:
                k = a.args[1].args[0]
                if not T.below(b, _ratio(v.args[1], k)) and not uses_any_bound(b):
                    continue
                j = T.var(k, "j")
                return sum_over(j, subst(rest, {v: add(mul(const(k), b), j)}))
            if a.op == "mod" and a.args[0] is v:
                n = a.args[1].args[0]
                j = T.var(_ratio(v.args[1], n), "j")
                return sum_over(j, subst(rest, {v: add(mul(const(n), j), b)}))
    return None


def _same_place(v: Term, body: Term) -> Term | None:
    """Two positions with one key and one rank among those of that key are one position."""
    fs = body.args if body.op == "mul" else ()
    for f in fs:
        if f.op != "eq" or any(x.op != "rank" for x in f.args):
            continue
        for (key, q, e), (other, p, g) in ((f.args[0].args, f.args[1].args), (f.args[1].args, f.args[0].args)):
            own = q is v and key is other and not uses(p, v) and T.below(p, v.args[1])
            if own and e is T.at_key(key, q) and g is T.at_key(key, p) and T.eq(e, g) in fs:
                return subst(mul(*(x for x in fs if x is not f)), {v: p})
    return None


def uses_any_bound(b: Term) -> bool:
    """Output indices are in range by construction."""
    return b.op == "v"


def _ratio(n: Any, k: Any) -> Any:
    r = sp.cancel(sp.sympify(n) / sp.sympify(k))
    return int(r) if r.is_Integer else r


def _cases(v: Term, body: Term) -> list[Term] | None:
    """Σ_v of a body, or of a factor of it, that is written case by case: one tensor for each value of v, stacked."""
    size = v.args[1]
    if not isinstance(size, int):
        return None
    if body.op == "mul":
        written = [f for f in body.args if f.op == "ite" and f.args[0].op == "eq" and v in f.args[0].args]
        cases = _cases(v, written[0]) if len(written) == 1 else None
        if cases is None or len(cases) != size:
            return None
        rest = mul(*(f for f in body.args if f is not written[0]))
        return [mul(subst(rest, {v: const(c)}), case) for c, case in enumerate(cases)]
    out: dict[int, Term] = {}
    while body.op == "ite" and body.args[0].op == "eq" and v in body.args[0].args:
        (c,) = (x for x in body.args[0].args if x is not v)
        if c.op != "c" or not isinstance(c.args[0], int):
            return None
        out.setdefault(c.args[0], subst(body.args[1], {v: c}))
        body = body.args[2]
    left = [c for c in range(size) if c not in out]
    if not out or len(left) > 1 and uses(body, v):
        return None
    out.update((c, subst(body, {v: const(c)})) for c in left)
    return [out[c] for c in sorted(out)]


def _is_slot(t: Term, v: Term) -> bool:
    return t.op == "topk" and bool(t.args[1]) and t.args[1][-1] is v


def _one_of_distinct(inner: Term, j: Term, v: Term) -> bool:
    """[v is among the choices of one top-k]: at most one slot matches, so any is a sum."""
    if inner.op != "eq" or v not in inner.args:
        return False
    other = inner.args[0] if inner.args[1] is v else inner.args[1]
    return _is_slot(other, j)


def _scattered(v: Term, body: Term) -> Term | None:
    """A factor Σ_j [b_j = v] g_j: exchange the sums, then `_one_hot`."""
    for f in body.args if body.op == "mul" else (body,):
        if f.op not in ("sum", "any"):
            continue
        j, inner = f.args
        if f.op == "any" and not _one_of_distinct(inner, j, v):
            continue
        if not any(g.op == "eq" and v in g.args for g in (inner.args if inner.op == "mul" else (inner,))):
            continue
        rest = mul(*(g for g in body.args if g is not f)) if body.op == "mul" else const(1)
        return sum_over(j, sum_over(v, mul(inner, rest)))
    return None
