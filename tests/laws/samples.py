"""For every rule terms that look like its left side: some that are one, and some that miss it narrowly."""

from __future__ import annotations

from collections.abc import Callable

from random_terms import S0, Source

import moe_compile.passes.terms as T
from moe_compile.passes.terms.arithmetic import build
from moe_compile.passes.terms.term import Term

Sample = Callable[[Source], Term]
SAMPLES: dict[str, Sample] = {}


def sample(*names: str) -> Callable[[Sample], Sample]:
    def register(f: Sample) -> Sample:
        SAMPLES.update(dict.fromkeys(names, f))
        return f

    return register


def c(v: object) -> Term:
    return T.const(v)


def n(op: str, *args: object) -> Term:
    """A term whose subterms are in normal form, itself as it is."""
    return build(op, *(T.normal(a) if isinstance(a, Term) else a for a in args))


def small(s: Source, *vs: Term) -> Term:
    return s.index(list(vs), 1)


def condition(s: Source, *vs: Term) -> Term:
    return T.normal(s.truth(list(vs), 1))


def number(s: Source, *vs: Term) -> Term:
    return T.normal(s.value(list(vs), 1))


def either(s: Source, a: Term, b: Term) -> tuple[Term, Term]:
    return (a, b) if s.chance(0.5) else (b, a)


# ---- logic -------------------------------------------------------------------------------------------------------------


@sample("equal to itself")
def _(s: Source) -> Term:
    a, b = small(s, s.var()), small(s, s.var())
    return n("eq", a, s.r.choice((a, a, b)))


@sample("numbers equal")
def _(s: Source) -> Term:
    return n("eq", c(s.r.choice((1, 2, 2.5, S0))), c(s.r.choice((1, 2, 2.5, S0, S0 + 1, 2 * S0))))


@sample("numbers ordered")
def _(s: Source) -> Term:
    return n("lt", c(s.r.choice((0, 1, 2.5, S0))), c(s.r.choice((1, 2, -1, S0, S0 + 1, 2 * S0))))


@sample("truth equal")
def _(s: Source) -> Term:
    return n("eq", condition(s, s.var(4), s.var(3)), c(s.r.choice((0, 1, 2, 0.5, S0))))


@sample("count is zero")
def _(s: Source) -> Term:
    v, u = s.var(), s.var(2)
    body = s.r.choice((s.truth([v, u], 1), s.truth([v, u], 1), s.value([v, u], 1)))
    return n("eq", T.mk("sum", u, T.mk("sum", v, body)) if s.chance(0.5) else T.mk("sum", v, body), c(s.r.choice((0, 0, 1))))


@sample("equal shifts")
def _(s: Source) -> Term:
    v, u = s.var(5), s.var(5)
    return n("eq", build("add", small(s, v), c(s.r.randint(1, 2))), build("add", small(s, u), c(s.r.randint(1, 2))))


@sample("never equal")
def _(s: Source) -> Term:
    return n("eq", small(s, s.var()), c(s.r.randint(-2, 8)))


@sample("equal quotient")
def _(s: Source) -> Term:
    x = s.r.choice((T.normal(s.choose([s.var()])), T.atom(s.tensor(5, whole=9, negative=True), (s.var(5),)), s.var(6)))
    return build("eq", T.mk("fdiv", x, c(s.r.randint(1, 4))), c(s.r.randint(-1, 3)))


@sample("certainly ordered")
def _(s: Source) -> Term:
    return n("lt", small(s, s.var(), s.var()), c(s.r.choice((-1, 0, 1, 2, 4, 8, 12, 20, S0, 3 * S0))))


@sample("compared choice")
def _(s: Source) -> Term:
    a, b = (s.r.choice((c(s.r.randint(-1, 4)), s.var(), T.normal(s.choose([s.var()])))) for _ in range(2))
    return n(s.r.choice(("eq", "lt")), T.mk("ite", condition(s, s.var(4)), a, b), c(s.r.randint(0, 5)))


@sample("ordered multiples")
def _(s: Source) -> Term:
    k, j = s.size(2), s.var(s.size())
    a = s.r.choice(
        (s.var(s.size()), T.normal(s.choose([s.var()])), c(s.r.randint(-2, 3)), T.atom(s.tensor(5, whole=4, negative=True), (s.var(5),)))
    )
    return n(
        "lt",
        build("add", build("mul", c(k), a), j if s.chance(0.7) else c(s.r.randint(-2, 3))),
        c(k * s.r.randint(-1, 4) + s.r.choice((0, 0, 0, 1, 2))),
    )


