"""What each pass read and made, as text: what a terminal shows of a trace, and what its page shares with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from textwrap import indent
from typing import TYPE_CHECKING

from .table import short

if TYPE_CHECKING:
    from .passes.trace import Entry, Stage, Trace, Unit

LINES = 40  # of a graph or term, where everything is printed


def text(trace: Trace, stage: str = "") -> str:
    """All passes, with the first lines of long graphs and terms; or one pass in full. Raises ValueError where no pass has that name."""
    check_stage(stage)
    return "\n".join(line for u in trace.units for line in _unit(u, stage))


def stage_names() -> list[str]:
    """Names of the passes in their order; "record" is what a loop did when it was read by example."""
    from .passes.pipeline import PASSES

    return ["record", *(p.name for p in PASSES)]


def check_stage(name: str, given_as: str = "stage") -> None:
    """Raises ValueError for a name that is no pass's and not ""."""
    if name and name not in (names := stage_names()):
        raise ValueError(f"{given_as}: there is no pass {name!r}; the passes are {', '.join(names)}")


def laws() -> dict[str, str]:
    """The law of each rule, by its name."""
    from .passes.terms import NORMAL

    return {r.name: r.law for r in NORMAL}


def refusals(u: Unit) -> list[tuple[str, str, str]]:
    """(pass, first predicate that failed, line of the user's code) of everything in a graph that is left as written."""
    return [(s.name, reason, source) for s in u.stages for reason, source in s.refusals]


def difference(before: str, after: str) -> str:
    """Lines that went (-) and came (+), with a line around them."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1))[2:]
    return "\n".join("  ⋮" if line.startswith("@@") else line for line in lines)


def _unit(u: Unit, stage: str) -> Iterator[str]:
    title = f"{u.title}   {short(u.source)}" if u.source else u.title
    yield f"\n══ {title} {'═' * max(3, 100 - len(title))}"
    for name, reason, source in refusals(u):
        yield f"✗ {name}: {reason}" + (f"   {short(source)}" if source else "")
    for s in u.stages:
        if s.name == stage or s.entries and not stage:
            yield from _stage(s, 10**9 if stage else LINES)


def _stage(s: Stage, limit: int) -> Iterator[str]:
    yield f"\n── {s.name}: {s.says}"
    if not s.entries:
        yield "  no block came this far"
    for e in s.entries:
        yield from _entry(e, limit)
    if s.skipped:
        yield f"  nothing like experts at {sum(s.skipped.values())} other places: {_counts(s.skipped)}"
    if s.rules:
        yield f"  rules fired: {_counts(s.rules)}"


def _entry(e: Entry, limit: int) -> Iterator[str]:
    yield f"\n  • {e.title}" + (f"   {short(e.source)}" if e.source else "")
    if e.before and e.before == e.after:
        yield "    goes on as it is"
    elif e.changes:
        yield _cut(difference(e.before, e.after), limit)
    else:
        for word, text in (("before", e.before), ("after", e.after)):
            if text:
                yield f"    {word}:\n{_cut(text, limit)}"
    for note in e.notes:
        yield indent(note, "    ")
    if e.refusal:
        yield f"    ✗ first failing predicate: {e.refusal}"


def _counts(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{what} ×{n}" for what, n in sorted(counted.items(), key=lambda x: (-x[1], x[0])))


def _cut(text: str, limit: int) -> str:
    lines = text.splitlines()
    if len(lines) > limit:
        lines = [*lines[:limit], f"… {len(lines) - limit} more lines (--stage shows all of a pass, --html everything)"]
    return indent("\n".join(lines), "      ")
