"""Terms in print, over several lines: for traces and documents. One line, cut short, is `term.show`."""

from __future__ import annotations

from .ops import OPS
from .term import Term, show

_SIZE = 40_000  # characters: a term is a tree in print, and may be a huge one


def pretty(t: Term, width: int = 110) -> str:
    """All of a term; what does not fit on a line has each of its parts on lines of its own."""
    out: list[str] = []
    _lay(t, width, out)
    text = "\n".join(out)
    return text if len(text) <= _SIZE else f"{text[:_SIZE]}\n… (cut)"


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
