"""From terms to sympy: arithmetic and scalar functions are the same for an expert's inside and for a router; what a leaf is, differs."""

from __future__ import annotations

from typing import Any

import sympy as sp

from ...ir import scalar
from ..terms import Term


def _said(name: str) -> str:
    """A function with limits that has no row where gradients are wanted, as users call it."""
    name = "relu6, hardswish, hardsigmoid or hardtanh" if name == "hardtanh" else name
    return f"{name}, whose gradient at a limit is none of clamp's: without gradients, or written with clamp, it is read"


class Bridge:
    """`leaf(x)`: the expression of a term that is no arithmetic. `failure(x)`: the exception for a function that has no row."""

    def number(self, v: Any) -> sp.Expr:
        return scalar.number(v)

    def function(self, name: str, x: sp.Expr, consts: tuple[Any, ...]) -> sp.Expr:
        return scalar.call(name, x, consts)

    def leaf(self, x: Term) -> sp.Expr:
        raise NotImplementedError

    def failure(self, name: str) -> Exception:
        raise NotImplementedError

    def arithmetic(self, x: Term, go: Any) -> sp.Expr:
        """The expression of x, `go` being that of its subterms."""
        if x.op == "c":
            return self.number(x.args[0])
        if x.op in ("add", "mul"):
            return (sp.Add if x.op == "add" else sp.Mul)(*(go(y) for y in x.args))
        if x.op == "pow":
            return go(x.args[0]) ** sp.nsimplify(x.args[1], rational=True)
        if x.op == "fn":
            try:
                return self.function(x.args[0], go(x.args[1][0]), x.args[2])
            except KeyError:
                raise self.failure(_said(x.args[0]) if x.args[2] else x.args[0]) from None
        return self.leaf(x)