@sample("ordered shifts")
def _(s: Source) -> Term:
    return n("lt", build("add", small(s, s.var(5)), c(s.r.randint(-2, 2))), c(s.r.choice((0, 1, 3, S0))))


@sample("not a number", "not twice")
def _(s: Source) -> Term:
    return n("not", s.r.choice((c(0), c(1), T.mk("not", condition(s, s.var(3))), condition(s, s.var(3), s.var(4)))))


@sample("known choice")
def _(s: Source) -> Term:
    return n("ite", s.r.choice((c(0), c(1), condition(s, s.var(3)))), number(s, s.var()), number(s))


@sample("turned choice")
def _(s: Source) -> Term:
    return n("ite", s.r.choice((T.not_(condition(s, s.var(4))), condition(s, s.var(4)))), number(s, s.var()), number(s))


@sample("no choice")
def _(s: Source) -> Term:
    a, b = number(s, s.var()), number(s, s.var())
    return n("ite", condition(s, s.var(4)), a, s.r.choice((a, a, b)))


@sample("choice that is known")
def _(s: Source) -> Term:
    a, b = condition(s, s.var(4)), condition(s, s.var(4))
    return n("ite", a, build("mul", s.r.choice((a, a, b)), number(s)), number(s))


@sample("choice or zero", "zero or choice", "choice is a truth")
def _(s: Source) -> Term:
    zero, one = c(0), c(1)
    a, b = s.r.choice(((number(s, s.var(3)), zero), (zero, one), (one, zero), (zero, number(s)), (c(-float("inf")), zero)))
    return n("ite", s.r.choice((condition(s, s.var(4)), T.atom(s.tensor(4), (s.var(4),)))), a, b)


@sample("masked addend")
def _(s: Source) -> Term:
    v = s.var(3)
    low = s.r.choice((-float("inf"), -float("inf"), -5))
    return n("add", number(s, v), T.mk("ite", condition(s, v), c(s.r.choice((0, 0, 1))), c(low)))


# ---- functions ---------------------------------------------------------------------------------------------------------


NAMES = ("sigmoid", "exp", "relu", "tanh", "log1p", "softplus", "abs", "erf", "gelu_tanh", "expm1", "round")


@sample("function of a number")
def _(s: Source) -> Term:
    return T.mk("fn", s.r.choice(NAMES), (s.r.choice((c(s.number()), c(-float("inf")), c(S0), number(s, s.var()))),), ())


@sample("function of a choice")
def _(s: Source) -> Term:
    x = T.normal(T.mk("ite", condition(s, s.var(4)), number(s, s.var()), s.r.choice((c(s.number()), c(-float("inf")), number(s, s.var())))))
    return T.mk("fn", s.r.choice(NAMES), (x,), ())


@sample("function of the scattered")
def _(s: Source) -> Term:
    k = s.r.randint(2, 3)
    v, u, j, i = s.var(5), s.var(3), s.var(k, "j"), s.var(s.r.choice((k, k, k, 4)), "i")
    chosen = T.mk("topk", s.choice(3, k, extent=4), (u, j))
    hit = T.normal(build("eq", s.r.choice((chosen, chosen, chosen, T.atom(s.tensor(3, k, whole=4), (u, j)))), v))
    asked = s.r.choice((hit, hit, hit, T.normal(build("eq", chosen, s.var(4)))))
    total = T.mk("sum", j, build("mul", hit, T.atom(s.tensor(3, k), (u, j)), s.r.choice((c(1), number(s, u)))))
    low = s.r.choice((c(-float("inf")), c(-float("inf")), c(0.5), number(s, v)))
    return T.mk("fn", s.r.choice(NAMES), (T.mk("ite", T.mk("any", i, T.subst(asked, {j: i})), total, low),), ())


@sample("logistic")
def _(s: Source) -> Term:
    e = T.fn(s.r.choice(("exp", "exp", "exp", "sigmoid")), number(s, s.var()))
    return n("pow", build("add", c(s.r.choice((1, 1, 1, 2))), build("mul", c(s.r.choice((1, 1, 2))), e)), s.r.choice((-1, -1, -1, -2, 2)))


