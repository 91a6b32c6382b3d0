"""Sums over index variables, simplified until no dispatch is left."""

from __future__ import annotations

from typing import Any

from .arithmetic import add, eq, mul
from .facts import Facts
from .numbers import exact_div, same_size
from .orders import at_key, size_of
from .reductions import is_slot, same_choice
from .rules import Rules, rule
from .term import Term, const, factors, let, mk, only_in, places, uses, var


def _sides(f: Term) -> tuple[tuple[Term, Term], ...]:
    """A comparison's sides, either one first; none for another term."""
    return ((f.args[0], f.args[1]), (f.args[1], f.args[0])) if f.op == "eq" else ()


def _without(body: Term, f: Term) -> Term:
    """body / f for a factor f."""
    return mul(*(g for g in factors(body) if g is not f))


@rule("Σ_v 0 = 0,  Σ_v a = |v| a   where v is not in a", "sum")
def _of_a_constant(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    return None if uses(body, v) else mul(const(v.args[1]), body)


@rule("Σ_{v<1} f(v) = f(0)", "sum")
def _of_one_index(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    return let(body, {v: const(0)}) if v.args[1] == 1 else None


@rule("Σ_v ite([v = 0], a_0, ite([v = 1], a_1, ...)) f(v) = a_0 f(0) + a_1 f(1) + ...   at most one value of v unnamed", "sum")
def _case_by_case(t: Term, facts: Facts) -> Term | None:
    """One tensor for each value of v, stacked."""
    v, body = t.args
    size = v.args[1]
    if not isinstance(size, int) or body.op not in ("ite", "mul"):
        return None
    written = [f for f in factors(body) if f.op == "ite" and f.args[0].op == "eq" and v in f.args[0].args]
    cases = _cases(v, written[0]) if len(written) == 1 else None
    if cases is None:
        return None
    rest = _without(body, written[0])
    return add(*(mul(let(rest, {v: const(c)}), case) for c, case in cases.items()))


def _cases(v: Term, t: Term) -> dict[int, Term] | None:
    """The value of t for each value of v; None where more than one is not named and depends on v."""
    out: dict[int, Term] = {}
    while t.op == "ite" and t.args[0].op == "eq" and v in t.args[0].args:
        (c,) = (x for x in t.args[0].args if x is not v)
        if c.op != "c" or not isinstance(c.args[0], int):
            return None
        out.setdefault(c.args[0], let(t.args[1], {v: c}))
        t = t.args[2]
    left = [c for c in range(v.args[1]) if c not in out]
    if not out or len(left) > 1 and uses(t, v):
        return None
    out.update((c, let(t, {v: const(c)})) for c in left)
    return {c: out[c] for c in range(v.args[1])}  # a number beyond the sum's is never met


@rule("Σ_v [choice(v) = a] = any_v [choice(v) = a]   the choices of one top-k are distinct", "sum")
def _distinct_slots(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    return mk("any", v, body) if any(is_slot(a, v) and not uses(b, v) for a, b in _sides(body)) else None


@rule(
    "Σ_p f(perm[p]) = Σ_q f(q),  with sorted(key)[p] = key[q]   where the sum is over all positions: sorted order is a permutation", "sum"
)
def _over_a_sorted_order(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    found = [x for x in places(body, v, ("perm", "sv")) if x.args[-1] is v]
    sort = next((x for x in found if x.op == "perm"), None)
    if not found or sort is None and len(found) > 1:
        return None
    key = found[0].args[0] if sort is None else sort.args[1]
    if not same_size(size_of(key), v.args[1]):
        return None
    q = var(v.args[1], "q")
    mapping = {x: at_key(key, q) if x.op == "sv" else q for x in found if (x is sort or x.op == "sv" and x.args[0] is key)}
    return mk("sum", q, let(body, mapping)) if only_in(body, v, set(mapping)) else None


@rule("Σ_n f(nz[n]) = Σ_i mask(i) f(i)   nz[n] is the place of the n-th true element of the mask", "sum")
def _over_masked_rows(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    rows = {x for x in places(body, v, ("nz",)) if x.args[1] is v}
    if len({x.args[0] for x in rows}) != 1 or not only_in(body, v, rows):
        return None
    mask = next(iter(rows)).args[0]
    coords = tuple(var(n, "c") for n in mask.shape)
    out = mul(mask.at(coords), let(body, {x: coords[x.args[2]] for x in rows}))
    for c in reversed(coords):
        out = mk("sum", c, out)
    return out


@rule("Σ_v a f(v) = a Σ_v f(v)   where v is not in a", "sum")
def _factor_out(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    outside = [f for f in factors(body) if not uses(f, v) and f.op != "c"]  # a number stays where it was written
    if not outside:
        return None
    return mul(*outside, mk("sum", v, mul(*(f for f in factors(body) if f not in outside))))


@rule("Σ_q [key(q) = key(p)] [rank(q) = rank(p)] f(q) = f(p)   where 0 <= p < |q|: a place in a group is one position", "sum")
def _same_place(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    for f in factors(body) if body.op == "mul" else ():
        for a, b in _sides(f):
            if a.op != "rank" or b.op != "rank":
                continue
            (key, q, e), (other, p, g) = a.args, b.args
            if q is not v or key is not other or uses(p, v) or not facts.below(p, v.args[1]):
                continue
            if e is facts.normal(at_key(key, q)) and g is facts.normal(at_key(key, p)) and facts.normal(eq(e, g)) in body.args:
                return let(_without(body, f), {v: p})
    return None


@rule("Σ_v [v = a] f(v) = [0 <= a < |v|] f(a)", "sum")
def _one_hot(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    for f in factors(body):
        for a, b in _sides(f):
            if a is v and not uses(b, v):
                return mul(*facts.inside(b, v.args[1]), let(_without(body, f), {v: b}))
    return None


@rule("Σ_v [choice(v) = choice(s)] f(v) = f(s)   in one top-k, 0 <= s < |v| for certain", "sum")
def _own_slot(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    for f in factors(body):
        for a, b in _sides(f):
            if not uses(b, v) and same_choice(a, b, v, facts):
                return let(_without(body, f), {v: b.args[1][-1]})
    return None


@rule("Σ_v [v // k = a] f(v) = Σ_{j<k} [0 <= k a + j < |v|] f(k a + j)", "sum")
def _block(t: Term, facts: Facts) -> Term | None:
    """Flattened pairs: one of them given."""
    v, body = t.args
    for f in factors(body):
        for a, b in _sides(f):
            if a.op == "fdiv" and a.args[0] is v and not uses(b, v) and _positive(k := a.args[1].args[0]):
                j = var(k, "j")
                at = facts.normal(add(mul(a.args[1], b), j))
                return mk("sum", j, mul(*facts.inside(at, v.args[1]), let(_without(body, f), {v: at})))
    return None


@rule("Σ_v [v mod n = a] f(v) = Σ_j [0 <= a < n] [n j + a < |v|] f(n j + a)", "sum")
def _stride(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    for f in factors(body):
        for a, b in _sides(f):
            if a.op == "mod" and a.args[0] is v and not uses(b, v) and _positive(n := a.args[1].args[0]):
                count = _rounded_up(v.args[1], n)
                if count is None:
                    continue
                j = var(count, "j")
                at = facts.normal(add(mul(a.args[1], j), b))
                within = (*facts.inside(b, n), *facts.inside(at, v.args[1]))
                return mk("sum", j, mul(*within, let(_without(body, f), {v: at})))
    return None


def _positive(n: Any) -> bool:
    return not isinstance(n, (int, float)) or n > 0


def _rounded_up(n: Any, k: Any) -> Any:
    """n / k rounded up, where that can be written down."""
    if isinstance(n, int) and isinstance(k, int):
        return -(-n // k)
    return exact_div(n, k)


@rule("Σ_v (Σ_j [b_j = v] g_j) f(v) = Σ_j Σ_v [b_j = v] g_j f(v),  any_j alike where at most one j hits", "sum")
def _scattered(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    for f in factors(body):
        if f.op not in ("sum", "any"):
            continue
        j, inner = f.args
        if f.op == "any" and not any(b is v and is_slot(a, j) for a, b in _sides(inner)):
            continue
        if any(v in g.args for g in factors(inner) if g.op == "eq"):
            return mk("sum", j, mk("sum", v, mul(inner, _without(body, f))))
    return None


@rule("Σ_v (a + b) = Σ_v a + Σ_v b   where that lets one of them be simplified", "sum")
def _distribute(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    if body.op == "add" and any(not uses(a, v) or any(f.op in ("eq", "sum") for f in factors(a)) for a in body.args):
        return add(*(mk("sum", v, a) for a in body.args))
    return None


@rule("(any_j c_j) · Σ_j c_j g_j = Σ_j c_j g_j", "mul")
def _any_of_the_summed(t: Term, facts: Facts) -> Term | None:
    for a in t.args:
        if a.op == "any" and any(b.op == "sum" and _counts(b, a, facts) for b in t.args):
            return _without(t, a)
    return None


def _counts(total: Term, a: Term, facts: Facts) -> bool:
    (v, body), (u, condition) = total.args, a.args
    if v.args[1] != u.args[1]:
        return False
    here = facts.normal(let(condition, {u: v}))
    return all(c in factors(body) for c in factors(here))


SUMS = Rules.of(vars())
