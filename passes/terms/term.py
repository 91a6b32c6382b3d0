"""The interned term itself: construction, traversal, budget. The meaning of each op stands in `terms`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import sympy as sp

table: dict[tuple[Any, ...], Term] = {}


_serial = itertools.count()


_fresh = itertools.count()


class Term:
    """An interned expression node; build with the functions below, never directly."""

    __slots__ = ("args", "atoms", "op", "serial")
    op: str
    args: tuple[Any, ...]
    serial: int
    atoms: frozenset[Term]

    def __repr__(self) -> str:
        return show(self)


def reset() -> None:
    """Forget all terms (once a compilation; terms of different compilations must not meet)."""
    table.clear()
    allow(10_000_000)


class TooLarge(Exception):
    """More distinct terms than any block of experts needs: values depend on each other in too many ways."""


_work = [10_000_000]  # steps left


def allow(steps: int) -> None:
    """Start a piece of work that may take so many steps of rebuilding and walking before it is given up (`TooLarge`)."""
    _work[0] = steps


def step(n: int = 1) -> None:
    _work[0] -= n
    if _work[0] < 0:
        raise TooLarge("the values around the selection depend on each other in too many ways")


def mk(op: str, *args: Any) -> Term:
    key = (op, *args)
    t = table.get(key)
    if t is None:
        step()
        t = object.__new__(Term)
        t.op, t.args, t.serial = op, args, next(_serial)
        free: set[Term] = {t} if op == "v" else set()
        for a in children(t):
            free |= a.atoms
        if op in BINDERS:
            free.discard(args[0])
        t.atoms = frozenset(free)
        table[key] = t
    return t


BINDERS = ("sum", "max", "min", "any", "prod")


def children(t: Term) -> Iterator[Term]:
    """Direct subterms (a binder's variable is not one)."""
    if t.op in BINDERS:
        yield t.args[1]
        return
    for a in t.args:
        if isinstance(a, Term):
            yield a
        elif isinstance(a, tuple):
            for b in a:
                if isinstance(b, Term):
                    yield b


def const(v: Any) -> Term:
    if isinstance(v, Term):
        return v
    if isinstance(v, bool):
        v = int(v)
    if isinstance(v, sp.Float):
        v = float(v)
    if isinstance(v, float) and v.is_integer() and abs(v) < 2**53:
        v = int(v)
    if isinstance(v, sp.Expr) and v.is_Integer:
        v = int(v)
    # ints and floats that compare equal are one constant; NaN is its own
    return mk("c", v if v == v else "nan")


def is_c(t: Term, v: Any = None) -> bool:
    return t.op == "c" and (v is None or t.args[0] == v)


def var(size: Any, name: str = "i") -> Term:
    return mk("v", f"{name}{next(_fresh)}", size)


def named(name: str, size: Any) -> Term:
    """A variable that is the same wherever the same name and size are asked for."""
    return mk("v", name, size)


def atom(node: Any, idx: tuple[Term, ...]) -> Term:
    return mk("a", node, idx)


def uses(t: Term, v: Term) -> bool:
    return v in t.atoms


def walk(t: Term) -> Iterator[Term]:
    """Every distinct subterm, parents after children."""
    seen: set[Term] = set()
    stack: list[tuple[Term, bool]] = [(t, False)]
    while stack:
        x, done = stack.pop()
        if done:
            yield x
        elif x not in seen:
            seen.add(x)
            step()
            stack.append((x, True))
            stack.extend((c, False) for c in children(x))


def show(t: Term, limit: int = 160) -> str:
    """For debugging and rejections: the head of the term as text, cut at about `limit` characters (a term may be a huge tree)."""
    out: list[str] = []
    length = 0
    for piece in _pieces(t):
        out.append(piece)
        length += len(piece)
        if length > limit:
            return "".join(out)[: limit - 3] + "..."
    return "".join(out)


def _pieces(t: Term) -> Iterator[str]:
    """The text of a term, bit by bit."""
    op, a = t.op, t.args
    if op in ("c", "v"):
        yield str(a[0])
    elif op in ("a", "topk"):
        name = getattr(a[0], "name", None)
        yield (name or (f"({a[0][0]}, ...)" if isinstance(a[0], tuple) else str(a[0]))) + "["
        yield from _joined(a[1], ", ")
        yield "]"
    elif op in ("add", "mul"):
        yield "("
        yield from _joined(a, " + " if op == "add" else "*")
        yield ")"
    elif op == "pow":
        yield from _pieces(a[0])
        yield f"^{a[1]}"
    elif op == "fn":
        yield f"{a[0]}("
        yield from _joined(a[1], ", ")
        yield f", {a[2]})" if a[2] else ")"
    elif op in BINDERS:
        yield f"{op}_{a[0].args[0]}<{a[0].args[1]}>("
        yield from _pieces(a[1])
        yield ")"
    elif op in ("perm", "inv", "sv"):
        yield "sorted(" if op == "sv" else f"{op}("
        yield from _pieces(a[-1])
        yield ")"
    else:
        yield f"{op}("
        yield from _joined(a, ", ")
        yield ")"


def _joined(ts: tuple[Any, ...], by: str) -> Iterator[str]:
    for i, t in enumerate(ts):
        yield by if i else ""
        yield from _pieces(t) if isinstance(t, Term) else (str(t),)