@sample("exp times logistic")
def _(s: Source) -> Term:
    x, y = number(s, s.var()), number(s)
    turned = build("mul", c(s.r.choice((-1, -1, -1, 1))), s.r.choice((x, x, x, y)))
    return n("mul", T.fn("exp", x), T.fn("sigmoid", turned), number(s), c(s.r.choice((1, 2))))


# ---- indices -----------------------------------------------------------------------------------------------------------


@sample("by one")
def _(s: Source) -> Term:
    return n(s.r.choice(("fdiv", "mod")), small(s, s.var(), s.var()), c(s.r.choice((1, 1, 2))))


@sample("whole multiples", "below divisor", "common factor")
def _(s: Source) -> Term:
    k, m = s.size(), s.size()
    parts = [build("mul", c(s.r.choice((1, 1, k, k, m, k * m, -k))), s.var(s.r.choice((s.size(), k, m)))) for _ in range(s.r.randint(1, 3))]
    return n(s.r.choice(("fdiv", "mod")), build("add", *parts, c(s.r.choice((0, 0, 1, 7, -1)))), c(s.r.choice((k, m, k * m, 2 * k))))


@sample("quotient of quotient", "quotient of remainder", "remainder of remainder")
def _(s: Source) -> Term:
    k, m = s.size(2), s.size(2)
    inner = T.mk(s.r.choice(("fdiv", "mod")), small(s, s.var(), s.var(9)), c(s.r.choice((k, m, k * m))))
    if s.chance(0.3):
        inner = build("add", build("mul", c(s.r.choice((1, 3, -1))), inner), small(s, s.var()))
    return n(s.r.choice(("fdiv", "mod")), inner, c(s.r.choice((k, m, k * m))))


@sample("quotient and remainder")
def _(s: Source) -> Term:
    k, m, f = s.size(2), s.size(2), s.r.choice((1, 1, 2, -1))
    x = T.normal(s.r.choice((small(s, s.var(9), s.var()), T.mk("fdiv", s.choose([s.var()]), c(2)), s.affine([s.var(9), s.var(7)]))))
    q = T.mk("fdiv", x, c(k))
    q = T.mk("mod", q, c(m)) if s.chance(0.5) else q
    factor = s.r.choice((f * k, f * k, f * k, f * m, k))
    return n("add", build("mul", c(factor), q), build("mul", c(f), T.mk("mod", x, c(k))), small(s, s.var()))


# ---- sorted orders -----------------------------------------------------------------------------------------------------


@sample("there and back")
def _(s: Source) -> Term:
    (a, key), (b, other), p = s.sort(), s.sort(), s.var(4)
    inner, outer = either(s, "perm", "inv") if s.chance(0.8) else ("perm", "perm")
    return T.mk(outer, a, key, T.mk(inner, a, key, p) if s.chance(0.7) else T.mk(inner, b, other, p))


@sample("sorted at its place")
def _(s: Source) -> Term:
    (a, key), (b, other), p = s.sort(), s.sort(), s.var(4)
    return T.mk("sv", key, s.r.choice((T.mk("inv", a, key, p), T.mk("inv", a, key, p), T.mk("perm", a, key, p), T.mk("inv", b, other, p))))


# ---- reductions --------------------------------------------------------------------------------------------------------


@sample("of one value")
def _(s: Source) -> Term:
    v, u = s.var(), s.var()
    op = s.r.choice(("max", "min", "any"))
    body = condition if op == "any" else number
    return n(op, v, body(s, u) if s.chance(0.6) else body(s, u, v))


@sample("any hits")
def _(s: Source) -> Term:
    v, u = s.var(), s.var()
    a = small(s, u) if s.chance(0.8) else small(s, u, v)
    rest = s.r.choice((c(1), c(1), condition(s, u, v), number(s, u, v)))
    return n("any", v, build("mul", build("eq", v, a), rest))


