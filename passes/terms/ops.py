"""The table of term ops: how each is laid out, and with that how its subterms are found, replaced, compared and printed.

`kinds` has a letter for each argument: t a term, s a tuple of terms, k a sort key (a term of its own that substitution leaves alone),
b the variable that a reduction binds, d data; "*" is any number of terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Args = tuple[Any, ...]
Text = Callable[[str, Args], Iterable[Any]]


class Op:
    """`commutative`: the order of the subterms says nothing. `opaque`: two such terms are alike only when they are one (see unify).

    `shape`: what of the data belongs to a term's form. `text`: the pieces that are printed, terms among them.
    `terms`: it holds terms only. `leaf`: it holds none that could be replaced. `binds`: its first argument is a bound variable.
    """

    def __init__(
        self,
        name: str,
        kinds: str,
        text: Text,
        *,
        commutative: bool = False,
        opaque: bool = False,
        shape: Callable[[Args], Any] | None = None,
    ) -> None:
        self.name, self.kinds, self.text, self.commutative, self.opaque = name, kinds, text, commutative, opaque
        self.shape = shape or (lambda args: ())
        self.terms = not kinds.strip("*t")
        self.leaf = not kinds.strip("dk")
        self.binds = kinds[0] == "b"

    def children(self, args: Args) -> Args:
        """The direct subterms."""
        if self.terms:
            return args
        if "s" in self.kinds:
            return tuple([x for k, a in zip(self.kinds, args) if k in "tks" for x in (a if k == "s" else (a,))])
        return tuple([a for k, a in zip(self.kinds, args) if k in "tk"])

    def map(self, args: Args, f: Callable[[Any], Any]) -> Args:
        """The arguments with f applied to each direct subterm, sort keys apart."""
        if self.terms:
            return tuple([f(a) for a in args])
        return tuple([f(a) if k == "t" else tuple([f(x) for x in a]) if k == "s" else a for k, a in zip(self.kinds, args)])

    def data(self, args: Args) -> Args:
        """The arguments that are no terms."""
        return () if self.terms else tuple(a for k, a in zip(self.kinds, args) if k in "db")


def joined(xs: Iterable[Any], by: str) -> list[Any]:
    out: list[Any] = []
    for x in xs:
        out.extend((by, x) if out else (x,))
    return out


def _read(name: str, a: Args) -> Iterable[Any]:
    node = getattr(a[0], "name", None) or (f"({a[0][0]}, ...)" if isinstance(a[0], tuple) else str(a[0]))
    return (f"{node}[", *joined(a[1], ", "), "]")


def _reduction(name: str, a: Args) -> Iterable[Any]:
    return (f"{name}_{a[0].args[0]}<{a[0].args[1]}>(", a[1], ")")


def _sorted(name: str, a: Args) -> Iterable[Any]:
    return ("sorted(" if name == "sv" else f"{name}(", a[-1], ")")


def _leaf(name: str, a: Args) -> Iterable[Any]:
    return (str(a[0]),)


def _call(name: str, a: Args) -> Iterable[Any]:
    return (f"{name}(", *joined(a, ", "), ")")


def _infix(sign: str) -> Text:
    return lambda name, a: ("(", *joined(a, sign), ")")


def _function(name: str, a: Args) -> Iterable[Any]:
    return (f"{a[0]}(", *joined(a[1], ", "), f", {a[2]})" if a[2] else ")")


_ROWS = (
    Op("c", "d", _leaf, opaque=True),
    Op("v", "dd", _leaf, opaque=True, shape=lambda a: a[0]),
    Op("a", "ds", _read),
    Op("topk", "ds", _read, opaque=True, shape=lambda a: len(a[1])),
    Op("add", "*", _infix(" + "), commutative=True),
    Op("mul", "*", _infix("*"), commutative=True),
    Op("pow", "td", lambda name, a: (a[0], f"^{a[1]}")),
    Op("fn", "dsd", _function, shape=lambda a: a[0]),
    Op("eq", "tt", _call, commutative=True),
    Op("lt", "tt", _call),
    Op("not", "t", _call),
    Op("ite", "ttt", _call),
    Op("sum", "bt", _reduction),
    Op("max", "bt", _reduction),
    Op("min", "bt", _reduction),
    Op("any", "bt", _reduction),
    Op("prod", "bt", _reduction),
    Op("fdiv", "tt", _call),
    Op("mod", "tt", _call),
    Op("perm", "dkt", _sorted, opaque=True),
    Op("inv", "dkt", _sorted, opaque=True),
    Op("sv", "kt", _sorted, opaque=True),
    Op("rank", "ktt", _call),
    Op("nz", "dtd", _call, opaque=True),
    Op("let", "tds", lambda name, a: (a[0], "{", *joined((x for pair in zip(a[1], a[2]) for x in pair), " "), "}")),
)
OPS: dict[str, Op] = {op.name: op for op in _ROWS}
BINDERS = tuple(op.name for op in _ROWS if op.binds)
