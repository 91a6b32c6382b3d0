"""Groups of experts in a criterion: experts outside the best groups are masked; a group's score is its best, or a sum of its best ones."""

from __future__ import annotations

import torch.fx as fx

from ...ir import Groups
from .. import terms as T
from ..aten.element import Puller, call_args, shape_of
from ..aten.names import op_name
from ..terms import Term
from .algebra import Unknown


def takes_largest(chosen: Term) -> bool:
    """Whether a selection is of the best; of a sort, whose slots are counted from the largest, it may be of the last."""
    choice: fx.Node = chosen.args[0]
    a, name = call_args(choice), op_name(choice)
    if name == "topk":
        return bool(a.largest)
    if name in ("sort", "argsort"):
        slot, end = chosen.args[1][-1], T.const(shape_of(choice.args[0])[-1] - 1)  # type: ignore[arg-type]
        return slot is not end and not any(T.add(slot, v) is end for v in T.walk(slot) if v.op == "v")
    return name in ("max", "argmax")


def roll_slots(t: Term, choice: fx.Node, rows: tuple[Term, ...], k: int) -> Term:
    """f(slot 0) + f(slot 1) + ... + f(slot k-1) is a sum over the slots, also when it is written out."""
    slots = [T.mk("topk", choice, (*rows, T.const(c))) for c in range(k)]
    memo: dict[Term, Term] = {}
    for x in T.walk(t):
        y = T.rebuild(x, lambda c: memo[c]) if x.op not in ("c", "v") else x
        if y.op == "add" and k > 1:
            y = _rolled(y, slots)
        memo[x] = y
    return memo[t]


def is_last_slot(x: Term, t: Term) -> bool:
    """Whether x reads the last one, n >= 1, of a top-k's slots that t reads by number."""
    if not x.args[1] or x.args[1][-1].op != "c" or x.args[1][-1].args[0] < 1:
        return False
    same = [y.args[1][-1] for y in T.walk(t) if y.op == "topk" and y.args[0] is x.args[0] and y.args[1][:-1] == x.args[1][:-1]]
    return all(s.op == "c" and s.args[0] <= x.args[1][-1].args[0] for s in same)


def _rolled(t: Term, slots: list[Term]) -> Term:
    v = T.named("#rolled", len(slots))
    rest, forms = list(t.args), []
    any_slot = T.mk("topk", slots[0].args[0], (*slots[0].args[1][:-1], v))
    groups: dict[Term, dict[int, Term]] = {}
    for a in t.args:
        here = [c for c, s in enumerate(slots) if any(x is s for x in T.walk(a))]
        if len(here) == 1:
            groups.setdefault(T.subst(a, {slots[here[0]]: any_slot}), {})[here[0]] = a
    for form, members in groups.items():
        if len(members) == len(slots):
            rest = [a for a in rest if a not in members.values()]
            forms.append(form)
    return T.canonical(T.add(T.reduce_("sum", v, T.add(*forms)), *rest)) if forms else t


def split_groups(criterion: Term, e: Term, p: Puller) -> tuple[Term, Groups | None]:
    """ite([group of e is among the kept ones], x, fill) -> x and the groups."""
    if criterion.op == "ite":
        cond, inside, fill = criterion.args
        if inside.op == "c":
            cond, inside, fill = T.not_(cond), fill, inside
        if keeps_all(cond, e):
            return inside, None
        if fill.op != "c":
            raise Unknown("losing groups are filled with a tensor")
        return inside, _groups(cond, inside, float(fill.args[0]), e, p)
    if criterion.op == "mul":
        for f in criterion.args:
            if f.op == "any" or (f.op == "eq" and any(x.op == "topk" for x in T.walk(f))):
                inside = T.mul(*(g for g in criterion.args if g is not f))
                return inside, None if keeps_all(f, e) else _groups(f, inside, 0.0, e, p)
    return criterion, None


def keeps_all(cond: Term, e: Term) -> bool:
    """∃ j < n: topk_n(x)[j] = v is true of every v in [0, n): of n groups all are kept, of one group that one.

    v: 0, or the group of expert e, e // per_group.
    """
    slots, hit = cond.args if cond.op == "any" else (None, cond)
    pick, v = hit.args if hit.op == "eq" else (hit, hit)
    if pick.op != "topk":
        pick, v = v, pick
    if pick.op != "topk" or not isinstance(pick.args[0], fx.Node) or not pick.args[1]:
        return False
    choice, slot = pick.args[0], pick.args[1][-1]
    count = shape_of(choice.args[0])[-1]  # type: ignore[arg-type]
    each = slot is slots and slots.args[1] == count if slots is not None else T.is_c(slot, 0) and count == 1
    group = v.op == "fdiv" and v.args[0] is e and v.args[1].op == "c" and e.args[1] == count * v.args[1].args[0]
    return each and (group or T.is_c(v, 0))


def _groups(cond: Term, inside: Term, fill: float, e: Term, p: Puller) -> Groups:
    kept, hit = (cond.args[0].args[1], cond.args[1]) if cond.op == "any" else (1, cond)
    if hit.op != "eq":
        raise Unknown(f"experts are masked by something else than their group: {T.show(cond, 90)}")
    pick, group = hit.args if hit.args[0].op == "topk" else hit.args[::-1]
    if pick.op != "topk" or group.op != "fdiv" or group.args[0] is not e:
        raise Unknown(f"experts are masked by something else than their group: {T.show(cond, 90)}")
    per_group = group.args[1].args[0]
    count = e.args[1] // per_group
    chooser: fx.Node = pick.args[0]
    if not takes_largest(pick) or shape_of(chooser.args[0])[-1] != count:  # type: ignore[arg-type]
        raise Unknown("groups are chosen in an unknown way")
    g = T.named("g", count)
    score = T.canonical(p.at(chooser.args[0], (*pick.args[1][:-1], g)))
    for x in [x for x in T.walk(score) if x.op == "topk" and is_last_slot(x, score)]:
        score = roll_slots(score, x.args[0], x.args[1][:-1], x.args[1][-1].args[0] + 1)
    return Groups(count, kept, _group_top(score, inside, e, g, per_group), fill)


def _group_top(score: Term, inside: Term, e: Term, g: Term, n: int) -> int:
    """How many of a group's best selection scores its own score sums (1: the maximum)."""
    if score.op == "max":
        v, body = score.args
        if v.args[1] == n and same_at(body, inside, e, T.add(T.mul(T.const(n), g), v)):
            return 1
    elif score.op == "sum" or score.op == "mul" and sum(f.op == "sum" for f in score.args) == 1:
        inner = next(f for f in (score.args if score.op == "mul" else (score,)) if f.op == "sum")
        v, body = inner.args
        body = T.mul(body, *(f for f in score.args if f is not inner)) if score.op == "mul" else body
        for x in T.walk(body):
            if x.op == "topk" and any(T.uses(i, v) for i in x.args[1]):
                if takes_largest(x) and same_at(body, inside, e, T.add(T.mul(T.const(n), g), x)):
                    return int(v.args[1])
    else:
        for x in T.walk(score):
            if x.op == "topk" and takes_largest(x) and same_at(score, inside, e, T.add(T.mul(T.const(n), g), x)):
                return 1
    raise Unknown("a group's score is neither the maximum nor a sum of the best selection scores")


def same_at(body: Term, inside: Term, e: Term, index: Term) -> bool:
    """Whether body is `inside` at expert `index`; both are canonical up to the names of variables bound further out."""
    return T.canonical(T.subst(inside, {e: index})) is T.canonical(body)
