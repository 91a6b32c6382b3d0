"""The interned term itself: construction and traversal. The meaning of each op stands in `terms`, its layout in `ops`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sympy as sp

from .budget import step
from .ops import BINDERS, OPS

table: dict[tuple[Any, ...], Term] = {}
_serial = itertools.count()
_fresh = itertools.count()
_CLOSED: frozenset[Any] = frozenset()


class Term:
    """An interned expression node; build with the functions below, never directly.

    `parts`: its direct subterms (a binder's variable is not one). `atoms`: the variables that are free in it.
    """

    __slots__ = ("args", "atoms", "op", "parts", "serial")
    op: str
    args: tuple[Any, ...]
    serial: int
    parts: tuple[Term, ...]
    atoms: frozenset[Term]

    def __repr__(self) -> str:
        return show(self)


def mk(op: str, *args: Any) -> Term:
    """The term with exactly these arguments: nothing is simplified."""
    key = (op, *args)
    t = table.get(key)
    if t is None:
        step()
        t = object.__new__(Term)
        t.op, t.args, t.serial, t.parts = op, args, next(_serial), OPS[op].children(args)
        t.atoms = _free(t)
        table[key] = t
    return t


def _free(t: Term) -> frozenset[Term]:
    if t.op == "v":
        return frozenset((t,))
    if not t.parts:
        return _CLOSED
    free = t.parts[0].atoms
    for c in t.parts[1:]:
        if c.atoms is not free:
            free = free | c.atoms
    return free - {t.args[0]} if t.op in BINDERS else free


def children(t: Term) -> tuple[Term, ...]:
    """Direct subterms (a binder's variable is not one)."""
    return t.parts


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
    """A variable of its own, 0 <= it < size."""
    return mk("v", f"{name}{next(_fresh)}", size)


def named(name: str, size: Any) -> Term:
    """A variable that is the same wherever the same name and size are asked for."""
    return mk("v", name, size)


def atom(node: Any, idx: tuple[Term, ...]) -> Term:
    return mk("a", node, idx)


def let(body: Term, mapping: dict[Term, Term]) -> Term:
    """body with terms (usually variables) replaced, written down and not carried out."""
    return mk("let", body, tuple(mapping), tuple(mapping.values()))


def uses(t: Term, v: Term) -> bool:
    return v in t.atoms


def factors(t: Term) -> tuple[Term, ...]:
    """What t is a product of."""
    return t.args if t.op == "mul" else (t,)


def addends(t: Term) -> tuple[Term, ...]:
    """What t is a sum of."""
    return t.args if t.op == "add" else (t,)


def walk(t: Term) -> Iterator[Term]:
    """Every distinct subterm, parents after children."""
    done: set[Term] = set()
    entered: set[Term] = set()
    stack = [t]
    while stack:
        x = stack.pop()
        if x in done:
            continue
        if x.parts and x not in entered:
            entered.add(x)
            stack.append(x)
            stack.extend(x.parts)
        else:
            done.add(x)
            yield x
    step(len(done))


def reached(t: Term, into: Callable[[Term], Iterable[Term]]) -> Iterator[Term]:
    """t and the terms that `into` leads to from it, each once."""
    seen = {t}
    stack = [t]
    while stack:
        x = stack.pop()
        yield x
        new = [y for y in into(x) if y not in seen]
        seen.update(new)
        stack += new


def places(t: Term, v: Term, ops: tuple[str, ...]) -> list[Term]:
    """The subterms of these ops that v is free in."""
    found = []
    seen: set[Term] = set()
    stack = [t]
    while stack:
        x = stack.pop()
        if v in x.atoms and x not in seen:
            seen.add(x)
            stack.extend(x.parts)
            if x.op in ops:
                found.append(x)
    step(len(seen))
    return found


def only_in(t: Term, v: Term, within: set[Term]) -> bool:
    """Whether the variable v stands nowhere in t but inside these subterms."""
    seen: set[Term] = set()
    stack = [t]
    while stack:
        x = stack.pop()
        if x is v:
            return False
        if v in x.atoms and x not in seen and x not in within:
            seen.add(x)
            stack.extend(x.parts)
    return True


def _plain(t: Term) -> Iterable[Any]:
    return OPS[t.op].text(t.op, t.args)


def show(t: Term, limit: int = 160, pieces: Callable[[Term], Iterable[Any]] = _plain) -> str:
    """The head of the term as text, cut at about `limit` characters (a term may be a huge tree). `pieces`: what is printed of a term."""
    out: list[str] = []
    length = 0
    stack: list[Any] = [t]
    while stack:
        piece = stack.pop()
        if isinstance(piece, Term):
            stack.extend(reversed(list(pieces(piece))))
            continue
        out.append(str(piece))
        length += len(out[-1])
        if length > limit:
            return "".join(out)[: limit - 3] + "..."
    return "".join(out)
