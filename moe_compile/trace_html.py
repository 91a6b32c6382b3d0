"""A trace as one HTML document: no script, nothing loaded from elsewhere. Long texts fold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING

from ._version import __version__
from .html import document, where
from .reported import Report
from .table import render
from .trace_text import difference, laws, refusals

if TYPE_CHECKING:
    from .passes.trace import Entry, Stage, Trace, Unit

_LONG = 60  # lines of a text that stands open


def page(report: Report, trace: Trace) -> str:
    """The document."""
    units = trace.units
    links = "".join(f'<li><a href="#u{i}">{escape(u.title)}</a> {_verdict(u)}</li>' for i, u in enumerate(units))
    parts = (
        f"<h1>moe_compile {escape(__version__)}: what each pass made of the model</h1>\n",
        f"<pre>{escape(render(report, 140))}</pre>\n<ul>{links or '<li>No graph reached the passes.</li>'}</ul>\n",
        *(part for i, u in enumerate(units) for part in _unit(u, i)),
    )
    return document("moe_compile trace", "".join(parts))


def _verdict(u: Unit) -> str:
    found = refusals(u)
    if not found:
        return '<span class="good">nothing refused</span>'
    return "".join(f'<div class="bad">✗ {escape(name)}: {escape(reason)} {where(source)}</div>' for name, reason, source in found)


def _unit(u: Unit, number: int) -> Iterator[str]:
    yield f'<h2 id="u{number}">{escape(u.title)} {where(u.source)}</h2>\n{_verdict(u)}\n'
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
    yield f'<div class="entry"><div><code>{escape(e.title)}</code> {where(e.source)}</div>\n'
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
