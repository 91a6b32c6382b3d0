"""The contract of the house: which room may import which, no circles, no long files or functions. Part of `make lint`.

Imports inside functions count as well: a lazy import hides a circle, it does not remove it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOOR = "door"  # whatever users touch: everything in moe_compile/ that stands in no room

# room -> what it may import; a room may always import itself
MAY = {
    "ir": set(),
    "calls": set(),
    "errors": {"ir"},
    "terms": {"ir"},
    "aten": {"terms", "ir", "calls"},
    "recover": {"aten", "terms", "ir", "calls"},
    "rewrite": {"recover", "aten", "terms", "ir", "calls", "ops"},
    "prove": {"rewrite", "recover", "aten", "terms", "ir", "calls", "ops"},
    "passes": {"prove", "rewrite", "recover", "aten", "terms", "ir", "calls", "ops"},
    "loops": {"passes", "prove", "rewrite", "recover", "aten", "terms", "ir", "calls", "ops"},
    "ops": {"ir", "reference"},
    "reference": {"ir"},
    "target": {"ir", "ops"},
    "lowering": {"target", "ir", "ops"},
    "cpu": {"ir", "errors", "ops", "target", "reference"},
    "triton": {"ir", "errors", "ops", "target", "reference"},
    "ascend": {"ir", "errors", "calls", "ops", "target", "reference"},
}
# What still breaks the directions; nothing is added here
OWED: set[tuple[str, str]] = set()
OWED_FILES: dict[str, int] = {}
OWED_FUNCTIONS: set[str] = set()
TARGETS = {"target", "reference", "cpu", "triton", "ascend"}
PASSES = {"terms", "aten", "recover", "prove", "rewrite"}


def files() -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for top in ("moe_compile", "passes", "lowering"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if top == "moe_compile" else ("moe_compile", *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def room(module: str) -> str:
    parts = module.split(".")[1:]
    if parts[:1] == ["passes"]:
        return parts[1] if parts[1:] and parts[1] in PASSES else "passes"
    if parts[:1] == ["lowering"]:
        return parts[1] if parts[1:] and parts[1] in TARGETS else "lowering"
    return parts[0] if parts and parts[0] in ("ir", "calls", "errors", "loops", "ops") else DOOR


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports, at the top or in a function."""
    known = files()
    out: dict[str, set[str]] = {}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        out[name] = {m for m in _imported(ast.parse(path.read_text()), package, set(known)) if m != name}
    return out


def _imported(tree: ast.AST, package: str, known: set[str]) -> Iterator[str]:
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from (a.name for a in n.names if a.name in known)
        elif isinstance(n, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - n.level + 1] if n.level else []
            base = ".".join([*up, *([n.module] if n.module else [])])
            for a in n.names:
                module = f"{base}.{a.name}" if f"{base}.{a.name}" in known else base
                if module in known:
                    yield module


def test_directions():
    wrong = {
        (room(a), room(b)): f"{a} imports {b}"
        for a, bs in imports().items()
        for b in bs
        if room(a) != DOOR and room(b) not in (MAY[room(a)] | {room(a)})
    }
    unknown = {pair: text for pair, text in wrong.items() if pair not in OWED}
    assert not unknown, unknown


def circles() -> list[set[str]]:
    """Groups of modules that import each other (Tarjan's algorithm). A package's own __init__ gathers its modules and is left out."""
    graph = {m: {x for x in ms if not m.startswith(x + ".")} for m, ms in imports().items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(v: str) -> None:
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in graph[v]:
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            group = set()
            while True:
                w = stack.pop()
                group.add(w)
                if w == v:
                    break
            if len(group) > 1:
                found.append(group)

    for v in graph:
        if v not in index:
            visit(v)
    return found


def test_no_circles():
    assert not circles()


@pytest.mark.parametrize("folder", ["moe_compile", "passes", "lowering"])
def test_no_long_files(folder):
    long = {str(p.relative_to(ROOT)): n for p in (ROOT / folder).rglob("*.py") if (n := len(p.read_text().splitlines())) > 350}
    unknown = {f: n for f, n in long.items() if n > OWED_FILES.get(f, 0)}
    assert not unknown, unknown


@pytest.mark.parametrize("folder", ["moe_compile", "passes", "lowering"])
def test_no_long_functions(folder):
    """Device kernels apart: one kernel is one function."""
    long = {}
    for p in (ROOT / folder).rglob("*.py"):
        for n in ast.walk(ast.parse(p.read_text())):
            if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= 40 and not any("jit" in ast.dump(d) for d in n.decorator_list):
                long[f"{p.relative_to(ROOT)}:{n.name}"] = n.end_lineno - n.lineno + 1
    unknown = {f: n for f, n in long.items() if f not in OWED_FUNCTIONS}
    assert not unknown, unknown
