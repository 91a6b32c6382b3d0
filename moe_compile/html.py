"""What the pages of this package share: their style, and how code and places are written."""

from __future__ import annotations

import linecache
from html import escape

from .table import short

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c22; --good: #183; --soft: #8881; --box: #fff; --ink: #223; }
@media (prefers-color-scheme: dark) { :root { --bad: #f77; --good: #6d8; --box: #223; --ink: #dde; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1.5rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; border-bottom: 2px solid var(--line); margin-top: 2.5rem; }
pre { font: 12.5px/1.4 ui-monospace, monospace; background: var(--soft); padding: .6rem; margin: .3rem 0; overflow-x: auto; }
section.stage { margin: 1.2rem 0; } summary { cursor: pointer; }
.stage > details > summary { font-weight: 600; } .says, .where, .rules { opacity: .75; font-weight: 400; }
.entry { border-left: 3px solid var(--line); padding-left: .9rem; margin: .9rem 0; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(32rem, 1fr)); gap: .8rem; } .two > * { min-width: 0; }
.bad { color: var(--bad); font-weight: 600; } .good, ins { color: var(--good); } ins, del { text-decoration: none; }
del { color: var(--bad); }
table { border-collapse: collapse; margin: .4rem 0; } td { padding: .1rem .9rem .1rem 0; } td:first-child { text-align: right; }
"""
_AROUND = 3  # lines of code before and after


def document(title: str, body: str, style: str = "") -> str:
    """One self-contained page: no script, nothing loaded from elsewhere."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}{style}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def where(source: str) -> str:
    """file:line, as it is told in text."""
    return f'<span class="where">{escape(short(source))}</span>' if source else ""


def code_at(source: str) -> str:
    """The lines around file:line, that one marked; "" where the text cannot be had."""
    path, _, line = source.rpartition(":")
    lines = linecache.getlines(path) if line.isdigit() else []
    at = int(line) if lines else 0
    if not 0 < at <= len(lines):
        return ""
    shown = range(max(1, at - _AROUND), min(len(lines), at + _AROUND) + 1)
    rows = (f"{'<ins>' if n == at else ''}{n:5d}  {escape(lines[n - 1].rstrip())}{'</ins>' if n == at else ''}" for n in shown)
    return f"<pre>{chr(10).join(rows)}</pre>"
