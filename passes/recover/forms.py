"""How the up projections of one expert are stored: one matrix, halves of one, interleaved rows, or two."""

from __future__ import annotations

import sympy as sp

from ...ir import Form
from ...ir import scalar as act
from .body import Core
from .rows import No


def layout(c: Core) -> tuple[Form, list[sp.Symbol], sp.Expr]:
    """Storage form of the up projection, its symbols (first, second), and the activation in G and U."""
    symbols = list(c.linears)
    if len(symbols) == 1:
        lin = c.linears[symbols[0]]
        if (lin.stride, lin.offset) != (1, 0):
            raise No("a single projection reads a part of its weight")
        return Form.SINGLE, symbols, tidy(c.expr.subs(symbols[0], act.G))
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
    return form, [a, b], tidy(c.expr.subs({a: act.G, b: act.U}, simultaneous=True))


def _is_gate(s: sp.Symbol, expr: sp.Expr) -> bool:
    return any(s in f.free_symbols for f in expr.atoms(sp.Function))


def tidy(expr: sp.Expr) -> sp.Expr:
    """Numbers as exact as they were written: 0.5 is 1/2, 1.702 stays itself."""
    # scales of rows that were divided by and multiplied back
    expr = expr.replace(lambda e: e.is_Float and e != 1 and abs(e - 1) < 1e-12, lambda e: sp.S.One)
    return expr.replace(lambda e: e.is_Float, lambda e: sp.nsimplify(e, rational=True) if sp.nsimplify(e, rational=True).q < 10**6 else e)
