"""Terms as a person reads them, with the user's names and over several lines: for traces and documents.

`term.show` is the plain form, on one line and cut short, that stands in reasons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .ops import OPS, Args, Text, joined
from .term import Term, show

SAID = "moe_said"  # in a node's meta: what the user calls it
_SIZE = 40_000  # characters: a term is a tree in print, and may be a huge one


def said(node: Any) -> str:
    """What a tensor is called: as the user calls it, where that is known."""
    if isinstance(node, tuple):
        return f"({said(node[0])}, ...)"
    return str(getattr(node, "meta", {}).get(SAID) or getattr(node, "name", None) or node)


def _infix(sign: str, left: str = "(", right: str = ")") -> Text:
    return lambda name, a: (left, *joined(a, sign), right)


def _sum(name: str, a: Args) -> Iterable[Any]:
    numbers = [t.args[0] for t in a if t.op == "c"]
    return (
        "(",
        *joined((t for t in a if t.op != "c"), " + "),
        *(f" - {-n}" if isinstance(n, (int, float)) and n < 0 else f" + {n}" for n in numbers),
        ")",
    )


def _variable(name: str, a: Args) -> Iterable[Any]:
    return (str(a[0]).replace("#", "v"),)


def _read(name: str, a: Args) -> Iterable[Any]:
    return (f"{said(a[0])}[", *joined(a[1], ", "), "]")


def _reduction(name: str, a: Args) -> Iterable[Any]:
    head = (f"{_SIGNS.get(name, name)}[", *_variable("v", a[0].args), f"<{a[0].args[1]}]")
    return (*head, a[1]) if a[1].op in _ENCLOSED else (*head, "(", a[1], ")")


def _function(name: str, a: Args) -> Iterable[Any]:
    return (f"{a[0]}(", *joined(a[1], ", "), *(f", {c}" for c in a[2] or ()), ")")


_SIGNS = {"sum": "Σ", "prod": "Π"}
_ENCLOSED = ("add", "mul", "fdiv", "mod", "eq", "lt")  # printed in brackets of their own
_BETWEEN = (",", "·", "+", "=", "<", "//", "%")
_TEXT: dict[str, Text] = {  # for the others the table of ops has the text
    "v": _variable,
    "a": _read,
    "topk": _read,
    "add": _sum,
    "mul": _infix(" · "),
    "fdiv": _infix(" // "),
    "mod": _infix(" % "),
    "eq": _infix(" = ", "[", "]"),
    "lt": _infix(" < ", "[", "]"),
    "ite": lambda name, a: ("if(", *joined(a, ", "), ")"),
    "fn": _function,
    **dict.fromkeys(("sum", "prod", "max", "min", "any"), _reduction),
}


def pieces(t: Term) -> Iterable[Any]:
    """What is printed of a term, its parts among it."""
    return _TEXT.get(t.op, OPS[t.op].text)(t.op, t.args)


def pretty(t: Term, width: int = 110) -> str:
    """All of a term; what does not fit on a line has each of its parts on lines of its own. Bound variables are numbered from the top."""
    out: list[str] = []
    _lay(t, width, out)
    text = _numbered("\n".join(out))
    return text if len(text) <= _SIZE else f"{text[:_SIZE]}\n… (cut)"


def line(t: Term) -> str:
    """The head of a term on one line."""
    return _numbered(show(t, pieces=pieces))


_BINDER = re.compile(r"(?:[ΣΠ]|\b(?:max|min|any))\[([a-z]+)(\d+)<")


def _numbered(text: str) -> str:
    """The text with bound variables s13, m14, m18 called s, m, m2: their own numbers count all that were ever made."""
    new: dict[str, str] = {}
    taken = {"t": 1, "h": 1}  # the token and the feature that are asked for
    for name, number in _BINDER.findall(text):
        if name + number not in new:
            taken[name] = taken.get(name, 0) + 1
            new[name + number] = name if taken[name] == 1 else f"{name}{taken[name]}"
    return re.sub(rf"(?<![\w.])({'|'.join(new)})(?!\w)", lambda m: new[m[1]], text) if new else text


def _lay(t: Term, width: int, out: list[str], indent: int = 0) -> None:
    room = max(width - 2 * indent, 24)
    if sum(map(len, out)) > _SIZE:
        return
    flat = show(t, 2 * room, pieces)
    if len(flat) <= room or not t.parts:
        out.append("  " * indent + flat)
        return
    before = ""
    for piece in pieces(t):
        if isinstance(piece, Term):
            if before:
                out.append("  " * indent + before)
            before = ""
            _lay(piece, width, out, indent + 1)
        elif piece.strip() in _BETWEEN:
            out[-1] += piece.rstrip()
        else:
            before += piece
    if before:
        out.append("  " * indent + before)
