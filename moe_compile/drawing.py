"""A block before and after, drawn: boxes for router, selection, dispatch, experts, combine and shared expert, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .findings import BlockReport

_WIDTH, _HEIGHT, _GAP, _CHARS = 178, 58, 34, 27
_OURS, _THEIRS = "#1a7f4b", "#8a8f98"  # what is fused, what stays as written
STYLE = """
svg.block { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg.block text { fill: var(--ink); } svg.block .small { font-size: 10.5px; opacity: .8; } svg.block rect { fill: var(--box); }
figure { margin: .6rem 0; } figcaption { opacity: .75; }
"""


def before(b: BlockReport) -> str:
    """What the model's author wrote, part by part: each a chain of operations and, in a loop, of kernels."""
    e = b.ir.experts
    each = f"{e.num_experts} experts" + (f" + {e.num_identity} identity" if e.num_identity else "")
    boxes = [
        ("router", "logits l = x · Wᵀ"),
        ("selection", b.formula),
        ("dispatch", "rows of each expert's tokens"),
        (each, b.experts),
        ("combine", "y = Σ w · expert(x)"),
    ]
    return _row(boxes, [False] * 5, b.shared, False)


def after(b: BlockReport) -> str:
    """The fused ops: one for the selection where it was recovered, one for dispatch, experts and combine."""
    op = "experts: dispatch, products, combine"
    routed = b.ir.gating is not None
    boxes = [("router", "logits l = x · Wᵀ"), ("route" if routed else "selection", b.formula), (op, f"{b.experts} · {b.lowering}")]
    return _row(boxes, [False, routed, True], b.shared, "overlapped" in b.shared)


def _row(boxes: Sequence[tuple[str, str]], ours: Sequence[bool], shared: str, shared_ours: bool) -> str:
    widths = [_WIDTH * (2 if len(title) > 22 else 1) for title, _ in boxes]
    x, parts = 36, [_arrow(4, 36, 70)]
    for (title, text), own, w in zip(boxes, ours, widths, strict=True):
        parts.append(_box(x, 40, w, title, text, own))
        parts.append(_arrow(x + w, x + w + _GAP, 70))
        x += w + _GAP
    height = 120
    if shared and shared != "–":
        parts += [_box(36 + _WIDTH + _GAP, 130, 2 * _WIDTH, "shared expert", shared, shared_ours), _around(20, x - 14, 70, 160)]
        height = 205
    return f'<svg class="block" viewBox="0 0 {x + 20} {height}" width="{x + 20}" role="img">{"".join(parts)}</svg>'


def _box(x: int, y: int, w: int, title: str, text: str, ours: bool) -> str:
    colour = _OURS if ours else _THEIRS
    lines = _folded(text, _CHARS * w // _WIDTH)
    small = "".join(f'<text class="small" x="{x + 8}" y="{y + 33 + 13 * i}">{escape(line)}</text>' for i, line in enumerate(lines))
    return (
        f"<g><title>{escape(title)}: {escape(text)}</title>"
        f'<rect x="{x}" y="{y}" width="{w}" height="{_HEIGHT}" rx="6" stroke="{colour}" stroke-width="{2.5 if ours else 1.2}"/>'
        f'<text x="{x + 8}" y="{y + 17}" font-weight="600">{escape(title)}</text>{small}</g>'
    )


def _folded(text: str, width: int) -> list[str]:
    """Two lines of a text at most; the rest is in the box's title."""
    if len(text) <= width:
        return [text]
    cut = text.rfind(" ", 0, width) if " " in text[:width] else width
    rest = text[cut:].strip()
    return [text[:cut], rest if len(rest) <= width else f"{rest[: width - 1]}…"]


def _arrow(x: int, to: int, y: int) -> str:
    return f'<path d="M{x} {y} H{to - 5} m-4 -4 l4 4 l-4 4" fill="none" stroke="{_THEIRS}" stroke-width="1.4"/>'


def _around(x: int, to: int, y: int, below: int) -> str:
    """The way of the shared expert, from the input past all boxes to the sum."""
    left, right = 36 + _WIDTH + _GAP, 36 + 3 * _WIDTH + _GAP
    return (
        f'<path d="M{x} {y} V{below} H{left} M{right} {below} H{to} V{y + 5} m-4 4 l4 -4 l4 4" fill="none" stroke="{_THEIRS}" '
        f'stroke-width="1.4"/><text x="{to - 4}" y="{y - 8}">+</text>'
    )
