"""Terms in print, over several lines: for traces and documents. One line, cut short, is `term.show`."""

from __future__ import annotations

import re

from .ops import OPS
from .term import Term, show

_SIZE = 40_000  # characters: a term is a tree in print, and may be a huge one


def pretty(t: Term, width: int = 110) -> str:
    """All of a term; what does not fit on a line has each of its parts on lines of its own. Bound variables are numbered from the top."""
    out: list[str] = []
    _lay(t, width, out)
    text = _numbered("\n".join(out))
    return text if len(text) <= _SIZE else f"{text[:_SIZE]}\n… (cut)"


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
    flat = show(t, 2 * room)
    if len(flat) <= room or not t.parts:
        out.append("  " * indent + flat)
        return
    before = ""
    for piece in OPS[t.op].text(t.op, t.args):
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


_BETWEEN = (",", "·", "+", "=", "<", "//", "%")
