"""One base for all experts, each with an adapter of its own on it (a mixture of adapters):  W x + s b[e] (a[e] x).

The op takes a matrix for each expert; they may all be the same one, read where it lies. It is so taken only where nothing is to be learned
of it: a gradient would be made once for each expert.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import terms as T
from ..terms import Term
from .adapters import read
from .rows import factors


def of_each(body: Term, t: Term, expert: Term) -> Term:
    """The term with W[out, in] and bias[out] beside low-rank pairs read as those of `expert`, of as many as there are."""
    count = expert.args[1]
    found: dict[Term, Term] = {}
    for total in [x for x in T.walk(body) if x.op == "add" and T.uses(x, expert)]:
        for out in total.atoms - {t, expert}:
            pairs = [a for a in total.args if (pair := read(a, out, expert)) is not None and isinstance(pair.a.args[0], tuple)]
            for part in total.args if pairs else ():
                atoms = [f for f in (part, *_inside(part, out)) if f.op == "a" and _is_common(f, out, t, expert)]
                found |= {a: T.atom((a.args[0],) * count, (expert, *a.args[1])) for a in atoms}
    return T.canonical(T.subst(body, found)) if found else body


def _inside(part: Term, out: Term) -> list[Term]:
    return [g for f in factors(part) if f.op == "sum" and T.uses(f, out) for g in factors(f.args[1])]


def _is_common(a: Term, out: Term, t: Term, expert: Term) -> bool:
    """Whether an atom is a frozen parameter of no expert."""
    return T.uses(a, out) and not T.uses(a, t) and not T.uses(a, expert) and _is_frozen(a.args[0])


def _is_frozen(n: Any) -> bool:
    given = getattr(n, "op", "") in ("placeholder", "get_attr")
    return given and not (torch.is_grad_enabled() and n.meta.get("trained", n.meta["val"].requires_grad))
