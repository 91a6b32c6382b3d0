"""The report as text: a table to read at a glance, in plain characters."""

from __future__ import annotations

import os
import shutil
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from .findings import BlockReport, Findings, GraphBreak
from .ir import Rejection

WIDTH = 120
_HEAD = ("source", "routing, experts", "shared", "target", "lowering", "valid")
_LIMITS = (32, 0, 20, 8, 20, 5)  # the widest each column may get; the second one takes what the others leave


def render(report: Findings, width: int | None = None) -> str:
    """The whole report: blocks, rejections, graph breaks, one line of totals. `width` defaults to the terminal's, or 120."""
    width = width or max(100, shutil.get_terminal_size((WIDTH, 0)).columns)
    parts = []
    if report.blocks:
        parts.append(_table(_HEAD, [_row(*g) for g in _fold(report.blocks)], width))
    if report.rejected:
        parts.append(_listing("left as written", [_rejection_text(r) for r in report.rejected], width))
    if report.graph_breaks:
        parts.append(_listing("graph breaks", [_break_text(b) for b in report.graph_breaks], width))
    if report.notes:
        parts.append(_listing("notes", report.notes, width))
    parts.append("\n".join(textwrap.wrap(totals(report), width, break_on_hyphens=False)))
    return "\n".join(parts)


def short(source: str) -> str:
    """file:line without the folders that say nothing: the path after site-packages, or relative to the working folder."""
    if not source:
        return "unknown source"
    _, found, tail = source.rpartition("site-packages" + os.sep)
    if found:
        return tail
    path = os.path.relpath(source)
    return source if path.startswith("..") else path


def _fold(blocks: Sequence[BlockReport]) -> list[tuple[BlockReport, int]]:
    """Equal neighbours, which the layers of a model are, as one row and a count."""
    return [(b, len(list(same))) for b, same in groupby(blocks)]


def _row(b: BlockReport, count: int) -> tuple[str, ...]:
    source = os.path.basename(b.source) or "unknown source"
    if count > 1:
        source = f"{source}\n× {count}"
    lowering = f"{b.lowering}\n{b.note}" if b.note and b.note not in b.formula else b.lowering
    meaning = "\n".join(filter(None, (b.formula, b.experts, b.exchange)))
    return source, meaning, b.shared, b.target, lowering, "yes" if b.validated else "no"


def _rejection_text(r: Rejection) -> str:
    return f"{short(r.source)}: {r.reason} [{r.code or r.stage}]"


def _break_text(b: GraphBreak) -> str:
    return f"{short(b.source)}: {b.reason}"


def _listing(title: str, texts: Sequence[str], width: int) -> str:
    lines = [f"{title}:"]
    for text, n in Counter(texts).items():
        lines += textwrap.wrap(text + (f" ×{n}" if n > 1 else ""), width - 2, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


def totals(report: Findings) -> str:
    """One line: how much was fused, left, cut, and how long it took."""

    def count(n: int, what: str) -> str:
        return f"{n} {what}{'' if n == 1 else 's'}"

    parts = [
        f"{count(len(report.blocks), 'MoE block')} fused",
        f"{len(report.rejected)} left as written",
        count(report.graph_count, "graph"),
        count(len(report.graph_breaks), "graph break"),
    ]
    if report.graph_count and not report.blocks and not report.rejected:
        parts.insert(2, "no selection of experts was seen")
    total, passes, validate = (report.seconds.get(k, 0.0) for k in ("total", "passes", "validate"))
    if total:
        parts.append(f"compiled in {total:.2f} s: passes {passes:.2f} s, of which validation {validate:.2f} s")
    return " · ".join(parts)


# -- layout -----------------------------------------------------------------------------------------------------------------


def _columns(text: str) -> int:
    """Width on a terminal: East Asian wide characters take two columns, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    widths = _widths([head, *rows], width)
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [rule, _line(head, widths), rule]
    for row in rows:
        cells = [_wrap(cell, w) for cell, w in zip(row, widths)]
        for i in range(max(map(len, cells))):
            lines.append(_line([c[i] if i < len(c) else "" for c in cells], widths))
    return "\n".join([*lines, rule])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(c + " " * (w - _columns(c)) for c, w in zip(cells, widths)).rstrip()


def _widths(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Natural widths up to each column's limit; the flexible column takes the rest."""
    natural = [max(_columns(line) for row in rows for line in row[i].split("\n")) for i in range(len(_LIMITS))]
    widths = [min(n, limit) if limit else 0 for n, limit in zip(natural, _LIMITS)]
    flexible = _LIMITS.index(0)
    widths[flexible] = max(30, min(natural[flexible], width - sum(widths) - 2 * (len(widths) - 1)))
    return widths


def _wrap(cell: str, width: int) -> list[str]:
    """The cell's lines, each wrapped at spaces; what continues is indented."""
    lines = []
    for line in cell.split("\n"):
        lines += textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False) or [""]
    return lines