@sample("any slot is itself", "distinct slots", "own slot")
def _(s: Source) -> Term:
    k = s.r.randint(1, 3)
    v, row, other = s.var(s.r.choice((k, k, 2))), s.var(3), s.var(3)
    chosen, second = s.choice(3, k, extent=4), s.choice(3, k, extent=4)
    slot = s.r.choice((s.var(k), c(0), c(2), small(s, row)))
    own = T.mk("topk", chosen, (row, v))
    same = T.mk("topk", s.r.choice((chosen, chosen, chosen, second)), (s.r.choice((row, row, row, other)), slot))
    hit = build("eq", own, same if s.chance(0.8) else small(s, row))
    op = s.r.choice(("any", "sum", "sum"))
    rest = c(1) if op == "any" else s.r.choice((c(1), number(s, v, row)))
    return n(op, v, build("mul", hit, rest))


# ---- sums --------------------------------------------------------------------------------------------------------------


@sample("of a constant")
def _(s: Source) -> Term:
    v, u = s.var(), s.var()
    return n("sum", v, number(s, u) if s.chance(0.7) else number(s, u, v))


@sample("of one index")
def _(s: Source) -> Term:
    v = s.var(s.r.choice((1, 1, 2)))
    return n("sum", v, number(s, v, s.var()))


@sample("case by case")
def _(s: Source) -> Term:
    v, u = s.var(s.r.randint(2, 4)), s.var()
    out = number(s, u) if s.chance(0.7) else number(s, u, v)
    for _ in range(s.r.randint(1, 4)):
        out = T.mk("ite", build("eq", v, c(s.r.randint(-1, 5))), number(s, u, v), out)
    return n("sum", v, build("mul", out, s.r.choice((c(1), c(1), number(s, v), condition(s, v)))))


@sample("over a sorted order")
def _(s: Source) -> Term:
    size = s.size(2)
    node, key = s.sort(size)
    other, second = s.sort(size)
    v, u = s.var(s.r.choice((size, size, size, size, 2))), s.var(s.size(2))
    rows, table = s.tensor(size), s.tensor(4)
    place = T.mk("perm", node, key, v)
    more = [
        T.atom(rows, (place,)),
        T.atom(rows, (T.mk("perm", other, second, v),)),
        build("eq", T.mk("sv", second, v), u),
        T.atom(rows, (v,)),
    ]
    parts = [
        T.atom(rows, (place,)),
        build("eq", T.mk("sv", key, v), u),
        T.atom(table, (T.mk("sv", key, v),)),
        build("eq", T.mk("fdiv", place, c(2)), u),
    ]
    chosen = [s.r.choice(parts) for _ in range(s.r.randint(1, 3))] + ([s.r.choice(more)] if s.chance(0.2) else [])
    return T.mk("sum", v, T.normal(build("mul", *chosen)))


@sample("over masked rows")
def _(s: Source) -> Term:
    mask = s.mask(*(s.size(2) for _ in range(s.r.randint(1, 2))))
    row, u = T.var(s.rows_of(mask), "n"), s.var()
    at = [T.mk("nz", mask, row, d) for d in range(len(mask.shape))]
    parts = [T.atom(s.tensor(*mask.shape), tuple(at)), build("eq", at[0], u), T.atom(s.tensor(5), (u,))]
    if s.chance(0.15):
        parts.append(T.atom(s.tensor(9), (row,)))
    return T.mk("sum", row, T.normal(build("mul", *(s.r.choice(parts) for _ in range(3)), parts[-1])))


@sample("factor out")
def _(s: Source) -> Term:
    v, u = s.var(), s.var()
    return n("sum", v, build("mul", number(s, u), number(s, v, u), s.r.choice((c(1), condition(s, u), condition(s, v)))))


@sample("same place")
def _(s: Source) -> Term:
    size = s.size(2)
    _, key = s.sort(size)
    _, other = s.sort(size)
    v, p = s.var(s.r.choice((size, size, size, 2))), s.r.choice((s.var(size), s.var(size), c(1), s.var(5)))
    own, theirs = T.at_key(key, v), T.at_key(s.r.choice((key, key, key, key, other)), p)
    ranks = build("eq", T.mk("rank", key, v, own), T.mk("rank", s.r.choice((key, key, key, other)), p, theirs))
    return T.mk("sum", v, T.normal(build("mul", ranks, build("eq", own, theirs) if s.chance(0.9) else c(1), T.atom(s.tensor(size), (v,)))))


