"""A report as one HTML document: each block before and after, its formula, the lines of code, reasons, seconds of the passes."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

from ._version import __version__
from .drawing import STYLE, after, before
from .findings import BlockReport, Findings
from .html import code_at, document, where
from .table import totals

_PASSES = ("shadow", "find", "assemble", "lower", "prove", "plan", "emit", "share", "keep", "rewrite", "recall")


def page(report: Findings) -> str:
    """The document."""
    return document("moe_compile report", f"<h1>moe_compile {escape(__version__)}</h1>{fragment(report)}", STYLE)


def fragment(report: Findings) -> str:
    """The same without the page around it, for a notebook."""
    return "".join([f"<p>{escape(totals(report))}</p>", *_blocks(report), *_left(report), *_breaks(report), *_seconds(report)])


def _blocks(report: Findings) -> Iterator[str]:
    for b, same in groupby(report.blocks):
        yield from _block(b, len(list(same)))


def _block(b: BlockReport, count: int) -> Iterator[str]:
    yield f'<h2><span class="good">fused</span> {where(b.source)}{f" × {count}" if count > 1 else ""}</h2>'
    yield f"<p><code>{escape(b.formula)}</code><br><code>{escape(b.experts)}</code>"
    if b.exchange:
        yield f"<br><code>{escape(b.exchange)}</code>"
    yield "" if b.shared == "–" else f"<br>shared: <code>{escape(b.shared)}</code>"
    yield f"<br>{escape(b.target)}: {escape(b.lowering)}{' · proved on probes' if b.validated else ' · not validated'}</p>"
    if b.note:
        yield f"<p>{escape(b.note)}</p>"
    yield f"<figure><figcaption>as written</figcaption>{before(b)}</figure>"
    yield f"<figure><figcaption>as it runs</figcaption>{after(b)}</figure>"
    yield code_at(b.source)


def _left(report: Findings) -> Iterator[str]:
    for (reason, source, code), same in groupby(report.rejected, lambda r: (r.reason, r.source, r.code or r.stage)):
        times = len(list(same))
        yield f'<h2><span class="bad">left as written</span> {where(source)}{f" × {times}" if times > 1 else ""}</h2>'
        yield f'<p class="bad">✗ {escape(reason)} <span class="where">[{escape(code)}]</span></p>{code_at(source)}'


def _breaks(report: Findings) -> Iterator[str]:
    if report.graph_breaks:
        yield "<h2>graph breaks</h2>"
    for b in report.graph_breaks:
        yield f"<p>{where(b.source)}: {escape(b.reason)}</p>{code_at(b.source)}"
    if report.notes:
        yield "<h2>notes</h2>" + "".join(f"<p>{escape(n)}</p>" for n in report.notes)


def _seconds(report: Findings) -> Iterator[str]:
    known = {k: report.seconds[k] for k in (*_PASSES, "validate", "passes", "total") if k in report.seconds}
    if not known:
        return
    most = max(known.values()) or 1.0
    yield "<h2>seconds</h2><table>"
    for name, s in known.items():
        bar = f'<svg width="204" height="10"><rect width="{max(1, round(200 * s / most))}" height="10" fill="#1a7f4b"/></svg>'
        yield f"<tr><td>{escape(name)}</td><td>{s:.3f}</td><td>{bar}</td></tr>"
    yield "</table>"
