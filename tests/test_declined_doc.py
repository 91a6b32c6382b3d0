"""docs/declined.md has a section for every code that a reason may have, and for nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_STAGE = {"Rejection": 2, "NoExperts": 2, "refuse": 1}  # where the stage stands among the arguments
_NEVER_TOLD = {"draw", "no experts"}  # of a try that is made again, and of a place that nothing was seen at


def _texts(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    """The strings that an expression may be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Name) and node.id in known:
        yield known[node.id]
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body, known)
        yield from _texts(node.orelse, known)


def _constants(tree: ast.Module) -> dict[str, str]:
    found = {}
    for n in tree.body:
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str):
            found |= {t.id: n.value.value for t in n.targets if isinstance(t, ast.Name)}
    return found


def _codes() -> set[str]:
    """The code of each refusal in the package: the one that it is given, else its stage."""
    found = set()
    for folder in ("moe_compile", "passes", "lowering"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            known = _constants(tree) | {"LEAVES": "left graph", "FIND": "find", "NO_EXPERTS": "no experts"}
            for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
                name = getattr(call.func, "id", getattr(call.func, "attr", ""))
                if name not in (*_STAGE, "No"):
                    continue
                words = {k.arg: k.value for k in call.keywords}
                code = words.get("code") or (call.args[1] if name == "No" and len(call.args) > 1 else None)
                given = [t for t in _texts(code, known) if t] if code is not None else []
                at = _STAGE.get(name)
                stage = words.get("stage") or (call.args[at] if at is not None and len(call.args) > at else None)
                found.update(given if given or stage is None else _texts(stage, known))
    return found - _NEVER_TOLD


def test_every_code_has_a_section_and_every_section_a_code() -> None:
    text = (ROOT / "docs" / "declined.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^### `([^`]+)`", text, re.M))
    engine = (ROOT / "passes" / "prove" / "engine.py").read_text(encoding="utf-8")
    told = re.findall(r'\("(\w+)", (?:f?"|str)|^    code = "(\w+)"', engine, re.M)
    codes = _codes() | {"recover"} | {c for pair in told for c in pair if c}  # "recover": of a refusal that names none
    assert sections == codes, f"without a section: {sorted(codes - sections)}; without a code: {sorted(sections - codes)}"


def test_every_section_says_what_it_means_what_to_change_and_when_not_to() -> None:
    text = (ROOT / "docs" / "declined.md").read_text(encoding="utf-8")
    for section in re.split(r"^### ", text, flags=re.M)[1:]:
        assert "**Change**" in section and "**Leave it**" in section, section.splitlines()[0]
