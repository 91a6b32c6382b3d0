"""The golden file: the IR and the verdict of every catalogue entry and zoo model, one line each, compared by every test run.

    make golden          # writes tests/golden.txt anew

A changed line is a decision about the compiler: read the diff, and say in the commit message why it is right.
Fields of the IR that have their default value are left out; in reasons, what is not a matter of the code is written as `…`.
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sympy as sp
import torch

FILE = Path(__file__).with_name("golden.txt")
WRITE = "GOLDEN_WRITE" in os.environ
HOW = "run `make golden`, read the diff of tests/golden.txt, commit it, and say in the commit message why it is right"


def verdict(report: Any) -> str:
    """What a report says of the blocks, as one line: equal blocks once with their number, then what was left and why."""
    told = [*(block(b.ir) + ("" if b.validated else " NOT VALIDATED") for b in report.blocks)]
    told += [f"left[{r.stage}]: {_steady(r.reason)}" for r in report.rejected]
    counts = {t: told.count(t) for t in told}
    return " ++ ".join(f"{n} x {t}" if n > 1 else t for t, n in counts.items()) or "nothing seen"


def block(ir: Any) -> str:
    """One MoeBlock: its routing (or why that is as written), its experts, its shared expert."""
    routing = _text(ir.gating) if ir.gating is not None else f"as written({_steady(ir.routing_note)})"
    return f"fused: {routing} {_text(ir.experts)}" + (f" {_text(ir.shared)}" if ir.shared is not None else "")


def meanings(line: str) -> set[str]:
    """The blocks of a verdict, without why a routing is as written."""
    told = [re.sub(r"^\d+ x ", "", t) for t in line.split(" ++ ")]
    return {re.sub(r"as written\(.*?\) Experts", "as written Experts", t) for t in told if t.startswith("fused: ")}


def _text(value: Any) -> str:
    """A value of the IR; dataclasses by their fields."""
    if dataclasses.is_dataclass(value):
        shown = [(f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value) if f.compare]
        return f"{type(value).__name__}({', '.join(f'{n}={_text(v)}' for n, v, default in shown if v is not default and v != default)})"
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(v) or isinstance(v, enum.Enum) for v in value):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, sp.Expr):  # sympy writes 15 digits of every number
        return re.sub(r"\d+\.\d+(e[-+]?\d+)?", lambda m: repr(float(m[0])), str(value))
    return str(value)


def _steady(reason: str) -> str:
    """A reason without what changes from run to run or torch to torch: measured differences, names of nodes, printed terms."""
    said, colon, term = reason.partition(": ")
    if colon and re.search(r"\w[\[(]", term):
        reason = f"{said}: …"
    reason = re.sub(r"\d\.\d+e[-+]\d+", "…", reason)
    return re.sub(r"\b[a-z][a-z0-9_]*_\d+\b|\b[a-z]\d+\b", "…", reason)


def rows() -> dict[str, str]:
    """Key -> verdict, as the file has them."""
    text = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    return dict(line.split("\t", 1) for line in text.splitlines())


def problem(key: str, found: str) -> str:
    """How the file's line disagrees with what was found, and what to do; in writing mode the line is put right instead."""
    if WRITE:
        _put(key, found)
        return ""
    kept = rows().get(key)
    if kept == found:
        return ""
    if kept is None:
        return f"tests/golden.txt has no line for {key}: {HOW}"
    return f"{key} is recovered otherwise than tests/golden.txt says\n  file: {kept}\n  now:  {found}\n{HOW}"


def stale(kind: str, known: Iterable[str]) -> str:
    """What is wrong with lines of a kind ("catalogue", "zoo") that no test stands behind; in writing mode they are taken out."""
    left = sorted({k for k in rows() if k.startswith(f"{kind}/")} - {f"{kind}/{k}" for k in known})
    if WRITE:
        for key in left:
            _put(key, None)
        return ""
    return f"tests/golden.txt has lines that no entry stands behind: {left}; {HOW}" if left else ""


def _put(key: str, found: str | None) -> None:
    """One line of the file, under a lock: several workers write."""
    FILE.touch()
    with FILE.open("r+", encoding="utf-8") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        lines = dict(line.split("\t", 1) for line in f.read().splitlines())
        lines = {k: v for k, v in lines.items() if k != key} | ({} if found is None else {key: found})
        f.seek(0)
        f.truncate()
        f.write("".join(f"{k}\t{v}\n" for k, v in sorted(lines.items())))
