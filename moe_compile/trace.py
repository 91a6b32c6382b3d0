"""How each pass read a model: for whoever brings up a model that declines."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from textwrap import indent
from typing import TYPE_CHECKING, Any

from .explain import explain
from .report import Report
from .table import short

if TYPE_CHECKING:
    from .passes.trace import Entry, Stage, Trace, Unit


WHOLE = "the whole graph"  # title of an entry whose texts are graphs


@dataclass
class Traced:
    """A report and the passes behind it; `str()` is text, `to_html()` one self-contained page."""

    report: Report
    trace: Trace

    def text(self, stage: str = "", limit: int = 40) -> str:
        """All stages, or those of one name. Of a graph with more than `limit` lines the changed ones are shown, or the first `limit`."""
        return "\n".join(_unit(self.trace, stage, limit)) + f"\n\n{self.report}"

    def __str__(self) -> str:
        return self.text()

    def to_html(self) -> str:
        from .trace_html import page

        return page(self)


def trace(model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Traced:
    """As `explain`, with what each pass was given, what it made of it, which rules fired how often, and the first predicate that failed."""
    from .passes import trace as passes

    with passes.collecting() as found:
        report = explain(model, *args, options=options, **kwargs)
    return Traced(report, found)


def _unit(found: Trace, stage: str, limit: int) -> Iterator[str]:
    for u in found.units:
        yield f"══ {u.title} " + "═" * max(0, 100 - len(u.title))
        for s in u.stages:
            if stage in ("", s.name):
                yield from _stage(s, limit if not stage else 10**9)
        if u.refusal:
            yield f"\n✗ left as written: {u.refusal}"


def _stage(s: Stage, limit: int) -> Iterator[str]:
    yield f"\n── {s.name}: {s.says} " + (f"({s.seconds:.3f} s)" if s.seconds else "")
    for e in s.entries:
        yield from _entry(e, limit)
    if s.skipped:
        yield "  elsewhere nothing looks like experts: " + ", ".join(f"{reason} ×{n}" for reason, n in s.skipped.most_common())
    if s.rules:
        yield "  rules fired: " + ", ".join(f"{name} ×{n}" for name, n in s.rules.most_common())


def _entry(e: Entry, limit: int) -> Iterator[str]:
    yield f"\n  • {e.title}" + (f"   {short(e.source)}" if e.source else "")
    if e.before and e.before == e.after:
        yield "    goes on as it is"
    elif e.title == WHOLE:
        yield _cut(difference(e.before, e.after), limit)
    else:
        for word, text in (("before:", e.before), ("after:", e.after)):
            if text:
                yield f"    {word}\n{_cut(text, limit)}"
    for note in e.notes:
        yield indent(note, "    ")
    if e.refusal:
        yield f"    ✗ first failing predicate: {e.refusal}"


def difference(before: str, after: str) -> str:
    """Lines that went (-) and came (+), with a line around them."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1))[2:]
    return "\n".join("  ⋮" if line.startswith("@@") else line for line in lines)


def _cut(text: str, limit: int) -> str:
    lines = text.splitlines()
    if len(lines) > limit:
        lines = [*lines[:limit], f"… {len(lines) - limit} more lines (--stage shows all of a stage, --html everything)"]
    return indent("\n".join(lines), "      ")
