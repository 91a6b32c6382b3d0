"""Where a node comes from in the user's code, and what it is called there."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
import torch.fx as fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_PART = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_LOCAL = re.compile(r"^[LG]\['([^']+)'\]")
_ARGUMENT = re.compile(r"^args\[(\d+)\]$")  # of the frame that capture puts around a module
_TORCH = os.path.dirname(torch.__file__) + os.sep
_LONG = 80


def frames(n: Any) -> list[tuple[str, str]]:
    """(file, line) of the user's calls that made a node, the innermost last."""
    trace = n.meta.get("stack_trace") if isinstance(n, fx.Node) else None
    found = _FRAME.findall(trace or "")
    return [f for f in found if not f[0].startswith(_TORCH)] or found


def source_of(n: Any) -> str:
    """file:line of the innermost frame of the user's code that made a node, or ""."""
    found = frames(n)
    return ":".join(found[-1]) if found else ""


def block_source(out: fx.Node, choice: fx.Node | None) -> str:
    """The line of the function that holds both the routing and the experts: where their stacks part."""
    a, b = frames(out), frames(choice)
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    frame = a[min(common, len(a) - 1)] if a else None
    return ":".join(frame) if frame else ""


def code_of(n: Any) -> str:
    """What the user wrote for a node: the marked part of its line, or the whole line; "" where the text is not known."""
    trace = n.meta.get("stack_trace") if isinstance(n, fx.Node) else None
    lines = (trace or "").rstrip().splitlines()
    if not lines or _FRAME.search(lines[-1]):
        return ""
    marks = lines[-1]
    if set(marks.strip()) <= set("^~") and len(lines) > 1:
        text = lines[-2]
        start, end = len(marks) - len(marks.lstrip()), len(marks)
        return _short(_closed(text[start:end]) if end <= len(text) else text)
    return _short(marks)


def _closed(text: str) -> str:
    """The text up to the first bracket that closes nothing in it, or to the statement's end: marks reach too far at times."""
    depth, quote = 0, ""
    for i, c in enumerate(text):
        if quote or c in "'\"":
            quote = "" if c == quote else quote or c
            continue
        depth += (c in "([{") - (c in ")]}")
        if depth < 0 or c == ";" and depth == 0:
            return text[:i]
    return text


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def input_name(n: fx.Node) -> str:
    """What the user calls an input of Dynamo's graph: `self.experts.up`, `x`; "" where that is not known."""
    source = getattr(n.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    try:
        text = str(name() if callable(name) else name)
    except NotImplementedError:
        return ""
    text = _LOCAL.sub(r"\1", _PART.sub(r".\1", text)).replace(".__self__", "")  # of a method that is compiled, whose it is
    return _ARGUMENT.sub(lambda m: "the input" if m[1] == "0" else f"argument {int(m[1]) + 1}", text)