@sample("one hot")
def _(s: Source) -> Term:
    v, u = s.var(), s.var()
    return n("sum", v, build("mul", build("eq", v, small(s, u) if s.chance(0.9) else small(s, u, v)), number(s, u, v)))


@sample("block", "stride")
def _(s: Source) -> Term:
    k, m = s.size(), s.size()
    v, u = s.var(s.r.choice((k, m, k * m, 7, 4))), s.var(s.r.choice((k, m, 3)))
    a = s.r.choice((u, u, c(s.r.randint(-1, 3)), small(s, u)))
    return n("sum", v, build("mul", build("eq", T.mk(s.r.choice(("fdiv", "mod")), v, c(s.r.choice((k, m, 2)))), a), number(s, u, v)))


@sample("scattered")
def _(s: Source) -> Term:
    k = s.r.randint(1, 3)
    v, j, u = s.var(), s.var(k, "j"), s.var()
    chosen = T.mk("topk", s.choice(5, k, extent=4), (u, j))
    hit = build("eq", s.r.choice((chosen, chosen, small(s, u, j))), v)
    inner = T.mk("any", j, hit) if s.chance(0.4) else T.mk("sum", j, build("mul", hit, number(s, u, j)))
    return n("sum", v, build("mul", inner, number(s, u, v)))


@sample("distribute")
def _(s: Source) -> Term:
    v, u = s.var(), s.var()
    return n(
        "sum",
        v,
        build("add", *(s.r.choice((number(s, u), number(s, u, v), build("mul", condition(s, u, v), number(s, v)))) for _ in range(2))),
    )


@sample("any of the summed")
def _(s: Source) -> Term:
    v, w, u = s.var(3, "j"), s.var(s.r.choice((3, 3, 3, 2)), "j"), s.var()
    hit, other = condition(s, u, v), condition(s, u, v)
    asked = T.subst(s.r.choice((hit, hit, hit, other)), {v: w})
    return n("mul", T.mk("any", w, asked), T.mk("sum", v, build("mul", hit, T.atom(s.tensor(3, 5), (v, u)))), number(s, u))


@sample("zero anyhow")
def _(s: Source) -> Term:
    v, w, u = s.var(3, "j"), s.var(3, "j"), s.var()
    positive = s.tensor(3, 5)
    s.facts.positive.add(positive)
    ids = s.tensor(3, whole=5)
    s.facts.know(ids, 5)
    chosen = s.r.choice((T.eq(T.atom(ids, (v,)), u), T.eq(T.atom(ids, (v,)), u), condition(s, u, v)))
    body = build("mul", chosen, T.atom(s.r.choice((positive, s.tensor(3, 5))), (v, u)))
    x = T.mk("sum", v, s.r.choice((body, body, build("add", body, c(-1)))))
    again = T.mk("sum", w, T.subst(x.args[1], {v: w}))
    over = build("pow", number(s, u), -1)
    y = build("mul", s.r.choice((again, again, again, number(s, u))), over, number(s, u))
    asked = s.r.choice((x, x, build("mul", x, over)))
    return n("mul", s.r.choice((T.not_(T.eq(asked, c(0))), T.lt(c(0), asked))), y)


# ---- axioms ------------------------------------------------------------------------------------------------------------


@sample("beyond the experts")
def _(s: Source) -> Term:
    experts, k, u = s.r.randint(1, 4), s.r.randint(1, 3), s.var()
    a = s.r.choice((T.normal(s.choose([u])), T.atom(s.tensor(5, whole=6, negative=True), (u,)), s.var(6)))
    at = build("add", build("mul", c(k), a), s.var(s.r.choice((k, k, k, 2)))) if s.chance(0.4) else a
    size = experts * (1 if at is a else k)
    w = T.atom((s.weight if s.chance(0.8) else s.tensor)(size, 3), (at, s.var(3)))
    m = s.var(3)
    other = s.r.choice((w, build("add", w, number(s)), T.mk("sum", m, build("mul", w, T.atom(s.tensor(3), (m,)))), build("add", w, w, w)))
    limit = T.mk("lt", a, c(s.r.choice((experts, experts, experts + 1, experts - 1))))
    return n("mul", s.r.choice((limit, T.mk("not", T.mk("lt", a, c(0))))), other, number(s))
