"""A trace as one HTML document: no script, nothing loaded from elsewhere. Long texts fold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING

from ._version import __version__
from .reported import Report
from .table import render, short
from .trace_text import difference, laws, refusals

if TYPE_CHECKING:
    from .passes.trace import Entry, Stage, Trace, Unit

_LONG = 60  # lines of a text that stands open

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c22; --good: #183; --soft: #8881; }
@media (prefers-color-scheme: dark) { :root { --bad: #f77; --good: #6d8; } }
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


def page(report: Report, trace: Trace) -> str:
    """The document."""
    units = trace.units
    links = "".join(f'<li><a href="#u{i}">{escape(u.title)}</a> {_verdict(u)}</li>' for i, u in enumerate(units))
    parts = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>moe_compile trace</title><style>{_STYLE}</style></head>\n',
        f"<body><h1>moe_compile {escape(__version__)}: what each pass made of the model</h1>\n",
        f"<pre>{escape(render(report, 140))}</pre>\n<ul>{links or '<li>No graph reached the passes.</li>'}</ul>\n",
        *(part for i, u in enumerate(units) for part in _unit(u, i)),
        "</body></html>\n",
    )
    return "".join(parts)


def _verdict(u: Unit) -> str:
    found = refusals(u)
    if not found:
        return '<span class="good">nothing refused</span>'
    return "".join(f'<div class="bad">✗ {escape(name)}: {escape(reason)} {_where(source)}</div>' for name, reason, source in found)


def _unit(u: Unit, number: int) -> Iterator[str]:
    yield f'<h2 id="u{number}">{escape(u.title)} {_where(u.source)}</h2>\n{_verdict(u)}\n'
    for s in u.stages:
        yield from _stage(s)


def _stage(s: Stage) -> Iterator[str]:
    failed = ' <span class="bad">✗</span>' if s.refusals else ""
    seconds = f" · {s.seconds:.3f} s" if s.seconds else ""
    state = " open" if s.refusals or s.name == "find" else ""
    says = f'<span class="says">{escape(s.says)}{seconds}</span>'
    yield f'<section class="stage"><details{state}><summary>{escape(s.name)}{failed} {says}</summary>\n'
    if not s.entries:
        yield "<p>No block came this far.</p>"
    for e in s.entries:
        yield from _entry(e)
    if s.skipped:
        yield f'<p class="rules">Nothing like experts at {sum(s.skipped.values())} other places:</p>{_counted(s.skipped.most_common())}'
    if s.rules:
        yield f'<p class="rules">Rules fired:</p>{_counted(s.rules.most_common(), laws())}'
    yield "</details></section>\n"


def _entry(e: Entry) -> Iterator[str]:
    yield f'<div class="entry"><div><code>{escape(e.title)}</code> {_where(e.source)}</div>\n'
    if e.refusal:
        yield f'<div class="bad">✗ first failing predicate: {escape(e.refusal)}</div>\n'
    if e.before and e.before == e.after:
        yield "<p>Goes on as it is.</p>"
    if e.changes:
        yield _text("what changed", _coloured(difference(e.before, e.after)))
    pair = (("before", e.before), ("after", e.after if e.after != e.before else ""))
    yield '<div class="two">' + "".join(_text(word, escape(text)) for word, text in pair if text) + "</div>\n"
    yield "".join(f"<pre>{escape(note)}</pre>" for note in e.notes)
    yield "</div>\n"


def _text(title: str, marked: str) -> str:
    lines = marked.count("\n") + 1
    return f"<details{' open' if lines <= _LONG else ''}><summary>{title}, {lines} lines</summary><pre>{marked}</pre></details>"


def _coloured(text: str) -> str:
    tags = {"+": "ins", "-": "del"}
    lines = ((tags.get(line[:1]), escape(line)) for line in text.splitlines())
    return "\n".join(f"<{tag}>{line}</{tag}>" if tag else line for tag, line in lines)


def _counted(counts: list[tuple[str, int]], more: Mapping[str, str] = MappingProxyType({})) -> str:
    rows = (f"<tr><td>{n}</td><td>{escape(what)}</td><td>{escape(more.get(what, ''))}</td></tr>" for what, n in counts)
    return f"<table>{''.join(rows)}</table>\n"


def _where(source: str) -> str:
    return f'<span class="where">{escape(short(source))}</span>' if source else ""
